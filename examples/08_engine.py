# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""An engine of your own: a small broker, and the link through which nodes use it.

Run it with `uvicorn 08_engine:app --workers 2` in this directory, and connect several clients with
`python -m websockets ws://127.0.0.1:8000/ws/news`. What one types reaches all clients of both processes. The process
that starts first runs the broker. docs/write-an-engine.md explains each part.
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Self
from urllib.parse import urlsplit

from fastapi import FastAPI

from wsbroadcast import ConfigurationError, ConnectionManager, create_router
from wsbroadcast.engines.broker import BrokerEngine, Inlet, Link, Parcel, reset

MAX_ENVELOPE_BYTES = 8 * 1024 * 1024
MAX_BACKLOG_BYTES = 32 * 1024 * 1024


class Hub:
    """A broker: what is published to a name goes to every node that has subscribed to it.

    A node says `sub NAME`, `unsub NAME`, `ping`, or `pub NAME SIZE` and then so many bytes. It is answered with `pong`,
    and with `msg NAME SIZE` and then so many bytes. Each begins a line, and all is done in the order in which it came.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.host = host
        self.port = port
        self._server: asyncio.Server | None = None
        self._nodes: dict[asyncio.StreamWriter, set[bytes]] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for node in self._nodes:
                node.transport.abort()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, node: asyncio.StreamWriter) -> None:
        self._nodes[node] = set()
        try:
            with suppress(OSError, EOFError, ValueError):  # it is gone, or speaks another language
                while line := await reader.readline():
                    await self.obey(node, line.split(), reader)
        finally:
            del self._nodes[node]
            node.close()

    async def obey(self, node: asyncio.StreamWriter, words: list[bytes], reader: asyncio.StreamReader) -> None:
        match words:
            case [b"sub", name]:
                self._nodes[node].add(name)
            case [b"unsub", name]:
                self._nodes[node].discard(name)
            case [b"ping"]:
                node.write(b"pong\n")
            case [b"pub", name, size]:
                envelope = await reader.readexactly(int(size))
                self.send(name, b"msg %b %d\n%b" % (name, len(envelope), envelope))

    def send(self, name: bytes, data: bytes) -> None:
        for node, names in self._nodes.items():
            if name in names:
                node.write(data)
                if node.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
                    node.transport.abort()  # it doesn't keep up; when it is back, its engine reports a gap


class HubLink(Link):
    """One connection to the hub."""

    max_envelope_bytes = MAX_ENVELOPE_BYTES

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._writer: asyncio.StreamWriter | None = None
        self._pongs: deque[asyncio.Future[None]] = deque()

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def read(self, inlet: Inlet) -> None:
        while line := await self._reader.readline():
            await self.heed(line.split(), inlet)
        raise ConnectionError("the hub ended the connection")

    async def heed(self, words: list[bytes], inlet: Inlet) -> None:
        match words:
            case [b"msg", name, size]:
                inlet.take(name.decode(), await self._reader.readexactly(int(size)))
            case [b"pong"]:
                pong = self._pongs.popleft()
                if not pong.done():  # who asked may have been cancelled
                    pong.set_result(None)

    async def subscribe(self, names: Sequence[str]) -> None:
        await self._tell(b"sub %b\n" % name.encode() for name in names)

    async def unsubscribe(self, names: Sequence[str]) -> None:
        await self._tell(b"unsub %b\n" % name.encode() for name in names)

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | None]:
        await self._tell(b"pub %b %d\n%b" % (name.encode(), len(envelope), envelope) for name, envelope in parcels)
        return [None] * len(parcels)

    async def abort(self) -> None:
        if self._writer is not None:
            reset(self._writer.transport)

    async def _tell(self, commands: Iterable[bytes]) -> None:
        # The hub obeys in order, so its pong says that it has done everything before.
        assert self._writer is not None
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        self._writer.write(b"".join(commands) + b"ping\n")
        await pong


class HubEngine(BrokerEngine):
    """Links nodes through a hub."""

    name = "hub"

    def __init__(self, host: str = "127.0.0.1", port: int = 7470, *, fail_fast: bool = False) -> None:
        super().__init__(address=f"{host}:{port}", fail_fast=fail_fast)
        self.host = host
        self.port = port

    @classmethod
    def from_url(cls, url: str) -> Self:
        try:
            parts = urlsplit(url)
            return cls(parts.hostname or "127.0.0.1", parts.port or 7470)
        except ValueError:
            raise ConfigurationError("the URL of a hub is hub://host:port") from None

    def new_link(self) -> Link:
        return HubLink(self.host, self.port)


engine = HubEngine.from_url(os.environ.get("HUB_URL", "hub://127.0.0.1:7470"))
hub = Hub(engine.host, engine.port)
manager = ConnectionManager(engine)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with suppress(OSError):  # another process runs the broker
        await hub.start()
    async with manager:
        yield
    await hub.stop()


app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/ws/{room}", channel="room:{room}"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
