"""Measures scenarios in rounds. In each round every peer has its turn: what disturbs the machine disturbs all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from peers import Peer
from scenarios import Crowd, Scenario
from sessions import Session, SessionError

Result = dict[str, Any]
Results = dict[str, dict[str, list[Result]]]
"""By scenario and peer, one result for each round; `{"error": …}` where there is none."""


@dataclass(frozen=True)
class Options:
    """How to measure."""

    rounds: int
    seconds: float
    loop: str


class Meter:
    """Runs scenarios and keeps what comes out."""

    def __init__(self, peers: list[Peer], options: Options) -> None:
        self._peers = peers
        self._options = options
        self._begun = time.monotonic()
        self._open: dict[tuple[Peer, Crowd], Session] = {}
        self._broken: dict[tuple[Peer, Crowd], str] = {}
        self.results: Results = defaultdict(lambda: defaultdict(list))

    def measure(self, scenarios: Iterable[Scenario]) -> Results:
        """Measure group by group; a peer that fails is left out and the reason kept."""
        for _, group in groupby(scenarios, key=lambda scenario: scenario.group):
            together = list(group)
            try:
                self._measure_group(together)
            finally:
                self._close_all()
        return self.results

    def _measure_group(self, scenarios: list[Scenario]) -> None:
        with_loop = any(scenario.loop for scenario in scenarios)
        for i in range(self._options.rounds):
            for scenario in scenarios:
                for peer in self._in_turn(i):
                    if scenario.needs <= peer.can:
                        result = self._measure(scenario, peer, with_loop)
                        self.results[scenario.name][peer.name].append(result)
                        self._tell(scenario, peer, i, result)

    def _in_turn(self, i: int) -> Iterator[Peer]:
        # Another one first in each round.
        shift = i % len(self._peers)
        yield from self._peers[shift:] + self._peers[:shift]

    def _measure(self, scenario: Scenario, peer: Peer, with_loop: bool) -> Result:
        key = (peer, scenario.crowd)
        if key in self._broken:
            return {"error": self._broken[key]}
        try:
            if scenario.is_fresh:
                with Session(peer, scenario.crowd, self._options.loop) as session:
                    session.start()
                    return self._KINDS[scenario.kind](self, scenario, session, with_loop and "loop" in peer.can)
            if key not in self._open:
                self._open[key] = Session(peer, scenario.crowd, self._options.loop)
                self._prepare(scenario, self._open[key], with_loop and "loop" in peer.can)
            return self._KINDS[scenario.kind](self, scenario, self._open[key], False)
        except (SessionError, OSError) as error:
            if not scenario.is_fresh:
                self._broken[key] = str(error)
                self._open.pop(key).close()
            return {"error": str(error)}

    def _prepare(self, scenario: Scenario, session: Session, with_loop: bool) -> None:
        session.start()
        if scenario.kind == "connect":
            session.connect(100)  # whatever is lazy about the first ones
            session.ask({"do": "disconnect"})
        else:
            session.connect(loop=with_loop)
            session.ask(scenario.command(0.2))  # not counted

    def _run(self, scenario: Scenario, session: Session, with_loop: bool) -> Result:
        if scenario.is_fresh:
            session.connect(loop=with_loop)
        return session.ask(scenario.command(self._options.seconds))

    def _connect(self, scenario: Scenario, session: Session, with_loop: bool) -> Result:
        result = session.connect()
        session.ask({"do": "disconnect"})
        return result

    def _memory(self, scenario: Scenario, session: Session, with_loop: bool) -> Result:
        session.connect(200)
        time.sleep(0.3)
        before = session.memory()
        session.connect()
        time.sleep(0.3)
        return {"memory_bytes": (session.memory() - before) / scenario.crowd.connections}

    _KINDS: ClassVar[dict[str, Callable[..., Result]]] = {"run": _run, "connect": _connect, "memory": _memory}

    def _close_all(self) -> None:
        for session in self._open.values():
            session.close()
        self._open.clear()
        self._broken.clear()

    def _tell(self, scenario: Scenario, peer: Peer, i: int, result: Result) -> None:
        at = f"[{time.monotonic() - self._begun:6.1f} s] round {i + 1}/{self._options.rounds}"
        print(f"{at}  {scenario.name:16} {peer.name:12} {describe(result)}", flush=True)


def describe(result: Result) -> str:
    """Return one result in a few words."""
    if "error" in result:
        return f"left out: {result['error']}"
    if "memory_bytes" in result:
        return f"{result['memory_bytes'] / 1000:8.2f} kB a connection"
    if "p99_ms" not in result:
        return f"{result['cpu_us']:8.1f} µs a connect, {result['per_second']:.0f} a second"
    if result["stopped"]:
        return f"stopped after {result['messages']} messages: {result['stopped']}"
    return (
        f"{result['cpu_us']:8.3f} µs a delivery, p50 {result['p50_ms']:.2f} ms, p99 {result['p99_ms']:.2f} ms, "
        f"load of server {result['server_load']:.0%}, of client {result['client_load']:.0%}"
    )
