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
from wsbroadcast import ConnectionManager, FastPath, Limits


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

    def write(self, data: bytes) -> None:
        self._transport.write(data)

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

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
        transports.append(connection._sink.transport)
        async for _ in connection:
            pass

    async with serve_here(app, loop="asyncio", ws="websockets-sansio") as port:
        client = await RawClient.connect(port, "/ws")
        client.socket.send(masked_frame(TEXT, b"x" * 1000))
        await eventually(lambda: asyncio.sleep(0, manager.connections == []))
        assert not transports[0].is_reading()
        client.close()


class Waits(WebSocket):
    """An app's own class whose `receive` does more."""

    async def receive(self) -> Any:
        event = await super().receive()
        await asyncio.sleep(0.02)
        return event


@pytest.mark.parametrize("who", ["subclass", "middleware"])
async def test_what_stands_between_loses_nothing_and_reading_goes_on(who: str) -> None:
    manager = ConnectionManager()
    got: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        websocket = (Waits if who == "subclass" else WebSocket)(scope, receive, send)
        await manager.connect(websocket)
        async for text in websocket.iter_text():
            got.append(text)  # noqa: PERF401  # looked at meanwhile

    async def limited(scope: Any, receive: Any, send: Any) -> None:
        async def later() -> Any:
            event = await receive()
            await asyncio.sleep(0.02)
            return event

        await app(scope, later if who == "middleware" else receive, send)

    async with serve_here(FastPath(limited), loop="asyncio", ws="websockets-sansio", lifespan="off") as port:
        async with connect(f"ws://127.0.0.1:{port}/") as client:
            for number in range(20):
                await client.send(str(number))
                if number % 5 == 0:
                    await eventually(lambda number=number: asyncio.sleep(0, len(got) > number))  # type: ignore[misc]
            await eventually(lambda: asyncio.sleep(0, len(got) == 20))
            assert manager.stats().sinks == {"uvicorn": 1}
        await eventually(lambda: asyncio.sleep(0, manager.connections == []))
    assert got == [str(number) for number in range(20)]


async def test_stop_in_earnest_is_not_forgotten(served: Any) -> None:
    """Another reader may take a message and let uvicorn go on reading; what comes next stops it."""
    port, _, protocols, _ = served
    async with connect(f"ws://127.0.0.1:{port}/echo") as client:
        await client.send("a")
        assert await asyncio.wait_for(client.recv(), 5) == "a"
        protocol = protocols[-1]
        await eventually(lambda: asyncio.sleep(0, protocol.read_paused))
        protocol.transport.pause_reading()
        protocol.queue.put_nowait({"type": "websocket.receive", "text": "b"})
        protocol.queue.put_nowait({"type": "websocket.receive", "text": "c"})
        for text in ("b", "c"):
            assert await asyncio.wait_for(client.recv(), 5) == text
        await client.send("d")
        assert await asyncio.wait_for(client.recv(), 5) == "d"
