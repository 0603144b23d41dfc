"""Who is in one channel, computed from its log. All readers get the same result. No I/O.

Each entry of the log is one step of one incarnation. The writer decides beforehand what the step changes, and the log
takes the entry only if it is the next one. So an entry means the same to all readers, and a reader notices if one is
missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pydantic_core import from_json

from wsbroadcast.audience import Audience
from wsbroadcast.publication import MAX_OFFSET, PresenceChange

# How many names the log may have beyond those of present members before it is written anew.
_SPARE = 32

# The largest channel that one entry states as a whole, in bytes.
_WHOLE_BYTES = 32 * 1024

# How many members one entry has at most, so that a node does something else in between.
_MEMBERS = 500

Whole = dict[str, tuple[bytes, tuple[str, ...]]]
"""Who is in a channel: the info of each member, and the incarnations that have entered it."""


@dataclass
class Entry:
    """One step: a `PresenceChange`, as nodes read it, and what only the ledger has to know."""

    version: int
    by: str
    joined: dict[str, bytes] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    more: dict[str, bytes] = field(default_factory=dict)
    """Members that this incarnation has entered too, beside others; and members with a new info."""
    less: list[str] = field(default_factory=list)
    """Members that this incarnation has removed, but that others still have."""
    whole: Whole | None = None
    """All members after this step. Earlier entries don't matter then."""

    @property
    def is_told(self) -> bool:
        """Whether it changes anything for the nodes."""
        return bool(self.joined or self.left)

    def change(self, channel: str) -> PresenceChange | None:
        """Return the change that nodes are told; `None` if there is none."""
        if not self.is_told:
            return None
        return PresenceChange(Audience("channel", channel), self.version, self.joined, frozenset(self.left), self.by)

    def encode(self) -> bytes:
        """Write the entry as an envelope with additional fields."""
        body: dict[str, object] = {"by": self.by, "joined": _texts(self.joined), "left": self.left}
        if self.more:
            body["more"] = _texts(self.more)
        if self.less:
            body["less"] = self.less
        if self.whole is not None:
            body["whole"] = {name: [info.decode(), *holders] for name, (info, holders) in self.whole.items()}
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        return f'{{"v":1,"type":"presence","version":{self.version}}}\n{text}'.encode()

    @classmethod
    def decode(cls, envelope: bytes) -> Entry | None:
        """Read an entry; `None` if the bytes are something else. They are untrusted."""
        head, _, text = envelope.partition(b"\n")
        try:
            header, body = from_json(head), from_json(text)
            version, whole = header["version"], body.get("whole")
            if type(version) is not int or not 0 < version <= MAX_OFFSET or type(body["by"]) is not str:
                return None
            return cls(
                version,
                body["by"],
                _infos(body["joined"]),
                _names(body["left"]),
                _infos(body.get("more", {})),
                _names(body.get("less", [])),
                None if whole is None else {name: _stated(each) for name, each in whole.items()},
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            return None


class Ledger:
    """Who is in a channel after some entries of its log.

    Args:
        version: The version before the first change.
    """

    __slots__ = ("_counts", "_holders", "infos", "sequence", "stated", "version")

    def __init__(self, version: int) -> None:
        self.sequence = 0
        """The number of the last entry; 0 if there is none."""
        self.version = version
        """The version of the last change."""
        self.infos: dict[str, bytes] = {}
        """The members and their infos."""
        self.stated = 0
        """How many names the log has in it."""
        self._holders: dict[str, tuple[str, ...]] = {}
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.infos)

    def has(self, incarnation: str) -> bool:
        """Tell whether an incarnation has any member here."""
        return self._counts[incarnation] > 0

    def held_by(self, incarnation: str) -> list[str]:
        """Return the members that an incarnation has here."""
        if not self.has(incarnation):
            return []
        return [name for name, holders in self._holders.items() if incarnation in holders]

    # Entries to write.

    def enter(self, incarnation: str, members: Mapping[str, bytes]) -> Entry | None:
        """Return the entry by which members join; `None` if nothing changes."""
        joined = {name: info for name, info in members.items() if name not in self.infos}
        more = {
            name: info
            for name, info in members.items()
            if name in self.infos and (incarnation not in self._holders[name] or self.infos[name] != info)
        }
        if not joined and not more:
            return None
        return Entry(self.version + bool(joined), incarnation, joined, more=more)

    def leave(self, incarnation: str, members: Iterable[str]) -> Entry | None:
        """Return the entry by which members leave; `None` if the incarnation has none of them here."""
        held = [name for name in members if incarnation in self._holders.get(name, ())]
        if not held:
            return None
        left = [name for name in held if len(self._holders[name]) == 1]
        less = [name for name in held if len(self._holders[name]) > 1]
        return Entry(self.version + bool(left), incarnation, left=left, less=less)

    def complete(self, entry: Entry) -> None:
        """Let an entry state all members, if the log is long and the channel small, or if nobody is left."""
        if len(entry.left) == len(self.infos) and not entry.joined and not entry.more:
            entry.whole = {}
        elif self._is_long(entry) and sum(map(size_of, self.infos, self.infos.values())) <= _WHOLE_BYTES:
            after = Ledger(self.version)
            after._holders, after.infos = dict(self._holders), dict(self.infos)
            after._take(entry)
            entry.whole = {name: (info, after._holders[name]) for name, info in after.infos.items()}

    def _is_long(self, entry: Entry | None = None) -> bool:
        stated = self.stated + (0 if entry is None else _stated_by(entry))
        return stated > 2 * sum(self._counts.values()) + _SPARE

    @property
    def is_long(self) -> bool:
        """Whether the log is much longer than the present members need."""
        return self._is_long()

    def statements(self) -> list[tuple[str, str]]:
        """Return pairs of incarnation and member, ordered by incarnation."""
        return sorted((holder, name) for name, holders in self._holders.items() for holder in holders)

    def restated(self, incarnation: str, members: Iterable[str]) -> Entry:
        """Return the entry that states again those of the members that are still there."""
        still = {name: self.infos[name] for name in members if incarnation in self._holders.get(name, ())}
        return Entry(self.version, incarnation, more=still)

    # Entries that were written.

    def apply(self, sequence: int, entry: Entry | None) -> None:
        """Take the next entry. If `entry` is `None`, only the number is taken."""
        self.sequence = sequence
        if entry is None:
            return
        self.version = entry.version
        if entry.whole is None:
            self.stated += _stated_by(entry)
            self._take(entry)
            return
        self.infos = {name: info for name, (info, _) in entry.whole.items()}
        self._holders = {name: holders for name, (_, holders) in entry.whole.items()}
        self._counts = Counter(holder for holders in self._holders.values() for holder in holders)
        self.stated = sum(self._counts.values())

    def _take(self, entry: Entry) -> None:
        by = entry.by
        for members in (entry.joined, entry.more):
            self.infos.update(members)
            for name in members:
                holders = self._holders.get(name, ())
                if by not in holders:
                    self._holders[name] = (*holders, by)
                    self._counts[by] += 1
        for names in (entry.left, entry.less):
            for name in names:
                self._release(name, by)
        if not self._counts[by]:
            del self._counts[by]

    def _release(self, name: str, by: str) -> None:
        holders = self._holders.get(name, ())
        if by not in holders:
            return
        self._counts[by] -= 1
        rest = tuple(each for each in holders if each != by)
        if rest:
            self._holders[name] = rest
        else:
            del self._holders[name], self.infos[name]


