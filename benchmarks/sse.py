"""Measure what a delivered event costs a server: ours, beside sse-starlette, FastAPI's own and our WebSockets.

Each server runs uvicorn in a process of its own on one core; the clients are raw sockets in this process on the other.
What is printed is CPU time of the server's process for each event that came to a client, until it is idle again, and
ratios within a round; medians over all rounds.

    python benchmarks/sse.py                            # 1,000 clients, 128 bytes, five rounds
    python benchmarks/sse.py --clients 200 --rounds 2   # a first look
"""

from __future__ import annotations

import argparse
import asyncio
import os
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# Its end is found wherever the kernel cuts what comes.
END = b"!"
MESSAGE = "x" * 127 + END.decode()

STREAM = b"GET /events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\n\r\n"
SOCKET = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)


@dataclass(frozen=True)
class Client:
    """What a client sends: its request, and what follows once there is an answer."""

    request: bytes
    then: bytes = b""


VARIANTS = {
    "ours": Client(STREAM),
    "sse-starlette": Client(STREAM),
    "fastapi.sse": Client(STREAM),
    "websocket": Client(SOCKET + b"\r\n"),
    "websocket-events": Client(SOCKET + b"Sec-WebSocket-Protocol: wsbroadcast.v1\r\n\r\n"),
}

Bar = tuple[str, str, str, float]
"""In which mode, what, compared with what, and the most that it may cost."""

# What the columns are compared with, and the most that they may cost.
MODES = ("back to back", "one in flight")
BARS: list[Bar] = [
    *((mode, "ours", "sse-starlette", 0.15) for mode in MODES),
    *((mode, "ours", "fastapi.sse", 0.04) for mode in MODES),
    *((mode, "ours", "websocket", 1.3) for mode in MODES),
    ("one in flight", "websocket-events", "websocket", 1.15),
]


# The servers.


def serve(variant: str, port: int) -> None:
    """Run one of the servers."""
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()
    queues: set[asyncio.Queue[str]] = set()

    @contextmanager
    def subscribed() -> Iterator[asyncio.Queue[str]]:
        queue: asyncio.Queue[str] = asyncio.Queue()
        queues.add(queue)
        try:
            yield queue
        finally:
            queues.discard(queue)

    if variant in ("ours", "websocket", "websocket-events"):
        from wsbroadcast import ConnectionManager, create_router, create_sse_router

        manager = ConnectionManager()
        app.include_router(create_sse_router(manager, "/events"))
        app.include_router(create_router(manager, "/ws", inbound="ignore"))

        async def send() -> None:
            await manager.broadcast(MESSAGE)

    else:

        async def send() -> None:
            for queue in queues:
                queue.put_nowait(MESSAGE)

    if variant == "sse-starlette":
        from sse_starlette import EventSourceResponse as Response

        @app.get("/events")
        async def starlettes() -> Response:
            async def events():  # type: ignore[no-untyped-def]
                with subscribed() as queue:
                    while True:
                        yield (b"data: %b\r\n\r\n" % (await queue.get()).encode())

            return Response(events())

    if variant == "fastapi.sse":
        from fastapi.sse import EventSourceResponse, ServerSentEvent

        @app.get("/events", response_class=EventSourceResponse)
        async def fastapis():  # type: ignore[no-untyped-def]
            with subscribed() as queue:
                while True:
                    yield ServerSentEvent(data=await queue.get())

    @app.post("/send")
    async def send_some(number: int) -> None:
        for _ in range(number):
            await send()

    options = {"ws_per_message_deflate": False, "backlog": 4096, "timeout_keep_alive": 600}
    uvicorn.run(app, port=port, loop="asyncio", log_level="warning", **options)


# The clients.


