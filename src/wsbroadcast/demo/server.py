"""Runs the demo's app on uvicorn."""

from __future__ import annotations

import socket

from wsbroadcast.demo.app import create_app
from wsbroadcast.exceptions import MissingDependency

_SEND_BUFFER_BYTES = 128 * 1024


def serve(listener: socket.socket) -> None:
    """Serve the demo on a listening socket until the process is told to end.

    Raises:
        MissingDependency: If uvicorn or websockets isn't installed.
    """
    check_dependencies()
    import uvicorn

    config = uvicorn.Config(
        create_app(),
        log_level="warning",
        ws="websockets-sansio",  # where the manager's fast path is; the default in recent releases only
        ws_max_size=64 * 1024,
        # A tab that reads nothing would hold up the end otherwise.
        timeout_graceful_shutdown=2,
    )
    uvicorn.Server(config).run(sockets=[listener])


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
