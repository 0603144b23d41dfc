"""Replays: connections that are behind in the history of an audience are sent what they missed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from time import monotonic
from typing import Any, Protocol

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.frames import Batch
from wsbroadcast.delivery.slow_consumers import NOBODYS
from wsbroadcast.history import FIRST, LAST, NOW, Offset, Reason, Recovery, Since
from wsbroadcast.logs import about, logger
from wsbroadcast.node.tail import Stretch, Tail, batch_of
from wsbroadcast.node.tails import Tails
from wsbroadcast.publication import MAX_OFFSET, Position, Publication
from wsbroadcast.stats import Counters

# How many connections are sent something in one turn of the event loop. New publications go out between the turns.
_TURN_CURSORS = 64


Announce = Callable[[Recovery, Position | None, Sequence[Publication]], None]
"""Tells a client whether it gets what it missed, the position after which publications follow, and the first ones."""

Found = tuple[Recovery, Position | None]
"""Whether everything after a place can be had; and the position of that place, `None` if it can't."""


class Replayer(Protocol):
    """What the replays need of their node."""

    @property
    def has_hooks(self) -> bool:
        """Whether `on_deliver` hooks have to run."""

    async def replay_through_hooks(
        self, publication: Publication, connection: Connection, has_room: Callable[[], Awaitable[bool]]
    ) -> None:
        """Run the hooks for a publication that a connection missed, and hand it over; raise what a hook raises."""

    def lost_track(self, audience: Audience, connection: Connection, reason: Reason) -> None:
        """Take note that what a connection was promised is gone. It goes on where the audience is now."""


class Cursor:
    """A connection that is behind in an audience, and its position there."""

    __slots__ = ("audience", "began", "connection", "epoch", "is_busy", "offset")

    def __init__(self, connection: Connection, audience: Audience) -> None:
        self.connection = connection
        self.audience = audience
        self.began = 0.0
        """When it told its position, in seconds of the monotonic clock; 0 if it was never away."""
        self.epoch = ""
        """The epoch of its offset; empty before it begins."""
        self.offset = 0
        """The offset up to which it has got everything."""
        self.is_busy = False
        """Whether its next step is scheduled already, or waits for its sink or for hooks."""


