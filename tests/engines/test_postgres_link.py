"""The link to a Postgres that runs."""

from __future__ import annotations

import asyncio
import gc
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import asyncpg
import pytest

from tests.support.asgi import turns
from tests.support.brokers import Endpoint
from tests.support.postgres import Life, Node, Run, drop_database, holding, living, new_link, until
from tests.support.servers import eventually
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.postgres.link import PostgresLink
from wsbroadcast.engines.postgres.notifier import MAX_ENVELOPE_BYTES, Notifier, SpillTable
from wsbroadcast.engines.postgres.presence_tables import PresenceTables
from wsbroadcast.engines.postgres.protocol import Connection
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.options import Timing

EVERY_BYTE = bytes(range(256)) * 4
LARGE = random.Random(1).randbytes(50_000)


@pytest.fixture
async def life(postgres_server: Endpoint, prefix: str) -> AsyncIterator[Life]:
    async with living(postgres_server.url, prefix) as life:
        yield life


@pytest.fixture
async def run(postgres_server: Endpoint) -> AsyncIterator[Run]:
    """Run SQL in a session of somebody else."""
    connection = await asyncpg.connect(postgres_server.url)
    try:
        yield connection.fetchval
    finally:
        await connection.close()


# What arrives.


async def test_order_is_the_same_for_two_listeners_of_two_publishers(postgres_server: Endpoint, prefix: str) -> None:
    async with living(postgres_server.url, prefix) as one, living(postgres_server.url, prefix) as other:
        for life in (one, other):
            await life.link.subscribe([life.name("news")])

        async def publish(life: Life, who: bytes) -> None:
            for number in range(100):
                size = 9000 if number % 7 == 0 else 10
                await life.publish(("news", who + b"%d " % number + bytes(size)))

        await asyncio.gather(publish(one, b"one "), publish(other, b"other "))
        await until(lambda: len(one.pile.parcels) == len(other.pile.parcels) == 200)
        assert one.pile.parcels == other.pile.parcels


async def test_large_envelope_holds_up_its_own_name_only(life: Life) -> None:
    await life.link.subscribe([life.name("news"), life.name("echo")])
    await life.publish(("news", LARGE), ("news", b"after"), ("echo", b"probe"), ("news", LARGE[1:]), ("news", b"end"))
    await life.arrives("news", LARGE, b"after", LARGE[1:], b"end")
    assert life.pile.parcels[0] == Parcel(life.name("echo"), b"probe")


async def test_names_of_others_are_filtered(life: Life) -> None:
    await life.link.subscribe([life.name("news")])
    await life.publish(*[(f"other-{number}", b"x") for number in range(50)], ("other", LARGE), ("news", b"end"))
    await life.arrives("news", b"end")
    assert len(life.pile.parcels) == 1


async def test_unsubscribed_name_forgets_what_was_held_back(life: Life) -> None:
    await life.link.subscribe([life.name("news"), *(life.name(f"{number}") for number in range(50))])
    async with life.link._listener.lock:  # nothing can be read
        await life.publish(("news", LARGE), ("news", b"old"), ("1", b"x"))
        await life.arrives("1", b"x")
        await life.link.unsubscribe([life.name("news")])
        await life.link.subscribe([life.name("news")])
    await life.publish(("news", LARGE[1:]), ("news", b"new"))
    await life.arrives("news", LARGE[1:], b"new")


async def test_link_listens_to_the_channels_of_its_names_only(life: Life) -> None:
    async def channels() -> set[str]:
        listener = life.link._listener._connection
        return {row[0] for row in await listener.fetch("SELECT pg_listening_channels()")}

    assert await channels() == {life.prefix}
    many = [life.name(f"room-{number}") for number in range(200)]
    await life.link.subscribe(many)
    assert await channels() == {life.prefix, *(f"{life.prefix}:{number}" for number in range(8))}
    await life.link.unsubscribe(many[1:])
    assert len(await channels()) == 2
    await life.link.unsubscribe(many)
    assert await channels() == {life.prefix}


# What anybody may send.


