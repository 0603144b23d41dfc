"""The engine for apps whose only server is Postgres, by its LISTEN and NOTIFY. It needs the extra `postgres`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any, Self
from uuid import uuid4

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines import URL
from wsbroadcast.engines.broker import DEFAULT_TIMING, truth
from wsbroadcast.engines.broker.envelope import encode
from wsbroadcast.engines.broker.health import is_bug
from wsbroadcast.engines.broker.link import Keep, KeptParcel, Parcel
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.broker.presence import PresentEngine
from wsbroadcast.engines.postgres.history import outgoing
from wsbroadcast.engines.postgres.link import PostgresLink
from wsbroadcast.engines.postgres.notifier import MAX_ENVELOPE_BYTES, SpillTable
from wsbroadcast.engines.postgres.presence_tables import PresenceTables
from wsbroadcast.engines.postgres.protocol import channel_of, pack, pack_row
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.engines.postgres.url import read_url, split_url
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import History, HistoryRules
from wsbroadcast.options import Timing
from wsbroadcast.publication import Publication
from wsbroadcast.text import plain

_NOTIFY = "SELECT current_database(), pg_notify({channel}, {note})"

# For how many seconds a publisher in transactions uses the rules of the nodes that it has read.
_LEARN_SECONDS = 10.0


class PostgresEngine(PresentEngine):
    """Links nodes by LISTEN and NOTIFY. Each node has two connections.

    It can publish inside a transaction of the app: if that is rolled back, nothing is sent. A message that doesn't fit
    into a notification goes through a table, which is made when the first such message comes.

    Histories and presence are kept in unlogged tables, which a node makes when it first needs them. A crash of the
    server empties them.

    LISTEN needs a session. With PgBouncer, connect to its port for session mode, or to the server itself.

    Args:
        url: A URL of libpq or of SQLAlchemy. Several hosts are tried until one is a primary.
        prefix: The beginning of the names of Postgres's channels and tables. Apps that share a database need different
            prefixes.
        schema: The schema of the tables.
        fail_fast: Whether `start` raises if Postgres can't be reached. Otherwise it starts without Postgres.
        max_message_bytes: The largest payload that is taken from Postgres, in bytes.
        timing: How long to wait for Postgres.
        **options: Further arguments of `asyncpg.connect`, such as `ssl` or a function for `password`.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    name = "postgres"

    def __init__(
        self,
        url: URL = "postgresql://localhost",
        *,
        prefix: str = DEFAULT_PREFIX,
        schema: str = "public",
        fail_fast: bool = False,
        max_message_bytes: int = MAX_ENVELOPE_BYTES,
        timing: Timing = DEFAULT_TIMING,
        **options: Any,
    ) -> None:
        self._target = read_url(url, options)
        super().__init__(
            prefix=prefix,
            address=self._target.address,
            fail_fast=fail_fast,
            max_message_bytes=max_message_bytes,
            timing=timing,
        )
        self._prefix = plain(prefix)
        self._table = SpillTable(self._prefix, schema)
        self._history = HistoryTables(self._prefix, schema)
        self._presence = PresenceTables(self._prefix, schema, self._table)
        self._turns = count()
        # The rules of the nodes, as a transaction has read them, and when it did.
        self._learned: tuple[float, HistoryRules | None] | None = None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from a URL such as `postgresql://user:password@host/database?prefix=shop&sslmode=require`.

        Its query may have `prefix`, `schema`, `fail_fast=true` and the options of libpq that asyncpg knows.
        """
        url, ours = split_url(url, {"prefix", "schema", "fail_fast"})
        options: dict[str, Any] = dict(ours)
        if "fail_fast" in options:
            options["fail_fast"] = truth("fail_fast", options["fail_fast"], "Postgres")
        return cls(url, **options)

    def new_link(self) -> PostgresLink:
        """Make a link that isn't open yet."""
        connect = partial(self._target.connect, next(self._turns))
        where = f"postgres at {self.address}"
        return PostgresLink(
            connect,
            self._prefix,
            self._table,
            where,
            self._timing,
            self._history,
            self._presence,
            self.told_rules,
            only_publishes=self.only_publishes,
        )

    @property
    def history_sql(self) -> str:
        """The SQL that makes the tables and functions of histories. An administrator runs it if the app may not."""
        return self._history.create_sql

    @property
    def presence_sql(self) -> str:
        """The SQL that makes the tables and functions of presence. An administrator runs it if the app may not."""
        return self._presence.create_sql

    async def publish_in(self, transaction: object, publication: Publication, history: History | None = None) -> None:
        """Publish as part of a transaction that the app has begun: a commit sends the publication, a rollback doesn't.

        It uses the app's connection, so it also works while the engine's own connections are lost. Only the very first
        message that is too large for a notification needs one of these, to make the table.

        A publication that is kept gets its position at the commit. Until then nobody waits for it, and a rollback
        leaves no gap in the numbers. With the isolation levels REPEATABLE READ and SERIALIZABLE the commit fails if
        somebody else has published to the audience since the transaction began. Try the transaction again then.

        Args:
            transaction: An asyncpg or psycopg connection, or a session or connection of SQLAlchemy.
            publication: What to publish.
            history: How much is kept of its audience. If a publisher has no rules, it reads those of the nodes in the
                transaction, at most every 10 s.

        Raises:
            ConfigurationError: If `transaction` is something else, or is in another database, where nobody listens; or
                if its role may not use the tables of the history.
            MessageTooLarge: If the publication is larger than Postgres takes, or than `max_message_bytes`.
            EngineUnavailable: If the tables aren't there and can't be made now.
            Exception: If the driver of the transaction raises it.
        """
        running = Transaction(transaction)
        if publication.message.size > self._max_message_bytes:  # the nodes would drop it
            raise MessageTooLarge(publication.message.size, self._max_message_bytes)
        envelope = encode(publication, None)
        if len(envelope) > MAX_ENVELOPE_BYTES:
            overhead = len(envelope) - publication.message.size
            raise MessageTooLarge(publication.message.size, MAX_ENVELOPE_BYTES - overhead)
        link, name = self._postgres_link, self.names.of(publication.audience)
        if history is None and self.only_publishes and self.told_rules is None:
            rules = await self._learn_in(running)
            history = None if rules is None else rules.of(publication.audience)
        if history is None:
            row = await self._notify_in(running, Parcel(name, envelope))
        else:
            row = await self._append_in(running, KeptParcel(name, envelope, Keep(history)))
        if link is not None and link.database is not None and (row is None or row[0] != link.database):
            raise ConfigurationError(
                f"the transaction is in the database {row and row[0]!r}, and nobody listens there: roll it back"
            )

    async def _notify_in(self, running: Transaction, parcel: Parcel) -> tuple[Any, ...] | None:
        note = pack(parcel, takes_unicode=self._takes_unicode)
        channel = channel_of(parcel.name, self._prefix)
        if note is None:
            channel, note = self._prefix, await self._spill(running, parcel)
        return await running.fetch(_NOTIFY, {"channel": channel, "note": note})

    async def _learn_in(self, running: Transaction) -> HistoryRules | None:
        now = time.monotonic()
        if self._learned is None or now - self._learned[0] >= _LEARN_SECONDS:
            # An SQL error would end the app's transaction, so the permission is checked first.
            found = await running.fetch(self._history.may_learn_sql, {})
            rules = None
            if found == (False,):
                raise ConfigurationError(
                    f"postgres at {self.address}: nodes keep a history, but the transaction's role may not use its "
                    f"tables: an administrator has to run: {self._history.grant_sql.format(role='<the role>')}"
                )
            if found == (True,):
                row = await running.fetch(self._history.learn_sql, {})
                rules = None if row is None else HistoryRules.from_json(row[0].encode())
            self._learned = now, rules
        return self._learned[1]

    async def _append_in(self, running: Transaction, parcel: KeptParcel) -> tuple[Any, ...] | None:
        link = self._postgres_link
        if (link is None or not link.is_kept) and await running.fetch(self._history.exists_sql, {}) != (True,):
            raise EngineUnavailable(
                f"the tables of the history aren't there yet: start a node with history= first, which makes them at "
                f"postgres at {self.address}; nothing was sent"
            )
        return await running.fetch(
            self._history.outbox_sql, outgoing(parcel, self._prefix, takes_unicode=self._takes_unicode)
        )

    @property
    def _takes_unicode(self) -> bool:
        link = self._postgres_link
        return link is not None and link.takes_unicode

    @property
    def _postgres_link(self) -> PostgresLink | None:
        link = self.link
        assert link is None or isinstance(link, PostgresLink)
        return link

    async def _spill(self, running: Transaction, parcel: Parcel) -> str:
        if await running.fetch(self._table.exists_sql, {}) != (True,):
            await self._create_table()
        row = uuid4()
        self._table.expect_commit()
        await running.fetch(self._table.insert_sql, {"id": row.hex, "envelope": parcel.envelope})
        return pack_row(parcel.name, row)

    async def _create_table(self) -> None:
        # Not in the app's transaction: there the table would be locked for everybody until the transaction ends.
        link = opened = self._postgres_link
        try:
            async with Patience(self._timing.request_timeout):
                if link is None:  # an outage, or a publisher that has only published in transactions
                    link = self.new_link()
                    await link.open()
                await link.create_table()
        except ConfigurationError:
            raise
        except Exception as error:
            if is_bug(error):
                raise
            raise EngineUnavailable(
                f"postgres at {self.address} is out of reach, so the table for messages over 7.5 kB can't be made;"
                " nothing was sent"
            ) from error
        finally:
            if opened is None and link is not None:
                await link.abort()


