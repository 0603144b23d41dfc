"""Measures scenarios in rounds. In each round every peer has its turn: what disturbs the machine disturbs all."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from kinds import KINDS, Options, Result
from peers import Peer
from scenarios import Crowd, Scenario
from sessions import Session, SessionError

Results = dict[str, dict[str, list[Result]]]
"""By scenario and peer, one result for each round; `{"error": …}` where there is none."""


class Meter:
    """Runs scenarios and keeps what comes out."""

    def __init__(self, peers: list[Peer], options: Options, is_quiet: bool = False) -> None:
        self._peers = peers
        self._options = options
        self._is_quiet = is_quiet
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
        # There and back, so that what changes steadily meets all alike; and another one first in the next two rounds.
        shift = i // 2 % len(self._peers)
        order = self._peers[shift:] + self._peers[:shift]
        yield from reversed(order) if i % 2 else order

    def _measure(self, scenario: Scenario, peer: Peer, with_loop: bool) -> Result:
        try:
            if scenario.is_fresh:
                return KINDS[scenario.kind](scenario, peer, self._options)
            return self._run(scenario, peer, with_loop)
        except (SessionError, OSError) as error:
            return {"error": str(error)}

    def _run(self, scenario: Scenario, peer: Peer, with_loop: bool) -> Result:
        """Send messages to a crowd that stays for the scenarios that share it."""
        key = (peer, scenario.crowd)
        if key in self._broken:
            return {"error": self._broken[key]}
        try:
            if key not in self._open:
                self._open[key] = session = Session(peer, scenario.crowd, self._options.loop)
                session.start()
                session.connect(loop=with_loop and "loop" in peer.can)
                session.ask(scenario.command(0.2))  # not counted
            return self._open[key].ask(scenario.command(self._options.seconds))
        except (SessionError, OSError) as error:
            self._broken[key] = str(error)
            self._open.pop(key).close()
            raise

    def _close_all(self) -> None:
        for session in self._open.values():
            session.close()
        self._open.clear()
        self._broken.clear()

    def _tell(self, scenario: Scenario, peer: Peer, i: int, result: Result) -> None:
        if self._is_quiet:
            return
        at = f"[{time.monotonic() - self._begun:6.1f} s] round {i + 1}/{self._options.rounds}"
        print(f"{at}  {scenario.name:16} {peer.name:12} {describe(result)}", flush=True)


def describe(result: Result) -> str:
    """Return one result in a few words."""
    if "error" in result:
        return f"left out: {result['error']}"
    for mark, form in _FORMS.items():
        if mark in result:
            return form(result)
    return f"{result['cpu_us']:8.1f} µs, {result['per_second']:.0f} a second"


def _describe_run(result: Result) -> str:
    if result["stopped"]:
        return f"stopped after {result['messages']} messages: {result['stopped']}"
    return (
        f"{result['cpu_us']:8.3f} µs a delivery, p50 {result['p50_ms']:.2f} ms, p99 {result['p99_ms']:.2f} ms, "
        f"load of server {result['server_load']:.0%}, of client {result['client_load']:.0%}"
    )


# By what only this kind of result has; the first that fits.
_FORMS: dict[str, Callable[[Result], str]] = {
    "p99_ms": _describe_run,
    "bound_bytes": lambda r: f"{r['memory_bytes'] / 1e6:8.2f} MB each, bound {r['bound_bytes'] / 1e6:.2f} MB",
    "memory_bytes": lambda r: f"{r['memory_bytes'] / 1000:8.2f} kB a connection",
    "objects": lambda r: f"{r['objects']:8.1f} objects a life",
    "to_alone": lambda r: (
        f"{r['to_alone']:8.2f} of {r['alone_bytes_per_second'] / 1e6:.1f} MB/s alone, {r['evicted']:.0f} evicted"
    ),
    "heard": lambda r: (
        f"{r['share']:8.2f} heard, {r['heard']} of {r['said']}, "
        f"p50 {r['p50_ms'] or 0:.1f} ms, max {r['max_ms'] or 0:.1f} ms, {r['evicted']:.0f} evicted"
    ),
}
