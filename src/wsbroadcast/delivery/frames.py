"""RFC 6455 frames from a server to a client, and RFC 7692 compression that all connections share. No I/O.

A server's frames are not masked (RFC 6455, 5.1), so one frame serves every connection. A compressed message serves
every connection with the same window size, because it is compressed with a context of its own: a sender may always do
so (RFC 7692, 7.2.1), whatever was negotiated and whatever the receiver still remembers.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Generic, TypeVar

from wsbroadcast.delivery.backlog import Entry, Place, PlacedEntry
from wsbroadcast.message import Encoding, Message
from wsbroadcast.publication import Protocol, Publication, plain

_FIN = 0x80
_COMPRESSED = 0x40  # RSV1 (RFC 7692, 6), in the first frame of a message only
_CONTINUATION = 0x00
_TEXT = 0x01
_BINARY = 0x02

# What a compressed block ends with after a sync flush, and what is left out on the wire (RFC 7692, 7.2.1).
_EMPTY_BLOCK = b"\x00\x00\xff\xff"

# Below this a message gains nothing worth its inflation on the other side.
_MIN_COMPRESSED_BYTES = 64

FRAGMENT_BYTES = 256 * 1024
"""The most that one frame carries. A larger message is cut into fragments (RFC 6455, 5.4), so that it can be written
bit by bit, and the server's pings, pongs and close frames may come in between. Smaller ones would cost a healthy
connection half as much again, in calls of the kernel; larger ones stay in the transport of one that reads nothing."""

PIECE_BYTES = FRAGMENT_BYTES + 10
"""A full fragment with its header: cut into pieces of this size, a message falls apart into whole frames."""


def frame_header(first: int, size: int) -> bytes:
    """Return the header of an unmasked frame (RFC 6455, 5.2).

    Args:
        first: The first byte: flags and opcode.
        size: The payload's size in bytes.
    """
    if size < 126:
        return bytes((first, size))
    if size < 65536:
        return bytes((first, 126)) + size.to_bytes(2)
    return bytes((first, 127)) + size.to_bytes(8)


def _frames(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size <= FRAGMENT_BYTES:
        return frame_header(_FIN | first, size) + payload
    parts: list[bytes | memoryview] = []
    view = memoryview(payload)
    for start in range(0, size, FRAGMENT_BYTES):
        fragment = view[start : start + FRAGMENT_BYTES]
        fin = _FIN if start + FRAGMENT_BYTES >= size else 0
        parts += frame_header(fin | (first if start == 0 else _CONTINUATION), len(fragment)), fragment
    return b"".join(parts)


class Framed:
    """The encoding as frames: the payload behind a header."""

    def encode(self, message: Message) -> bytes:
        """Return the message's frame, or the frames of a large one."""
        return _frames(_TEXT if message.is_text else _BINARY, message.payload)


FRAMED = Framed()


class Deflated:
    """The encoding as frames that are compressed; small and incompressible messages stay as they are.

    Args:
        window_bits: The binary logarithm of the window the receiver keeps, 9 to 15.
    """

    def __init__(self, window_bits: int) -> None:
        self._window_bits = window_bits

    def encode(self, message: Message) -> bytes:
        """Return the message's frame, or the frames of a large one."""
        if message.size < _MIN_COMPRESSED_BYTES:
            return message._wire(FRAMED)
        compressor = zlib.compressobj(wbits=-self._window_bits, memLevel=5)
        payload = compressor.compress(message.payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        payload = payload.removesuffix(_EMPTY_BLOCK)
        if len(payload) >= message.size:
            return message._wire(FRAMED)
        return _frames(_COMPRESSED | (_TEXT if message.is_text else _BINARY), payload)


class Unframed:
    """The encoding for servers that make the frames themselves: the payload."""

    def encode(self, message: Message) -> bytes:
        """Return the payload."""
        return message.payload


class WireForm:
    """What connections get that share a protocol and an encoding: of each publication the same bytes.

    Ask `wire_form` for one: there is only one of each, so it is compared by identity.
    """

    __slots__ = ("__weakref__", "_encoding", "_protocol", "has_positions")

    def __init__(self, protocol: Protocol, encoding: Encoding) -> None:
        self._protocol = protocol
        self._encoding = encoding
        self.has_positions: bool = getattr(protocol, "has_positions", False)
        """Whether its clients know where they are in a history."""

    def encode(self, publication: Publication) -> bytes:
        """Return what is written of a publication."""
        message = publication.message if self._protocol is plain else publication.seen_by(self._protocol)
        return message._wire(self._encoding)

    def entry(self, publication: Publication) -> Entry:
        """Return a publication as it waits in backlogs."""
        message = publication.seen_by(self._protocol)
        key = publication.message.key
        is_placed = self.has_positions and publication.position is not None
        entry = (PlacedEntry if is_placed else Entry)(
            message._wire(self._encoding),
            message.size,
            is_text=message.is_text,
            key=None if key is None else (publication.audience, key),
            channel=publication.channel,
        )
        if isinstance(entry, PlacedEntry):
            entry.place = Place(publication.audience, publication.offset, publication.previous)
        return entry


@cache
def wire_form(protocol: Protocol = plain, window_bits: int | None = None) -> WireForm:
    """Return the wire form of connections whose frames we make.

    Args:
        protocol: What publications look like to their clients.
        window_bits: Of permessage-deflate, if that was negotiated: the binary logarithm of the window that the receiver
            keeps, 9 to 15.
    """
    return WireForm(protocol, FRAMED if window_bits is None else Deflated(window_bits))


@cache
def unframed(protocol: Protocol = plain) -> WireForm:
    """Return the wire form of connections whose server makes the frames."""
    return WireForm(protocol, Unframed())


# The ASGI events of what is written to servers that make the frames themselves. No I/O.


# How much is kept, in bytes of payload, beside the newest: enough for connections that are written to in turns.
_KEPT_BYTES = 256 * 1024

# What an event takes beside the payload.
_EVENT_BYTES = 512


class Events:
    """Makes events, and keeps those of the newest messages, so that connections which keep up share them.

    They aren't kept with what waits: the text in an event may take four times the bytes of its payload. A connection
    that is behind makes the event of an older message for itself.
    """

    def __init__(self) -> None:
        self._kept: dict[Entry, dict[str, Any]] = {}
        self._bytes = 0

    def of(self, entry: Entry) -> dict[str, Any]:
        """Return the `websocket.send` event of a message."""
        event = self._kept.get(entry)
        if event is None:
            content = {"text": entry.data.decode()} if entry.is_text else {"bytes": entry.data}
            event = self._kept[entry] = {"type": "websocket.send", **content}
            self._bytes += entry.size + _EVENT_BYTES
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                self._bytes -= oldest.size + _EVENT_BYTES
        return event

    def clear(self) -> None:
        """Forget them all: nobody has anything waiting."""
        self._kept.clear()
        self._bytes = 0


# The publications of one turn of the event loop for one audience, joined once per wire form. No I/O.


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
            and (first.position is None) is (publication.position is None)
            and first.__class__ is publication.__class__
        )

    @property
    def messages(self) -> int:
        """How many of them were broadcast or sent; the others are of a protocol, or say where a connection is."""
        return sum(publication.__class__ is Publication for publication in self.publications)

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
