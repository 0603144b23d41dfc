"""Measure what a delivery costs in the Centrifuge client protocol, JSON and Protobuf, beside plain WebSockets.

As `sse.py` does: each server runs uvicorn in a process of its own on one core; the clients are raw sockets in this
process on the other. What is printed is CPU time of the server's process for each message that came to a client, and
ratios within a round; medians over all rounds. Then how many round trips to Redis it takes to connect with five
subscriptions in the first frame: with a proxy before Redis that delays what passes.

    python benchmarks/centrifuge.py                            # 1,000 clients, 128 bytes, five rounds
    python benchmarks/centrifuge.py --clients 200 --rounds 2   # a first look
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sse import MESSAGE, MODES, SOCKET, Bar, Client, main
from websockets.asyncio.client import connect

from tests.support.brokers import RedisServer
from tests.support.proxy import FaultProxy
from tests.support.servers import serve_here

JSON = b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"news"}}'
# The same two commands, each after its length.
PROTOBUF = b"\x04\x08\x01\x22\x00" + b"\x0a\x08\x02\x2a\x06\x0a\x04news"


def masked(opcode: int, payload: bytes) -> bytes:
    """A short frame of a client; the mask is zero."""
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + bytes(4) + payload


VARIANTS = {
    "plain": Client(SOCKET.replace(b"/ws", b"/plain") + b"\r\n"),
    "json": Client(SOCKET + b"\r\n", masked(1, JSON)),
    "protobuf": Client(SOCKET + b"Sec-WebSocket-Protocol: centrifuge-protobuf\r\n\r\n", masked(2, PROTOBUF)),
}
BARS: list[Bar] = [(mode, variant, "plain", 1.2) for mode in MODES for variant in ("json", "protobuf")]

DELAY, TIMES = 0.1, 5


def serve(port: int) -> None:
    """Run the server, which has all of them."""
    import uvicorn
    from fastapi import FastAPI

    from wsbroadcast import ClientTiming, ConnectionManager, create_centrifuge_router, create_router

    # The crowd answers no pings.
    app, manager = FastAPI(), ConnectionManager(client_timing=ClientTiming(ping_interval=3600))
    app.include_router(create_router(manager, "/plain", channel="news", inbound="ignore"))
    app.include_router(create_centrifuge_router(manager, "/ws", authorize=lambda *_: True))

    @app.post("/send")
    async def send_some(number: int) -> None:
        for _ in range(number):
            await manager.broadcast(MESSAGE, channel="news")

    options = {"ws_per_message_deflate": False, "backlog": 4096, "timeout_keep_alive": 600}
    uvicorn.run(app, port=port, loop="asyncio", log_level="warning", **options)


async def round_trips(subscriptions: int) -> float:
    """Return how many times a proxy's delay, both ways, it takes until all is answered."""
    from fastapi import FastAPI

    from wsbroadcast import ConnectionManager, History, create_centrifuge_router

    took = []
    with RedisServer() as redis:
        async with FaultProxy(redis) as proxy:
            manager = ConnectionManager(proxy.url, history=History(messages=100))
            app = FastAPI()
            app.include_router(create_centrifuge_router(manager, "/ws", authorize=lambda *_: True))
            async with serve_here(app) as port:
                for time_ in range(TIMES + 1):
                    proxy.delay(DELAY if time_ else 0)  # the first isn't counted: it starts the manager
                    commands: list[dict[str, object]] = [{"id": 1, "connect": {}}]
                    for number in range(subscriptions):  # channels that nobody is in yet
                        channel = f"room:{time_}.{number}"
                        commands.append({"id": number + 2, "subscribe": {"channel": channel}})
                    async with connect(f"ws://127.0.0.1:{port}/ws") as websocket:
                        began = time.perf_counter()
                        await websocket.send("\n".join(map(json.dumps, commands)))
                        waiting = len(commands)
                        while waiting:
                            waiting -= sum('"id":' in line for line in str(await websocket.recv()).splitlines())
                        took.append(time.perf_counter() - began)
    return statistics.median(took[1:]) / (2 * DELAY)


if __name__ == "__main__":
    wanted = main(__doc__, __file__, VARIANTS, BARS)
    if wanted.serve:
        serve(wanted.port)
    else:
        alone, together = (asyncio.run(round_trips(several)) for several in (1, 5))
        print(f"  connect with a subscription: {alone:.2f} round trips to Redis, one to subscribe and one to read")
        verdict = "ok" if together < alone + 0.5 else "MISSED"
        print(f"  connect with five subscriptions: {together:.2f}, the same ones for all {verdict}")
