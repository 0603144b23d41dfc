"""Who is in a channel, as JetStream lets nodes know it: chance, crashes, restarts, what is long, who may what."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, cast

import nats
import pytest
from nats.aio.client import Client

from tests.engines.links import used
from tests.engines.nats_links import serving
from tests.engines.test_nats_history import permitted
from tests.engines.test_redis_presence import CHANNELS, Steps, of, present, told
from tests.support.asgi import Peer
from tests.support.brokers import JetStreamServer, NATSServer, jetstream_cluster
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from tests.support.strict import STRICT
from wsbroadcast import ConfigurationError, ConnectionManager, EngineError, EngineUnavailable, Presence
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.broker.presence import PresentEngine, PresentLink
from wsbroadcast.engines.nats import NATSEngine, rooms
from wsbroadcast.engines.nats.jetstream import Put
from wsbroadcast.engines.nats.ledger import Entry
from wsbroadcast.engines.nats.presence import NATSPresence
from wsbroadcast.engines.nats.rooms import Room
from wsbroadcast.options import Timing
from wsbroadcast.presence import Roll
from wsbroadcast.publication import PresenceChange
from wsbroadcast.testing import Node, Recorder
from wsbroadcast.testing.nodes import NEWS
from wsbroadcast.testing.presence import changes_of

OwnJetStream = Callable[..., JetStreamServer]

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
STEPS = 4000 if FULL else 300
ROUNDS = 200 if FULL else 25
SEEDS = range(5) if FULL else range(1)
LONG = 600.0
QUICK = Timing(linger=0.02, connect_timeout=5.0)


@pytest.fixture(scope="module")
def jetstream() -> Iterator[JetStreamServer]:
    """One that all tests share that change nothing but their own stream."""
    with JetStreamServer() as server:
        yield server


@pytest.fixture
def own_jetstream() -> Iterator[OwnJetStream]:
    servers: list[JetStreamServer] = []

    def own(**options: Any) -> JetStreamServer:
        servers.append(JetStreamServer(**options))
        servers[-1].start()
        return servers[-1]

    yield own
    for server in servers:
        server.close()


def engine(url: str, prefix: str, **options: Any) -> NATSEngine:
    return NATSEngine(url, prefix=prefix, timing=QUICK, **options)


class Administrator:
    """Asks a NATS server without any of our code."""

    def __init__(self, client: Client, prefix: str) -> None:
        self.client = client
        self.prefix = prefix
        self.stream = f"{prefix}-presence"

    async def call(self, verb: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        text = b"" if content is None else json.dumps(content).encode()
        answer: dict[str, Any] = json.loads((await self.client.request(f"$JS.API.{verb}", text, timeout=5)).data)
        assert "error" not in answer, answer
        return answer

    async def streams(self) -> list[str]:
        return (await self.call("STREAM.NAMES"))["streams"] or []

    async def subjects(self) -> dict[str, int]:
        """Return how many messages stand under which name, without the root and the epoch."""
        info = await self.call(f"STREAM.INFO.{self.stream}", {"subjects_filter": ">"})
        found: dict[str, int] = info["state"].get("subjects") or {}
        return {name.split(".", 2)[-1]: count for name, count in found.items() if not name.endswith(".epoch")}

    async def count(self, kind: str) -> int:
        return sum(count for name, count in (await self.subjects()).items() if name.startswith(f"{kind}."))

    async def end_lease(self, incarnation: str) -> None:
        """Do at once what the stream does when a lease has run out."""
        await self.call(f"STREAM.PURGE.{self.stream}", {"filter": f"{self.prefix}:present.*.lease.{incarnation}"})

    async def write(self, subject: str, payload: bytes) -> None:
        """Write what none of our nodes would."""
        info = await self.call(f"STREAM.INFO.{self.stream}", {"subjects_filter": ">"})
        epoch = next(name.split(".")[1] for name in info["state"]["subjects"] if ".lease." in name)
        await self.client.request(f"{self.prefix}:present.{epoch}.{subject}", payload, timeout=5)


@asynccontextmanager
async def administering(server: NATSServer, prefix: str) -> AsyncIterator[Administrator]:
    client = await nats.connect(server.url, allow_reconnect=False)
    try:
        yield Administrator(client, prefix)
    finally:
        await client.close()


@asynccontextmanager
async def here(
    server: NATSServer, prefix: str, count: int, channels: Iterable[str] = ("news",)
) -> AsyncIterator[tuple[Administrator, list[Node]]]:
    """Run nodes that hold a lease and have joined channels, beside somebody who isn't one of them."""
    async with (
        administering(server, prefix) as admin,
        present(*(engine(server.url, prefix) for _ in range(count)), channels=channels) as nodes,
    ):
        yield admin, nodes


