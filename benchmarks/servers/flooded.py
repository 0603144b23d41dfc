"""The server of `flood.py`: a room that anybody may talk in, with limits, and a page of figures."""

import asyncio
import dataclasses
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from _serve import serve
from fastapi import FastAPI

from wsbroadcast import ConnectionDep, ConnectionManager, LimitExceeded, Limits, create_router

LIMITS = Limits(
    max_connections=1000,
    max_connections_per_address=60,
    max_handshake_rate=10,
    handshake_burst=100,
    max_inbound_rate=20,
    inbound_burst=50,
)

manager = ConnectionManager(limits=LIMITS)
lags: list[float] = []


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Watch how late the event loop is, without any client that could be late itself."""

    async def watch() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            lags.append(loop.time() - due)

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()


app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/room/{channel}"))


@app.websocket("/names")
async def names(connection: ConnectionDep) -> None:
    """A client subscribes to whatever it names."""
    async for name in connection:
        try:
            await connection.subscribe(str(name))
        except LimitExceeded as error:
            await connection.send(str(error))


@app.get("/figures")
async def figures() -> dict[str, Any]:
    """What the node holds, once the garbage is out."""
    gc.collect()
    memory, peak = _memory()
    late = sorted(lags)
    lags.clear()
    return {
        **dataclasses.asdict(manager.stats()),
        "tasks": len(asyncio.all_tasks()),
        "lag_p99_ms": late[len(late) * 99 // 100] * 1000,
        "memory": memory,
        "peak_memory": peak,
    }


def _memory() -> tuple[int, int]:
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return int(status["RssAnon"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    serve(app)
