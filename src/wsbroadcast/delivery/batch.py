"""The messages of one turn of the event loop for one audience, joined once per wire form. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.delivery.frames import WireForm
from wsbroadcast.message import Message

R = TypeVar("R")


class Batch(Generic[R]):
    """Consecutive messages for the same recipients."""

    __slots__ = ("exclude", "messages", "target", "wires")

    def __init__(self, target: Audience | Sequence[R], exclude: frozenset[str], message: Message) -> None:
        self.target = target
        """An audience, looked up when the batch is delivered, or the recipients themselves."""
        self.exclude = exclude
        """Ids of the connections in the audience that don't get it."""
        self.messages = [message]
        """In the order in which they go out."""
        self.wires: dict[WireForm, bytes] = {}
        """The joined frames by wire form, as far as connections have needed them."""

    def wire(self, form: WireForm) -> bytes:
        """Return the frames of all messages as one piece of bytes, the same object for every connection."""
        wire = self.wires.get(form)
        if wire is None:
            frames = [form.frame(message) for message in self.messages]
            wire = self.wires[form] = frames[0] if len(frames) == 1 else b"".join(frames)
        return wire
