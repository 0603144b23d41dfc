"""Tasks, event loops and threads, and calls between them."""

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
    """Tasks that end by themselves, each within its own timeout."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        # How many run their first step inside `create_task`. An eager task factory does that.
        self._starting = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def includes_current(self) -> bool:
        """Return whether the caller runs in one of these tasks."""
        return self._starting > 0 or asyncio.current_task() in self._tasks

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], name: str, context: Context | None = None
    ) -> asyncio.Task[None]:
        """Run a coroutine in the background. If it raises, the error is logged.

        Args:
            coroutine: What to run.
            name: The task's name, for lists of a process's tasks.
            context: The context variables that it sees, such as those of the connection that it is about. By default
                it sees none, so nothing of its caller either.
        """
        task = self._start(coroutine, name, context)
        task.add_done_callback(_log_error)
        return task

    def begin(self, coroutine: Coroutine[Any, Any, T], name: str, context: Context) -> asyncio.Task[T]:
        """Run a coroutine in the background. The caller awaits it, unless the caller is cancelled."""
        task = self._start(coroutine, name, context)
        task.add_done_callback(_look_at)
        return task

    def _start(self, coroutine: Coroutine[Any, Any, T], name: str, context: Context | None) -> asyncio.Task[T]:
        # A copy, because an eager task factory enters the context at once, and the caller may be in this very context.
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
        """Wait, in one of these tasks, until the caller of `spawn` goes on. An eager task runs before that."""
        if self._starting:
            await asyncio.sleep(0)

    async def join(self) -> None:
        """Wait until all have ended, and all that they start; the calling task isn't waited for."""
        while pending := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(pending)

    async def cancel(self) -> None:
        """Cancel all of them, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await self.join()

    async def end(self, seconds: float) -> None:
        """Cancel all but the calling task, and wait until they have ended, for at most so many seconds."""
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)


def _log_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error, extra=about("task.failed", task=task.get_name()))


def _look_at(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # else asyncio logs that it was never retrieved, if the caller was cancelled


class Interruptible:
    """A task inside `receive` that may have to be interrupted.

    It is cancelled for that. As with `asyncio.timeout`, our own cancellation is taken back; another one passes through.
    """

    __slots__ = ("_cancelling", "_is_interrupted", "_is_taken_back", "_task", "before", "throws_away")

    def __init__(self, throws_away: bool, before: Interruptible | None) -> None:
        self.throws_away = throws_away
        """Whether it only waits for the end of the connection. It is interrupted if a task wants to read messages."""
        self.before = before
        """The one that began before it and still waits; `None` if no other task reads."""
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
        """Return this chain of readings without one that has ended."""
        if self is ended:
            return self.before
        if self.before is not None:
            self.before = self.before.without(ended)
        return self

    def take_back(self) -> bool:
        """Take back our own cancellation; return whether it was the only one."""
        if not self._is_interrupted or self._is_taken_back or self._task is None:
            return False
        self._is_taken_back = True
        return self._task.uncancel() <= self._cancelling


# Coroutines, and code that blocks.


class AwaitableContext(Coroutine[Any, Any, T], Generic[T]):
    """A call that can be awaited, or used with `async with`, where something is done at the end of the block.

    Args:
        coroutine: Returns the result, in both cases.
        leave: Called with the result, and awaited, at the end of the block.
    """

    __slots__ = ("_coroutine", "_leave", "_result")

    def __init__(self, coroutine: Coroutine[Any, Any, T], leave: Callable[[T], Awaitable[None]]) -> None:
        self._coroutine = coroutine
        self._leave = leave

    def __await__(self) -> Generator[Any, None, T]:
        return self._coroutine.__await__()

    # `asyncio.create_task` wants these methods of a coroutine.

    def send(self, value: Any) -> Any:
        """Resume the coroutine."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error where the coroutine waits."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """End the coroutine where it waits."""
        self._coroutine.close()

    async def __aenter__(self) -> T:
        self._result = await self._coroutine
        return self._result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave(self._result)


def mark_coroutine_function(function: Callable[..., object]) -> None:
    """Let `iscoroutinefunction` return true for a function that returns an awaitable."""
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(function)
    else:
        function._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]  # as asyncio.iscoroutinefunction looks for it


