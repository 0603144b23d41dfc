"""Publisher: from sync and async programs, threads and forks; with a fake broker where a real one adds nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn
from uuid import UUID

import pytest

from tests.support import loops
from tests.support.asgi import Peer
from tests.support.brokers import Endpoint, RedisServer
from tests.support.brokers.processes import wait_until
from tests.support.fake_broker import FakeBroker, FakeEngine, FakeLink
from tests.support.loops import TASK_FACTORIES
from tests.support.servers import ROOT, eventually
from tests.support.strict import STRICT
from wsbroadcast import (
    Audience,
    ConfigurationError,
    ConnectionManager,
    EngineUnavailable,
    Gap,
    Health,
    InvalidChannel,
    LifecycleError,
    Limits,
    MemoryEngine,
    Message,
    MessageTooLarge,
    Publication,
    Publisher,
    Receipt,
)
from wsbroadcast.engines.broker.link import Link
from wsbroadcast.options import Timing
from wsbroadcast.publishing.host import Inbox

PUBLICATION = Publication(Message.of("text"), Audience("everyone"))
PATIENT = Timing(connect_timeout=30, request_timeout=30)


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def publisher(broker: FakeBroker) -> Iterator[Publisher]:
    publisher = Publisher(FakeEngine(broker))
    yield publisher
    while not publisher._state().is_closed:
        publisher.close()


def published(broker: FakeBroker) -> list[tuple[str, bytes]]:
    """What came to the broker, as names and payloads, without the echoes."""
    parcels = [parcel for batch in broker.batches for parcel in batch if ":node:" not in parcel.name]
    return [(parcel.name, parcel.envelope.partition(b"\n")[2]) for parcel in parcels]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("wsbroadcast")]


@contextmanager
def loop_in_thread() -> Iterator[Callable[[Any], Any]]:
    """An app's event loop in another thread; yields what runs a coroutine there."""
    with loops.loop_in_thread() as loop:
        yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(10)


async def nowait(publisher: Publisher) -> None:
    publisher.broadcast_nowait("text")


# What is sent, and what is refused.

SENT: list[tuple[object, dict[str, Any], tuple[str, bytes]]] = [
    ("text", {}, ("wsbroadcast:everyone", b"text")),
    ("text", {"channel": "news"}, ("wsbroadcast:channel:news", b"text")),
    ({"a": 1}, {"channel": "news"}, ("wsbroadcast:channel:news", b'{"a":1}')),
    (b"\x00\n\xff", {"user": 42}, ("wsbroadcast:user:42", b"\x00\n\xff")),
    ("text", {"user": UUID(int=1), "key": "oil"}, (f"wsbroadcast:user:{UUID(int=1)}", b"text")),
]

REFUSED: list[tuple[object, dict[str, Any]]] = [
    ("text", {"channel": None}),
    ("text", {"user": None}),
    ("text", {"channel": ""}),
    ("text", {"channel": "news", "user": 1}),
    ("\ud800", {"channel": "news"}),
    (float("nan"), {}),
    (object(), {}),
    ("text", {"key": 1}),
    ("x" * 101, {"channel": "news"}),
]


@pytest.mark.parametrize(("message", "arguments", "parcel"), SENT)
def test_sync_program_sends(
    publisher: Publisher, broker: FakeBroker, message: object, arguments: dict[str, Any], parcel: tuple[str, bytes]
) -> None:
    with publisher:
        publisher.broadcast_threadsafe(message, **arguments)
        assert published(broker) == [parcel]
    assert broker.links == []
    assert threads() == []


@pytest.mark.parametrize(("message", "arguments", "parcel"), SENT)
async def test_async_program_sends(
    publisher: Publisher, broker: FakeBroker, message: object, arguments: dict[str, Any], parcel: tuple[str, bytes]
) -> None:
    async with publisher:
        await publisher.broadcast(message, **arguments)
        assert published(broker) == [parcel]
        publisher.broadcast_nowait(message, **arguments)
        assert threads() == []
    assert published(broker) == [parcel, parcel]
    assert broker.links == []


