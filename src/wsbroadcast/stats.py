"""Plain integers that everything worth knowing is counted in, and the snapshot `stats()` makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


class Counters:
    """Counted since the manager was made; never reset."""

    __slots__ = (
        "broadcasts",
        "connects",
        "deliveries",
        "disconnects",
        "dropped",
        "evicted",
        "heals",
        "hook_errors",
        "limited",
        "recoveries",
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


class EngineCounters:
    """What an engine counts, since it was made; never reset."""

    def __init__(self) -> None:
        self.reconnects = 0
        self.gaps = 0
        self.publish_failures = 0
        self.bad_envelopes: Counter[str] = Counter()

    def snapshot(self) -> EngineStats:
        """Return the counts as they are now."""
        return EngineStats(
            reconnects=self.reconnects,
            gaps=self.gaps,
            publish_failures=self.publish_failures,
            bad_envelopes=dict(self.bad_envelopes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine has counted since it was made; all zero for one that needs no broker."""

    reconnects: int = 0
    """Times a lost connection to the broker was replaced."""
    gaps: int = 0
    """Outages after which messages of other nodes were known to be missing."""
    publish_failures: int = 0
    """Publications that the broker did not take; their callers saw an error, those of `broadcast_nowait` a log line."""
    bad_envelopes: Mapping[str, int] = field(default_factory=dict)
    """What came from the broker and was dropped, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """One node at one moment. The counters run from the manager's creation and never go down."""

    connections: int
    """Connections that are registered now."""
    users: int
    """Users with at least one connection now."""
    channels: int
    """Channels with at least one connection now."""
    sinks: dict[str, int]
    """Connections now by how they are written to: `uvicorn` is the fast path, `asgi` works on every server."""
    fast_path_refused: dict[str, int]
    """Connections now that are not on the fast path, by the reason why."""
    connects: int
    disconnects: int
    broadcasts: int
    """Broadcasts that were handed to recipients on this node."""
    sends: int
    """Messages to single connections."""
    deliveries: int
    """Messages handed over to connections: one broadcast to ten connections is ten."""
    dropped: dict[str, int]
    """Messages that were handed over and will not arrive, by reason: a slow-consumer policy, or `closed` for what
    was still waiting when a connection ended, or found its socket gone."""
    evicted: dict[str, int]
    """Connections that were thrown out, by reason: `backlog_full` or `send_timeout`."""
    limited: dict[str, int]
    """What was refused because it went past a limit, by the name of the limit; `draining` for who came to a drain."""
    vetoed: int
    """Broadcasts that an `on_broadcast` hook held back."""
    unpublished: int
    """Messages of a router's clients that were ignored, because the broker did not take them."""
    hook_errors: int
    """Hooks that raised or were cut off."""
    heals: int
    """Times that a history was read on this node because something had not come, and everything was there."""
    recoveries: int
    """Connections that were away, and got exactly what they had missed in an audience."""
    refused_recoveries: dict[str, int]
    """Connections that could not be given what they had missed in an audience, and were told so, by reason: see
    `Recovery.reason`."""
    unkept: int
    """Messages to an audience with a history that were published past it: without a position, and never replayed."""
    backlog_bytes: int
    """Bytes that wait for slow consumers now."""
    backlog_messages: int
    """Messages that wait for slow consumers now."""
    behind: int
    """Connections past their high-water mark now."""
    engine: EngineStats
    """What the engine has counted."""
