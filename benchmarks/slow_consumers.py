"""Scenarios of clients that read badly: what they cost the server's memory, and those who read."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from peers import Peer
from scenarios import Scenario
from sessions import Session

if TYPE_CHECKING:
    from kinds import Options

Result = dict[str, Any]

# "What a node holds" in docs/reference.md, with the defaults of SlowConsumer: the connection, what may wait for it, and
# its place in one channel.
_CONNECTION = 40_000
_BACKLOG = 1024 * 1024 + 1024 * 330
_TRANSPORT = 64 * 1024
_FRAGMENT = 256 * 1024
_CHANNEL = 400
_TLS = 280_000

# One that stalls and reads, again and again. It stalls for a little less than a quarter of `send_timeout`.
_STALL, _READ, _PULSES = 2.3, 0.5, 6
_ALONE = 3.0

_READERS, _HOSTILE = 4, 6
_ROOM_SECONDS = 15.0  # longer than `send_timeout`, after which who takes nothing is thrown out


def stalled_memory(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Measure what clients that read nothing take, each with its connection, once nobody takes any more."""
    count = scenario.crowd.connections
    with _session(scenario, peer, options) as session:
        before = session.memory()
        session.ask({"do": "stall", "connections": count, "tls": scenario.crowd.tls})
        held = session.get(f"/fill?texts={scenario.texts}&size={scenario.size}")
        time.sleep(0.3)
        each, limit = (session.memory() - before) / count, bound(scenario)
        return {
            "memory_bytes": each,
            "bound_bytes": limit,
            "to_bound": each / limit,
            "backlog_bytes": held["backlog_bytes"] / count,
        }


def bound(scenario: Scenario) -> float:
    """Return what a connection may take by the documentation; what all of them share is held once."""
    shared = scenario.size / scenario.crowd.connections if scenario.texts == "shared" else 0.0
    transport = (_TRANSPORT + min(scenario.size, _FRAGMENT)) * (2 if scenario.crowd.tls else 1)
    tls = _TLS if scenario.crowd.tls else 0
    return _CONNECTION + tls + _BACKLOG + transport + _CHANNEL + shared


def pulsing(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Measure a tight loop to readers: alone, beside one that stalls and reads, and alone again."""
    pulse = {"stall": _STALL, "read": _READ, "comes_back": scenario.comes_back}
    with _session(scenario, peer, options) as session:
        session.ask({"do": "join", "readers": scenario.crowd.connections})
        _throughput(session, scenario, 0.5)  # not counted
        before = _throughput(session, scenario, _ALONE)
        beside = _throughput(session, scenario, _PULSES * (_STALL + _READ), pulse)
        alone = (before + _throughput(session, scenario, _ALONE)) / 2
        evicted = _evicted(session)
    return {
        "alone_bytes_per_second": alone,
        "bytes_per_second": beside,
        "to_alone": beside / alone,
        "evicted": evicted,
    }


def _throughput(session: Session, scenario: Scenario, seconds: float, pulse: Result | None = None) -> float:
    session.tell({"do": "read", "pulse": pulse})
    ran = session.get(f"/loop?size={scenario.size}&seconds={seconds}")
    session.tell({"do": "stop"})
    received: int = session.hear("read")["received"]
    return received / float(ran["seconds"])


def _evicted(session: Session) -> float:
    return float(sum(session.get("/stats")["evicted"].values()))


def hostile_room(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Let most of a room read nothing and send pings, while one of those who read says something each second."""
    with _session(scenario, peer, options) as session:
        session.ask({"do": "join", "readers": _READERS, "hostile": _HOSTILE})
        session.tell({"do": "read"})
        session.get(f"/fall-behind?connections={_HOSTILE}")
        session.tell({"do": "stop"})
        session.hear("read")
        result = session.ask({"do": "talk", "seconds": _ROOM_SECONDS})
        return {**result, "evicted": _evicted(session)}


def _session(scenario: Scenario, peer: Peer, options: Options) -> Session:
    session = Session(dataclasses.replace(peer, server="bounded"), scenario.crowd, options.loop, client="slow_clients")
    session.start()
    return session
