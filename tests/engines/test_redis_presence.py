"""Who is in a channel, as Redis knows it: what crashes, restarts, an administrator and short memory make of it."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import redis
from redis.crc import key_slot

from tests.engines.redis_links import skip_without_shards
from tests.engines.test_redis_history import promote
from tests.support.brokers import RedisServer
from tests.support.brokers.redis_groups import RedisSentinel
from tests.support.servers import eventually
from wsbroadcast import Audience, EngineUnavailable
from wsbroadcast.engines.broker.presence import PresentEngine, PresentLink
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.redis.presence import RedisPresence
from wsbroadcast.exceptions import EngineError
from wsbroadcast.options import Timing
from wsbroadcast.presence import Roll
from wsbroadcast.publication import PresenceChange
from wsbroadcast.testing import Node, Recorder
from wsbroadcast.testing.nodes import NEWS
from wsbroadcast.testing.presence import changes_of, follow

OwnRedis = Callable[..., RedisServer]

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
STEPS = 4000 if FULL else 300
SEEDS = range(5) if FULL else range(1)

CHANNELS = ("news", "sport", "a.b c*{x}")

QUICK = Timing(linger=0.02)


@asynccontextmanager
async def present(*engines: PresentEngine, channels: Iterable[str] = ("news",)) -> AsyncIterator[list[Node]]:
    """Start engines that hold a lease, and let each want some channels."""
    nodes = [Node(engine, Recorder(), 10) for engine in engines]
    try:
        for node in nodes:
            await node.engine.start(node.recorder)
            await node.join(*(Audience("channel", each) for each in channels))
            await of(node).renew(60)
        yield nodes
    finally:
        for engine in engines:
            await engine.aclose()


def of(node: Node) -> PresentEngine:
    return cast(PresentEngine, node.engine)


def store_of(node: Node) -> RedisPresence:
    return cast(RedisPresence, cast(PresentLink, of(node).link).presence)


async def told(node: Node, count: int) -> list[PresenceChange]:
    """Wait for so many changes; return them."""
    assert await node.recorder.wait_until(lambda: len(changes_of(node)) >= count, 10)
    assert len(changes_of(node)) == count
    return changes_of(node)


async def crash(node: Node) -> str:
    """Let the lease of a node run out; return its incarnation."""
    dead = of(node).incarnation
    await of(node).renew(0.001)
    await eventually(lambda: _is_dead(node, dead))
    return dead


async def _is_dead(node: Node, incarnation: str) -> bool:
    return incarnation not in await of(node).alive()


def keys_of(server: RedisServer) -> list[str]:
    return sorted(str(each) for each in server.command("KEYS", "*"))


# Random steps.


class Steps:
    """Random steps of nodes, and a model of what they do."""

    def __init__(self, nodes: list[Node], seed: int) -> None:
        self.nodes = nodes
        self.chance = random.Random(seed)  # a seeded test
        self.model = Roll()
        self.changes: dict[str, list[PresenceChange]] = {channel: [] for channel in CHANNELS}
        self.names = [f"user {number}" for number in range(8)]

    async def take(self) -> None:
        node = self.chance.choice(self.nodes)
        if self.chance.random() < 0.03:
            await self.crash(node)
        else:
            await self.move(node)

    async def move(self, node: Node) -> None:
        engine, channel = of(node), self.chance.choice(CHANNELS)
        some = self.chance.sample(self.names, self.chance.randint(1, 4))
        for _ in range(self.chance.choice((1, 1, 1, 2))):  # repeated, because the outcome isn't known
            if self.chance.random() < 0.5:
                got = await engine.enter(channel, dict.fromkeys(some, b'"x"'))
                meant = self.model.enter(channel, engine.incarnation, dict.fromkeys(some, b'"x"'))
            else:
                got = await engine.leave(channel, some)
                meant = self.model.leave(channel, engine.incarnation, some)
            self.compare([got] if got else [], [meant] if meant else [])

    async def end_lease(self, node: Node) -> str:
        return await crash(node)

    async def crash(self, node: Node) -> None:
        dead = await self.end_lease(node)
        if self.chance.random() < 0.3:  # it doesn't know yet
            await self.move(node)
        if self.chance.random() < 0.3:  # it goes on before anybody has swept
            await self.go_on(node)
        await self.sweep(dead)
        if of(node).incarnation == dead:
            if self.chance.random() < 0.3:  # nor now
                await self.move(node)
                await self.sweep(dead)
            await self.go_on(node)

    async def sweep(self, dead: str) -> None:
        found = await asyncio.gather(*(of(each).sweep() for each in self.nodes))
        got = sorted((change for changes in found for change in changes), key=lambda change: change.audience.name)
        self.compare(got, self.model.drop(dead))

    async def go_on(self, node: Node) -> None:
        dead = of(node).incarnation
        assert not await of(node).renew(60)
        assert of(node).incarnation != dead

    def compare(self, got: list[PresenceChange], meant: list[PresenceChange]) -> None:
        assert [_what(each) for each in got] == [_what(each) for each in meant]
        for change in got:
            self.changes[change.audience.name].append(change)

    async def settle(self) -> None:
        """Compare what each node sees, and was told, with the model."""
        for node in self.nodes:
            seen = await told(node, sum(map(len, self.changes.values())))
            for channel in CHANNELS:
                mine = [each for each in seen if each.audience.name == channel]
                assert mine == self.changes[channel]
                versions = [each.version for each in mine]
                assert versions == list(range(versions[0], versions[0] + len(versions)))
                assert await of(node).members(channel) == (versions[-1], self.model.members(channel).members)
                assert set(self.model.members(channel).members) == follow(mine)
            for name in self.names:
                assert await of(node).channels_of(name) == self.model.channels_of(name)

    async def leave_all(self) -> None:
        for node in self.nodes:
            for channel in CHANNELS:
                await of(node).leave(channel, self.names)


def _what(change: PresenceChange) -> tuple[object, ...]:
    return change.audience, change.joined, change.left, change.by


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_steps_with_crashes(own_redis: OwnRedis, seed: int) -> None:
    server = own_redis()
    async with present(*(RedisEngine(server.url) for _ in range(3)), channels=CHANNELS) as nodes:
        steps = Steps(nodes, seed)
        for _ in range(STEPS):
            await steps.take()
        await steps.settle()
        await steps.leave_all()
        left = [key for key in keys_of(server) if ":state:" not in key and ":leases:" not in key]
        assert left == []
        assert all(0 < server.command("PTTL", key) <= 86_460_000 for key in keys_of(server))


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_steps_with_crashes_in_a_cluster(own_cluster: list[RedisServer], seed: int) -> None:
    url = f"redis+cluster://{own_cluster[0].host}:{own_cluster[0].port}"
    async with present(*(RedisEngine(url) for _ in range(3)), channels=CHANNELS) as nodes:
        steps = Steps(nodes, seed)
        for _ in range(STEPS):
            await steps.take()
        await steps.settle()
        await steps.leave_all()
        for server in own_cluster:
            left = [key for key in keys_of(server) if ":state:" not in key and ":leases:" not in key]
            assert left == []
            assert all(0 < server.command("PTTL", key) <= 86_460_000 for key in keys_of(server))


# What happens to the server.


async def test_who_does_not_use_it_leaves_no_trace(own_redis: OwnRedis) -> None:
    server = own_redis()
    engine = RedisEngine(server.url)
    node = Node(engine, Recorder(), 10)
    await engine.start(node.recorder)
    try:
        await node.join(NEWS)
        await node.publish("hello")
        await node.receives(["hello"])
        assert keys_of(server) == []
        used = server.command("INFO", "commandstats")
        assert not {"cmdstat_eval", "cmdstat_evalsha", "cmdstat_get"} & set(used)
    finally:
        await engine.aclose()


async def test_nobody_comes_before_there_is_a_lease(own_redis: OwnRedis) -> None:
    server = own_redis()
    engine = RedisEngine(server.url)
    await engine.start(Recorder())
    try:
        with pytest.raises(EngineUnavailable, match="call renew first"):
            await engine.enter("news", {"ann": b""})
        assert await engine.leave("news", ["ann"]) is None
        assert keys_of(server) == []
    finally:
        await engine.aclose()


@pytest.mark.parametrize("is_lost", [False, True])
async def test_after_a_restart_everybody_is_entered_again(own_redis: OwnRedis, is_lost: bool) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url, timing=QUICK)) as (node,):
        await of(node).enter("news", {"ann": b'"Ann"'})
        before = of(node).incarnation
        (first,) = await told(node, 1)
        if is_lost:
            server.command("FLUSHALL")
        await server.stopped()
        await eventually(lambda: _is_away(node))
        for step in (of(node).members("news"), of(node).renew(60), of(node).sweep(), of(node).leave("news", ["ann"])):
            with pytest.raises(EngineUnavailable):
                await step
        await server.started()
        await eventually(lambda: _is_back(node))
        assert not await of(node).renew(60)
        assert of(node).incarnation != before
        assert (await of(node).enter("news", {"ann": b'"Ann"'}) is not None) == is_lost
        second = await of(node).enter("news", {"bob": b""})
        assert second is not None
        assert second.version > first.version + 2  # so that nobody takes it for the next one
        assert await of(node).alive() == {of(node).incarnation} | (set() if is_lost else {before})


async def _is_away(node: Node) -> bool:
    return not (await node.engine.health()).is_ok


async def _is_back(node: Node) -> bool:
    return (await node.engine.health()).is_ok


async def test_what_is_flushed_is_entered_again(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url), RedisEngine(server.url)) as nodes:
        node = of(nodes[0])
        await node.enter("news", {"ann": b""})
        server.command("FLUSHALL")
        assert (await node.members("news")).members == {}
        assert not await node.renew(60)
        assert await node.renew(60)
        assert await node.enter("news", {"ann": b""}) is not None
        assert list(await of(nodes[1]).sweep()) == []
        assert set((await of(nodes[1]).members("news")).members) == {"ann"}


async def test_promotion_ends_a_lease_and_jumps_the_version(own_redis: OwnRedis) -> None:
    # A server that was a replica for a moment may have lost what was confirmed.
    server = own_redis()
    async with present(RedisEngine(server.url), RedisEngine(server.url)) as nodes:
        node, other = map(of, nodes)
        first = await node.enter("news", {"ann": b""})
        before = node.incarnation
        promote(server)
        assert not await node.renew(60)
        assert not await other.renew(60)
        assert await node.enter("news", {"ann": b""}) is None  # nobody is told: she was here all the time
        second = await node.enter("news", {"bob": b""})
        assert first is not None
        assert second is not None
        assert second.version > first.version + 1
        # What stands under the old incarnation goes when its lease does.
        server.command("ZADD", "wsbroadcast:leases:{wsbroadcast}", 1, before)
        assert list(await other.sweep()) == []
        assert set((await other.members("news")).members) == {"ann", "bob"}


async def test_failover_ends_every_lease(own_sentinel: RedisSentinel) -> None:
    url = f"redis+sentinel://{own_sentinel.sentinel.host}:{own_sentinel.sentinel.port}/{own_sentinel.service}"
    async with present(RedisEngine(url), RedisEngine(url)) as nodes:
        node, other = map(of, nodes)
        first = await node.enter("news", {"ann": b""})
        before = {node.incarnation, other.incarnation}
        await own_sentinel.primary.killed()
        for each in nodes:
            assert await each.recorder.wait_until(lambda: each.recorder.gaps, 20)  # noqa: B023
            assert not await of(each).renew(60)
        assert not before & {node.incarnation, other.incarnation}
        await node.enter("news", {"ann": b""})
        second = await other.enter("news", {"bob": b""})
        assert first is not None
        assert second is not None
        assert second.version > first.version + 2
        assert set((await node.members("news")).members) == {"ann", "bob"}


# A cluster.


async def test_who_is_cancelled_before_a_question_goes_out_leaves_nothing_behind(
    own_cluster: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a warning tells of, such as a coroutine that nobody has awaited, fails here."""
    url = f"redis+cluster://{own_cluster[0].host}:{own_cluster[0].port}"
    async with present(RedisEngine(url), RedisEngine(url)) as nodes:
        node = of(nodes[0])
        await node.enter("news", {"ann": b""})

        def cancelled(work: Callable[[], Awaitable[object]]) -> asyncio.Task[object]:
            """Cancel what asks several servers in the turn of the loop in which it begins to."""
            task = asyncio.ensure_future(work())

            def begin(*questions: Any, **options: Any) -> asyncio.Future[list[Any]]:
                monkeypatch.undo()
                task.cancel()
                return gather(*questions, **options)

            gather = asyncio.gather
            monkeypatch.setattr(asyncio, "gather", begin)
            return task

        for work in (
            lambda: node.enter("news", {"bob": b""}),
            lambda: node.leave("news", ["bob"]),
            lambda: node.channels_of("ann"),
            lambda: node.renew(60),
        ):
            task = cancelled(work)
            await asyncio.wait([task])
            assert task.cancelled()
            gc.collect()
        await node.enter("news", {"bob": b""})
        assert (await of(nodes[1]).members("news")).members.keys() == {"ann", "bob"}