class Crowd:
    """Raw sockets, which read all that comes and count the messages in it."""

    def __init__(self, port: int, client: Client, number: int) -> None:
        self._selector = selectors.DefaultSelector()
        self.port = port
        self.messages = 0
        self.bytes = 0
        for _ in range(number):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(client.request)
            if client.then:
                assert connection.recv(4096).startswith(b"HTTP/1.1 101")
                connection.sendall(client.then)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ)
        self.read_until_quiet(3.0)

    def read(self, timeout: float) -> bool:
        """Read what is there; return whether anything was."""
        ready = self._selector.select(timeout)
        for key, _ in ready:
            try:
                data = key.fileobj.recv(1 << 18)
            except BlockingIOError:
                continue
            if not data:
                raise SystemExit("the server has closed a connection")
            self.messages += data.count(END)
            self.bytes += len(data)
        return bool(ready)

    def read_until_quiet(self, seconds: float) -> None:
        """Read until nothing comes for a while."""
        while self.read(seconds):
            pass

    def read_until(self, messages: int) -> None:
        """Read until so many messages have come."""
        deadline = time.monotonic() + 60
        while self.messages < messages:
            self.read(1.0)
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.messages} of {messages} messages came")

    def close(self) -> None:
        """Leave."""
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()


class Server:
    """One server in a process of its own, with its crowd; the script runs it if it is told `--serve`."""

    def __init__(self, script: str, variant: str, client: Client, clients: int, core: int | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, script, "--serve", variant, "--port", str(port)]
        self.process = subprocess.Popen(command)
        if core is not None:
            os.sched_setaffinity(self.process.pid, {core})
        self.port = port
        self.clients = clients
        try:
            self._connect()
            self.crowd = Crowd(port, client, clients)
        except BaseException:
            self._end()
            raise

    def _connect(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                self._control = socket.create_connection(("127.0.0.1", self.port))
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def send(self, number: int) -> None:
        """Let it broadcast so many messages."""
        request = f"POST /send?number={number} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        self._control.sendall(request.encode())

    def cpu(self) -> float:
        """Return its CPU time in seconds."""
        with open(f"/proc/{self.process.pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9

    def measure(self, mode: str, messages: int) -> float:
        """Return CPU microseconds for each delivery."""
        crowd = self.crowd
        before, came = self.cpu(), crowd.messages
        if mode == "back to back":
            self.send(messages)
            crowd.read_until(came + messages * self.clients)
        else:
            for number in range(1, messages + 1):
                self.send(1)
                crowd.read_until(came + number * self.clients)
        crowd.read_until_quiet(0.3)
        self._control.recv(1 << 16)
        return (self.cpu() - before) / (messages * self.clients) * 1e6

    def close(self) -> None:
        """End it."""
        self.crowd.close()
        self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()


def main(doc: str | None, script: str, variants: Mapping[str, Client], bars: Sequence[Bar]) -> argparse.Namespace:
    """Measure and print; or only return the arguments, if a server is to be run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--messages", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    if arguments.serve:
        return arguments
    found = measure(script, variants, bars, arguments)
    print(f"\nµs of server CPU per delivery, {arguments.clients} clients, medians of {arguments.rounds} rounds")
    for (mode, variant), costs in found.items():
        print(f"  {mode:14} {variant:18} {statistics.median(costs):8.2f}   {min(costs):.2f} to {max(costs):.2f}")
    for mode, variant, other, most in bars:
        ratios = [a / b for a, b in zip(found[mode, variant], found[mode, other], strict=True)]
        verdict = "ok" if statistics.median(ratios) <= most else "MISSED"
        print(f"  {mode}: {variant} / {other} = {statistics.median(ratios):.3f} (bar {most}) {verdict}")
    return arguments


def measure(
    script: str, variants: Mapping[str, Client], bars: Sequence[Bar], options: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Measure all variants in turns; each in a fresh server for each round."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[1]})
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds):
        for variant in variants if number % 2 else reversed(variants):
            core = cores[0] if len(cores) > 1 else None
            server = Server(script, variant, variants[variant], options.clients, core)
            try:
                server.measure("back to back", max(2, options.messages // 5))  # not counted
                for mode in MODES:
                    if any(mode == bar[0] and variant in bar[1:3] for bar in bars):
                        cost = server.measure(mode, options.messages)
                        found.setdefault((mode, variant), []).append(cost)
                        print(f"round {number + 1}: {mode}, {variant}: {cost:.2f} µs", flush=True)
            finally:
                server.close()
    return found


if __name__ == "__main__":
    wanted = main(__doc__, __file__, VARIANTS, BARS)
    if wanted.serve:
        serve(wanted.serve, wanted.port)
