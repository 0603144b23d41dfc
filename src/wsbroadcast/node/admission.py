"""Who may come in, and how much a client may say: `Limits` applied to handshakes, connections and messages."""

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
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import LimitExceeded, PermissionDenied
from wsbroadcast.history import NOWHERE, SinceByAudience, SinceOption, since_of
from wsbroadcast.logs import Clock, Throttle, about, logger
from wsbroadcast.options import ExpiresAt, Limits, unix_seconds
from wsbroadcast.stats import Counters
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.types import Headers

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


DRAINING = "draining"
"""What stands for a limit where a node takes nobody, because it is about to end."""

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
"""By the name of the limit. The texts don't tell clients the figures."""


IN_ALL = "max_connections"
PER_USER = "max_connections_per_user"
PER_ADDRESS = "max_connections_per_address"


class Violations:
    """Counts what went past a limit, and logs it without letting a flood into the log."""

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
            if limit == DRAINING:  # which is what a deploy is about
                logger.info(text, limit, count, who, extra=about("limit.exceeded", limit=limit, count=count))
            else:
                logger.warning(text, limit, count, who, extra=about("limit.exceeded", limit=limit, count=count))
        return limit_error(limit)


def limit_error(limit: str) -> LimitExceeded:
    """Make the error for what went past a limit."""
    return LimitExceeded(limit, REFUSALS[limit].text, REFUSALS[limit].code)


class Counted:
    """At most so many of one key, such as a user. A key that has none takes no memory."""

    __slots__ = ("_most", "taken")

    def __init__(self, most: int | None) -> None:
        self._most = most
        self.taken: dict[str, int] = {}
        """How many each key has, while there is a limit."""

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._most is not None

    def is_full(self, key: str) -> bool:
        """Tell whether a key has as many as it may have."""
        return self._most is not None and self.taken.get(key, 0) >= self._most

    def take(self, key: str) -> bool:
        """Count one more, if it may be; return whether it was."""
        if self.is_full(key):
            return False
        self.taken[key] = self.taken.get(key, 0) + 1
        return True

    def give_back(self, key: str) -> None:
        """Count one less."""
        self.taken[key] -= 1
        if not self.taken[key]:
            del self.taken[key]


class Poll(NamedTuple):
    """Which place a client keeps that polls."""

    name: str
    """What it is called."""
    seconds: float
    """For how long it is kept after a poll."""


class Lease:
    """A connection's place among those that are counted.

    It is held from before the socket is accepted until the socket is freed.
    """

    __slots__ = ("_address", "_taken", "quotas")

    def __init__(self, quotas: Quotas, address: str | None) -> None:
        self.quotas = quotas
        """Where the place is taken."""
        self._address = address
        self._taken: tuple[tuple[str, str], ...] = ()

    def take(self, limit: str, key: str | None) -> None:
        """Count it under one limit too, such as its user's once that is known; `None` isn't counted.

        Raises:
            LimitExceeded: If there is no room; the place is as it was.
        """
        if key is None or (limit, key) in self._taken:
            return
        if self.quotas.take(limit, key, self._address):
            self._taken += ((limit, key),)

    def counts_for(self, limit: str, key: str) -> bool:
        """Tell whether it is counted under this key."""
        return (limit, key) in self._taken

    @property
    def needs_release(self) -> bool:
        """Whether giving it back changes anything, so that somebody has to remember it."""
        return self.quotas.needs_address

    def release(self) -> None:
        """Give everything back. Idempotent."""
        taken, self._taken = self._taken, ()
        self.quotas.give_back(taken)


class PollLease(Lease):
    """The place of a client that polls and says who it is: it keeps it for a while after each poll, and counts once.

    Args:
        quotas: Where the place is taken.
        address: The client's.
        name: What it is called in its next poll.
        seconds: For how long it is kept.
    """

    __slots__ = ("_seconds", "_timer", "name")

    def __init__(self, quotas: Quotas, address: str | None, name: str, seconds: float) -> None:
        super().__init__(quotas, address)
        self.name = name
        """What it is called."""
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def take(self, limit: str, key: str | None) -> None:
        """Count it under one limit too, and no more under another key, such as that of a user who has logged out.

        Raises:
            LimitExceeded: If there is no room.
        """
        others = tuple(each for each in self._taken if each[0] == limit and each[1] != key)
        self._taken = tuple(each for each in self._taken if each not in others)
        self.quotas.give_back(others)
        super().take(limit, key)

    def release(self) -> None:
        """Keep it for the next poll."""
        if not self._taken or self._timer is not None:
            return
        if self.quotas.polls.setdefault(self.name, self) is not self:
            super().release()  # two polls of one name at once: one place is kept
            return
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self.expire, context=Context())

    def expire(self) -> None:
        """Give it back: no poll has come."""
        self.take_back()
        super().release()

    def take_back(self) -> None:
        """Let the next poll have it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            del self.quotas.polls[self.name]

    def is_of(self, address: str | None) -> bool:
        """Tell whether it is a client's of this address."""
        return self._address == address


