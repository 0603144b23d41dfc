"""What Postgres keeps: transactions, crashes, roles, and tables that don't grow."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from typing import Any, Self

import asyncpg
import pytest

from tests.engines.test_postgres_link import wait_blocked
from tests.engines.test_postgres_transaction import KINDS, Begin, Regret, asyncpg_connection
from tests.support.asgi import turns
from tests.support.brokers import Endpoint, PostgresServer
from tests.support.postgres import Node, Run, drop_database, holding, until
from tests.support.servers import eventually
from wsbroadcast import Audience, ConnectionManager, EngineUnavailable, Publication, Publisher
from wsbroadcast.engines.broker.link import Keep, KeptParcel, Parcel
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.postgres.link import _SETTINGS
from wsbroadcast.engines.postgres.notifier import NOTIFY_ONE, SpillTable
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.message import Message
from wsbroadcast.options import Timing
from wsbroadcast.publication import Position

Own = Callable[..., PostgresServer]

KEPT = History(messages=50, seconds=60)
RULES = HistoryRules({"*": KEPT})
LARGE = "x" * 20_000

NEWS, SPORT, PRICES = CHANNELS = [Audience("channel", name) for name in ("news", "sport", "prices")]


class Keeping(Node):
    """A node that keeps what is broadcast to channels, and has joined three of them."""

    def __init__(self, engine: PostgresEngine, rules: HistoryRules | None = RULES) -> None:
        super().__init__(engine)
        engine.keep(rules, only_publishes=rules is None)  # then it learns them

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.engine.subscribe(CHANNELS)
        await self.engine.confirmed(CHANNELS)
        return self

    async def append(
        self, data: object, audience: Audience = NEWS, history: History = KEPT, key: str | None = None
    ) -> Appended:
        return await self.engine.append(Publication(Message.of(data), audience), history, key)

    async def append_in(self, transaction: object, data: object, audience: Audience = NEWS) -> None:
        await self.engine.publish_in(transaction, Publication(Message.of(data), audience), KEPT)

    async def read(self, since: Position | None = None, audience: Audience = NEWS, history: History = KEPT) -> Replay:
        return await self.engine.read(audience, since, history)

    async def texts(self, since: Position | None = None, audience: Audience = NEWS) -> list[str | bytes]:
        return [each.message.data for each in (await self.read(since, audience)).publications]

    async def position(self, audience: Audience = NEWS) -> Position:
        (position,) = await self.engine.positions([audience], [KEPT])
        return position

    async def came(self, count: int, audience: Audience = NEWS) -> list[Publication]:
        """Wait for as many publications; they and no others must have come."""

        def found() -> list[Publication]:
            return [each for each in self.recorder.publications if each.audience == audience]

        with suppress(AssertionError):
            await until(lambda: len(found()) >= count)
        assert len(found()) == count
        return found()

    async def link_is_lost_and_back(self, before: object) -> None:
        await until(lambda: self.engine.link is not None and self.engine.link is not before)


@asynccontextmanager
async def keeping(url: str, prefix: str, rules: HistoryRules | None = RULES, **options: Any) -> AsyncIterator[Keeping]:
    async with Keeping(PostgresEngine(url, prefix=prefix, **options), rules) as node:
        yield node


@pytest.fixture
async def node(postgres_server: Endpoint, prefix: str) -> AsyncIterator[Keeping]:
    async with keeping(postgres_server.url, prefix) as node:
        yield node


@pytest.fixture
async def run(postgres_server: Endpoint) -> AsyncIterator[Run]:
    """Run SQL in a session of somebody else."""
    connection = await asyncpg.connect(postgres_server.url)
    try:
        yield connection.fetchval
    finally:
        await connection.close()


# In a transaction of the app's own.


@pytest.mark.parametrize("kind", list(KINDS))
async def test_commit_keeps_and_rollback_leaves_no_hole(postgres_server: Endpoint, node: Keeping, kind: str) -> None:
    begin: Begin = KINDS[kind]
    before = await node.append("before")
    with suppress(Regret):
        async with begin(postgres_server.url) as transaction:
            await node.append_in(transaction, "never")
            await node.append_in(transaction, LARGE)
            raise Regret
    messages: list[str | bytes] = ["one", "one", "Grüße ☕ %s :x {y} 'z'", b"\x00\xff", "a\0b", LARGE, "two"]
    async with begin(postgres_server.url) as transaction:
        for each in messages:
            await node.append_in(transaction, each)
        assert await node.position() == before.position
    after = await node.append("after")
    assert after.position == Position(before.position.epoch, len(messages) + 2)
    came = await node.came(len(messages) + 2)
    assert [each.message.data for each in came] == ["before", *messages, "after"]
    assert [each.offset for each in came] == list(range(1, len(messages) + 3))
    assert await node.texts(before.position) == [*messages, "after"]
    assert (await node.read(before.position)).is_complete(before.position)


@pytest.mark.parametrize("kind", list(KINDS))
async def test_publisher_in_a_transaction_keeps_what_the_nodes_keep(
    postgres_server: Endpoint, prefix: str, run: Run, kind: str
) -> None:
    begin: Begin = KINDS[kind]
    user = Audience("user", "ada")  # of whom nothing is kept
    early = Publisher(PostgresEngine(postgres_server.url, prefix=prefix))
    async with early, begin(postgres_server.url) as transaction:
        await early.broadcast("before anybody keeps", channel="news", transaction=transaction)
    publisher = Publisher(PostgresEngine(postgres_server.url, prefix=prefix))
    async with keeping(postgres_server.url, prefix) as node:
        await node.append("first")
        async with begin(postgres_server.url) as transaction:
            for each in "second", LARGE:
                await publisher.broadcast(each, to=[NEWS, user], transaction=transaction)
        assert [each.message.data for each in (await node.came(3))] == ["first", "second", LARGE]
        assert await node.texts(Position((await node.position()).epoch, 0)) == ["first", "second", LARGE]
    await publisher.aclose()


async def test_publisher_whose_transaction_may_not_read_what_is_kept_is_told_what_to_run(
    postgres_server: Endpoint, prefix: str, role: str
) -> None:
    publisher = Publisher(PostgresEngine(role, prefix=prefix))
    administrator = postgres_server.url.rpartition("/")[0] + "/" + role.rpartition("/")[2]
    async with keeping(administrator, prefix) as node, asyncpg_connection(role) as transaction:
        with pytest.raises(ConfigurationError, match="GRANT USAGE ON SCHEMA"):
            await publisher.broadcast("kept?", channel="news", transaction=transaction)
        assert await transaction.fetchval("SELECT 1") == 1, "the transaction goes on"
        assert await node.texts(None) == []
    await publisher.aclose()


async def test_open_transaction_delays_nobody(postgres_server: Endpoint, node: Keeping) -> None:
    async with asyncpg_connection(postgres_server.url) as first, asyncpg_connection(postgres_server.url) as second:
        await node.append_in(first, "in the first")
        await node.append_in(second, "in the second", SPORT)
        async with asyncio.timeout(1):
            await node.append("at once")
            await node.append("at once", SPORT)
            assert [each.message.data for each in await node.came(1)] == ["at once"]
            assert await node.texts() == ["at once"]
    assert [each.message.data for each in await node.came(2)] == ["at once", "in the first"]
    assert [each.offset for each in await node.came(2)] == [1, 2]


async def test_savepoint_that_is_rolled_back_leaves_no_hole(postgres_server: Endpoint, node: Keeping) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        await node.append_in(connection, "outside")
        with suppress(Regret):
            async with connection.transaction():
                await node.append_in(connection, "inside")
                raise Regret
        async with connection.transaction():
            await node.append_in(connection, "released")
    assert [(each.message.data, each.offset) for each in await node.came(2)] == [("outside", 1), ("released", 2)]


async def test_transactions_in_any_order_never_deadlock(postgres_server: Endpoint, prefix: str) -> None:
    """Transactions of three channels in random order, some rolled back, beside batches of two nodes."""
    chance = random.Random(5)
    kept: dict[Audience, int] = dict.fromkeys(CHANNELS, 0)

    async def transact(node: Keeping, connection: Any) -> None:
        for _ in range(40):
            audiences = chance.sample(CHANNELS, 3)
            with suppress(Regret):
                async with connection.transaction():
                    for audience in audiences:
                        await node.append_in(connection, "in a transaction", audience)
                    if chance.random() < 0.1:
                        raise Regret
                for audience in audiences:
                    kept[audience] += 1

    async def append(node: Keeping) -> None:
        for _ in range(40):
            audiences = chance.sample(CHANNELS, 3)
            await asyncio.gather(*(node.append("by a node", audience) for audience in audiences))
            for audience in audiences:
                kept[audience] += 1

    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(keeping(postgres_server.url, prefix)) for _ in range(2)]
        connections = [await asyncpg.connect(postgres_server.url) for _ in range(4)]
        for connection in connections:
            stack.push_async_callback(connection.close)
        await asyncio.gather(
            *(transact(nodes[0], connection) for connection in connections), *(append(node) for node in nodes)
        )
        for audience in CHANNELS:
            for node in nodes:
                came = await node.came(kept[audience], audience)
                assert [each.offset for each in came] == list(range(1, kept[audience] + 1))


async def test_offset_is_not_visible_before_the_one_before_it(postgres_server: Endpoint, node: Keeping) -> None:
    """A transaction that has taken its offset, and isn't committed, holds the next ones up; readers see neither."""
    first = await node.append("1")
    async with asyncpg_connection(postgres_server.url) as connection:
        await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        await node.append_in(connection, "2")
        appending = asyncio.create_task(node.append("3"))
        await eventually(lambda: _somebody_waits(connection))
        assert (await node.position(), await node.texts()) == (first.position, ["1"])
    assert (await appending).position.offset == 3
    assert [(each.message.data, each.offset) for each in await node.came(3)] == [("1", 1), ("2", 2), ("3", 3)]


