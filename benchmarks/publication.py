"""Run every benchmark, one after the other, and keep what each prints: the figures of docs/performance.md.

    python benchmarks/environments.py                                   # once: the other libraries
    benchmarks/.venv/main/bin/python benchmarks/publication.py          # everything
    benchmarks/.venv/main/bin/python benchmarks/publication.py history presence

What a benchmark prints, but for its progress, goes to benchmarks/results/<name>.txt, below the command, the machine and
the versions. A name that ends without success leaves its file as it was, and the run goes on. `fan_out` updates
summary.json and the plots; so does `peers`, which measures two of its scenarios with all libraries.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
import time

from fan_out import RESULTS, machine, versions
from peers import HERE

COMMANDS = {
    "footprint": "footprint.py --clients 1000 --rounds 2",
    "imports": "imports.py",
    "message_types": "message_types.py",
    "fan_out": "fan_out.py --publish --rounds 3 --seconds 0.5 --peers handwritten,ours,websockets,picows,socketify,raw",
    "peers": "fan_out.py --publish --rounds 5 --seconds 0.5 --scenarios one,sixteen",
    "engines": "engines.py --rounds 3",
    "history": "history.py --rounds 3",
    "presence": "presence.py",
    "streams": "streams.py --scenarios append,calls,late",
    "streams_node": "streams.py --scenarios node --engines memory,redis",
    "sse": "sse.py --rounds 3",
    "centrifuge": "centrifuge.py --rounds 3",
    "scrape": "scrape.py",
    "flood": "flood.py --rounds 3",
}

_PROGRESS = re.compile(r"\[ *[\d.]+ s\] |(\w+: )?round \d")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of {', '.join(COMMANDS)} (default: all)")
    names = parser.parse_args().names or list(COMMANDS)
    if unknown := set(names) - set(COMMANDS):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    failed = [name for name in names if not _publish(name)]
    if failed:
        sys.exit(f"without a result: {', '.join(failed)}")


def _publish(name: str) -> bool:
    begun = time.monotonic()
    command = COMMANDS[name]
    print(f"\n== {command}", flush=True)
    printed = []
    program = [sys.executable, *shlex.split(command)]
    with subprocess.Popen(program, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            if not _PROGRESS.match(line):
                printed.append(line.rstrip())
    if process.returncode:
        return False
    about = {"machine": machine(), "versions": versions()}
    lines = [
        f"python benchmarks/{command}",
        f"{datetime.date.today()}, {time.monotonic() - begun:.0f} s",
        *(f"{key}: {json.dumps(value)}" for key, value in about.items()),
    ]
    (RESULTS / f"{name}.txt").write_text("\n".join(lines) + "\n" + "\n".join(printed) + "\n")
    return True


if __name__ == "__main__":
    main()
