"""Several nodes of an app in one process, to test what happens between them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, Self

from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.exceptions import ConfigurationError, LifecycleError
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.testing.hub import Hub, HubEngine

# The clock is set forward in so many steps, so that tasks can run between events that become due.
_STEPS = 100


class Cluster:
    """Nodes of an app in one process, each a `ConnectionManager`: `async with Cluster(3, history=…) as cluster`.

    `cluster[0]` is the first node. Before the block you may give the nodes hooks and apps. A broker in memory links
    them. They run from the beginning of the block to its end.

    Args:
        count: The number of nodes.
        seed: The seed for messages that are lost or doubled at random.
        options: Options of each `ConnectionManager`, except for the engine.

    Raises:
        ConfigurationError: If the count is not a positive number, or an option makes no sense.
    """

    def __init__(self, count: int = 2, *, seed: int = 0, **options: Any) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigurationError(f"a cluster has one node or more, not {count!r:.80}")
        if "engine" in options:
            raise ConfigurationError("the nodes of a cluster have an engine of its own: leave engine= out")
        self.hub = Hub(seed)
        """The broker between them. Set its `lost` and `doubled` to lose or double a share of the live messages."""
        self._engines = [HubEngine(self.hub) for _ in range(count)]
        self.managers = [ConnectionManager(engine, **options) for engine in self._engines]
        """The managers, one for each node."""
        self._killed: set[int] = set()
        self._was_started = self._is_running = False
        # The event loop's clock before it was first set forward, and by how much it is forward now.
        self._clock: tuple[asyncio.AbstractEventLoop, Any] | None = None
        self._set_forward = 0.0

    async def __aenter__(self) -> Self:
        if self._was_started:
            raise LifecycleError("this cluster was started before: make another one")
        self._was_started = self._is_running = True
        try:
            for manager in self.managers:
                await manager.start()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._end()

    async def _end(self) -> None:
        self._is_running = False
        try:
            for manager in self.managers:
                await manager.aclose()
        finally:
            self._undo_clock()

    def __getitem__(self, number: int) -> ConnectionManager:
        return self.managers[number]

    def __len__(self) -> int:
        return len(self.managers)

    def __iter__(self) -> Iterator[ConnectionManager]:
        return iter(self.managers)

    # Failures.

    def partition(self, *numbers: int) -> None:
        """Cut nodes off from the broker; without a number, all of them.

        Messages on their way to these nodes are lost. Their clients stay, and their `broadcast` raises
        `EngineUnavailable`.

        Raises:
            ValueError: If there is no such node, or it was killed.
            LifecycleError: If the cluster doesn't run.
        """
        for engine in self._chosen(numbers):
            engine.cut()

    def heal(self, *numbers: int) -> None:
        """Let nodes reach the broker again; without a number, all of them. `on_gap` runs there.

        Raises:
            ValueError: If there is no such node, or it was killed.
            LifecycleError: If the cluster doesn't run.
        """
        for engine in self._chosen(numbers):
            engine.heal()

    async def kill(self, number: int) -> None:
        """End a node like `kill -9`: other nodes hear nothing from it, and its clients see no close frame.

        Its `on_disconnect` hooks run nevertheless, cut off from the broker.

        Raises:
            ValueError: If there is no such node, or it was killed.
            LifecycleError: If the cluster doesn't run.
        """
        (engine,) = self._chosen((number,))
        self._killed.add(number)
        engine.cut()
        manager = self.managers[number]
        life = core_of(manager).life
        for connection in manager.connections:
            life.node.membership.lost(connection, ABNORMAL, "")
        while life.is_started:  # the lifespan of an app may have started it once more
            await manager.aclose()

    async def restart_broker(self, *, keeps: bool = False) -> None:
        """Cut all nodes off for a moment, and let the broker forget what it kept.

        Args:
            keeps: Whether the broker remembers everything instead, like a broker with a disk.

        Raises:
            LifecycleError: If the cluster doesn't run.
        """
        self.partition()
        if not keeps:
            self.hub.forget()
        await asyncio.sleep(0)
        self.heal()

    def delay(self, seconds: float) -> None:
        """Delay each message to a node, and each answer of the broker, by so many seconds, from now on.

        Raises:
            ValueError: If it is not a number of seconds.
        """
        self.hub.delay = _seconds(seconds)

    # Time.

    async def advance(self, seconds: float) -> None:
        """Set the clock of the event loop forward, so that everything that is due by then happens now.

        Timers, timeouts and the age of kept messages follow this clock; `expires_at` follows that of the system. A
        timeout that runs meanwhile, such as one of the test, runs out too. The end of the block resets the clock.

        Raises:
            ValueError: If it is not a number of seconds.
            LifecycleError: If the cluster doesn't run, or in an event loop whose clock can't be set, such as uvloop's.
        """
        seconds = _seconds(seconds)
        self._check_running()
        self._set_clock()
        begin = self._set_forward
        for step in range(1, _STEPS + 1):
            self._set_forward = begin + seconds * step / _STEPS
            for _ in range(3):  # a timer's callback, the task that it wakes, and what that task hands over
                await asyncio.sleep(0)

    def _set_clock(self) -> None:
        loop = asyncio.get_running_loop()
        if self._clock is not None:
            return
        if not isinstance(loop, asyncio.BaseEventLoop):
            kind = f"{type(loop).__module__}.{type(loop).__qualname__}"
            raise LifecycleError(f"the clock of {kind} can't be set: run this test in asyncio's own event loop")
        real = loop.time
        self._clock = loop, vars(loop).get("time")
        loop.time = lambda: real() + self._set_forward  # type: ignore[method-assign]

    def _undo_clock(self) -> None:
        if self._clock is not None:
            loop, before = self._clock
            self._clock, self._set_forward = None, 0.0
            if before is None:
                del loop.time
            else:
                loop.time = before  # type: ignore[method-assign]

    def _chosen(self, numbers: Sequence[int]) -> list[HubEngine]:
        self._check_running()
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self):
                raise ValueError(f"there is no node {number!r:.80}: they are 0 to {len(self) - 1}")
            if number in self._killed:
                raise ValueError(f"node {number} was killed")
        chosen = numbers or [number for number in range(len(self)) if number not in self._killed]
        return [self._engines[number] for number in chosen]

    def _check_running(self) -> None:
        if not self._is_running:
            raise LifecycleError("the cluster doesn't run: `async with Cluster(…) as cluster` runs one")


def _seconds(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value) or value < 0:
        raise ValueError(f"a number of seconds, 0 or more, not {value!r:.80}")
    return value
