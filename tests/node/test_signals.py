"""The signal handler before a server's: where it is installed, who is drained by it, what the server learns when."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
from time import monotonic
from types import FrameType
from typing import Any, TypeVar

import pytest
import uvicorn

from tests.support.asgi import Peer, connected, eventually
from tests.support.loops import loop_in_thread
from wsbroadcast import ConnectionManager, LimitExceeded, SlowConsumer
from wsbroadcast.node import signals
from wsbroadcast.node.signals import SIGNALS

T = TypeVar("T")

BOTH = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """uvicorn's, as far as signals go; it says what it was told and when."""

    def __init__(self) -> None:
        super().__init__(uvicorn.Config("nothing:app"))
        self.told: list[int] = []
        self.told_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.told.append(sig)
        self.told_at = monotonic()
        super().handle_exit(sig, frame)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server whose signal handlers are installed as uvicorn does it."""
    server = Server()
    before = {number: signal.signal(number, server.handle_exit) for number in BOTH}
    yield server
    for number, handler in before.items():
        signal.signal(number, handler)


def is_ours() -> bool:
    return all(signal.getsignal(number) == SIGNALS.handle for number in BOTH)


async def there(loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, T]) -> T:
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, loop))


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


async def test_nothing_is_installed_where_no_server_is_known() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    async with ConnectionManager():
        assert [signal.getsignal(number) for number in BOTH] == before


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None, max])
async def test_nothing_is_installed_before_somebody_elses_handler(server: Server, handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
    async with ConnectionManager():
        assert signal.getsignal(signal.SIGTERM) == handler
        assert signal.getsignal(signal.SIGINT) == SIGNALS.handle


async def test_nothing_is_installed_for_a_manager_that_leaves_the_signals_alone(server: Server) -> None:
    async with ConnectionManager(drain=None):
        assert signal.getsignal(signal.SIGTERM) == server.handle_exit


@pytest.mark.parametrize("begins", ["start", "first use"])
async def test_handler_is_installed_at_the_start_and_put_back_at_the_end(server: Server, begins: str) -> None:
    manager = ConnectionManager()
    if begins == "start":
        await manager.start()
    else:
        await manager.connect(Peer().websocket)
    assert is_ours()
    # sse-starlette finds the server by this.
    assert signal.getsignal(signal.SIGTERM).__self__.should_exit is False  # type: ignore[union-attr]
    server.should_exit = True
    assert signal.getsignal(signal.SIGTERM).__self__.should_exit is True  # type: ignore[union-attr]
    await manager.aclose()
    assert [signal.getsignal(number) for number in BOTH] == [server.handle_exit] * 2


async def test_only_our_own_handler_is_put_back(server: Server) -> None:
    async with ConnectionManager():
        mine = signal.default_int_handler
        signal.signal(signal.SIGINT, mine)
    assert signal.getsignal(signal.SIGINT) == mine
    assert signal.getsignal(signal.SIGTERM) == server.handle_exit


async def test_last_manager_puts_it_back(server: Server) -> None:
    async with ConnectionManager():
        async with ConnectionManager():
            pass
        assert is_ours()
    assert not is_ours()


@pytest.mark.parametrize("number", BOTH)
async def test_server_is_told_when_the_drain_is_over(server: Server, number: int) -> None:
    async with ConnectionManager(drain=0.3) as manager:
        pairs = await connected(manager, 50)
        began = monotonic()
        send(number)
        await eventually(lambda: manager.is_draining)
        assert (server.told, server.should_exit) == ([], False)
        await eventually(lambda: server.told)
        assert server.told == [number]
        assert 0.2 < server.told_at - began < 1.5
        assert {peer.end for peer, _ in pairs} == {(1012, "drain")}


async def test_all_managers_are_drained_before_the_server_is_told(server: Server) -> None:
    async with ConnectionManager(drain=0.1) as one, ConnectionManager(drain=0.5) as another:
        pairs = await connected(one, 50) + await connected(another, 50)
        send()
        await eventually(lambda: server.told)
        assert {peer.end for peer, _ in pairs} == {(1012, "drain")}
        await asyncio.sleep(0)
    assert server.told == [signal.SIGTERM]


async def test_second_signal_passes_at_once_and_the_server_is_not_told_again(server: Server) -> None:
    async with ConnectionManager(drain=60) as manager:
        await connected(manager, 100)
        send()
        await eventually(lambda: manager.is_draining)
        send(signal.SIGINT)
        await eventually(lambda: server.told)
        assert server.told == [signal.SIGINT]
        send(signal.SIGINT)  # and so does every other
        await eventually(lambda: len(server.told) == 2)
        assert server.force_exit
    assert len(server.told) == 2


async def test_signal_after_a_drain_passes_at_once(server: Server) -> None:
    async with ConnectionManager() as manager:
        await manager.drain()
        send()
        await eventually(lambda: server.told)


@pytest.mark.parametrize("is_told", [False, True])
async def test_manager_that_begins_after_the_signal_takes_nobody(server: Server, is_told: bool) -> None:
    async with ConnectionManager(drain=0.2) as manager:
        await connected(manager, 50 if not is_told else 0)
        send()
        await eventually(lambda: server.told if is_told else manager.is_draining)
        late = ConnectionManager()
        with pytest.raises(LimitExceeded):
            await late.connect(Peer().websocket)
        await late.aclose()
        await eventually(lambda: server.told)


async def test_drain_of_somebody_else_prolongs_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_GRACE_SECONDS", 0.1)
    async with ConnectionManager(drain=0.1, slow_consumer=SlowConsumer(close_timeout=0.1)) as manager:
        await connected(manager, 100)
        draining = asyncio.create_task(manager.drain(over=60))
        await eventually(lambda: manager.is_draining)
        began = monotonic()
        send()
        await eventually(lambda: server.told)
        assert 0.25 < server.told_at - began < 1.5
    await draining
    assert server.told == [signal.SIGTERM]


async def test_next_server_of_the_process_is_drained_as_well(server: Server) -> None:
    manager = ConnectionManager(drain=0.05)
    async with manager:
        send()
        await eventually(lambda: server.told)
    another = Server()
    for number in BOTH:
        signal.signal(number, another.handle_exit)
    async with manager:
        (peer, _), *_ = await connected(manager, 1)
        assert is_ours()
        send()
        await eventually(lambda: another.told)
        assert peer.end == (1012, "drain")
    assert server.told == [signal.SIGTERM]


async def test_manager_that_is_forgotten_is_not_drained(server: Server) -> None:
    manager = ConnectionManager()
    await manager.start()
    assert is_ours()
    del manager
    gc.collect()
    send()
    await eventually(lambda: server.told)


def test_manager_in_a_thread_installs_nothing(server: Server) -> None:
    async def use() -> None:
        async with ConnectionManager() as manager:
            await connected(manager, 1)
            assert not is_ours()

    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(use())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


async def test_manager_in_a_thread_is_drained_in_its_own_event_loop(server: Server) -> None:
    with loop_in_thread() as elsewhere:
        theirs = ConnectionManager(drain=0.3)
        pairs = await there(elsewhere, connected(theirs, 50))
        async with ConnectionManager(drain=0.1) as ours:
            send()
            await eventually(lambda: server.told)
            assert ours.is_draining
            assert {peer.end for peer, _ in pairs} == {(1012, "drain")}
        await there(elsewhere, theirs.aclose())
    assert server.told == [signal.SIGTERM]


async def test_event_loop_that_is_blocked_holds_nobody_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_GRACE_SECONDS", 0.1)
    is_over = threading.Event()
    with loop_in_thread() as elsewhere:
        theirs = ConnectionManager(drain=0.1)
        await there(elsewhere, connected(theirs, 1))
        elsewhere.call_soon_threadsafe(is_over.wait)
        async with ConnectionManager(drain=0.1, slow_consumer=SlowConsumer(close_timeout=0.1)):
            send()
            await eventually(lambda: server.told)
        is_over.set()
        await there(elsewhere, theirs.aclose())
    assert server.told == [signal.SIGTERM]