async def test_slot_that_moves_while_somebody_comes(own_cluster: list[RedisServer]) -> None:
    servers = own_cluster
    skip_without_shards(servers[0])
    url = f"redis+cluster://{servers[0].host}:{servers[0].port}"
    slot = key_slot(b"wsbroadcast:channel:news")
    async with present(RedisEngine(url), RedisEngine(url)) as nodes:
        node, other = map(of, nodes)
        names: list[str] = []
        refused = 0

        async def go_on() -> None:
            nonlocal refused
            while True:
                try:
                    await node.enter("news", {f"user {len(names)}": b""})
                except EngineUnavailable:  # repeated
                    refused += 1
                else:
                    names.append(f"user {len(names)}")
                await asyncio.sleep(0.001)

        async def more() -> None:
            seen = len(names) + refused
            await eventually(lambda: _is(lambda: len(names) + refused > seen + 10))

        entering = asyncio.create_task(go_on())
        try:
            await more()
            here = next(server for server in servers if server.command("CLUSTER", "COUNTKEYSINSLOT", slot) == 2)
            there = next(server for server in servers if server is not here)
            source, target = (server.command("CLUSTER", "MYID") for server in (here, there))
            there.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source)
            here.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target)
            for key in ("members", "state"):
                await more()
                name = f"wsbroadcast:{key}:{{wsbroadcast:channel:news}}"
                here.command("MIGRATE", there.host, there.port, name, 0, 5000)
            await more()
            for server in (there, here, *(each for each in servers if each not in (here, there))):
                server.command("CLUSTER", "SETSLOT", slot, "NODE", target)
            done = len(names)
            await eventually(lambda: _is(lambda: len(names) > done + 10))
        finally:
            entering.cancel()
            await asyncio.wait([entering])
        assert refused
        await eventually(lambda: _is_back(nodes[1]))
        await node.renew(60)
        found = await other.members("news")
        assert set(names) <= set(found.members) <= {*names, f"user {len(names)}"}
        assert await other.channels_of("user 0") == {"news"}
        await node.leave("news", found.members)
        assert await other.count("news") == 0


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()


