"""The connection to Postgres that publishes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from wsbroadcast.engines.broker.link import KeptParcel, Parcel
from wsbroadcast.engines.postgres.history import Batch, Keeper
from wsbroadcast.engines.postgres.protocol import (
    Connection,
    PostgresError,
    UndefinedTable,
    channel_of,
    drop,
    is_forbidden,
    is_full,
    is_loss,
    pack,
    pack_row,
    publish_error,
    refusal,
    said,
)
from wsbroadcast.exceptions import ConfigurationError, EngineError
from wsbroadcast.history import Appended
from wsbroadcast.logs import about, logger
from wsbroadcast.text import plain


class _Letter(NamedTuple):
    """A parcel in the form in which it is published."""

    channel: str
    note: str
    row: UUID | None = None
    envelope: bytes = b""


class Notifier:
    """Publishes the parcels of one call in one statement, in this order: all of them or nothing.

    Args:
        prefix: The engine's prefix.
        table: The table for large envelopes.
        where: The engine and its broker's address, for logs and errors.
    """

    def __init__(self, prefix: str, table: SpillTable, where: str) -> None:
        self._prefix = prefix
        self._table = table
        self._where = where
        self._connection: Connection = None
        self._role = ""
        self._takes_unicode = False
        # Keeps what is to be kept; `None` if nothing is.
        self._keeper: Keeper | None = None
        self.lock = asyncio.Lock()
        """The lock of the connection, because asyncpg allows one operation at a time."""

    def open(self, connection: Connection, *, role: str, takes_unicode: bool) -> None:
        """Use this connection, which is open for this role."""
        self._connection = connection
        self._role = role
        self._takes_unicode = takes_unicode

    def keep(self, keeper: Keeper) -> None:
        """Take parcels that are to be kept, too."""
        self._keeper = keeper

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish parcels, and sometimes remove rows that everybody has read.

        Returns:
            For each parcel the error with which it was refused, where it is kept, or `None`.

        Raises:
            Exception: If the connection is lost.
        """
        kept = 0 if self._keeper is None else sum(isinstance(parcel, KeptParcel) for parcel in parcels)
        others = [parcel for parcel in parcels if not isinstance(parcel, KeptParcel)] if kept else parcels
        letters = [self._letter(parcel) for parcel in others]
        large = [letter for letter in letters if letter.row is not None]
        async with self.lock:
            try:
                results = await (self._append(parcels, letters, large) if kept else self._publish(letters, large))
            except PostgresError as error:
                # If the tables of the history are gone, the next link makes them anew.
                if is_loss(error, self._connection) or isinstance(error, UndefinedTable):
                    raise
                return [await self._refused(error)] * len(parcels)
            await self._clean_up(len(large))
            if self._keeper is not None:
                await self._keeper.trim()
        return results

    async def notify(self, channel: str, note: str) -> None:
        """Send one notification as it is.

        Raises:
            ConfigurationError: If the role may not.
            Exception: If it is refused, or the connection is lost.
        """
        try:
            await self._connection.execute(NOTIFY_ONE, channel, note)
        except PostgresError as error:
            if is_loss(error, self._connection):
                raise
            if is_forbidden(error):
                raise refusal(error, self._where) from error
            raise await self._refused(error) from error

    async def _refused(self, error: PostgresError) -> EngineError:
        if is_full(error):
            # This question also makes the server remove what everybody has read. A refused NOTIFY doesn't.
            await self._connection.execute("SELECT pg_notification_queue_usage()")
        return publish_error(error, self._where)

    def _letter(self, parcel: Parcel) -> _Letter:
        note = pack(parcel, takes_unicode=self._takes_unicode)
        if note is not None:
            return _Letter(channel_of(parcel.name, self._prefix), note)
        row = uuid4()
        return _Letter(self._prefix, pack_row(parcel.name, row), row, parcel.envelope)

    async def _append(
        self, parcels: Sequence[Parcel], letters: list[_Letter], large: list[_Letter]
    ) -> list[Exception | Appended | None]:
        # If the second statement is refused, rows without a notification do no harm.
        refused: ConfigurationError | None = None
        if large:
            try:
                await self._with_table(self._table.spill_sql, *_rows(large))
            except ConfigurationError as error:
                refused = error
        assert self._keeper is not None
        sent = iter(letters)
        between = [None if isinstance(parcel, KeptParcel) else next(sent) for parcel in parcels]
        is_refused = [refused is not None and one is not None and one.row is not None for one in between]
        notes = [
            None if one is None or is_out else (one.channel, one.note)
            for one, is_out in zip(between, is_refused, strict=True)
        ]
        batch = Batch(parcels, notes, self._prefix, takes_unicode=self._takes_unicode)
        results = await self._keeper.append(batch)
        return [refused if is_out else result for result, is_out in zip(results, is_refused, strict=True)]

    async def _publish(self, letters: list[_Letter], large: list[_Letter]) -> list[Exception | Appended | None]:
        if not large:
            await self._publish_small(letters)
            return [None] * len(letters)
        try:
            await self._publish_large(letters, large)
        except ConfigurationError as error:
            small = [letter for letter in letters if letter.row is None]
            if small:
                await self._publish_small(small)
            return [error if letter.row is not None else None for letter in letters]
        return [None] * len(letters)

    async def _publish_small(self, letters: list[_Letter]) -> None:
        if len(letters) == 1:  # this takes the server a fifth less time
            channel, note, *_ = letters[0]
            await self._connection.execute(NOTIFY_ONE, channel, note)
        else:
            await self._connection.execute(NOTIFY, [one.channel for one in letters], [one.note for one in letters])

    async def _publish_large(self, letters: list[_Letter], large: list[_Letter]) -> None:
        channels, notes = [one.channel for one in letters], [one.note for one in letters]
        await self._with_table(self._table.publish_sql, *_rows(large), channels, notes)

    async def _with_table(self, statement: str, *values: object) -> None:
        try:
            await self._connection.execute(statement, *values)
        except UndefinedTable:
            await self._create_table()
            await self._connection.execute(statement, *values)
        except PostgresError as error:
            if not is_forbidden(error):
                raise
            raise self._not_permitted(error) from error
        self._table.expect_clean_up()

    async def create_table(self) -> None:
        """Make the table for large envelopes.

        Raises:
            ConfigurationError: If the role may not make it.
            Exception: If the connection is lost.
        """
        async with self.lock:
            try:
                await self._create_table()
            except ConfigurationError:
                raise
            except BaseException as error:
                if is_loss(error, self._connection):
                    drop(self._connection)  # no other call can use it any more, and nobody else is told
                raise

    async def _create_table(self) -> None:
        try:
            await self._connection.execute(self._table.create_sql)
        except PostgresError as error:
            if not is_forbidden(error):
                raise
            raise self._not_permitted(error) from error

    def _not_permitted(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"{self._where}: {said(error)}; for messages over 7.5 kB, which need a table, an administrator has to run:"
            f" {self._table.permit_sql} {self._role}"
        )

    async def _clean_up(self, published: int) -> None:
        # It is done with a publish. There is always a next one: the engine's own echo.
        if not self._table.begin_clean_up():
            return
        is_behind = has_more = False
        try:
            if await self._connection.fetchval(self._table.exists_sql):
                is_behind, has_more = await self._connection.fetchrow(self._table.clean_up_sql, 2 * published)
        except PostgresError as error:
            if is_loss(error, self._connection):
                raise
            logger.warning(
                "%s: old rows of %s can't be removed: %s",
                self._where,
                self._table.name,
                said(error),
                extra=about("engine.upkeep_failed", engine="postgres"),
            )
        self._table.end_clean_up(is_behind=is_behind, has_more=has_more)


