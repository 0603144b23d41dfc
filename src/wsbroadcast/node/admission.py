"""Applies `Limits` to handshakes, connections and messages."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from ipaddress import IPv6Address, ip_address
from math import ceil
from time import monotonic
from typing import Any, NamedTuple, NoReturn, Protocol, Self

from starlette.websockets import WebSocket

from wsbroadcast.audience import UserId, as_channels, user_key
from wsbroadcast.close_codes import EXPIRED, CloseCode
from wsbroadcast.exceptions import LimitExceeded, PermissionDenied
from wsbroadcast.history import NOWHERE, SinceByAudience, SinceOption, since_of
from wsbroadcast.logs import Clock, Throttle, about, logger
from wsbroadcast.options import ExpiresAt, Limits, unix_seconds
from wsbroadcast.stats import Counters
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.types import Headers

# No IP address is longer. A server on a Unix socket may give its peers longer names.
_MAX_ADDRESS_CHARACTERS = 64

# How many keys are remembered at the same time. Past this many, the oldest is forgotten and begins anew.
MAX_KEYS = 65_536


class Refusal(NamedTuple):
    """How a client learns that it went past a limit."""

    text: str
    """The body of the response, or the close reason."""
    code: CloseCode
    """The close code, if the WebSocket was accepted."""
    status: int = 403
    """The HTTP status, if it wasn't accepted."""


DRAINING = "draining"
"""Stands in place of a limit's name if a node takes nobody, because it is about to end."""

REFUSALS = {
    DRAINING: Refusal("draining", CloseCode.SERVICE_RESTART, 503),
    "max_connections": Refusal("too many connections here", CloseCode.TRY_AGAIN_LATER, 503),
    "max_connections_per_user": Refusal("too many connections of this user", CloseCode.POLICY_VIOLATION, 429),
    "max_connections_per_address": Refusal("too many connections from this address", CloseCode.POLICY_VIOLATION, 429),
    "max_handshake_rate": Refusal("too many handshakes from this address", CloseCode.TRY_AGAIN_LATER, 429),
    "max_channels_per_connection": Refusal("too many channels", CloseCode.POLICY_VIOLATION),
    "max_inbound_bytes": Refusal("message too big", CloseCode.MESSAGE_TOO_BIG),
    "max_inbound_rate": Refusal("too many messages (max_inbound_rate)", CloseCode.POLICY_VIOLATION),
    "max_router_inbound_rate": Refusal("too many messages (max_router_inbound_rate)", CloseCode.POLICY_VIOLATION),
}
"""The refusals, by the name of the limit. The texts don't tell clients the figures."""


IN_ALL = "max_connections"
PER_USER = "max_connections_per_user"
PER_ADDRESS = "max_connections_per_address"


class Violations:
    """Counts what went past a limit, and logs it at most once a minute for each limit."""

    def __init__(self, counters: Counters, clock: Clock = monotonic) -> None:
        self._counters = counters
        self._throttle = Throttle(clock)

    def count(self, limit: str, who: object) -> LimitExceeded:
        """Count one more, and return the error to raise.

        Args:
            limit: The name of a field of `Limits`, or `DRAINING`.
            who: A connection or an address, for the log.
        """
        limited = self._counters.limited
        limited[limit] += 1
        if self._throttle.is_due(limit):
            text, count = "%s: refused %d so far, the last was %.200r", limited[limit]
            if limit == DRAINING:  # it is expected during a deploy
                logger.info(text, limit, count, who, extra=about("limit.exceeded", limit=limit, count=count))
            else:
                logger.warning(text, limit, count, who, extra=about("limit.exceeded", limit=limit, count=count))
        return limit_error(limit)


def limit_error(limit: str) -> LimitExceeded:
    """Make the error for a limit that was passed."""
    return LimitExceeded(limit, REFUSALS[limit].text, REFUSALS[limit].code)


class Counted:
    """Counts how many places each key has, such as a user, up to a limit. A key without places takes no memory."""

    __slots__ = ("_most", "taken")

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.taken: dict[str, int] = {}
        """How many places each key has, if there is a limit."""

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._most is not None

    def is_full(self, key: str) -> bool:
        """Tell whether a key has as many places as it may have."""
        return self._most is not None and self.taken.get(key, 0) >= self._most

    def take(self, key: str) -> bool:
        """Take a place for a key, if one is free; return whether one was."""
        if self.is_full(key):
            return False
        self.taken[key] = self.taken.get(key, 0) + 1
        return True

    def give_back(self, key: str) -> None:
        """Give a place of a key back."""
        self.taken[key] -= 1
        if not self.taken[key]:
            del self.taken[key]


