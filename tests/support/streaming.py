"""An app with streams, for tests on real servers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, Run, create_stream_router

manager = ConnectionManager()
app = FastAPI()


@app.post("/begin/{id_}")
async def begin(id_: str, count: int) -> dict[str, Any]:
    """Begin a stream of so many numbers, 10 ms from one to the next."""

    async def produce(run: Run) -> None:
        for number in range(count):
            run.append(f"{number} ")
            await asyncio.sleep(0.01)

    return {"run": (await manager.start_stream(id_, produce)).run_id}


@app.get("/health")
async def health() -> dict[str, str]:
    """Which server it is."""
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.get("/state")
async def state() -> dict[str, Any]:
    """How many viewers there are."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return {"viewers": names.count("wsbroadcast stream viewer")}


app.include_router(create_stream_router(manager, "/runs/{id}", public=True))
