"""Clients of the Centrifuge SDKs that were away: over restarts of a server and of its broker, over deploys."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_drain import Deploy
from tests.support.brokers import RedisServer
from tests.support.centrifuge_sdks import (
    PATIENCE,
    Asks,
    Clients,
    Tab,
    also_in_a_browser,
    clients,
    everywhere,
    in_javascript,
)
from tests.support.centrifuge_site import site
from tests.support.npm import needs_npm
from tests.support.programs import needs_nginx
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager, History, Publisher

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

APP = "tests.support.deployed_sdks:app"


@pytest.fixture(params=["sqlite", "redis"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/messages.db"
    own: Callable[..., RedisServer] = request.getfixturevalue("own_redis")
    return own().url


@also_in_a_browser
async def test_nothing_is_lost_over_a_restart_of_the_server(sdk: Clients, engine: str) -> None:
    async with site(engine) as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="room:1")
        await tab.hears("subscribed", channel="room:1")
        for number in range(5):
            await here.manager.broadcast(number, channel="room:1")
        await tab.hears("publication", 5)
        await here.end()
        await tab.hears("connecting", 2)
        async with Publisher(engine, history={"*": History(messages=100), "short:*": History(messages=2)}) as publisher:
            for number in range(5, 10):
                await publisher.broadcast(number, channel="room:1")
        await here.begin()
        told = await tab.hears("subscribed", 2, channel="room:1")
        assert (told["was_recovering"], told["recovered"]) == (True, True)
        await here.manager.broadcast(10, channel="room:1")
        await tab.hears("publication", 11)
        assert await tab.data("room:1") == list(range(11))


@also_in_a_browser
async def test_broker_that_has_lost_everything_is_no_recovery(
    sdk: Clients, own_redis: Callable[..., RedisServer]
) -> None:
    redis = own_redis(config={"appendonly": "no"})
    async with site(redis.url) as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="room:1")
        before = await tab.hears("subscribed", channel="room:1")
        await here.manager.broadcast(1, channel="room:1")
        await tab.hears("publication")
        await redis.killed()
        await redis.started()
        after = await tab.hears("subscribed", channel="room:1", was_recovering=True, recovered=False)
        assert after["position"]["epoch"] != before["position"]["epoch"]
        await published(here.manager, 2)
        await tab.hears("publication", 2)
        assert await tab.data("room:1") == [1, 2]


async def published(manager: ConnectionManager, number: int) -> None:
    """Publish once the broker takes it."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                await manager.broadcast(number, channel="room:1")
            except OSError:
                await asyncio.sleep(0.05)
            else:
                return


@everywhere
async def test_who_was_away_too_long_is_told_so(sdk: Clients) -> None:
    async with site() as here:
        tab = await sdk.open(here.url)
        for channel in ("short:1", "long:1"):
            await tab("subscribe", channel=channel)
            await tab.hears("subscribed", channel=channel)
            await here.manager.broadcast(0, channel=channel)
            await tab.hears("publication", channel=channel)
        here.proxy.refuse()
        await tab("cut")
        await tab.hears("connecting", 2)
        for channel in ("short:1", "long:1"):
            for number in range(1, 4):
                await here.manager.broadcast(number, channel=channel)
        here.proxy.heal()
        assert not (await tab.hears("subscribed", 2, channel="short:1"))["recovered"]
        assert (await tab.hears("subscribed", 2, channel="long:1"))["recovered"]
        for channel in ("short:1", "long:1"):
            await here.manager.broadcast(4, channel=channel)
            await tab.hears("publication", channel=channel, data=4)
        assert await tab.data("short:1") == [0, 4]
        assert await tab.data("long:1") == [0, 1, 2, 3, 4]


@everywhere
async def test_state_is_loaded_anew_where_nothing_can_be_recovered(sdk: Clients) -> None:
    async with site() as here:
        top = await here.manager.position("short:1")
        old = {"offset": top.offset, "epoch": top.epoch}
        for number in range(3):
            await here.manager.broadcast(number, channel="short:1")
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="short:1", state=[old, {**old, "offset": 2}])
        told = await tab.hears("subscribed", channel="short:1")
        assert told["recovered"]
        await tab.hears("publication")
        assert await tab.data("short:1") == [2]
        assert len(await tab.log("get_state")) == 2  # the first position was answered with 112
        assert await tab.log("unsubscribed") == []


