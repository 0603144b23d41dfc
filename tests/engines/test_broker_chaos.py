"""Crowds of clients with random lives at real brokers, while everything fails: the same as over memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import chaos
from tests.support.brokers import Broker, BrokerMissing, JetStreamServer, PostgresServer, RedisServer
from tests.support.brokers.redis_groups import RedisSentinel
from tests.support.chaos import BrokerWorld, Story, nodes_at
from tests.support.servers import eventually
from wsbroadcast import Delivery, History, Presence, SlowConsumer
from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.options import Timing

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
SECONDS = 20.0 if FULL else 2.0
CLIENTS = 60 if FULL else 30
SEEDS = range(5) if FULL else range(1)
MESSAGES = 60

# Nodes come back soon, so that much can happen in little time.
TIMING = Timing(linger=0.05, max_backoff=0.1)

World = AbstractAsyncContextManager[BrokerWorld]
Worlds = Callable[..., World]


def at_broker(kind: Callable[[], Broker], engine: Callable[..., KeepingEngine]) -> Callable[..., World]:
    @asynccontextmanager
    async def at(directory: Path, **options: Any) -> AsyncIterator[BrokerWorld]:
        try:
            server = kind()
        except BrokerMissing as missing:
            pytest.skip(str(missing))
        with server:
            async with nodes_at(server, lambda url: engine(url, timing=TIMING), server.restarted, **options) as world:
                yield world

    return at


@asynccontextmanager
async def at_file(directory: Path, **options: Any) -> AsyncIterator[BrokerWorld]:
    path = directory / "messages.db"

    def remove() -> None:
        for each in directory.glob("messages.db*"):
            if each.is_file():
                each.unlink()

    async def replace() -> None:
        await asyncio.to_thread(remove)

    async with nodes_at(None, lambda _: SQLiteEngine(path, timing=TIMING), replace, **options) as world:
        yield world


WORLDS = {
    "redis": at_broker(RedisServer, RedisEngine),
    "jetstream": at_broker(JetStreamServer, NATSEngine),
    "postgres": at_broker(PostgresServer, PostgresEngine),
    "sqlite": at_file,
}


@pytest.fixture(params=WORLDS)
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Worlds:
    def make(**options: Any) -> World:
        return WORLDS[request.param](tmp_path, history=History(messages=MESSAGES), **options)

    return make


async def run(world: BrokerWorld, seed: int, **options: Any) -> Story:
    story = await chaos.run(world, seed, messages=MESSAGES, seconds=SECONDS, clients=CLIENTS, **options)
    print(dict(story.seen))
    print(story.holes)
    assert world.was_lossy
    assert story.seen["cut"] > 5
    return story


@pytest.mark.parametrize("seed", SEEDS)
async def test_logs_are_unbroken_or_say_where_they_aren_t(nodes: Worlds, seed: int) -> None:
    async with nodes(seed=seed) as world:
        story = await run(world, seed)
    assert story.wrong == {}
    assert story.seen["recovered"] > 20


@pytest.mark.parametrize("seed", SEEDS)
async def test_logs_are_unbroken_with_hooks_and_small_backlogs(nodes: Worlds, seed: int) -> None:
    async with nodes(seed=seed, slow_consumer=SlowConsumer(max_backlog_messages=16)) as world:
        for manager in world.managers:
            manager.on_deliver(ponder)
        story = await run(world, seed + 1000)
    assert story.wrong == {}
    assert story.seen["recovered"] > 20


@pytest.mark.parametrize("seed", SEEDS)
async def test_all_holds_with_history_presence_hooks_and_deploys_together(nodes: Worlds, seed: int) -> None:
    hooks = chaos.Hooks()
    options = {"presence": Presence(grace=0.2), "slow_consumer": SlowConsumer(max_backlog_messages=16)}
    async with nodes(seed=seed, hooks=[hooks], **options) as world:
        world.deploys = 0.1
        story = await run(world, seed + 2000, users=CLIENTS // 3)
    assert story.wrong == {}
    assert story.seen["recovered"] > 20
    assert story.seen["deployed"] > 1
    assert min(hooks.joined, hooks.left, hooks.delivered) > 0


async def ponder(delivery: Delivery) -> None:
    await asyncio.sleep(0)
    if str(delivery.message.data).endswith("7"):
        delivery.recipients.clear()


@pytest.mark.parametrize("seed", SEEDS)
async def test_logs_are_unbroken_over_a_failover(own_sentinel: RedisSentinel, seed: int) -> None:
    url = f"redis+sentinel://{own_sentinel.sentinel.host}:{own_sentinel.sentinel.port}/{own_sentinel.service}"

    def is_replica_promoted() -> bool:
        address = own_sentinel.address
        return address == (own_sentinel.replica.host, own_sentinel.replica.port)

    async def fail_over() -> None:
        await own_sentinel.primary.killed()
        await eventually(lambda: asyncio.to_thread(is_replica_promoted), timeout=20)

    def make(_: str) -> KeepingEngine:
        return RedisEngine(url, timing=TIMING)

    async with nodes_at(None, make, fail_over, seed=seed, history=History(messages=MESSAGES)) as world:
        story = await run(world, seed)
    assert story.wrong == {}
    assert story.seen["gap: epoch"] + story.seen["refused: epoch"] > 0
