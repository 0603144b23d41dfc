"""An app with limits. Each server runs it as `tests.support.limited:app`.

`/{kind}/{room}/…` is a manager with the limits of its kind, made when it is asked for. The endpoints catch little
more than FastAPI's tutorial.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from wsbroadcast import (
    Connection,
    ConnectionManager,
    InvalidChannel,
    LimitExceeded,
    Limits,
    PermissionDenied,
    SlowConsumer,
    create_router,
)

LIMITS = {
    "in_all": Limits(max_connections=2),
    "per_user": Limits(max_connections_per_user=2),
    "per_address": Limits(max_connections_per_address=2),
    "pace": Limits(max_handshake_rate=0.001, handshake_burst=2),
    "inbound": Limits(max_inbound_bytes=1000, max_inbound_rate=0.001, inbound_burst=10),
    "channels": Limits(max_channels_per_connection=2),
    "flood": Limits(
        max_connections=250,
        max_connections_per_address=60,
        max_handshake_rate=0.001,
        handshake_burst=100,
        max_inbound_rate=0.001,
        inbound_burst=60,
        max_channels_per_connection=50,
    ),
    "default": Limits(),
}

managers: dict[str, ConnectionManager] = {}

app = FastAPI()

open_manager = ConnectionManager(limits=Limits(max_inbound_bytes=1000))
app.include_router(create_router(open_manager, "/router/{channel}", accepts="json"))


def manager_of(kind: str, room: str) -> ConnectionManager:
    if f"{kind} {room}" not in managers:
        manager = ConnectionManager(limits=LIMITS[kind], slow_consumer=SlowConsumer(send_timeout=1.0))
        manager.on_message(refuse_the_word)
        managers[f"{kind} {room}"] = manager
    return managers[f"{kind} {room}"]


def refuse_the_word(connection: Connection, message: str | bytes) -> None:
    if "forbidden" in str(message):
        raise PermissionDenied("that word is forbidden")
    if "broken" in str(message):
        raise ZeroDivisionError("the hook is broken")


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.get("/{kind}/{room}/stats")
async def stats(kind: str, room: str) -> dict[str, Any]:
    manager = manager_of(kind, room)
    counted = manager._core.life.node.membership.admission.quotas.counted
    return {
        **dataclasses.asdict(manager.stats()),
        "places": {name: each.taken for name, each in counted.items() if each.taken},
        "tasks": sum(task.get_name().startswith("wsbroadcast") for task in asyncio.all_tasks()),
    }


@app.post("/{kind}/{room}/broadcast")
async def broadcast(kind: str, room: str, times: int, size: int) -> None:
    for number in range(times):
        manager_of(kind, room).broadcast_nowait(f"{number:08}" + "x" * (size - 8))
        if number % 20 == 0:
            await asyncio.sleep(0)


@app.post("/{kind}/{room}/disconnect/{user}")
async def disconnect(kind: str, room: str, user: str) -> None:
    await manager_of(kind, room).close_user(user, reason="signed out")


@app.websocket("/{kind}/{room}/ws")
async def endpoint(websocket: WebSocket, kind: str, room: str, user: str | None = None, expires_in: float = 0) -> None:
    """FastAPI's tutorial."""
    manager = manager_of(kind, room)
    expires_at = time.time() + expires_in if expires_in else None
    await manager.connect(websocket, user=user, expires_at=expires_at)
    try:
        while True:
            await manager.broadcast(await websocket.receive_text())
    except WebSocketDisconnect:
        manager.disconnect(websocket)


@app.websocket("/{kind}/{room}/accepted")
async def accepted(websocket: WebSocket, kind: str, room: str) -> None:
    """Accepts by itself."""
    await websocket.accept()
    connection = await manager_of(kind, room).connect(websocket)
    await connection.wait_closed()


@app.websocket("/{kind}/{room}/json")
async def json(websocket: WebSocket, kind: str, room: str) -> None:
    """Reads JSON; a message is a list of channels to be in."""
    manager = manager_of(kind, room)
    async with manager.connect(websocket) as connection:
        try:
            while True:
                await connection.subscribe(*await connection.receive_json())
                await connection.send(sorted(connection.channels))
        except InvalidChannel:
            await connection.close(1007, "no channel")
        except WebSocketDisconnect:
            pass


@app.websocket("/{kind}/{room}/names")
async def names(websocket: WebSocket, kind: str, room: str) -> None:
    """Subscribes to whatever a client names."""
    async with manager_of(kind, room).connect(websocket) as connection:
        async for name in connection:
            try:
                await connection.subscribe(str(name))
            except LimitExceeded as error:
                await connection.send(error.limit)
