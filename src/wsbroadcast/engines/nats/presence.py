"""Who is in a channel, by a stream of JetStream. The stream only keeps and orders what the nodes write.

It has messages under these names, after the epoch:

* `log.<channel>`: the steps of a channel. A node decides from all earlier steps what its step changes. The stream takes
  the step only if no other came in between, and sends it to the nodes as `prefix.channel.<channel>`.
* `lease.<incarnation>`: a lease. The stream removes it when it has run out.
* `node.<incarnation>`: an incarnation that may have left something behind. It stays.
* `in.<incarnation>.<channel>`: a channel in which an incarnation may have members. It is written before the step.
* `of.<member>.<channel>.<incarnation>`: a channel in which a member is. It is written before the step too, and counts
  only while the lease is there.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import methodcaller
from urllib.parse import unquote

from wsbroadcast.engines.broker.names import quoted
from wsbroadcast.engines.broker.presence import PresenceStore
from wsbroadcast.engines.nats.jetstream import Put, Refused
from wsbroadcast.engines.nats.ledger import Entry, Ledger, parts_of
from wsbroadcast.engines.nats.protocol import Answer
from wsbroadcast.engines.nats.records import GONE, OVER, RECORD, SWEPT, YES, Conversation, Records, number_of
from wsbroadcast.engines.nats.rooms import Room, Rooms
from wsbroadcast.engines.nats.streams import PresenceStream
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.presence import Members
from wsbroadcast.publication import PresenceChange

# The headers of a swept, dead incarnation. It is swept again for 60 s, because what it sent may arrive late.
_DEAD = RECORD | {"Nats-TTL": "60s"}

# How many channels are swept at the same time; and the seconds after which one call of `sweep` begins nothing new.
_AT_ONCE = 50
_SWEEP_SECONDS = 1.0

# How often a renewal is tried if the number of the lease's record isn't known.
_TRIES = 5


@dataclass
class Attending:
    """How an engine keeps presence, and the lease that it holds. All its links share this object."""

    stream: PresenceStream
    who: str
    """What errors call the server."""
    is_wanted: bool = False
    """Whether presence will be used, but it isn't known yet that the server can keep it. One that can't is refused."""
    incarnation: str = ""
    """The incarnation that holds the lease."""
    epoch: str = ""
    """The epoch of the data that has the lease."""
    sequence: int = 0
    """The number of the lease's record."""
    until: float = 0.0
    """When the lease runs out at the earliest, in seconds of the event loop's clock."""


