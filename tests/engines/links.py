"""What the tests of links share: an inlet that keeps what it takes, and a link in use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from wsbroadcast.engines import create_engine
from wsbroadcast.engines.broker import BrokerEngine, Link, Parcel
from wsbroadcast.engines.broker.link import Place


class Letters:
    """An inlet that keeps what it takes."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, bytes]] = []
        self.reasons: list[str] = []
        self._changed = asyncio.Event()

    def take(self, name: str, envelope: bytes, place: Place | None = None) -> None:
        self.taken.append((name, envelope))
        self._changed.set()

    def missed(self, why: str, since: float | None = None) -> None:
        self.reasons.append(why)

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


def new_link(where: str | BrokerEngine | Link) -> Link:
    """Make a link as an engine does."""
    engine = create_engine(where) if isinstance(where, str) else where
    if isinstance(engine, Link):
        return engine
    assert isinstance(engine, BrokerEngine)
    return engine.new_link()


@asynccontextmanager
async def used(where: str | BrokerEngine | Link, *names: str) -> AsyncIterator[Used]:
    """Open a link, read from it, and subscribe it to names."""
    link, letters = new_link(where), Letters()
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


async def open_once(where: str | BrokerEngine | Link) -> None:
    """Open a link, and let go of it."""
    link = new_link(where)
    try:
        async with asyncio.timeout(10):
            await link.open()
    finally:
        await link.abort()


async def failure(where: str | BrokerEngine | Link) -> Exception:
    """Return why a link can't be opened."""
    try:
        await open_once(where)
    except Exception as error:
        return error
    raise AssertionError("the link is open")
