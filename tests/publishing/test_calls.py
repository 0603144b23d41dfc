"""Calls into another event loop; what they do for a publisher is tested with that."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from tests.support.loops import loop_in_thread
from wsbroadcast import EngineUnavailable
from wsbroadcast.publishing.calls import Calls, HasEnded, Ticket


async def answer(ticket: Ticket) -> str:
    assert ticket.take()
    return "done"


async def fail(ticket: Ticket) -> str:
    raise KeyError("mine")


def test_ticket_is_taken_once() -> None:
    ticket = Ticket()
    assert [ticket.take(), ticket.take()] == [True, False]


async def test_call_returns_what_it_returns_there() -> None:
    with loop_in_thread() as loop:
        calls = Calls(loop, lambda: False)
        assert await calls.do_elsewhere(answer) == "done"
        assert await asyncio.to_thread(calls.do_threadsafe, answer) == "done"
        with pytest.raises(KeyError, match="mine"):
            await calls.do_elsewhere(fail)
        with pytest.raises(KeyError, match="mine"):
            await asyncio.to_thread(calls.do_threadsafe, fail)


async def test_call_that_may_not_begin_any_more_was_not_made() -> None:
    with loop_in_thread() as loop:
        calls = Calls(loop, lambda: True)
        with pytest.raises(HasEnded):
            await calls.do_elsewhere(answer)
    with pytest.raises(HasEnded):  # it is closed
        await calls.do_elsewhere(answer)


@pytest.mark.parametrize(("is_made", "error"), [(False, HasEnded), (True, EngineUnavailable)])
def test_call_in_an_event_loop_that_stops_without_a_word_is_given_up(is_made: bool, error: type[Exception]) -> None:
    """Should the event loop run once more, the call finds that out."""
    loop = asyncio.new_event_loop()
    taken: list[bool] = []

    async def call(ticket: Ticket) -> None:
        if is_made:
            assert ticket.take()
        loop.stop()
        try:
            await loop.create_future()
        finally:
            taken.append(ticket.take())

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    calls = Calls(loop, lambda: False)
    with pytest.raises(error):
        calls.do_threadsafe(call)
    thread.join()
    loop.run_until_complete(calls.wait_done())
    assert taken == [False]
    loop.close()


@pytest.mark.parametrize(("is_made", "error"), [(False, HasEnded), (True, EngineUnavailable)])
def test_call_that_is_cancelled_with_all_that_is_left_in_an_event_loop(is_made: bool, error: type[Exception]) -> None:
    """As `asyncio.run` does at its end."""
    begun, outcomes = threading.Event(), []

    async def call(ticket: Ticket) -> None:
        if is_made:
            assert ticket.take()
        begun.set()
        await asyncio.Event().wait()

    async def use() -> threading.Thread:
        calls = Calls(asyncio.get_running_loop(), lambda: False)

        def make() -> None:
            try:
                calls.do_threadsafe(call)
            except Exception as raised:
                outcomes.append(type(raised))

        thread = threading.Thread(target=make)
        thread.start()
        await asyncio.to_thread(begun.wait, 5)
        return thread

    asyncio.run(use()).join()
    assert outcomes == [error]


async def test_caller_that_gives_up_cancels_the_call() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def call(ticket: Ticket) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with loop_in_thread() as loop:
        calling = asyncio.create_task(Calls(loop, lambda: False).do_elsewhere(call))
        assert await asyncio.to_thread(begun.wait, 5)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert await asyncio.to_thread(cancelled.wait, 5)


def test_errors_from_another_event_loop_leave_no_cycle() -> None:
    """Or else what the frames hold, a publisher for one, lives until the next collection."""

    class Caller:
        pass

    def make(caller: Caller) -> None:
        with loop_in_thread() as loop:
            Calls(loop, lambda: False).do_threadsafe(fail)

    caller = Caller()
    gone = weakref.ref(caller)
    gc.disable()
    try:
        with pytest.raises(KeyError) as caught:
            make(caller)
        del caller, caught
        assert gone() is None
    finally:
        gc.enable()
