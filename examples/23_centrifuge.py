# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[centrifuge,demo]"]
# ///
"""A server for the Centrifuge SDKs: JavaScript, Dart, Swift, Java, Go and Python, with tokens, recovery and presence.

Run it with `pip install "wsbroadcast[centrifuge]"` and `uvicorn 23_centrifuge:app` in this directory.
`curl -X POST "http://localhost:8000/token?user=ada"` makes a token. With it, an SDK connects to
ws://localhost:8000/connection/websocket and subscribes to `news`. Then it gets what
`curl -X POST "http://localhost:8000/announce?text=hello"` sends, also if it was away in between. The test suite of
centrifuge-python passes against this server.
"""

import os

import jwt
from fastapi import FastAPI

from wsbroadcast import (
    USERS,
    CentrifugeTokens,
    Connection,
    ConnectionManager,
    Handshake,
    History,
    Presence,
    create_centrifuge_router,
)

SECRET = os.environ.get("TOKEN_SECRET", "secret")  # the SDK's test suite has this one; yours needs at least 32 bytes

manager = ConnectionManager(
    os.environ.get("BROKER_URL", "memory://"),
    history={"*": History(messages=100), "smallhistory:*": History(messages=2), USERS: History(messages=100)},
    presence=Presence(by="connection", grace=0),
)


def authorize(connection: Connection | Handshake, action: str, channel: str | None) -> bool:
    if action in ("subscribe", "call"):
        return True
    return channel in connection.channels or channel == f"#{connection.user}"  # to publish, and to see who is there


app = FastAPI()
app.include_router(
    create_centrifuge_router(
        manager,
        "/connection/websocket",
        tokens=CentrifugeTokens(SECRET, allow_weak_secret=True),
        authorize=authorize,
        shows_joins=True,
    )
)


@manager.method("add")
async def add(a: int, b: int) -> int:
    return a + b


@app.post("/token")
async def token(user: str) -> str:  # stands for your login
    return jwt.encode({"sub": user}, SECRET)


@app.post("/announce")
async def announce(text: str) -> None:
    await manager.broadcast({"text": text}, channel="news")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
