"""A broker in memory that fails on request, and the engines of the nodes that it links."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from secrets import token_urlsafe
from typing import Self

from wsbroadcast.audience import Audience
from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.engines.memory import Log
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.presence import Members, Roll
from wsbroadcast.publication import Control, Gap, Position, PresenceChange, Publication
from wsbroadcast.stats import EngineStats


class Hub:
    """A broker in this process.

    Args:
        seed: The seed for messages that are lost or doubled at random.
    """

    def __init__(self, seed: int = 0) -> None:
        self.engines: list[HubEngine] = []
        """The engines that run."""
        self.delay = 0.0
        """Seconds that a message takes to a node, and that an answer of the broker takes."""
        self.lost = 0.0
        """The share of live publications that don't arrive at a node, from 0 to 1."""
        self.doubled = 0.0
        """The share of live publications that arrive twice, from 0 to 1."""
        self.rules: HistoryRules | None = None
        """The history rules that the nodes have stored."""
        self._random = random.Random(seed)  # noqa: S311  # not for secrets
        self._logs: dict[Audience, Log] = {}
        self.roll = Roll()
        """Who is in which channel."""
        self.leases: dict[str, float] = {}
        """Until when each incarnation is alive, by the clock of the event loop."""

    def log(self, audience: Audience) -> Log:
        """Return the history of an audience."""
        log = self._logs.get(audience)
        if log is None:
            log = self._logs[audience] = Log(self.now())
        return log

    def alive(self) -> frozenset[str]:
        """Return the incarnations whose lease is valid."""
        now = self.now()
        return frozenset(incarnation for incarnation, until in self.leases.items() if until > now)

    def sweep(self) -> list[PresenceChange]:
        """Remove the members of dead incarnations, and tell the nodes."""
        changes: list[PresenceChange] = []
        alive = self.alive()
        for incarnation in self.roll.incarnations - alive:
            changes += self.roll.drop(incarnation)
        self.leases = {each: until for each, until in self.leases.items() if each in alive}
        for change in changes:
            self.send(change)
        return changes

    def now(self) -> float:
        """Return the time by the clock of the event loop."""
        return asyncio.get_running_loop().time()

    def forget(self, audience: Audience | None = None) -> None:
        """Forget the history of an audience, or everything, like a broker that loses its memory."""
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._learns = False
        self._cut_at = 0.0
        self._gaps = self._failures = 0
        self._incarnation = ""
        # Publications on their way here, each with the time of its arrival. The timer is that of the first one.
        self._arriving: deque[tuple[float, Publication | Control]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.wanted: set[Audience] = set()
        """The audiences that it is subscribed to."""
        self.is_cut = False
        """Whether it can't reach the hub."""

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Raise an error: it is made for a hub, not for a URL."""
        raise LifecycleError("a HubEngine is made for a Hub")

    async def start(self, receiver: Receiver) -> None:
        """Join the hub."""
        if self._receiver is not None:
            if self._loop is not None and self._loop.is_running():
                raise LifecycleError("the hub engine is started already: each manager needs one of its own")
            await self.aclose()  # ends what an event loop that is gone has left
        self._receiver, self._loop = receiver, asyncio.get_running_loop()
        self._hub.engines.append(self)
        if self.rules is not None:
            self._hub.rules = self.rules
        elif self._learns:
            self.rules = self._hub.rules

    async def aclose(self) -> None:
        """Leave the hub."""
        self._receiver = self._loop = None
        self.wanted.clear()
        self._lose()
        if self in self._hub.engines:
            self._hub.engines.remove(self)

    def arrive(self, publication: Publication | Control, delay: float) -> None:
        """Let a publication arrive at this node after so many seconds, but never before those of earlier calls."""
        loop = asyncio.get_running_loop()
        due = max(loop.time() + delay, self._arriving[-1][0] if self._arriving else 0.0)
        self._arriving.append((due, publication))
        if self._timer is None:
            self._timer = loop.call_at(due, self._take)

    def _take(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        now = max(loop.time(), self._arriving[0][0])  # timers may be early by the resolution of the clock
        while self._arriving and self._arriving[0][0] <= now:
            assert self._receiver is not None  # without one, nothing is on its way
            self._receiver.take(self._arriving.popleft()[1])
        if self._arriving and self._timer is None:  # a publication may have set the timer meanwhile
            self._timer = loop.call_at(self._arriving[0][0], self._take)

    def _lose(self) -> None:
        self._arriving.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cut(self) -> None:
        """Lose the connection: publications on their way are lost, and nothing comes or goes."""
        if not self.is_cut:
            self.is_cut, self._cut_at = True, self._hub.now()
            self._lose()

    def heal(self) -> None:
        """Restore the connection."""
        if self.is_cut:
            self.is_cut = False
            if self._receiver is not None:
                self._gaps += 1
                self._receiver.gap(Gap(self.name, self._hub.now() - self._cut_at))

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Want publications to these audiences."""
        self.wanted.update(audiences)

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """Stop wanting publications to these audiences."""
        self.wanted.difference_update(audiences)

    async def publish(self, publication: Publication | Control) -> None:
        """Send a publication to all nodes."""
        self.publish_nowait(publication)
        await self._confirmed()

    def publish_nowait(self, publication: Publication | Control) -> None:
        """Send a publication to all nodes."""
        self._check_publish()
        self._hub.send(publication)

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept."""
        self.rules, self._learns = rules, only_publishes and rules is None

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        """Keep a publication, and send it to all nodes."""
        self._check_publish()
        log = self._log(publication.audience)
        known = None if key is None else log.repeat(key)
        position = known or log.append(publication, history, self._hub.now())
        if known is None:
            if key is not None:
                log.remember(key)
            self._hub.send(publication)
        await self._confirmed()
        return Appended(position, is_repeat=known is not None)

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Keep a publication, and send it to all nodes."""
        self._check_publish()
        self._log(publication.audience).append(publication, history, self._hub.now())
        self._hub.send(publication)

    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        """Return what is kept of an audience."""
        await self._travel()
        log = self._log(audience)
        is_its_own = since is not None and since.epoch == log.epoch and 0 <= since.offset <= log.offset
        replay = log.read(since.offset if is_its_own and since is not None else None, history, self._hub.now())
        await self._travel()
        return replay

    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        """Return the newest positions of audiences."""
        await self._travel()
        logs = [self._log(audience) for audience in audiences]
        return [Position(log.epoch, log.offset) for log in logs]

    async def forget(self, audience: Audience) -> None:
        """Remove what is kept of an audience."""
        await self._travel()
        self._hub.forget(audience)

    # Presence.

    @property
    def incarnation(self) -> str:
        """The name of this node's lease."""
        return self._incarnation

    async def renew(self, seconds: float) -> bool:
        """Hold the lease, or take another one."""
        await self._travel()
        is_same = self._incarnation in self._hub.alive()
        if not is_same:
            self._incarnation = token_urlsafe(9)
        self._hub.leases[self._incarnation] = self._hub.now() + seconds
        await self._travel()
        return is_same

    async def alive(self) -> frozenset[str]:
        """Return the incarnations whose lease is valid."""
        await self._travel()
        return self._hub.alive()

    async def enter(self, channel: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Say that members are in a channel."""
        return await self._change(lambda: self._hub.roll.enter(channel, self._incarnation, members))

    async def leave(self, channel: str, members: Iterable[str]) -> PresenceChange | None:
        """Say that members are not in a channel any more."""
        return await self._change(lambda: self._hub.roll.leave(channel, self._incarnation, members))

    async def _change(self, step: Callable[[], PresenceChange | None]) -> PresenceChange | None:
        await self._travel()
        change = step()
        if change is not None:
            self._hub.send(change)
        await self._confirmed()
        return change

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        await self._travel()
        return self._hub.roll.members(channel)

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        await self._travel()
        return self._hub.roll.count(channel)

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        await self._travel()
        return self._hub.roll.channels_of(member)

    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove the members of dead nodes."""
        await self._travel()
        changes = self._hub.sweep()
        await self._travel()
        return changes

    def stats(self) -> EngineStats:
        """Return what was counted."""
        return EngineStats(reconnects=self._gaps, gaps=self._gaps, publish_failures=self._failures)

    async def health(self) -> Health:
        """Return whether it reaches the hub."""
        is_ok = self._receiver is not None and not self.is_cut
        return Health(self.name, is_ok, "" if is_ok else "cut off" if self.is_cut else "not started")

    def _log(self, audience: Audience) -> Log:
        return self._hub.log(audience)

    async def _travel(self) -> None:
        self._check()
        await asyncio.sleep(self._hub.delay)
        self._check()

    async def _confirmed(self) -> None:
        try:
            await self._travel()
        except EngineUnavailable as error:  # cut off before the hub's answer could arrive
            self._failures += 1
            error.may_have_been_sent = True
            raise

    def _check_publish(self) -> None:
        try:
            self._check()
        except EngineUnavailable:
            self._failures += 1
            raise

    def _check(self) -> None:
        if self._receiver is None:
            raise EngineUnavailable("the hub engine is not started")
        if self.is_cut:
            raise EngineUnavailable("the hub is out of reach: this node is cut off")
