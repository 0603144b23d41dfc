"""The clients of `slow_consumers.py`, in one process: some read, some read nothing, one stalls and reads in turns.

`sessions.py` starts it with the server's port, and talks to it in lines of JSON: one command in, one result out.
"""

from __future__ import annotations

import io
import json
import os
import select
import socket
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flooders import frame, handshake

_PING = b"\x89\xfd\0\0\0\0" + b"p" * 125  # the largest there may be, masked with zeros (RFC 6455, 5.5.2)
_QUIET = 0.2
_LITTLE = 4096
# What a kernel holds for one that reads now and then. With less it is thrown out, with more it lags less.
_SOME = 64 * 1024
_ROOM = "/room"


class ClientError(Exception):
    """The server did something that makes the run worthless."""


class Gone(ClientError):
    """The server closed a connection."""


def connect(port: int, path: str, kernel_bytes: int | None = None, is_tls: bool = False) -> socket.socket:
    """Open a WebSocket and return its socket; the client's kernel holds so many bytes for it."""
    sock = socket.socket()
    if kernel_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, kernel_bytes)  # before it connects, or it has no effect
    sock.settimeout(15)
    sock.connect(("127.0.0.1", port))
    if is_tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        sock = context.wrap_socket(sock)
    sock.sendall(handshake(path))
    head = b""
    while b"\r\n\r\n" not in head:
        received = sock.recv(1)  # what follows stays in the kernel
        if not received:
            raise Gone("the server closed a connection while it opened")
        head += received
    if not head.startswith(b"HTTP/1.1 101"):
        raise ClientError(f"the server refused: {head[:100].decode(errors='replace')}")
    sock.setblocking(False)
    return sock


@dataclass(frozen=True)
class Pulse:
    """How one stalls and reads in turns, in seconds, and whether it comes back when the server has thrown it out."""

    stall: float
    read: float
    comes_back: bool

    def is_reading(self, since: float) -> bool:
        """Tell whether it is its time to read; it begins with a stall."""
        return since % (self.stall + self.read) >= self.stall


