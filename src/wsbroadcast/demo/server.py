"""Runs the demo's app on uvicorn, in two processes that share a file of SQLite."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from wsbroadcast.demo.app import create_app
from wsbroadcast.exceptions import MissingDependency

_SEND_BUFFER_BYTES = 128 * 1024

# How long the end of the second worker is waited for.
_END_SECONDS = 10.0


def serve(listener: socket.socket) -> None:
    """Serve the demo on a listening socket, in this process and in another one, until this one is told to end.

    Raises:
        MissingDependency: If uvicorn or websockets isn't installed.
    """
    check_dependencies()
    # uvicorn ends a process as the signal would that it has got; then nobody would end the other one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with tempfile.TemporaryDirectory(prefix="wsbroadcast-demo-", ignore_cleanup_errors=True) as directory:
        engine = f"sqlite:///{directory}/messages.db"
        with _second_worker(listener, engine):
            _run(listener, engine, compares=True)


def _run(listener: socket.socket, engine: str, *, compares: bool) -> None:
    import uvicorn

    config = uvicorn.Config(
        create_app(engine, compares=compares),
        log_level="warning",
        ws="websockets-sansio",  # where the manager's fast path is; the default in recent releases only
        ws_max_size=64 * 1024,
        # A tab that reads nothing would hold up the end otherwise.
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _second_worker(listener: socket.socket, engine: str) -> Iterator[None]:
    if os.name == "nt":  # where a child gets no sockets
        yield
        return
    command = [sys.executable, "-m", "wsbroadcast.demo.server", str(listener.fileno()), engine]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()]) as worker:  # noqa: S603  # our own
        try:
            yield
        finally:
            worker.terminate()
            try:
                worker.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()


def _work() -> None:
    # The second worker: ends with the first one, however that ends. Then its standard input does, too.
    listener, engine = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]

    def end_with_the_first() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_the_first, daemon=True).start()
    with listener, suppress(KeyboardInterrupt):
        _run(listener, engine, compares=False)


def check_dependencies() -> None:
    """Raise an error that holds the pip command if the server's packages are missing.

    Raises:
        MissingDependency: If uvicorn or websockets isn't installed.
    """
    try:
        import uvicorn  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f'the demo needs {error.name}: pip install "wsbroadcast[demo]"') from error


def listen(host: str, port: int) -> socket.socket:
    """Open the socket the demo is served on, before anything is started that would have to be stopped again.

    Raises:
        OSError: If the port is taken or not allowed, or the host isn't one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=128)
    # Every connection inherits it. The kernel would hold back up to 4 MiB for a stalled tab before the manager sees it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return listener


def url_of(host: str, port: int) -> str:
    """Return where a browser on this machine finds what listens at an address."""
    if host in ("0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        host = "localhost"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


if __name__ == "__main__":
    _work()
