"""A server in a process of its own on one core, and the load client for it in another process on the other core."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from peers import HERE, Peer
from scenarios import Crowd


class SessionError(Exception):
    """The server or its load client failed."""


def cores() -> tuple[int, int]:
    """Return the core of the servers and the core of the load; the same one where there is no second."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[-1], usable[0]


class Session:
    """A running server and the connections to it. Use it with `with`."""

    def __init__(
        self, peer: Peer, crowd: Crowd, loop: str, wrapper: Sequence[str] = (), client: str = "load_client"
    ) -> None:
        self.peer = peer
        self.crowd = crowd
        self._loop = loop
        # A script of ours, with its arguments, that runs the server's file: a profiler.
        self._wrapper = wrapper
        self._client = client
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start both processes; the connections come later."""
        server_core, load_core = cores()
        port = self._port = free_port()
        flags = ["--port", str(port), "--loop", self._loop]
        flags += [f"--{name}" for name in ("deflate", "tls") if getattr(self.crowd, name)]
        self._server = self._spawn(
            [self.peer.python, *self._wrapper, str(HERE / "servers" / f"{self.peer.server}.py"), *flags],
            server_core,
            stdout=self._log,
            env=self.peer.environ,
        )
        self._wait_until_open(port)
        options = {"port": port, "pid": self._server.pid, "dialect": self.peer.dialect, "deflate": self.crowd.deflate}
        self._load = self._spawn(
            [sys.executable, str(HERE / f"{self._client}.py"), json.dumps(options)],
            load_core,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def connect(self, connections: int | None = None, loop: bool = False) -> dict[str, Any]:
        """Open the crowd's connections, or so many."""
        crowd = self.crowd
        count = crowd.connections if connections is None else connections
        command = {"connections": count, "channels": crowd.channels, "loop": loop, "stalled": crowd.stalled}
        opened = self.ask({"do": "connect", **command}, timeout=60 + count / 20)
        if crowd.deflate and not opened["deflate"]:
            raise SessionError("negotiates no permessage-deflate")
        return opened

    def ask(self, command: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Give the load client a command and return its result."""
        self.tell(command)
        return self.hear(command["do"], timeout)

    def tell(self, command: dict[str, Any]) -> None:
        """Give the load client a command."""
        assert self._load.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._load.stdin.write(json.dumps(command).encode() + b"\n")
            self._load.stdin.flush()

    def hear(self, what: str, timeout: float = 120) -> dict[str, Any]:
        """Return the result of the command that it was given last."""
        assert self._load.stdout is not None
        if not select.select([self._load.stdout], [], [], timeout)[0]:
            raise SessionError(f"{what} took longer than {timeout:.0f} s")
        line = self._load.stdout.readline()
        if not line:
            raise SessionError(f"the load client died: {self._tail()}")
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise SessionError(f"{result['error']}{self._tail()}")
        return result

    def get(self, path: str, timeout: float = 120) -> dict[str, Any]:
        """Ask the server itself for a page of JSON."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # a certificate that it has made itself
        url = f"http{'s' if self.crowd.tls else ''}://127.0.0.1:{self._port}{path}"
        with urllib.request.urlopen(url, timeout=timeout, context=context if self.crowd.tls else None) as answer:
            result: dict[str, Any] = json.load(answer)
        if "error" in result:
            raise SessionError(result["error"])
        return result

    def cpu(self) -> float:
        """Return the CPU time that the server has used, in seconds."""
        return cpu_seconds(self._server.pid)

    @property
    def server_pid(self) -> int:
        """The server's process."""
        return self._server.pid

    def memory(self) -> int:
        """Return the server's anonymous memory in bytes."""
        with open(f"/proc/{self._server.pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(timeout=20)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._processes.clear()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, command: list[str], core: int, **streams: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stderr=self._log, preexec_fn=on_core(core), **streams)
        self._processes.append(process)
        return process

    def _wait_until_open(self, port: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise SessionError(f"the server ended with {self._server.returncode}{self._tail()}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.05)
        raise SessionError(f"the server didn't open its port{self._tail()}")

    def _tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f" (log: {lines[-1]})" if lines else ""


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used."""
    return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3)


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def on_core(core: int) -> Callable[[], None]:
    """Return what a new process does first: stay on a core, take all descriptors there are, and end with us."""

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        # However this process ends, no server outlives it.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
