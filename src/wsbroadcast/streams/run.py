"""One run of a stream, as its producer uses it. What is appended is joined for a moment, then kept and sent."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import time
from typing import Any, Protocol

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import running_loop
from wsbroadcast.engines.contract import KeepsHistory
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, LimitExceeded, StreamEnded
from wsbroadcast.history import Appended
from wsbroadcast.logs import about, logger
from wsbroadcast.message import Message
from wsbroadcast.options import check_count, check_positive
from wsbroadcast.publication import Publication
from wsbroadcast.streams.entries import End, EndState, State, check_readable, text_json, write_part
from wsbroadcast.streams.ledger import END_KEY, MAX_SECONDS, STREAMS, Ledger, Start, log_of
from wsbroadcast.text import plain

JOIN_SECONDS = 0.04
"""How long text is joined before it is kept, in seconds."""

# After so many publications the time doubles, so that a run of a day doesn't have more than its log keeps.
_PATIENT_AFTER = 2048
_LONGEST_JOIN_SECONDS = 5.12

# About the most that one publication and one piece of text hold, so that every broker takes it.
_PART_BYTES = 256 * 1024
_TEXT_CHARACTERS = 64 * 1024

# Between two attempts after a failure; it grows from the first to the second.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0

MAX_BYTES = 16 * 1024 * 1024
"""The largest value that `StreamLimits.max_bytes` may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """How much one run of a stream may produce. Beyond it, `append` raises `LimitExceeded`.

    Raises:
        ConfigurationError: If a number makes no sense.
    """

    max_bytes: int = 1024 * 1024
    """All text and data together, in bytes of UTF-8 and JSON."""
    max_entries: int = 4096
    """The number of entries. Texts that follow one another count as one entry."""
    max_entry_bytes: int = 256 * 1024
    """The largest single data, in bytes of JSON."""
    max_seconds: float = 3600.0
    """How long a run may last, at most a day. A longer one ends as `error`."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_entries", "max_entry_bytes"):
            check_count(f"StreamLimits.{name}", getattr(self, name))
        check_positive("StreamLimits.max_seconds", self.max_seconds)
        for name, most in (("max_bytes", MAX_BYTES), ("max_entries", 2**16), ("max_entry_bytes", 512 * 1024)):
            check_most(f"StreamLimits.{name}", getattr(self, name), most)
        check_most("StreamLimits.max_seconds", self.max_seconds, MAX_SECONDS)


def check_most(name: str, value: float, most: float) -> None:
    """Check that an option isn't too large.

    Raises:
        ConfigurationError: If it is.
    """
    if value > most:
        raise ConfigurationError(f"{name} is at most {most:,.0f}, not {value!r:.80}")


LOST = End("lost")
"""The end of a run whose node is gone."""

Encode = Callable[[object], bytes]
"""Returns data as JSON."""


class Host(Protocol):
    """What a run needs from the place where it is produced."""

    def is_alive(self, incarnation: str) -> bool:
        """Return whether the node's lease is valid, and is the one that the run was begun under."""

    async def wait_alive(self, incarnation: str) -> bool:
        """Wait until the node's lease is valid; return whether it is the one that the run was begun under.

        Raises:
            EngineUnavailable: If the broker can't be reached.
        """

    def ended(self, run: Run) -> None:
        """Called when a run has written its end, or can't."""


