"""Tasks, event loops, and the borders between them: what plain calls, coroutines and threads do across them."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future, wait
from contextvars import Context
from types import AsyncGeneratorType, GeneratorType, TracebackType
from typing import Any, Generic, Self, TypeVar

from wsbroadcast.exceptions import ConfigurationError, LifecycleError
from wsbroadcast.logs import about, logger

T = TypeVar("T")
R = TypeVar("R")

# Tasks.


class Tasks:
    """Tasks that end by themselves, each within a timeout of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        # How many run their first step inside `create_task`, as an eager task factory lets them.
        self._starting = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def includes_current(self) -> bool:
        """Tell whether the caller runs in one of these tasks."""
        return self._starting > 0 or asyncio.current_task() in self._tasks

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], name: str, context: Context | None = None
    ) -> asyncio.Task[None]:
        """Run a coroutine in the background; an error that escapes it is logged.

        Args:
            coroutine: What is to be done.
            name: The task's name, to be seen in a list of a process's tasks.
            context: The context variables that it sees, such as those of the connection that it is about. By default
                it sees none, so that nothing of its caller is found there.
        """
        task = self._start(coroutine, name, context)
        task.add_done_callback(_log_error)
        return task

    def begin(self, coroutine: Coroutine[Any, Any, T], name: str, context: Context) -> asyncio.Task[T]:
        """Run a coroutine whose outcome the caller looks at, unless the caller is cancelled."""
        task = self._start(coroutine, name, context)
        task.add_done_callback(_look_at)
        return task

    def _start(self, coroutine: Coroutine[Any, Any, T], name: str, context: Context | None) -> asyncio.Task[T]:
        # A copy, because an eager task factory enters it at once, and it may be the one that is entered now.
        context = Context() if context is None else context.copy()
        self._starting += 1
        try:
            task = asyncio.get_running_loop().create_task(coroutine, name=f"wsbroadcast {name}", context=context)
        finally:
            self._starting -= 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def begun(self) -> None:
        """Wait, in one of these tasks, until its caller goes on: an eager task factory runs the task in between."""
        if self._starting:
            await asyncio.sleep(0)

    async def join(self) -> None:
        """Wait until all have ended, also those that they start; not the one that calls this."""
        while pending := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(pending)

    async def cancel(self) -> None:
        """Cancel all of them, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await self.join()


def _log_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error, extra=about("task.failed", task=task.get_name()))


def _look_at(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # else asyncio complains where the caller was cancelled


class Interruptible:
    """A task inside `receive` that may have to be interrupted.

    As `asyncio.timeout` does it: our own cancellation is taken back, anybody else's passes through.
    """

    __slots__ = ("_cancelling", "_is_interrupted", "_is_taken_back", "_task", "before", "throws_away")

    def __init__(self, throws_away: bool, before: Interruptible | None) -> None:
        self.throws_away = throws_away
        """Whether it only waits for the end, and steps aside for a reader of the messages."""
        self.before = before
        """The one that began before it and still waits, if another task reads as well."""
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._is_interrupted = False
        self._is_taken_back = False

    def interrupt(self) -> None:
        """Make the task come out of `receive`."""
        if self._task is not None and self._task is not asyncio.current_task() and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def without(self, ended: Interruptible) -> Interruptible | None:
        """Return the readings from this one on, without one that has ended."""
        if self is ended:
            return self.before
        if self.before is not None:
            self.before = self.before.without(ended)
        return self

    def take_back(self) -> bool:
        """Undo our own cancellation; return whether it was the only one."""
        if not self._is_interrupted or self._is_taken_back or self._task is None:
            return False
        self._is_taken_back = True
        return self._task.uncancel() <= self._cancelling


# Coroutines, and code that blocks.


class AwaitableContext(Coroutine[Any, Any, T], Generic[T]):
    """Await it for its result; or use it with `async with`, which gives the result and does something at the end.

    Args:
        coroutine: Gives the result.
        leave: Awaited with the result at the end of the block.
    """

    __slots__ = ("_coroutine", "_leave", "_result")

    def __init__(self, coroutine: Coroutine[Any, Any, T], leave: Callable[[T], Awaitable[None]]) -> None:
        self._coroutine = coroutine
        self._leave = leave

    def __await__(self) -> Generator[Any, None, T]:
        return self._coroutine.__await__()

    # The rest of a coroutine, for `asyncio.create_task`.

    def send(self, value: Any) -> Any:
        """Resume it."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error where it waits."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """End it where it waits."""
        self._coroutine.close()

    async def __aenter__(self) -> T:
        self._result = await self._coroutine
        return self._result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave(self._result)


