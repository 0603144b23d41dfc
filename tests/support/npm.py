"""Clients from npm: installed once for all workers of a test run, and programs in Node that do what tests say."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

NPM = shutil.which("npm")

needs_npm = pytest.mark.skipif(NPM is None, reason="no npm on the PATH: apt-get install npm")

# What a registry may need. A thread that waits for a program can't be stopped, and would keep its test from ending.
_SECONDS = 240

SCRIPTS = Path(__file__).parent / "front_ends"


def once(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """Fill a directory that all workers of this run share, if none has done it yet."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = shared / name
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "done").exists():
            fill(directory)
            (directory / "done").touch()
    return directory


def run(command: Sequence[str], directory: Path) -> None:
    """Run a command that has to succeed."""
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def installed(factory: pytest.TempPathFactory, *packages: str) -> Path:
    """Install packages in a directory that all workers of this run share, if none has done it yet."""

    def install(directory: Path) -> None:
        (directory / "package.json").write_text('{"type": "module"}')
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline"]
        run([NPM or "npm", "install", *options, *packages], directory)

    return once(factory, "-".join(["npm", *packages]).replace("/", "-"), install)


class Program:
    """A script that reads a command a line, as JSON, and answers each with a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, do: str, tab: str = "", **options: Any) -> Any:
        """Tell it what to do; return what it answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, "tab": tab, **options}).encode() + b"\n")
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        assert line, "the script has ended"
        return json.loads(line)


@asynccontextmanager
async def program(directory: Path, name: str, *modules: str) -> AsyncIterator[Program]:
    """Run a script of `tests/support/front_ends` where its packages are, with the modules of ours that it imports."""
    for each in (name, *modules):
        shutil.copy(SCRIPTS / each, directory / each)
    async with started("node", str(directory / name), directory=directory) as found:
        yield found


@asynccontextmanager
async def started(
    *command: str, directory: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Program]:
    """Run a program that reads commands."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=directory,
        env=os.environ | (environment or {}),
        limit=1 << 26,  # all that a client has got, in one line
    )
    try:
        yield Program(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def check_types(directory: Path, *files: str) -> None:
    """Check files of TypeScript strictly, as a page's build does; a failure has what the compiler says."""
    options = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom"]
    (directory / "package.json").write_text('{"type": "module"}')
    command = [NPM or "npm", "exec", "--yes", "--package=typescript@5.9.3", "--", "tsc", *options, *files]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def run_script(directory: Path, name: str, document: Any, *options: str) -> Any:
    """Run a script of `tests/support/front_ends` about a document where its packages are; return what it prints."""
    script = Path(shutil.copy(SCRIPTS / name, directory / name))
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        command = ["node", str(script), file.name, *options]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
