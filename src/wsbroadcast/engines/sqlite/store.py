"""An SQLite file. Each publication is a row, and all nodes read the rows in the order of commits. All of it blocks."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_urlsafe
from typing import NamedTuple

from wsbroadcast.engines.broker.link import Entry, KeptParcel, Parcel, Place, Stretch
from wsbroadcast.engines.sqlite.file import Identity, check_local
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.logs import about, logger
from wsbroadcast.publication import Position

# Rows that a node reads at once.
READ_ROWS = 1000

# How many seconds a row stays after it is no longer kept. Nodes that are late can still read it.
LATE_SECONDS = 60.0

# How many old rows each append removes. Removing many at once would keep others from writing.
_SWEPT_ROWS = 200

# From how many quiet names rows are removed at once.
_SWEPT_NAMES = 20

# For how many names the next trim is remembered. Past this many, all are dropped.
_REMEMBERED = 8192

# How often, in seconds, a node removes rows and positions that have expired.
_SWEEP_SECONDS = 5.0

# How many seconds to wait for another writer when the file is opened. If that fails, it is tried again later.
_OPEN_SECONDS = 0.25
_OPEN_PAUSE_SECONDS = 0.01

# How many names one statement asks for.
_ASKED_NAMES = 500

_SCHEMA = """
CREATE TABLE IF NOT EXISTS wsbroadcast_messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    place INTEGER,
    epoch TEXT,
    previous INTEGER,
    kept INTEGER NOT NULL,
    at REAL NOT NULL,
    key TEXT,
    envelope BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS wsbroadcast_kept ON wsbroadcast_messages (name, place) WHERE kept = 1;
