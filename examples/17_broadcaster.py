# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""The names of encode/broadcaster, for an app that used it: `Broadcast`, `subscribe`, `publish`, `Event`.

Run it with `uvicorn 17_broadcaster:app` in this directory, and connect two clients with
`python -m websockets ws://127.0.0.1:8000/`. What one types appears in both. You may copy the class `Broadcast` as it
is. It differs from broadcaster's in three things. A message may be bytes, or anything that JSON can express. No message
is lost in silence: `get` may raise `Lagged`. A broker that was down is found again.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from wsbroadcast import ConnectionManager, History, Listener


@dataclass(frozen=True)
class Event:
    channel: str
    message: Any


class Unsubscribed(Exception):
    """Raised by `get` when the block of the subscription has ended."""


class Subscriber:
    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    async def get(self) -> Event:
        try:
            return await anext(self)
        except StopAsyncIteration:
            raise Unsubscribed from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        publication = await anext(self._listener)
        return Event(self._listener.channels[0], publication.data)


class Broadcast:
    """Publishes and subscribes. `redis-stream://` keeps the messages, so that a slow subscriber can read them later."""

    def __init__(self, url: str) -> None:
        keeps = url.startswith("redis-stream://")
        self._manager = ConnectionManager(
            url.replace("redis-stream://", "redis://"), history=History() if keeps else None
        )

    async def connect(self) -> None:
        await self._manager.start()

    async def disconnect(self) -> None:
        await self._manager.aclose()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.disconnect()

    async def publish(self, channel: str, message: Any) -> None:
        await self._manager.broadcast(message, channel=channel)

    @asynccontextmanager
    async def subscribe(self, channel: str) -> AsyncIterator[Subscriber]:
        async with self._manager.listen(channel) as listener:
            yield Subscriber(listener)


# The chat of broadcaster's README. It subscribes before it accepts, so that a client misses nothing.

broadcast = Broadcast(os.environ.get("BROKER_URL", "memory://"))


async def chatroom_ws(websocket: WebSocket) -> None:
    async with broadcast.subscribe(channel="chatroom") as subscriber, asyncio.TaskGroup() as tasks:
        await websocket.accept()
        sending = tasks.create_task(chatroom_ws_sender(websocket, subscriber))
        async for message in websocket.iter_text():
            await broadcast.publish(channel="chatroom", message=message)
        sending.cancel()


async def chatroom_ws_sender(websocket: WebSocket, subscriber: Subscriber) -> None:
    async for event in subscriber:
        await websocket.send_text(event.message)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with broadcast:
        yield


app = Starlette(routes=[WebSocketRoute("/", chatroom_ws, name="chatroom_ws")], lifespan=lifespan)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
