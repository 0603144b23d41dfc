"""The protocol of Redis, version 2 (RESP2): it makes bytes of commands, and replies of bytes. No I/O.

Every Redis, Valkey and proxy speaks version 2. The push messages of version 3 aren't needed for subscriptions.
https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, Union


class ErrorReply(Exception):
    """An error that the server answers."""

    @property
    def code(self) -> str:
        """The first word, such as `NOPERM`."""
        return str(self).partition(" ")[0]


Reply: TypeAlias = Union[bytes, int, ErrorReply, "list[Reply]", None]
"""A text or bytes, a number, an error, a list of replies, or nothing."""


def pack(*parts: str | bytes) -> bytes:
    """Return a command as bytes for the server."""
    packed = [b"*%d\r\n" % len(parts)]
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        packed.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(packed)


class ReplyReader:
    """Cuts arriving bytes into replies, in whichever pieces they arrive."""

    def __init__(self) -> None:
        # The beginning of a reply, and how many bytes there must be before it is parsed again. A large envelope comes
        # in many pieces.
        self._begun = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> Iterator[Reply]:
        """Return the replies that are complete now.

        Raises:
            ValueError: If the bytes aren't RESP2.
        """
        if self._begun:
            self._begun += data
            if len(self._begun) < self._needed:
                return
            data = bytes(self._begun)
            self._begun.clear()
        position = 0
        try:
            while position < len(data):
                reply, position = _parse(data, position)
                yield reply
        except _Incomplete as incomplete:
            self._begun += data[position:]
            self._needed = incomplete.end - position


class _Incomplete(Exception):
    """The data ends before `end`, which the reply reaches at least."""

    def __init__(self, end: int) -> None:
        self.end = end


def _parse(data: bytes, start: int) -> tuple[Reply, int]:
    # Most of the time for an arriving message is spent here. It is called once for the list and once for each part.
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        raise _Incomplete(len(data) + 1)
    kind = data[start]
    body = line_end + 2
    if kind == 36:  # $
        size = int(data[start + 1 : line_end])
        if size < 0:
            return None, body
        end = body + size
        if len(data) < end + 2:
            raise _Incomplete(end + 2)
        return data[body:end], end + 2
    if kind == 42:  # *
        return _parse_list(data, body, int(data[start + 1 : line_end]))
    line = data[start + 1 : line_end]
    if kind == 58:  # :
        return int(line), body
    if kind == 43:  # +
        return line, body
    if kind == 45:  # -
        return ErrorReply(line.decode(errors="replace")), body
    raise ValueError(f"expected the protocol of Redis, not {bytes(data[start : start + 20])!r}")


def _parse_list(data: bytes, position: int, size: int) -> tuple[Reply, int]:
    if size < 0:
        return None, position
    replies = []
    for _ in range(size):
        reply, position = _parse(data, position)
        replies.append(reply)
    return replies, position
