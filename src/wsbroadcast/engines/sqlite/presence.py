"""Who is in which channel, in tables of an SQLite file. All of it blocks the calling thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.sqlite.store import Store, boot
from wsbroadcast.presence import Members
from wsbroadcast.publication import PresenceChange

SWEPT_MEMBERS = 500
"""How many members one sweep removes at most. Nobody else can write meanwhile."""

# For how many seconds the version of an empty channel is remembered. A node that was away for longer reads it anew.
_REMEMBER_SECONDS = 600.0

# How many empty channels one sweep forgets at most.
_FORGOTTEN_CHANNELS = 500

# How many names one statement asks for.
_ASKED_NAMES = 500

# `holders` is the number of leases under which a member was entered. It is stored so that nobody has to count them.
# `size` is the number of members of a channel. The number of a lease is never used again.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS wsbroadcast_leases (
    id INTEGER PRIMARY KEY AUTOINCREMENT, prefix TEXT NOT NULL, incarnation TEXT NOT NULL UNIQUE, until REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS wsbroadcast_channels (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    prefix TEXT NOT NULL,
    channel TEXT NOT NULL,
    version INTEGER NOT NULL,
    size INTEGER NOT NULL,
    forget_at REAL,
    UNIQUE (prefix, channel)
);
CREATE INDEX IF NOT EXISTS wsbroadcast_empty ON wsbroadcast_channels (forget_at) WHERE forget_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS wsbroadcast_members (
    channel INTEGER NOT NULL,
    member TEXT NOT NULL,
    info BLOB NOT NULL,
    holders INTEGER NOT NULL,
    PRIMARY KEY (channel, member)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS wsbroadcast_memberships ON wsbroadcast_members (member);
CREATE TABLE IF NOT EXISTS wsbroadcast_holdings (
    lease INTEGER NOT NULL, channel INTEGER NOT NULL, member TEXT NOT NULL, PRIMARY KEY (lease, channel, member)
) WITHOUT ROWID;
"""

Pack = Callable[[PresenceChange], Parcel]
Clock = Callable[[], float]


class _Room(NamedTuple):
    """The row of a channel."""

    id: int
    channel: str
    version: int
    size: int


