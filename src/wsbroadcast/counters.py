"""Plain integers that everything worth knowing is counted in, and the snapshot `stats()` makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


class Counters:
    """Counted since the manager was made; never reset."""

    __slots__ = (
        "broadcasts",
        "connects",
        "deliveries",
        "disconnects",
        "dropped",
        "evicted",
        "hook_errors",
        "sends",
        "vetoed",
    )

    def __init__(self) -> None:
        self.connects = 0
        self.disconnects = 0
        self.broadcasts = 0
        self.sends = 0
        self.deliveries = 0
        self.vetoed = 0
        self.hook_errors = 0
        self.dropped: Counter[str] = Counter()
        self.evicted: Counter[str] = Counter()


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
    vetoed: int
    """Broadcasts that an `on_broadcast` hook held back."""
    hook_errors: int
    """Hooks that raised or were cut off."""
    backlog_bytes: int
    """Bytes that wait for slow consumers now."""
    backlog_messages: int
    """Messages that wait for slow consumers now."""
    behind: int
    """Connections past their high-water mark now."""
