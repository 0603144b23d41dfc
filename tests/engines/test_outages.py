"""Two nodes, a real broker, and what can go wrong between them.

Every fault is told the same way: a node publishes numbers all the time while the fault comes and goes.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from tests.support.asgi import Peer
from tests.support.brokers import NATSServer, PostgresServer, RedisServer
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager, EngineUnavailable, Gap
from wsbroadcast.options import Timing

Broker = RedisServer | NATSServer | PostgresServer

EachBroker = Callable[[Callable[[Broker], Awaitable[None]]], Awaitable[None]]

# Seconds a fault lasts; in full, those that the drivers' own patience would not survive.
FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
RESTART_SECONDS = (1, 60) if FULL else (1,)
HANG_SECONDS = 30 if FULL else 3

# What `Timing` promises for the return of a broker, and some room for a busy machine.
RECOVERY_SECONDS = 2.0 + 1.0

# What blocks the loop does so for a timeout, of 1.5 s or more; a busy machine was seen to take half a second away.
LAG_SECONDS = 1.0


@dataclass
class Node:
    manager: ConnectionManager
    peer: Peer = field(default_factory=Peer)
    gaps: list[Gap] = field(default_factory=list)

    async def begin(self) -> None:
        self.manager.on_gap(self.gaps.append)
        await self.manager.connect(self.peer.websocket, channels=["news"])

    @property
    def numbers(self) -> list[int]:
        return [int(message) for message in self.peer.messages if str(message).isdecimal()]


class Story:
    """A node that publishes, another that receives, and what they saw."""

    def __init__(self, publisher: Node, receiver: Node) -> None:
        self.publisher, self.receiver = publisher, receiver
        self.refused: list[float] = []
        self.taken: list[int] = []
        self.max_lag = 0.0
        self.late = Peer()

    async def publish_numbers(self) -> None:
        number = 0
        while True:
            number += 1
            began = time.monotonic()
            try:
                await self.publisher.manager.broadcast(str(number), channel="news")
                self.taken.append(number)
            except EngineUnavailable:
                self.refused.append(time.monotonic() - began)
            await asyncio.sleep(0.01)

    async def watch_the_loop(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            self.max_lag = max(self.max_lag, time.monotonic() - began - 0.01)

    async def outage_is_known(self) -> None:
        for node in (self.publisher, self.receiver):
            await eventually(lambda node=node: _is(node.manager, ok=False), timeout=12)  # type: ignore[misc]

        async def is_refused() -> bool:
            return bool(self.refused)

        await eventually(is_refused)  # a publisher that just waits between two numbers has noticed nothing yet

    async def serve_meanwhile(self) -> None:
        """Local broadcasts go on, and people come in."""
        await self.receiver.manager.connect(self.late.websocket, channels=["late"])
        await self.receiver.manager.broadcast_local("local", channel="late")
        assert await self.late.wait_messages(1) == ["local"]

    async def recover(self) -> float:
        """Return the seconds until both channels arrive again."""
        began = time.monotonic()

        async def arrives() -> bool:
            before = len(self.receiver.numbers)
            try:
                await self.publisher.manager.broadcast("late", channel="late")
            except EngineUnavailable:
                return False
            await asyncio.sleep(0.05)
            return "late" in self.late.messages and len(self.receiver.numbers) > before

        await eventually(arrives, timeout=20)
        # Messages arrive a moment before a link is in use, which is when the gap is told.
        for node in (self.publisher, self.receiver):
            await eventually(partial(_is, node.manager, ok=True), timeout=20)
        return time.monotonic() - began

    def check(self) -> None:
        for node in (self.publisher, self.receiver):
            numbers = node.numbers
            assert numbers == sorted(set(numbers)), "one came twice, or an older one after a newer one"
            assert len(node.gaps) == 1, [gap.seconds for gap in node.gaps]
            assert node.manager.stats().engine.gaps == 1
        assert self.refused, "nobody noticed"
        assert max(self.refused) < 2.5
        assert self.max_lag < LAG_SECONDS, "the app's other tasks were blocked"


@asynccontextmanager
async def story(
    url: Callable[[], str], prefix: str, receiver_url: Callable[[], str] | None = None
) -> AsyncIterator[Story]:
    separator = "&" if "?" in url() else "?"
    nodes = [Node(ConnectionManager(f"{one()}{separator}prefix={prefix}")) for one in (url, receiver_url or url)]
    async with nodes[0].manager, nodes[1].manager:
        for node in nodes:
            await node.begin()
        told = Story(*nodes)
        tasks = [asyncio.create_task(told.publish_numbers()), asyncio.create_task(told.watch_the_loop())]
        try:
            await nodes[1].peer.wait_messages(5)
            yield told
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            assert task.cancelled(), task.exception()


async def _is(manager: ConnectionManager, *, ok: bool) -> bool:
    return (await manager.health()).is_ok is ok


@pytest.fixture
def each_broker(
    own_redis: Callable[..., RedisServer],
    own_nats: Callable[..., NATSServer],
    own_postgres: Callable[..., PostgresServer],
) -> EachBroker:
    """Tell a story at all brokers at the same time: most of it is waiting."""
    brokers: list[Broker] = [own_redis(), own_nats(), own_postgres()]

    async def tell(of: Callable[[Broker], Awaitable[None]]) -> None:
        outcomes = await asyncio.gather(*map(of, brokers), return_exceptions=True)
        for broker, outcome in zip(brokers, outcomes, strict=True):
            if outcome is not None:
                outcome.add_note(f"at {type(broker).__name__}")
                raise outcome

    return tell


@pytest.mark.parametrize("seconds", RESTART_SECONDS)
async def test_restart_of_the_broker(each_broker: EachBroker, prefix: str, seconds: float) -> None:
    async def at(broker: Broker) -> None:
        async with story(lambda: broker.url, prefix) as told:
            await broker.killed()
            down = time.monotonic()
            await told.outage_is_known()
            await told.serve_meanwhile()
            await asyncio.sleep(down + seconds - time.monotonic())
            await broker.started()
            assert await told.recover() < RECOVERY_SECONDS
            told.check()
            assert told.receiver.gaps[0].seconds >= seconds - 0.5

    await each_broker(at)


async def test_broker_that_hangs(each_broker: EachBroker, prefix: str) -> None:
    async def at(broker: Broker) -> None:
        async with story(lambda: broker.url, prefix) as told:
            await asyncio.to_thread(broker.pause)
            down = time.monotonic()
            await told.outage_is_known()
            await told.serve_meanwhile()
            await asyncio.sleep(down + HANG_SECONDS - time.monotonic())
            await asyncio.to_thread(broker.resume)
            assert await told.recover() < RECOVERY_SECONDS
            told.check()

    await each_broker(at)


Fault = Callable[[FaultProxy], Awaitable[Any] | None]


@pytest.mark.parametrize("fault", [FaultProxy.black_hole, FaultProxy.drop_replies], ids=["black hole", "no replies"])
async def test_network_that_swallows(each_broker: EachBroker, prefix: str, fault: Fault) -> None:
    async def at(broker: Broker) -> None:
        async with FaultProxy(broker) as proxy, story(lambda: proxy.url, prefix) as told:
            fault(proxy)
            await told.outage_is_known()
            await told.serve_meanwhile()
            proxy.heal()
            assert await told.recover() < RECOVERY_SECONDS
            told.check()

    await each_broker(at)


async def test_connections_that_are_reset(each_broker: EachBroker, prefix: str) -> None:
    async def at(broker: Broker) -> None:
        async with FaultProxy(broker) as proxy, story(lambda: proxy.url, prefix) as told:
            proxy.refuse()
            proxy.reset()
            await told.outage_is_known()
            await told.serve_meanwhile()
            proxy.heal()
            assert await told.recover() < RECOVERY_SECONDS
            told.check()

    await each_broker(at)


async def test_receiver_alone_is_cut_off(each_broker: EachBroker, prefix: str) -> None:
    async def at(broker: Broker) -> None:
        async with FaultProxy(broker) as proxy, story(lambda: broker.url, prefix, lambda: proxy.url) as told:
            proxy.black_hole()
            await eventually(lambda: _is(told.receiver.manager, ok=False), timeout=12)
            await told.serve_meanwhile()
            proxy.heal()
            assert await told.recover() < RECOVERY_SECONDS
            numbers = told.receiver.numbers
            assert numbers == sorted(set(numbers))
            assert len(told.receiver.gaps) == 1
            assert told.publisher.gaps == []
            assert told.refused == []
            assert told.publisher.numbers == told.taken[: len(told.publisher.numbers)]

    await each_broker(at)


async def test_node_that_the_broker_cuts_off_as_a_slow_consumer(
    own_redis: Callable[..., RedisServer], prefix: str
) -> None:
    redis = own_redis(config={"client-output-buffer-limit": "pubsub 1mb 512kb 1"})
    async with story(lambda: redis.url, prefix) as told:

        def publish_more_than_it_keeps() -> None:
            for _ in range(60):
                redis.command("PUBLISH", f"{prefix}:channel:news", "x" * 1_000_000)

        flood = threading.Thread(target=publish_more_than_it_keeps)
        flood.start()
        while flood.is_alive():
            time.sleep(0.05)  # noqa: ASYNC251  # the node is busy with something else
        await told.receiver.manager.connect(told.late.websocket, channels=["late"])
        assert await told.recover() < RECOVERY_SECONDS
        for node in (told.publisher, told.receiver):
            assert node.numbers == sorted(set(node.numbers))
            assert len(node.gaps) == 1
            assert node.manager.stats().engine.reconnects == 1


async def test_broker_that_comes_after_the_app(each_broker: EachBroker, prefix: str) -> None:
    async def at(broker: Broker) -> None:
        await broker.killed()
        separator = "&" if "?" in broker.url else "?"
        node = Node(ConnectionManager(f"{broker.url}{separator}prefix={prefix}"))
        async with node.manager:
            await node.begin()
            health = await node.manager.health()
            assert not health.is_ok
            assert health.detail
            with pytest.raises(EngineUnavailable):
                await node.manager.broadcast("lost", channel="news")
            await broker.started()
            began = time.monotonic()
            await eventually(lambda: _is(node.manager, ok=True), timeout=10)
            assert time.monotonic() - began < RECOVERY_SECONDS
            await node.manager.broadcast("1", channel="news")
            assert await node.peer.wait_messages(1) == ["1"]

    await each_broker(at)


async def test_timing_promises_what_is_asserted_here() -> None:
    timing = Timing()
    assert timing.connect_timeout + timing.max_backoff <= 2.0
    assert timing.request_timeout <= 2.5
