"""Peers that read nothing, on real sockets: what they cost the others, and what they cost in memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.support.rawclient import CLOSE, PING, RawClient, masked_frame
from tests.support.servers import eventually, serve_here
from wsbroadcast import Audience, ConnectionManager, Message, SlowConsumer
from wsbroadcast.publication import Publication

KIB = 1024
SEND_TIMEOUT = 4.0


def make_app(manager: ConnectionManager) -> FastAPI:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.connect(websocket)
        await connection.wait_closed()

    return app


@asynccontextmanager
async def stalled(port: int, count: int) -> AsyncIterator[list[RawClient]]:
    """Connect clients with a small buffer, from which nobody reads."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(await RawClient.connect(port, "/ws", receive_buffer=4096))
            stack.callback(clients[-1].close)
        yield clients


async def holds(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    async def is_so() -> bool:
        return condition()

    await eventually(is_so, timeout)


async def ping(clients: list[RawClient]) -> None:
    frame = masked_frame(PING, b"still here")
    while True:
        for client in clients:
            with contextlib.suppress(OSError):
                client.socket.send(frame)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("pings", [False, True])
async def test_majority_that_reads_nothing_delays_nobody_and_is_evicted(pings: bool) -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=SEND_TIMEOUT))
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(serve_here(make_app(manager)))
        hostile = await stack.enter_async_context(stalled(port, 6))
        readers: list[ClientConnection] = [
            await stack.enter_async_context(connect(f"ws://127.0.0.1:{port}/ws", compression=None)) for _ in range(4)
        ]
        pinging = asyncio.create_task(ping(hostile if pings else []))
        stack.callback(pinging.cancel)

        async def say(text: str) -> float:
            began = time.monotonic()
            await manager.broadcast(text)
            assert [await reader.recv() for reader in readers] == [text] * 4
            return time.monotonic() - began

        while manager.stats().behind < 6:
            await say("x" * 60_000)
        latencies = []
        while not manager.stats().evicted:
            latencies.append(await say("y" * 100))
            await asyncio.sleep(0.1)
            assert len(latencies) < 20 * SEND_TIMEOUT  # twice as long as it may take
        await holds(lambda: len(manager.connections) == 4)
        assert manager.stats().evicted == {"send_timeout": 6}
        assert max(latencies) < SEND_TIMEOUT / 4
        assert len(latencies) > 20


# What waits is held once.


@asynccontextmanager
async def traced(manager: ConnectionManager, count: int) -> AsyncIterator[Callable[[], float]]:
    """Connect stalled clients; yields what tells how many bytes were allocated for each since."""
    async with serve_here(make_app(manager), ws_ping_interval=None) as port, stalled(port, count):
        await holds(lambda: len(manager.connections) == count)
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()

            def each() -> float:
                gc.collect()
                return (tracemalloc.get_traced_memory()[0] - before) / count

            yield each
        finally:
            tracemalloc.stop()


def patient() -> ConnectionManager:
    return ConnectionManager(slow_consumer=SlowConsumer(send_timeout=600.0))


BOUND = 1024 * KIB + 200 * KIB + 128 * KIB
"""A full backlog, what its messages take beside their bytes, and the transport."""


@pytest.mark.parametrize("size", [KIB, 16 * KIB])
@pytest.mark.parametrize("kind", ["ascii", "emoji", "bytes"])
async def test_own_messages_of_those_who_read_nothing_are_held_once(kind: str, size: int) -> None:
    manager = patient()
    async with traced(manager, 10) as each:
        full = False
        while not full:
            full = True
            for connection in manager.connections:
                if connection._sink.held_bytes + size > KIB * KIB or connection._sink.held_messages >= KIB:
                    continue
                full = False
                text = "x" * (size - 4) + ("\U0001f600" if kind == "emoji" else "yyyy")
                value: Any = text.encode() if kind == "bytes" else text
                to_it = Audience("connection", connection.id)
                manager._core.life.node.dispatcher.dispatch(Publication(Message.of(value), to_it))
            await asyncio.sleep(0)
        assert manager.stats().backlog_bytes >= 10 * (1024 * KIB - size)
        assert each() <= BOUND


