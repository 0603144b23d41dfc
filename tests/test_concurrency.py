"""Tasks, and what crosses the borders of an event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from concurrent.futures import Future
from typing import NoReturn, cast

import pytest

from tests.support.brokers.processes import wait_until
from tests.support.loops import loop_in_thread
from wsbroadcast import LifecycleError
from wsbroadcast.concurrency import (
    LoopEnded,
    LoopThread,
    Tasks,
    Timed,
    running_loop,
    submit,
    wait_elsewhere,
    wait_in_thread,
    without_waiting,
)

# Tasks.


async def test_task_has_a_name_and_is_counted_until_it_ends() -> None:
    tasks = Tasks()
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    task = tasks.spawn(work(), "work")
    assert task.get_name() == "wsbroadcast work"
    assert len(tasks) == 1
    may_end.set()
    await tasks.join()
    assert task.done()
    assert len(tasks) == 0


async def test_join_without_tasks_returns() -> None:
    await Tasks().join()


async def test_join_waits_for_what_tasks_start_themselves() -> None:
    tasks = Tasks()
    finished: list[int] = []

    async def work(left: int) -> None:
        await asyncio.sleep(0)
        if left:
            tasks.spawn(work(left - 1), "more work")
        finished.append(left)

    tasks.spawn(work(5), "work")
    await tasks.join()
    assert finished == [5, 4, 3, 2, 1, 0]


async def test_join_from_within_a_task_does_not_wait_for_itself() -> None:
    tasks = Tasks()
    may_end = asyncio.Event()
    order: list[str] = []

    async def work() -> None:
        await may_end.wait()
        order.append("work")

    async def end() -> None:
        may_end.set()
        await tasks.join()
        order.append("end")

    tasks.spawn(work(), "work")
    async with asyncio.timeout(5):
        await tasks.spawn(end(), "end")
    assert order == ["work", "end"]


async def test_error_of_a_task_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()

    async def work() -> None:
        raise KeyError("lost")

    tasks.spawn(work(), "work")
    await tasks.join()
    assert "wsbroadcast work failed" in caplog.text
    assert "KeyError: 'lost'" in caplog.text
    assert len(tasks) == 0


async def test_cancelled_task_is_forgotten_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    task = tasks.spawn(_forever(), "work")
    task.cancel()
    await tasks.join()
    assert len(tasks) == 0
    assert not [record for record in caplog.records if record.name == "wsbroadcast"]


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()


# Code that blocks.


def blocked(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "wsbroadcast"]


async def test_timed_awaitable_is_the_other_one(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> list[str]:
        seen = []
        await asyncio.sleep(0)
        future = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, KeyError("from the future"))
        try:
            await future
        except KeyError as error:
            seen.append(error.args[0])
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            seen.append("cut off")
        return seen

    assert await Timed(work(), "work", 1.0) == ["from the future", "cut off"]
    assert await Timed(asyncio.ensure_future(asyncio.sleep(0, "task")), "work", 1.0) == "task"
    assert blocked(caplog) == []


@pytest.mark.parametrize("where", ["first step", "later step", "after an error", "on the way out"])
async def test_each_step_of_a_timed_awaitable_is_watched(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def block(step: str) -> None:
        if where == step:
            time.sleep(0.06)

    async def work() -> None:
        block("first step")
        await asyncio.sleep(0)
        block("later step")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            block("after an error")
        try:
            await asyncio.Event().wait()
        finally:
            block("on the way out")

    async def call() -> None:
        await Timed(work(), "the hook", 0.05)

    task = asyncio.create_task(call())
    with caplog.at_level(logging.WARNING, "wsbroadcast"):
        for _ in range(3):
            await asyncio.sleep(0)
        for _ in range(2):
            task.cancel()
            for _ in range(3):
                await asyncio.sleep(0)
    assert task.cancelled()
    [warning] = blocked(caplog)
    assert warning.startswith("the hook blocked the event loop for 0.")


def test_timed_awaitable_that_is_given_up_is_cleaned_up() -> None:
    events: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            events.append("cleaned up")

    async def call() -> None:
        await Timed(wait(), "the hook", 1.0)

    async def use() -> None:
        with pytest.raises(LifecycleError):
            without_waiting(call(), "a hook has to wait")
        assert events == ["cleaned up"]

    asyncio.run(use())


# A thread with an event loop of its own.


class Resident:
    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.may_answer = asyncio.Event()
        self.calls: list[str] = []

    async def answer(self) -> str:
        await self.may_answer.wait()
        self.calls.append("answer")
        return "answer"

    async def end(self) -> None:
        self.may_answer.set()
        self.calls.append("end")


def test_thread_answers_what_was_submitted_before_it_ends() -> None:
    thread = LoopThread("wsbroadcast test", Resident)
    resident = thread.made
    early = [thread.submit(resident.answer) for _ in range(3)]
    thread.stop(resident.end)
    thread.stop(resident.end)  # does nothing
    with pytest.raises(LoopEnded):
        thread.submit(resident.answer)
    thread.join()
    assert [future.result(0) for future in early] == 3 * ["answer"]
    assert sorted(resident.calls) == 3 * ["answer"] + ["end"]
    assert resident.loop.is_closed()


def test_thread_passes_errors_on_and_goes_on() -> None:
    async def fail() -> NoReturn:
        raise KeyError("mine")

    thread = LoopThread("wsbroadcast test", Resident)
    with pytest.raises(KeyError, match="mine"):
        thread.submit(fail).result(5)
    thread.stop(thread.made.end)
    thread.join()
    assert thread.made.calls == ["end"]


def test_thread_that_can_make_nothing_says_why_and_ends() -> None:
    def fail() -> NoReturn:
        raise OSError("no room")

    before = threading.active_count()
    with pytest.raises(OSError, match="no room"):
        LoopThread("wsbroadcast test", fail)
    wait_until(lambda: threading.active_count() == before)


# From plain calls, and from threads.


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
    looked = threading.Event()

    class Looking:
        def is_running(self) -> bool:
            looked.set()
            return loop.is_running()

    async def be_slow() -> str:
        await asyncio.to_thread(looked.wait, 5)
        return "done"

    with loop_in_thread() as loop:
        looking = cast(asyncio.AbstractEventLoop, Looking())
        assert wait_in_thread(submit(be_slow(), loop), looking, look_seconds=0.001) == "done"
    assert looked.is_set()


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
