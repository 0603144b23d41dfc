"""What a `FaultProxy` forwards with: the two connections of a client, and what befalls their bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import dataclass, field, replace

from tests.support.brokers import Endpoint

# How much is held in each direction of a connection, beside the buffers of the kernel: a sender feels it when the other
# side doesn't read.
_CHUNK_BYTES = 16 * 1024
_CHUNKS = 16


@dataclass
class Fate:
    """What befalls the bytes that go one way."""

    swallows: bool = False
    limit: int | None = None
    """How many bytes pass until it is cut."""


@dataclass
class Fates:
    """What befalls the bytes of a connection."""

    requests: Fate = field(default_factory=Fate)
    replies: Fate = field(default_factory=Fate)

    def copy(self) -> Fates:
        return Fates(replace(self.requests), replace(self.replies))


@dataclass
class Faults:
    """What befalls all connections, and with what fates a new one begins."""

    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    delay: float = 0.0
    fates: Fates = field(default_factory=Fates)

    def __post_init__(self) -> None:
        self.flowing.set()


class Pipe:
    """One client's connection, and the one to the endpoint that belongs to it."""

    def __init__(self, endpoint: Endpoint, faults: Faults, client: socket.socket) -> None:
        self.fates = faults.fates.copy()
        self._endpoint = endpoint
        self._faults = faults
        self._socket = client
        self._writers: list[asyncio.StreamWriter] = []
        self._client: asyncio.StreamReader | None = None
        self.task = asyncio.create_task(self._forward())
        # Also if it is cancelled before it has begun.
        self.task.add_done_callback(self._end)

    @property
    def client_is_gone(self) -> bool:
        return self._client is not None and (self._client.at_eof() or self._client.exception() is not None)

    async def _forward(self) -> None:
        """Forward until both sides have closed.

        Raises:
            OSError: If one side was reset, or it is cut, or the endpoint can't be reached.
        """
        self._client, client = await asyncio.open_connection(sock=self._socket, limit=_CHUNK_BYTES)
        self._writers.append(client)
        while self.fates.requests.swallows:  # the endpoint doesn't hear of a connection that nothing comes through
            if not await self._client.read(_CHUNK_BYTES):
                await asyncio.Event().wait()
        reader, writer = await asyncio.open_connection(self._endpoint.host, self._endpoint.port, limit=_CHUNK_BYTES)
        self._writers.append(writer)
        requests = Flow(self._faults, self.fates.requests, self._client, writer)
        replies = Flow(self._faults, self.fates.replies, reader, client)
        try:
            async with asyncio.TaskGroup() as group:
                for flow in (requests, replies):
                    group.create_task(flow.take())
                    group.create_task(flow.give())
        except* OSError as errors:
            raise ConnectionResetError from errors

    def _end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self._reset()
        for writer in self._writers:
            writer.close()
        if not self._writers:
            self._socket.close()
        if error is not None and not isinstance(error, OSError):
            raise error

    def _reset(self) -> None:
        """Close both connections with a reset; what is in their buffers is thrown away."""
        for writer in self._writers:
            sock = writer.get_extra_info("socket")
            if sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Flow:
    """One direction of a connection."""

    def __init__(self, faults: Faults, fate: Fate, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._faults = faults
        self._fate = fate
        self._reader = reader
        self._writer = writer
        self._loop = asyncio.get_running_loop()
        # When to deliver what; no bytes are the end.
        self._held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_CHUNKS)
        writer.transport.set_write_buffer_limits(0)  # `drain` returns when the kernel has it all

    async def take(self) -> None:
        data = b"-"
        while data:
            try:
                data = await self._reader.read(_CHUNK_BYTES)
            except OSError:
                if self._fate.swallows:
                    return
                raise
            await self._held.put((self._loop.time() + self._faults.delay, data))

    async def give(self) -> None:
        while True:
            due, data = await self._held.get()
            await asyncio.sleep(due - self._loop.time())
            await self._faults.flowing.wait()
            if self._fate.swallows:
                continue
            if not data:
                self._writer.write_eof()
                return
            await self._write(data)

    async def _write(self, data: bytes) -> None:
        if self._fate.limit is not None:
            data = data[: self._fate.limit]
            self._fate.limit -= len(data)
        is_cut = self._fate.limit == 0
        self._writer.write(data)
        await self._writer.drain()
        if is_cut:
            raise ConnectionResetError