async def agree(node: Node, channel: str = "news") -> None:
    """Wait until a node was told what is so, and compare: the versions have no hole, and lead there."""
    found = await of(node).members(channel)
    assert await of(node).count(channel) == len(found.members)

    def mine() -> list[PresenceChange]:
        return [each for each in changes_of(node) if each.audience.name == channel]

    assert await node.recorder.wait_until(lambda: bool(mine()) and mine()[-1].version >= found.version, 10), found
    members: set[str] = set()
    for number, change in enumerate(mine()):
        assert change.version == mine()[0].version + number
        assert not change.joined.keys() & members, "it is told twice that somebody comes"
        assert change.left <= members, "it is told of somebody who wasn't there that it goes"
        members = (members | change.joined.keys()) - change.left
    assert members == found.members.keys()


# Chance.


class StepsOnNATS(Steps):
    """Random steps of nodes, whose leases somebody ends."""

    admin: Administrator

    async def end_lease(self, node: Node) -> str:
        dead = of(node).incarnation
        await self.admin.end_lease(dead)
        return dead


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_steps_with_crashes(jetstream: JetStreamServer, prefix: str, seed: int) -> None:
    engines = [engine(jetstream.url, prefix) for _ in range(3)]
    async with administering(jetstream, prefix) as admin, present(*engines, channels=CHANNELS) as nodes:
        steps = StepsOnNATS(nodes, seed)
        steps.admin = admin
        for _ in range(STEPS):
            await steps.take()
        await steps.settle()
        await steps.leave_all()

        async def is_tidy() -> bool:
            return {"in", "of"}.isdisjoint(name.partition(".")[0] for name in await admin.subjects())

        await eventually(is_tidy)
        for channel in CHANNELS:
            assert (await of(nodes[0]).members(channel)).members == {}
        assert await admin.count("log") == len(CHANNELS)  # what is left is the version
        assert await admin.call("CONSUMER.NAMES." + admin.stream)
        assert (await admin.call(f"STREAM.INFO.{admin.stream}"))["state"]["consumer_count"] == 0


class Keeper:
    """Makes the broker agree with what one node wants, again and again, as a node does."""

    def __init__(self, engine: PresentEngine) -> None:
        self.engine = engine
        self.wanted: dict[str, set[str]] = {channel: set() for channel in CHANNELS}
        self.failures = 0

    async def agree(self) -> bool:
        """Try once; return whether all of it is done, under one lease."""
        names = {f"user {number}" for number in range(8)}
        try:
            is_same = await self.engine.renew(LONG)
            for channel, wanted in self.wanted.items():
                await self.engine.enter(channel, dict.fromkeys(wanted, b"1"))
                await self.engine.leave(channel, names - wanted)
            await self.engine.sweep()
        except EngineUnavailable:
            self.failures += 1
            return False
        return is_same


async def are_linked(nodes: list[Node]) -> bool:
    return all(of(node).link is not None for node in nodes)


@pytest.mark.parametrize("seed", SEEDS)
async def test_cuts_lost_leases_and_restarts_end_in_agreement(
    own_jetstream: OwnJetStream, prefix: str, seed: int
) -> None:
    """Links are reset in the middle of steps and leases end; all nodes see what they want together, told once each."""
    chance = random.Random(seed)  # a seeded test
    server = own_jetstream()
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(FaultProxy(server)) for _ in range(3)]
        watcher, *nodes = await stack.enter_async_context(
            present(
                *(engine(url, prefix) for url in (server.url, *(proxy.url for proxy in proxies))), channels=CHANNELS
            )
        )
        admin = await stack.enter_async_context(administering(server, prefix))
        keepers = [Keeper(of(node)) for node in nodes]
        for _ in range(ROUNDS):
            for keeper in keepers:
                for wanted in keeper.wanted.values():
                    wanted ^= set(chance.sample([f"user {number}" for number in range(8)], 2))
            if chance.random() < 0.5:
                await eventually(partial(are_linked, nodes), 20)
            running = [asyncio.create_task(keeper.agree()) for keeper in keepers]
            if chance.random() < 0.5:
                chance.choice(proxies).cut(replies=chance.randrange(4000))
            if chance.random() < 0.2:
                await admin.end_lease(chance.choice(keepers).engine.incarnation)
            await asyncio.gather(*running)
            for proxy in proxies:
                proxy.heal()
        await eventually(partial(are_linked, nodes), 20)
        for keeper in (*keepers, *keepers):  # the first time some may only learn that a lease is lost
            await eventually(keeper.agree, 20)
        assert sum(keeper.failures for keeper in keepers) > 3
        for channel in CHANNELS:
            wanted = set().union(*(keeper.wanted[channel] for keeper in keepers))
            for node in (watcher, *nodes):
                assert (await of(node).members(channel)).members.keys() == wanted
            await agree(watcher, channel)
        for name in (f"user {number}" for number in range(8)):
            where = {channel for channel in CHANNELS if any(name in keeper.wanted[channel] for keeper in keepers)}
            assert await of(watcher).channels_of(name) == where


