"""An app with presence on several nodes, linked by the broker in WSBROADCAST_TEST_ENGINE.

What its hooks are told goes to the file WSBROADCAST_TEST_TOLD, one line of JSON each. WSBROADCAST_TEST_PRESENCE has the
options of `Presence`, WSBROADCAST_TEST_PACE what all times of leases are multiplied by.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, WebSocket

from wsbroadcast import Connection, ConnectionManager, EngineUnavailable, Presence
from wsbroadcast.engines import lease
from wsbroadcast.manager import core_of
from wsbroadcast.node import presence as node_presence
from wsbroadcast.node import watching

PACE = float(os.environ.get("WSBROADCAST_TEST_PACE", "1"))
TOLD = os.environ.get("WSBROADCAST_TEST_TOLD", os.devnull)

for module, name in (
    (lease, "LEASE_SECONDS"),
    (lease, "RENEW_SECONDS"),
    (lease, "MARGIN_SECONDS"),
    (node_presence, "_SWEEP_SECONDS"),
    (watching, "_TELL_SECONDS"),
):
    setattr(module, name, getattr(module, name) * PACE)


def info_of(connection: Connection) -> Any:
    """What others see of a member; of some it is more than is allowed."""
    return "x" * 1_000_000 if connection.info == "huge" else connection.info


options = json.loads(os.environ.get("WSBROADCAST_TEST_PRESENCE", "{}"))
manager = ConnectionManager(
    os.environ.get("WSBROADCAST_TEST_ENGINE", "memory://"),
    presence=Presence(info=info_of, **options) if os.environ.get("WSBROADCAST_TEST_IS_PRESENT", "1") == "1" else None,
    drain=json.loads(os.environ.get("WSBROADCAST_TEST_DRAIN", "5.0")),
)


def note(what: str, channel: str, user: str) -> None:
    """Write a line at once, whoever else writes one."""
    with open(TOLD, "ab", buffering=0) as file:
        file.write(json.dumps({"pid": os.getpid(), "what": what, "channel": channel, "user": user}).encode() + b"\n")


@manager.on_joined
async def joined(channel: str, user: str) -> None:
    note("joined", channel, user)


@manager.on_left
async def left(channel: str, user: str) -> None:
    note("left", channel, user)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with manager:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.websocket("/ws")
async def endpoint(
    websocket: WebSocket,
    channel: Annotated[list[str] | None, Query()] = None,
    user: str | None = None,
    info: str | None = None,
    watches: bool = False,
) -> None:
    async with manager.connect(websocket, user=user, channels=channel or (), info=info) as connection:
        if watches and channel:
            await core_of(manager).watch(connection, channel[0])
        await connection.wait_closed()


@app.get("/presence")
async def presence(channel: str) -> dict[str, Any]:
    """What whichever worker answers says of a channel; nothing while the broker is away."""
    try:
        members = await manager.presence(channel)
        count = await manager.presence_count(channel)
    except EngineUnavailable:
        return {"pid": os.getpid(), "members": None, "count": None}
    return {"pid": os.getpid(), "members": {member.id: member.info for member in members}, "count": count}


@app.get("/user")
async def user_(user: str) -> dict[str, Any]:
    return {"channels": sorted(await manager.user_channels(user)), "is_online": await manager.is_online(user)}


@app.post("/close_user")
async def close_user(user: str) -> bool:
    try:
        await manager.close_user(user)
    except EngineUnavailable:
        return False
    return True


@app.post("/subscribe")
async def subscribe(user: str, channel: str) -> None:
    for connection in list(manager.connections):
        if connection.user == user:
            await connection.subscribe(channel)


@app.post("/broadcast")
async def broadcast(channel: str) -> int | None:
    return (await manager.broadcast("hi", channel=channel)).members


@app.post("/flap")
async def flap(first: int, count: int) -> None:
    """Let the first connection come to channels, and leave each at once."""
    connection = next(iter(manager.connections))
    for number in range(first, first + count):
        await connection.subscribe(f"flap:{number}")
        await connection.unsubscribe(f"flap:{number}")


@app.get("/left_over")
async def left_over() -> dict[str, int]:
    """How much this process holds of channels and members, and whether it is just telling the broker of some."""
    known = core_of(manager).life.node.presence
    assert known is not None
    kinds = "_here", "_seated", "_dirty", "_graces", "_unknown", "_untold"
    return {kind: len(getattr(known, kind)) for kind in kinds} | {"_agreeing": int(known._agreeing.locked())}
