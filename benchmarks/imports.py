"""What an import costs: the time spent in our own modules, and in all, when their bytecode is cached.

python benchmarks/imports.py
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys

PROGRAMS = {
    "publishes only": "from wsbroadcast import Publisher",
    "has connections": "from wsbroadcast import ConnectionManager",
    "uses FastAPI": "from wsbroadcast import create_router",
}

_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")


def measured(program: str) -> tuple[float, float]:
    """Milliseconds in our own modules, and in all that the program imports."""
    command = [sys.executable, "-X", "importtime", "-c", program]
    cached = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=cached).stderr
    found = [(int(micros) / 1000, name) for micros, name in _LINE.findall(printed)]
    start = max(number for number, (_, name) in enumerate(found) if name == "site")  # what Python itself imports
    found = found[start + 1 :]
    return sum(took for took, name in found if name.startswith("wsbroadcast")), sum(took for took, _ in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    print(f"milliseconds, the median of {runs} runs")
    for name, program in PROGRAMS.items():
        measured(program)  # compiles what isn't compiled yet
        own, everything = zip(*(measured(program) for _ in range(runs)), strict=True)
        print(f"{name:16} own {statistics.median(own):6.1f}   all {statistics.median(everything):6.1f}")


if __name__ == "__main__":
    main()
