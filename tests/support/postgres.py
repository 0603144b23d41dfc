"""A link to Postgres that is open and read, and a node whose engine is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Self

import asyncpg

from tests.support.servers import eventually
from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.link import Parcel, Place
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.postgres.link import PostgresLink
from wsbroadcast.engines.postgres.notifier import SpillTable
from wsbroadcast.engines.postgres.presence_tables import PresenceTables
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.engines.postgres.url import read_url
from wsbroadcast.history import Appended
from wsbroadcast.message import Message
from wsbroadcast.options import Timing
from wsbroadcast.publication import Publication
from wsbroadcast.testing import Recorder

NEWS = Audience("channel", "news")

Run = Callable[..., Awaitable[Any]]
"""Runs SQL in a session of somebody else, and returns the first value."""


class Pile:
    """An inlet that keeps what it gets."""

    def __init__(self) -> None:
        self.parcels: list[Parcel] = []
        self.misses: list[str] = []
        self.missed_since: list[float | None] = []

    def take(self, name: str, envelope: bytes, place: Place | None = None) -> None:
        self.parcels.append(Parcel(name, envelope))

    def missed(self, why: str, since: float | None = None) -> None:
        self.misses.append(why)
        self.missed_since.append(since)

    def of(self, name: str) -> list[bytes]:
        return [parcel.envelope for parcel in self.parcels if parcel.name == name]


class Life:
    """A link, a task that reads it, and what has arrived."""

    def __init__(self, link: PostgresLink, prefix: str) -> None:
        self.link = link
        self.prefix = prefix
        self.pile = Pile()
        self.reading = asyncio.create_task(link.read(self.pile), name="wsbroadcast test read")

    def name(self, channel: str) -> str:
        return f"{self.prefix}:channel:{channel}"

    async def publish(self, *parcels: tuple[str, bytes]) -> list[Exception | Appended | None]:
        """Publish envelopes to channels."""
        return list(await self.link.publish([Parcel(self.name(to), envelope) for to, envelope in parcels]))

    async def arrives(self, channel: str, *envelopes: bytes) -> None:
        """Wait for as many envelopes to a channel; they and no others must have come, in this order."""
        name = self.name(channel)
        with suppress(AssertionError):  # the next line says more
            await until(lambda: len(self.pile.of(name)) >= len(envelopes))
        assert self.pile.of(name) == list(envelopes)

    async def lost(self, timeout: float = 5.0) -> BaseException | None:
        """Wait until the link is lost, and return why."""
        await asyncio.wait([self.reading], timeout=timeout)
        assert self.reading.done(), "nobody noticed"
        return self.reading.exception()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""

    async def holds() -> bool:
        return condition()

    await eventually(holds)


async def drop_database(run: Run, name: str) -> None:
    """Drop a database as soon as the sessions are gone that were aborted."""

    async def is_dropped() -> bool:
        try:
            await run(f"DROP DATABASE {name}")
        except asyncpg.ObjectInUseError:
            return False
        return True

    await eventually(is_dropped)


@asynccontextmanager
async def holding(url: str, statement: str) -> AsyncIterator[None]:
    """A transaction of somebody else that holds locks."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute(statement)
            yield
    finally:
        await connection.close()


def new_link(url: str, prefix: str, schema: str = "public", **options: Any) -> PostgresLink:
    """Make a link as the engine does."""
    target = read_url(url, options)
    where = f"postgres at {target.address}"
    spill = SpillTable(prefix, schema)
    tables = spill, where, Timing(), HistoryTables(prefix, schema), PresenceTables(prefix, schema, spill)
    return PostgresLink(partial(target.connect, 0), prefix, *tables)


@asynccontextmanager
async def living(url: str, prefix: str, **options: Any) -> AsyncIterator[Life]:
    """A link from its opening to its abort."""
    link = new_link(url, prefix, **options)
    try:
        await link.open()
        life = Life(link, prefix)
        try:
            await asyncio.sleep(0)  # reading begins
            yield life
        finally:
            life.reading.cancel()
            await asyncio.wait([life.reading])
    finally:
        await link.abort()


class Node:
    """An engine that is started and has joined `NEWS`, and what has arrived."""

    def __init__(self, engine: PostgresEngine) -> None:
        self.engine = engine
        self.recorder = Recorder()

    async def __aenter__(self) -> Self:
        await self.engine.start(self.recorder)
        self.engine.subscribe([NEWS])
        await self.engine.confirmed([NEWS])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.aclose()

    async def publish(self, data: object) -> None:
        await self.engine.publish(Publication(Message.of(data), NEWS))

    async def publish_in(self, transaction: object, data: object) -> None:
        await self.engine.publish_in(transaction, Publication(Message.of(data), NEWS))

    async def receives(self, *expected: str | bytes) -> None:
        """Wait for as many messages; they and no others must have come, in this order."""
        with suppress(AssertionError):  # the next line says more
            await until(lambda: len(self.recorder.data(NEWS)) >= len(expected))
        assert self.recorder.data(NEWS) == list(expected)
