"""Clients that come and go at random on several nodes, faults meanwhile, and checks of what each client was told."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.support.asgi import Peer
from tests.support.brokers import Endpoint
from tests.support.proxy import FaultProxy
from wsbroadcast import (
    Connection,
    ConnectionClosed,
    ConnectionManager,
    Delivery,
    EngineError,
    Hook,
    LifecycleError,
    LimitExceeded,
    Position,
)
from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.broker.link import NOWHERE, Inlet, KeepingLink, Place
from wsbroadcast.protocols.events import events
from wsbroadcast.testing import Cluster
from wsbroadcast.transports import SPEAKS

CHANNELS = ("a", "b", "c")

# How many messages fewer than a history has may have come since, for a refusal to count as needless: a node may be
# behind the publisher that the test counts by.
_SLACK = 8

# In each half of a story there are at least so many cuts.
_CUTS = 4

# For so many seconds clients may come to where everything ends, once nothing fails any more.
_PATIENCE = 20.0

# What a node may answer that can't reach its broker, or is about to end.
_NOT_NOW = (EngineError, LifecycleError, LimitExceeded, ConnectionClosed)


class World:
    """Nodes, and what may happen to them."""

    restarts = 0.0
    """How probable a restart of the broker is, each time a node was cut off; there is one in the middle anyway."""
    deploys = 0.0
    """How probable a deploy of a node is, each time one was cut off."""

    def __init__(self, managers: list[ConnectionManager]) -> None:
        self.managers = managers

    def cut(self, number: int, *, briefly: bool) -> None:
        """Cut a node off from its broker; briefly means that it may come back at once."""
        raise NotImplementedError

    def heal(self, number: int) -> None:
        """Let it back."""
        raise NotImplementedError

    async def restart(self) -> None:
        """Let the broker be away for a moment, or another take its place."""
        raise NotImplementedError

    async def deploy(self, number: int) -> None:
        """Let another node come in the place of one, which is drained and ends."""
        raise NotImplementedError

    def calm(self) -> None:
        """Let everything arrive once, from now on."""
        raise NotImplementedError

    @property
    def was_lossy(self) -> bool:
        """Whether something was lost and something doubled, as far as that is counted."""
        return True


class ClusterWorld(World):
    """A cluster in memory, whose broker forgets everything now and then."""

    restarts = 0.1

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(list(cluster.managers))
        self._cluster = cluster
        cluster.hub.lost = cluster.hub.doubled = 0.03
        cluster.delay(0.002)

    def cut(self, number: int, *, briefly: bool) -> None:
        self._cluster.partition(number)

    def heal(self, number: int) -> None:
        self._cluster.heal(number)

    async def restart(self) -> None:
        await self._cluster.restart_broker()

    async def deploy(self, number: int) -> None:
        if len(self.managers) > 2:  # nobody comes in its place
            await leave(self.managers.pop())

    def calm(self) -> None:
        self._cluster.hub.lost = self._cluster.hub.doubled = 0.0


class Line:
    """What is between an engine and its broker: it loses some of what is live, doubles some, and breaks on command.

    Args:
        engine: An engine that isn't started.
        seed: Of what is lost and doubled.
    """

    def __init__(self, engine: KeepingEngine, seed: int) -> None:
        self._random = random.Random(seed)
        self._new_link = engine.new_link
        self.share = 0.03
        """Of what is kept so much is lost on the way, and as much comes twice."""
        self.is_cut = False
        """Whether the link breaks with the next message, and none can be opened."""
        self.lost = self.doubled = 0
        engine.new_link = self._make  # type: ignore[method-assign]

    def _make(self) -> KeepingLink:
        link = self._new_link()
        open_, read = link.open, link.read

        async def opened() -> None:
            self._check()
            await open_()

        link.open = opened  # type: ignore[method-assign]
        link.read = lambda inlet: read(_End(self, inlet))  # type: ignore[method-assign]
        return link

    def _check(self) -> None:
        if self.is_cut:
            raise ConnectionResetError("the line is cut")

    def times(self, envelope: bytes, place: Place | None) -> int:
        """Return how often an envelope arrives."""
        self._check()
        is_kept = place not in (None, NOWHERE) or b',"offset":' in envelope.partition(b"\n")[0]
        chance = self._random.random() if is_kept else 1.0
        self.lost += chance < self.share
        self.doubled += self.share <= chance < 2 * self.share
        return 0 if chance < self.share else 2 if chance < 2 * self.share else 1


class _End:
    """The end of a line: an inlet."""

    def __init__(self, line: Line, inlet: Inlet) -> None:
        self._line = line
        self._inlet = inlet
        self.missed = inlet.missed

    def take(self, name: str, envelope: bytes, place: Place | None = None) -> None:
        for _ in range(self._line.times(envelope, place)):
            self._inlet.take(name, envelope, place)


async def leave(manager: ConnectionManager) -> None:
    """Drain a node and end it, as a deploy does."""
    await manager.drain(0.2)
    await manager.aclose()


@dataclass
class Node:
    """A node at a real broker, over a proxy if it is reached over a socket that we know."""

    manager: ConnectionManager
    line: Line
    proxy: FaultProxy | None


class BrokerWorld(World):
    """Nodes at a real broker."""

    def __init__(
        self,
        nodes: list[Node],
        restart: Callable[[], Awaitable[object]],
        begin: Callable[[], Awaitable[Node]],
    ) -> None:
        super().__init__([node.manager for node in nodes])
        self._nodes = nodes
        self._lines = [node.line for node in nodes]
        self._restart = restart
        self._begin = begin

    def cut(self, number: int, *, briefly: bool) -> None:
        node = self._nodes[number]
        if node.proxy is None:
            node.line.is_cut = True
        else:
            if not briefly:
                node.proxy.refuse()
            node.proxy.reset()

    def heal(self, number: int) -> None:
        node = self._nodes[number]
        node.line.is_cut = False
        if node.proxy is not None:
            node.proxy.heal()

    async def restart(self) -> None:
        await self._restart()

    async def deploy(self, number: int) -> None:
        node, old = await self._begin(), self.managers[number]
        self._lines.append(node.line)
        self._nodes[number], self.managers[number] = node, node.manager
        await leave(old)

    def calm(self) -> None:
        for line in self._lines:
            line.share = 0.0

    @property
    def was_lossy(self) -> bool:
        return any(line.lost for line in self._lines) and any(line.doubled for line in self._lines)


@asynccontextmanager
async def nodes_at(
    endpoint: Endpoint | None,
    make_engine: Callable[[str], KeepingEngine],
    restart: Callable[[], Awaitable[object]],
    *,
    count: int = 3,
    seed: int = 0,
    **options: Any,
) -> AsyncIterator[BrokerWorld]:
    """Run nodes at a broker that loses and doubles messages.

    Args:
        endpoint: Where the broker is; `None` if there is no socket to put a proxy before.
        make_engine: Makes a node's engine, for a URL if there is an endpoint.
        restart: Restarts the broker.
        count: How many nodes.
        seed: Of what is lost and doubled.
        options: Of the managers.
    """
    numbers = itertools.count(seed * 10)
    async with AsyncExitStack() as stack:

        async def begin() -> Node:
            proxy = None if endpoint is None else await stack.enter_async_context(FaultProxy(endpoint))
            engine = make_engine("" if proxy is None else proxy.url)
            line = Line(engine, next(numbers))
            manager = await stack.enter_async_context(ConnectionManager(engine, **options))
            return Node(manager, line, proxy)

        yield BrokerWorld([await begin() for _ in range(count)], restart, begin)


class Hooks(Hook):
    """Counts what it is told, lets what is published pass, and withholds some of what is delivered."""

    def __init__(self) -> None:
        self.joined = self.left = self.delivered = 0

    async def on_joined(self, channel: str, user: str) -> None:
        self.joined += 1

    async def on_left(self, channel: str, user: str) -> None:
        self.left += 1

    async def on_deliver(self, delivery: Delivery) -> None:
        await asyncio.sleep(0)
        self.delivered += 1
        if str(delivery.message.data).endswith("7"):
            delivery.recipients.clear()


class Story:
    """What is known of all publications, and what was found wrong."""

    def __init__(self, messages: int) -> None:
        self.messages = messages
        """How many a history keeps."""
        self.offsets: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        """What was published under each offset, by channel and epoch, as anybody has seen it."""
        self.published: list[tuple[str, Position]] = []
        self.wrong: Counter[str] = Counter()
        """What must not be."""
        self.holes: list[tuple[str, Position, Position, str]] = []
        """Where something was lost in silence: the channel, the places around it, and what the client got before."""
        self.seen: Counter[str] = Counter()
        """What happened, so that a test knows that something did."""

    def note(self, channel: str, position: Position, text: str) -> None:
        """Remember a publication; whoever sees another under its position is wrong."""
        known = self.offsets[channel, position.epoch].setdefault(position.offset, text)
        if known != text:
            self.wrong["two under one position"] += 1

    def between(self, channel: str, after: Position, before: int) -> int:
        """Return how many publications are known between two places."""
        return sum(after.offset < offset < before for offset in self.offsets[channel, after.epoch])

    def since(self, channel: str, position: Position) -> int:
        """Return how many publications are known after a position."""
        return sum(offset > position.offset for offset in self.offsets[channel, position.epoch])


class Client:
    """One client, over all its connections; it speaks events, and says since when it wants what it missed."""

    def __init__(self, story: Story, managers: Sequence[ConnectionManager], channels: Sequence[str], seed: int) -> None:
        self.story = story
        self.managers = managers
        self.channels = channels
        self.random = random.Random(seed)
        self.log: dict[str, list[tuple[str, Any]]] = {channel: [] for channel in channels}
        """What it was told, by channel, in order."""
        self.at: dict[str, Position] = {}
        """Where it is, as it tells when it comes back."""
        self.user: str | None = None
        """Whose it is, where somebody asks who is there."""
        self.peer: Peer | None = None
        self.connection: Connection
        self._read = 0

    async def live(self, is_over: Callable[[], bool]) -> None:
        """Come, stay, stall, leave, come back at another node."""
        while not is_over():
            await self.come_in()
            await asyncio.sleep(self.random.uniform(0.01, 0.4))
            if self.random.random() < 0.2 and self.peer is not None:
                self.peer.stall()
                await asyncio.sleep(self.random.uniform(0.01, 0.3))
                self.peer.resume()
            if self.random.random() < 0.7:
                await self.leave()
                await asyncio.sleep(self.random.choice((0, 0, 0.001, self.random.uniform(0, 0.3))))
        await self.come_in()

    async def come_in(self) -> None:
        """Try to come, at one node or another, until one lets it in."""
        while True:
            try:
                await self.come(self.random.choice(self.managers))
            except _NOT_NOW:
                self.story.seen["not let in"] += 1
                await asyncio.sleep(0.01)
            else:
                return

    async def come(self, manager: ConnectionManager) -> None:
        """Connect since where it is, unless it is connected."""
        self.read()
        if self.peer is not None and self.peer.close is None:
            return
        peer = Peer(suspends=self.random.random() < 0.5)
        peer.websocket.scope[SPEAKS] = events
        since = {channel: self.at[channel] for channel in self.channels if channel in self.at}
        for channel in self.channels:
            self.log[channel].append(("came", since.get(channel)))
        self._read, self.peer = 0, peer
        try:
            self.connection = await manager.connect(peer.websocket, channels=self.channels, since=since, user=self.user)
        except _NOT_NOW:
            self.peer = None
            raise
        self.story.seen["came back" if since else "came"] += 1

    async def leave(self) -> None:
        """Go without a word, and remember what came."""
        peer = self.peer
        if peer is not None:
            manager = self.connection.manager
            self.read()
            self.peer = None
            peer.vanish()
            manager.disconnect(self.connection)

    async def end(self) -> None:
        """Give back what the test has to give back."""

    def read(self) -> None:
        """Look at what came, and move on."""
        if self.peer is None:
            return
        messages = self.peer.messages
        for message in messages[self._read :]:
            self.take(json.loads(message))
        self._read = len(messages)

    def take(self, event: dict[str, Any]) -> None:
        """Note one event."""
        kind, channel = event["type"], event.get("channel")
        if channel not in self.log or kind not in ("message", "position", "subscribed", "gap"):
            return
        position = None if "position" not in event else Position.of(event["position"])
        if kind == "message":
            if position is None:
                self.story.wrong["without a position"] += 1
                return
            self.story.note(channel, position, event["data"])
        if kind == "subscribed" and event.get("recovered") is False:
            self.refused(channel, event["reason"], position)
        if kind == "subscribed" and event.get("recovered"):
            self.story.seen["recovered"] += 1
        if kind == "gap":
            self.story.seen[f"gap: {event['reason']}"] += 1
        self.log[channel].append((kind, (position, event.get("recovered"))))
        if position is not None:
            self.at[channel] = position
        elif kind in ("subscribed", "gap"):
            self.at.pop(channel, None)

    def tell(self) -> str:
        """Return where it stands, for somebody who has to find out why."""
        peer, sink = self.peer, self.connection._sink
        waits = None if sink.backlog is None else list(sink.backlog)
        close = None if peer is None else peer.end
        last = {channel: log[-3:] for channel, log in self.log.items()}
        return f"{self.connection} closed {close}, is at {self.at}, waits {waits}, was told {last}"

    def refused(self, channel: str, reason: str, position: Position | None) -> None:
        """Note a refusal, and whether there was a reason for it."""
        self.story.seen[f"refused: {reason}"] += 1
        since: Position | None = next(value for kind, value in reversed(self.log[channel]) if kind == "came")
        if since is None or position is None or position.epoch != since.epoch:
            return
        if reason == "epoch":
            self.story.wrong["needless refusal: epoch"] += 1
        elif reason != "unavailable" and self.story.since(channel, since) < self.story.messages - _SLACK:
            self.story.wrong[f"needless refusal: {reason}"] += 1

    def check(self) -> None:
        """Go through what it was told, and find holes, doubles and what is out of order."""
        self.read()
        for channel, log in self.log.items():
            at: Position | None = None
            asked: Position | None = None
            before = ""
            for kind, value in log:
                if kind == "came":
                    asked = value
                    continue
                position, recovered = value
                if kind == "subscribed":
                    if recovered and position != asked:
                        self.story.wrong["recovered from elsewhere"] += 1
                    at = position
                elif kind == "gap":
                    at = position
                elif at is None or position.epoch != at.epoch:
                    self.story.wrong["another epoch in silence" if at is not None else "before it was subscribed"] += 1
                    at = position
                else:
                    if position.offset <= at.offset:
                        self.story.wrong["doubled or out of order"] += 1
                    elif self.story.between(channel, at, position.offset):
                        self.story.wrong["lost in silence"] += 1
                        self.story.holes.append((channel, at, position, before))
                    at = position
                before = kind


async def publish(
    story: Story, managers: Sequence[ConnectionManager], channels: Sequence[str], seed: int, is_over: Callable[[], bool]
) -> None:
    """Publish at random nodes until it is over."""
    choose = random.Random(seed)
    number = 0
    while not is_over():
        number += 1
        channel, text = choose.choice(channels), f"{seed}.{number}"
        manager = choose.choice(managers)
        try:
            if choose.random() < 0.2:
                manager.broadcast_nowait(text, channel=channel)
            else:
                receipt = await manager.broadcast(text, channel=channel)
                assert receipt.position is not None
                story.note(channel, receipt.position, text)
            story.seen["published"] += 1
        except _NOT_NOW:
            story.seen["not published"] += 1
        await asyncio.sleep(choose.uniform(0, 0.004))


async def run(
    world: World,
    seed: int,
    *,
    messages: int,
    seconds: float,
    clients: int,
    patience: float = _PATIENCE,
    kind: type[Client] = Client,
    users: int = 0,
) -> Story:
    """Let clients, publishers and faults do what they do for a while; return what came of it.

    With users, everybody who is there at the end has to be known to every node then, and nobody else.

    Args:
        world: The nodes.
        seed: Of all lives and faults.
        messages: How many messages the histories have.
        seconds: How long it lasts, without restarts of the broker.
        clients: How many there are.
        patience: For how many seconds they may come to where everything ends, once nothing fails any more.
        kind: What clients speak.
        users: To how many users the clients belong; 0 if to none.
    """
    story = Story(messages)
    some = [kind(story, world.managers, CHANNELS, seed * 1000 + number) for number in range(clients)]
    for number, client in enumerate(some):
        client.user = f"u{number % users}" if users else None
    async with asyncio.TaskGroup() as tasks:
        breaking = tasks.create_task(_break_things(story, world, seed, seconds))
        for client in some:
            tasks.create_task(client.live(breaking.done))
        for number in range(3):
            tasks.create_task(publish(story, world.managers, CHANNELS, seed * 10 + number, breaking.done))
    world.calm()
    await _come_to_the_end(story, world.managers[0], some, patience)
    if users:
        await _agree(story, world.managers, some, patience)
    for client in some:
        client.check()
        await client.end()
    return story


async def _break_things(story: Story, world: World, seed: int, seconds: float) -> None:
    choose = random.Random(seed + 1)
    loop = asyncio.get_running_loop()
    for half in range(2):
        if half:
            await world.restart()
        ends = loop.time() + seconds / 2
        wanted = story.seen["cut"] + _CUTS

        def is_over(ends: float = ends, wanted: int = wanted, is_last: bool = half == 1) -> bool:
            # On a busy machine little happens in a second.
            has_happened = story.seen["cut"] >= wanted and (world.was_lossy or not is_last)
            return loop.time() > ends and (has_happened or loop.time() > ends + _PATIENCE)

        while not is_over():
            await asyncio.sleep(choose.uniform(0.05, 0.2))
            number = choose.randrange(len(world.managers))
            seconds_away = choose.choice((0, 0.001, choose.uniform(0, 0.2)))
            world.cut(number, briefly=not seconds_away)
            await asyncio.sleep(seconds_away)
            world.heal(number)
            story.seen["cut"] += 1
            if choose.random() < world.restarts:
                await world.restart()
            if choose.random() < world.deploys or (world.deploys and story.seen["deployed"] <= half):
                await world.deploy(number)
                story.seen["deployed"] += 1
            if choose.random() < 0.1:
                with suppress(EngineError):
                    await world.managers[0].forget(choose.choice(CHANNELS))
                    story.seen["forgotten"] += 1


async def _come_to_the_end(
    story: Story, manager: ConnectionManager, clients: Sequence[Client], patience: float
) -> None:
    """Wait until every client is where the histories are; who doesn't come there is wrong."""
    ends = asyncio.get_running_loop().time() + patience
    for channel in CHANNELS * 2:  # what follows shows what was lost before it
        await _publish_last(story, manager, channel)
    while True:
        for client in clients:
            await client.come_in()  # who was let go as a slow consumer comes back
        behind = Counter[str]()
        for channel in CHANNELS:
            top = await manager.position(channel)
            for client in clients:
                client.read()
                behind[channel] += client.at.get(channel) != top
        if not behind.total():
            return
        if asyncio.get_running_loop().time() > ends:
            story.wrong["never came to the end"] += behind.total()
            tops = {channel: await manager.position(channel) for channel in CHANNELS}
            for client in clients:
                if client.at != tops:
                    print(client.tell())
            return
        await asyncio.sleep(0.01)


async def _agree(
    story: Story, managers: Sequence[ConnectionManager], clients: Sequence[Client], patience: float
) -> None:
    """Let half of them go, and wait until every node knows who is left."""
    for client in clients[::2]:
        await client.leave()
    here = {client.user for client in clients[1::2]}
    ends = asyncio.get_running_loop().time() + patience
    while True:
        try:
            known = [{member.id for member in await each.presence(name)} for each in managers for name in CHANNELS]
        except EngineError:
            known = []
        if known and all(each == here for each in known):
            return
        if asyncio.get_running_loop().time() > ends:
            story.wrong["a ghost"] += sum(len(each - here) for each in known)
            story.wrong["somebody unknown"] += sum(len(here - each) for each in known)
            story.wrong["nobody could say who is there"] += not known
            return
        await asyncio.sleep(0.05)


async def _publish_last(story: Story, manager: ConnectionManager, channel: str) -> None:
    async with asyncio.timeout(_PATIENCE):
        while True:
            try:
                receipt = await manager.broadcast("last", channel=channel)
            except EngineError:
                await asyncio.sleep(0.02)
                continue
            assert receipt.position is not None
            story.note(channel, receipt.position, "last")
            return
