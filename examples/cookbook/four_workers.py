# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Four workers on one machine, linked by a file. There is no broker, and nothing to install.

Run it with `uvicorn four_workers:app --workers 4` in this directory, and open http://localhost:8000 in several tabs.
Each tab says which worker it is on. Kill a worker with `kill -9`, and look at its tabs.
"""

import os
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from wsbroadcast import Connection, ConnectionManager, Health, History, Page, Presence, create_router


def shown(connection: Connection) -> dict[str, int]:
    return {"worker": os.getpid()}


manager = ConnectionManager(
    os.environ.get("BROKER_URL", "sqlite:///workers.db"),
    history={"hall": History(messages=50)},
    presence={"hall": Presence(by="connection", grace=0, info=shown)},
)
app = FastAPI()
app.include_router(create_router(manager, "/ws", channel="hall", inbound="ignore"))


@app.get("/kept")
async def kept() -> Page:
    return await manager.history("hall")


@app.post("/say", status_code=204)
async def say(text: str) -> None:
    # Any worker may get this request. The message reaches the pages of all of them.
    await manager.broadcast({"text": text, "worker": os.getpid()}, channel="hall")


@app.get("/health")
async def health() -> Health:
    return await manager.health()


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run("four_workers:app", workers=4)