class Run:
    """One run of a stream: `run.append("text")`, `run.append({"tool": "search"})`.

    Any viewer on any node can read what is appended within about 40 ms. Text that is appended meanwhile is joined.
    """

    def __init__(
        self,
        host: Host,
        keeper: KeepsHistory,
        ledger: Ledger,
        start: Start,
        limits: StreamLimits,
        encode: Encode,
    ) -> None:
        self._host = host
        self._keeper = keeper
        self._ledger = ledger
        self._start = start
        self._limits = limits
        self._encode = encode
        self._log: Audience = log_of(start.run)
        self._loop = asyncio.get_running_loop()
        # What was appended and isn't written yet: text as it was, data as JSON.
        self._held: deque[str | bytes] = deque()
        self._room = limits.max_bytes
        self._count = 0
        self._was_text = False
        self._end: End | None = None
        # Whether the writer knows that something is held. The first `append` wakes it.
        self._is_awake = False
        # Whether text was appended last, the writer knows of it, and the run goes on.
        self._goes_on = False
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # About the log: entries that are written, publications, and the epoch.
        self._at = self._parts = 0
        self._epoch = ""
        self.task: asyncio.Task[None] | None = None
        """The task that produces, if the manager owns it."""
        self.written: asyncio.Future[None] = self._loop.create_future()
        """Done when the run's end is written, or can't be."""

    # For the producer.

    @property
    def id(self) -> str:
        """The stream's id."""
        return self._start.id

    @property
    def run_id(self) -> str:
        """The id of this run. No other run has it."""
        return self._start.run

    @property
    def user(self) -> str | None:
        """The user whose stream it is, as text."""
        return self._start.user

    @property
    def ttl(self) -> float:
        """For how many seconds it is kept after its end."""
        return self._start.ttl

    @property
    def state(self) -> State:
        """`running`, or how it has ended: `done`, `error`, `cancelled` or `lost`."""
        return "running" if self._end is None else self._end.state

    @property
    def cancelled(self) -> bool:
        """Whether it was stopped or lost. Then producing more makes no sense."""
        return self._end is not None and self._end.state in ("cancelled", "lost")

    def append(self, entry: str | dict[str, Any]) -> None:
        """Append text or data. It doesn't wait: what is appended is on its way within 40 ms.

        Texts that follow one another are joined. Data is written as JSON at once, so you may change it afterwards. This
        may be called in any thread, but only in one at a time.

        Raises:
            StreamEnded: If the run has ended: it was stopped, or its node was cut off from the broker for too long.
            LimitExceeded: If it would be more than the run's limits allow. It isn't appended, and the run goes on.
            EncodeError: If data can't be written as JSON, or can't be read again: it has more than 190 levels.
            TypeError: If it is neither a str nor a dict.
        """
        # The usual case: text after text, and the writer knows of it already. This is called for each token.
        if self._goes_on and type(entry) is str and entry.isascii():
            room = self._room - len(entry)
            if room >= 0:
                self._room = room
                self._held.append(entry)
                if not self._goes_on:  # in another thread, the writer may have looked in between
                    self._tell_writer()
                return
        self._append(entry)

    def _append(self, entry: object) -> None:
        if self._end is not None:
            raise StreamEnded(self.id, self._end.state)
        if isinstance(entry, str):
            if not entry:
                return
            text = plain(entry)
            self._take(text, len(text.encode("utf-8", "replace")), is_new=not self._was_text)
        elif isinstance(entry, dict):
            data = self._encode(entry)
            if len(data) > self._limits.max_entry_bytes:
                raise self._too_much("max_entry_bytes", "bytes at once")
            check_readable(data)
            self._take(data, len(data), is_new=True)
        else:
            raise TypeError(f"append takes a str or a dict, not {type(entry).__name__}")
        self._was_text = isinstance(entry, str)
        self._tell_writer()

    def _tell_writer(self) -> None:
        # This runs in the thread of the producer, while the writer takes what is held or the run ends. One side writes
        # first what the other side reads last, so nothing is held that the writer doesn't know of.
        self._goes_on = self._was_text
        if self._end is not None:
            self._goes_on = False
        if not self._is_awake:
            self._is_awake = True
            if running_loop() is self._loop:
                self._notice()
            else:
                self._loop.call_soon_threadsafe(self._notice)

    def _take(self, entry: str | bytes, size: int, *, is_new: bool) -> None:
        if size > self._room:
            raise self._too_much("max_bytes", "bytes")
        if is_new and self._count >= self._limits.max_entries:
            raise self._too_much("max_entries", "entries")
        self._room -= size
        self._count += is_new
        self._held.append(entry)

    def _too_much(self, limit: str, of_what: str) -> LimitExceeded:
        most = getattr(self._limits, limit)
        return LimitExceeded(
            limit, f"a run has at most {most:,} {of_what}: to raise that, pass limits=StreamLimits({limit}=…)"
        )

    # Its end. The first end counts.

    def end(self, state: EndState, error: str = "") -> None:
        """End it here. What is held is written first."""
        if self._end is None:
            self._end = End(state, error)
            self._goes_on = False
            self._hurry()

    def stop(self) -> None:
        """End it because somebody asked for that, and let the producer know."""
        if self._end is None:
            self.end("cancelled")
            self._cancel()

    def lose(self) -> None:
        """End it because the node's lease has run out. Others may have written so already."""
        if self._end is None:
            self.end("lost")
            if self.task is not asyncio.current_task():  # a producer that ends its own manager must finish doing that
                self._cancel()

    def lose_if(self, incarnation: str) -> None:
        """End it if it was begun under a lease that is lost."""
        if self._start.node == incarnation:
            self.lose()

    def _overrun(self) -> None:
        if self._end is None:
            self.end("error", "it took too long")
            self._cancel()

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def was_ended_elsewhere(self, error: BaseException) -> bool:
        """Return whether an error only says that the run was stopped or lost."""
        if isinstance(error, BaseExceptionGroup):  # a task group raises one even for a single error
            return all(map(self.was_ended_elsewhere, error.exceptions))
        return isinstance(error, StreamEnded) and error.id == self.id and self.cancelled

    @property
    def how_it_ended(self) -> End | None:
        """The end, with what went wrong; `None` if it hasn't ended."""
        return self._end

    async def wait_written(self, seconds: float) -> None:
        """Wait until its end is written, at most this many seconds."""
        await asyncio.wait([self.written], timeout=seconds)

    # The writer.

    def _notice(self) -> None:
        if self._timer is None and self._wake is not None:
            self._timer = self._loop.call_later(self._pause(), self._hurry)

    def _pause(self) -> float:
        return min(JOIN_SECONDS * 2.0 ** (self._parts // _PATIENT_AFTER), _LONGEST_JOIN_SECONDS)

    def _hurry(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def write(self) -> None:
        """Write what is appended until the end is written."""
        deadline = self._loop.call_later(self._limits.max_seconds, self._overrun)
        try:
            while await self._write_more():
                pass
            await self._write_end()
        except Exception as error:  # a bug, here or in a driver: the run gets an end all the same
            log_failure(error)
            self._end = End("error", "it can't be kept")
            self._goes_on = False
            self._cancel()
            await insist(lambda: self._ledger.end_log(self._start, self._end or LOST))
            await insist(lambda: self._ledger.end(self._start, self._end or LOST))
        finally:
            deadline.cancel()
            self._hurry()
            if not self.written.done():
                self.written.set_result(None)
            self._host.ended(self)

    async def _write_more(self) -> bool:
        # Return whether it goes on. What is held when the run ends is written with the end.
        if self._end is None:
            await self._until_due()
        if self._end is not None:
            return False
        # Before what is held is taken, and in this order: from now on an `append` wakes the writer again.
        self._is_awake = False
        self._goes_on = False
        try:
            for entries in self._taken():
                if await self._keep(entries, None) is None:
                    self.lose()
                    break
        except EngineError as error:
            self._fail(error)
        return True

    async def _until_due(self) -> None:
        self._wake = self._loop.create_future()
        if self._held:
            self._notice()
        try:
            await self._wake
        finally:
            self._wake = None

    def _taken(self) -> list[list[bytes]]:
        # Take what is held, as a list of publications, each a list of entries as JSON.
        parts: list[list[bytes]] = []
        size, pieces = _PART_BYTES, list[str]()

        def add(entry: bytes) -> None:
            nonlocal size
            if size + len(entry) > _PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(entry)
            size += len(entry)

        def add_text() -> None:
            text = "".join(pieces)
            pieces.clear()
            for start in range(0, len(text), _TEXT_CHARACTERS):
                add(text_json(text[start : start + _TEXT_CHARACTERS]))

        for _ in range(len(self._held)):
            entry = self._held.popleft()
            if isinstance(entry, str):
                pieces.append(entry)
            else:
                add_text()
                add(entry)
        add_text()
        return parts

    async def _keep(self, entries: list[bytes], end: End | None) -> Appended | None:
        # Try until it works. It isn't known what becomes of an attempt that times out, but if it comes twice, viewers
        # ignore the second. With a key for each, the broker would have to remember all keys for minutes. Return `None`
        # if the lease that the run was begun under has run out: others may have ended the run.
        publication = Publication(Message(write_part(self._at, entries, end), "json"), self._log)
        key = None if end is None else END_KEY
        history = STREAMS if end is None else self._start.history(time() - self._start.at)
        pause = _FIRST_PAUSE
        while True:
            try:
                node = self._start.node
                if not self._host.is_alive(node) and not await self._host.wait_alive(node):
                    return None
                appended = await self._keeper.append(publication, history, key)
            except EngineUnavailable:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            if self._epoch and appended.position.epoch != self._epoch:
                raise EngineError("the broker has lost what was kept of it")
            self._epoch = appended.position.epoch
            self._at += len(entries)
            self._parts += 1
            return appended

    def _fail(self, error: EngineError) -> None:
        log_failure(error)
        self.end("error", "it can't be kept")
        self._held.clear()
        self._cancel()

    async def _write_end(self) -> None:
        assert self._end is not None
        try:
            appended = await self._append_end(self._end)
        except EngineError as error:
            log_failure(error)
            self._end, appended = End("error", "it can't be kept"), None
        else:
            if appended is None:
                self._end = End("lost")  # what is held isn't written, so it can't be `done`
        if appended is None:
            await insist(lambda: self._ledger.end_log(self._start, self._end or LOST))
        if appended is None or appended.is_repeat:
            await insist(self._learn_end)
        await insist(lambda: self._ledger.end(self._start, self._end or LOST))

    async def _append_end(self, end: End) -> Appended | None:
        # With everything that is held before it.
        *parts, last = self._taken() or [[]]
        for entries in parts:
            if await self._keep(entries, None) is None:
                return None
        return await self._keep(last, end)

    async def _learn_end(self) -> None:
        # Another node may have ended it before. The first end counts.
        self._end = await self._ledger.end_of(self._start) or self._end

    def __repr__(self) -> str:
        return f"<Run {self.id!r} {self.state}>"


async def insist(call: Callable[[], Awaitable[None]]) -> None:
    """Call something until the broker takes it, or refuses it for good."""
    pause = _FIRST_PAUSE
    while True:
        try:
            await call()
            return
        except EngineUnavailable:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        except EngineError as error:
            log_failure(error)
            return


def log_failure(error: Exception) -> None:
    """Log that a stream can't go on, or can't be ended properly."""
    logger.error("a stream can't go on: %s", error, exc_info=error, extra=about("stream.failed"))
