"""What Redis keeps: what a restart, a failover, an administrator, and short memory make of it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import redis
from redis.crc import key_slot

from tests.engines.links import Used, open_once, used
from tests.engines.redis_links import fake_redis, obliging, skip_without_shards
from tests.support.brokers import Endpoint, RedisServer, free_port
from tests.support.brokers.redis_groups import RedisSentinel
from tests.support.servers import eventually
from wsbroadcast import Audience, ConfigurationError, EngineUnavailable, Message, Publication
from wsbroadcast.engines.broker.link import Keep, KeepingLink, KeptParcel, Parcel
from wsbroadcast.engines.contract import keeps_history
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.redis.connection import Asker
from wsbroadcast.engines.redis.history import Keeper
from wsbroadcast.engines.redis.options import target_from_url
from wsbroadcast.engines.redis.protocol import ErrorReply
from wsbroadcast.exceptions import EngineError
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.options import Timing
from wsbroadcast.publication import Position
from wsbroadcast.testing import Node, Recorder
from wsbroadcast.testing.history import KEPT, RULES, append, position, read
from wsbroadcast.testing.nodes import NEWS, SPORT

OwnRedis = Callable[..., RedisServer]

NAME = "wsbroadcast:channel:news"
POSITION = f"wsbroadcast:position:{{{NAME}}}"
STREAM = f"wsbroadcast:history:{{{NAME}}}"

QUICK = Timing(probe_interval=0.05)


@asynccontextmanager
async def running(
    *engines: RedisEngine, rules: HistoryRules | None = RULES, learns: bool = True
) -> AsyncIterator[list[Node]]:
    """Start engines that keep everything, or without rules learn what others keep, and let each want the news."""
    nodes = [Node(engine, Recorder(), 10) for engine in engines]
    try:
        for node in nodes:
            if rules is not None or learns:
                keeps_history(node.engine).keep(rules, only_publishes=rules is None)
            await node.engine.start(node.recorder)
            await node.join(NEWS)
        yield nodes
    finally:
        for engine in engines:
            await engine.aclose()


def learning(engine: RedisEngine) -> RedisEngine:
    """Let an engine learn what others keep."""
    engine.keep(None, only_publishes=True)
    return engine


async def appended(node: Node, count: int) -> list[Position]:
    """Append so many, one batch after the other; return their positions."""
    return [(await append(node, str(number))).position for number in range(count)]


async def kept(node: Node, since: Position | None = None) -> list[object]:
    """Return what is kept after a position."""
    offset = 0 if since is None else since.offset
    return [each.message.data for each in (await read(node, since)).publications if each.offset > offset]


async def is_complete(node: Node, since: Position) -> bool:
    return (await read(node, since)).is_complete(since)


def promote(server: RedisServer) -> None:
    """Make a server a replica of nobody and a primary again, in one step, so that none of its clients sees it."""
    with redis.Redis.from_url(server.unix_url) as client, client.pipeline() as commands:
        commands.execute_command("REPLICAOF", "127.0.0.1", free_port())
        commands.execute_command("REPLICAOF", "NO", "ONE")
        commands.execute()


# What happens to keys and scripts.


async def test_flushed_scripts_change_nothing(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        positions: list[Position] = []
        for number in range(5):
            server.command("SCRIPT", "FLUSH")
            some = await asyncio.gather(*(append(node, f"{number} {each}") for each in range(3)))
            positions += [each.position for each in some]
            server.command("SCRIPT", "FLUSH")
            assert await position(node, NEWS) == positions[-1]
        assert [each.offset for each in positions] == list(range(1, 16))
        await node.receives([f"{number} {each}" for number in range(5) for each in range(3)])
        assert node.engine.stats().reconnects == 0


async def test_scripts_that_are_flushed_within_a_batch_cost_the_rest_of_it() -> None:
    answers = iter([b"$3\r\ne:1\r\n", *[b"-NOSCRIPT No matching script. Please use EVAL.\r\n"] * 2, b":0\r\n"])

    def answer(command: list[bytes]) -> bytes:
        match command:
            case [b"INFO", *_]:
                return info()
            case [b"EVAL" | b"EVALSHA", *_] | [b"PUBLISH", b"a", *_]:
                return next(answers)
        return obliging(command)

    async with fake_redis(answer) as address, used(f"redis://{address}") as (link, _, reading):
        batch = [*[KeptParcel("a", b'{"v":1}\nx', Keep(KEPT))] * 3, Parcel("a", b"x")]
        first, *refused, last = await link.publish(batch)
        assert (first, last) == (Appended(Position("e", 1)), None)
        for each in refused:
            assert isinstance(each, EngineUnavailable)
            assert "NOSCRIPT" in str(each)
            assert "nothing was sent" in str(each)
        assert not reading.done()


async def test_position_that_is_removed_begins_a_new_history(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = await appended(node, 10)
        assert server.command("DEL", POSITION) == 1
        after = (await append(node, "after")).position
        assert after.offset == 1
        assert after.epoch != before[0].epoch
        assert await kept(node) == ["after"]
        for since in before:
            assert not await is_complete(node, since)
        assert await node.recorder.wait_until(lambda: len(node.recorder.publications) > 10, 5)
        assert [each.position for each in node.recorder.publications] == [*before, after]


async def test_key_counts_once_in_each_history(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = await append(node, "before", key="key")
        await keeps_history(node.engine).forget(NEWS)
        after = await append(node, "after", key="key")
        assert not after.is_repeat
        assert after.position.epoch != before.position.epoch
        assert await append(node, "again", key="key") == Appended(after.position, is_repeat=True)
        await node.receives(["before", "after"])


async def test_what_lies_before_a_hole_is_read_too(redis_server: Endpoint, prefix: str) -> None:
    history = History(max_kept_bytes=5)
    async with running(RedisEngine(redis_server.url, prefix=prefix)) as (node,):
        engine = keeps_history(node.engine)
        at = [
            (await engine.append(Publication(Message.of(text), NEWS), history)).position for text in ("a", "b" * 6, "c")
        ]
        for since in (None, *at):
            replay = await engine.read(NEWS, since, history)
            if since is None:
                found = [(each.message.data, each.offset, each.previous) for each in replay.publications]
                assert found == [("a", 1, 0), ("c", 3, 2)]
            assert [replay.is_complete(each) for each in (Position(at[0].epoch, 0), at[0])] == [False, False]
        assert [(await engine.read(NEWS, each, history)).is_complete(each) for each in at] == [False, True, True]


async def test_stream_that_is_removed_is_missing_and_no_more(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = await appended(node, 10)
        assert server.command("DEL", STREAM) == 1
        assert await is_complete(node, before[-1])
        assert not await is_complete(node, before[-2])
        after = (await append(node, "after")).position
        assert after == Position(before[0].epoch, 11)
        assert await is_complete(node, before[-1])
        assert await kept(node, before[-1]) == ["after"]
        assert not await is_complete(node, before[-2])


async def test_history_is_honest_while_redis_evicts(own_redis: OwnRedis) -> None:
    server = own_redis(config={"maxmemory-policy": "allkeys-lru"})
    channels = [Audience("channel", f"room {number}") for number in range(150)]
    async with running(RedisEngine(server.url)) as (node,):
        used_memory = int(server.command("INFO", "memory")["used_memory"])
        server.command("CONFIG", "SET", "maxmemory", used_memory + 1_500_000)
        texts = [f"{number} {'x' * 1000}" for number in range(20)]
        positions = {
            channel: [each.position for each in await asyncio.gather(*(append(node, text, channel) for text in texts))]
            for channel in channels
        }
        assert int(server.command("INFO", "stats")["evicted_keys"]) > 0
        verdicts: Counter[bool] = Counter()
        for channel in channels:
            await append(node, "after", channel)
            for number, since in enumerate(positions[channel]):
                replay = await read(node, since, channel)
                found = [each.message.data for each in replay.publications if each.offset > since.offset]
                verdicts[replay.is_complete(since)] += 1
                if replay.is_complete(since):
                    assert found == [*texts[number + 1 :], "after"]
        assert verdicts[True] > 0
        assert verdicts[False] > 0


async def test_short_memory_refuses_and_sends_nothing(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = await appended(node, 3)
        server.command("CONFIG", "SET", "maxmemory", 1)
        for key in (None, "key"):
            with pytest.raises(EngineUnavailable, match=r"OOM .*; nothing was sent") as raised:
                await append(node, "refused", key=key)
            assert not raised.value.may_have_been_sent
        with pytest.raises(EngineUnavailable, match="OOM"):
            await append(node, "refused", SPORT)
        await node.publish("unkept")
        assert await is_complete(node, before[0])
        server.command("CONFIG", "SET", "maxmemory", 0)
        after = (await append(node, "after", key="key")).position
        assert after == Position(before[0].epoch, 4)
        assert await position(node, SPORT) != Position(before[0].epoch, 0)
        await node.receives(["0", "1", "2", "unkept", "after"])
        assert await kept(node) == ["0", "1", "2", "after"]
        assert node.engine.stats().reconnects == 0


async def test_node_starts_while_memory_is_short(own_redis: OwnRedis) -> None:
    server = own_redis(config={"maxmemory": "1"})
    async with running(RedisEngine(server.url, timing=QUICK)) as (node,):
        await node.publish("unkept")
        await node.receives(["unkept"])
        with pytest.raises(EngineUnavailable, match="OOM"):
            await append(node, "refused")
        with pytest.raises(EngineUnavailable, match="OOM"):
            await position(node, NEWS)
        server.command("CONFIG", "SET", "maxmemory", 0)
        assert (await append(node, "kept")).position.offset == 1
        await eventually(lambda: exists(server, "wsbroadcast:histories"))
        assert node.engine.stats().reconnects == 0


async def exists(server: RedisServer, key: str) -> bool:
    return bool(server.command("EXISTS", key))


async def test_keys_expire_when_nobody_needs_them(own_redis: OwnRedis) -> None:
    server = own_redis()
    history = History(messages=5, seconds=50, remember=500)
    async with running(RedisEngine(server.url)) as (node,):
        await keeps_history(node.engine).append(Publication(Message.of("x"), NEWS), history, "ü{}")
        key = f"wsbroadcast:key:{{{NAME}}}:ü{{}}"
        expected = {"wsbroadcast:histories": -1, STREAM: 50_000, POSITION: 500_000, key: 300_000}
        assert set(server.command("KEYS", "*")) - {each for each in server.command("KEYS", "*") if "probe" in each} == {
            *expected
        }
        for name, milliseconds in expected.items():
            left = server.command("PTTL", name)
            assert milliseconds - 10_000 < left <= milliseconds
            assert name == "wsbroadcast:histories" or key_slot(name.encode()) == key_slot(NAME.encode())
        # A quiet channel that somebody looks at stays known; one that nobody looks at doesn't.
        server.command("PEXPIRE", POSITION, 200_000)
        await keeps_history(node.engine).positions([NEWS], [history])
        assert server.command("PTTL", POSITION) > 490_000
        await keeps_history(node.engine).positions([SPORT], [history])
        assert 490_000 < server.command("PTTL", POSITION.replace("news", "sport")) <= 500_000
        # No number is too large, and none too small, for an append to be done as a whole.
        for extreme in (History(10**9, 3.2e9, 3.2e9), History(1, 1e-9, 1e-9)):
            await keeps_history(node.engine).append(Publication(Message.of("y"), NEWS), extreme)
        assert await node.recorder.wait_until(lambda: len(node.recorder.data(NEWS)) == 3, 5)


async def test_few_more_than_asked_for_are_stored(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        await asyncio.gather(*(append(node, str(number)) for number in range(500)))
        assert 20 <= server.command("XLEN", STREAM) <= 120
        assert len(await kept(node)) == 20


# Restart, promotion, failover.


async def test_restart_begins_a_new_history(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = await appended(node, 10)
        await server.killed()
        await server.started()
        assert server.command("HGET", POSITION, "s") == "10"
        assert await node.recorder.wait_until(lambda: node.recorder.gaps, node.seconds)
        for since in before:
            assert not await is_complete(node, since)
        after = (await append(node, "after")).position
        assert after.offset == 1
        assert after.epoch != before[0].epoch
        assert await kept(node) == ["after"]


async def test_promoted_replica_without_the_last_is_another_history(own_redis: OwnRedis) -> None:
    primary = own_redis(config={"repl-diskless-sync-delay": "0"})
    replica = own_redis(config={"replicaof": f"{primary.host} {primary.port}"})
    async with running(RedisEngine(primary.url)) as (node,):
        await asyncio.gather(*(append(node, str(number)) for number in range(495)))

        async def has_caught_up() -> bool:
            return bool(replica.command("HGET", POSITION, "s") == "495")

        await eventually(has_caught_up)
        replica.command("REPLICAOF", "NO", "ONE")
        last = (await appended(node, 5))[-1]
        assert last.offset == 500
        await primary.killed()
    async with running(RedisEngine(replica.url)) as (node,):
        for _ in range(10):
            await append(node, "after")
        for offset in (495, 500, 505):
            replay = await read(node, Position(last.epoch, offset))
            assert not replay.is_complete(Position(last.epoch, offset))
            assert replay.top.epoch != last.epoch
        assert await kept(node) == ["after"] * 10


async def test_first_read_after_a_promotion_is_another_history_too(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = await appended(node, 3)
    promote(server)
    async with running(RedisEngine(server.url)) as (node,):
        replay = await read(node, before[-1])
        assert not replay.is_complete(before[-1])
        assert list(replay.publications) == []
        assert await position(node, NEWS) == replay.top
        assert replay.top.offset == 0


async def test_promotion_is_seen_although_the_connection_lives(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url, timing=QUICK)) as (node,):
        before = await appended(node, 3)
        promote(server)

        async def is_seen() -> bool:
            at = (await append(node, "after")).position
            return at.epoch != before[0].epoch and at.offset == 1

        await eventually(is_seen)
        assert not await is_complete(node, before[-1])
        assert await kept(node) == ["after"]
        assert node.engine.stats().reconnects == 0
        assert node.recorder.gaps == []


async def test_node_that_has_not_seen_the_promotion_yet_goes_by_those_that_have(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (late,):
        before = (await append(late, "before")).position
        promote(server)
        async with running(RedisEngine(server.url)) as (node,):
            first = (await append(node, "first")).position
            second = (await append(late, "second")).position
            third = (await append(node, "third")).position
        assert first.epoch != before.epoch
        assert [second, third] == [Position(first.epoch, 2), Position(first.epoch, 3)]


async def test_server_that_becomes_a_replica_is_left(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url, timing=QUICK)) as (node,):
        await appended(node, 3)
        server.command("REPLICAOF", "127.0.0.1", free_port())

        async def is_left() -> bool:
            return not (await node.engine.health()).is_ok

        await eventually(is_left)
        assert "is a replica" in (await node.engine.health()).detail
        server.command("REPLICAOF", "NO", "ONE")
        assert await node.recorder.wait_until(lambda: node.recorder.gaps, node.seconds)
        assert (await append(node, "after")).position.offset == 1


async def test_failover_begins_a_new_history(own_sentinel: RedisSentinel) -> None:
    url = f"redis+sentinel://{own_sentinel.sentinel.host}:{own_sentinel.sentinel.port}/{own_sentinel.service}"
    async with running(RedisEngine(url), RedisEngine(url)) as nodes:
        before = await appended(nodes[0], 5)
        await own_sentinel.primary.killed()
        for node in nodes:
            assert await node.recorder.wait_until(lambda: node.recorder.gaps, 20)  # noqa: B023
        after = (await append(nodes[0], "after")).position
        for node in nodes:
            assert not await is_complete(node, before[-1])
            assert await position(node, NEWS) == after
            await node.receives(["0", "1", "2", "3", "4", "after"])


# A cluster.


async def test_slot_that_moves_while_something_is_appended(own_cluster: list[RedisServer]) -> None:
    servers = own_cluster
    skip_without_shards(servers[0])
    url = f"redis+cluster://{servers[0].host}:{servers[0].port}"
    slot = key_slot(NAME.encode())
    async with running(RedisEngine(url), RedisEngine(url)) as nodes:
        done: list[tuple[str, Position]] = []
        refused: list[EngineUnavailable] = []

        async def go_on() -> None:
            while True:
                text = str(len(done) + len(refused))
                try:
                    done.append((text, (await append(nodes[0], text)).position))
                except EngineUnavailable as error:
                    refused.append(error)
                await asyncio.sleep(0.001)

        appending = asyncio.create_task(go_on())
        try:
            await _grown(lambda: len(done))
            here = next(server for server in servers if server.command("CLUSTER", "COUNTKEYSINSLOT", slot) == 2)
            there = next(server for server in servers if server is not here)
            await _move(slot, (here, there), servers, lambda: _grown(lambda: len(done) + len(refused)))
            await _grown(lambda: len(done))
        finally:
            appending.cancel()
            await asyncio.wait([appending])
        # What was refused has taken no offset; of what broke off with the link one at a time may have.
        epochs = Counter(at.epoch for _, at in done)
        assert len(epochs) == 2
        unknown = sum(error.may_have_been_sent for error in refused)
        for epoch, count in epochs.items():
            offsets = [at.offset for _, at in done if at.epoch == epoch]
            assert offsets == sorted(set(offsets))
            assert offsets[-1] <= count + unknown
        assert any("moving a slot" in str(error) for error in refused)
        # What was confirmed is kept, and came to those who were subscribed.
        newest = done[-1][1].epoch
        old, new = ([each for each in done if (each[1].epoch == newest) == is_new] for is_new in (False, True))
        await eventually(partial(_is_in_reach, nodes[1]))  # Redis has ended its subscription
        found = {each.message.data for each in (await read(nodes[1], None)).publications}
        assert {text for text, _ in new[-19:]} <= found <= {str(number) for number in range(int(new[0][0]), 10_000)}
        came = {(each.message.data, each.position) for each in nodes[1].recorder.publications}
        assert set(old) <= came
        assert not await is_complete(nodes[1], old[-1][1])


async def _move(
    slot: int, way: tuple[RedisServer, RedisServer], servers: list[RedisServer], wait: Callable[[], Awaitable[None]]
) -> None:
    here, there = way
    source, target = (server.command("CLUSTER", "MYID") for server in way)
    there.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source)
    here.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target)
    await wait()
    for key in (POSITION, STREAM):
        here.command("MIGRATE", there.host, there.port, key, 0, 5000)
        await wait()
    for server in (there, here, *(each for each in servers if each not in way)):
        server.command("CLUSTER", "SETSLOT", slot, "NODE", target)


async def _is_in_reach(node: Node) -> bool:
    return (await node.engine.health()).is_ok


async def _grown(count: Callable[[], int]) -> None:
    begun = count()

    async def is_more() -> bool:
        return count() >= begun + 10

    await eventually(is_more)


# Reading.


async def test_large_history_is_read_in_parts(own_redis: OwnRedis) -> None:
    server = own_redis()
    history = History(messages=50)
    async with running(RedisEngine(server.url)) as (node,):
        texts = [f"{number} {'x' * 300_000}" for number in range(45)]
        for text in texts:
            at = await keeps_history(node.engine).append(Publication(Message.of(text), NEWS), history)
        calls = _scripts(server)
        replay = await keeps_history(node.engine).read(NEWS, Position(at.position.epoch, 0), history)
        assert _scripts(server) - calls == 3
        assert [each.message.data for each in replay.publications] == texts
        assert replay.is_complete(Position(at.position.epoch, 0))


def _scripts(server: RedisServer) -> int:
    return int(server.command("INFO", "commandstats")["cmdstat_eval"]["calls"])


async def test_history_that_is_forgotten_while_it_is_read_is_read_anew() -> None:
    def page(epoch: str, top: int, places: str, envelopes: str, has_more: int) -> bytes:
        texts = b"".join(b"$%d\r\n%b\r\n" % (len(text), text.encode()) for text in ("5000", places, envelopes))
        return b"*6\r\n$1\r\n%b\r\n$1\r\n%d\r\n%b:%d\r\n" % (epoch.encode(), top, texts, has_more)

    pages = iter(
        [page("a", 9, "9-1000-1 8-1000-1", "xy", 1), page("b", 3, "", "", 0), page("b", 3, "3-4000-2", "zz", 0)]
    )

    def answer(command: list[bytes]) -> bytes:
        match command:
            case [b"INFO", *_]:
                return info()
            case [b"EVAL", *_]:
                return next(pages)
        return obliging(command)

    async with fake_redis(answer) as address, used(f"redis://{address}") as used_link:
        stretch = await _keeping(used_link).read_kept("a", None, KEPT)
        assert (stretch.top, stretch.base) == (Position("b", 3), 2)
        assert [tuple(entry) for entry in stretch.entries] == [(b"zz", 3, 1.0, 2)]


async def test_questions_and_publications_go_on_at_the_same_time(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        reads = []
        for number in range(40):
            appending = asyncio.create_task(append(node, str(number)))
            reads += [asyncio.create_task(read(node, None)) for _ in range(3)]
            given_up = asyncio.create_task(read(node, None))
            await asyncio.sleep(0)
            given_up.cancel()
            assert (await appending).position.offset == number + 1
        for replay in await asyncio.gather(*reads):
            offsets = [each.offset for each in replay.publications]
            assert offsets == list(range(max(0, replay.top.offset - 20) + 1, replay.top.offset + 1))
        assert node.engine.stats().reconnects == 0


async def test_kept_and_unkept_parcels_keep_their_order(redis_server: Endpoint, prefix: str) -> None:
    name = f"{prefix}:channel:news"
    async with used(RedisEngine(redis_server.url, prefix=prefix), name) as (link, letters, _):
        batch = [
            KeptParcel(name, b'{"v":1}\n%d' % number, Keep(KEPT)) if number % 3 else Parcel(name, b"%d" % number)
            for number in range(30)
        ]
        outcomes = await link.publish([*batch, Parcel(name, b"end")])
        assert [outcome is None for outcome in outcomes] == [number % 3 == 0 for number in range(31)]
        assert [each.position.offset for each in outcomes if isinstance(each, Appended)] == list(range(1, 21))
        taken = [envelope.rpartition(b"\n")[2] for _, envelope in await letters.until(b"end")]
        assert taken == [b"%d" % number for number in range(30)] + [b"end"]


async def test_live_envelope_says_where_it_is_kept(redis_server: Endpoint, prefix: str) -> None:
    name = f"{prefix}:channel:news"
    async with used(RedisEngine(redis_server.url, prefix=prefix), name) as used_link:
        for header, payload in ((b'{"v":1,"id":"}"', b"}\n{"), (b'{"v":1', b"")):
            kept_as = b"%b}\n%b" % (header, payload)
            (outcome,) = await used_link.link.publish([KeptParcel(name, kept_as, Keep(KEPT))])
            assert isinstance(outcome, Appended)
            at = outcome.position
            place = f',"epoch":"{at.epoch}","offset":{at.offset},"previous":{at.offset - 1}'.encode()
            await used_link.letters.until(b"%b%b}\n%b" % (header, place, payload))
            stretch = await _keeping(used_link).read_kept(name, None, KEPT)
            assert stretch.entries[-1].envelope == kept_as
            assert 0 <= stretch.entries[-1].age < 5


def _keeping(used_link: Used) -> KeepingLink:
    assert isinstance(used_link.link, KeepingLink)
    return used_link.link


# Permissions.

TO_KEEP = "+del +eval +evalsha +get +hmget +hset +info +pexpire +pttl +set +time +xadd +xdel +xrevrange"


async def lives(node: Node) -> None:
    """Do everything that a node with a history does."""
    at = (await append(node, "hello", key="key")).position
    await node.receives(["hello"])
    assert await kept(node) == ["hello"]
    assert (await append(node, "again", key="key")).is_repeat
    assert await position(node, NEWS) == at
    await keeps_history(node.engine).forget(NEWS)
    assert (await position(node, NEWS)).epoch != at.epoch


async def test_documented_permissions_are_enough(own_redis: OwnRedis) -> None:
    rules = f"on >secret ~t:* resetchannels &t:* +publish +subscribe +unsubscribe {TO_KEEP}"
    server = own_redis(users=[f"app {rules}"])
    engine = RedisEngine.from_url(f"redis://app:secret@{server.host}:{server.port}?prefix=t")
    async with running(engine) as (node,):
        await lives(node)


async def test_documented_permissions_are_enough_in_a_cluster(own_cluster: list[RedisServer]) -> None:
    skip_without_shards(own_cluster[0])
    pubsub = "+spublish +ssubscribe +sunsubscribe +ping +cluster|slots"
    rules = f"on >secret ~t:* resetchannels &t:* {pubsub} {TO_KEEP}"
    for server in own_cluster:
        server.command("ACL", "SETUSER", "app", *rules.split())
    url = f"redis+cluster://app:secret@{own_cluster[0].host}:{own_cluster[0].port}?prefix=t"
    async with running(RedisEngine.from_url(url)) as (node,):
        await lives(node)
    for server in own_cluster[1:]:  # one that holds no rules, too
        server.command("ACL", "SETUSER", "app", "-info")
        with pytest.raises(ConfigurationError, match=rf"{server.port} refuses the user 'app' .*history= needs \+info"):
            await open_once(_with_rules(RedisEngine.from_url(url)))
        server.command("ACL", "SETUSER", "app", "+info")


def _with_rules(engine: RedisEngine) -> RedisEngine:
    engine.keep(RULES)
    return engine


@pytest.mark.parametrize("missing", ["~t:*", *TO_KEEP.replace(" +xdel", "").split()])  # that is rarely needed
async def test_each_missing_permission_is_named_at_the_start(own_redis: OwnRedis, missing: str) -> None:
    rules = f"~t:* &t:* +publish +subscribe +unsubscribe {TO_KEEP}".split()
    rules.remove(missing)
    server = own_redis(users=[f"app on >secret resetchannels {' '.join(rules)}"])
    engine = RedisEngine.from_url(f"redis://app:secret@{server.host}:{server.port}?prefix=t")
    engine.keep(RULES)
    needs = rf"Redis at {server.host}:{server.port} refuses the user 'app' \(NOPERM .* needs &t:\* .* ~t:\* .*\+evalsha"
    with pytest.raises(ConfigurationError, match=needs) as raised:
        await engine.start(Recorder())
    assert ("history= needs +info" in str(raised.value)) == (missing == "+info")


@pytest.mark.parametrize("ahead", [0, 1, 3_600_000, 10**12])
async def test_append_after_a_refused_one_needs_no_later_time(own_redis: OwnRedis, ahead: int) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        before = (await append(node, "before")).position
        # What a refused append leaves behind; it was at a later time, because the clock was set back since.
        seconds, microseconds = server.command("TIME")
        refused = f"2-{int(seconds) * 1000 + int(microseconds) // 1000 + ahead}"
        assert server.command("XADD", STREAM, refused, "d", "x") == refused
        assert server.command("XDEL", STREAM, refused) == 1
        after = (await append(node, "after")).position
        assert (before.offset, after.offset) == (1, 2)
        assert await kept(node) == ["before", "after"]
        assert await is_complete(node, before)


async def test_stream_of_somebody_else_refuses_appends(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url)) as (node,):
        await append(node, "before")
        server.command("XADD", STREAM, "9-1", "d", "x")
        with pytest.raises(EngineError, match="Invalid stream ID"):
            await append(node, "after")


async def test_forbidden_channel_is_not_kept_either(own_redis: OwnRedis) -> None:
    rules = f"on >secret ~t:* resetchannels &t:probe &t:node:* +publish +subscribe +unsubscribe {TO_KEEP}"
    server = own_redis(users=[f"app {rules}"])
    async with running(RedisEngine(server.url, prefix="t")) as (node,):
        before = (await append(node, "before")).position
        engine = RedisEngine.from_url(f"redis://app:secret@{server.host}:{server.port}?prefix=t")
        engine.keep(RULES)
        await engine.start(Recorder())
        for history in (KEPT, History(max_kept_bytes=1)):
            with pytest.raises(EngineUnavailable, match=r"NOPERM .* needs &t:\*"):
                await engine.append(Publication(Message.of("forbidden"), NEWS), history)
        await engine.aclose()
        after = (await append(node, "after")).position
        assert after == Position(before.epoch, 2)
        assert await kept(node) == ["before", "after"]
        await node.receives(["before", "after"])


async def test_redis_without_scripts_keeps_nothing(own_redis: OwnRedis) -> None:
    server = own_redis(config={"rename-command EVAL": '""'})
    engine = RedisEngine(server.url)
    engine.keep(RULES)
    with pytest.raises(ConfigurationError, match=r"unknown command .*EVAL.*: history= needs scripts and streams"):
        await engine.start(Recorder())


def info(role: str = "master", replid: str = "a" * 40) -> bytes:
    text = f"# Replication\r\nrole:{role}\r\nmaster_replid:{replid}\r\nmaster_replid2:{'0' * 40}\r\n"
    return b"$%d\r\n%b\r\n" % (len(text), text.encode())


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (b"$6\r\nhello\n\r\n", ConfigurationError, "no master_replid in INFO replication"),
        (info(replid="?"), ConfigurationError, "connect to the server itself, or leave history= out"),
        (b":1\r\n", ConfigurationError, "no master_replid"),
        (info("slave"), ConnectionError, "is a replica"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", ConnectionError, "LOADING"),
    ],
)
async def test_server_without_a_generation_keeps_nothing(answer: bytes, kind: type[Exception], says: str) -> None:
    async with fake_redis(lambda command: answer if command[0] == b"INFO" else obliging(command)) as address:
        with pytest.raises(kind, match=says):
            await open_once(_with_rules(RedisEngine(f"redis://{address}")))


async def test_generation_that_is_not_said_for_a_moment_is_asked_for_again() -> None:
    asked = 0

    def answer(command: list[bytes]) -> bytes:
        nonlocal asked
        match command:
            case [b"INFO", *_]:
                asked += 1
                return b"-BUSY Redis is busy running a script.\r\n" if asked == 2 else info()
            case [b"EVAL" | b"EVALSHA", *_]:
                return b"-OOM command not allowed\r\n"
        return obliging(command)

    async def is_asked() -> bool:
        return asked > 3

    async with (
        fake_redis(answer) as address,
        used(_with_rules(RedisEngine(f"redis://{address}", timing=QUICK))) as (_, _, reading),
    ):
        await eventually(is_asked)
        assert not reading.done()


_AROUND = f"ERR Error running script (call to f_{'a' * 40}): @user_script:1: @user_script: 1: "
_BEHIND = f" script: {'a' * 40}, on @user_script:1."
_MAY_NOT = "The user executing the script can't run this command or subcommand"


@pytest.mark.parametrize(
    ("says", "kind", "told"),
    [
        # Redis 6, 7, and Valkey, each in its own words.
        (f"{_AROUND}-OOM not allowed", EngineUnavailable, "answers OOM not allowed; nothing was sent"),
        (f"OOM not allowed{_BEHIND}", EngineUnavailable, "answers OOM not allowed; nothing was sent"),
        ("OOM not allowed script: on @user_script:1.", EngineUnavailable, "answers OOM not allowed; nothing"),
        (f"{_AROUND}{_MAY_NOT}", ConfigurationError, f"(NOPERM {_MAY_NOT})"),
        (f"ERR {_MAY_NOT}{_BEHIND}", ConfigurationError, f"(NOPERM {_MAY_NOT})"),
        (f"@user_script: 1: {_MAY_NOT}", ConfigurationError, f"(NOPERM {_MAY_NOT})"),
        ("ERR ACL failure in script: No script: on @user_script:1.", ConfigurationError, "(NOPERM No)"),
        (f"{_AROUND}-READONLY You can't", ConnectionError, "answers READONLY You can't"),
        (f"READONLY You can't{_BEHIND}", ConnectionError, "answers READONLY You can't"),
        ("MOVED 7 a:1", ConnectionError, "answers MOVED"),
        ("ASK 7 a:1", EngineUnavailable, "is moving a slot to another node; nothing was sent"),
        ("TRYAGAIN Multiple keys", EngineUnavailable, "is moving a slot to another node; nothing was sent"),
        ("NOSCRIPT No matching script.", EngineUnavailable, "nothing was sent"),
        ("WRONGTYPE Operation against a key", EngineError, "answers WRONGTYPE"),
    ],
)
def test_error_of_a_script_is_what_it_is_without_one(says: str, kind: type[Exception], told: str) -> None:
    asker = Asker(target_from_url("redis://", {}).access, None, "", lambda error: None)
    error = Keeper(asker, "t", "PUBLISH").explain(ErrorReply(says))
    assert type(error) is kind
    assert told in str(error)


QUESTIONS: list[Callable[[KeepingLink], Awaitable[object]]] = [
    lambda link: link.read_kept("a", None, KEPT),
    lambda link: link.read_positions(["a"], [KEPT]),
    lambda link: link.forget("a"),
]


def test_names_that_are_remembered_are_bounded() -> None:
    keeper = Keeper(Asker(target_from_url("redis://", {}).access, None, "", lambda error: None), "t", "PUBLISH")
    commands = set()
    for number in range(8200):
        parcel = KeptParcel(f"t:channel:{number}", b'{"v":1}\nx', Keep(KEPT))
        commands |= {keeper.append(parcel, b"fresh", is_first=False) for _ in range(2)}
    assert len(commands) == 8200
    assert len(keeper._known[False]) == 8
    assert len(keeper.trial(None)) == 1  # of a node of a cluster for which no name was found


@pytest.mark.parametrize("question", QUESTIONS)
async def test_answer_of_the_wrong_server_loses_the_link(
    question: Callable[[KeepingLink], Awaitable[object]],
) -> None:
    def answer(command: list[bytes]) -> bytes:
        match command:
            case [b"INFO", *_]:
                return info()
            case [b"EVAL" | b"DEL", *_]:
                return b"-MOVED 7 a:1\r\n"
        return obliging(command)

    async with fake_redis(answer) as address, used(f"redis://{address}") as used_link:
        with pytest.raises(ConnectionError, match="MOVED"):
            await question(_keeping(used_link))
        assert "MOVED" in str(await used_link.lost())


async def test_answers_that_make_no_sense_are_errors() -> None:
    def answer(command: list[bytes]) -> bytes:
        match command:
            case [b"INFO", *_]:
                return info()
            case [b"EVAL", *_]:
                return b"$1\r\nx\r\n"
        return obliging(command)

    async with fake_redis(answer) as address, used(f"redis://{address}") as used_link:
        link = _keeping(used_link)
        with pytest.raises(ValueError, match="answers a read with bytes"):
            await link.read_kept("a", None, KEPT)
        with pytest.raises(ValueError, match="answers a publish with bytes"):
            await link.publish([KeptParcel("a", b'{"v":1}\nx', Keep(KEPT))])


# The rules at the broker.


@pytest.mark.parametrize("learns", [True, False])
async def test_without_a_history_nothing_is_asked_but_once_by_publishers(own_redis: OwnRedis, learns: bool) -> None:
    server = own_redis()
    commands: list[str] = []
    async with (
        redis.asyncio.Redis.from_url(server.unix_url) as client,
        client.monitor() as monitor,
        running(RedisEngine(server.url, timing=QUICK), rules=None, learns=learns) as (node,),
    ):
        for number in range(3):
            await node.publish(str(number))
        await node.receives(["0", "1", "2"])
        async with asyncio.timeout(10):
            while sum(":node:" in command for command in commands) < 5:  # echoes
                commands.append((await monitor.next_command())["command"])
    names = Counter(command.partition(" ")[0].upper() for command in commands)
    assert set(names) <= {"CLIENT", "PUBLISH", "GET", "SUBSCRIBE", "UNSUBSCRIBE"}
    assert names["GET"] == learns
    assert server.command("KEYS", "*") == []


@pytest.mark.parametrize("rules", [None, RULES])
async def test_history_costs_no_round_trip_more_to_open(rules: HistoryRules | None) -> None:
    held: list[bytes] = []

    def answer(command: list[bytes]) -> bytes:
        match command:
            case [b"PUBLISH" | b"INFO" | b"EVAL" | b"EVALSHA" | b"GET" | b"SET", *_]:
                held.append({b"PUBLISH": b":0\r\n", b"INFO": info(), b"GET": b"$-1\r\n"}.get(command[0], b"+OK\r\n"))
                if command[0] == (b"GET" if rules is None else b"SET"):  # the last
                    return b"".join(held)
                return b""
        return obliging(command)

    async with fake_redis(answer) as address:
        engine = RedisEngine(f"redis://{address}")
        engine.keep(rules, only_publishes=rules is None)
        await open_once(engine)
    assert len(held) == (2 if rules is None else 7)


async def test_different_rules_are_told_once(own_redis: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    server = own_redis()
    other = HistoryRules({"*": History(messages=7)})
    async with running(RedisEngine(server.url)) as (one,):
        async with running(RedisEngine(server.url), rules=other) as (two,):
            for number in range(1, 4):
                server.command("CLIENT", "KILL", "TYPE", "pubsub")
                for node in (one, two):
                    await eventually(lambda: _has_reconnected(node, number))  # noqa: B023
            told = [record.getMessage() for record in caplog.records if "keeps other histories" in record.getMessage()]
            assert 1 <= len(told) <= 2
            assert "wsbroadcast:histories in Redis" in told[0]
            assert repr(RULES) in told[0]
            assert repr(other) in told[0]
        async with running(RedisEngine(server.url), rules=None) as (publisher,):
            assert keeps_history(publisher.engine).rules in (RULES, other)


async def _has_reconnected(node: Node, times: int) -> bool:
    return node.engine.stats().reconnects >= times and (await node.engine.health()).is_ok


async def test_equal_rules_are_not_told(own_redis: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    server = own_redis()
    async with running(*(RedisEngine(server.url) for _ in range(3))):
        assert caplog.records == []


async def test_rules_that_are_removed_are_written_again(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with running(RedisEngine(server.url, timing=QUICK)):
        server.command("FLUSHALL")
        await eventually(lambda: exists(server, "wsbroadcast:histories"))
        assert HistoryRules.from_json(server.command("GET", "wsbroadcast:histories").encode()) == RULES


async def test_rules_of_somebody_else_are_left_out(own_redis: OwnRedis, caplog: pytest.LogCaptureFixture) -> None:
    server = own_redis()
    for write in (("SET", "wsbroadcast:histories", "garbage"), ("LPUSH", "wsbroadcast:histories", "a")):
        server.command("DEL", "wsbroadcast:histories")
        server.command(*write)
        async with running(RedisEngine(server.url), rules=None) as (node,):
            assert keeps_history(node.engine).rules is None
            await node.publish("hello")
            await node.receives(["hello"])
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "was not written by this library" in told
    async with running(RedisEngine(server.url)):
        assert HistoryRules.from_json(server.command("GET", "wsbroadcast:histories").encode()) == RULES


async def test_publisher_may_not_be_allowed_to_read_the_rules(
    own_redis: OwnRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rules = "on >secret resetchannels &t:* +publish +subscribe +unsubscribe"
    server = own_redis(users=[f"plain {rules}", f"reader {rules} ~t:* +get", f"publisher {rules} ~t:* +get +info"])
    place = f"{server.host}:{server.port}?prefix=t"
    async with running(RedisEngine(server.url, prefix="t")):
        async with running(RedisEngine.from_url(f"redis://plain:secret@{place}"), rules=None) as (node,):
            assert keeps_history(node.engine).rules is None
            await node.publish("hello")
        assert "that needs +get" in caplog.text
        with pytest.raises(ConfigurationError, match=r"needs \+info"):  # who knows that something is kept, and can't
            await open_once(learning(RedisEngine.from_url(f"redis://reader:secret@{place}")))
        async with running(RedisEngine.from_url(f"redis://publisher:secret@{place}"), rules=None) as (node,):
            assert keeps_history(node.engine).rules == RULES
            with pytest.raises(EngineUnavailable, match=r"NOPERM .* needs .* ~t:\* .*\+eval"):
                await append(node, "hello")
            await node.publish("hello")


async def test_rules_are_known_on_while_the_server_loads_its_data() -> None:
    answers = iter([b"$%d\r\n%b\r\n" % (len(RULES.to_json()), RULES.to_json()), b"-LOADING Redis is loading\r\n"])

    def answer(command: list[bytes]) -> bytes:
        match command:
            case [b"INFO", *_]:
                return info()
            case [b"GET", *_]:
                return next(answers)
        return obliging(command)

    async with fake_redis(answer) as address:
        engine = learning(RedisEngine(f"redis://{address}"))
        for _ in range(2):
            async with used(engine) as used_link:
                assert _keeping(used_link).rules == RULES
