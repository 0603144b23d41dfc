"""Looks after the stream that keeps histories: that it is there, which epochs it names, and that it lost nothing."""

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
from wsbroadcast.engines.nats.jetstream import API, NAME_IN_USE, NO_STREAM, WRONG_LAST, Refused, Stream
from wsbroadcast.engines.nats.protocol import Answer, Record, moment_of, nanoseconds
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import HistoryRules
from wsbroadcast.logs import Throttle, about, logger

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
"""The header of a record that is kept only if the record before it has this number."""

# The header of a record that outlives all messages.
_FOREVER = {"Nats-TTL": "never"}

# What a record says, and whether it is written again: only the first one proves what came after it.
_MARK = re.compile(rb"([A-Za-z0-9_-]{1,31})(~?)")

# Records are written again after this share of the time that messages are kept, which is a quarter of `remember`.
_SHARE = 5

# How often something is tried again that another node may change at the same moment.
_TRIES = 5

# Seconds until a stream is looked at again that could not be, and how many answers one look may last.
_LOOK_AGAIN = 1.0
_LOOKS = 4

# What our idea of the stream's clock may be wrong by, in nanoseconds.
_SKEW = 10**8


@dataclass(eq=False)
class Keeping:
    """How an engine keeps, and what it remembers from link to link."""

    stream: Stream
    rules: HistoryRules | None
    """What is kept; `None` for who learns it from others."""
    who: str
    """How errors call the server."""
    ack_timeout: float
    """Seconds after which nothing more is expected to be said of what was appended."""
    learned: HistoryRules | None = None
    """What others have said that they keep."""
    epoch: str = ""
    """The one that the stream named last."""
    top: int = 0
    """The largest number that is known to have been given in the stream under this epoch."""
    told: bytes = b""
    """The rules of others that the log was told of."""
    is_short_told: bool = False
    """Whether the log was told that the stream is kept less safely than was asked for."""
    # When that message was taken, at the latest: in nanoseconds since 1970, or in the headers that say it.
    _time: int | bytes = 0

    def note(self, sequence: int, time: int | bytes) -> None:
        """Remember a message that the stream has, if it is the newest."""
        if sequence > self.top:
            self.top, self._time = sequence, time

    def begin(self, epoch: str) -> None:
        """Remember an epoch; what was seen under another one proves nothing."""
        if epoch != self.epoch:
            self.epoch, self.top, self._time = epoch, 0, 0

    def learn(self, text: bytes) -> None:
        """Take what others say that they keep. The bytes are untrusted."""
        try:
            self.learned = HistoryRules.from_json(text)
        except ConfigurationError as error:
            logger.warning("%s: %s", self.who, error, extra=about("history.upkeep_failed", engine="nats"))

    @property
    def time(self) -> int:
        """When the newest message was taken, at the latest; in nanoseconds since 1970."""
        return self._time if isinstance(self._time, int) else Answer(b"", self._time).time


class Mark(NamedTuple):
    """A record that names an epoch: that of the stream, or that of an audience that was forgotten."""

    value: str
    is_first: bool
    """Whether it was written when the epoch began, not again later."""
    sequence: int
    time: int

    @classmethod
    def of(cls, record: Record | None) -> Mark | None:
        """Read a record; `None` if there is none, or it names nothing."""
        found = None if record is None else _MARK.fullmatch(record.payload)
        if record is None or found is None:
            return None
        return cls(found[1].decode(), not found[2], record.sequence, record.time)


