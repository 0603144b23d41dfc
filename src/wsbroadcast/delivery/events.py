"""The ASGI events of what is written to servers that make the frames themselves. No I/O."""

from __future__ import annotations

from typing import Any

from wsbroadcast.delivery.backlog import Entry

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
