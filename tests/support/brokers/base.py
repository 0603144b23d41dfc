"""The base of all brokers: a process to start, stop, kill and pause, with a port and a directory."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from tests.support.brokers import processes

HOST = "127.0.0.1"

_START_TIMEOUT = 30.0


class Endpoint:
    """The address of a broker. A mere `Endpoint` was started by somebody else, so tests can't stop it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "the URL of a broker needs a host"
        assert parts.port is not None, "the URL of a broker needs a port"
        self._url = url
        self.host: str = parts.hostname
        self.port: int = parts.port

    @property
    def url(self) -> str:
        """The URL to connect to, with user and password if the broker wants them."""
        return self._url


class Broker(Endpoint, ABC):
    """A broker that the tests start. It keeps its port and its data until `close`, also after `kill` and `start`."""

    name: str
    user: str | None = None
    """The user of the operating system that runs it; `None` is our own."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.directory = Path(tempfile.mkdtemp(prefix=f"wsbroadcast-{self.name}-"))
        processes.warden().watch(self.directory)
        self._log = self.directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """Return the program and its arguments."""

    @abstractmethod
    def _answers(self) -> bool:
        """Check that it is ready to serve.

        Raises:
            OSError: If it isn't.
        """

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            AssertionError: If it runs already or doesn't answer; with what it has written.
        """
        assert not self.is_running, f"{self.name} runs already"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.user,
                cwd=self.directory,
                env=environment(),
                start_new_session=True,
            )
        processes.warden().watch(self._process.pid)
        self._wait_ready(self._process)

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            assert process.poll() is None, f"{self.name} did not start:\n{self.log()}"
            try:
                if self._answers():
                    return
            except OSError:
                pass
            time.sleep(0.01)
        raise AssertionError(f"{self.name} does not answer after {_START_TIMEOUT:g} s:\n{self.log()}")

    def stop(self, timeout: float = 10.0) -> None:
        """Ask it to end, as an administrator would, and wait until it has.

        Raises:
            AssertionError: If it doesn't; it is killed.
        """
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} still runs {timeout:g} s after a signal:\n{self.log()}") from None
        self._ended()

    _stop_signal = signal.SIGTERM

    def kill(self) -> None:
        """End it at once with SIGKILL, all of its processes, also when it is paused."""
        if self._process is None:
            return
        if self._process.poll() is None:
            pids = processes.kill(self._process.pid)
            self._process.wait()
            processes.wait_gone(pids)
        self._ended()

    def _ended(self) -> None:
        assert self._process is not None
        processes.warden().forget(self._process.pid)
        self._process = None

    def restart(self) -> None:
        """Stop and start it, with the same port and data."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Stop all of its processes with SIGSTOP. The kernel still accepts connections and takes bytes."""
        assert self._process is not None, f"{self.name} does not run"
        processes.freeze(self._process.pid)

    def resume(self) -> None:
        """Let its processes go on."""
        assert self._process is not None, f"{self.name} does not run"
        processes.signal_all(processes.tree(self._process.pid), signal.SIGCONT)

    def close(self) -> None:
        """Kill it and remove its data; in a process that was forked from ours, do nothing."""
        if os.getpid() != self._owner:
            return
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        processes.warden().forget(self.directory)

    def log(self) -> str:
        """Return what it has written to its log."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    async def started(self) -> None:
        await asyncio.to_thread(self.start)

    async def stopped(self) -> None:
        await asyncio.to_thread(self.stop)

    async def killed(self) -> None:
        await asyncio.to_thread(self.kill)

    async def restarted(self) -> None:
        await asyncio.to_thread(self.restart)


_given: deque[int] = deque(maxlen=500)
_giving = threading.Lock()


def free_port() -> int:
    """Return a port that nobody listens on, and that no connection takes while a broker is down for a moment.

    Systems give outgoing connections ports from 32768 or 49152 on, so one there may be somebody's when the broker
    comes back; and who tries such a port often enough connects to itself. 10000 above it Redis Cluster has its bus.
    The processes of one test run have different ones, because between our look and the broker's start each could be
    somebody else's. For the same reason none is given twice in a row.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with _giving:
        while True:
            port = random.randrange(10_000 + process, 22_000, processes)
            if port not in _given and _is_free(port) and _is_free(port + 10_000):
                _given.append(port)
                return port


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended don't count
        try:
            sock.bind((HOST, port))
        except OSError:
            return False
    return True


def environment() -> dict[str, str]:
    """Return the environment without variables that would change a broker's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "REDIS", "NATS"))}
    return kept | {"LC_ALL": "C"}
