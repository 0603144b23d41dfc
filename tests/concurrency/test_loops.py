from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from concurrent.futures import Future

import pytest

from tests.support.loops import loop_in_thread
from wsbroadcast import LifecycleError
from wsbroadcast.concurrency.loops import running_loop, submit, wait_elsewhere, wait_in_thread, without_waiting


async def double(value: int) -> int:
    return 2 * value


async def nothing_to_wait_for(value: int) -> int:
    return await double(value) + await double(value)


def test_without_waiting_runs_what_has_nothing_to_wait_for() -> None:
    assert without_waiting(nothing_to_wait_for(3), "why") == 12


def test_without_waiting_passes_errors_on() -> None:
    async def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        without_waiting(fail(), "why")


async def test_without_waiting_refuses_what_has_to_wait_and_cleans_it_up() -> None:
    events: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            events.append("cleaned up")

    with pytest.raises(LifecycleError, match="a hook has to wait, and broadcast_nowait can't: await `broadcast`"):
        without_waiting(wait(), "a hook has to wait")
    assert events == ["cleaned up"]


def test_no_loop_runs_in_a_plain_thread() -> None:
    assert running_loop() is None


async def test_running_loop_is_the_one_of_this_thread() -> None:
    assert running_loop() is asyncio.get_running_loop()
    assert await asyncio.to_thread(running_loop) is None


def test_wait_in_thread_returns_the_result() -> None:
    with loop_in_thread() as loop:
        future = asyncio.run_coroutine_threadsafe(double(4), loop)
        assert wait_in_thread(future, loop) == 8


@pytest.mark.parametrize("error", [KeyError("mine"), TimeoutError("mine")])
def test_wait_in_thread_passes_errors_on(error: Exception) -> None:
    async def fail() -> None:
        raise error

    with loop_in_thread() as loop:
        future = asyncio.run_coroutine_threadsafe(fail(), loop)
        with pytest.raises(type(error), match="mine"):
            wait_in_thread(future, loop)


def test_wait_in_thread_ends_with_the_loop() -> None:
    future: Future[None] = Future()
    with loop_in_thread() as loop:
        pass
    with pytest.raises(LifecycleError, match="event loop ended"):
        wait_in_thread(future, loop)
    assert future.cancelled()


def test_wait_in_thread_waits_longer_than_it_looks() -> None:
    async def be_slow() -> str:
        await asyncio.sleep(1.2)  # past the first look at the loop
        return "done"

    with loop_in_thread() as loop:
        assert wait_in_thread(asyncio.run_coroutine_threadsafe(be_slow(), loop), loop) == "done"


def test_wait_in_thread_ends_with_what_its_loop_cancels() -> None:
    """As `asyncio.run` does with everything that is left at its end."""
    waiting = threading.Event()

    async def wait() -> None:
        waiting.set()
        await asyncio.get_running_loop().create_future()

    async def cancel_all() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    with loop_in_thread() as loop:
        future = submit(wait(), loop)
        waiting.wait(5)
        submit(cancel_all(), loop)
        with pytest.raises(LifecycleError, match="event loop ended"):
            wait_in_thread(future, loop)


def test_submit_to_a_closed_loop_is_refused() -> None:
    with loop_in_thread() as loop:
        pass
    with pytest.raises(LifecycleError, match="event loop ended"):
        submit(double(1), loop)


async def test_wait_elsewhere_returns_the_result_and_passes_errors_on() -> None:
    async def fail() -> None:
        raise KeyError("mine")

    with loop_in_thread() as loop:
        assert await wait_elsewhere(submit(double(4), loop), loop) == 8
        with pytest.raises(KeyError, match="mine"):
            await wait_elsewhere(submit(fail(), loop), loop)


async def test_wait_elsewhere_cancels_what_it_waits_for() -> None:
    waiting, cancelled = threading.Event(), threading.Event()

    async def wait() -> None:
        waiting.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with loop_in_thread() as loop:

        async def call() -> (
            None
        ):  # begins before it is cancelled, although `to_thread` needn't let it since Python 3.14
            await wait_elsewhere(submit(wait(), loop), loop)

        task = asyncio.create_task(call())
        assert await asyncio.to_thread(waiting.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(cancelled.wait, 5)


async def test_wait_elsewhere_ends_with_the_loop() -> None:
    future: Future[None] = Future()
    with loop_in_thread() as loop:
        pass
    with pytest.raises(LifecycleError, match="event loop ended"):
        await wait_elsewhere(future, loop)
    future = Future()
    future.cancel()
    with pytest.raises(LifecycleError, match="event loop ended"):
        await wait_elsewhere(future, loop)


def test_errors_from_another_thread_leave_no_cycle() -> None:
    """Or else what the frames hold, a publisher for one, lives until the next collection."""

    class Caller:
        pass

    async def fail() -> None:
        raise KeyError("mine")

    def call(caller: Caller) -> None:
        with loop_in_thread() as loop:
            wait_in_thread(submit(fail(), loop), loop)

    caller = Caller()
    gone = weakref.ref(caller)
    gc.disable()
    try:
        with pytest.raises(KeyError) as caught:
            call(caller)
        del caller, caught
        assert gone() is None
    finally:
        gc.enable()
