"""Who is measured: a name, the server file, and what it can do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".venv"


@dataclass(frozen=True)
class Peer:
    """One server to measure."""

    name: str
    server: str
    """The file in servers/, without its ending."""
    label: str
    imports: str
    """The module whose import tells whether it is installed."""
    environment: str = "main"
    dialect: str = "plain"
    is_ours: bool = False
    is_python: bool = True
    """Whether it is a peer in Python that we mean to be faster than, in every scenario."""
    can: frozenset[str] = field(default=frozenset({"channels", "deflate", "leave", "collector"}))
    """Of `channels`, `deflate`, `loop`; `leave` if its server closes when a client says goodbye, `collector` if Python
    code handles its connections, `bounds` if it bounds what waits for a slow consumer."""
    interpreter: str | None = None
    """Where it isn't that of its environment."""
    tree: Path | None = None
    """A source tree of ours to run in place of what is installed."""

    @property
    def python(self) -> str:
        """The interpreter of its environment; this one, where `environments.py` made none."""
        if self.interpreter is not None:
            return self.interpreter
        made = ENVIRONMENTS / self.environment / "bin" / "python"
        return str(made) if made.exists() else sys.executable

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of its process."""
        return os.environ | ({} if self.tree is None else {"PYTHONPATH": str(self.tree / "src")})

    def missing(self) -> str | None:
        """Return why it can't run here, or `None`."""
        found = subprocess.run(
            [self.python, "-c", f"import {self.imports}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=self.environ,
        )
        return found.stderr.strip().splitlines()[-1] if found.returncode else None


ALL = frozenset({"channels", "deflate", "loop", "leave", "collector"})

PEERS = [
    Peer("handwritten", "handwritten", "hand-written manager", "fastapi, uvicorn", can=ALL),
    Peer("ours", "ours", "wsbroadcast", "wsbroadcast, uvicorn", is_ours=True, can=ALL | {"bounds"}),
    Peer("ours-router", "ours_router", "wsbroadcast, create_router", "wsbroadcast, uvicorn", is_ours=True),
    Peer("litestar", "litestar_channels", "Litestar channels", "litestar, uvicorn"),
    Peer("broadcaster", "encode_broadcaster", "encode/broadcaster", "broadcaster, uvicorn"),
    Peer(
        "permit",
        "permit_pubsub",
        "fastapi_websocket_pubsub",
        "fastapi_websocket_pubsub, uvicorn",
        environment="permit",
        dialect="permit",
    ),
    Peer("socketio", "socketio_rooms", "python-socketio", "socketio, uvicorn", dialect="socketio"),
    Peer("channels", "django_channels", "Django Channels", "channels, django, uvicorn"),
    Peer("websockets", "websockets_broadcast", "websockets.broadcast", "websockets.asyncio.server", can=ALL),
    Peer(
        "picows",
        "picows_server",
        "picows (Cython)",
        "picows",
        is_python=False,
        can=frozenset({"channels", "loop"}),
    ),
    Peer(
        "socketify",
        "socketify_server",
        "socketify (uWebSockets, C++)",
        "socketify",
        is_python=False,
        can=ALL - {"collector"},
    ),
    Peer(
        "raw",
        "raw_transport",
        "floor: bare transport.write",
        "asyncio",
        is_python=False,
        can=frozenset({"loop"}),
    ),
]

BY_NAME = {peer.name: peer for peer in PEERS}
BASELINE = "handwritten"
CPP = "socketify"
FLOOR = "raw"
LIBRARY = "websockets"
