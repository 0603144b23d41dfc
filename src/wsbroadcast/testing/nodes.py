"""Nodes for tests of engines: they publish, and keep what they receive."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ClassVar, NamedTuple
from unicodedata import normalize

from wsbroadcast.audience import Audience
from wsbroadcast.engines.contract import Engine, keeps_history
from wsbroadcast.history import HistoryRules
from wsbroadcast.message import Message
from wsbroadcast.publication import Control, Gap, Publication

# Messages and names that engines and brokers are known to get wrong.


NEWS = Audience("channel", "news")
SPORT = Audience("channel", "sport")

MESSAGES = (
    Message.of("text"),
    Message.of(""),
    Message.of('line\nand "line", \0, \\ and 漢字 \N{GRINNING FACE}'),
    Message.of(b""),
    Message.of(bytes(range(256))),
    Message.of(b'{"v":1}\n\r\n'),
    Message.json({"number": 1.5, "nothing": None, "list": ["ü", True]}),
    Message.of("newest", key="oil"),
    Message.of(b"newest", key=" \N{GRINNING FACE}\n"),
)
"""Messages of every kind."""

NAMES = (
    *("*", ">", "a.>", "a.*", "a.b", ".", "..", "a", "a b", "a  b", " a", "a ", "a%20b", "a+b", "a/b", "a:b", "a|b"),
    *("news", "news1", "new", "News", "NEWS", "news[a-z]", "newsa", "news?", "^news$", "channel:news", "everyone"),
    *('"; DROP TABLE news', "'; DROP TABLE news", '"', "'", "''", "\\", "$1", "${a}", "%s", "%", "%%", "{}", "~", "_"),
    *("\N{GRINNING FACE}" * 50, "\N{WINKING FACE}" * 50, "x" * 200, "x" * 199, "x" * 63, "x" * 64, "X" * 64),
    *(normalize("NFC", "café"), normalize("NFD", "café"), "CAFÉ", "ß", "ss", "İ", "i", "\N{NO-BREAK SPACE}"),
)
"""Names of channels and users that a broker may misread, or mix up."""


# A receiver that keeps what an engine hands to it.


class Recorder:
    """A receiver that keeps publications and gaps. It can be told to fail, or never to end."""

    def __init__(self) -> None:
        self.publications: list[Publication] = []
        """The publications that were received, in order."""
        self.controls: list[Control] = []
        """The controls that were received, such as dismissals, in order."""
        self.gaps: list[Gap] = []
        """The gaps that were reported, in order."""
        self.failing: set[Audience] = set()
        """Audiences for which `deliver` raises `RuntimeError`. `take` only counts their publications."""
        self.stalled: set[Audience] = set()
        """Audiences for which `deliver` never ends. `take` only counts their publications."""
        self.failures = 0
        """How many publications to failing audiences came."""
        self.waiting = 0
        """How many publications to stalled audiences came."""
        self._changed = asyncio.Event()

    # Called by the engine.

    def take(self, publication: Publication | Control) -> None:
        """Keep a publication."""
        if publication.audience in self.stalled:
            self.waiting += 1
        elif publication.audience in self.failing:
            self.failures += 1
        elif isinstance(publication, Publication):
            self.publications.append(publication)
        else:
            self.controls.append(publication)
        self._changed.set()

    async def deliver(self, publication: Publication | Control) -> None:
        """Keep a publication, unless it was told to fail or never to end."""
        self.take(publication)
        if publication.audience in self.stalled:
            await asyncio.Event().wait()
        if publication.audience in self.failing:
            raise RuntimeError("the recorder was told to fail")

    def gap(self, gap: Gap) -> None:
        """Keep a gap."""
        self.gaps.append(gap)
        self._changed.set()

    def suspect(self) -> None:
        """Do nothing: without a tail there is nothing to read."""

    # For tests.

    @property
    def received(self) -> list[Publication | Control]:
        """Everything that was received: publications, then controls."""
        return [*self.publications, *self.controls]

    def data(self, audience: Audience) -> list[str | bytes]:
        """Return what clients of an audience would have received, in order."""
        return [each.message.data for each in self.publications if each.audience == audience]

    async def wait_until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait until a condition is true, which changes only when something is received; return whether it is true."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


# Nodes.


class Node(NamedTuple):
    """An engine that runs, and the recorder of what it has handed over."""

    engine: Engine
    recorder: Recorder
    seconds: float
    """How many seconds to wait for something that should be received."""

    async def join(self, *audiences: Audience) -> None:
        """Subscribe to audiences, and wait until that is confirmed."""
        self.engine.subscribe(audiences)
        await self.engine.confirmed(audiences)

    async def publish(self, data: object, audience: Audience = NEWS) -> None:
        """Publish a message."""
        await self.engine.publish(Publication(Message.of(data), audience))

    def publish_nowait(self, data: object, audience: Audience = NEWS) -> None:
        """Publish a message without waiting for the engine."""
        self.engine.publish_nowait(Publication(Message.of(data), audience))

    async def receives(self, expected: Sequence[str | bytes], audience: Audience = NEWS) -> None:
        """Wait for as many messages to an audience; check that exactly these have come, in this order."""
        recorder = self.recorder
        await recorder.wait_until(lambda: len(recorder.data(audience)) >= len(expected), self.seconds)
        assert recorder.data(audience) == list(expected), f"of what was published to {audience}"


class Nodes(ABC):
    """The nodes that the tests of a contract run on."""

    node_count: ClassVar[int] = 1
    """How many nodes each test has. The first publishes, all receive."""
    has_one_order: ClassVar[bool] = True
    """Whether all nodes get what several nodes publish at the same time in the same order. With NATS they don't."""
    seconds: ClassVar[float] = 5.0
    """After so many seconds, something that should have happened counts as missing."""
    flapping_seconds: ClassVar[float] = 0.1
    """For so many seconds a subscription is watched after it has flapped."""

    @abstractmethod
    def make_engine(self) -> Engine:
        """Return a new engine that isn't started. The same broker links all engines that one test makes."""

    @asynccontextmanager
    async def nodes(
        self, *audiences: Audience, rules: HistoryRules | None = None, only_publish: bool = False
    ) -> AsyncIterator[list[Node]]:
        """Run nodes that have joined these audiences, and keep what the rules say, or learn what others keep."""
        async with asyncio.timeout(12 * self.seconds), AsyncExitStack() as stack:
            nodes = []
            for _ in range(self.node_count):
                node = Node(self.make_engine(), Recorder(), self.seconds)
                if rules is not None or only_publish:
                    keeps_history(node.engine).keep(rules, only_publishes=only_publish)
                await node.engine.start(node.recorder)
                stack.push_async_callback(node.engine.aclose)
                await node.join(*audiences)
                nodes.append(node)
            yield nodes

    def check_one_order(self, nodes: Sequence[Node]) -> None:
        """Compare the orders in which nodes have received the same messages, if the broker promises one order."""
        first, *orders = (node.recorder.data(NEWS) for node in nodes)
        for order in orders if self.has_one_order else []:
            both = set(first) & set(order)
            assert [text for text in order if text in both] == [text for text in first if text in both]


async def use(engine: Engine, recorder: Recorder, seconds: float) -> None:
    """Start an engine, let one message come back to it, and stop it, all within so many seconds."""
    node = Node(engine, recorder, seconds)
    async with asyncio.timeout(seconds):
        await engine.start(recorder)
        await node.join(NEWS)
        await node.publish("hello")
        await node.receives(["hello"])
        await engine.aclose()
