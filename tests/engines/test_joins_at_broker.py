"""Joining, leaving and publishing from elsewhere, at the speed of real brokers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.support.asgi import Peer
from tests.support.brokers import Endpoint, RedisServer
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.options import Timing

NAMES = (
    "*",
    ">",
    "a.>",
    "a.*",
    "news[a-z]",
    "newsb",
    '"; DROP TABLE x; --',
    "😀" * 50,
    "News",
    "news",
    "a b",
    "é",
    "e\u0301",
)


@pytest.fixture(params=["redis", "nats", "postgres"])
def url(request: pytest.FixtureRequest, prefix: str) -> str:
    endpoint: Endpoint = request.getfixturevalue(f"{request.param}_server")
    return f"{endpoint.url}{'&' if '?' in endpoint.url else '?'}prefix={prefix}"


@asynccontextmanager
async def two_nodes(url: str) -> AsyncIterator[tuple[ConnectionManager, ConnectionManager]]:
    async with ConnectionManager(url) as here, ConnectionManager(url) as there:
        yield here, there


async def test_whoever_has_joined_misses_nothing_that_is_published_elsewhere(url: str) -> None:
    async with two_nodes(url) as (here, there):
        peer = Peer()
        connection = await here.connect(peer.websocket)
        for number in range(1000):
            channel = f"room-{number}"
            await here.subscribe(connection, channel)
            await there.broadcast(channel, channel=channel)
            assert (await peer.wait_messages(number + 1))[-1] == channel
            await here.unsubscribe(connection, channel)


async def test_every_name_reaches_exactly_itself(url: str) -> None:
    async with two_nodes(url) as (here, there):
        peers = {name: Peer() for name in NAMES}
        for name, peer in peers.items():
            await here.connect(peer.websocket, channels=[name])
        for name in NAMES:
            await there.broadcast(f"for {name}", channel=name)
        await there.broadcast("end")
        for name, peer in peers.items():
            assert await peer.wait_messages(2) == [f"for {name}", "end"]


async def test_flapping_over_a_slow_network_ends_as_wanted(own_redis: Callable[..., RedisServer], prefix: str) -> None:
    redis = own_redis()
    async with FaultProxy(redis) as proxy:
        engine = RedisEngine(proxy.url, prefix=prefix, timing=Timing(linger=0.02))
        async with ConnectionManager(engine) as manager:
            proxy.delay(0.05)
            connections = [await manager.connect(Peer().websocket) for _ in range(100)]
            dice = random.Random(4)  # the same flaps each time

            async def flap(number: int) -> None:
                for _ in range(100):
                    channel = f"c{(number + dice.randrange(3)) % 100}"
                    if dice.random() < 0.1:
                        await manager.subscribe(connections[number], channel)
                    else:
                        joining = asyncio.create_task(manager.subscribe(connections[number], channel))
                        await asyncio.sleep(0)
                        joining.cancel()
                        await asyncio.wait([joining])
                    await manager.unsubscribe(connections[number], channel)

            await asyncio.gather(*map(flap, range(100)))
            await manager.subscribe(connections[0], "c0", "c1")
            wanted = {f"{prefix}:{name}".encode() for name in ("everyone", "channel:c0", "channel:c1")}
            await eventually(lambda: _holds(redis, prefix, wanted), timeout=10)
            for connection in connections:
                manager.disconnect(connection)
            await eventually(lambda: _holds(redis, prefix, set()), timeout=10)
    assert await _holds(redis, prefix, set())


async def _holds(redis: RedisServer, prefix: str, wanted: set[bytes]) -> bool:
    reply = await asyncio.to_thread(redis.command, "PUBSUB", "CHANNELS", f"{prefix}:*")
    held = {name if isinstance(name, bytes) else str(name).encode() for name in reply}
    return {name for name in held if b":node:" not in name} == wanted
