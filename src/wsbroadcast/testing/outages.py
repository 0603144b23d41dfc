"""The contract of engines whose broker goes away and comes back, as tests."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from math import inf
from typing import ClassVar
from uuid import uuid4

import pytest

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.testing.contract import EngineContract
from wsbroadcast.testing.nodes import NEWS, SPORT, Node, Recorder, use

LATER = Audience("channel", "joined during the outage")


@pytest.mark.asyncio
class BrokerContract(EngineContract):
    """What an engine must do whose nodes are linked by a broker that may go away.

    Subclass it and override `make_engine`, `stop_broker` and `start_broker`. When a test begins, the broker runs.
    """

    node_count: ClassVar[int] = 3
    answer_seconds: ClassVar[float] = 2.5
    """Within so many seconds a call is answered while the broker is away, if only by an error."""
    recovery_seconds: ClassVar[float] = 2.0
    """Within so many seconds after `start_broker` has returned, everything works again."""
    lag_seconds: ClassVar[float] = 1.0
    """The most seconds that the event loop may be late in an outage. Code that blocks it for a timeout takes longer."""
    outage_seconds: ClassVar[float] = 0.3
    """The shortest outage, in seconds."""

    @abstractmethod
    async def stop_broker(self) -> None:
        """End the broker, so that connections to it are lost."""

    @abstractmethod
    async def start_broker(self) -> None:
        """Start it again at the same place; return when it can be connected to."""

    # Nodes that end or block.

    async def test_end_of_a_node_is_no_matter_for_the_others(self) -> None:
        """A node that ends takes nothing with it: the others reach each other as before, and report no gap."""
        async with self.nodes(NEWS) as nodes:
            await nodes[1].engine.aclose()
            rest = [nodes[0], *nodes[2:]]
            for node in rest:
                await node.publish("hello")
            for node in rest:
                await node.receives(["hello"] * len(rest))
                assert node.recorder.gaps == []

    async def test_node_that_takes_nothing_is_no_matter_for_the_others(self) -> None:
        """A node whose receiver takes for ever doesn't delay any publisher, or any other node."""
        sent = [f"{number}" for number in range(500)]
        async with self.nodes(NEWS) as nodes:
            nodes[1].recorder.stalled.add(NEWS)
            async with asyncio.timeout(self.seconds):
                for text in sent:
                    await nodes[0].publish(text)
            for node in (nodes[0], *nodes[2:]):
                await node.receives(sent)

    # Outages.

    async def test_publishing_fails_during_an_outage_and_never_arrives_late(self) -> None:
        """Without a broker, `publish` raises `EngineUnavailable` in time, `health` says so, nothing is sent late."""
        async with self.nodes(NEWS) as nodes:
            async with self.outage(nodes):
                for node in nodes:
                    with suppress(EngineUnavailable):  # it need not know at once
                        node.publish_nowait("late")
                    async with asyncio.timeout(self.answer_seconds):
                        health = await node.engine.health()
                    assert not health.is_ok
                    assert health.detail
            await self.recover(nodes, NEWS)
            for node in nodes:
                assert "late" not in node.recorder.data(NEWS)
                assert (await node.engine.health()).is_ok

    async def test_other_tasks_run_during_an_outage(self) -> None:
        """The event loop is never blocked: not by the loss of the broker, attempts to find it, or its return."""
        async with self.nodes(NEWS) as nodes, _lag() as lag:
            async with self.outage(nodes):
                pass
            await self.recover(nodes, NEWS)
        assert max(lag) < self.lag_seconds

    async def test_audiences_are_back_with_the_broker(self) -> None:
        """All audiences are subscribed again in time, also those that were joined during the outage."""
        async with self.nodes(NEWS, SPORT) as nodes:
            async with self.outage(nodes):
                for node in nodes:
                    async with asyncio.timeout(self.answer_seconds):
                        await node.join(LATER)
                    node.engine.unsubscribe([SPORT])
            await self.recover(nodes, NEWS, LATER)
            for node in nodes:
                await node.join(SPORT)
            await nodes[0].publish("sport", SPORT)
            for node in nodes:
                await node.receives(["sport"], SPORT)

    async def test_each_outage_is_one_gap(self) -> None:
        """Every node reports each outage once, with about its length, and counts it."""
        async with self.nodes(NEWS) as nodes:
            for count in (1, 2):
                await self.recover(nodes, NEWS)  # a message from the broker: the gap can't begin before it
                before = asyncio.get_running_loop().time()
                async with self.outage(nodes) as outage:
                    pass
                for node in nodes:
                    await node.recorder.wait_until(lambda: len(node.recorder.gaps) >= count, self.seconds)  # noqa: B023
                await self.recover(nodes, NEWS)
                most = asyncio.get_running_loop().time() - before + 0.5
                for node in nodes:
                    assert len(node.recorder.gaps) == count
                    assert node.recorder.gaps[-1].engine == node.engine.name
                    assert outage.ended - outage.began - 0.1 < node.recorder.gaps[-1].seconds < most
                    stats = node.engine.stats()
                    assert (stats.reconnects, stats.gaps, stats.bad_envelopes) == (count, count, {})
                    assert stats.publish_failures > 0

    async def test_gap_is_reported_when_it_is_over(self) -> None:
        """An app that loads the present state because of a gap misses nothing: what is published afterwards arrives."""
        async with self.nodes(NEWS) as nodes:
            async with self.outage(nodes):
                pass
            for node in nodes:
                assert await node.recorder.wait_until(lambda: node.recorder.gaps, self.seconds)  # noqa: B023
            sent = [f"{number}" for number in range(len(nodes))]
            for node, text in zip(nodes, sent, strict=True):
                await node.publish(text)
            for node in nodes:
                await node.receives(sent)

    async def test_order_survives_an_outage(self) -> None:
        """Across an outage nothing comes twice, and nothing older after newer. All nodes agree on the order."""
        async with self.nodes(NEWS) as nodes:
            is_over = asyncio.Event()

            async def publish(index: int) -> None:
                number = 0
                while not is_over.is_set():
                    number += 1
                    with suppress(EngineUnavailable):
                        await nodes[index].publish(f"{number} of {index}")
                    await asyncio.sleep(0.001)

            async with asyncio.TaskGroup() as tasks:
                for index in range(len(nodes)):
                    tasks.create_task(publish(index))
                await self.recover(nodes, NEWS)
                async with self.outage(nodes):
                    pass
                await self.recover(nodes, NEWS)
                is_over.set()
            await nodes[0].publish("last")
            for _, recorder, seconds in nodes:
                assert await recorder.wait_until(lambda: "last" in recorder.data(NEWS), seconds)  # noqa: B023
                texts = [str(text) for text in recorder.data(NEWS)]
                assert len(texts) == len(set(texts))
                for index in range(len(nodes)):
                    numbers = [int(text.split()[0]) for text in texts if text.endswith(f" of {index}")]
                    assert numbers == sorted(numbers)
            self.check_one_order(nodes)

    async def test_broker_may_come_later_than_the_engine(self) -> None:
        """Without a broker an engine still starts, says that it isn't well, and heals when the broker comes."""
        async with AsyncExitStack() as stack:
            async with self.outage([]):
                async with asyncio.timeout(self.node_count * self.answer_seconds):
                    nodes = await stack.enter_async_context(self.nodes(NEWS))
                    for node in nodes:
                        assert not (await node.engine.health()).is_ok
                        await self._refuses(node)
            await self.recover(nodes, NEWS)
            for node in nodes:
                assert (await node.engine.health()).is_ok
                assert await node.recorder.wait_until(lambda: node.recorder.gaps, self.seconds)  # noqa: B023
                assert len(node.recorder.gaps) == 1

    async def test_aclose_needs_no_broker(self) -> None:
        """An engine that ends during an outage ends in time, and can be started again afterwards."""
        engine = self.make_engine()
        await engine.start(Recorder())
        async with self.outage([]):
            async with asyncio.timeout(self.answer_seconds):
                await engine.aclose()
        await use(engine, Recorder(), self.seconds)

    # For the tests.

    @asynccontextmanager
    async def outage(self, nodes: Sequence[Node]) -> AsyncIterator[Outage]:
        """Stop the broker. After the block, and when no node can publish any more, start it again."""
        loop = asyncio.get_running_loop()
        await self.stop_broker()
        try:
            outage = Outage(loop.time())
            yield outage
            while loop.time() < outage.began + self.outage_seconds:
                for node in nodes:
                    await self._refuses(node)
                await asyncio.sleep(0.01)
            outage.ended = loop.time()
        finally:
            await self.start_broker()

    async def _refuses(self, node: Node) -> None:
        async with asyncio.timeout(self.answer_seconds):
            with pytest.raises(EngineUnavailable):
                await node.publish("late")

    async def recover(self, nodes: Sequence[Node], *audiences: Audience) -> None:
        """Publish until a message to each audience has come from every node to every node, in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.recovery_seconds
        routes = [(node, audience) for node in nodes for audience in audiences]
        sent: list[list[str]] = [[] for _ in routes]

        def is_done() -> bool:
            return all(
                not set(texts).isdisjoint(node.recorder.data(audience))
                for node in nodes
                for (_, audience), texts in zip(routes, sent, strict=True)
            )

        while not is_done():
            assert loop.time() < deadline, f"messages don't travel {self.recovery_seconds} s after the broker came back"
            for texts in sent:
                texts.append(f"probe {uuid4()}")
            await asyncio.gather(*(_probe(*route, texts[-1]) for route, texts in zip(routes, sent, strict=True)))
            await nodes[0].recorder.wait_until(is_done, 0.02)


@dataclass
class Outage:
    """When the broker was away, in the time of the event loop."""

    began: float
    ended: float = inf


async def _probe(node: Node, audience: Audience, text: str) -> None:
    with suppress(EngineUnavailable):
        await node.publish(text, audience)


@asynccontextmanager
async def _lag() -> AsyncIterator[list[float]]:
    """Collect by how many seconds the event loop is late during the block."""
    loop = asyncio.get_running_loop()
    lag = [0.0]
    is_over = asyncio.Event()

    async def measure() -> None:
        while not is_over.is_set():
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            lag.append(loop.time() - due)

    measuring = asyncio.create_task(measure())
    try:
        yield lag
    finally:
        is_over.set()
        await measuring  # a block at the very end is noticed at the next look
