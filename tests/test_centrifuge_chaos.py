"""Clients of the Centrifuge client protocol with random lives, while everything fails: they are told of each hole."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.support import chaos
from tests.support.centrifuge_chaos import CentrifugeClient
from tests.support.chaos import ClusterWorld, Story
from wsbroadcast import History
from wsbroadcast.node.tail import Tail
from wsbroadcast.testing import Cluster

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
SECONDS = 20.0 if FULL else 2.5
CLIENTS = 60 if FULL else 30
SEEDS = range(10) if FULL else range(3)
MESSAGES = 60


async def run(seed: int, messages: int = MESSAGES, **options: Any) -> Story:
    async with Cluster(3, seed=seed, history=History(messages=messages)) as cluster:
        return await chaos.run(
            ClusterWorld(cluster),
            seed,
            messages=messages,
            seconds=SECONDS,
            clients=CLIENTS,
            kind=CentrifugeClient,
            **options,
        )


@pytest.mark.parametrize("seed", SEEDS)
async def test_each_offset_comes_once_and_a_hole_is_told(seed: int) -> None:
    story = await run(seed)
    assert story.wrong == {}
    assert story.seen["recovered"] > 20
    assert story.seen["not recovered"] > 0


async def test_control_that_believes_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tail, "has", lambda tail, offset, now: True)
    monkeypatch.setattr(Tail, "has_all_after", lambda tail, offset: True)
    story = await run(1, messages=5, patience=0.5)
    assert story.wrong["lost in silence"] > 0
