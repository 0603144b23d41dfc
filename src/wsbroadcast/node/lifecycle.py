"""Where and for how long a manager runs: from its first connection, or `start`, to `aclose`."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

from wsbroadcast.concurrency import Tasks, running_loop
from wsbroadcast.engines.contract import Engine
from wsbroadcast.exceptions import LifecycleError
from wsbroadcast.node.membership import CLOSED
from wsbroadcast.node.node import Node
from wsbroadcast.transports.exit_stack import WithExitStack, has_exit_stack

_FROM_A_THREAD = (
    "from a thread use `manager.broadcast_threadsafe(…)`, for anything else in a sync endpoint "
    "`anyio.from_thread.run(manager.disconnect_user, user)`"
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
            async with self._node.starting:  # whoever starts it there does that to the end
                if self._before is None or self._before.is_over:  # else nobody could start it there
                    await self._engine.aclose()
        finally:
            self._is_done = True
        await self._node.aclose()


class Lifecycle(ABC):
    """The life of a manager: in one event loop at a time, with a node for each, and an engine that starts once.

    An event loop owns it that has started it, or that has a connection, be it one that is coming in. One that has only
    sent something is left as soon as another one wants to own it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # The loop it runs in, or begins to; `None` before that and after the end.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_started = False
        self._starts = 0
        self._is_closed = False
        # Set at its end; there while the manager ends.
        self._ending: asyncio.Event | None = None
        # What another event loop has begun because we took the manager from it.
        self._departure: Departure | None = None
        # Held for moments, while it is decided which event loop it is.
        self._lock = threading.Lock()
        self._node = self._new_node()

    @abstractmethod
    def _new_node(self) -> Node:
        """Make what the manager is in the next event loop; the constructor does so, too."""

    async def start(self) -> None:
        """Begin to run in this event loop. Every `start` wants an `aclose`; only the last one ends it.

        Raises:
            LifecycleError: If it runs in another event loop.
        """
        if self._ending is not None and self._loop is asyncio.get_running_loop():
            await self._ending.wait()
        self._is_closed = False
        node = self._enter()
        try:
            await self._run_here()
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
            is_elsewhere = self._loop is not None and self._loop is not here and self._loop.is_running()
            if is_elsewhere and self._is_owned:
                raise LifecycleError(
                    "the manager runs in another event loop, where its connections live: close it there"
                )
            self._starts = max(0, self._starts - 1)
            if self._starts or self._is_closed:
                return
            self._is_closed = True
            if is_elsewhere:
                self._take_to(None)
        ending = self._ending = asyncio.Event()
        try:
            if self._loop is here:
                await self._close_here()
            else:
                await self._departed()
        finally:
            self._move_to(None)
            self._ending = None
            ending.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Run as long as an app: `FastAPI(lifespan=manager.lifespan)`. Routers of `create_router` carry it."""
        self.bind(app)
        layers = getattr(app, "middleware_stack", None)
        # FastAPI has one for endpoints; a middleware that connects is outside of it.
        is_needed = not has_exit_stack(layers) or bool(getattr(app, "user_middleware", None))
        if layers is not None and is_needed and not isinstance(layers, WithExitStack):
            app.middleware_stack = WithExitStack(layers)
        async with self:
            yield

    def bind(self, app: Any) -> None:
        """Make this the manager that `ManagerDep` and `ConnectionDep` find in an app; `lifespan` does it too.

        They find it in apps that are mounted in this one as well, unless such an app has one of its own.
        """
        managers = getattr(app.state, "wsbroadcast_managers", ())
        if self not in managers:
            managers = app.state.wsbroadcast_managers = (*managers, self)
        if hasattr(app, "router"):  # which is all that a request to a mounted app knows of the app around it
            app.router.wsbroadcast_managers = managers

    async def _run_here(self) -> Node:
        # Begin here unless that has been done; return what the manager is here.
        node = self._node  # before the look at the loop: who takes over changes that first
        if self._is_started and self._loop is running_loop():
            return node
        try:
            node = self._settle_here()
        except LifecycleError:
            await self._let_go()
            raise
        async with node.starting:  # several first uses at the same time start the engine once
            if self._node is node and not self._is_started:
                await self._departed()
                await self._engine.start(node)
                with self._lock:
                    if self._node is node:  # else another event loop has taken over
                        self._is_started = True
        if self._node is not node:
            raise self._elsewhere()
        return node

    def _enter(self) -> Node:
        # Own the manager in this event loop while somebody comes in; who calls it counts down.
        loop = asyncio.get_running_loop()
        with self._lock:
            is_here = self._is_started and self._loop is loop and not self._is_closed
            node = self._node if is_here else self._settle(is_owner=True)
            node.entering += 1
            return node

    def _settle_here(self) -> Node:
        with self._lock:
            return self._settle(is_owner=False)

    def _settle(self, *, is_owner: bool) -> Node:
        loop = running_loop()
        if loop is None:
            raise LifecycleError(f"no event loop runs here: {_FROM_A_THREAD}")
        if self._is_closed:
            raise LifecycleError(CLOSED)
        if self._loop is not None and self._loop is not loop:
            if not self._loop.is_running():
                self._move_to(loop)  # that loop has ended, and its connections with it
            elif is_owner and not self._is_owned:
                self._take_to(loop)
            else:
                raise LifecycleError(_ELSEWHERE)
        self._loop = loop
        return self._node

    @property
    def _is_owned(self) -> bool:
        return bool(self._starts or self._node.entering or len(self._node.registry))

    def _elsewhere(self) -> LifecycleError:
        return LifecycleError(CLOSED if self._loop in (None, running_loop()) else _ELSEWHERE)

    def _take_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        assert self._loop is not None
        self._departure = Departure(self._loop, self._node, self._engine, self._departure)
        self._move_to(loop)
        self._departure.begin()  # last: it may be over before the next line

    def _move_to(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._loop = loop  # before the node: who looks at both does it the other way round
        self._node = self._new_node()
        self._starts = 0
        self._is_started = False

    async def _departed(self) -> None:
        departure = self._departure
        if departure is not None:
            if departure.loop is running_loop():  # taken from us meanwhile; we are what it waits for
                raise self._elsewhere()
            await departure.wait()
            if self._departure is departure:
                self._departure = None

    async def _let_go(self) -> None:
        departure = self._departure
        if departure is not None and departure.loop is running_loop():
            await departure.finish()

    async def _close_here(self) -> None:
        try:
            await self._node.aclose()
        finally:
            if self._departure is None or self._departure.is_over:  # else it is stopped where it still runs
                await self._engine.aclose()
