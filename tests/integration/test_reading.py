"""How uvicorn reads while a connection has the WebSocket: not stopped for each message, and as bounded as before."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.asyncio.client import connect

from tests.support.rawclient import TEXT, RawClient, masked_frame
from tests.support.servers import eventually, serve_here
from wsbroadcast import ConnectionManager, Limits


class Counted:
    """A transport whose stops of reading are counted."""

    def __init__(self, transport: asyncio.Transport, calls: Counter[str]) -> None:
        self._transport = transport
        self._calls = calls

    def pause_reading(self) -> None:
        self._calls["pause"] += 1
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._calls["resume"] += not self._transport.is_reading()
        self._transport.resume_reading()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


@pytest.fixture
async def served(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[int, Counter[str], list[Any], asyncio.Event]]:
    """An app whose endpoint echoes, or waits for an event first."""
    calls: Counter[str] = Counter()
    protocols: list[Any] = []
    goes_on = asyncio.Event()
    made = WebSocketsSansIOProtocol.connection_made

    def connection_made(self: WebSocketsSansIOProtocol, transport: Any) -> None:
        protocols.append(self)
        made(self, Counted(transport, calls))  # type: ignore[arg-type]

    monkeypatch.setattr(WebSocketsSansIOProtocol, "connection_made", connection_made)
    app = FastAPI()
    manager = ConnectionManager()

    @app.websocket("/echo")
    async def echo(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        async for text in websocket.iter_text():
            await manager.broadcast(text)

    @app.websocket("/busy")
    async def busy(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        async for text in websocket.iter_text():
            await goes_on.wait()
            await manager.broadcast(text)

    async with serve_here(app, loop="asyncio", ws="websockets-sansio") as port:
        yield port, calls, protocols, goes_on


async def test_reading_is_not_stopped_for_an_app_that_keeps_up(served: Any) -> None:
    port, calls, _, _ = served
    async with connect(f"ws://127.0.0.1:{port}/echo") as client:
        for number in range(50):
            await client.send(str(number))
            assert await asyncio.wait_for(client.recv(), 5) == str(number)
    assert calls.total() <= 2  # once at most, when the first message comes before the endpoint asks for it


async def test_reading_is_stopped_for_an_app_that_does_not_keep_up_and_goes_on_afterwards(served: Any) -> None:
    port, calls, protocols, goes_on = served
    count, message = 400, "x" * 16_000
    async with connect(f"ws://127.0.0.1:{port}/busy", max_size=None, compression=None) as client:

        async def send() -> None:
            for _ in range(count):
                await client.send(message)

        sending = asyncio.create_task(send())
        protocol = protocols[-1]
        await eventually(lambda: asyncio.sleep(0, calls["pause"] == 1))
        for _ in range(50):
            await asyncio.sleep(0)
        # What one read of the transport brings, 256 KiB, and one more; not the 6 MB that the client has.
        assert protocol.queue.qsize() * len(message) <= 2 * 256 * 1024
        assert not sending.done()
        goes_on.set()
        for _ in range(count):
            assert await asyncio.wait_for(client.recv(), 5) == message
        await sending


async def test_cancelled_read_leaves_nothing_stopped(served: Any) -> None:
    port, _, protocols, _ = served
    async with connect(f"ws://127.0.0.1:{port}/echo") as client:
        await client.send("hello")
        assert await asyncio.wait_for(client.recv(), 5) == "hello"
        protocol = protocols[-1]
        assert protocol.read_paused  # said to be: the endpoint waits for the next message
        manager_task = next(task for task in protocol.tasks if not task.done())
        manager_task.cancel()
        await asyncio.wait({manager_task})
        assert not protocol.read_paused


async def test_client_that_floods_stays_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes past a limit is closed, and nothing more of it is read."""
    app = FastAPI()
    manager = ConnectionManager(limits=Limits(max_inbound_bytes=100))
    transports: list[Any] = []

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.connect(websocket)
        transports.append(connection.sink.transport)
        async for _ in connection:
            pass

    async with serve_here(app, loop="asyncio", ws="websockets-sansio") as port:
        client = await RawClient.connect(port, "/ws")
        client.socket.send(masked_frame(TEXT, b"x" * 1000))
        await eventually(lambda: asyncio.sleep(0, manager.connections == []))
        assert not transports[0].is_reading()
        client.close()
