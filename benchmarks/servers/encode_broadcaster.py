"""encode/broadcaster with its memory backend, in FastAPI, as in its README."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
from _serve import CHANNEL, serve
from broadcaster import Broadcast
from fastapi import FastAPI, WebSocket

broadcast = Broadcast("memory://")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with broadcast:
        yield


app = FastAPI(lifespan=lifespan)


async def _receive(websocket: WebSocket, channel: str) -> None:
    async for message in websocket.iter_text():
        await broadcast.publish(channel=channel, message=message)


async def _send(websocket: WebSocket, channel: str) -> None:
    async with broadcast.subscribe(channel=channel) as subscriber:
        async for event in subscriber:
            await websocket.send_text(event.message)


async def _serve_channel(websocket: WebSocket, channel: str) -> None:
    await websocket.accept()
    async with anyio.create_task_group() as tasks:

        async def receive() -> None:
            await _receive(websocket, channel)
            tasks.cancel_scope.cancel()

        tasks.start_soon(receive)
        await _send(websocket, channel)


@app.websocket("/ws")
async def everyone(websocket: WebSocket) -> None:
    await _serve_channel(websocket, CHANNEL)


@app.websocket("/ws/{channel}")
async def of_a_channel(websocket: WebSocket, channel: str) -> None:
    await _serve_channel(websocket, channel)


if __name__ == "__main__":
    serve(app)
