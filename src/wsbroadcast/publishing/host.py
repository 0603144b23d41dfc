"""Where a publisher runs: in an event loop of the app's, or in a thread of its own; one after another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import LoopEnded, LoopThread, Patience, running_loop
from wsbroadcast.engines.contract import Engine, Health, KeepsHistory, publish_all
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError
from wsbroadcast.history import Appended, HistoryRules, check_key
from wsbroadcast.publication import Control, Gap, Publication

T = TypeVar("T")

CLOSED = "the publisher is closed"
"""What an error says after the end."""

# Seconds between two looks whether the engine has been stopped in the event loop where it ran before.
_LOOK_SECONDS = 0.01


class NullReceiver:
    """What an engine hands its publications to where no connections are; it is subscribed to nothing."""

    def take(self, publication: Publication | Control) -> None:
        """Do nothing."""

    async def deliver(self, publication: Publication | Control) -> None:
        """Do nothing."""

    def gap(self, gap: Gap) -> None:
        """Do nothing."""

    def suspect(self) -> None:
        """Do nothing."""


class HasEnded(LifecycleError):
    """Raised by a host that has ended. Nothing was sent; the call may be made at another host."""


class Host:
    """The engine in one event loop, from its first use there until it is stopped or the loop ends.

    It is made in its event loop. `submit`, `stop`, `join` and the properties are for all threads, the rest is for that
    loop.

    Args:
        engine: An engine that is not started, or that runs at the host before.
        before: The host before. The engine is started here as soon as it no longer runs there.
        start_timeout: Seconds that a call waits for the engine to start. It goes on starting after that.
    """

    def __init__(self, engine: Engine, before: Host | None, start_timeout: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread: LoopThread[Host] | None = None
        """The thread that the event loop has to itself; `None` if the loop belongs to the app."""
        self._engine = engine
        self._before = before
        self._start_timeout = start_timeout
        # Whether the engine was started here and not yet stopped, nor started at a later host.
        self._has_engine = False
        self._has_started = False
        self._is_stopped = False
        self._stopping = asyncio.Event()
        # Owned and awaited by `_life`, because the call that began it may be cancelled.
        self._start: asyncio.Task[None] | None = None
        # Awaited by who stops the host; cancelled, with everything else in the loop, when `asyncio.run` ends.
        self._life = self.loop.create_task(self._live(), name="wsbroadcast publisher", context=Context())

    @property
    def has_ended(self) -> bool:
        """Whether it was stopped, or its event loop ends; the loop still runs then, to cancel what is left in it."""
        return self._is_stopped or self._life.done() or self._life.cancelling() > 0 or not self.loop.is_running()

    @property
    def is_over(self) -> bool:
        """Whether the engine no longer runs here, so that it may be started elsewhere."""
        return (self._life.done() or not self.loop.is_running()) and (self._before is None or self._before.is_over)

    @property
    def is_started(self) -> bool:
        """Whether the engine has started, perhaps without its broker, and was not stopped."""
        return self._has_started and not self.has_ended

    async def start(self) -> bool:
        """Start the engine, unless that was done; return whether it has started, or False if it takes longer.

        Raises:
            HasEnded: If the host has.
            ConfigurationError: If the broker refuses us.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
        """
        if self.has_ended:
            raise HasEnded(CLOSED)
        if self._start is None or (self._start.done() and not self._has_started):
            start = self._start_engine()
            self._start = self.loop.create_task(start, name="wsbroadcast publisher start", context=Context())
            # The callers that waited for it may be gone. The next call begins again and sees the error itself.
            self._start.add_done_callback(lambda start: start.cancelled() or start.exception())
        begun = self._start
        if not begun.done():
            with suppress(TimeoutError):
                async with Patience(self._start_timeout):
                    await asyncio.wait([begun])
        if self.has_ended or begun.cancelled():
            raise HasEnded(CLOSED)
        if begun.done():
            begun.result()
        return begun.done()

    async def _start_engine(self) -> None:
        if self._before is not None:
            while not self._before.is_over:  # noqa: ASYNC110  # its event loop may end without telling anyone
                await asyncio.sleep(_LOOK_SECONDS)
            self._before._has_engine = False  # in case its event loop runs once more
            self._before = None
        self._has_engine = True
        await self._engine.start(NullReceiver())
        self._has_started = True

    async def publish(
        self, publications: Sequence[Publication | Control], key: str | None = None
    ) -> dict[Audience, Appended]:
        """Start if necessary, and return once the engine has taken the publications, and where it keeps which.

        Raises:
            HasEnded: If the host has; nothing was sent.
            EngineError: If the broker doesn't take it; `EngineUnavailable` if to try again may help.
            ConfigurationError: If there is a key for an audience of which nothing is kept.
        """
        rules = await self.rules()
        if key is not None:
            if rules is None and not (health := await self._engine.health()).is_ok:
                raise EngineUnavailable(f"what is kept isn't known: {health.detail}; nothing was sent")
            check_key(key, rules, [each.audience for each in publications])
        return await publish_all(self._engine, publications, rules, key)

    async def rules(self) -> HistoryRules | None:
        """Start if necessary, and return what is kept, as far as it is known.

        Raises:
            HasEnded: If the host has.
            EngineUnavailable: If the engine doesn't start so quickly.
        """
        if not (self.is_started or await self.start()):
            raise EngineUnavailable(f"the {self._engine.name} engine finds no broker so quickly; nothing was sent")
        return self._engine.rules if isinstance(self._engine, KeepsHistory) else None

    async def ask(self, question: Callable[[Engine, HistoryRules | None], Coroutine[Any, Any, T]]) -> T:
        """Start if necessary, and ask the engine something about what is kept.

        Raises:
            HasEnded: If the host has.
            EngineUnavailable: If the broker can't be asked.
        """
        return await question(self._engine, await self.rules())

    async def health(self) -> Health:
        """Tell whether an echo comes back through the broker."""
        if not (self.is_started or await self.start()):
            return Health(self._engine.name, False, "not connected yet")
        return await self._engine.health()

    def submit(self, call: Callable[[Host], Coroutine[Any, Any, T]]) -> Future[T]:
        """Make a call from another thread; only where the host has a thread of its own.

        Raises:
            HasEnded: If the host has; the call was not made.
        """
        assert self.thread is not None
        try:
            return self.thread.submit(partial(call, self))
        except LoopEnded:
            raise HasEnded(CLOSED) from None

    def stop(self) -> None:
        """Begin to end: what was published goes out, if that is possible quickly, and the engine is stopped."""
        self._is_stopped = True
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._stopping.set)
        if self.thread is not None:
            self.thread.stop(self.wait_ended)

    async def wait_ended(self) -> None:
        """Return when a host that was stopped has ended."""
        await asyncio.shield(self._life)

    def join(self) -> None:
        """Block until a host that was stopped has ended, or its event loop."""
        if self.thread is not None:
            self.thread.join()
        while not self._life.done() and self.loop.is_running():
            time.sleep(_LOOK_SECONDS)

    async def _live(self) -> None:
        await self._stopping.wait()
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        if self._has_engine:
            self._has_engine = False
            await self._engine.aclose()


class State:
    """What a publisher is in one process. `lock` guards the rest; it is held only briefly.

    Args:
        parent: The same in the process that this one was forked off.
    """

    def __init__(self, parent: State | None = None) -> None:
        self.lock = threading.Lock()
        # How many `start` are without an `aclose` yet, by the event loop in which they were called, if any.
        self.starts: Counter[asyncio.AbstractEventLoop | None] = Counter(parent.starts if parent else ())
        # Whether it refuses to work until the next start.
        self.is_closed: bool = parent is not None and parent.is_closed
        self.host: Host | None = None
        # The host before, which may be about to end.
        self.left: Host | None = None
        # Whether it is used outside of one event loop. Then it runs in a thread of its own until it is closed.
        self.is_shared = False

    def leave(self) -> None:
        """Stop the host, if there is one; the next call gets another."""
        if self.host is not None:
            self.left, self.host = self.host, None
            self.left.stop()

    def leave_ended(self) -> None:
        """Leave the host if it has ended."""
        host = self.host
        if host is not None and host.has_ended:
            # A call that comes while its event loop ends can't begin anew in there.
            self.is_shared = self.is_shared or host.loop is running_loop()
            self.leave()

    def count(self, change: int) -> int:
        """Count a start more or less; return how many are left. Those of event loops that are closed don't count."""
        self.starts = Counter({loop: n for loop, n in self.starts.items() if n and not (loop and loop.is_closed())})
        here = running_loop()
        if change < 0 and not self.starts[here]:
            here = next(iter(+self.starts), None)
        self.starts[here] = max(0, self.starts[here] + change)
        return self.starts.total()
