"""Counters, as plain integers, and the snapshot of them that `stats()` returns."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

CONNECTION_BOUNDS = (0.01, 0.1, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
"""Bounds for how long connections last, in seconds. Those up to 300 s are some of OpenTelemetry's for SignalR."""

WAIT_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds for how long something takes while somebody waits for it, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How long something took: for each bound, how many durations belong to it."""

    bounds: tuple[float, ...] = ()
    """Seconds, growing. A duration belongs to the first bound that isn't smaller."""
    counts: tuple[int, ...] = ()
    """How many durations belong to each bound; the last number counts those longer than all bounds."""
    sum: float = 0.0
    """The sum of all durations, in seconds."""

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)


class Durations:
    """Counts how long something takes. It costs about 0.3 µs each time, so it isn't used for each delivery."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more duration."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> Histogram:
        """Return what was counted so far."""
        return Histogram(bounds=self._bounds, counts=tuple(self._counts), sum=self._sum)


class Counters:
    """What a node counts since the manager was made. It is never reset."""

    __slots__ = (
        "broadcasts",
        "client_errors",
        "connection_seconds",
        "connects",
        "deliveries",
        "delivery_seconds",
        "disconnects",
        "dropped",
        "evicted",
        "heals",
        "hook_errors",
        "invalid",
        "limited",
        "recoveries",
        "recovery_seconds",
        "refused_recoveries",
        "sends",
        "unkept",
        "unpublished",
        "vetoed",
    )

    def __init__(self) -> None:
        self.client_errors: Counter[str] = Counter()
        self.connects = 0
        self.disconnects = 0
        self.broadcasts = 0
        self.sends = 0
        self.deliveries = 0
        self.vetoed = 0
        self.unpublished = 0
        self.hook_errors = 0
        self.invalid = 0
        self.heals = 0
        self.recoveries = 0
        self.unkept = 0
        self.refused_recoveries: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.evicted: Counter[str] = Counter()
        self.limited: Counter[str] = Counter()
        self.connection_seconds = Durations(CONNECTION_BOUNDS)
        self.delivery_seconds = Durations(WAIT_BOUNDS)
        self.recovery_seconds = Durations(WAIT_BOUNDS)


class EngineCounters:
    """What an engine counts since it was made. It is never reset."""

    def __init__(self) -> None:
        self.reconnects = 0
        self.gaps = 0
        self.publish_failures = 0
        self.bad_envelopes: Counter[str] = Counter()
        self.publish_seconds = Durations(WAIT_BOUNDS)
        self.round_trip_seconds = Durations(WAIT_BOUNDS)

    def snapshot(self, *, is_connected: bool) -> EngineStats:
        """Return a snapshot of the counters."""
        return EngineStats(
            is_connected=is_connected,
            reconnects=self.reconnects,
            gaps=self.gaps,
            publish_failures=self.publish_failures,
            bad_envelopes=dict(self.bad_envelopes),
            publish_seconds=self.publish_seconds.snapshot(),
            round_trip_seconds=self.round_trip_seconds.snapshot(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine has counted since it was made. All is zero for an engine that needs no broker."""

    is_connected: bool = True
    """Whether there is a connection to the broker now. Always true for an engine without a broker."""
    reconnects: int = 0
    """How often a lost connection to the broker was replaced."""
    gaps: int = 0
    """Outages after which messages of other nodes were known to be missed."""
    publish_failures: int = 0
    """Publications that the broker did not take. Their callers saw an error; `broadcast_nowait` wrote a log line."""
    bad_envelopes: Mapping[str, int] = field(default_factory=dict)
    """What came from the broker and was dropped because it was not valid, by reason."""
    publish_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long the broker took to take what was published in one turn of the event loop."""
    round_trip_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long the engine's messages to itself took. It sends one every few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The counts of one node at one moment. Totals start when the manager is made and never go down.

    In a report from a node of another version, numbers that it doesn't know are zero.

    As JSON, by pydantic's `TypeAdapter(Stats)`, other versions can read it too. They leave out what they don't know.
    """

    connections: int = 0
    """Connections that are registered now."""
    users: int = 0
    """Users with at least one connection now."""
    channels: int = 0
    """Channels with at least one connection now."""
    sinks: dict[str, int] = field(default_factory=dict)
    """Connections now, by how they are written to: `uvicorn` is the fast path, `asgi` works on every server. Event
    streams are `uvicorn_sse` and `asgi_sse`, a long poll is `long_poll`."""
    fast_path_refused: dict[str, int] = field(default_factory=dict)
    """Connections now that are not on the fast path, by reason."""
    connects: int = 0
    disconnects: int = 0
    broadcasts: int = 0
    """Broadcasts that were handed over to recipients on this node."""
    sends: int = 0
    """Messages sent to single connections."""
    deliveries: int = 0
    """Messages handed over to connections. One broadcast to ten connections counts as ten."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Messages that were handed over and will not arrive, by reason: the name of a slow-consumer policy; `not_json` for
    bytes, which clients of the Centrifuge protocol's JSON can't be sent; `opening` for messages that came in too large
    a number while a client was being subscribed; or `closed` for messages that still waited when a connection ended or
    its socket was gone. A message that is being written when a connection ends may arrive, and isn't counted."""
    evicted: dict[str, int] = field(default_factory=dict)
    """Connections that were ended because they took too little, by reason: `backlog_full` or `send_timeout`."""
    limited: dict[str, int] = field(default_factory=dict)
    """What was refused because of a limit, by the name of the limit; `draining` for what came during a drain."""
    client_errors: dict[str, int] = field(default_factory=dict)
    """Errors that clients of the Centrifuge protocol were answered with or closed for, by code."""
    vetoed: int = 0
    """Broadcasts that an `on_broadcast` hook held back."""
    unpublished: int = 0
    """Messages of a router's clients that were lost, because the broker did not take them."""
    hook_errors: int = 0
    """Hooks that raised or were cancelled, and functions of `ConnectionManager.on` and `Presence.info` that raised."""
    invalid: int = 0
    """Messages of clients that were not of the types that are received. They were answered with an error."""
    heals: int = 0
    """How often a history was read on this node because something had not come, and all of it was there."""
    recoveries: int = 0
    """Connections that were away and then got exactly what they had missed in an audience."""
    refused_recoveries: dict[str, int] = field(default_factory=dict)
    """Connections that could not get what they had missed in an audience, and were told so, by reason: see
    `Recovery.reason`."""
    unkept: int = 0
    """Messages to an audience with a history that bypassed it: they have no position and are never replayed."""
    backlog_bytes: int = 0
    """Bytes that wait for slow consumers now."""
    backlog_messages: int = 0
    """Messages that wait for slow consumers now."""
    behind: int = 0
    """Connections past their high-water mark now."""
    connection_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long connections lasted, of those that have ended."""
    delivery_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """The time from when a node had a message until it was written to the connections that keep up. It includes hooks,
    the wait for the crowd, and the rest of the turn of the event loop. Of the messages of one turn, the first is
    measured."""
    recovery_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """The time from when a connection said since when it was away until it had all that it had missed."""
    engine: EngineStats = field(default_factory=EngineStats)
    """What the engine has counted."""
