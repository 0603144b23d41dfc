"""Who may come in, and how much a client may say: the tables and clocks behind `Limits`. No I/O, no await."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from ipaddress import IPv6Address, ip_address
from time import monotonic
from typing import Any, NamedTuple, Protocol

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import LimitExceeded
from wsbroadcast.logs import Clock, Throttle, logger
from wsbroadcast.options import Limits
from wsbroadcast.stats import Counters

# No address is longer; what a server on a Unix socket calls a peer may be.
_MAX_ADDRESS_CHARACTERS = 64

# More keys than this are not remembered at the same time: the oldest begins anew.
MAX_KEYS = 65_536


class Refusal(NamedTuple):
    """How a client learns that it went past a limit."""

    text: str
    """The body of the response, or the reason of the close."""
    code: CloseCode
    """The close code for a socket that is accepted."""
    status: int = 403
    """The HTTP status for one that isn't."""


REFUSALS = {
    "max_connections": Refusal("too many connections here", CloseCode.TRY_AGAIN_LATER, 503),
    "max_connections_per_user": Refusal("too many connections of this user", CloseCode.POLICY_VIOLATION, 429),
    "max_connections_per_address": Refusal("too many connections from this address", CloseCode.POLICY_VIOLATION, 429),
    "max_handshake_rate": Refusal("too many handshakes from this address", CloseCode.TRY_AGAIN_LATER, 429),
    "max_channels_per_connection": Refusal("too many channels", CloseCode.POLICY_VIOLATION),
    "max_inbound_bytes": Refusal("message too big", CloseCode.MESSAGE_TOO_BIG),
    "max_inbound_rate": Refusal("too many messages (max_inbound_rate)", CloseCode.POLICY_VIOLATION),
    "max_router_inbound_rate": Refusal("too many messages (max_router_inbound_rate)", CloseCode.POLICY_VIOLATION),
}
"""By the name of the limit. The texts say nothing of the figures: those are nobody's affair outside."""


IN_ALL = "max_connections"
PER_USER = "max_connections_per_user"
PER_ADDRESS = "max_connections_per_address"


class Breaches:
    """Counts what went past a limit, and logs it without letting a flood into the log."""

    def __init__(self, counters: Counters, clock: Clock = monotonic) -> None:
        self._counters = counters
        self._throttle = Throttle(clock)

    def count(self, limit: str, who: object) -> LimitExceeded:
        """Count one more, and return the error to raise.

        Args:
            limit: The name of a field of `Limits`.
            who: A connection or an address, for the log.
        """
        limited = self._counters.limited
        limited[limit] += 1
        if self._throttle.is_due(limit):
            logger.warning("%s: refused %d so far, the last was %.200r", limit, limited[limit], who)
        return LimitExceeded(limit, REFUSALS[limit].text, REFUSALS[limit].code)


class Seats:
    """At most so many of one key, such as a user. A key that has none takes no memory."""

    __slots__ = ("_most", "taken")

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.taken: dict[str, int] = {}
        """How many each key has, while there is a limit."""

    @property
    def are_counted(self) -> bool:
        """Whether there is a limit."""
        return self._most is not None

    def take(self, key: str) -> bool:
        """Count one more, if it may be; return whether it was."""
        taken = self.taken.get(key, 0)
        if self._most is not None and taken >= self._most:
            return False
        self.taken[key] = taken + 1
        return True

    def give_back(self, key: str) -> None:
        """Count one less."""
        self.taken[key] -= 1
        if not self.taken[key]:
            del self.taken[key]


class Place:
    """A connection's place among those that are counted; held from before it is accepted until it has ended."""

    __slots__ = ("_address", "_taken", "admission")

    def __init__(self, admission: Admission, address: str | None) -> None:
        self.admission = admission
        """Where it is taken."""
        self._address = address
        self._taken: tuple[tuple[str, str], ...] = ()

    def take(self, limit: str, key: str | None) -> None:
        """Count it under one limit too, such as its user's once that is known; `None` isn't counted.

        Raises:
            LimitExceeded: If there is no room; the place is as it was.
        """
        if key is not None and self.admission.take(limit, key, self._address):
            self._taken += ((limit, key),)

    def release(self) -> None:
        """Give everything back. Idempotent."""
        taken, self._taken = self._taken, ()
        self.admission.give_back(taken)


class Pace:
    """A token bucket for each key, kept as the moment at which it is full again (GCRA). A full one takes no memory."""

    def __init__(self, rate: float, burst: float, clock: Clock = monotonic) -> None:
        self._interval = 1 / rate
        self._window = window(rate, burst)
        self._clock = clock
        # The one that was used last is the last.
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, key: str) -> bool:
        """Take a token; return whether there was one."""
        self.forget()
        now = self._clock()
        before = self._full_at.pop(key, now)
        full_at = max(before, now) + self._interval
        is_taken = full_at - now <= self._window
        self._full_at[key] = full_at if is_taken else before
        if len(self._full_at) > MAX_KEYS:
            del self._full_at[next(iter(self._full_at))]
        return is_taken

    def forget(self) -> None:
        """Forget the buckets that are full again."""
        now = self._clock()
        while self._full_at:
            oldest = next(iter(self._full_at))
            if self._full_at[oldest] > now:
                return
            del self._full_at[oldest]


def window(rate: float, burst: float) -> float:
    """Return how far ahead of the clock a bucket's full moment may be; half a token forgives rounding."""
    return (burst + 0.5) / rate


