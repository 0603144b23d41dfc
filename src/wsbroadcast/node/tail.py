"""The tail: the newest part of one audience's history on one node. Replays and new publications meet only here. No I/O.

Here "members" are the connections of the audience that get new publications; connections that are behind get replays.
"""

from __future__ import annotations

from bisect import bisect_right
from enum import Enum
from operator import attrgetter
from typing import Any

from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.frames import Batch
from wsbroadcast.history import History, Reason, Replay
from wsbroadcast.message import Message
from wsbroadcast.publication import MAX_OFFSET, Position, Publication

_offset = attrgetter("offset")

# Replaces entries that were trimmed.
_NOTHING = Publication(Message.of(""), EVERYONE)

# How many publications are held at most while the history is read. Those that don't fit are read from the history.
_MAX_HELD = 4096

# After so many reads that don't have a held publication, it is given up.
_MAX_READS = 3

# Trimmed entries are removed from the list when there are so many, because that moves all others.
_TRIM = 64

# For connections that are on the way, so many times as much is kept here as the history has.
_PROMISED_PART = 3

# How many joined stretches are remembered. Clients that come back at the same time have mostly missed the same.
_MAX_STRETCHES = 8


class Taken(Enum):
    """What a tail did with a publication."""

    NEXT = "next"
    """It is the next one, and may be delivered."""
    KNOWN = "known"
    """It came before."""
    HELD = "held"
    """It is held until the history is read."""
    SUSPECT = "suspect"
    """It is held, and the history has to be read: something before it is missing, or it has another epoch."""


class Stretch:
    """Consecutive publications for a replay. All connections that miss the same share one object."""

    __slots__ = ("batch", "end", "withholds")

    def __init__(self, publications: list[Publication], delivered: int) -> None:
        self.batch: Batch[Any] | None = batch_of(publications) if publications else None
        """The publications; `None` if there are none, because the other offsets had no valid envelope."""
        self.end = publications[-1].offset if publications else delivered
        """The offset of the last one."""
        self.withholds = any(each.exclude or each.exclude_users for each in publications)
        """Whether one of them excludes connections or users."""


def batch_of(publications: list[Publication]) -> Batch[Any]:
    """Return publications of one audience as a batch. It ignores whom they exclude."""
    batch: Batch[Any] = Batch(publications[0])
    batch.publications.extend(publications[1:])
    return batch


