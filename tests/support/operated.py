"""An app with an operations router, for several workers behind one port; the engine is in WSBROADCAST_TEST_ENGINE."""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Query, WebSocket
from starlette.requests import HTTPConnection

from wsbroadcast import ConnectionManager, SlowConsumer, create_operations_router

manager = ConnectionManager(
    os.environ.get("WSBROADCAST_TEST_ENGINE", "memory://"), slow_consumer=SlowConsumer(send_timeout=60.0)
)


async def only_operators(connection: HTTPConnection) -> None:
    """Let in clients with the cookie of an operator."""
    if connection.cookies.get("session") != "operator":
        raise HTTPException(401, "sign in")


app = FastAPI(lifespan=manager.lifespan)
app.include_router(create_operations_router(manager, dependencies=[Depends(only_operators)]))


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.websocket("/ws")
async def endpoint(
    websocket: WebSocket,
    channel: Annotated[list[str] | None, Query()] = None,
    user: str | None = None,
) -> None:
    async with manager.connect(websocket, user=user, channels=channel or ()) as connection:
        await connection.wait_closed()


@app.post("/publish/{channel}")
async def publish(channel: str, size: int = 10, count: int = 1) -> None:
    for _ in range(count):
        manager.broadcast_nowait("x" * size, channel=channel)