class Admission:
    """Counts connections and paces handshakes. What is asked and what follows from it happen in one step."""

    def __init__(self, limits: Limits, breaches: Breaches, clock: Clock = monotonic) -> None:
        self._most_channels = limits.max_channels_per_connection
        self._breaches = breaches
        self.seats = {name: Seats(getattr(limits, name)) for name in (IN_ALL, PER_USER, PER_ADDRESS)}
        """The places that are taken, by the name of the limit."""
        # What every connection gets where no places are counted: there is nothing that each would have to remember.
        self._uncounted = None if any(seats.are_counted for seats in self.seats.values()) else Place(self, None)
        rate = limits.max_handshake_rate
        self.pace = None if rate is None else Pace(rate, limits.handshake_burst, clock)
        """The pace of handshakes by address, where it is limited."""
        self.needs_address = self._uncounted is None or self.pace is not None
        """Whether a handshake's address matters, be it for the log."""

    def admit(self, address: str | None) -> Place:
        """Take a place for a handshake. Whose it is, `Place.take` adds once it is known.

        Raises:
            LimitExceeded: If there is no place here or for its address, or if that one makes too many handshakes.
        """
        if self.pace is not None and address is not None and not self.pace.take(address):
            raise self._breaches.count("max_handshake_rate", address)
        if self._uncounted is not None:
            return self._uncounted
        place = Place(self, address)
        try:
            place.take(PER_ADDRESS, address)
            place.take(IN_ALL, "")
        except LimitExceeded:
            place.release()
            raise
        return place

    def take(self, limit: str, key: str, address: str | None) -> bool:
        """Take a seat; return whether there is anything to give back. Called by a place.

        Raises:
            LimitExceeded: If all are taken.
        """
        seats = self.seats[limit]
        if seats.are_counted and not seats.take(key):
            raise self._breaches.count(limit, address)  # not the user: names are not for logs
        return seats.are_counted

    def give_back(self, taken: Iterable[tuple[str, str]]) -> None:
        """Give seats back. Called by a place."""
        for limit, key in taken:
            self.seats[limit].give_back(key)
        if self.pace is not None:
            self.pace.forget()

    def check_channels(self, count: int, who: object) -> None:
        """Check how many channels a connection is about to be in.

        Raises:
            LimitExceeded: If they are too many.
        """
        if self._most_channels is not None and count > self._most_channels:
            raise self._breaches.count("max_channels_per_connection", who)


class InboundPace(NamedTuple):
    """How fast the messages of a client may come."""

    limit: str
    """The name of the limit that says so."""
    interval: float
    """Seconds for each message."""
    window: float
    """How far ahead of the clock the moment may be at which its bucket is full again, in seconds."""


class Sender(Protocol):
    """What the inbound limits have to know of a connection."""

    inbound_full_at: float

    @property
    def inbound_pace(self) -> InboundPace | None: ...  # noqa: D102


class Inbound:
    """How large and how many the messages of a client may be. Runs for each message, so it is short."""

    def __init__(self, limits: Limits, breaches: Breaches, clock: Clock = monotonic) -> None:
        self._breaches = breaches
        self._clock = clock
        self._max_bytes = sys.maxsize if limits.max_inbound_bytes is None else limits.max_inbound_bytes
        self._burst = limits.inbound_burst
        self.pace = self._pace("max_inbound_rate", limits.max_inbound_rate)
        """What holds for every client; `None` if nothing does."""
        self.router_pace = self.pace or self._pace("max_router_inbound_rate", limits.max_router_inbound_rate)
        """What holds for the clients of routers."""

    def _pace(self, limit: str, rate: float | None) -> InboundPace | None:
        return None if rate is None else InboundPace(limit, 1 / rate, window(rate, self._burst))

    def check(self, sender: Sender, message: str | bytes) -> None:
        """Count a message that came in.

        Raises:
            LimitExceeded: If it is too large, or one too many for now.
        """
        if (pace := sender.inbound_pace) is not None:
            now = self._clock()
            full_at = sender.inbound_full_at
            full_at = (full_at if full_at > now else now) + pace.interval
            if full_at - now > pace.window:
                raise self._breaches.count(pace.limit, sender)
            sender.inbound_full_at = full_at
        # A character is at most 4 bytes of UTF-8, so most texts need not be looked at.
        if len(message) * 4 > self._max_bytes and _size(message) > self._max_bytes:
            raise self._breaches.count("max_inbound_bytes", sender)


def _size(message: str | bytes) -> int:
    if isinstance(message, bytes) or message.isascii():
        return len(message)
    return len(message.encode("utf-8", "surrogatepass"))


def address_of(scope: Mapping[str, Any]) -> str | None:
    """Return what a peer's address counts as; `None` if the server doesn't know any, as on a Unix socket.

    Only `scope["client"]` counts, never a header: whoever connects writes those. An IPv6 address counts as its /64
    network, because that is what one customer is given (RFC 6177); one that holds an IPv4 address as that. What is no
    IP address is cut to 64 characters.
    """
    client = scope.get("client")
    host = client[0] if client else None
    if not host or not isinstance(host, str):
        return None
    try:
        address = ip_address(host)
    except ValueError:
        return host[:_MAX_ADDRESS_CHARACTERS]
    if not isinstance(address, IPv6Address):
        return host
    mapped = address.ipv4_mapped
    return str(IPv6Address(int(address) >> 64 << 64)) + "/64" if mapped is None else str(mapped)
