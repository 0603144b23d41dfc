"""Connections that are behind in the history of an audience, and are sent what they missed until they are not."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from time import monotonic
from typing import Any, Protocol

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.frames import Batch
from wsbroadcast.delivery.slow_consumers import NOBODYS
from wsbroadcast.history import LAST, NOW, Reason, Recovery, Since
from wsbroadcast.logs import about, logger
from wsbroadcast.node.tail import Stretch, Tail, batch_of
from wsbroadcast.node.tails import Tails
from wsbroadcast.publication import MAX_OFFSET, Position, Publication
from wsbroadcast.stats import Counters

# How many connections are sent something in one turn of the event loop: what is live goes between the turns.
_TURN_CURSORS = 64


Announce = Callable[[Recovery, Position | None], None]


class Replayer(Protocol):
    """What the replays ask of their node."""

    @property
    def has_hooks(self) -> bool:
        """Whether `on_deliver` hooks have to be asked."""

    async def replay_through_hooks(
        self, publication: Publication, connection: Connection, has_room: Callable[[], Awaitable[bool]]
    ) -> None:
        """Ask the hooks about a publication that a connection missed, and hand it over; raises what a hook raises."""

    def lost_track(self, audience: Audience, connection: Connection, reason: Reason) -> None:
        """A connection was promised what isn't there any more; it is a member where the audience is now."""


class Cursor:
    """A connection that is behind in an audience, and where it is."""

    __slots__ = ("audience", "began", "connection", "epoch", "is_busy", "offset")

    def __init__(self, connection: Connection, audience: Audience) -> None:
        self.connection = connection
        self.audience = audience
        self.began = 0.0
        """When it said where it was, by the monotonic clock; 0 for one that was never away."""
        self.epoch = ""
        """That of its offset; empty as long as it hasn't begun."""
        self.offset = 0
        """It has got everything up to here."""
        self.is_busy = False
        """Whether its next step is scheduled already, or waits for its sink or for hooks."""


