"""The newest stretch of the history of one audience on one node: the only place where replay meets live. No I/O."""

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

# In the place of what was trimmed.
_NOTHING = Publication(Message.of(""), EVERYONE)

# What is held at most while the history is read. What doesn't fit is in the history, and read again.
_MAX_HELD = 4096

# After so many reads that don't have it, what was held is given up.
_MAX_READS = 3

# What was trimmed is taken out of the list when it is this many, because that moves the rest.
_TRIM = 64

# How many times as much as the history has is held for those who are on the way.
_PROMISED_PART = 3

# Joined stretches that are remembered: who comes back at the same time has mostly missed the same.
_MAX_STRETCHES = 8


class Taken(Enum):
    """What became of a publication that came."""

    NEXT = "next"
    """It is the next one, and may be delivered."""
    KNOWN = "known"
    """It came before."""
    HELD = "held"
    """It waits until the history is read."""
    SUSPECT = "suspect"
    """It waits, and the history has to be read: something before it is missing, or the epoch is another."""


class Stretch:
    """Consecutive publications as they are replayed, the same for everybody who misses the same."""

    __slots__ = ("batch", "end", "withholds")

    def __init__(self, publications: list[Publication], delivered: int) -> None:
        self.batch: Batch[Any] | None = batch_of(publications) if publications else None
        """The publications; `None` if there are none, because the rest was no envelope."""
        self.end = publications[-1].offset if publications else delivered
        """The offset of the last."""
        self.withholds = any(each.exclude or each.exclude_users for each in publications)
        """Whether there is one that not everybody gets."""


def batch_of(publications: list[Publication]) -> Batch[Any]:
    """Return publications of one audience as a batch, which doesn't look at whom they exclude."""
    batch: Batch[Any] = Batch(publications[0])
    batch.publications.extend(publications[1:])
    return batch


