"""The protocol of NATS between a client that is let in and its server, as far as an engine needs it. No I/O.

https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import re
from collections.abc import Callable

PING = b"PING\r\n"
PONG = b"PONG\r\n"

REFUSAL = re.compile(
    r"authorization violation|authentication (expired|revoked)|maximum (\w+ )*subscriptions exceeded", re.IGNORECASE
)
"""What a server says that trying again doesn't mend."""

# A line that is longer than any server sends; the longest names all the servers of a cluster.
_MAX_LINE_BYTES = 1024 * 1024


def pub(name: str, payload: bytes) -> bytes:
    """Return the command that publishes a payload."""
    return b"PUB %b %d\r\n%b\r\n" % (name.encode(), len(payload), payload)


def sub(name: str, sid: bytes) -> bytes:
    """Return the command that begins a subscription, to which every message of it will refer."""
    return b"SUB %b %b\r\n" % (name.encode(), sid)


def unsub(sid: bytes) -> bytes:
    """Return the command that ends a subscription."""
    return b"UNSUB %b\r\n" % sid


class Reader:
    """Makes messages and lines of what arrives, however it is cut.

    Args:
        on_message: Called with the id of the subscription and the payload; headers are left out.
        on_line: Called with any other line, without its end.
    """

    def __init__(self, on_message: Callable[[bytes, bytes], None], on_line: Callable[[bytes], None]) -> None:
        self._on_message = on_message
        self._on_line = on_line
        # The beginning of what isn't complete, and how long it has to become before another look is worthwhile.
        self._rest = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            ValueError, IndexError: If it isn't the protocol of NATS.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return
            data = bytes(self._rest)
            self._rest.clear()
        self._needed = 0
        start = self._read(data)
        self._rest += data[start:]
        if len(self._rest) > max(self._needed, _MAX_LINE_BYTES):
            raise ValueError(f"a line of NATS is longer than {_MAX_LINE_BYTES} bytes")

    def _read(self, data: bytes) -> int:
        # Returns where the first line or message begins that isn't complete.
        start = 0
        while (end := data.find(b"\r\n", start)) >= 0:
            if not data.startswith((b"MSG ", b"HMSG "), start):
                self._on_line(data[start:end])
                start = end + 2
                continue
            # MSG <subject> <sid> [reply-to] <bytes>, and HMSG has the bytes of its headers before those of all.
            words = data[start:end].split()
            payload = end + 2
            stop = payload + int(words[-1])
            if stop < payload:
                raise ValueError("a message of NATS has a negative size")
            if len(data) < stop + 2:
                self._needed = stop + 2 - start
                break
            if words[0] == b"HMSG":
                payload += int(words[-2])
            self._on_message(words[2], data[payload:stop])
            start = stop + 2
        return start
