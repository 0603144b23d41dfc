"""Where a publisher's engine runs: in the event loop of the app, or in one of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeAlias, TypeVar

from wsbroadcast.concurrency.loops import Patience
from wsbroadcast.engines.contract import Engine, Health
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.publication import Dismissal, Gap, Publication
from wsbroadcast.publishing.calls import Calls, HasEnded, Ticket

T = TypeVar("T")

# Seconds that a call waits for the engine to start. It goes on starting after that.
_START_SECONDS = 2.25

# Between two looks whether the home before has ended.
_LOOK_SECONDS = 0.01


Call: TypeAlias = Callable[["Home", Ticket], Coroutine[Any, Any, T]]
"""What is to be done in a home."""


class Nobody:
    """Receives for a node without connections, which is subscribed to nothing."""

    def take(self, publication: Publication | Dismissal) -> None:
        """There is nobody here."""

    async def deliver(self, publication: Publication | Dismissal) -> None:
        """There is nobody here."""

    def gap(self, gap: Gap) -> None:
        """Nobody misses anything."""


class Home:
    """An engine in one event loop. Its coroutines belong there, whichever thread wants them.

    Args:
        engine: An engine that isn't started, or that the home before had.
        loop: Where it runs.
        before: Where the engine was before; it is started here when it is stopped there.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, before: Home | None = None) -> None:
        self.loop = loop
        self.starts = 0
        """How many `start` of its own event loop are without an `aclose` yet; the publisher counts."""
        self._engine = engine
        self._before = before
        # Whether the engine was started here, and wasn't stopped or started elsewhere since.
        self._has_engine = False
        # Both owned by this object and awaited by `end`; not by the call that began them, which may be cancelled.
        self._start: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None
        self._calls = Calls(loop, lambda: self.has_ended)
        self._stop = asyncio.Event()
        self._is_ended = False
        self._is_over = threading.Event()

    @property
    def has_ended(self) -> bool:
        """Whether it was ended, or its event loop, which may still run to cancel what is left in it."""
        life = self._life
        is_dying = life is not None and (life.done() or life.cancelling() > 0)
        return self._is_ended or is_dying or not self.loop.is_running()

    @property
    def is_over(self) -> bool:
        """Whether the engine may be started elsewhere."""
        is_over = self._is_over.is_set() or not self.loop.is_running()
        return is_over and (self._before is None or self._before.is_over)

    def serves(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Tell whether calls from that event loop, or from none, are safe here: it says before it ends."""
        return self.loop is loop or self.starts > 0

    @property
    def is_started(self) -> bool:
        """Whether the engine has started, degraded maybe, and wasn't ended."""
        return not self.has_ended and self._start is not None and self._start.done() and not self._has_failed()

    async def start(self) -> bool:
        """Start the engine if that hasn't been done; return whether it has started, or still tries to.

        Raises:
            HasEnded: If it has.
            ConfigurationError: If the broker refuses us.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
        """
        if self.has_ended:
            raise HasEnded
        if self._life is None:
            self._life = self.loop.create_task(self._live(), name="wsbroadcast publisher", context=Context())
        if self._start is None or self._has_failed():
            self._start = self.loop.create_task(
                self._start_engine(), name="wsbroadcast publisher start", context=Context()
            )
            self._start.add_done_callback(_look_at)
        if not self.is_started:
            await self._wait_for(self._start)
        return self.is_started

    async def _start_engine(self) -> None:
        if self._before is not None:
            while not self._before.is_over:  # noqa: ASYNC110  # its event loop may be gone without a word
                await asyncio.sleep(_LOOK_SECONDS)
            self._before._has_engine = False  # should its event loop run once more
            self._before = None
        self._has_engine = True
        await self._engine.start(Nobody())

    async def _wait_for(self, start: asyncio.Task[None]) -> None:
        try:
            async with Patience(_START_SECONDS):
                await asyncio.wait([start])
        except TimeoutError:
            return
        if start.cancelled():  # by `end`
            raise HasEnded
        start.result()

    def _has_failed(self) -> bool:
        start = self._start
        return start is not None and start.done() and (start.cancelled() or start.exception() is not None)

    async def _is_ready(self) -> bool:
        is_started = self.is_started or await self.start()
        if self.has_ended:
            raise HasEnded
        return is_started

    async def publish(self, publication: Publication | Dismissal, ticket: Ticket | None = None) -> None:
        """Start if need be, and return once the engine has taken the publication.

        Args:
            publication: What to publish.
            ticket: Taken when it is handed to the engine.

        Raises:
            HasEnded: If it has; nothing was sent.
            EngineError: If the broker doesn't take it, mostly `EngineUnavailable`.
        """
        if not await self._is_ready():
            raise EngineUnavailable(f"the {self._engine.name} engine finds no broker so quickly; nothing was sent")
        if ticket is not None and not ticket.take():
            raise HasEnded
        await self._engine.publish(publication)

    def publish_nowait(self, publication: Publication | Dismissal) -> None:
        """Take the publication without waiting for a confirmation."""
        self._engine.publish_nowait(publication)

    async def health(self) -> Health:
        """Tell whether an echo comes back through the broker."""
        if not await self._is_ready():
            return Health(self._engine.name, False, "not connected yet")
        return await self._engine.health()

    def do_threadsafe(self, call: Call[T]) -> T:
        """Make a call from a thread; blocks until it is done.

        Raises:
            HasEnded: If the home or its event loop has, and the call was not made.
            EngineUnavailable: If it ended, and whether the call was made isn't known.
        """
        return self._calls.do_threadsafe(partial(call, self))

    async def do_elsewhere(self, call: Call[T]) -> T:
        """Make a call from another event loop; raises what `do_threadsafe` does."""
        return await self._calls.do_elsewhere(partial(call, self))

    # The end.

    async def end(self) -> None:
        """Stop the engine, in its loop. What was published goes out before, if that is possible quickly."""
        self._begin_to_end()
        if self._life is not None:
            await asyncio.shield(self._life)

    def stop(self) -> None:
        """End soon; returns at once, so that it may be called from anywhere."""
        self._is_ended = True
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._begin_to_end)

    def end_threadsafe(self) -> None:
        """End, from another thread; blocks until it is done."""
        self.stop()
        while not self._is_over.wait(timeout=1):
            if not self.loop.is_running():
                return

    def _begin_to_end(self) -> None:
        self._is_ended = True
        self._stop.set()
        if self._life is None:
            self._is_over.set()

    async def _live(self) -> None:
        # While this task lives, so does the home. It is cancelled together with all others when `asyncio.run` ends.
        try:
            await self._stop.wait()
            await self._end()
        finally:
            self._is_ended = True
            self._is_over.set()

    async def _end(self) -> None:
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        if self._has_engine:
            self._has_engine = False
            await self._engine.aclose()
        await self._calls.wait_done()  # they have their answers now, and must not be cancelled before they gave them on


class OwnHome(Home):
    """An engine in an event loop of its own, which runs in a daemon thread until it is told to stop.

    Args:
        engine: An engine that isn't started, or that the home before had.
        before: Where the engine was before.
    """

    def __init__(self, engine: Engine, before: Home | None = None) -> None:
        super().__init__(engine, asyncio.new_event_loop(), before)
        running = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(running,), name="wsbroadcast publisher", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads
            self.loop.close()
            raise
        running.wait()

    def _run(self, running: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._live_here(running))

    async def _live_here(self, running: threading.Event) -> None:
        self._life = asyncio.current_task()
        running.set()
        await self._live()

    def serves(self, loop: asyncio.AbstractEventLoop | None) -> bool:
        """Everybody: it ends when it is told to."""
        return True

    def end_threadsafe(self) -> None:
        """End, and block until the thread has ended too."""
        self.stop()
        self._thread.join()


def _look_at(start: asyncio.Task[None]) -> None:
    # Whoever waited for it may have gone; the next call begins again and sees for itself.
    if not start.cancelled():
        start.exception()
