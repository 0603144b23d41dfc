# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Hooks run your code at every event. Here they greet, moderate, and let a user mute another one.

Run it with `uvicorn 04_hooks:app` in this directory. Connect eva, who mutes bob, with
`python -m websockets "ws://127.0.0.1:8000/ws/eva?mutes=bob"`, and others at `/ws/bob` and `/ws/ada`. Eva doesn't see
what bob says. A message with `buy now` reaches nobody.
"""

import json
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Query, WebSocket

from wsbroadcast import (
    HOLD_BACK,
    Audience,
    CloseCode,
    Connection,
    ConnectionManager,
    Delivery,
    HoldBack,
    Hook,
    Message,
    PermissionDenied,
)


@dataclass
class Member:
    name: str
    mutes: set[str]


class Moderation(Hook):
    """Refuses long messages and holds spam back. `on_broadcast` may also change a message."""

    async def on_message(self, connection: Connection, message: str | bytes) -> None:
        if len(message) > 1000:
            raise PermissionDenied("too long")  # the endpoint doesn't get it

    async def on_broadcast(self, message: Message, audience: Audience) -> Message | HoldBack:
        return HOLD_BACK if b"buy now" in message.payload else message


class Muting(Hook):
    """Removes from the recipients those who muted the author. It runs once for each broadcast."""

    async def on_deliver(self, delivery: Delivery) -> None:
        author = json.loads(delivery.message.payload).get("from")
        delivery.recipients = [one for one in delivery.recipients if author not in one.info.mutes]


manager = ConnectionManager(hooks=[Moderation(), Muting()])
app = FastAPI(lifespan=manager.lifespan)


@manager.on_connect
async def welcome(connection: Connection) -> None:
    if connection.info.name == "root":
        raise PermissionDenied("this name is taken")  # the connection is closed with 1008
    await manager.broadcast({"joined": connection.info.name}, exclude=connection)


@manager.on_disconnect
async def say_goodbye(connection: Connection) -> None:
    await manager.broadcast({"left": connection.info.name, "code": connection.close_code})


@app.websocket("/ws/{name}")
async def endpoint(websocket: WebSocket, name: str, mutes: Annotated[list[str], Query()] = []) -> None:  # noqa: B006
    try:
        async with manager.connect(websocket, info=Member(name, set(mutes))) as connection:
            async for message in connection:
                await manager.broadcast({"from": name, "text": str(message)})
    except PermissionDenied as denied:
        await manager.close(websocket, CloseCode.POLICY_VIOLATION, str(denied))  # does nothing if it is closed already


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
