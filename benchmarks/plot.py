"""The plots of the docs, as SVG written by hand: no library, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import peers
import scenarios

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 15px; } .soft { fill: #59636e; } .axis { stroke: #d1d9e0; }
.ours { fill: #0b6bcb; } .cpp { fill: #7a5195; } .hand { fill: #c8500a; } .other { fill: #9aa4af; }
path.line { fill: none !important; stroke-width: 2; } .line.ours { stroke: #0b6bcb; stroke-width: 3 !important; }
.line.cpp { stroke: #7a5195; } .line.hand { stroke: #c8500a; }
.line.other { stroke: #9aa4af; } .paper { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .soft { fill: #9198a1; } .axis { stroke: #3d444d; } .paper { fill: #0d1117; }
.ours { fill: #4aa3ff; } .cpp { fill: #b58cd6; } .hand { fill: #f0883e; } .other { fill: #6e7681; }
.line.ours { stroke: #4aa3ff; } .line.cpp { stroke: #b58cd6; } .line.hand { stroke: #f0883e; }
.line.other { stroke: #6e7681; } }
"""
_WIDTH = 760


def drawings(summary: dict[str, dict[str, dict[str, Any]]]) -> dict[str, str]:
    """Return what can be drawn from what was measured, by file name."""
    found = {"fan_out": _bars(summary), "growth": _growth(summary)}
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def _kind(peer: str) -> str:
    if peers.BY_NAME[peer].is_ours:
        return "ours"
    return {peers.BASELINE: "hand", peers.CPP: "cpp"}.get(peer, "other")


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{_WIDTH}" height="{height:.0f}"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


# Bars: what a delivery costs.

_BARS = ("one", "sixteen", "deflate")
_ROW, _LEFT, _ROOM = 24, 230, 430
# A bar that is longer than so many times the hand-written one is cut, and says so.
_CUT = 3.0


def _bars(summary: dict[str, dict[str, dict[str, Any]]]) -> str | None:
    parts: list[str] = []
    y = 28.0
    for name in _BARS:
        costs = {peer: n["cpu_us"] for peer, n in summary.get(name, {}).items() if n.get("cpu_us") is not None}
        if not costs:
            continue
        scenario = scenarios.BY_NAME[name]
        parts.append(_text(12, y, f"{scenario.title}, {scenario.crowd.connections:,} connections", "title"))
        if name == _BARS[0]:
            parts.append(_text(_WIDTH - 12, y, "µs of server CPU for each delivered message", "soft", "end"))
        y += 14
        limit = min(max(costs.values()), _CUT * costs.get(peers.BASELINE, max(costs.values())))
        for peer, cost in sorted(costs.items(), key=lambda item: item[1]):
            parts.append(_bar(y, peer, cost, limit))
            y += _ROW
        y += 30
    return _svg(y - 20, "Server CPU for each delivered message, by library", parts) if parts else None


def _bar(y: float, peer: str, cost: float, limit: float) -> str:
    length = max(2.0, _ROOM * min(cost, limit) / limit)
    middle = y + _ROW / 2 + 4
    parts = [
        _text(_LEFT - 10, middle, peers.BY_NAME[peer].label, anchor="end"),
        f'<rect class="{_kind(peer)}" x="{_LEFT}" y="{y + 3:.1f}" width="{length:.1f}" height="{_ROW - 7}" rx="2"/>',
    ]
    if cost > limit:
        x = _LEFT + length - 26
        parts.append(f'<path class="paper" d="M{x:.1f} {y + 1:.1f}h7l-6 {_ROW - 3}h-7z"/>')
    parts.append(_text(_LEFT + length + 8, middle, f"{cost:.2f}" if cost < 10 else f"{cost:.0f}"))
    return "".join(parts)


# Lines: how it grows.


@dataclass(frozen=True)
class _Panel:
    title: str
    points: dict[str, float]
    """Scenario → place on the horizontal axis."""


_PANELS = (
    _Panel("connections", {"conns_10": 10, "conns_100": 100, "conns_1000": 1000, "conns_5000": 5000}),
    _Panel("bytes of a message", {"one": 128, "kib_1": 1024, "kib_16": 16384, "kib_64": 65536}),
    _Panel("channels in use, of 10 among 10,000", {"ten_among": 1, "channels_100": 100, "channels_1000": 1000}),
)
_DRAWN = ("handwritten", "websockets", "ours", "socketify")


def _growth(summary: dict[str, dict[str, dict[str, Any]]]) -> str | None:
    parts: list[str] = []
    height = 250.0
    panels = [panel for panel in _PANELS if sum(name in summary for name in panel.points) > 1]
    for i, panel in enumerate(panels):
        parts.append(_panel(panel, summary, 48, 40 + i * height, _WIDTH - 48 - 220, height - 84))
    if not parts:
        return None
    return _svg(len(panels) * height + 8, "How the cost of a delivery grows", parts)


def _panel(panel: _Panel, summary: dict[str, dict[str, dict[str, Any]]], x: float, y: float, w: float, h: float) -> str:
    lines = {
        peer: [
            (place, summary[name][peer]["cpu_us"])
            for name, place in panel.points.items()
            if summary.get(name, {}).get(peer, {}).get("cpu_us") is not None
        ]
        for peer in _DRAWN
    }
    lines = {peer: points for peer, points in lines.items() if points}
    costs = [cost for points in lines.values() for _, cost in points]
    places = [place for name, place in panel.points.items() if name in summary]
    if not costs:
        return ""
    ticks = _ticks(min(costs), max(costs))

    def across(place: float) -> float:
        return x + w * _share(place, places[0], places[-1])

    def up(cost: float) -> float:
        return y + h - h * _share(cost, ticks[0], ticks[-1])

    parts = [_text(_WIDTH - 12, y - 18, "logarithmic", "soft", "end")]
    parts.append(_text(12, y - 18, f"µs of server CPU for each delivery, by {panel.title}", "title"))
    for tick in ticks:
        parts.append(f'<path class="axis" d="M{x:.1f} {up(tick):.1f}h{w:.1f}"/>')
        parts.append(_text(x - 8, up(tick) + 4, f"{tick:g}", "soft", "end"))
    parts.extend(_text(across(place), y + h + 20, f"{place:,.0f}", "soft", "middle") for place in places)
    taken: list[float] = []
    for peer, points in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        path = "L".join(f"{across(place):.1f} {up(cost):.1f}" for place, cost in points)
        parts.append(f'<path class="line {_kind(peer)}" d="M{path}"/>')
        parts.extend(
            f'<circle class="{_kind(peer)}" cx="{across(place):.1f}" cy="{up(cost):.1f}" r="3.5"/>'
            for place, cost in points
        )
        # One label below the other where lines end close together.
        label = max([up(points[-1][1]) + 4, *(place + 15 for place in taken[-1:])])
        taken.append(label)
        parts.append(_text(x + w + 12, label, peers.BY_NAME[peer].label))
    return "".join(parts)


def _share(value: float, low: float, high: float) -> float:
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if high > low else 0.5


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 steps that hold all values."""
    steps = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low)
    last = min(i for i, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]
