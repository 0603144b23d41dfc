"""What a flood costs those who are not part of it: the p99 of 50 healthy clients, and what is left over afterwards.

`python benchmarks/flood.py` takes five minutes; it needs Linux. The server runs on one core, everybody else on the
other; a latency ends when the kernel has the message for the client, so that the client's own lateness isn't measured.
A round measures the healthy clients four times, for a while each: alone; with attackers who get into another room; with
260 more clients in their own room, who read; and with attackers who get in there instead. The attack is, all at once:
10,000 small frames in a second, 1,000 handshakes from one address, as many of a million channel names as the server
takes, and 200 clients that never read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sessions import cores, cpu_seconds, free_port, on_core

HERE = Path(__file__).parent
ATTACKS = ("frames", "handshakes", "names", "deaf")
HELD = ("connections", "users", "channels", "backlog_bytes", "tasks", "memory", "peak_memory")

Result = dict[str, Any]


class Flood:
    """A server, and the processes that are its clients."""

    def __init__(self, seconds: float) -> None:
        server_core, self._load_core = cores()
        self._seconds = seconds
        self._port = free_port()
        command = [sys.executable, str(HERE / "servers" / "flooded.py"), "--port", str(self._port)]
        self.server = subprocess.Popen(command, preexec_fn=on_core(server_core), stderr=subprocess.DEVNULL)
        self.held()

    def held(self, connections: int = 0) -> Result:
        """Return what the server holds, as soon as it has only so many connections."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                found = self._figures()
            except OSError:
                found = {}
            if found.get("connections") == connections:
                return found
            time.sleep(0.2)
        raise SystemExit(f"the server doesn't get down to {connections} connections: {found}")

    def _figures(self) -> Result:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/figures", timeout=30) as answer:
            found: Result = json.load(answer)
            return found

    def measure(self, others: Sequence[str] = (), room: str = "/room/a") -> Result:
        """Return what the healthy clients measured beside others, and what became of those."""
        self.held()
        healthy = self._start("healthy", self._seconds)
        assert healthy.stdout is not None
        opened = json.loads(healthy.stdout.readline())
        if opened != {"status": [101]}:
            raise SystemExit(f"the healthy clients are refused: {opened}")
        cpu = cpu_seconds(self.server.pid)
        started = {role: self._start(role, self._seconds - 2, room) for role in others}
        outcomes = {role: json.loads(process.communicate()[0] or "{}") for role, process in started.items()}
        result: Result = json.loads(healthy.communicate()[0])
        lag = self._figures()["lag_p99_ms"]  # since the last time anybody asked, which was before they began
        return {**result, "lag_p99_ms": lag, "cpu_s": cpu_seconds(self.server.pid) - cpu, **outcomes}

    def _start(self, role: str, seconds: float, room: str = "/room/a") -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "flooders.py"), role, str(self._port), str(seconds)]
        environment = {**os.environ, "FLOOD_ROOM": room}
        prepare = on_core(self._load_core)
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=prepare, env=environment)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15, help="of one measurement (default: %(default)s)")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="some of them (default: %(default)s)")
    chosen = parser.parse_args()
    flood = Flood(chosen.seconds)
    try:
        flood.measure()  # once to get warm
        before = flood.held()
        attacks = chosen.attacks.split(",")
        kinds: dict[str, tuple[Sequence[str], str]] = {
            "alone": ((), ""),
            "flood beside": (attacks, "/room/b"),
            "crowd": (("crowd",), "/room/a"),
            "flood inside": (attacks, "/room/a"),
        }
        rounds = []
        for _ in range(chosen.rounds):
            rounds.append({name: flood.measure(*options) for name, options in kinds.items()})
            for name, result in rounds[-1].items():
                print(f"{name}: {result}", flush=True)
        report(rounds, before, flood.held())
    finally:
        flood.server.kill()
        flood.server.wait()


def report(rounds: list[dict[str, Result]], before: Result, after: Result) -> None:
    """Print the medians, and what is left over."""
    columns = {"p99_ms": "p99 ms", "lag_p99_ms": "loop late, p99 ms", "cpu_s": "server CPU s"}
    medians = {
        name: {column: statistics.median(each[name][column] for each in rounds) for column in columns}
        for name in rounds[0]
    }
    print("".join(f"{title:>18}" for title in ("", *columns.values())))
    for name, values in medians.items():
        print(f"{name:>18}" + "".join(f"{value:>18.2f}" for value in values.values()))
    for name, usual in (("flood beside", "alone"), ("flood inside", "crowd")):
        for column, title in columns.items():
            print(
                f"{name} against {usual}: {title} {(medians[name][column] / medians[usual][column] - 1) * 100:+.0f} %"
            )
    print()
    for name in HELD:
        print(f"{name:>14}: {before[name]:>12,} before, {after[name]:>12,} after")
    print(f"limited: {after['limited']}\nevicted: {after['evicted']}\ndropped: {after['dropped']}")


if __name__ == "__main__":
    main()
