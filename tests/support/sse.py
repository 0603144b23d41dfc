"""A client for event streams and long polls on a bare socket, and a parser by the rules of WHATWG HTML, 9.2.6."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

TIMEOUT = 10.0
"""Seconds after which something that should have come is missing."""


@dataclass(frozen=True)
class Event:
    """One that a page would see."""

    data: str
    name: str = "message"
    id: str = ""
    """The last id at that moment."""

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class EventParser:
    """Interprets a stream as a browser does; what is fed may end anywhere."""

    def __init__(self) -> None:
        self._bytes = b""
        self._is_first = True
        self._after_cr = False
        self._data: list[str] = []
        self._name = ""
        self._id = ""
        self.last_id = ""
        """The id that a browser would send when it comes back."""
        self.retry: int | None = None
        """How long it would wait, in milliseconds."""
        self.comments = 0
        """Lines that begin with a colon."""

    def feed(self, data: bytes) -> list[Event]:
        """Take more; return the events that it completes."""
        self._bytes += data
        if self._is_first and len(self._bytes) >= 3:
            self._bytes = self._bytes.removeprefix(b"\xef\xbb\xbf")
            self._is_first = False
        events: list[Event] = []
        while True:
            if self._after_cr and self._bytes:  # the LF of a CR LF
                self._bytes = self._bytes.removeprefix(b"\n")
                self._after_cr = False
            found = re.search(rb"[\r\n]", self._bytes)
            if found is None:
                return events
            line, end = self._bytes[: found.start()], found.group()
            self._bytes = self._bytes[found.end() :]
            self._after_cr = end == b"\r"
            if (event := self._line(line.decode("utf-8", "replace"))) is not None:
                events.append(event)

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            self.comments += 1
            return None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._name = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value)
        return None

    def _dispatch(self) -> Event | None:
        self.last_id = self._id
        data, name = self._data, self._name
        self._data, self._name = [], ""
        if not data:
            return None
        return Event("\n".join(data), name or "message", self.last_id)


class BrokenChunk(Exception):
    """Raised when a body in chunks isn't one."""


@dataclass
class Response:
    """The head of a response, and its body as it comes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int
    headers: dict[str, str]
    head: bytes
    parser: EventParser = field(default_factory=EventParser)
    events: list[Event] = field(default_factory=list)
    """Those that came and nobody took."""
    is_cut: bool = False
    """Whether the body ended without the last chunk that says so."""
    body: bytes = b""
    """What of the body was read, decoded."""

    async def _piece(self) -> bytes:
        # The next piece of the body; empty at its end.
        if self.headers.get("transfer-encoding") == "chunked":
            try:
                line = await self.reader.readuntil(b"\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial and not re.fullmatch(rb"[0-9a-fA-F]+\r?", error.partial):
                    raise BrokenChunk(error.partial) from None
                self.is_cut = True
                return b""
            if not re.fullmatch(rb"[0-9a-fA-F]+\r\n", line):
                raise BrokenChunk(line[:80])
            size = int(line, 16)
            try:
                data = await self.reader.readexactly(size + 2)
            except asyncio.IncompleteReadError as error:
                self.is_cut = True
                return error.partial[:size]
            if data[-2:] != b"\r\n":
                raise BrokenChunk(data[-80:])
            return data[:-2]
        if "content-length" in self.headers:
            return await self.reader.read(int(self.headers["content-length"]) - len(self.body))
        return await self.reader.read(65536)

    async def piece(self) -> bytes:
        """Return the next piece of the body; empty at its end."""
        async with asyncio.timeout(TIMEOUT):
            data = await self._piece()
        self.body += data
        return data

    async def event(self) -> Event:
        """Return the next event.

        Raises:
            EOFError: If the stream ends first.
        """
        while not self.events:
            data = await self.piece()
            if not data:
                raise EOFError
            self.events += self.parser.feed(data)
        return self.events.pop(0)

    async def named(self, name: str) -> Event:
        """Return the next event of a name; those before it are left out."""
        while (event := await self.event()).name != name:
            pass
        return event

    async def take(self, number: int) -> list[Event]:
        """Return so many events."""
        return [await self.event() for _ in range(number)]

    async def rest(self) -> list[Event]:
        """Return all events until the end."""
        events = []
        try:
            while True:
                events.append(await self.event())
        except EOFError:
            return events

    async def whole(self) -> bytes:
        """Return the body."""
        while await self.piece():
            pass
        return self.body

    async def json(self) -> Any:
        """Return the body, read as JSON."""
        return json.loads(await self.whole())

    @property
    def socket(self) -> socket.socket:
        found: socket.socket = self.writer.get_extra_info("socket")
        return found

    def close(self) -> None:
        """Leave."""
        self.writer.close()

    def reset(self) -> None:
        """Leave by RST."""
        from tests.support.rawclient import reset_on_close

        reset_on_close(self.socket)
        self.writer.transport.abort()


def request_bytes(port: int, path: str, method: str = "GET", version: str = "1.1", **headers: str) -> bytes:
    """Write a request; underscores in the names of headers are hyphens."""
    lines = [f"{method} {path} HTTP/{version}", f"Host: 127.0.0.1:{port}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def read_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Response:
    """Read the head of a response."""
    async with asyncio.timeout(TIMEOUT):
        head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    pairs = [line.partition(":") for line in lines]
    headers: dict[str, str] = {}
    for name, _, value in pairs:
        key = name.lower()
        headers[key] = f"{headers[key]}, {value.strip()}" if key in headers else value.strip()
    return Response(reader, writer, int(first.split()[1]), headers, head)


@asynccontextmanager
async def request(
    port: int,
    path: str,
    method: str = "GET",
    version: str = "1.1",
    *,
    tls: ssl.SSLContext | None = None,
    receive_buffer: int | None = None,
    **headers: str,
) -> AsyncIterator[Response]:
    """Ask, and read the head of what is answered; leaves at the end of the block.

    Args:
        port: The server's.
        path: With the query.
        method: The request's.
        version: Of HTTP.
        tls: What makes it HTTPS.
        receive_buffer: The size of the socket's; a small one lets the server feel soon that nobody reads.
        headers: Others; underscores in their names are hyphens.
    """
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    except OSError:
        sock.close()
        raise
    options: dict[str, Any] = {} if tls is None else {"ssl": tls, "server_hostname": "localhost"}
    limit = 2**16 if receive_buffer is None else receive_buffer
    reader, writer = await asyncio.open_connection(sock=sock, limit=limit, **options)
    try:
        writer.write(request_bytes(port, path, method, version, **headers))
        yield await read_head(reader, writer)
    finally:
        writer.transport.abort()
