"""What is measured: which connections, and what is sent to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Crowd:
    """The connections of one server."""

    connections: int = 1000
    channels: int = 0
    """Over how many channels they are spread; 0 for one crowd without channels."""
    deflate: bool = False
    stalled: bool = False
    """Whether one of them never reads."""
    tls: bool = False


@dataclass(frozen=True)
class Scenario:
    """One line of the tables. Those of a group are measured together, in turns, in the same run."""

    name: str
    title: str
    group: str
    crowd: Crowd = field(default_factory=Crowd)
    kind: str = "run"
    """How it is measured: a function of `kinds.py` or `slow_consumers.py`."""
    size: int = 128
    in_flight: int = 1
    loop: bool = False
    channels: int = 0
    """How many channels take turns; 0 for all."""
    least: int = 3
    most: int = 100_000
    seconds: float | None = None
    """Where it isn't the run's own."""
    is_fresh: bool = False
    """Whether every round wants new servers, because a round leaves a trace."""
    waves: int = 1
    """How often the crowd comes and goes, where it does."""
    texts: str = "ascii"
    """What clients that read nothing are sent: each its own, `ascii` or with one `emoji`, or one `shared` by all."""
    comes_back: bool = False
    """Whether a client that is thrown out connects again."""

    @property
    def needs(self) -> frozenset[str]:
        """What a peer has to be able to do."""
        crowd = self.crowd
        wanted = {
            "channels": bool(crowd.channels),
            "deflate": crowd.deflate,
            "loop": self.loop,
            "leave": self.kind in ("life", "garbage"),
            "collector": self.kind == "garbage",
            "bounds": self.kind in ("stalled_memory", "pulsing", "hostile_room"),
        }
        return frozenset(name for name, is_wanted in wanted.items() if is_wanted)

    def command(self, seconds: float) -> dict[str, Any]:
        """Return what the load client is told."""
        return {
            "do": "run",
            "size": self.size,
            "in_flight": self.in_flight,
            "loop": self.loop,
            "channels": self.channels,
            "seconds": seconds if self.seconds is None else self.seconds,
            "least": self.least,
            "most": self.most,
        }


THOUSAND = Crowd(1000)
MANY_CHANNELS = Crowd(10_000, channels=1000)
FIVE_HUNDRED = Crowd(500)
STALLED = Crowd(100)
_STALL = {"group": "stalled", "size": 16 * 1024, "least": 400, "most": 400, "is_fresh": True}
_HELD = {"group": "stalled_memory", "kind": "stalled_memory", "is_fresh": True}

SCENARIOS = [
    Scenario("one", "one in flight", "fan_out"),
    Scenario("sixteen", "16 in flight, pipelined by a client", "fan_out", in_flight=16),
    Scenario("sixteen_loop", "16 in flight, a producer loop", "fan_out", in_flight=16, loop=True),
    Scenario("kib_1", "messages of 1 KiB", "fan_out", size=1024),
    Scenario("kib_16", "messages of 16 KiB", "fan_out", size=16 * 1024),
    Scenario("kib_64", "messages of 64 KiB", "fan_out", size=64 * 1024),
    Scenario("deflate", "permessage-deflate, 512 B", "deflate", Crowd(1000, deflate=True), size=512),
    Scenario("deflate_sixteen", "the same, 16 in flight", "deflate", Crowd(1000, deflate=True), size=512, in_flight=16),
    Scenario("conns_10", "10 connections", "connections", Crowd(10)),
    Scenario("conns_100", "100 connections", "connections", Crowd(100)),
    Scenario("conns_1000", "1,000 connections", "connections", THOUSAND),
    Scenario("conns_5000", "5,000 connections", "connections", Crowd(5000)),
    Scenario("ten_alone", "10 connections alone, one channel", "channels", Crowd(10, channels=1)),
    Scenario("ten_among", "a channel of 10 among 10,000", "channels", MANY_CHANNELS, channels=1),
    Scenario("channels_100", "100 channels of 10 among 10,000, in turns", "channels", MANY_CHANNELS, channels=100),
    Scenario("channels_1000", "1,000 channels of 10, in turns", "channels", MANY_CHANNELS),
    Scenario("all_reading", "16 KiB, everybody reads", crowd=THOUSAND, **_STALL),  # type: ignore[arg-type]
    Scenario("one_stalled", "16 KiB, one never reads", crowd=Crowd(1000, stalled=True), **_STALL),  # type: ignore[arg-type]
    Scenario("connect", "connects onto a clean heap", "connect", kind="connect", is_fresh=True),
    Scenario("life", "a life: connect, get a message, leave", "life", FIVE_HUNDRED, "life", is_fresh=True, waves=6),
    Scenario("garbage", "left to the collector by a life", "garbage", FIVE_HUNDRED, "garbage", is_fresh=True),
    Scenario("memory", "memory of an idle connection", "memory", Crowd(2000), kind="memory", is_fresh=True),
    Scenario(
        "memory_deflate",
        "the same, permessage-deflate negotiated",
        "memory",
        Crowd(2000, deflate=True),
        kind="memory",
        is_fresh=True,
    ),
    Scenario("stalled_ascii", "reads nothing, ASCII", crowd=STALLED, **_HELD, size=1024),  # type: ignore[arg-type]
    Scenario("stalled_emoji", "the same, one emoji", crowd=STALLED, **_HELD, size=1024, texts="emoji"),  # type: ignore[arg-type]
    Scenario("stalled_tls", "the same, TLS", crowd=Crowd(100, tls=True), **_HELD, size=1024, texts="emoji"),  # type: ignore[arg-type]
    Scenario("stalled_shared", "one of 15 MB", crowd=STALLED, **_HELD, size=15_000_000, texts="shared"),  # type: ignore[arg-type]
    Scenario("pulsing", "one of 11 stalls and reads", "pulsing", Crowd(10), "pulsing", size=16 * 1024, is_fresh=True),
    Scenario(
        "pulsing_back",
        "the same, and comes back when it is evicted",
        "pulsing",
        Crowd(10),
        "pulsing",
        size=16 * 1024,
        is_fresh=True,
        comes_back=True,
    ),
    Scenario("hostile_room", "4 read, 6 only send pings", "hostile_room", Crowd(10), "hostile_room", is_fresh=True),
]

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