@pytest.mark.parametrize("channel", ["{prefix}", "{prefix}:3"])
async def test_other_programs_publish_with_one_command(life: Life, run: Run, channel: str) -> None:
    for number in range(20):  # so that we listen to all channels
        await life.link.subscribe([life.name(f"room-{number}"), life.name("news")])
    command = f"SELECT pg_notify('{channel}', E'{{prefix}}:channel:news text {{{{\"v\":1}}}}\\nhello')"
    await run(command.format(prefix=life.prefix))
    await life.arrives("news", b'{"v":1}\nhello')


async def test_garbage_is_handed_on_as_no_envelope(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news")])
    garbage = ["", "x", "{}", f"{life.name('news')} base64 %", f"{life.name('news')} table x", life.name("news")]
    for each in garbage:
        await run("SELECT pg_notify($1, $2)", life.prefix, each)
    await run("SELECT pg_notify($1, $2)", life.prefix, f"{life.name('news')} text good")
    await life.arrives("news", b"", b"", b"", b"good")
    assert life.pile.of(life.prefix) == [b""] * 3
    assert life.pile.misses == []


async def test_row_that_is_gone_is_missed(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news")])
    await life.link.create_table()
    note = f"{life.name('news')} table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55"
    await run("SELECT pg_notify($1, $2)", life.prefix, note)
    await life.publish(("news", b"after"))
    await life.arrives("news", b"after")
    assert life.pile.misses == ["a large message was gone from the table before it was read"]


async def test_table_that_is_gone_is_missed_and_made_again(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news")])
    await life.publish(("news", LARGE))
    await life.arrives("news", LARGE)
    await run(f"DROP TABLE {life.prefix}_spill")
    note = f"{life.name('news')} table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55"
    await run("SELECT pg_notify($1, $2)", life.prefix, note)
    await until(lambda: life.pile.misses != [])
    assert "does not exist" in life.pile.misses[0]
    assert await life.publish(("news", LARGE[1:])) == [None]
    await life.arrives("news", LARGE, LARGE[1:])


async def test_row_that_is_too_large_is_no_envelope(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news")])
    await life.link.create_table()
    row = "6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55"
    huge = f"convert_to(repeat('x', {MAX_ENVELOPE_BYTES + 1}), 'UTF8')"
    await run(f"INSERT INTO {life.prefix}_spill VALUES ('{row}', clock_timestamp() + interval '60 s', {huge})")
    await run("SELECT pg_notify($1, $2)", life.prefix, f"{life.name('news')} table {row}")
    await life.arrives("news", b"")


async def test_more_than_can_be_held_back_is_missed(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.link._MAX_HELD_BACK", 2)
    await life.link.subscribe([life.name("news")])
    await life.publish(("news", LARGE), ("news", b"1"), ("news", b"2"))
    await life.arrives("news", LARGE, b"1")
    assert life.pile.misses == ["large messages come faster than they can be read"]


async def test_what_is_held_back_when_the_link_is_lost_is_missed_from_its_arrival_on(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news"), life.name("other")])
    loop = asyncio.get_running_loop()
    async with life.link._listener.lock:  # nothing can be read
        began = loop.time()
        await life.publish(("news", LARGE), ("news", b"behind it"))
        await life.publish(("other", b"x"))
        await life.arrives("other", b"x")
        await run("SELECT pg_terminate_backend($1)", life.link._listener._connection.get_server_pid())
        await until(lambda: life.link._listener._connection.is_closed())
    assert await life.lost() is not None
    assert life.pile.of(life.name("news")) == []
    assert life.pile.misses == ["large messages were not read before the connection was lost"]
    (since,) = life.pile.missed_since
    assert since is not None
    assert since <= began


async def test_row_that_is_gone_is_missed_from_its_arrival_on(life: Life) -> None:
    await life.link.subscribe([life.name("news"), life.name("other")])
    async with life.link._listener.lock:
        began = asyncio.get_running_loop().time()
        await life.publish(("news", LARGE), ("other", b"x"))
        await life.arrives("other", b"x")
        await life.link._notifier._connection.execute(f"DELETE FROM {life.prefix}_spill")
    await until(lambda: life.pile.misses != [])
    (since,) = life.pile.missed_since
    assert since is not None
    assert since <= began


async def test_link_that_is_lost_with_nothing_held_back_has_missed_nothing(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news")])
    await life.publish(("news", LARGE))
    await life.arrives("news", LARGE)
    await run("SELECT pg_terminate_backend($1)", life.link._listener._connection.get_server_pid())
    await life.lost()
    assert life.pile.misses == []


# The table.


async def test_largest_envelope_goes_through_the_table(life: Life) -> None:
    await life.link.subscribe([life.name("news")])
    largest = bytes(MAX_ENVELOPE_BYTES)
    assert await life.publish(("news", largest)) == [None]
    await until(lambda: life.pile.parcels != [])
    assert life.pile.parcels[0].envelope == largest


async def test_table_is_made_by_several_at_once(postgres_server: Endpoint, prefix: str) -> None:
    async with living(postgres_server.url, prefix) as one, living(postgres_server.url, prefix) as other:
        outcomes = await asyncio.gather(*(life.publish(("news", LARGE)) for life in (one, other)))
    assert outcomes == [[None], [None]]


async def test_rows_are_removed_when_everybody_has_read_them(
    life: Life, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
    for _ in range(40):
        await life.publish(*[("news", LARGE)] * 4)
    table = f"{life.prefix}_spill"
    assert await run(f"SELECT count(*) FROM {table}") == 160
    await run(f"UPDATE {table} SET expires = clock_timestamp() WHERE id <> (SELECT id FROM {table} LIMIT 1)")

    async def left() -> int:
        await life.publish(("news", b"echo"))
        return int(await run(f"SELECT count(*) FROM {table}"))

    assert [await left() for _ in range(4)] == [160 - 64, 160 - 128, 1, 1]
    await run(f"UPDATE {table} SET expires = clock_timestamp()")
    assert await left() == 0


async def test_rows_are_removed_by_who_only_reads(
    postgres_server: Endpoint, prefix: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with living(postgres_server.url, prefix) as reader, living(postgres_server.url, prefix) as writer:
        await reader.publish(("news", b"echo"))  # when the first clean-up is due
        monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
        await reader.link.subscribe([reader.name("news")])
        await writer.publish(("nobody", LARGE), ("news", b"after"))
        await reader.arrives("news", b"after")
        assert await run(f"SELECT count(*) FROM {prefix}_spill") == 1
        await run(f"UPDATE {prefix}_spill SET expires = clock_timestamp()")
        await reader.publish(("news", b"echo"))
        assert await run(f"SELECT count(*) FROM {prefix}_spill") == 0


async def test_rows_are_removed_that_processes_before_this_one_left(
    postgres_server: Endpoint, prefix: str, run: Run
) -> None:
    async with living(postgres_server.url, prefix) as before:
        await before.publish(("news", LARGE))
    await run(f"UPDATE {prefix}_spill SET expires = clock_timestamp()")
    async with living(postgres_server.url, prefix) as after:
        await after.publish(("news", b"echo"))
        assert await run(f"SELECT count(*) FROM {prefix}_spill") == 0


async def test_rows_are_removed_after_an_outage(
    postgres_server: Endpoint, prefix: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Node(PostgresEngine(postgres_server.url, prefix=prefix)) as node:
        monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
        await node.publish("x" * 20_000)
        lost = node.engine.link
        assert isinstance(lost, PostgresLink)
        await run("SELECT pg_terminate_backend($1)", lost._listener._connection.get_server_pid())
        await until(lambda: node.recorder.gaps != [])
        assert node.engine.link is not lost
        assert await run(f"SELECT count(*) FROM {prefix}_spill") == 1
        await run(f"UPDATE {prefix}_spill SET expires = clock_timestamp()")
        await node.publish("echo")
        assert await run(f"SELECT count(*) FROM {prefix}_spill") == 0


async def test_clean_up_that_fails_is_only_logged(
    life: Life, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
    await life.publish(("news", LARGE))
    await run(f"ALTER TABLE {life.prefix}_spill RENAME expires TO elapses")
    assert await life.publish(("news", b"echo")) == [None]
    assert "can't be removed" in caplog.text


async def test_clean_up_without_a_table_is_nothing_to_be_logged(
    life: Life, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.KEPT_SECONDS", -1)
    assert await life.publish(("news", b"echo")) == [None]
    await life.publish(("news", LARGE))
    await run(f"DROP TABLE {life.prefix}_spill")
    assert await life.publish(("news", b"echo")) == [None]
    assert caplog.records == []


@pytest.fixture
async def poor(postgres_server: Endpoint, prefix: str, run: Run) -> AsyncIterator[str]:
    """The URL of a role that may use everything in the schema of its own, and make nothing there."""
    await run(f"CREATE ROLE {prefix} LOGIN")
    await run(f"CREATE SCHEMA {prefix}")
    await run(f"GRANT USAGE ON SCHEMA {prefix} TO {prefix}")
    yield postgres_server.url.replace("postgres@", f"{prefix}@")
    await run(f"DROP SCHEMA {prefix} CASCADE")
    await run(f"DROP ROLE {prefix}")


async def test_role_that_may_not_make_the_table_is_told_the_command(poor: str, prefix: str, run: Run) -> None:
    async with living(poor, prefix, schema=prefix) as life:
        await life.link.subscribe([life.name("news")])
        errors = await life.publish(("news", b"1"), ("news", LARGE), ("news", b"2"))
        await life.arrives("news", b"1", b"2")
        assert errors[0] is errors[2] is None
        assert isinstance(errors[1], ConfigurationError)
        assert await life.publish(("news", LARGE)) != [None]
        with pytest.raises(ConfigurationError, match="permission denied"):
            await life.link.create_table()
        command = str(errors[1]).partition("an administrator has to run: ")[2]
        for statement in command.split("; "):
            await run(statement)
        assert await life.publish(("news", LARGE)) == [None]
        await life.arrives("news", b"1", b"2", LARGE)
        await run(f"REVOKE INSERT ON {prefix}.{prefix}_spill FROM {prefix}")
        (error,) = await life.publish(("news", LARGE))
        assert isinstance(error, ConfigurationError)
        await run(f"REVOKE SELECT ON {prefix}.{prefix}_spill FROM {prefix}")
        note = f"{life.name('news')} table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55"
        await run("SELECT pg_notify($1, $2)", prefix, note)
        await until(lambda: life.pile.misses != [])
        assert "permission denied" in life.pile.misses[0]


async def test_schema_that_is_not_there_is_told(postgres_server: Endpoint, prefix: str) -> None:
    async with living(postgres_server.url, prefix, schema="nowhere") as life:
        (error,) = await life.publish(("news", LARGE))
    assert isinstance(error, ConfigurationError)
    assert 'schema "nowhere" does not exist' in str(error)


# What is refused.


async def test_database_that_became_read_only_takes_small_messages(life: Life) -> None:
    await life.link.create_table()
    await life.link._notifier._connection.execute("SET default_transaction_read_only = on")
    (error,) = await life.publish(("news", LARGE))
    assert isinstance(error, EngineUnavailable)
    assert re.search("takes no message now: .* read-only transaction; nothing was sent", str(error))
    assert await life.publish(("news", b"small")) == [None]
    assert not life.reading.done()


async def test_statement_that_is_refused_leaves_the_link_alive(life: Life, postgres_server: Endpoint) -> None:
    await life.link.subscribe([life.name("news")])
    await life.link.create_table()
    await life.link._notifier._connection.execute("SET statement_timeout = '300 ms'")
    async with holding(postgres_server.url, f"LOCK TABLE {life.prefix}_spill"):
        errors = await life.publish(("news", LARGE), ("news", b"small"))
    assert [type(error) for error in errors] == [EngineUnavailable] * 2
    assert "takes no message now: canceling statement due to statement timeout; nothing was sent" in str(errors[0])
    assert await life.publish(("news", LARGE)) == [None]
    await life.arrives("news", LARGE)


class Full:
    """A connection to a server whose queue is full, or that refuses what it is told for another reason."""

    def __init__(self, error: Exception | None = None) -> None:
        self.statements: list[str] = []
        self._error = error or asyncpg.ProgramLimitExceededError("too many notifications in the NOTIFY queue")

    def is_closed(self) -> bool:
        return False

    async def execute(self, statement: str, *values: object) -> None:
        self.statements.append(statement)
        if "pg_notify" in statement:
            raise self._error


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (asyncpg.ReadOnlySQLTransactionError, EngineUnavailable),
        (asyncpg.QueryCanceledError, EngineUnavailable),
        (asyncpg.DiskFullError, EngineUnavailable),
        (asyncpg.OutOfMemoryError, EngineUnavailable),
        (asyncpg.LockNotAvailableError, EngineUnavailable),
        (asyncpg.DeadlockDetectedError, EngineUnavailable),
        (asyncpg.SerializationError, EngineUnavailable),
        (asyncpg.InsufficientPrivilegeError, EngineUnavailable),
        (asyncpg.UndefinedFunctionError, EngineUnavailable),
        (asyncpg.UntranslatableCharacterError, EngineError),
        (asyncpg.NullValueNotAllowedError, EngineError),
    ],
    ids=lambda value: value.__name__,
)
async def test_refusal_is_of_the_message_or_of_all_messages(
    prefix: str, refusal: type[Exception], told: type[EngineError]
) -> None:
    notifier = Notifier(prefix, SpillTable(prefix, "public"), "postgres at host:5432")
    notifier.open(Full(refusal("not now\nDETAIL: secret")), role="app", takes_unicode=True)
    (error,) = await notifier.publish([Parcel("a", b"x")])
    assert type(error) is told
    assert "not now" in str(error)
    assert "secret" not in str(error)


async def test_full_queue_of_notifications_is_unavailable_and_emptied(prefix: str) -> None:
    connection = Full()
    notifier = Notifier(prefix, SpillTable(prefix, "public"), "postgres at host:5432")
    notifier.open(connection, role="app", takes_unicode=True)
    for parcels in ([Parcel("a", b"x")], [Parcel("a", b"x")] * 2, [Parcel("a", LARGE)]):
        connection.statements.clear()
        errors = await notifier.publish(parcels)
        assert [type(error) for error in errors] == [EngineUnavailable] * len(parcels)
        assert "took nothing, because its queue of notifications is full" in str(errors[0])
        assert isinstance(errors[0], EngineUnavailable)
        assert isinstance(errors[0].__cause__, asyncpg.ProgramLimitExceededError)
        assert connection.statements[-1] == "SELECT pg_notification_queue_usage()"
    with pytest.raises(EngineUnavailable):
        await notifier.notify("a", "x")


# A database that isn't in UTF-8.


@pytest.fixture
async def latin1(postgres_server: Endpoint, prefix: str, run: Run) -> AsyncIterator[str]:
    await run(f"CREATE DATABASE {prefix} ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    yield postgres_server.url.rpartition("/")[0] + f"/{prefix}"
    await drop_database(run, prefix)


async def test_database_of_another_encoding_takes_every_text(latin1: str, prefix: str) -> None:
    async with living(latin1, prefix) as life:
        await life.link.subscribe([life.name("news")])
        envelopes = ["日本語 Grüße".encode(), b"plain", EVERY_BYTE, LARGE]
        assert await life.publish(*[("news", each) for each in envelopes]) == [None] * 4
        await life.arrives("news", *envelopes)


# A pooler in between.


class Pooled:
    """What a connection through a pooler looks like; one for single transactions forgets LISTEN."""

    def __init__(self, connection: Connection, *, forgets: bool, pid: int | None) -> None:
        self._connection = connection
        self._forgets = forgets
        self._pid = pid

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def get_server_pid(self) -> int:
        return int(self._connection.get_server_pid()) if self._pid is None else self._pid

    async def add_listener(self, channel: str, callback: Any) -> None:
        if not self._forgets:
            await self._connection.add_listener(channel, callback)


def pooled(url: str, prefix: str, *, forgets: bool, pid: int | None = -1, connect_timeout: float = 1.5) -> PostgresLink:
    async def connect() -> Any:
        return Pooled(await asyncpg.connect(url), forgets=forgets, pid=pid)

    timing = Timing(connect_timeout=connect_timeout)
    table, history = SpillTable(prefix, "public"), HistoryTables(prefix, "public")
    return PostgresLink(
        connect, prefix, table, "postgres at pooler:6432", timing, history, PresenceTables(prefix, "public", table)
    )


async def test_pooler_in_transaction_mode_is_refused(postgres_server: Endpoint, prefix: str) -> None:
    link = pooled(postgres_server.url, prefix, forgets=True)
    with pytest.raises(ConfigurationError, match="at pooler:6432 is reached through a pooler in transaction mode"):
        await link.open()
    await link.abort()


async def test_pooler_in_session_mode_will_do(postgres_server: Endpoint, prefix: str) -> None:
    link = pooled(postgres_server.url, prefix, forgets=False)
    await link.open()
    await link.abort()


async def test_server_that_brings_nothing_is_out_of_reach(postgres_server: Endpoint, prefix: str) -> None:
    link = pooled(postgres_server.url, prefix, forgets=True, pid=None, connect_timeout=0.8)
    began = time.monotonic()
    with pytest.raises(EngineUnavailable, match="takes notifications but delivers none"):
        await link.open()
    assert time.monotonic() - began < 3
    await link.abort()


# Cancelled and aborted.


async def wait_blocked(run: Run, pid: int) -> None:
    """Wait until a session waits for a lock."""

    async def is_blocked() -> bool:
        return bool(await run("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))

    await eventually(is_blocked)


async def cut_off(working: Awaitable[Any], after: int) -> None:
    task = asyncio.ensure_future(working)
    await turns(after)
    task.cancel()
    await asyncio.wait([task])


async def nothing_is_left(before: set[asyncio.Task[Any]]) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))
    await until(lambda: asyncio.all_tasks() <= before)
    gc.collect()  # an unclosed socket or connection warns, and a warning is an error
    assert complaints == []


@pytest.mark.parametrize("after", [*range(12), 20, 50, 100, 200, 400, 800])
async def test_open_that_is_cancelled_leaves_nothing(postgres_server: Endpoint, prefix: str, after: int) -> None:
    before = asyncio.all_tasks()
    # With TLS asyncpg 0.32 complains if it is cut off in the very turn in which a socket is connected.
    link = new_link(f"{postgres_server.url}?sslmode=disable", prefix)
    await cut_off(link.open(), after)
    await link.abort()
    await link.abort()
    await nothing_is_left(before)


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("what", ["publish", "publish large", "subscribe", "unsubscribe", "read"])
async def test_call_that_is_cancelled_leaves_nothing(
    postgres_server: Endpoint, prefix: str, what: str, after: int
) -> None:
    before = asyncio.all_tasks()
    async with living(postgres_server.url, prefix) as life:
        names = [life.name("news")]
        await life.link.subscribe(names)
        match what:
            case "publish":
                await cut_off(life.publish(("news", b"x")), after)
            case "publish large":
                await cut_off(life.publish(("news", LARGE)), after)
            case "subscribe":
                await cut_off(life.link.subscribe([life.name(f"{number}") for number in range(50)]), after)
            case "unsubscribe":
                await cut_off(life.link.unsubscribe(names), after)
            case "read":
                await life.publish(("news", LARGE))
                await turns(after)
    await nothing_is_left(before)


async def test_abort_while_opening_drops_what_comes(postgres_server: Endpoint, prefix: str) -> None:
    before = asyncio.all_tasks()
    link = new_link(postgres_server.url, prefix)
    opening = asyncio.create_task(link.open())
    await turns(5)
    await link.abort()
    with pytest.raises(EngineUnavailable, match="given up"):
        await opening
    await nothing_is_left(before)


async def test_nothing_is_handed_over_after_abort(life: Life, run: Run) -> None:
    await life.link.subscribe([life.name("news")])
    await life.publish(*[("news", b"x")] * 50, ("news", LARGE))
    await life.link.abort()
    count = len(life.pile.parcels)
    note = f"{life.name('news')} text late"
    await run("SELECT pg_notify($1, $2)", life.prefix, note)
    life.link._listener._on_notification(None, 0, life.prefix, note)  # asyncpg calls it in the turn after the arrival
    await life.lost()
    assert len(life.pile.parcels) == count


async def test_abort_resets_both_connections(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    transports: list[asyncio.BaseTransport] = []
    monkeypatch.setattr("wsbroadcast.engines.postgres.protocol.reset", transports.append)
    await life.link.abort()
    assert len(transports) == 2
    assert all(transport.get_extra_info("peername") for transport in transports)


async def test_call_that_is_cancelled_tells_the_server_nothing(life: Life, run: Run, postgres_server: Endpoint) -> None:
    await life.link.create_table()
    async with holding(postgres_server.url, f"LOCK TABLE {life.prefix}_spill"):
        before = asyncio.all_tasks()
        publishing = asyncio.create_task(life.publish(("news", LARGE)))
        await wait_blocked(run, life.link._notifier._connection.get_server_pid())
        publishing.cancel()
        await turns(3)
        assert publishing.cancelled()
        assert asyncio.all_tasks() == before  # asyncpg would connect again, to cancel the statement
        await life.link.abort()


async def test_subscribe_waits_for_a_row_that_is_being_read(life: Life, run: Run, postgres_server: Endpoint) -> None:
    await life.link.subscribe([life.name("news")])
    await life.publish(("news", LARGE))
    await life.arrives("news", LARGE)
    async with holding(postgres_server.url, f"LOCK TABLE {life.prefix}_spill"):
        note = f"{life.name('news')} table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55"
        await run("SELECT pg_notify($1, $2)", life.prefix, note)
        await wait_blocked(run, life.link._listener._connection.get_server_pid())
        names = [life.name(f"{number}") for number in range(50)]
        subscribing = asyncio.create_task(life.link.subscribe(names))
        await turns(3)
        assert not subscribing.done()
    await subscribing
    await life.link.unsubscribe(names)
    assert len(life.pile.misses) == 1


async def test_broker_forgets_a_link_that_is_aborted(life: Life, run: Run) -> None:
    pids = [each.get_server_pid() for each in (life.link._listener._connection, life.link._notifier._connection)]
    await life.link.abort()

    async def are_gone() -> bool:
        return not await run("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)", pids)

    await eventually(are_gone)


# Lost.


@pytest.mark.parametrize("which", ["_listener", "_notifier"])
async def test_session_that_is_ended_by_an_administrator_is_a_loss(life: Life, run: Run, which: str) -> None:
    await life.link.subscribe([life.name("news")])
    await run("SELECT pg_terminate_backend($1)", getattr(life.link, which)._connection.get_server_pid())
    assert isinstance(await life.lost(), ConnectionError)


async def test_session_that_ends_during_a_publish_is_a_loss(life: Life, run: Run, postgres_server: Endpoint) -> None:
    await life.link.create_table()
    pid = life.link._notifier._connection.get_server_pid()
    async with holding(postgres_server.url, f"LOCK TABLE {life.prefix}_spill"):
        publishing = asyncio.create_task(life.publish(("news", LARGE)))
        await wait_blocked(run, pid)
        await run("SELECT pg_terminate_backend($1)", pid)
        with pytest.raises(asyncpg.PostgresError):
            await publishing
    assert isinstance(await life.lost(), ConnectionError)


async def test_session_that_ends_while_reading_a_row_is_a_loss(life: Life, run: Run, postgres_server: Endpoint) -> None:
    await life.link.subscribe([life.name("news")])
    await life.link.create_table()
    pid = life.link._listener._connection.get_server_pid()
    async with holding(postgres_server.url, f"LOCK TABLE {life.prefix}_spill"):
        note = f"{life.name('news')} table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55"
        await run("SELECT pg_notify($1, $2)", life.prefix, note)
        await wait_blocked(run, pid)
        await run("SELECT pg_terminate_backend($1)", pid)
        assert isinstance(await life.lost(), asyncpg.PostgresError)


async def test_making_the_table_can_be_cut_off(life: Life, run: Run, postgres_server: Endpoint) -> None:
    pid = life.link._notifier._connection.get_server_pid()
    lock = f"SELECT pg_advisory_xact_lock(hashtext('{life.link._notifier._table.name}'))"
    async with holding(postgres_server.url, lock):
        making = asyncio.create_task(life.link.create_table())
        await wait_blocked(run, pid)
        making.cancel()
        await asyncio.wait([making])
        assert making.cancelled()
        assert isinstance(await life.lost(), ConnectionError)  # nobody else could use the connection


async def test_session_settings_keep_a_listener_and_drop_a_dead_one(life: Life) -> None:
    for connection in (life.link._listener._connection, life.link._notifier._connection):
        assert await connection.fetchval("SHOW tcp_keepalives_idle") == "30"
        assert await connection.fetchval("SHOW tcp_user_timeout") in ("30s", "30000")
        assert await connection.fetchval("SHOW idle_session_timeout") == "0"
        assert await connection.fetchval("SHOW application_name") == "wsbroadcast"