class Upkeep:
    """What one link knows of the stream.

    The epoch is a random record in the stream. Whoever finds none writes one, and the stream takes the first: all nodes
    agree on it, and it is gone when the data is. An audience that is forgotten gets a record of its own, so that all
    others keep their epoch. That one may expire when no position can refer to it any more.

    Args:
        keeping: How the engine keeps.
        api: Asks the server.
        lost: Done when the connection is lost.
    """

    def __init__(self, keeping: Keeping, api: API, lost: asyncio.Future[Exception]) -> None:
        self.epoch: Mark | None = None
        """The stream's own; `None` while there is no stream."""
        self.replicas = 1
        """On how many servers the stream is."""
        self.max_messages = -1
        """The largest number of messages of one audience; -1 if there is no end."""
        # Whether it may be full, and drop its oldest messages.
        self._drops = False
        self._keeping = keeping
        self._api = api
        self._lost = lost
        # Told when the stream isn't the one it was.
        self._inlet: Inlet | None = None
        # Done when the stream has to be looked at now.
        self._alarm: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Audiences whose history was removed, by their names in the stream.
        self._forgotten: dict[str, Mark] = {}
        # How long a message is kept, and the stream's clock, compared with our monotonic one; both in nanoseconds.
        self._max_age = 0
        self._clock = 0
        self._throttle = Throttle()

    # How it begins.

    async def open(self) -> None:
        """Find the stream and its epochs, or make them.

        Raises:
            Refused: If JetStream doesn't.
            ConfigurationError: If there is a stream that can't become what it has to be.
        """
        await self._stand()
        epoch, rules = await self._api.records("epoch", "rules")
        await self.settle(epoch)
        if self._keeping.rules is not None:
            await self._say(self._keeping.rules, rules)
        await self._read_forgotten()

    async def learn(self) -> bool:
        """Read what others keep; return whether they keep anything."""
        try:
            (record,) = await self._api.records("rules")
        except (ConfigurationError, EngineUnavailable):  # no JetStream, no stream, or it is none of our business
            return False
        if record is not None:
            self._keeping.learn(record.payload)
        return record is not None

    async def _stand(self) -> None:
        # Once more after each change, because another node may have undone it: it knew the stream as it was before.
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
        raise EngineUnavailable(f"{self._keeping.who}: the stream {stream.name} doesn't become what it has to be")

    def _tell_shortfall(self, config: Mapping[str, Any]) -> None:
        keeping = self._keeping
        if not keeping.is_short_told and (shortfall := keeping.stream.shortfall(config)):
            keeping.is_short_told = True
            logger.warning(
                "%s: the stream %s stands already, and %s",
                keeping.who,
                keeping.stream.name,
                shortfall,
                extra=about("history.stream_differs", engine="nats"),
            )

    async def _change(self, verb: str, config: Mapping[str, Any]) -> None:
        try:
            await self._api.call(verb, config)
        except Refused as refused:
            if refused.number != NAME_IN_USE:  # else another node has made it just now
                raise

    async def _say(self, rules: HistoryRules, record: Record | None) -> None:
        # Beside the data, for who only publishes. The last one wins.
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

    # How it goes on.

    async def watch(self, inlet: Inlet) -> None:
        """Look after the stream until the connection is lost."""
        self._inlet = inlet
        while not self._lost.done():
            ends: set[asyncio.Future[Any]] = {self._lost, self._alarm}
            await asyncio.wait(ends, timeout=self._seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if not self._lost.done():
                await self._look()

    def alarm(self) -> None:
        """Let the stream be looked at now: something is wrong with it."""
        if not self._alarm.done():
            self._alarm.set_result(None)

    @property
    def _seconds_left(self) -> float | None:
        # Until the records have to be written again; not all nodes at once, because one is enough.
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
                    "%s: its histories can't be looked after: %s",
                    self._keeping.who,
                    error,
                    extra=about("history.upkeep_failed", engine="nats"),
                )
            await asyncio.wait([self._lost], timeout=_LOOK_AGAIN)

    async def _write_again(self) -> None:
        # A full stream drops its oldest messages, also those that outlive all others.
        mark = self.epoch
        assert mark is not None, "it is settled"
        try:
            await self._api.put("epoch", f"{mark.value}~".encode(), _FOREVER | {EXPECTED: str(mark.sequence)})
        except Refused as refused:
            if refused.number != WRONG_LAST:  # else another node was first
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
        """Return what names the epoch of an audience."""
        assert self.epoch is not None, "it is known"
        mark = self.forgotten(rest)
        return self.epoch if mark is None else mark

    def forgotten(self, rest: str) -> Mark | None:
        """Return the record of an audience that was forgotten, as long as it holds."""
        mark = self._forgotten.get(rest) if self._forgotten else None
        if mark is not None and self.is_over(mark):
            del self._forgotten[rest]
            return None
        return mark

    def begin_of(self, rest: str) -> int:
        """Return the number behind which the epoch of an audience begins: smaller ones are about to be removed."""
        mark = self.forgotten(rest) if self._forgotten else None
        return mark.sequence if mark is not None and mark.is_first else 0

    def is_over(self, mark: Mark) -> bool:
        """Tell whether what came after a record may have expired."""
        return 0 < self._max_age < self.now() - mark.time

    def is_old(self, mark: Mark) -> bool:
        """Tell whether a record has to be written again, to outlive what comes now."""
        return 0 < self._max_age // _SHARE < self.now() - mark.time

    async def settle(self, record: Record | None) -> None:
        """Take the epoch that stands in the stream; write one if there is none, or another if messages were lost."""
        known, disproved = self._keeping.epoch, ""
        mark = Mark.of(record)
        if known and record is None:
            await self._stand()  # is it a stream that may have dropped the record?
        if known and (mark is None or mark.value == known) and not await self._is_intact():
            disproved = known
        for _ in range(_TRIES):
            if mark is not None and mark.value != disproved:
                self.take_epoch(mark)
                return
            # A full stream drops its oldest messages, and this one may be among them. Then it is the same epoch. Of
            # another stream somebody has removed it, and what else nobody knows.
            is_same = record is None and known and not disproved and self._drops
            text = f"{known}~" if is_same else new_epoch()
            expected = 0 if record is None else record.sequence
            try:
                await self._api.put("epoch", text.encode(), _FOREVER | {EXPECTED: str(expected)})
            except Refused as refused:
                if refused.number != WRONG_LAST:  # else another node was first
                    raise
            (record,) = await self._api.records("epoch")
            mark = Mark.of(record)
        raise EngineUnavailable(f"{self._keeping.who}: the nodes don't agree on an epoch")

    async def _is_intact(self) -> bool:
        # Whether the stream has all that is known of it, but for what it has dropped by its limits. One that was set
        # back to an earlier copy gives the same numbers to other messages, and those are younger.
        top = self._keeping.top
        if await self.newest() < top:
            return False
        younger = await self._api.first_since(moment_of(self._keeping.time + 1))
        return younger is None or younger.sequence > top

    def take_epoch(self, mark: Mark) -> None:
        """Take what names the epoch of the stream, if it is newer than what is known."""
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
                self._inlet.missed("the history at the broker isn't the one that it was")

    def take_forgotten(self, answer: Answer) -> None:
        """Take what names the epoch of an audience, if it is newer than what is known."""
        rest = answer.subject.removeprefix(self._api.subject("forgotten."))
        before, mark = self._forgotten.get(rest), Mark.of(answer.record)
        if mark is not None and (before is None or mark.time > before.time):
            self._forgotten[rest] = mark

    def note_append(self, sequence: int) -> None:
        """Take note that the stream has confirmed a number just now."""
        self._keeping.note(sequence, self.now() + _SKEW)

    # Its numbers and its clock.

    async def newest(self) -> int:
        """Ask the leader for the newest number of the stream."""
        info = await self._api.call("INFO")
        self._set_clock(info)
        return int(info["state"]["last_seq"])

    def now(self) -> int:
        """Return what the stream's clock says, about: in nanoseconds since 1970."""
        return monotonic_ns() + self._clock

    def _set_clock(self, info: Mapping[str, Any]) -> None:
        if (now := nanoseconds(str(info.get("ts")))) > 0:
            self._clock = now - monotonic_ns()
