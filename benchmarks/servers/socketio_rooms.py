"""python-socketio, asyncio server as an ASGI app; channels are rooms."""

from urllib.parse import parse_qs

import socketio
from _serve import CHANNEL, serve

sio = socketio.AsyncServer(async_mode="asgi", ping_interval=600, ping_timeout=600)
rooms: dict[str, str] = {}


@sio.event
async def connect(sid: str, environ: dict[str, str]) -> None:
    rooms[sid] = parse_qs(environ["QUERY_STRING"]).get("channel", [CHANNEL])[0]
    await sio.enter_room(sid, rooms[sid])


@sio.event
async def message(sid: str, data: str) -> None:
    await sio.emit("message", data, room=rooms[sid])


@sio.event
async def disconnect(sid: str) -> None:
    rooms.pop(sid, None)


if __name__ == "__main__":
    serve(socketio.ASGIApp(sio))