async def _somebody_waits(connection: Any) -> bool:
    query = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND transactionid IS NOT NULL)"
    return bool(await connection.fetchval(query))


async def test_lock_of_somebody_else_refuses_and_does_not_cost_the_link(postgres_server: Endpoint, prefix: str) -> None:
    async with keeping(postgres_server.url, prefix, timing=Timing(request_timeout=0.4)) as node:
        link = node.engine.link
        async with asyncpg_connection(postgres_server.url) as connection:
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            await node.append_in(connection, "held")
            with pytest.raises(EngineUnavailable, match="lock timeout; nothing was sent") as caught:
                await node.append("waits")
            assert not caught.value.may_have_been_sent
            await node.append("another", SPORT)
        assert (await node.append("after")).position.offset == 2
        assert node.engine.link is link


async def test_snapshot_that_is_too_old_fails_the_commit_and_leaves_no_hole(
    postgres_server: Endpoint, node: Keeping
) -> None:
    connection = await asyncpg.connect(postgres_server.url)
    await node.append("1")
    transaction = connection.transaction(isolation="repeatable_read")
    await transaction.start()
    await node.append_in(connection, "in the old snapshot")
    await node.append("2")
    with pytest.raises(asyncpg.SerializationError):
        await transaction.commit()
    async with connection.transaction(isolation="serializable"):
        await node.append_in(connection, "3")
    await connection.close()
    assert [(each.message.data, each.offset) for each in await node.came(3)] == [("1", 1), ("2", 2), ("3", 3)]


