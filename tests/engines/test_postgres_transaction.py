"""Publishing inside a transaction of the app's own, with every driver it may have."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import asyncpg
import psycopg
import psycopg.rows
import pytest
import sqlalchemy
import sqlalchemy.ext.asyncio
import sqlalchemy.orm

from tests.support.asgi import Peer
from tests.support.brokers import Endpoint
from tests.support.postgres import NEWS, Node, holding, until
from tests.support.servers import eventually
from wsbroadcast import (
    Audience,
    ConnectionManager,
    EngineUnavailable,
    MessageTooLarge,
    Publication,
    Publisher,
    SlowConsumer,
)
from wsbroadcast.engines.broker.envelope import encode
from wsbroadcast.engines.contract import Transactional
from wsbroadcast.engines.postgres import PostgresEngine, Transaction
from wsbroadcast.engines.postgres.notifier import MAX_ENVELOPE_BYTES
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.message import Message
from wsbroadcast.options import Timing

LARGE = "x" * 20_000

Begin = Callable[[str], AbstractAsyncContextManager[Any]]
"""Opens a transaction that is committed at the end, and rolled back by an error."""


class Regret(Exception):
    """Why a transaction is rolled back."""


@asynccontextmanager
async def asyncpg_connection(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def asyncpg_pool(url: str) -> AsyncIterator[Any]:
    async with (
        asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
        pool.acquire() as connection,
        connection.transaction(),
    ):
        yield connection


@asynccontextmanager
async def psycopg_async(url: str) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(url, row_factory=psycopg.rows.dict_row) as connection:
        yield connection


@asynccontextmanager
async def psycopg_sync(url: str) -> AsyncIterator[Any]:
    with psycopg.connect(url) as connection:
        yield connection


def _engine(url: str, driver: str) -> sqlalchemy.ext.asyncio.AsyncEngine:
    return sqlalchemy.ext.asyncio.create_async_engine(url.replace("postgresql:", f"postgresql+{driver}:"))


def sqlalchemy_connection(driver: str) -> Begin:
    @asynccontextmanager
    async def begin(url: str) -> AsyncIterator[Any]:
        engine = _engine(url, driver)
        try:
            async with engine.begin() as connection:
                yield connection
        finally:
            await engine.dispose()

    return begin


def sqlalchemy_session(driver: str) -> Begin:
    @asynccontextmanager
    async def begin(url: str) -> AsyncIterator[Any]:
        engine = _engine(url, driver)
        try:
            async with sqlalchemy.ext.asyncio.async_sessionmaker(engine).begin() as session:
                yield session
        finally:
            await engine.dispose()

    return begin


@asynccontextmanager
async def sqlalchemy_sync(url: str) -> AsyncIterator[Any]:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


@asynccontextmanager
async def sqlalchemy_sync_session(url: str) -> AsyncIterator[Any]:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with sqlalchemy.orm.sessionmaker(engine).begin() as session:
            yield session
    finally:
        engine.dispose()


KINDS: dict[str, Begin] = {
    "asyncpg": asyncpg_connection,
    "asyncpg pool": asyncpg_pool,
    "psycopg async": psycopg_async,
    "psycopg": psycopg_sync,
    "AsyncConnection over asyncpg": sqlalchemy_connection("asyncpg"),
    "AsyncConnection over psycopg": sqlalchemy_connection("psycopg"),
    "AsyncSession over asyncpg": sqlalchemy_session("asyncpg"),
    "AsyncSession over psycopg": sqlalchemy_session("psycopg"),
    "Connection": sqlalchemy_sync,
    "Session": sqlalchemy_sync_session,
}


@pytest.fixture(params=list(KINDS))
def begin(request: pytest.FixtureRequest) -> Begin:
    return KINDS[request.param]


@pytest.fixture
async def node(postgres_server: Endpoint, prefix: str) -> AsyncIterator[Node]:
    async with Node(PostgresEngine(postgres_server.url, prefix=prefix)) as node:
        assert isinstance(node.engine, Transactional)
        yield node


async def test_commit_sends_and_rollback_does_not(postgres_server: Endpoint, node: Node, begin: Begin) -> None:
    url = postgres_server.url
    with suppress(Regret):
        async with begin(url) as transaction:
            await node.publish_in(transaction, "never")
            await node.publish_in(transaction, f"never {LARGE}")
            raise Regret
    messages: list[str | bytes] = ["one", "one", "Grüße ☕ %s :x {y} 'z'", b"\x00\xff", LARGE, "two"]
    async with begin(url) as transaction:
        for each in messages:
            await node.publish_in(transaction, each)
        await node.publish("before the commit")
    await node.receives("before the commit", *messages)


async def test_savepoint_that_is_rolled_back_sends_nothing(postgres_server: Endpoint, node: Node) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        await node.publish_in(connection, "outside")
        with suppress(Regret):
            async with connection.transaction():
                await node.publish_in(connection, "inside")
                await node.publish_in(connection, f"inside {LARGE}")
                raise Regret
    await node.publish("end")
    await node.receives("outside", "end")


async def test_app_sees_its_rows_and_the_message_together(postgres_server: Endpoint, node: Node, prefix: str) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        await connection.execute(f"CREATE TABLE {prefix}_orders (id int)")
        await connection.execute(f"INSERT INTO {prefix}_orders VALUES (7)")
        await node.publish_in(connection, {"order": 7})
    await node.receives('{"order":7}')


async def test_connection_without_a_transaction_sends_at_once(postgres_server: Endpoint, node: Node) -> None:
    async with await psycopg.AsyncConnection.connect(postgres_server.url, autocommit=True) as connection:
        await node.publish_in(connection, "now")
        await node.publish_in(connection, LARGE)
        await node.receives("now", LARGE)


async def test_open_transaction_holds_up_nobody_else(postgres_server: Endpoint, node: Node) -> None:
    async with asyncpg_connection(postgres_server.url) as first, asyncpg_connection(postgres_server.url) as second:
        await node.publish_in(first, f"1 {LARGE}")  # the table is made here
        await node.publish_in(second, f"2 {LARGE}")
        await node.publish(f"3 {LARGE}")
        await node.receives(f"3 {LARGE}")


async def test_rows_of_a_transaction_outlive_it(postgres_server: Endpoint, node: Node, prefix: str) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        await node.publish_in(connection, LARGE)
        query = f"SELECT expires > clock_timestamp() + interval '10 minutes' FROM {prefix}_spill"
        assert await connection.fetchval(query) is True
    await node.receives(LARGE)


async def test_rows_of_a_transaction_are_removed(
    postgres_server: Endpoint, node: Node, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
    nobody = Audience("channel", "nobody")
    async with asyncpg_connection(postgres_server.url) as connection:
        await node.engine.publish_in(connection, Publication(Message.of(LARGE), nobody))
        await node.publish("the clean-up with this one sees no row")
    connection = await asyncpg.connect(postgres_server.url)
    assert await connection.fetchval(f"SELECT count(*) FROM {prefix}_spill") == 1
    await connection.execute(f"UPDATE {prefix}_spill SET expires = clock_timestamp()")
    await node.publish("but the clean-up with this one")
    assert await connection.fetchval(f"SELECT count(*) FROM {prefix}_spill") == 0
    await connection.close()


async def test_row_of_a_transaction_is_expected_by_an_engine_that_does_not_hear_of_it(
    postgres_server: Endpoint, node: Node, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        await node.publish_in(connection, LARGE)  # so that there is a table
        engine = PostgresEngine(postgres_server.url, prefix=prefix)
        assert engine._table.begin_clean_up()
        engine._table.end_clean_up(is_behind=False, has_more=False)
        monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
        assert not engine._table.begin_clean_up()
        await engine.publish_in(connection, Publication(Message.of(LARGE), NEWS))
        assert engine._table.begin_clean_up()


async def test_transaction_in_another_database_is_refused(postgres_server: Endpoint, node: Node) -> None:
    async with asyncpg_connection(postgres_server.url.removesuffix("postgres") + "template1") as connection:
        with pytest.raises(ConfigurationError, match="is in the database 'template1', and nobody listens there"):
            await node.publish_in(connection, "lost")


@pytest.mark.parametrize("transaction", [object(), "BEGIN", 7, asyncpg, Transaction])
async def test_anything_else_is_refused(node: Node, transaction: object) -> None:
    with pytest.raises(
        ConfigurationError, match=r"an asyncpg\.Connection, a psycopg\.AsyncConnection or Connection, or"
    ):
        await node.publish_in(transaction, "x")


async def test_connection_of_sqlite_is_refused(node: Node) -> None:
    connection = sqlite3.connect(":memory:")
    with pytest.raises(ConfigurationError, match=r"not sqlite3\.Connection"):
        await node.publish_in(connection, "x")
    connection.close()
    engine = sqlalchemy.create_engine("sqlite://")
    with engine.connect() as through, pytest.raises(ConfigurationError, match="of Postgres, not of sqlite"):
        await node.publish_in(through, "x")
    engine.dispose()


async def test_error_of_the_driver_is_the_caller_s(postgres_server: Endpoint, node: Node) -> None:
    connection = await asyncpg.connect(postgres_server.url)
    await connection.close()
    with pytest.raises(asyncpg.InterfaceError):
        await node.publish_in(connection, "x")


async def test_message_that_is_too_large_is_refused(postgres_server: Endpoint, node: Node) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        overhead = len(encode(Publication(Message.of(""), NEWS), None))
        with pytest.raises(MessageTooLarge) as caught:
            await node.publish_in(connection, "x" * MAX_ENVELOPE_BYTES)
        assert caught.value.limit == MAX_ENVELOPE_BYTES - overhead
        await node.publish_in(connection, "still usable")
    await node.receives("still usable")


async def test_message_that_the_nodes_would_drop_is_refused_before_any_sql(
    postgres_server: Endpoint, prefix: str
) -> None:
    async with Node(PostgresEngine(postgres_server.url, prefix=prefix, max_message_bytes=1000)) as node:
        async with asyncpg_connection(postgres_server.url) as connection:
            await connection.execute("SAVEPOINT here")
            with suppress(asyncpg.PostgresError):
                await connection.execute("from now on every statement is refused")
            with pytest.raises(MessageTooLarge) as caught:
                await node.publish_in(connection, "x" * 1001)
            assert (caught.value.size, caught.value.limit) == (1001, 1000)
            await connection.execute("ROLLBACK TO SAVEPOINT here")
            await node.publish_in(connection, "x" * 1000)
        await node.receives("x" * 1000)


async def test_engine_that_is_not_started_makes_the_table(postgres_server: Endpoint, prefix: str) -> None:
    out_of_reach = PostgresEngine("postgresql://127.0.0.1:1/postgres", prefix=prefix)
    engine = PostgresEngine(postgres_server.url, prefix=prefix)
    async with asyncpg_connection(postgres_server.url) as connection:
        await out_of_reach.publish_in(connection, Publication(Message.of("Grüße"), NEWS))
        with pytest.raises(EngineUnavailable, match="out of reach, so the table"):
            await out_of_reach.publish_in(connection, Publication(Message.of(LARGE), NEWS))
        await engine.publish_in(connection, Publication(Message.of(LARGE), NEWS))
        await out_of_reach.publish_in(connection, Publication(Message.of(LARGE), NEWS))

        async def nothing_is_left_open() -> bool:
            query = "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE $1"
            return not await connection.fetchval(query, f"%{prefix}%")

        await eventually(nothing_is_left_open)


async def test_table_that_cannot_be_made_is_told(postgres_server: Endpoint, prefix: str) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        async with Node(PostgresEngine(postgres_server.url, prefix=prefix, schema="nowhere")) as node:
            with pytest.raises(ConfigurationError, match='schema "nowhere" does not exist'):
                await node.publish_in(connection, LARGE)
        engine = PostgresEngine(postgres_server.url, prefix=prefix, timing=Timing(request_timeout=0.2))
        lock = f"SELECT pg_advisory_xact_lock(hashtext('{engine._table.name}'))"
        async with Node(engine) as node, holding(postgres_server.url, lock):
            with pytest.raises(EngineUnavailable, match="out of reach"):
                await node.publish_in(connection, LARGE)
        assert await connection.fetchval("SELECT 1") == 1


async def test_manager_broadcasts_in_a_transaction(postgres_server: Endpoint, prefix: str) -> None:
    async with ConnectionManager(f"{postgres_server.url}?prefix={prefix}") as manager:
        peer = Peer()
        await manager.connect(peer.websocket, channels=["news"])
        async with asyncpg_connection(postgres_server.url) as connection:
            await manager.broadcast("committed", channel="news", transaction=connection)
            await manager.broadcast("at once", channel="news")
            assert await peer.wait_messages(1) == ["at once"]
        assert await peer.wait_messages(2) == ["at once", "committed"]


@pytest.mark.parametrize("channels", [["news"], ["news", "sport"]])
async def test_broadcast_in_a_transaction_does_not_wait_for_slow_clients(
    postgres_server: Endpoint, prefix: str, channels: list[str]
) -> None:
    """Meanwhile the transaction would hold the locks of its rows, for as long as a client stands still."""
    slow = SlowConsumer(max_backlog_bytes=80_000, send_timeout=60.0)
    async with ConnectionManager(f"{postgres_server.url}?prefix={prefix}", slow_consumer=slow) as manager:
        peer = Peer()
        await manager.connect(peer.websocket, channels=["news"])
        peer.stall()
        for _ in range(2):  # one that the server holds, and one that waits
            await manager.broadcast("x" * 20_000, channel="news")
        await until(lambda: manager.stats().behind == 1)
        async with asyncpg_connection(postgres_server.url) as connection:
            async with asyncio.timeout(8):  # others wait for 15 s
                await manager.broadcast("committed", channels=channels, transaction=connection)
        peer.resume()
        assert (await peer.wait_messages(3))[2] == "committed"


def test_publisher_makes_the_table_in_its_own_thread(postgres_server: Endpoint, prefix: str) -> None:
    """A transaction belongs to the event loop of the app, the connection that makes the table to the publisher's."""
    with Publisher(f"{postgres_server.url}?prefix={prefix}") as publisher:

        async def use() -> None:
            async with asyncpg_connection(postgres_server.url) as connection:
                await publisher.broadcast(LARGE, channel="news", transaction=connection)
                assert await connection.fetchval(f"SELECT count(*) FROM {prefix}_spill") == 1

        asyncio.run(use())
        publisher.broadcast_threadsafe(LARGE, channel="news")


async def test_publisher_s_message_goes_out_with_the_commit(postgres_server: Endpoint, prefix: str) -> None:
    url = f"{postgres_server.url}?prefix={prefix}"
    peer = Peer()
    async with ConnectionManager(url) as manager, Publisher(url) as publisher:
        await manager.connect(peer.websocket, channels=["news"])
        with suppress(Regret):
            async with asyncpg_connection(postgres_server.url) as connection:
                await publisher.broadcast("rolled back", channel="news", transaction=connection)
                raise Regret
        async with asyncpg_connection(postgres_server.url) as connection:
            await publisher.broadcast("committed", channel="news", transaction=connection)
            await manager.broadcast("before", channel="news")
        assert await peer.wait_messages(2) == ["before", "committed"]