def size_of(name: str, info: bytes = b"") -> int:
    """Return about how many bytes a member takes in an entry."""
    return 2 * (len(name.encode()) + len(info)) + 16


def parts_of(members: Mapping[str, bytes], limit: int) -> Iterator[dict[str, bytes]]:
    """Cut members into parts that each fit into one entry. A part with a single member may be too large."""
    part: dict[str, bytes] = {}
    size = 0
    for name, info in members.items():
        more = size_of(name, info)
        if part and (size + more > limit or len(part) >= _MEMBERS):
            yield part
            part, size = {}, 0
        part[name] = info
        size += more
    if part:
        yield part


def _stated_by(entry: Entry) -> int:
    return len(entry.joined) + len(entry.left) + len(entry.more) + len(entry.less)


def _texts(members: Mapping[str, bytes]) -> dict[str, str]:
    return {name: info.decode() for name, info in members.items()}


def _infos(found: dict[str, str]) -> dict[str, bytes]:
    return {name: info.encode() for name, info in found.items()}


def _names(found: list[str]) -> list[str]:
    if type(found) is not list or not all(type(name) is str for name in found):
        raise ValueError("these are no names")
    return found


def _stated(found: list[str]) -> tuple[bytes, tuple[str, ...]]:
    info, *holders = _names(found)
    if not holders:
        raise ValueError("nobody says that it is there")
    return info.encode(), tuple(holders)