class Replays:
    """The connections of one node that are behind.

    Such a connection is in the registry, and left out when its audience is delivered to. It is sent what came since, as
    fast as its sink takes it. It is a member like others from the turn of the event loop in which it has reached the
    place up to which the members have got everything. So it gets every publication once, and nothing is kept for it.

    Args:
        node: Asks hooks.
        tails: Have what was missed.
        dispatcher: Hands over what is live.
        counters: Where recoveries are counted.
    """

    def __init__(self, node: Replayer, tails: Tails, dispatcher: Dispatcher[Connection], counters: Counters) -> None:
        self._node = node
        self._tails = tails
        self._dispatcher = dispatcher
        self._counters = counters
        self.cursors: dict[Audience, dict[Connection, Cursor]] = {}
        """Those that are behind, by audience."""
        self._ready: deque[Cursor] = deque()
        self._is_scheduled = False
        self._tasks = Tasks()

    def behind(self, audience: Audience) -> Collection[Connection]:
        """Return the connections that are behind in an audience: they get nothing live."""
        return self.cursors.get(audience, ())

    def is_held(self, connection: Connection, audience: Audience) -> bool:
        """Tell whether a connection has yet to be told where it begins."""
        cursor = self.cursors.get(audience, {}).get(connection)
        return cursor is not None and not cursor.epoch

    def place(self, connection: Connection, audience: Audience) -> Position | None:
        """Return up to where a member has got everything; `None` if it isn't known."""
        cursor = self.cursors.get(audience, {}).get(connection)
        return self._position(audience) if cursor is None else Position(cursor.epoch, cursor.offset)

    # In and out.

    def hold(self, connection: Connection, audience: Audience) -> None:
        """Let a connection that is about to be a member get nothing yet: it says in `start` since when."""
        self._dispatcher.flush()
        self.cursors.setdefault(audience, {})[connection] = Cursor(connection, audience)

    async def start(self, connection: Connection, audience: Audience, since: Since, announce: Announce) -> Recovery:
        """Send a connection that is held what it missed; return, before all of it is sent, whether that can be done.

        If it can't, the connection is a member from now on, where the audience is now.

        Args:
            connection: Which.
            audience: In which audience.
            since: Where it was.
            announce: Called with what is returned, and with the position from which messages follow, before any does.
        """
        began = monotonic()
        cursor = self.cursors.get(audience, {}).get(connection)
        if cursor is None:
            recovery, begins = Recovery(False, "unavailable", self._position(audience)), None
        else:
            recovery, begins = await self.locate(audience, since)
        if begins is None:
            if since is not NOW:
                self._counters.refused_recoveries[recovery.reason] += 1
            if cursor is not None:
                self._join(cursor)
            announce(recovery, recovery.position)
        else:
            assert cursor is not None
            cursor.epoch, cursor.offset = begins.epoch, begins.offset
            announce(recovery, begins)
            if since is not NOW:
                cursor.began = began
            self._schedule(cursor)
        return recovery

    def _position(self, audience: Audience) -> Position | None:
        tail = self._tails.of(audience)
        return None if tail is None else tail.delivered_position

    async def locate(self, audience: Audience, since: Since) -> tuple[Recovery, Position | None]:
        """Find out whether everything since a place can be had; return the place too, if it can.

        It can be had from here for a while.
        """
        tail = self._tails.of(audience)
        if tail is None and self._tails.history(audience) is None:
            return Recovery(False, "not_kept", None), None
        if tail is None or not await self._is_near(tail, audience, since):
            return Recovery(False, "unavailable", self._position(audience)), None
        if since is NOW:
            offset = tail.delivered
        elif since is LAST:
            offset = tail.before_last()
        elif since.epoch != tail.epoch or since.offset > tail.top:
            return Recovery(False, "epoch", tail.delivered_position), None
        elif not await self._has(tail, audience, since.offset):
            return Recovery(False, tail.why_not(since.offset), tail.delivered_position), None
        else:
            offset = since.offset
        tail.promised = min(tail.promised, offset)
        return Recovery(True, "", tail.position), Position(tail.epoch, offset)

    async def _is_near(self, tail: Tail, audience: Audience, since: Since) -> bool:
        # Who is ahead may have been at a node that heard more; a history that was forgotten, too.
        if tail.is_reading:
            await self._tails.attempted(audience)
        is_elsewhere = isinstance(since, Position) and (since.epoch != tail.epoch or since.offset > tail.top)
        if is_elsewhere and tail.epoch and not await self._tails.read_on(audience, tail):
            return False
        return bool(tail.epoch) and self._tails.of(audience) is tail

    async def _has(self, tail: Tail, audience: Audience, offset: int) -> bool:
        if offset < tail.base and tail.is_shrunk:
            await self._tails.refill(audience, tail)
        return tail.has(offset, asyncio.get_running_loop().time())

    def fall_back(self, connection: Connection, audience: Audience, offset: int) -> bool:
        """Let a member whose sink is full go on after an offset when there is room; return whether that can be done."""
        tail = self._tails.of(audience)
        if tail is None or not tail.epoch:
            return False
        some = self.cursors.setdefault(audience, {})
        if connection not in some:
            cursor = some[connection] = Cursor(connection, audience)
            cursor.epoch, cursor.offset, cursor.is_busy = tail.epoch, offset, True
            tail.promised = min(tail.promised, offset)
            connection._sink.when_drained(lambda: self._schedule(cursor))
        return True

    def left(self, connection: Connection, audience: Audience | None = None) -> None:
        """Forget a connection that has left an audience, or all."""
        for each in [audience] if audience is not None else list(self.cursors):
            self._forget(each, connection)

    def _forget(self, audience: Audience, connection: Connection) -> None:
        some = self.cursors.get(audience)
        if some is not None and some.pop(connection, None) is not None and not some:
            del self.cursors[audience]
            if (tail := self._tails.of(audience)) is not None:
                tail.promised = MAX_OFFSET

    def _join(self, cursor: Cursor) -> None:
        self._dispatcher.flush()  # what was handed over for the members comes before
        self._forget(cursor.audience, cursor.connection)

    def moved(self, audience: Audience) -> None:
        """Let those go on who wait for the place up to which the members have got everything."""
        for cursor in self.cursors.get(audience, {}).values():
            if cursor.epoch and not cursor.is_busy:
                self._schedule(cursor)

    def broken(self, audience: Audience) -> None:
        """The tail has begun anew: who was behind has missed something, and is a member from now on."""
        for cursor in list(self.cursors.get(audience, {}).values()):
            if cursor.epoch:
                self._join(cursor)

    def _lose(self, cursor: Cursor, reason: Reason) -> None:
        self._join(cursor)
        self._node.lost_track(cursor.audience, cursor.connection, reason)

    # Step by step.

    def _is_behind(self, cursor: Cursor) -> bool:
        return self.cursors.get(cursor.audience, {}).get(cursor.connection) is cursor

    def _schedule(self, cursor: Cursor) -> None:
        cursor.is_busy = True
        self._ready.append(cursor)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn, context=NOBODYS)

    def _turn(self) -> None:
        self._is_scheduled = False
        self._dispatcher.flush()
        for _ in range(min(_TURN_CURSORS, len(self._ready))):
            cursor = self._ready.popleft()
            cursor.is_busy = False
            if self._is_behind(cursor):
                self._step(cursor)
        if self._ready and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn, context=NOBODYS)

    def _step(self, cursor: Cursor) -> None:
        tail = self._tails.of(cursor.audience)
        if tail is None or tail.epoch != cursor.epoch:
            self._lose(cursor, "epoch")
        elif cursor.offset >= tail.delivered:
            # Else it waits for `moved`: it is settled already who gets what is being delivered, or it is ahead.
            if cursor.offset == tail.delivered and not self._tails.deliveries.is_in_flight(cursor.audience):
                self._join(cursor)
                if cursor.began:
                    self._counters.recoveries += 1
                    self._counters.recovery_seconds.observe(monotonic() - cursor.began)
        elif not tail.has_all_after(cursor.offset):
            self._lose(cursor, tail.why_not(cursor.offset))
        elif cursor.connection._sink.backlog is not None:
            self._go_on(cursor)  # it may be behind in many audiences, whose stretches together are more than fits
        elif self._node.has_hooks:
            cursor.is_busy = True
            replaying = self._replay_through_hooks(cursor, tail.after(cursor.offset))
            self._tasks.spawn(replaying, "replay", cursor.connection._transport.context)
        else:
            self._send(cursor, tail)

    def _send(self, cursor: Cursor, tail: Tail) -> None:
        connection = cursor.connection
        stretch = tail.after(cursor.offset)
        cursor.offset = stretch.end
        batch = stretch.batch
        if batch is not None and stretch.withholds:
            batch = _without_withheld(batch, connection)
        if batch is not None:
            self._dispatcher.deliver_batch(batch, connection)
        self._go_on(cursor)

    def _go_on(self, cursor: Cursor) -> None:
        if cursor.connection._sink.backlog is None:
            self._schedule(cursor)
        else:
            cursor.is_busy = True
            cursor.connection._sink.when_drained(lambda: self._schedule(cursor))

    async def _replay_through_hooks(self, cursor: Cursor, stretch: Stretch) -> None:
        await self._tasks.begun()
        for publication in () if stretch.batch is None else stretch.batch.publications:
            try:
                if not _is_withheld(publication, cursor.connection):
                    has_room = partial(self._has_room, cursor)
                    await self._node.replay_through_hooks(publication, cursor.connection, has_room)
            except Exception:
                logger.exception(
                    "a message was not delivered", extra=about("delivery.failed", audience=publication.audience.kind)
                )
                await self._tell_withheld(cursor, publication)
            if not self._is_behind(cursor):
                return
        cursor.offset = stretch.end
        self._go_on(cursor)

    async def _has_room(self, cursor: Cursor) -> bool:
        # Hooks of many audiences may come to their end at once, for one connection.
        sink = cursor.connection._sink
        while self._is_behind(cursor) and sink.is_half_full:
            drained = asyncio.Event()
            sink.when_drained(drained.set)
            await drained.wait()
        return self._is_behind(cursor)

    async def _tell_withheld(self, cursor: Cursor, publication: Publication) -> None:
        if cursor.connection._sink.has_positions and await self._has_room(cursor):
            self._dispatcher.flush()
            self._dispatcher.deliver_batch(batch_of([publication.withheld()]), cursor.connection)

    async def aclose(self) -> None:
        """End: nobody is sent anything more."""
        self.cursors.clear()
        self._ready.clear()
        await self._tasks.cancel()


def _without_withheld(batch: Batch[Any], connection: Connection) -> Batch[Any] | None:
    some: list[Publication] = []
    for publication in batch.publications:
        if not _is_withheld(publication, connection):
            some.append(publication)
        elif connection._sink.has_positions:
            some.append(publication.withheld())
    return batch_of(some) if some else None


def _is_withheld(publication: Publication, connection: Connection) -> bool:
    return connection.id in publication.exclude or connection._user_key in publication.exclude_users
