"""SQL on a connection that the app has open, without importing its driver."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from wsbroadcast.exceptions import ConfigurationError

ACCEPTED = (
    "an asyncpg.Connection, a psycopg.AsyncConnection or Connection, or SQLAlchemy's AsyncSession, AsyncConnection,"
    " Session or Connection"
)


class Transaction:
    """The transaction that the app's own connection is in.

    What runs in it is committed or rolled back by the app, together with its own statements. With a driver that isn't
    asynchronous, each statement blocks until it is answered.

    Args:
        connection: One of `ACCEPTED`.

    Raises:
        ConfigurationError: If it is none of them.
    """

    def __init__(self, connection: object) -> None:
        self._connection: Any = connection
        self._kind = _kind_of(connection)

    async def fetch(self, statement: str, values: Mapping[str, object]) -> tuple[Any, ...] | None:
        """Run a statement and return its first row, if it has one.

        Args:
            statement: SQL, with `{name}` where a value belongs; each name once, in the order of the values.
            values: The values by name.

        Raises:
            ConfigurationError: If the connection is to a server that isn't Postgres.
            Exception: Whatever the driver raises.
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
            raise ConfigurationError(f"the transaction is one of {connection.dialect.name}, not of Postgres")
        text = sys.modules["sqlalchemy"].text
        result = await _done(connection.execute(text(sql), dict(values)))
        row = result.first() if result.returns_rows else None
        return None if row is None else tuple(row)


# What to look for among a connection's types, so that one of the app's own that is derived from it will do: the
# package that it is from, its name, how it is used.
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
