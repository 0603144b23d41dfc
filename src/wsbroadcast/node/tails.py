"""The tails of one node. A tail is opened with the first connection of an audience, and reads what is missing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from contextvars import Context

from wsbroadcast.audience import Audience, for_logs
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import KeepsHistory
from wsbroadcast.exceptions import EngineError
from wsbroadcast.history import History, HistoryRules, Reason
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.node.deliveries import Deliverer, Deliveries
from wsbroadcast.node.tail import Tail, Taken
from wsbroadcast.publication import Publication
from wsbroadcast.stats import Counters

# If nothing came to an audience for so many seconds, the engine is asked for its position: a message may be lost.
_QUIET_SECONDS = 10.0

# How many audiences one question has at most, so that it can be answered within its timeout.
_ASKED_AT_ONCE = 1000

# How many publications of one tail may wait for hooks or a slow crowd. If there are more, there is a break.
_MAX_WAITING = 65_536
_MAX_WAITING_BYTES = 32 * 1024 * 1024

# How many bytes of payload all tails may have together. If there are more, the quietest tails keep only their position.
_MAX_BYTES = 64 * 1024 * 1024
_COUNT_AFTER = 1024

# Seconds between two attempts to read. After so many failures the held publications are delivered, after a break.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_MAX_FAILURES = 4


def _now() -> float:
    return asyncio.get_running_loop().time()


class _Reading:
    """A read of a history, in one or more attempts."""

    def __init__(self) -> None:
        self.attempted = asyncio.Event()
        """Set when the present attempt has ended, with success or not."""
        self.wanted = asyncio.Event()
        """Set when the next attempt is to be made at once."""


class Tails:
    """The newest parts of the histories of this node's audiences, and the way from there to the connections.

    Args:
        node: Delivers publications.
        engine: Keeps what is published.
        rules: What is kept.
        counters: Where heals are counted.
        turn_messages: How many publications are replayed to a connection at once.
        turn_bytes: How many bytes of payload are replayed at once, if that is more than one publication.
    """

    def __init__(
        self,
        node: Deliverer,
        engine: KeepsHistory,
        rules: HistoryRules,
        counters: Counters,
        turn_messages: int,
        turn_bytes: int,
    ) -> None:
        self._node = node
        self._turn = (turn_messages, turn_bytes)
        self._engine = engine
        self._rules = rules
        self._counters = counters
        self._tails: dict[Audience, Tail] = {}
        self._readings: dict[Audience, _Reading] = {}
        self._refilling: dict[Audience, asyncio.Task[None]] = {}
        # The audiences that have broken since the running check has begun; `None` if no check needs them.
        self._breaks: set[Audience] | None = None
        self._tasks = Tasks()
        self.deliveries = Deliveries(node)
        """Delivers publications from the tails to the connections."""
        self._look: asyncio.TimerHandle | None = None
        self._throttle = Throttle()
        self._taken = 0

    def history(self, audience: Audience) -> History | None:
        """Return how much is kept of an audience; `None` for nothing."""
        return self._rules.of(audience)

    def of(self, audience: Audience) -> Tail | None:
        """Return the tail of an audience; `None` if it has none here."""
        return self._tails.get(audience)

    def is_due(self, publication: Publication) -> bool:
        """Tell whether a publication may still be delivered. It may not if there was a break since it was taken."""
        tail, position = self._tails.get(publication.audience), publication.position
        if tail is None or position is None:
            return True
        return tail.epoch == position.epoch and tail.delivered < position.offset

    # Opening and closing.

    async def open(self, audiences: Iterable[Audience]) -> None:
        """Open tails of those audiences that have a history; return when they were read, or can't be read now."""
        opened = [audience for audience in audiences if audience in self._tails or self._open(audience)]
        for audience in opened:
            if (tail := self._tails.get(audience)) is not None and not tail.epoch:
                await self.attempted(audience)

    def _open(self, audience: Audience) -> bool:
        history = self._rules.of(audience)
        if history is None:
            return False
        tail = self._tails[audience] = Tail(history, *self._turn)
        tail.is_reading = True
        tail.heard_at = _now()
        self._begin_reading(audience, tail)
        self._look_later()
        return True

    def close(self, audience: Audience) -> None:
        """Forget the tail of an audience that has no connection here any more."""
        if self._tails.pop(audience, None) is not None:
            reading = self._readings.pop(audience, None)
            if reading is not None:
                reading.wanted.set()
                reading.attempted.set()

    # Taking publications.

    def take(self, publication: Publication) -> None:
        """Deliver a publication with a position, or hold it until what is missing before it is read. Never blocks."""
        audience = publication.audience
        tail = self._tails.get(audience)
        if tail is None:
            self._node.deliver_now(publication)  # no connection here needs the tail
            return
        taken = tail.take(publication)
        if taken is Taken.NEXT:
            self._node.arrived(audience)
            if self.deliveries.is_running(audience):
                self._check_waiting(audience, tail)
            else:
                self.deliveries.next(publication, audience, tail)
            self._taken += 1
            if self._taken % _COUNT_AFTER == 0:
                self._shrink()
        elif taken is Taken.SUSPECT:
            self._begin_reading(audience, tail)

    def _check_waiting(self, audience: Audience, tail: Tail) -> None:
        if tail.waiting > _MAX_WAITING or tail.bytes > _MAX_WAITING_BYTES:
            tail.skip()
            self._break(audience, "too_many", 0.0)

    # Reading what is missing.

    def _begin_reading(self, audience: Audience, tail: Tail) -> None:
        if audience not in self._readings:
            reading = self._readings[audience] = _Reading()
            self._tasks.spawn(self._read(audience, tail, reading), "history")

    async def attempted(self, audience: Audience) -> None:
        """Return when the running attempt to read has ended, or at once if none runs."""
        reading = self._readings.get(audience)
        if reading is not None:
            await reading.attempted.wait()

    async def settled(self, audience: Audience) -> bool:
        """Return true when nothing has to be read any more, or false when it can't be read now."""
        while (tail := self._tails.get(audience)) is not None and tail.is_reading:
            before = self._readings.get(audience)
            if before is None or before.attempted.is_set():
                return False
            await before.attempted.wait()
        return True

    async def read_on(self, audience: Audience, tail: Tail) -> bool:
        """Read what came after the top; return true when that is done, or false when it can't be done now."""
        read = tail.want_read()
        while tail.read < read and self._tails.get(audience) is tail:
            tail.is_reading = True
            self._begin_reading(audience, tail)
            if not await self.settled(audience):
                return False
        return True

    def forgotten(self, audience: Audience) -> None:
        """Read the history of an audience again, because it was removed. Until then nothing of it is sent."""
        tail = self._tails.get(audience)
        if tail is not None:
            tail.want_read()
            tail.is_void = True
            self._begin_reading(audience, tail)

    async def refill(self, audience: Audience, tail: Tail) -> None:
        """Read what the tail has dropped to save memory. Many calls at once make one read."""
        refilling = self._refilling.get(audience)
        if refilling is None:
            refilling = self._refilling[audience] = self._tasks.spawn(self._refill(audience, tail), "history refill")
        await asyncio.wait([refilling])

    async def _refill(self, audience: Audience, tail: Tail) -> None:
        await self._tasks.begun()
        try:
            replay = await self._engine.read(audience, None, tail.history)
            tail.refilled(replay)
            if replay.top.epoch != tail.epoch and self._tails.get(audience) is tail:
                tail.want_read()
                self._begin_reading(audience, tail)
        except EngineError as error:
            logger.info(
                "the history of %s can't be read again (%s)",
                for_logs(audience),
                error,
                extra=about("history.unreadable", audience=audience.kind),
            )
        finally:
            del self._refilling[audience]

    async def _read(self, audience: Audience, tail: Tail, reading: _Reading) -> None:
        await self._tasks.begun()
        failures = 0
        pause = _FIRST_PAUSE
        try:
            while self._tails.get(audience) is tail and tail.is_reading:
                reading.attempted.clear()
                was_unknown = not tail.epoch
                tail.reads += 1
                number = tail.reads
                try:
                    replay = await self._engine.read(audience, tail.position, tail.history)
                except EngineError as error:
                    failures += 1
                    self._failed(audience, tail, failures, error)
                    reading.attempted.set()
                    await self._pause(reading, pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                    continue
                if self._tails.get(audience) is not tail:
                    return
                failures, pause = 0, _FIRST_PAUSE
                top = tail.top
                broken = tail.filled(replay, number)
                tail.read = number
                seconds, tail.heard_at = _now() - tail.heard_at, _now()
                if broken is not None:
                    self._break(audience, broken, seconds)
                elif not was_unknown and tail.top > top:  # if not, nothing was missing
                    self._counters.heals += 1
                self._node.arrived(audience)
                self.deliveries.go_on(audience, tail)
        finally:
            reading.attempted.set()
            if self._readings.get(audience) is reading:
                del self._readings[audience]

    def _failed(self, audience: Audience, tail: Tail, failures: int, error: EngineError) -> None:
        tail.has_failed = True
        if self._throttle.is_due("read"):
            logger.warning(
                "missed messages to %s can't be read (%s); trying again",
                for_logs(audience),
                error,
                extra=about("history.unreadable", audience=audience.kind),
            )
        if failures >= _MAX_FAILURES:
            if (reason := tail.given_up()) is not None:
                self._break(audience, reason, _now() - tail.heard_at)
            self._node.arrived(audience)
            self.deliveries.go_on(audience, tail)

    async def _pause(self, reading: _Reading, seconds: float) -> None:
        reading.wanted.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0, seconds)):  # noqa: S311  # jitter
                await reading.wanted.wait()

    def _break(self, audience: Audience, reason: Reason, seconds: float) -> None:
        self.deliveries.broken(audience)
        if self._breaks is not None:
            self._breaks.add(audience)
        self._node.broken(audience, reason, None if self._breaks is not None else seconds)

    # Checks.

    async def heal(self) -> Collection[Audience]:
        """After an outage, read all that was missed; return the audiences for which that can't be done.

        An audience whose position can't be asked is one of them.
        """
        breaks = self._breaks = set() if self._breaks is None else self._breaks
        audiences = list(self._tails)
        breaks.update(audience for audience, tail in self._tails.items() if not tail.epoch)
        try:
            breaks.update(await self._look_at(audiences))
            for audience in audiences:
                if not await self.settled(audience):
                    breaks.add(audience)
        finally:
            if self._breaks is breaks:
                self._breaks = None
        return breaks

    def suspect(self) -> None:
        """Check soon whether something is missing, because the engine may have lost publications."""
        if self._tails:
            self._tasks.spawn(self._look_in_peace(list(self._tails)), "history look")

    async def _look_in_peace(self, audiences: Sequence[Audience]) -> None:
        await self._tasks.begun()
        await self._look_at(audiences)

    async def _look_at(self, audiences: Sequence[Audience]) -> set[Audience]:
        # The audiences whose position can't be asked now.
        unknown: set[Audience] = set()
        for start in range(0, len(audiences), _ASKED_AT_ONCE):
            some = [each for each in audiences[start : start + _ASKED_AT_ONCE] if each in self._tails]
            for audience in some:
                if (reading := self._readings.get(audience)) is not None:
                    reading.wanted.set()
            try:
                positions = await self._engine.positions(some, [self._tails[each].history for each in some])
            except EngineError:
                unknown.update(some)
                continue
            for audience, position in zip(some, positions, strict=True):
                tail = self._tails.get(audience)
                if tail is None or tail.is_reading:
                    continue
                tail.heard_at = _now()
                if position.epoch != tail.epoch or position.offset > tail.top:
                    tail.is_reading = True
                    self._begin_reading(audience, tail)
        return unknown

    def _look_later(self) -> None:
        # There is only one timer, also if a check opens another tail before the check ends.
        if self._look is None:
            loop = asyncio.get_running_loop()
            self._look = loop.call_later(_QUIET_SECONDS, self._look_at_the_quiet, context=Context())

    def _look_at_the_quiet(self) -> None:
        self._look = None
        self._shrink()
        if not self._tails:
            return
        since = _now() - _QUIET_SECONDS
        quiet = [audience for audience, tail in self._tails.items() if tail.heard_at < since and not tail.is_reading]
        if quiet:
            self._tasks.spawn(self._look_in_peace(quiet), "history look")
        self._look_later()

    def _shrink(self) -> None:
        excess = sum(tail.bytes for tail in self._tails.values()) - _MAX_BYTES
        if excess <= 0:
            return
        for tail in sorted(self._tails.values(), key=lambda tail: tail.heard_at):
            excess -= tail.bytes
            tail.shrink()
            if excess <= 0:
                return

    async def aclose(self, patience: float = 0.0) -> None:
        """Deliver what waits for at most so many seconds, then end."""
        if self._look is not None:
            self._look.cancel()
        await self.deliveries.aclose(patience)
        await self._tasks.cancel()
