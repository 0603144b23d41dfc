"""A WebSocket client on a bare socket, which can misbehave; and a swarm of them in their own process.

`python -m tests.support.rawclient --port 8000 --path /ws --connections 50 --messages 1000` connects, prints a JSON line
when all are connected, counts what arrives and prints a second line when every connection has it or is closed. They
stay connected until standard input ends. A line there, `vanish`, resets every connection at once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import NamedTuple
from zlib import crc32

TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

_MASK = b"\x0f\xf0\x55\xaa"


class Frame(NamedTuple):
    """One frame from the server."""

    opcode: int
    payload: bytes

    @property
    def close_code(self) -> int:
        return int.from_bytes(self.payload[:2]) if len(self.payload) >= 2 else 1005


def handshake(port: int, path: str) -> bytes:
    """Return an opening handshake without extensions, so that messages arrive uncompressed."""
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """Return an unfragmented client frame (RFC 6455, 5.3)."""
    size = len(payload)
    if size < 126:
        header = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        header = bytes((0x80 | opcode, 0x80 | 126)) + size.to_bytes(2)
    else:
        header = bytes((0x80 | opcode, 0x80 | 127)) + size.to_bytes(8)
    mask = (_MASK * (size // 4 + 1))[:size]
    masked = (int.from_bytes(payload) ^ int.from_bytes(mask)).to_bytes(size)
    return header + _MASK + masked


def reset_on_close(sock: socket.socket) -> None:
    """Make the socket's close an RST, as when a machine loses its process or a NAT its memory."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class FrameParser:
    """Cuts a stream into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0

    def feed(self, data: bytes) -> None:
        del self._buffer[: self._position]
        self._position = 0
        self._buffer += data

    def next(self) -> Frame | None:
        """Return the next whole frame, or `None` if more must be fed first."""
        buffer, start = self._buffer, self._position
        if len(buffer) < start + 2:
            return None
        size, body = buffer[start + 1], start + 2
        if size >= 126:
            width = 2 if size == 126 else 8
            body += width
            if len(buffer) < body:
                return None
            size = int.from_bytes(buffer[body - width : body])
        if len(buffer) < body + size:
            return None
        self._position = body + size
        return Frame(buffer[start] & 0x0F, bytes(buffer[body : body + size]))


class RawClient:
    """A connection that reads only when a test tells it to."""

    def __init__(self, sock: socket.socket, parser: FrameParser) -> None:
        self.socket = sock
        self._parser = parser

    @classmethod
    async def connect(cls, port: int, path: str, *, receive_buffer: int | None = None) -> RawClient:
        """Connect; a small `receive_buffer` lets the server feel soon that nobody reads."""
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)  # before connect, or it has no effect
        try:
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, handshake(port, path))
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := await loop.sock_recv(sock, 1 if receive_buffer else 4096)):
                    raise ConnectionError(f"the handshake ended with {head!r}")
                head += data
        except BaseException:
            sock.close()
            raise
        head, _, rest = head.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            sock.close()
            raise ConnectionError(f"refused with {head!r}")
        parser = FrameParser()
        parser.feed(rest)
        return cls(sock, parser)

    async def send(self, text: str) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, masked_frame(TEXT, text.encode()))

    async def receive(self) -> Frame | None:
        """Return the next frame, or `None` at the end of the stream."""
        while (frame := self._parser.next()) is None:
            try:
                data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self._parser.feed(data)
        return frame

    async def receive_text(self) -> str:
        """Return the next text; the server's pings are passed over."""
        while (frame := await self.receive()) is not None and frame.opcode == PING:
            pass
        assert frame is not None, "the stream ended"
        assert frame.opcode == TEXT, frame
        return frame.payload.decode()

    def vanish(self) -> None:
        """Disappear by RST, without a close frame."""
        reset_on_close(self.socket)
        self.socket.close()

    def close(self) -> None:
        self.socket.close()


