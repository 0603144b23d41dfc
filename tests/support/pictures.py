"""Draws the pictures of the docs that show how something goes: `scripts/pictures`. SVG by hand, light and dark."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / "docs" / "assets"

_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.soft { fill: #59636e; } .strong { font-weight: 600; } .inside { fill: #ffffff; font-weight: 600; }
.paper { fill: #ffffff; } .box { fill: #f6f8fa; stroke: #d1d9e0; } .axis { stroke: #8c959f; fill: none; }
.ours { fill: #0b6bcb; stroke: #0b6bcb; } .warm { fill: #c8500a; stroke: #c8500a; }
.away { fill: #c8500a; opacity: .14; }
.line { fill: none; stroke-width: 3; } .thin { fill: none; stroke-width: 1.5; } .dashed { stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .soft { fill: #9198a1; } .inside { fill: #0d1117; }
.paper { fill: #0d1117; } .box { fill: #161b22; stroke: #3d444d; } .axis { stroke: #6e7681; }
.ours { fill: #4aa3ff; stroke: #4aa3ff; } .warm { fill: #f0883e; stroke: #f0883e; }
.away { fill: #f0883e; opacity: .2; }
.line, .thin { fill: none; } }
"""
_WIDTH = 480  # and no more, so that a phone shows letters that can be read


def _svg(height: int, title: str, parts: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="560" role="img" '
        f'aria-label="{escape(title)}">\n<style>{_STYLE}</style>\n'
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, style: str = "box") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" class="{style}"/>'


def _path(points: Iterable[tuple[float, float]], style: str) -> str:
    return f'<path class="{style}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _box(x: float, y: float, width: float, title: str, text: str) -> list[str]:
    middle = x + width / 2
    return [
        _rect(x, y, width, 46),
        _text(middle, y + 19, title, "strong", "middle"),
        _text(middle, y + 37, text, "soft", "middle"),
    ]


def _arrow(x: float, y: float, to_x: float, to_y: float, style: str = "axis") -> list[str]:
    tip = 5 if to_y > y else -5
    return [
        _path([(x, y), (to_x, to_y)], f"{style} thin"),
        _path([(to_x - 4, to_y - tip), (to_x, to_y), (to_x + 4, to_y - tip)], f"{style} thin"),
    ]


def _message(x: float, y: float, number: int, style: str = "ours") -> list[str]:
    return [
        f'<circle cx="{x:g}" cy="{y:g}" r="11" class="{style}"/>',
        _text(x, y + 4.5, str(number), "inside", "middle"),
    ]


# The life of a message.

_CLIENTS = ((60, 0), (120, 0), (180, 6), (300, 0), (360, 0), (420, 0))


def life() -> str:
    """From `broadcast` to the sockets: encoded once, one batch for a node, a backlog for who doesn't read."""
    parts = [
        *_box(60, 12, 360, "await manager.broadcast(message)", "in an endpoint, a route, a thread, another process"),
        *_arrow(240, 58, 240, 78),
        *_box(60, 78, 360, "encoded once", "the bytes are the same for everybody"),
        *_arrow(240, 124, 240, 144),
        *_box(20, 144, 440, "the engine", "memory: this node. A broker: every node that wants the channel"),
    ]
    for x, node in ((120, "node 1"), (360, "node 2")):
        parts += [
            *_arrow(x, 190, x, 210),
            *_box(x - 100, 210, 200, node, "one batch for its connections"),
        ]
    for x, waiting in _CLIENTS:
        parts += _arrow(x, 256, x, 292, "warm" if waiting else "ours")
        parts.append(f'<circle cx="{x}" cy="302" r="9" class="{"warm" if waiting else "ours"}"/>')
        parts += [_rect(x + 7 + 7 * i, 266, 5, 12, "warm") for i in range(waiting)]
    parts += [
        _text(20, 340, "A client that keeps up is written to at once.", "soft"),
        _text(20, 358, "One that doesn't read has a backlog. Nobody waits for it.", "soft"),
    ]
    return _svg(370, "The life of a message", parts)


# Recovery.

_KEPT = {14: 40, 15: 95, 16: 150, 17: 210, 18: 262, 19: 386, 20: 440}
_REPLAYED = {17: 326, 18: 350}


