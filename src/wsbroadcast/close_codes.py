"""The close codes, and whether a client should come back after them."""

from __future__ import annotations

from enum import IntEnum

from wsbroadcast.text import plain

MAX_REASON_BYTES = 123
"""The longest close reason, in bytes of UTF-8: a control frame holds 125, two of them for the code (RFC 6455, 5.5)."""

ABNORMAL = 1006
"""The code that an endpoint sees if the peer vanished without a close frame. It is never sent (RFC 6455, 7.4.1)."""


EXPIRED = "it has expired"
"""The close reason when `expires_at` has come."""


class CloseCode(IntEnum):
    """The codes this library closes with, from the IANA registry of RFC 6455, 7.4, and its own from 4000 on."""

    NORMAL = 1000
    """The endpoint has returned, or closed the connection."""
    GOING_AWAY = 1001
    """The manager was closed."""
    UNSUPPORTED_DATA = 1003
    """The client sent text where bytes were expected, or bytes where text was expected."""
    INVALID_DATA = 1007
    """The client sent text that is not what was expected, such as broken JSON."""
    POLICY_VIOLATION = 1008
    """A hook or an access check refused the connection, or the client went past a limit."""
    MESSAGE_TOO_BIG = 1009
    """The client sent a message that is too large."""
    INTERNAL_ERROR = 1011
    """The endpoint failed."""
    SERVICE_RESTART = 1012
    """The server restarts, the node drains, or `Limits.max_connection_age` is over."""
    TRY_AGAIN_LATER = 1013
    """The connection was a slow consumer, or the server is full."""
    UNAUTHENTICATED = 4401
    """The user isn't known, or no longer: no proof came in time, or the proof has expired or was revoked."""
    FORBIDDEN = 4403
    """The user may not do what it asked for."""
    REPLACED = 4409
    """A newer connection of the same user has taken its place."""


_RECONNECT = {
    CloseCode.GOING_AWAY,
    ABNORMAL,
    CloseCode.INTERNAL_ERROR,
    CloseCode.SERVICE_RESTART,
    CloseCode.TRY_AGAIN_LATER,
}


def should_reconnect(code: int) -> bool:
    """Return whether a client that was closed with this code should come back.

    If a server refuses to send one of our codes, it is sent plus 3,000 (see `fallback_codes`) and means the same. After
    4401 a client should come back only with a new proof of its user.
    """
    return (code - 3000 if 4000 < code < 4016 else code) in _RECONNECT


def is_sendable(code: int) -> bool:
    """Return whether a close frame may carry this code (RFC 6455, 7.4)."""
    return code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999


def check_sendable(code: int) -> None:
    """Check that a close frame may carry a code.

    Raises:
        ValueError: If it may not carry the code.
    """
    if not isinstance(code, int) or not is_sendable(code):
        raise ValueError(f"a close code is 1000-1003, 1007-1014 or 3000-4999, not {code!r}")


def fallback_codes(code: int) -> tuple[int, ...]:
    """Return the codes to try in order, because some servers refuse registered ones.

    Daphne takes only 1000 and 3000 to 4999, so 1013 goes out as 4013 there. It takes no `IntEnum` either, so the codes
    are plain integers.
    """
    code = int(code)
    if code == 1000 or code >= 3000:
        return (code,)
    return (code, code + 3000, 1000)


def cut_reason(reason: str | None) -> str:
    """Cut a close reason to 123 bytes of UTF-8, between two characters; a lone surrogate becomes `?`."""
    data = plain(reason or "").encode("utf-8", "replace")
    return data[:MAX_REASON_BYTES].decode("utf-8", "ignore")