class Tail:
    """What came, without a hole, and how far it was delivered.

    Publications come by `take`, as the engine brings them: some twice, some never. Each says which one was before it,
    so a hole shows. Then what comes behind it is held, until `filled` has what the engine has read. What was read and
    can't be joined to the rest without a hole is a break: the tail begins anew behind it.

    Args:
        history: How much is kept of the audience.
        turn_messages: How many are replayed at once, one at least.
        turn_bytes: How many bytes of payload are, if that is more than one.
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
        self._turn_messages = max(1, turn_messages)  # of a backlog of three messages a turn is none
        self._turn_bytes = turn_bytes
        self.epoch = ""
        """That of the history; empty as long as it was never read."""
        self.top = 0
        """The offset of the newest publication."""
        self.base = 0
        """Everything after this offset is here."""
        self.delivered = 0
        """The offset up to which the members have got everything, or had it withheld."""
        self.is_reading = False
        """Whether the history is being read, or has to be."""
        self.is_void = False
        """Whether the history was removed: nothing more of it goes out."""
        self.reads = 0
        """How many reads of the history have begun."""
        self.read = 0
        """The newest read that has come to its end."""
        self.has_failed = False
        """Whether a read has failed, so that there may be members who weren't told where they begin."""
        self.wanted_read = 0
        """The read that somebody wants the outcome of, because it has what was confirmed before it began."""
        self.promised = MAX_OFFSET
        """The offset after which everything is held a while longer, for those who are on the way here."""
        self.is_shrunk = False
        """Whether some of it was forgotten that is still kept."""
        self.heard_at = 0.0
        """When something came last, by the clock of the event loop."""
        self.bytes = 0
        """Payload bytes of what is here."""
        # Those from `_first` on are here; the rest was trimmed.
        self._entries: list[Publication] = []
        self._first = 0
        # With the number of reads that had begun when it came.
        self._held: list[tuple[Publication, int]] = []
        self._has_lost_held = False
        self._stretches: dict[tuple[int, int], Stretch] = {}
        # Why what came before `base` is gone.
        self._gone: Reason = "expired"

    @property
    def position(self) -> Position | None:
        """The newest position; `None` if it isn't known."""
        return Position(self.epoch, self.top) if self.epoch else None

    @property
    def delivered_position(self) -> Position | None:
        """The position up to which the members have got everything; `None` if it isn't known."""
        return Position(self.epoch, self.delivered) if self.epoch else None

    def want_read(self) -> int:
        """Let the history be read, from now on; return the number of the read that begins after this."""
        self.is_reading = True
        self.wanted_read = self.reads + 1
        return self.wanted_read

    # What comes.

    def take(self, publication: Publication) -> Taken:
        """Take a publication with a position."""
        return self._take(publication, self.reads)

    def _take(self, publication: Publication, reads: int) -> Taken:
        position = publication.position
        assert position is not None
        offset = position.offset
        if position.epoch == self.epoch and publication.previous == self.top and not self.is_void:
            self._append(publication, offset)  # also while the history is read: nothing is missing before it
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
        """Take what was read since `position`; return why there is a break, or `None` if there is none.

        What was held comes next, as if it came now. Ask `is_reading` afterwards: it may have to be read again.

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
            self.top = replay.top.offset  # what is no envelope has an offset, too
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
        """The history can't be read: go on with what was held; return why there is a break, if there is one.

        There is none where what was held follows what is here: the read was for something else, such as a position of
        another history. Ask `is_reading` afterwards: there may be a hole behind that.
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
        # What came before a read began, and isn't in there: it is of a history that has ended, or forged. A broker may
        # tell the nodes a little earlier than those who read.
        position = publication.position
        assert position is not None
        if position.epoch != self.epoch:
            return reads > 0
        return reads > _MAX_READS and position.offset > self.top and publication.previous != self.top

    def _why_broken(self, replay: Replay) -> Reason | None:
        if not self.epoch:
            return "unavailable" if self.has_failed else None  # else nobody has begun yet
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
        self.delivered = self.top  # who is a member now has not missed what came before it was one

    def _deliver_what_came(self) -> None:
        # What came behind the break is for the members, also if the read has it already.
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
        # What was not delivered stays, however much it is; what somebody was promised for as long as there is room.
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
        """Forget what was delivered, because many tails together are too large; the position stays."""
        while self._first < len(self._entries) and self._entries[self._first].offset <= self.delivered:
            self._forget_first()
            self.is_shrunk = True
        self._stretches.clear()

    def skip(self) -> None:
        """Count everything as delivered: too much waits for it."""
        self.delivered = self.top
        self._trim()

    # What is here.

    @property
    def waiting(self) -> int:
        """How many publications are not delivered yet."""
        return len(self._entries) - bisect_right(self._entries, self.delivered, lo=self._first, key=_offset)

    def next(self) -> Publication | None:
        """Return what has to be delivered next; `None` if everything was."""
        if self.delivered >= self.top:
            return None
        index = bisect_right(self._entries, self.delivered, lo=self._first, key=_offset)
        if index == len(self._entries):
            self.delivered = self.top  # the rest was no envelope
            return None
        return self._entries[index]

    def first_after(self, offset: int) -> Publication | None:
        """Return what came first after an offset, delivered or not; `None` if nothing did."""
        index = bisect_right(self._entries, offset, lo=self._first, key=_offset)
        return self._entries[index] if index < len(self._entries) else None

    def has(self, offset: int, now: float) -> bool:
        """Tell whether everything after an offset is here, none of it too old; an offset that never was is not."""
        index = bisect_right(self._entries, offset, lo=self._first, key=_offset)
        if not self._is_one(offset, index):
            return False
        return index == len(self._entries) or now - self._entries[index].kept_at <= self.history.seconds

    def _is_one(self, offset: int, index: int) -> bool:
        # Whether it is the offset of something, or the place where what is here begins.
        if offset in (self.base, self.top):
            return True
        return offset > self.base and index > self._first and self._entries[index - 1].offset == offset

    def before_last(self) -> int:
        """Return the offset before the newest publication that was delivered, so that a replay has only that one."""
        index = bisect_right(self._entries, self.delivered, lo=self._first, key=_offset)
        return self.delivered if index == self._first else self._entries[index - 1].previous

    def why_not(self, offset: int) -> Reason:
        """Return why not everything after an offset is here."""
        if offset >= self.base:
            index = bisect_right(self._entries, offset, lo=self._first, key=_offset)
            return "expired" if self._is_one(offset, index) else "epoch"
        if self.is_shrunk:
            return "unavailable"  # the rest is kept, and couldn't be read
        return self._gone

    def has_all_after(self, offset: int) -> bool:
        """Tell whether everything after the offset of one who is on the way here is still here."""
        return offset >= self.base

    def after(self, offset: int) -> Stretch:
        """Return what was delivered after an offset: as much as one turn takes, and one publication at least.

        Whoever misses the same gets the same object, whose bytes are joined once.
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
        """Take back what was forgotten by `shrink` and is still kept, unless the history is another by now."""
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