async def test_who_is_swept_while_somebody_comes_is_listed_again(
    own_cluster: list[RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis+cluster://{own_cluster[0].host}:{own_cluster[0].port}"
    async with present(RedisEngine(url), RedisEngine(url)) as nodes:
        late, other = map(of, nodes)
        await late.enter("news", {"ann": b""})
        await crash(nodes[0])
        store = store_of(nodes[0])
        step = store._step

        async def frozen(*arguments: Any) -> Any:
            assert [change.left for change in await other.sweep()] == [{"ann"}]
            return await step(*arguments)

        monkeypatch.setattr(store, "_step", frozen)
        assert await late.enter("news", {"bob": b""}) is not None
        assert [change.left for change in await other.sweep()] == [{"bob"}]
        assert (await other.members("news")).members == {}


# An administrator, and short memory.


async def test_flushed_scripts_change_nothing(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url)) as (node,):
        for number in range(3):
            server.command("SCRIPT", "FLUSH")
            some = await asyncio.gather(*(of(node).enter("news", {f"{number} {each}": b""}) for each in range(3)))
            assert None not in some
        assert await of(node).count("news") == 9


async def test_what_is_lost_of_a_lease_is_listed_by_who_comes(own_redis: OwnRedis) -> None:
    """Short memory takes single keys; nobody stays in a channel for ever because of that."""
    server = own_redis()
    async with present(RedisEngine(server.url), RedisEngine(server.url)) as nodes:
        dead, other = map(of, nodes)
        await dead.enter("news", {"ann": b""})
        server.command("DEL", "wsbroadcast:leases:{wsbroadcast}")
        server.command("DEL", f"wsbroadcast:entered:{{wsbroadcast}}:{dead.incarnation}")
        assert not await other.renew(60)
        assert list(await other.sweep()) == []
        await other.enter("news", {"bob": b""})
        (change,) = await other.sweep()
        assert change.left == {"ann"}
        assert set((await other.members("news")).members) == {"bob"}


async def test_what_is_lost_of_a_channel_is_entered_again(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url), RedisEngine(server.url)) as nodes:
        node, other = map(of, nodes)
        await node.enter("news", {"ann": b"", "bob": b""})
        server.command("DEL", "wsbroadcast:members:{wsbroadcast:channel:news}")
        assert await other.channels_of("ann") == frozenset()
        assert await other.enter("news", {"eve": b""}) is not None
        await node.enter("news", {"ann": b""})
        await node.leave("news", ["ann"])
        await other.leave("news", ["eve"])
        assert [key for key in keys_of(server) if ":entered:" in key] == []


