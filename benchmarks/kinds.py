"""Scenarios that want new servers in every round: each function starts them and returns one result."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slow_consumers
from peers import HERE, Peer
from scenarios import Scenario
from sessions import Session, SessionError

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How to measure."""

    rounds: int
    seconds: float
    loop: str


def run(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Send messages to a crowd that has just come."""
    with Session(peer, scenario.crowd, options.loop) as session:
        session.start()
        session.connect()
        return session.ask(scenario.command(options.seconds))


def connect(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Count what a connect costs a server that holds nothing, collections of its garbage included."""
    if "collector" not in peer.can:
        with Session(peer, scenario.crowd, options.loop) as session:
            _warm(session)
            return session.connect()
    with _Collector(peer, scenario, options) as collector:
        _warm(collector.session)
        collector.collect()
        return collector.session.connect()


def life(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Count what a connection costs from its handshake to its end, while crowds come and go."""
    with Session(peer, scenario.crowd, options.loop) as session:
        _warm(session)
        before, begun = session.cpu(), time.perf_counter()
        for _ in range(scenario.waves):
            session.connect()
            session.ask({"do": "leave"})
        lives = scenario.waves * scenario.crowd.connections
        took = time.perf_counter() - begun
        return {"cpu_us": (session.cpu() - before) * 1e6 / lives, "per_second": lives / took}


def garbage(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Count the objects that only the cyclic collector can free when a connection has ended."""
    with _Collector(peer, scenario, options) as collector:
        _warm(collector.session)
        collector.switch_off()
        collector.collect()
        collector.session.connect()
        collector.session.ask({"do": "leave"})
        found = collector.collect()
        return {"objects": found / scenario.crowd.connections}


def memory(scenario: Scenario, peer: Peer, options: Options) -> Result:
    """Measure the memory of connections that nothing is sent to."""
    with Session(peer, scenario.crowd, options.loop) as session:
        session.start()
        session.connect(200)
        time.sleep(0.3)
        before = session.memory()
        session.connect()
        time.sleep(0.3)
        return {"memory_bytes": (session.memory() - before) / scenario.crowd.connections}


def _warm(session: Session) -> None:
    """Start, and let a few connections come and go: what is lazy about the first ones is not counted."""
    session.start()
    session.connect(20)
    session.ask({"do": "leave" if "leave" in session.peer.can else "disconnect"})


class _Collector:
    """A session with a server whose cyclic collector is under control. Use it with `with`."""

    def __init__(self, peer: Peer, scenario: Scenario, options: Options) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = Path(self._folder.name) / "count"
        wrapper = [str(HERE / "servers" / "_collected.py"), str(self._count)]
        self.session = Session(peer, scenario.crowd, options.loop, wrapper)

    def switch_off(self) -> None:
        """Let nothing be collected but by `collect`."""
        os.kill(self.session.server_pid, signal.SIGUSR2)

    def collect(self) -> int:
        """Collect, and return how many unreachable objects there were."""
        self._count.unlink(missing_ok=True)
        os.kill(self.session.server_pid, signal.SIGUSR1)
        deadline = time.monotonic() + 15
        while not self._count.exists():
            if time.monotonic() > deadline:
                raise SessionError("the server doesn't collect")
            time.sleep(0.01)
        return int(self._count.read_text())

    def __enter__(self) -> _Collector:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.session.close()
        self._folder.cleanup()


KINDS: dict[str, Callable[[Scenario, Peer, Options], Result]] = {
    "run": run,
    "connect": connect,
    "life": life,
    "garbage": garbage,
    "memory": memory,
    "stalled_memory": slow_consumers.stalled_memory,
    "pulsing": slow_consumers.pulsing,
    "hostile_room": slow_consumers.hostile_room,
}