class Tally(asyncio.Protocol):
    """Counts text messages that begin with eight digits, their number; in a swarm."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._parser = FrameParser()
        self._head: bytes | None = b""
        self.transport: asyncio.Transport | None = None
        self.received = 0
        self.payload_bytes = 0
        self.lost = 0
        self.doubled_or_disordered = 0
        self.doubled = 0
        self.order = 0
        """A checksum of all payloads in the order in which they came."""
        self._seen = bytearray(swarm.messages)
        self.close_code: int | None = None
        self._next = 0
        self._is_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._swarm.handshake)

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += data
            if b"\r\n\r\n" not in self._head:
                return
            _, _, data = self._head.partition(b"\r\n\r\n")
            self._head = None
            self._swarm.connected()
        self._parser.feed(data)
        while (frame := self._parser.next()) is not None:
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        opcode, payload = frame
        if opcode == TEXT:
            number = int(payload[:8])
            if number == self._next:
                self._next += 1
            elif number > self._next:
                self.lost += number - self._next
                self._next = number + 1
            else:
                self.doubled_or_disordered += 1
            if number < len(self._seen):
                self.doubled += self._seen[number]
                self._seen[number] = 1
            self.order = crc32(payload, self.order)
            self.received += 1
            self.payload_bytes += len(payload)
            if self.received == self._swarm.messages:
                self._done()
        elif opcode == PING:
            assert self.transport is not None
            self.transport.write(masked_frame(PONG, payload))
        elif opcode == CLOSE:
            self.close_code = frame.close_code

    def connection_lost(self, exc: Exception | None) -> None:
        if self.close_code is None:
            self.close_code = 1006
        self._done()

    @property
    def missing_numbers(self) -> int:
        """How many of the numbers never came."""
        return self._seen.count(0)

    def _done(self) -> None:
        if not self._is_done:
            self._is_done = True
            self._swarm.one_done()


class Swarm:
    """Many connections to one path, counted together."""

    def __init__(self, port: int, path: str, connections: int, messages: int) -> None:
        self.handshake = handshake(port, path)
        self.messages = messages
        self._port = port
        self._size = connections
        self._open = 0
        self._unfinished = connections
        self._ready = asyncio.Event()
        self._finished = asyncio.Event()
        self.tallies: list[Tally] = []

    def connected(self) -> None:
        self._open += 1
        if self._open == self._size:
            self._ready.set()

    def one_done(self) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._finished.set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for start in range(0, self._size, 50):  # fewer at once than any server's accept queue holds
            batch = range(start, min(start + 50, self._size))
            made = await asyncio.gather(
                *(loop.create_connection(lambda: Tally(self), "127.0.0.1", self._port) for _ in batch)
            )
            self.tallies += [tally for _, tally in made]
        await self._ready.wait()
        print(json.dumps({"connected": self._open}), flush=True)
        started = time.monotonic()
        await self._finished.wait()
        print(json.dumps({**self.result(), "seconds": round(time.monotonic() - started, 3)}), flush=True)

    def result(self) -> dict[str, object]:
        tallies = self.tallies
        return {
            "received": sum(tally.received for tally in tallies),
            "payload_bytes": sum(tally.payload_bytes for tally in tallies),
            "complete": sum(tally.received == self.messages for tally in tallies),
            "lost": sum(tally.lost for tally in tallies),
            "doubled_or_disordered": sum(tally.doubled_or_disordered for tally in tallies),
            "missing": sum(tally.missing_numbers for tally in tallies),
            "doubled": sum(tally.doubled for tally in tallies),
            "orders": len({tally.order for tally in tallies}),
            "closed": dict(Counter(str(tally.close_code) for tally in tallies if tally.close_code is not None)),
        }

    def vanish(self) -> None:
        """Reset every connection at once and end without another word."""
        for tally in self.tallies:
            assert tally.transport is not None
            reset_on_close(tally.transport.get_extra_info("socket"))
        os._exit(0)


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--messages", type=int, required=True)
    options = parser.parse_args()
    swarm = Swarm(options.port, options.path, options.connections, options.messages)
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def read_orders() -> None:
        for line in sys.stdin:
            if line.strip() == "vanish":
                loop.call_soon_threadsafe(swarm.vanish)
        loop.call_soon_threadsafe(task.cancel)

    threading.Thread(target=read_orders, daemon=True).start()
    await swarm.run()
    await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(asyncio.CancelledError):
        asyncio.run(_main())
