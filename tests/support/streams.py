"""An app with streams of events and long poll. Each server runs it as `tests.support.streams:app`.

* `/sse/{channel}`: a router with histories for `kept-…`.
* `/both/{channel}`: a WebSocket and HTTP on one path.
* `/member/{channel}`: the token in the query is the user; `short` expires after a second.
* `/hook/{channel}`: a hook refuses.
* `/slow/{channel}`: its manager gives a slow consumer one second.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import Counter
from typing import Any

from fastapi import FastAPI
from starlette.requests import HTTPConnection

from wsbroadcast import (
    Connection,
    ConnectionManager,
    History,
    Identity,
    PermissionDenied,
    SlowConsumer,
    create_router,
    create_sse_router,
)

KEPT = History(messages=20)

manager = ConnectionManager(history={"kept-*": KEPT})
members = ConnectionManager()
refusing = ConnectionManager()
slow = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=1.0, close_timeout=0.3))
MANAGERS = {"main": manager, "members": members, "refusing": refusing, "slow": slow}
hooked: Counter[str] = Counter()


@manager.on_connect
def _came(connection: Connection) -> None:
    hooked["connect"] += 1


@manager.on_disconnect
def _went(connection: Connection) -> None:
    hooked["disconnect"] += 1
    hooked[f"code {connection.close_code}"] += 1


@refusing.on_connect
def _refuse(connection: Connection) -> None:
    raise PermissionDenied("the hook says no")


async def user(request: HTTPConnection) -> Identity | None:
    token = request.query_params.get("token")
    if token == "broken":
        raise RuntimeError("the password is hunter2")
    return None if token is None else Identity(token, expires_at=time.time() + 1 if token == "short" else None)


app = FastAPI()


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.get("/state")
async def state(name: str = "main") -> dict[str, Any]:
    gc.collect()
    stats = MANAGERS[name].stats()
    tasks = [task.get_name() for task in asyncio.all_tasks()]
    return {
        "connections": stats.connections,
        "channels": stats.channels,
        "sinks": dict(stats.sinks),
        "refused": dict(stats.fast_path_refused),
        "evicted": dict(stats.evicted),
        "dropped": dict(stats.dropped),
        "hooked": dict(hooked),
        "tasks": sum(name.startswith("wsbroadcast") for name in tasks),
        "all_tasks": len(tasks),
        "living": sum(isinstance(each, Connection) for each in gc.get_objects()),
        "position": await manager.position("kept-1"),
    }


@app.post("/broadcast")
async def broadcast(channel: str, text: str, name: str = "main", times: int = 1) -> dict[str, Any]:
    receipt = None
    for number in range(times):
        receipt = await MANAGERS[name].broadcast(text.replace("N", str(number)), channel=channel)
    return {"position": getattr(receipt, "position", None)}


@app.post("/flood")
async def flood(name: str, size: int, times: int, channel: str) -> dict[str, float]:
    filling = "x" * size
    started = time.monotonic()
    for number in range(times):
        await MANAGERS[name].broadcast(f"{number:08}{filling}", channel=channel)
        await asyncio.sleep(0.002)  # else a client in Python is a slow one too
    return {"seconds": time.monotonic() - started}


@app.post("/close_user")
async def close_user(user: str) -> None:
    await members.close_user(user)


@app.post("/close")
async def close(code: int, reason: str = "", name: str = "main") -> None:
    for connection in MANAGERS[name].connections:
        await connection.close(code, reason)


@app.post("/send")
async def send() -> None:
    for connection in manager.connections:
        await connection.send("own text")
        await connection.send({"own": "json"})
        await connection.send(b"\xff")


@app.post("/aclose")
async def aclose() -> None:
    await slow.aclose()
    await slow.start()


app.include_router(create_sse_router(manager, "/sse/{channel}"))
app.include_router(create_router(manager, "/both/{channel}", channel="{channel}", http=True))
app.include_router(create_sse_router(members, "/member/{channel}", authenticate=user))
app.include_router(create_sse_router(refusing, "/hook/{channel}"))
app.include_router(create_sse_router(slow, "/slow/{channel}"))
for each in MANAGERS.values():
    each.bind(app)  # daphne runs no lifespan