class Tail:
    """The publications that came, with none missing in between, and up to where they were delivered.

    Publications come by `take`, as the engine brings them: some twice, some never. Each has the offset of the one
    before it, so it shows if one is missing. Then later publications are held, until `filled` gets what the engine has
    read. If that doesn't join the rest without a gap, there is a break: the tail begins anew after it.

    Args:
        history: How much is kept of the audience.
        turn_messages: How many publications are replayed at once; at least one is.
        turn_bytes: How many bytes of payload are replayed at once, if that is more than one publication.
    """

    __slots__ = (
        "_entries",
        "_first",
        "_gone",
        "_has_lost_held",
        "_held",
        "_stretches",
        "_turn_bytes",
        "_turn_messages",
        "base",
        "bytes",
        "delivered",
        "epoch",
        "has_failed",
        "heard_at",
        "history",
        "is_reading",
        "is_shrunk",
        "is_void",
        "promised",
        "read",
        "reads",
        "top",
        "wanted_read",
    )

    def __init__(self, history: History, turn_messages: int = 128, turn_bytes: int = 16 * 1024) -> None:
        self.history = history
        """How much is kept of the audience."""
        self._turn_messages = max(1, turn_messages)  # it would be 0 with a backlog of three messages
        self._turn_bytes = turn_bytes
        self.epoch = ""
        """The epoch of the history; empty before it was read."""
        self.top = 0
        """The offset of the newest publication."""
        self.base = 0
        """Everything after this offset is here."""
        self.delivered = 0
        """The offset up to which members have got everything that isn't withheld from them."""
        self.is_reading = False
        """Whether the history is being read, or has to be."""
        self.is_void = False
        """Whether the history was removed. Nothing more of it is sent then."""
        self.reads = 0
        """How many reads of the history have begun."""
        self.read = 0
        """The number of the newest read that has ended."""
        self.has_failed = False
        """Whether a read has failed. There may be members then that weren't told where they begin."""
        self.wanted_read = 0
        """The number of the read that somebody waits for, because it has all that was confirmed before it began."""
        self.promised = MAX_OFFSET
        """Everything after this offset is kept here a while longer, for connections that are on the way."""
        self.is_shrunk = False
        """Whether publications were dropped here that the engine still keeps."""
        self.heard_at = 0.0
        """When something came last, in seconds of the event loop's clock."""
        self.bytes = 0
        """The payload bytes of all that is here."""
        # The entries from `_first` on are here. Those before it were trimmed.
        self._entries: list[Publication] = []
        self._first = 0
        # The held publications, each with the number of reads that had begun when it came.
        self._held: list[tuple[Publication, int]] = []
        self._has_lost_held = False
        self._stretches: dict[tuple[int, int], Stretch] = {}
        # Why everything up to `base` is gone.
        self._gone: Reason = "expired"

    @property
    def position(self) -> Position | None:
        """The newest position; `None` if it isn't known."""
        return Position(self.epoch, self.top) if self.epoch else None

    @property
    def delivered_position(self) -> Position | None:
        """The position up to which members have got everything; `None` if it isn't known."""
        return Position(self.epoch, self.delivered) if self.epoch else None

    def want_read(self) -> int:
        """Ask for a read of the history that begins after this call; return its number."""
        self.is_reading = True
        self.wanted_read = self.reads + 1
        return self.wanted_read

    # Taking publications.

    def take(self, publication: Publication) -> Taken:
        """Take a publication with a position."""
        return self._take(publication, self.reads)

    def _take(self, publication: Publication, reads: int) -> Taken:
        position = publication.position
        assert position is not None
        offset = position.offset
        if position.epoch == self.epoch and publication.previous == self.top and not self.is_void:
            self._append(publication, offset)  # also while the history is read, because nothing is missing before it
            return Taken.NEXT
        if self.is_reading:
            self._hold(publication, reads)
            return Taken.HELD
        if position.epoch == self.epoch and offset <= self.top:
            return Taken.KNOWN
        self.is_reading = True
        self._hold(publication, reads)
        return Taken.SUSPECT

    def filled(self, replay: Replay, read: int) -> Reason | None:
        """Take what was read after `position`; return the reason of a break, or `None` if there is none.

        The held publications are taken next, as if they came now. Check `is_reading` afterwards: the history may have
        to be read again.

        Args:
            replay: What was read.
            read: The number of the read.
        """
        self.is_reading = False
        self.is_void = self.is_void and read < self.wanted_read
        broken: Reason | None = None
        if self.epoch and replay.is_complete(Position(self.epoch, self.top)):
            for publication in replay.publications:
                if publication.offset > self.top:
                    self._append(publication, publication.offset)
            self.top = replay.top.offset  # an invalid envelope has an offset, too
        elif replay.top.epoch != self.epoch or replay.top.offset > self.top:
            broken, was_known = self._why_broken(replay), bool(self.epoch)
            self._begin(replay)
            if was_known:
                self._deliver_what_came()
        held, self._held, has_lost = self._held, [], self._has_lost_held
        self._has_lost_held = False
        for publication, began in held:
            if not self._is_refuted(publication, read - began):
                self._take(publication, began)
        if has_lost or read < self.wanted_read:
            self.is_reading = True
        return broken

    def given_up(self) -> Reason | None:
        """Go on with the held publications, because the history can't be read; return the reason of a break, if any.

        There is no break if the held ones follow what is here. Then the read was for something else, such as a position
        of another history. Check `is_reading` afterwards: publications may be missing after these.
        """
        self.is_reading = self.is_void = False
        held, self._held, self._has_lost_held = self._held, [], False
        if not held:
            return None
        first, _ = held[0]
        assert first.position is not None
        is_joined = first.position.epoch == self.epoch and (first.previous == self.top or first.offset <= self.top)
        if not is_joined:
            self._begin(Replay(Position(first.position.epoch, first.previous), (), first.previous))
            self.is_shrunk = True
        for publication, _ in held:
            self.take(publication)
        return None if is_joined else "unavailable"

    def _is_refuted(self, publication: Publication, reads: int) -> bool:
        # A publication that came before a read began, but isn't in that read, is forged or of a former history. Several
        # reads decide, because a broker may send a publication slightly before a read has it.
        position = publication.position
        assert position is not None
        if position.epoch != self.epoch:
            return reads > 0
        return reads > _MAX_READS and position.offset > self.top and publication.previous != self.top

    def _why_broken(self, replay: Replay) -> Reason | None:
        if not self.epoch:
            return "unavailable" if self.has_failed else None  # else no connection has begun yet
        if replay.top.epoch != self.epoch:
            return "epoch"
        return self._why_gone(replay)

    def _why_gone(self, replay: Replay) -> Reason:
        return "too_many" if len(replay.publications) >= self.history.messages else "expired"

    def _begin(self, replay: Replay) -> None:
        self.epoch, self.top = replay.top.epoch, replay.top.offset
        self.base = replay.base
        self._gone = self._why_gone(replay)
        self._entries, self._first = list(replay.publications), 0
        self._stretches.clear()
        self.is_shrunk = False
        self.bytes = sum(publication.message.size for publication in self._entries)
        self.delivered = self.top  # present members haven't missed what came before they joined

    def _deliver_what_came(self) -> None:
        # Publications that came after the break are delivered to members, also if the read has them already.
        came = [
            each.previous
            for each, _ in self._held
            if each.position is not None and each.position.epoch == self.epoch and each.offset <= self.top
        ]
        self.delivered = max(self.base, min(came, default=self.top))

    def _hold(self, publication: Publication, reads: int) -> None:
        if len(self._held) < _MAX_HELD:
            self._held.append((publication, reads))
        else:
            self._has_lost_held = True

    def _append(self, publication: Publication, offset: int) -> None:
        self._entries.append(publication)
        self.top = offset
        self.heard_at = publication.kept_at
        self.bytes += publication.message.size
        if len(self._entries) - self._first > self.history.messages:
            self._trim()

    def _trim(self) -> None:
        # Everything that isn't delivered stays, however much it is. What was promised stays as long as there is room.
        entries, most = self._entries, self.history.messages
        while (size := len(entries) - self._first) > most and entries[self._first].offset <= self.delivered:
            if entries[self._first].offset > self.promised and size <= _PROMISED_PART * most:
                break
            self._forget_first()
            self._gone = "too_many"
        if self._first >= _TRIM and 2 * self._first >= len(entries):
            del entries[: self._first]
            self._first = 0

    def _forget_first(self) -> None:
        first = self._entries[self._first]
        self.base = first.offset
        self.bytes -= first.message.size
        self._entries[self._first] = _NOTHING
        self._first += 1

    def shrink(self) -> None:
        """Drop what was delivered, because all tails together are too large. The position stays."""
        while self._first < len(self._entries) and self._entries[self._first].offset <= self.delivered:
            self._forget_first()
            self.is_shrunk = True
        self._stretches.clear()

    def skip(self) -> None:
        """Count everything as delivered, because too much waits."""
        self.delivered = self.top
        self._trim()

    # Reading what is here.

    @property
    def waiting(self) -> int:
        """How many publications are not delivered yet."""
        return len(self._entries) - bisect_right(self._entries, self.delivered, lo=self._first, key=_offset)

    def next(self) -> Publication | None:
        """Return the publication to deliver next; `None` if all were delivered."""
        if self.delivered >= self.top:
            return None
        index = bisect_right(self._entries, self.delivered, lo=self._first, key=_offset)
        if index == len(self._entries):
            self.delivered = self.top  # the other offsets had no valid envelope
            return None
        return self._entries[index]

    def first_after(self, offset: int) -> Publication | None:
        """Return the first publication after an offset, delivered or not; `None` if there is none."""
        index = bisect_right(self._entries, offset, lo=self._first, key=_offset)
        return self._entries[index] if index < len(self._entries) else None

    def has(self, offset: int, now: float) -> bool:
        """Tell whether everything after an offset is here, and none of it too old. The offset must have existed."""
        index = bisect_right(self._entries, offset, lo=self._first, key=_offset)
        if not self._is_one(offset, index):
            return False
        return index == len(self._entries) or now - self._entries[index].kept_at <= self.history.seconds

    def _is_one(self, offset: int, index: int) -> bool:
        # Whether it is the offset of a publication here, or the one at which these begin.
        if offset in (self.base, self.top):
            return True
        return offset > self.base and index > self._first and self._entries[index - 1].offset == offset

    def before_last(self) -> int:
        """Return the offset before the newest delivered publication. A replay after it has only that one."""
        index = bisect_right(self._entries, self.delivered, lo=self._first, key=_offset)
        return self.delivered if index == self._first else self._entries[index - 1].previous

    def why_not(self, offset: int) -> Reason:
        """Return why not everything after an offset is here."""
        if offset >= self.base:
            index = bisect_right(self._entries, offset, lo=self._first, key=_offset)
            return "expired" if self._is_one(offset, index) else "epoch"
        if self.is_shrunk:
            return "unavailable"  # the rest is kept, but couldn't be read
        return self._gone

    def has_all_after(self, offset: int) -> bool:
        """Tell whether everything after an offset is still here, for a connection that is on the way."""
        return offset >= self.base

    def after(self, offset: int) -> Stretch:
        """Return what was delivered after an offset: as much as one turn takes, and at least one publication.

        Connections that miss the same get the same object, whose bytes are joined once.
        """
        key = (offset, self.delivered)
        stretch = self._stretches.get(key)
        if stretch is None:
            if len(self._stretches) >= _MAX_STRETCHES:
                del self._stretches[next(iter(self._stretches))]
            stretch = self._stretches[key] = Stretch(self._after(offset), self.delivered)
        return stretch

    def _after(self, offset: int) -> list[Publication]:
        start = end = bisect_right(self._entries, offset, lo=self._first, key=_offset)
        size = 0
        while end < len(self._entries) and end - start < self._turn_messages:
            entry = self._entries[end]
            size += entry.message.size
            if entry.offset > self.delivered or (size > self._turn_bytes and end > start):
                break
            end += 1
        return self._entries[start:end]

    def refilled(self, replay: Replay) -> None:
        """Take back what `shrink` has dropped and the engine still keeps, unless the history is another one now."""
        if replay.top.epoch != self.epoch:
            return
        older = [publication for publication in replay.publications if publication.offset <= self.base]
        if replay.base < self.base:
            self._entries[: self._first] = older
            self._first = 0
            self.base = replay.base
            self.bytes += sum(publication.message.size for publication in older)
        self._gone = self._why_gone(replay)  # all of it: it may be ahead, with fewer that are older than what is here
        self.is_shrunk = False
