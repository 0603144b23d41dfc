"""The manager's life: start and end, event loops, threads."""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Self

import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, cancel_at, connected, eventually, lifespan, turns
from wsbroadcast import (
    ConfigurationError,
    Connection,
    ConnectionManager,
    EncodeError,
    Engine,
    Gap,
    Health,
    InvalidChannel,
    LifecycleError,
    Publication,
    Receiver,
    SlowConsumer,
)
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.publication import Control

# Start and end.


async def test_the_first_use_starts_the_manager() -> None:
    manager = ConnectionManager()
    await manager.broadcast("to nobody yet")
    [(peer, _)] = await connected(manager, 1)
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    assert (await manager.health()).is_ok
    await manager.aclose()


async def test_broadcast_nowait_starts_the_manager() -> None:
    manager = ConnectionManager()
    manager.broadcast_nowait("to nobody yet")
    assert manager.stats().broadcasts == 1
    await manager.aclose()


async def test_start_waits_for_the_end_that_has_begun() -> None:
    may_end = asyncio.Event()
    manager = ConnectionManager()

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await may_end.wait()

    await manager.start()
    await connected(manager, 1)
    ending = asyncio.create_task(manager.aclose())
    await turns()
    starting = asyncio.create_task(manager.start())
    await turns()
    assert not ending.done()
    assert not starting.done()
    may_end.set()
    await asyncio.gather(ending, starting)
    await asyncio.to_thread(manager.broadcast_threadsafe, "it runs")
    await manager.aclose()


async def test_aclose_sends_what_was_handed_over_and_closes_with_1001() -> None:
    ended: list[Connection] = []
    manager = ConnectionManager()

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await asyncio.sleep(0)
        ended.append(connection)

    pairs = await connected(manager, 5)
    await manager.broadcast("last words")
    await manager.aclose()
    for peer, connection in pairs:
        assert peer.messages == ["last words"]
        assert peer.close_code == 1001
        assert not connection.is_open
    assert len(ended) == 5  # awaited
    assert manager.connections == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_aclose_is_idempotent() -> None:
    manager = ConnectionManager()
    await manager.aclose()  # never started
    await manager.start()
    await manager.aclose()
    await manager.aclose()


async def test_aclose_gives_up_peers_that_take_nothing() -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(close_timeout=0.05))
    pairs = await connected(manager, 3)
    for peer, _ in pairs:
        peer.stall()
    await manager.broadcast("held")
    await asyncio.wait_for(manager.aclose(), 2)
    for peer, _ in pairs:
        peer.resume()
    await turns()
    assert all(peer.messages == [] for peer, _ in pairs)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_aclose_gives_up_peers_that_left_with_a_backlog() -> None:
    manager = ConnectionManager()
    [(peer, _)] = await connected(manager, 1)
    peer.stall()
    await manager.broadcast("held")
    await eventually(lambda: peer.is_stalled)
    manager.disconnect(peer.websocket)
    await asyncio.wait_for(manager.aclose(), 5)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_closed_manager_refuses_and_says_so() -> None:
    manager = ConnectionManager()
    [(peer, connection)] = await connected(manager, 1)
    await manager.aclose()
    fresh = Peer()
    calls: list[Callable[[], Any]] = [
        lambda: manager.broadcast("x"),
        lambda: manager.broadcast_local("x"),
        lambda: manager.broadcast_nowait("x"),
        lambda: manager.connect(fresh.websocket),
        lambda: manager.health(),
    ]
    for call in calls:
        with pytest.raises(LifecycleError, match="closed"):
            await call()
    assert fresh.sent == []
    # What ends things goes on working.
    manager.disconnect(peer.websocket)
    await manager.close(connection)
    await manager.unsubscribe(connection, "a")
    assert manager.stats().connections == 0


async def test_a_closed_manager_can_be_started_again() -> None:
    manager = ConnectionManager()
    for _ in range(3):
        async with manager:
            [(peer, _)] = await connected(manager, 1, channels=["a"])
            await manager.broadcast("hello", channel="a")
            assert await peer.next() == "hello"
        assert manager.stats().connections == 0
    assert manager.stats().connects == 3


async def test_starts_are_counted() -> None:
    manager = ConnectionManager()
    await manager.start()
    async with manager, manager:
        await connected(manager, 1)
    assert len(manager.connections) == 1
    await manager.aclose()
    assert manager.connections == []
    with pytest.raises(LifecycleError):
        await manager.broadcast("x")


async def test_lifespan_binds_and_runs_as_long_as_the_app() -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    async with lifespan(app):
        assert app.state.wsbroadcast_managers == (manager,)
        [(peer, _)] = await connected(manager, 1)
    assert peer.close_code == 1001


async def test_two_apps_may_share_a_manager() -> None:
    manager = ConnectionManager()
    async with lifespan(FastAPI(lifespan=manager.lifespan)):
        async with lifespan(FastAPI(lifespan=manager.lifespan)):
            pass
        [(peer, _)] = await connected(manager, 1)
        await manager.broadcast("still here")
        assert await peer.next() == "still here"