async def test_who_is_swept_while_it_tries_again_to_come_is_found_later(
    jetstream: JetStreamServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with here(jetstream, prefix, 2) as (admin, (node, other)):
        await of(node).enter("news", {"ann": b""})
        await of(other).enter("news", {"bob": b""})  # comes in between
        rooms = cast(NATSPresence, cast(PresentLink, of(node).link).presence)._rooms
        catch_up = rooms.catch_up

        async def swept_first(room: Room) -> None:
            monkeypatch.undo()
            await admin.end_lease(of(node).incarnation)
            (change,) = await of(other).sweep()
            assert change.left == {"ann"}
            await catch_up(room)

        monkeypatch.setattr(rooms, "catch_up", swept_first)
        assert await of(node).enter("news", {"cat": b""}) is not None
        (change,) = await of(other).sweep()
        assert change.left == {"cat"}
        assert (await of(other).members("news")).members.keys() == {"bob"}
        await agree(other)


async def test_who_comes_while_a_log_is_written_anew_stands_in_it(
    jetstream: JetStreamServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with here(jetstream, prefix, 3) as (_, (node, other, reader)):
        log = cast(NATSPresence, cast(PresentLink, of(node).link).presence)._rooms
        write, interfered = log._write, asyncio.Event()

        async def interfering(room: Room, entry: Entry, before: Sequence[Put] = ()) -> bool:
            if entry.more:  # it begins to say anew who is there
                monkeypatch.undo()
                await of(other).enter("news", {"zed": b""})
                interfered.set()
            return await write(room, entry, before)

        monkeypatch.setattr(log, "_write", interfering)
        names = [f"user {number}" for number in range(40)]
        await of(node).enter("news", dict.fromkeys(names, b""))
        for at in range(0, 30, 10):
            await of(node).leave("news", names[at : at + 10])
        assert interfered.is_set()
        for each in (node, other, reader):
            assert (await of(each).members("news")).members.keys() == {*names[30:], "zed"}
        await agree(reader)


async def test_many_nodes_in_one_channel_at_once(jetstream: JetStreamServer, prefix: str) -> None:
    async with present(*(engine(jetstream.url, prefix) for _ in range(8))) as nodes:
        model = Roll()

        async def live(node: Node, seed: int) -> None:
            chance = random.Random(seed)  # a seeded test
            for _ in range(20):
                some = chance.sample([f"user {number}" for number in range(10)], 3)
                if chance.random() < 0.6:
                    await of(node).enter("news", dict.fromkeys(some, b""))
                    model.enter("news", of(node).incarnation, dict.fromkeys(some, b""))
                else:
                    await of(node).leave("news", some)
                    model.leave("news", of(node).incarnation, some)

        await asyncio.gather(*(live(node, seed) for seed, node in enumerate(nodes)))
        for node in nodes:
            assert (await of(node).members("news")).members == model.members("news").members
            await agree(node)


# Processes.

_NODE = """
import asyncio, sys
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.testing import Recorder

async def main():
    engine = NATSEngine(sys.argv[1], prefix=sys.argv[2])
    await engine.start(Recorder())
    while True:
        try:
            if not await engine.renew(1.0):
                await engine.enter("news", {"both": b"", "mine": b""})
                print(engine.incarnation, flush=True)
        except EngineUnavailable:
            pass
        await asyncio.sleep(0.2)

asyncio.run(main())
"""


def started(server: JetStreamServer, prefix: str) -> subprocess.Popen[str]:
    command = [*STRICT, "-c", _NODE, server.url, prefix]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@asynccontextmanager
async def process_of(server: JetStreamServer, prefix: str) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """Run a node in a process of its own, which holds a lease of a second; yield it and its incarnation."""
    with started(server, prefix) as process:
        try:
            assert process.stdout is not None
            yield process, (await asyncio.to_thread(process.stdout.readline)).strip()
        finally:
            process.kill()


async def swept(nodes: list[Node]) -> list[PresenceChange]:
    """Let all nodes sweep at once, until somebody finds something."""

    async def sweep() -> list[PresenceChange]:
        found = await asyncio.gather(*(of(node).sweep() for node in nodes))
        return [change for changes in found for change in changes]

    found = await eventually(sweep)
    assert isinstance(found, list)
    return found


async def test_process_that_is_killed_has_left_and_that_is_told_once(jetstream: JetStreamServer, prefix: str) -> None:
    async with present(engine(jetstream.url, prefix), engine(jetstream.url, prefix)) as nodes:
        await of(nodes[0]).enter("news", {"both": b""})
        async with process_of(jetstream, prefix) as (process, incarnation):
            assert (await of(nodes[0]).members("news")).members.keys() == {"both", "mine"}
            process.kill()
            (change,) = await swept(nodes)
            assert (change.left, change.by) == (frozenset({"mine"}), incarnation)
            assert [list(await of(node).sweep()) for node in nodes] == [[], []]
            for node in nodes:
                assert await of(node).channels_of("mine") == frozenset()
                await agree(node)


async def test_process_that_was_frozen_leaves_and_joins_once(jetstream: JetStreamServer, prefix: str) -> None:
    async with (
        present(engine(jetstream.url, prefix), engine(jetstream.url, prefix)) as nodes,
        process_of(jetstream, prefix) as (process, incarnation),
    ):
        process.send_signal(signal.SIGSTOP)
        (change,) = await swept(nodes)
        assert change.left == {"both", "mine"}
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        again = (await asyncio.to_thread(process.stdout.readline)).strip()
        assert again not in ("", incarnation)
        for node in nodes:
            assert list(await of(node).sweep()) == []
            assert (await of(node).members("news")).members.keys() == {"both", "mine"}
            changes = await told(node, 3)
            assert [(len(each.joined), len(each.left), each.by) for each in changes] == [
                (2, 0, incarnation),
                (0, 2, incarnation),
                (2, 0, again),
            ]


# What happens to the server and the stream.


async def test_nobody_comes_before_there_is_a_lease(jetstream: JetStreamServer, prefix: str) -> None:
    node = engine(jetstream.url, prefix)
    await node.start(Recorder())
    try:
        with pytest.raises(EngineUnavailable, match="call renew first"):
            await node.enter("news", {"ann": b""})
        assert await node.leave("news", ["ann"]) is None
    finally:
        await node.aclose()


@pytest.mark.parametrize("is_told", [False, True])
async def test_who_does_not_use_it_makes_no_stream(jetstream: JetStreamServer, prefix: str, is_told: bool) -> None:
    node = Node(engine(jetstream.url, prefix), Recorder(), 10)
    node.engine.uses_lease = is_told
    await node.engine.start(node.recorder)
    try:
        await node.join(NEWS)
        await node.publish("hello")
        await node.receives(["hello"])
        async with administering(jetstream, prefix) as admin:
            assert (admin.stream in await admin.streams()) is is_told
    finally:
        await node.engine.aclose()


async def test_after_a_restart_everybody_is_entered_again(own_jetstream: OwnJetStream, prefix: str) -> None:
    server = own_jetstream()
    async with present(engine(server.url, prefix), engine(server.url, prefix)) as (node, other):
        await of(node).enter("news", {"ann": b'"Ann"'})
        before = of(node).incarnation
        (first,) = await told(node, 1)
        await server.restarted()
        for each in (node, other):
            assert await each.recorder.wait_until(lambda each=each: each.recorder.gaps, 20)  # type: ignore[misc]
        assert (await of(other).members("news")).members == {}
        assert not await of(node).renew(LONG)
        assert of(node).incarnation != before
        assert await of(node).alive() == {of(node).incarnation}
        second = await of(node).enter("news", {"ann": b'"Ann"'})
        assert second is not None
        assert second.version > first.version + 2  # so that nobody takes it for the next one
        assert await of(node).renew(LONG)
        assert (await of(other).members("news")).members == {"ann": b'"Ann"'}


@pytest.mark.parametrize("harm", ["DELETE", "PURGE"])
async def test_stream_that_is_gone_is_made_anew(jetstream: JetStreamServer, prefix: str, harm: str) -> None:
    async with here(jetstream, prefix, 2) as (admin, (node, other)):
        first = await of(node).enter("news", {"ann": b""})
        await of(other).enter("news", {"bob": b""})
        await admin.call(f"STREAM.{harm}.{admin.stream}")
        with pytest.raises(EngineUnavailable):
            await of(other).enter("news", {"eve": b""})
        assert not await of(node).renew(LONG)
        assert await of(node).enter("news", {"eve": b""}) is not None
        with pytest.raises(EngineUnavailable, match="call renew first"):
            await of(other).enter("news", {"bob": b""})
        assert not await of(other).renew(LONG)
        second = await of(other).enter("news", {"bob": b""})
        assert first is not None
        assert second is not None
        assert second.version > first.version + 3
        for each in (node, other):
            assert (await of(each).members("news")).members.keys() == {"eve", "bob"}
            assert await of(each).renew(LONG)


async def test_what_comes_late_from_the_dead_is_swept(jetstream: JetStreamServer, prefix: str) -> None:
    async with here(jetstream, prefix, 2) as (admin, (late, other)):
        await of(late).enter("news", {"ann": b""})
        await admin.end_lease(of(late).incarnation)
        assert [change.left for change in await of(other).sweep()] == [{"ann"}]
        assert list(await of(other).sweep()) == []
        assert await of(late).enter("news", {"ann": b"", "bob": b""}) is not None
        assert await of(other).channels_of("ann") == frozenset()
        assert [change.left for change in await of(other).sweep()] == [{"ann", "bob"}]
        assert list(await of(other).sweep()) == []
        assert not await of(late).renew(LONG)
        await agree(other)


async def test_lease_whose_renewal_was_not_confirmed_is_the_same(jetstream: JetStreamServer, prefix: str) -> None:
    async with FaultProxy(jetstream) as proxy, present(engine(proxy.url, prefix)) as (node,):
        before = of(node).incarnation
        proxy.drop_replies()
        with pytest.raises(EngineUnavailable):
            await of(node).renew(LONG)
        proxy.heal()
        proxy.reset()

        async def is_renewed() -> bool:
            try:
                return await of(node).renew(LONG)
            except EngineUnavailable:
                return False

        await eventually(is_renewed)
        assert of(node).incarnation == before


# What is long, and what is large.


async def test_log_of_a_channel_stays_short(jetstream: JetStreamServer, prefix: str) -> None:
    async with here(jetstream, prefix, 3) as (admin, (node, other, late)):
        await of(other).enter("news", {"there": b'"x"'})
        await of(late).members("news")  # and hears nothing for a long time
        for number in range(300):
            await of(node).enter("news", {f"user {number}": b""})
            await of(node).leave("news", [f"user {number}"])
        assert await admin.count("log") < 40
        assert (await of(late).members("news")).members == {"there": b'"x"'}
        assert await of(late).enter("news", {"late": b""}) is not None
        assert await of(other).leave("news", ["there"]) is not None
        await agree(other)
        await of(late).leave("news", ["late"])
        assert await admin.count("log") == 1


async def test_log_of_a_large_channel_is_written_anew(
    jetstream: JetStreamServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "_MOST_BYTES", 4096)
    monkeypatch.setattr("wsbroadcast.engines.nats.ledger._WHOLE_BYTES", 1024)
    crowd = {f"user {number}": b'"%d"' % number for number in range(300)}
    async with here(jetstream, prefix, 3) as (admin, (node, other, late)):
        change = await of(node).enter("news", crowd)
        assert change is not None
        assert change.joined == crowd
        await of(other).enter("news", dict(list(crowd.items())[:100]))
        await of(late).members("news")

        async def flap(each: Node, name: str) -> None:
            for _ in range(300):
                await of(each).enter("news", {name: b""})
                await of(each).leave("news", [name])

        await asyncio.gather(flap(node, "ann"), flap(other, "bob"))
        assert await admin.count("log") < 800
        for each in (late, node, other):
            assert (await of(each).members("news")).members == crowd
        fresh = engine(jetstream.url, prefix)
        async with present(fresh) as (reader,):
            assert await of(reader).members("news") == await of(node).members("news")
        left = await of(node).leave("news", crowd)
        assert left is not None
        assert left.left == set(list(crowd)[100:])
        await agree(late)


async def test_more_records_than_are_read_at_once(jetstream: JetStreamServer, prefix: str) -> None:
    async with here(jetstream, prefix, 2) as (admin, (node, other)):
        names = [f"room {number}" for number in range(1100)]
        for start in range(0, len(names), 100):
            await asyncio.gather(*(of(node).enter(name, {"ann": b""}) for name in names[start : start + 100]))
        assert await of(other).channels_of("ann") == set(names)
        await admin.end_lease(of(node).incarnation)
        assert await of(other).channels_of("ann") == frozenset()
        left: list[str] = []
        while swept := await of(other).sweep():
            left += [change.audience.name for change in swept]
        assert sorted(left) == sorted(names)


async def test_crowds_of_a_dead_node_are_swept_once(jetstream: JetStreamServer, prefix: str) -> None:
    async with here(jetstream, prefix, 4, channels=["large"]) as (admin, nodes):
        dead, *others = nodes
        for start in range(0, 2500, 100):
            await of(dead).enter("large", {f"user {start + each}": b"" for each in range(100)})
        await asyncio.gather(*(of(dead).enter(f"room {number}", {"ann": b""}) for number in range(100)))
        await of(others[0]).enter("large", {f"other {each}": b"" for each in range(500)})
        await admin.end_lease(of(dead).incarnation)
        left: list[str] = []
        while len(left) < 2600:
            found = await asyncio.gather(*(of(each).sweep() for each in others))
            left += [name for changes in found for change in changes for name in change.left]
        assert sorted(left) == sorted([f"user {each}" for each in range(2500)] + ["ann"] * 100)
        assert [list(await of(each).sweep()) for each in others] == [[], [], []]
        for each in others:
            await agree(each, "large")


async def test_what_others_see_may_be_too_large(own_jetstream: OwnJetStream, prefix: str) -> None:
    server = own_jetstream(config="max_payload: 8192\n")
    async with present(engine(server.url, prefix)) as (node,):
        crowd = {f"user {number}": b'"%b"' % (b"x" * 500) for number in range(100)}
        change = await of(node).enter("news", crowd)
        assert change is not None
        assert change.joined == crowd
        with pytest.raises(EngineError, match=r"let Presence.info say less, or raise max_payload"):
            await of(node).enter("news", {"ann": b'"%b"' % (b"x" * 9000)})
        assert (await of(node).members("news")).members == crowd
        await agree(node)


# Who may what.

NEEDED = (
    "{prefix}.>",
    "{prefix}:present.>",
    "$JS.API.STREAM.*.{prefix}-presence",
    "$JS.API.DIRECT.GET.{prefix}-presence",
)


async def test_permissions_that_are_named_are_enough(own_jetstream: OwnJetStream, prefix: str) -> None:
    documented = " ".join((NATSEngine.__doc__ or "").split())
    assert all(f"`{name.format(prefix='prefix')}`" in documented for name in NEEDED)
    server = own_jetstream(config=permitted(prefix, NEEDED))
    url = f"nats://node:node@{server.host}:{server.port}"
    async with present(engine(url, prefix), engine(url, prefix)) as (node, other):
        await of(node).enter("news", {"ann": b"", "bob": b""})
        await of(other).enter("news", {"ann": b""})
        for number in range(40):  # until the log is written anew
            await of(node).enter("news", {f"user {number}": b"", "bob": b"%d" % number})
            await of(node).leave("news", [f"user {number}"])
        assert await of(other).channels_of("ann") == {"news"}
        assert not await of(node).renew(1) or await eventually(lambda: swept([other]))
        await agree(other)


@pytest.mark.parametrize("missing", NEEDED[1:])
async def test_permission_that_is_missing_is_named(own_jetstream: OwnJetStream, prefix: str, missing: str) -> None:
    server = own_jetstream(config=permitted(prefix, tuple(name for name in NEEDED if name != missing)))
    url = f"nats://node:node@{server.host}:{server.port}"
    node = engine(url, prefix)
    node.uses_lease = True
    with pytest.raises(ConfigurationError, match="doesn't let the user 'node' publish") as caught:
        await node.start(Recorder())
    for name in NEEDED[1:]:
        assert f"'{name.format(prefix=prefix)}'" in str(caught.value)
    unaware = engine(url, prefix)
    await unaware.start(Recorder())
    try:
        with pytest.raises(EngineUnavailable, match="presence needs publish on"):
            await unaware.renew(LONG)
        assert unaware.stats().reconnects == 0
    finally:
        await unaware.aclose()


async def test_server_without_jetstream_is_refused(own_nats: Callable[..., NATSServer], prefix: str) -> None:
    server = own_nats()
    node = engine(server.url, prefix)
    node.uses_lease = True
    with pytest.raises(ConfigurationError, match=r"write jetstream \{\} into .* or leave presence= out"):
        await node.start(Recorder())
    unaware = engine(server.url, prefix)
    await unaware.start(Recorder())
    try:
        with pytest.raises(EngineUnavailable, match="JetStream is off"):
            await unaware.renew(LONG)
    finally:
        await unaware.aclose()


async def test_manager_with_presence_refuses_a_server_that_keeps_none(
    own_nats: Callable[..., NATSServer], prefix: str
) -> None:
    server = own_nats()
    with pytest.raises(ConfigurationError, match=r"can't keep presence, because JetStream is off: write jetstream"):
        async with ConnectionManager(engine(server.url, prefix), presence=Presence()):
            pass


async def test_managers_know_who_is_in_a_channel(jetstream: JetStreamServer, prefix: str) -> None:
    options: dict[str, Any] = {"presence": Presence(grace=0)}
    async with (
        ConnectionManager(engine(jetstream.url, prefix), **options) as one,
        ConnectionManager(engine(jetstream.url, prefix), **options) as other,
    ):
        connections = [
            await manager.connect(Peer().websocket, user=user, channels=["news"])
            for manager, user in ((one, "ann"), (other, "ann"), (other, "bob"))
        ]

        async def here(*users: str) -> bool:
            seen = [sorted(str(member.user) for member in await each.presence("news")) for each in (one, other)]
            return seen == [sorted(users)] * 2

        await eventually(partial(here, "ann", "bob"))
        await connections[1].close()
        await connections[2].close()
        await eventually(partial(here, "ann"))
        assert await other.user_channels("ann") == {"news"}
        assert not await one.is_online("bob")
        await connections[0].close()
        await eventually(here)


async def test_old_server_is_refused(prefix: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.10.29","max_payload":1048576,"headers":true}\r\n')
        while await reader.readuntil(b"PING\r\n"):
            writer.write(b"PONG\r\n")

    async with serving(serve) as url:
        node = engine(url, prefix)
        node.uses_lease = True
        with pytest.raises(ConfigurationError, match=r"nats-server 2\.10\.29, and presence needs 2\.11"):
            await node.start(Recorder())


async def test_jetstream_that_is_away_later_costs_no_message(own_jetstream: OwnJetStream, prefix: str) -> None:
    """A server that could keep presence at the start, and can't when the node is back, carries messages still."""
    server = own_jetstream()
    node = Node(engine(server.url, prefix), Recorder(), 10)
    node.engine.uses_lease = True
    await node.engine.start(node.recorder)
    try:
        await node.join(NEWS)
        path = server.directory / "nats.conf"
        await server.stopped()
        path.write_text(path.read_text().partition("jetstream {")[0])
        await server.started()
        assert await node.recorder.wait_until(lambda: node.recorder.gaps, 20)
        await node.publish("hello")
        await node.receives(["hello"])
        with pytest.raises(EngineUnavailable, match="JetStream is off"):
            await of(node).renew(LONG)
    finally:
        await node.engine.aclose()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"subjects": ["other:{prefix}.>"]}, "doesn't take"),
        ({"max_age": 3600 * 10**9}, "drops who is still there"),
        ({"max_msgs_per_subject": 1}, "drops who is still there"),
        ({"max_msgs": 1000, "discard": "old"}, "drops who is still there"),
        ({"deny_purge": True, "allow_rollup_hdrs": False}, "only grows"),
    ],
)
async def test_stream_that_does_not_fit_is_refused(
    jetstream: JetStreamServer, prefix: str, changes: dict[str, Any], what: str
) -> None:
    async with administering(jetstream, prefix) as admin:
        config = {"name": admin.stream, "subjects": [f"{prefix}:present.>"], "storage": "memory", **changes}
        config["subjects"] = [each.format(prefix=prefix) for each in config["subjects"]]
        await admin.call(f"STREAM.CREATE.{admin.stream}", config)
        node = engine(jetstream.url, prefix)
        node.uses_lease = True
        with pytest.raises(ConfigurationError, match=what):
            await node.start(Recorder())


