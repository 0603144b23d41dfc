"""The protocol of NATS after the login, as far as the engine needs it. No I/O.

https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

PING = b"PING\r\n"
PONG = b"PONG\r\n"

REFUSAL = re.compile(
    r"authorization violation|authentication (expired|revoked)|maximum (\w+ )*subscriptions exceeded", re.IGNORECASE
)
"""Errors of a server for which trying again doesn't help."""

# No server sends a longer line. The longest line names all servers of a cluster.
_MAX_LINE_BYTES = 1024 * 1024


def pub(name: str, payload: bytes) -> bytes:
    """Return the command that publishes a payload."""
    return b"PUB %b %d\r\n%b\r\n" % (name.encode(), len(payload), payload)


def request(name: str, reply: bytes, payload: bytes) -> bytes:
    """Return the command that publishes a payload with a name for answers."""
    return b"PUB %b %b %d\r\n%b\r\n" % (name.encode(), reply, len(payload), payload)


def head_of(headers: Mapping[str, str]) -> bytes:
    """Return headers as bytes, to be written before a payload."""
    lines = "".join(f"{header}: {value}\r\n" for header, value in headers.items())
    return b"NATS/1.0\r\n%b\r\n" % lines.encode()


def request_with(name: str, reply: bytes, head: bytes, payload: bytes) -> bytes:
    """Return the command that publishes a payload with headers. With an empty `reply` nobody answers."""
    where = b"%b %b" % (name.encode(), reply)
    return b"HPUB %b %d %d\r\n%b%b\r\n" % (where, len(head), len(head) + len(payload), head, payload)


def sub(name: str, sid: bytes) -> bytes:
    """Return the command that begins a subscription. Each message of it will have its id, `sid`."""
    return b"SUB %b %b\r\n" % (name.encode(), sid)


def unsub(sid: bytes) -> bytes:
    """Return the command that ends a subscription."""
    return b"UNSUB %b\r\n" % sid


OnMessage = Callable[[list[bytes], bytes, bytes], None]
"""Called with each message."""


class Reader:
    """Makes messages and lines of arriving bytes, in whichever pieces they arrive.

    Args:
        on_message: Called with the words of the message's first line, the payload, and the headers as bytes, empty
            without any. The second word is the name, the third the id of the subscription.
        on_line: Called with each other line, without its end.
    """

    def __init__(self, on_message: OnMessage, on_line: Callable[[bytes], None]) -> None:
        self._on_message = on_message
        self._on_line = on_line
        # The beginning of something incomplete, and how many bytes there must be before it is parsed again.
        self._rest = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            ValueError, IndexError: If the bytes aren't the protocol of NATS.
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
        # Returns the beginning of the first line or message that isn't complete.
        start = 0
        while (end := data.find(b"\r\n", start)) >= 0:
            if not data.startswith((b"MSG ", b"HMSG "), start):
                self._on_line(data[start:end])
                start = end + 2
                continue
            # MSG <subject> <sid> [reply-to] <bytes>. HMSG has the size of its headers before the whole size.
            words = data[start:end].split()
            payload = end + 2
            stop = payload + int(words[-1])
            if stop < payload:
                raise ValueError("a message of NATS has a negative size")
            if len(data) < stop + 2:
                self._needed = stop + 2 - start
                break
            headers = b""
            if words[0] == b"HMSG":
                headers = data[payload : (payload := payload + int(words[-2]))]
            self._on_message(words, data[payload:stop], headers)
            start = stop + 2
        return start


# The headers with which JetStream describes a message that it keeps.
# https://docs.nats.io/nats-concepts/jetstream/headers