class Attendance:
    """Who is in which channel, for the apps of one prefix. Each method that writes is one transaction.

    Leases are timed by the monotonic clock. All processes of a machine share it: it begins when the machine starts, and
    nobody can set it. On Linux it stands still while the machine sleeps, as all holders of leases do. Containers share
    it too, unless one has its own time namespace.

    Args:
        store: The connection of the calling thread.
        prefix: The beginning of all names.
        pack: Makes the parcel that is sent for a change.
        clock: The clock that times leases.
    """

    def __init__(self, store: Store, prefix: str, pack: Pack, clock: Clock = time.monotonic) -> None:
        self._store = store
        self._sql = store.sql
        self._prefix = prefix
        self._pack = pack
        self._clock = clock

    def make(self) -> None:
        """Make the tables. Leases from before the last start of the machine are ended."""
        with self._store.writing():
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    self._sql.execute(statement)
            if self._store.has_changed("boot of leases", boot()):
                self._sql.execute("UPDATE wsbroadcast_leases SET until = -1")

    # Leases.

    def renew(self, incarnation: str, fresh: str, seconds: float) -> bool:
        """Renew a lease; take a new one if it has run out."""
        with self._store.writing():
            now = self._clock()
            found = self._sql.execute(
                "UPDATE wsbroadcast_leases SET until = ? WHERE prefix = ? AND incarnation = ? AND until > ?",
                (now + seconds, self._prefix, incarnation, now),
            )
            if found.rowcount:
                return True
            self._sql.execute(
                "INSERT INTO wsbroadcast_leases (prefix, incarnation, until) VALUES (?, ?, ?)",
                (self._prefix, fresh, now + seconds),
            )
            return False

    def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""
        rows = self._sql.execute(
            "SELECT incarnation FROM wsbroadcast_leases WHERE prefix = ? AND until > ?", (self._prefix, self._clock())
        )
        return frozenset(incarnation for (incarnation,) in rows)

    # Joining and leaving.

    def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members, and send the change, if there is one. If the incarnation holds no lease, nobody is added."""
        with self._store.writing():
            lease = self._lease(incarnation, self._clock())
            if lease is None or not members:
                return None
            room = self._room(channel) or self._new_room(channel)
            names = list(members)
            here = self._of_these("SELECT member FROM wsbroadcast_members WHERE channel = ?", (room.id,), names)
            held = self._held(lease, room, names)
            added = [name for name in names if name not in held]
            self._sql.executemany(
                "INSERT INTO wsbroadcast_holdings VALUES (?, ?, ?)", [(lease, room.id, name) for name in added]
            )
            self._sql.executemany(
                "INSERT INTO wsbroadcast_members VALUES (?, ?, ?, 1) "
                "ON CONFLICT (channel, member) DO UPDATE SET info = excluded.info, holders = holders + ?",
                [(room.id, name, info, name not in held) for name, info in members.items()],
            )
            joined = {name: info for name, info in members.items() if name not in here}
            return self._tell(room, incarnation, joined=joined)

    def leave(self, channel: str, incarnation: str, members: Collection[str]) -> PresenceChange | None:
        """Remove members, and send the change, if there is one."""
        with self._store.writing():
            lease, room = self._lease(incarnation), self._room(channel)
            if lease is None or room is None:
                return None
            return self._remove(room, lease, incarnation, self._held(lease, room, list(members)))

    def sweep(self) -> list[PresenceChange]:
        """Remove some of what dead incarnations have entered, and some channels that are empty for long."""
        now, today = self._clock(), time.time()
        (is_old,) = self._sql.execute(
            "SELECT EXISTS (SELECT 1 FROM wsbroadcast_leases WHERE prefix = ? AND until <= ?) "
            "OR EXISTS (SELECT 1 FROM wsbroadcast_channels WHERE forget_at < ?)",
            (self._prefix, now, today),
        ).fetchone()
        if not is_old and not self._dead(now):
            return []  # no transaction is begun, which would keep others from writing
        with self._store.writing():
            changes = self._drop(now)
            self._sql.execute(
                "DELETE FROM wsbroadcast_leases WHERE prefix = ? AND until <= ? "
                "AND NOT EXISTS (SELECT 1 FROM wsbroadcast_holdings AS holdings WHERE holdings.lease = id)",
                (self._prefix, now),
            )
            self._sql.execute(
                "DELETE FROM wsbroadcast_channels WHERE id IN "
                "(SELECT id FROM wsbroadcast_channels WHERE forget_at < ? LIMIT ?)",
                (today, _FORGOTTEN_CHANNELS),
            )
        return changes

    def _dead(self, now: float) -> list[tuple[int, str]]:
        # The dead leases that hold any member. The row of a lease may be gone, if somebody removed it by hand.
        return self._sql.execute(
            "WITH RECURSIVE held (lease) AS (SELECT min(lease) FROM wsbroadcast_holdings UNION ALL "
            "SELECT (SELECT min(lease) FROM wsbroadcast_holdings WHERE lease > held.lease) FROM held "
            "WHERE held.lease IS NOT NULL) "
            "SELECT held.lease, coalesce(leases.incarnation, '') FROM held "
            "LEFT JOIN wsbroadcast_leases AS leases ON leases.id = held.lease "
            "WHERE held.lease IS NOT NULL AND (leases.id IS NULL OR (leases.prefix = ? AND leases.until <= ?))",
            (self._prefix, now),
        ).fetchall()

    def _drop(self, now: float) -> list[PresenceChange]:
        changes: list[PresenceChange] = []
        left = SWEPT_MEMBERS
        for lease, incarnation in self._dead(now):
            rows = self._sql.execute(
                "SELECT channels.channel, holdings.member FROM wsbroadcast_holdings AS holdings "
                "JOIN wsbroadcast_channels AS channels ON channels.id = holdings.channel "
                "WHERE holdings.lease = ? AND channels.prefix = ? ORDER BY holdings.channel LIMIT ?",
                (lease, self._prefix, left),
            ).fetchall()
            left -= len(rows)
            for channel, some in groupby(rows, lambda row: str(row[0])):
                room = self._room(channel)
                assert room is not None  # the channel has members
                change = self._remove(room, lease, incarnation, [member for _, member in some])
                changes += [] if change is None else [change]
        return changes

    # Read.

    def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        # It is one statement, so that version and members are of one moment.
        rows = self._sql.execute(
            "SELECT channels.version, members.member, members.info FROM wsbroadcast_channels AS channels "
            "LEFT JOIN wsbroadcast_members AS members ON members.channel = channels.id "
            "WHERE channels.prefix = ? AND channels.channel = ?",
            (self._prefix, channel),
        ).fetchall()
        version = rows[0][0] if rows else 0
        return Members(version, {member: info for _, member, info in rows if member is not None})

    def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        room = self._room(channel)
        return 0 if room is None else room.size

    def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        rows = self._sql.execute(
            "SELECT channels.channel FROM wsbroadcast_members AS members "
            "JOIN wsbroadcast_channels AS channels ON channels.id = members.channel "
            "WHERE members.member = ? AND channels.prefix = ?",
            (member, self._prefix),
        )
        return frozenset(channel for (channel,) in rows)

    # In a transaction that has begun.

    def _lease(self, incarnation: str, after: float = -2.0) -> int | None:
        found = self._sql.execute(
            "SELECT id FROM wsbroadcast_leases WHERE prefix = ? AND incarnation = ? AND until > ?",
            (self._prefix, incarnation, after),
        ).fetchone()
        return None if found is None else int(found[0])

    def _room(self, channel: str) -> _Room | None:
        found = self._sql.execute(
            "SELECT id, channel, version, size FROM wsbroadcast_channels WHERE prefix = ? AND channel = ?",
            (self._prefix, channel),
        ).fetchone()
        return None if found is None else _Room(*found)

    def _new_room(self, channel: str) -> _Room:
        made = self._sql.execute(
            "INSERT INTO wsbroadcast_channels (prefix, channel, version, size) VALUES (?, ?, 0, 0)",
            (self._prefix, channel),
        )
        assert made.lastrowid is not None  # an inserted row has one
        return _Room(made.lastrowid, channel, 0, 0)

    def _held(self, lease: int, room: _Room, names: Sequence[str]) -> set[str]:
        where = "SELECT member FROM wsbroadcast_holdings WHERE lease = ? AND channel = ?"
        return self._of_these(where, (lease, room.id), names)

    def _of_these(self, statement: str, values: tuple[object, ...], names: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for start in range(0, len(names), _ASKED_NAMES):
            some = names[start : start + _ASKED_NAMES]
            marks = ",".join("?" * len(some))
            rows = self._sql.execute(f"{statement} AND member IN ({marks})", (*values, *some))
            found.update(member for (member,) in rows)
        return found

    def _remove(self, room: _Room, lease: int, incarnation: str, held: Iterable[str]) -> PresenceChange | None:
        names = list(held)
        places = [(room.id, name) for name in names]
        self._sql.executemany(
            "DELETE FROM wsbroadcast_holdings WHERE lease = ? AND channel = ? AND member = ?",
            [(lease, *place) for place in places],
        )
        self._sql.executemany(
            "UPDATE wsbroadcast_members SET holders = holders - 1 WHERE channel = ? AND member = ?", places
        )
        where = "SELECT member FROM wsbroadcast_members WHERE channel = ? AND holders = 0"
        left = self._of_these(where, (room.id,), names)
        self._sql.executemany(
            "DELETE FROM wsbroadcast_members WHERE channel = ? AND member = ?", [(room.id, name) for name in left]
        )
        return self._tell(room, incarnation, left=frozenset(left))

    def _tell(
        self,
        room: _Room,
        incarnation: str,
        joined: Mapping[str, bytes] | None = None,
        left: frozenset[str] = frozenset(),
    ) -> PresenceChange | None:
        joined = joined or {}
        if not joined and not left:
            return None
        version, size, now = room.version + 1, room.size + len(joined) - len(left), time.time()
        self._sql.execute(
            "UPDATE wsbroadcast_channels SET version = ?, size = ?, forget_at = ? WHERE id = ?",
            (version, size, None if size else now + _REMEMBER_SECONDS, room.id),
        )
        change = PresenceChange(Audience("channel", room.channel), version, joined, left, incarnation)
        self._store.add([self._pack(change)], now)
        return change