@pytest.mark.parametrize("act", ["broadcast", "close", "disconnect", "aclose"])
async def test_an_on_disconnect_hook_may_act_while_the_manager_closes(act: str) -> None:
    manager = ConnectionManager()

    @manager.on_disconnect
    async def act_on(connection: Connection) -> None:
        if act == "broadcast":
            await manager.broadcast("somebody left")
        elif act == "close":
            await connection.close()
        elif act == "disconnect":
            manager.disconnect(connection)
        else:
            await manager.aclose()

    await connected(manager, 3)
    await asyncio.wait_for(manager.aclose(), 5)
    assert manager.stats().hook_errors == 0


async def test_readers_learn_of_the_end_of_the_manager() -> None:
    manager = ConnectionManager()
    [(peer, connection)] = await connected(manager, 1)
    reading = asyncio.ensure_future(peer.websocket.receive_text())
    waiting = asyncio.ensure_future(connection.wait_closed())
    await turns()
    await manager.aclose()
    with pytest.raises(WebSocketDisconnect) as caught:
        await asyncio.wait_for(reading, 5)
    assert caught.value.code == 1001
    await asyncio.wait_for(waiting, 5)


class SlowEngine(Engine):
    """The memory engine with a start and an end that take a while, as those of a broker do."""

    name = "slow"

    def __init__(self) -> None:
        self.receivers: list[Receiver] = []
        self.starts = 0

    @classmethod
    def from_url(cls, url: str) -> Self:
        raise NotImplementedError

    async def start(self, receiver: Receiver) -> None:
        self.starts += 1
        for _ in range(3):
            await asyncio.sleep(0)
        self.receivers.append(receiver)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.receivers.clear()

    async def publish(self, publication: Publication | Control) -> None:
        await asyncio.sleep(0)
        for receiver in self.receivers:
            await receiver.deliver(publication)

    def publish_nowait(self, publication: Publication | Control) -> None:
        for receiver in self.receivers:
            receiver.take(publication)

    async def health(self) -> Health:
        return Health(self.name, bool(self.receivers))


async def test_first_uses_at_the_same_time_start_the_engine_once() -> None:
    engine = SlowEngine()
    manager = ConnectionManager(engine)
    peers = [Peer() for _ in range(3)]
    await asyncio.gather(manager.broadcast("x"), *(manager.connect(peer.websocket) for peer in peers))
    assert engine.starts == 1
    await manager.broadcast("once")
    for peer in peers:
        await peer.wait_for(lambda peer=peer: "once" in peer.messages)  # type: ignore[misc]
        assert peer.messages.count("once") == 1
    await manager.aclose()


async def test_a_first_use_that_is_cancelled_while_the_engine_starts_spoils_nothing() -> None:
    for step in range(1, 10):
        manager = ConnectionManager(SlowEngine())
        waited = await cancel_at(step, manager.broadcast("x"))
        [(peer, _)] = await connected(manager, 1)
        await manager.broadcast("hello")
        await turns()
        assert peer.messages == ["hello"]
        await manager.aclose()
        if not waited:
            return
    raise AssertionError("it never ends")


async def test_broadcast_nowait_before_the_start_of_an_engine_that_takes_a_while_says_what_to_do() -> None:
    manager = ConnectionManager(SlowEngine())
    with pytest.raises(LifecycleError, match="has to start"):
        manager.broadcast_nowait("x")
    await manager.start()
    manager.broadcast_nowait("x")
    await manager.aclose()


async def test_aclose_that_is_cancelled_leaves_a_manager_that_can_be_started() -> None:
    manager = ConnectionManager(SlowEngine())
    for step in range(1, 20):
        await manager.start()
        [(peer, _)] = await connected(manager, 1)
        waited = await cancel_at(step, manager.aclose())
        await eventually(lambda: manager.stats().connections == 0)
        async with manager:
            [(peer, _)] = await connected(manager, 1)
            await manager.broadcast("hello")
            await peer.wait_messages(1)
            await turns()
            assert peer.messages == ["hello"]
        if not waited:
            return
    raise AssertionError("it never ends")


# Event loops. These run their own.


def _quietly() -> None:
    gc.collect()  # a coroutine that was never awaited warns now, which fails the test


def test_without_an_event_loop_it_says_what_to_do() -> None:
    manager = ConnectionManager()
    with pytest.raises(LifecycleError, match="broadcast_threadsafe"):
        manager.broadcast_nowait("x")
    with pytest.raises(LifecycleError, match="lifespan"):
        manager.broadcast_threadsafe("x")
    manager.disconnect(Peer().websocket)
    _quietly()


def test_a_module_level_manager_survives_asyncio_run_twice() -> None:
    manager = ConnectionManager()

    async def main() -> None:
        assert manager.stats().connections in (0, 1)
        [(peer, _)] = await connected(manager, 1, channels=["a"])
        await manager.broadcast("hello", channel="a")
        assert await peer.next() == "hello"
        assert len(manager.connections) == 1

    asyncio.run(main())
    asyncio.run(main())
    asyncio.run(manager.aclose())
    asyncio.run(manager.start())  # which nobody ends
    asyncio.run(main_again(manager))
    _quietly()


