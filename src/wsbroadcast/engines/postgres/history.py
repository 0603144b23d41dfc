"""Histories in Postgres: appending, reading, and removing what is too old."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

from wsbroadcast.engines.broker.link import Entry, KeptParcel, Parcel, Stretch
from wsbroadcast.engines.postgres.protocol import (
    Connection,
    PostgresError,
    Turns,
    UndefinedTable,
    channel_of,
    drop,
    is_forbidden,
    is_loss,
    pack_kept,
    said,
)
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.logs import about, logger
from wsbroadcast.publication import Position

OLDEST_VERSION = 13
"""The oldest PostgreSQL that can keep histories. Since it, random ids and 64-bit transaction ids are in the server."""

# Seconds between two removals of what is too old. If more is left, the next publish removes again.
_TRIM_SECONDS = 10.0


def outgoing(parcel: KeptParcel, prefix: str, *, takes_unicode: bool) -> dict[str, object]:
    """Return the row of a parcel for the outbox."""
    history = parcel.keep.history
    form, body = pack_kept(parcel, takes_unicode=takes_unicode)
    return {
        "name": parcel.name,
        "channel": channel_of(parcel.name, prefix),
        "form": form,
        "body": body,
        "envelope": parcel.envelope if body is None else None,
        "is_kept": _is_kept(parcel),
        "messages": history.messages,
        "seconds": history.seconds,
        "remember": history.remember,
    }


def _is_kept(parcel: KeptParcel) -> bool:
    # The limit is for the payload, which comes after the header.
    envelope, most = parcel.envelope, parcel.keep.history.max_kept_bytes
    return len(envelope) <= most or len(envelope) - envelope.find(b"\n") - 1 <= most


_ANY = History()


class Batch:
    """The parcels of one append statement: its arguments, and its result.

    Args:
        parcels: Parcels that are to be kept, and others that are sent between them.
        notes: The channel and the notification of each parcel that isn't kept; `None` for one that isn't sent.
        prefix: The engine's prefix.
        takes_unicode: Whether the database is in UTF-8.
    """

    def __init__(
        self, parcels: Sequence[Parcel], notes: Sequence[tuple[str, str] | None], prefix: str, *, takes_unicode: bool
    ) -> None:
        names = sorted({parcel.name for parcel in parcels if isinstance(parcel, KeptParcel)})
        self._at = {name: index for index, name in enumerate(names)}
        self._counts = [0] * len(names)
        self._histories: list[History] = [_ANY] * len(names)
        self._rows: list[tuple[object, ...]] = []
        # By parcel: the place of its row, the index of its name, and whether it repeats another one of this batch.
        self._places: list[tuple[int, int, bool] | None] = []
        self._seen: dict[tuple[str, str], int] = {}
        for parcel, note in zip(parcels, notes, strict=True):
            if isinstance(parcel, KeptParcel):
                self._places.append(self._keep(parcel, prefix, takes_unicode))
            else:
                self._places.append(None)
                if note is not None:
                    self._rows.append((note[0], None, None, None, note[1], None, None, None))

    def _keep(self, parcel: KeptParcel, prefix: str, takes_unicode: bool) -> tuple[int, int, bool]:
        name, envelope = parcel
        history, key = parcel.keep
        at, row = self._at[name], len(self._rows)
        if key is not None and self._seen.setdefault((name, key), row) != row:
            return self._seen[name, key], at, True
        self._histories[at] = history
        self._counts[at] += 1
        form, body = pack_kept(parcel, takes_unicode=takes_unicode)
        self._rows.append(
            (
                channel_of(name, prefix),
                at + 1,  # arrays begin at 1 in Postgres
                self._counts[at],
                form,
                body,
                envelope if body is None else None,
                _is_kept(parcel),
                None if key is None else _digest(key),
            )
        )
        return row, at, False

    @property
    def arguments(self) -> Sequence[object]:
        """The arguments of `HistoryTables.append_sql`."""
        messages, seconds, remember = zip(*((h.messages, h.seconds, h.remember) for h in self._histories), strict=True)
        *columns, keys = zip(*self._rows, strict=True)
        return [list(self._at), self._counts, messages, seconds, remember, *columns, keys if any(keys) else None]

    def appended(self, found: Any) -> list[Appended | None]:
        """Return where each parcel is kept, from the result of the statement."""
        epochs, bases, repeats = found
        tops = list(bases)
        positions: dict[int, Appended] = {}
        result: list[Appended | None] = []
        for place in self._places:
            if place is None:
                result.append(None)
                continue
            row, at, is_repeat = place
            if is_repeat:
                appended = Appended(positions[row].position, is_repeat=True)
            elif repeats is not None and repeats[row] is not None:
                appended = Appended(Position(epochs[at], repeats[row]), is_repeat=True)
            else:
                tops[at] += 1
                appended = Appended(Position(epochs[at], tops[at]))
            positions[row] = appended
            result.append(appended)
        return result


def _digest(key: str) -> bytes:
    # A key may be of any length, and may have characters that a text of Postgres can't have.
    return blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest()


class Keeper:
    """Appends on the publishing connection, and removes what is too old.

    Args:
        tables: The tables.
        where: The engine and its broker's address, for logs and errors.
    """

    def __init__(self, tables: HistoryTables, where: str) -> None:
        self._tables = tables
        self._where = where
        self._connection: Connection = None
        self._trim_at = 0.0
        # The name of the counter at which the last trim ended.
        self._trimmed = ""

    async def open(
        self,
        connection: Connection,
        role: str,
        rules: HistoryRules | None,
        seconds: float,
        *,
        is_made: bool,
        writes: bool,
    ) -> HistoryRules | None:
        """Use this connection; make the tables if rules are given, and return the rules that count.

        Args:
            connection: The publishing connection.
            role: The role of the connection, quoted for SQL.
            rules: What is kept; `None` if it isn't known here.
            seconds: How many seconds a statement may wait for a lock.
            is_made: Whether the tables are there.
            writes: Whether to write the rules down.

        Raises:
            ConfigurationError: If the server is too old, or the role lacks a permission.
        """
        self._connection = connection
        try:
            if not is_made:
                await self._make()
            before, is_permitted = await self._write(rules if writes else None, seconds)
        except PostgresError as error:
            if not is_forbidden(error):
                raise
            sql = self._tables.grant_sql if is_made else self._tables.permit_sql
            raise self._not_permitted(said(error), sql.format(role=role)) from error
        if not is_permitted:
            raise self._not_permitted(f"{role} may not use its tables", self._tables.grant_sql.format(role=role))
        if before is not None and rules is None:
            return HistoryRules.from_json(before.encode())
        if before is not None and rules is not None and writes:
            self._tables.compare(rules, before, self._where)
        return rules

    async def _make(self) -> None:
        version = self._connection.get_server_version().major
        if version < OLDEST_VERSION:
            raise ConfigurationError(
                f"{self._where} is PostgreSQL {version}, and history needs {OLDEST_VERSION} or later: upgrade, or "
                "leave history= out"
            )
        await self._connection.execute(self._tables.create_sql)

    async def _write(self, rules: HistoryRules | None, seconds: float) -> tuple[str | None, bool]:
        text = None if rules is None else rules.to_json().decode()
        milliseconds = str(max(1, int(seconds * 1000)))
        before, is_restored, _, is_permitted = await self._connection.fetchrow(
            self._tables.open_sql, text, milliseconds, self._tables.tables
        )
        if is_restored:
            logger.warning(
                "%s: the tables of the history were restored: new histories begin",
                self._where,
                extra=about("history.restored", engine="postgres"),
            )
            await self._connection.execute(self._tables.renew_sql)
        return before, is_permitted

    def _not_permitted(self, why: str, sql: str) -> ConfigurationError:
        return ConfigurationError(f"{self._where}: {why}; for history=, an administrator has to run: {sql}")

    async def append(self, batch: Batch) -> list[Appended | None]:
        """Keep, number and send the parcels of a batch in one step.

        Raises:
            Exception: If it is refused, or the connection is lost.
        """
        return batch.appended(await self._connection.fetchrow(self._tables.append_sql, *batch.arguments))

    async def trim(self) -> None:
        """Remove some of what is too old, if that is due."""
        # It is done with a publish. There is always a next one: the engine's own echo.
        now = time.monotonic()
        if now < self._trim_at:
            return
        self._trim_at = now + _TRIM_SECONDS
        try:
            self._trimmed, has_more = await self._connection.fetchrow(self._tables.trim_sql, self._trimmed)
        except PostgresError as error:
            if is_loss(error, self._connection):
                raise
            self._trim_at = now + 6 * _TRIM_SECONDS
            logger.warning(
                "%s: what is too old can't be removed: %s",
                self._where,
                said(error),
                extra=about("history.upkeep_failed", engine="postgres"),
            )
        else:
            if has_more:
                self._trim_at = now


class Reader:
    """Reads what is kept, on the listening connection, which never waits for a large batch that is being published.

    Args:
        tables: The tables.
        where: The engine and its broker's address, for errors.
        lock: The lock of the connection, because asyncpg allows one operation at a time.
    """

    def __init__(self, tables: HistoryTables, where: str, lock: asyncio.Lock) -> None:
        self._tables = tables
        self._where = where
        self._turns = Turns(lock)

    def open(self, connection: Connection) -> None:
        """Use this connection."""
        self._turns.connection = connection

    async def read(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what was kept under a name; see `KeepingLink.read_kept`."""
        least = -1 if since is None else since
        rows = await self._fetch(self._tables.read_sql, name, history.remember, least, history.messages)
        epoch, top, *_ = rows[0]
        entries = [
            Entry(envelope, place, age, place - 1) for _, _, place, age, envelope in reversed(rows) if place is not None
        ]
        base = top
        for entry in reversed(entries):
            if entry.offset != base:
                break  # the message after this one was too large to be kept
            base -= 1
        return Stretch(Position(epoch, top), entries, base)

    async def positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest position under each name; see `KeepingLink.read_positions`."""
        remember = [history.remember for history in histories]
        rows = await self._fetch(self._tables.positions_sql, names, remember)
        return [Position(*row) for row in rows]

    async def forget(self, name: str) -> None:
        """Remove what is kept under a name."""
        await self._fetch(self._tables.forget_sql, name)

    async def _fetch(self, sql: str, *arguments: object) -> Sequence[Any]:
        async def fetch(connection: Connection) -> Sequence[Any]:
            while True:
                rows: Sequence[Any] = await connection.fetch(sql, *arguments)
                if rows and all(row[0] is not None for row in rows):
                    return rows
                # Another node has made an epoch meanwhile, which this statement didn't see.

        try:
            return await self._turns.run(fetch)
        except Exception as error:
            # If asyncpg itself has closed the connection, it tells nobody else. The next link makes missing tables.
            if is_loss(error, self._turns.connection) or isinstance(error, UndefinedTable):
                drop(self._turns.connection)
            raise EngineUnavailable(f"{self._where} can't be read now: {said(error)}") from error

    async def join(self) -> None:
        """Wait until all that was asked has ended. The connection is gone."""
        await self._turns.join()