def _rows(large: list[_Letter]) -> tuple[list[UUID | None], list[bytes]]:
    return [one.row for one in large], [one.envelope for one in large]


# The table for envelopes that are too large for a notification of Postgres.


MAX_ENVELOPE_BYTES = 8 * 1024 * 1024
"""The largest envelope, in bytes. Over 100 Mbit/s it still takes less time than the timeout of a publish."""

KEPT_SECONDS = 60
"""For how many seconds a row is kept: longer than any node takes to read it."""

KEPT_IN_TRANSACTION_SECONDS = 900
"""The same for a row of the app's own transaction, which nobody can see before that ends."""

# How many rows one clean-up removes, so that the publish that does it takes only a moment.
_CLEAN_UP_ROWS = 64

_SCHEMA = re.compile(r"[A-Za-z0-9_-]{1,63}")

NOTIFY_ONE = "SELECT pg_notify($1, $2)"

# It is one statement, so there is one transaction, and one wait for the global lock that each commit with notifications
# takes. The notifications have the order of the sub-select. The count avoids a result row for each of them.
_NOTIFY = (
    "SELECT count(pg_notify(channel, note)) FROM (SELECT channel, note"
    " FROM unnest({}::text[], {}::text[]) WITH ORDINALITY AS notes (channel, note, place) ORDER BY place) AS ordered"
)
NOTIFY = _NOTIFY.format("$1", "$2")


