"""Tasks that start at once, before `create_task` returns (Python 3.12 and later), change nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.asgi import Peer, connected, eventually, turns
from tests.support.fast import WebSocketsSansIOProtocol
from tests.support.loops import TASK_FACTORIES
from wsbroadcast import Connection, ConnectionManager, Gap, SlowConsumer


@pytest.fixture(params=TASK_FACTORIES)
async def manager(request: pytest.FixtureRequest) -> AsyncIterator[ConnectionManager]:
    asyncio.get_running_loop().set_task_factory(request.param)
    options = SlowConsumer(max_backlog_messages=4, send_timeout=0.2, close_timeout=0.05)
    async with ConnectionManager(slow_consumer=options) as manager:
        yield manager


async def test_close_on_the_fast_path(manager: ConnectionManager) -> None:
    protocol = WebSocketsSansIOProtocol()
    connection = await manager.connect(protocol.websocket)
    assert connection._sink.kind == "uvicorn"
    await manager.broadcast("before")
    await manager.close(protocol.websocket, 4100)
    assert protocol.messages == ["before", "<close>"]
    assert connection.close_code == 4100
    assert manager.stats().behind == manager.stats().backlog_messages == 0


async def test_messages_arrive_in_order_and_nothing_stays(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    for number in range(20):
        await manager.broadcast(f"{number}")
        await peer.websocket.send_text(f"own {number}")
    await connection.close(4100)
    assert peer.messages == [text for number in range(20) for text in (f"{number}", f"own {number}")]
    assert peer.close_code == 4100
    assert not any(task.get_name().startswith("wsbroadcast") for task in asyncio.all_tasks())


@pytest.mark.parametrize("way", ["backlog_full", "send_timeout"])
async def test_eviction(manager: ConnectionManager, way: str) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    [(peer, _)] = await connected(manager, 1)
    peer.stall()
    for number in range(8 if way == "backlog_full" else 2):
        manager.broadcast_nowait(f"{number}")
        await asyncio.sleep(0)
    await eventually(lambda: len(ended) == 1)
    assert manager.stats().evicted == {way: 1}
    peer.resume()


async def test_hooks_run_in_their_order(manager: ConnectionManager) -> None:
    seen: list[Any] = []

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        await asyncio.sleep(0)
        seen.append("connect")

    @manager.on_message
    async def on_message(connection: Connection, message: str | bytes) -> None:
        await asyncio.sleep(0)
        seen.append(message)

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await asyncio.sleep(0)
        seen.append("disconnect")

    peer = Peer()
    connection = await manager.connect(peer.websocket)
    peer.say("hello")
    assert await connection.receive() == "hello"
    manager.disconnect(connection)
    await eventually(lambda: seen == ["connect", "hello", "disconnect"])


async def test_hook_that_acts_on_a_lost_connection_breaks_into_no_delivery(manager: ConnectionManager) -> None:
    lost, stays, leaves = protocols = [WebSocketsSansIOProtocol() for _ in range(3)]
    connections = [await manager.connect(protocol.websocket, channels=["news"]) for protocol in protocols]

    @manager.on_disconnect
    def on_disconnect(connection: Connection) -> None:
        manager.broadcast_nowait("somebody has left")
        manager.disconnect(connections[2])

    lost.transport.abort()
    manager.broadcast_nowait("1", channel="news")
    manager.broadcast_nowait("2")
    await eventually(lambda: manager.stats().disconnects == 2)
    await turns()
    assert stays.messages == ["1", "2", "somebody has left", "somebody has left"]
    assert leaves.messages == ["1", "2", "somebody has left"]


async def test_gap_hook_runs_when_what_reports_the_gap_goes_on(manager: ConnectionManager) -> None:
    seen: list[str] = []
    manager.on_gap(lambda gap: seen.append("hook"))
    await manager.connect(Peer().websocket)
    manager._core.life.node.gap(Gap("test", 1.0))
    seen.append("goes on")
    await eventually(lambda: len(seen) == 2)
    assert seen == ["goes on", "hook"]


async def test_deliver_hook_runs_when_what_broadcasts_without_waiting_goes_on(manager: ConnectionManager) -> None:
    seen: list[str] = []
    manager.on_deliver(lambda delivery: seen.append("hook"))
    manager.broadcast_nowait("hello")
    seen.append("goes on")
    await eventually(lambda: len(seen) == 2)
    assert seen == ["goes on", "hook"]
