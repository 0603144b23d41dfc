"""Who is in a channel, as Redis knows it. A script decides, counts and sends each change in one step.

Each channel has two keys in the slot of its name. The *members* are a hash: for each member the incarnations that have
entered it, a line break, and its info. The *state* is a hash: the version `v` of the newest change, the generation `g`
of the server that made it, and for each incarnation `n<incarnation>`, the number of members that it has entered.

The *leases* are a sorted set of incarnations by the time at which they end, in milliseconds since 1970 by the server.
Each incarnation has a set of the channels that it has *entered*. Each member has a hash of its channels, with the
version of the change by which it joined. A cluster has these keys in other slots than the channel. So the entered
channels are written before the step, and the channels of a member after it. A reader of these checks them against the
channels themselves.

All keys expire when they weren't touched for a day. Each node touches what it has entered while it sweeps.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar, cast

from pydantic_core import from_json

from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.presence import PresenceStore
from wsbroadcast.engines.redis.history import Keeper, Script
from wsbroadcast.engines.redis.presence_scripts import (
    ALIVE,
    DEAD,
    END,
    ENTER,
    INDEX,
    LEAVE,
    LIST,
    MEMBERS,
    RENEW,
    TOUCH,
)
from wsbroadcast.engines.redis.protocol import Reply, pack
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.presence import Members
from wsbroadcast.publication import PresenceChange

T = TypeVar("T")

# Milliseconds after which keys expire that weren't touched.
_EXPIRE = 86_400_000

# How many channels are swept, or touched, in one write.
_AT_ONCE = 50

# Seconds after which one call of `sweep` begins nothing new.
_SWEEP_SECONDS = 1.0

# A change of more bytes is sent as a jump of the version, without names. The nodes then read who is in the channel.
_MOST_BYTES = 256 * 1024


@dataclass
class Held:
    """The lease that this node holds. All links of an engine share this object."""

    incarnation: str = ""
    """The incarnation whose lease was renewed last."""
    generations: Sequence[str] = ()
    """The generations of the servers when the lease was taken. A server with another one may have lost entries."""
    until: float = 0.0
    """When the lease runs out at the earliest, in seconds of the event loop's clock."""
    touched: float = 0.0
    """When this node's entries were touched last, or when the lease was taken."""
    cursor: bytes = b"0"
    """Where touching goes on."""


class Servers(NamedTuple):
    """Finds the server of a key."""

    keeper_of: Callable[[str], Keeper]
    """Returns the server that has a key, or a name."""
    all: Callable[[], Sequence[Keeper]]
    """Returns all servers."""
    lose: Callable[[Exception], None]
    """Gives the link up, because it needs other servers now."""
    is_cluster: bool
    """Whether a script may use the keys of one slot only."""