class SpillTable:
    """The table for large envelopes. Each prefix has one, which is made when the first envelope needs it.

    It is unlogged: its rows live for a minute, and needn't be in the write-ahead log, in a backup or on a standby.

    Every node is told of every row, also of those for other nodes, and removes rows whose time is over. The time of the
    next clean-up is kept here and not in a link, because rows outlive links.

    Args:
        prefix: The engine's prefix.
        schema: The table's schema. It is fixed, because nodes with other roles may have another search path.

    Raises:
        ConfigurationError: If the schema's name has other characters than letters, digits, - and _, or is too long.
    """

    def __init__(self, prefix: str, schema: str) -> None:
        if not isinstance(schema, str) or not _SCHEMA.fullmatch(schema):
            raise ConfigurationError(f"schema must be 1 to 63 letters, digits, - or _, not {schema!r:.80}")
        self.name = f'"{plain(schema)}"."{prefix}_spill"'
        """The table's name as SQL has it; nothing in it needs an escape."""
        definition = "(id uuid PRIMARY KEY, expires timestamptz NOT NULL, envelope bytea NOT NULL)"
        create = f"CREATE UNLOGGED TABLE IF NOT EXISTS {self.name} {definition}"
        self.permit_sql = f"{create}; GRANT SELECT, INSERT, DELETE ON {self.name} TO"
        """The SQL for an administrator, without the role at its end."""
        # Two statements that create it at once would collide, even with IF NOT EXISTS.
        self.create_sql = f"SELECT pg_advisory_xact_lock(hashtext('{self.name}')); {create}"
        self.read_sql = (
            f"SELECT CASE WHEN octet_length(envelope) <= $2 THEN envelope END FROM {self.name} WHERE id = $1"  # noqa: S608
        )
        """Takes an id and a size in bytes; a larger envelope is null."""
        self.clean_up_sql = (
            f"WITH gone AS (DELETE FROM {self.name} WHERE id IN (SELECT id FROM {self.name}"  # noqa: S608
            f" WHERE expires < clock_timestamp() LIMIT {_CLEAN_UP_ROWS} + $1::int FOR UPDATE SKIP LOCKED) RETURNING id)"
            f" SELECT (SELECT count(*) FROM gone) >= {_CLEAN_UP_ROWS} + $1::int,"
            f" (SELECT count(*) FROM {self.name}) > (SELECT count(*) FROM gone)"
        )
        """Takes how many rows more than usual to remove. Tells whether there are more to remove, and more at all."""
        self.spill_sql = (
            f"INSERT INTO {self.name} (id, expires, envelope)"  # noqa: S608
            f" SELECT id, clock_timestamp() + interval '{KEPT_SECONDS} s', envelope"
            f" FROM unnest($1::uuid[], $2::bytea[]) AS rows (id, envelope)"
        )
        """Takes ids and envelopes."""
        self.publish_sql = f"WITH spilled AS ({self.spill_sql}) {_NOTIFY.format('$3', '$4')}"
        """Takes ids, envelopes, channels and texts."""
        self.exists_sql = f"SELECT to_regclass('{self.name}') IS NOT NULL"
        """Tells whether the table is there. If it isn't, the server's log has no error."""
        self.insert_sql = (
            f"INSERT INTO {self.name} (id, expires, envelope) VALUES (CAST({{id}} AS uuid), clock_timestamp()"  # noqa: S608
            f" + interval '{KEPT_IN_TRANSACTION_SECONDS} s', {{envelope}})"
        )
        """For the app's own transaction: takes `id` and `envelope`, which each driver writes in its own way."""
        # When to clean up next, by the monotonic clock; `None` if no rows are known. The first time is now, because
        # earlier processes may have left rows.
        self._clean_up_at: float | None = time.monotonic()
        # Until then there may be rows that a clean-up can't see, because their transaction has not ended.
        self._unseen_until = 0.0

    def expect_clean_up(self) -> None:
        """Take note that there is a row in the table."""
        if self._clean_up_at is None:
            self._clean_up_at = time.monotonic() + KEPT_SECONDS + 1

    def expect_commit(self) -> None:
        """Take note that there will be a row if a transaction is committed."""
        self._unseen_until = time.monotonic() + KEPT_IN_TRANSACTION_SECONDS + 1
        self.expect_clean_up()

    def begin_clean_up(self) -> bool:
        """Return whether it is time to remove rows. If that then fails, it is due again later."""
        now = time.monotonic()
        if self._clean_up_at is None or now < self._clean_up_at:
            return False
        self._clean_up_at = now + KEPT_SECONDS + 1
        return True

    def end_clean_up(self, *, is_behind: bool, has_more: bool) -> None:
        """Set the time of the next clean-up.

        Args:
            is_behind: Whether there are more rows whose time is over.
            has_more: Whether there are more rows at all.
        """
        now = time.monotonic()
        if is_behind:
            self._clean_up_at = now
        elif not has_more and now >= self._unseen_until:
            self._clean_up_at = None