async def test_what_readers_needed_is_not_kept_for_those_who_read_nothing() -> None:
    manager = patient()
    async with traced(manager, 1) as each:
        port = manager.connections[0].websocket.scope["server"][1]
        async with connect(f"ws://127.0.0.1:{port}/ws", compression="deflate") as reader:
            while manager.stats().backlog_bytes < 1000 * KIB:
                await manager.broadcast("x" * (16 * KIB - 4) + "\U0001f600")
                await reader.recv()
            assert each() <= BOUND + 256 * KIB  # what the reader takes, and its client, beside


async def test_large_message_is_held_once_for_all() -> None:
    manager = patient()
    size = 15_000_000
    async with traced(manager, 20) as each:
        await manager.broadcast(b"x" * size)
        await holds(lambda: all(connection._sink.outstanding for connection in manager.connections))
        await asyncio.sleep(0)
        assert manager.stats().backlog_messages == 20
        assert each() <= size / 20 + 300 * KIB


# Large messages arrive whole.


@pytest.mark.parametrize("compression", [None, "deflate"])
async def test_large_messages_arrive_whole_with_pongs_in_between(compression: Any) -> None:
    manager = ConnectionManager()
    values: list[str | bytes] = [
        "x" * 65_536,
        "y" * 65_537,
        "é\U0001f600" * 50_000,
        bytes(range(256)) * 12_000,
        "small",
    ]
    async with (
        serve_here(make_app(manager)) as port,
        connect(f"ws://127.0.0.1:{port}/ws", max_size=None, max_queue=1, compression=compression) as client,
    ):
        await holds(lambda: len(manager.connections) == 1)
        receiving = asyncio.create_task(receive(client, 3 * len(values)))
        pongs = 0
        for _ in range(3):
            for value in values:
                await manager.broadcast(value)
                await asyncio.wait_for(await client.ping(), 10)
                pongs += 1
        assert await asyncio.wait_for(receiving, 30) == values * 3
        assert pongs == 15
        assert manager.stats().dropped == {}


async def receive(client: ClientConnection, count: int) -> list[str | bytes]:
    return [await client.recv() for _ in range(count)]


async def test_peer_that_is_dismissed_in_the_middle_of_a_large_message_gets_the_close_frame() -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(close_timeout=5.0))
    async with serve_here(make_app(manager)) as port, stalled(port, 1) as [client]:
        [connection] = manager.connections
        await manager.broadcast("x" * 15_000_000)
        await holds(lambda: connection._sink.held_messages == 1 and connection._sink.held_bytes < 15_000_000)
        manager._core.life.node.membership.dismiss(connection, 4401, "bye")
        while (frame := await asyncio.wait_for(client.receive(), 20)) is not None and frame.opcode != CLOSE:
            pass
        assert frame is not None
        assert frame.close_code == 4401
        assert manager.stats().dropped == {"closed": 1}


async def test_client_of_a_library_sees_the_code_in_the_middle_of_a_large_message() -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(close_timeout=5.0))
    async with (
        serve_here(make_app(manager)) as port,
        connect(f"ws://127.0.0.1:{port}/ws", max_size=None, max_queue=1, compression=None) as client,
    ):
        await holds(lambda: len(manager.connections) == 1)
        [connection] = manager.connections
        await manager.broadcast(b"x" * 16_000_000)
        await manager.broadcast("never")
        await holds(lambda: connection._sink.held_messages > 0)
        manager._core.life.node.membership.dismiss(connection, 4401, "bye")
        received = [message async for message in ended(client)]
        assert "never" not in received
        assert client.close_code == 4401


async def ended(client: ClientConnection) -> AsyncIterator[str | bytes]:
    """What still comes, until the connection is closed."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            yield await asyncio.wait_for(client.recv(), 20)
