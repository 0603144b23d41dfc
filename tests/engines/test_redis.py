"""The Redis engine as a whole: two nodes and a real Redis, one that sentinels name, or a cluster."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import redis.asyncio
from redis.crc import key_slot

from tests.engines.redis_links import skip_without_shards
from tests.support.brokers import BrokerMissing, Endpoint, RedisServer, free_port
from tests.support.brokers.redis_groups import RedisSentinel, redis_cluster, redis_sentinel
from wsbroadcast import ConfigurationError, EngineUnavailable, MessageTooLarge
from wsbroadcast.audience import Audience
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.contract import Engine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.redis.options import SCHEMES
from wsbroadcast.testing import EngineContract, HistoryContract, Node, PresenceContract, Recorder

NEWS = Audience("channel", "news")
NAME = "wsbroadcast:channel:news"

OwnRedis = Callable[..., RedisServer]


@asynccontextmanager
async def running(*engines: RedisEngine, seconds: float = 10.0) -> AsyncIterator[list[Node]]:
    """Start engines and let each want the news."""
    nodes = [Node(engine, Recorder(), seconds) for engine in engines]
    try:
        for node in nodes:
            await node.engine.start(node.recorder)
            await node.join(NEWS)
        yield nodes
    finally:
        for engine in engines:
            await engine.aclose()


async def both_hear(nodes: list[Node], *before: str) -> None:
    """Each publishes, all receive."""
    expected: list[str | bytes] = list(before)
    for number, node in enumerate(nodes):
        await node.publish(f"{number}")
        expected.append(f"{number}")
        for other in nodes:
            await other.receives(expected)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    try:
        with redis_cluster() as nodes:
            yield f"redis+cluster://{','.join(f'{node.host}:{node.port}' for node in nodes)}"
    except BrokerMissing as missing:
        pytest.skip(str(missing))


class TestCluster(PresenceContract, HistoryContract, EngineContract):
    """A cluster does everything that a single Redis does."""

    node_count = 2

    @pytest.fixture(autouse=True)
    def _place(self, cluster: str, prefix: str) -> None:
        self.url = f"{cluster}?prefix={prefix}"

    def make_engine(self) -> Engine:
        return RedisEngine.from_url(self.url)


@pytest.fixture(scope="module")
def sentinel() -> Iterator[str]:
    try:
        with redis_sentinel() as group:
            yield f"redis+sentinel://{group.sentinel.host}:{group.sentinel.port}/{group.service}"
    except BrokerMissing as missing:
        pytest.skip(str(missing))


class TestSentinel(PresenceContract, HistoryContract, EngineContract):
    """So does a Redis that sentinels name."""

    node_count = 2

    @pytest.fixture(autouse=True)
    def _place(self, sentinel: str, prefix: str) -> None:
        self.url = f"{sentinel}?prefix={prefix}"

    def make_engine(self) -> Engine:
        return RedisEngine.from_url(self.url)


async def test_nodes_hear_each_other_whichever_way_they_come_in(own_redis: OwnRedis) -> None:
    server = own_redis(password="pw")
    async with redis.asyncio.Redis(host=server.host, port=server.port, password="pw") as client:
        engines = [RedisEngine(server.url), RedisEngine.from_url(server.unix_url), RedisEngine(client=client)]
        async with running(*engines) as nodes:
            await both_hear(nodes)
            assert len(server.command("PUBSUB", "CHANNELS")) == 1 + len(nodes)  # the news, and each node's own
    assert server.command("PUBSUB", "CHANNELS") == []


async def test_nodes_hear_each_other_over_tls(own_redis: OwnRedis) -> None:
    server = own_redis(tls=True)
    url = f"{server.url}?ssl_ca_certs={server.ca}"
    async with running(RedisEngine(url), RedisEngine(url)) as nodes:
        await both_hear(nodes)


async def test_prefix_keeps_apps_apart(redis_server: Endpoint, prefix: str) -> None:
    engines = [RedisEngine(redis_server.url, prefix=f"{prefix}-{number}") for number in range(2)]
    async with running(*engines) as (one, other):
        await one.publish("1")
        await other.publish("2")
        await one.receives(["1"])
        await other.receives(["2"])


async def test_nodes_follow_the_sentinels(own_sentinel: RedisSentinel) -> None:
    url = f"redis+sentinel://{own_sentinel.sentinel.host}:{own_sentinel.sentinel.port}/{own_sentinel.service}"
    async with running(RedisEngine(url), RedisEngine(url), seconds=20) as nodes:
        await both_hear(nodes)
        await own_sentinel.primary.killed()
        for node in nodes:
            assert await node.recorder.wait_until(lambda: node.recorder.gaps, node.seconds)  # noqa: B023
        await both_hear(nodes, "0", "1")
        assert [len(node.recorder.gaps) for node in nodes] == [1, 1]
        assert NAME in own_sentinel.replica.command("PUBSUB", "CHANNELS")


async def test_nodes_follow_a_slot_that_moves(own_cluster: list[RedisServer]) -> None:
    servers = own_cluster
    skip_without_shards(servers[0])
    url = f"redis+cluster://{servers[0].host}:{servers[0].port}"
    async with running(RedisEngine(url), RedisEngine(url)) as nodes:
        await both_hear(nodes)
        slot = key_slot(NAME.encode())
        target = next(server for server in servers if subscribers(server) == 0)
        there = target.command("CLUSTER", "MYID")
        for server in (target, *(server for server in servers if server is not target)):
            server.command("CLUSTER", "SETSLOT", slot, "NODE", there)
        for node in nodes:
            assert await node.recorder.wait_until(lambda: node.recorder.gaps, node.seconds)  # noqa: B023
        await both_hear(nodes, "0", "1")
        assert subscribers(target) == len(nodes)


def subscribers(server: RedisServer) -> int:
    count: int = server.command("PUBSUB", "SHARDNUMSUB", NAME)[1]
    return count


async def test_message_that_would_cut_off_every_node_is_refused(redis_server: Endpoint, prefix: str) -> None:
    async with running(RedisEngine(redis_server.url, prefix=prefix)) as (node,):
        with pytest.raises(MessageTooLarge):
            await node.publish(bytes(24 * 1024**2))
        await both_hear([node])
        assert node.recorder.gaps == []


async def test_engine_that_is_refused_does_not_start(own_redis: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    server = own_redis(
        password="main", users=["app on >secret resetchannels &other:* +publish +subscribe +unsubscribe"]
    )
    needs = "who needs &wsbroadcast:"
    for login, advice in (("app:wr0ng", "check user and"), ("app:secret", needs), (":wr0ng", "check user and")):
        engine = create_engine(f"redis://{login}@{server.host}:{server.port}")
        with pytest.raises(
            ConfigurationError, match=rf"Redis at 127\.0\.0\.1:{server.port} refuses the user .*{advice}"
        ) as raised:
            await engine.start(Recorder())
        for secret in ("wr0ng", "secret"):
            assert secret not in str(raised.value)
            assert secret not in caplog.text


async def test_engine_without_redis_starts_unless_told_to_fail(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    place = f"127.0.0.1:{free_port()}"
    engine = create_engine(f"redis://app:secret@{place}?fail_fast=true")
    with pytest.raises(EngineUnavailable, match=f"redis at {place} can't be reached"):
        await engine.start(Recorder())
    engine = create_engine(f"redis://app:secret@{place}")
    await engine.start(Recorder())
    assert not (await engine.health()).is_ok
    await engine.aclose()
    assert "secret" not in caplog.text


async def test_garbage_in_redis_is_dropped(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        for garbage in ("", "\x80\x04N.", "[" * 10_000, "x" * 1_000_000, '{"v":99}'):
            server.command("PUBLISH", NAME, garbage)
        await both_hear([node])
        assert sum(node.engine.stats().bad_envelopes.values()) == 5
        assert node.recorder.gaps == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_makes_an_engine(scheme: str) -> None:
    place = {"unix": "/run/redis.sock", "sentinel": "localhost/main"}.get(scheme.rpartition("+")[2], "localhost")
    assert RedisEngine.from_url(f"{scheme}://{place}?prefix=shop").names.of(NEWS) == "shop:channel:news"
