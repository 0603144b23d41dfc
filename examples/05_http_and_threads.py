# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Broadcasts from outside a WebSocket endpoint: from a route, a `def` route and a thread, with your own lifespan.

Run it with `uvicorn 05_http_and_threads:app` in this directory, and connect with
`python -m websockets ws://127.0.0.1:8000/ws`. The thread sends the time each second. The route sends
`{"announcement":"hello"}` when you call `curl -X POST "http://127.0.0.1:8000/announce?text=hello"`.
"""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from fastapi import FastAPI

from wsbroadcast import ConnectionDep, ConnectionManager, ManagerDep

manager = ConnectionManager()


def tick(stopped: threading.Event) -> None:
    """A thread that knows nothing of asyncio."""
    while not stopped.wait(timeout=1.0):
        manager.broadcast_threadsafe({"time": datetime.now(UTC)})


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    manager.bind(app)  # so that ManagerDep and ConnectionDep find it
    stopped = threading.Event()
    async with manager:
        clock = threading.Thread(target=tick, args=[stopped])
        clock.start()
        yield
        stopped.set()
        await asyncio.to_thread(clock.join)  # not clock.join(): the thread may be waiting for this event loop


app = FastAPI(lifespan=lifespan)


@app.websocket("/ws")
async def feed(connection: ConnectionDep) -> None:
    await connection.wait_closed()  # this endpoint only sends


@app.post("/announce", status_code=204)
async def announce(text: str, manager: ManagerDep) -> None:
    await manager.broadcast({"announcement": text})


@app.post("/report", status_code=204)
def report(text: str, manager: ManagerDep) -> None:
    # FastAPI runs a `def` route in a thread.
    manager.broadcast_threadsafe({"report": text})


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
