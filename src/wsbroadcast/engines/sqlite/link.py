"""The link to a file: a thread that writes, a thread that reads, and a socket by which processes wake each other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wsbroadcast.engines.broker.link import Inlet, Parcel, Stretch
from wsbroadcast.engines.broker.presence import PresenceStore, PresentLink
from wsbroadcast.engines.sqlite.file import Bell, bells_of
from wsbroadcast.engines.sqlite.presence import Attendance, Pack
from wsbroadcast.engines.sqlite.store import READ_ROWS, Store
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.presence import Members
from wsbroadcast.publication import Position, PresenceChange

T = TypeVar("T")

# How often, in seconds, to read although no bell has rung, because a ring may get lost. Where there are no bells, this
# is the only way.
_LOOK_SECONDS = 0.5
_LOOK_SECONDS_WITHOUT_BELLS = 0.02

# How often, in seconds, to check that the path still leads to the open file.
_IDENTITY_SECONDS = 0.5

# The largest payload that SQLite stores by default, with room for the header.
MAX_ENVELOPE_BYTES = 500_000_000


class SQLiteLink(PresentLink):
    """A node's link to a file.

    Args:
        path: The path of the file.
        prefix: The beginning of all names.
        pack: Makes the parcel that is sent for a change of presence.
        rules: What is kept.
        only_publishes: Whether this program receives nothing.
        busy_seconds: How many seconds to wait for another writer.
    """

    max_envelope_bytes = MAX_ENVELOPE_BYTES
    keeps_without_rules = True

    def __init__(
        self,
        path: Path,
        prefix: str,
        pack: Pack,
        rules: HistoryRules | None,
        *,
        only_publishes: bool,
        busy_seconds: float,
    ) -> None:
        super().__init__(rules, only_publishes=only_publishes)
        self._path = path
        self._prefix = prefix
        self._busy_seconds = busy_seconds
        self._names: set[str] = set()
        self._writer = ThreadPoolExecutor(1, "wsbroadcast sqlite writer")
        self._reader = ThreadPoolExecutor(1, "wsbroadcast sqlite reader")
        self._writing: Store | None = None
        self._reading: Store | None = None
        self._bell: Bell | None = None
        self._rung = asyncio.Event()
        self._last = 0
        self._looked_at = 0.0
        self.presence = FilePresence(self, prefix, pack)

    async def open(self) -> None:
        """Open the file twice, to write and to read. Make it if there is none."""
        self._writing = await self._run(self._writer, self._open_to_write)
        self._reading = await self._run(self._reader, lambda: Store(self._path, self._busy_seconds))
        self._last = await self._run(self._reader, self._reading.newest)
        if hasattr(socket, "AF_UNIX"):
            try:
                self._bell = Bell(bells_of(self._path))
            except OSError as error:
                raise ConfigurationError(f"no socket can be made in {bells_of(self._path)}: {error}") from error
            asyncio.get_running_loop().add_reader(self._bell.socket, self._answer)

    def _open_to_write(self) -> Store:
        store = Store(self._path, self._busy_seconds)
        try:
            store.open_to_write()
            if self.writes:
                assert self.rules is not None
                store.write_rules(self._prefix, self.rules)
            elif self.learns:
                self.rules = store.read_rules(self._prefix)
            if not store.is_there:
                raise EngineUnavailable(f"{self._path} was removed or replaced while it was opened")
        except BaseException:
            store.close()
            raise
        return store

    def _answer(self) -> None:
        assert self._bell is not None
        self._bell.answer()
        self._rung.set()

    async def read(self, inlet: Inlet) -> None:
        """Hand over what is committed, as soon as a bell rings."""
        reading = self._reading
        assert reading is not None
        pause = _LOOK_SECONDS if self._bell is not None else _LOOK_SECONDS_WITHOUT_BELLS
        while True:
            rows = await self._run(self._reader, lambda: reading.after(self._last))
            if rows and rows[0].id > self._last + 1:
                inlet.missed("rows were removed before this process had read them")
            for row in rows:
                if row.name in self._names:
                    inlet.take(row.name, row.envelope, row.place)
            if rows:
                self._last = rows[-1].id
            self._check_identity(reading)
            if len(rows) < READ_ROWS:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._rung.wait()
                self._rung.clear()

    def _check_identity(self, store: Store) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._looked_at >= _IDENTITY_SECONDS:
            self._looked_at = now
            if not store.is_there:
                raise EngineUnavailable(f"{self._path} was removed or replaced")

    async def subscribe(self, names: Sequence[str]) -> None:
        """Hand over what comes under these names."""
        self._names.update(names)

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Hand over no more of what comes under these names."""
        self._names.difference_update(names)

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Write parcels in one transaction, and ring the bells of other nodes."""
        writing = self._writing
        assert writing is not None
        fitting = [parcel for parcel in parcels if len(parcel.envelope) <= MAX_ENVELOPE_BYTES]
        try:
            results = iter(await self._run(self._writer, lambda: writing.append(fitting, time.time())))
        except sqlite3.OperationalError as error:
            return [_refusal(error)] * len(parcels)
        self.ring()
        return [
            next(results)
            if len(parcel.envelope) <= MAX_ENVELOPE_BYTES
            else MessageTooLarge(len(parcel.envelope), MAX_ENVELOPE_BYTES)
            for parcel in parcels
        ]

    def ring(self) -> None:
        """Wake all nodes, so that they read what was written."""
        self._rung.set()
        if self._bell is not None:
            self._bell.ring()

    async def write_by(self, call: Callable[[Store], T]) -> T:
        """Call something with the connection that writes, in its thread."""
        writing = self._writing
        if writing is None:
            raise EngineUnavailable(f"{self._path} is not in use any more")
        return await self._run(self._writer, lambda: call(writing))

    async def read_by(self, call: Callable[[Store], T]) -> T:
        """Call something with the connection that reads, in its thread."""
        reading = self._reading
        if reading is None:
            raise EngineUnavailable(f"{self._path} is not in use any more")
        return await self._run(self._reader, lambda: call(reading))

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what is kept under a name."""
        while True:
            stretch = await self.read_by(lambda store: store.kept(name, since or 0, history, time.time()))
            if stretch is not None:
                return stretch
            await self._make_places([name], history.remember)

    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest positions of names."""
        while True:
            found = await self.read_by(lambda store: store.positions(names))
            missing = [name for name in names if name not in found]
            if not missing:
                return [found[name] for name in names]
            await self._make_places(missing, max(history.remember for history in histories))

    async def _make_places(self, names: Sequence[str], seconds: float) -> None:
        await self.write_by(lambda store: store.make_places(names, time.time() + seconds))

    async def forget(self, name: str) -> None:
        """Remove what is kept under a name."""
        await self.write_by(lambda store: store.forget(name))

    async def abort(self) -> None:
        """Write nothing any more, and close the file."""
        bell, self._bell = self._bell, None
        if bell is not None:
            asyncio.get_running_loop().remove_reader(bell.socket)
            bell.close()
        writing, self._writing = self._writing, None
        reading, self._reading = self._reading, None
        for store in (writing, reading):
            if store is not None:
                store.interrupt()
        try:
            for thread, store in ((self._reader, reading), (self._writer, writing)):
                if store is not None:  # waited for, because a process that is forked meanwhile would find it locked
                    await self._run(thread, store.close)
        finally:
            self._reader.shutdown(wait=False)
            self._writer.shutdown(wait=False)

    async def _run(self, thread: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(thread, call)


def _refusal(error: sqlite3.OperationalError) -> EngineUnavailable:
    refusal = EngineUnavailable(f"the file takes nothing now ({error}); nothing was sent")
    refusal.__cause__ = error
    return refusal


class FilePresence(PresenceStore):
    """Who is in which channel, in the file of a link. The tables are made at the first use.

    Args:
        link: The link.
        prefix: The beginning of all names.
        pack: Makes the parcel that is sent for a change.
    """

    def __init__(self, link: SQLiteLink, prefix: str, pack: Pack) -> None:
        self._link = link
        self._prefix = prefix
        self._pack = pack
        self._is_made = False

    async def renew(self, incarnation: str, fresh: str, seconds: float) -> bool:
        """Renew a lease, or take a new one."""
        return await self._write(lambda attendance: attendance.renew(incarnation, fresh, seconds))

    async def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""
        return await self._read(lambda attendance: attendance.alive())

    async def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members, and ring. If the incarnation holds no lease, nobody is added."""
        return await self._change(lambda attendance: attendance.enter(channel, incarnation, members))

    async def leave(self, channel: str, incarnation: str, members: Collection[str]) -> PresenceChange | None:
        """Remove members, and ring."""
        return await self._change(lambda attendance: attendance.leave(channel, incarnation, members))

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        return await self._read(lambda attendance: attendance.members(channel))

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        return await self._read(lambda attendance: attendance.count(channel))

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        return await self._read(lambda attendance: attendance.channels_of(member))

    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove some of what dead incarnations have entered, and ring."""
        return await self._change(lambda attendance: attendance.sweep())

    async def _change(self, step: Callable[[Attendance], T]) -> T:
        change = await self._write(step)
        if change:
            self._link.ring()
        return change

    async def _write(self, step: Callable[[Attendance], T]) -> T:
        return await self._at(self._link.write_by, step)

    async def _read(self, step: Callable[[Attendance], T]) -> T:
        return await self._at(self._link.read_by, step)

    async def _at(self, turn: Callable[[Callable[[Store], T]], Awaitable[T]], step: Callable[[Attendance], T]) -> T:
        try:
            if not self._is_made:
                await self._link.write_by(lambda store: self._attendance(store).make())
                self._is_made = True
            return await turn(lambda store: step(self._attendance(store)))
        except sqlite3.Error as error:
            self._is_made = False  # the tables may have been removed
            raise EngineUnavailable(f"the file can't be read or written now ({error})") from error

    def _attendance(self, store: Store) -> Attendance:
        return Attendance(store, self._prefix, self._pack)
