"""What the servers share: their options, and how the ASGI ones are run. Imported by every file beside it."""

import argparse
from collections.abc import Coroutine
from typing import Any

CHANNEL = "all"
"""The channel of those who name none, where a peer knows channels only."""


def options() -> argparse.Namespace:
    """Return what `fan_out.py` asks of this server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--deflate", action="store_true", help="for servers where it is off by default")
    return parser.parse_args()


def serve(app: Any) -> None:
    """Run an ASGI app on uvicorn as it comes, without its log and its pings."""
    import uvicorn

    chosen = options()
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=chosen.port,
        loop=chosen.loop,
        log_level="warning",
        access_log=False,
        backlog=4096,
        ws_ping_interval=None,
    )


def run(main: Coroutine[Any, Any, None], loop: str) -> None:
    """Run a server that is no ASGI app, in the event loop that was asked for."""
    if loop == "uvloop":
        import uvloop

        uvloop.run(main)
    else:
        import asyncio

        asyncio.run(main)