class TokenBuckets:
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


class Quotas:
    """Counts connections and paces handshakes. What is asked and what follows from it happen in one step."""

    def __init__(self, limits: Limits, violations: Violations, clock: Clock = monotonic) -> None:
        self._most_channels = limits.max_channels_per_connection
        self._violations = violations
        self.counted = {name: Counted(getattr(limits, name)) for name in (IN_ALL, PER_USER, PER_ADDRESS)}
        """The places that are taken, by the name of the limit."""
        # The lease of every connection where no places are counted. It holds nothing, so all can share it.
        self._uncounted = None if any(each.is_limited for each in self.counted.values()) else Lease(self, None)
        rate = limits.max_handshake_rate
        self.polls: dict[str, PollLease] = {}
        """The places that are kept between two polls, by their names, the oldest first."""
        self.pace = None if rate is None else TokenBuckets(rate, limits.handshake_burst, clock)
        """The pace of handshakes by address, where it is limited."""
        self.needs_address = self._uncounted is None or self.pace is not None
        """Whether a handshake's address matters, if only for the log."""

    @property
    def counts_places(self) -> bool:
        """Whether places are counted at all."""
        return self._uncounted is None

    def make_room(self, user_key: str) -> None:
        """Give a place back that a user keeps between two polls, if there is one."""
        for lease in self.polls.values():
            if lease.counts_for(PER_USER, user_key):
                lease.expire()
                return

    def admit(self, address: str | None, poll: Poll | None = None) -> Lease:
        """Take a place for a handshake. Whose it is, `Lease.take` adds once it is known.

        Args:
            address: Its address.
            poll: Which place it keeps between polls, if it polls.

        Raises:
            LimitExceeded: If there is no place here or for its address, or if that one makes too many handshakes.
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
        """Take a place; return whether there is anything to give back. Called by a lease.

        Raises:
            LimitExceeded: If all places are taken.
        """
        counted = self.counted[limit]
        if counted.is_limited and not counted.take(key):
            raise self._violations.count(limit, address)  # not the user: names are not for logs
        return counted.is_limited

    def give_back(self, taken: Iterable[tuple[str, str]]) -> None:
        """Give places back. Called by a lease."""
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
    """What the inbound limits have to know of a connection."""

    _inbound_full_at: float | None


class InboundLimit:
    """How large and how many the messages of a client may be. Runs for each message, so it is short.

    One rate holds: `max_inbound_rate` for every client, or else `max_router_inbound_rate` for the clients of routers.
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
        # Of those who say something without a connection.
        self._requests = None if self._rate is None else TokenBuckets(self._rate, limits.inbound_burst, clock)

    def check_request(self, who: str | None, address: str | None) -> None:
        """Count what a request says, of somebody who has no connection.

        Args:
            who: Whose request it is: a user or an address; `None` if nobody knows.
            address: From where it came, for the log.

        Raises:
            LimitExceeded: If it is one too many for now.
        """
        if self._requests is not None and who is not None and not self._requests.take(who):
            raise self._violations.count(self._limit, address)

    def check_size(self, size: int, who: object) -> None:
        """Check how much a request says, in bytes.

        Raises:
            LimitExceeded: If it is too large.
        """
        if size > self._max_bytes:
            raise self._violations.count("max_inbound_bytes", who)

    def begin(self, sender: Sender, *, is_routers: bool) -> None:
        """Give a client its bucket, full, if a rate holds for it."""
        if self._rate is not None and (self._is_for_all or is_routers):
            sender._inbound_full_at = 0.0

    def check(self, sender: Sender, message: str | bytes) -> None:
        """Count a message that came in.

        Raises:
            LimitExceeded: If it is too large, or one too many for now.
        """
        if (full_at := sender._inbound_full_at) is not None:
            now = self._clock()
            full_at = (full_at if full_at > now else now) + self._interval
            if full_at - now > self._window:
                raise self._violations.count(self._limit, sender)
            sender._inbound_full_at = full_at
        # A character is at most 4 bytes of UTF-8, so most texts need not be looked at.
        if len(message) * 4 > self._max_bytes and _size(message) > self._max_bytes:
            raise self._violations.count("max_inbound_bytes", sender)


def _size(message: str | bytes) -> int:
    if isinstance(message, bytes) or message.isascii():
        return len(message)
    return len(message.encode("utf-8", "surrogatepass"))


