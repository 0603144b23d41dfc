"""Several nodes in one process, linked by a broker in memory that fails as it is told to."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.engines.memory import Log
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.publication import Control, Gap, Position, Publication


class Hub:
    """A broker in this process.

    Args:
        seed: Of what is lost and doubled by chance.
    """

    def __init__(self, seed: int = 0) -> None:
        self.engines: list[HubEngine] = []
        """Those that run."""
        self.delay = 0.0
        """Seconds that everything takes to arrive."""
        self.lost = 0.0
        """The share of live publications that don't arrive at a node."""
        self.doubled = 0.0
        """The share that arrives twice."""
        self.rules: HistoryRules | None = None
        """What the nodes have said that they keep."""
        self._random = random.Random(seed)  # noqa: S311  # not for secrets
        self._logs: dict[Audience, Log] = {}

    def log(self, audience: Audience) -> Log:
        """Return the history of an audience."""
        log = self._logs.get(audience)
        if log is None:
            log = self._logs[audience] = Log(self.now())
        return log

    def now(self) -> float:
        """Return the time by the clock of the event loop."""
        return asyncio.get_running_loop().time()

    def forget(self, audience: Audience | None = None) -> None:
        """Forget the history of an audience, or everything, as a broker does that loses its memory."""
        if audience is None:
            self._logs.clear()
        else:
            self._logs.pop(audience, None)

    def send(self, publication: Publication | Control) -> None:
        """Let a publication arrive at every node that wants it and isn't cut off."""
        for engine in self.engines:
            if not engine.is_cut and publication.audience in engine.wanted:
                times = 1
                if isinstance(publication, Publication):
                    chance = self._random.random()
                    times = 0 if chance < self.lost else 2 if chance < self.lost + self.doubled else 1
                for _ in range(times):
                    engine.arrive(publication, self.delay)


