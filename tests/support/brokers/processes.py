"""Child processes that end with the tests, even when the tests are killed. Linux: it reads `/proc`.

Run as a script it is the warden: it reads from stdin which processes and directories a test process owns, and removes
them when stdin ends.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it, parents first."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found = [pid]
    for each in found:
        found.extend(children.get(each, ()))
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The command stands in parentheses and may hold any character, also a parenthesis.
            yield int(path.name), int(stat.rpartition(")")[2].split()[1])


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def freeze(pid: int) -> list[int]:
    """Stop a process and all that descend from it; return them once none runs any more.

    Parents first: one that is stopped has no further children.
    """
    stopped: list[int] = []
    while new := [each for each in tree(pid) if each not in stopped]:
        signal_all(new, signal.SIGSTOP)
        stopped += new
        _wait_still(new)
    return stopped


def _wait_still(pids: list[int]) -> None:
    wait_until(lambda: not any(map(_runs, pids)))


def _runs(pid: int) -> bool:
    """Say whether a thread of a process still runs; each stops for itself, soon after the signal."""
    return any(_state(thread) not in "TtZX" for thread in Path(f"/proc/{pid}/task").glob("*"))


def _state(process: Path) -> str:
    """Return the letter of proc(5): `T` for stopped, `Z` for ended, but its parent hasn't taken note; `X` for gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def kill(pid: int) -> list[int]:
    """Kill a process and all that descend from it; return them. It doesn't wait for their end."""
    pids = freeze(pid)
    signal_all(pids, signal.SIGKILL)
    return pids


def wait_gone(pids: list[int], timeout: float = 10.0) -> None:
    """Wait until processes are alive no more."""
    wait_until(lambda: not any(map(is_alive, pids)), timeout)


def is_alive(pid: int) -> bool:
    """Say whether a process holds anything still; one that only waits for its parent to take note doesn't."""
    return _state(Path(f"/proc/{pid}")) not in "ZX"


def wait_until(condition: Callable[[], object], timeout: float = 10.0) -> None:
    """Block until a condition holds; `eventually` is its twin to await."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s"
        time.sleep(0.005)


class Warden:
    """The other end of a warden process: tells it what to remove once this process is gone, however it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A session of its own: Ctrl+C must not end it before us. Its stdin is closed when we end.
        self._process = subprocess.Popen(
            (sys.executable, "-I", __file__),
            stdin=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        atexit.register(self._dismiss)

    def watch(self, what: int | Path) -> None:
        """Remove a process or a directory if we end without it."""
        self._write(f"+{what}\n")

    def forget(self, what: int | Path) -> None:
        """Leave it alone: it is removed already."""
        self._write(f"-{what}\n")

    def _dismiss(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(line)
            self._process.stdin.flush()


@cache
def warden() -> Warden:
    """Return the warden of this process; started by the first who asks."""
    return Warden()


def guard() -> None:
    """Read lines of `+` or `-` with a pid or a directory; when they end, remove what was added and is still there."""
    owned: set[str] = set()
    for line in sys.stdin:
        (owned.add if line[0] == "+" else owned.discard)(line[1:].rstrip("\n"))
    killed = [pid for each in owned if each.isdigit() for pid in kill(int(each))]
    wait_gone(killed)
    for each in owned:
        if not each.isdigit():
            shutil.rmtree(each, ignore_errors=True)


if __name__ == "__main__":
    guard()
