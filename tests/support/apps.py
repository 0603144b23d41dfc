"""The apps under test. `app` holds them all; each server runs it as `tests.support.apps:app`.

* `/tutorial`: the example of FastAPI's own documentation, unchanged but for the import.
* `/seed`: the other endpoint that many people write.
* `/m/<name>/…`: endpoints around a manager of that name, made at the first request, so that every test has its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections import Counter
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.responses import HTMLResponse

from wsbroadcast import Connection, ConnectionManager, SlowConsumer

# --- FastAPI's tutorial, "Handling disconnections and multiple clients" -----------------------------------------------
# https://fastapi.tiangolo.com/advanced/websockets/

tutorial = FastAPI()

manager = ConnectionManager()


@tutorial.get("/")
async def get() -> HTMLResponse:
    return HTMLResponse("the page of the tutorial")


@tutorial.websocket("/ws/{client_id}")
async def websocket_endpoint(websocket: WebSocket, client_id: int) -> None:
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.send_personal_message(f"You wrote: {data}", websocket)
            await manager.broadcast(f"Client #{client_id} says: {data}")
    except WebSocketDisconnect:
        manager.disconnect(websocket)
        await manager.broadcast(f"Client #{client_id} left the chat")


# --- The seed -------------------------------------------------------------------------------------------------------

seed = FastAPI()

seed_manager = ConnectionManager()


@seed.websocket("/ws")
async def seed_endpoint(websocket: WebSocket) -> None:
    await seed_manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await seed_manager.broadcast(f"Broadcast: {data}")
    except WebSocketDisconnect:
        seed_manager.disconnect(websocket)


# --- Managers by name -----------------------------------------------------------------------------------------------


class Room:
    """A manager, and what its hooks and endpoints have seen."""

    def __init__(self, name: str, send_timeout: float) -> None:
        self.manager = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=send_timeout))
        self.connected: Counter[str] = Counter()
        self.disconnected: Counter[str] = Counter()
        self.ends: list[str] = []
        self.manager.on_connect(self._count_connect)
        self.manager.on_disconnect(self._count_disconnect)

    def _count_connect(self, connection: Connection) -> None:
        self.connected[connection.id] += 1

    def _count_disconnect(self, connection: Connection) -> None:
        self.disconnected[connection.id] += 1

    def stats(self) -> dict[str, Any]:
        tasks = [task.get_name() for task in asyncio.all_tasks()]
        return {
            **dataclasses.asdict(self.manager.stats()),
            "on_connect": self.connected.total(),
            "on_disconnect": self.disconnected.total(),
            "on_disconnect_twice": sum(count > 1 for count in self.disconnected.values()),
            "ends": self.ends,
            "tasks": sum(name.startswith("wsbroadcast") for name in tasks),
        }


rooms: dict[str, Room] = {}


def room_of(name: str) -> Room:
    """Return the room of a name; `slow-…` has a `send_timeout` of 1 s instead of 10."""
    if name not in rooms:
        rooms[name] = Room(name, 1.0 if name.startswith("slow-") else 10.0)
    return rooms[name]


app = FastAPI()
app.mount("/tutorial", tutorial)
app.mount("/seed", seed)


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.get("/examples")
async def examples() -> dict[str, Any]:
    return {"tutorial": dataclasses.asdict(manager.stats()), "seed": dataclasses.asdict(seed_manager.stats())}


@app.get("/m/{name}/stats")
async def stats(name: str) -> dict[str, Any]:
    return room_of(name).stats()


@app.post("/m/{name}/broadcast")
async def broadcast(name: str, text: str, times: int = 1) -> None:
    for _ in range(times):
        await room_of(name).manager.broadcast(text)


@app.post("/m/{name}/flood")
async def flood(name: str, messages: int, size: int) -> dict[str, float]:
    """Broadcast numbered messages in a tight loop."""
    manager, filling = room_of(name).manager, "x" * (size - 8)
    started = time.monotonic()
    for number in range(messages):
        await manager.broadcast(f"{number:08}{filling}")
    return {"seconds": time.monotonic() - started}


@app.post("/m/{name}/close")
async def close_all(name: str, code: int, reason: str = "", last_words: int = 0, size: int = 8) -> None:
    """Close every connection right after some broadcasts, from a task that is not of its endpoint."""
    manager, filling = room_of(name).manager, "x" * (size - 8)
    for number in range(last_words):
        await manager.broadcast(f"{number:08}{filling}")
    await asyncio.gather(*(manager.close(connection, code, reason) for connection in manager.connections))


@app.websocket("/m/{name}/chat")
async def chat(websocket: WebSocket, name: str) -> None:
    """The endpoint of `/seed`; it notes how it ended."""
    room = room_of(name)
    await room.manager.connect(websocket)
    try:
        while True:
            await room.manager.broadcast(await websocket.receive_text())
    except WebSocketDisconnect as end:
        room.ends.append(f"disconnect {end.code}")
        room.manager.disconnect(websocket)
    except BaseException as error:
        room.ends.append(repr(error))
        raise


@app.websocket("/m/{name}/listen")
async def listen(websocket: WebSocket, name: str) -> None:
    """Only listens."""
    connection = await room_of(name).manager.connect(websocket)
    await connection.wait_closed()


@app.websocket("/m/{name}/forgetful")
async def forgetful(websocket: WebSocket, name: str) -> None:
    """Never calls `disconnect`."""
    await room_of(name).manager.connect(websocket)
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        pass


@app.websocket("/m/{name}/deaf")
async def deaf(websocket: WebSocket, name: str) -> None:
    """Never calls `disconnect` and never receives: a ticker that only sends."""
    connection = await room_of(name).manager.connect(websocket)
    while connection.is_open:  # noqa: ASYNC110  # a ticker knows nothing better
        await asyncio.sleep(0.05)


@app.websocket("/m/{name}/mixed")
async def mixed(websocket: WebSocket, name: str) -> None:
    """Mixes broadcasts with its own sends, and closes, without waiting in between."""
    manager = room_of(name).manager
    await manager.connect(websocket)
    await websocket.receive_text()
    for number in range(20):
        await manager.broadcast(f"broadcast {number}")
        await websocket.send_text(f"own text {number}")
        await manager.broadcast({"json": number})
        await websocket.send_json({"own json": number})
        await manager.send_personal_message(f"personal {number}", websocket)
        await websocket.send_bytes(b"own bytes %d" % number)
    await manager.broadcast("last")
    await websocket.close(4001, "mixed")


MIXED_OWN = [
    message
    for number in range(20)
    for message in (
        f"broadcast {number}",
        f"own text {number}",
        f'{{"json":{number}}}',
        f'{{"own json":{number}}}',
        f"personal {number}",
        b"own bytes %d" % number,
    )
] + ["last"]
"""What the client of `mixed` gets, in this order, before it is closed with 4001."""

MIXED_OTHERS = [message for number in range(20) for message in (f"broadcast {number}", f'{{"json":{number}}}')] + [
    "last"
]
"""What the others get."""


# --- One manager with a lifespan -------------------------------------------------------------------------------------

lived_manager = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=1.0))

lived = FastAPI(lifespan=lived_manager.lifespan)


@lived.get("/health")
async def lived_health() -> dict[str, str]:
    return await health()


@lived.websocket("/ws")
async def lived_endpoint(websocket: WebSocket) -> None:
    connection = await lived_manager.connect(websocket)
    async for message in connection:
        await lived_manager.broadcast(message)


# --- What an endpoint says last --------------------------------------------------------------------------------------


class EndpointFailed(Exception):
    """The error with which an endpoint of these tests fails."""


async def say(manager: ConnectionManager, websocket: WebSocket, how: str, text: str) -> None:
    """Hand over a message for the endpoint's own connection, without a chance for other tasks to run."""
    match how:
        case "send":
            await manager.send(websocket, text)
        case "personal":
            await manager.send_personal_message(text, websocket)
        case "broadcast":
            await manager.broadcast(text)
        case "channel":
            await manager.broadcast(text, channel="room")
        case "user":
            await manager.broadcast(text, user="ann")
        case "nowait":
            manager.broadcast_nowait(text)
        case "own":
            await websocket.send_text(text)


