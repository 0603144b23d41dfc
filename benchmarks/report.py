"""From the results of the rounds to medians, ratios, tables and bars."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import scenarios
from measure import Result, Results
from peers import BASELINE, CPP, Peer

Summary = dict[str, dict[str, dict[str, Any]]]
"""By scenario and peer: medians, and ratios to the hand-written manager and to uWebSockets."""


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
    metric = "memory_bytes" if "memory_bytes" in summary else "cpu_us"
    for name, reference in (("to_handwritten", BASELINE), ("to_uwebsockets", CPP)):
        summary[name] = _ratio(rounds, others.get(reference, []), metric)
    summary["rounds"] = len(good)
    return summary


def _ratio(rounds: list[Result], reference: list[Result], metric: str) -> float | None:
    pairs = [(mine.get(metric), its.get(metric)) for mine, its in zip(rounds, reference, strict=False)]
    return _median([mine / its for mine, its in pairs if mine is not None and its is not None])


def _median(values: list[Any]) -> Any:
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


_RATIOS = [("to hand-wr.", _cell("to_handwritten", ".2f")), ("to uWebSock.", _cell("to_uwebsockets", ".2f"))]
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
    "memory": [("kB", _cell("memory_bytes", ".2f", 1e-3)), *_RATIOS],
}


@dataclass(frozen=True)
class Bar:
    """What we want to reach."""

    title: str
    value: float | None
    limit: float

    def __str__(self) -> str:
        verdict = "not measured" if self.value is None else "met" if self.value <= self.limit else "MISSED"
        value = "-" if self.value is None else f"{self.value:.2f}"
        return f"  {self.title:66} {value:>8}  ≤ {self.limit:<5} {verdict}"


def bars(summary: Summary) -> list[Bar]:
    """Return what was wanted against what was measured."""

    def of(scenario: str, name: str, peer: str = "ours") -> float | None:
        return summary.get(scenario, {}).get(peer, {}).get(name)

    def within(scenario: str, reference: str, name: str) -> float | None:
        mine, other = of(scenario, name), of(reference, name)
        return None if mine is None or other is None else mine / other

    def both(title: str, scenario: str, to_handwritten: float, to_cpp: float | None, peer: str = "ours") -> list[Bar]:
        found = [Bar(f"{title}, to hand-written", of(scenario, "to_handwritten", peer), to_handwritten)]
        if to_cpp is not None:
            found.append(Bar(f"{title}, to uWebSockets", of(scenario, "to_uwebsockets", peer), to_cpp))
        return found

    ours_memory, its_memory = of("memory", "memory_bytes"), of("memory", "memory_bytes", BASELINE)
    return [
        *both("one in flight", "one", 0.55, 1.25),
        *both("16 in flight, the tutorial's handler", "sixteen", 0.10, 1.5),
        *both("16 in flight, create_router", "sixteen", 0.10, 1.5, "ours-router"),
        *both("16 in flight, a producer loop", "sixteen_loop", 0.10, 1.5),
        *both("permessage-deflate, 512 B", "deflate", 0.20, None),
        *both("5,000 connections", "conns_5000", 0.75, 1.35),
        Bar("a channel of 10 among 10,000, to 10 alone (CPU)", within("ten_among", "ten_alone", "cpu_us"), 1.3),
        Bar("one stalled, to everybody reading (p99)", within("one_stalled", "all_reading", "p99_ms"), 1.1),
        Bar(
            "memory of an idle connection over hand-written, kB",
            None if ours_memory is None or its_memory is None else (ours_memory - its_memory) / 1000,
            1.0,
        ),
    ]


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
