"""A broker that takes no message any more, although it lets us in: what `broadcast` raises then, and that it heals."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis

from tests.support.asgi import Peer
from tests.support.brokers import Endpoint, NATSServer, RedisServer
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager, EngineUnavailable

SAYS = "nothing was sent"


class App:
    """A manager with somebody in a channel."""

    def __init__(self, url: str) -> None:
        self.manager = ConnectionManager(url)
        self.peer = Peer()

    async def refuses(self, why: str, message: str = "lost") -> None:
        """The documented error comes, at first and when the engine itself has noticed; local broadcasts go on."""
        with pytest.raises(EngineUnavailable, match=rf"(?s){why}.*{SAYS}"):
            await self.manager.broadcast(message, channel="news")
        await self.manager.broadcast_local("local", channel="news")

    async def is_ill(self, why: str = "") -> None:
        """Wait until the engine has noticed, and says why."""

        async def told() -> bool:
            health = await self.manager.health()
            return not health.is_ok and re.search(why, health.detail) is not None

        await eventually(told, timeout=10)

    async def heals(self, message: str = "again") -> None:
        """Wait until a broadcast arrives."""

        async def arrives() -> bool:
            with suppress(EngineUnavailable):
                await self.manager.broadcast(message, channel="news")
            return message in self.peer.messages

        await eventually(arrives, timeout=10)
        assert "lost" not in self.peer.messages


@asynccontextmanager
async def app(url: str) -> AsyncIterator[App]:
    app = App(url)
    async with app.manager:
        await app.manager.connect(app.peer.websocket, channels=["news"])
        await app.manager.broadcast("first", channel="news")
        assert await app.peer.wait_messages(1) == ["first"]
        yield app


async def test_redis_that_takes_publish_back(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(users=["app on >pw resetchannels &wsbroadcast:* +publish +subscribe +unsubscribe"])
    async with app(f"redis://app:pw@{server.host}:{server.port}") as node:
        server.command("ACL", "SETUSER", "app", "-publish")
        await node.refuses("'app' .NOPERM")
        await node.is_ill()
        await node.refuses("'app' .NOPERM")
        server.command("ACL", "SETUSER", "app", "+publish")
        await node.heals()


async def test_redis_that_takes_a_channel_back(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(users=["app on >pw resetchannels &wsbroadcast:* +publish +subscribe +unsubscribe"])
    async with app(f"redis://app:pw@{server.host}:{server.port}") as node:
        server.command("ACL", "SETUSER", "app", "resetchannels", "&other:*")
        await node.is_ill(
            "^ConfigurationError: .*NOPERM"
        )  # Redis ends connections that are subscribed to what is forbidden now
        await node.refuses("'app' .NOPERM")
        server.command("ACL", "SETUSER", "app", "&wsbroadcast:*")
        await node.heals()


async def test_redis_that_is_busy_with_a_script(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(config={"lua-time-limit": "1"})
    async with app(server.url) as node:
        running = asyncio.ensure_future(asyncio.to_thread(run_for_ever, server))

        async def is_busy() -> bool:
            try:
                await asyncio.to_thread(server.command, "GET", "x")
            except redis.RedisError as error:
                return "BUSY" in str(error)
            return False

        await eventually(is_busy)
        await node.refuses("answers BUSY")
        server.command("SCRIPT", "KILL")
        await running
        await node.heals()


def run_for_ever(server: RedisServer) -> None:
    with suppress(redis.RedisError):
        server.command("EVAL", "while true do end", 0)


async def test_nats_that_takes_publish_back(own_nats: Callable[..., NATSServer]) -> None:
    allowed = 'publish: ["wsbroadcast.>"], subscribe: ["wsbroadcast.>"]'
    server = own_nats(
        config=f"authorization {{ users: [ {{user: app, password: pw, permissions: {{ {allowed} }}}} ] }}"
    )
    config = server.directory / "nats.conf"

    def allow(before: str, after: str) -> None:
        config.write_text(config.read_text().replace(before, after))
        assert server._process is not None
        server._process.send_signal(signal.SIGHUP)

    async with app(f"nats://app:pw@{server.host}:{server.port}") as node:
        allow('publish: ["wsbroadcast.>"]', 'publish: ["wsbroadcast.node.>"]')

        async def is_forbidden() -> bool:
            try:
                await node.manager.broadcast("first", channel="news")
            except EngineUnavailable:
                return True
            return False

        await eventually(is_forbidden)
        await node.refuses("doesn't let the user 'app' publish to 'wsbroadcast.channel.news'")
        assert (await node.manager.health()).is_ok  # its echo still comes back
        allow('publish: ["wsbroadcast.node.>"]', 'publish: ["wsbroadcast.>"]')
        await node.heals()


@asynccontextmanager
async def role(server: Endpoint, prefix: str) -> AsyncIterator[tuple[str, Callable[[str], Awaitable[Any]]]]:
    """A database of its own with a role that owns nothing; yields its URL, and how to run what an owner may."""
    place = server.url.rpartition("/")[0]
    owner = await asyncpg.connect(server.url)
    await owner.execute(f"CREATE DATABASE {prefix}")
    await owner.execute(f"CREATE ROLE {prefix} LOGIN SUPERUSER")
    connection = await asyncpg.connect(f"{place}/{prefix}")
    try:
        parts = urlsplit(server.url)
        yield f"postgresql://{prefix}@{parts.hostname}:{parts.port}/{prefix}?prefix={prefix}", connection.execute
    finally:
        await connection.close()
        await owner.execute(f"DROP DATABASE {prefix} WITH (FORCE)")
        await owner.execute(f"DROP ROLE {prefix}")
        await owner.close()


LARGE = "lost" * 5000


async def test_postgres_that_became_read_only(postgres_server: Endpoint, prefix: str) -> None:
    async with role(postgres_server, prefix) as (url, run), app(url) as node:
        await node.heals("x" * 20_000)  # by the table
        await run(f"ALTER ROLE {prefix} SET default_transaction_read_only = on")
        await run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{prefix}'")
        await node.is_ill()
        await node.heals()
        await node.refuses("read-only transaction", LARGE)
        await node.heals("small ones go on")


async def test_postgres_that_takes_pg_notify_back(postgres_server: Endpoint, prefix: str) -> None:
    async with role(postgres_server, prefix) as (url, run), app(url) as node:
        await run(f"ALTER ROLE {prefix} NOSUPERUSER")
        await run("REVOKE EXECUTE ON FUNCTION pg_notify FROM PUBLIC")
        await node.refuses("permission denied for function pg_notify")
        await node.is_ill()
        await node.refuses("permission denied for function pg_notify")
        await run("GRANT EXECUTE ON FUNCTION pg_notify TO PUBLIC")
        await node.heals()


async def test_postgres_whose_role_may_not_make_the_table(postgres_server: Endpoint, prefix: str) -> None:
    async with role(postgres_server, prefix) as (url, run), app(url) as node:
        await run(f"ALTER ROLE {prefix} NOSUPERUSER")
        await run("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        await node.refuses("permission denied for schema public.*an administrator has to run: ", LARGE)
        await node.heals()


async def test_postgres_whose_statements_time_out(postgres_server: Endpoint, prefix: str) -> None:
    async with role(postgres_server, prefix) as (url, run), app(url) as node:
        await node.heals("x" * 20_000)
        await run(f"ALTER ROLE {prefix} SET statement_timeout = '200ms'")
        await run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{prefix}'")
        await node.is_ill()
        await node.heals()
        await run(f"BEGIN; LOCK TABLE {prefix}_spill")
        await node.refuses("canceling statement due to statement timeout", LARGE)
        await run("COMMIT")
        await node.heals("y" * 20_000)