class Poll(NamedTuple):
    """The place that a polling client keeps between two polls."""

    name: str
    """The name of the place."""
    seconds: float
    """For how many seconds it is kept after a poll."""


class Lease:
    """A connection's place under the limits. It is held from before the socket is accepted until it is freed."""

    __slots__ = ("_address", "_taken", "quotas")

    def __init__(self, quotas: Quotas, address: str | None) -> None:
        self.quotas = quotas
        """The limits under which the place is taken."""
        self._address = address
        self._taken: tuple[tuple[str, str], ...] = ()

    def take(self, limit: str, key: str | None) -> None:
        """Count the place under one more limit, such as that of its user once that is known; `None` isn't counted.

        Raises:
            LimitExceeded: If all places are taken. The lease is as it was then.
        """
        if key is None or (limit, key) in self._taken:
            return
        if self.quotas.take(limit, key, self._address):
            self._taken += ((limit, key),)

    def counts_for(self, limit: str, key: str) -> bool:
        """Tell whether the place is counted under this key."""
        return (limit, key) in self._taken

    @property
    def needs_release(self) -> bool:
        """Whether it has anything to give back. If not, nobody has to keep it."""
        return self.quotas.needs_address

    def release(self) -> None:
        """Give the place back. It may be called twice."""
        taken, self._taken = self._taken, ()
        self.quotas.give_back(taken)


class PollLease(Lease):
    """The place of a polling client. It is kept for a while after each poll, so that the client counts once.

    Args:
        quotas: The limits under which the place is taken.
        address: The client's address.
        name: The name by which the next poll finds the place.
        seconds: For how many seconds it is kept after a poll.
    """

    __slots__ = ("_seconds", "_timer", "name")

    def __init__(self, quotas: Quotas, address: str | None, name: str, seconds: float) -> None:
        super().__init__(quotas, address)
        self.name = name
        """The name by which the next poll finds the place."""
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def take(self, limit: str, key: str | None) -> None:
        """Count the place under one more limit, and no longer under another key, such as a user who has logged out.

        Raises:
            LimitExceeded: If all places are taken.
        """
        others = tuple(each for each in self._taken if each[0] == limit and each[1] != key)
        self._taken = tuple(each for each in self._taken if each not in others)
        self.quotas.give_back(others)
        super().take(limit, key)

    def release(self) -> None:
        """Keep the place for the next poll."""
        if not self._taken or self._timer is not None:
            return
        if self.quotas.polls.setdefault(self.name, self) is not self:
            super().release()  # there were two polls with one name at once: only one place is kept
            return
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self.expire, context=Context())

    def expire(self) -> None:
        """Give the place back, because no poll has come."""
        self.take_back()
        super().release()

    def take_back(self) -> None:
        """Let the next poll have the place."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            del self.quotas.polls[self.name]

    def is_of(self, address: str | None) -> bool:
        """Tell whether it is the place of a client at this address."""
        return self._address == address


class TokenBuckets:
    """A token bucket for each key, stored as the moment when it is full again (GCRA). A full one takes no memory."""

    def __init__(self, rate: float, burst: float, clock: Clock = monotonic) -> None:
        self._interval = 1 / rate
        self._window = window(rate, burst)
        self._clock = clock
        # By key, when the bucket is full again. The one that was used last is the last.
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
    """Return how many seconds ahead of the clock a bucket's full moment may be. Half a token is added for rounding."""
    return (burst + 0.5) / rate


