"""The backlog: the messages that one connection has not taken yet. It has limits of bytes and messages. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from wsbroadcast.audience import Audience
from wsbroadcast.options import Policy, SlowConsumer

HIGH_WATER_PART = 8
"""A connection is a slow consumer when one part of so many of its backlog is full. Broadcasters may wait for it then;
the rest of the backlog is for connections that are slower than the crowd."""


Key = tuple[Audience, str]
"""Under `conflate`, only the newest message with a key is kept. Keys of different audiences are different."""


class BacklogFull(Exception):
    """Raised when a message doesn't fit and the policy is to disconnect."""


class Place(NamedTuple):
    """The place of a message in the history of its audience, for clients that know positions."""

    audience: Audience
    offset: int
    previous: int
    """The offset before it."""


class Entry:
    """A waiting message, in the wire form in which it will be written.

    All connections share it that wait for the message in that form. The message itself is not kept beside it, neither
    its text, nor its payload, nor frames in other forms.
    """

    __slots__ = ("channel", "data", "is_text", "key", "policy", "size")

    place: Place | None = None
    """Its place in a history, if the connection can go on from there later; else `None`."""
    is_spoken = False
    """Whether it is of the protocol itself, such as an answer, for which the client waits. No policy drops it."""

    def __init__(
        self, data: bytes, size: int, *, is_text: bool, key: Key | None = None, channel: str | None = None
    ) -> None:
        self.data = data
        """The bytes that will be written."""
        self.size = size
        """The payload's size in bytes, which counts for the limits of a backlog."""
        self.is_text = is_text
        """Whether it is sent as a text frame."""
        self.key = key
        """Its key under the policy `conflate`; `None` for none."""
        self.channel = channel
        """The channel that it was broadcast to, which may have its own policy; `None` for other audiences."""
        self.policy: Policy | None = None
        """What happens if it doesn't fit. It is set when it first waits, for all backlogs of a node."""


class PlacedEntry(Entry):
    """A message that a connection can be sent later, because its client knows positions."""

    __slots__ = ("place",)


class SpokenEntry(Entry):
    """A message of the protocol itself, such as an answer or a ping."""

    __slots__ = ()

    is_spoken = True


class Turn:
    """Something other than a message that has a place in the order of writes."""

    __slots__ = ()


class Backlog:
    """Messages in the order in which they will be sent, and turns between them, which count for no limit."""

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
        # In the order of arrival. Under `conflate` an entry has its own key here, so that a newer one finds it.
        self._items: OrderedDict[Key | int, Entry | Turn] = OrderedDict()
        self._serial = 0
        self.bytes = 0
        """Payload bytes of the waiting messages."""
        self.messages = 0
        """How many messages wait."""
        self.handed_over = 0
        """How many bytes were written from here, and a little more for each message: see `hand_over`."""
        self.rest: memoryview | None = None
        """The rest of a large message that is partly written. It is sent before everything else. It counts for no
        limit, because dropping it would make no room."""

    def __iter__(self) -> Iterator[Entry | Turn]:
        return iter(self._items.values())

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, not even a turn."""
        return not self._items and self.rest is None

    @property
    def is_past_high_water(self) -> bool:
        """Whether the connection is a slow consumer: an eighth of a limit is waiting."""
        return self._holds_part(HIGH_WATER_PART)

    @property
    def is_half_full(self) -> bool:
        """Whether half of a limit is waiting."""
        return self._holds_part(2)

    def push(self, entry: Entry) -> int:
        """Append a message; return how many messages, perhaps this one too, were dropped to stay within the limits.

        A message that is larger than the limit is taken if no other waits. Messages of the protocol itself may fill as
        much again, so that clients that are sent too much still get answers.

        Raises:
            BacklogFull: If it doesn't fit and the policy doesn't drop, or it may not be dropped.
        """
        policy = entry.policy
        if policy is None:
            policy = entry.policy = self._options.policy_of(entry.channel)
        older = self._items.get(entry.key) if policy == "conflate" and entry.key is not None else None
        if self._is_full_for(entry, older):
            if entry.is_spoken:
                raise BacklogFull
            if policy == "drop_newest":
                return 1
            if policy == "drop_oldest":
                return self._make_room_for(entry)
            raise BacklogFull
        if older is not None and entry.key is not None:
            self._forget(entry.key)  # the newer one goes to the end, so that messages keep the order of broadcasts
        self._append(entry)
        return 0 if older is None else 1

    def has_room_for(self, entry: Entry) -> bool:
        """Tell whether a message fits without any other being dropped."""
        return not self._is_full_for(entry)

    def push_turn(self, turn: Turn) -> None:
        """Append a turn. It is never dropped and never refused."""
        self._serial += 1
        self._items[self._serial] = turn

    def pop(self) -> Entry | Turn | None:
        """Take out the next item; return `None` if nothing waits."""
        if not self._items:
            return None
        _, item = self._items.popitem(last=False)
        self._uncount(item)
        return item

    def hand_over(self, size: int) -> None:
        """Count a written message. A small message counts as its share of a full backlog, in bytes."""
        self.handed_over += size + self._options.max_backlog_bytes // self._options.max_backlog_messages

    def remove_turn(self, turn: Turn) -> bool:
        """Take out a turn anywhere in the order; return whether it was still there."""
        for key, item in self._items.items():
            if item is turn:
                del self._items[key]
                return True
        return False

    def _holds_part(self, part: int) -> bool:
        options = self._options
        return self.bytes * part > options.max_backlog_bytes or self.messages * part > options.max_backlog_messages

    def _is_full_for(self, entry: Entry, instead_of: Entry | Turn | None = None) -> bool:
        times = 2 if entry.is_spoken else 1
        most, most_bytes = self._options.max_backlog_messages * times, self._options.max_backlog_bytes * times
        messages, size = self.messages, self.bytes + entry.size
        if isinstance(instead_of, Entry):
            messages, size = messages - 1, size - instead_of.size
        return messages > 0 and (messages >= most or size > most_bytes)

    def _make_room_for(self, entry: Entry) -> int:
        dropped = 0
        while self._is_full_for(entry):
            oldest = next((key for key, item in self._items.items() if self._may_be_dropped(item)), None)
            if oldest is None:  # the others are of channels whose policy drops nothing
                return dropped + 1
            self._forget(oldest)
            dropped += 1
        self._append(entry)
        return dropped

    def _may_be_dropped(self, item: Entry | Turn) -> bool:
        return isinstance(item, Entry) and item.policy == "drop_oldest" and not item.is_spoken

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
