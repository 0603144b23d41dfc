"""Plain integers that everything worth knowing is counted in, and the snapshot `stats()` makes of them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

CONNECTION_BOUNDS = (0.01, 0.1, 1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
"""Seconds that connections last; up to 300 s some of those that OpenTelemetry's conventions for SignalR have."""

WAIT_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds that something takes while somebody waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How long something took: how often it lay between two bounds."""

    bounds: tuple[float, ...] = ()
    """Seconds. A duration belongs to the first bound that isn't smaller."""
    counts: tuple[int, ...] = ()
    """How many durations belong to each bound, and last how many are longer than all of them."""
    sum: float = 0.0
    """The seconds of all together."""

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


class Durations:
    """How long something took, so far. One observation costs about 0.3 µs, so it is not for each delivery."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def snapshot(self) -> Histogram:
        """Return what there was so far."""
        return Histogram(bounds=self._bounds, counts=tuple(self._counts), sum=self._sum)


class Counters:
    """Counted since the manager was made; never reset."""

    __slots__ = (
        "broadcasts",
        "connection_seconds",
        "connects",
        "deliveries",
        "delivery_seconds",
        "disconnects",
        "dropped",
        "evicted",
        "heals",
        "hook_errors",
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
        self.connects = 0
        self.disconnects = 0
        self.broadcasts = 0
        self.sends = 0
        self.deliveries = 0
        self.vetoed = 0
        self.unpublished = 0
        self.hook_errors = 0
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
    """What an engine counts, since it was made; never reset."""

    def __init__(self) -> None:
        self.reconnects = 0
        self.gaps = 0
        self.publish_failures = 0
        self.bad_envelopes: Counter[str] = Counter()
        self.publish_seconds = Durations(WAIT_BOUNDS)
        self.round_trip_seconds = Durations(WAIT_BOUNDS)

    def snapshot(self, *, is_connected: bool) -> EngineStats:
        """Return the counts as they are now."""
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
    """What an engine has counted since it was made; all zero for one that needs no broker."""

    is_connected: bool = True
    """Whether there is a connection to the broker now; also where none is needed."""
    reconnects: int = 0
    """Times a lost connection to the broker was replaced."""
    gaps: int = 0
    """Outages after which messages of other nodes were known to be missing."""
    publish_failures: int = 0
    """Publications that the broker did not take; their callers saw an error, those of `broadcast_nowait` a log line."""
    bad_envelopes: Mapping[str, int] = field(default_factory=dict)
    """What came from the broker and was dropped, by reason."""
    publish_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long the broker took to take what was published in one turn of the event loop."""
    round_trip_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long the engine's messages to itself took, which it sends every few seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One node at one moment. The counters run from the manager's creation and never go down.

    What a node of another version doesn't say is zero.
    """

    connections: int = 0
    """Connections that are registered now."""
    users: int = 0
    """Users with at least one connection now."""
    channels: int = 0
    """Channels with at least one connection now."""
    sinks: dict[str, int] = field(default_factory=dict)
    """Connections now by how they are written to: `uvicorn` is the fast path, `asgi` works on every server."""
    fast_path_refused: dict[str, int] = field(default_factory=dict)
    """Connections now that are not on the fast path, by the reason why."""
    connects: int = 0
    disconnects: int = 0
    broadcasts: int = 0
    """Broadcasts that were handed to recipients on this node."""
    sends: int = 0
    """Messages to single connections."""
    deliveries: int = 0
    """Messages handed over to connections: one broadcast to ten connections is ten."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Messages that were handed over and will not arrive, by reason: a slow-consumer policy, or `closed` for what
    was still waiting when a connection ended, or found its socket gone. What is being written when a connection
    ends may arrive, and isn't counted."""
    evicted: dict[str, int] = field(default_factory=dict)
    """Connections that were thrown out, by reason: `backlog_full` or `send_timeout`."""
    limited: dict[str, int] = field(default_factory=dict)
    """What was refused because it went past a limit, by the name of the limit; `draining` for who came to a drain."""
    vetoed: int = 0
    """Broadcasts that an `on_broadcast` hook held back."""
    unpublished: int = 0
    """Messages of a router's clients that were ignored, because the broker did not take them."""
    hook_errors: int = 0
    """Hooks that raised or were cut off."""
    heals: int = 0
    """Times that a history was read on this node because something had not come, and everything was there."""
    recoveries: int = 0
    """Connections that were away, and have now got exactly what they had missed in an audience."""
    refused_recoveries: dict[str, int] = field(default_factory=dict)
    """Connections that could not be given what they had missed in an audience, and were told so, by reason: see
    `Recovery.reason`."""
    unkept: int = 0
    """Messages to an audience with a history that were published past it: without a position, and never replayed."""
    backlog_bytes: int = 0
    """Bytes that wait for slow consumers now."""
    backlog_messages: int = 0
    """Messages that wait for slow consumers now."""
    behind: int = 0
    """Connections past their high-water mark now."""
    connection_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long connections lasted that have ended."""
    delivery_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long it took from when a node had a message until it was written to the connections that keep up: hooks, the
    wait for the crowd, the rest of the turn of the event loop. Of the messages of one turn the first is measured."""
    recovery_seconds: Histogram = field(default_factory=Histogram, compare=False)
    """How long it took from when a connection said since when it was away until it had all that it had missed."""
    engine: EngineStats = field(default_factory=EngineStats)
    """What the engine has counted."""
