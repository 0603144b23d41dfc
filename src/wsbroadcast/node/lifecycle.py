"""Where and for how long a manager runs: from its first connection, or `start`, to `aclose`."""

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

# Between two looks whether another event loop has let go of the engine, and for how long to look.
_LOOK_SECONDS = 0.01
_LEAVE_SECONDS = 5.0

# For which a call there waits until it has.
_FINISH_SECONDS = 1.0


class _Ending(NamedTuple):
    """An `aclose` that runs."""

    loop: asyncio.AbstractEventLoop
    over: asyncio.Event


class Departure:
    """The end in an event loop that owns nothing, because the manager is needed in another one.

    The engine has to be stopped where it was started: in a task of that event loop, or by its next call of ours, should
    it never get to its tasks.

    Args:
        loop: The event loop that is left, which runs.
        node: What the manager was there.
        engine: What is stopped.
        before: The departure that this event loop has waited for itself.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, node: Node, engine: Engine, before: Departure | None) -> None:
        self.loop = loop
        """The event loop that is left."""
        self._node = node
        self._engine = engine
        self._before = before
        self._tasks = Tasks()
        self._task: asyncio.Task[None] | None = None
        self._is_done = False

    @property
    def is_over(self) -> bool:
        """Whether the engine may be started elsewhere."""
        is_over = self._is_done or not self.loop.is_running()
        return is_over and (self._before is None or self._before.is_over)

    def begin(self) -> None:
        """Leave as soon as that event loop gets to it; from any thread."""
        with suppress(RuntimeError):  # it is closed
            self.loop.call_soon_threadsafe(self._begin)

    async def finish(self) -> None:
        """Leave now, in that event loop, if that goes quickly: it may have to wait for a hook that calls this."""
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
            async with self._node.starting:  # a start that has begun there is finished first
                if self._before is None or self._before.is_over:  # else nobody could start it there
                    await self._engine.aclose()
        finally:
            self._is_done = True
        await self._node.aclose()


class Lifecycle:
    """The life of a manager: in one event loop at a time, with a node for each, and an engine that starts once.

    An event loop owns it that has started it, or that has a connection, be it one that is coming in. One that has only
    sent something is left as soon as another one wants to own it.

    Args:
        engine: Starts with the manager, and stops with it.
        new_node: Makes what the manager is in the next event loop.
        drain: Seconds of the drain at a signal; `None` for none.
    """

    def __init__(self, engine: Engine, new_node: Callable[[Engine], Node], drain: float | None = None) -> None:
        self.engine = engine
        self._drain = drain
        self.loop: asyncio.AbstractEventLoop | None = None
        """The event loop it runs in, or begins to; `None` before that and after the end."""
        self.is_started = False
        """Whether the engine is started in that event loop."""
        self._new_node = new_node
        self._starts = 0
        self.is_closed = False
        """Whether it has ended, or is about to."""
        # There while the manager ends.
        self._ending: _Ending | None = None
        # What another event loop has begun because we took the manager from it.
        self._departure: Departure | None = None
        # Held for moments, while it is decided which event loop it is.
        self._lock = threading.Lock()
        self.node = new_node(engine)
        """What the manager is in that event loop."""

    async def start(self) -> None:
        """Begin to run in this event loop. Every `start` wants an `aclose`; only the last one ends it.

        An end that has begun comes first, in whichever event loop it runs.

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
        """End: send what was handed over, close the connections with 1001, wait for hooks, stop the engine.

        Does nothing if `start` was called more often than `aclose`. Idempotent. Afterwards the manager refuses to work
        until it is started again.

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
            if self.loop is here and not self.node.is_own_task():  # which the one that ends it waits for
                await ending.over.wait()
            return
        try:
            if self.loop is here:
                await self._close_here()
            else:
                await self._departed()
        finally:
            with self._lock:
                if self._ending is ending:  # else this event loop had stopped, and another one has taken over
                    SIGNALS.detach(self)
                    self._move_to(None)
                    self._ending = None
            ending.over.set()

    def _begin_again(self) -> Node | None:
        # Nothing while the manager ends: who ends it still works on what it was.
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
        """Begin in this event loop unless that has been done; return what the manager is here.

        Raises:
            LifecycleError: If it is closed, perhaps during the call, or runs in another event loop.
        """
        node = self.node  # before the look at the loop: who takes over changes that first
        if self.is_started and self.loop is running_loop():
            return node
        try:
            node = self.settle_here()
        except LifecycleError:
            await self._let_go()
            raise
        async with node.starting:  # several first uses at the same time start the engine once
            if self._is_current(node) and not self.is_started:
                await self._departed()
                await self.engine.start(node)
                with self._lock:
                    if self._is_current(node):
                        self.is_started = True
                        if node.siblings is not None:
                            node.siblings.begin()
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
        """Whether it runs, in an event loop that runs too, and isn't drained yet."""
        return self.is_started and not self.node.drain.is_over and self.loop is not None and self.loop.is_running()

    def begin_drain(self) -> tuple[asyncio.Task[None], float]:
        """Begin the drain at a signal, in its event loop; return it, and for how many seconds to wait for it."""
        drain, seconds = self.node.drain, self._drain or 0.0
        return drain.begin(seconds), seconds + drain.close_timeout

    def _is_current(self, node: Node) -> bool:
        return self.node is node and not self.is_closed

    def check_here(self) -> None:
        """Check that the caller is in the event loop that the manager runs in, before anything changes.

        Raises:
            LifecycleError: If it is in another one, or in a thread without one.
        """
        loop = running_loop()
        if loop is None or loop is not self.loop:
            raise LifecycleError(_ELSEWHERE)

    def enter(self) -> Node:
        """Own the manager in this event loop while somebody comes in; the caller counts `node.entering` down.

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
        """Return what the manager is in this event loop, if nobody else owns it.

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
                self._move_to(loop)  # that loop has ended, and its connections with it
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
        self._departure.begin()  # last: it may be over before the next line

    def _move_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop  # before the node: who looks at both does it the other way round
        self.node = self._new_node(self.engine)
        self._starts = 0
        self.is_started = False

    async def _departed(self) -> None:
        departure = self._departure
        if departure is not None:
            if departure.loop is running_loop():  # another loop took it from us, and waits for us
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
            # Else another event loop has started it again, or it is stopped where it still runs.
            if self.node is node and (self._departure is None or self._departure.is_over):
                await self.engine.aclose()
                await self._stopped_starting()

    async def _stopped_starting(self) -> None:
        # Who was starting the engine stops it again, and the next start comes after that.
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_SECONDS), self.node.starting:
                pass