async def test_stream_of_an_administrator_is_made_fit(jetstream: JetStreamServer, prefix: str) -> None:
    async with administering(jetstream, prefix) as admin:
        config = {"name": admin.stream, "subjects": [f"{prefix}:present.>"], "storage": "file", "max_bytes": 10**7}
        await admin.call(f"STREAM.CREATE.{admin.stream}", {**config, "discard": "new", "allow_msg_ttl": True})
        async with present(engine(jetstream.url, prefix)) as (node,):
            await of(node).enter("news", {"ann": b""})
            await agree(node)


async def test_full_stream_refuses_who_comes_and_nobody_is_dropped(jetstream: JetStreamServer, prefix: str) -> None:
    async with administering(jetstream, prefix) as admin:
        config = {"name": admin.stream, "subjects": [f"{prefix}:present.>"], "storage": "memory", "discard": "new"}
        await admin.call(f"STREAM.CREATE.{admin.stream}", {**config, "max_bytes": 20_000, "allow_msg_ttl": True})
        async with present(engine(jetstream.url, prefix)) as (node,):
            await of(node).enter("news", {"ann": b""})
            rooms = asyncio.gather(*(of(node).enter(f"room {number}", {"ann": b""}) for number in range(200)))
            with pytest.raises(EngineUnavailable, match="maximum bytes exceeded"):
                await rooms
            assert (await of(node).members("news")).members == {"ann": b""}