CREATE UNIQUE INDEX IF NOT EXISTS wsbroadcast_keys ON wsbroadcast_messages (name, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS wsbroadcast_left ON wsbroadcast_messages (id) WHERE kept = 0;
CREATE TABLE IF NOT EXISTS wsbroadcast_places (
    name TEXT PRIMARY KEY, epoch TEXT NOT NULL, place INTEGER NOT NULL, quiet_at REAL, forget_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS wsbroadcast_quiet ON wsbroadcast_places (quiet_at) WHERE quiet_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS wsbroadcast_facts (fact TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Row(NamedTuple):
    """One publication, as nodes read it after its commit."""

    id: int
    name: str
    envelope: bytes
    place: Place | None


class Store:
    """A connection to the file, for one thread at a time.

    Args:
        path: The path of the file. It is made if there is none.
        busy_seconds: How many seconds to wait for another writer.

    Raises:
        ConfigurationError: If the file can't be used: its directory is missing, a permission is, or it is no such file.
    """

    def __init__(self, path: Path, busy_seconds: float) -> None:
        self.path = path
        self.is_new = _make(path)
        """Whether this connection has made the file."""
        self.identity = Identity.of(path)
        """The identity of the file."""
        self._busy_seconds = busy_seconds
        self.sql = sqlite3.connect(path, timeout=_OPEN_SECONDS, isolation_level=None, check_same_thread=False)
        """The connection itself. All writes are made inside `writing`."""
        # When old rows are to be removed next: of all names, of quiet names, and of each name.
        self._sweep_at = self._sweep_quiet_at = 0.0
        self._trim_at: dict[str, float] = {}
        self.is_over = False
        """Whether nothing may be written any more."""

    @property
    def is_there(self) -> bool:
        """Whether the path still leads to the open file."""
        return self.identity is not None and Identity.of(self.path) == self.identity

    def close(self) -> None:
        """Close the connection. The last one that is closed moves the write-ahead log into the file."""
        with suppress(sqlite3.Error):
            self.sql.execute("SELECT 1")  # ends an `interrupt`, which would keep SQLite from moving the log
        self.sql.close()

    def interrupt(self) -> None:
        """Write nothing any more, and interrupt what runs. It may be called from any thread."""
        self.is_over = True
        self.sql.interrupt()

    # Set up.

    def open_to_write(self) -> None:
        """Make the tables; make new epochs if the machine was restarted or the file replaced since the last time."""
        check_local(self.path)
        (mode,) = self._set_wal()
        if mode != "wal":
            raise ConfigurationError(f"{self.path} can't have a write-ahead log here (journal_mode is {mode})")
        self.sql.execute("PRAGMA synchronous = NORMAL")
        with self.writing():
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    self.sql.execute(statement)
            self._settle_generation()
        self.sql.execute(f"PRAGMA busy_timeout = {round(1000 * self._busy_seconds)}")

    def _set_wal(self) -> tuple[str]:
        # For this statement SQLite doesn't wait for other connections, which may be doing the same now.
        deadline = time.monotonic() + _OPEN_SECONDS
        while True:
            try:
                found: tuple[str] = self.sql.execute("PRAGMA journal_mode = WAL").fetchone()
                return found
            except sqlite3.OperationalError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_OPEN_PAUSE_SECONDS)
            except sqlite3.DatabaseError as error:
                raise ConfigurationError(f"{self.path} is not an SQLite file ({error})") from error

    def _settle_generation(self) -> None:
        # A power cut may take the last commits, and a copied file has an earlier state. Then messages may be gone that
        # were confirmed. Both show as another boot or another inode.
        if self.has_changed("generation", f"{boot()} {self.identity}"):
            self.sql.execute("DELETE FROM wsbroadcast_places")
            self.sql.execute("UPDATE wsbroadcast_messages SET kept = 0, key = NULL WHERE kept = 1")

    def has_changed(self, fact: str, value: str) -> bool:
        """Write a fact down, inside a transaction; tell whether its value was another one before."""
        known = self._fact(fact)
        if known != value:
            self._set_fact(fact, value)
        return known is not None and known != value

    def _fact(self, fact: str) -> str | None:
        found = self.sql.execute("SELECT value FROM wsbroadcast_facts WHERE fact = ?", (fact,)).fetchone()
        return None if found is None else str(found[0])

    def _set_fact(self, fact: str, value: str) -> None:
        self.sql.execute(
            "INSERT INTO wsbroadcast_facts VALUES (?, ?) ON CONFLICT (fact) DO UPDATE SET value = excluded.value",
            (fact, value),
        )

    def write_rules(self, prefix: str, rules: HistoryRules) -> None:
        """Write down what is kept. Log a warning if other rules were written there."""
        text = rules.to_json().decode()
        with self.writing():
            known = self._fact(f"rules {prefix}")
            self._set_fact(f"rules {prefix}", text)
        if known is not None and known != text:
            logger.warning(
                "%s: another node keeps other histories than this one. Programs that only publish now use those of "
                "this one: %s, not %s",
                self.path,
                text,
                known,
                extra=about("history.rules_differ", engine="sqlite"),
            )

    def read_rules(self, prefix: str) -> HistoryRules | None:
        """Read the rules that others have written."""
        text = self._fact(f"rules {prefix}")
        return None if text is None else HistoryRules.from_json(text.encode())

    # Write.

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write in one transaction: all of it or nothing."""
        self.sql.execute("BEGIN IMMEDIATE")
        try:
            yield
            if self.is_over or not self.is_there:
                raise EngineUnavailable(f"{self.path} was given up, or removed or replaced")
            self.sql.execute("COMMIT")
        except BaseException:
            if self.sql.in_transaction:
                self.sql.execute("ROLLBACK")
            raise

    def append(self, parcels: Sequence[Parcel], now: float) -> list[Appended | None]:
        """Write parcels in one transaction; return the positions of those that are kept."""
        with self.writing():
            return self.add(parcels, now)

    def add(self, parcels: Sequence[Parcel], now: float) -> list[Appended | None]:
        """Write parcels inside a transaction, and remove some rows that are too old."""
        batch = _Batch(self.sql, now)
        results = [batch.add(parcel) for parcel in parcels]
        batch.write()
        for name, history in batch.histories.items():
            self._trim(name, batch.positions[name].offset - history.messages, now)
        self._sweep(now)
        return results

    # Old rows are removed in small parts, because others can't write meanwhile; and late, because a node may be late.

    def _trim(self, name: str, oldest: int, now: float) -> None:
        if oldest > 0 and now >= self._trim_at.get(name, 0.0):
            where = "name = ? AND kept = 1 AND place <= ? ORDER BY place"
            left_at = self._delete(where, (name, oldest), now - LATE_SECONDS)
            if len(self._trim_at) >= _REMEMBERED:
                self._trim_at.clear()
            self._trim_at[name] = (now if left_at is None else left_at) + LATE_SECONDS

    def _sweep(self, now: float) -> None:
        if now >= self._sweep_at:
            left_at = self._delete("kept = 0 ORDER BY id", (), now - LATE_SECONDS)
            self._sweep_at = (now if left_at is None else left_at) + LATE_SECONDS
        if now >= self._sweep_quiet_at:
            self._sweep_quiet_at = now + _SWEEP_SECONDS
            quiet = self.sql.execute(
                "SELECT name FROM wsbroadcast_places WHERE quiet_at < ? LIMIT ?", (now - LATE_SECONDS, _SWEPT_NAMES)
            ).fetchall()
            for row in quiet:
                if self._delete("name = ? AND kept = 1 ORDER BY place", row, now) is None:
                    self.sql.execute("UPDATE wsbroadcast_places SET quiet_at = NULL WHERE name = ?", row)
            self.sql.execute(
                "DELETE FROM wsbroadcast_places WHERE name IN (SELECT name FROM wsbroadcast_places "
                "WHERE forget_at < ? LIMIT ?)",
                (now, _SWEPT_ROWS),
            )

    def _delete(self, where: str, values: tuple[object, ...], before: float) -> float | None:
        # Deletes from the oldest row on those written before a moment. Returns when the first row that is left was
        # written.
        some = f"SELECT id FROM wsbroadcast_messages WHERE {where} LIMIT ?"  # noqa: S608  # our own words
        self.sql.execute(
            f"DELETE FROM wsbroadcast_messages WHERE id IN ({some}) AND at < ?",  # noqa: S608  # our own words
            (*values, _SWEPT_ROWS, before),
        )
        left = self.sql.execute(
            f"SELECT at FROM wsbroadcast_messages WHERE {where} LIMIT 1",  # noqa: S608  # our own words
            values,
        ).fetchone()
        return None if left is None else float(left[0])

    def make_places(self, names: Iterable[str], forget_at: float) -> None:
        """Give names an epoch that have none."""
        with self.writing():
            self.sql.executemany(
                "INSERT INTO wsbroadcast_places VALUES (?, ?, 0, NULL, ?) ON CONFLICT DO NOTHING",
                [(name, token_urlsafe(9), forget_at) for name in names],
            )

    def forget(self, name: str) -> None:
        """Remove what is kept under a name. Nodes that are late are still sent what they haven't read yet."""
        with self.writing():
            self.sql.execute(
                "UPDATE wsbroadcast_messages SET kept = 0, key = NULL WHERE name = ? AND kept = 1", (name,)
            )
            self.sql.execute(
                "UPDATE wsbroadcast_places SET epoch = ?, place = 0 WHERE name = ?", (token_urlsafe(9), name)
            )

    # Read.

    def newest(self) -> int:
        """Return the id of the newest row that there ever was."""
        found = self.sql.execute("SELECT seq FROM sqlite_sequence WHERE name = 'wsbroadcast_messages'").fetchone()
        return 0 if found is None else int(found[0])

    def after(self, last: int) -> list[Row]:
        """Read the rows that were committed after the row `last`."""
        rows = self.sql.execute(
            "SELECT id, name, envelope, epoch, place, previous FROM wsbroadcast_messages "
            "WHERE id > ? ORDER BY id LIMIT ?",
            (last, READ_ROWS),
        ).fetchall()
        return [
            Row(id_, name, envelope, None if place is None else Place(Position(epoch, place), previous))
            for id_, name, envelope, epoch, place, previous in rows
        ]

    def positions(self, names: Sequence[str]) -> dict[str, Position]:
        """Read the newest positions of these names. A name without an epoch is left out."""
        found: dict[str, Position] = {}
        for start in range(0, len(names), _ASKED_NAMES):
            some = names[start : start + _ASKED_NAMES]
            marks = ",".join("?" * len(some))
            rows = self.sql.execute(
                f"SELECT name, epoch, place FROM wsbroadcast_places WHERE name IN ({marks})",  # noqa: S608  # marks alone
                some,
            )
            found |= {name: Position(epoch, place) for name, epoch, place in rows}
        return found

    def kept(self, name: str, since: int, history: History, now: float) -> Stretch | None:
        """Read what is kept under a name; `None` if it has no epoch yet."""
        # It is one statement, so that position and messages are of one moment.
        rows = self.sql.execute(
            "SELECT places.epoch, places.place, messages.place, messages.at, messages.envelope "
            "FROM wsbroadcast_places AS places LEFT JOIN wsbroadcast_messages AS messages "
            "ON messages.name = places.name AND messages.kept = 1 AND messages.place > ? "
            "AND messages.place > places.place - ? "
            "WHERE places.name = ? ORDER BY messages.place",
            (since, history.messages, name),
        ).fetchall()
        if not rows:
            return None
        epoch, top = rows[0][:2]
        entries = [Entry(envelope, place, now - at) for _, _, place, at, envelope in rows if place is not None]
        base = top
        for entry in reversed(entries):
            if entry.offset != base:
                break  # the message after this one was too large to be kept
            base -= 1
        return Stretch(Position(epoch, top), entries, max(base, min(since, top)))


# Held while a file is made. After that, only SQLite may open it. If this process opened and closed it once more, all
# locks of its other connections on the file would be gone (fcntl(2)). Another process would then believe to be the last
# one, and remove the write-ahead log to which these connections still write.
_MAKING = threading.Lock()


def _make(path: Path) -> bool:
    """Make the file, readable only for its owner, if there is none; return whether it was made."""
    try:
        with _MAKING:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if path.is_dir():
            raise ConfigurationError(f"{path} is a directory: name a file in it") from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise ConfigurationError(f"{path} may not be read and written by this user") from None
        return False
    except FileNotFoundError:
        raise ConfigurationError(f"there is no directory for {path}: make it, or give another path") from None
    except PermissionError:
        raise ConfigurationError(f"{path} may not be read and written by this user") from None
    return True


class _Batch:
    """Parcels that are written in one transaction, in their order."""

    def __init__(self, sql: sqlite3.Connection, now: float) -> None:
        self._sql = sql
        self._now = now
        self._rows: list[tuple[object, ...]] = []
        self._keys: dict[tuple[str, str], Position] = {}
        self.positions: dict[str, Position] = {}
        """The newest position under each name."""
        self.histories: dict[str, History] = {}
        """How much is kept under each name."""

    def add(self, parcel: Parcel) -> Appended | None:
        """Add a parcel; return its position, if it is kept."""
        if not isinstance(parcel, KeptParcel):
            self._rows.append((parcel.name, None, None, None, 0, self._now, None, parcel.envelope))
            return None
        name, (history, key) = parcel.name, parcel.keep
        if key is not None and (known := self._repeat(name, key)) is not None:
            return Appended(known, is_repeat=True)
        before = self.positions.get(name) or self._find(name)
        position = self.positions[name] = Position(before.epoch, before.offset + 1)
        self.histories[name] = history
        if key is not None:
            self._keys[name, key] = position
        is_kept = len(parcel.envelope) <= history.max_kept_bytes + _header_size(parcel.envelope)
        place = (position.offset, position.epoch, before.offset)
        self._rows.append((name, *place, int(is_kept), self._now, key, parcel.envelope))
        return Appended(position)

    def _repeat(self, name: str, key: str) -> Position | None:
        if (name, key) in self._keys:
            return self._keys[name, key]
        found = self._sql.execute(
            "SELECT epoch, place FROM wsbroadcast_messages WHERE name = ? AND key = ?", (name, key)
        ).fetchone()
        return None if found is None else Position(*found)

    def _find(self, name: str) -> Position:
        found = self._sql.execute("SELECT epoch, place FROM wsbroadcast_places WHERE name = ?", (name,)).fetchone()
        return Position(token_urlsafe(9), 0) if found is None else Position(*found)

    def write(self) -> None:
        """Write the rows, and the new positions of the names."""
        self._sql.executemany(
            "INSERT INTO wsbroadcast_messages (name, place, epoch, previous, kept, at, key, envelope) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            self._rows,
        )
        self._sql.executemany(
            "INSERT INTO wsbroadcast_places VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) "
            "DO UPDATE SET place = excluded.place, quiet_at = excluded.quiet_at, forget_at = excluded.forget_at",
            [
                (name, at.epoch, at.offset, self._now + history.seconds, self._now + history.remember)
                for name, at in self.positions.items()
                for history in (self.histories[name],)
            ],
        )


def _header_size(envelope: bytes) -> int:
    return envelope.index(b"\n") + 1


def boot() -> str:
    """Return an id of the present run of this machine. It changes at each start of the machine."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else str(round(time.time() - time.monotonic(), -2))
