"""Make the virtual environments that the peers run in: `python benchmarks/environments.py`.

Two of them, in benchmarks/.venv, because two peers install into the same package. What can't be installed is named and
skipped; the benchmark leaves those peers out.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from peers import ENVIRONMENTS, HERE

GROUPS = {"main": "requirements.txt", "permit": "requirements-permit.txt"}


def main() -> None:
    """Make or update both."""
    for name, requirements in GROUPS.items():
        path = ENVIRONMENTS / name
        if not (path / "bin" / "python").exists():
            print(f"making {path.relative_to(HERE.parent)}", flush=True)
            venv.create(path, with_pip=True)
        if not _install(path, "-r", str(HERE / requirements)):
            for line in _packages(HERE / requirements):
                if not _install(path, line):
                    print(f"can't install {line}: left out")
        if not _install(path, "-e", str(HERE.parent)):
            sys.exit("can't install wsbroadcast itself")


def _install(path: Path, *what: str) -> bool:
    command = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=900, check=False).returncode == 0


def _packages(requirements: Path) -> list[str]:
    return [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]


if __name__ == "__main__":
    main()
