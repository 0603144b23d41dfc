"""Measure what a delivered message costs a server, here and in other libraries, in one run.

Each server runs in a process of its own on one core; the load client runs in another process on the other core. Costs
are CPU time of the server's process for each delivered message, from the kernel's own clock. Rounds are interleaved:
in each of them every peer has its turn; ratios are taken within a round, and what is printed are medians.

    python benchmarks/environments.py           # once: the other libraries
    python benchmarks/fan_out.py                # everything, two hours
    python benchmarks/fan_out.py --quick        # a first look
    python benchmarks/fan_out.py --scenarios one,sixteen --peers handwritten,ours,socketify --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import plot
import report
import scenarios
from kinds import Options
from measure import Meter
from peers import HERE, Peer
from scenarios import Scenario
from sessions import cores

RESULTS = HERE / "results"


def main() -> None:
    """Measure, print, and write what was measured."""
    arguments = _arguments()
    options = Options(
        rounds=arguments.rounds or (2 if arguments.quick else 5),
        seconds=arguments.seconds or (0.3 if arguments.quick else 1.0),
        loop=arguments.loop,
    )
    here = _installed(report.chosen(arguments.peers, peers.PEERS))
    wanted = _possible(_scenarios(arguments.scenarios, arguments.quick))
    server_core, load_core = cores()
    print(f"servers on core {server_core}, load on core {load_core}, event loop {options.loop}", flush=True)
    if server_core == load_core:
        print("only one core: the load disturbs what is measured, trust no latency", flush=True)
    meter = Meter(here, options)
    try:
        meter.measure(wanted)
    except KeyboardInterrupt:
        print("interrupted: this is what there is so far")
    summary = report.summarise(meter.results)
    print("", report.tables(summary), "", report.factors(summary), "", "bars", sep="\n")
    print(*report.bars(summary), sep="\n")
    _write(arguments.publish, summary, meter, options)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", help=f"names or groups, with commas: {', '.join(scenarios.BY_NAME)}")
    parser.add_argument("--peers", help=f"names, with commas: {', '.join(peers.BY_NAME)}")
    parser.add_argument("--rounds", type=int, help="how often each peer has its turn (5; 2 with --quick)")
    parser.add_argument("--seconds", type=float, help="how long a turn takes (1; 0.3 with --quick)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="of the Python servers")
    parser.add_argument("--quick", action="store_true", help="short turns, and no more than 1,000 connections")
    parser.add_argument("--publish", action="store_true", help="update results/summary.json and the plots of the docs")
    return parser.parse_args()


def _scenarios(names: str | None, is_quick: bool) -> list[Scenario]:
    every = scenarios.SCENARIOS
    if names is None:
        return [one for one in every if not is_quick or one.crowd.connections <= 1000]
    asked = set(names.split(","))
    unknown = asked - {one.name for one in every} - {one.group for one in every}
    if unknown:
        sys.exit(f"no such scenario or group: {', '.join(sorted(unknown))}")
    return [one for one in every if asked & {one.name, one.group}]


def _possible(wanted: list[Scenario]) -> list[Scenario]:
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 100
    for one in wanted:
        if one.crowd.connections > room:
            print(f"{one.name} is left out: {one.crowd.connections} connections, but only {room} files may be open")
    return [one for one in wanted if one.crowd.connections <= room]


def _installed(wanted: list[Peer]) -> list[Peer]:
    missing = {peer.name: reason for peer in wanted if (reason := peer.missing()) is not None}
    for name, reason in missing.items():
        print(f"{name} is left out: {reason} (see environments.py)", flush=True)
    return [peer for peer in wanted if peer.name not in missing]


def _write(publish: bool, summary: report.Summary, meter: Meter, options: Options) -> None:
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": machine(), "versions": versions(), "options": vars(options)}
    whole = {**about, "summary": summary, "rounds": meter.results}
    (RESULTS / "latest.json").write_text(json.dumps(whole, indent=1))
    _plot(summary, RESULTS)
    if publish:
        path = RESULTS / "summary.json"
        # Scenarios that were not measured this time stay.
        before = json.loads(path.read_text())["summary"] if path.exists() else {}
        merged = {**before, **summary}
        path.write_text(json.dumps({**about, "summary": _rounded(merged)}, indent=1) + "\n")
        _plot(merged, HERE.parent / "docs" / "assets")


def _plot(summary: report.Summary, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in plot.drawings(summary).items():
        (folder / f"{name}.svg").write_text(drawing)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Return what it is measured on."""
    with open("/proc/cpuinfo") as lines:
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release().split("-")[0]}


def versions() -> dict[str, str]:
    """Return the versions of Python and of what is measured."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found: dict[str, str] = {}
    for python in {peer.python for peer in peers.PEERS}:
        ran = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        found = json.loads(ran.stdout) | found
    wanted = {
        *("broadcaster", "channels", "fastapi", "fastapi-websocket-pubsub", "litestar", "picows", "python-socketio"),
        *("socketify", "starlette", "uvicorn", "uvloop", "websockets", "wsbroadcast"),
    }
    versions = {name: version for name, version in sorted(found.items()) if name in wanted}
    return {"python": platform.python_version(), **versions}


if __name__ == "__main__":
    main()
