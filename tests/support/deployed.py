"""The app of a deploy, of which nodes end and others take over. WSBROADCAST_TEST_ENGINE links them.

It has two managers: that of the router `/ws/<channel>`, and that of `/own`, an endpoint as people write it, which
begins with its first connection. WSBROADCAST_TEST_DRAIN is the time of the drain at a signal.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from importlib import import_module
from itertools import count
from typing import Any

from fastapi import WebSocket
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect

from tests.support.scaled import made
from wsbroadcast import Connection, ConnectionManager, History, Hook, ManagerDep

DRAIN: float | None = json.loads(os.environ.get("WSBROADCAST_TEST_DRAIN", "5.0"))


class Closes(Hook):
    """Says when connections end, in the log; the clock is the same in all processes of a machine."""

    def on_disconnect(self, connection: Connection) -> None:
        print(f"closed {time.monotonic():.4f}", flush=True)


app = made(history=History(messages=10_000, seconds=300), drain=DRAIN, hooks=[Closes()])
own = ConnectionManager(drain=DRAIN)


@app.websocket("/own")
async def endpoint(websocket: WebSocket) -> None:
    await own.connect(websocket)
    try:
        while True:
            await own.broadcast(await websocket.receive_text())
    except WebSocketDisconnect:
        own.disconnect(websocket)


@app.get("/pid")
async def pid() -> int:
    return os.getpid()


@app.post("/drain")
async def drain(manager: ManagerDep, over: float) -> dict[str, Any]:
    await manager.drain(over)
    await own.drain(over)
    health = await manager.health()
    return {"connections": manager.stats().connections + own.stats().connections, "is_ready": health.is_ready}


@app.post("/flood")
async def flood(manager: ManagerDep, messages: int, size: int) -> None:
    for _ in range(messages):
        await manager.broadcast("x" * size, channel="news")


async def _ticks() -> AsyncIterator[dict[str, str]]:
    for number in count():
        yield {"data": str(number)}
        await asyncio.sleep(0.1)


async def stream() -> Response:
    """Somebody else's stream of server-sent events, which never ends by itself."""
    sse_starlette = import_module("sse_starlette")  # which changes uvicorn's Server, and may not be there
    response: Response = sse_starlette.EventSourceResponse(_ticks())
    return response


app.add_api_route("/sse", stream, response_model=None)