class Quotas:
    """Counts connections and limits the rate of handshakes. A limit is checked and a place taken in one step."""

    def __init__(self, limits: Limits, violations: Violations, clock: Clock = monotonic) -> None:
        self._most_channels = limits.max_channels_per_connection
        self._violations = violations
        self.counted = {name: Counted(getattr(limits, name)) for name in (IN_ALL, PER_USER, PER_ADDRESS)}
        """The taken places, by the name of the limit."""
        # If no places are counted, the lease of all connections. It holds nothing, so they can share it.
        self._uncounted = None if any(each.is_limited for each in self.counted.values()) else Lease(self, None)
        rate = limits.max_handshake_rate
        self.polls: dict[str, PollLease] = {}
        """The places that are kept between two polls, by their names, the oldest first."""
        self.pace = None if rate is None else TokenBuckets(rate, limits.handshake_burst, clock)
        """The rate of handshakes by address; `None` if it isn't limited."""
        self.needs_address = self._uncounted is None or self.pace is not None
        """Whether the address of a handshake is needed, if only for the log."""

    @property
    def counts_places(self) -> bool:
        """Whether places are counted at all."""
        return self._uncounted is None

    def make_room(self, user_key: str) -> None:
        """Give back one place that a user keeps between two polls, if there is one."""
        for lease in self.polls.values():
            if lease.counts_for(PER_USER, user_key):
                lease.expire()
                return

    def admit(self, address: str | None, poll: Poll | None = None) -> Lease:
        """Take a place for a handshake. Its user is added by `Lease.take` once it is known.

        Args:
            address: The address of the client.
            poll: The place that it keeps between polls; `None` if it doesn't poll.

        Raises:
            LimitExceeded: If all places, or those of the address, are taken; or if the address makes too many
                handshakes.
        """
        if self.pace is not None and address is not None and not self.pace.take(address):
            raise self._violations.count("max_handshake_rate", address)
        if self._uncounted is not None:
            return self._uncounted
        lease = Lease(self, address)
        if poll is not None:
            kept = self.polls.get(poll.name)
            if kept is not None and kept.is_of(address):
                kept.take_back()
                return kept
            lease = PollLease(self, address, *poll)
        try:
            lease.take(PER_ADDRESS, address)
            lease.take(IN_ALL, "")
        except LimitExceeded:
            lease.release()
            raise
        return lease

    def is_full(self, limit: str, key: str) -> bool:
        """Tell whether a key has all the places that it may have."""
        return self.counted[limit].is_full(key)

    def take(self, limit: str, key: str, address: str | None) -> bool:
        """Take a place; return whether there is anything to give back. A lease calls it.

        Raises:
            LimitExceeded: If all places are taken.
        """
        counted = self.counted[limit]
        if counted.is_limited and not counted.take(key):
            raise self._violations.count(limit, address)  # the user's name must not be in a log
        return counted.is_limited

    def give_back(self, taken: Iterable[tuple[str, str]]) -> None:
        """Give places back. A lease calls it."""
        for limit, key in taken:
            self.counted[limit].give_back(key)
        if self.pace is not None:
            self.pace.forget()

    def check_channels(self, count: int, who: object) -> None:
        """Check how many channels a connection is about to be in.

        Raises:
            LimitExceeded: If they are too many.
        """
        if self._most_channels is not None and count > self._most_channels:
            raise self._violations.count("max_channels_per_connection", who)


class Sender(Protocol):
    """The part of a connection that the inbound limits need."""

    _inbound_full_at: float | None


class InboundLimit:
    """Limits the size and the rate of a client's messages. It runs for each message, so it is short.

    There is one rate: `max_inbound_rate` for all clients if it is set, else `max_router_inbound_rate` for clients of
    routers.
    """

    def __init__(self, limits: Limits, violations: Violations, clock: Clock = monotonic) -> None:
        self._violations = violations
        self._clock = clock
        self._max_bytes = sys.maxsize if limits.max_inbound_bytes is None else limits.max_inbound_bytes
        self._is_for_all = limits.max_inbound_rate is not None
        self._limit = "max_inbound_rate" if self._is_for_all else "max_router_inbound_rate"
        self._rate: float | None = getattr(limits, self._limit)
        self._interval = 0.0 if self._rate is None else 1 / self._rate
        self._window = 0.0 if self._rate is None else window(self._rate, limits.inbound_burst)
        # The buckets of clients that send requests without a connection.
        self._requests = None if self._rate is None else TokenBuckets(self._rate, limits.inbound_burst, clock)

    def check_request(self, who: str | None, address: str | None) -> None:
        """Count a request of a client without a connection.

        Args:
            who: The user or the address of the client; `None` if neither is known.
            address: The address, for the log.

        Raises:
            LimitExceeded: If the client makes too many requests.
        """
        if self._requests is not None and who is not None and not self._requests.take(who):
            raise self._violations.count(self._limit, address)

    def check_size(self, size: int, who: object) -> None:
        """Check the size of a request, in bytes.

        Raises:
            LimitExceeded: If it is too large.
        """
        if size > self._max_bytes:
            raise self._violations.count("max_inbound_bytes", who)

    def begin(self, sender: Sender, *, is_routers: bool) -> None:
        """Give a client a full bucket, if there is a rate for it."""
        if self._rate is not None and (self._is_for_all or is_routers):
            sender._inbound_full_at = 0.0

    def check(self, sender: Sender, message: str | bytes) -> None:
        """Count a message that came in.

        Raises:
            LimitExceeded: If it is too large, or if there are too many.
        """
        if (full_at := sender._inbound_full_at) is not None:
            now = self._clock()
            full_at = (full_at if full_at > now else now) + self._interval
            if full_at - now > self._window:
                raise self._violations.count(self._limit, sender)
            sender._inbound_full_at = full_at
        # A character has at most 4 bytes of UTF-8, so most texts needn't be encoded.
        if len(message) * 4 > self._max_bytes and _size(message) > self._max_bytes:
            raise self._violations.count("max_inbound_bytes", sender)


