"""The messages of one turn of the event loop for one audience, joined once per wire form. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.delivery.backlog import Entry
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, WireForm
from wsbroadcast.message import Message

R = TypeVar("R")


class Batch(Generic[R]):
    """Consecutive messages for the same recipients."""

    __slots__ = ("_entries", "audience", "exclude", "messages", "recipients", "wires")

    def __init__(
        self, message: Message, audience: Audience, exclude: frozenset[str], recipients: Sequence[R] | None = None
    ) -> None:
        self.messages = [message]
        """In the order in which they go out."""
        self.audience = audience
        """Whom they were broadcast to; looked up when the batch is delivered, unless the recipients are named."""
        self.exclude = exclude
        """Ids of the connections in the audience that don't get it."""
        self.recipients = recipients
        """Those of the audience who get it, where hooks have said so."""
        self.wires: dict[WireForm, bytes] = {}
        """The joined frames by wire form, as far as connections have needed them."""
        # What waits of it, by wire form, once there is a connection for which it has to.
        self._entries: dict[WireForm, list[Entry]] | None = None

    @property
    def is_large(self) -> bool:
        """Whether a message is too large for one write."""
        return any(message.size > FRAGMENT_BYTES for message in self.messages)

    def wire(self, form: WireForm) -> bytes:
        """Return the frames of all messages as one piece of bytes, the same object for every connection."""
        wire = self.wires.get(form)
        if wire is None:
            frames = [form.frame(message) for message in self.messages]
            wire = self.wires[form] = frames[0] if len(frames) == 1 else b"".join(frames)
        return wire

    def entries(self, form: WireForm) -> list[Entry]:
        """Return the messages as they wait in backlogs, the same objects for every connection."""
        if self._entries is None:
            self._entries = {}
        entries = self._entries.get(form)
        if entries is None:
            entries = self._entries[form] = [self._entry(message, form) for message in self.messages]
        return entries

    def _entry(self, message: Message, form: WireForm) -> Entry:
        key = None if message.key is None else (self.audience, message.key)
        return Entry(form.frame(message), message.size, is_text=message.is_text, key=key)
