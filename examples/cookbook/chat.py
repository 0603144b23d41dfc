# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A chat room that keeps its last hundred messages and shows who is there.

Run it with `uvicorn chat:app` in this directory, and open http://localhost:8000/?user=ada and
http://localhost:8000/?user=bob.
"""

import os
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Query
from fastapi.responses import FileResponse
from pydantic import Field

from wsbroadcast import Connection, ConnectionManager, History, Page, PermissionDenied, Presence, create_router

COLOURS = ("#c2255c", "#0b7285", "#e8590c", "#364fc7")

manager = ConnectionManager(
    os.environ.get("BROKER_URL", "memory://"),
    history={"room:*": History(messages=100, seconds=86_400)},
    presence={"room:*": Presence(info=lambda connection: {"colour": colour_of(connection.user)})},
)
app = FastAPI()


def colour_of(user: object) -> str:
    return COLOURS[sum(str(user).encode()) % len(COLOURS)]


async def current_user(user: Annotated[str, Query(min_length=1, max_length=20)]) -> str:
    return user  # stands for your session or token


app.include_router(
    create_router(manager, "/ws/{room}", channel="room:{room}", inbound="ignore", authenticate=current_user)
)


@manager.method("say")
async def say(connection: Connection, room: str, text: Annotated[str, Field(min_length=1, max_length=2000)]) -> None:
    channel = f"room:{room}"
    if channel not in connection.channels:
        raise PermissionDenied("you are not in this room")
    # The name comes from the connection, so nobody can write under another name.
    message = {"user": connection.user, "colour": colour_of(connection.user), "text": text}
    await manager.broadcast(message, channel=channel)


@app.get("/rooms/{room}", dependencies=[Depends(current_user)])
async def kept(room: str) -> Page:
    return await manager.history(f"room:{room}")


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