def recovery() -> str:
    """A channel goes on while a client is away. It says where it was, and gets what it missed before what is new."""
    parts = [
        _text(12, 24, "the channel keeps its messages", "strong"),
        _path([(12, 50), (468, 50)], "axis"),
        *[part for number, x in _KEPT.items() for part in _message(x, 50, number)],
        _rect(172, 72, 132, 100, "away"),
        _text(238, 90, "away", "soft", "middle"),
        _text(12, 104, "the client has got", "strong"),
        _path([(12, 130), (172, 130)], "ours line"),
        _path([(304, 130), (468, 130)], "ours line"),
    ]
    got = {number: x for number, x in _KEPT.items() if number not in _REPLAYED}
    parts += [part for number, x in got.items() for part in _message(x, 130, number)]
    parts += [part for number, x in _REPLAYED.items() for part in _message(x, 130, number, "warm")]
    parts += [
        *_arrow(304, 130, 304, 66),
        _text(310, 98, "since 16"),
        _text(238, 192, "What it missed comes first, once and in order. Then it goes on live.", "soft", "middle"),
    ]
    return _svg(206, "A client that comes back gets what it missed", parts)


# A drain.

_SECONDS = 5.0
_MOST = 1000


def _at(second: float, connections: float) -> tuple[float, float]:
    return 62 + second * 64, 200 - connections * 0.16


def drain() -> str:
    """The connections of a node that drains, and where they are then: random moments, random pauses, both seeded."""
    dice = random.Random(1)
    closed = sorted(dice.uniform(0, _SECONDS) for _ in range(_MOST))
    back = sorted(second + dice.uniform(0, 0.5) for second in closed)
    here = [(0.0, float(_MOST)), *((second, _MOST - 1.0 - i) for i, second in enumerate(closed))]
    there = [(0.0, 0.0), *((second, i + 1.0) for i, second in enumerate(back))]
    parts = [
        _text(12, 22, "connections", "soft"),
        _path([_at(0, _MOST), _at(0, 0), _at(6.2, 0)], "axis"),
        _text(54, 45, "1,000", "soft", "end"),
        _text(54, 204, "0", "soft", "end"),
        *(_text(*_below(second), f"{second} s", "soft", "middle") for second in range(0, 7, 1)),
        _path([_at(*point) for point in here[::10]], "warm line"),
        _path([_at(*point) for point in [*there[::10], (6.2, _MOST)]], "ours line"),
        _text(138, 62, "the node that ends", "strong"),
        _text(330, 150, "the other nodes", "strong"),
        _text(12, 246, "Each is closed at a random moment within five seconds,", "soft"),
        _text(12, 264, "and its client comes back to another node after a random pause.", "soft"),
    ]
    return _svg(276, "Connections move from a node that drains to others, a few at a time", parts)


def _below(second: float) -> tuple[float, float]:
    x, y = _at(second, 0)
    return x, y + 20


# Presence over a crash.


def _when(second: float) -> float:
    return 172 + second * 22


def presence() -> str:
    """A node crashes: who is back on another one has never left, who isn't has left when the lease has run out."""
    gone = 10.3  # the lease, and the next look
    parts = [
        _text(12, 54, "node 1", "strong"),
        _path([(_when(-4.5), 50), (_when(0), 50)], "ours line"),
        *[_path([(_when(second), 43), (_when(second), 57)], "ours thin") for second in (-4.5, -1.5)],
        _text(_when(-3), 36, "renews its lease", "soft", "middle"),
        _text(_when(0), 56, "✕", "strong", "middle"),
        _text(_when(0) + 10, 36, "crash", "strong"),
        _path([(_when(0) + 8, 50), (_when(8.5), 50)], "warm thin dashed"),
        _path([(_when(8.5), 43), (_when(8.5), 57)], "warm thin"),
        _text(_when(13), 36, "its lease has run out", "soft", "end"),
        _text(12, 114, "Bob", "strong"),
        _path([(_when(-4.5), 110), (_when(0), 110)], "ours line"),
        _path([(_when(0), 110), (_when(1), 110)], "ours thin dashed"),
        _path([(_when(1), 110), (_when(13), 110)], "ours line"),
        _text(_when(1), 98, "back on node 2: has never left"),
        _text(12, 174, "Ada", "strong"),
        _path([(_when(-4.5), 170), (_when(0), 170)], "ours line"),
        _path([(_when(0), 170), (_when(gone), 170)], "warm thin dashed"),
        _text(_when(0) + 10, 158, "is still in the list", "soft"),
        _path([(_when(gone), 160), (_when(gone), 180)], "warm line"),
        _text(_when(gone) - 6, 198, "node 2: Ada has left", "", "end"),
        _path([(_when(-4.5), 222), (_when(13), 222)], "axis"),
        *[_text(_when(second), 240, f"{second} s", "soft", "middle") for second in (0, 5, 10, 13)],
        *[_path([(_when(second), 218), (_when(second), 226)], "axis") for second in (0, 5, 10, 13)],
    ]
    return _svg(250, "Who was on a node that has crashed", parts)


PICTURES: dict[str, Callable[[], str]] = {"life": life, "recovery": recovery, "drain": drain, "presence": presence}


def main() -> int:
    """Write all of them."""
    for name, draw in PICTURES.items():
        (PLACE / f"{name}.svg").write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