ACCEPTED = (
    "an asyncpg.Connection, a psycopg.AsyncConnection or Connection, or SQLAlchemy's AsyncSession, AsyncConnection,"
    " Session or Connection"
)


class Transaction:
    """The transaction that the app's connection is in.

    The app commits or rolls back what runs in it, together with its own statements. With a synchronous driver each
    statement blocks until it is answered.

    Args:
        connection: One of `ACCEPTED`.

    Raises:
        ConfigurationError: If it is another object.
    """

    def __init__(self, connection: object) -> None:
        self._connection: Any = connection
        self._kind = _kind_of(connection)

    async def fetch(self, statement: str, values: Mapping[str, object]) -> tuple[Any, ...] | None:
        """Run a statement and return its first row, if it has one.

        Args:
            statement: SQL, with `{name}` in place of a value; each name once, in the order of the values.
            values: The values by name.

        Raises:
            ConfigurationError: If the connection is to a server that isn't Postgres.
            Exception: If the driver raises it.
        """
        if self._kind == "asyncpg":
            numbered = {name: f"${number}" for number, name in enumerate(values, 1)}
            row = await self._connection.fetchrow(statement.format(**numbered), *values.values())
            return None if row is None else tuple(row)
        if self._kind == "psycopg":
            return await self._fetch_psycopg(statement.format(**{name: f"%({name})s" for name in values}), values)
        return await self._fetch_sqlalchemy(statement.format(**{name: f":{name}" for name in values}), values)

    async def _fetch_psycopg(self, sql: str, values: Mapping[str, object]) -> tuple[Any, ...] | None:
        cursor = self._connection.cursor(row_factory=lambda _: tuple)
        try:
            await _done(cursor.execute(sql, values))
            row: tuple[Any, ...] | None = None if cursor.description is None else await _done(cursor.fetchone())
            return row
        finally:
            await _done(cursor.close())

    async def _fetch_sqlalchemy(self, sql: str, values: Mapping[str, object]) -> tuple[Any, ...] | None:
        connection = self._connection
        if self._kind == "sqlalchemy session":
            connection = await _done(connection.connection())
        if connection.dialect.name != "postgresql":
            raise ConfigurationError(f"the transaction must be of Postgres, not of {connection.dialect.name}")
        text = sys.modules["sqlalchemy"].text
        result = await _done(connection.execute(text(sql), dict(values)))
        row = result.first() if result.returns_rows else None
        return None if row is None else tuple(row)


# The classes of connections: package and name, and how to use it. All base classes of a connection are looked at, so
# that a subclass of the app will do.
_KINDS = {
    ("asyncpg", "Connection"): "asyncpg",
    ("asyncpg", "PoolConnectionProxy"): "asyncpg",
    ("psycopg", "AsyncConnection"): "psycopg",
    ("psycopg", "Connection"): "psycopg",
    ("sqlalchemy", "AsyncConnection"): "sqlalchemy connection",
    ("sqlalchemy", "Connection"): "sqlalchemy connection",
    ("sqlalchemy", "AsyncSession"): "sqlalchemy session",
    ("sqlalchemy", "Session"): "sqlalchemy session",
    ("sqlalchemy", "async_scoped_session"): "sqlalchemy session",
    ("sqlalchemy", "scoped_session"): "sqlalchemy session",
}


def _kind_of(connection: object) -> str:
    for each in type(connection).__mro__:
        found = _KINDS.get((each.__module__.partition(".")[0], each.__name__))
        if found is not None:
            return found
    kind = type(connection)
    raise ConfigurationError(f"transaction must be {ACCEPTED}, not {kind.__module__}.{kind.__name__}")


async def _done(result: Any) -> Any:
    return await result if hasattr(result, "__await__") else result
