"""RFC 6455 frames from a server to a client, and RFC 7692 compression that all connections share. No I/O.

A server's frames are not masked (RFC 6455, 5.1), so one frame serves all connections. A compressed message serves all
connections with the same window size, because each message is compressed with a new context. A sender may always do so
(RFC 7692, 7.2.1), whatever was negotiated and whatever the receiver still remembers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Generic, TypeVar

from wsbroadcast.delivery.backlog import Entry, Place, PlacedEntry, SpokenEntry
from wsbroadcast.message import Encoding, Message
from wsbroadcast.publication import NOTHING, Frame, Protocol, Publication, plain

_FIN = 0x80
_COMPRESSED = 0x40  # RSV1 (RFC 7692, 6), only in the first frame of a message
_CONTINUATION = 0x00
_TEXT = 0x01
_BINARY = 0x02

# The end of a compressed block after a sync flush. It is left out on the wire (RFC 7692, 7.2.1).
_EMPTY_BLOCK = b"\x00\x00\xff\xff"

# Smaller messages aren't compressed: the gain isn't worth the work of the receiver.
_MIN_COMPRESSED_BYTES = 64

FRAGMENT_BYTES = 256 * 1024
"""The largest payload of one frame, in bytes. A larger message is cut into fragments (RFC 6455, 5.4). So it can be
written in parts, and the server's pings, pongs and close frames may come in between. With smaller fragments a healthy
connection would cost half as much again, in system calls. Larger ones would fill the transport of a peer that reads
nothing."""

# How many bytes one message has at most if a protocol joins several. Clients take at least 1 MiB in one message.
_MOST_JOINED_BYTES = 512 * 1024

PIECE_BYTES = FRAGMENT_BYTES + 10
"""The size of a full fragment with its header. If a message is cut into pieces of this size, each is a whole frame."""


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
    """The encoding as frames: a header and the payload."""

    def encode(self, message: Message) -> bytes:
        """Return the message's frame, or the frames of a large one."""
        return _frames(_TEXT if message.is_text else _BINARY, message.payload)


FRAMED = Framed()


