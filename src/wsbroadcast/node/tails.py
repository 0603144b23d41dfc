"""The tails of one node: opened with the first member, read where something is missing, delivered in order."""

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

# An audience from which nothing came for so long is asked where it is: its last message may have been lost.
_QUIET_SECONDS = 10.0

# Audiences in one question, so that its timeout is for something that can be done in time.
_ASKED_AT_ONCE = 1000

# What may wait for hooks, or for a crowd that is behind, in one tail. Beyond, there is a break.
_MAX_WAITING = 65_536
_MAX_WAITING_BYTES = 32 * 1024 * 1024

# How many bytes of payload the tails have together, before those that are quiet for longest keep the position only.
_MAX_BYTES = 64 * 1024 * 1024
_COUNT_AFTER = 1024

# Between two attempts to read; after so many failures what was held is delivered, behind a break.
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_MAX_FAILURES = 4


def _now() -> float:
    return asyncio.get_running_loop().time()


class _Reading:
    """A history that is being read, attempt after attempt."""

    def __init__(self) -> None:
        self.attempted = asyncio.Event()
        """Set when the attempt that runs has ended, however it did."""
        self.wanted = asyncio.Event()
        """Set when the next attempt may be made at once."""


class Tails:
    """What this node has of the histories of its audiences, and the way from there to the connections.

    Args:
        node: Delivers.
        engine: Keeps what is published.
        rules: Say what is kept.
        counters: Where is counted what was healed.
        turn_messages: How many publications are replayed to a connection at once.
        turn_bytes: How many bytes of payload are, if that is more than one.
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
        # Breaks since the look that runs has begun; `None` while none runs whose caller wants to know.
        self._breaks: set[Audience] | None = None
        self._tasks = Tasks()
        self.deliveries = Deliveries(node)
        """What is on its way from here."""
        self._look: asyncio.TimerHandle | None = None
        self._throttle = Throttle()
        self._taken = 0

    def history(self, audience: Audience) -> History | None:
        """Return how much is kept of an audience; `None` for nothing."""
        return self._rules.of(audience)

    def of(self, audience: Audience) -> Tail | None:
        """Return the tail of an audience that has one here."""
        return self._tails.get(audience)

    def is_due(self, publication: Publication) -> bool:
        """Tell whether a publication may still be delivered: there was no break since it was taken."""
        tail, position = self._tails.get(publication.audience), publication.position
        if tail is None or position is None:
            return True
        return tail.epoch == position.epoch and tail.delivered < position.offset

    # From the first member to the last.

    async def open(self, audiences: Iterable[Audience]) -> None:
        """Have tails of those audiences that have a history; return when they were read, or can't be read now."""
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
        """Forget the tail of an audience that has no member here any more."""
        if self._tails.pop(audience, None) is not None:
            reading = self._readings.pop(audience, None)
            if reading is not None:
                reading.wanted.set()
                reading.attempted.set()

    # What comes.

    def take(self, publication: Publication) -> None:
        """Deliver a publication with a position, or hold it until what is missing before it is read; never blocks."""
        audience = publication.audience
        tail = self._tails.get(audience)
        if tail is None:
            self._node.deliver_now(publication)  # nobody is here, or nobody that minds a hole
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

    # What is missing.

    def _begin_reading(self, audience: Audience, tail: Tail) -> None:
        if audience not in self._readings:
            reading = self._readings[audience] = _Reading()
            self._tasks.spawn(self._read(audience, tail, reading), "history")

    async def attempted(self, audience: Audience) -> None:
        """Return when an attempt to read that runs now has ended, or at once if none runs."""
        reading = self._readings.get(audience)
        if reading is not None:
            await reading.attempted.wait()

    async def settled(self, audience: Audience) -> bool:
        """Return when nothing has to be read any more, or nothing can be; tell which."""
        while (tail := self._tails.get(audience)) is not None and tail.is_reading:
            before = self._readings.get(audience)
            if before is None or before.attempted.is_set():
                return False
            await before.attempted.wait()
        return True

    async def read_on(self, audience: Audience, tail: Tail) -> bool:
        """Read what came since the top; return when that is done, or can't be done now, and which."""
        read = tail.want_read()
        while tail.read < read and self._tails.get(audience) is tail:
            tail.is_reading = True
            self._begin_reading(audience, tail)
            if not await self.settled(audience):
                return False
        return True

    def forgotten(self, audience: Audience) -> None:
        """Read the history of an audience anew, because it was removed; until then nobody is sent anything of it."""
        tail = self._tails.get(audience)
        if tail is not None:
            tail.want_read()
            tail.is_void = True
            self._begin_reading(audience, tail)

    async def refill(self, audience: Audience, tail: Tail) -> None:
        """Read what the tail has forgotten to save memory; many who ask at once are one read."""
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
                "what was forgotten of %s can't be read (%s)",
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
                elif not was_unknown and tail.top > top:  # else nothing was missing
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
                "what was missed of %s can't be read (%s); trying again",
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

    # Looks.

    async def heal(self) -> Collection[Audience]:
        """Read on wherever something came that isn't here, after an outage; return the audiences that are broken.

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
        """Look soon whether something is missing: the engine has lost some of what it was brought."""
        if self._tails:
            self._tasks.spawn(self._look_in_peace(list(self._tails)), "history look")

    async def _look_in_peace(self, audiences: Sequence[Audience]) -> None:
        await self._tasks.begun()
        await self._look_at(audiences)

    async def _look_at(self, audiences: Sequence[Audience]) -> set[Audience]:
        # Those that can't be asked now.
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
        # One timer for all, also if what a look begins makes another tail before that look's end.
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
        """End; what waits may still be delivered for so many seconds."""
        if self._look is not None:
            self._look.cancel()
        await self.deliveries.aclose(patience)
        await self._tasks.cancel()