def name_if_it_blocked(name: str, started: float, seconds: float) -> None:
    """Log a warning if some code blocked the event loop.

    Args:
        name: What the log calls the code.
        started: When it began, by `time.perf_counter`.
        seconds: From how many seconds on it is reported.
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
    """Wraps an awaitable, and reports each step from one await to the next that blocks the event loop.

    Args:
        awaitable: What is wrapped.
        name: What the log calls the code.
        seconds: From how many seconds on a step is reported.
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
        """Raise an error where the awaitable waits."""
        started = time.perf_counter()
        try:
            return self._steps.throw(*error)
        finally:
            name_if_it_blocked(self._name, started, self._seconds)


# Event loops and threads.


class LoopEnded(LifecycleError):
    """Raised when a call runs in another thread's event loop, and that loop ends before the call is done."""

    def __init__(self) -> None:
        super().__init__("the other thread's event loop ended before the call was done")


def without_waiting(coroutine: Coroutine[Any, Any, T], why: str) -> T:
    """Run a coroutine that is expected to finish without waiting for anything.

    Raises:
        LifecycleError: If it has to wait after all. Its text begins with `why`, which says what it waits for.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # what the coroutine returned
    coroutine.close()
    raise LifecycleError(f"{why}, and broadcast_nowait can't: await `broadcast`")


class Unfinished(ConfigurationError):
    """Raised when a function of the app returned something that has not run yet. So its answer isn't known."""


def finished(result: T, what: str) -> T:
    """Return the result of a function of the app, after a check that it is no coroutine and no generator.

    Args:
        result: The result; if that was an awaitable, the result of awaiting it.
        what: What the error calls the result.

    Raises:
        Unfinished: If it is a coroutine, which is closed then, or a generator.
    """
    if isinstance(result, Coroutine):
        result.close()  # else Python warns later, and somewhere else
        raise Unfinished(f"{what} is a coroutine that nobody awaits: an `await` is missing")
    if isinstance(result, (AsyncGeneratorType, GeneratorType)):
        raise Unfinished(f"{what} is a generator, and nothing of it has run: use `return` instead of `yield`")
    return result


class Patience:
    """An async context manager that ends its block after so many seconds.

    If the event loop is blocked for a while, the block gets more time: the second half of its time begins when the loop
    notices that the first half is over. So an answer that has arrived by then is read.

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
    """Return the event loop that runs in this thread; `None` if none does."""
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
        future: The future, for example of `submit`.
        loop: The loop of the other thread.
        look_seconds: How often, in seconds, it is checked that the loop still runs. It may end without telling anyone.

    Raises:
        LoopEnded: If that loop ends first.
    """
    while not wait([future], timeout=look_seconds).done:
        if not loop.is_running():
            future.cancel()
            raise LoopEnded
    try:
        return future.result()
    except CancelledError:  # by `asyncio.run`, which at its end cancels all tasks that are left
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
        del here, future  # they hold the error, and that would hold this frame


class LoopThread(Generic[T]):
    """A daemon thread with its own event loop, for calls from all threads.

    Each call that was submitted gets its answer, even while the thread ends.

    Args:
        name: The thread's name.
        make: Called once in the event loop; `made` keeps what it returns.

    Raises:
        RuntimeError: If no thread can be started.
        OSError: If no event loop can be made, for example without file descriptors.
    """

    def __init__(self, name: str, make: Callable[[], T]) -> None:
        # Held while a call is submitted, and when the end begins. So no call comes after the last look at `_calls`.
        self._lock = threading.Lock()
        self._calls: set[Future[Any]] = set()
        self._is_stopped = False
        self._stopping = asyncio.Event()
        self._last: Future[None] | None = None
        made: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, made), name=name, daemon=True)
        self._thread.start()
        self.made = made.result()
        """What `make` has returned."""

    def submit(self, call: Callable[[], Coroutine[Any, Any, R]]) -> Future[R]:
        """Make a call in the event loop; return its future.

        Raises:
            LoopEnded: If the thread was told to stop. The call isn't made.
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
        """Make a last call, take no others, and end when all are done. It returns at once."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped = True
                self._last = self._submit(last)
                self._loop.call_soon_threadsafe(self._stopping.set)

    def join(self) -> None:
        """Block until the stopped thread has ended; raise what the last call raised."""
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
