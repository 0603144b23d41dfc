"""The errors and close codes of the Centrifuge client protocol, and what each means to its clients. No I/O.

A client comes back after a close with 3000 to 3499 or 4000 to 4499, and never after one with 3500 to 3999 or 4500 to
4999. The client for JavaScript reads the code only if the reason isn't JSON. After an empty reason it comes back.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import Any

from wsbroadcast.close_codes import EXPIRED, CloseCode, cut_reason


class ErrorCode(IntEnum):
    """Why a command was not done."""

    INTERNAL = 100
    UNAUTHORIZED = 101
    UNKNOWN_CHANNEL = 102
    PERMISSION_DENIED = 103
    METHOD_NOT_FOUND = 104
    LIMIT_EXCEEDED = 106
    BAD_REQUEST = 107
    NOT_AVAILABLE = 108
    TOKEN_EXPIRED = 109
    EXPIRED = 110
    TOO_MANY_REQUESTS = 111
    UNRECOVERABLE_POSITION = 112
    APPLICATION = 400
    """The error that a method has answered with, by a `CallError`."""


# After these errors a client tries again by itself.
_TEMPORARY = {ErrorCode.INTERNAL, ErrorCode.TOO_MANY_REQUESTS}


class Failed(Exception):
    """Raised for a command that is answered with an error. The client stays connected."""

    def __init__(self, code: ErrorCode, text: str = "") -> None:
        self.code = code
        """The code of the error."""
        message = text or code.name.lower().replace("_", " ")
        self.error: dict[str, Any] = {"code": int(code), "message": message, "temporary": code in _TEMPORARY}
        """The error as the client gets it."""
        super().__init__(message)


class Disconnect(IntEnum):
    """The close codes that this library uses for clients of this protocol."""

    # The client comes back after these.
    NORMAL = 3000
    SHUTDOWN = 3001
    SERVER_ERROR = 3004
    EXPIRED = 3005
    SUBSCRIPTION_EXPIRED = 3006
    SLOW = 3008
    INSUFFICIENT_STATE = 3010
    NO_PONG = 3012
    TOO_MANY_REQUESTS = 3013
    # The client doesn't come back after these.
    INVALID_TOKEN = 3500
    BAD_REQUEST = 3501
    FORCED = 3503
    CONNECTION_LIMIT = 3504
    CHANNEL_LIMIT = 3505
    PERMISSION_DENIED = 3507


class Disconnected(Exception):
    """Raised for something for which a connection is closed."""

    def __init__(self, code: int, reason: str = "") -> None:
        self.code = code
        """The close code: one of `Disconnect`, or one of the app's."""
        self.reason = reason or text_of(code)
        """The close reason."""
        super().__init__(self.reason)


def text_of(code: int) -> str:
    """Return the reason that goes with a code."""
    return Disconnect(code).name.lower().replace("_", " ") if code in list(Disconnect) else "closed by the server"


UNSUBSCRIBED_BY_SERVER = 2000
"""The code with which a client is unsubscribed for good."""

INSUFFICIENT_STATE = 2500
"""The code after which a client subscribes again at once. It has missed something that isn't here any more."""

SUBSCRIPTION_EXPIRED = 2501
"""The code for a client whose token for a channel has expired. It gets another token and subscribes again."""

# The close codes of this library, as clients of this protocol get them.
_CLOSING: dict[int, Disconnect] = {
    CloseCode.NORMAL: Disconnect.FORCED,
    CloseCode.GOING_AWAY: Disconnect.SHUTDOWN,
    1002: Disconnect.BAD_REQUEST,
    CloseCode.UNSUPPORTED_DATA: Disconnect.BAD_REQUEST,
    CloseCode.INVALID_DATA: Disconnect.BAD_REQUEST,
    CloseCode.POLICY_VIOLATION: Disconnect.FORCED,
    CloseCode.INTERNAL_ERROR: Disconnect.SERVER_ERROR,
    CloseCode.SERVICE_RESTART: Disconnect.SHUTDOWN,
    CloseCode.TRY_AGAIN_LATER: Disconnect.SLOW,
    CloseCode.UNAUTHENTICATED: Disconnect.INVALID_TOKEN,
    CloseCode.FORBIDDEN: Disconnect.PERMISSION_DENIED,
    CloseCode.REPLACED: Disconnect.CONNECTION_LIMIT,
}


# The close codes for limits, by name, if a limit has one of its own.
_LIMITS = {
    "max_connections_per_user": Disconnect.CONNECTION_LIMIT,
    "max_channels_per_connection": Disconnect.CHANNEL_LIMIT,
    "max_connections_per_address": Disconnect.TOO_MANY_REQUESTS,
    "max_handshake_rate": Disconnect.TOO_MANY_REQUESTS,
}


def closing(code: int, reason: str, limit: str = "") -> tuple[int, str]:
    """Return the code and the reason that a client is closed with.

    A code from 3000 on that isn't one of this library's is the app's, and stays. 1009 stays, too: the message was too
    large, and would be too large again.

    Args:
        code: The code that a plain connection would be closed with.
        reason: The reason that a plain connection would be closed with.
        limit: The name of the limit because of which the client isn't let in; empty for none.
    """
    if code == CloseCode.UNAUTHENTICATED and reason == EXPIRED:
        code = Disconnect.EXPIRED
    code = int(_LIMITS[limit] if limit in _LIMITS else _CLOSING.get(code, code))
    reason = cut_reason(reason).strip() or text_of(code)
    try:
        json.loads(reason)
    except ValueError:
        return code, reason
    return code, cut_reason(f"closed: {reason}")
