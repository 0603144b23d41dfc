"""Every code a connection is closed with, and whether a client should come back."""

from __future__ import annotations

from enum import IntEnum

from wsbroadcast.text import plain

MAX_REASON_BYTES = 123
"""The longest close reason, in UTF-8 bytes: a control frame holds 125, two of them for the code (RFC 6455, 5.5)."""

ABNORMAL = 1006
"""What an endpoint sees when the peer vanished without a close frame. Never sent (RFC 6455, 7.4.1)."""


class CloseCode(IntEnum):
    """The codes this library closes with, after the IANA registry of RFC 6455, 7.4."""

    NORMAL = 1000
    """The endpoint is done."""
    GOING_AWAY = 1001
    """The manager is closed for good."""
    UNSUPPORTED_DATA = 1003
    """The client sent text where bytes were expected, or the other way round."""
    INVALID_DATA = 1007
    """The client sent text that is not what was asked for, such as broken JSON."""
    POLICY_VIOLATION = 1008
    """A hook or an access check refused the connection, or the client went past a limit."""
    MESSAGE_TOO_BIG = 1009
    """The client sent a message that is too large."""
    INTERNAL_ERROR = 1011
    """The endpoint failed."""
    SERVICE_RESTART = 1012
    """The server restarts."""
    TRY_AGAIN_LATER = 1013
    """The connection was a slow consumer, or the server is full."""
    UNAUTHENTICATED = 4401
    """Who it is isn't known, or no longer: nothing proved it in time, it has expired, or was taken back."""
    FORBIDDEN = 4403
    """Who it is may not do what it asked for."""
    REPLACED = 4409
    """A newer connection of the same user took its place."""


_RECONNECT = {
    CloseCode.GOING_AWAY,
    ABNORMAL,
    CloseCode.INTERNAL_ERROR,
    CloseCode.SERVICE_RESTART,
    CloseCode.TRY_AGAIN_LATER,
}


def should_reconnect(code: int) -> bool:
    """Tell whether a client that was closed with this code should come back.

    Codes of ours that a server refused arrive moved up by 3,000 (see `fallback_codes`) and mean the same. After 4401 it
    should come back only with a new proof of who it is.
    """
    return (code - 3000 if 4000 < code < 4016 else code) in _RECONNECT


def is_sendable(code: int) -> bool:
    """Tell whether a close frame may carry this code (RFC 6455, 7.4)."""
    return code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999


def check_sendable(code: int) -> None:
    """Check that a close frame may carry a code.

    Raises:
        ValueError: If it may not.
    """
    if not isinstance(code, int) or not is_sendable(code):
        raise ValueError(f"close code must be 1000-1003, 1007-1014 or 3000-4999, not {code!r}")


def fallback_codes(code: int) -> tuple[int, ...]:
    """Return the codes to try in order, because some servers refuse the registered ones.

    Daphne takes 1000 and 3000 to 4999 only: there 1013 goes out as 4013. They are plain integers, because it takes no
    `IntEnum` either.
    """
    code = int(code)
    if code == 1000 or code >= 3000:
        return (code,)
    return (code, code + 3000, 1000)


def cut_reason(reason: str | None) -> str:
    """Cut a close reason to 123 bytes of UTF-8, at a character border; a lone surrogate becomes `?`."""
    data = plain(reason or "").encode("utf-8", "replace")
    return data[:MAX_REASON_BYTES].decode("utf-8", "ignore")
