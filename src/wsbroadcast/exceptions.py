"""All errors that this library raises on purpose.

WSBroadcastError
├── ConfigurationError(ValueError)        options, URLs
│   └── MissingDependency(ImportError)    its text holds the pip command
├── InvalidChannel(ValueError)            .channel, .rule
├── EncodeError(ValueError)               the message can't be sent
│   └── MessageTooLarge                   .size, .limit
├── ConnectionClosed(WebSocketDisconnect, RuntimeError)   .code, .reason
├── LifecycleError(RuntimeError)          not running, or running in another event loop
├── PermissionDenied(WebSocketException)  raised by hooks and access checks
├── LimitExceeded(WebSocketException)     .limit
├── StreamExists                          .id; a stream has one producer at a time
├── StreamEnded(RuntimeError)             .id, .state; nothing can be appended any more
├── StreamNotFound(LookupError)           .id
└── EngineError                           a retry doesn't help, except after:
    └── EngineUnavailable(OSError)        the broker is out of reach, or takes nothing now
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.text import plain, text_of

_POLICY_VIOLATION = 1008  # a number, because this module may not import close_codes


class WSBroadcastError(Exception):
    """The base class of all errors of this library."""


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
        """The rule that it breaks."""
        super().__init__(f"invalid channel {shorten(channel)}: {rule}")


class EncodeError(WSBroadcastError, ValueError):
    """Raised when a message can't be sent as text, bytes or JSON. Nobody got it."""


class MessageTooLarge(EncodeError):
    """Raised when a message is larger than a limit allows. Nobody got it."""

    def __init__(self, size: int, limit: int) -> None:
        self.size = size
        """The message's size in bytes."""
        self.limit = limit
        """The largest allowed size in bytes."""
        super().__init__(f"message of {size} bytes is larger than the limit of {limit} bytes")


class ConnectionClosed(WSBroadcastError, WebSocketDisconnect, RuntimeError):
    """Raised when a connection is used after its end.

    It is also a `WebSocketDisconnect`, so the `except` clause that an endpoint already has catches it.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        WebSocketDisconnect.__init__(self, code, plain(reason or ""))

    def __str__(self) -> str:
        return f"connection closed with code {self.code}" + (f": {self.reason!r}" if self.reason else "")


class LifecycleError(WSBroadcastError, RuntimeError):
    """Raised when a manager is used where it doesn't run: after `aclose`, or in another event loop."""


class Lagged(WSBroadcastError):
    """Raised once by a listener that missed messages, because it read too slowly or they were lost on the way."""

    def __init__(self, missed: int | None) -> None:
        self.missed = missed
        """How many messages; `None` if that isn't known."""
        super().__init__(f"{'some' if missed is None else missed} messages were missed")


class PermissionDenied(WSBroadcastError, WebSocketException):
    """Raised by a hook or an access check that refuses something on purpose.

    It is also a `WebSocketException`: if nobody catches it, Starlette closes with its code, and its text as the reason.
    """

    def __init__(self, message: str = "") -> None:
        WebSocketException.__init__(self, _POLICY_VIOLATION, text_of(message))

    def __str__(self) -> str:
        return self.reason


class LimitExceeded(WSBroadcastError, WebSocketException):
    """Raised when something would go past a limit of `Limits`, or when a node drains.

    It is also a `WebSocketException`: if nobody catches it, Starlette closes with its code, and its text as the reason.
    """

    def __init__(self, limit: str, message: str, code: int = _POLICY_VIOLATION) -> None:
        self.limit = limit
        """The name of the limit: a field of `Limits`, or `draining` if the node takes nobody any more."""
        WebSocketException.__init__(self, code, plain(message))

    def __str__(self) -> str:
        return self.reason


class StreamExists(WSBroadcastError):
    """Raised when a stream is begun that is still being produced, on any node. A stream has one producer at a time."""

    def __init__(self, id_: str) -> None:
        self.id = id_
        """The stream's id."""
        super().__init__(f"the stream {shorten(id_)} is running: stop it first, or give this one another id")


class StreamEnded(WSBroadcastError, RuntimeError):
    """Raised when something is appended to a stream that has ended, for example because it was stopped."""

    def __init__(self, id_: str, state: str) -> None:
        self.id = id_
        """The stream's id."""
        self.state = state
        """How it has ended: `done`, `error`, `cancelled` or `lost`."""
        super().__init__(f"the stream {shorten(id_)} has ended ({state}): nothing can be appended any more")


class StreamNotFound(WSBroadcastError, LookupError):
    """Raised when there is no stream with an id, or not any more."""

    def __init__(self, id_: str) -> None:
        self.id = id_
        """The id."""
        super().__init__(f"there is no stream {shorten(id_)}")


class EngineError(WSBroadcastError):
    """Raised when an engine fails.

    Except after an `EngineUnavailable`, a retry doesn't help: the broker refuses this very message, or there is a bug.
    """


class EngineUnavailable(EngineError, OSError):
    """Raised when the broker can't be reached, takes no messages now, or forbids us to send them. A retry may help.

    Nothing was sent, unless `may_have_been_sent` is true: then the broker was asked and didn't answer in time.
    """

    def __init__(self, *args: object, may_have_been_sent: bool = False) -> None:
        super().__init__(*args)
        self.may_have_been_sent = may_have_been_sent
        """Whether the broker may have taken the message: it was asked, and didn't answer in time."""
        self.positions: Mapping[Any, Any] = {}
        """For a broadcast to several audiences: those that were sent the message, each with its `Position`, or `None`
        if it has no history."""


def ungrouped(error: Exception, *kinds: type[Exception]) -> Exception:
    """Return the error that a group stands for, if all its members are of these kinds; else return what was given.

    A task group raises a group of what its tasks raised, even for a single error. An `except` clause that names the
    error doesn't catch the group. If there are several members, the one whose kind is named first here is returned.
    """
    if not isinstance(error, ExceptionGroup):
        return error
    members = list(_members(error))
    if not all(isinstance(member, kinds) for member in members):
        return error
    return next(member for kind in kinds for member in members if isinstance(member, kind))


def _members(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for member in group.exceptions:
        if isinstance(member, ExceptionGroup):
            yield from _members(member)
        else:
            yield member


def shorten(value: object, limit: int = 80) -> str:
    """Write a value that a client chose so that it is safe in a log: escaped by `repr`, and cut."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except Exception:  # a repr of the app that fails, or an int or a nesting that is too large for one
        text = object.__repr__(value)
    return text if len(text) <= limit else text[:limit] + "…"


def kind_of(value: object) -> str:
    """Name the type of a value that wasn't expected, with its module, because two types may have the same name."""
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"the class {name}" if isinstance(value, type) else name
