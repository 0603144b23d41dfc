"""The load client: many WebSockets in one process, on `epoll` and `recv_into` alone, so that it isn't the bottleneck.

`sessions.py` starts it with the server's port and pid, and talks to it in lines of JSON: one command in, one result
out. The server's CPU time is read here, right before and after the messages, from the kernel's clock of its process.

Most connections only count whole frames. About 64 are looked into: their messages must come in order, none lost, none
doubled, and the time inside gives the latency.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import re
import resource
import select
import socket
import struct
import sys
import time
import zlib
from collections import deque
from typing import Any

from dialects import DIALECTS, Plain, Step

_STAMP = re.compile(rb"(\d{10}) (\d{20})")
_NEVER = 1 << 62
_SAMPLES = 64
_GOING_AWAY = b"\x88\x82\0\0\0\0\x03\xe9"  # a close frame with 1001
_LINGER_RESET = struct.pack("ii", 1, 0)


class LoadError(Exception):
    """The server did something that makes the run worthless."""


class Stalled(LoadError):
    """Nothing came any more."""


def cpu_ns(pid: int) -> int:
    """Return the CPU time a process has used, all its threads: what clock_getcpuclockid(3) names."""
    return time.clock_gettime_ns((~pid << 3) | 2)


class Connection:
    """One WebSocket of the load."""

    __slots__ = (
        "channel",
        "count",
        "head",
        "inflate",
        "is_loop",
        "is_sampled",
        "is_upgraded",
        "next",
        "receive",
        "socket",
        "steps",
        "tail",
    )

    def __init__(self, channel: str | None, is_loop: bool) -> None:
        self.channel = channel
        self.is_loop = is_loop
        self.is_sampled = False
        self.is_upgraded = False
        self.inflate: Any = None
        self.head = b""
        self.tail = b""
        self.count = 0
        self.next = 0
        self.steps: deque[Step] = deque()
        self.socket = socket.socket()
        self.receive = self.socket.recv_into

    def send(self, text: str) -> None:
        """Send one text frame; masked, as a client must, with a mask of zeros."""
        self.send_bytes(client_frame(text))

    def send_bytes(self, data: bytes) -> None:
        """Send all of it, waiting where the socket is full."""
        sent = 0
        while sent < len(data):
            try:
                sent += self.socket.send(data[sent:])
            except BlockingIOError:
                if not select.select([], [self.socket], [], 10)[1]:
                    raise Stalled("the server stopped reading") from None

    def reset(self) -> None:
        """Close by RST, which leaves no TIME_WAIT behind."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self.socket.close()


def client_frame(text: str) -> bytes:
    """Return a masked text frame (RFC 6455, 5.2)."""
    payload = text.encode()
    size = len(payload)
    if size < 126:
        return bytes((0x81, 0x80 | size, 0, 0, 0, 0)) + payload
    if size < 65536:
        return b"\x81\xfe" + size.to_bytes(2) + b"\0\0\0\0" + payload
    return b"\x81\xff" + size.to_bytes(8) + b"\0\0\0\0" + payload


