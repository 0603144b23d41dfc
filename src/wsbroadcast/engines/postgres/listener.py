"""The connection to Postgres that listens."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from uuid import UUID

from wsbroadcast.engines.broker.link import Inlet
from wsbroadcast.engines.postgres.notifier import MAX_ENVELOPE_BYTES, SpillTable
from wsbroadcast.engines.postgres.protocol import (
    Connection,
    Note,
    PostgresError,
    channel_of,
    is_loss,
    is_row,
    said,
    unpack,
)

# Notes that wait for a large envelope of the same name, at most.
_MAX_HELD_BACK = 10_000


class Listener:
    """Listens to a few channels, however many names are subscribed: names travel in the notes.

    Notes go to the inlet as they come. What comes behind a large envelope of the same name is held back until that is
    read from the table; other names go on.

    Args:
        prefix: The engine's prefix.
        table: Where large envelopes are.
    """

    def __init__(self, prefix: str, table: SpillTable) -> None:
        self._prefix = prefix
        self._table = table
        self._connection: Connection = None
        # asyncpg allows one operation at a time on a connection.
        self._lock = asyncio.Lock()
        self._inlet: Inlet | None = None
        self._names: set[str] = set()
        # How many of our names are on each channel that we listen to.
        self._channels: Counter[str] = Counter()
        # By name, the notes behind a large envelope, with its own first; each with the time of what came before it.
        self._held_back: dict[str, deque[tuple[float, Note]]] = {}
        # When the last notification came.
        self._heard_at = 0.0
        # Names whose first note is to be read from the table, or why the connection was lost.
        self._to_read: asyncio.Queue[str | Exception] = asyncio.Queue()

    async def open(self, connection: Connection) -> None:
        """Use this connection, and listen to what other programs publish."""
        self._connection = connection
        self._heard_at = asyncio.get_running_loop().time()
        await connection.add_listener(self._prefix, self._on_notification)

    def close(self) -> None:
        """Hand over nothing any more."""
        self._inlet = None

    def lost(self, _connection: Connection) -> None:
        """End `read`: a connection is gone."""
        self._to_read.put_nowait(ConnectionError("Postgres ended the connection"))

    async def subscribe(self, names: Sequence[str]) -> None:
        """Let these names through, and listen to their channels."""
        for name in names:
            if name in self._names:
                continue
            self._names.add(name)
            channel = channel_of(name, self._prefix)
            if channel not in self._channels:
                async with self._lock:
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
                async with self._lock:
                    await self._connection.remove_listener(channel, self._on_notification)

    async def read(self, inlet: Inlet) -> None:
        """Hand over what comes, until the connection is lost; what is held back then is missed.

        Raises:
            Exception: Why it was lost.
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
        assert note.row is not None
        envelope = await self._read_row(note.row, since, inlet)
        if self._held_back.get(name) is not notes:
            return  # unsubscribed meanwhile
        notes.popleft()
        if envelope is not None:
            inlet.take(name, envelope)
        while notes and notes[0][1].row is None:
            inlet.take(name, notes.popleft()[1].envelope)
        if notes:
            self._to_read.put_nowait(name)  # behind the other names that wait
        else:
            del self._held_back[name]

    async def _read_row(self, row: UUID, since: float, inlet: Inlet) -> bytes | None:
        try:
            async with self._lock:
                found = await self._connection.fetchrow(self._table.read, row, MAX_ENVELOPE_BYTES)
        except PostgresError as error:
            if is_loss(error, self._connection):
                raise
            inlet.missed(f"a large message can't be read: {said(error)}", since)
            return None
        if found is None:
            inlet.missed("a large message was gone from the table before it was read", since)
            return None
        return found[0] or b""  # an empty envelope, as for one that is too large, is dropped and counted

    def _on_notification(self, _connection: Connection, _pid: int, channel: str, payload: str) -> None:
        # Synchronous, because asyncpg runs each coroutine as a task of its own, in any order.
        inlet = self._inlet
        if inlet is None:
            return
        before, self._heard_at = self._heard_at, asyncio.get_running_loop().time()
        if is_row(payload):
            self._table.expect_clean_up()  # whoever it is for: somebody has to remove it
        name = payload.partition(" ")[0]
        if name not in self._names:
            if not name.startswith(f"{self._prefix}:"):  # else somebody else's audience
                inlet.take(channel, b"")  # no name at all: dropped and counted
            return
        try:
            note = unpack(payload)
        except ValueError:
            note = Note(name)  # an empty envelope, which is dropped and counted
        notes = self._held_back.get(name)
        if notes is not None:
            self._hold_back(before, note, notes, inlet)
        elif note.row is None:
            inlet.take(name, note.envelope)
        else:
            self._held_back[name] = deque([(before, note)])
            self._to_read.put_nowait(name)

    def _hold_back(self, before: float, note: Note, notes: deque[tuple[float, Note]], inlet: Inlet) -> None:
        if len(notes) < _MAX_HELD_BACK:
            notes.append((before, note))
        else:
            inlet.missed("large messages come faster than they can be read")
