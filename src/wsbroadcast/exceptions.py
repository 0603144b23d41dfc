"""Every error this library raises on purpose.

WSBroadcastError
├── ConfigurationError(ValueError)        options, URLs
│   └── MissingDependency(ImportError)    its text holds the pip command
├── InvalidChannel(ValueError)            .channel, .rule
├── EncodeError(ValueError)               the message can't be sent
│   └── MessageTooLarge                   .size, .limit
├── ConnectionClosed(WebSocketDisconnect, RuntimeError)   .code, .reason
├── LifecycleError(RuntimeError)          not running, or running in another event loop
├── PermissionDenied                      raised by hooks and access checks
├── LimitExceeded                         .limit
└── EngineError
    └── EngineUnavailable(OSError)        nothing was sent; retry is sensible
"""

from __future__ import annotations

from starlette.websockets import WebSocketDisconnect


class WSBroadcastError(Exception):
    """The root of every error of this library."""


class ConfigurationError(WSBroadcastError, ValueError):
    """Raised when an option or an engine URL makes no sense."""


class MissingDependency(ConfigurationError, ImportError):
    """Raised when an engine needs a package that isn't installed."""


class InvalidChannel(WSBroadcastError, ValueError):
    """Raised when a channel name breaks a rule."""

    def __init__(self, channel: object, rule: str) -> None:
        self.channel = channel
        """The name as it was given."""
        self.rule = rule
        """What a channel name has to be."""
        super().__init__(f"invalid channel {_shorten(channel)}: {rule}")


class EncodeError(WSBroadcastError, ValueError):
    """Raised when a message can't be sent as text, bytes or JSON; nobody got it."""


class MessageTooLarge(EncodeError):
    """Raised when a message is larger than a limit allows; nobody got it."""

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        """The message's size in bytes."""
        self.limit = limit
        """The largest size that is allowed, in bytes."""
        super().__init__(f"message of {size} bytes is larger than the limit of {limit} bytes")


class ConnectionClosed(WSBroadcastError, WebSocketDisconnect, RuntimeError):
    """Raised when a connection is used after its end.

    It is a `WebSocketDisconnect` too, so that the `except` clause an endpoint already has catches it.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        WebSocketDisconnect.__init__(self, code, reason)

    def __str__(self) -> str:
        return f"connection closed with code {self.code}" + (f": {self.reason}" if self.reason else "")


class LifecycleError(WSBroadcastError, RuntimeError):
    """Raised when a manager is used where it doesn't run: after `aclose`, or in another event loop."""


class PermissionDenied(WSBroadcastError):
    """Raised by a hook or an access check that refuses something on purpose."""


class LimitExceeded(WSBroadcastError):
    """Raised when something would go past a configured limit."""

    def __init__(self, limit: str, message: str) -> None:
        self.limit = limit
        """The name of the limit."""
        super().__init__(message)


class EngineError(WSBroadcastError):
    """Raised when an engine fails."""


class EngineUnavailable(EngineError, OSError):
    """Raised when the broker can't be reached; nothing was sent, a retry is sensible."""


def _shorten(value: object, limit: int = 80) -> str:
    # A name a client chose ends up in logs: escaped by repr and cut.
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except Exception:  # a repr of the app's, or an int or a nesting that is too long for one
        text = object.__repr__(value)
    return text if len(text) <= limit else text[:limit] + "…"
