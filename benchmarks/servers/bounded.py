"""The server of `slow_consumers.py`: clients that read badly, and HTTP routes that make it send to them."""

import asyncio
import dataclasses
import gc
import time
from typing import Any

from _serve import serve
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from wsbroadcast import ConnectionManager, SlowConsumer

app = FastAPI()
room = ConnectionManager()
# Whoever reads nothing stays, so that what it holds can be measured.
stalled = ConnectionManager(slow_consumer=SlowConsumer(policy="drop_newest", send_timeout=600))


@app.websocket("/room")
async def in_the_room(websocket: WebSocket) -> None:
    """As in the tutorial: one sender waits in `broadcast`, and its endpoint reads nothing meanwhile."""
    await room.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await room.broadcast(data)
    except WebSocketDisconnect:
        room.disconnect(websocket)


@app.websocket("/stalled/{channel}")
async def by_itself(websocket: WebSocket, channel: str) -> None:
    await stalled.connect(websocket, channels=[channel])
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        stalled.disconnect(websocket)


@app.get("/loop")
async def loop(size: int, seconds: float) -> dict[str, Any]:
    """Broadcast to the room in a tight loop."""
    text = "x" * size
    begun, broadcasts = time.perf_counter(), 0
    while time.perf_counter() < begun + seconds:
        await room.broadcast(text)
        broadcasts += 1
    return {"broadcasts": broadcasts, "seconds": time.perf_counter() - begun}


@app.get("/fall-behind")
async def fall_behind(connections: int) -> dict[str, Any]:
    """Broadcast to the room until so many of it are behind; those who read have the time to."""
    text, sent = "x" * 32 * 1024, 0
    while room.stats().behind < connections:
        if sent == 1000:
            return {"error": f"{room.stats().behind} are behind after {sent} messages"}
        room.broadcast_nowait(text)
        sent += 1
        await asyncio.sleep(0.01)
    return {"sent": sent}


@app.get("/fill")
async def fill(texts: str, size: int) -> dict[str, Any]:
    """Send to those who read nothing until nobody of them takes any more."""
    if texts == "shared":
        stalled.broadcast_nowait("x" * size)
        await asyncio.sleep(0.1)
    else:
        await _fill_each(_ENDINGS[texts], size)
    gc.collect()
    return dataclasses.asdict(stalled.stats())


async def _fill_each(ending: str, size: int) -> None:
    connections = stalled.stats().connections
    for i in range(connections):
        # The kernel's part, which is megabytes, in large pieces.
        waiting = stalled.stats().backlog_messages
        while stalled.stats().backlog_messages == waiting:
            stalled.broadcast_nowait("x" * 32 * 1024, channel=f"{i}")
            await asyncio.sleep(0)
    number, taken = 0, connections
    while taken:
        before = _dropped()
        for i in range(connections):
            # Each text is another one: nothing is shared that isn't shared in an app.
            text = f"{number} {i} "
            stalled.broadcast_nowait(text + "x" * (size - len(text) - len(ending.encode())) + ending, channel=f"{i}")
            number += 1
        await asyncio.sleep(0)
        taken = connections - _dropped() + before


def _dropped() -> int:
    return sum(stalled.stats().dropped.values())


@app.get("/stats")
async def stats() -> dict[str, Any]:
    return dataclasses.asdict(room.stats())


_ENDINGS: dict[str, str] = {"ascii": "", "emoji": "\N{GRINNING FACE}"}

if __name__ == "__main__":
    serve(app)
