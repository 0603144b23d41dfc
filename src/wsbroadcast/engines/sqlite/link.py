"""The link to a file: a thread that writes, a thread that reads, and a bell that tells other processes to look."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wsbroadcast.engines.broker.link import Inlet, KeepingLink, Parcel, Stretch
from wsbroadcast.engines.sqlite.file import Bell, bells_of
from wsbroadcast.engines.sqlite.store import READ_ROWS, Store
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.publication import Position

T = TypeVar("T")

# How often to look although no bell has rung: one may get lost. Without bells it is the only way.
_LOOK_SECONDS = 0.5
_LOOK_SECONDS_WITHOUT_BELLS = 0.02

# How often to look whether the file is still the one at the path.
_IDENTITY_SECONDS = 0.5

# The largest that SQLite stores by default, with room for the header.
MAX_ENVELOPE_BYTES = 500_000_000


class SQLiteLink(KeepingLink):
    """One use of a file by one node.

    Args:
        path: Where the file is.
        prefix: What the names begin with.
        rules: What is kept.
        only_publishes: Whether nobody receives anything here.
        busy_seconds: How long to wait for another writer.
    """

    max_envelope_bytes = MAX_ENVELOPE_BYTES

    def __init__(
        self, path: Path, prefix: str, rules: HistoryRules | None, *, only_publishes: bool, busy_seconds: float
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

    async def open(self) -> None:
        """Open the file twice, and make it if there is none."""
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
        """Hand on what is committed, as soon as a bell rings."""
        reading = self._reading
        assert reading is not None
        pause = _LOOK_SECONDS if self._bell is not None else _LOOK_SECONDS_WITHOUT_BELLS
        while True:
            rows = await self._run(self._reader, lambda: reading.after(self._last))
            if rows and rows[0].id > self._last + 1:
                inlet.missed("rows were removed before this process came to read them")
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
        """Hand on what comes under these names."""
        self._names.update(names)

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Hand it on no more."""
        self._names.difference_update(names)

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Write parcels in one transaction, and ring."""
        writing = self._writing
        assert writing is not None
        fitting = [parcel for parcel in parcels if len(parcel.envelope) <= MAX_ENVELOPE_BYTES]
        try:
            results = iter(await self._run(self._writer, lambda: writing.append(fitting, time.time())))
        except sqlite3.OperationalError as error:
            return [_refusal(error)] * len(parcels)
        self._rung.set()
        if self._bell is not None:
            self._bell.ring()
        return [
            next(results)
            if len(parcel.envelope) <= MAX_ENVELOPE_BYTES
            else MessageTooLarge(len(parcel.envelope), MAX_ENVELOPE_BYTES)
            for parcel in parcels
        ]

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what is kept under a name."""
        reading = self._reading
        assert reading is not None
        while True:
            stretch = await self._run(self._reader, lambda: reading.kept(name, since or 0, history, time.time()))
            if stretch is not None:
                return stretch
            await self._make_places([name], history.remember)

    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read where names are."""
        reading = self._reading
        assert reading is not None
        while True:
            found = await self._run(self._reader, lambda: reading.positions(names))
            missing = [name for name in names if name not in found]
            if not missing:
                return [found[name] for name in names]
            await self._make_places(missing, max(history.remember for history in histories))

    async def _make_places(self, names: Sequence[str], seconds: float) -> None:
        writing = self._writing
        assert writing is not None
        await self._run(self._writer, lambda: writing.make_places(names, time.time() + seconds))

    async def forget(self, name: str) -> None:
        """Remove what is kept under a name."""
        writing = self._writing
        assert writing is not None
        await self._run(self._writer, lambda: writing.forget(name))

    async def abort(self) -> None:
        """Write nothing any more, and let go of the file."""
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
                if store is not None:  # waited for, because a process that is forked off meanwhile finds it locked
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
