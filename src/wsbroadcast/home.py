"""Where a publisher's engine runs: in the event loop of the app, or in one of its own."""

from __future__ import annotations

import asyncio
import threading

from wsbroadcast.engines.base import Engine, Gap, Health, Publication
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError
from wsbroadcast.loops import Patience, submit, wait_in_thread

CLOSED = "the publisher is closed"

# Seconds that a call waits for the engine to start. It goes on starting after that.
_START_SECONDS = 2.25


class Nobody:
    """Receives for a node without connections, which is subscribed to nothing."""

    async def receive(self, publication: Publication) -> None:
        """There is nobody here."""

    def receive_nowait(self, publication: Publication) -> None:
        """There is nobody here."""

    def is_ready(self, publication: Publication) -> bool:
        """Nobody is always ready."""
        return True

    async def receive_paced(self, publication: Publication) -> None:
        """There is nobody here."""

    async def gap(self, gap: Gap) -> None:
        """Nobody misses anything."""


class Home:
    """An engine in one event loop. Its coroutines belong there, whichever thread wants them.

    Args:
        engine: An engine that isn't started, or was in an event loop that has ended.
        loop: Where it runs.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._engine = engine
        # Owned by this object and awaited by `end`; not by the call that began it, which may be cancelled.
        self._start: asyncio.Task[None] | None = None
        self._is_ended = False

    @property
    def has_ended(self) -> bool:
        """Whether it was ended, or its event loop."""
        return self._is_ended or not self.loop.is_running()

    @property
    def is_started(self) -> bool:
        """Whether the engine has started, degraded maybe, and wasn't ended."""
        return not self._is_ended and self._start is not None and self._start.done() and not self._has_failed()

    async def start(self) -> bool:
        """Start the engine if that hasn't been done; return whether it has started, or still tries to.

        Raises:
            LifecycleError: If it was ended.
            ConfigurationError: If the broker refuses us.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
        """
        if self._is_ended:
            raise LifecycleError(CLOSED)
        if self._start is None or self._has_failed():
            self._start = self.loop.create_task(self._engine.start(Nobody()), name="wsbroadcast publisher start")
            self._start.add_done_callback(_look_at)
        if not self._start.done():
            await self._wait_for(self._start)
        return self.is_started

    async def _wait_for(self, start: asyncio.Task[None]) -> None:
        try:
            async with Patience(_START_SECONDS):
                await asyncio.wait([start])
        except TimeoutError:
            return
        if start.cancelled():  # by `end`
            raise LifecycleError(CLOSED)
        start.result()

    def _has_failed(self) -> bool:
        start = self._start
        return start is not None and start.done() and (start.cancelled() or start.exception() is not None)

    async def publish(self, publication: Publication) -> None:
        """Start if need be, and return once the engine has taken the publication.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer in time.
        """
        if not self.is_started and not await self.start():
            raise EngineUnavailable(f"the {self._engine.name} engine finds no broker so quickly; nothing was sent")
        await self._engine.publish(publication)

    def publish_nowait(self, publication: Publication) -> None:
        """Take the publication without waiting for a confirmation."""
        self._engine.publish_nowait(publication)

    async def health(self) -> Health:
        """Tell whether an echo comes back through the broker."""
        if not await self.start():
            return Health(self._engine.name, False, "not connected yet")
        return await self._engine.health()

    async def end(self) -> None:
        """Stop the engine, in its loop. What was published goes out before, if that is possible quickly."""
        self._is_ended = True
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        await self._engine.aclose()

    def end_threadsafe(self) -> None:
        """Do the same from another thread; blocks until it is done."""
        wait_in_thread(submit(self.end(), self.loop), self.loop)


class OwnHome(Home):
    """An engine in an event loop of its own, which runs in a daemon thread until it is told to stop.

    Args:
        engine: An engine that isn't started, or was in an event loop that has ended.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, asyncio.new_event_loop())
        self._stop = asyncio.Event()
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
            runner.run(self._live(running))

    async def _live(self, running: threading.Event) -> None:
        running.set()
        await self._stop.wait()
        await self.end()

    def stop(self) -> None:
        """End soon; returns at once, so that it may be called from anywhere."""
        try:
            self.loop.call_soon_threadsafe(self._stop.set)
        except RuntimeError:
            pass  # it has ended

    def end_threadsafe(self) -> None:
        """End, and block until the thread has ended too."""
        self.stop()
        self._thread.join()


def _look_at(start: asyncio.Task[None]) -> None:
    # Whoever waited for it may have gone; the next call begins again and sees for itself.
    if not start.cancelled():
        start.exception()