@in_javascript
async def test_history_that_is_forgotten_again_and_again_makes_no_storm(sdk: Clients) -> None:
    """An SDK that is told that its state is insufficient subscribes again with no delay at all."""
    async with site() as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="room:1")
        await tab.hears("subscribed", channel="room:1")
        loop = asyncio.get_running_loop()
        began, forgotten = loop.time(), 0
        while loop.time() - began < 4 or forgotten < 100:
            await here.manager.broadcast(forgotten, channel="room:1")
            await here.manager.forget("room:1")
            forgotten += 1
            await asyncio.sleep(0.01)
        seconds = loop.time() - began
        times = len(await tab.log("subscribing"))
        assert 2 <= times <= 6 + seconds

        async def goes_on() -> bool:
            await here.manager.broadcast("last", channel="room:1")
            return "last" in await tab.data("room:1")

        await eventually(goes_on, PATIENCE)


# Deploys.


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploy]:
    with Deploy(tmp_path) as deploy:
        yield deploy


class Crowd:
    """Many clients of the SDK for JavaScript in one program, half of them JSON and half Protobuf."""

    def __init__(self, node: Asks, count: int) -> None:
        self._tab = Tab(node, "")
        self.count = count

    async def open(self, url: str) -> None:
        for protobuf in (False, True):
            await self._tab("crowd", urls=[url], number=self.count // 2, channel="news", protobuf=protobuf)

    async def look(self) -> dict[str, Any]:
        seen: dict[str, Any] = await self._tab("crowd_look")
        return seen

    async def until(self, within: float = PATIENCE, **fields: Any) -> dict[str, Any]:
        """Wait until it is so; return what it looks like."""
        seen: dict[str, Any] = {}

        async def is_so() -> bool:
            seen.update(await self.look())
            return {name: seen[name] for name in fields} == fields

        try:
            await eventually(is_so, within)
        except AssertionError:
            pytest.fail(f"it never came: {seen}")
        return seen


@asynccontextmanager
async def crowd(factory: pytest.TempPathFactory, count: int, url: str) -> AsyncIterator[Crowd]:
    async with clients("js", factory, url) as node:
        found = Crowd(node, count)
        await found.open(url)
        await found.until(subscribed=count)
        yield found


@needs_npm
@needs_nginx
async def test_deploy_of_two_nodes_loses_nothing(deploy: Deploy, tmp_path_factory: pytest.TempPathFactory) -> None:
    count, over = (1000, 5.0) if FULL else (40, 1.0)
    nodes = [deploy.start(drain=over, app=APP), deploy.start(drain=over, app=APP)]
    port = deploy.proxy(*nodes)
    number = 0
    async with (
        crowd(tmp_path_factory, count, f"ws://127.0.0.1:{port}/ws/centrifuge") as sdks,
        Publisher(deploy.engine, history=History(messages=10_000, seconds=300)) as publisher,
    ):
        is_over = asyncio.Event()

        async def publish() -> None:
            nonlocal number
            while not is_over.is_set():
                number += 1
                await publisher.broadcast(number, channel="news")
                await asyncio.sleep(0.2 if FULL else 0.02)

        publishing = asyncio.create_task(publish())
        before = (await sdks.look())["codes"]
        there = [(await node.get("/stats"))["connections"] for node in nodes]
        for at, node in enumerate(nodes):
            await node.stopped(timeout=PATIENCE)
            await sdks.until(subscribed=count)
            nodes[at] = await asyncio.to_thread(deploy.start, drain=over, app=APP, port=node.port)
        is_over.set()
        await publishing
        seen = await sdks.until(lasts=[number])
    assert sum(there) == count
    assert min(there) > 0.3 * count
    assert (seen["missing"], seen["twice"], seen["unrecovered"]) == (0, 0, 0)
    assert seen["connects"] >= count + sum(there)
    # Closed by a drain, or once more where the proxy has sent them to a node that was ending.
    codes = Counter(seen["codes"]) - Counter(before)
    print(f"{count} clients, {number} messages: {dict(codes)}")
    assert codes.keys() <= {"1", "3001"}
    assert codes["3001"] >= count
    for node in nodes:
        assert not node.complaints(), node.log()