class HubEngine(Engine):
    """The engine of one node at a hub."""

    name = "hub"
    rules: HistoryRules | None = None

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._receiver: Receiver | None = None
        self._learns = False
        self._cut_at = 0.0
        self._arriving: deque[Publication | Control] = deque()
        self.wanted: set[Audience] = set()
        """What it is subscribed to."""
        self.is_cut = False
        """Whether it can't reach the hub."""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """It is made for a hub, not for a URL."""
        raise LifecycleError("a HubEngine is made for a Hub")

    async def start(self, receiver: Receiver) -> None:
        """Join the hub."""
        if self._receiver is not None:
            raise LifecycleError("the hub engine is started already: each manager needs one of its own")
        self._receiver = receiver
        self._hub.engines.append(self)
        if self.rules is not None:
            self._hub.rules = self.rules
        elif self._learns:
            self.rules = self._hub.rules

    async def aclose(self) -> None:
        """Leave the hub."""
        self._receiver = None
        self.wanted.clear()
        self._arriving.clear()
        if self in self._hub.engines:
            self._hub.engines.remove(self)

    def arrive(self, publication: Publication | Control, delay: float) -> None:
        """Let a publication come to this node, in the order of the calls."""
        self._arriving.append(publication)
        asyncio.get_running_loop().call_later(delay, self._take)

    def _take(self) -> None:
        if self._arriving and self._receiver is not None:
            publication = self._arriving.popleft()
            if not self.is_cut:
                self._receiver.take(publication)

    def cut(self) -> None:
        """Lose the connection: what is on its way is lost, and nothing comes or goes."""
        if not self.is_cut:
            self.is_cut, self._cut_at = True, self._hub.now()

    def heal(self) -> None:
        """Have the connection back."""
        if self.is_cut:
            self.is_cut = False
            if self._receiver is not None:
                self._receiver.gap(Gap(self.name, self._hub.now() - self._cut_at))

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Want publications to these audiences."""
        self.wanted.update(audiences)

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """No longer want them."""
        self.wanted.difference_update(audiences)

    async def publish(self, publication: Publication | Control) -> None:
        """Send it to all nodes."""
        await self._travel()
        self._hub.send(publication)

    def publish_nowait(self, publication: Publication | Control) -> None:
        """Send it to all nodes."""
        self._check()
        self._hub.send(publication)

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept."""
        self.rules, self._learns = rules, only_publishes and rules is None

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        """Keep it, and send it to all nodes."""
        await self._travel()
        log = self._hub.log(publication.audience)
        if key is not None and (position := log.repeat(key)) is not None:
            return Appended(position, is_repeat=True)
        position = log.append(publication, history, self._hub.now())
        if key is not None:
            log.remember(key)
        self._hub.send(publication)
        await self._travel()
        return Appended(position)

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Keep it, and send it to all nodes."""
        self._check()
        self._hub.log(publication.audience).append(publication, history, self._hub.now())
        self._hub.send(publication)

    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        """Return what is kept."""
        await self._travel()
        log = self._hub.log(audience)
        is_its_own = since is not None and since.epoch == log.epoch and 0 <= since.offset <= log.offset
        replay = log.read(since.offset if is_its_own and since is not None else None, history, self._hub.now())
        await self._travel()
        return replay

    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        """Return where audiences are."""
        await self._travel()
        logs = [self._hub.log(audience) for audience in audiences]
        return [Position(log.epoch, log.offset) for log in logs]

    async def forget(self, audience: Audience) -> None:
        """Remove what is kept of an audience."""
        await self._travel()
        self._hub.forget(audience)

    async def health(self) -> Health:
        """Tell whether it reaches the hub."""
        is_ok = self._receiver is not None and not self.is_cut
        return Health(self.name, is_ok, "" if is_ok else "cut off" if self.is_cut else "not started")

    async def _travel(self) -> None:
        self._check()
        await asyncio.sleep(self._hub.delay)
        self._check()

    def _check(self) -> None:
        if self._receiver is None:
            raise EngineUnavailable("the hub engine is not started")
        if self.is_cut:
            raise EngineUnavailable("the hub is out of reach: this node is cut off")


class Cluster:
    """Nodes of an app in one process, each a `ConnectionManager`: `async with Cluster(3, history=…) as cluster`.

    Args:
        count: How many nodes.
        seed: Of what is lost and doubled by chance.
        options: Those of every `ConnectionManager`, but for the engine.
    """

    def __init__(self, count: int = 2, *, seed: int = 0, **options: Any) -> None:
        self.hub = Hub(seed)
        """The broker between them."""
        self._engines = [HubEngine(self.hub) for _ in range(count)]
        self.managers = [ConnectionManager(engine, **options) for engine in self._engines]
        """One for each node."""
        self._killed: set[int] = set()
        self._set_forward = 0.0

    async def __aenter__(self) -> Self:
        for manager in self.managers:
            await manager.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        for number, manager in enumerate(self.managers):
            if number not in self._killed:
                await manager.aclose()

    def __getitem__(self, number: int) -> ConnectionManager:
        return self.managers[number]

    def __len__(self) -> int:
        return len(self.managers)

    def __iter__(self) -> Iterator[ConnectionManager]:
        return iter(self.managers)

    def partition(self, *numbers: int) -> None:
        """Cut nodes off from the broker; those that are named none means all."""
        for engine in self._chosen(numbers):
            engine.cut()

    def heal(self, *numbers: int) -> None:
        """Let nodes reach the broker again; all, if none is named."""
        for engine in self._chosen(numbers):
            engine.heal()

    async def kill(self, number: int) -> None:
        """End a node as `kill -9` does: nobody is told, its connections are lost."""
        self._killed.add(number)
        engine, manager = self._engines[number], self.managers[number]
        engine.cut()
        node = core_of(manager).life.node
        for connection in manager.connections:
            node.membership.lost(connection, ABNORMAL, "")
        await manager.aclose()

    async def restart_broker(self, *, keeps: bool = False) -> None:
        """Cut all nodes off, and let the broker forget what it kept, unless it is told not to."""
        self.partition()
        if not keeps:
            self.hub.forget()
        self.heal()

    def delay(self, seconds: float) -> None:
        """Let everything between the nodes and the broker take so long from now on."""
        self.hub.delay = seconds

    async def advance(self, seconds: float) -> None:
        """Set the clock of the event loop forward: whatever is due by then happens now.

        Raises:
            LifecycleError: If the event loop's clock can't be set, as uvloop's.
        """
        loop = asyncio.get_running_loop()
        if not self._set_forward:
            real = loop.time
            try:
                loop.time = lambda: real() + self._set_forward  # type: ignore[method-assign]
            except AttributeError:
                raise LifecycleError("the clock of this event loop can't be set: use asyncio's own") from None
        self._set_forward += seconds
        for _ in range(3):
            await asyncio.sleep(0)

    def _chosen(self, numbers: Sequence[int]) -> list[HubEngine]:
        return [self._engines[number] for number in numbers] if numbers else self._engines