@pytest.mark.parametrize(("message", "arguments"), REFUSED)
async def test_publisher_refuses_what_the_manager_refuses(
    broker: FakeBroker, message: object, arguments: dict[str, Any]
) -> None:
    limits = Limits(max_outbound_bytes=100)
    manager, publisher = ConnectionManager(limits=limits), Publisher(FakeEngine(broker), limits=limits)
    async with manager, publisher:
        with pytest.raises(ValueError) as expected:  # noqa: PT011  # what it says is compared
            await manager.broadcast(message, **arguments)
        for call in (publisher.broadcast_nowait, publisher.broadcast_threadsafe):
            with pytest.raises(type(expected.value)) as caught:
                call(message, **arguments)
            assert str(caught.value) == str(expected.value)
        with pytest.raises(type(expected.value)) as caught:
            await publisher.broadcast(message, **arguments)
        assert str(caught.value) == str(expected.value)
    assert published(broker) == []


def test_message_over_the_limit_of_the_broker_is_refused(publisher: Publisher) -> None:
    with pytest.raises(MessageTooLarge):
        publisher.broadcast_threadsafe("x" * 5000)


def test_a_refusal_needs_no_broker(publisher: Publisher, broker: FakeBroker) -> None:
    with pytest.raises(InvalidChannel):
        publisher.broadcast_threadsafe("text", channel="")
    assert broker.opened == 0
    assert threads() == []


@pytest.mark.parametrize("engine", ["memory://", MemoryEngine()])
def test_memory_is_refused_because_it_reaches_nobody(engine: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"memory:// reaches this process only.*such as redis://"):
        Publisher(engine)


@pytest.mark.parametrize("engine", [None, "", "nope://ann:secret@host"])
def test_what_names_no_engine_is_refused_without_repeating_it(engine: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Publisher(engine)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), True, "2"])
def test_what_is_no_time_is_refused(broker: FakeBroker, seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="start_timeout"):
        Publisher(FakeEngine(broker), start_timeout=seconds)


def test_what_are_no_limits_is_refused(broker: FakeBroker) -> None:
    with pytest.raises(ConfigurationError, match="limits"):
        Publisher(FakeEngine(broker), limits=100)  # type: ignore[arg-type]


def test_publisher_says_what_it_is(publisher: Publisher) -> None:
    assert repr(publisher) == "<Publisher fake>"


# Life in a program without an event loop.


def test_publisher_connects_when_it_is_used_first(publisher: Publisher, broker: FakeBroker) -> None:
    assert broker.opened == 0
    assert threads() == []
    publisher.broadcast_threadsafe("one")
    publisher.broadcast_threadsafe("two")
    assert broker.opened == 1
    publisher.close()
    assert threads() == []
    publisher.close()


