"""The logs of channels, as one link knows them. A link reads a log to its end before it writes to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from wsbroadcast.engines.broker.names import quoted
from wsbroadcast.engines.nats.jetstream import Put
from wsbroadcast.engines.nats.ledger import Entry, Ledger, parts_of
from wsbroadcast.engines.nats.protocol import Answer, expected_of
from wsbroadcast.engines.nats.records import RECORD, Records
from wsbroadcast.engines.nats.upkeep import EXPECTED, Mark
from wsbroadcast.exceptions import EngineError

QUIET = "Wsbroadcast-Quiet"
"""The header of an entry that changes nothing for nodes."""

_QUIET_LINE = f"\r\n{QUIET}: ".encode()

# For how long the version of an empty channel is remembered.
_REMEMBER = "600s"

# The largest size that entries are cut to, in bytes; and how much of the largest message is left for headers.
_MOST_BYTES = 256 * 1024
_HEADER_BYTES = 512

# How many members are remembered over all channels. Each channel counts as one more.
_REMEMBERED = 50_000

# Seconds until a log is read again if a replica has only a part of it.
_PAUSE = 0.01

Plan = Callable[[Ledger], Entry | None]
"""Returns the next entry; `None` if nothing changes."""


@dataclass(eq=False)
class Room:
    """What a link knows of a channel."""

    channel: str
    token: str
    """The channel as a part of names."""
    epoch: Mark
    """The record that names the data of the log."""
    ledger: Ledger
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the task that reads or writes the log."""
    weight: int = 0
    """How much of `_REMEMBERED` it takes."""


class Rooms:
    """The channels that a link has used last.

    Args:
        records: The stream.
        limit: Returns the size of the largest message that the server takes, in bytes.
    """

    def __init__(self, records: Records, limit: Callable[[], int]) -> None:
        self._records = records
        self._limit = limit
        # The epoch of the rooms, the rooms, the longest unused first, and their weight together.
        self._epoch: Mark | None = None
        self._rooms: dict[str, Room] = {}
        self._weight = 0

    @property
    def most_bytes(self) -> int:
        """The size that entries are cut to, in bytes."""
        return min(_MOST_BYTES, self._limit() // 4)

    def of(self, channel: str, epoch: Mark) -> Room:
        """Return what is known of a channel."""
        if epoch is not self._epoch:  # what is remembered isn't true for other data
            self._epoch, self._rooms, self._weight = epoch, {}, 0
        room = self._rooms.pop(channel, None) or Room(channel, quoted(channel), epoch, _new_ledger(epoch))
        self._rooms[channel] = room
        return room

    def keep(self, room: Room) -> None:
        """Take note of the size of a channel; forget others if they are too many together."""
        if self._rooms.get(room.channel) is room:
            self._weight += len(room.ledger) + 1 - room.weight
            room.weight = len(room.ledger) + 1
        while self._weight > _REMEMBERED and len(self._rooms) > 1:
            self._weight -= self._rooms.pop(next(iter(self._rooms))).weight

    async def catch_up(self, room: Room) -> None:
        """Read the entries of the log that aren't known yet, or all entries if some of them are gone."""
        log = f"log.{room.token}"
        while True:
            self._records.check(room.epoch)
            ledger = room.ledger
            subject = self._records.api.subject(self._records.name(log))
            query = {"seq": ledger.sequence + 1, "next_by_subj": subject}
            newest, found = await self._records.newest([log], query)
            top = newest[log].sequence if log in newest else 0
            is_whole = top >= ledger.sequence and _follow(ledger, found)
            if is_whole and ledger.sequence >= top:
                return
            if not is_whole:
                room.ledger = _new_ledger(room.epoch)
            await asyncio.sleep(_PAUSE if is_whole else 0)

    async def step(
        self, room: Room, plan: Plan, before: Sequence[Put], right_before: Sequence[Put] = ()
    ) -> list[Entry]:
        """Write the next entry of a channel; return the written entries, none if nothing changes.

        Args:
            room: The channel.
            plan: Returns the entry. It is called again if another entry came in between.
            before: Messages that are written first, also if there is no entry.
            right_before: Messages that are written after these, and again before each further try.
        """
        before = [*before, *right_before]
        is_fresh = False
        while (entry := plan(room.ledger)) is not None or not is_fresh:
            if entry is not None:
                room.ledger.complete(entry)
                if await self._write(room, entry, before):
                    if room.ledger.is_long:
                        await self._write_anew(room)
                    return [entry]
                before = right_before
            await self.catch_up(room)
            is_fresh = True
        if before:
            await self._records.put_behind(before[-1], before[:-1])
        return []

    async def _write(self, room: Room, entry: Entry, before: Sequence[Put] = ()) -> bool:
        # Returns whether the entry was the next one. If not, it was not written.
        ledger, payload = room.ledger, entry.encode()
        expected = ledger.sequence
        self._records.check(room.epoch)
        if len(payload) > (limit := self._limit() - _HEADER_BYTES):
            raise EngineError(
                f"the entry of a member has {len(payload)} bytes, and {self._records.who} takes {limit}: let "
                "Presence.info say less, or raise max_payload"
            )
        log = Put(self._records.name("log", room.token), payload, _headers(entry, expected))
        sequence = await self._records.put_behind(log, before)
        if sequence and ledger.sequence == expected:
            ledger.apply(sequence, entry)
        return sequence > 0

    async def _write_anew(self, room: Room) -> None:
        # Writes all members again, then removes the entries before that.
        parts = self._parts(room.ledger)
        while parts and not await self._write(room, room.ledger.restated(*parts[0])):
            await self.catch_up(room)
            parts = self._parts(room.ledger)  # entries that came in between are removed too, so they are in the parts
        if not parts:
            return
        first = room.ledger.sequence
        for part in parts[1:]:
            while (entry := room.ledger.restated(*part)).more and not await self._write(room, entry):
                await self.catch_up(room)
        subject = self._records.api.subject(self._records.name("log", room.token))
        await self._records.api.call("PURGE", {"filter": subject, "seq": first})
        room.ledger.stated = len(room.ledger.statements())

    def _parts(self, ledger: Ledger) -> list[tuple[str, dict[str, bytes]]]:
        # The members that one entry states, and their incarnation.
        return [
            (incarnation, part)
            for incarnation, statements in groupby(ledger.statements(), lambda each: each[0])
            for part in parts_of({name: ledger.infos.get(name, b"") for _, name in statements}, self.most_bytes)
        ]


def is_quiet(headers: bytes) -> bool:
    """Tell whether an entry that a stream sends changes nothing for nodes."""
    return _QUIET_LINE in headers


def _new_ledger(epoch: Mark) -> Ledger:
    # The versions of an unknown channel begin after all versions that there were before this epoch.
    return Ledger(epoch.time // 1000)


def _headers(entry: Entry, expected: int) -> dict[str, str]:
    headers = {EXPECTED: str(expected)}
    if not entry.is_told:
        headers[QUIET] = "1"
    if entry.whole is not None:
        headers |= RECORD
        if not entry.whole:
            headers["Nats-TTL"] = _REMEMBER
    return headers


def _follow(ledger: Ledger, found: Sequence[Answer]) -> bool:
    # Returns whether no entry is missing in between. The first entry of a log stands for all entries before it.
    for answer in found:
        expected = expected_of(answer.headers)
        entry = None if expected < 0 else Entry.decode(answer.payload)  # else it wasn't written by a node
        is_next = ledger.sequence in (0, expected) or expected < 0
        if not is_next and (entry is None or entry.whole is None):
            return False
        ledger.apply(answer.sequence, entry)
    return True