class NATSPresence(PresenceStore):
    """The steps of a link to NATS for presence.

    Args:
        attending: How the engine keeps presence.
        limit: Returns the size of the largest message that the server takes, in bytes.
        denial: Makes the error for a name to which the server doesn't let this user publish.
    """

    def __init__(
        self, attending: Attending, limit: Callable[[], int], denial: Callable[[str], ConfigurationError]
    ) -> None:
        self._held = attending
        self._records = Records(attending.stream, attending.who, denial)
        self._rooms = Rooms(self._records, limit)

    # The connection.

    async def open(self, talk: Conversation, version: object) -> None:
        """Use a connection from now on. If presence will be used, check that the server can keep it.

        Raises:
            ConfigurationError: If it can't.
        """
        self._records.use(talk, version)
        if self._held.is_wanted:
            with suppress(EngineUnavailable):  # it may be able later, and messages don't wait for presence
                await self._records.ready()
                self._held.is_wanted = False

    def hear(self, subject: bytes, answer: Answer) -> None:
        """Take an answer from the server."""
        self._records.answers.take(subject, answer)

    def deny(self, subject: str) -> bool:
        """Take note that the server refused what was published to a name; return whether the name is of presence."""
        if not self._held.stream.owns(subject):
            return False
        self._records.answers.deny(subject)
        return True

    # Leases.

    async def renew(self, incarnation: str, fresh: str, seconds: float) -> bool:
        """Renew a lease; take a new one if it has run out, or if the stream is another one now."""
        began = asyncio.get_running_loop().time()
        lasts = RECORD | {"Nats-TTL": f"{max(1, math.ceil(seconds))}s"}
        try:
            is_same = await self._prolong(incarnation, lasts)
        except Refused:
            if self._records.epoch is not None:
                raise
            is_same = False
        if not is_same:
            await self._take(fresh, lasts)
        self._held.until = began + seconds
        return is_same

    async def _prolong(self, incarnation: str, lasts: dict[str, str]) -> bool:
        await self._records.ready()
        if not self._holds(incarnation):
            return False
        name, held = f"lease.{incarnation}", self._held
        for _ in range(_TRIES):
            sequence = await self._records.put_next(Put(self._records.name(name), YES, lasts), held.sequence)
            if sequence:
                held.sequence = sequence
                return True
            # The lease has run out; or it was renewed, but the answer was lost.
            record = (await self._records.newest([name]))[0].get(name)
            if record is None or record.payload != YES:
                return False
            held.sequence = record.sequence
        return False

    async def _take(self, fresh: str, lasts: dict[str, str]) -> None:
        epoch, held = await self._records.ready(), self._held
        # The lease is written first: nobody may find the record of the node without it.
        sequence, node = await self._records.put(
            Put(self._records.name("lease", fresh), YES, lasts), Put(self._records.name("node", fresh), YES, RECORD)
        )
        number_of(node)
        held.incarnation, held.epoch, held.sequence = fresh, epoch.value, number_of(sequence)

    def _holds(self, incarnation: str) -> bool:
        held, epoch = self._held, self._records.epoch
        return bool(incarnation) and held.incarnation == incarnation and epoch is not None and epoch.value == held.epoch

    async def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""
        found = await self._records.read("lease.*")
        return frozenset(_last(name) for name, lease in found.items() if lease.payload == YES)

    # Joining and leaving.

    async def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members, and send the change. A large one is sent in several parts.

        Raises:
            EngineUnavailable: If this node has no lease. Nobody could find what it leaves behind then.
        """
        room = self._rooms.of(channel, await self._records.ready())
        if not self._holds(incarnation):
            raise EngineUnavailable("this node has no lease yet, so nobody can join: call renew first")
        made: list[Entry] = []
        async with room.lock:
            for part in parts_of(members, self._rooms.most_bytes):
                places = self._places(room, incarnation, part, YES, RECORD)
                # Written again before each try: a sweep may have found nothing there, and marked the record as over.
                where = Put(self._records.name("in", incarnation, room.token), YES, RECORD)
                made += await self._rooms.step(room, methodcaller("enter", incarnation, part), places, [where])
        self._rooms.keep(room)
        if asyncio.get_running_loop().time() >= self._held.until:
            # The incarnation may have been swept meanwhile. Then no sweep looks at it any more.
            await self._records.put_behind(Put(self._records.name("node", incarnation), YES, RECORD), ())
        return _merged(made, channel)

    async def leave(self, channel: str, incarnation: str, members: Collection[str]) -> PresenceChange | None:
        """Remove members, and send the change."""
        room = self._rooms.of(channel, await self._records.ready())
        if not self._holds(incarnation):
            return None
        async with room.lock:
            made = await self._remove(room, incarnation, members)
            if not room.ledger.has(incarnation):
                self._records.api.put_nowait([Put(self._records.name("in", incarnation, room.token), OVER, GONE)])
        self._rooms.keep(room)
        return _merged(made, channel)

    async def _remove(self, room: Room, incarnation: str, members: Iterable[str]) -> list[Entry]:
        made: list[Entry] = []
        for part in parts_of(dict.fromkeys(members, b""), self._rooms.most_bytes):
            gone = self._places(room, incarnation, part, OVER, GONE)
            made += await self._rooms.step(room, methodcaller("leave", incarnation, part), gone)
        return made

    def _places(
        self, room: Room, incarnation: str, members: Iterable[str], what: bytes, headers: Mapping[str, str]
    ) -> list[Put]:
        end = f"{room.token}.{incarnation}"
        return [Put(self._records.name("of", quoted(member), end), what, headers) for member in members]

    # Reading.

    async def _ledger(self, channel: str) -> Ledger:
        room = self._rooms.of(channel, await self._records.ready())
        async with room.lock:
            await self._rooms.catch_up(room)
        self._rooms.keep(room)
        return room.ledger

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        ledger = await self._ledger(channel)
        return Members(ledger.version, dict(ledger.infos))

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        return len(await self._ledger(channel))

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels in which a live node has a member."""
        places, alive = await asyncio.gather(self._records.read(f"of.{quoted(member)}.*.*"), self.alive())
        words = [name.split(".") for name in places]
        return frozenset(unquote(channel) for *_, channel, incarnation in words if incarnation in alive)

    # Sweeping.

    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove some of what was entered by incarnations whose lease has run out."""
        end = asyncio.get_running_loop().time() + _SWEEP_SECONDS
        found = await self._records.read("lease.*", "node.*")
        nodes = {_last(name): node for name, node in found.items() if name.startswith("node.")}
        leases = {_last(name): lease.payload for name, lease in found.items() if name.startswith("lease.")}
        # The leader, which takes renewals, decides which are dead. So nobody renews a lease that others take for dead.
        lapsed = [each for each in nodes if each not in leases]
        dead = {each for each in nodes if leases.get(each, YES) != YES}
        is_dead = await asyncio.gather(*(self._put_next("lease", each, SWEPT, 0, _DEAD) for each in lapsed))
        dead |= {each for each, is_so in zip(lapsed, is_dead, strict=True) if is_so}
        places = await asyncio.gather(*(self._records.read(f"in.{each}.*", is_some=True) for each in dead))
        done = [each for each, some in zip(dead, places, strict=True) if not some and nodes[each].payload != SWEPT]
        await asyncio.gather(*(self._put_next("node", each, SWEPT, nodes[each].sequence, _DEAD) for each in done))
        return await self._bury([place for some in places for place in some.items()], end)

    async def _put_next(self, kind: str, name: str, what: bytes, sequence: int, headers: Mapping[str, str]) -> bool:
        return bool(await self._records.put_next(Put(self._records.name(kind, name), what, headers), sequence))

    async def _bury(self, places: Sequence[tuple[str, Answer]], end: float) -> list[PresenceChange]:
        # The changes are returned even if something failed. The rest is left to the next call.
        changes: list[PresenceChange] = []
        error: BaseException | None = None
        for start in range(0, len(places), _AT_ONCE):
            if start and asyncio.get_running_loop().time() >= end:
                break
            dropping = (self._drop(name, each) for name, each in places[start : start + _AT_ONCE])
            for result in await asyncio.gather(*dropping, return_exceptions=True):
                if isinstance(result, BaseException):
                    error = result
                else:
                    changes += result
        if error is not None and not changes:
            raise error
        return changes

    async def _drop(self, place: str, record: Answer) -> list[PresenceChange]:
        _, incarnation, token = place.split(".")
        room = self._rooms.of(unquote(token), await self._records.ready())
        async with room.lock:
            await self._rooms.catch_up(room)
            made = await self._remove(room, incarnation, room.ledger.held_by(incarnation))
            if not room.ledger.has(incarnation):
                await self._put_next("in", f"{incarnation}.{token}", OVER, record.sequence, GONE)
        self._rooms.keep(room)
        return [change for entry in made if (change := entry.change(room.channel)) is not None]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _merged(made: Sequence[Entry], channel: str) -> PresenceChange | None:
    changes = [change for entry in made if (change := entry.change(channel)) is not None]
    if not changes:
        return None
    joined = {name: info for change in changes for name, info in change.joined.items()}
    left = frozenset(name for change in changes for name in change.left)
    return PresenceChange(changes[-1].audience, changes[-1].version, joined, left, changes[-1].by)
