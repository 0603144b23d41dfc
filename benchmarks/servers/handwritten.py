"""The manager of FastAPI's tutorial, written by hand; one such manager for each channel."""

import json
from collections import defaultdict

from _serve import serve
from fastapi import FastAPI, WebSocket, WebSocketDisconnect


class ConnectionManager:
    def __init__(self) -> None:
        self.active_connections: list[WebSocket] = []

    async def connect(self, websocket: WebSocket) -> None:
        await websocket.accept()
        self.active_connections.append(websocket)

    def disconnect(self, websocket: WebSocket) -> None:
        self.active_connections.remove(websocket)

    async def broadcast(self, message: str) -> None:
        for connection in self.active_connections:
            await connection.send_text(message)


app = FastAPI()
manager = ConnectionManager()
managers = defaultdict(ConnectionManager)


@app.websocket("/ws")
async def everyone(websocket: WebSocket) -> None:
    await manager.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await manager.broadcast(data)
    except WebSocketDisconnect:
        manager.disconnect(websocket)


@app.websocket("/loop")
async def loop(websocket: WebSocket) -> None:
    await manager.connect(websocket)
    try:
        while True:
            for message in json.loads(await websocket.receive_text()):
                await manager.broadcast(message)
    except WebSocketDisconnect:
        manager.disconnect(websocket)


@app.websocket("/ws/{channel}")
async def of_a_channel(websocket: WebSocket, channel: str) -> None:
    of_channel = managers[channel]
    await of_channel.connect(websocket)
    try:
        while True:
            data = await websocket.receive_text()
            await of_channel.broadcast(data)
    except WebSocketDisconnect:
        of_channel.disconnect(websocket)


if __name__ == "__main__":
    serve(app)
