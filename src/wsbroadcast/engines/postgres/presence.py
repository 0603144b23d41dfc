"""Presence in Postgres: the questions to its tables."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic_core import from_json

from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.presence import PresenceStore
from wsbroadcast.engines.postgres.history import OLDEST_VERSION
from wsbroadcast.engines.postgres.notifier import SpillTable
from wsbroadcast.engines.postgres.presence_tables import PresenceTables
from wsbroadcast.engines.postgres.protocol import (
    Connection,
    PostgresError,
    Turns,
    UndefinedFunction,
    UndefinedTable,
    channel_of,
    drop,
    is_forbidden,
    is_loss,
    said,
)
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.presence import Members
from wsbroadcast.publication import PresenceChange

T = TypeVar("T")

SWEPT_MEMBERS = 500
"""How many members one sweep removes at most, because their channels wait meanwhile."""


class TablePresence(PresenceStore):
    """The steps of a link to Postgres for presence. One of its connections writes, the other one reads.

    Args:
        tables: The tables of presence.
        spill: The table for large envelopes.
        prefix: The engine's prefix.
        where: The engine and its broker's address, for errors.
        seconds: How many seconds a statement may wait for a lock.
        writing: The lock of the connection that publishes.
        reading: The lock of the connection that listens.
    """

    def __init__(
        self,
        tables: PresenceTables,
        spill: SpillTable,
        prefix: str,
        where: str,
        seconds: float,
        writing: asyncio.Lock,
        reading: asyncio.Lock,
    ) -> None:
        self._tables = tables
        self._spill = spill
        self._prefix = prefix
        self._where = where
        self._milliseconds = str(max(1, int(seconds * 1000)))
        self._names = AudienceNames(prefix)
        self._writer, self._reader = Turns(writing), Turns(reading)
        self._role = ""
        self._is_ready = False

    def open(self, listening: Connection, publishing: Connection, role: str) -> None:
        """Use these connections, which are open for this role."""
        self._writer.connection, self._reader.connection, self._role = publishing, listening, role

    async def join(self) -> None:
        """Wait until all that was asked has ended. The connections are gone."""
        await self._writer.join()
        await self._reader.join()

    # The steps.

    async def renew(self, incarnation: str, fresh: str, seconds: float) -> bool:
        """Renew a lease, or take a new one."""
        sql = self._tables.renew_sql
        return bool(await self._write(lambda connection: connection.fetchval(sql, incarnation, fresh, seconds)))

    async def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""
        rows = await self._read(lambda connection: connection.fetch(self._tables.alive_sql))
        return frozenset(incarnation for (incarnation,) in rows)

    async def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members. If the incarnation holds no lease, nobody is added."""
        audience = Audience("channel", channel)
        name, names = self._names.of(audience), list(members)
        values = (
            *(incarnation, name, json.dumps(channel), channel_of(name, self._prefix)),
            *(list(map(json.dumps, names)), [json.dumps(info.decode()) for info in members.values()]),
        )
        version, nths = await self._write(lambda connection: connection.fetchrow(self._tables.enter_sql, *values))
        if version is None:
            return None
        joined = {names[nth - 1]: members[names[nth - 1]] for nth in nths}
        return PresenceChange(audience, version, joined, by=incarnation)

    async def leave(self, channel: str, incarnation: str, members: Collection[str]) -> PresenceChange | None:
        """Remove members."""
        audience = Audience("channel", channel)
        values = incarnation, self._names.of(audience), list(map(json.dumps, members))
        version, gone = await self._write(lambda connection: connection.fetchrow(self._tables.leave_sql, *values))
        return None if version is None else PresenceChange(audience, version, {}, _texts(gone), incarnation)

    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove some of what dead incarnations have entered."""
        rows = await self._write(lambda connection: connection.fetch(self._tables.sweep_sql, SWEPT_MEMBERS))
        return [
            PresenceChange(Audience("channel", json.loads(channel)), version, {}, _texts(gone), by)
            for channel, version, by, gone in rows
        ]

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        name = self._names.of(Audience("channel", channel))
        row = await self._read(lambda connection: connection.fetchrow(self._tables.members_sql, name))
        if row is None:
            return Members(0, {})
        version, members = row
        infos = from_json(f"{{{members or ''}}}")
        return Members(version, {member: info.encode() for member, info in infos.items()})

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        name = self._names.of(Audience("channel", channel))
        return int(await self._read(lambda connection: connection.fetchval(self._tables.count_sql, name)) or 0)

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        name, sql = json.dumps(member), self._tables.channels_of_sql
        rows = await self._read(lambda connection: connection.fetch(sql, name))
        return _texts(channel for (channel,) in rows)

    # Asking the server.

    async def _write(self, ask: Callable[[Connection], Awaitable[T]]) -> T:
        async def write(connection: Connection) -> T:
            if self._is_ready:
                try:
                    return await ask(connection)
                except (UndefinedFunction, UndefinedTable):
                    pass  # somebody has removed the tables
            await self._prepare(connection)
            return await ask(connection)

        return await self._at(self._writer, write)

    async def _read(self, ask: Callable[[Connection], Awaitable[T]]) -> T:
        if not self._is_ready:
            await self._at(self._writer, self._prepare)
        return await self._at(self._reader, ask)

    async def _prepare(self, connection: Connection) -> None:
        tables = self._tables
        values = self._milliseconds, tables.schema, tables.parts
        *_, found = await connection.fetchrow(tables.prepare_sql, *values)
        if found != len(tables.parts):
            version = connection.get_server_version().major
            if version < OLDEST_VERSION:
                raise ConfigurationError(
                    f"{self._where} is PostgreSQL {version}, and presence needs {OLDEST_VERSION} or later: upgrade, or "
                    "leave presence= out"
                )
            await connection.execute(tables.create_sql)
        self._spill.expect_clean_up()
        self._is_ready = True

    async def _at(self, turns: Turns, ask: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            return await turns.run(ask)
        except ConfigurationError:
            raise
        except Exception as error:
            if is_loss(error, turns.connection):
                drop(turns.connection)  # nobody else is told
            elif isinstance(error, PostgresError) and is_forbidden(error):
                sql = (self._tables.grant_sql if self._is_ready else self._tables.permit_sql).format(role=self._role)
                raise ConfigurationError(
                    f"{self._where}: {said(error)}; for presence=, an administrator has to run: {sql}"
                ) from error
            self._is_ready = False  # the next call checks whether all tables are there
            raise EngineUnavailable(f"{self._where} can't be asked about presence: {said(error)}") from error


def _texts(found: Iterable[str]) -> frozenset[str]:
    return frozenset(map(json.loads, found))
