r"""What a notification of Postgres carries: a name, and an envelope as text or the row where it is. No I/O.

    wsbroadcast:channel:news text:1f {"v":1,"node":"kX2…","seq":42}\nhello
    wsbroadcast:channel:news base64:20 eyJ2IjoxLCJ0eXBlIjoiYmluYXJ5In0K…
    wsbroadcast:channel:news table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55

The number after the colon keeps two equal envelopes apart, because Postgres merges equal notifications of one
transaction; whoever sends a single one may leave it out.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from itertools import count
from typing import NamedTuple
from uuid import UUID
from zlib import crc32

from wsbroadcast.engines.link import Parcel

MAX_NOTE_BYTES = 7_500
"""The longest notification that is sent. Postgres takes 7,999 bytes, a build of it with smaller pages takes less."""

# Channels of Postgres that share the audiences. A server hands a notification to every session that listens to its
# channel: more of them spare a node what it doesn't want, fewer are sooner listened to after an outage.
_CHANNELS = 8

_numbers = count()


class Note(NamedTuple):
    """A notification that was understood."""

    name: str
    envelope: bytes = b""
    row: UUID | None = None
    """Where the envelope is, if it was too large for a notification."""


def channel_of(name: str, prefix: str) -> str:
    """Return the channel of Postgres on which a name is published.

    Every node listens to the channel `prefix` too, so that no other program has to know this rule. There it also hears
    of rows, which somebody has to remove even if nobody reads them.
    """
    return f"{prefix}:{crc32(name.encode()) % _CHANNELS}"


def pack(parcel: Parcel, *, takes_unicode: bool) -> str | None:
    """Return the notification of a parcel, or `None` if it doesn't fit in one.

    Args:
        parcel: The name and the envelope.
        takes_unicode: Whether the database is in UTF-8; another one refuses characters that it doesn't have.
    """
    name, envelope = parcel
    if len(envelope) > MAX_NOTE_BYTES:
        return None
    text = _as_text(envelope, takes_unicode)
    if text is not None:
        start, size = f"{name} text:{next(_numbers):x} ", len(envelope)
    else:
        text = b64encode(envelope).decode()
        start, size = f"{name} base64:{next(_numbers):x} ", len(text)
    return start + text if len(start) + size <= MAX_NOTE_BYTES else None


def pack_row(name: str, row: UUID) -> str:
    """Return the notification that says in which row the envelope is."""
    return f"{name} table {row.hex}"


def is_row(note: str) -> bool:
    """Tell whether a notification says in which row an envelope is."""
    return note.startswith("table ", note.find(" ") + 1)


def unpack(payload: str) -> Note:
    """Read a notification, which anybody may have sent.

    Raises:
        ValueError: If it has none of the forms above.
    """
    name, _, rest = payload.partition(" ")
    form, _, body = rest.partition(" ")
    match form.partition(":")[0]:
        case "text":
            return Note(name, body.encode())
        case "base64":
            return Note(name, b64decode(body, validate=True))
        case "table":
            return Note(name, row=UUID(hex=body))
    raise ValueError("neither text nor base64 nor table")


def _as_text(envelope: bytes, takes_unicode: bool) -> str | None:
    if b"\0" in envelope:  # no text of Postgres may have it
        return None
    try:
        return envelope.decode("utf-8" if takes_unicode else "ascii")
    except UnicodeDecodeError:
        return None
