"""When and in which event loop a manager runs: from its first connection, or `start`, to `aclose`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from wsbroadcast.concurrency import Tasks, running_loop
from wsbroadcast.engines.contract import Engine
from wsbroadcast.exceptions import LifecycleError
from wsbroadcast.node.membership import CLOSED
from wsbroadcast.node.node import Node
from wsbroadcast.node.signals import SIGNALS

_FROM_A_THREAD = (
    "from a thread use `manager.broadcast_threadsafe(…)`, for anything else in a sync endpoint "
    "`anyio.from_thread.run(manager.close_user, user)` or "
    "`anyio.from_thread.run_sync(manager.disconnect, websocket)`"
)

_ELSEWHERE = (
    f"the manager runs in another event loop, where its connections live: {_FROM_A_THREAD}; an event loop of your own "
    "that only sends can have a `Publisher`; in tests use `with TestClient(app)`"
)

# How often, in seconds, it is checked whether another event loop has stopped the engine.
_LOOK_SECONDS = 0.01
_LEAVE_SECONDS = 5.0

# For how many seconds a call in that event loop waits until it has.
_FINISH_SECONDS = 1.0


class _Ending(NamedTuple):
    """An `aclose` that runs."""

    loop: asyncio.AbstractEventLoop
    over: asyncio.Event


class Departure:
    """The end of a manager in an event loop that has no connections, because another event loop needs it.

    The engine has to be stopped where it was started: in a task of that event loop; or by the next call of this library
    there, if the loop never gets to its tasks.

    Args:
        loop: The event loop that the manager leaves. It still runs.
        node: The node in that event loop.
        engine: The engine to stop.
        before: The departure that this event loop itself has waited for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, node: Node, engine: Engine, before: Departure | None) -> None:
        self.loop = loop
        """The event loop that the manager leaves."""
        self._node = node
        self._engine = engine
        self._before = before
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None
        self._is_done = False

    @property
    def is_over(self) -> bool:
        """Whether the engine may be started in another event loop."""
        is_over = self._is_done or not self.loop.is_running()
        return is_over and (self._before is None or self._before.is_over)

    def begin(self) -> None:
        """Leave as soon as that event loop gets to it. It may be called from any thread."""
        with suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self._begin)

    async def finish(self) -> None:
        """Leave now, in that event loop, if that is quick. It may have to wait for a hook, which may be the caller."""
        self._begin()
        assert self._task is not None
        await asyncio.wait([self._task], timeout=_FINISH_SECONDS)

    async def wait(self) -> None:
        """Wait in another event loop until it is over.

        Raises:
            LifecycleError: If it takes too long.
        """
        began = asyncio.get_running_loop().time()
        while not self.is_over:
            if asyncio.get_running_loop().time() - began > _LEAVE_SECONDS:
                raise LifecycleError("the event loop of another thread that used the manager first is blocked")
            await asyncio.sleep(_LOOK_SECONDS)

    def _begin(self) -> None:
        if self._task is None:
            self._task = self._tasks.spawn(self._leave(), "departure")

    async def _leave(self) -> None:
        try:
            async with self._node.starting:  # if a start has begun there, it ends first
                if self._before is None or self._before.is_over:  # else the engine can't have been started there
                    await self._engine.aclose()
        finally:
            self._is_done = True
        await self._node.aclose()


