"""Nodes for tests of engines: what they publish, and what they receive."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ClassVar, NamedTuple

from wsbroadcast.audience import Audience
from wsbroadcast.engines.base import Engine, Publication
from wsbroadcast.message import Message
from wsbroadcast.testing.recorder import Recorder
from wsbroadcast.testing.samples import NEWS


class Node(NamedTuple):
    """An engine that runs, and what it has handed over."""

    engine: Engine
    recorder: Recorder
    seconds: float
    """How long to wait for what should be received."""

    async def join(self, *audiences: Audience) -> None:
        """Subscribe, and wait until that is confirmed."""
        self.engine.subscribe(audiences)
        await self.engine.confirmed(audiences)

    async def publish(self, data: object, audience: Audience = NEWS) -> None:
        """Publish a message."""
        await self.engine.publish(Publication(Message.of(data), audience))

    def publish_nowait(self, data: object, audience: Audience = NEWS) -> None:
        """Publish a message without waiting for the engine."""
        self.engine.publish_nowait(Publication(Message.of(data), audience))

    async def receives(self, expected: Sequence[str | bytes], audience: Audience = NEWS) -> None:
        """Wait for as many messages to an audience; they and no others must have come, in this order."""
        recorder = self.recorder
        await recorder.wait_until(lambda: len(recorder.data(audience)) >= len(expected), self.seconds)
        assert recorder.data(audience) == list(expected), f"of what was published to {audience}"


class Nodes(ABC):
    """What the tests of a contract run on."""

    node_count: ClassVar[int] = 1
    """How many nodes each test has. The first publishes, all receive."""
    has_one_order: ClassVar[bool] = True
    """Whether the broker puts what several nodes publish at the same time in one order for all; NATS doesn't."""
    seconds: ClassVar[float] = 5.0
    """After which something that should have happened counts as missing."""
    flapping_seconds: ClassVar[float] = 0.1
    """For which a subscription is watched after it has flapped."""

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return a new engine that isn't started; all that one test makes are linked by the same broker."""

    @asynccontextmanager
    async def nodes(self, *audiences: Audience, is_ready: bool = True) -> AsyncIterator[list[Node]]:
        """Run nodes that have joined these audiences; `is_ready` is their recorders'."""
        async with asyncio.timeout(12 * self.seconds), AsyncExitStack() as stack:
            nodes = []
            for _ in range(self.node_count):
                node = Node(self.make_engine(), Recorder(is_ready=is_ready), self.seconds)
                await node.engine.start(node.recorder)
                stack.push_async_callback(node.engine.aclose)
                await node.join(*audiences)
                nodes.append(node)
            yield nodes

    def check_one_order(self, nodes: Sequence[Node]) -> None:
        """Compare the orders in which nodes have received what they have in common, if the broker promises one."""
        first, *orders = (node.recorder.data(NEWS) for node in nodes)
        for order in orders if self.has_one_order else []:
            both = set(first) & set(order)
            assert [text for text in order if text in both] == [text for text in first if text in both]


async def use(engine: Engine, recorder: Recorder, seconds: float) -> None:
    """Start an engine, let one message come back to it, stop it; all in so many seconds."""
    node = Node(engine, recorder, seconds)
    async with asyncio.timeout(seconds):
        await engine.start(recorder)
        await node.join(NEWS)
        await node.publish("hello")
        await node.receives(["hello"])
        await engine.aclose()


def content(publication: Publication) -> tuple[object, ...]:
    """Return what two publications have in common that are the same."""
    message = publication.message
    return (message.payload, message.data, message.is_text, message.key, *publication[1:])
