"""An app for several workers behind one port, linked by the broker in WSBROADCAST_TEST_ENGINE."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

from fastapi import APIRouter, FastAPI

from wsbroadcast import ConnectionManager, History, ManagerDep, SlowConsumer, create_router

router = APIRouter()


def made(**options: Any) -> FastAPI:
    """Make an app of which every worker has a manager of its own."""
    engine, slow_consumer = os.environ["WSBROADCAST_TEST_ENGINE"], SlowConsumer(max_backlog_messages=10_000)
    app = FastAPI()
    app.include_router(
        create_router(ConnectionManager(engine, slow_consumer=slow_consumer, **options), "/ws/{channel}", http=True)
    )
    app.include_router(router)
    return app


@router.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@router.get("/stats")
async def stats(manager: ManagerDep) -> dict[str, Any]:
    """Those of whichever worker answers."""
    return {"pid": os.getpid(), **dataclasses.asdict(manager.stats())}


@router.post("/publish/{channel}")
async def publish(manager: ManagerDep, channel: str, first: int, count: int, publishers: int = 1) -> dict[str, int]:
    """Publish numbers, each once, from several tasks of whichever worker answers."""

    async def some(start: int) -> None:
        for number in range(start, first + count, publishers):
            await manager.broadcast(f"{number:08}", channel=channel)

    await asyncio.gather(*(some(first + offset) for offset in range(publishers)))
    return {"pid": os.getpid()}


@router.get("/position/{channel}")
async def position(manager: ManagerDep, channel: str) -> dict[str, Any]:
    """Where the history of a channel is."""
    position = await manager.position(channel)
    return {"epoch": position.epoch, "offset": position.offset}


@router.get("/history/{channel}")
async def history(manager: ManagerDep, channel: str) -> list[str]:
    """What is kept of a channel."""
    return [str(each.message.data) for each in (await manager.history(channel)).messages]


app = made()
keeping_app = made(history=History(messages=100))