async def main_again(manager: ConnectionManager) -> None:
    """Start a closed manager in yet another loop."""
    async with manager:
        await connected(manager, 1)
    assert manager.connections == []


def test_asyncio_run_that_leaves_a_stalled_peer_behind_spoils_nothing() -> None:
    manager = ConnectionManager()

    async def main() -> None:
        [(peer, _)] = await connected(manager, 1)
        peer.stall()
        await manager.broadcast("held")
        await turns()

    asyncio.run(main())
    asyncio.run(main())
    assert manager.stats().evicted == {}
    _quietly()


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine there; return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def stop(self, *, close: bool = True) -> None:
        """End the loop."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)
        if close and not self.loop.is_closed():
            self.loop.close()


@pytest.fixture
def other_loop() -> Generator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


def test_a_second_running_event_loop_is_told_what_to_do(other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    other_loop.run(manager.start())

    async def main() -> None:
        fresh = Peer()
        calls: list[Callable[[], Any]] = [
            lambda: manager.broadcast("x"),
            lambda: manager.broadcast_nowait("x"),
            lambda: manager.connect(fresh.websocket),
            lambda: manager.start(),
        ]
        for call in calls:
            with pytest.raises(LifecycleError, match="another event loop"):
                await call()
        assert fresh.sent == []

    asyncio.run(main())
    other_loop.run(manager.aclose())
    _quietly()


# Event loops that own nothing.


Use = Callable[[ConnectionManager], Any]

USES: dict[str, Use] = {
    "broadcast": lambda manager: manager.broadcast("to nobody"),
    "broadcast_local": lambda manager: manager.broadcast_local("to nobody"),
    "broadcast_nowait": lambda manager: _now(manager.broadcast_nowait, "to nobody"),
    "health": lambda manager: manager.health(),
    "close_user": lambda manager: manager.close_user("ann"),
    "send": lambda manager: _refused_send(manager),
}

TOLD = "another event loop.*broadcast_threadsafe.*Publisher"


async def _now(call: Callable[..., Any], *arguments: Any) -> None:
    call(*arguments)


async def _refused_send(manager: ConnectionManager) -> None:
    try:
        await manager.send(Peer().websocket, "never connected")
    except LifecycleError as error:
        if "await `manager.connect" not in str(error):
            raise


class Life(SlowEngine):
    """An engine that tells in which event loops it was started and stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.life: list[tuple[str, asyncio.AbstractEventLoop]] = []
        self.may_start = threading.Event()
        self.may_start.set()

    async def start(self, receiver: Receiver) -> None:
        self.life.append(("starts", asyncio.get_running_loop()))
        while not self.may_start.is_set():  # noqa: ASYNC110  # set in another thread
            await asyncio.sleep(0.001)
        await super().start(receiver)
        self.life.append(("started", asyncio.get_running_loop()))

    async def aclose(self) -> None:
        await super().aclose()
        self.life.append(("stopped", asyncio.get_running_loop()))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
