"""Presence on one node: tells the broker who is in its channels, and tells hooks and clients who is anywhere."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import Context
from heapq import heappop, heappush
from itertools import starmap
from typing import Any

from pydantic_core import to_json

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import KeepsPresence
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.exceptions import EncodeError, EngineError
from wsbroadcast.hooks import HookChain, HookEvent
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.message import Message
from wsbroadcast.node.watching import Present, Say, Watches
from wsbroadcast.presence import (
    ANONYMOUS,
    ONLINE,
    Member,
    Members,
    Presence,
    PresenceRules,
    by_user,
    channels_shown,
    is_hidden,
    members_of,
)
from wsbroadcast.publication import PresenceChange, Publications
from wsbroadcast.stats import Counters

# About how often, in seconds, a node sweeps. Each pause is random, so that nodes don't sweep at the same moment.
_SWEEP_SECONDS = 2.0

# Seconds until something is tried again that has failed: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0

# Stands in place of a seat's info if the outcome of a step isn't known: it is on its way, or the broker was lost
# meanwhile. No info has this value.
_MAYBE = b"\0"

# How many members one step enters at most, with how many bytes of info, which a broker's form may make three times as
# long; and how many channels are changed at the same time.
_MEMBERS_AT_ONCE = 500
_INFO_BYTES_AT_ONCE = 128 * 1024
_CHANNELS_AT_ONCE = 32

# For how many seconds a change may still arrive from a step whose outcome isn't known.
_UNKNOWN_SECONDS = 10.0

# For how many seconds the end of a node waits for the broker.
_END_SECONDS = 2.0


class Seat:
    """One member in one channel on this node."""

    __slots__ = ("connections", "info", "known", "leaves_at")

    def __init__(self) -> None:
        self.connections = 0
        """How many connections of the member are in the channel here."""
        self.info = b""
        """What others see of the member."""
        self.known: bytes | None = None
        """The info that the broker has from this node; `None` if it has none, `_MAYBE` if that isn't known."""
        self.leaves_at: float | None = None
        """If it has no connections: when its grace is over, in seconds of the event loop's clock."""

    def is_taken(self, now: float) -> bool:
        """Tell whether the member is in the channel on this node."""
        return self.connections > 0 or (self.leaves_at is not None and self.leaves_at > now)


class Unknown:
    """Steps in one channel whose outcome isn't known."""

    __slots__ = ("keys", "told", "until")

    def __init__(self) -> None:
        self.keys = set[str]()
        """The members that the steps were about."""
        self.told = set[int]()
        """The versions of changes that hooks were told of since then."""
        self.until = 0.0
        """When the steps are forgotten, in seconds of the event loop's clock."""

    def has_made(self, change: PresenceChange) -> bool:
        """Tell whether one of these steps made a change of this incarnation. If not, another node has swept it."""
        return self.keys.issuperset(change.joined) and self.keys.issuperset(change.left)