async def test_short_memory_refuses_who_comes_and_tells_nobody(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url)) as (node,):
        await of(node).enter("news", {"ann": b""})
        before = await of(node).members("news")
        server.command("CONFIG", "SET", "maxmemory", 1)
        with pytest.raises(EngineUnavailable, match="OOM"):
            await of(node).enter("news", {"bob": b""})
        assert await of(node).members("news") == before
        assert await of(node).leave("news", ["ann"]) is not None
        server.command("CONFIG", "SET", "maxmemory", 0)
        assert await of(node).enter("news", {"bob": b""}) is not None
        assert [(set(each.joined), each.left) for each in await told(node, 3)] == [
            ({"ann"}, frozenset()),
            (set(), {"ann"}),
            ({"bob"}, frozenset()),
        ]


async def test_short_memory_leaves_leases_to_those_who_have_one(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url), RedisEngine(server.url)) as nodes:
        node, other = map(of, nodes)
        await node.enter("news", {"ann": b""})
        dead = await crash(nodes[1])
        server.command("CONFIG", "SET", "maxmemory", 1)
        assert await node.renew(60)
        with pytest.raises(EngineUnavailable, match="OOM"):
            await other.renew(60)
        assert other.incarnation == dead
        assert await node.alive() == {node.incarnation}
        server.command("CONFIG", "SET", "maxmemory", 0)
        assert not await other.renew(60)
        assert await other.alive() == {node.incarnation, other.incarnation}
        assert set((await other.members("news")).members) == {"ann"}


