"""Where and for how long a manager runs: from its first use, or `start`, to `aclose`."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from wsbroadcast.engines.base import Engine
from wsbroadcast.exceptions import LifecycleError
from wsbroadcast.exit_stack import WithExitStack, has_exit_stack
from wsbroadcast.loops import running_loop
from wsbroadcast.membership import CLOSED
from wsbroadcast.node import Node

_FROM_A_THREAD = (
    "from a thread use `manager.broadcast_threadsafe(…)`, for anything else in a sync endpoint "
    "`anyio.from_thread.run(manager.disconnect_user, user)`"
)


class Lifecycle(ABC):
    """The life of a manager: in one event loop at a time, with a node for each, and an engine that starts once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # The loop it runs in, or begins to; `None` before that and after the end.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_started = False
        self._starts = 0
        self._is_closed = False
        # Set at its end; there while the manager ends.
        self._ending: asyncio.Event | None = None
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
        await self._run_here()
        self._starts += 1

    async def aclose(self) -> None:
        """End: send what was handed over, close the connections with 1001, wait for hooks, stop the engine.

        Does nothing if `start` was called more often than `aclose`. Idempotent. Afterwards the manager refuses to work
        until it is started again.

        Raises:
            LifecycleError: If it runs in another event loop.
        """
        if self._loop is not None and self._loop is not asyncio.get_running_loop() and self._loop.is_running():
            raise LifecycleError("the manager runs in another event loop, where its connections live: close it there")
        self._starts = max(0, self._starts - 1)
        if self._starts or self._is_closed:
            return
        self._is_closed = True
        ending = self._ending = asyncio.Event()
        try:
            if self._loop is asyncio.get_running_loop():
                await self._close_here()
        finally:
            self._loop = None
            self._is_started = False
            self._node = self._new_node()
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

    async def _run_here(self) -> None:
        if self._is_started and self._loop is running_loop():
            return
        self._settle_here()
        async with self._node.starting:  # several first uses at the same time start the engine once
            if not self._is_started:
                await self._engine.start(self._node)
                self._is_started = True

    def _settle_here(self) -> None:
        loop = running_loop()
        if loop is None:
            raise LifecycleError(f"no event loop runs here: {_FROM_A_THREAD}")
        if self._is_closed:
            raise LifecycleError(CLOSED)
        if self._loop is not None and self._loop is not loop:
            if self._loop.is_running():
                raise LifecycleError(
                    f"the manager runs in another event loop, where its connections live: {_FROM_A_THREAD}, "
                    "in tests `with TestClient(app)`"
                )
            self._node = self._new_node()  # that loop has ended, and its connections with it
            self._starts = 0
            self._is_started = False
        self._loop = loop

    async def _close_here(self) -> None:
        try:
            await self._node.aclose()
        finally:
            await self._engine.aclose()