class NodePresence:
    """Tells the broker who is in the channels here, and tells hooks and clients who is in them on any node.

    `_here` has the wanted state. One task at a time brings the broker to this state. It tries again until that is done,
    because each step may be repeated.

    Args:
        engine: Knows who is in which channel.
        lease: The lease of this node, under which its members are entered.
        rules: Which channels know who is in them.
        hooks: Are told who joins and leaves, on the node where it happens.
        tasks: Run in the background.
        counters: Where failures of `info` are counted.
        say: Sends connections a message of their protocol.
    """

    def __init__(
        self,
        engine: KeepsPresence,
        lease: LeaseKeeper,
        rules: PresenceRules,
        hooks: HookChain,
        tasks: Tasks,
        counters: Counters,
        say: Say,
    ) -> None:
        self._engine = engine
        self._lease = lease
        self.rules = rules
        """Which channels know who is in them."""
        self._hooks = hooks
        self._tasks = tasks
        self._counters = counters
        self.watches = Watches(self.read, say, tasks)
        """The clients that are told who is in a channel."""
        self._throttle = Throttle()
        self._here: dict[str, dict[str, Seat]] = {}
        # The channels in which each connection counts.
        self._seated: dict[Present, set[str]] = {}
        # By channel, the members for which the broker may have another state than `_here`.
        self._dirty: dict[str, set[str]] = {}
        # By channel, the steps whose outcome isn't known. The change that comes from the broker tells it.
        self._unknown: dict[str, Unknown] = {}
        # When graces end, the first one first. Those that are out of date are skipped.
        self._graces: list[tuple[float, str, str]] = []
        self._grace_timer: asyncio.TimerHandle | None = None
        # The task that holds the lease, sweeps and updates the broker, while anybody is here.
        self._life: asyncio.Task[None] | None = None
        self._wake: asyncio.Event | None = None
        # The generation of the lease under which the members here were entered.
        self._generation = 0
        self._swept_at = 0.0
        self._agreeing = asyncio.Lock()
        # By channel, what hooks have yet to be told.
        self._untold: dict[str, deque[tuple[HookEvent, list[str]]]] = {}
        # Whether it sweeps also while nobody is here.
        self._stands_guard = False
        self._is_ended = False

    def begin(self) -> None:
        """Sweep from now on, if hooks are told who leaves. This may be the only node that is left."""
        if self._hooks.has("on_left"):
            self._stands_guard = True
            self.wake()

    # Connections.

    def came(self, connection: Present, channel: str) -> None:
        """Take note that a connection is in a channel, unless it has left meanwhile. It may be called twice."""
        presence = self.rules.of(channel)
        if self._is_ended or not connection.is_open:
            return
        seated = self._seated.get(connection)
        if seated is None:
            seated = self._seated[connection] = set()
            self._sit(connection, ONLINE)
        if presence is None or channel not in connection.channels or channel in seated:
            return
        seated.add(channel)
        self._sit(connection, channel)
        if presence.by == "connection" and connection._user_key is not None:
            self._sit(connection, by_user(channel))

    def online(self, connection: Present) -> None:
        """Take note that a connection is here, with its channels. It may be called twice."""
        for channel in connection.channels or ("",):
            self.came(connection, channel)

    def went(self, connection: Present, channel: str, *, is_final: bool) -> None:
        """Take note that a connection has left a channel. It may be called twice.

        Args:
            connection: The connection.
            channel: The channel.
            is_final: Whether it left on purpose, so that there is no grace.
        """
        self.watches.end(connection, channel)
        if channel in (seated := self._seated.get(connection, set())):
            seated.remove(channel)
            self._rise(connection, channel, is_final)
            if is_by_connection(self.rules.of(channel)) and connection._user_key is not None:
                self._rise(connection, by_user(channel), is_final)

    def gone(self, connection: Present, *, is_final: bool) -> None:
        """Take note that a connection has left. It may be called twice."""
        for channel in connection.channels:
            self.went(connection, channel, is_final=is_final)
        if self._seated.pop(connection, None) is not None:
            self._rise(connection, ONLINE, is_final)

    def _sit(self, connection: Present, channel: str) -> None:
        presence = self.rules.of(channel)
        assert presence is not None
        key = key_of(connection, channel, presence)
        seat = self._here.setdefault(channel, {}).setdefault(key, Seat())
        seat.connections += 1
        seat.leaves_at = None
        if not is_hidden(channel) and (seat.connections == 1 or presence.info is not None):
            seat.info = self.info_of(connection, presence)
        if seat.known != seat.info:
            self._changed(channel, key)

    def _rise(self, connection: Present, channel: str, is_final: bool) -> None:
        presence = self.rules.of(channel)
        assert presence is not None
        key = key_of(connection, channel, presence)
        seat = self._here[channel][key]
        seat.connections -= 1
        if seat.connections:
            return
        now = self._now()
        seat.leaves_at = now if is_final else now + presence.grace
        if seat.is_taken(now):
            heappush(self._graces, (seat.leaves_at, channel, key))
            self._set_grace_timer()
        else:
            self._changed(channel, key)

    def info_of(self, connection: Present, presence: Presence) -> bytes:
        """Return what the broker keeps of a member: its info, and the user if the member is a connection."""
        info = self._made_info(connection, presence)
        if presence.by == "user":
            return info
        return b'{"user":%b,"info":%b}' % (to_json(connection._user_key), info or b"null")

    def _made_info(self, connection: Present, presence: Presence) -> bytes:
        try:
            info = connection._shown if presence.info is None else Message.json(presence.info(connection)).payload
            if len(info) > presence.max_info_bytes:
                raise EncodeError(f"it has {len(info)} bytes, the limit is {presence.max_info_bytes}")
        except Exception as error:  # the app's function failed; the member joins all the same
            self._counters.hook_errors += 1
            if self._throttle.is_due("info"):
                logger.error(
                    "Presence.info failed, so a member has no info: %s",
                    error,
                    exc_info=error,
                    extra=about("presence.info_failed"),
                )
            return b""
        return info

    def _set_grace_timer(self) -> None:
        first = self._graces[0][0] if self._graces else None
        if self._grace_timer is not None:
            if self._grace_timer.when() == first:
                return
            self._grace_timer.cancel()
            self._grace_timer = None
        if first is not None:
            self._grace_timer = asyncio.get_running_loop().call_at(first, self._end_graces, context=Context())

    def _end_graces(self) -> None:
        self._grace_timer = None
        now = max(self._now(), self._graces[0][0])  # timers may be early by the resolution of the clock
        while self._graces and self._graces[0][0] <= now:
            _, channel, key = heappop(self._graces)
            seat = self._here.get(channel, {}).get(key)
            if seat is not None and not seat.connections and seat.leaves_at is not None and seat.leaves_at <= now:
                seat.leaves_at = 0.0
                self._changed(channel, key)
        self._set_grace_timer()

    # From the broker.

    def take(self, change: PresenceChange) -> None:
        """Take a change that came from the broker."""
        channel = change.audience.name
        unknown = self._unknown.get(channel)
        if unknown is not None and change.by == self._engine.incarnation and unknown.has_made(change):
            self._announce_once(change)
        self.watches.take(change)

    def suspect(self) -> None:
        """Ask the broker again: changes may have been missed, and it may have forgotten this node."""
        self.watches.read_anew()
        if self._life is not None:
            self.wake()

    # Updating the broker.

    def _changed(self, channel: str, key: str) -> None:
        self._dirty.setdefault(channel, set()).add(key)
        self.wake()

    def wake(self) -> None:
        """Check at once whether there is anything to do."""
        if self._is_ended:
            return
        if self._life is None or self._life.done():
            self._wake = asyncio.Event()
            self._wake.set()
            self._life = self._tasks.spawn(self._live(), "presence")
        elif self._wake is not None:
            self._wake.set()

    @property
    def _is_needed(self) -> bool:
        return bool(self._here or self._dirty or self.watches or self._stands_guard)

    async def _live(self) -> None:
        await self._tasks.begun()
        pause = _FIRST_PAUSE
        while self._is_needed and not self._is_ended:
            if self._here or self._dirty:
                self._lease.hold(self)
            else:
                self._lease.release(self)
            try:
                await self._agree()
                await self.sweep()
                pause = _FIRST_PAUSE
            except EngineError as error:
                if self._throttle.is_due("presence"):
                    logger.warning(
                        "presence can't be updated at the broker now: %s",
                        error,
                        extra=about("presence.unavailable"),
                    )
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                await self._until_changed(_SWEEP_SECONDS * random.uniform(0.75, 1.25))  # noqa: S311  # no secret
        self._lease.release(self)

    async def _until_changed(self, seconds: float) -> None:
        assert self._wake is not None
        self._wake.clear()
        if not self._dirty:  # else something changed while the broker was asked
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._wake.wait()

    async def _agree(self) -> None:
        """Bring the broker to the state that is wanted now."""
        for _ in range(len(self._dirty) // _CHANNELS_AT_ONCE + 1):
            async with self._agreeing:  # steps in one channel run one after the other, whichever task makes them
                if self._here or self._dirty:
                    await self._hold_lease()
                channels = list(self._dirty)[:_CHANNELS_AT_ONCE]
                await self._agree_on_several({channel: self._dirty.pop(channel) for channel in channels})

    async def _hold_lease(self) -> None:
        generation = await self._lease.ensure()
        if generation != self._generation:
            # What the broker had of this node is gone, or will be removed with the old incarnation. Changes that
            # happened meanwhile may not have arrived here.
            if self._generation:
                self.watches.read_anew()
            self._generation = generation
            for channel, seats in self._here.items():
                for seat in seats.values():
                    seat.known = _MAYBE
                self._dirty[channel] = set(seats)

    async def _agree_on_several(self, channels: Mapping[str, set[str]]) -> None:
        failed = dict(channels)  # all of them, if the caller in the app is cancelled
        try:
            results = await asyncio.gather(*starmap(self._agree_on, channels.items()), return_exceptions=True)
            failed = {each: channels[each] for each, error in zip(channels, results, strict=True) if error is not None}
        finally:
            for channel, keys in failed.items():
                self._dirty.setdefault(channel, set()).update(keys)
        for error in results:
            if error is not None:
                raise error

    async def _agree_on(self, channel: str, keys: set[str]) -> None:
        here, now = self._here.get(channel, {}), self._now()
        seats = {key: here[key] for key in keys if key in here}
        entering = {key: seat.info for key, seat in seats.items() if seat.is_taken(now) and seat.known != seat.info}
        leaving = [key for key, seat in seats.items() if not seat.is_taken(now) and seat.known is not None]
        for some in _parts(entering):
            members = {key: entering[key] for key in some}
            await self._step(channel, members, self._engine.enter(channel, members))
        for some in _parts(dict.fromkeys(leaving, b"")):
            await self._step(channel, dict.fromkeys(some), self._engine.leave(channel, some))
        for key in [key for key, seat in seats.items() if not seat.is_taken(now) and seat.known is None]:
            if not seats[key].is_taken(self._now()):
                del here[key]
        if not here and self._here.get(channel) is here:
            del self._here[channel]
            self._unknown.pop(channel, None)

    async def _step(
        self, channel: str, known: Mapping[str, bytes | None], step: Coroutine[Any, Any, PresenceChange | None]
    ) -> None:
        # `known` is what the broker has after the step.
        seats, incarnation = self._here[channel], self._engine.incarnation
        for key in known:
            seats[key].known = _MAYBE
        try:
            change = await step
        except BaseException:
            unknown = self._unknown.setdefault(channel, Unknown())
            unknown.keys.update(known)
            unknown.until = self._now() + _UNKNOWN_SECONDS
            raise
        if change is not None:
            self._announce_once(change)
        if incarnation != self._engine.incarnation:
            return  # it may have been entered under a lease that is lost
        for key, info in known.items():
            seats[key].known = info
            if (seats[key].info if seats[key].is_taken(self._now()) else None) != info:
                self._dirty.setdefault(channel, set()).add(key)

    async def sweep(self) -> None:
        """Remove what dead nodes have left behind, unless that was done just now."""
        now = self._now()
        if now - self._swept_at < _SWEEP_SECONDS / 2:
            return
        changes = await self._engine.sweep()
        self._swept_at = now
        for change in changes:
            self._announce(change)

    # Telling hooks.

    def _announce_once(self, change: PresenceChange) -> None:
        # The change that a step has returned also arrives from the broker.
        if (unknown := self._unknown.get(change.audience.name)) is not None:
            if change.version in unknown.told:
                return
            unknown.told.add(change.version)
            if unknown.until < self._now():
                del self._unknown[change.audience.name]
        self._announce(change)

    def _announce(self, change: PresenceChange) -> None:
        # Only the node that has made a change tells its hooks.
        channel = change.audience.name
        if is_hidden(channel):
            return
        is_by_user = not is_by_connection(self.rules.of(channel))
        told: tuple[tuple[HookEvent, Iterable[str]], ...]
        told = (("on_joined", change.joined), ("on_left", sorted(change.left)))
        for event, keys in told:
            if self._hooks.has(event):
                users = [key for key in keys if not (is_by_user and key.startswith(ANONYMOUS))]
                waiting = self._untold.get(channel)
                if users and waiting is not None:
                    waiting.append((event, users))
                elif users:
                    self._untold[channel] = deque([(event, users)])
                    self._tasks.spawn(self._tell(channel), f"{event} hooks")

    async def _tell(self, channel: str) -> None:
        # Hooks run in the order of changes, so that a slow hook doesn't end after one for a later change.
        await self._tasks.begun()
        waiting = self._untold[channel]
        try:
            while waiting:
                event, users = waiting.popleft()
                for user in users:
                    await self._hooks.observe(event, channel, user)
        finally:
            del self._untold[channel]

    # Questions of the app.

    async def ask(self, question: Callable[[KeepsPresence], Awaitable[Any]]) -> Any:
        """Ask the broker, after it was told all that happened here and dead nodes were swept.

        Raises:
            EngineUnavailable: If the broker can't be reached.
        """
        await self._agree()
        await self.sweep()
        return await question(self._engine)

    async def read(self, channel: str) -> Members:
        """Return what the broker has of a channel."""
        found: Members = await self.ask(lambda engine: engine.members(channel))
        return found

    async def members(self, channel: str) -> list[Member]:
        """Return who is in a channel; see `ConnectionManager.presence`."""
        presence = self.rules.required(channel)
        return members_of((await self.read(channel)).members, presence.by)

    async def count(self, channel: str) -> int:
        """Return how many members are in a channel, including connections without a user."""
        self.rules.required(channel)
        found: int = await self.ask(lambda engine: engine.count(channel))
        return found

    async def channels_of(self, user_key: str) -> frozenset[str]:
        """Return the channels that a user is in."""
        return channels_shown(await self.ask(lambda engine: engine.channels_of(user_key)))

    async def is_online(self, user_key: str) -> bool:
        """Tell whether a user has a connection, whichever channels it is in."""
        return bool(await self.ask(lambda engine: engine.channels_of(user_key)))

    def counts(self, publications: Publications) -> bool:
        """Tell whether the number of members over all nodes is known for a broadcast. It must have one audience."""
        if len(publications) != 1:
            return False
        audience = publications[0].audience
        return audience.kind == "user" or audience == EVERYONE or self.rules.of(audience.name) is not None

    async def reached(self, audience: Audience) -> int | None:
        """Return how many members an audience has at the broker; `None` if the broker can't be asked."""
        with suppress(EngineError):
            if audience.kind == "user":
                return int(bool(await self._engine.channels_of(audience.name)))
            channel = ONLINE if audience == EVERYONE else audience.name
            # The broker may not know all members of this node yet.
            return max(len(self._here.get(channel, ())), await self._engine.count(channel))
        return None

    # The end.

    async def aclose(self) -> None:
        """End as planned. The members here stay for their grace, so that nobody is told of a deploy."""
        self._is_ended = True
        self.watches.aclose()
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        if self._life is not None:
            self._life.cancel()
        if not self._lease.generation or not self._here:
            return
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._hand_over()

    async def _hand_over(self) -> None:
        grace = 0.0
        for channel, seats in self._here.items():
            stays = self.rules.required(channel).grace
            grace = max(grace, stays)
            for seat in seats.values():
                if not stays:
                    seat.connections, seat.leaves_at = 0, 0.0
                elif seat.connections:  # the node must be there until the grace ends
                    seat.connections, seat.leaves_at = 0, self._now() + stays
            self._dirty[channel] = set(seats)
        await self._agree()
        if self._here:
            await self._lease.stay(grace)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def is_by_connection(presence: Presence | None) -> bool:
    """Tell whether each connection counts as a member of a channel."""
    return presence is not None and presence.by == "connection"


def key_of(connection: Present, channel: str, presence: Presence) -> str:
    """Return the key of the member that a connection counts as in a channel."""
    if presence.by == "connection" and not is_hidden(channel):
        return connection.id
    return ANONYMOUS + connection.id if connection._user_key is None else connection._user_key


def _parts(infos: Mapping[str, bytes]) -> Iterator[list[str]]:
    # Cuts members into parts that any broker takes in one step.
    some: list[str] = []
    size = 0
    for key, info in infos.items():
        if some and (len(some) == _MEMBERS_AT_ONCE or size + len(info) > _INFO_BYTES_AT_ONCE):
            yield some
            some, size = [], 0
        some.append(key)
        size += len(info)
    if some:
        yield some
