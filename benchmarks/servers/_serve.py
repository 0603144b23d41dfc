"""What the servers share: their options, and how the ASGI ones are run. Imported by every file beside it."""

import argparse
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

CHANNEL = "all"
"""The channel of those who name none, where a peer knows channels only."""


def options() -> argparse.Namespace:
    """Return what `fan_out.py` asks of this server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--deflate", action="store_true", help="for servers where it is off by default")
    parser.add_argument("--tls", action="store_true", help="with a certificate of its own")
    return parser.parse_args()


def serve(app: Any) -> None:
    """Run an ASGI app on uvicorn as it comes, without its log and its pings."""
    import uvicorn

    chosen = options()
    with tempfile.TemporaryDirectory() as folder:
        uvicorn.run(
            app,
            host="127.0.0.1",
            port=chosen.port,
            loop=chosen.loop,
            log_level="warning",
            access_log=False,
            backlog=4096,
            ws_ping_interval=None,
            ssl_certfile=_certificate(Path(folder)) if chosen.tls else None,
        )


def _certificate(folder: Path) -> Path:
    import trustme

    path = folder / "certificate.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(path)
    return path


def run(main: Coroutine[Any, Any, None], loop: str) -> None:
    """Run a server that is no ASGI app, in the event loop that was asked for."""
    if loop == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        import asyncio

        asyncio.run(main)
