"""Show where the microseconds of one scenario go, in one server: ours, if no other is named.

    python benchmarks/profile_server.py --scenario one
    python benchmarks/profile_server.py --scenario sixteen --peer handwritten --cprofile

With py-spy, which samples from outside and sees C functions and system calls too, the shares are what they are at full
speed. Without it cProfile counts calls; it makes every Python call dearer, so trust its order, not its numbers. Either
way the numbers are scaled to the CPU time of a delivery that was measured without a profiler.
"""

from __future__ import annotations

import argparse
import os
import pstats
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import peers
import scenarios
from peers import HERE, Peer
from scenarios import Scenario
from sessions import Session

Profile = tuple[Counter[str], Counter[str]]
"""What functions took, alone and with what they call; in any unit."""


def main() -> None:
    """Measure, profile, print."""
    arguments = _arguments()
    scenario = scenarios.BY_NAME[arguments.scenario]
    peer = peers.BY_NAME[arguments.peer]
    if scenario.kind != "run":
        sys.exit(f"{scenario.name} sends no messages")
    spy = None if arguments.cprofile else _find_spy(peer)
    cost = _cost(peer, scenario, arguments)
    print(f"{peer.label}, {scenario.title}: {cost:.3f} µs a delivery", flush=True)
    if spy is not None:
        print(f"py-spy, {arguments.seconds:.0f} s", flush=True)
        alone, together = _spy(spy, peer, scenario, arguments)
    else:
        print("cProfile (no py-spy: pip install py-spy for true shares)", flush=True)
        alone, together = _cprofile(peer, scenario, arguments)
    _print("alone", alone, sum(alone.values()), cost, arguments.lines)
    _print("with what they call", together, sum(alone.values()), cost, arguments.lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", default="one", choices=list(scenarios.BY_NAME))
    parser.add_argument("--peer", default="ours", choices=list(peers.BY_NAME))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--lines", type=int, default=25)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--cprofile", action="store_true", help="even where py-spy is there")
    return parser.parse_args()


def _find_spy(peer: Peer) -> str | None:
    beside = Path(peer.python).parent / "py-spy"
    return str(beside) if beside.exists() else shutil.which("py-spy")


def _connect(session: Session, scenario: Scenario) -> None:
    session.start()
    session.connect(loop=scenario.loop)
    session.ask(scenario.command(0.3))


def _cost(peer: Peer, scenario: Scenario, arguments: argparse.Namespace) -> float:
    with Session(peer, scenario.crowd, arguments.loop) as session:
        _connect(session, scenario)
        cost: float = session.ask(scenario.command(2.0))["cpu_us"]
        return cost


def _spy(spy: str, peer: Peer, scenario: Scenario, arguments: argparse.Namespace) -> Profile:
    with tempfile.TemporaryDirectory() as folder, Session(peer, scenario.crowd, arguments.loop) as session:
        _connect(session, scenario)
        stacks = Path(folder) / "stacks"
        command = [spy, "record", "--native", "--rate", "500", "--format", "raw", "--output", str(stacks)]
        command += ["--pid", str(session.server_pid), "--duration", str(int(arguments.seconds))]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as sampler:
            time.sleep(1)  # until it samples
            session.ask(scenario.command(arguments.seconds - 1.5))
            error = sampler.communicate(timeout=60)[1]
        if not stacks.exists():
            sys.exit(f"py-spy failed: {error.decode().strip()}")
        return _count(stacks.read_text())


def _count(stacks: str) -> Profile:
    alone: Counter[str] = Counter()
    together: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, samples = line.rpartition(" ")
        frames = [_short(frame) for frame in stack.split(";")]
        if frames[-1].startswith("epoll_wait"):  # waiting is no work
            continue
        alone[frames[-1]] += int(samples)
        for frame in set(frames):
            together[frame] += int(samples)
    return alone, together


def _short(frame: str) -> str:
    """Return a frame without its line and with the last two parts of its path."""
    name, _, place = frame.rpartition(" (")
    if not name:
        return frame
    path = place.rstrip(")").rpartition(":")[0] or place.rstrip(")")
    return f"{name} ({'/'.join(Path(path).parts[-2:])})"


def _cprofile(peer: Peer, scenario: Scenario, arguments: argparse.Namespace) -> Profile:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics"
        wrapper = [str(HERE / "servers" / "_profiled.py"), str(path)]
        with Session(peer, scenario.crowd, arguments.loop, wrapper) as session:
            _connect(session, scenario)
            os.kill(session.server_pid, signal.SIGUSR1)
            session.ask(scenario.command(arguments.seconds))
            os.kill(session.server_pid, signal.SIGUSR1)
            deadline = time.monotonic() + 15
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(0.5)  # until it is written
        statistics = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]  # public, but not in typeshed
    alone: Counter[str] = Counter()
    together: Counter[str] = Counter()
    for (file, _, function), (_, _, own, total, _) in statistics.items():
        name = f"{function} ({'/'.join(Path(file).parts[-2:])})"
        if "select.epoll" not in name:  # waiting is no work
            alone[name] += int(own * 1e9)
            together[name] += int(total * 1e9)
    return alone, together


def _print(title: str, counts: Counter[str], whole: int, cost: float, lines: int) -> None:
    print(f"\n{title:>30}: µs a delivery, share")
    for name, count in counts.most_common(lines):
        print(f"  {cost * count / whole:8.3f}  {count / whole:6.1%}  {name}")


if __name__ == "__main__":
    main()