def _size(message: str | bytes) -> int:
    if isinstance(message, bytes) or message.isascii():
        return len(message)
    return len(message.encode("utf-8", "surrogatepass"))


def address_of(scope: Mapping[str, Any]) -> str | None:
    """Return the key under which an address is counted; `None` if the server doesn't know it, as on a Unix socket.

    Only `scope["client"]` counts, never a header, because the client writes those. An IPv6 address counts as its /64
    network, because one customer is given that (RFC 6177). An IPv6 address that holds an IPv4 address counts as that
    one. Anything that is not an IP address is cut to 64 characters.
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


POLL = "wsbroadcast.poll"
"""The key in a long poll's scope for the place that it keeps: a `Poll`."""


# The key in a handshake's scope for the leases that are held until it is connected, by their quotas.
_LEASES_KEY = "wsbroadcast.leases"


class Joining(NamedTuple):
    """The checked arguments of `connect`."""

    user: UserId | None
    user_key: str | None
    channels: tuple[str, ...]
    info: object
    subprotocol: str | None
    headers: Headers | None
    expires_at: float | None
    since: SinceByAudience = NOWHERE

    @classmethod
    def of(
        cls,
        user: UserId | None,
        channels: Iterable[str],
        info: object,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        expires_at: ExpiresAt = None,
        since: SinceOption = None,
    ) -> Self:
        """Check the arguments of `connect`.

        Raises:
            InvalidChannel: If a channel name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, `expires_at` is not a valid time, or `since` names no
                position, or an audience that isn't joined.
        """
        key = None if user is None else user_key(user)
        names = as_channels(channels) if channels else ()
        where = NOWHERE if since is None else since_of(since, names, key)
        return cls(user, key, names, info, subprotocol, headers, unix_seconds(expires_at), where)


