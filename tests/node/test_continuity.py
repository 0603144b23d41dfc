"""What was missed comes all the same, whatever was lost between the nodes; what can't come is told of once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually, turns
from wsbroadcast import (
    USERS,
    Audience,
    Connection,
    ConnectionManager,
    Delivery,
    Gap,
    History,
    MemoryEngine,
    Message,
    Publication,
    Recovery,
    SlowConsumer,
)
from wsbroadcast.options import Policy
from wsbroadcast.testing import Cluster

NEWS = Audience.channel("news")
KEPT = History(messages=10, seconds=60, max_kept_bytes=1000)

sets_the_clock = pytest.mark.skipif(
    os.environ.get("WSBROADCAST_TEST_LOOP") == "uvloop", reason="the clock of uvloop can't be set"
)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster(3, history=KEPT) as cluster:
        yield cluster


async def come(manager: ConnectionManager, **options: Any) -> tuple[Peer, Connection]:
    peer = Peer()
    return peer, await manager.connect(peer.websocket, channels=["news"], **options)


def texts(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@sets_the_clock
async def test_last_message_that_was_lost_comes_although_nothing_follows(cluster: Cluster) -> None:
    peer, _ = await come(cluster[1])
    cluster.hub.lost = 1.0
    await cluster[0].broadcast("lost", channel="news")
    cluster.hub.lost = 0.0
    await turns()
    assert peer.messages == []
    await cluster.advance(20)  # a look every 10 s, at what was quiet for as long
    assert await peer.wait_messages(1) == ["lost"]
    assert cluster[1].stats().heals == 1


async def test_what_follows_a_history_that_was_forgotten_is_delivered(cluster: Cluster) -> None:
    (here, _), (there, _) = await come(cluster[0]), await come(cluster[1])
    async with cluster[1].listen("news", policy="drop_oldest") as messages:
        await cluster[0].broadcast("old", channel="news")
        assert await here.wait_messages(1) == await there.wait_messages(1) == ["old"]
        assert (await anext(messages)).data == "old"
        await cluster[0].forget("news")
        for text in ("new", "newer"):
            await cluster[0].broadcast(text, channel="news")
        assert await here.wait_messages(3) == await there.wait_messages(3) == ["old", "new", "newer"]
        assert [(await anext(messages)).data for _ in range(2)] == ["new", "newer"]


@sets_the_clock
async def test_quiet_channel_is_known_for_longer_than_its_messages(cluster: Cluster) -> None:
    before = await cluster[0].position("news")
    at = (await cluster[0].broadcast("old", channel="news")).position
    await cluster.advance(1000)
    for manager in cluster:
        _, back = await come(manager, since=at)
        assert back.recovered["news"] == Recovery(True, "", at)
        _, back = await come(manager, since=before)
        assert back.recovered["news"] == Recovery(False, "expired", at)


@pytest.mark.parametrize(("missed", "are_healed"), [(10, True), (11, False)])
async def test_who_stays_in_an_outage_gets_all_or_is_told_once(cluster: Cluster, missed: int, are_healed: bool) -> None:
    peer, _ = await come(cluster[1])
    gaps: list[Gap] = []
    cluster[1].on_gap(gaps.append)
    cluster.partition(1)
    for number in texts(missed):
        await cluster[0].broadcast(number, channel="news")
    cluster.heal()
    await eventually(lambda: gaps)
    await cluster[0].broadcast("later", channel="news")
    assert await peer.wait_messages(missed + 1 if are_healed else 1) == [*texts(missed if are_healed else 0), "later"]
    assert [NEWS in gap.audiences for gap in gaps] == [not are_healed]


async def test_node_that_is_behind_a_position_looks_before_it_answers(cluster: Cluster) -> None:
    peer, _ = await come(cluster[1])
    cluster.hub.lost = 1.0
    ahead = (await cluster[0].broadcast("0", channel="news")).position
    cluster.hub.lost = 0.0
    await turns()
    assert peer.messages == []
    other, back = await come(cluster[1], since=ahead)
    assert back.recovered["news"] == Recovery(True, "", ahead)
    await cluster[0].broadcast("1", channel="news")
    assert await other.wait_messages(1) == ["1"]
    assert await peer.wait_messages(2) == ["0", "1"]


async def test_strange_position_keeps_nobody_else_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MemoryEngine()
    async with ConnectionManager(engine, history=KEPT) as manager:
        peer, _ = await come(manager)
        may_answer, read = asyncio.Event(), engine.read

        async def read_slowly(*args: Any) -> Any:
            await may_answer.wait()
            return await read(*args)

        monkeypatch.setattr(engine, "read", read_slowly)
        stranger = asyncio.create_task(come(manager, since="strange:1"))
        await turns()
        await manager.broadcast("live", channel="news")
        assert await peer.wait_messages(1) == ["live"]
        assert not stranger.done()
        may_answer.set()
        _, connection = await stranger
        assert connection.recovered["news"].reason == "epoch"
        await manager.broadcast("more", channel="news")
        assert await peer.wait_messages(2) == ["live", "more"]


async def test_message_that_was_too_large_to_be_kept_is_a_hole(cluster: Cluster) -> None:
    peer, _ = await come(cluster[1])
    before = await cluster[0].position("news")
    at = (await cluster[0].broadcast("x" * 1001, channel="news")).position
    await cluster[0].broadcast("small", channel="news")
    assert await peer.wait_messages(2) == ["x" * 1001, "small"]
    _, back = await come(cluster[2], since=before)
    assert not back.recovered["news"].recovered
    other, back = await come(cluster[2], since=at)
    assert back.recovered["news"].recovered
    assert await other.wait_messages(1) == ["small"]


async def test_message_past_the_history_is_delivered_and_in_no_replay() -> None:
    engine = MemoryEngine()
    async with ConnectionManager(engine, history=KEPT) as manager, manager.listen("news") as messages:
        peer, _ = await come(manager)
        at = (await manager.broadcast("0", channel="news")).position
        engine.publish_nowait(Publication(Message.of("stranger"), NEWS))
        await manager.broadcast("1", channel="news")
        assert await peer.wait_messages(3) == ["0", "stranger", "1"]
        assert sorted([(await anext(messages)).data for _ in range(3)]) == ["0", "1", "stranger"]
        assert [each.data for each in (await manager.history("news")).messages] == ["0", "1"]
        back, connection = await come(manager, since=at)
        assert connection.recovered["news"].recovered
        assert await back.wait_messages(1) == ["1"]
        assert manager.stats().unkept == 1


async def test_hooks_are_asked_about_a_message_past_the_history() -> None:
    engine = MemoryEngine()
    async with ConnectionManager(engine, history=KEPT) as manager:

        @manager.on_deliver
        async def censor(delivery: Delivery) -> None:
            if delivery.message.data == "secret":
                delivery.recipients.clear()

        peer, _ = await come(manager)
        for text in ("secret", "public"):
            engine.publish_nowait(Publication(Message.of(text), NEWS))
        assert await peer.wait_messages(1) == ["public"]


async def test_what_closes_and_unsubscribes_is_not_kept() -> None:
    async with ConnectionManager(history={"*": KEPT, USERS: KEPT}) as manager:
        at = (await manager.broadcast("0", user=1)).position
        for _ in range(2):
            peer, _ = await come(manager, user=1)
            await manager.unsubscribe_user(1, "news")
            await manager.close_user(1)
            assert (await peer.wait_close()) == 4401
        assert await manager.position(user=1) == at
        peer, connection = await come(manager, user=1, since={Audience.user(1): at})
        assert connection.recovered[Audience.user(1)].recovered
        await turns()
        assert connection.is_open
        assert connection.channels == {"news"}
        assert peer.messages == []


@pytest.mark.parametrize("policy", ["disconnect", "drop_oldest", "drop_newest", "conflate"])
async def test_who_comes_back_is_replayed_all_under_every_policy(policy: Policy) -> None:
    slow = SlowConsumer(policy=policy, max_backlog_messages=16)
    async with ConnectionManager(history=History(messages=1000), slow_consumer=slow) as manager:
        at = await manager.position("news")
        for number in texts(200):
            await manager.broadcast(number, channel="news")
        peer, _ = await come(manager, since=at)
        peer.stall()
        for number in texts(400)[200:]:
            manager.broadcast_nowait(number, channel="news")
        await turns()
        peer.resume()
        messages = await peer.wait_messages(400)
        assert messages == texts(400)
        assert manager.stats().dropped == {}
