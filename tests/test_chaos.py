"""Crowds of clients with random lives, while everything fails: each one's log is unbroken, or says where it isn't."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from tests.support.chaos import Client, Story, publish
from wsbroadcast import Delivery, History, Publication, SlowConsumer
from wsbroadcast.node.tail import Tail, Taken
from wsbroadcast.testing import Cluster

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
SECONDS = 20.0 if FULL else 2.5
CLIENTS = 60 if FULL else 30
SEEDS = range(10) if FULL else range(3)
MESSAGES = 60

CHANNELS = ("a", "b", "c")


async def run(cluster: Cluster, seed: int, *, seconds: float = SECONDS) -> Story:
    """Let clients, publishers and faults do what they do for a while; return what came of it."""
    story = Story(MESSAGES)
    loop = asyncio.get_running_loop()
    ends = loop.time() + seconds
    clients = [Client(story, cluster.managers, CHANNELS, seed * 1000 + number) for number in range(CLIENTS)]

    def is_over() -> bool:
        return loop.time() >= ends

    async with asyncio.TaskGroup() as tasks:
        for client in clients:
            tasks.create_task(client.live(is_over))
        for number in range(3):
            tasks.create_task(publish(story, cluster.managers, CHANNELS, seed * 10 + number, is_over))
        tasks.create_task(break_things(cluster, seed, is_over))
    cluster.hub.lost = cluster.hub.doubled = 0.0
    for channel in CHANNELS:  # what follows shows what was lost before it
        for _ in range(2):
            receipt = await cluster[0].broadcast("last", channel=channel)
            assert receipt.position is not None
            story.note(channel, receipt.position, "last")
    for client in clients:
        await caught_up(client, story)
        client.check()
    return story


async def caught_up(client: Client, story: Story) -> None:
    async with asyncio.timeout(20):
        while True:
            client.read()
            tops = {channel: max(story.offsets[channel, at.epoch]) for channel, at in client.at.items()}
            if len(tops) == len(CHANNELS) and all(client.at[channel].offset >= top for channel, top in tops.items()):
                return
            await asyncio.sleep(0.005)


async def break_things(cluster: Cluster, seed: int, is_over: Any) -> None:
    choose = random.Random(seed + 1)
    rounds = 0
    while not is_over():
        rounds += 1
        await asyncio.sleep(choose.uniform(0.05, 0.2))
        number = choose.randrange(len(cluster))
        cluster.partition(number)
        await asyncio.sleep(choose.choice((0, 0.001, choose.uniform(0, 0.2))))
        cluster.heal(number)
        if choose.random() < 0.1 or rounds == 5:  # once in any case, however slow the machine is
            await cluster.restart_broker()
        if choose.random() < 0.1:
            await cluster[0].forget(choose.choice(CHANNELS))


def made(seed: int, **options: Any) -> Cluster:
    cluster = Cluster(3, seed=seed, history=History(messages=MESSAGES), **options)
    cluster.hub.lost = cluster.hub.doubled = 0.03
    cluster.delay(0.002)
    return cluster


@pytest.mark.parametrize("seed", SEEDS)
async def test_logs_are_unbroken_or_say_where_they_aren_t(seed: int) -> None:
    async with made(seed) as cluster:
        story = await run(cluster, seed)
    assert story.wrong == {}
    assert story.seen["recovered"] > 100
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
    assert story.seen["recovered"] > 50


# Controls: the test finds what it is for.


async def _wrong_of(seed: int) -> dict[str, int]:
    async with made(seed) as cluster:
        try:
            story = await run(cluster, seed)
        except TimeoutError:
            return {"never caught up": 1}
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