def mark_coroutine_function(function: Callable[..., object]) -> None:
    """Let `iscoroutinefunction` be true of a function that returns something to await."""
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(function)
    else:
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # as asyncio.iscoroutinefunction looks for it


def name_if_it_blocked(name: str, started: float, seconds: float) -> None:
    """Warn, by name, of code that kept the event loop for so many seconds.

    Args:
        name: Of the code, for the log.
        started: When it began, by `time.perf_counter`.
        seconds: From which on it is reported.
    """
    took = time.perf_counter() - started
    if took >= seconds:
        logger.warning(
            "%s blocked the event loop for %.1f s; run blocking code with asyncio.to_thread",
            name,
            took,
            extra=about("loop.blocked", blocker=name, seconds=took),
        )


class Timed(Generic[T]):
    """An awaitable that is another one, whose steps from one await to the next are watched by `name_if_it_blocked`.

    Args:
        awaitable: The other one.
        name: Of the code, for the log.
        seconds: From which on a step is reported.
    """

    def __init__(self, awaitable: Awaitable[T], name: str, seconds: float) -> None:
        self._steps = awaitable.__await__()
        self._name = name
        self._seconds = seconds

    def __await__(self) -> Generator[Any, Any, T]:
        result: T = yield from self
        return result

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        try:
            return next(self._steps)
        finally:
            name_if_it_blocked(self._name, started, self._seconds)

    def throw(self, *error: Any) -> Any:
        """Raise an error where it waits."""
        started = time.perf_counter()
        try:
            return self._steps.throw(*error)
        finally:
            name_if_it_blocked(self._name, started, self._seconds)


# Event loops and threads.


class LoopEnded(LifecycleError):
    """Raised when the other thread's event loop ends before a call there is done."""

    def __init__(self) -> None:
        super().__init__("the other thread's event loop ended before the call was done")


def without_waiting(coroutine: Coroutine[Any, Any, T], why: str) -> T:
    """Run a coroutine that is expected to finish without waiting for anything.

    Raises:
        LifecycleError: If it has to wait after all; `why` says what for.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # what the coroutine returned
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

    Time in which the event loop was blocked doesn't count fully: the second half of the time begins when the loop
    notices that the first half is over, and what has arrived by then is read.

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
    """Run a coroutine in the event loop of another thread.

    Raises:
        LoopEnded: If that loop is closed.
    """
    try:
        return asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError:
        coroutine.close()
        raise LoopEnded from None


def wait_in_thread(future: Future[T], loop: asyncio.AbstractEventLoop, look_seconds: float = 1.0) -> T:
    """Block until a future of another thread's loop is done.

    Args:
        future: Of `submit`, for example.
        loop: The other thread's.
        look_seconds: Between two looks whether that loop still runs, because it may end without telling anyone.

    Raises:
        LoopEnded: If that loop ends first.
    """
    while not wait([future], timeout=look_seconds).done:
        if not loop.is_running():
            future.cancel()
            raise LoopEnded
    try:
        return future.result()
    except CancelledError:  # by `asyncio.run`, at whose end everything that is left is cancelled
        raise LoopEnded from None
    finally:
        del future  # an error would hold this frame, which holds the future, which holds the error


async def wait_elsewhere(future: Future[T], loop: asyncio.AbstractEventLoop, look_seconds: float = 1.0) -> T:
    """Wait until a future of another thread's loop is done; cancel it if this call is cancelled.

    The arguments are those of `wait_in_thread`.

    Raises:
        LoopEnded: If that loop ends first.
    """
    here = asyncio.wrap_future(future)
    try:
        while not here.done():
            await asyncio.wait([here], timeout=look_seconds)
            if not here.done() and not loop.is_running():
                raise LoopEnded
        if here.cancelled():
            raise LoopEnded
        return here.result()
    finally:
        here.cancel()
        del here, future  # they hold the error, which would hold this frame


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
        self._last: Future[None] | None = None
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
                self._last = self._submit(last)
                self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> None:
        """Block until a thread that was stopped has ended; raise what the last call raised."""
        self._thread.join()
        if self._last is not None:
            self._last.result()

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
