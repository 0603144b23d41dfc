"""`websockets.broadcast` on the asyncio server of the websockets library; a set of connections per channel."""

import asyncio
import json
from collections import defaultdict

from _serve import options, run
from websockets.asyncio.server import ServerConnection, broadcast, serve

channels: defaultdict[str, set[ServerConnection]] = defaultdict(set)


async def handler(websocket: ServerConnection) -> None:
    assert websocket.request is not None
    path = websocket.request.path
    connections = channels["/ws" if path == "/loop" else path]
    connections.add(websocket)
    try:
        async for message in websocket:
            for one in json.loads(message) if path == "/loop" else (message,):
                broadcast(connections, one)
    finally:
        connections.discard(websocket)


async def main(port: int) -> None:
    async with serve(handler, "127.0.0.1", port, ping_interval=None, backlog=4096):
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    run(main(options().port), options().loop)