# The first header that a stream writes, after the headers of the publisher, which may say anything.
_STREAM = b"\r\nNats-Stream: "
_SEQUENCE = re.compile(rb"\r\nNats-Sequence: ([0-9]{1,18})\r\n")
_LAST_SEQUENCE = re.compile(rb"\r\nNats-Last-Sequence: ([0-9]{1,18})\r\n")
_SUBJECT = re.compile(rb"\r\nNats-Subject: ([^\r\n]+)\r\n")
_TIME = re.compile(rb"\r\nNats-Time-Stamp: ([0-9TZ:.+-]{1,40})\r\n")
_PENDING = re.compile(rb"\r\nNats-Num-Pending: ([0-9]{1,18})\r\n")
_EXPECTED = re.compile(rb"\r\nNats-Expected-Last-Subject-Sequence: ([0-9]{1,18})\r\n")
_UP_TO = re.compile(rb"\r\nNats-UpTo-Sequence: ([0-9]{1,18})\r\n")
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z")


class Record(NamedTuple):
    """A message that a stream keeps."""

    sequence: int
    time: int
    """When the stream took it, in nanoseconds since 1970."""
    payload: bytes


class Answer(NamedTuple):
    """A message that answers a question, or one of several."""

    payload: bytes
    headers: bytes

    @property
    def status(self) -> int:
        """The status, if it is no message: 204 for the end, 404, 503; 0 if it is a message."""
        if not self.headers.startswith(b"NATS/1.0 "):
            return 0
        return int(status) if (status := self.headers[9:12]).isdigit() else 0

    @property
    def sequence(self) -> int:
        """Its number in the stream; 0 if it has none."""
        return _number(_SEQUENCE, self.headers)

    @property
    def subject(self) -> str:
        """The name under which the stream keeps it; empty if it doesn't say."""
        found = _find(_SUBJECT, self.headers)
        return "" if found is None else found[1].decode(errors="replace")

    @property
    def time(self) -> int:
        """When the stream took it, in nanoseconds since 1970; 0 if it doesn't say."""
        found = _find(_TIME, self.headers)
        return 0 if found is None else nanoseconds(found[1].decode())

    @property
    def record(self) -> Record:
        """The message that the stream keeps."""
        return Record(self.sequence, self.time, self.payload)

    @property
    def pending(self) -> int:
        """How many messages there are after it."""
        return _number(_PENDING, self.headers)

    @property
    def last(self) -> int:
        """The number of the last message that was sent, in the end of several."""
        return _number(_LAST_SEQUENCE, self.headers)

    @property
    def up_to(self) -> int:
        """The newest number that the answering server knew; 0 if it doesn't say."""
        return _number(_UP_TO, self.headers)


def chain(headers: bytes, stream: bytes = _STREAM) -> tuple[int, int] | None:
    """Return the numbers of a message and of the one before it under its name; `None` if they make no sense.

    Args:
        headers: The headers.
        stream: The header that names the stream which must have written them.
    """
    start = headers.rfind(stream)
    if start < 0:
        return None
    sequence, last = _SEQUENCE.search(headers, start), _LAST_SEQUENCE.search(headers, start)
    if sequence is None or last is None:
        return None
    offset, previous = int(sequence[1]), int(last[1])
    return (offset, previous) if previous < offset else None


def expected_of(headers: bytes) -> int:
    """Return the number that the publisher expected of the last message under this name; -1 if it gave none."""
    found = _EXPECTED.search(headers)
    return -1 if found is None else int(found[1])


def nanoseconds(moment: str) -> int:
    """Read a moment as Go writes it; 0 if it is none."""
    found = _MOMENT.fullmatch(moment)
    if found is None:
        return 0
    try:
        seconds = _seconds(found[1])
    except ValueError:
        return 0
    return seconds * 10**9 + int((found[2] or "").ljust(9, "0"))


@lru_cache(maxsize=1024)  # messages that are read together were taken within a few seconds
def _seconds(moment: str) -> int:
    return int(datetime.fromisoformat(f"{moment}+00:00").timestamp())


def moment_of(nanoseconds: int) -> str:
    """Write a moment as Go reads it."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _number(pattern: re.Pattern[bytes], headers: bytes) -> int:
    found = _find(pattern, headers)
    return 0 if found is None else int(found[1])


def _find(pattern: re.Pattern[bytes], headers: bytes) -> re.Match[bytes] | None:
    return pattern.search(headers, max(0, headers.rfind(_STREAM)))