@pytest.mark.parametrize("key", ["members:{t:channel:news}", "state:{t:channel:news}", "leases:{t}"])
async def test_key_of_somebody_else_is_an_error(own_redis: OwnRedis, key: str) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url, prefix="t")) as (node,):
        server.command("DEL", f"t:{key}")
        server.command("SET", f"t:{key}", "mine")
        with pytest.raises(EngineError, match="WRONGTYPE"):
            await of(node).enter("news", {"ann": b""})
        assert server.command("GET", f"t:{key}") == "mine"
        server.command("DEL", f"t:{key}")
        await of(node).renew(60)
        await of(node).enter("news", {"ann": b""})
        assert set((await of(node).members("news")).members) == {"ann"}


# How long it lasts, and how much it is.


async def test_sweeping_touches_what_would_expire(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url)) as (node,):
        for number in range(120):
            await of(node).enter(f"room {number}", {"ann": b"", f"user {number}": b""})
        with redis.Redis.from_url(server.unix_url) as client:
            keys = list(client.scan_iter(count=1000))
            assert len(keys) == 2 * 120 + 121 + 2
            assert all(client.pexpire(key, 60_000) for key in keys)
            await of(node).sweep()
            assert all(client.pttl(key) <= 60_000 for key in keys)  # it isn't due
            store_of(node).held.touched -= store_of(node).expire
            await of(node).renew(60)
            await of(node).sweep()
            assert all(client.pttl(key) > 60_000 for key in keys)


