"""From the results of the rounds to medians, ratios, tables and bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import scenarios
from kinds import Result
from measure import Results
from peers import BASELINE, CPP, FLOOR, LIBRARY, Peer

Summary = dict[str, dict[str, dict[str, Any]]]
"""By scenario and peer: medians, and ratios to those in `_REFERENCES`."""

_REFERENCES = {
    "to_handwritten": BASELINE,
    "to_websockets": LIBRARY,
    "to_uwebsockets": CPP,
    "to_floor": FLOOR,
}
_METRICS = ("objects", "memory_bytes", "cpu_us")
"""What is compared: the first of these that a result has."""


def summarise(results: Results) -> Summary:
    """Return medians over the rounds. Ratios are taken within each round first."""
    return {
        scenario: {peer: _summarise(rounds, of_scenario) for peer, rounds in of_scenario.items()}
        for scenario, of_scenario in results.items()
    }


def _summarise(rounds: list[Result], others: dict[str, list[Result]]) -> dict[str, Any]:
    good = [one for one in rounds if "error" not in one]
    if not good:
        return {"error": rounds[-1]["error"]}
    numbers = {name for one in good for name, value in one.items() if isinstance(value, float)}
    summary: dict[str, Any] = {name: _median([one.get(name) for one in good]) for name in sorted(numbers)}
    stopped = [one for one in good if one.get("stopped")]
    if stopped:
        summary["stopped"] = f"after {_median([one['messages'] for one in stopped]):.0f} messages"
    metric = metric_of(summary)
    for name, reference in _REFERENCES.items():
        summary[name] = _ratio(rounds, others.get(reference, []), metric)
    summary["rounds"] = len(good)
    return summary


def metric_of(result: Result) -> str:
    """Return the name of what is compared."""
    return next((metric for metric in _METRICS if metric in result), "cpu_us")


def _ratio(rounds: list[Result], reference: list[Result], metric: str) -> float | None:
    pairs = [(mine.get(metric), its.get(metric)) for mine, its in zip(rounds, reference, strict=False)]
    return _median([mine / its for mine, its in pairs if mine is not None and its])


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def tables(summary: Summary) -> str:
    """Return one table for each scenario."""
    return "\n\n".join(_table(scenarios.BY_NAME[name], of_peers) for name, of_peers in summary.items())


def _table(scenario: scenarios.Scenario, of_peers: dict[str, dict[str, Any]]) -> str:
    columns = _COLUMNS[scenario.kind]
    head = f"{scenario.title} ({scenario.name}; {_crowd(scenario)})"
    lines = [head, f"  {'':30}" + "".join(f"{title:>14}" for title, _ in columns)]
    for name, numbers in of_peers.items():
        label = f"  {peers.BY_NAME[name].label:30}"
        if "error" in numbers:
            lines.append(f"{label}  left out: {numbers['error']}")
            continue
        cells = "".join(f"{cell(numbers):>14}" for _, cell in columns)
        lines.append(label + cells + (f"  stopped {numbers['stopped']}" if "stopped" in numbers else ""))
    return "\n".join(lines)


def _crowd(scenario: scenarios.Scenario) -> str:
    crowd = scenario.crowd
    parts = [f"{crowd.connections:,} connections", f"{scenario.size:,} B"]
    return ", ".join(parts if scenario.kind == "run" else parts[:1])


def _cell(name: str, form: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    def cell(numbers: dict[str, Any]) -> str:
        value = numbers.get(name)
        return "-" if value is None else format(value * scale, form)

    return cell


_RATIOS = [
    ("to hand-wr.", _cell("to_handwritten", ".2f")),
    ("to websockets", _cell("to_websockets", ".2f")),
    ("to uWebSock.", _cell("to_uwebsockets", ".2f")),
    ("to the floor", _cell("to_floor", ".2f")),
]
_COLUMNS = {
    "run": [
        ("CPU µs", _cell("cpu_us", ".2f")),
        *_RATIOS,
        ("p50 ms", _cell("p50_ms", ".2f")),
        ("p99 ms", _cell("p99_ms", ".2f")),
        ("deliveries/s", _cell("per_second", ",.0f")),
        ("server load", _cell("server_load", ".0%")),
        ("client load", _cell("client_load", ".0%")),
    ],
    "connect": [
        ("CPU µs", _cell("cpu_us", ".1f")),
        *_RATIOS,
        ("connects/s", _cell("per_second", ",.0f")),
        ("client load", _cell("client_load", ".0%")),
    ],
    "life": [("CPU µs", _cell("cpu_us", ".1f")), *_RATIOS],
    "garbage": [("objects", _cell("objects", ".1f")), *_RATIOS],
    "memory": [("kB", _cell("memory_bytes", ".2f", 1e-3)), *_RATIOS],
    "stalled_memory": [
        ("MB each", _cell("memory_bytes", ".2f", 1e-6)),
        ("bound MB", _cell("bound_bytes", ".2f", 1e-6)),
        ("to the bound", _cell("to_bound", ".2f")),
        ("backlog MB", _cell("backlog_bytes", ".2f", 1e-6)),
    ],
    "pulsing": [
        ("alone MB/s", _cell("alone_bytes_per_second", ".1f", 1e-6)),
        ("beside MB/s", _cell("bytes_per_second", ".1f", 1e-6)),
        ("to alone", _cell("to_alone", ".2f")),
        ("evicted", _cell("evicted", ".0f")),
    ],
    "hostile_room": [
        ("heard", _cell("share", ".0%")),
        ("p50 ms", _cell("p50_ms", ".1f")),
        ("max ms", _cell("max_ms", ".1f")),
        ("evicted", _cell("evicted", ".0f")),
    ],
}


@dataclass(frozen=True)
class Bar:
    """What we want to reach."""

    title: str
    value: float | None
    limit: float
    is_least: bool = False
    """Whether more is better."""

    def __str__(self) -> str:
        value = "-" if self.value is None else f"{self.value:.2f}"
        return f"  {self.title:66} {value:>8}  {'≥' if self.is_least else '≤'} {self.limit:<5} {self._verdict()}"

    def _verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if (self.value >= self.limit if self.is_least else self.value <= self.limit) else "MISSED"


def bars(summary: Summary) -> list[Bar]:
    """Return what was wanted against what was measured."""

    def of(scenario: str, name: str, peer: str = "ours") -> float | None:
        return summary.get(scenario, {}).get(peer, {}).get(name)

    def within(scenario: str, reference: str, name: str) -> float | None:
        mine, other = of(scenario, name), of(reference, name)
        return None if mine is None or other is None else mine / other

    def to(title: str, scenario: str, peer: str = "ours", **limits: float) -> list[Bar]:
        return [
            Bar(f"{title}, to {_NAMES[name]}", of(scenario, f"to_{name}", peer), limit)
            for name, limit in limits.items()
        ]

    def more(scenario: str, name: str, scale: float = 1.0) -> float | None:
        mine, its = of(scenario, name), of(scenario, name, BASELINE)
        return None if mine is None or its is None else (mine - its) / scale

    return [
        *to("one in flight", "one", handwritten=0.55, floor=1.12, uwebsockets=1.25),
        *to("16 in flight, the tutorial's handler", "sixteen", handwritten=0.10, uwebsockets=1.5),
        *to("16 in flight, create_router", "sixteen", "ours-router", handwritten=0.10, uwebsockets=1.5),
        *to("16 in flight, a producer loop", "sixteen_loop", handwritten=0.10, uwebsockets=1.5),
        *to("permessage-deflate, 512 B", "deflate", handwritten=0.20),
        *to("10 connections", "conns_10", handwritten=0.85, websockets=1.10),
        *to("5,000 connections", "conns_5000", handwritten=0.75, uwebsockets=1.35),
        Bar("a channel of 10 among 10,000, to 10 alone (CPU)", within("ten_among", "ten_alone", "cpu_us"), 1.3),
        *to("1,000 channels of 10", "channels_1000", handwritten=0.66, websockets=1.0),
        Bar("one stalled, to everybody reading (p99)", within("one_stalled", "all_reading", "p99_ms"), 1.1),
        *to("connects onto a clean heap", "connect", handwritten=1.12),
        *to("a whole life with churn", "life", handwritten=1.2),
        # No ratio: from Python 3.12 on a life of the hand-written class leaves nothing.
        Bar("objects left to the collector, over hand-written", more("garbage", "objects"), 0.5),
        Bar("memory of an idle connection over hand-written, kB", more("memory", "memory_bytes", 1000), 1.0),
        *[
            Bar(f"memory of one that reads nothing ({texts}), to its bound", of(f"stalled_{texts}", "to_bound"), 1.0)
            for texts in ("ascii", "emoji", "tls", "shared")
        ],
        Bar("tight loop beside one that stalls and reads, to alone", of("pulsing", "to_alone"), 0.8, is_least=True),
        Bar("heard in a room of mostly hostile ones", of("hostile_room", "share"), 1.0, is_least=True),
    ]


_NAMES = {
    "handwritten": "hand-written",
    "websockets": "websockets",
    "uwebsockets": "uWebSockets",
    "floor": "a bare transport.write loop",
}


def factors(summary: Summary) -> str:
    """Return by which factor we need less CPU than each other Python library, in every scenario."""
    lines = ["our CPU goes how many times into theirs"]
    names = [peer.name for peer in peers.PEERS if peer.is_python and not peer.is_ours]
    lines.append(f"  {'':16}" + "".join(f"{name:>13}" for name in names))
    for scenario, of_peers in summary.items():
        mine = of_peers.get("ours", {}).get("cpu_us")
        if mine is None:
            continue
        cells = [_factor(of_peers.get(name, {}), mine) for name in names]
        lines.append(f"  {scenario:16}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def _factor(numbers: dict[str, Any], mine: float) -> str:
    if "stopped" in numbers:
        return "stopped"
    its = numbers.get("cpu_us")
    return "-" if its is None else f"{its / mine:.1f}{'' if its >= mine else ' SLOWER'}"


def chosen(names: str | None, everyone: list[Peer]) -> list[Peer]:
    """Return the peers that a comma-separated list names."""
    return everyone if names is None else [peers.BY_NAME[name] for name in names.split(",")]
