# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""The cursors of everybody who looks at the same board, in the colour of each user.

Run it with `uvicorn cursors:app` in this directory, open http://localhost:8000/?user=ada and
http://localhost:8000/?user=bob side by side, and move the mouse.
"""

import os
from pathlib import Path
from typing import Annotated
from zlib import crc32

from fastapi import FastAPI, Query
from fastapi.responses import FileResponse
from pydantic import Field

from wsbroadcast import Connection, ConnectionManager, Presence, SlowConsumer, create_router


def shown(connection: Connection) -> dict[str, object]:
    return {"hue": crc32(str(connection.user).encode()) % 360}


manager = ConnectionManager(
    os.environ.get("BROKER_URL", "memory://"),
    # Each tab has its own cursor, which disappears with the tab.
    presence={"board:*": Presence(by="connection", grace=0, info=shown)},
    slow_consumer=SlowConsumer(policy="conflate"),
)
app = FastAPI()


async def current_user(user: Annotated[str, Query(min_length=1, max_length=20)]) -> str:
    return user  # stands for your session or token


app.include_router(
    create_router(manager, "/ws/{board}", channel="board:{board}", inbound="ignore", authenticate=current_user)
)

Share = Annotated[float, Field(ge=0, le=1)]


@manager.method("move")
async def move(connection: Connection, x: Share, y: Share) -> None:
    # A page that can't keep up gets only the newest place of each cursor: this is what the key is for.
    for board in connection.channels:
        where = {"id": connection.id, "user": connection.user, "x": x, "y": y}
        await manager.broadcast(where, channel=board, exclude=connection, key=connection.id)


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
