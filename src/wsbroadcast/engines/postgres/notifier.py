"""The connection to Postgres that publishes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID, uuid4

from wsbroadcast.engines.link import Parcel
from wsbroadcast.engines.postgres.driver import (
    Connection,
    PostgresError,
    UndefinedTable,
    drop,
    is_forbidden,
    is_full,
    is_loss,
    publish_error,
    refusal,
    said,
)
from wsbroadcast.engines.postgres.spill import NOTIFY, NOTIFY_ONE, SpillTable
from wsbroadcast.engines.postgres.wire import channel_of, pack, pack_row
from wsbroadcast.exceptions import ConfigurationError, EngineError

logger = logging.getLogger("wsbroadcast")


class _Letter(NamedTuple):
    """A parcel as it is published."""

    channel: str
    note: str
    row: UUID | None = None
    envelope: bytes = b""


class Notifier:
    """Publishes in one statement what it is given at once: all of it or nothing, in this order.

    Args:
        prefix: The engine's prefix.
        table: Where large envelopes go.
        where: The engine and its broker's address, for logs and errors.
    """

    def __init__(self, prefix: str, table: SpillTable, where: str) -> None:
        self._prefix = prefix
        self._table = table
        self._where = where
        self._connection: Connection = None
        self._role = ""
        self._takes_unicode = False
        # asyncpg allows one operation at a time on a connection.
        self._lock = asyncio.Lock()

    def open(self, connection: Connection, *, role: str, takes_unicode: bool) -> None:
        """Use this connection, which is open for this role."""
        self._connection = connection
        self._role = role
        self._takes_unicode = takes_unicode

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | None]:
        """Publish parcels, and once in a while remove rows that everybody has read.

        Returns:
            For each parcel what it was refused with, or `None`.

        Raises:
            Exception: If the connection is lost.
        """
        letters = [self._letter(parcel) for parcel in parcels]
        large = [letter for letter in letters if letter.row is not None]
        async with self._lock:
            try:
                errors = await self._publish(letters, large)
            except PostgresError as error:
                if is_loss(error, self._connection):
                    raise
                return [await self._refused(error)] * len(letters)
            await self._clean_up(len(large))
        return errors

    async def notify(self, channel: str, note: str) -> None:
        """Send one notification as it is.

        Raises:
            ConfigurationError: If we may not.
            Exception: If it is refused or the connection is lost.
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
            # To ask also removes what everybody has read, which a NOTIFY doesn't get to any more.
            await self._connection.execute("SELECT pg_notification_queue_usage()")
        return publish_error(error, self._where)

    def _letter(self, parcel: Parcel) -> _Letter:
        note = pack(parcel, takes_unicode=self._takes_unicode)
        if note is not None:
            return _Letter(channel_of(parcel.name, self._prefix), note)
        row = uuid4()
        return _Letter(self._prefix, pack_row(parcel.name, row), row, parcel.envelope)

    async def _publish(self, letters: list[_Letter], large: list[_Letter]) -> list[Exception | None]:
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
        if len(letters) == 1:  # spares the server a fifth of the time
            channel, note, *_ = letters[0]
            await self._connection.execute(NOTIFY_ONE, channel, note)
        else:
            await self._connection.execute(NOTIFY, [one.channel for one in letters], [one.note for one in letters])

    async def _publish_large(self, letters: list[_Letter], large: list[_Letter]) -> None:
        channels, notes = [one.channel for one in letters], [one.note for one in letters]
        rows, envelopes = [one.row for one in large], [one.envelope for one in large]
        try:
            await self._connection.execute(self._table.publish, channels, notes, rows, envelopes)
        except UndefinedTable:
            await self._create_table()
            await self._connection.execute(self._table.publish, channels, notes, rows, envelopes)
        except PostgresError as error:
            if not is_forbidden(error):
                raise
            raise self._not_permitted(error) from error
        self._table.expect_clean_up()

    async def create_table(self) -> None:
        """Make the table for large envelopes.

        Raises:
            ConfigurationError: If our role may not.
            Exception: If the connection is lost.
        """
        async with self._lock:
            try:
                await self._create_table()
            except asyncio.CancelledError:
                drop(self._connection)  # which no other call can use any more
                raise

    async def _create_table(self) -> None:
        try:
            await self._connection.execute(self._table.create)
        except PostgresError as error:
            if not is_forbidden(error):
                raise
            raise self._not_permitted(error) from error

    def _not_permitted(self, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"{self._where}: {said(error)}; a message over 7.5 kB needs a table, and an administrator can make it by:"
            f" {self._table.permit} {self._role}"
        )

    async def _clean_up(self, published: int) -> None:
        # With a publish, because there is always a next one: the engine's own echo.
        if not self._table.begin_clean_up():
            return
        is_behind = has_more = False
        try:
            if await self._connection.fetchval(self._table.exists):
                is_behind, has_more = await self._connection.fetchrow(self._table.clean_up, 2 * published)
        except PostgresError as error:
            if is_loss(error, self._connection):
                raise
            logger.warning("%s: old rows of %s can't be removed: %s", self._where, self._table.name, said(error))
        self._table.end_clean_up(is_behind=is_behind, has_more=has_more)