class Admission:
    """Applies `Limits` to WebSockets. A place is taken in one step, before anything is awaited.

    It has two halves: `quotas` counts connections, `inbound` limits what clients send.

    Args:
        limits: The limits.
        counters: Where refusals are counted.
        make_room: Takes a place from the oldest connection of a user, if the limits say so.
    """

    def __init__(self, limits: Limits, counters: Counters, make_room: Callable[[str], None]) -> None:
        self._make_room = make_room if limits.when_full == "oldest" else None
        self._violations = violations = Violations(counters)
        # The WebSockets inside blocks of `handshake`. Once a drain has begun, only those that it has refused.
        self._arriving: set[WebSocket] = set()
        self.drains_until: float | None = None
        """When a drain ends or has ended, in seconds of the event loop's clock; `None` if none has begun."""
        self.quotas = Quotas(limits, violations)
        """Counts connections, and limits the rate of handshakes."""
        self.check_channels = self.quotas.check_channels
        """Raises `LimitExceeded` if a connection has too many channels."""
        self.inbound = InboundLimit(limits, violations)
        """Limits the messages of clients."""
        self.check_message = self.inbound.check
        """Raises `LimitExceeded` if a message is too large, or if there are too many."""

    async def admit(self, websocket: WebSocket, joining: Joining) -> Lease:
        """Take a place for a WebSocket that is about to be accepted, or refuse it.

        Raises:
            LimitExceeded: If no place is free, the channels are too many, or the node is drained. The refusal has been
                sent.
            PermissionDenied: If the connection has expired already. The refusal has been sent.
        """
        if self.drains_until is not None:
            await self.refuse_draining(websocket)
        lease = self._take_over(websocket) or await self._take_lease(websocket)
        try:
            key = joining.user_key
            if key is not None and not lease.counts_for(PER_USER, key):  # the lease of a later poll does already
                self._make_room_for(key)
            lease.take(PER_USER, key)
            self.check_channels(len(joining.channels), websocket.scope.get("client"))
            if joining.expires_at is not None and joining.expires_at <= time.time():
                raise PermissionDenied(EXPIRED)
        except LimitExceeded as error:
            lease.release()
            await _refuse(websocket, error)
            raise
        except PermissionDenied:
            lease.release()
            await refuse(websocket, 401, CloseCode.UNAUTHENTICATED, EXPIRED)
            raise
        return lease

    def _make_room_for(self, user_key: str) -> None:
        if self._make_room is not None and self.quotas.is_full(PER_USER, user_key):
            self.quotas.make_room(user_key)
            if self.quotas.is_full(PER_USER, user_key):
                self._make_room(user_key)

    @asynccontextmanager
    async def handshake(self, websocket: WebSocket) -> AsyncGenerator[None]:
        """Hold a place for a handshake. `admit` takes the place over. An inner block has the same place.

        Raises:
            LimitExceeded: If no place is free, or the node is drained. The refusal has been sent.
        """
        if self.drains_until is not None:
            await self.refuse_draining(websocket)
        leases: dict[Quotas, Lease] = websocket.scope.setdefault(_LEASES_KEY, {})
        if self.quotas in leases:
            yield
            return
        lease = leases[self.quotas] = await self._take_lease(websocket)
        self._arriving.add(websocket)
        try:
            yield
        finally:
            self._arriving.discard(websocket)
            if leases.get(self.quotas) is lease:  # else a connection has taken it over
                del leases[self.quotas]
                lease.release()

    def arrived(self, websocket: WebSocket) -> None:
        """Let a drain leave a WebSocket alone, because something else ends it."""
        self._arriving.discard(websocket)

    def drain(self, until: float) -> list[Coroutine[Any, Any, None]]:
        """Take no more connections; return coroutines that refuse the handshakes that are being checked now.

        Args:
            until: When all connections will be closed, in seconds of the event loop's clock.
        """
        self.drains_until = until
        # WebSockets that are just being connected are refused by `admit`.
        self._arriving = {each for each in self._arriving if self.quotas in each.scope.get(_LEASES_KEY, ())}
        return [_refuse(each, self._draining(each), self._retry_after()) for each in self._arriving]

    async def refuse_draining(self, websocket: WebSocket) -> NoReturn:
        """Refuse a WebSocket because of a drain.

        Raises:
            LimitExceeded: Always.
        """
        if websocket in self._arriving:  # it was refused and counted already
            raise limit_error(DRAINING)
        error = self._draining(websocket)
        await _refuse(websocket, error, self._retry_after())
        raise error

    def _draining(self, websocket: WebSocket) -> LimitExceeded:
        return self._violations.count(DRAINING, websocket.scope.get("client"))

    def _retry_after(self) -> list[tuple[bytes, bytes]]:
        # A client that can't reach another node comes back when this one has ended.
        assert self.drains_until is not None
        left = self.drains_until - asyncio.get_running_loop().time()
        return [(b"retry-after", b"%d" % max(1, ceil(left)))]

    def _take_over(self, websocket: WebSocket) -> Lease | None:
        leases: dict[Quotas, Lease] = websocket.scope.get(_LEASES_KEY, {})
        return leases.pop(self.quotas, None)

    async def _take_lease(self, websocket: WebSocket) -> Lease:
        try:
            address = address_of(websocket.scope) if self.quotas.needs_address else None
            return self.quotas.admit(address, websocket.scope.get(POLL))
        except LimitExceeded as error:
            await _refuse(websocket, error)
            raise


async def _refuse(websocket: WebSocket, error: LimitExceeded, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    await refuse(websocket, REFUSALS[error.limit].status, error.code, error.reason, headers, limit=error.limit)
