# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Clients choose their channels, and `authorize` decides. The news is for all, and each user has a private channel.

Run it with `uvicorn 11_private_channels:app` in this directory. Get a token with
`curl -X POST "http://127.0.0.1:8000/token?user=ada"`, connect with `python -m websockets ws://127.0.0.1:8000/ws`, and
type the token first, without its quotes. Type `{"type": "subscribe", "channel": "private:ada"}`: the answer is
`subscribed`. Type `{"type": "publish", "channel": "news", "data": "hello"}`: the answer is `not allowed`, because only
`root` may publish to the news.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException

from wsbroadcast import Connection, ConnectionManager, Handshake, ManagerDep, TokenFrom, create_router

KEY = secrets.token_bytes(32)
TOKEN_SECONDS = 900

manager = ConnectionManager()
app = FastAPI()


# A signed token. In your app, this is a JWT, and a library checks it.


def sign(claims: bytes) -> str:
    return base64.urlsafe_b64encode(hmac.digest(KEY, claims, hashlib.sha256)).decode().rstrip("=")


def write_token(claims: dict[str, Any]) -> str:
    data = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"{data}.{sign(data.encode())}"


async def current_user(
    token: Annotated[str, Depends(TokenFrom(header=True, subprotocol="bearer", first_message=True))],
) -> dict[str, Any]:
    data, _, signature = token.partition(".")
    if not hmac.compare_digest(sign(data.encode()), signature):
        raise HTTPException(401, "that token isn't ours")
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)))
    if claims["exp"] <= time.time():
        raise HTTPException(401, "that token has expired")
    return claims  # `sub` becomes the user, and at `exp` the connection is closed


def authorize(connection: Connection | Handshake, action: str, channel: str | None) -> bool:
    if channel == "news":
        return action == "subscribe" or connection.info["role"] == "editor"
    return action == "subscribe" and channel == f"private:{connection.user}"


app.include_router(create_router(manager, "/ws", inbound="commands", authenticate=current_user, authorize=authorize))


@app.post("/token")
async def token(user: str) -> str:
    # Here everybody gets a token. In your app, this comes after a login.
    role = "editor" if user == "root" else "reader"
    return write_token({"sub": user, "role": role, "exp": time.time() + TOKEN_SECONDS})


@app.post("/tell/{user}", status_code=204)
async def tell(user: str, text: str, manager: ManagerDep) -> None:
    await manager.broadcast({"private": text}, channel=f"private:{user}")


@app.post("/ban/{user}", status_code=204)
async def ban(user: str, manager: ManagerDep) -> None:
    await manager.close_user(user, reason="banned")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
