"""What the tests of NATS links share: a server that does what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support import tcp
from tests.support.tcp import Serve

INFO = b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}\r\n'


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[str]:
    """Run a server that does what it is told with each connection and then closes it; yield its URL."""
    async with tcp.serving(serve) as port:
        yield f"nats://127.0.0.1:{port}"


async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Do what a server does until a client is in."""
    writer.write(INFO)
    await reader.readuntil(b"PING\r\n")
    writer.write(b"PONG\r\n")
