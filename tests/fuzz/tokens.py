"""What a handshake's headers say: origin, host, subprotocols, and a token in any of its places."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.harness import fuzz, watched

with watched():
    from fastapi import HTTPException
    from starlette.requests import HTTPConnection

    from wsbroadcast import TokenFrom
    from wsbroadcast.web.origin import AllowedOrigins, parse_origin

TOKEN_FROM = TokenFrom(header=True, subprotocol="bearer", cookie="session", query="token")
ORIGINS = (AllowedOrigins(), AllowedOrigins(["https://app.example", "http://localhost:5173"]))
HEADERS = (b"origin", b"host", b"authorization", b"cookie", b"sec-websocket-protocol")

_loop = asyncio.new_event_loop()


def check(data: bytes) -> None:
    """A handshake has a token, or it gets 401; its origin is allowed, or refused in one printable line."""
    *values, query = (data.split(b"\n", len(HEADERS)) + [b""] * len(HEADERS))[: len(HEADERS) + 1]
    headers = [(name, value) for name, value in zip(HEADERS, values, strict=True) if value]
    for scheme in ("ws", "wss"):
        for origins in ORIGINS:
            refusal = origins.refusal(scheme, headers)
            assert refusal is None or (refusal.isprintable() and len(refusal) < 2000)
    origin = parse_origin(values[0].decode("latin-1"))
    assert origin is None or parse_origin(str(origin)) == origin
    offered = [part.strip() for part in values[4].decode("latin-1").split(",")]
    scope = {"type": "http", "path": "/", "headers": headers, "query_string": query, "subprotocols": offered}
    try:
        token = _loop.run_until_complete(TOKEN_FROM(HTTPConnection(scope)))
    except HTTPException as error:
        assert error.status_code == 401  # noqa: PT017
        return
    assert 0 < len(token) <= 8192
    assert token.isascii()
    assert token.isprintable()


if __name__ == "__main__":
    fuzz(check)
