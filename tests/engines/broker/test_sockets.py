"""Closing with a reset, on real sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme

from wsbroadcast.engines.broker.link import no_linger, reset

# More than the kernel takes while nobody reads.
MUCH = bytes(50_000_000)

Ends = tuple[asyncio.StreamWriter, asyncio.StreamReader]


@asynccontextmanager
async def connected(kind: str, directory: Path) -> AsyncIterator[Ends]:
    """A connection: the end that writes, and the one that reads."""
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait((reader, writer))

    if kind == "unix":
        server = await asyncio.start_unix_server(accept, directory / "socket")
        _, writer = await asyncio.open_unix_connection(directory / "socket")
    else:
        ours, theirs = _tls() if kind == "tls" else (None, None)
        server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=theirs)
        host, port = server.sockets[0].getsockname()
        _, writer = await asyncio.open_connection(host, port, ssl=ours, server_hostname="localhost" if ours else None)
    reader, other = await accepted.get()
    try:
        yield writer, reader
    finally:
        server.close()
        for transport in (writer.transport, other.transport):
            transport.abort()
        await asyncio.sleep(0)


def _tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(ours)
    authority.issue_cert("localhost").configure_cert(theirs)
    return ours, theirs


async def _heard(reader: asyncio.StreamReader) -> int:
    heard = 0
    while data := await reader.read(65536):
        heard += len(data)
    return heard


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_reset_sends_nothing_that_still_waits(kind: str, tmp_path: Path) -> None:
    async with connected(kind, tmp_path) as (writer, reader):
        writer.write(MUCH)
        reset(writer.transport)
        with pytest.raises(ConnectionResetError):
            await _heard(reader)


async def test_reset_only_closes_a_unix_socket(tmp_path: Path) -> None:
    async with connected("unix", tmp_path) as (writer, reader):
        writer.write(MUCH)
        reset(writer.transport)
        assert await _heard(reader) < len(MUCH)


@pytest.mark.parametrize("kind", ["tcp", "tls"])
async def test_no_linger_makes_every_close_a_reset(kind: str, tmp_path: Path) -> None:
    async with connected(kind, tmp_path) as (writer, reader):
        no_linger(writer.transport)
        writer.transport.abort()
        with pytest.raises(ConnectionResetError):
            await _heard(reader)


@pytest.mark.parametrize("kind", ["tcp", "tls", "unix"])
async def test_reset_can_be_repeated_at_any_time(kind: str, tmp_path: Path) -> None:
    async with connected(kind, tmp_path) as (writer, _):
        for _ in range(5):
            reset(writer.transport)
            writer.close()  # as drivers do, who don't know of it
            await asyncio.sleep(0)
        assert writer.transport.is_closing()


async def test_reset_takes_a_transport_that_has_no_socket_and_can_not_abort() -> None:
    class Plain(asyncio.BaseTransport):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    transport = Plain()
    reset(transport)
    assert transport.is_closed