async def test_event_loop_that_has_only_sent_something_owns_nothing(use: Use, other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    other_loop.run(use(manager))
    [(peer, connection)] = await connected(manager, 1, user="ann")
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    with pytest.raises(LifecycleError, match=TOLD):
        await asyncio.to_thread(other_loop.run, use(manager))
    assert connection.is_open
    await asyncio.to_thread(manager.broadcast_threadsafe, "from a thread")
    assert await peer.next() == "from a thread"
    await manager.aclose()
    _quietly()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("way", ["start", "handshake", "lifespan"])
async def test_who_starts_or_lets_somebody_in_wins_too(use: Use, way: str, other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    other_loop.run(use(manager))
    peer = Peer()
    ways: dict[str, AbstractAsyncContextManager[Any]] = {
        "start": manager,
        "handshake": manager.handshake(peer.websocket),
        "lifespan": manager.lifespan(FastAPI()),
    }
    async with ways[way]:
        with pytest.raises(LifecycleError, match=TOLD):
            await asyncio.to_thread(other_loop.run, use(manager))
        await manager.connect(peer.websocket)
        await manager.broadcast("hello")
        assert await peer.next() == "hello"
    await manager.aclose()


async def test_event_loop_that_has_a_connection_owns_the_manager_until_that_has_left(other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    [(theirs, _)] = other_loop.run(connected(manager, 1))
    with pytest.raises(LifecycleError, match=TOLD):
        await manager.connect(Peer().websocket)
    with pytest.raises(LifecycleError, match=TOLD):
        await manager.start()
    other_loop.run(_now(manager.disconnect, theirs.websocket))
    [(peer, _)] = await connected(manager, 1)
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    assert theirs.messages == []
    await manager.aclose()


async def test_event_loop_in_which_somebody_comes_in_owns_the_manager(other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    is_inside, may_go_on = threading.Event(), threading.Event()

    async def come_in() -> None:
        async with manager.handshake(Peer().websocket):
            is_inside.set()
            await asyncio.to_thread(may_go_on.wait, 5)

    coming = asyncio.ensure_future(asyncio.to_thread(other_loop.run, come_in()))
    await asyncio.to_thread(is_inside.wait, 5)
    with pytest.raises(LifecycleError, match=TOLD):
        await manager.connect(Peer().websocket)
    may_go_on.set()
    await coming
    await connected(manager, 1)
    await manager.aclose()


async def test_engine_is_stopped_in_the_event_loop_that_is_left(other_loop: LoopThread) -> None:
    engine = Life()
    manager = ConnectionManager(engine)
    other_loop.run(manager.broadcast("to nobody"))
    [(peer, _)] = await connected(manager, 1)
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    here, there = asyncio.get_running_loop(), other_loop.loop
    assert engine.life == [
        ("starts", there), ("started", there), ("stopped", there), ("starts", here), ("started", here)
    ]  # fmt: skip
    await manager.aclose()
    assert engine.life[-1] == ("stopped", here)
    assert asyncio.all_tasks(there) == set()


async def test_engine_that_is_being_started_elsewhere_is_waited_for(other_loop: LoopThread) -> None:
    engine = Life()
    engine.may_start.clear()
    manager = ConnectionManager(engine)
    sending = asyncio.run_coroutine_threadsafe(manager.broadcast("to nobody"), other_loop.loop)
    await eventually(lambda: bool(engine.life))
    connecting = asyncio.ensure_future(connected(manager, 1))
    await turns()
    assert not connecting.done()
    engine.may_start.set()
    [(peer, _)] = await connecting
    with pytest.raises(LifecycleError, match=TOLD):
        await asyncio.wrap_future(sending)
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    assert [what for what, _ in engine.life] == ["starts", "started", "stopped", "starts", "started"]
    await manager.aclose()


async def test_broadcast_that_loses_its_event_loop_in_a_hook_reaches_nobody(other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    is_inside, may_go_on = threading.Event(), threading.Event()

    @manager.on_broadcast
    async def wait(message: Any, audience: Any) -> Any:
        if message.data == "late":
            is_inside.set()
            while not may_go_on.is_set():  # noqa: ASYNC110  # set in another thread
                await asyncio.sleep(0.001)
        return message

    calls = [manager.broadcast("late"), manager.broadcast_local("late")]
    sending = [asyncio.run_coroutine_threadsafe(call, other_loop.loop) for call in calls]
    await asyncio.to_thread(is_inside.wait, 5)
    [(peer, _)] = await connected(manager, 1)
    may_go_on.set()
    for call in sending:
        with pytest.raises(LifecycleError, match=TOLD):
            await asyncio.wrap_future(call)
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    await manager.aclose()


async def test_event_loop_that_never_gets_to_its_tasks_lets_go_at_its_next_call() -> None:
    manager = ConnectionManager()
    has_sent, may_go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []

    async def send() -> None:
        await manager.broadcast("to nobody")
        has_sent.set()
        may_go_on.wait(5)  # blocks its event loop
        try:
            await manager.broadcast("to nobody")
        except LifecycleError as error:
            errors.append(error)
        has_sent.clear()
        may_go_on.clear()
        has_sent.wait(5)  # and again

    thread = threading.Thread(target=asyncio.run, args=(send(),))
    thread.start()
    assert await asyncio.to_thread(has_sent.wait, 5)
    connecting = asyncio.ensure_future(connected(manager, 1))
    await turns()
    assert not connecting.done()
    may_go_on.set()
    [(peer, _)] = await connecting
    assert len(errors) == 1
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    await manager.aclose()
    has_sent.set()
    thread.join()


async def test_event_loop_that_is_blocked_for_long_is_named(
    monkeypatch: pytest.MonkeyPatch, other_loop: LoopThread
) -> None:
    monkeypatch.setattr("wsbroadcast.node.lifecycle._LEAVE_SECONDS", 0.05)
    manager = ConnectionManager()
    other_loop.run(manager.broadcast("to nobody"))
    may_go_on = threading.Event()
    other_loop.loop.call_soon_threadsafe(may_go_on.wait, 5)
    with pytest.raises(LifecycleError, match="blocked"):
        await manager.connect(Peer().websocket)
    may_go_on.set()
    await connected(manager, 1)
    await manager.aclose()


async def test_event_loop_that_ends_meanwhile_is_not_waited_for(other_loop: LoopThread) -> None:
    engine = Life()
    manager = ConnectionManager(engine)
    other_loop.run(manager.broadcast("to nobody"))
    is_blocked, may_go_on = threading.Event(), threading.Event()

    def block() -> None:
        is_blocked.set()
        may_go_on.wait(5)
        other_loop.loop.stop()

    other_loop.loop.call_soon_threadsafe(block)
    await asyncio.to_thread(is_blocked.wait, 5)
    connecting = asyncio.ensure_future(connected(manager, 1))
    await turns()
    may_go_on.set()
    await connecting
    await manager.aclose()
    # Its owner clears up as asyncio.run does.
    await asyncio.to_thread(other_loop.stop, close=False)
    for task in asyncio.all_tasks(other_loop.loop):
        task.cancel()
        await asyncio.to_thread(other_loop.loop.run_until_complete, asyncio.wait({task}))


async def test_aclose_ends_it_in_an_event_loop_that_owns_nothing(other_loop: LoopThread) -> None:
    engine = Life()
    manager = ConnectionManager(engine)
    other_loop.run(manager.broadcast("to nobody"))
    await manager.aclose()
    assert engine.life[-1] == ("stopped", other_loop.loop)
    with pytest.raises(LifecycleError, match="closed"):
        await asyncio.to_thread(other_loop.run, manager.broadcast("x"))
    async with manager:
        await connected(manager, 1)


async def test_start_waits_for_an_end_in_another_event_loop(
    other_loop: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = asyncio.Event()
    engine = Life()
    manager = ConnectionManager(engine)

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await may_end.wait()

    async def start() -> asyncio.Task[None]:
        starting = asyncio.create_task(manager.start())
        await turns()
        return starting

    async def use(starting: asyncio.Task[None]) -> str | bytes:
        await starting
        [(peer, _)] = await connected(manager, 1)
        await manager.broadcast("hello")
        return await peer.next()

    await manager.start()
    await connected(manager, 1)
    ending = asyncio.create_task(manager.aclose())
    await turns()
    here, there = asyncio.get_running_loop(), other_loop.loop
    starting = await asyncio.to_thread(other_loop.run, start())
    assert manager._core.life.loop is here
    with monkeypatch.context() as patch:
        patch.setattr("wsbroadcast.node.lifecycle._LEAVE_SECONDS", 0.0)
        with pytest.raises(LifecycleError, match="still being closed"):
            await asyncio.to_thread(other_loop.run, manager.start())
    may_end.set()
    await ending
    assert await asyncio.to_thread(other_loop.run, use(starting)) == "hello"
    assert engine.life[2:4] == [("stopped", here), ("starts", there)]
    await asyncio.to_thread(other_loop.run, manager.aclose())


def test_end_that_its_event_loop_never_finished_ends_nothing_later(other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    may_end = asyncio.Event()
    manager.on_disconnect(lambda connection: may_end.wait())

    async def begin_to_end() -> asyncio.Task[None]:
        await manager.start()
        await connected(manager, 1)
        ending = asyncio.create_task(manager.aclose())
        await turns()
        return ending

    async def use(ending: asyncio.Task[None]) -> None:
        await manager.start()
        [(peer, _)] = await connected(manager, 1)
        ending.get_coro().close()  # as the garbage collector does
        await manager.broadcast("hello")
        assert await peer.next() == "hello"
        may_end.set()
        await manager.aclose()

    ending = other_loop.run(begin_to_end())
    other_loop.stop(close=False)
    asyncio.run(use(ending))
    ending.cancel()
    other_loop.loop.run_until_complete(asyncio.wait(asyncio.all_tasks(other_loop.loop)))


async def test_third_event_loop_stops_nothing_that_the_second_could_not_start(other_loop: LoopThread) -> None:
    engine = Life()
    manager = ConnectionManager(engine)
    other_loop.run(manager.broadcast("to nobody"))
    may_go_on = threading.Event()
    other_loop.loop.call_soon_threadsafe(may_go_on.wait, 5)
    second = LoopThread()
    coming = asyncio.run_coroutine_threadsafe(manager.connect(Peer().websocket), second.loop)
    await eventually(lambda: manager._core.life.loop is second.loop)
    coming.cancel()
    await eventually(lambda: not manager._core.life.node.entering)
    connecting = asyncio.ensure_future(connected(manager, 1))
    await eventually(lambda: manager._core.life.loop is not second.loop)
    may_go_on.set()
    await connecting
    here, there = asyncio.get_running_loop(), other_loop.loop
    life = [each for each in engine.life if each[0] != "started"]
    # The second may stop once more what has been stopped, while it hasn't been started again.
    assert [each for each in life if each != ("stopped", second.loop)] == [
        ("starts", there), ("stopped", there), ("starts", here)
    ]  # fmt: skip
    assert life[-1] == ("starts", here)
    await manager.aclose()
    second.stop()


async def test_end_before_the_other_event_loop_has_let_go_stops_the_engine_once(other_loop: LoopThread) -> None:
    engine = Life()
    manager = ConnectionManager(engine)
    other_loop.run(manager.broadcast("to nobody"))
    may_go_on = threading.Event()
    other_loop.loop.call_soon_threadsafe(may_go_on.wait, 5)
    connecting = asyncio.ensure_future(manager.connect(Peer().websocket))
    await turns()
    connecting.cancel()
    await asyncio.wait([connecting])
    await manager.aclose()
    may_go_on.set()
    await eventually(lambda: engine.life[-1] == ("stopped", other_loop.loop))
    assert [what for what, _ in engine.life] == ["starts", "started", "stopped"]


def test_hook_of_the_event_loop_that_is_left_may_go_on_sending(other_loop: LoopThread) -> None:
    """The end there waits for the hook, which has to wait for nothing."""
    manager = ConnectionManager(Life(), hook_timeout=60)
    is_taken, told = threading.Event(), threading.Event()

    @manager.on_gap
    async def tell(gap: Gap) -> None:
        while not is_taken.is_set():  # noqa: ASYNC110  # set in another thread
            await asyncio.sleep(0.001)
        with pytest.raises(LifecycleError, match=TOLD):
            await manager.broadcast("reload")
        told.set()

    async def use() -> None:
        await manager.broadcast("to nobody")
        node = manager._core.life.node
        node.tasks.spawn(manager.hooks.observe("on_gap", Gap("life", 1.0)), "on_gap hooks")

    async def main() -> None:
        async with manager:
            is_taken.set()
            await connected(manager, 1)
            assert await asyncio.to_thread(told.wait, 10)

    other_loop.run(use())
    asyncio.run(main())
    other_loop.stop()
    _quietly()


@pytest.fixture
def hasty_threads() -> Generator[None]:
    """Threads that are switched at nearly every chance, which shows what they do to each other."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty_threads")
async def test_many_event_loops_that_send_never_keep_anybody_out() -> None:
    managers = [ConnectionManager(Life() if number % 2 else "memory://") for number in range(40)]
    current = [managers[0]]
    told: list[str] = []

    async def send() -> None:
        while current:
            try:
                await current[0].broadcast("from a loop of its own")
            except (LifecycleError, IndexError) as error:
                told.append(str(error))
            await asyncio.sleep(0.001)

    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(asyncio.run, send()) for _ in range(4)]
        try:
            for manager in managers:
                current[0] = manager
                async with asyncio.timeout(10):
                    [(peer, _)] = await connected(manager, 1)
                    await manager.broadcast("hello")
                assert await peer.next() == "hello"
                assert peer.messages == ["hello"]
                await manager.aclose()
        finally:
            current.clear()
            await asyncio.to_thread(lambda: [each.result(10) for each in sending])
    assert told
    assert all("broadcast_threadsafe" in text or "closed" in text or "index" in text for text in told)


@pytest.mark.usefixtures("hasty_threads")
async def test_thread_that_broadcasts_while_the_manager_moves_loses_nothing(other_loop: LoopThread) -> None:
    manager = ConnectionManager(Life())
    other_loop.run(manager.broadcast("to nobody"))
    is_over = threading.Event()

    def work() -> int:
        number = 0
        while not is_over.is_set():
            number += 1
            manager.broadcast_threadsafe(str(number))
        return number

    working = asyncio.ensure_future(asyncio.to_thread(work))
    [(peer, _)] = await connected(manager, 1)
    await peer.wait_messages(20)
    is_over.set()
    count = await working
    numbers = [int(text) for text in await peer.wait_messages(1) if isinstance(text, str)]
    await eventually(lambda: peer.messages[-1:] == [str(count)])
    numbers = [int(str(text)) for text in peer.messages]
    assert numbers == list(range(numbers[0], count + 1))
    await manager.aclose()


@pytest.mark.parametrize("broker", ["redis", "nats", "postgres"])
async def test_engine_with_a_broker_leaves_nothing_where_it_was(
    broker: str, request: pytest.FixtureRequest, prefix: str, other_loop: LoopThread
) -> None:
    url = request.getfixturevalue(f"{broker}_server").url
    manager, far = ConnectionManager(f"{url}?prefix={prefix}"), ConnectionManager(f"{url}?prefix={prefix}")
    [(elsewhere, _)] = await connected(far, 1)
    for number in range(3):  # it works, as long as it runs there
        await asyncio.to_thread(other_loop.run, manager.broadcast(f"{number}"))
    assert await elsewhere.wait_messages(3) == ["0", "1", "2"]
    [(peer, _)] = await connected(manager, 1)
    assert asyncio.all_tasks(other_loop.loop) == set()
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    assert (await manager.health()).is_ok
    with pytest.raises(LifecycleError, match=TOLD):
        await asyncio.to_thread(other_loop.run, manager.broadcast("x"))
    await far.broadcast("to both")
    assert await peer.next() == "to both"
    assert manager.stats().engine.gaps == 0
    await manager.aclose()
    await far.aclose()
    _quietly()


@pytest.mark.parametrize("broker", ["memory", "redis"])
def test_clients_come_in_while_a_thread_sends_by_asyncio_run(broker: str, request: pytest.FixtureRequest) -> None:
    """An app without a lifespan, and a scheduler in a thread: it was there first."""
    url = "memory://" if broker == "memory" else request.getfixturevalue("redis_server").url
    manager = ConnectionManager(url)
    app = FastAPI()
    has_sent, is_over = threading.Event(), threading.Event()
    told: list[str] = []

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        async for message in await manager.connect(websocket):
            await manager.broadcast(message)

    async def schedule() -> None:
        while not is_over.is_set():
            try:
                await manager.broadcast("tick")
            except LifecycleError as error:
                told.append(str(error))
            has_sent.set()
            await asyncio.sleep(0.001)

    thread = threading.Thread(target=asyncio.run, args=(schedule(),))
    thread.start()
    try:
        assert has_sent.wait(5)
        with TestClient(app).websocket_connect("/ws") as ada:
            ada.send_text("hello")
            assert ada.receive_text() == "hello"
            told.clear()
            while not told:
                has_sent.clear()
                assert has_sent.wait(5)
            manager.broadcast_threadsafe("from a thread")
            assert ada.receive_text() == "from a thread"
    finally:
        is_over.set()
        thread.join()
    assert re.search(TOLD, told[0])
    _quietly()


# Threads.


async def test_broadcast_threadsafe_reaches_everyone_and_returns_when_it_is_handed_over() -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 3, channels=["a"])

        def work() -> int:
            for number in range(100):
                manager.broadcast_threadsafe(number, channel="a", exclude=pairs[0][1])
            return manager.stats().broadcasts

        assert await asyncio.to_thread(work) == 100
        for peer, _ in pairs[1:]:
            assert await peer.wait_messages(100) == [str(number) for number in range(100)]
        assert pairs[0][0].messages == []


async def test_broadcast_threadsafe_from_many_threads_loses_nothing() -> None:
    async with ConnectionManager() as manager:
        [(peer, _)] = await connected(manager, 1)

        def work(name: int) -> None:
            for number in range(50):
                manager.broadcast_threadsafe(f"{name} {number}")

        with ThreadPoolExecutor(8) as pool:
            loop = asyncio.get_running_loop()
            await asyncio.gather(*(loop.run_in_executor(pool, work, name) for name in range(8)))
        messages = [str(message) for message in await peer.wait_messages(400)]
        for name in range(8):
            assert [m for m in messages if m.startswith(f"{name} ")] == [f"{name} {number}" for number in range(50)]


async def test_broadcast_threadsafe_raises_in_the_thread() -> None:
    async with ConnectionManager() as manager:

        @manager.on_broadcast
        async def fail(message: Any, audience: Any) -> Any:
            if message.data == "timeout":
                raise TimeoutError("the hook's own")
            return message

        for message, options, error in (
            ("\ud800", {}, EncodeError),
            ("x", {"channel": ""}, InvalidChannel),
            ("x", {"user": None}, ValueError),
            ("timeout", {}, TimeoutError),
        ):
            with pytest.raises(error):
                await asyncio.to_thread(partial(manager.broadcast_threadsafe, **options), message)


async def test_broadcast_threadsafe_from_the_loop_itself_says_what_to_do() -> None:
    async with ConnectionManager() as manager:
        with pytest.raises(LifecycleError, match="await"):
            manager.broadcast_threadsafe("x")


async def test_broadcast_threadsafe_before_the_start_and_after_the_end_says_what_to_do() -> None:
    manager = ConnectionManager()
    with pytest.raises(LifecycleError, match="isn't running"):
        await asyncio.to_thread(manager.broadcast_threadsafe, "x")
    await manager.start()
    await asyncio.to_thread(manager.broadcast_threadsafe, "x")
    await manager.aclose()
    with pytest.raises(LifecycleError, match="isn't running"):
        await asyncio.to_thread(manager.broadcast_threadsafe, "x")


@pytest.mark.parametrize("close", [True, False])
def test_broadcast_threadsafe_after_the_loop_has_ended_never_hangs(other_loop: LoopThread, close: bool) -> None:
    manager = ConnectionManager()
    other_loop.run(manager.start())
    other_loop.stop(close=close)
    with pytest.raises(LifecycleError):
        manager.broadcast_threadsafe("x")
    other_loop.stop()
    _quietly()


@pytest.mark.parametrize("close", [True, False])
def test_broadcast_threadsafe_never_hangs_when_the_loop_ends_meanwhile(other_loop: LoopThread, close: bool) -> None:
    manager = ConnectionManager(hook_timeout=60)
    is_inside = threading.Event()

    @manager.on_broadcast
    async def hang(message: Any, audience: Any) -> Any:
        is_inside.set()
        await asyncio.sleep(60)

    other_loop.run(manager.start())
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(manager.broadcast_threadsafe, "x")
        assert is_inside.wait(5)
        other_loop.stop(close=False)
        with pytest.raises(LifecycleError, match="ended"):
            call.result(10)
    # The loop's owner clears up as asyncio.run does.
    for task in asyncio.all_tasks(other_loop.loop):
        task.cancel()
        other_loop.loop.run_until_complete(asyncio.wait({task}))
    other_loop.stop()
    _quietly()


async def test_broadcast_threadsafe_waits_for_the_crowd_as_broadcast_does() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=8, send_timeout=60)) as manager:
        [(peer, _)] = await connected(manager, 1)
        peer.stall()
        while manager.stats().behind == 0:
            manager.broadcast_nowait("held")
            await turns()
        call = asyncio.ensure_future(asyncio.to_thread(manager.broadcast_threadsafe, "waits"))
        await asyncio.sleep(0.05)
        assert not call.done()
        peer.resume()
        await asyncio.wait_for(call, 5)


def test_other_calls_from_a_thread_say_what_to_do(other_loop: LoopThread) -> None:
    manager = ConnectionManager()
    other_loop.run(manager.start())
    with pytest.raises(LifecycleError, match="broadcast_threadsafe"):
        manager.broadcast_nowait("x")
    other_loop.run(manager.aclose())


async def test_aclose_from_another_loop_says_where_to_call_it() -> None:
    manager = ConnectionManager()
    [(_, connection)] = await connected(manager, 1)
    with pytest.raises(LifecycleError, match="another event loop"):
        await asyncio.to_thread(lambda: asyncio.run(manager.aclose()))
    assert connection.is_open
    await manager.aclose()


@pytest.mark.parametrize(
    "options",
    [{"hook_timeout": 0}, {"hook_timeout": "5"}, {"hook_timeout": float("nan")}, {"slow_consumer": "drop"}],
)
def test_options_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(ConfigurationError):
        ConnectionManager(**options)


async def test_exclude_of_something_else_is_refused() -> None:
    manager = ConnectionManager()
    with pytest.raises(TypeError, match="exclude takes"):
        await manager.broadcast("hello", exclude="id")  # type: ignore[arg-type]


# Start and end at the same time.


class HeldEngine(MemoryEngine):
    """Its start takes as long as a test says; an end doesn't cut it short."""

    def __init__(self) -> None:
        super().__init__()
        self.starts = 0
        self.may_start = asyncio.Event()

    async def start(self, receiver: Receiver) -> None:
        self.starts += 1
        await self.may_start.wait()
        await super().start(receiver)

    @property
    def runs(self) -> bool:
        return self._receiver is not None


STARTERS: dict[str, Callable[[ConnectionManager], Any]] = {
    "start": lambda manager: manager.start(),
    "connect": lambda manager: manager.connect(Peer().websocket),
    "broadcast": lambda manager: manager.broadcast("x"),
}


@pytest.mark.parametrize("use", STARTERS)
async def test_use_that_waits_for_the_engine_is_refused_when_the_manager_is_closed(use: str) -> None:
    engine = HeldEngine()
    manager = ConnectionManager(engine)
    waiting = [asyncio.ensure_future(STARTERS[use](manager)) for _ in range(2)]
    await eventually(lambda: engine.starts == 1)
    ending = asyncio.create_task(manager.aclose())
    await turns()
    assert not ending.done()
    engine.may_start.set()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    await ending
    assert [type(outcome) for outcome in outcomes] == [LifecycleError, LifecycleError]
    assert (engine.starts, engine.runs, manager.connections) == (1, False, [])


async def test_manager_that_was_closed_while_its_engine_started_hears_after_the_next_start() -> None:
    engine = HeldEngine()
    manager = ConnectionManager(engine)
    first = asyncio.create_task(manager.start())
    await eventually(lambda: engine.starts == 1)
    ending = asyncio.create_task(manager.aclose())
    await turns()
    again = asyncio.create_task(manager.start())
    engine.may_start.set()
    with pytest.raises(LifecycleError):
        await first
    await asyncio.gather(ending, again)
    [(peer, _)] = await connected(manager, 1)
    await manager.broadcast("hello")
    assert await peer.next() == "hello"
    await manager.aclose()
    assert not engine.runs


async def test_second_aclose_at_the_same_time_returns_when_the_first_is_done() -> None:
    may_end = asyncio.Event()
    manager = ConnectionManager()

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await may_end.wait()

    await manager.start()
    await connected(manager, 1)
    endings = [asyncio.create_task(manager.aclose()) for _ in range(2)]
    await turns()
    assert [ending.done() for ending in endings] == [False, False]
    may_end.set()
    await asyncio.wait_for(asyncio.gather(*endings), 5)


async def test_hook_that_closes_the_manager_while_it_is_closed_doesnt_wait_for_itself() -> None:
    manager = ConnectionManager()
    closed: list[Connection] = []

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await manager.aclose()
        closed.append(connection)

    await manager.start()
    [(_, connection)] = await connected(manager, 1)
    await asyncio.wait_for(manager.aclose(), 2)  # less than a hook's timeout
    assert closed == [connection]


# From a thread, and from another event loop.


@pytest.mark.parametrize("verb", ["disconnect", "renew"])
async def test_plain_call_from_a_thread_is_refused_before_anything_changes(verb: str) -> None:
    gone: list[Connection] = []
    async with ConnectionManager() as manager:
        manager.on_disconnect(gone.append)
        [(peer, connection)] = await connected(manager, 1, expires_at=4e9)
        timer = connection._expiry
        call = partial(manager.disconnect, connection) if verb == "disconnect" else partial(connection.renew, None)
        with pytest.raises(LifecycleError, match=r"anyio\.from_thread"):
            await asyncio.to_thread(call)
        assert connection.is_open
        assert connection.expires_at == 4e9
        assert connection._expiry is timer is not None
        assert not timer.cancelled()
        await manager.broadcast("still here")
        assert await peer.next() == "still here"
        manager.disconnect(connection)
        await eventually(lambda: gone == [connection])
    assert gone == [connection]


@pytest.mark.parametrize("verb", ["close", "subscribe", "unsubscribe"])
async def test_call_from_another_event_loop_is_refused_before_anything_changes(verb: str) -> None:
    async with ConnectionManager() as manager:
        [(_, connection)] = await connected(manager, 1, channels=["a"])
        calls: dict[str, Callable[[], Any]] = {
            "close": lambda: manager.close(connection),
            "subscribe": lambda: manager.subscribe(connection, "b"),
            "unsubscribe": lambda: manager.unsubscribe(connection, "a"),
        }

        async def call() -> None:
            await calls[verb]()

        with pytest.raises(LifecycleError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, call())
        assert connection.is_open
        assert connection.channels == {"a"}