async def test_outbox_is_empty_after_the_commit(postgres_server: Endpoint, node: Keeping, run: Run) -> None:
    async with asyncpg_connection(postgres_server.url) as connection:
        for number in range(10):
            await node.append_in(connection, str(number))
    assert await run(f"SELECT count(*) FROM {node.engine._prefix}_history_outbox") == 0


async def test_any_program_can_append_by_the_outbox(node: Keeping, run: Run) -> None:
    insert = f"INSERT INTO {node.engine._prefix}_history_outbox (name, body) VALUES ($1, $2)"
    await run(insert, node.engine.names.of(NEWS), '{"v":1}\nhello')
    (publication,) = await node.came(1)
    assert (publication.message.data, publication.offset) == ("hello", 1)
    assert await node.texts() == ["hello"]


async def test_transaction_needs_the_tables(postgres_server: Endpoint, prefix: str) -> None:
    engine, publication = PostgresEngine(postgres_server.url, prefix=prefix), Publication(Message.of("kept"), NEWS)
    async with asyncpg_connection(postgres_server.url) as connection:
        with pytest.raises(EngineUnavailable, match="tables of the history aren't there yet"):
            await engine.publish_in(connection, publication, KEPT)
        assert await connection.fetchval("SELECT 1") == 1  # the transaction is as usable as before
    async with keeping(postgres_server.url, prefix) as node:
        async with asyncpg_connection(postgres_server.url) as connection:
            await engine.publish_in(connection, publication, KEPT)  # by one that isn't started
        assert await node.texts() == ["kept"]


async def test_transaction_in_another_database_is_refused(postgres_server: Endpoint, node: Keeping, run: Run) -> None:
    prefix = node.engine._prefix
    other = postgres_server.url.removesuffix("postgres") + prefix
    await run(f"CREATE DATABASE {prefix}")
    async with keeping(other, prefix):
        pass
    async with asyncpg_connection(other) as connection:
        with pytest.raises(ConfigurationError, match="and nobody listens there"):
            await node.append_in(connection, "lost")
    await drop_database(run, prefix)


async def test_manager_keeps_what_it_broadcasts_in_a_transaction(postgres_server: Endpoint, prefix: str) -> None:
    async with ConnectionManager(f"{postgres_server.url}?prefix={prefix}", history=KEPT) as manager:
        async with asyncpg_connection(postgres_server.url) as connection:
            await manager.broadcast("committed", channel="news", transaction=connection)
            await manager.broadcast("at once", channel="news")
        page = await manager.history("news")
        assert [each.data for each in page.messages] == ["at once", "committed"]


# What outlives what.