class Payloads:
    """Messages of one size, each with its number and the time it was made.

    Many different bodies, so that no compressor's window still holds a message when it comes again.
    """

    def __init__(self, size: int) -> None:
        dice = random.Random(size)
        self._bodies = itertools.cycle([self._body(size, dice) for _ in range(max(8, min(1000, 1_000_000 // size)))])

    def make(self, number: int) -> str:
        """Return a message: JSON, of exactly the size."""
        return f'{{"id":"{number:010d} {time.perf_counter_ns():020d}"{next(self._bodies)}}}'

    @staticmethod
    def _body(size: int, dice: random.Random) -> str:
        room = size - len('{"id":"0123456789 01234567890123456789"}')
        parts = ""
        while len(parts) < room:
            symbol = "".join(dice.choices("ABCDEFGHKLMNPRSTX", k=3))
            price, volume = dice.randrange(1, 100_000) / 100, dice.randrange(10_000)
            parts += f',"{symbol}":{{"price":{price},"volume":{volume},"side":"{dice.choice(("buy", "sell"))}"}}'
        return parts[:room]


class Load:
    """All connections to one server, and what is done with them."""

    def __init__(self, port: int, pid: int, dialect: Plain, deflate: bool) -> None:
        self._port = port
        self._pid = pid
        self._dialect = dialect
        self._deflate = deflate
        self._connections: dict[int, Connection] = {}
        self._by_channel: dict[str | None, list[Connection]] = {}
        self._looper: Connection | None = None
        self._stalled: Connection | None = None
        self._numbers: dict[str | None, int] = {}
        self._epoll = select.epoll()
        self._buffer = bytearray(8 * 1024 * 1024)
        # The frame that connections only count, once it is known: its length and its first two bytes.
        self._frame = _NEVER
        self._frame_start = (0, 0)
        self._latencies: list[int] = []
        self._bytes = 0
        self._payloads: dict[int, Payloads] = {}

    # Commands.

    def connect(self, connections: int, channels: int = 0, loop: bool = False, stalled: bool = False) -> dict[str, Any]:
        """Open connections, spread over channels, and wait until a message reaches all of them."""
        names = [f"channel-{i % channels}" if channels else None for i in range(connections)]
        fresh = [Connection(name, is_loop=loop and i == 0) for i, name in enumerate(names)]
        if stalled:
            self._stalled = fresh[connections // 2]
            self._stalled.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        cpu, start, own = cpu_ns(self._pid), time.perf_counter(), time.process_time()
        negotiated = self._open(fresh)
        wall, own = time.perf_counter() - start, time.process_time() - own
        time.sleep(0.05)
        used = cpu_ns(self._pid) - cpu
        self._barrier()
        if self._stalled is not None:
            self._epoll.unregister(self._stalled.socket)
            self._by_channel[self._stalled.channel].remove(self._stalled)
        return {
            "deflate": negotiated,
            "per_second": connections / wall,
            "cpu_us": used / 1000 / connections,
            "client_load": own / wall,
        }

    def disconnect(self) -> dict[str, Any]:
        """Reset all connections."""
        for connection in self._connections.values():
            self._epoll.unregister(connection.socket)
            connection.reset()
        self._connections.clear()
        self._by_channel.clear()
        self._looper = None
        time.sleep(0.3)
        return {}

    def leave(self) -> dict[str, Any]:
        """Close all connections as a browser does: say so, and wait until the server has closed the socket."""
        for connection in self._connections.values():
            connection.send_bytes(_GOING_AWAY)
        waiting = dict(self._connections)
        while waiting:
            events = self._epoll.poll(15, 4096)
            if not events:
                raise Stalled(f"{len(waiting)} connections are not closed")
            for fd, _ in events:
                if self._has_ended(waiting[fd]):
                    self._epoll.unregister(fd)
                    waiting.pop(fd).socket.close()
        self._connections.clear()
        self._by_channel.clear()
        self._looper = None
        time.sleep(0.1)  # the server's tasks end after their sockets
        return {}

    def _has_ended(self, connection: Connection) -> bool:
        try:
            while connection.receive(self._buffer):
                pass
        except BlockingIOError:
            return False
        except ConnectionResetError:
            pass
        return True

    def run(
        self,
        size: int,
        in_flight: int = 1,
        loop: bool = False,
        channels: int = 0,
        seconds: float = 1.0,
        least: int = 3,
        most: int = 100_000,
        longest: float = 15.0,
        stall: float = 10.0,
    ) -> dict[str, Any]:
        """Broadcast `in_flight` messages, wait for all their deliveries, and again, until the time is over.

        Args:
            size: Bytes of a message.
            in_flight: Messages on their way at once.
            loop: Whether a loop in the server broadcasts them, from one frame that holds them all.
            channels: How many channels take turns; 0 for as many as there are.
            seconds: How long.
            least: Messages at least, whatever the time.
            most: Messages at most.
            longest: Seconds after which it ends, whatever is missing.
            stall: Seconds without a delivery after which the run has failed.
        """
        payloads = self._payloads_of(size)
        names = list(self._by_channel)[: channels or None]
        turns = itertools.cycle(names)
        sent = dict.fromkeys(names, 0)
        self._begin()
        time.sleep(0.05)
        messages = deliveries = 0
        cpu, start, own = cpu_ns(self._pid), time.perf_counter(), time.process_time()
        stopped = None
        while messages < most:
            took = time.perf_counter() - start
            if took > longest or (took > seconds and messages >= least):
                break
            name = next(turns)
            self._send(name, payloads, in_flight, loop)
            try:
                deliveries += self._collect(len(self._by_channel[name]) * in_flight, stall)
            except Stalled as error:
                stopped = str(error)
                break
            sent[name] += in_flight
            messages += in_flight
        wall, own = time.perf_counter() - start, time.process_time() - own
        time.sleep(0.05)
        used = cpu_ns(self._pid) - cpu
        if stopped is None:
            self._check(sent)
        latencies = sorted(self._latencies)
        return {
            "messages": messages,
            "deliveries": deliveries,
            "stopped": stopped,
            "cpu_us": used / 1000 / deliveries if deliveries else None,
            "p50_ms": percentile(latencies, 0.50),
            "p99_ms": percentile(latencies, 0.99),
            "max_ms": percentile(latencies, 1.0),
            "per_second": deliveries / wall,
            "server_load": used / 1e9 / wall,
            "client_load": own / wall,
            "bytes": self._bytes / deliveries if deliveries else None,
        }

    # Opening.

    def _open(self, fresh: list[Connection], window: int = 128) -> bool:
        waiting, epoll = deque(fresh), select.epoll()
        opening: dict[int, Connection] = {}
        negotiated = True
        step = max(1, len(fresh) // _SAMPLES)
        while waiting or opening:
            while waiting and len(opening) < window:
                connection = waiting.popleft()
                self._dial(connection)
                opening[connection.socket.fileno()] = connection
                epoll.register(connection.socket, select.EPOLLOUT)
            events = epoll.poll(15)
            if not events:
                raise Stalled(f"{len(opening)} connections don't open, {len(waiting)} wait")
            for fd, _ in events:
                connection = opening[fd]
                if not connection.head and not connection.is_upgraded:
                    self._ask(connection)
                    epoll.modify(fd, select.EPOLLIN)
                elif self._welcome(connection):
                    epoll.unregister(fd)
                    del opening[fd]
        for i, connection in enumerate(fresh):
            connection.is_sampled = i % step == 0
            negotiated = negotiated and connection.inflate is not None
            if not connection.is_sampled and not self._dialect.needs_payload:
                connection.inflate = None
            self._connections[connection.socket.fileno()] = connection
            self._by_channel.setdefault(connection.channel, []).append(connection)
            # Edge-triggered: one system call less for each read. What is read is always less than the buffer, so that
            # nothing is left which no edge would tell of.
            self._epoll.register(connection.socket, select.EPOLLIN | select.EPOLLET)
            if connection.is_loop:
                self._looper = connection
        return negotiated

    def _dial(self, connection: Connection) -> None:
        connection.socket.setblocking(False)
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.socket.connect_ex(("127.0.0.1", self._port))

    def _ask(self, connection: Connection) -> None:
        error = connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise LoadError(f"can't connect: {os.strerror(error)}")
        path = self._dialect.path(connection.channel, connection.is_loop)
        lines = [
            f"GET {path} HTTP/1.1",
            f"Host: 127.0.0.1:{self._port}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
            "Sec-WebSocket-Version: 13",
        ]
        if self._deflate:
            lines.append("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        connection.socket.send("\r\n".join([*lines, "", ""]).encode())
        connection.head = b"?"

    def _welcome(self, connection: Connection) -> bool:
        """Read what came while it opens; return whether it is open."""
        data = connection.socket.recv(65536)
        if not data:
            raise LoadError("the server closed a connection while it opened")
        if not connection.is_upgraded:
            connection.head += data
            head, end, data = connection.head.partition(b"\r\n\r\n")
            if not end:
                return False
            if not head.startswith(b"?HTTP/1.1 101"):
                raise LoadError(f"the server refused: {head[1:200].decode(errors='replace')}")
            connection.is_upgraded = True
            if b"permessage-deflate" in head.lower():
                connection.inflate = zlib.decompressobj(wbits=-15)
            connection.steps.extend(self._dialect.handshake(connection.channel))
        if data:
            for payload in self._frames(connection, data, look=True):
                if connection.steps and (expected := connection.steps[0].expect) and expected in payload:
                    self._step(connection)
        while connection.steps and connection.steps[0].expect is None:
            self._step(connection)
        return not connection.steps

    @staticmethod
    def _step(connection: Connection) -> None:
        step = connection.steps.popleft()
        if step.send is not None:
            connection.send(step.send)

    def _barrier(self) -> None:
        """Broadcast until one message has reached everybody: accepted and registered is not the same moment."""
        payloads = self._payloads_of(128)
        for _ in range(20):
            self._begin()
            missing = 0
            for chunk in itertools.batched(self._by_channel, 64) if sys.version_info >= (3, 12) else [self._by_channel]:
                for name in chunk:
                    self._send(name, payloads, 1, loop=False)
                try:
                    self._collect(sum(len(self._by_channel[name]) for name in chunk), stall=1.5)
                except Stalled:
                    missing += 1
            if not missing:
                return
        raise LoadError("some connections get no messages")

    # Messages.

    def _payloads_of(self, size: int) -> Payloads:
        if size not in self._payloads:
            self._payloads[size] = Payloads(size)
        return self._payloads[size]

    def _begin(self) -> None:
        self._frame = _NEVER
        self._latencies = []
        self._bytes = 0
        for connection in self._connections.values():
            connection.count = 0
            connection.next = -1

    def _send(self, channel: str | None, payloads: Payloads, in_flight: int, loop: bool) -> None:
        first = self._numbers.get(channel, 0)
        self._numbers[channel] = first + in_flight
        messages = [payloads.make(number) for number in range(first, first + in_flight)]
        if loop:
            assert self._looper is not None
            self._looper.send(json.dumps(messages))
            return
        # Not by the one that leads the loop, where there is one.
        members = self._by_channel[channel]
        sender = members[1] if members[0].is_loop else members[0]
        wrap = self._dialect.wrap
        sender.send_bytes(b"".join(client_frame(wrap(message, channel)) for message in messages))

    def _collect(self, wanted: int, stall: float) -> int:
        """Read until so many deliveries have come."""
        connections, buffer, poll = self._connections, self._buffer, self._epoll.poll
        got = 0
        while got < wanted:
            events = poll(stall, 4096)
            if not events:
                raise Stalled(f"{wanted - got} of {wanted} deliveries never came")
            size, (first, second) = self._frame, self._frame_start
            for fd, _ in events:
                connection = connections[fd]
                length = connection.receive(buffer)
                if (
                    length % size == 0
                    and not connection.is_sampled
                    and not connection.tail
                    and length
                    and buffer[0] == first
                    and buffer[1] == second
                ):
                    count = length // size
                    connection.count += count
                    got += count
                    self._bytes += length
                else:
                    got += self._look(connection, length)
        if got > wanted:
            raise LoadError(f"{got} deliveries instead of {wanted}")
        return got

    def _look(self, connection: Connection, length: int) -> int:
        """Read frames one by one; return how many were deliveries."""
        if not length:
            raise LoadError("the server closed a connection")
        if length == len(self._buffer):
            raise LoadError("more came at once than the buffer holds")
        self._bytes += length
        look = connection.is_sampled or self._dialect.needs_payload
        dialect, got = self._dialect, 0
        now = time.perf_counter_ns()
        for payload in self._frames(connection, bytes(self._buffer[:length]), look):
            if look:
                if not dialect.is_delivery(payload):
                    continue
                if dialect.needs_payload and (answer := dialect.answer(payload)) is not None:
                    connection.send(answer)
                if connection.is_sampled:
                    self._sample(connection, payload, now)
            got += 1
        connection.count += got
        return got

    def _sample(self, connection: Connection, payload: bytes, now: int) -> None:
        found = _STAMP.search(payload)
        if found is None:
            raise LoadError(f"not our message: {payload[:80]!r}")
        number = int(found[1])
        if connection.next not in (-1, number):
            raise LoadError(f"message {number} came where {connection.next} was due")
        connection.next = number + 1
        self._latencies.append(now - int(found[2]))

    def _frames(self, connection: Connection, data: bytes, look: bool) -> list[bytes]:
        """Return the payloads of the data frames that are complete; empty ones where nobody looks."""
        data = connection.tail + data if connection.tail else data
        at, end, payloads = 0, len(data), []
        while end - at >= 2:
            first, size, start = data[at], data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4]), at + 4
            elif size == 127:
                size, start = int.from_bytes(data[at + 2 : at + 10]), at + 10
            if end < start + size or end < start:
                break
            if first & 0x0F in (1, 2) and first & 0x80:
                payload = data[start : start + size] if look else b""
                if first & 0x40 and look:
                    if connection.inflate is None:
                        raise LoadError("a compressed frame on a connection without compression")
                    payload = connection.inflate.decompress(payload + b"\0\0\xff\xff")
                elif look and self._dialect.is_countable and not self._deflate:
                    self._frame, self._frame_start = start + size - at, (first, data[at + 1])
                payloads.append(payload)
            elif first & 0x0F == 8:
                code = int.from_bytes(data[start : start + 2])
                raise LoadError(f"the server closed a connection with {code}: {data[start + 2 : start + size]!r}")
            elif first & 0x0F not in (9, 10):
                raise LoadError(f"a frame that begins with {first:#x}")
            at = start + size
        connection.tail = data[at:]
        return payloads

    def _check(self, sent: dict[str | None, int]) -> None:
        for name, messages in sent.items():
            wrong = [c.count for c in self._by_channel[name] if c.count != messages]
            if wrong:
                raise LoadError(f"{len(wrong)} connections got another number of messages than {messages}: {wrong[:5]}")


def percentile(ordered: list[int], share: float) -> float | None:
    """Return a percentile of nanoseconds in milliseconds."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e6


def main() -> None:
    """Carry out commands from standard input until it ends."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    options = json.loads(sys.argv[1])
    load = Load(options["port"], options["pid"], DIALECTS[options["dialect"]], options["deflate"])
    methods = {"connect": load.connect, "run": load.run, "leave": load.leave, "disconnect": load.disconnect}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            result = methods[command.pop("do")](**command)
        except (LoadError, OSError) as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
