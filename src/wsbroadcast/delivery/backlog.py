"""What one connection has not taken yet: bounded in bytes and in messages. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from wsbroadcast.audience import Audience
from wsbroadcast.options import Policy, SlowConsumer

HIGH_WATER_PART = 8
"""The crowd is asked to wait when this part of a backlog is full; what is left carries the tail of the crowd."""


Key = tuple[Audience, str]
"""What a message is the newest of. It belongs to an audience: two of them may name different things alike."""


class BacklogFull(Exception):
    """Raised when a message doesn't fit and the policy is to let the connection go."""


class Place(NamedTuple):
    """Where a message stands in the history of its audience, for a client that knows where it is."""

    audience: Audience
    offset: int
    previous: int
    """The offset before it."""


class Entry:
    """One message as it waits: in the wire form in which it will be written, and in no other.

    It is shared by all connections that it waits for in that form. The message itself is not kept: a backlog holds what
    will be written, and neither the text, the payload nor the frames for others beside it.
    """

    __slots__ = ("channel", "data", "is_text", "key", "policy", "size")

    place: Place | None = None
    """Its place in a history, from where the connection can go on later; `None` if it can't."""

    def __init__(
        self, data: bytes, size: int, *, is_text: bool, key: Key | None = None, channel: str | None = None
    ) -> None:
        self.data = data
        """What will be written."""
        self.size = size
        """The payload's size in bytes, by which a backlog is bounded."""
        self.is_text = is_text
        """Whether it goes out as a text frame."""
        self.key = key
        """What it is the newest of, under the policy `conflate`."""
        self.channel = channel
        """The channel that it was broadcast to, which may have a policy of its own; `None` for other audiences."""
        self.policy: Policy | None = None
        """What happens if it doesn't fit; known once it has waited somewhere, for all backlogs of a node."""


class PlacedEntry(Entry):
    """One that a connection can be sent later, because its client knows where it is in a history."""

    __slots__ = ("place",)


class Turn:
    """A place in the order of writes: something other than a message whose time comes when it is popped."""

    __slots__ = ()


class Backlog:
    """Messages in the order in which they go out, and turns between them, which count for nothing."""

    __slots__ = (
        "_items",
        "_options",
        "_serial",
        "bytes",
        "handed_over",
        "messages",
        "rest",
    )

    def __init__(self, options: SlowConsumer) -> None:
        self._options = options
        # Ordered by arrival. Under `conflate` an entry's key is its own, so that a newer one finds it.
        self._items: OrderedDict[Key | int, Entry | Turn] = OrderedDict()
        self._serial = 0
        self.bytes = 0
        """Payload bytes of the waiting messages."""
        self.messages = 0
        """How many messages wait."""
        self.handed_over = 0
        """What was written from here, in bytes, and a little more for each message: see `hand_over`."""
        self.rest: memoryview | None = None
        """What is left of a large message that is partly written. It goes out before everything else, and isn't
        counted, because dropping it would make no room."""

    def __iter__(self) -> Iterator[Entry | Turn]:
        return iter(self._items.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, not even a turn."""
        return not self._items and self.rest is None

    @property
    def is_past_high_water(self) -> bool:
        """Whether the connection is a slow consumer: an eighth of what may wait is waiting."""
        return self._holds_part(HIGH_WATER_PART)

    @property
    def is_half_full(self) -> bool:
        """Whether half of what may wait is waiting."""
        return self._holds_part(2)

    def push(self, entry: Entry) -> int:
        """Append a message; return how many messages, this one included, were dropped to stay within the bounds.

        A message larger than the bound is taken when no other waits.

        Raises:
            BacklogFull: If it doesn't fit and the policy doesn't drop.
        """
        policy = entry.policy
        if policy is None:
            policy = entry.policy = self._options.policy_of(entry.channel)
        older = self._items.get(entry.key) if policy == "conflate" and entry.key is not None else None
        if self._is_full_for(entry, older):
            if policy == "drop_newest":
                return 1
            if policy == "drop_oldest":
                return self._make_room_for(entry)
            raise BacklogFull
        if older is not None and entry.key is not None:
            self._forget(entry.key)  # the newer one goes to the end: what is sent keeps the order of broadcasts
        self._append(entry)
        return 0 if older is None else 1

    def has_room_for(self, entry: Entry) -> bool:
        """Tell whether a message fits without any other being dropped."""
        return not self._is_full_for(entry)

    def push_turn(self, turn: Turn) -> None:
        """Append a turn; it is never dropped and never refused."""
        self._serial += 1
        self._items[self._serial] = turn

    def pop(self) -> Entry | Turn | None:
        """Take out what goes next, or return `None` if nothing waits."""
        if not self._items:
            return None
        _, item = self._items.popitem(last=False)
        self._uncount(item)
        return item

    def hand_over(self, size: int) -> None:
        """Count what was written. A message counts like so many bytes as its share of a full backlog at least."""
        self.handed_over += size + self._options.max_backlog_bytes // self._options.max_backlog_messages

    def remove_turn(self, turn: Turn) -> bool:
        """Take out a turn wherever it stands; return whether it was still there."""
        for key, item in self._items.items():
            if item is turn:
                del self._items[key]
                return True
        return False

    def _holds_part(self, part: int) -> bool:
        options = self._options
        return self.bytes * part > options.max_backlog_bytes or self.messages * part > options.max_backlog_messages

    def _is_full_for(self, entry: Entry, instead_of: Entry | Turn | None = None) -> bool:
        options = self._options
        messages, size = self.messages, self.bytes + entry.size
        if isinstance(instead_of, Entry):
            messages, size = messages - 1, size - instead_of.size
        return messages > 0 and (messages >= options.max_backlog_messages or size > options.max_backlog_bytes)

    def _make_room_for(self, entry: Entry) -> int:
        dropped = 0
        while self._is_full_for(entry):
            oldest = next((key for key, item in self._items.items() if self._may_be_dropped(item)), None)
            if oldest is None:  # the rest belongs to channels that lose nothing silently
                return dropped + 1
            self._forget(oldest)
            dropped += 1
        self._append(entry)
        return dropped

    def _may_be_dropped(self, item: Entry | Turn) -> bool:
        return isinstance(item, Entry) and item.policy == "drop_oldest"

    def _append(self, entry: Entry) -> None:
        self._serial += 1
        key = entry.key if entry.policy == "conflate" else None
        self._items[self._serial if key is None else key] = entry
        self.messages += 1
        self.bytes += entry.size

    def _forget(self, key: Key | int) -> None:
        self._uncount(self._items.pop(key))

    def _uncount(self, item: Entry | Turn) -> None:
        if isinstance(item, Entry):
            self.messages -= 1
            self.bytes -= item.size
