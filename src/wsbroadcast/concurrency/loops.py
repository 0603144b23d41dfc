"""Crossing the borders of an event loop: from plain calls, and from threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from types import AsyncGeneratorType, GeneratorType, TracebackType
from typing import Any, Generic, TypeVar

from wsbroadcast.exceptions import ConfigurationError, LifecycleError


class LoopEnded(LifecycleError):
    """Raised when the other thread's event loop ends before a call there is done."""

    def __init__(self) -> None:
        super().__init__("the other thread's event loop ended before the call was done")


T = TypeVar("T")
R = TypeVar("R")


def without_waiting(coroutine: Coroutine[Any, Any, T], why: str) -> T:
    """Run a coroutine that is expected to finish without waiting for anything.

    Raises:
        LifecycleError: If it has to wait after all; `why` says what for.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise LifecycleError(f"{why}, and broadcast_nowait can't: await `broadcast`")


class Unfinished(ConfigurationError):
    """Raised when a function of the app returned something that has yet to run, so that what it says isn't known."""


def finished(result: T, what: str) -> T:
    """Return what a function of the app returned, if nothing of it has yet to run.

    Args:
        result: What it returned; if that was awaitable, what came of it.
        what: How the error calls it.

    Raises:
        Unfinished: If it is a coroutine, which is closed then, or a generator.
    """
    if isinstance(result, Coroutine):
        result.close()  # else Python complains later, and somewhere else
        raise Unfinished(f"{what} is a coroutine that nobody awaits: an `await` is missing")
    if isinstance(result, (AsyncGeneratorType, GeneratorType)):
        raise Unfinished(f"{what} is a generator, of which nothing has run: use `return` instead of `yield`")
    return result


class Patience:
    """An async context manager that cuts its block off after so many seconds.

    An event loop that was blocked meanwhile is not held against the block: the second half of the time begins when the
    loop notices that the first is over, and what has arrived by then is read.

    Raises:
        TimeoutError: If the time is up.
    """

    __slots__ = ("_half", "_seconds", "_timeout")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        self._half = asyncio.get_running_loop().call_later(self._seconds / 2, self._begin_second_half)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._half.cancel()
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise TimeoutError(f"no answer within {self._seconds:g} s") from error

    def _begin_second_half(self) -> None:
        self._timeout.reschedule(asyncio.get_running_loop().time() + self._seconds / 2)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def submit(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> Future[T]:
    """Run a coroutine in the loop of another thread.

    Raises:
        LoopEnded: If that loop is closed.
    """
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        coroutine.close()
        raise LoopEnded from None


def wait_in_thread(future: Future[T], loop: asyncio.AbstractEventLoop) -> T:
    """Block until a future of another thread's loop is done.

    Raises:
        LoopEnded: If that loop ends first.
    """
    while not wait([future], timeout=1).done:
        if not loop.is_running():
            future.cancel()
            raise LoopEnded
    try:
        return future.result()
    except CancelledError:  # by `asyncio.run`, at whose end everything that is left is cancelled
        raise LoopEnded from None
    finally:
        del future  # an error would hold this frame, which holds the future, which holds the error


async def wait_elsewhere(future: Future[T], loop: asyncio.AbstractEventLoop) -> T:
    """Wait until a future of another thread's loop is done; cancelled, if this is.

    Raises:
        LoopEnded: If that loop ends first.
    """
    here = asyncio.wrap_future(future)
    try:
        while not here.done():
            await asyncio.wait([here], timeout=1)
            if not here.done() and not loop.is_running():
                raise LoopEnded
        if here.cancelled():
            raise LoopEnded
        return here.result()
    finally:
        here.cancel()
        del here, future  # as above


class LoopThread(Generic[T]):
    """A daemon thread with an event loop of its own, in which calls from all threads are made until it is stopped.

    Every call that was submitted gets its answer, also while the thread ends.

    Args:
        name: Of the thread.
        make: Makes, in the event loop, what lives there as long as the thread does.

    Raises:
        RuntimeError: If no thread can be started.
        OSError: If no event loop can be made, for example without file descriptors.
    """

    def __init__(self, name: str, make: Callable[[], T]) -> None:
        # Held while a call is submitted or the end begins: no call comes after the last look at `_calls`.
        self._lock = threading.Lock()
        self._calls: set[Future[Any]] = set()
        self._is_stopped = False
        self._stopping = asyncio.Event()
        made: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, made), name=name, daemon=True)
        self._thread.start()
        self.made = made.result()
        """What was made."""

    def submit(self, call: Callable[[], Coroutine[Any, Any, R]]) -> Future[R]:
        """Make a call in the event loop.

        Raises:
            LoopEnded: If the thread was told to stop; the call isn't made.
        """
        with self._lock:
            if self._is_stopped:
                raise LoopEnded
            return self._submit(call)

    def _submit(self, call: Callable[[], Coroutine[Any, Any, R]]) -> Future[R]:
        future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Take no more calls after a last one, and end when all are done; returns at once."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped = True
                self._submit(last)
                self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> None:
        """Block until a thread that was stopped has ended."""
        self._thread.join()

    def _run(self, make: Callable[[], T], made: Future[T]) -> None:
        try:
            with asyncio.Runner() as runner:
                runner.run(self._serve(make, made))
        except BaseException as error:
            if made.done():
                raise
            made.set_exception(error)

    async def _serve(self, make: Callable[[], T], made: Future[T]) -> None:
        self._loop = asyncio.get_running_loop()
        made.set_result(make())
        await self._stopping.wait()
        if calls := [asyncio.wrap_future(call) for call in list(self._calls)]:
            await asyncio.wait(calls)