def address_of(scope: Mapping[str, Any]) -> str | None:
    """Return what a peer's address counts as; `None` if the server doesn't know one, as on a Unix socket.

    Only `scope["client"]` counts, never a header, because the client writes those. An IPv6 address counts as its /64
    network, because that is what one customer is given (RFC 6177); one that holds an IPv4 address counts as
    that one. Anything that is not an IP address is cut to 64 characters.
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


EXPIRED = "it has expired"
"""What a client is told when `expires_at` has come."""

POLL = "wsbroadcast.poll"
"""Where in its scope a long poll says which place it keeps: a `Poll`."""


# Where in its scope a handshake has the leases that are held for it until it is connected, by their quotas.
_LEASES_KEY = "wsbroadcast.leases"


class Joining(NamedTuple):
    """What `connect` was told about a connection, checked."""

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
        """Check what `connect` was told.

        Raises:
            InvalidChannel: If a channel name breaks a rule.
            ValueError: If `user` is not a str, int or UUID, `expires_at` is not a valid time, or `since` is no position
                of something that is joined.
        """
        key = None if user is None else user_key(user)
        names = as_channels(channels) if channels else ()
        where = NOWHERE if since is None else since_of(since, names, key)
        return cls(user, key, names, info, subprotocol, headers, unix_seconds(expires_at), where)


class Admission:
    """Applies `Limits` to WebSockets. A place is taken in one step, before anything is awaited.

    Its two halves are in reach: `quotas` for what is counted, `inbound` for what clients send.

    Args:
        limits: What is too much.
        counters: Where refusals are counted.
        make_room: Takes a place from the oldest connection of a user, if that is wanted.
    """

    def __init__(self, limits: Limits, counters: Counters, make_room: Callable[[str], None]) -> None:
        self._make_room = make_room if limits.when_full == "oldest" else None
        self._violations = violations = Violations(counters)
        # The WebSockets in the blocks of `handshake`; once a drain has begun, those that it has refused there.
        self._arriving: set[WebSocket] = set()
        self.drains_until: float | None = None
        """When a drain ends or has ended, by the event loop's clock; `None` if none has begun."""
        self.quotas = Quotas(limits, violations)
        """Counts connections, and paces handshakes."""
        self.check_channels = self.quotas.check_channels
        """Raises `LimitExceeded` for too many channels of one connection."""
        self.inbound = InboundLimit(limits, violations)
        """Limits the messages of clients."""
        self.check_message = self.inbound.check
        """Raises `LimitExceeded` for a message that is too large, or one too many."""

    async def admit(self, websocket: WebSocket, joining: Joining) -> Lease:
        """Take a place for a WebSocket that is about to be accepted, or refuse it.

        Raises:
            LimitExceeded: If no place is free, the channels are too many, or the node is drained; the refusal has been
                sent.
            PermissionDenied: If it has expired; the refusal has been sent.
        """
        if self.drains_until is not None:
            await self.refuse_draining(websocket)
        lease = self._take_over(websocket) or await self._take_lease(websocket)
        try:
            key = joining.user_key
            if key is not None and not lease.counts_for(PER_USER, key):  # as that of the next poll does
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
        """Hold a place for a handshake; `admit` takes it over. Inside another such block it is the same place.

        Raises:
            LimitExceeded: If no place is free, or the node is drained; the refusal has been sent.
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
            if leases.get(self.quotas) is lease:  # else it is a connection's now
                del leases[self.quotas]
                lease.release()

    def drain(self, until: float) -> list[Coroutine[Any, Any, None]]:
        """Take nobody any more; return what refuses those that are looked into now.

        Args:
            until: When everybody who is here will be closed, by the event loop's clock.
        """
        self.drains_until = until
        # Who is being connected is refused there.
        self._arriving = {each for each in self._arriving if self.quotas in each.scope.get(_LEASES_KEY, ())}
        return [_refuse(each, self._draining(each), self._retry_after()) for each in self._arriving]

    async def refuse_draining(self, websocket: WebSocket) -> NoReturn:
        """Refuse a WebSocket because of a drain.

        Raises:
            LimitExceeded: Always.
        """
        if websocket in self._arriving:  # it knows, and is counted
            raise limit_error(DRAINING)
        error = self._draining(websocket)
        await _refuse(websocket, error, self._retry_after())
        raise error

    def _draining(self, websocket: WebSocket) -> LimitExceeded:
        return self._violations.count(DRAINING, websocket.scope.get("client"))

    def _retry_after(self) -> list[tuple[bytes, bytes]]:
        # Whoever can go to no other node comes back when this one is done.
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
    await refuse(websocket, REFUSALS[error.limit].status, error.code, error.reason, headers)
