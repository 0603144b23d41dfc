"""`wsbroadcast.testing.Cluster`: nodes that fail as they are told to."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually, turns
from wsbroadcast import (
    ConfigurationError,
    Connection,
    ConnectionManager,
    EngineUnavailable,
    Gap,
    History,
    LifecycleError,
)
from wsbroadcast.testing import Cluster
from wsbroadcast.testing.hub import HubEngine

KEPT = History(messages=10, seconds=60)

sets_the_clock = pytest.mark.skipif(
    os.environ.get("WSBROADCAST_TEST_LOOP") == "uvloop", reason="the clock of uvloop can't be set"
)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster(3, history=KEPT) as cluster:
        yield cluster


async def come(manager: ConnectionManager, channel: str = "news", **options: Any) -> tuple[Peer, Connection]:
    peer = Peer()
    return peer, await manager.connect(peer.websocket, channels=[channel], **options)


async def test_nodes_reach_each_other(cluster: Cluster) -> None:
    peers = [(await come(manager))[0] for manager in cluster]
    for number in range(len(cluster)):
        await cluster[number].broadcast(str(number), channel="news")
    for peer in peers:
        assert await peer.wait_messages(3) == ["0", "1", "2"]
    assert cluster.managers == list(cluster)


async def test_node_that_is_cut_off_gets_what_it_missed(cluster: Cluster) -> None:
    (here, _), (there, _) = await come(cluster[0]), await come(cluster[1])
    gaps: list[Gap] = []
    cluster[1].on_gap(gaps.append)
    cluster.partition(1)
    await cluster[0].broadcast("1", channel="news")
    assert await here.wait_messages(1) == ["1"]
    with pytest.raises(EngineUnavailable, match="cut off"):
        await cluster[1].broadcast("never", channel="news")
    with pytest.raises(EngineUnavailable, match="cut off"):
        await cluster[1].broadcast("never", channel="other")
    health = await cluster[1].health()
    assert (health.engine, health.is_ok, health.detail) == ("hub", False, "cut off")
    assert there.messages == []
    cluster.heal(1)
    assert await there.wait_messages(1) == ["1"]
    await eventually(lambda: gaps)
    stats = cluster[1].stats().engine
    assert (stats.gaps, stats.reconnects, stats.publish_failures) == (1, 1, 2)
    assert (await cluster[1].health()).is_ok


async def test_all_nodes_are_cut_off_and_healed_at_once(cluster: Cluster) -> None:
    cluster.partition()
    for manager in cluster:
        assert not (await manager.health()).is_ok
    cluster.heal()
    for manager in cluster:
        assert (await manager.health()).is_ok


async def test_what_is_on_its_way_to_a_node_that_is_cut_off_is_lost() -> None:
    async with Cluster(2) as cluster:
        peer, _ = await come(cluster[1])
        cluster[0].broadcast_nowait("lost", channel="news")
        cluster.partition(1)
        cluster.heal(1)
        await cluster[0].broadcast("after", channel="news")
        assert await peer.wait_messages(1) == ["after"]


async def test_killed_node_says_nothing_and_its_clients_come_back_elsewhere(cluster: Cluster) -> None:
    peer, connection = await come(cluster[1])
    other, _ = await come(cluster[2])
    ended: list[Connection] = []

    @cluster[1].on_disconnect
    async def say_so(connection: Connection) -> None:
        ended.append(connection)
        await cluster[1].broadcast("left", channel="news")

    receipt = await cluster[0].broadcast("1", channel="news")
    assert await peer.wait_messages(1) == ["1"]
    await cluster.kill(1)
    assert ended == [connection]
    assert peer.close is None
    assert cluster[1].connections == []
    with pytest.raises(LifecycleError, match="closed"):
        await cluster[1].broadcast("1", channel="news")
    await cluster[0].broadcast("2", channel="news")
    again, back = await come(cluster[2], since=receipt.position)
    assert back.recovered["news"].recovered
    assert await again.wait_messages(1) == ["2"]
    assert await other.wait_messages(2) == ["1", "2"]


async def test_killed_node_ends_though_an_app_has_started_it_too(cluster: Cluster) -> None:
    async with cluster[1]:
        await cluster.kill(1)
        with pytest.raises(LifecycleError):
            await come(cluster[1])


async def test_killed_node_is_none_any_more(cluster: Cluster) -> None:
    await cluster.kill(1)
    for wrong in (cluster.kill, cluster.partition, cluster.heal):
        with pytest.raises(ValueError, match="node 1 was killed"):
            await wrong(1)  # type: ignore[misc]
    cluster.partition()
    cluster.heal()
    assert [(await cluster[number].health()).is_ok for number in (0, 2)] == [True, True]


@pytest.mark.parametrize("keeps", [False, True])
async def test_broker_is_restarted(cluster: Cluster, keeps: bool) -> None:
    receipt = await cluster[0].broadcast("1", channel="news")
    assert receipt.position is not None
    peer, _ = await come(cluster[1])
    gaps: list[Gap] = []
    cluster[1].on_gap(gaps.append)
    await cluster.restart_broker(keeps=keeps)
    await eventually(lambda: gaps)
    position = await cluster[0].position("news")
    assert (position == receipt.position) is keeps
    assert (position.epoch == receipt.position.epoch) is keeps
    await cluster[0].broadcast("2", channel="news")
    assert await peer.wait_messages(1) == ["2"]
    _, back = await come(cluster[1], since=receipt.position)
    assert back.recovered["news"].reason == ("" if keeps else "epoch")
    assert [manager.stats().engine.gaps for manager in cluster] == [1, 1, 1]


@sets_the_clock
async def test_messages_are_delayed_and_keep_their_order() -> None:
    async with Cluster(2) as cluster:
        peer, _ = await come(cluster[1])
        cluster.delay(30)
        sending = asyncio.create_task(cluster[0].broadcast("1", channel="news"))
        await turns()
        cluster.delay(0)
        await cluster[0].broadcast("2", channel="news")
        await turns(10)
        assert not sending.done()
        assert peer.messages == []
        await cluster.advance(29)
        assert peer.messages == []
        await cluster.advance(2)
        assert await peer.wait_messages(2) == ["1", "2"]
        await sending


@sets_the_clock
async def test_delay_is_that_of_the_moment_of_sending() -> None:
    async with Cluster(2) as cluster:
        peer, _ = await come(cluster[1])
        for seconds in (10, 20):
            cluster.delay(seconds)
            cluster[0].broadcast_nowait(str(seconds), channel="news")
        await cluster.advance(15)
        assert await peer.wait_messages(1) == ["10"]
        await cluster.advance(10)
        assert await peer.wait_messages(2) == ["10", "20"]


async def test_messages_that_are_lost_or_doubled_on_the_way_are_healed(cluster: Cluster) -> None:
    peer, _ = await come(cluster[1])
    cluster.hub.lost = 1.0
    await cluster[0].broadcast("lost", channel="news")
    cluster.hub.lost, cluster.hub.doubled = 0.0, 1.0
    await cluster[0].broadcast("doubled", channel="news")
    cluster.hub.doubled = 0.0
    await cluster[0].broadcast("last", channel="news")
    assert await peer.wait_messages(3) == ["lost", "doubled", "last"]
    await turns()
    assert len(peer.messages) == 3


@sets_the_clock
async def test_publisher_that_is_cut_off_before_the_answer_is_told_that_it_may_have_been_sent(cluster: Cluster) -> None:
    peer, _ = await come(cluster[1])
    for channel in ("news", "plain"):
        cluster.delay(5)
        sending = asyncio.create_task(cluster[0].broadcast("sent", channel=channel))
        await turns()
        cluster.partition(0)
        await cluster.advance(10)
        with pytest.raises(EngineUnavailable) as error:
            await sending
        assert error.value.may_have_been_sent
        cluster.delay(0)
        cluster.heal()
    assert await peer.wait_messages(1) == ["sent"]


@sets_the_clock
async def test_clock_makes_what_is_kept_old_and_is_set_right_at_the_end() -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    async with Cluster(2, history=KEPT) as cluster:
        receipt = await cluster[0].broadcast("1", channel="news")
        await cluster[0].broadcast("2", channel="news")
        await cluster.advance(59)
        assert len((await cluster[1].history("news")).messages) == 2
        await cluster.advance(2)
        assert loop.time() > before + 61
        assert (await cluster[1].history("news")).messages == []
        _, back = await come(cluster[1], since=receipt.position)
        assert back.recovered["news"].reason == "expired"
    assert loop.time() < before + 30
    assert "time" not in vars(loop)


@sets_the_clock
async def test_what_follows_from_what_is_due_happens_too(cluster: Cluster) -> None:
    ticks: list[float] = []
    loop = asyncio.get_running_loop()

    async def tick() -> None:
        while True:
            await asyncio.sleep(10)
            ticks.append(loop.time())

    ticking = asyncio.create_task(tick())
    await turns()
    await cluster.advance(0)
    assert ticks == []
    await cluster.advance(95)
    assert len(ticks) == 9
    ticking.cancel()


@sets_the_clock
async def test_clocks_of_two_clusters_are_undone_one_after_the_other() -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    async with Cluster(1) as one:
        await one.advance(100)
        async with Cluster(1) as two:
            await two.advance(1000)
            assert loop.time() > before + 1100
        assert before + 100 < loop.time() < before + 1000
    assert loop.time() < before + 30
    assert "time" not in vars(loop)


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), "5", None, True])
async def test_seconds_that_make_no_sense(cluster: Cluster, seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"a number of seconds, 0 or more"):
        await cluster.advance(seconds)
    with pytest.raises(ValueError, match=r"a number of seconds, 0 or more"):
        cluster.delay(seconds)
    assert cluster.hub.delay == 0


@pytest.mark.parametrize("number", [7, 3, -1, "1", True, None, 1.0])
async def test_node_that_is_none(cluster: Cluster, number: Any) -> None:
    for wrong in (cluster.kill, cluster.partition, cluster.heal):
        with pytest.raises(ValueError, match=r"there is no node .*: they are 0 to 2"):
            await wrong(number)  # type: ignore[misc]
    assert [(await manager.health()).is_ok for manager in cluster] == [True, True, True]


@pytest.mark.parametrize("count", [0, -1, True, "2", None, 1.5])
def test_count_that_makes_no_sense(count: Any) -> None:
    with pytest.raises(ConfigurationError, match="one node or more"):
        Cluster(count)


def test_cluster_has_an_engine_of_its_own() -> None:
    with pytest.raises(ConfigurationError, match="leave engine= out"):
        Cluster(2, engine="memory://")
    with pytest.raises(LifecycleError, match="made for a Hub"):
        HubEngine.from_url("hub://")


async def test_cluster_that_does_not_run_says_so() -> None:
    cluster = Cluster(2)
    cluster.delay(0.01)  # which is a setting

    async def check() -> None:
        for wrong in (cluster.kill, cluster.advance, cluster.partition, cluster.heal):
            with pytest.raises(LifecycleError, match="async with"):
                await wrong(1)  # type: ignore[misc]
        with pytest.raises(LifecycleError, match="async with"):
            await cluster.restart_broker()

    await check()
    async with cluster:
        await cluster[0].broadcast("1")
        with pytest.raises(LifecycleError, match="make another one"):
            await cluster.__aenter__()
        await cluster[0].broadcast("1")
    await check()
    with pytest.raises(LifecycleError, match="make another one"):
        async with cluster:
            pass


async def test_cluster_whose_start_fails_leaves_nothing_behind() -> None:
    cluster = Cluster(3)

    async def fail(receiver: object) -> None:
        raise EngineUnavailable("no")

    cluster._engines[1].start = fail  # type: ignore[method-assign]
    with pytest.raises(EngineUnavailable):
        async with cluster:
            pass
    assert cluster.hub.engines == []
    with pytest.raises(LifecycleError):
        cluster.partition()


def test_clock_of_uvloop_can_not_be_set() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def run() -> None:
        async with Cluster(1) as cluster:
            with pytest.raises(LifecycleError, match=r"uvloop.*can't be set"):
                await cluster.advance(1)
            await cluster[0].broadcast("1")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_nothing_is_left_behind() -> None:
    tasks = asyncio.all_tasks()
    cluster = Cluster(2, history=KEPT)
    async with cluster:
        peers = [await come(manager) for manager in cluster]
        cluster.delay(1000)
        cluster[0].broadcast_nowait("on its way", channel="news")
        cluster.partition(1)
    assert asyncio.all_tasks() == tasks
    assert cluster.hub.engines == []
    assert [peer.close_code for peer, _ in peers] == [1001, 1001]
    ref = weakref.ref(cluster)
    del cluster, peers
    gc.collect()  # neither a timer of the event loop nor its clock holds it
    assert ref() is None
