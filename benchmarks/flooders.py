"""The clients of `flood.py`: fifty healthy ones that measure, and those that attack. Each kind is a process of its own.

`python flooders.py healthy 8000 20` talks for 20 s and prints the latencies; `python flooders.py frames 8000 20`
attacks. Healthy clients come from 127.0.0.1, the others from 127.0.0.2 and on, so that a limit by address can tell them
apart.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

HEALTHY = 50
HEALTHY_ROOM = "/room/a"
_MASK = b"\0\0\0\0"  # which is a mask too (RFC 6455, 5.3)
_SO_TIMESTAMPNS = 35  # which Python has no name for


def room() -> str:
    """Where the attackers go: the room of the healthy ones, or another."""
    return os.environ.get("FLOOD_ROOM", HEALTHY_ROOM)


def frame(text: str) -> bytes:
    """Return a client's text frame of less than 126 bytes."""
    payload = text.encode()
    return bytes((0x81, 0x80 | len(payload))) + _MASK + payload


def handshake(path: str) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def read_frames(data: bytes, take: Callable[[bytes], object]) -> bytes:
    """Hand on whole text frames of less than 126 bytes; return what is left."""
    at = 0
    while len(data) >= at + 2 and len(data) >= at + 2 + data[at + 1]:
        size = data[at + 1]
        if data[at] == 0x81:
            take(data[at + 2 : at + 2 + size])
        at += 2 + size
    return data[at:]


class Client(asyncio.Protocol):
    """One connection; whole text frames are handed on."""

    def __init__(self, path: str, take: Callable[[bytes], None]) -> None:
        self._path = path
        self._take = take
        self._data = b""
        loop = asyncio.get_running_loop()
        self.status: asyncio.Future[int] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(handshake(self._path))

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self.status.done():
            head, end, rest = self._data.partition(b"\r\n\r\n")
            if not end:
                return
            self.status.set_result(int(head.split(b" ", 2)[1]))
            self._data = rest
        self._data = read_frames(self._data, self._take)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.status.done():
            self.status.set_result(0)
        self.ended.set_result(None)


async def connect(port: int, path: str, address: str, take: Callable[[bytes], None] = lambda _: None) -> Client:
    """Connect from an address; returns whether it was let in or not, see `status`."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Client(path, take), "127.0.0.1", port, local_addr=(address, 0))
    await client.status
    return client


def attack(port: int, path: str, address: str) -> socket.socket:
    """Connect and send a handshake, and let it be."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects, or it has no effect
    sock.bind((address, 0))
    sock.connect(("127.0.0.1", port))
    sock.sendall(handshake(path))
    return sock


class Listener:
    """A healthy client that notes when the kernel had each word for it.

    Attackers and healthy clients share a core, so a healthy one may be late itself; what the server did is what counts.
    The kernel's stamp is that of the last bytes that were read: of two words that came together both count as late as
    the second.
    """

    def __init__(self, client: Client, latencies: list[int]) -> None:
        self._socket = socket.socket(fileno=os.dup(client.transport.get_extra_info("socket").fileno()))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._data = b""
        self._latencies = latencies
        client.transport.pause_reading()
        asyncio.get_running_loop().add_reader(self._socket, self._read)
        self.is_closed = False

    def say(self) -> None:
        """Say what time it is."""
        self._socket.send(frame(f"ns {time.time_ns()}"))

    def _read(self) -> None:
        data, ancillary, _, _ = self._socket.recvmsg(65536, 64)
        if not data:
            self.is_closed = True
            asyncio.get_running_loop().remove_reader(self._socket)
            return
        came = time.time_ns()
        if ancillary:  # what came before the option was set has no stamp
            seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
            came = seconds * 1_000_000_000 + nanoseconds
        self._data = read_frames(self._data + data, lambda word: self._take(word, came))

    def _take(self, word: bytes, came: int) -> None:
        if word.startswith(b"ns "):
            self._latencies.append(came - int(word[3:]))


