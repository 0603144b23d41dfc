"""Compare two source trees of ours in one run: what a delivery, a connect, a life and an idle connection cost.

Three servers take turns, there and back: one of the base, one of this tree (or of `--head`), and a second one of the
base. What counts is the median of the ratios within the rounds; beside it stands what the base shows against itself,
which is what the machine can't tell from a change.

    python benchmarks/ab.py --base ../before
    python benchmarks/ab.py --base ../before --scenarios one,sixteen --pairs 31 --loop uvloop

New processes are started every few pairs, because how a process happens to lie in memory is worth a percent or two.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import peers
import scenarios
from kinds import Options
from measure import Meter, Results
from peers import HERE, Peer
from report import metric_of
from scenarios import Scenario

_DEFAULT = "one,sixteen,sixteen_loop,deflate,conns_10,connect,life,memory"
_EACH = 5
"""Pairs with the same processes."""
_STEADY = ("memory", "garbage")
"""Kinds that hardly vary: measured with the first processes only."""
_LIMIT = 1.03


@dataclass(frozen=True)
class Ratio:
    """The ratios of all pairs: their median, and where it lies with 95 % confidence."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:6.3f} ({self.low:.3f}-{self.high:.3f})"

    @staticmethod
    def of(ratios: list[float]) -> Ratio:
        """Take the interval from the order alone, whatever the distribution (a sign test)."""
        ordered, count = sorted(ratios), len(ratios)
        outside, below = 0.0, 0
        while below < (count - 1) // 2 and outside + math.comb(count, below) / 2**count <= 0.025:
            outside += math.comb(count, below) / 2**count
            below += 1
        rank = max(below - 1, 0)
        return Ratio(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    wanted = [_short(scenarios.BY_NAME[name]) for name in arguments.scenarios.split(",")]
    trees = [_peer(name, tree, arguments) for name, tree in (("base", arguments.base), ("head", arguments.head))]
    everyone = [*trees, replace(trees[0], name="base again")]
    begun = time.monotonic()
    results = _measure(wanted, everyone, arguments)
    print(
        f"\n{arguments.pairs} pairs on {arguments.loop}, {time.monotonic() - begun:.0f} s; medians, and 95 % of them\n"
    )
    print(*table(wanted, results), sep="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="a directory with src/: what it was before")
    parser.add_argument("--head", type=Path, default=HERE.parent, help="a directory with src/ (default: this one)")
    parser.add_argument("--scenarios", default=_DEFAULT, help="names, with commas (default: %(default)s)")
    parser.add_argument("--peer", choices=("ours", "ours-router"), default="ours", help="which server of ours")
    parser.add_argument("--pairs", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="how long a turn takes (default: %(default)s)")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="of the servers")
    parser.add_argument("--python", help="the servers' interpreter (default: that of the benchmark's environment)")
    parser.add_argument("--verbose", action="store_true", help="tell every turn")
    return parser.parse_args()


def _peer(name: str, tree: Path, arguments: argparse.Namespace) -> Peer:
    """Return our server from a tree.

    Raises:
        SystemExit: If the interpreter would import something else.
    """
    ours = peers.BY_NAME[arguments.peer]
    peer = replace(ours, name=name, label=name, interpreter=arguments.python, tree=tree.resolve())
    if (reason := peer.missing()) is not None:
        sys.exit(f"{name}: {reason}")
    code = "import wsbroadcast; print(wsbroadcast.__file__)"
    ran = subprocess.run([peer.python, "-c", code], capture_output=True, text=True, check=True, env=peer.environ)
    if not Path(ran.stdout.strip()).is_relative_to(tree.resolve() / "src"):
        sys.exit(f"{name}: {tree} has no src/wsbroadcast, {ran.stdout.strip()} would be measured")
    return peer


def _short(scenario: Scenario) -> Scenario:
    """Return a scenario with less to do in a turn: many short turns tell more than a few long ones."""
    crowd = scenario.crowd
    if scenario.kind == "memory":
        crowd = replace(crowd, connections=1000)
    elif scenario.kind == "connect":
        crowd = replace(crowd, connections=500)
    return replace(scenario, crowd=crowd, waves=min(scenario.waves, 2))


def _measure(wanted: list[Scenario], everyone: list[Peer], arguments: argparse.Namespace) -> Results:
    meters = []
    for done in range(0, arguments.pairs, _EACH):
        options = Options(min(_EACH, arguments.pairs - done), arguments.seconds, arguments.loop)
        meters.append(Meter(everyone, options, is_quiet=not arguments.verbose))
        meters[-1].measure([one for one in wanted if done == 0 or one.kind not in _STEADY])
        print(f"{min(done + _EACH, arguments.pairs)} of {arguments.pairs} pairs", flush=True)
    return {
        scenario.name: {
            peer.name: [one for meter in meters for one in meter.results[scenario.name][peer.name]] for peer in everyone
        }
        for scenario in wanted
    }


def table(wanted: list[Scenario], results: Results) -> list[str]:
    """Return the lines of the table."""
    lines = [f"{'':16}{'':10}{'base':>10}{'head':>10}{'head to base':>24}{'base to itself':>24}"]
    lines += [_line(scenario, results[scenario.name]) for scenario in wanted]
    return lines


def _line(scenario: Scenario, of_peers: dict[str, list[dict[str, float]]]) -> str:
    rounds = list(zip(of_peers["base"], of_peers["head"], of_peers["base again"], strict=True))
    good = [three for three in rounds if not any("error" in one for one in three)]
    if not good:
        errors = {str(one["error"]) for three in rounds for one in three if "error" in one}
        return f"{scenario.name:16}left out: {'; '.join(sorted(errors))}"
    metric = metric_of(good[0][0])
    base, head, again = ([one[metric] for one in column] for column in zip(*good, strict=True))
    change = Ratio.of([mine / its for mine, its in zip(head, base, strict=True)])
    itself = Ratio.of([mine / its for mine, its in zip(again, base, strict=True)])
    middle = f"{statistics.median(base):10.2f}{statistics.median(head):10.2f}"
    return f"{scenario.name:16}{metric:>10}{middle}{change!s:>24}{itself!s:>24}  {verdict(change, itself)}"


def verdict(change: Ratio, itself: Ratio) -> str:
    """Say whether a tree is as fast as the base, as far as can be told."""
    if change.high < 1 and change.median < itself.low:
        return "faster"
    if change.median <= _LIMIT:
        return "within 3 %"
    return "within what the base shows against itself" if change.median <= itself.high else "SLOWER"


if __name__ == "__main__":
    main()