async def test_strangers_in_the_stream_disturb_nobody(jetstream: JetStreamServer, prefix: str) -> None:
    async with here(jetstream, prefix, 2) as (admin, (node, other)):
        await of(node).enter("news", {"ann": b""})
        for payload in (b"", b"hello", b'{"v":1}\n[]', b'{"v":1,"type":"presence","version":1}\n{"by":1}'):
            await admin.write("log.news", payload)
            await admin.write("lease.nobody", payload)
            await admin.write("of.ann.news.nobody", payload)
            await admin.write("log.sport", payload)
        assert await of(node).enter("news", {"bob": b""}) is not None
        assert await of(other).enter("sport", {"ann": b""}) is not None
        assert (await of(other).members("news")).members.keys() == {"ann", "bob"}
        assert await of(other).channels_of("ann") >= {"news", "sport"}
        assert list(await of(other).sweep()) == []


async def test_quiet_steps_reach_no_receiver(jetstream: JetStreamServer, prefix: str) -> None:
    async with (
        used(engine(jetstream.url, prefix), f"{prefix}.channel.news") as link,
        present(engine(jetstream.url, prefix), engine(jetstream.url, prefix)) as (node, other),
    ):
        await of(node).enter("news", {"ann": b""})
        await of(other).enter("news", {"ann": b""})
        await of(node).leave("news", ["ann"])
        await of(other).leave("news", ["ann"])
        await link.link.publish([Parcel(f"{prefix}.channel.news", b"end")])
        taken = await link.letters.until(b"end")
        assert len(taken) == 3


