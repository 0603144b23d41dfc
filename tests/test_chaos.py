"""Crowds of clients with random lives, while everything fails: each one's log is unbroken, or says where it isn't."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from tests.support import chaos
from tests.support.chaos import ClusterWorld, Story
from wsbroadcast import Delivery, History, Presence, Publication, SlowConsumer
from wsbroadcast.manager import core_of
from wsbroadcast.node.tail import Tail, Taken
from wsbroadcast.testing import Cluster

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
SECONDS = 20.0 if FULL else 2.5
CLIENTS = 60 if FULL else 30
SEEDS = range(10) if FULL else range(3)
MESSAGES = 60


async def run(cluster: Cluster, seed: int, **options: Any) -> Story:
    world = ClusterWorld(cluster)
    return await chaos.run(world, seed, messages=MESSAGES, seconds=SECONDS, clients=CLIENTS, **options)


def made(seed: int, **options: Any) -> Cluster:
    return Cluster(3, seed=seed, history=History(messages=MESSAGES), **options)


@pytest.mark.parametrize("seed", SEEDS)
async def test_logs_are_unbroken_or_say_where_they_aren_t(seed: int) -> None:
    async with made(seed) as cluster:
        story = await run(cluster, seed)
    assert story.wrong == {}
    assert story.seen["recovered"] > 20
    assert story.seen["gap: epoch"] + story.seen["refused: epoch"] > 0


@pytest.mark.parametrize("seed", SEEDS)
async def test_logs_are_unbroken_with_hooks_and_small_backlogs(seed: int) -> None:
    async with made(seed, slow_consumer=SlowConsumer(max_backlog_messages=16)) as cluster:
        for manager in cluster:

            @manager.on_deliver
            async def ponder(delivery: Delivery) -> None:
                await asyncio.sleep(0)
                if str(delivery.message.data).endswith("7"):
                    delivery.recipients.clear()

        story = await run(cluster, seed)
    assert story.wrong == {}
    assert story.seen["recovered"] > 20


@pytest.mark.parametrize("seed", SEEDS)
async def test_all_holds_with_history_presence_hooks_and_deploys_together(seed: int) -> None:
    hooks = chaos.Hooks()
    options = {"presence": Presence(grace=0.2), "slow_consumer": SlowConsumer(max_backlog_messages=16)}
    async with made(seed, hooks=[hooks], **options) as cluster:
        world = ClusterWorld(cluster)
        world.deploys = 0.1
        story = await chaos.run(
            world, seed + 2000, messages=MESSAGES, seconds=SECONDS, clients=CLIENTS, users=CLIENTS // 3
        )
    assert story.wrong == {}
    assert story.seen["recovered"] > 20
    assert story.seen["deployed"] > 0
    assert min(hooks.joined, hooks.left, hooks.delivered) > 0


async def test_clients_that_are_too_slow_at_the_end_come_back() -> None:
    class World(ClusterWorld):
        def calm(self) -> None:
            super().calm()
            for manager in self.managers:
                for connection in manager.connections:
                    core_of(manager).life.node.evict(connection)

    async with made(0) as cluster:
        story = await chaos.run(World(cluster), 0, messages=MESSAGES, seconds=0.2, clients=CLIENTS, patience=5.0)
    assert story.wrong == {}


# Controls: the test finds what it is for.


async def _wrong_of(seed: int) -> dict[str, int]:
    async with made(seed) as cluster:
        story = await run(cluster, seed, patience=0.5)
    return story.wrong


async def test_control_without_a_look_for_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(tail: Tail, publication: Publication) -> Taken:
        position = publication.position
        if position is None or tail.is_reading or position.epoch != tail.epoch or position.offset <= tail.top:
            return original(tail, publication)
        tail._append(publication, position.offset)
        return Taken.NEXT

    original = Tail.take
    monkeypatch.setattr(Tail, "take", take)
    assert (await _wrong_of(1)).get("lost in silence", 0) > 0


async def test_control_that_believes_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def has(tail: Tail, offset: int, now: float) -> bool:
        return True

    monkeypatch.setattr(Tail, "has", has)
    monkeypatch.setattr(Tail, "has_all_after", lambda tail, offset: True)
    monkeypatch.setattr("tests.test_chaos.MESSAGES", 5)
    assert (await _wrong_of(1)).get("lost in silence", 0) > 0


async def test_control_whose_epoch_survives_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsbroadcast.engines.memory.token_urlsafe", lambda size: "always")
    wrong: dict[str, int] = {}
    for seed in range(3):
        wrong |= await _wrong_of(seed)
    assert wrong != {}
