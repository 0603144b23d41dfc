"""A manager that starts, ends, lets in, sends and forgets at the same time, with an engine that takes its time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, Self

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.asgi import Peer, turns
from wsbroadcast import (
    Connection,
    ConnectionClosed,
    ConnectionManager,
    Dismissal,
    Engine,
    Health,
    LifecycleError,
    Publication,
    Receiver,
)


class StrictEngine(Engine):
    """Starts and stops slowly, one at a time, and knows whether it was used rightly."""

    name = "strict"
    links_nodes = False

    def __init__(self, pace: int) -> None:
        self.pace = pace
        self.receiver: Receiver | None = None
        self.starting: asyncio.Task[Any] | None = None
        self.has_been_misused = False

    @classmethod
    def from_url(cls, url: str) -> Self:
        raise NotImplementedError

    async def start(self, receiver: Receiver) -> None:
        self.has_been_misused |= self.receiver is not None or self.starting is not None
        self.starting = asyncio.current_task()
        try:
            await turns(self.pace)
        finally:
            self.starting = None
        self.receiver = receiver

    async def aclose(self) -> None:
        await turns(self.pace)
        self.receiver = None

    async def publish(self, publication: Publication | Dismissal) -> None:
        await turns(1)
        if self.receiver is not None:
            await self.receiver.deliver(publication)

    def publish_nowait(self, publication: Publication | Dismissal) -> None:
        if self.receiver is not None:
            self.receiver.take(publication)

    async def health(self) -> Health:
        return Health(self.name, self.receiver is not None)


class World:
    """The manager, who has tried to come in, and what its hooks have seen."""

    def __init__(self, pace: int) -> None:
        self.engine = StrictEngine(pace)
        self.manager = ConnectionManager(self.engine)
        self.peers: list[Peer] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.came: list[Connection] = []
        self.went: list[Connection] = []
        self.manager.on_connect(self.came.append)
        self.manager.on_disconnect(self.went.append)

    def do(self, operation: str) -> None:
        """Begin an operation; it goes on while others begin."""
        if operation == "disconnect":
            for connection in self.manager.connections[:1]:
                self.manager.disconnect(connection)
            return
        calls: dict[str, Any] = {"start": self.manager.start, "aclose": self.manager.aclose, "connect": self.connect}
        call: Coroutine[Any, Any, Any] = (
            calls[operation]() if operation in calls else self.manager.broadcast("to who is here")
        )
        self.tasks.append(asyncio.get_running_loop().create_task(call))

    async def connect(self) -> None:
        peer = Peer()
        self.peers.append(peer)
        await self.manager.connect(peer.websocket)

    async def settle(self) -> None:
        """Wait for all that has begun; an error may only say that the manager, or the connection, has ended."""
        async with asyncio.timeout(5):
            for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, (LifecycleError, ConnectionClosed)), outcome
        self.tasks.clear()

    async def check(self) -> None:
        """Close it, and see that nothing is left; start it again, and see that it works."""
        for _ in range(20):
            await self.manager.aclose()
        assert self.manager.connections == []
        assert self.engine.receiver is None
        assert self.came == sorted(self.went, key=self.came.index)
        assert len(self.went) == len(set(self.went))
        with pytest.raises(LifecycleError, match="closed"):
            await self.manager.broadcast("nobody hears it")
        await self.manager.start()
        peer = Peer()
        await self.manager.connect(peer.websocket)
        await self.manager.broadcast("hello")
        await peer.wait_messages(1)
        assert peer.messages == ["hello"]
        await self.manager.aclose()
        assert await peer.wait_close() == 1001
        assert not self.engine.has_been_misused


OPERATIONS = st.sampled_from(["start", "aclose", "connect", "broadcast", "disconnect"])


# The cases in which a manager was deaf, or let somebody in after its end.
@pytest.mark.parametrize("is_eager", [False, True] if sys.version_info >= (3, 12) else [False])
@example(4, [("start", 2), ("aclose", 0)])
@example(4, [("connect", 2), ("aclose", 1)])
@example(2, [("start", 9), ("connect", 9), ("aclose", 0), ("aclose", 0), ("start", 0)])
@example(4, [("broadcast", 1), ("aclose", 1), ("connect", 0), ("start", 0)])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(OPERATIONS, st.integers(0, 9)), max_size=12))
def test_whatever_happens_at_the_same_time_it_ends_and_can_begin_again(
    is_eager: bool, pace: int, operations: list[tuple[str, int]]
) -> None:
    async def main() -> None:
        if is_eager:
            asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  # mypy knows 3.11
        world = World(pace)
        for operation, pause in operations:
            world.do(operation)
            await turns(pause)
        await world.settle()
        await world.check()

    asyncio.run(main())