async def connect_by(manager: ConnectionManager, websocket: WebSocket, way: str) -> None:
    """Connect in the endpoint's own task, or in one that ends at once."""
    connecting = manager.connect(websocket, user="ann", channels=["room"])
    match way:
        case "wait_for":
            await asyncio.wait_for(connecting, 5)
        case "gather":
            await asyncio.gather(connecting)
        case "group":
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(connecting)
        case _:
            await connecting


@app.websocket("/m/{name}/last/{end}/{way}/{how}")
async def last_word(websocket: WebSocket, name: str, end: str, way: str, how: str, size: int = 0) -> None:
    """Send three messages and end in one of several ways. `disconnect` is never called, except where `end` says so."""
    manager = room_of(name).manager
    if end == "with":
        async with manager.connect(websocket, user="ann", channels=["room"]):
            await say(manager, websocket, how, "last")
        return
    await connect_by(manager, websocket, way)
    if size:
        await manager.send(websocket, "x" * size)
    try:
        for text in ("first", "second", "last"):
            await say(manager, websocket, how, text)
        if end == "raise":
            raise EndpointFailed
        if end == "code":
            raise WebSocketException(4008, "says the endpoint")
        if end == "cancelled":
            raise asyncio.CancelledError
    finally:
        if end == "finally":
            manager.disconnect(websocket)
