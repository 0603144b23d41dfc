"""One life of two connections to Postgres: one listens and reads large envelopes, one publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from uuid import uuid4

from wsbroadcast.concurrency import Patience, submit, wait_elsewhere
from wsbroadcast.engines.broker.link import Inlet, Link, Parcel
from wsbroadcast.engines.postgres.listener import Listener
from wsbroadcast.engines.postgres.notifier import MAX_ENVELOPE_BYTES, Notifier, SpillTable
from wsbroadcast.engines.postgres.protocol import Connection, drop, is_refusal, refusal
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.options import Timing

# A notification to ourselves takes this part of the time to connect, at most.
_ROUND_TRIP_PART = 1 / 2

# A node that is gone without a word must not keep its session, whose unread notifications fill the server's queue; and
# one that only listens is idle on purpose. From pg_settings, because older servers lack one or the other.
_SETTINGS = (
    "SELECT count(set_config(name, CASE name WHEN 'tcp_keepalives_idle' THEN '30' WHEN 'tcp_user_timeout' THEN '30s'"
    " ELSE '0' END, false)), pg_backend_pid(), current_database(), quote_ident(current_user), pg_is_in_recovery()"
    " FROM pg_settings WHERE name IN ('tcp_keepalives_idle', 'tcp_user_timeout', 'idle_session_timeout')"
)


class PostgresLink(Link):
    """A connection to listen and one to publish, so that neither waits for a large envelope of the other.

    Args:
        connect: Makes a connection, the same way each time.
        prefix: The engine's prefix.
        table: Where large envelopes go.
        where: The engine and its broker's address, for logs and errors.
        timing: How long to wait for Postgres.
    """

    max_envelope_bytes = MAX_ENVELOPE_BYTES

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        prefix: str,
        table: SpillTable,
        where: str,
        timing: Timing,
    ) -> None:
        self._timing = timing
        self._connect = connect
        self._prefix = prefix
        self._where = where
        self._connections: list[Connection] = []
        # Where the connections live, once it was opened.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._role = ""
        self._is_aborted = False
        self._notifier = Notifier(prefix, table, where)
        self._listener = Listener(prefix, table)
        self.is_open = False
        """Whether it was opened and isn't aborted."""
        self.database: str | None = None
        """The database's name, once the link was open."""
        self.takes_unicode = False
        """Whether the database is in UTF-8; known once the link was open."""

    async def open(self) -> None:
        """Connect both at once, listen to the channel of other programs, and see whether a notification comes back."""
        self._loop = asyncio.get_running_loop()
        opened = await asyncio.gather(self._open_one(), self._open_one(), return_exceptions=True)
        for each in opened:
            if isinstance(each, Exception) and is_refusal(each):
                raise refusal(each, self._where)
            if isinstance(each, BaseException):
                raise each
        (listening, pid), (publishing, _) = opened  # type: ignore[misc]  # no exception is left
        await self._listener.open(listening)
        self._notifier.open(publishing, role=self._role, takes_unicode=self.takes_unicode)
        await self._check_round_trip(listening, is_pooled=pid != listening.get_server_pid())
        self.is_open = True

    async def _open_one(self) -> tuple[Connection, int]:
        connection = await self._connect()
        self._connections.append(connection)
        if self._is_aborted:
            drop(connection)
            raise EngineUnavailable("the link was given up")
        connection.add_termination_listener(self._listener.lost)
        _, pid, self.database, self._role, is_standby = await connection.fetchrow(_SETTINGS)
        if is_standby:
            raise EngineUnavailable(f"{self._where} is a hot standby, which has no LISTEN")
        self.takes_unicode = connection.get_settings().server_encoding == "UTF8"
        return connection, pid

    async def _check_round_trip(self, listening: Connection, *, is_pooled: bool) -> None:
        # A queue that is full, a NOTIFY that is forbidden, a LISTEN that is forgotten: better known now than at the
        # first echo, when the outage was said to be over.
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
                    f"{self._where} is reached through a pooler in transaction mode, which forgets LISTEN; name the"
                    " server itself, or the pooler's port for session mode"
                ) from None
            raise EngineUnavailable(f"{self._where} takes notifications and brings none") from None
        await listening.remove_listener(self._prefix, on_notification)

    async def read(self, inlet: Inlet) -> None:
        """Hand over notes as they come, and read large envelopes."""
        await self._listener.read(inlet)

    async def subscribe(self, names: Sequence[str]) -> None:
        """Let these names through, and listen to their channels."""
        await self._listener.subscribe(names)

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Let them through no more, and listen no longer to channels that none of ours is on."""
        await self._listener.unsubscribe(names)

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | None]:
        """Publish in one statement; what is too large for a note goes into the table, in the same statement."""
        return await self._notifier.publish(parcels)

    async def create_table(self) -> None:
        """Make the table for large envelopes, before somebody else's transaction needs it.

        That transaction may run in another event loop than the link, of another thread.

        Raises:
            ConfigurationError: If our role may not.
            Exception: If the connection is lost, or the link's event loop has ended.
        """
        if self._loop is None or self._loop is asyncio.get_running_loop():
            await self._notifier.create_table()
        else:
            await wait_elsewhere(submit(self._notifier.create_table(), self._loop), self._loop)

    async def abort(self) -> None:
        """Close both with a reset."""
        self._is_aborted = True
        self.is_open = False
        self._listener.close()
        connections, self._connections = self._connections, []
        for connection in connections:
            drop(connection)
        await asyncio.sleep(0)  # then the sockets are closed
