"""An app with a door. Each server runs it as `tests.support.guarded:app`.

* `/ws`: a router with the defaults, `/listed` with a list of origins, `/dependency` with `ConnectionDep`.
* `/member`: a token from everywhere; the token is the user, and some tokens are trouble.
* `/client`: tells what the server says of the handshake.
"""

import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, WebSocket

from wsbroadcast import ConnectionDep, ConnectionManager, TokenFrom, create_router

LISTED = "https://app.example"
"""The only origin that `/listed` allows."""

SILENCE = 0.5
"""Seconds until somebody who says nothing is closed."""

manager = ConnectionManager()
app = FastAPI()
sessions = {"open": 0, "opened": 0}
endpoints = {"dependency": 0}


async def session() -> AsyncIterator[None]:
    """Stands for a database session."""
    sessions["open"] += 1
    sessions["opened"] += 1
    try:
        yield
    finally:
        sessions["open"] -= 1


token_from = TokenFrom(header=True, subprotocol="bearer", cookie="session", query="token", first_message=SILENCE)


async def current_user(
    token: Annotated[str, Depends(token_from)], session: Annotated[None, Depends(session)]
) -> str | None:
    if token == "broken":
        raise ValueError("the password is hunter2")
    if token == "expired":
        raise HTTPException(401, "that token has expired", {"WWW-Authenticate": 'Bearer error="invalid_token"'})
    if token == "banned":
        raise HTTPException(403, "not you")
    return None if token == "nobody" else token


@app.get("/health")
async def health() -> dict[str, str]:
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}


@app.get("/state")
async def state() -> dict[str, Any]:
    return {
        "users": sorted(str(connection.user) for connection in manager.connections),
        "connects": manager.stats().connects,
        "sinks": manager.stats().sinks,
        "sessions": sessions,
        "endpoints": endpoints,
    }


def _authorize(connection: Any, action: str, channel: str | None) -> bool:
    return channel != "private"


app.include_router(create_router(manager, "/ws"))
app.include_router(create_router(manager, "/listed", allowed_origins=[LISTED]))
app.include_router(create_router(manager, "/member", authenticate=current_user))
app.include_router(
    create_router(manager, "/channel/{channel}", authenticate=current_user, authorize=_authorize, inbound="commands")
)
manager.bind(app)  # daphne runs no lifespan


@app.websocket("/dependency")
async def dependency(connection: ConnectionDep) -> None:
    endpoints["dependency"] += 1
    async for message in connection:
        await connection.send(message)


@app.websocket("/client")
async def client(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_json(
        {"client": websocket.client, "url": str(websocket.url), "root_path": websocket.scope.get("root_path")}
    )
    await websocket.close()
