"""Options in small frozen objects, so that constructors don't need fifteen keywords. No I/O."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import Literal, TypeVar, get_args

from wsbroadcast.exceptions import ConfigurationError

# An int may be larger than this, but then it can't be added to a time.
_LARGEST = sys.float_info.max

Policy = Literal["disconnect", "drop_newest", "drop_oldest", "conflate"]
"""What happens when the backlog of a slow consumer is full; see `SlowConsumer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowConsumer:
    """How much may wait for one connection, and what happens beyond that.

    There are four policies. Every drop is counted.

    * `disconnect` closes the connection with 1013, a code that tells a client to come back.
    * `drop_newest` keeps what waits and drops what comes.
    * `drop_oldest` drops what has waited longest.
    * `conflate` keeps the newest message of each `key` that a broadcast names, and disconnects if that doesn't fit
      either. A message without a key is kept as under `disconnect`.

    A connection may be in channels with different policies. Then the policy of the message that doesn't fit decides.
    `drop_oldest` drops only messages of channels that have this policy too.
    """

    policy: Policy = "disconnect"
    by_channel: Mapping[str, Policy] = field(default_factory=dict)
    """Other policies for channels, by name or pattern: `*` is any text, as in `{"ticker:*": "conflate"}`. If several
    fit, the longest one counts."""
    max_backlog_bytes: int = 1024 * 1024
    """Bytes that may wait for one connection. If nothing waits for it, it is sent even a single larger message."""
    max_backlog_messages: int = 1024
    """Messages that may wait for one connection."""
    send_timeout: float = 10.0
    """Seconds after which a connection whose peer takes nothing is evicted. It is also the longest time that a
    broadcast waits for connections that are behind, but at most 10 s."""
    close_timeout: float = 1.0
    """Seconds that a close waits for a peer that takes nothing or doesn't answer. Then the connection is aborted."""

    def __post_init__(self) -> None:
        if not isinstance(self.by_channel, Mapping) or not all(isinstance(name, str) for name in self.by_channel):
            raise ConfigurationError('by_channel must be a dict of policies, such as {"ticker:*": "conflate"}')
        for policy in (self.policy, *self.by_channel.values()):
            if policy not in get_args(Policy):
                raise ConfigurationError(f"policy must be one of {', '.join(get_args(Policy))}, not {policy!r}")
        _check_fields(self, "max_backlog_bytes", "max_backlog_messages", check=check_count)
        _check_fields(self, "send_timeout", "close_timeout", check=check_positive)

    def policy_of(self, channel: str | None) -> Policy:
        """Return the policy for messages to a channel. `None` is for messages to no channel."""
        if channel is None or not self.by_channel:
            return self.policy
        return longest_match(self.by_channel, channel) or self.policy


V = TypeVar("V")


def longest_match(patterns: Mapping[str, V], name: str) -> V | None:
    """Return the value of the longest pattern that fits a name; `*` is any text. `None` if no pattern fits."""
    fitting = [pattern for pattern in patterns if _compiled(pattern).fullmatch(name)]
    return patterns[max(fitting, key=len)] if fitting else None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How many and how large things may be, on one node. `None` means no limit.

    A limit is the largest allowed value: the next one is refused. What one connection may do is limited by default. How
    many connections there may be, only the app knows: those limits are off until you set them.

    An address is `scope["client"]` as the server gives it, never a header. If the server isn't told of a proxy, all
    clients have the proxy's address. IPv6 addresses count by their /64 network. Address limits don't apply to peers
    without an address, as on a Unix socket.
    """

    max_outbound_bytes: int = 16 * 1024 * 1024
    """The largest message that can be broadcast or sent to clients, in bytes."""
    max_connections: int | None = None
    """All connections. The next handshake is refused with 503."""
    max_connection_age: float | None = None
    """Seconds after which a connection is closed with 1012, so that its client comes back, perhaps to another node. It
    is up to a tenth more or less for each connection. Messages that wait for it are sent first."""
    max_connections_per_user: int | None = None
    """Connections of one user; see `when_full`."""
    when_full: Literal["refuse", "oldest"] = "refuse"
    """What happens beyond `max_connections_per_user`. With `refuse` the next handshake is refused with 429. With
    `oldest` the user's oldest connection on this node is closed with 4409, and the new one takes its place: so a phone
    gets in that comes back before its dead connection was noticed."""
    max_connections_per_address: int | None = None
    """Connections from one address. The next handshake is refused with 429."""
    max_handshake_rate: float | None = None
    """Lasting rate of handshakes from one address, per second. Beyond it they are refused with 429."""
    handshake_burst: int = 20
    """Handshakes from one address that may come at once."""
    max_channels_per_connection: int | None = 100
    """Channels that one connection is in. Beyond it `LimitExceeded` is raised."""
    max_inbound_bytes: int | None = 64 * 1024
    """The largest message of a client, in bytes; text counts as UTF-8. A larger one closes its connection with 1009."""
    max_inbound_rate: float | None = None
    """Lasting rate of messages from one client, per second. Beyond it the connection is closed with 1008."""
    max_router_inbound_rate: float | None = 100.0
    """The same for clients of a router, whose messages reach others without code of the app. If `max_inbound_rate` is
    set, that counts instead."""
    inbound_burst: int = 1000
    """Messages from one client that may come at once."""

    def __post_init__(self) -> None:
        if self.when_full not in ("refuse", "oldest"):
            raise ConfigurationError(f"Limits.when_full must be refuse or oldest, not {self.when_full!r:.80}")
        if self.when_full == "oldest" and self.max_connections_per_user is None:
            raise ConfigurationError('Limits.when_full="oldest" needs max_connections_per_user: set that too')
        always = ("max_outbound_bytes", "handshake_burst", "inbound_burst")
        names = [f.name for f in fields(self) if f.name in always or getattr(self, f.name) is not None]
        names.remove("when_full")
        numbers = [name for name in names if name.endswith(("_rate", "_age"))]
        _check_fields(self, *(name for name in names if name not in numbers), check=check_count)
        _check_fields(self, *numbers, check=check_positive)


def check_positive(name: str, value: object) -> None:
    """Check an option that is a number, such as seconds or a rate.

    Raises:
        ConfigurationError: If it is not a number, not finite, zero or negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
        raise ConfigurationError(f"{name} must be a positive number, not {value!r:.80}")


def check_seconds(name: str, value: object) -> None:
    """Check an option that is a duration, which may be 0.

    Raises:
        ConfigurationError: If it is not a number, not finite or negative.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _LARGEST:
        raise ConfigurationError(f"{name} must be seconds, 0 or more, not {value!r:.80}")


def check_count(name: str, value: object) -> None:
    """Check an option that counts something, such as messages or bytes.

    Raises:
        ConfigurationError: If it is not an int, zero or negative. A float is refused even if it has no fraction.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigurationError(f"{name} must be a whole number greater than 0, not {value!r:.80}")


def _check_fields(options: object, *names: str, check: Callable[[str, object], None]) -> None:
    for name in names:
        check(f"{type(options).__name__}.{name}", getattr(options, name))


# Until when a connection may live.


_LAST_SECOND = 253_402_300_800  # the end of the year 9999; tokens that count milliseconds lie far beyond it

ExpiresAt = float | datetime | None


def unix_seconds(expires_at: object) -> float | None:
    """Return a moment as seconds since 1970; `None` means never.

    Args:
        expires_at: Seconds since 1970, such as the `exp` of a JWT (RFC 7519, 4.1.4), or a datetime with a timezone.

    Raises:
        ValueError: If it is something else, not finite, or too large to be seconds.
    """
    if expires_at is None:
        return None
    if isinstance(expires_at, datetime):
        if expires_at.utcoffset() is None:
            raise ValueError("expires_at has no timezone, so its moment isn't known: use datetime.now(UTC) + …")
        return expires_at.timestamp()
    if isinstance(expires_at, bool) or not isinstance(expires_at, (int, float)):
        raise ValueError(f"expires_at is seconds since 1970 or a datetime, not {type(expires_at).__name__}")
    if not -_LAST_SECOND < expires_at < _LAST_SECOND:  # this refuses NaN too
        raise ValueError("expires_at must be seconds since 1970, but is not finite, or is in milliseconds")
    return float(expires_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long an engine waits for its broker, in seconds."""

    connect_timeout: float = 1.5
    """To open a connection. A broker that is back is noticed within this time plus `max_backoff`."""
    request_timeout: float = 2.0
    """For an answer of the broker. After that the connection counts as lost."""
    probe_interval: float = 5.0
    """Between two messages of the engine to itself, which show whether messages travel."""
    max_backoff: float = 0.4
    """The longest pause between two attempts to connect. Each pause is a random part of it."""
    linger: float = 1.0
    """How long a subscription is kept after the last connection on this node has left its audience."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            check_positive(f"Timing.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTiming:
    """Times for clients that speak events, in seconds.

    The server tells them in `hello`, so an operator can slow down many clients without a new release of the page.
    """

    ping_interval: float = 25.0
    """Between two pings to each such client. Pages can't see the pings of WebSocket itself, and proxies cut
    connections that are idle."""
    stream_ping_interval: float = 15.0
    """Between two comments in an event stream."""
    reconnect_min: float = 0.5
    """A client that is cut off comes back after a random part of this time. The time doubles after each failure."""
    reconnect_max: float = 20.0
    """The longest that this time grows to."""
    call_timeout: float = 30.0
    """How long a method that a client calls may take. After that the call is answered with `timeout`."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            check_positive(f"ClientTiming.{name}", getattr(self, name))
        if self.reconnect_max < self.reconnect_min:
            raise ConfigurationError("ClientTiming.reconnect_max must not be smaller than reconnect_min")
