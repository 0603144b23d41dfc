"""A connection that has ended is freed at once: nothing of it is left to the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from tests.support.asgi import Peer, eventually, turns
from tests.support.fast import WebSocketsSansIOProtocol
from wsbroadcast import Connection, ConnectionDep, ConnectionManager, create_router


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def tutorial(app: FastAPI, manager: ConnectionManager) -> None:
    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket, user="ann", channels=["room"], expires_at=4e9)
        try:
            while True:
                await manager.broadcast(await websocket.receive_text(), channel="room")
        except WebSocketDisconnect:
            manager.disconnect(websocket)


def forgetful(app: FastAPI, manager: ConnectionManager) -> None:
    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await manager.broadcast(await websocket.receive_text())


def dependency(app: FastAPI, manager: ConnectionManager) -> None:
    manager.bind(app)

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep) -> None:
        async for message in connection:
            await manager.broadcast(message)


def router(app: FastAPI, manager: ConnectionManager) -> None:
    app.include_router(create_router(manager, "/ws"))


def closing(app: FastAPI, manager: ConnectionManager) -> None:
    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.connect(websocket)
        await manager.broadcast(await websocket.receive_text())
        await connection.close(4000)


ENDPOINTS: list[Callable[[FastAPI, ConnectionManager], None]] = [tutorial, forgetful, dependency, router, closing]


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("make", ENDPOINTS, ids=lambda make: make.__name__)
async def test_ended_connection_is_freed_without_the_collector(
    manager: ConnectionManager, make: Callable[[FastAPI, ConnectionManager], None], is_fast: bool
) -> None:
    seen: list[weakref.ref[Any]] = []
    kinds: set[str] = set()

    @manager.on_connect
    def on_connect(connection: Connection) -> None:
        kinds.add(connection._sink.kind)
        seen.extend((weakref.ref(connection), weakref.ref(connection.websocket)))

    manager.on_disconnect(lambda connection: None)
    app = FastAPI()
    make(app, manager)
    for _ in range(3):
        if is_fast:
            await life_of_a_fast_one(app)
        else:
            await life(app)
        await turns()
    await eventually(lambda: manager.stats().disconnects == 3)
    await eventually(lambda: not any("wsbroadcast" in task.get_name() for task in asyncio.all_tasks()))
    await turns()
    assert kinds == {"uvicorn" if is_fast else "asgi"}
    assert [ref() for ref in seen if ref() is not None] == []


async def life(app: FastAPI) -> None:
    peer = Peer()
    call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
    peer.say("hello")
    await peer.next()
    peer.leave()
    await asyncio.wait_for(call, 5)


async def life_of_a_fast_one(app: FastAPI) -> None:
    protocol = WebSocketsSansIOProtocol()
    scope = {**protocol.websocket.scope, "raw_path": b"/ws", "root_path": "", "subprotocols": [], "state": {}}
    call = asyncio.ensure_future(app(scope, protocol.receive, protocol.send))
    protocol.inbox.put_nowait({"type": "websocket.receive", "text": "hello"})
    await eventually(lambda: "hello" in protocol.messages)
    protocol.inbox.put_nowait({"type": "websocket.disconnect", "code": 1001})
    protocol.transport.close()
    await asyncio.wait_for(call, 5)
