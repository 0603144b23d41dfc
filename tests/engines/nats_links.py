"""What the tests of NATS links share: an inlet that keeps, a link in use, and a server that is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from wsbroadcast.engines.broker.link import Link, Parcel
from wsbroadcast.engines.nats import NATSEngine

INFO = b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}\r\n'

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Letters:
    """An inlet that keeps what it takes."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self._changed = asyncio.Event()

    def take(self, name: str, envelope: bytes) -> None:
        self.taken.append((name, envelope))
        self._changed.set()

    def missed(self, why: str, since: float | None = None) -> None:
        raise AssertionError(f"a NATS link misses nothing: {why}")

    async def until(self, envelope: bytes) -> list[tuple[str, bytes]]:
        """Wait for an envelope; return all that has come."""
        async with asyncio.timeout(10):
            while not self.taken or self.taken[-1][1] != envelope:
                self._changed.clear()
                await self._changed.wait()
        return self.taken


class Used(NamedTuple):
    """A link in use."""

    link: Link
    letters: Letters
    reading: asyncio.Task[None]

    async def lost(self) -> Exception:
        """Wait until `read` has raised."""
        await asyncio.wait([self.reading], timeout=10)
        error = self.reading.exception()
        assert isinstance(error, Exception)
        return error

    async def publish(self, name: str, *envelopes: bytes) -> None:
        """Publish, and expect that all are taken."""
        async with asyncio.timeout(10):
            assert await self.link.publish([Parcel(name, each) for each in envelopes]) == [None] * len(envelopes)


@asynccontextmanager
async def used(engine: NATSEngine | str, *names: str) -> AsyncIterator[Used]:
    """Open a link, read from it, and subscribe it to names."""
    link = (NATSEngine(engine) if isinstance(engine, str) else engine).new_link()
    letters = Letters()
    try:
        async with asyncio.timeout(10):
            await link.open()
        reading = asyncio.create_task(link.read(letters), name="wsbroadcast test read")
        try:
            if names:
                await link.subscribe(names)
            yield Used(link, letters, reading)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
    finally:
        await link.abort()


async def failure(engine: NATSEngine | str) -> Exception:
    """Return why a link can't be opened."""
    link = (NATSEngine(engine) if isinstance(engine, str) else engine).new_link()
    try:
        async with asyncio.timeout(10):
            await link.open()
    except Exception as error:
        return error
    finally:
        await link.abort()
    raise AssertionError("the link is open")


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[str]:
    """Run a server that does what it is told with each connection and then closes it; yield its URL."""
    tasks = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # the link's side is gone, or the test is over
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.sleep(0)


async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Do what a server does until a client is in."""
    writer.write(INFO)
    await reader.readuntil(b"PING\r\n")
    writer.write(b"PONG\r\n")