async def test_large_change_is_told_as_a_jump(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(RedisEngine(server.url)) as (node,):
        await of(node).enter("news", {"ann": b""})
        crowd = {f"user {number}": b'"%b"' % (b"x" * 1000) for number in range(400)}
        change = await of(node).enter("news", crowd)
        assert change is not None
        assert change.joined == crowd
        first, second = await told(node, 2)
        assert (second.joined, second.left) == ({}, frozenset())
        assert second.version == change.version == first.version + 2
        assert (await of(node).members("news")).version == change.version


async def test_crowds_of_a_dead_node_are_swept_once(own_redis: OwnRedis) -> None:
    server = own_redis()
    async with present(*(RedisEngine(server.url) for _ in range(4)), channels=["large"]) as nodes:
        dead, *others = nodes
        for start in range(0, 2500, 100):
            await of(dead).enter("large", {f"user {start + each}": b"" for each in range(100)})
        await asyncio.gather(*(of(dead).enter(f"room {number}", {"ann": b""}) for number in range(200)))
        await of(others[0]).enter("large", {f"other {each}": b"" for each in range(1000)})
        await crash(dead)
        found = await asyncio.gather(*(of(each).sweep() for each in others))
        left = [name for changes in found for change in changes for name in change.left]
        assert sorted(left) == sorted([f"user {each}" for each in range(2500)] + ["ann"] * 200)
        assert all(len(change.left) <= 1000 for changes in found for change in changes)
        changes = await told(others[0], 26 + len([each for some in found for each in some if len(each.left) > 1]))
        versions = [change.version for change in changes]
        assert versions == list(range(versions[0], versions[0] + len(versions)))
        assert follow(changes) == {f"other {each}" for each in range(1000)}
        assert list(await of(others[0]).sweep()) == []
        assert await of(others[0]).count("large") == 1000
        assert [key for key in keys_of(server) if of(dead).incarnation in key] == []


# What we may do.

TO_BE_PRESENT = (
    "+eval +evalsha +exists +hdel +hexists +hget +hgetall +hincrby +hkeys +hlen +hmget +hscan +hset +info "
    "+pexpire +sadd +srandmember +srem +sscan +time +zadd +zrangebyscore +zrem +zscore"
)


async def all_of_it(nodes: list[Node]) -> None:
    """Do everything once."""
    first, second = map(of, nodes)
    await first.enter("news", {"ann": b"", "bob": b""})
    await second.enter("news", {"ann": b""})
    await first.leave("news", ["bob"])
    assert await second.channels_of("ann") == {"news"}
    assert await second.count("news") == 1
    assert set((await second.members("news")).members) == {"ann"}
    store_of(nodes[1]).held.touched -= store_of(nodes[1]).expire
    await crash(nodes[0])
    await second.sweep()
    assert not await first.renew(60)
    assert await second.alive() == {first.incarnation, second.incarnation}
    await second.leave("news", ["ann"])


async def test_documented_permissions_are_enough(own_redis: OwnRedis) -> None:
    assert TO_BE_PRESENT in " ".join((RedisEngine.__doc__ or "").split())
    rules = f"~t:* &t:* +publish +subscribe +unsubscribe {TO_BE_PRESENT}"
    server = own_redis(users=[f"app on >secret resetchannels {rules}"])
    url = f"redis://app:secret@{server.host}:{server.port}?prefix=t"
    async with present(RedisEngine.from_url(url), RedisEngine.from_url(url)) as nodes:
        await all_of_it(nodes)


async def test_documented_permissions_are_enough_in_a_cluster(own_cluster: list[RedisServer]) -> None:
    skip_without_shards(own_cluster[0])
    pubsub = "+spublish +ssubscribe +sunsubscribe +ping +cluster|slots"
    for server in own_cluster:
        server.command("ACL", "SETUSER", "app", *f"on >secret ~t:* resetchannels &t:* {pubsub} {TO_BE_PRESENT}".split())
    url = f"redis+cluster://app:secret@{own_cluster[0].host}:{own_cluster[0].port}?prefix=t"
    async with present(RedisEngine.from_url(url), RedisEngine.from_url(url)) as nodes:
        await all_of_it(nodes)


@pytest.mark.parametrize("missing", ["~t:*", *TO_BE_PRESENT.replace(" +evalsha", "").split()])  # a cluster needs that
async def test_missing_permission_is_named(own_redis: OwnRedis, missing: str) -> None:
    rules = f"~t:* &t:* +publish +subscribe +unsubscribe {TO_BE_PRESENT}".split()
    rules.remove(missing)
    server = own_redis(users=[f"app on >secret resetchannels {' '.join(rules)}"])
    url = f"redis://app:secret@{server.host}:{server.port}?prefix=t"
    needs = rf"Redis at {server.host}:{server.port} refuses the user 'app' \(NOPERM .* needs &t:\* .* ~t:\* .*\+zscore"
    with pytest.raises(EngineUnavailable, match=needs):
        async with present(RedisEngine.from_url(url), RedisEngine.from_url(url)) as nodes:
            await all_of_it(nodes)


async def test_client_of_redis_sees_nothing_odd(own_redis: OwnRedis) -> None:
    """What is kept of a channel can be read by anybody, as it is documented."""
    server = own_redis()
    async with present(RedisEngine(server.url)) as (node,):
        await of(node).enter("news", {"ann": b'"Ann"'})
        with redis.Redis.from_url(server.unix_url, decode_responses=True) as client:
            found: Any = client.hgetall("wsbroadcast:members:{wsbroadcast:channel:news}")
        assert found == {"ann": f'{of(node).incarnation}\n"Ann"'}
