"""Small frozen option objects, so that constructors need not grow fifteen keywords."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from wsbroadcast.exceptions import ConfigurationError

Policy = Literal["disconnect", "drop_newest", "drop_oldest", "conflate"]
"""What happens to a slow consumer whose backlog is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowConsumer:
    """What a connection may leave unread, and what happens beyond that.

    Policies: `disconnect` closes the connection with 1013, a code that tells a client to come back. `drop_newest`
    keeps what waits and drops what comes. `drop_oldest` drops what has waited longest. `conflate` keeps the newest
    message of each `key` that a broadcast names, and disconnects when that doesn't fit either. Every drop is counted.
    """

    policy: Policy = "disconnect"
    max_backlog_bytes: int = 1024 * 1024
    """Bytes that may wait for one connection. A single larger message still goes to one that has nothing waiting."""
    max_backlog_messages: int = 1024
    """Messages that may wait for one connection."""
    send_timeout: float = 10.0
    """Seconds a backlog may stand still before its connection is evicted, and the longest a broadcast waits for a
    crowd that is behind."""
    close_timeout: float = 1.0
    """Seconds a close waits for a peer that takes nothing before the connection is aborted."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ConfigurationError(f"policy must be one of {', '.join(get_args(Policy))}, not {self.policy!r}")
        _check_fields(self, "max_backlog_bytes", "max_backlog_messages", "send_timeout", "close_timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is too much."""

    max_message_bytes: int = 16 * 1024 * 1024
    """The largest message that can be broadcast or sent, in bytes."""

    def __post_init__(self) -> None:
        _check_fields(self, "max_message_bytes")


def check_positive(name: str, value: object) -> None:
    """Check an option that is a number.

    Raises:
        ConfigurationError: If it is none, not finite, zero or negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < inf:
        raise ConfigurationError(f"{name} must be a positive number, not {value!r}")


def _check_fields(options: object, *names: str) -> None:
    for name in names:
        check_positive(f"{type(options).__name__}.{name}", getattr(options, name))
