"""Real servers on real sockets: each as a process of its own, started from this interpreter."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import uvicorn

from tests.support.brokers import free_port

APP = "tests.support.apps:app"

# The directory that `tests` is imported from.
ROOT = Path(__file__).resolve().parents[2]

_START_TIMEOUT = 90.0

_COMPLAINTS = ("Traceback", "never awaited", "never retrieved", "was destroyed but", "ResourceWarning", "ASGI callable")


@dataclass(frozen=True)
class Flavour:
    """A server, and how it is started."""

    name: str
    package: str
    arguments: tuple[str, ...]
    fast_path: bool = False
    requires: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def missing(self) -> str:
        """The package that isn't installed, and how to install it; empty if all are."""
        packages = (self.package, *self.requires)
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        return f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}" if missing else ""

    @property
    def ends_on_sigterm(self) -> bool:
        """Whether the server ends on SIGTERM.

        Since Python 3.12.1 `Server.wait_closed` waits for every connection, and hypercorn 0.18 awaits it before it
        closes any (pgjones/hypercorn#308).
        """
        return not (self.package == "hypercorn" and sys.version_info >= (3, 12, 1))


def _uvicorn(name: str, loop: str, ws: str, http: str = "auto", **options: Any) -> Flavour:
    arguments = ("--host", "127.0.0.1", "--port", "{port}", "--loop", loop, "--ws", ws, "--http", http, "{app}")
    return Flavour(name, "uvicorn", arguments, **options)


UVICORN = _uvicorn("uvicorn", "asyncio", "auto", fast_path=True, requires=("websockets",))
UVICORN_UVLOOP = _uvicorn("uvicorn-uvloop", "uvloop", "auto", fast_path=True, requires=("websockets", "uvloop"))
UVICORN_DEBUG = _uvicorn(
    "uvicorn-debug",
    "asyncio",
    "auto",
    fast_path=True,
    requires=("websockets",),
    environment={"PYTHONASYNCIODEBUG": "1", "PYTHONWARNINGS": "default"},
)
UVICORN_WSPROTO = _uvicorn("uvicorn-wsproto", "asyncio", "wsproto", requires=("wsproto",))
UVICORN_WSPROTO_UVLOOP = _uvicorn("uvicorn-wsproto-uvloop", "uvloop", "wsproto", requires=("wsproto", "uvloop"))
UVICORN_H11 = _uvicorn("uvicorn-h11", "asyncio", "auto", "h11", fast_path=True, requires=("websockets", "h11"))
UVICORN_HTTPTOOLS = _uvicorn(
    "uvicorn-httptools", "uvloop", "auto", "httptools", fast_path=True, requires=("websockets", "uvloop", "httptools")
)
HYPERCORN = Flavour("hypercorn", "hypercorn", ("--bind", "127.0.0.1:{port}", "{app}"))
GRANIAN = Flavour(
    "granian", "granian", ("--interface", "asgi", "--host", "127.0.0.1", "--port", "{port}", "--workers", "1", "{app}")
)
DAPHNE = Flavour("daphne", "daphne", ("-b", "127.0.0.1", "-p", "{port}", "{app}"))

FLAVOURS = (
    UVICORN,
    UVICORN_UVLOOP,
    UVICORN_DEBUG,
    UVICORN_WSPROTO,
    UVICORN_WSPROTO_UVLOOP,
    HYPERCORN,
    GRANIAN,
    DAPHNE,
)

STREAM_FLAVOURS = (UVICORN_DEBUG, UVICORN_H11, UVICORN_HTTPTOOLS, HYPERCORN, GRANIAN, DAPHNE)
"""One of each thing that HTTP responses go through."""


