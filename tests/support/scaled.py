"""An app for several workers behind one port, linked by the broker in WSBROADCAST_TEST_ENGINE."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, ManagerDep, SlowConsumer, create_router

manager = ConnectionManager(
    os.environ["WSBROADCAST_TEST_ENGINE"], slow_consumer=SlowConsumer(max_backlog_messages=10_000)
)
app = FastAPI()
app.include_router(create_router(manager, "/ws/{channel}"))


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.get("/stats")
async def stats(manager: ManagerDep) -> dict[str, Any]:
    """Those of whichever worker answers."""
    return {"pid": os.getpid(), **dataclasses.asdict(manager.stats())}


@app.post("/publish/{channel}")
async def publish(manager: ManagerDep, channel: str, first: int, count: int, publishers: int = 1) -> dict[str, int]:
    """Publish numbers, each once, from several tasks of whichever worker answers."""

    async def some(start: int) -> None:
        for number in range(start, first + count, publishers):
            await manager.broadcast(f"{number:08}", channel=channel)

    await asyncio.gather(*(some(first + offset) for offset in range(publishers)))
    return {"pid": os.getpid()}
