"""Every error this library raises on purpose.

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
└── EngineError                           a retry doesn't help, except for:
    └── EngineUnavailable(OSError)        out of reach, or takes nothing now; a retry is sensible
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.text import plain, text_of

_POLICY_VIOLATION = 1008  # as a number: close_codes stands above


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
        super().__init__(f"invalid channel {shorten(channel)}: {rule}")


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
        WebSocketDisconnect.__init__(self, code, plain(reason or ""))

    def __str__(self) -> str:
        return f"connection closed with code {self.code}" + (f": {self.reason!r}" if self.reason else "")


class LifecycleError(WSBroadcastError, RuntimeError):
    """Raised when a manager is used where it doesn't run: after `aclose`, or in another event loop."""


class Lagged(WSBroadcastError):
    """Raised once by a listener that has missed messages, because it read too slowly or they were lost on the way."""

    def __init__(self, missed: int | None) -> None:
        self.missed = missed
        """How many, if that is known."""
        super().__init__(f"{'some' if missed is None else missed} messages were missed")


class PermissionDenied(WSBroadcastError, WebSocketException):
    """Raised by a hook or an access check that refuses something on purpose.

    It is a `WebSocketException` too: where nobody catches it, Starlette closes with its code, its text as the reason.
    """

    def __init__(self, message: str = "") -> None:
        WebSocketException.__init__(self, _POLICY_VIOLATION, text_of(message))

    def __str__(self) -> str:
        return self.reason


class LimitExceeded(WSBroadcastError, WebSocketException):
    """Raised when something would go past a configured limit.

    It is a `WebSocketException` too: where nobody catches it, Starlette closes with its code, its text as the reason.
    """

    def __init__(self, limit: str, message: str, code: int = _POLICY_VIOLATION) -> None:
        self.limit = limit
        """The name of the limit, a field of `Limits`; `draining` where a node takes nobody."""
        WebSocketException.__init__(self, code, plain(message))

    def __str__(self) -> str:
        return self.reason


class EngineError(WSBroadcastError):
    """Raised when an engine fails.

    If it is no `EngineUnavailable`, a retry doesn't help: the broker refuses this very message, or there is a bug.
    """


class EngineUnavailable(EngineError, OSError):
    """Raised when the broker can't be reached, takes no messages now, or forbids us to send them; a retry is sensible.

    Nothing was sent, unless `may_have_been_sent`: the broker was asked and did not answer in time.
    """

    def __init__(self, *args: object, may_have_been_sent: bool = False) -> None:
        super().__init__(*args)
        self.may_have_been_sent = may_have_been_sent
        """Whether the broker may have taken the message, because it was asked and didn't answer in time."""
        self.positions: Mapping[Any, Any] = {}
        """Of a broadcast to several audiences, those that were sent it, each with its `Position`, or `None` where
        nothing is kept."""


def ungrouped(error: Exception, *kinds: type[Exception]) -> Exception:
    """Return the error that a group stands for, if it has no members but of these kinds; else what was given.

    A task group raises a group of what its tasks raised, even of a single error, and a group is of no kind that an
    `except` clause names. Of several members the one counts whose kind is named first here.
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
    """Write what a client chose so that it can stand in a log: escaped by `repr` and cut."""
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except Exception:  # a repr of the app's, or an int or a nesting that is too long for one
        text = object.__repr__(value)
    return text if len(text) <= limit else text[:limit] + "…"


def kind_of(value: object) -> str:
    """Name the type of a value that isn't what was expected; with its module, which tells equal names apart."""
    kind = value if isinstance(value, type) else type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"the class {name}" if isinstance(value, type) else name
