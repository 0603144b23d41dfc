"""Calls of a publisher into another event loop, which may end at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from wsbroadcast.concurrency.loops import LoopEnded, wait_elsewhere, wait_in_thread
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError

T = TypeVar("T")

CLOSED = "the publisher is closed"


class HasEnded(LifecycleError):
    """Raised by a home that has ended. What was asked of it was not done, and may be asked of another one."""

    def __init__(self) -> None:
        super().__init__(CLOSED)


class Ticket:
    """Decides between a call in another event loop and who waits for it, if that loop ends meanwhile.

    The call takes it when there is no way back, who waits when he gives the call up. There is one, and taking it is
    atomic: no call is made twice, and none is lost without a word.
    """

    def __init__(self) -> None:
        self._one = [None]

    def take(self) -> bool:
        """Take it; return whether the other hasn't."""
        try:
            self._one.pop()
        except IndexError:
            return False
        return True


class Calls:
    """Calls into one event loop, from threads and from other loops.

    Args:
        loop: The event loop.
        has_ended: Tells whether no call is to begin there any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, has_ended: Callable[[], bool]) -> None:
        self._loop = loop
        self._has_ended = has_ended
        # Awaited by `wait_done`, and by whoever made the call.
        self._tasks: set[asyncio.Task[Any]] = set()

    def do_threadsafe(self, call: Callable[[Ticket], Coroutine[Any, Any, T]]) -> T:
        """Make a call from a thread; blocks until it is done.

        Raises:
            HasEnded: If the loop ended, and the call was not made.
            EngineUnavailable: If it ended, and whether the call was made isn't known.
        """
        ticket = Ticket()
        future = self._submit(call, ticket)
        try:
            return wait_in_thread(future, self._loop)
        except LoopEnded:
            raise _lost(ticket) from None
        finally:
            del future  # an error would hold this frame, which holds the future, which holds the error

    async def do_elsewhere(self, call: Callable[[Ticket], Coroutine[Any, Any, T]]) -> T:
        """Make a call from another event loop; raises what `do_threadsafe` does."""
        ticket = Ticket()
        future = self._submit(call, ticket)
        try:
            return await wait_elsewhere(future, self._loop)
        except LoopEnded:
            raise _lost(ticket) from None
        finally:
            del future  # as above

    async def wait_done(self) -> None:
        """Wait, in the loop, until all calls have returned that have begun."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _submit(self, call: Callable[[Ticket], Coroutine[Any, Any, T]], ticket: Ticket) -> Future[T]:
        # Not `asyncio.run_coroutine_threadsafe`, which begins tasks in a loop that is about to end.
        future: Future[T] = Future()
        try:
            self._loop.call_soon_threadsafe(self._begin, call, ticket, future)
        except RuntimeError:  # it is closed
            raise HasEnded from None
        return future

    def _begin(self, call: Callable[[Ticket], Coroutine[Any, Any, T]], ticket: Ticket, future: Future[T]) -> None:
        if self._has_ended():
            if future.set_running_or_notify_cancel():
                future.set_exception(HasEnded())
        elif not future.cancelled():
            task = self._loop.create_task(call(ticket), name="wsbroadcast publisher call")
            self._tasks.add(task)
            task.add_done_callback(partial(self._finish, ticket, future))
            future.add_done_callback(partial(self._cancel, task))

    def _finish(self, ticket: Ticket, future: Future[T], task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        error = _lost(ticket) if task.cancelled() else task.exception()
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    def _cancel(self, task: asyncio.Task[T], future: Future[T]) -> None:
        if future.cancelled():
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(task.cancel)


def _lost(ticket: Ticket) -> Exception:
    # What to tell who made a call in an event loop that ended.
    if ticket.take():
        return HasEnded()
    return EngineUnavailable(
        "the event loop that the publisher ran in ended; whether the broker took the message isn't known"
    )
