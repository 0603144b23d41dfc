"""Start, end, connect, broadcast and disconnect at the same time, over an engine whose start and end take a while."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from tests.support.asgi import Peer
from tests.support.loops import TASK_FACTORIES
from wsbroadcast import Connection, ConnectionClosed, ConnectionManager, LifecycleError
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.engines.memory import MemoryEngine

VERBS = ("start", "aclose", "connect", "broadcast", "disconnect")

# `oldest` and `newest` let one of the engine's starts and ends go on, `turn` only gives way to other tasks.
operations = st.lists(st.sampled_from((*VERBS, "oldest", "newest", "turn")), max_size=25)


class SteppedEngine(MemoryEngine):
    """Each start and each end waits until the test lets it go on; an end doesn't cut a start short."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: deque[asyncio.Event] = deque()

    async def _wait(self) -> None:
        self.waiting.append(event := asyncio.Event())
        await event.wait()

    async def start(self, receiver: Receiver) -> None:
        await self._wait()
        await super().start(receiver)

    async def aclose(self) -> None:
        await self._wait()
        await super().aclose()

    def step(self, which: str = "newest") -> None:
        if self.waiting:
            (self.waiting.popleft() if which == "oldest" else self.waiting.pop()).set()

    @property
    def runs(self) -> bool:
        return self._receiver is not None


class World:
    """One manager, and everything that was begun with it."""

    def __init__(self) -> None:
        self.engine = SteppedEngine()
        self.manager = ConnectionManager(self.engine)
        self.begun: list[asyncio.Future[Any]] = []
        self.came: list[Connection] = []
        self.gone: list[Connection] = []
        self.manager.on_connect(self.came.append)
        self.manager.on_disconnect(self.gone.append)

    async def do(self, verb: str) -> None:
        if verb in ("oldest", "newest"):
            self.engine.step(verb)
        elif verb == "disconnect":
            for connection in self.came[-1:]:
                self.manager.disconnect(connection)
        elif verb in VERBS:
            call = {"connect": lambda: self.manager.connect(Peer().websocket), "broadcast": self._broadcast}.get(verb)
            self.begun.append(asyncio.ensure_future((call or getattr(self.manager, verb))()))
        await asyncio.sleep(0)

    async def _broadcast(self) -> None:
        await self.manager.broadcast("x")

    async def finish(self, *futures: asyncio.Future[Any]) -> None:
        async with asyncio.timeout(5):
            while not all(future.done() for future in futures):
                self.engine.step()
                await asyncio.sleep(0)


@pytest.mark.parametrize("factory", TASK_FACTORIES)
@seed(10)
@settings(max_examples=200, database=None)
@given(operations)
def test_any_order_of_starts_and_ends_leaves_a_manager_that_works(factory: Any, steps: list[str]) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        world = World()
        for step in steps:
            await world.do(step)
        await world.finish(*world.begun)
        for future in world.begun:
            assert isinstance(future.exception(), (type(None), LifecycleError, ConnectionClosed)), future
        assert len(world.manager.connections) == len(world.came) - len(world.gone)
        assert all(connection.is_open for connection in world.manager.connections)

        # Whatever came before: it ends as often as it was started, and then it can be used again.
        for _ in range(steps.count("start") + 1):
            await world.finish(asyncio.ensure_future(world.manager.aclose()))
        assert (world.manager.connections, world.engine.runs) == ([], False)
        assert sorted(map(id, world.came)) == sorted(map(id, world.gone))
        assert not any(task.get_name().startswith("wsbroadcast ") for task in asyncio.all_tasks())

        await world.finish(asyncio.ensure_future(world.manager.start()))
        peer = Peer()
        await world.manager.connect(peer.websocket)
        await world.manager.broadcast("it works")
        assert await peer.next() == "it works"
        await world.finish(asyncio.ensure_future(world.manager.aclose()))
        assert not world.engine.runs

    asyncio.run(main())
