"""The link to Postgres: one connection listens and reads large envelopes, another one publishes."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from uuid import uuid4

from wsbroadcast.concurrency import Patience, submit, wait_elsewhere
from wsbroadcast.engines.broker.link import Inlet, Parcel, Stretch
from wsbroadcast.engines.broker.presence import PresentLink
from wsbroadcast.engines.postgres.history import Keeper, Reader
from wsbroadcast.engines.postgres.notifier import MAX_ENVELOPE_BYTES, Notifier, SpillTable
from wsbroadcast.engines.postgres.presence import TablePresence
from wsbroadcast.engines.postgres.presence_tables import PresenceTables
from wsbroadcast.engines.postgres.protocol import (
    Connection,
    Note,
    PostgresError,
    channel_of,
    drop,
    is_loss,
    is_refusal,
    is_row,
    refusal,
    said,
    unpack,
)
from wsbroadcast.engines.postgres.tables import HistoryTables
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.options import Timing
from wsbroadcast.publication import Position

# The test notification of a link to itself may take this part of the time to connect, at most.
_ROUND_TRIP_PART = 1 / 2

# A statement may wait for a lock for this part of the time to publish. It is refused then, and the connection is kept.
_LOCK_PART = 1 / 2

# If a node vanishes, its session must end, because its unread notifications fill the server's queue. And a session that
# only listens must not be ended for being idle. Read from pg_settings, because older servers lack some of the settings.
# Two nodes that publish to one history wait for each other, whatever isolation level the database has by default.
_SETTINGS = (
    "SELECT count(set_config(name, CASE name WHEN 'tcp_keepalives_idle' THEN '30' WHEN 'tcp_user_timeout' THEN '30s'"
    " WHEN 'default_transaction_isolation' THEN 'read committed' ELSE '0' END, false)),"
    " pg_backend_pid(), current_database(), quote_ident(current_user), pg_is_in_recovery(),"
    # How many tables and functions of histories are there. They are passed as text[], because asyncpg would have to ask
    # the server what name[] is.
    " (SELECT count(*) FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname = $1 AND c.relname = ANY ($2::text[]::name[]))"
    " + (SELECT count(*) FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace"
    " WHERE n.nspname = $1 AND p.proname = ANY ($2::text[]::name[]))"
    " FROM pg_settings WHERE name IN ('tcp_keepalives_idle', 'tcp_user_timeout', 'idle_session_timeout',"
    " 'default_transaction_isolation')"
)


class PostgresLink(PresentLink):
    """A connection to listen and another to publish, so that neither waits for a large envelope of the other.

    Args:
        connect: Makes a connection, in the same way each time.
        prefix: The engine's prefix.
        table: The table for large envelopes.
        where: The engine and its broker's address, for logs and errors.
        timing: How long to wait for Postgres.
        history: The tables of histories.
        presence: The tables of presence.
        rules: What is kept; `None` if that isn't known, or if nothing is.
        only_publishes: Whether this program receives nothing.
    """

    max_envelope_bytes = MAX_ENVELOPE_BYTES

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        prefix: str,
        table: SpillTable,
        where: str,
        timing: Timing,
        history: HistoryTables,
        presence: PresenceTables,
        rules: HistoryRules | None = None,
        *,
        only_publishes: bool = False,
    ) -> None:
        super().__init__(rules, only_publishes=only_publishes)
        self._timing = timing
        self._connect = connect
        self._prefix = prefix
        self._where = where
        self._connections: list[Connection] = []
        # The event loop of the connections, once the link was opened.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._role = ""
        self._is_aborted = False
        self._notifier = Notifier(prefix, table, where)
        self._listener = Listener(prefix, table, history)
        self._history = history
        self._keeper = Keeper(history, where)
        self._reader = Reader(history, where, self._listener.lock)
        locks = self._notifier.lock, self._listener.lock
        self.presence: TablePresence = TablePresence(
            presence, table, prefix, where, timing.request_timeout * _LOCK_PART, *locks
        )
        self.is_kept = False
        """Whether all tables and functions of histories are there; known once the link was open."""
        self.is_open = False
        """Whether the link was opened and isn't aborted."""
        self.database: str | None = None
        """The database's name; known once the link was open."""
        self.takes_unicode = False
        """Whether the database is in UTF-8; known once the link was open."""

    async def open(self) -> None:
        """Open both connections at once, listen to the channel of other programs, and test a notification."""
        self._loop = asyncio.get_running_loop()
        opened = await asyncio.gather(self._open_one(), self._open_one(), return_exceptions=True)
        for each in opened:
            if isinstance(each, Exception) and is_refusal(each):
                raise refusal(each, self._where)
            if isinstance(each, BaseException):
                raise each
        (listening, pid), (publishing, _) = opened  # type: ignore[misc]  # no exception is left
        self._notifier.open(publishing, role=self._role, takes_unicode=self.takes_unicode)
        await self._listener.open(listening)
        self.presence.open(listening, publishing, self._role)
        if self.rules is not None or (self.learns and self.is_kept):
            await self._open_history(listening, publishing)
        await self._check_round_trip(listening, is_pooled=pid != listening.get_server_pid())
        self.is_open = True

    async def _open_one(self) -> tuple[Connection, int]:
        connection = await self._connect()
        self._connections.append(connection)
        if self._is_aborted:
            drop(connection)
            raise EngineUnavailable("the link was given up")
        connection.add_termination_listener(self._listener.lost)
        schema, parts = self._history.schema, self._history.parts
        found = await connection.fetchrow(_SETTINGS, schema, parts)
        _, pid, self.database, self._role, is_standby, count = found
        self.is_kept = count == len(parts)
        if is_standby:
            raise EngineUnavailable(f"{self._where} is a hot standby, which has no LISTEN")
        self.takes_unicode = connection.get_settings().server_encoding == "UTF8"
        return connection, pid

    async def _open_history(self, listening: Connection, publishing: Connection) -> None:
        self._reader.open(listening)
        seconds = self._timing.request_timeout * _LOCK_PART
        self.rules = await self._keeper.open(
            publishing, self._role, self.rules, seconds, is_made=self.is_kept, writes=self.writes
        )
        self.is_kept = True
        self._notifier.keep(self._keeper)

    async def _check_round_trip(self, listening: Connection, *, is_pooled: bool) -> None:
        # The queue may be full, NOTIFY forbidden, or LISTEN forgotten by a pooler. It is better to know it now than at
        # the first echo, when the outage has already been reported as over.
        came = asyncio.Event()
        token = f"{self._prefix}:link {uuid4().hex}"

        def on_notification(_connection: Connection, _pid: int, _channel: str, payload: str) -> None:
            if payload == token:
                came.set()

        await listening.add_listener(self._prefix, on_notification)
        await self._notifier.notify(self._prefix, token)
        try:
            async with Patience(self._timing.connect_timeout * _ROUND_TRIP_PART):
                await came.wait()
        except TimeoutError:
            if is_pooled:
                raise ConfigurationError(
                    f"{self._where} is reached through a pooler in transaction mode, which forgets LISTEN: name the"
                    " server itself, or the pooler's port for session mode"
                ) from None
            raise EngineUnavailable(f"{self._where} takes notifications but delivers none") from None
        await listening.remove_listener(self._prefix, on_notification)

    async def read(self, inlet: Inlet) -> None:
        """Hand over notifications as they come, and read large envelopes."""
        await self._listener.read(inlet)

    async def subscribe(self, names: Sequence[str]) -> None:
        """Let these names through, and listen to their channels."""
        await self._listener.subscribe(names)

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Let them through no more, and listen no longer to channels that none of ours is on."""
        await self._listener.unsubscribe(names)

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish in one statement. Envelopes that are too large for a notification go into a table."""
        return await self._notifier.publish(parcels)

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what was kept, on the listening connection, which doesn't wait for what is being published."""
        return await self._reader.read(name, since, history)

    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest positions, on the listening connection."""
        return await self._reader.positions(names, histories)

    async def forget(self, name: str) -> None:
        """Remove the rows and the counter of a name. The next question for the name makes another epoch."""
        await self._reader.forget(name)

    async def create_table(self) -> None:
        """Make the table for large envelopes, for a transaction of the app.

        The transaction may run in another event loop than the link, in another thread.

        Raises:
            ConfigurationError: If the role may not make it.
            Exception: If the connection is lost, or the link's event loop has ended.
        """
        if self._loop is None or self._loop is asyncio.get_running_loop():
            await self._notifier.create_table()
        else:
            await wait_elsewhere(submit(self._notifier.create_table(), self._loop), self._loop)

    async def abort(self) -> None:
        """Close both connections with a reset."""
        self._is_aborted = True
        self.is_open = False
        self._listener.close()
        connections, self._connections = self._connections, []
        for connection in connections:
            drop(connection)
        await asyncio.sleep(0)  # the sockets are closed in the next turn of the loop
        await self._reader.join()
        await self.presence.join()


# How many notifications may wait for a large envelope of the same name.
_MAX_HELD_BACK = 10_000


class Listener:
    """Listens to a few channels for any number of names, because the notifications have the names in them.

    Notifications go to the inlet as they come. If a large envelope has to be read from a table, later notifications of
    the same name are held back until then. Other names go on.

    Args:
        prefix: The engine's prefix.
        table: The table for large envelopes.
        history: The tables that have large envelopes that are kept.
    """

    def __init__(self, prefix: str, table: SpillTable, history: HistoryTables) -> None:
        self._prefix = prefix
        self._table = table
        self._history = history
        self._connection: Connection = None
        self.lock = asyncio.Lock()
        """The lock of the connection, because asyncpg allows one operation at a time."""
        self._inlet: Inlet | None = None
        self._names: set[str] = set()
        # How many subscribed names each of the listened channels has.
        self._channels: Counter[str] = Counter()
        # By name, the notification of a large envelope and all later ones, each with the time of the one before it.
        self._held_back: dict[str, deque[tuple[float, Note]]] = {}
        # When the last notification came.
        self._heard_at = 0.0
        # Names whose first large envelope is to be read from the table, or the reason why the connection was lost.
        self._to_read: asyncio.Queue[str | Exception] = asyncio.Queue()

    async def open(self, connection: Connection) -> None:
        """Use this connection, and listen to the channel of other programs."""
        self._connection = connection
        self._heard_at = asyncio.get_running_loop().time()
        await connection.add_listener(self._prefix, self._on_notification)

    def close(self) -> None:
        """Hand over nothing from now on."""
        self._inlet = None

    def lost(self, _connection: Connection) -> None:
        """End `read`, because the connection is gone."""
        self._to_read.put_nowait(ConnectionError("Postgres ended the connection"))

    async def subscribe(self, names: Sequence[str]) -> None:
        """Let these names through, and listen to their channels."""
        for name in names:
            if name in self._names:
                continue
            self._names.add(name)
            channel = channel_of(name, self._prefix)
            if channel not in self._channels:
                async with self.lock:
                    await self._connection.add_listener(channel, self._on_notification)
            self._channels[channel] += 1

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Let them through no more, and listen no longer to channels that none of ours is on."""
        for name in names:
            if name not in self._names:
                continue
            self._names.discard(name)
            self._held_back.pop(name, None)
            channel = channel_of(name, self._prefix)
            self._channels[channel] -= 1
            if not self._channels[channel]:
                del self._channels[channel]
                async with self.lock:
                    await self._connection.remove_listener(channel, self._on_notification)

    async def read(self, inlet: Inlet) -> None:
        """Hand over what comes, until the connection is lost. What is held back then is reported as missed.

        Raises:
            Exception: Why the connection was lost.
        """
        self._inlet = inlet
        try:
            await self._read(inlet)
        finally:
            if self._held_back:
                since = min(notes[0][0] for notes in self._held_back.values())
                inlet.missed("large messages were not read before the connection was lost", since)

    async def _read(self, inlet: Inlet) -> None:
        while True:
            name = await self._to_read.get()
            if isinstance(name, Exception):
                raise name
            notes = self._held_back.get(name)
            if notes is not None:
                await self._read_first(name, notes, inlet)

    async def _read_first(self, name: str, notes: deque[tuple[float, Note]], inlet: Inlet) -> None:
        since, note = notes[0]
        envelope = await self._read_row(note, since, inlet)
        if self._held_back.get(name) is not notes:
            return  # the name was unsubscribed meanwhile
        notes.popleft()
        if envelope is not None:
            inlet.take(name, envelope, note.place)
        while notes and (envelope := notes[0][1].envelope) is not None:
            inlet.take(name, envelope, notes.popleft()[1].place)
        if notes:
            self._to_read.put_nowait(name)  # after the other names that wait
        else:
            del self._held_back[name]

    async def _read_row(self, note: Note, since: float, inlet: Inlet) -> bytes | None:
        sql: str = self._history.row_sql
        position = note.place.position
        where: tuple[object, ...] = (position.epoch, position.offset)
        if note.row is not None:
            sql, where = self._table.read_sql, (note.row,)
        try:
            async with self.lock:
                found = await self._connection.fetchrow(sql, *where, MAX_ENVELOPE_BYTES)
        except PostgresError as error:
            if is_loss(error, self._connection):
                raise
            inlet.missed(f"a large message can't be read: {said(error)}", since)
            return None
        if found is None:
            inlet.missed("a large message was gone from the table before it was read", since)
            return None
        return found[0] or b""  # an empty one stands for one that is too large; it is dropped and counted

    def _on_notification(self, _connection: Connection, _pid: int, channel: str, payload: str) -> None:
        # A plain function: asyncpg would run each coroutine as its own task, in any order.
        inlet = self._inlet
        if inlet is None:
            return
        before, self._heard_at = self._heard_at, asyncio.get_running_loop().time()
        if is_row(payload):
            self._table.expect_clean_up()  # also if the row is for another node, because some node has to remove it
        name = payload.partition(" ")[0]
        if name not in self._names:
            if not name.startswith(f"{self._prefix}:"):  # else it is for an audience of another node
                inlet.take(channel, b"")  # it has no valid name: it is dropped and counted
            return
        try:
            note = unpack(payload)
        except ValueError:
            note = Note(name)  # it has an empty envelope, which is dropped and counted
        notes = self._held_back.get(name)
        if notes is not None:
            self._hold_back(before, note, notes, inlet)
        elif note.envelope is not None:
            inlet.take(name, note.envelope, note.place)
        else:
            self._held_back[name] = deque([(before, note)])
            self._to_read.put_nowait(name)

    def _hold_back(self, before: float, note: Note, notes: deque[tuple[float, Note]], inlet: Inlet) -> None:
        if len(notes) < _MAX_HELD_BACK:
            notes.append((before, note))
        else:
            inlet.missed("large messages come faster than they can be read")