class Reader:
    """One that reads at once, and notes which of the words said came to it, and when."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port, _ROOM)
        self.latencies: list[int] = []
        self.is_closed = False
        self._data = b""

    def read(self, buffer: bytearray) -> int:
        """Return how many bytes came, without looking into them."""
        try:
            size = self.socket.recv_into(buffer)
        except BlockingIOError:
            return 0
        if not size:
            raise Gone("the server closed one that reads")
        return size

    def listen(self, buffer: bytearray) -> None:
        """Take what came as words."""
        try:
            size = self.read(buffer)
        except (Gone, ConnectionResetError):
            self.is_closed = True
            return
        self._data += buffer[:size]
        while len(self._data) >= 2 and len(self._data) >= (end := 2 + self._data[1]):
            first, payload, self._data = self._data[0], self._data[2:end], self._data[end:]
            if first == 0x81:
                self.latencies.append(time.perf_counter_ns() - int(payload))
            elif first == 0x88:
                self.is_closed = True


class Clients:
    """All clients of one server."""

    def __init__(self, port: int, commands: io.RawIOBase) -> None:
        self._port = port
        self._commands = commands
        self._buffer = bytearray(1024 * 1024)
        self._readers: list[Reader] = []
        # Those who read nothing. They are only kept, or their sockets would be closed.
        self._slow: list[socket.socket] = []

    def stall(self, connections: int, tls: bool) -> dict[str, Any]:
        """Connect and never read, each in a channel of its own."""
        self._slow = [connect(self._port, f"/stalled/{i}", _LITTLE, tls) for i in range(connections)]
        return {}

    def join(self, readers: int, hostile: int = 0) -> dict[str, Any]:
        """Enter the room: some will read, the others won't."""
        self._readers = [Reader(self._port) for _ in range(readers)]
        self._slow = [connect(self._port, _ROOM, _LITTLE) for _ in range(hostile)]
        return {}

    def read(self, pulse: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read as fast as it comes until the next command, and then until nothing comes any more.

        Args:
            pulse: How one more client stalls and reads.
        """
        pulser = None if pulse is None else _Pulser(self._port, Pulse(**pulse))
        epoll = select.epoll()
        readers = {reader.socket.fileno(): reader for reader in self._readers}
        for fd in (*readers, self._commands.fileno()):
            epoll.register(fd, select.EPOLLIN)
        received, is_over, came = 0, False, time.monotonic()
        while not is_over or time.monotonic() < came + _QUIET:
            for fd, _ in epoll.poll(0.02):
                if fd in readers:
                    received += readers[fd].read(self._buffer)
                    came = time.monotonic()
                else:
                    epoll.unregister(fd)
                    self._commands.readline()
                    is_over = True
            if pulser is not None and not is_over:
                pulser.read(self._buffer)
        if pulser is not None:
            pulser.socket.close()
        return {"received": received, "ends": 0 if pulser is None else pulser.ends}

    def talk(self, seconds: float) -> dict[str, Any]:
        """Let a reader say something each second, and those who read nothing send a ping each half second."""
        epoll = select.epoll()
        readers = {reader.socket.fileno(): reader for reader in self._readers}
        for fd in readers:
            epoll.register(fd, select.EPOLLIN)
        begun, steps, said = time.monotonic(), 0, 0
        while (now := time.monotonic()) < begun + seconds + 0.5:
            if now < begun + seconds and now >= begun + steps / 2:
                self._ping()
                if steps % 2 == 0 and not self._readers[0].is_closed:
                    said += 1
                    self._readers[0].socket.send(frame(str(time.perf_counter_ns())))
                steps += 1
            for fd, _ in epoll.poll(0.01):
                readers[fd].listen(self._buffer)
                if readers[fd].is_closed:
                    epoll.unregister(fd)
        return self._heard(said)

    def _ping(self) -> None:
        for sock in self._slow:
            try:
                sock.send(_PING)
            except (BlockingIOError, ConnectionResetError, BrokenPipeError):
                pass  # the server doesn't read either, or has thrown it out

    def _heard(self, said: int) -> dict[str, Any]:
        latencies = sorted(latency for reader in self._readers for latency in reader.latencies)
        return {
            "said": said,
            "heard": [len(reader.latencies) for reader in self._readers],
            "share": min(len(reader.latencies) for reader in self._readers) / said,
            "p50_ms": latencies[len(latencies) // 2] / 1e6 if latencies else None,
            "max_ms": latencies[-1] / 1e6 if latencies else None,
            "closed": sum(reader.is_closed for reader in self._readers),
        }


class _Pulser:
    """One that stalls and reads in turns."""

    def __init__(self, port: int, pulse: Pulse) -> None:
        self._port = port
        self._pulse = pulse
        self._begun = time.monotonic()
        self.socket = connect(port, _ROOM, _SOME)
        self._is_gone = False
        self.ends = 0

    def read(self, buffer: bytearray) -> None:
        if self._is_gone or not self._pulse.is_reading(time.monotonic() - self._begun):
            return
        try:
            if self.socket.recv_into(buffer):
                return
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        self.ends += 1
        self.socket.close()
        if self._pulse.comes_back:
            self.socket = connect(self._port, _ROOM, _SOME)
        else:
            self._is_gone = True


def main() -> None:
    """Carry out commands from standard input until it ends."""
    # Without a buffer: `read` asks the kernel whether there is another command.
    commands = os.fdopen(0, "rb", buffering=0, closefd=False)
    clients = Clients(json.loads(sys.argv[1])["port"], commands)
    roles: list[Callable[..., dict[str, Any]]] = [clients.stall, clients.join, clients.read, clients.talk]
    methods = {role.__name__: role for role in roles}
    for line in commands:
        command = json.loads(line)
        try:
            result = methods[command.pop("do")](**command)
        except (ClientError, OSError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