@dataclass
class RedisPresence(PresenceStore):
    """The steps of a link to Redis for presence."""

    prefix: str
    """The beginning of all keys."""
    names: AudienceNames
    """The names of channels."""
    servers: Servers
    """Finds the server of a key."""
    held: Held
    """The lease that this node holds."""
    expire: int = _EXPIRE
    """Milliseconds after which keys expire that weren't touched."""
    # In a cluster: the channels that are being entered. They must stay in the set of entered channels.
    _entering: Counter[str] = field(default_factory=Counter)

    # Leases.

    async def renew(self, incarnation: str, fresh: str, seconds: float) -> bool:
        """Renew a lease; take a new one if it has run out, or a server was started or promoted since."""
        began = asyncio.get_running_loop().time()
        keepers = self.servers.all()
        learning = [self._checked(keeper.learn) for keeper in keepers]
        renewed, *_ = await self._all(self._renew(incarnation, fresh, seconds), *learning)
        generations = sorted(keeper.generation for keeper in keepers)
        is_same = renewed == incarnation.encode() and (self.held.incarnation, self.held.generations) == (
            incarnation,
            generations,
        )
        if not is_same:
            if renewed != fresh.encode():
                await self._renew("", fresh, seconds)
            self.held.incarnation, self.held.generations = fresh, generations
            self.held.touched, self.held.cursor = began, b"0"
        self.held.until = began + seconds
        return is_same

    async def _renew(self, incarnation: str, fresh: str, seconds: float) -> Reply:
        milliseconds = str(max(1, int(seconds * 1000)))
        return await self._run(RENEW, [self._leases], incarnation, fresh, milliseconds, str(self.expire))

    async def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""
        return frozenset(each.decode() for each in _list(await self._run(ALIVE, [self._leases])))

    # Joining and leaving.

    async def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members, and send the change. In a cluster, then write down the channels of the members.

        Raises:
            EngineUnavailable: If this node never had a lease. Nobody could find what it leaves behind then.
        """
        if not incarnation:
            raise EngineUnavailable("this node has no lease yet, so nobody can join: call renew first")
        if self.servers.is_cluster:
            self._entering[channel] += 1  # until the step is done: if it is cancelled, its outcome isn't known
            await self._list(channel, incarnation)
        parts = [part for name, info in members.items() for part in (name, info.decode())]
        text, others, which = _list(await self._step(ENTER, channel, incarnation, *parts))
        names = list(members)
        joined = {names[int(at)]: members[names[int(at)]] for at in which.split()}
        if self.servers.is_cluster:
            await self._index(joined, channel, text, "joined")
            if others or asyncio.get_running_loop().time() >= self.held.until:
                # The channel may have been swept meanwhile. Or no sweep would find it, because a server forgot the set.
                for each in {incarnation, *others.decode().split()}:
                    await self._list(channel, each)
            self._entering[channel] -= 1
        return self._change(channel, text, incarnation, joined=joined)

    async def leave(self, channel: str, incarnation: str, members: Collection[str]) -> PresenceChange | None:
        """Remove members, and send the change."""
        if not incarnation:
            return None
        return (await self._left(channel, incarnation, await self._step(LEAVE, channel, incarnation, "", *members)))[0]

    async def _left(self, channel: str, incarnation: str, answer: Reply) -> tuple[PresenceChange | None, bytes]:
        # Returns the change, and where to look next.
        match answer:
            case [bytes(text), int(rest), bytes(cursor), bytes(found)]:
                pass
            case _:
                raise ValueError(f"Redis answers the script for leaving with {type(answer).__name__}")
        names = frozenset(_texts(found))
        if self.servers.is_cluster:
            await self._index(names, channel, text, "left")
            if rest <= 0 and cursor in (b"", b"0") and not self._entering[channel]:
                del self._entering[channel]
                await self._ask(self._leases, pack("SREM", self._entered(incarnation), channel))
        return self._change(channel, text, incarnation, left=names), cursor

    def _change(
        self,
        channel: str,
        text: bytes,
        incarnation: str,
        joined: Mapping[str, bytes] | None = None,
        left: frozenset[str] = frozenset(),
    ) -> PresenceChange | None:
        if not text:
            return None
        return PresenceChange(Audience("channel", channel), int(text), joined or {}, left, incarnation)

    # Reading.

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        keeper, keys = self._keys(channel)
        await self._checked(keeper.ready)
        (answer,) = await self._checked(keeper.ask, MEMBERS.call(keys, keeper.generation, is_first=True))
        version, *found = _list(answer)
        parts = iter(b"\xff".join(found).split(b"\xff") if found else ())
        return Members(int(version), {name.decode(): next(parts).partition(b"\n")[2] for name in parts})

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        keeper, keys = self._keys(channel)
        (answer,) = await self._checked(keeper.ask, pack("HLEN", keys[0]))
        return cast(int, answer)

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels of a member. Each channel is asked whether the member is in it."""
        key = self._of(member)
        (answer,) = await self._ask(key, pack("HGETALL", key))
        found = _list(answer)
        channels = {channel.decode(): version for channel, version in zip(found[::2], found[1::2], strict=True)}
        asked: dict[Keeper, list[str]] = defaultdict(list)
        for channel in channels:
            asked[self._keys(channel)[0]].append(channel)
        answers = await self._all(
            *(
                self._checked(keeper.ask, *(pack("HEXISTS", self._keys(each)[1][0], member) for each in some))
                for keeper, some in asked.items()
            )
        )
        for some, known in zip(asked.values(), answers, strict=True):
            for channel, is_here in zip(some, known, strict=True):
                if not is_here:
                    await self._run(INDEX, [key], channel, channels.pop(channel), "left", str(self.expire))
        return frozenset(channels)

    # Sweeping.

    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove entries of dead incarnations, for about a second, and touch the entries of this one."""
        until = asyncio.get_running_loop().time() + _SWEEP_SECONDS
        changes: list[PresenceChange] = []
        for incarnation in _list(await self._run(DEAD, [self._leases])):
            await self._sweep(incarnation.decode(), until, changes)
        await self._touch(until)
        return changes

    async def _sweep(self, incarnation: str, until: float, changes: list[PresenceChange]) -> None:
        loop, entered = asyncio.get_running_loop(), self._entered(incarnation)
        while loop.time() < until:
            # Random channels, because other nodes may sweep at the same time.
            (answer,) = await self._ask(self._leases, pack("SRANDMEMBER", entered, str(_AT_ONCE)))
            channels = [each.decode() for each in _list(answer)]
            if not channels:
                await self._run(END, [self._leases, entered], incarnation)
                return
            cursors: dict[str, bytes] = dict.fromkeys(channels, b"0")
            while cursors and loop.time() < until:
                cursors = await self._sweep_some(incarnation, cursors, changes)

    async def _sweep_some(
        self, incarnation: str, cursors: Mapping[str, bytes], changes: list[PresenceChange]
    ) -> dict[str, bytes]:
        # Removes up to 500 members of each channel, and returns where to go on.
        further = {}
        answers = await self._all(
            *(self._step(LEAVE, channel, incarnation, cursor) for channel, cursor in cursors.items())
        )
        for channel, answer in zip(cursors, answers, strict=True):
            change, cursor = await self._left(channel, incarnation, answer)
            if change is not None:
                changes.append(change)
            if cursor != b"0":
                further[channel] = cursor
        return further

    async def _touch(self, until: float) -> None:
        # Done once in each quarter of the time after which keys expire.
        held, loop = self.held, asyncio.get_running_loop()
        if not held.incarnation or loop.time() < held.touched + self.expire / 4000:
            return
        entered = self._entered(held.incarnation)
        while loop.time() < until:
            command = pack("SSCAN", entered, held.cursor, "COUNT", str(_AT_ONCE))
            (answer, _) = await self._ask(self._leases, command, pack("PEXPIRE", entered, str(self.expire)))
            match answer:
                case [bytes(cursor), list(channels)]:
                    await self._all(*(self._touch_one(cast(bytes, each).decode()) for each in channels))
                    held.cursor = cursor
                    if cursor == b"0":
                        held.touched = loop.time()
                        return
                case _:
                    raise ValueError(f"Redis answers a scan with {type(answer).__name__}")

    async def _touch_one(self, channel: str) -> None:
        keeper, keys = self._keys(channel)
        cursor = b""
        while cursor != b"0":
            command = TOUCH.call(keys, str(self.expire), self._base, cursor or b"0", is_first=True)
            (answer,) = await self._checked(keeper.ask, command)
            cursor, found = _list(answer)
            for name in filter(None, found.split(b"\xff")):
                key = self._of(name.decode())
                await self._ask(key, pack("PEXPIRE", key, str(self.expire)))

    # Keys and their servers.

    @property
    def _leases(self) -> str:
        return f"{self.prefix}:leases:{{{self.prefix}}}"

    def _entered(self, incarnation: str) -> str:
        return f"{self.prefix}:entered:{{{self.prefix}}}:{incarnation}"

    def _of(self, member: str) -> str:
        return f"{self.prefix}:presence:{member}"

    @property
    def _base(self) -> str:
        return "" if self.servers.is_cluster else self.prefix

    def _keys(self, channel: str) -> tuple[Keeper, tuple[str, str]]:
        # The braces give the keys the name's slot. No name has braces itself.
        name = self.names.of(Audience("channel", channel))
        return self.servers.keeper_of(name), (f"{self.prefix}:members:{{{name}}}", f"{self.prefix}:state:{{{name}}}")

    async def _step(self, script: Script, channel: str, incarnation: str, *arguments: str | bytes) -> Reply:
        keeper, keys = self._keys(channel)
        await self._checked(keeper.ready)
        name = self.names.of(Audience("channel", channel))
        known = incarnation, keeper.generation, str(self.expire), keeper.verb, name, str(_MOST_BYTES)
        command = script.call(keys, *known, channel, self._base, *arguments, is_first=True)
        (answer,) = await self._checked(keeper.ask, command)
        return answer

    async def _list(self, channel: str, incarnation: str) -> None:
        await self._run(LIST, [self._leases, self._entered(incarnation)], incarnation, channel, str(self.expire))

    async def _index(self, members: Iterable[str], channel: str, version: bytes, what: str) -> None:
        by_keeper: dict[Keeper, list[bytes]] = defaultdict(list)
        for each in members:
            key = self._of(each)
            commands = by_keeper[self.servers.keeper_of(key)]
            parts = channel, version, what, str(self.expire)
            commands.append(INDEX.call([key], *parts, is_first=not commands))
        await self._all(*(self._checked(keeper.ask, *commands) for keeper, commands in by_keeper.items()))

    async def _run(self, script: Script, keys: Sequence[str], *arguments: str | bytes) -> Reply:
        (answer,) = await self._ask(keys[0], script.call(keys, *arguments, is_first=True))
        return answer

    async def _ask(self, key: str, *commands: bytes) -> list[Reply]:
        return await self._checked(self.servers.keeper_of(key).ask, *commands)

    async def _checked(self, ask: Callable[..., Awaitable[T]], *commands: bytes) -> T:
        try:
            return await ask(*commands)
        except ConnectionError as error:
            self.servers.lose(error)  # this is no longer the right server: the next link finds the right one
            raise

    async def _all(self, *work: Awaitable[T]) -> list[T]:
        # All run in one turn, so that they are sent together. All have ended before an error is raised.
        results = await asyncio.gather(*work, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return cast("list[T]", results)


def _list(answer: Reply) -> list[bytes]:
    if not isinstance(answer, list) or not all(isinstance(each, bytes) for each in answer):
        raise ValueError(f"Redis answers a question about presence with {type(answer).__name__}")
    return cast("list[bytes]", answer)


def _texts(found: bytes) -> list[str]:
    return cast("list[str]", from_json(found))
