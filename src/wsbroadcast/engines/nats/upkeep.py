"""Looks after the stream of histories: whether it is there, which epochs it names, and whether it lost anything."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import uniform
from time import monotonic_ns
from typing import Any, NamedTuple

from wsbroadcast.engines.broker.history import new_epoch
from wsbroadcast.engines.broker.link import Inlet
from wsbroadcast.engines.nats.jetstream import API, NAME_IN_USE, NO_STREAM, WRONG_LAST, Refused
from wsbroadcast.engines.nats.protocol import Answer, Record, moment_of, nanoseconds
from wsbroadcast.engines.nats.streams import HistoryStream
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import HistoryRules
from wsbroadcast.logs import Throttle, about, logger

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
"""The header of a record that is taken only if the record before it has this number."""

# The header of a record that outlives all messages.
_FOREVER = {"Nats-TTL": "never"}

# The value of a record is an epoch, and `~` if it was written again. Only the first one proves what came after it.
_MARK = re.compile(rb"([A-Za-z0-9_-]{1,31})(~?)")

# Records are written again after a fifth of the time that messages are kept, which is a quarter of `remember`.
_SHARE = 5

# How often something is tried that another node may change at the same moment.
_TRIES = 5

# Seconds until the stream is checked again if that failed; and a check may take so many times the time of one answer.
_LOOK_AGAIN = 1.0
_LOOKS = 4

# By how much the computed time of the stream's clock may be wrong, in nanoseconds.
_SKEW = 10**8


@dataclass(eq=False)
class Keeping:
    """How an engine keeps histories, and what it remembers. All its links share this object."""

    stream: HistoryStream
    rules: HistoryRules | None
    """What is kept; `None` if the rules are learned from other nodes."""
    who: str
    """What errors call the server."""
    ack_timeout: float
    """Seconds to wait for the confirmation of an append."""
    learned: HistoryRules | None = None
    """The rules that other nodes have written."""
    epoch: str = ""
    """The epoch that the stream named last."""
    top: int = 0
    """The largest number that the stream is known to have given under this epoch."""
    told: bytes = b""
    """The rules of other nodes that were logged last."""
    is_short_told: bool = False
    """Whether it was logged that the stream is kept less safely than was asked for."""
    # When the message `top` was taken, at the latest: in nanoseconds since 1970, or the headers that have the time.
    _time: int | bytes = 0

    def note(self, sequence: int, time: int | bytes) -> None:
        """Remember a message of the stream, if it is the newest."""
        if sequence > self.top:
            self.top, self._time = sequence, time

    def begin(self, epoch: str) -> None:
        """Remember an epoch, and forget what was seen under another one."""
        if epoch != self.epoch:
            self.epoch, self.top, self._time = epoch, 0, 0

    def learn(self, text: bytes) -> None:
        """Take the rules of other nodes. The bytes are untrusted."""
        try:
            self.learned = HistoryRules.from_json(text)
        except ConfigurationError as error:
            logger.warning("%s: %s", self.who, error, extra=about("history.upkeep_failed", engine="nats"))

    @property
    def time(self) -> int:
        """When the newest message was taken, at the latest, in nanoseconds since 1970."""
        return self._time if isinstance(self._time, int) else Answer(b"", self._time).time


class Mark(NamedTuple):
    """A record that names an epoch: that of the stream, or that of an audience whose history was removed."""

    value: str
    is_first: bool
    """Whether it was written when the epoch began, and not again later."""
    sequence: int
    time: int

    @classmethod
    def of(cls, record: Record | None) -> Mark | None:
        """Read a record; `None` if there is none, or it names no epoch."""
        found = None if record is None else _MARK.fullmatch(record.payload)
        if record is None or found is None:
            return None
        return cls(found[1].decode(), not found[2], record.sequence, record.time)


class Upkeep:
    """What one link knows of the stream.

    The epoch is a random record in the stream. A node that finds none writes one, and the stream takes the first. So
    all nodes agree on it, and it is gone when the data is. If the history of an audience is removed, the audience gets
    a record of its own, so that all others keep their epoch. That record may expire when no position can refer to it
    any more.

    Args:
        keeping: How the engine keeps.
        api: Asks the server.
        lost: Done when the connection is lost.
    """

    def __init__(self, keeping: Keeping, api: API, lost: asyncio.Future[Exception]) -> None:
        self.epoch: Mark | None = None
        """The record of the stream's epoch; `None` while there is no stream."""
        self.replicas = 1
        """On how many servers the stream is."""
        self.max_messages = -1
        """How many messages of one audience the stream keeps; -1 if there is no limit."""
        # Whether the stream may become full, and then drops its oldest messages.
        self._drops = False
        self._keeping = keeping
        self._api = api
        self._lost = lost
        # Is told when the stream is another one.
        self._inlet: Inlet | None = None
        # Done when the stream has to be checked now.
        self._alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Audiences whose history was removed, by their names in the stream.
        self._forgotten: dict[str, Mark] = {}
        # How long a message is kept, and how far the stream's clock is from our monotonic one; both in nanoseconds.
        self._max_age = 0
        self._clock = 0
        self._throttle = Throttle()

    # The beginning.

    async def open(self) -> None:
        """Find the stream and its epochs, or make them.

        Raises:
            Refused: If JetStream refuses it now.
            ConfigurationError: If JetStream can't keep it, or the existing stream has settings that don't fit.
        """
        await self._stand()
        epoch, rules = await self._api.records("epoch", "rules")
        await self.settle(epoch)
        if self._keeping.rules is not None:
            await self._say(self._keeping.rules, rules)
        await self._read_forgotten()

    async def learn(self) -> bool:
        """Read the rules of other nodes; return whether there is a stream."""
        try:
            (record,) = await self._api.records("rules")
        except (ConfigurationError, EngineUnavailable):  # no JetStream, no stream, or no permission
            return False
        if record is not None:
            self._keeping.learn(record.payload)
        return record is not None

    async def _stand(self) -> None:
        # The stream is read again after each change, because another node that had read it before may have undone it.
        stream, rules = self._keeping.stream, self._keeping.rules
        for _ in range(_TRIES):
            try:
                info = await self._api.call("INFO")
            except Refused as refused:
                if refused.number != NO_STREAM or rules is None:
                    raise
                await self._change("CREATE", stream.new(rules))
                continue
            config = info["config"]
            changes = {} if rules is None else stream.changes(config, rules)
            if not changes:
                self.replicas, self._max_age = config.get("num_replicas", 1), config.get("max_age", 0)
                self.max_messages = config.get("max_msgs_per_subject", -1)
                self._drops = config.get("max_bytes", -1) > 0 or config.get("max_msgs", -1) > 0
                self._set_clock(info)
                self._tell_shortfall(config)
                return
            await self._change("UPDATE", config | changes)
        raise EngineUnavailable(
            f"{self._keeping.who}: the stream {stream.name} can't be configured now, because others change it too"
        )

    def _tell_shortfall(self, config: Mapping[str, Any]) -> None:
        keeping = self._keeping
        if not keeping.is_short_told and (shortfall := keeping.stream.shortfall(config)):
            keeping.is_short_told = True
            logger.warning(
                "%s: the stream %s exists already, and %s",
                keeping.who,
                keeping.stream.name,
                shortfall,
                extra=about("history.stream_differs", engine="nats"),
            )

    async def _change(self, verb: str, config: Mapping[str, Any]) -> None:
        try:
            await self._api.call(verb, config)
        except Refused as refused:
            if refused.number != NAME_IN_USE:  # else another node has made the stream just now
                raise

    async def _say(self, rules: HistoryRules, record: Record | None) -> None:
        # The rules are written beside the data, for programs that only publish. The last ones count.
        text, keeping = rules.to_json(), self._keeping
        if record is not None and record.payload == text:
            return
        if record is not None and record.payload != keeping.told:
            keeping.told = record.payload
            others = record.payload.decode(errors="replace")
            logger.warning(
                "%s: another node keeps other histories, %.500s; this one keeps %.500s",
                keeping.who,
                others,
                text.decode(),
                extra=about("history.rules_differ", engine="nats"),
            )
        await self._api.put("rules", text, _FOREVER)

    async def _read_forgotten(self) -> None:
        (found,), _ = await self._api.fetch({"seq": 1, "next_by_subj": self._api.subject("forgotten.>")})
        for answer in found:
            self.take_forgotten(answer)

    # Later.

    async def watch(self, inlet: Inlet) -> None:
        """Look after the stream until the connection is lost."""
        self._inlet = inlet
        while not self._lost.done():
            ends: set[asyncio.Future[Any]] = {self._lost, self._alarm}
            await asyncio.wait(ends, timeout=self._seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if not self._lost.done():
                await self._look()

    def alarm(self) -> None:
        """Have the stream checked now, because something is wrong with it."""
        if not self._alarm.done():
            self._alarm.set_result(None)

    @property
    def _seconds_left(self) -> float | None:
        # Until the records have to be written again. It is random, because one node is enough.
        if self.epoch is None or not self._max_age:
            return None
        return max(0.0, (self.epoch.time + self._max_age // _SHARE - self.now()) / 10**9) * uniform(1, 1.2)  # noqa: S311

    async def _look(self) -> None:
        if self._alarm.done():
            self._alarm = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_LOOKS * self._keeping.ack_timeout):
                await self._stand()
                await self.settle(*await self._api.records("epoch"))
                await self._read_forgotten()
                if self._seconds_left == 0:
                    await self._write_again()
        except (EngineError, ConfigurationError, TimeoutError) as error:
            if self._throttle.is_due("look"):
                logger.warning(
                    "%s: the stream of histories can't be checked now: %s",
                    self._keeping.who,
                    error,
                    extra=about("history.upkeep_failed", engine="nats"),
                )
            await asyncio.wait([self._lost], timeout=_LOOK_AGAIN)

    async def _write_again(self) -> None:
        # A full stream drops its oldest messages, also records that never expire.
        mark = self.epoch
        assert mark is not None, "it is settled"
        try:
            await self._api.put("epoch", f"{mark.value}~".encode(), _FOREVER | {EXPECTED: str(mark.sequence)})
        except Refused as refused:
            if refused.number != WRONG_LAST:  # else another node came first
                raise
        if self._keeping.rules is not None:
            await self._api.put("rules", self._keeping.rules.to_json(), _FOREVER)

    # Epochs.

    def epoch_of(self, rest: str) -> str:
        """Return the epoch of an audience, by its name without the prefix; empty while none is known."""
        if self.epoch is None:
            return ""
        mark = self.mark_of(rest)
        return self.epoch.value if mark is self.epoch else f"{self.epoch.value}-{mark.value}"

    def mark_of(self, rest: str) -> Mark:
        """Return the record that names the epoch of an audience."""
        assert self.epoch is not None, "it is known"
        mark = self.forgotten(rest)
        return self.epoch if mark is None else mark

    def forgotten(self, rest: str) -> Mark | None:
        """Return the record of an audience whose history was removed, while it counts; else `None`."""
        mark = self._forgotten.get(rest) if self._forgotten else None
        if mark is not None and self.is_over(mark):
            del self._forgotten[rest]
            return None
        return mark

    def begin_of(self, rest: str) -> int:
        """Return the number after which the epoch of an audience begins. Messages with smaller ones will be removed."""
        mark = self.forgotten(rest) if self._forgotten else None
        return mark.sequence if mark is not None and mark.is_first else 0

    def is_over(self, mark: Mark) -> bool:
        """Tell whether messages that came after a record may have expired."""
        return 0 < self._max_age < self.now() - mark.time

    def is_old(self, mark: Mark) -> bool:
        """Tell whether a record has to be written again, to outlive the messages that come now."""
        return 0 < self._max_age // _SHARE < self.now() - mark.time

    async def settle(self, record: Record | None) -> None:
        """Take the epoch in the stream. Write one if there is none, or a new one if messages were lost."""
        known, disproved = self._keeping.epoch, ""
        mark = Mark.of(record)
        if known and record is None:
            await self._stand()  # finds out whether the stream may have dropped the record
        if known and (mark is None or mark.value == known) and not await self._is_intact():
            disproved = known
        for _ in range(_TRIES):
            if mark is not None and mark.value != disproved:
                self.take_epoch(mark)
                return
            # A full stream drops its oldest messages, and may have dropped the record. Then the epoch is the same. From
            # any other stream somebody has removed the record, and perhaps more.
            is_same = record is None and known and not disproved and self._drops
            text = f"{known}~" if is_same else new_epoch()
            expected = 0 if record is None else record.sequence
            try:
                await self._api.put("epoch", text.encode(), _FOREVER | {EXPECTED: str(expected)})
            except Refused as refused:
                if refused.number != WRONG_LAST:  # else another node came first
                    raise
            (record,) = await self._api.records("epoch")
            mark = Mark.of(record)
        raise EngineUnavailable(f"{self._keeping.who}: the nodes don't agree on an epoch")

    async def _is_intact(self) -> bool:
        # Returns whether the stream still has all that is known of it, except what its limits have dropped. A stream
        # that was restored from an earlier copy gives the same numbers to other messages, which are younger.
        top = self._keeping.top
        if await self.newest() < top:
            return False
        younger = await self._api.first_since(moment_of(self._keeping.time + 1))
        return younger is None or younger.sequence > top

    def take_epoch(self, mark: Mark) -> None:
        """Take the record of the stream's epoch, if it is newer than the known one."""
        before = self.epoch
        if before is not None and mark.time <= before.time:
            return
        self.epoch = mark
        self._keeping.begin(mark.value)
        self._keeping.note(mark.sequence, mark.time)
        if before is not None and before.value != mark.value:
            self._forgotten.clear()  # they are read again
            self.alarm()
            if self._inlet is not None:
                self._inlet.missed("the history at the broker is another one now")

    def take_forgotten(self, answer: Answer) -> None:
        """Take the record of an audience's epoch, if it is newer than the known one."""
        rest = answer.subject.removeprefix(self._api.subject("forgotten."))
        before, mark = self._forgotten.get(rest), Mark.of(answer.record)
        if mark is not None and (before is None or mark.time > before.time):
            self._forgotten[rest] = mark

    def note_append(self, sequence: int) -> None:
        """Take note that the stream has confirmed a message with this number just now."""
        self._keeping.note(sequence, self.now() + _SKEW)

    # The stream's numbers and its clock.

    async def newest(self) -> int:
        """Ask the leader for the newest number of the stream."""
        info = await self._api.call("INFO")
        self._set_clock(info)
        return int(info["state"]["last_seq"])

    def now(self) -> int:
        """Return about the time of the stream's clock, in nanoseconds since 1970."""
        return monotonic_ns() + self._clock

    def _set_clock(self, info: Mapping[str, Any]) -> None:
        if (now := nanoseconds(str(info.get("ts")))) > 0:
            self._clock = now - monotonic_ns()