class Server:
    """One server process. Use it with `with`: it runs inside the block, and is gone afterwards.

    It is up when it answers `probe` with JSON.
    """

    def __init__(
        self,
        flavour: Flavour,
        log: Path,
        app: str = APP,
        *,
        identifies_itself: bool = True,
        probe: str = "/health",
    ) -> None:
        self.flavour = flavour
        self._app = app
        # Whether `/health` repeats what it was started with: an example's doesn't.
        self._identifies_itself = identifies_itself
        self._probe = probe
        self._log = log
        self._mark = 0
        self._identity = uuid4().hex
        self.port = free_port()

    def __enter__(self) -> Self:
        arguments = (part.format(port=self.port, app=self._app) for part in self.flavour.arguments)
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.flavour.package, *arguments],
                cwd=ROOT,
                env=os.environ | self.flavour.environment | {"WSBROADCAST_TEST_SERVER": self._identity},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # some servers are several processes, and all have to go
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self.process.poll() is None and self.flavour.ends_on_sigterm:
                self.stop()
        finally:
            self.kill()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"{self.flavour} did not start:\n{self.log()}"
            try:
                answer = http(self.port, "GET", self._probe, timeout=5)
            except (OSError, ValueError):
                time.sleep(0.02)
                continue
            assert not self._identifies_itself or answer == {"server": self._identity}, (
                "another server answers on this port"
            )
            return
        raise AssertionError(f"{self.flavour} is not ready after {_START_TIMEOUT:g} s:\n{self.log()}")

    def stop(self, timeout: float = 8.0) -> float:
        """Send SIGTERM and return the seconds until the process ended; if it doesn't, kill it and fail."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.flavour} still runs {timeout:g} s after SIGTERM:\n{self.log()}") from None
        return time.monotonic() - started

    async def stopped(self, timeout: float = 8.0) -> float:
        """Do the same without blocking the event loop."""
        return await asyncio.to_thread(self.stop, timeout)

    def kill(self) -> None:
        """Kill all of its processes at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: nothing else is in there
        except ProcessLookupError:
            pass
        self.process.wait()

    def mark(self) -> None:
        """Let `log` begin here."""
        self._mark = self._log.stat().st_size

    def log(self) -> str:
        """Return what the server has written since the mark."""
        with self._log.open("rb") as file:
            file.seek(self._mark)
            return file.read().decode(errors="replace")

    def complaints(self) -> list[str]:
        """Return the lines since the mark that tell of errors, leaks or forgotten awaits."""
        return [line for line in self.log().splitlines() if any(sign in line for sign in _COMPLAINTS)]

    async def get(self, path: str) -> Any:
        return await asyncio.to_thread(http, self.port, "GET", path)

    async def post(self, path: str, timeout: float = 120) -> Any:
        return await asyncio.to_thread(http, self.port, "POST", path, timeout)

    async def stats(self, path: str, **fields: Any) -> dict[str, Any]:
        """Wait until the stats at a path meet a condition; return them."""

        async def reached() -> dict[str, Any] | None:
            stats: dict[str, Any] = await self.get(f"{path}/stats")
            return stats if {name: stats[name] for name in fields} == fields else None

        stats: dict[str, Any] = await eventually(reached)
        return stats

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.port}{path}"

    def peak_resident_bytes(self) -> int:
        """Return the most memory the process has ever held. Linux only."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def http(port: int, method: str, path: str, timeout: float = 30) -> Any:
    """Make one request on a connection of its own; return the decoded JSON.

    Raises:
        OSError: If there is no answer in time.
        ValueError: If the answer is neither 200 with JSON nor 204.
    """
    with socket.create_connection(("127.0.0.1", port), timeout) as sock:
        headers = f"Host: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close"
        sock.sendall(f"{method} {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 204 " in head.partition(b"\r\n")[0]:
        return None
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise ValueError(f"{method} {path}: {answer[:500]!r}")
    if b"transfer-encoding: chunked" in head.lower():
        body = b"".join(body.split(b"\r\n")[1::2])
    return json.loads(body)


async def eventually(condition: Callable[[], Awaitable[Any]], timeout: float = 5.0) -> Any:
    """Wait until a condition returns something true, and return it."""
    deadline = time.monotonic() + timeout
    while not (result := await condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s"
        await asyncio.sleep(0.02)
    return result


class SwarmProcess:
    """Many raw clients in a process of their own; see `tests.support.rawclient`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def connected(self, timeout: float = 60) -> None:
        await self._line(timeout)

    async def result(self, timeout: float = 120) -> dict[str, Any]:
        return await self._line(timeout)

    async def vanish(self) -> None:
        """Reset every connection at once."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"vanish\n")
        await self.process.wait()

    async def _line(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), timeout)
        assert line, "the swarm ended"
        result: dict[str, Any] = json.loads(line)
        return result


@asynccontextmanager
async def swarm(port: int, path: str, *, connections: int, messages: int) -> AsyncIterator[SwarmProcess]:
    """Connect many raw clients from another process; they are connected inside the block, and gone afterwards."""
    options = {"port": port, "path": path, "connections": connections, "messages": messages}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.rawclient",
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        several = SwarmProcess(process)
        await several.connected()
        yield several
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@asynccontextmanager
async def serve_here(app: Any, **options: Any) -> AsyncIterator[int]:
    """Run uvicorn in this event loop, for a test that checks the manager itself. It yields the port."""
    config = uvicorn.Config(app, log_level="warning", **options)
    server = uvicorn.Server(config)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[sock]), name="uvicorn")

        async def started() -> bool:
            return server.started or serving.done()

        try:
            await eventually(started)
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 10)