# Several servers.


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[JetStreamServer]]:
    """Three servers, which take some seconds to agree on a leader."""
    with jetstream_cluster() as servers:
        yield servers


@asynccontextmanager
async def present_on_each(servers: list[JetStreamServer], prefix: str, replicas: int) -> AsyncIterator[list[Node]]:
    """Run a node at each server, when they agree."""
    engines = [engine(server.url, prefix, presence_replicas=replicas) for server in servers]

    async def stands() -> bool:
        probe = engine(servers[0].url, prefix, presence_replicas=replicas)
        await probe.start(Recorder())
        try:
            await probe.renew(1)
        except EngineUnavailable:
            return False
        finally:
            await probe.aclose()
        return True

    await eventually(stands, 30)
    async with present(*engines, channels=CHANNELS) as nodes:
        yield nodes


async def test_random_steps_on_replicas(cluster: list[JetStreamServer], prefix: str) -> None:
    async with administering(cluster[0], prefix) as admin, present_on_each(cluster, prefix, 3) as nodes:
        steps = StepsOnNATS(nodes, 7)
        steps.admin = admin
        for _ in range(STEPS // 3):
            await steps.take()
        await steps.settle()


async def test_members_stay_when_the_leader_changes(cluster: list[JetStreamServer], prefix: str) -> None:
    async with administering(cluster[0], prefix) as admin, present_on_each(cluster, prefix, 3) as nodes:
        before = [of(node).incarnation for node in nodes]
        await of(nodes[0]).enter("news", {"ann": b""})
        names: list[str] = []
        refused = 0
        for number in range(400):
            if len(names) > 60:
                break
            if number == 20:
                await admin.call(f"STREAM.LEADER.STEPDOWN.{admin.stream}")
            try:
                await of(nodes[number % 3]).enter("news", {f"user {number}": b""})
                names.append(f"user {number}")
            except EngineUnavailable:
                refused += 1
                await asyncio.sleep(0.05)
        assert len(names) > 60

        async def is_renewed() -> bool:
            try:
                return all([await of(node).renew(LONG) for node in nodes])
            except EngineUnavailable:
                return False

        await eventually(is_renewed)
        assert [of(node).incarnation for node in nodes] == before
        assert set(names) | {"ann"} <= (await of(nodes[1]).members("news")).members.keys()
        for node in nodes:
            await agree(node)


async def test_memory_of_one_server_of_several_is_lost_with_it(cluster: list[JetStreamServer], prefix: str) -> None:
    # The nodes at the other servers stay connected, and the stream is there again, empty.
    async with administering(cluster[0], prefix) as admin, present_on_each(cluster, prefix, 1) as nodes:
        await of(nodes[0]).enter("news", {"ann": b""})
        before = {of(node).incarnation for node in nodes}
        leader = (await admin.call(f"STREAM.INFO.{admin.stream}"))["cluster"]["leader"]
        server = next(
            each for each in cluster if f"server_name: {leader}" in (each.directory / "nats.conf").read_text()
        )
        await server.restarted()

        async def is_back() -> bool:
            try:
                for node in nodes:
                    await of(node).renew(LONG)
                    await of(node).enter("news", {"ann": b""})
                return not before & await of(nodes[0]).alive()
            except EngineUnavailable:
                return False

        await eventually(is_back, 30)
        for node in nodes:
            assert (await of(node).members("news")).members == {"ann": b""}
            assert await of(node).renew(LONG)