def test_threads_share_one_connection(publisher: Publisher, broker: FakeBroker) -> None:
    def work(number: int) -> None:
        for count in range(20):
            publisher.broadcast_threadsafe(f"{number} {count}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert broker.opened == 1
    payloads = [payload.decode() for _, payload in published(broker)]
    for number in range(8):  # each thread's in its own order
        theirs = [payload for payload in payloads if payload.startswith(f"{number} ")]
        assert theirs == [f"{number} {count}" for count in range(20)]


def test_closed_publisher_refuses_until_it_is_started_again(publisher: Publisher, broker: FakeBroker) -> None:
    with publisher:
        publisher.broadcast_threadsafe("one")
    with pytest.raises(LifecycleError, match="the publisher is closed"):
        publisher.broadcast_threadsafe("lost")
    with publisher:
        publisher.broadcast_threadsafe("two")
    assert [payload for _, payload in published(broker)] == [b"one", b"two"]
    assert broker.opened == 2


def test_only_the_last_one_closes_it(publisher: Publisher, broker: FakeBroker) -> None:
    with publisher:
        with publisher:
            pass
        publisher.broadcast_threadsafe("still open")
        assert broker.opened == 1
    assert threads() == []


def test_publisher_that_nobody_has_any_more_ends(broker: FakeBroker) -> None:
    publisher = Publisher(FakeEngine(broker))
    publisher.broadcast_threadsafe("text")
    assert threads() == ["wsbroadcast publisher"]
    del publisher
    gc.collect()
    wait_until(lambda: threads() == [] and broker.links == [])


def test_program_that_never_closes_it_ends_without_a_word() -> None:
    """In development mode, which reports whatever isn't closed."""
    code = """
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import Publisher
publisher = Publisher(FakeEngine(FakeBroker()))
publisher.broadcast_threadsafe("text")
"""
    run_script(code)


# Life in event loops.


def test_publisher_serves_one_event_loop_after_another(publisher: Publisher, broker: FakeBroker) -> None:
    """As in a Celery task that calls `asyncio.run`."""
    for number in range(3):
        asyncio.run(publisher.broadcast(str(number)))
    assert [payload for _, payload in published(broker)] == [b"0", b"1", b"2"]
    publisher.broadcast_threadsafe("sync")
    assert broker.opened == 4


def test_event_loop_uses_the_thread_that_is_there(publisher: Publisher, broker: FakeBroker) -> None:
    publisher.broadcast_threadsafe("sync")

    async def use() -> None:
        await publisher.broadcast("async")
        with pytest.raises(InvalidChannel):
            await publisher.broadcast("text", channel="")
        with pytest.raises(MessageTooLarge):
            await publisher.broadcast("x" * 5000)
        assert (await publisher.health()).is_ok
        with pytest.raises(LifecycleError, match="runs in another event loop"):
            publisher.broadcast_nowait("text")
        publisher.broadcast_threadsafe("blocks this loop, but no other")
        await publisher.aclose()

    asyncio.run(use())
    assert broker.opened == 1
    assert len(published(broker)) == 3
    assert threads() == []


async def test_threads_of_an_async_program_share_the_connection_with_it(
    publisher: Publisher, broker: FakeBroker
) -> None:
    async with publisher:
        await publisher.broadcast("one")
        await asyncio.to_thread(publisher.broadcast_threadsafe, "two")
        with pytest.raises(MessageTooLarge):
            await asyncio.to_thread(publisher.broadcast_threadsafe, "x" * 5000)
        await publisher.broadcast("three")
        assert threads() == ["wsbroadcast publisher"]
        assert (broker.opened, len(broker.links)) == (2, 1)
        with pytest.raises(LifecycleError, match="or a thread of its own: await `broadcast`"):
            publisher.broadcast_nowait("four")
    assert (broker.links, threads()) == ([], [])
    assert [payload for _, payload in published(broker)] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("is_started", [False, True])
async def test_close_from_a_thread_ends_it_in_its_event_loop(
    publisher: Publisher, broker: FakeBroker, is_started: bool
) -> None:
    await (publisher.start() if is_started else publisher.broadcast("text"))
    await asyncio.to_thread(publisher.close)
    assert broker.links == []
    with pytest.raises(LifecycleError, match="closed"):
        await publisher.broadcast("text")


async def test_what_would_block_its_own_event_loop_is_refused(publisher: Publisher) -> None:
    async with publisher:
        with pytest.raises(LifecycleError, match=r"broadcast_threadsafe would block.*use `broadcast`"):
            publisher.broadcast_threadsafe("text")
        with pytest.raises(LifecycleError, match=r"close would block.*use `aclose`"):
            publisher.close()
        with pytest.raises(LifecycleError, match=r"with would block.*use `async with`"), publisher:
            pass
        publisher.broadcast_nowait("still open, and here")


def test_broadcast_nowait_needs_a_started_event_loop(publisher: Publisher) -> None:
    with pytest.raises(LifecycleError, match="no event loop runs here: use `broadcast_threadsafe`"):
        publisher.broadcast_nowait("text")

    async def use() -> None:
        with pytest.raises(LifecycleError, match="await `start` or `broadcast` first"):
            publisher.broadcast_nowait("text")

    asyncio.run(use())


async def test_cancelled_close_ends_it_though_every_thread_is_busy(publisher: Publisher) -> None:
    await asyncio.to_thread(publisher.broadcast_threadsafe, "in a thread of its own")
    loop, may_end = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        loop.set_default_executor(pool)
        busy = loop.run_in_executor(None, may_end.wait)
        closing = asyncio.create_task(publisher.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        may_end.set()
        await busy
        await asyncio.to_thread(wait_until, lambda: threads() == [])


@pytest.mark.parametrize("factory", TASK_FACTORIES)
async def test_task_factory_changes_nothing(publisher: Publisher, broker: FakeBroker, factory: Any) -> None:
    asyncio.get_running_loop().set_task_factory(factory)
    broker.refuses = ConfigurationError("wrong password")
    with pytest.raises(ConfigurationError, match="wrong password"):
        await publisher.broadcast("lost")
    broker.refuses = None
    async with publisher:
        await publisher.broadcast("one")
        publisher.broadcast_nowait("two")
        await asyncio.to_thread(publisher.broadcast_threadsafe, "three")
        await publisher.broadcast("four")
    assert [payload for _, payload in published(broker)] == [b"one", b"two", b"three", b"four"]
    assert (broker.links, threads()) == ([], [])


def test_second_event_loop_makes_it_run_in_a_thread_for_both(publisher: Publisher, broker: FakeBroker) -> None:
    with loop_in_thread() as run:
        run(publisher.broadcast("there"))
        assert threads() == []
        asyncio.run(publisher.broadcast("from another event loop"))
        assert threads() == ["wsbroadcast publisher"]
        assert (broker.opened, len(broker.links)) == (2, 1)
        run(publisher.broadcast("there again"))
        with pytest.raises(LifecycleError, match="or a thread of its own"):
            run(nowait(publisher))
    publisher.broadcast_threadsafe("from a thread")
    assert broker.opened == 2
    assert [payload for _, payload in published(broker)] == [
        b"there",
        b"from another event loop",
        b"there again",
        b"from a thread",
    ]


def test_event_loop_that_was_not_running_when_it_was_closed_may_use_it_again(
    publisher: Publisher, broker: FakeBroker
) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(publisher.broadcast("one"))
    publisher.close()
    loop.run_until_complete(publisher.start())
    loop.run_until_complete(publisher.broadcast("two"))
    assert (broker.opened, len(broker.links), threads()) == (2, 1, [])
    loop.run_until_complete(publisher.aclose())
    loop.close()
    assert [payload for _, payload in published(broker)] == [b"one", b"two"]


def test_event_loop_that_runs_once_more_leaves_the_thread_alone(publisher: Publisher, broker: FakeBroker) -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(publisher.broadcast("one"))
    publisher.broadcast_threadsafe("two")
    [link] = [link for link in broker.links if link is not broker.links[0]]
    loop.run_until_complete(settle(loop))
    publisher.broadcast_threadsafe("three")
    assert link in broker.links
    assert broker.opened == 2
    loop.close()


async def settle(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left in a loop, after it had its turn."""
    for _ in range(20):
        await asyncio.sleep(0)
    left = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in left:
        if "engine" in task.get_name():
            task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def test_publisher_that_was_closed_runs_in_the_event_loop_again(publisher: Publisher) -> None:
    await publisher.broadcast("here")
    await asyncio.to_thread(publisher.broadcast_threadsafe, "in a thread of its own")
    await publisher.aclose()
    async with publisher:
        publisher.broadcast_nowait("here again")
        assert threads() == []


async def test_event_loop_that_closes_it_leaves_it_to_the_others(publisher: Publisher, broker: FakeBroker) -> None:
    with loop_in_thread() as run:
        run(publisher.start())
        async with publisher:
            await publisher.broadcast("one")
            run(publisher.aclose())
            await publisher.broadcast("two")
            assert (broker.opened, threads()) == (2, ["wsbroadcast publisher"])
    assert threads() == []
    assert [payload for _, payload in published(broker)] == [b"one", b"two"]


def test_start_of_an_event_loop_that_ended_without_closing_it_counts_no_more(
    publisher: Publisher, broker: FakeBroker
) -> None:
    asyncio.run(publisher.start())
    publisher.broadcast_threadsafe("in a thread of its own")
    asyncio.run(publisher.start())
    with publisher:
        publisher.broadcast_threadsafe("text")
    assert (broker.links, threads()) == ([], [])
    with pytest.raises(LifecycleError, match="closed"):
        publisher.broadcast_threadsafe("text")


def test_what_is_said_last_in_an_event_loop_that_ends_is_sent(publisher: Publisher, broker: FakeBroker) -> None:
    """By a task that `asyncio.run` cancels."""

    async def say_last() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await publisher.broadcast("last")

    async def use() -> None:
        await publisher.broadcast("first")
        task = asyncio.create_task(say_last())
        await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(use())
    assert [payload for _, payload in published(broker)] == [b"first", b"last"]


def test_event_loops_that_come_and_go_at_the_same_time_lose_and_double_nothing(
    publisher: Publisher, broker: FakeBroker
) -> None:
    """As in Celery's pool of threads, with tasks that call `asyncio.run`, and others that don't."""

    def work(number: int) -> None:
        for count in range(20):
            if number % 2:
                asyncio.run(publisher.broadcast(f"{number} {count}"))
            else:
                publisher.broadcast_threadsafe(f"{number} {count}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    payloads = [payload.decode() for _, payload in published(broker)]
    assert sorted(payloads) == sorted(f"{number} {count}" for number in range(6) for count in range(20))
    assert len(broker.links) == 1


def test_calls_that_race_with_close_are_made_once_or_refused(publisher: Publisher, broker: FakeBroker) -> None:
    def work(number: int) -> list[str]:
        taken = []
        for count in range(50):
            try:
                publisher.broadcast_threadsafe(f"{number} {count}")
            except (LifecycleError, EngineUnavailable):  # closed; or stopped when it was on its way
                continue
            taken.append(f"{number} {count}")
        return taken

    def close(number: int) -> None:
        for _ in range(50):
            with publisher:
                pass

    with ThreadPoolExecutor(5) as pool:
        closing = [pool.submit(close, 0) for _ in range(2)]
        taken = [text for texts in pool.map(work, range(3)) for text in texts]
        for done in closing:
            done.result()
    payloads = [payload.decode() for _, payload in published(broker)]
    assert len(payloads) == len(set(payloads))
    assert set(taken) <= set(payloads)


class Late(FakeBroker):
    """Answers when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = threading.Event()

    async def answer(self) -> None:
        while not self.may_answer.is_set():  # in whichever event loop
            self.asked.set()
            await asyncio.sleep(0.001)

    def hang(self) -> None:
        """Answer nobody until it may, and take note of who asks."""
        self.asked.clear()
        self.may_answer.clear()


def test_publisher_begins_anew_while_an_event_loop_that_began_is_ending() -> None:
    broker = Late()
    broker.hang()
    is_ending, may_end = threading.Event(), threading.Event()

    class Slow(FakeLink):
        async def abort(self) -> None:
            await super().abort()
            is_ending.set()
            while not may_end.is_set():  # noqa: ASYNC110  # it is set in another thread
                await asyncio.sleep(0.001)

    class SlowEngine(FakeEngine):
        def new_link(self) -> Link:
            return FakeLink(broker) if is_ending.is_set() else Slow(broker)

    publisher = Publisher(SlowEngine(broker, timing=PATIENT))

    async def use() -> None:
        call = asyncio.create_task(publisher.broadcast("cut off"))
        await asyncio.to_thread(broker.asked.wait, 5)
        assert not call.done()

    thread = threading.Thread(target=lambda: asyncio.run(use()))
    thread.start()
    assert is_ending.wait(5)
    broker.may_answer.set()
    publisher.broadcast_threadsafe("meanwhile")
    may_end.set()
    thread.join()
    publisher.broadcast_threadsafe("afterwards")
    assert [payload for _, payload in published(broker)] == [b"meanwhile", b"afterwards"]
    publisher.close()


def test_thread_that_comes_while_an_event_loop_is_stuck_waits_for_its_end() -> None:
    broker = Late()
    publisher = Publisher(FakeEngine(broker, timing=PATIENT))

    async def use() -> Future[Receipt]:
        await publisher.broadcast("one")
        broker.hang()
        stuck = asyncio.create_task(publisher.broadcast("cut off"))
        await asyncio.to_thread(broker.asked.wait, 5)
        call = pool.submit(publisher.broadcast_threadsafe, "two")
        await asyncio.to_thread(wait_until, threads)
        assert not stuck.done()
        return call  # and the event loop ends, without telling the publisher

    with ThreadPoolExecutor(1) as pool:
        call = asyncio.run(use())
        broker.may_answer.set()
        call.result(5)
    assert [payload for _, payload in published(broker)] == [b"one", b"two"]
    publisher.close()


def test_call_that_its_event_loop_could_not_begin_is_made_in_the_thread() -> None:
    broker = Late()
    publisher = Publisher(FakeEngine(broker, timing=PATIENT))

    async def use() -> None:
        broker.hang()
        early = asyncio.create_task(publisher.broadcast("early"))
        await asyncio.to_thread(broker.asked.wait, 5)
        call = pool.submit(publisher.broadcast_threadsafe, "late")
        await asyncio.to_thread(wait_until, threads)
        broker.may_answer.set()
        await early
        await asyncio.wrap_future(call)

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(use())
    assert sorted(payload for _, payload in published(broker)) == [b"early", b"late"]
    publisher.close()


async def test_caller_that_gives_up_cancels_the_call_in_the_thread() -> None:
    broker = Late()
    publisher = Publisher(FakeEngine(broker, timing=PATIENT))
    await asyncio.to_thread(publisher.broadcast_threadsafe, "one")
    broker.hang()
    calling = asyncio.create_task(publisher.broadcast("cut off"))
    await asyncio.to_thread(broker.asked.wait, 5)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    broker.may_answer.set()
    await publisher.broadcast("two")
    await publisher.aclose()
    assert threads() == []


def test_errors_from_the_thread_leave_no_cycle(broker: FakeBroker) -> None:
    """Or else what the frames hold, a publisher for one, lives until the next collection."""
    publisher = Publisher(FakeEngine(broker))

    class Caller:
        pass

    def call(caller: Caller) -> None:
        publisher.broadcast_threadsafe("x" * 5000)

    caller = Caller()
    gone = weakref.ref(caller)
    gc.disable()
    try:
        with pytest.raises(MessageTooLarge) as caught:
            call(caller)
        del caller, caught
        publisher.close()  # its thread may hold the error for a moment
        assert gone() is None
    finally:
        gc.enable()
        publisher.close()


def test_process_without_a_thread_to_spare_says_so(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            publisher.broadcast_threadsafe("text")
    publisher.broadcast_threadsafe("text")


def test_process_without_an_event_loop_to_spare_says_so(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise OSError("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.events, "new_event_loop", fail)
        with pytest.raises(OSError, match="open files"):
            publisher.broadcast_threadsafe("text")
    publisher.broadcast_threadsafe("text")


class Stage(FakeEngine):
    """An engine with transactions."""

    def __init__(self, broker: FakeBroker) -> None:
        super().__init__(broker)
        self.published: list[object] = []

    async def publish_in(self, transaction: object, publication: Publication) -> None:
        self.published.append((transaction, publication.message.payload))


async def test_transaction_is_refused_when_the_publisher_is_closed(broker: FakeBroker) -> None:
    engine = Stage(broker)
    publisher = Publisher(engine)
    await publisher.broadcast("before it is used", transaction="t1")
    async with publisher:
        await publisher.broadcast("open", transaction="t2")
    with pytest.raises(LifecycleError, match="the publisher is closed"):
        await publisher.broadcast("closed", transaction="t3")
    assert engine.published == [("t1", b"before it is used"), ("t2", b"open")]


async def test_start_counts(publisher: Publisher, broker: FakeBroker) -> None:
    await publisher.start()
    async with publisher:
        pass
    await publisher.broadcast("still open")
    await publisher.aclose()
    await publisher.aclose()
    assert (broker.opened, broker.links) == (1, [])


@pytest.mark.parametrize("is_async", [True, False])
def test_engine_that_fails_to_stop_tells_who_closes_it(broker: FakeBroker, is_async: bool) -> None:
    class Stuck(FakeEngine):
        async def aclose(self) -> None:
            await super().aclose()
            raise KeyError("stuck")

    publisher = Publisher(Stuck(broker))

    async def use_async() -> None:
        await publisher.broadcast("text")
        await publisher.aclose()

    def use() -> None:
        publisher.broadcast_threadsafe("text")
        publisher.close()

    with pytest.raises(KeyError, match="stuck"):
        asyncio.run(use_async()) if is_async else use()
    assert threads() == []


async def test_what_an_engine_brings_although_nobody_is_here_is_dropped() -> None:
    receiver = Inbox(MemoryEngine())
    receiver.take(PUBLICATION)
    await receiver.deliver(PUBLICATION)
    receiver.gap(Gap("fake", 1.0))


# A broker that is not well.


def test_broker_that_is_down_is_no_error_before_a_message_is_sent(publisher: Publisher, broker: FakeBroker) -> None:
    broker.is_down = True
    with publisher:
        with pytest.raises(EngineUnavailable, match=r"nowhere:1 is out of reach.*nothing was sent"):
            publisher.broadcast_threadsafe("lost")
        assert asyncio.run(publisher.health()) == Health("fake", False, "ConnectionRefusedError: nobody listens")
        broker.is_down = False
        wait_until(lambda: broker.links)
        wait_until(lambda: asyncio.run(publisher.health()).is_ok)
        publisher.broadcast_threadsafe("found")
    assert [payload for _, payload in published(broker)] == [b"found"]


def test_broker_that_does_not_answer_is_given_up_in_time(broker: FakeBroker) -> None:
    broker.is_hung.set()
    publisher = Publisher(FakeEngine(broker, timing=PATIENT), start_timeout=0.1)
    with publisher:  # no error yet
        with pytest.raises(EngineUnavailable, match="nothing was sent"):
            publisher.broadcast_threadsafe("lost")
        assert asyncio.run(publisher.health()) == Health("fake", False, "not connected yet")
    assert published(broker) == []
    assert threads() == []


def test_engine_that_takes_its_time_goes_on_starting(broker: FakeBroker) -> None:
    may_answer = threading.Event()

    class Slow(FakeBroker):
        async def answer(self) -> None:
            await asyncio.to_thread(may_answer.wait, 5)

    broker = Slow()
    with Publisher(FakeEngine(broker, timing=PATIENT), start_timeout=0.1) as publisher:
        with pytest.raises(EngineUnavailable):
            publisher.broadcast_threadsafe("too early")
        may_answer.set()
        wait_until(lambda: broker.links)
        publisher.broadcast_threadsafe("in time")
    assert broker.opened == 1
    assert [payload for _, payload in published(broker)] == [b"in time"]


def test_engine_that_fails_fast_is_tried_again(broker: FakeBroker) -> None:
    broker.is_down = True
    publisher = Publisher(FakeEngine(broker, fail_fast=True))
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="can't be reached"), publisher:
            pass
        with pytest.raises(EngineUnavailable, match="can't be reached"):
            publisher.broadcast_threadsafe("lost")
    broker.is_down = False
    publisher.broadcast_threadsafe("found")
    publisher.close()


def test_refusal_by_the_broker_is_an_error_each_time_until_it_is_mended(
    publisher: Publisher, broker: FakeBroker
) -> None:
    broker.refuses = ConfigurationError("wrong password")
    with pytest.raises(ConfigurationError, match="wrong password"), publisher:
        pass
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="wrong password"):
            publisher.broadcast_threadsafe("lost")
    broker.refuses = None
    publisher.broadcast_threadsafe("found")
    assert [payload for _, payload in published(broker)] == [b"found"]


async def test_caller_that_is_cancelled_does_not_end_the_start_for_others(
    publisher: Publisher, broker: FakeBroker
) -> None:
    first, second = (asyncio.create_task(publisher.broadcast(text)) for text in ("first", "second"))
    await asyncio.sleep(0)
    first.cancel()
    await second
    with pytest.raises(asyncio.CancelledError):
        await first
    await publisher.aclose()
    assert broker.opened == 1
    assert [payload for _, payload in published(broker)] == [b"second"]


async def test_close_during_the_start_ends_both(broker: FakeBroker) -> None:
    broker.is_hung.set()
    publisher = Publisher(FakeEngine(broker, timing=PATIENT))
    waiting = asyncio.create_task(publisher.broadcast("text"))
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await publisher.aclose()
    with pytest.raises(LifecycleError, match="closed"):
        await waiting
    assert published(broker) == []


# A real broker.


@pytest.fixture
def url(redis_server: Endpoint, prefix: str) -> str:
    return f"{redis_server.url}?prefix={prefix}"


async def test_message_of_a_publisher_reaches_the_connections_of_an_app(url: str) -> None:
    manager, peer = ConnectionManager(url), Peer()
    async with manager, Publisher(url) as publisher:
        await manager.connect(peer.websocket, user=42, channels=["news"])
        await publisher.broadcast("to everyone")
        await publisher.broadcast({"to": "a channel"}, channel="news")
        await asyncio.to_thread(publisher.broadcast_threadsafe, b"to a user", user=42)
        await publisher.broadcast("to nobody here", channel="sport")
        assert await publisher.health() == Health("redis", True)

        async def received() -> list[object]:
            messages = [event.get("text") or event.get("bytes") for event in peer.sent]
            return messages if len(messages) == 4 else []

        assert set(await eventually(received)) == {None, "to everyone", '{"to":"a channel"}', b"to a user"}


def test_wrong_password_is_one_clear_error_without_it(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(password="sesame")
    publisher = Publisher(server.url.replace("sesame", "open-up"))
    for _ in range(2):
        with pytest.raises(ConfigurationError) as caught:
            publisher.broadcast_threadsafe("text")
        assert f"127.0.0.1:{server.port}" in str(caught.value)
        assert "open-up" not in repr_of_chain(caught.value)
        assert "\n" not in str(caught.value)
    publisher.close()


def test_broker_that_hangs_or_is_killed_is_an_error_in_time(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis()

    def fail(publisher: Publisher) -> None:
        started = time.monotonic()
        with pytest.raises(EngineUnavailable, match=f"127.0.0.1:{server.port}|connection to the broker is lost"):
            publisher.broadcast_threadsafe("text")
        assert time.monotonic() - started < 2.5

    with Publisher(server.url) as used, Publisher(server.url) as unused:
        used.broadcast_threadsafe("text")
        server.pause()
        fail(used)
        fail(unused)
        late = Publisher(server.url)
        fail(late)
        late.close()
        server.kill()
        fail(used)


def repr_of_chain(error: BaseException | None) -> str:
    return "" if error is None else f"{error!r} {repr_of_chain(error.__cause__ or error.__context__)}"


# Forks. In a process of their own, because this one has threads.

FORK = """
import os, sys, warnings
import redis
from wsbroadcast import Publisher

warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)  # what this is about
url, prefix = sys.argv[1:]
publisher = Publisher(url)
pubsub = redis.Redis.from_url(url.partition("?")[0]).pubsub()
pubsub.subscribe(f"{prefix}:everyone")

def received(count):
    found = []
    while len(found) < count:
        message = pubsub.get_message(timeout=5)
        assert message is not None, found
        if message["type"] == "message":
            header, _, payload = message["data"].partition(b"\\n")
            found.append((header.partition(b"seq")[0], payload.decode()))
    return found

def fork(work):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)  # which collects what it can, unlike the os._exit of multiprocessing and Celery
    assert os.waitpid(child, 0)[1] == 0
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on Windows")


@needs_fork
def test_publisher_made_in_the_parent_works_in_the_child(url: str, prefix: str) -> None:
    check = """
publisher._state().lock.acquire()  # a thread of the parent may hold it
fork(lambda: publisher.broadcast_threadsafe("child"))
assert received(1)[0][1] == "child"
"""
    run_script(FORK + check, url, prefix)


@needs_fork
def test_publisher_used_in_the_parent_works_in_both(url: str, prefix: str) -> None:
    check = """
publisher.broadcast_threadsafe("parent")
for _ in range(3):
    fork(lambda: [publisher.broadcast_threadsafe(f"child {number}") for number in range(2)])
    publisher.broadcast_threadsafe("parent again")
found = received(10)
assert [payload for _, payload in found] == ["parent"] + 3 * ["child 0", "child 1", "parent again"]
assert len({node for node, payload in found if payload.startswith("parent")}) == 1  # one connection all the time
assert len({node for node, _ in found}) == 4
"""
    run_script(FORK + check, url, prefix)


@needs_fork
def test_child_that_closes_it_or_runs_a_loop_leaves_the_parent_alone(url: str, prefix: str) -> None:
    check = """
import asyncio

def use():
    asyncio.run(publisher.broadcast("child"))
    publisher.close()

def close_once():
    publisher.close()
    publisher.broadcast_threadsafe("child again")

with publisher:
    publisher.broadcast_threadsafe("parent")
    fork(use)
    fork(publisher.close)
    with publisher:
        fork(close_once)
    publisher.broadcast_threadsafe("parent again")
assert [payload for _, payload in received(4)] == ["parent", "child", "child again", "parent again"]
"""
    run_script(FORK + check, url, prefix)


@needs_fork
def test_publisher_used_in_the_parent_works_in_a_pool_of_processes(url: str, prefix: str) -> None:
    check = """
import multiprocessing

def send(text):
    publisher.broadcast_threadsafe(text)

publisher.broadcast_threadsafe("parent")
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(send, ["one", "two"])
assert sorted(payload for _, payload in received(3)) == ["one", "parent", "two"]
"""
    run_script(FORK + check, url, prefix)


def run_script(code: str, *arguments: str) -> None:
    """Run a program in development mode; it has to end in time, successfully and without a word."""
    result = subprocess.run(
        [*STRICT, "-X", "dev", "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    # What development mode says of a step that took long is about the machine.
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Executing <")]
    assert (result.returncode, result.stdout, errors) == (0, "", [])


def test_threads_that_come_and_go_do_not_close_it_for_each_other(redis_server: Endpoint, prefix: str) -> None:
    publisher = Publisher(f"{redis_server.url}?prefix={prefix}")

    def come_and_go() -> None:
        for _ in range(20):
            with publisher:
                publisher.broadcast_threadsafe("text", channel="news")

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(come_and_go) for _ in range(4)]:
            done.result(timeout=60)
