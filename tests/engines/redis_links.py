"""What the tests of Redis links share: a server that answers as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.support.brokers import RedisServer
from tests.support.tcp import serving
from wsbroadcast.engines.redis.protocol import ReplyReader

_CONFIRMATION = b"*3\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n:1\r\n"

Answer = Callable[[list[bytes]], bytes]


@asynccontextmanager
async def fake_redis(answer: Answer) -> AsyncIterator[str]:
    """Run a server that gives `answer(command)` to each command; yields its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        commands = ReplyReader()  # a command has the form of a reply
        while data := await reader.read(65536):
            for command in commands.feed(data):
                assert isinstance(command, list)
                writer.write(answer([part for part in command if isinstance(part, bytes)]))

    async with serving(serve) as port:
        yield f"127.0.0.1:{port}"


def skip_without_shards(server: RedisServer) -> None:
    """Skip where the server has no sharded pub/sub; the link does without."""
    version = server.command("INFO", "server")["redis_version"]
    if int(str(version).partition(".")[0]) < 7:
        pytest.skip(f"Redis {version} has no sharded pub/sub, which came with 7")


def obliging(command: list[bytes]) -> bytes:
    """Answer like a Redis that has nothing to do."""
    match [part.lower() for part in command]:
        case [(b"subscribe" | b"unsubscribe" | b"ssubscribe" | b"sunsubscribe") as verb, *_] if len(command) > 1:
            names = command[1:]
            return b"".join(_CONFIRMATION % (len(verb), verb, len(name), name) for name in names)
        case [b"publish" | b"spublish", *_]:
            return b":0\r\n"
        case [b"get", *_]:
            return b"$-1\r\n"
        case [b"ping"]:
            return b"+PONG\r\n"
        case [b"sunsubscribe"]:
            return b"*3\r\n$12\r\nsunsubscribe\r\n$-1\r\n:0\r\n"
    return b"+OK\r\n"