class Replays:
    """The connections of one node that are behind.

    Such a connection is in the registry, but new publications aren't delivered to it. It is sent what it missed, as
    fast as its sink takes it. Once it has got as much as the other connections of the audience, it gets new
    publications like them, from the same turn of the event loop on. So it gets each publication once, and none is
    stored for it.

    Args:
        node: Runs the hooks.
        tails: Have what was missed.
        dispatcher: Hands over new publications.
        counters: Where recoveries are counted.
    """

    def __init__(self, node: Replayer, tails: Tails, dispatcher: Dispatcher[Connection], counters: Counters) -> None:
        self._node = node
        self._tails = tails
        self._dispatcher = dispatcher
        self._counters = counters
        self.cursors: dict[Audience, dict[Connection, Cursor]] = {}
        """The connections that are behind, by audience."""
        self._ready: deque[Cursor] = deque()
        self._is_scheduled = False
        self._tasks = Tasks()

    def behind(self, audience: Audience) -> Collection[Connection]:
        """Return the connections that are behind in an audience. They get no new publications."""
        return self.cursors.get(audience, ())

    def is_held(self, connection: Connection, audience: Audience) -> bool:
        """Tell whether a connection has yet to be told where it begins."""
        cursor = self.cursors.get(audience, {}).get(connection)
        return cursor is not None and not cursor.epoch

    def place(self, connection: Connection, audience: Audience) -> Position | None:
        """Return the position up to which a connection has got everything; `None` if it isn't known."""
        cursor = self.cursors.get(audience, {}).get(connection)
        return self._position(audience) if cursor is None else Position(cursor.epoch, cursor.offset)

    # In and out.

    def hold(self, connection: Connection, audience: Audience) -> None:
        """Send a new connection nothing of an audience until `start` says where it begins."""
        self._dispatcher.flush()
        self.cursors.setdefault(audience, {})[connection] = Cursor(connection, audience)

    async def start(
        self, connection: Connection, audience: Audience, since: Since, announce: Announce, carries: int = 0
    ) -> Recovery:
        """Send a held connection what it missed; return whether that can be done. The sending goes on after that.

        If it can't be done, the connection begins where the audience is now.

        Args:
            connection: The connection.
            audience: The audience.
            since: The place after which it wants what it missed.
            announce: Called with the result before anything is sent.
            carries: How many bytes of missed publications `announce` takes.
        """
        began = monotonic()
        if self.cursors.get(audience, {}).get(connection) is None:
            found: Found = Recovery(False, "unavailable", self._position(audience)), None
        else:
            found = await self.locate(audience, since)
        return self.begin(connection, audience, since, found, announce, carries, began)

    def begin(
        self,
        connection: Connection,
        audience: Audience,
        since: Since,
        found: Found,
        announce: Announce,
        carries: int,
        began: float,
    ) -> Recovery:
        """Do the same as `start` at once, with the result of `locate`; `began` is when that was asked."""
        cursor = self.cursors.get(audience, {}).get(connection)
        recovery, begins = found
        if cursor is None:
            begins = None  # the connection has left meanwhile
        if begins is None:
            if since is not NOW:
                self._counters.refused_recoveries[recovery.reason] += 1
            if cursor is not None:
                self._join(cursor)
            announce(recovery, recovery.position, ())
        else:
            assert cursor is not None
            cursor.epoch, cursor.offset = begins.epoch, begins.offset
            announce(recovery, begins, () if since is NOW or not carries else self._head(cursor, carries))
            if since is not NOW:
                cursor.began = began
            self._schedule(cursor)
        return recovery

    def _head(self, cursor: Cursor, most: int) -> list[Publication]:
        # Returns the first missed publications, of at most so many bytes, and moves the cursor after them. It returns
        # none if there are hooks, because hooks may have to wait.
        tail = self._tails.of(cursor.audience)
        missed: list[Publication] = []
        while not self._node.has_hooks and tail is not None and tail.epoch == cursor.epoch:
            if cursor.offset >= tail.delivered or not tail.has_all_after(cursor.offset):
                break
            stretch = tail.after(cursor.offset)
            publications = [] if stretch.batch is None else stretch.batch.publications
            most -= sum(each.size for each in publications)
            if most < 0:
                break
            missed += [each for each in publications if not _is_withheld(each, cursor.connection)]
            cursor.offset = stretch.end
        return missed

    def _position(self, audience: Audience) -> Position | None:
        tail = self._tails.of(audience)
        return None if tail is None else tail.delivered_position

    async def locate(self, audience: Audience, since: Since) -> Found:
        """Find out whether everything after a place can be had; return the position of the place too, if it can.

        What was found stays available on this node for a while.
        """
        tail = self._tails.of(audience)
        if isinstance(since, Offset):
            if tail is not None and tail.is_reading:
                await self._tails.attempted(audience)
            since = Position("" if tail is None else tail.epoch, int(since))
        if tail is None and self._tails.history(audience) is None:
            return Recovery(False, "not_kept", None), None
        if tail is None or not await self._is_near(tail, audience, since):
            return Recovery(False, "unavailable", self._position(audience)), None
        if since is NOW:
            offset = tail.delivered
        elif since is LAST:
            offset = tail.before_last()
        elif since is FIRST:
            offset = tail.base
        elif since.epoch != tail.epoch or since.offset > tail.top:
            return Recovery(False, "epoch", tail.delivered_position), None
        elif not await self._has(tail, audience, since.offset):
            return Recovery(False, tail.why_not(since.offset), tail.delivered_position), None
        else:
            offset = since.offset
        tail.promised = min(tail.promised, offset)
        return Recovery(True, "", tail.position), Position(tail.epoch, offset)

    async def _is_near(self, tail: Tail, audience: Audience, since: Since) -> bool:
        # A client that is ahead may have been at a node that got more, or in a history that was removed.
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
        """Let a connection with a full sink go on after an offset once it has room; return whether that can be done."""
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
        """Forget a connection that has left an audience, or all audiences."""
        for each in [audience] if audience is not None else list(self.cursors):
            self._forget(each, connection)

    def _forget(self, audience: Audience, connection: Connection) -> None:
        some = self.cursors.get(audience)
        if some is not None and some.pop(connection, None) is not None and not some:
            del self.cursors[audience]
            if (tail := self._tails.of(audience)) is not None:
                tail.promised = MAX_OFFSET

    def _join(self, cursor: Cursor) -> None:
        self._dispatcher.flush()  # what was handed over for the other connections comes first
        self._forget(cursor.audience, cursor.connection)

    def moved(self, audience: Audience) -> None:
        """Let connections go on that wait for the position up to which the others have got everything."""
        for cursor in self.cursors.get(audience, {}).values():
            if cursor.epoch and not cursor.is_busy:
                self._schedule(cursor)

    def broken(self, audience: Audience) -> None:
        """Take note that a tail has begun anew. Connections that were behind have missed something, and go on there."""
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
            # If not, it waits for `moved`: the recipients of the running delivery are fixed already, or it is ahead.
            if cursor.offset == tail.delivered and not self._tails.deliveries.is_in_flight(cursor.audience):
                self._join(cursor)
                if cursor.began:
                    self._counters.recoveries += 1
                    self._counters.recovery_seconds.observe(monotonic() - cursor.began)
        elif not tail.has_all_after(cursor.offset):
            self._lose(cursor, tail.why_not(cursor.offset))
        elif cursor.connection._sink.backlog is not None:
            self._go_on(cursor)  # it may be behind in many audiences, whose stretches don't all fit at once
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
        # The hooks of many audiences may end at the same time for one connection.
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
        """End. No connection is sent anything more."""
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