async def test_crash_of_the_server_begins_new_histories(own_postgres: Own, prefix: str) -> None:
    """One backend that is killed takes all down, and what is unlogged is empty: nothing of before is believed."""
    server = own_postgres()
    async with keeping(server.url, prefix) as node:
        before = [await node.append("lost", audience) for audience in CHANNELS for _ in range(3)]
        link = node.engine._postgres_link
        assert link is not None
        os.kill(link._notifier._connection.get_server_pid(), signal.SIGKILL)
        await node.link_is_lost_and_back(link)
        for audience, (appended, *_) in zip(CHANNELS, (before[:3], before[3:6], before[6:]), strict=True):
            replay = await node.read(appended.position, audience)
            assert (replay.top.offset, list(replay.publications)) == (0, [])
            assert replay.top.epoch != appended.position.epoch
            assert not replay.is_complete(appended.position)
        assert (await node.append("new")).position.offset == 1
    async with keeping(server.url, prefix, rules=None) as publisher:
        assert publisher.engine.rules == RULES


async def test_restart_of_the_server_keeps_all(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    async with keeping(server.url, prefix) as node:
        since = (await node.append("1")).position
        await node.append(LARGE)
        await node.append("key", key="k")
        link = node.engine.link
        await server.stopped()
        await server.started()
        await node.link_is_lost_and_back(link)
        assert await node.texts(since) == [LARGE, "key"]
        assert (await node.read(since)).is_complete(since)
        assert await node.append("again", key="k") == Appended(Position(since.epoch, 3), is_repeat=True)


async def test_counters_that_were_set_back_are_renewed(postgres_server: Endpoint, prefix: str, run: Run) -> None:
    """A dump that is restored has the offsets of another day, and the files of none."""
    async with keeping(postgres_server.url, prefix) as node:
        before = (await node.append("before the dump")).position
    await run(f"UPDATE {prefix}_history_rules SET generation = 7")
    async with keeping(postgres_server.url, prefix, rules=None) as node:
        assert (await node.position()).epoch != before.epoch
        assert await node.texts() == []
        now = (await node.append("now")).position
    async with keeping(postgres_server.url, prefix) as node:
        assert await node.position() == now


async def test_tables_that_are_gone_are_made_anew(node: Keeping, run: Run) -> None:
    link, before = node.engine.link, (await node.append("before")).position
    await run(f"DROP TABLE {node.engine._prefix}_history_counters")
    with pytest.raises(EngineUnavailable, match="history_counters"):
        await node.append("lost")
    await node.link_is_lost_and_back(link)
    after = (await node.append("after")).position
    assert after.offset == 1
    assert after.epoch != before.epoch
    assert await node.texts() == ["after"]


# Who may, and who knows.


@pytest.fixture
async def role(postgres_server: Endpoint, prefix: str, run: Run) -> AsyncIterator[str]:
    """A role of its own in a database of its own where it may not make anything; the URL."""
    await run(f"CREATE DATABASE {prefix}")
    await run(f'CREATE ROLE "{prefix}" LOGIN')
    admin = await asyncpg.connect(postgres_server.url.removesuffix("postgres") + prefix)
    await admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    await admin.close()
    host = f"{postgres_server.host}:{postgres_server.port}"
    yield f"postgres://{prefix}@{host}/{prefix}"
    await drop_database(run, prefix)
    await run(f'DROP ROLE "{prefix}"')


def sql_of(error: pytest.ExceptionInfo[ConfigurationError]) -> str:
    return str(error.value).partition("an administrator has to run: ")[2]


async def test_role_that_may_not_create_is_told_what_to_run(postgres_server: Endpoint, prefix: str, role: str) -> None:
    with pytest.raises(ConfigurationError, match="permission denied for schema public") as caught:
        async with keeping(role, prefix):
            pass
    assert sql_of(caught) == f'GRANT USAGE, CREATE ON SCHEMA "public" TO {prefix}'
    async with keeping(role, prefix, rules=None) as node:  # who keeps nothing needs none of it
        assert node.engine.rules is None
        await node.publish("unkept")
    admin = await asyncpg.connect(postgres_server.url.removesuffix("postgres") + prefix)
    await admin.execute(sql_of(caught))
    async with keeping(role, prefix) as node:
        assert (await node.append("kept")).position.offset == 1
        await admin.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    async with keeping(role, prefix) as node:  # which was needed once
        assert (await node.append("kept")).position.offset == 2
    await admin.close()


async def test_role_that_may_not_use_the_tables_of_another_is_told_what_to_run(
    postgres_server: Endpoint, prefix: str, role: str
) -> None:
    admin = await asyncpg.connect(postgres_server.url.removesuffix("postgres") + prefix)
    await admin.execute(PostgresEngine(prefix=prefix).history_sql)
    for rules in (RULES, None):
        with pytest.raises(ConfigurationError) as caught:
            async with keeping(role, prefix, rules=rules):
                pass
        assert sql_of(caught).startswith(f'GRANT USAGE ON SCHEMA "public" TO {prefix}; GRANT SELECT, INSERT, UPDATE')
    await admin.execute(f"GRANT SELECT, INSERT, UPDATE ON {prefix}_history_rules TO {prefix}")
    with pytest.raises(ConfigurationError, match="may not use its tables"):
        async with keeping(role, prefix, rules=None):
            pass
    await admin.execute(sql_of(caught))
    await admin.close()
    async with keeping(role, prefix) as node, asyncpg_connection(role) as connection:
        await node.append("kept")
        await node.append(LARGE, key="k")
        await node.append_in(connection, "in a transaction")
        await node.engine.forget(NEWS)
        assert await node.texts() == []


async def test_schema_that_is_not_there_is_told(postgres_server: Endpoint, prefix: str) -> None:
    with pytest.raises(ConfigurationError, match='schema "nowhere" does not exist') as caught:
        async with keeping(postgres_server.url, prefix, schema="nowhere"):
            pass
    assert sql_of(caught).startswith('CREATE SCHEMA IF NOT EXISTS "nowhere"; GRANT USAGE, CREATE ON SCHEMA "nowhere"')


async def test_old_server_is_refused(postgres_server: Endpoint, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.history.OLDEST_VERSION", 99)
    with pytest.raises(ConfigurationError, match=r"is PostgreSQL \d+, and history needs 99 or later"):
        async with keeping(postgres_server.url, prefix):
            pass


async def test_tables_are_made_by_several_at_once(postgres_server: Endpoint, prefix: str) -> None:
    async with AsyncExitStack() as stack:
        nodes = [stack.enter_async_context(keeping(postgres_server.url, prefix)) for _ in range(4)]
        found = await asyncio.gather(*(node.append("hello") for node in await asyncio.gather(*nodes)))
        assert sorted(each.position.offset for each in found) == [1, 2, 3, 4]


async def test_other_rules_are_told_once(
    postgres_server: Endpoint, prefix: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    others = HistoryRules({"news": History(messages=7)})
    caplog.set_level(logging.WARNING)

    def warnings() -> Sequence[str]:
        return [text for text in caplog.messages if "keeps other histories" in text]

    async with keeping(postgres_server.url, prefix) as one:
        assert warnings() == []
        async with keeping(postgres_server.url, prefix, rules=others) as other:
            assert len(warnings()) == 1
            async with keeping(postgres_server.url, prefix, rules=None) as publisher:
                assert publisher.engine.rules == others  # which came last
            for node in (one, other, one, other):
                link = node.engine._postgres_link
                assert link is not None
                await run("SELECT pg_terminate_backend($1)", link._notifier._connection.get_server_pid())
                await node.link_is_lost_and_back(link)
                assert len(warnings()) == 2
        assert "from now on" in warnings()[1]


# What is sent, and what is stored.


async def publish(node: Keeping, *parcels: tuple[str, bytes, Keep | None]) -> Sequence[Exception | Appended | None]:
    """Publish as one batch."""
    link = node.engine._postgres_link
    assert link is not None
    prefix = node.engine._prefix
    return await link.publish(
        [
            Parcel(f"{prefix}:channel:{to}", envelope)
            if keep is None
            else KeptParcel(f"{prefix}:channel:{to}", envelope, keep)
            for to, envelope, keep in parcels
        ]
    )


def envelope(text: str) -> bytes:
    return b'{"v":1}\n' + text.encode()


async def test_batch_of_all_kinds_keeps_its_order(node: Keeping, run: Run) -> None:
    """Kept and not, small and large, new and repeated, all in one statement."""
    keep, large = Keep(KEPT), "y" * 9_000
    await publish(node, ("news", envelope("0"), Keep(KEPT, "known")))
    found = await publish(
        node,
        ("news", envelope("1"), keep),
        ("news", envelope("2"), None),
        ("sport", envelope("other"), keep),
        ("news", envelope(f"3{large}"), None),
        ("news", envelope("again"), Keep(KEPT, "known")),
        ("news", envelope(f"4{large}"), keep),
        ("news", envelope("5"), Keep(KEPT, "new")),
        ("sport", envelope("other"), Keep(KEPT, "known")),
        ("news", envelope("again"), Keep(KEPT, "new")),
        ("news", envelope("6"), keep),
    )
    assert all(each is None or isinstance(each, Appended) for each in found)
    places = [each and (each.position.offset, each.is_repeat) for each in found]  # type: ignore[union-attr]
    assert places == [
        *((2, False), None, (1, False), None, (1, True), (3, False)),
        *((4, False), (2, False), (4, True), (5, False)),
    ]
    came = await node.came(7)
    assert [str(each.message.data)[0] for each in came] == list("0123456")
    assert [each.offset for each in came] == [1, 2, 0, 0, 3, 4, 5]
    assert [str(text)[0] for text in await node.texts()] == list("01456")
    assert [each.offset for each in await node.came(2, SPORT)] == [1, 2]
    assert (await node.append("7")).position.offset == 6
    assert await run(f"SELECT count(*) FROM {node.engine._prefix}_spill") == 1  # of what isn't kept


async def test_names_of_one_batch_have_epochs_of_their_own(node: Keeping) -> None:
    found = await publish(node, *((f"name {number}", envelope("x"), Keep(KEPT)) for number in range(100)))
    epochs = {each.position.epoch for each in found if isinstance(each, Appended)}
    assert len(epochs) == 100
    assert {len(epoch) for epoch in epochs} == {12}


async def test_key_may_be_anything(node: Keeping) -> None:
    keys = ["", "\0", "ä\N{GRINNING FACE}", "ä" * 5_000, "k", "K", "k "]
    found = await asyncio.gather(*(node.append(key, key=key) for key in keys for _ in range(2)))
    assert [each.is_repeat for each in found] == [False, True] * len(keys)


async def test_key_outlives_the_few_messages_that_are_kept(node: Keeping) -> None:
    last = History(messages=1, seconds=0.01)
    first = await node.append("first", history=last, key="k")
    for number in range(100):
        await node.append(number, history=last)
    assert await node.append("again", history=last, key="k") == Appended(first.position, is_repeat=True)


async def test_key_of_what_is_too_large_to_be_kept_counts(node: Keeping) -> None:
    small = History(max_kept_bytes=10)
    first = await node.append("x" * 11, history=small, key="k")
    assert not first.is_repeat
    assert (await node.append("x" * 11, history=small, key="k")).is_repeat
    assert await node.texts() == []


@pytest.mark.parametrize("size", [10_000, 1_000_000])
async def test_large_message_that_is_not_kept_is_delivered(node: Keeping, size: int) -> None:
    small = History(max_kept_bytes=1000)
    since = (await node.append("1", history=small)).position
    await node.append("x" * size, history=small)
    last = (await node.append("3", history=small)).position
    assert [len(str(each.message.data)) for each in await node.came(3)] == [1, size, 1]
    replay = await node.read(since)
    assert ([each.offset for each in replay.publications], replay.base) == ([3], 2)
    assert [each.previous for each in replay.publications] == [2]
    assert not replay.is_complete(since)
    assert replay.top == last


async def test_entries_below_a_hole_know_what_came_before_them(node: Keeping) -> None:
    small = History(max_kept_bytes=1000)
    for size in (1, 1, 2000, 1, 2000, 1):
        await node.append("x" * size, history=small)
    replay = await node.read()
    assert [(each.previous, each.offset) for each in replay.publications] == [(0, 1), (1, 2), (3, 4), (5, 6)]
    assert replay.base == 5


async def test_large_message_can_be_read_though_few_are_kept(
    postgres_server: Endpoint, prefix: str, node: Keeping
) -> None:
    """A node that is slow finds the row of a large message, how many ever came after it."""
    link = node.engine._postgres_link
    assert link is not None
    last = History(messages=1)
    async with link._listener.lock:  # it can't read
        for number in range(70):
            await node.append(f"{number} {LARGE}", history=last)
    assert [str(each.message.data).split()[0] for each in await node.came(70)] == [str(n) for n in range(70)]
    assert node.recorder.gaps == []


async def test_forged_notes_are_counted(node: Keeping, run: Run) -> None:
    name, prefix = node.engine.names.of(NEWS), node.engine._prefix
    forged = [
        "text:e:0 x",
        "text:e:-1 x",
        "text::1 x",
        f"text:e:{2**63} x",
        "text:ä:1 x",
        "row:e x",
        "row x",
        "row:e:x",
    ]
    for note in forged:
        await run("SELECT pg_notify($1, $2)", prefix, f"{name} {note}")
    await run("SELECT pg_notify($1, $2)", prefix, f"{name} row:e:1")  # no such row
    await node.append("good")
    assert [each.message.data for each in await node.came(1)] == ["good"]
    assert sum(node.engine.stats().bad_envelopes.values()) == len(forged)


# How it is read.


async def test_read_waits_for_no_publish(postgres_server: Endpoint, prefix: str) -> None:
    async with keeping(postgres_server.url, prefix, timing=Timing(request_timeout=4)) as node:
        at = (await node.append("1")).position
        async with asyncpg_connection(postgres_server.url) as connection:
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            await node.append_in(connection, "held", SPORT)
            appending = asyncio.create_task(node.append("waits", SPORT))
            await eventually(lambda: _somebody_waits(connection))
            async with asyncio.timeout(1):
                assert await node.texts() == ["1"]
                assert await node.position() == at
            assert not appending.done()
        await appending


async def test_reads_that_are_cancelled_do_not_cost_the_link(postgres_server: Endpoint, node: Keeping) -> None:
    """Neither the one that runs, nor those that wait for it."""
    link = node.engine._postgres_link
    assert link is not None
    at = (await node.append("1")).position
    lock = f"LOCK TABLE {node.engine._prefix}_history_counters IN ACCESS EXCLUSIVE MODE"
    async with holding(postgres_server.url, lock):
        reads = [asyncio.create_task(node.read()) for _ in range(3)]
        await until(link._listener.lock.locked)
        for read in reads:
            read.cancel()
        await asyncio.wait(reads)
        assert all(read.cancelled() for read in reads)
    assert await node.position() == at
    await node.append("2")
    assert len(await node.came(2)) == 2
    assert node.engine.link is link


# What a server says that shuts down, just before it closes the connection.
_GOODBYE = b"SFATAL\0VFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"


async def test_read_that_loses_the_connection_ends_the_link(postgres_server: Endpoint, prefix: str) -> None:
    """At once: asyncpg closes the connection, and tells only who reads."""
    async with keeping(postgres_server.url, prefix, timing=Timing(probe_interval=60)) as node:
        link = node.engine._postgres_link
        assert link is not None
        await node.append("1")
        await node.came(1)
        protocol = link._listener._connection._protocol
        protocol.data_received(b"E" + (len(_GOODBYE) + 4).to_bytes(4) + _GOODBYE)
        with pytest.raises(EngineUnavailable, match="cannot switch to state"):
            await node.position()
        await node.link_is_lost_and_back(link)
        assert await node.texts() == ["1"]
        await node.append("2")
        await node.came(2)


async def test_command_that_is_cancelled_ends_the_link(postgres_server: Endpoint, prefix: str) -> None:
    """Whoever is next on that connection would wait for an answer that never comes."""
    async with keeping(postgres_server.url, prefix, timing=Timing(probe_interval=60)) as node:
        link = node.engine._postgres_link
        assert link is not None
        listener, lock = link._listener, "SELECT pg_advisory_xact_lock(1)"

        async def wait() -> None:
            async with listener.lock:
                await listener._connection.execute(lock)

        async with holding(postgres_server.url, lock):
            waiting = asyncio.create_task(wait())
            await turns(3)
            reading = asyncio.create_task(node.position())
            await turns(3)
            waiting.cancel()
            await asyncio.wait([waiting])
            async with asyncio.timeout(1):
                with pytest.raises(EngineUnavailable):
                    await reading
            await node.link_is_lost_and_back(link)
        await node.append("1")
        await node.came(1)


async def test_reads_end_with_the_link(postgres_server: Endpoint, node: Keeping) -> None:
    link = node.engine._postgres_link
    assert link is not None
    lock = f"LOCK TABLE {node.engine._prefix}_history_counters IN ACCESS EXCLUSIVE MODE"
    async with holding(postgres_server.url, lock):
        reads = [asyncio.create_task(node.read()) for _ in range(3)]
        await until(link._listener.lock.locked)
        await link.abort()
        for read in reads:
            with pytest.raises(EngineUnavailable):
                await read


async def test_epochs_that_two_make_at_once_are_one(postgres_server: Endpoint, prefix: str) -> None:
    names = [Audience("channel", f"name {number}") for number in range(60)]
    patient = Timing(request_timeout=10)
    async with (
        keeping(postgres_server.url, prefix, timing=patient) as one,
        keeping(postgres_server.url, prefix, timing=patient) as other,
    ):
        found = await asyncio.gather(
            one.engine.positions(names, [KEPT] * 60),
            other.engine.positions(names[::-1], [KEPT] * 60),
            *(one.append("x", name) for name in names),
            *(other.read(audience=name) for name in names),
        )
        epochs = [(await one.position(name)).epoch for name in names]
        first, second = found[0], found[1]
        assert [each.epoch for each in first] == epochs  # type: ignore[union-attr]
        assert [each.epoch for each in second] == epochs[::-1]  # type: ignore[union-attr]


async def test_append_waits_its_turn_whatever_isolation_is_the_database_s(
    postgres_server: Endpoint, prefix: str, run: Run
) -> None:
    settings = {"default_transaction_isolation": "serializable"}
    async with keeping(postgres_server.url, prefix, server_settings=settings) as node:
        await node.append("1")
        link = node.engine._postgres_link
        assert link is not None
        async with asyncpg_connection(postgres_server.url) as other:  # as another node that appends
            await other.execute(f"UPDATE {prefix}_history_counters SET name = name")
            appending = asyncio.create_task(node.append("2"))
            await wait_blocked(run, link._notifier._connection.get_server_pid())
        assert (await appending).position.offset == 2


# What it doesn't grow by.


async def test_tables_do_not_grow(node: Keeping, run: Run) -> None:
    """Counters are updated in place, and of a busy channel hardly more is there than is kept."""
    prefix = node.engine._prefix
    many = [Audience("channel", f"name {number}") for number in range(200)]
    await node.engine.positions(many, [KEPT] * 200)
    sizes = []
    for _ in range(2):
        for _ in range(50):
            await asyncio.gather(*(node.append("x" * 100) for _ in range(40)))
        assert await run(f"SELECT count(*) FROM {prefix}_history") <= KEPT.messages + 32 + 40
        await run(f"VACUUM {prefix}_history")
        sizes.append(await run(f"SELECT pg_relation_size('{prefix}_history')"))
    assert sizes[1] <= 1.2 * sizes[0]
    await asyncio.gather(*(node.append("x", name) for name in many))
    assert await run(f"SELECT pg_relation_size('{prefix}_history_counters')") <= 8 * 8192
    updates = f"FROM pg_stat_user_tables WHERE relname = '{prefix}_history_counters'"

    async def are_counted() -> bool:
        await node.publish("a session counts when it is used, once a second")
        return bool(await run(f"SELECT n_tup_upd >= 299 {updates}"))

    await eventually(are_counted)
    assert await run(f"SELECT n_tup_upd - n_tup_hot_upd {updates}") <= 2
    replay = await node.read()
    assert [each.offset for each in replay.publications] == list(range(3951, 4001))


async def test_what_is_too_old_is_removed_some_at_a_time(
    postgres_server: Endpoint, prefix: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.history._TRIM_SECONDS", 0)
    async with keeping(postgres_server.url, prefix) as node:
        table, counters = f"{prefix}_history", f"{prefix}_history_counters"
        await run(
            f"INSERT INTO {table} SELECT 'old', n, now(), now(), now() - interval '1 s', true, NULL, NULL"
            " FROM generate_series(1, 2500) AS n"
        )
        await run(
            f"INSERT INTO {counters} (name, top, forget_at)"
            " SELECT 'old ' || n, 1, now() - interval '1 s' FROM generate_series(1, 2500) AS n"
        )
        await node.append("young", SPORT)
        left = (
            f"SELECT (SELECT count(*) FROM {table} WHERE epoch = 'old')"
            f" + (SELECT count(*) FROM {counters} WHERE name LIKE 'old %')"
        )
        seen = [await run(left)]
        async with asyncio.timeout(10):
            while seen[-1]:
                await node.publish("any publish will do")
                seen.append(await run(left))
        assert len(seen) >= 3
        assert all(before - after <= 2000 for before, after in pairwise(seen))
        assert await node.texts(audience=SPORT) == ["young"]


async def test_position_is_forgotten_after_its_time(
    postgres_server: Endpoint, prefix: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.history._TRIM_SECONDS", 0)
    counters = f"{prefix}_history_counters"
    async with keeping(postgres_server.url, prefix) as node:
        before = (await node.append("before")).position
        assert await run(f"SELECT forget_at > now() + interval '23 h' FROM {counters}")
        assert await node.position() == before
        await run(f"UPDATE {counters} SET forget_at = now() - interval '1 s'")
        await node.publish("any publish will do")
        assert (await node.position()).epoch != before.epoch
        assert await node.texts() == []


async def test_append_prolongs_the_time_of_a_position(node: Keeping, run: Run) -> None:
    counters = f"{node.engine._prefix}_history_counters"
    before = (await node.append("before")).position
    await run(f"UPDATE {counters} SET forget_at = now() - interval '1 s'")
    assert (await node.append("prolongs it")).position == Position(before.epoch, 2)
    assert await run(f"SELECT forget_at > now() + interval '23 h' FROM {counters}")


# What it costs who doesn't use it.


async def test_no_history_is_no_statement(postgres_server: Endpoint, prefix: str) -> None:
    """Whoever keeps nothing, where nothing is kept, runs what is needed to publish and to listen."""
    statements: list[str] = []

    async def run_once(*, only_publishes: bool) -> list[str]:
        statements.clear()
        engine = PostgresEngine(postgres_server.url, prefix=prefix)
        engine.keep(None, only_publishes=only_publishes)
        connect = type(engine._target).connect

        async def logged(turn: int) -> Any:
            connection = await connect(engine._target, turn)
            connection.add_query_logger(lambda query: statements.append(query.query))
            return connection

        object.__setattr__(engine._target, "connect", logged)
        async with Node(engine) as node:
            for _ in range(3):
                await node.publish("hello")
            assert await node.engine.health()
        return [each for each in statements if "LISTEN" not in each]

    def is_of_history(statement: str) -> bool:
        return f"{prefix}_history" in statement

    def check(found: list[str]) -> None:
        table = SpillTable(prefix, "public").exists_sql  # asked once, whether there are rows to remove
        assert Counter(found) == {_SETTINGS: 2, NOTIFY_ONE: found.count(NOTIFY_ONE), table: 1}

    check(await run_once(only_publishes=False))
    check(await run_once(only_publishes=True))
    async with keeping(postgres_server.url, prefix):
        pass
    check(await run_once(only_publishes=False))
    now = await run_once(only_publishes=True)  # rules stand there: they are read
    assert [each for each in now if is_of_history(each) and "trim" not in each] == [
        HistoryTables(prefix, "public").open_sql
    ]
