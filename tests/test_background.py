"""`manager.background`: on each node, or on one node of all, which moves when that one ends."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from tests.support.asgi import eventually, turns
from wsbroadcast import ConfigurationError, ConnectionManager, Presence
from wsbroadcast.testing import Cluster

sets_the_clock = pytest.mark.skipif(
    os.environ.get("WSBROADCAST_TEST_LOOP") == "uvloop", reason="the clock of uvloop can't be set"
)


class Ticks:
    """Which nodes run something, and which have begun to."""

    def __init__(self, cluster: Cluster, **options: Any) -> None:
        self.running: set[int] = set()
        self.most = 0
        self.begun: list[int] = []
        for number, manager in enumerate(cluster):
            manager.background(self.of(number), name="tick", **options)

    def of(self, number: int) -> Any:
        async def tick() -> None:
            self.begun.append(number)
            self.running.add(number)
            self.most = max(self.most, len(self.running))
            try:
                await asyncio.Event().wait()
            finally:
                self.running.discard(number)

        return tick


async def test_each_node_runs_it_from_start_to_end() -> None:
    cluster = Cluster(3)
    ticks = Ticks(cluster)
    async with cluster:
        await eventually(lambda: ticks.running == {0, 1, 2})
    assert ticks.running == set()
    assert sorted(ticks.begun) == [0, 1, 2]


@sets_the_clock
async def test_one_node_of_all_runs_it_and_the_next_when_that_one_ends() -> None:
    cluster = Cluster(3)
    ticks = Ticks(cluster, once=True)
    async with cluster:
        left = {0, 1, 2}
        while left:
            await cluster.advance(4)
            assert len(ticks.running) == 1
            (runner,) = ticks.running
            await cluster[runner].aclose()
            left.remove(runner)
            assert ticks.running == set()
    assert sorted(ticks.begun) == [0, 1, 2]
    assert ticks.most == 1


@sets_the_clock
@pytest.mark.parametrize("how", ["kill", "cut", "forget"])
async def test_another_node_runs_it_when_the_first_is_lost(how: str) -> None:
    cluster = Cluster(3, presence=Presence())
    ticks = Ticks(cluster, once=True)
    async with cluster:
        await cluster.advance(4)
        (first,) = ticks.running
        match how:
            case "kill":
                await cluster.kill(first)
            case "cut":
                cluster.partition(first)
            case "forget":
                cluster.hub.roll = type(cluster.hub.roll)()
                cluster.hub.leases.clear()
                await cluster.restart_broker()
        await cluster.advance(15)
        assert len(ticks.running) == 1
        assert ticks.most == 1 or how == "forget"
        if how == "cut":
            assert ticks.running != {first}
            cluster.heal(first)
            await cluster.advance(15)
            assert len(ticks.running) == 1
        assert ticks.most <= (2 if how == "forget" else 1)


async def test_what_fails_is_logged_and_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(1)
    calls: list[int] = []

    @cluster[0].background
    async def fails() -> None:
        calls.append(len(calls))
        if len(calls) < 3:
            raise RuntimeError("no")

    async with cluster:
        await turns(20)
        assert calls == [0]
        await cluster.advance(1.5)
        assert calls == [0, 1]
        await cluster.advance(60)
        assert calls == [0, 1, 2]
    assert "fails failed, and runs again in 1 s" in caplog.text


async def test_what_does_not_end_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    manager = ConnectionManager(hook_timeout=0.1)
    release = asyncio.Event()
    ended = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass
        ended.set()

    async with manager:
        manager.background(stubborn)
        await turns()
    assert "doesn't end though it was cancelled" in caplog.text
    release.set()
    await ended.wait()


async def test_it_may_be_given_while_the_manager_runs_and_may_end_it() -> None:
    async with ConnectionManager() as manager:
        ended = asyncio.Event()

        async def ends() -> None:
            await manager.aclose()
            ended.set()

        manager.background(ends)
        await eventually(ended.is_set)


def turns_nothing() -> None: ...


async def test_mistakes_are_told() -> None:
    manager = ConnectionManager()

    async def tick() -> None: ...

    manager.background(tick)
    with pytest.raises(ConfigurationError, match="give this one a name="):
        manager.background(tick)
    with pytest.raises(TypeError, match="the async function itself"):
        manager.background(tick())  # type: ignore[type-var, unused-coroutine]
    with pytest.raises(TypeError, match="an async function, not int"):
        manager.background(5)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="write async def turns_nothing"):
        manager.background(turns_nothing)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="the name of a background function"):
        manager.background(tick, name="")