class Deflated:
    """The encoding as compressed frames. Small and incompressible messages aren't compressed.

    Args:
        window_bits: The binary logarithm of the window that the receiver keeps, 9 to 15.
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
    """The encoding for servers that make the frames themselves: only the payload."""

    def encode(self, message: Message) -> bytes:
        """Return the payload."""
        return message.payload


class WireForm:
    """A protocol and an encoding. All connections that share both get the same bytes for each publication.

    Get one from `wire_form`. There is only one object for each, so they are compared by identity.
    """

    __slots__ = ("__weakref__", "_closing", "_encoding", "_join", "_protocol", "has_positions")

    def __init__(self, protocol: Protocol, encoding: Encoding) -> None:
        self._protocol = protocol
        self._encoding = encoding
        self.has_positions: bool = getattr(protocol, "has_positions", False)
        """Whether the clients know positions."""
        # How the protocol joins several messages, and how it changes close codes; `None` for most protocols.
        self._join: Callable[[Sequence[Message]], Message] | None = getattr(protocol, "join", None)
        self._closing: Callable[[int, str], tuple[int, str]] | None = getattr(protocol, "closing", None)

    def encode(self, publications: Sequence[Publication]) -> bytes:
        """Return the bytes of publications that are sent together."""
        protocol, encoding = self._protocol, self._encoding
        if protocol is plain:
            frames = [publication.message._wire(encoding) for publication in publications]
        else:
            messages = [publication.seen_by(protocol) for publication in publications]
            if self._join is not None and len(messages) > 1:
                messages = self._joined(messages)
            frames = [message._wire(encoding) for message in messages if message is not NOTHING]
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def _joined(self, messages: Sequence[Message]) -> list[Message]:
        assert self._join is not None
        joined: list[Message] = []
        some: list[Message] = []
        size = 0
        for message in messages:
            if message is not NOTHING:
                if some and size + message.size > _MOST_JOINED_BYTES:
                    joined.append(self._join(some))
                    some, size = [], 0
                some.append(message)
                size += message.size
        return [*joined, self._join(some)] if some else joined

    def closing(self, code: int, reason: str) -> tuple[int, str]:
        """Return the close code and reason for the clients."""
        return (code, reason) if self._closing is None else self._closing(code, reason)

    def entries(self, publications: Sequence[Publication]) -> list[Entry]:
        """Return the entries of publications for backlogs."""
        return [self.entry(each) for each in publications if each.seen_by(self._protocol) is not NOTHING]

    def entry(self, publication: Publication) -> Entry:
        """Return the entry of a publication for backlogs."""
        message = publication.seen_by(self._protocol)
        key = publication.message.key
        entry = self._kind_of(publication)(
            message._wire(self._encoding),
            message.size,
            is_text=message.is_text,
            key=None if key is None else (publication.audience, key),
            channel=publication.channel,
        )
        if isinstance(entry, PlacedEntry):
            entry.place = Place(publication.audience, publication.offset, publication.previous)
        return entry

    def _kind_of(self, publication: Publication) -> type[Entry]:
        if self.has_positions and publication.position is not None:
            return PlacedEntry
        # Joins and leaves in a channel may be as many as messages, so they count like messages.
        return SpokenEntry if isinstance(publication, Frame) and publication.channel is None else Entry


@cache
def wire_form(protocol: Protocol = plain, window_bits: int | None = None) -> WireForm:
    """Return the wire form of connections whose frames are made here.

    Args:
        protocol: The protocol of the clients.
        window_bits: If permessage-deflate was negotiated, the binary logarithm of the window that the receiver keeps, 9
            to 15.
    """
    return WireForm(protocol, FRAMED if window_bits is None else Deflated(window_bits))


@cache
def unframed(protocol: Protocol = plain) -> WireForm:
    """Return the wire form of connections whose server makes the frames."""
    return WireForm(protocol, Unframed())


# The ASGI events for servers that make the frames themselves. No I/O.


# How many bytes of payload are kept beside the newest message: enough for connections that are written to in turns.
_KEPT_BYTES = 256 * 1024

# How many bytes an event takes beside the payload.
_EVENT_BYTES = 512


class Events:
    """Makes events, and keeps those of the newest messages, so that connections that keep up share them.

    Events aren't kept in backlogs, because the text in an event may take four times the bytes of its payload. So a
    connection that is behind makes the event of an older message for itself.
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
        """Forget all events, because nothing waits for any connection."""
        self._kept.clear()
        self._bytes = 0


# The publications of one turn of the event loop for one audience. They are joined once for each wire form. No I/O.


R = TypeVar("R")


class Batch(Generic[R]):
    """Consecutive publications for the same recipients."""

    __slots__ = ("_entries", "_wires", "publications", "recipients")

    def __init__(self, publication: Publication, recipients: Sequence[R] | None = None) -> None:
        self.publications = [publication]
        """The publications in order. All have the audience and the exclusions of the first."""
        self.recipients = recipients
        """The recipients, if hooks have chosen them; if `None`, they are looked up when the batch is delivered."""
        # The joined frames and the entries by wire form, made when they are first needed.
        self._wires: dict[WireForm, bytes] = {}
        self._entries: dict[WireForm, list[Entry]] | None = None

    def takes(self, publication: Publication, recipients: Sequence[R] | None) -> bool:
        """Tell whether a publication fits into this batch."""
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
        """How many of them were broadcast or sent. The others are of the protocol itself, or tell a position."""
        return sum(publication.__class__ is Publication for publication in self.publications)

    @property
    def is_large(self) -> bool:
        """Whether a message is too large for one write."""
        return any(publication.message.size > FRAGMENT_BYTES for publication in self.publications)

    def wire(self, form: WireForm) -> bytes:
        """Return the frames of all publications as one bytes object, the same for all connections."""
        wire = self._wires.get(form)
        if wire is None:
            wire = self._wires[form] = form.encode(self.publications)
        return wire

    def entries(self, form: WireForm) -> list[Entry]:
        """Return the entries of the publications for backlogs, the same objects for all connections."""
        if self._entries is None:
            self._entries = {}
        entries = self._entries.get(form)
        if entries is None:
            entries = self._entries[form] = form.entries(self.publications)
        return entries