class Lifecycle:
    """The life of a manager. It runs in one event loop at a time, with a node for each, and with one engine.

    An event loop owns the manager if it has called `start`, or has a connection, also one that is being accepted. If an
    event loop has only sent something, the manager leaves it as soon as another one wants to own it.

    Args:
        engine: Starts and stops with the manager.
        new_node: Makes the node for the next event loop.
        drain: Seconds of the drain at a signal; `None` for none.
    """

    def __init__(self, engine: Engine, new_node: Callable[[Engine], Node], drain: float | None = None) -> None:
        self.engine = engine
        self._drain = drain
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop in which it runs or starts; `None` before that and after the end."""
        self.is_started = False
        """Whether the engine is started in that event loop."""
        self._new_node = new_node
        self._starts = 0
        self.is_closed = False
        """Whether it has ended, or is ending."""
        # Set while the manager ends.
        self._ending: _Ending | None = None
        # The departure from another event loop, from which the manager was taken.
        self._departure: Departure | None = None
        # Held for moments, while the event loop is decided.
        self._lock = threading.Lock()
        self.node = new_node(engine)
        """The node in that event loop."""

    async def start(self) -> None:
        """Begin to run in this event loop. Each `start` needs an `aclose`; only the last `aclose` ends the manager.

        If the manager is ending, in any event loop, it waits for that first.

        Raises:
            LifecycleError: If it runs in another event loop, or its end there takes too long.
        """
        deadline = asyncio.get_running_loop().time() + _LEAVE_SECONDS
        while (node := self._begin_again()) is None:
            await self._until_ended(deadline)
        try:
            await self.run_here()
            self._starts += 1
        finally:
            node.entering -= 1

    async def aclose(self) -> None:
        """Send what was handed over, close the connections with 1001, wait for hooks, and stop the engine.

        It does nothing if `start` was called more often than `aclose`. It may be called twice. Afterwards the manager
        refuses to work until it is started again.

        Raises:
            LifecycleError: If it runs in another event loop.
        """
        here = asyncio.get_running_loop()
        with self._lock:
            is_elsewhere = self.loop is not None and self.loop is not here and self.loop.is_running()
            if is_elsewhere and self._is_owned:
                raise LifecycleError(
                    "the manager runs in another event loop, where its connections live: close it there"
                )
            self._starts = max(0, self._starts - 1)
            if self._starts:
                return
            if is_first := not self.is_closed:
                self.is_closed = True
                self._ending = _Ending(here, asyncio.Event())
                if is_elsewhere:
                    self._take_to(None)
            ending = self._ending
        if ending is None:
            return
        if not is_first:
            if self.loop is here and not self.node.is_own_task():  # else the end would wait for this very task
                await ending.over.wait()
            return
        try:
            if self.loop is here:
                await self._close_here()
            else:
                await self._departed()
        finally:
            with self._lock:
                if self._ending is ending:  # else this event loop had stopped, and another one took over
                    SIGNALS.detach(self)
                    self._move_to(None)
                    self._ending = None
            ending.over.set()

    def _begin_again(self) -> Node | None:
        # Returns `None` while the manager ends, because the end still works with the old node.
        with self._lock:
            if self._ending is not None and self._ending.loop.is_running():
                return None
            node = self._settle(is_owner=True, reopens=True)
            self._ending = None
            node.entering += 1
            return node

    async def _until_ended(self, deadline: float) -> None:
        ending, here = self._ending, asyncio.get_running_loop()
        if ending is None:
            return
        if ending.loop is here:
            await ending.over.wait()
        elif here.time() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        else:
            raise LifecycleError("the manager is still being closed in another event loop")

    async def run_here(self) -> Node:
        """Start in this event loop unless that was done; return the node.

        Raises:
            LifecycleError: If it is closed, perhaps during the call, or runs in another event loop.
        """
        node = self.node  # read before the loop, because another event loop that takes over sets the loop first
        if self.is_started and self.loop is running_loop():
            return node
        try:
            node = self.settle_here()
        except LifecycleError:
            await self._let_go()
            raise
        async with node.starting:  # several first calls at the same time start the engine once
            if self._is_current(node) and not self.is_started:
                await self._departed()
                await self.engine.start(node)
                with self._lock:
                    if self._is_current(node):
                        self.is_started = True
                        node.begin()
                        if self._drain is not None:
                            SIGNALS.attach(self)
                if not self._is_current(node) and (self.node is node or self.loop is None):
                    # The manager was closed while it started. If another event loop has taken over, that one stops it.
                    await self.engine.aclose()
        if not self._is_current(node):
            raise self.elsewhere()
        return node

    @property
    def needs_drain(self) -> bool:
        """Whether it runs, its event loop runs too, and it isn't drained yet."""
        return self.is_started and not self.node.drain.is_over and self.loop is not None and self.loop.is_running()

    def begin_drain(self) -> tuple[asyncio.Task[None], float]:
        """Begin the drain at a signal, in its event loop; return its task, and how many seconds to wait for it."""
        drain, seconds = self.node.drain, self._drain or 0.0
        return drain.begin(seconds), seconds + drain.close_timeout

    def _is_current(self, node: Node) -> bool:
        return self.node is node and not self.is_closed

    def check_here(self) -> None:
        """Check that the caller is in the event loop that the manager runs in, before anything changes.

        Raises:
            LifecycleError: If the caller is in another event loop, or in a thread without one.
        """
        loop = running_loop()
        if loop is None or loop is not self.loop:
            raise LifecycleError(_ELSEWHERE)

    def enter(self) -> Node:
        """Own the manager in this event loop while a connection is accepted. The caller counts `node.entering` down.

        Raises:
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            is_here = self.is_started and self.loop is loop and not self.is_closed
            node = self.node if is_here else self._settle(is_owner=True)
            node.entering += 1
            return node

    def settle_here(self) -> Node:
        """Return the node of this event loop, if no other one owns the manager.

        Raises:
            LifecycleError: If the manager is closed, or runs in another event loop.
        """
        with self._lock:
            return self._settle(is_owner=False)

    def _settle(self, *, is_owner: bool, reopens: bool = False) -> Node:
        loop = running_loop()
        if loop is None:
            raise LifecycleError(f"no event loop runs here: {_FROM_A_THREAD}")
        if self.is_closed and not reopens:
            raise LifecycleError(CLOSED)
        if self.loop is not None and self.loop is not loop:
            if not self.loop.is_running():
                self._move_to(loop)  # the other loop has ended, and its connections with it
            elif is_owner and not self._is_owned:
                self._take_to(loop)
            else:
                raise LifecycleError(_ELSEWHERE)
        self.loop = loop
        self.is_closed = False
        return self.node

    @property
    def _is_owned(self) -> bool:
        return bool(self._starts or self.node.entering or len(self.node.registry))

    def elsewhere(self) -> LifecycleError:
        """Make the error for a manager that no longer runs in this event loop."""
        return LifecycleError(CLOSED if self.loop in (None, running_loop()) else _ELSEWHERE)

    def _take_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        assert self.loop is not None
        self._departure = Departure(self.loop, self.node, self.engine, self._departure)
        self._move_to(loop)
        self._departure.begin()  # comes last, because it may be over before a next line would run

    def _move_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop  # set before the node, because readers of both read the node first
        self.node = self._new_node(self.engine)
        self._starts = 0
        self.is_started = False

    async def _departed(self) -> None:
        departure = self._departure
        if departure is not None:
            if departure.loop is running_loop():  # another loop took the manager from this one, and waits for it
                raise self.elsewhere()
            await departure.wait()
            if self._departure is departure:
                self._departure = None

    async def _let_go(self) -> None:
        departure = self._departure
        if departure is not None and departure.loop is running_loop():
            await departure.finish()

    async def _close_here(self) -> None:
        node = self.node
        try:
            await node.aclose()
        finally:
            # If not, another event loop has started the engine again, or it is stopped in the loop where it still runs.
            if self.node is node and (self._departure is None or self._departure.is_over):
                await self.engine.aclose()
                await self._stopped_starting()

    async def _stopped_starting(self) -> None:
        # The task that was starting the engine stops it again. The next start comes after that.
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS), self.node.starting:
                pass
