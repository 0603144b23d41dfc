"""Server-sent events (WHATWG HTML, 9.2): what a publication looks like in a `text/event-stream`. No I/O.

```
retry: 2381                                                     the first line: how long a browser waits

event: hello
data: {"type":"hello","id":"kX2…"}

id: mH3…:16
event: recovered
data: {"type":"subscribed","channel":"news","position":"mH3…:16","recovered":true}

id: mH3…:17
data: what was broadcast

event: close
data: {"type":"close","code":1012,"reason":"drain"}            the last event
```

The `id` is always the position in the path's channel, and nothing else: a browser sends back the last one that it saw.
"""

from __future__ import annotations

from base64 import b64encode
from typing import Any
from weakref import WeakValueDictionary

from pydantic_core import from_json, to_json

from wsbroadcast.audience import Audience
from wsbroadcast.message import Message
from wsbroadcast.protocols.events import events
from wsbroadcast.publication import Frame, Publication, Withheld

PING = b": ping\n\n"
"""A comment that keeps a stream alive."""

# Not `error`: browsers use that name for the loss of a stream.
_NAMES = {"subscribed": b"recovered", "error": b"refused", "message": b"", "position": b""}


def event(data: bytes, name: bytes = b"", position: str | None = None) -> bytes:
    """Return one event as bytes.

    A line ends at LF, CR LF and CR, and at nothing else (9.2.6). U+2028 and similar characters don't end it.

    Args:
        data: The data of the event. An empty text makes an event too.
        name: The type of the event; empty for `message`.
        position: The id of the event. It has no line ends.
    """
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\n" in data:
        data = data.replace(b"\n", b"\ndata: ")
    id_ = b"" if position is None else b"id: %b\n" % position.encode()
    return b"%b%bdata: %b\n\n" % (id_, b"event: %b\n" % name if name else b"", data)


def app_event(content: str | bytes) -> bytes:
    """Return the event for what an app sends itself: text, or bytes as base64 in an event named `binary`."""
    if isinstance(content, str):
        return event(content.encode("utf-8", "replace"))
    return event(b64encode(content), b"binary")


def comment(text: bytes) -> bytes:
    """Return a comment. Pages don't see it."""
    return b": %b\n\n" % text.replace(b"\r", b" ").replace(b"\n", b" ")


def retry(seconds: float) -> bytes:
    """Return the line that says how long a browser waits before it comes back."""
    return b"retry: %d\n\n" % round(seconds * 1000)


def close(code: int, reason: str) -> bytes:
    """Return the last event of a stream. It says why the stream ends, like a close frame."""
    return event(to_json({"type": "close", "code": code, "reason": reason}), b"close")


class ServerSentEvents:
    """Writes publications as server-sent events, for the streams of one channel.

    Args:
        channel: The channel whose positions are the ids; `None` for no ids.
        is_events: Whether the data is the JSON of `wsbroadcast.v1`, for clients that speak that. Otherwise it is what
            was broadcast.
    """

    has_positions = True
    """Clients know their position, so a connection that is behind may be sent the rest later."""

    def __init__(self, channel: str | None, *, is_events: bool) -> None:
        self._audience = None if channel is None else Audience("channel", channel)
        self._is_events = is_events

    def __call__(self, publication: Publication) -> Message:
        """Return what a client gets for a publication."""
        message = publication.message
        if isinstance(publication, Frame):
            return Message(self._frame(message), "text")
        position = publication.position if publication.audience == self._audience else None
        if self._is_events:
            return Message(event(events(publication).payload, b"", position), "text", key=message.key)
        if isinstance(publication, Withheld):  # an id without data sets the position, but makes no event (9.2.6)
            return Message(PING if position is None else b"id: %b\n\n" % position.encode(), "text")
        if message.is_text:
            data, name = message.payload, b""
        else:
            data, name = b64encode(message.payload), b"binary"
        return Message(event(data, name, position), "text", key=message.key)

    def _frame(self, message: Message) -> bytes:
        # What the protocol itself says is JSON with a type. The type becomes the event's name.
        said: dict[str, Any] = from_json(message.payload)
        kind: str = said["type"]
        if kind == "ping":
            return PING
        is_ours = self._audience is not None and said.get("channel") == self._audience.name
        return event(message.payload, _NAMES.get(kind, kind.encode()), said.get("position") if is_ours else None)


_KNOWN: WeakValueDictionary[tuple[str | None, bool], ServerSentEvents] = WeakValueDictionary()


def server_sent_events(channel: str | None, *, is_events: bool = False) -> ServerSentEvents:
    """Return the protocol for the streams of a channel. They all get the same object, so that they share bytes."""
    protocol = _KNOWN.get((channel, is_events))
    if protocol is None:
        protocol = _KNOWN[channel, is_events] = ServerSentEvents(channel, is_events=is_events)
    return protocol
