"""The link to a Redis Cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis
import trustme
from redis.crc import key_slot

from tests.engines.links import Used, open_once, used
from tests.engines.redis_links import fake_redis, obliging, skip_without_shards
from tests.support.brokers import BrokerMissing, RedisServer, free_port
from tests.support.brokers.redis_groups import redis_cluster
from tests.support.servers import eventually
from wsbroadcast import Audience, ConfigurationError, EngineUnavailable, Message, Publication
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.redis.cluster import ClusterLink
from wsbroadcast.options import Timing
from wsbroadcast.testing import Recorder

COMMANDS = ["+spublish", "+ssubscribe", "+sunsubscribe", "+ping", "+cluster|slots"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[RedisServer]]:
    """A cluster that the tests share which only use it."""
    try:
        with redis_cluster() as nodes:
            yield nodes
    except BrokerMissing as missing:
        pytest.skip(str(missing))


def url_of(nodes: Sequence[RedisServer]) -> str:
    return f"redis+cluster://{','.join(f'{node.host}:{node.port}' for node in nodes)}"


def node_of(nodes: Sequence[RedisServer], name: str) -> RedisServer:
    return nodes[((key_slot(name.encode()) + 1) * len(nodes) - 1) // 16384]  # as `redis_cluster` shares them out


def name_at(nodes: Sequence[RedisServer], node: RedisServer, prefix: str = "name") -> str:
    return next(name for number in range(1000) if node_of(nodes, name := f"{prefix}:{number}") is node)


async def hello(used_link: Used, *names: str) -> None:
    assert await used_link.link.publish([Parcel(name, b"hello") for name in names]) == [None] * len(names)


async def test_every_name_has_the_node_of_its_slot(cluster: list[RedisServer], prefix: str) -> None:
    skip_without_shards(cluster[0])
    names = [f"{prefix}:{number}" for number in range(300)]
    async with used(url_of(cluster), *names) as one, used(url_of(cluster[:1]), *names) as other:
        for node in cluster:
            mine = {name for name in names if node_of(cluster, name) is node}
            held = {name for name in node.command("PUBSUB", "SHARDCHANNELS") if name.startswith(prefix)}
            assert held == mine
            assert node.command("PUBSUB", "CHANNELS") == []
        await hello(one, *names)
        await other.link.publish([Parcel(name, b"end") for name in names])
        for letters in (one.letters, other.letters):
            await eventually(lambda: _equals(len(letters.taken), 2 * len(names)))  # noqa: B023
            for name in names:
                assert [envelope for at, envelope in letters.taken if at == name] == [b"hello", b"end"]
        await one.link.subscribe([])
        await one.link.unsubscribe(names)
        await other.link.unsubscribe(names)
        assert [node.command("PUBSUB", "SHARDCHANNELS") for node in cluster] == [[], [], []]


async def test_names_with_a_hash_tag_go_where_the_cluster_wants_them(cluster: list[RedisServer], prefix: str) -> None:
    names = [f"{prefix}:{{{number % 5}}}:{number}" for number in range(50)]
    async with used(url_of(cluster), *names) as used_link:
        await hello(used_link, *names)
        await eventually(lambda: _equals(len(used_link.letters.taken), len(names)))


async def test_one_known_node_is_enough(cluster: list[RedisServer], prefix: str) -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()},{cluster[2].host}:{cluster[2].port}"
    names = [name_at(cluster, node, prefix) for node in cluster]
    async with used(url, *names) as used_link:
        await hello(used_link, *names)
        await eventually(lambda: _equals(len(used_link.letters.taken), len(names)))


async def test_client_of_a_cluster_is_taken(cluster: list[RedisServer], prefix: str) -> None:
    async with redis.asyncio.RedisCluster(host=cluster[0].host, port=cluster[0].port) as client:
        await client.set("a", "b")
        async with used(RedisEngine(client=client), f"{prefix}:a") as used_link:
            await hello(used_link, f"{prefix}:a")
            await used_link.letters.until(b"hello")
        assert await client.get("a") == b"b"


async def test_link_goes_over_tls(tls_cluster: list[RedisServer], tmp_path: Path) -> None:
    first, url = tls_cluster[0], url_of(tls_cluster).replace("redis", "rediss", 1)
    names = [name_at(tls_cluster, node) for node in tls_cluster]
    client = redis.asyncio.RedisCluster(host=first.host, port=first.port, ssl=True, ssl_ca_certs=str(first.ca))
    engines = RedisEngine(f"{url}?ssl_ca_certs={first.ca}"), RedisEngine(client=client)
    async with client, used(engines[0], *names) as one, used(engines[1], *names) as other:
        await hello(one, *names)
        for used_link in (one, other):
            await eventually(lambda: _equals(len(used_link.letters.taken), len(names)))  # noqa: B023
        await tls_cluster[1].killed()
        assert isinstance(await one.lost(), OSError)
    stranger = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    with pytest.raises(ConfigurationError, match="has a certificate that isn't trusted"):
        await open_once(f"{url}?ssl_ca_certs={stranger}")


async def test_order_of_a_name_is_kept(cluster: list[RedisServer], prefix: str) -> None:
    names = [f"{prefix}:{number}" for number in range(7)]
    async with used(url_of(cluster), *names) as used_link:
        sent = [Parcel(names[number % 7], b"%d" % number) for number in range(1400)]
        for start in range(0, 1400, 100):
            assert await used_link.link.publish(sent[start : start + 100]) == [None] * 100
        await eventually(lambda: _equals(len(used_link.letters.taken), 1400))
        for name in names:
            assert [each for each in used_link.letters.taken if each[0] == name] == [
                each for each in sent if each[0] == name
            ]


async def test_documented_permissions_are_enough(cluster: list[RedisServer], prefix: str) -> None:
    skip_without_shards(cluster[0])
    needed = ["resetchannels", f"&{prefix}:*", *COMMANDS]
    url = url_of(cluster).replace("://", f"://{prefix}:secret@") + f"?prefix={prefix}"
    for node in cluster:
        node.command("ACL", "SETUSER", prefix, "on", ">secret", *needed)
    names = [name_at(cluster, node, prefix) for node in cluster]
    async with used(RedisEngine.from_url(url), *names) as used_link:
        assert isinstance(used_link.link, ClusterLink)
        await hello(used_link, *names)
    for node in cluster:
        node.command("ACL", "SETUSER", prefix, "-sunsubscribe", "+publish", "+subscribe", "+unsubscribe")
    with pytest.raises(ConfigurationError, match="'sunsubscribe'"):  # else some nodes would speak past the others
        await open_once(url)
    for node in cluster:
        node.command("ACL", "SETUSER", prefix, "+sunsubscribe", "-publish", "-subscribe", "-unsubscribe")
    # Each node has an ACL of its own.
    cluster[1].command("ACL", "SETUSER", prefix, "-spublish")
    with pytest.raises(
        ConfigurationError, match=rf"{cluster[1].port} refuses the user .*needs &{prefix}:\* \+spublish"
    ):
        await open_once(url)
    cluster[1].command("ACL", "DELUSER", prefix)
    with pytest.raises(ConfigurationError, match="invalid username-password"):
        await open_once(url)


async def test_names_that_are_forbidden_cost_the_others_nothing(cluster: list[RedisServer], prefix: str) -> None:
    skip_without_shards(cluster[0])
    rules = [f"&{prefix}:{names}*" for names in ("probe", "node:", "channel:ok")]
    for node in cluster:
        node.command("ACL", "SETUSER", prefix, "on", ">secret", "resetchannels", *rules, "-@all", *COMMANDS)
    url = f"{url_of(cluster).replace('://', f'://{prefix}:secret@')}?prefix={prefix}"
    engine, node_of_ours = RedisEngine.from_url(url), Recorder()
    good, bad = ([Audience("channel", f"{kind}{number}") for number in range(12)] for kind in ("ok", "bad"))
    await engine.start(node_of_ours)
    try:
        engine.subscribe([audience for pair in zip(good, bad, strict=True) for audience in pair])
        await engine.confirmed(good)
        for audience in bad:
            with pytest.raises(EngineUnavailable, match="NOPERM"):
                await engine.confirmed([audience])
        for audience in good:
            await engine.publish(Publication(Message.of(audience.name), audience))
        await eventually(lambda: _equals(len(node_of_ours.publications), len(good)))
        assert (node_of_ours.gaps, engine.stats().reconnects, engine.stats().gaps) == ([], 0, 0)
    finally:
        await engine.aclose()


async def test_single_redis_is_no_cluster(redis_server: RedisServer) -> None:
    with pytest.raises(ConfigurationError, match="cluster support disabled: is it a cluster"):
        await open_once(url_of([redis_server]))


async def test_no_node_at_all_can_not_be_reached() -> None:
    with pytest.raises(redis.ConnectionError):
        await open_once(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{free_port()}")


async def test_slot_that_moves_loses_the_link_and_the_next_finds_it(own_cluster: list[RedisServer]) -> None:
    nodes = own_cluster
    skip_without_shards(nodes[0])
    name = name_at(nodes, nodes[0])
    slot = key_slot(name.encode())
    there = nodes[1].command("CLUSTER", "MYID")
    async with used(url_of(nodes), name) as subscriber, used(url_of(nodes)) as publisher:
        for node in (nodes[1], nodes[0], nodes[2]):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", there)
        assert "ended a subscription" in str(await subscriber.lost())
        with pytest.raises(ConnectionError, match="MOVED"):
            await publisher.link.publish([Parcel(name, b"hello")])
    async with used(url_of(nodes), name) as used_link:
        await hello(used_link, name)
        await used_link.letters.until(b"hello")
        assert nodes[1].command("PUBSUB", "SHARDCHANNELS") == [name]


async def test_lost_node_loses_the_link(own_cluster: list[RedisServer]) -> None:
    async with used(url_of(own_cluster), "a") as used_link:
        await own_cluster[1].killed()
        assert isinstance(await used_link.lost(), OSError)
    with pytest.raises(redis.ConnectionError):
        await open_once(url_of(own_cluster))
    await own_cluster[1].started()

    async def is_back() -> bool:
        try:
            async with used(url_of(own_cluster), "a") as used_link:
                await hello(used_link, "a")
                await used_link.letters.until(b"hello")
        except OSError:  # from Redis 8 on a node that has just begun says for a while that the cluster is down
            return False
        return True

    await eventually(is_back, timeout=20)


async def test_node_that_hangs_is_noticed_although_nothing_is_sent_to_it(cluster: list[RedisServer]) -> None:
    link = RedisEngine(url_of(cluster), timing=Timing(probe_interval=0.1, request_timeout=0.5)).new_link()
    before = _pings(cluster[1])
    async with used(link, "a") as used_link:
        await eventually(lambda: _equals(_pings(cluster[1]) - before > 2, True))  # it answers, subscribed or not
        assert not used_link.reading.done()
        cluster[1].pause()
        assert f"{cluster[1].port} doesn't answer within 0.5 s" in str(await used_link.lost())
        cluster[1].resume()


def _pings(node: RedisServer) -> int:
    calls: str = node.command("INFO", "commandstats").get("cmdstat_ping", {"calls": 0})["calls"]
    return int(calls)


# Clusters that are not quite like ours.


def _slots(*ranges: tuple[int, int, str, int]) -> bytes:
    packed = [
        b"*3\r\n:%d\r\n:%d\r\n*2\r\n$%d\r\n%b\r\n:%d\r\n" % (first, last, len(name), name.encode(), port)
        for first, last, name, port in ranges
    ]
    return b"*%d\r\n%b" % (len(packed), b"".join(packed))


@pytest.mark.parametrize("unknown", ["", "?"])
async def test_node_without_a_name_is_the_one_that_was_asked(unknown: str) -> None:
    port = 0

    def answer(command: list[bytes]) -> bytes:
        return _slots((0, 16383, unknown, port)) if command[0] == b"CLUSTER" else obliging(command)

    async with fake_redis(answer) as address:
        port = int(address.rpartition(":")[2])
        async with used(f"redis+cluster://{address}", "a") as used_link:
            await hello(used_link, "a")


async def test_cluster_before_redis_7_gets_plain_commands() -> None:
    port, commands = 0, []

    def answer(command: list[bytes]) -> bytes:
        commands.append(command[0].lower())
        if command[0] == b"CLUSTER":
            return _slots((0, 16383, "127.0.0.1", port))
        if command[0].lower() in (b"spublish", b"ssubscribe", b"sunsubscribe"):
            return b"-ERR unknown command\r\n"
        return obliging(command)

    async with fake_redis(answer) as address:
        port = int(address.rpartition(":")[2])
        async with used(f"redis+cluster://{address}", "a") as used_link:
            await hello(used_link, "a")
            await used_link.link.unsubscribe(["a"])
    assert {b"publish", b"subscribe", b"unsubscribe"} <= set(commands)


@pytest.mark.parametrize("ranges", [(), ((0, 100, "127.0.0.1", 1),)])
async def test_cluster_without_all_slots_can_not_be_used_yet(ranges: tuple[tuple[int, int, str, int], ...]) -> None:
    async with fake_redis(
        lambda command: _slots(*ranges) if command[0] == b"CLUSTER" else obliging(command)
    ) as address:
        with pytest.raises(ConnectionError, match=r"serves no slots yet|serves the slot"):
            await open_once(f"redis+cluster://{address}")


async def _equals(one: object, other: object) -> bool:
    return one == other
