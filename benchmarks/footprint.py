"""What the library weighs: memory of an idle connection with and without each feature, files, lines and bytes.

    python benchmarks/footprint.py                   # 2,000 connections each, three rounds
    python benchmarks/footprint.py --clients 200     # a first look

Each variant is a uvicorn of its own with one endpoint. Its anonymous memory is read when some connections are there
already, and again with all of them; nothing is sent. What the packages need is not counted, what a connection needs is.
"""

from __future__ import annotations

import argparse
import gzip
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel
from sse import SOCKET, STREAM, Client, Crowd, Server

from wsbroadcast import (
    ClientTiming,
    ConnectionManager,
    History,
    Presence,
    create_centrifuge_router,
    create_router,
    create_sse_router,
)

SOURCE = Path(__file__).resolve().parents[1] / "src" / "wsbroadcast"

_EVENTS = SOCKET + b"Sec-WebSocket-Protocol: wsbroadcast.v1\r\n\r\n"
_CENTRIFUGE = b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"news"}}'
VARIANTS = {
    "hand-written class": Client(SOCKET + b"\r\n"),
    "ConnectionManager": Client(SOCKET + b"\r\n"),
    "create_router": Client(SOCKET + b"\r\n"),
    "create_router, wsbroadcast.v1": Client(_EVENTS),
    "with history": Client(_EVENTS),
    "with presence": Client(_EVENTS),
    "with types": Client(_EVENTS),
    "with history, presence and types": Client(_EVENTS),
    "create_centrifuge_router": Client(
        SOCKET + b"\r\n", bytes([0x81, 0x80 | len(_CENTRIFUGE)]) + bytes(4) + _CENTRIFUGE
    ),
    "create_sse_router": Client(STREAM),
}
_SOME = 200


class Say(BaseModel):
    """What goes in and out where there are types."""

    type: Literal["say"] = "say"
    text: str


def serve(variant: str, port: int) -> None:
    """Run one of the servers."""
    options = {"ws_per_message_deflate": False, "backlog": 4096, "timeout_keep_alive": 600}
    uvicorn.run(_app(variant), port=port, loop="asyncio", log_level="warning", **options)


def _app(variant: str) -> FastAPI:
    app = FastAPI()
    if variant == "hand-written class":
        active: list[WebSocket] = []

        @app.websocket("/ws")
        async def by_hand(websocket: WebSocket) -> None:
            await websocket.accept()
            active.append(websocket)
            try:
                while True:
                    await websocket.receive_text()
            except WebSocketDisconnect:
                active.remove(websocket)

        return app

    of_manager: dict[str, Any] = {"client_timing": ClientTiming(ping_interval=3600)}  # the crowd answers no pings
    of_router: dict[str, Any] = {"channel": "news"}
    if "history" in variant:
        of_manager["history"] = History()
    if "presence" in variant:
        of_manager["presence"] = Presence()
    if "types" in variant:
        of_router |= {"receives": Say, "sends": Say}
    manager = ConnectionManager(**of_manager)
    if variant == "ConnectionManager":

        @app.websocket("/ws")
        async def ours(websocket: WebSocket) -> None:
            await manager.connect(websocket, channels=["news"])
            try:
                while True:
                    await websocket.receive_text()
            except WebSocketDisconnect:
                manager.disconnect(websocket)

    elif variant == "create_centrifuge_router":
        app.include_router(create_centrifuge_router(manager, "/ws", authorize=lambda *_: True))
    elif variant == "create_sse_router":
        app.include_router(create_sse_router(manager, "/events", channel="news"))
    else:
        app.include_router(create_router(manager, "/ws", **of_router))
    return app


def memory_of(process: int) -> int:
    """Return the anonymous memory of a process in bytes."""
    with open(f"/proc/{process}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measured(variant: str, clients: int) -> float:
    """Return the bytes that one more connection takes."""
    client = VARIANTS[variant]
    server = Server(__file__, variant, client, _SOME, None)
    try:
        before = memory_of(server.process.pid)
        more = Crowd(server.port, client, clients)
        time.sleep(0.3)
        taken = memory_of(server.process.pid) - before
        more.close()
        return taken / clients
    finally:
        server.close()


def weigh() -> None:
    """Print what the source and the client in the browser weigh."""
    files = sorted(SOURCE.rglob("*.py"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    share = len(files) / len(lines) * 1000
    print(f"src/wsbroadcast: {len(files)} files, {len(lines):,} lines, {share:.1f} files per 1,000")
    longest = sorted(((len(file.read_text().splitlines()), file) for file in files), reverse=True)
    print("the longest: " + ", ".join(f"{file.relative_to(SOURCE)} {number}" for number, file in longest[:5]))
    served = (SOURCE / "client" / "wsbroadcast.min.js").read_bytes()
    source = (SOURCE / "client" / "wsbroadcast.js").read_text().splitlines()
    print(f"the browser's client: {len(gzip.compress(served, 9)):,} bytes gzipped, {len(source)} lines of source")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.port)
        return
    weigh()
    print(f"\nbytes of an idle connection, {arguments.clients} on uvicorn, medians of {arguments.rounds} rounds")
    found = {name: [measured(name, arguments.clients) for _ in range(arguments.rounds)] for name in VARIANTS}
    base = statistics.median(found["hand-written class"])
    for name, each in found.items():
        median = statistics.median(each)
        print(f"  {name:34} {median:8,.0f} {median - base:+8,.0f}   {min(each):,.0f} to {max(each):,.0f}")


if __name__ == "__main__":
    main()
