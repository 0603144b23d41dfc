from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest

from wsbroadcast import LifecycleError
from wsbroadcast.loops import running_loop, wait_in_thread, without_waiting


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


@contextmanager
def loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


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