async def healthy(port: int, seconds: float) -> dict[str, object]:
    """Each says something four times a second, and everyone measures how long each word takes to reach it."""
    latencies: list[int] = []
    clients = [await connect(port, HEALTHY_ROOM, "127.0.0.1") for _ in range(HEALTHY)]
    print(json.dumps({"status": sorted({client.status.result() for client in clients})}), flush=True)
    listeners = [Listener(client, latencies) for client in clients]
    loop = asyncio.get_running_loop()
    started, number = loop.time(), 0
    while loop.time() < started + seconds:
        listeners[number % HEALTHY].say()
        number += 1
        await asyncio.sleep(max(0, started + number / (4 * HEALTHY) - loop.time()))
    await asyncio.sleep(1)
    latencies.sort()
    return {
        "p50_ms": latencies[len(latencies) // 2] / 1e6,
        "p99_ms": latencies[len(latencies) * 99 // 100] / 1e6,
        "max_ms": latencies[-1] / 1e6,
        "lost": number * HEALTHY - len(latencies),
        "closed": sum(listener.is_closed for listener in listeners),
    }


async def frames(port: int, seconds: float) -> dict[str, object]:
    """10,000 small frames in a second, from a client in the room of the healthy ones."""
    client = await connect(port, room(), "127.0.0.2")
    sent = 0
    for _ in range(100):
        client.transport.write(frame("flood") * 100)
        sent += 100
        await asyncio.sleep(0.01)
        if client.ended.done():
            break
    with suppress(TimeoutError):
        await asyncio.wait_for(client.ended, seconds)
    return {"sent": sent, "closed": client.ended.done()}


async def handshakes(port: int, seconds: float) -> dict[str, object]:
    """1,000 handshakes from one address."""
    clients = []
    started = time.monotonic()
    for number in range(1, 1001):
        clients.append(attack(port, room(), "127.0.0.3"))
        await asyncio.sleep(max(0, started + number * seconds / 1000 - time.monotonic()))
    statuses: Counter[str] = Counter()
    for sock in clients:
        with sock:
            sock.settimeout(1)
            statuses[sock.recv(32).split(b" ", 2)[1].decode()] += 1
    return dict(statuses)


async def names(port: int, seconds: float) -> dict[str, object]:
    """A million channel names, as fast as the server takes them."""
    client = await connect(port, "/names", "127.0.0.4")
    sent = 0
    deadline = time.monotonic() + seconds
    while sent < 1_000_000 and time.monotonic() < deadline and not client.ended.done():
        if client.transport.get_write_buffer_size() < 65536:
            client.transport.write(b"".join(frame(f"name {sent + number}") for number in range(1000)))
            sent += 1000
        await asyncio.sleep(0.001)
    return {"sent": sent, "closed": client.ended.done()}


async def deaf(port: int, seconds: float) -> dict[str, object]:
    """200 clients that never read, each from an address of its own."""
    clients = []
    for number in range(200):
        clients.append(attack(port, room(), f"127.0.1.{number + 1}"))
        await asyncio.sleep(0.005)
    await asyncio.sleep(seconds)
    for sock in clients:
        sock.close()
    return {"connected": len(clients)}


async def crowd(port: int, seconds: float) -> dict[str, object]:
    """As many clients in the room as an attack gets in there, but they read and say nothing."""
    clients = [await connect(port, room(), f"127.0.1.{number % 250 + 1}") for number in range(260)]
    await asyncio.sleep(seconds)
    closed = sum(client.ended.done() for client in clients)
    for client in clients:
        client.transport.abort()
    return {"closed": closed}


ROLES: dict[str, Callable[[int, float], Awaitable[dict[str, object]]]] = {
    "healthy": healthy,
    "frames": frames,
    "handshakes": handshakes,
    "names": names,
    "deaf": deaf,
    "crowd": crowd,
}


async def _main(role: str, port: int, seconds: float) -> None:
    print(json.dumps(await ROLES[role](port, seconds)), flush=True)


if __name__ == "__main__":
    if sys.argv[1] != "healthy":
        # Making a flood costs, too, but that must not be measured: whoever measures takes the core at once.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
