"""The publications of one turn of the event loop for one audience, joined once per wire form. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from wsbroadcast.delivery.backlog import Entry
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, WireForm
from wsbroadcast.publication import Publication

R = TypeVar("R")


class Batch(Generic[R]):
    """Consecutive publications for the same recipients."""

    __slots__ = ("_entries", "_wires", "publications", "recipients")

    def __init__(self, publication: Publication, recipients: Sequence[R] | None = None) -> None:
        self.publications = [publication]
        """In the order in which they go out. All have the audience and the exclusions of the first."""
        self.recipients = recipients
        """Those of the audience who get it, where hooks have said so; else looked up when the batch is delivered."""
        # The joined frames, and what waits, by wire form; as far as connections have needed them.
        self._wires: dict[WireForm, bytes] = {}
        self._entries: dict[WireForm, list[Entry]] | None = None

    def takes(self, publication: Publication, recipients: Sequence[R] | None) -> bool:
        """Tell whether a publication belongs into this batch."""
        first = self.publications[0]
        return (
            first.audience == publication.audience
            and first.exclude == publication.exclude
            and self.recipients == recipients
        )

    @property
    def is_large(self) -> bool:
        """Whether a message is too large for one write."""
        return any(publication.message.size > FRAGMENT_BYTES for publication in self.publications)

    def wire(self, form: WireForm) -> bytes:
        """Return the frames of all publications as one piece of bytes, the same object for every connection."""
        wire = self._wires.get(form)
        if wire is None:
            frames = [form.encode(publication) for publication in self.publications]
            wire = self._wires[form] = frames[0] if len(frames) == 1 else b"".join(frames)
        return wire

    def entries(self, form: WireForm) -> list[Entry]:
        """Return the publications as they wait in backlogs, the same objects for every connection."""
        if self._entries is None:
            self._entries = {}
        entries = self._entries.get(form)
        if entries is None:
            entries = self._entries[form] = [form.entry(publication) for publication in self.publications]
        return entries
