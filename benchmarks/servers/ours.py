"""The tutorial's own handlers, with the class replaced by the import."""

import json

from _serve import serve
from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from wsbroadcast import ConnectionManager, Limits

app = FastAPI()
# The load client pipelines thousands of messages a second, which the defaults take for an attack.
manager = ConnectionManager(limits=Limits(max_inbound_rate=None, max_inbound_bytes=None))


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
    await manager.connect(websocket, channels=[channel])
    try:
        while True:
            data = await websocket.receive_text()
            await manager.broadcast(data, channel=channel)
    except WebSocketDisconnect:
        manager.disconnect(websocket)


if __name__ == "__main__":
    serve(app)
