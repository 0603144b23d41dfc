"""Ten thousand operations in random order, many at the same time and cancelled anywhere: nothing may be left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, eventually
from wsbroadcast import (
    HOLD_BACK,
    Connection,
    ConnectionManager,
    Delivery,
    HoldBack,
    LifecycleError,
    Message,
    PermissionDenied,
    SlowConsumer,
)
from wsbroadcast.options import Policy

CHANNELS = ["a", "b", "c", "d"]
USERS = ["ada", "bob", "cy"]


class Churn:
    """The peers, what was done to them, and what the hooks saw."""

    def __init__(self, seed: int, policy: Policy) -> None:
        self.random = random.Random(seed)
        self.peers: list[Peer] = []
        self.everybody: list[Peer] = []
        self.began: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.number = 0
        self.is_over = False
        self.manager = ConnectionManager(
            slow_consumer=SlowConsumer(
                policy=policy, max_backlog_messages=32, max_backlog_bytes=2048, send_timeout=0.2, close_timeout=0.02
            )
        )
        self._add_hooks()

    def _add_hooks(self) -> None:
        manager = self.manager

        @manager.on_connect
        async def on_connect(connection: Connection) -> None:
            self.began[connection.id] += 1
            await self.pause()
            if self.happens(0.03):
                raise PermissionDenied("bad luck")
            if self.happens(0.03):
                manager.disconnect(connection)

        @manager.on_disconnect
        async def on_disconnect(connection: Connection) -> None:
            self.ended[connection.id] += 1
            await self.pause()
            if self.happens(0.1):
                await manager.broadcast(self.text(), channel="a")

        @manager.on_subscribe
        async def on_subscribe(connection: Connection, channel: str) -> None:
            await self.pause()
            if self.happens(0.03):
                raise PermissionDenied("bad luck")

        @manager.on_broadcast
        async def on_broadcast(message: Message, audience: object) -> Message | HoldBack:
            return HOLD_BACK if self.happens(0.02) else message

        @manager.on_deliver
        async def on_deliver(delivery: Delivery) -> None:
            if self.happens(0.05):
                await self.pause()
            if delivery.recipients and self.happens(0.02):
                manager.disconnect(self.random.choice(delivery.recipients))

    def happens(self, part: float) -> bool:
        return not self.is_over and self.random.random() < part

    async def pause(self) -> None:
        for _ in range(self.random.randrange(3)):
            await asyncio.sleep(0)

    def text(self) -> str:
        self.number += 1
        return f"{self.number:08} {'x' * self.random.randrange(40)}"

    def peer(self) -> Peer:
        return self.random.choice(self.peers) if self.peers else self.new_peer()

    def new_peer(self) -> Peer:
        peer = Peer(
            suspends=self.random.random() < 0.5,
            is_silent=self.random.random() < 0.3,
            has_both_keys=self.random.random() < 0.3,
            refuses=self.random.choice([(), (), (1013, 1001)]),
        )
        self.peers.append(peer)
        self.everybody.append(peer)
        return peer

    # What is done. Each is one operation.

    async def connect(self) -> None:
        channels = self.random.sample(CHANNELS, self.random.randrange(3))
        await self.manager.connect(
            self.new_peer().websocket, user=self.random.choice([None, *USERS]), channels=channels
        )

    async def endpoint(self) -> None:
        peer = self.new_peer()
        async with self.manager.connect(peer.websocket, channels=["a"]) as connection:
            if self.random.random() < 0.5:
                await connection.wait_closed()
            else:
                async for _ in connection:
                    await self.pause()

    async def connect_again(self) -> None:
        peer = self.peer()
        if peer.accepted is not None:
            await self.manager.connect(peer.websocket, channels=["a"])

    async def subscribe(self) -> None:
        await self.manager.subscribe(self.peer().websocket, *self.random.sample(CHANNELS, 2))

    async def unsubscribe(self) -> None:
        await self.manager.unsubscribe(self.peer().websocket, *self.random.sample(CHANNELS, 2))

    async def broadcast(self) -> None:
        exclude = self.peer().websocket if self.random.random() < 0.2 else ()
        await self.manager.broadcast(self.text(), exclude=exclude, key=self.random.choice([None, "k"]))

    async def broadcast_channel(self) -> None:
        await self.manager.broadcast(self.text(), channel=self.random.choice(CHANNELS))

    async def broadcast_user(self) -> None:
        await self.manager.broadcast(self.text(), user=self.random.choice(USERS))

    async def send(self) -> None:
        await self.manager.send(self.peer().websocket, self.text())

    async def app_send(self) -> None:
        peer = self.peer()
        if peer.accepted is not None:
            await peer.websocket.send_text(self.text())

    async def app_close(self) -> None:
        peer = self.peer()
        if peer.accepted is not None:
            await peer.websocket.close(4000)

    async def close(self) -> None:
        await self.manager.close(self.peer().websocket, 4001)

    async def disconnect(self) -> None:
        self.manager.disconnect(self.peer().websocket)

    async def leave(self) -> None:
        self.peer().leave()

    async def vanish(self) -> None:
        self.peer().vanish()

    async def say(self) -> None:
        self.peer().say("hello")

    async def stall(self) -> None:
        self.peer().stall()

    async def resume(self) -> None:
        self.peer().resume()

    async def forget(self) -> None:
        if self.peers:
            self.peers.remove(self.peer())

    def operations(self) -> tuple[list[Callable[[], Coroutine[Any, Any, None]]], list[int]]:
        weights: dict[Callable[[], Coroutine[Any, Any, None]], int] = {
            self.connect: 8,
            self.endpoint: 4,
            self.connect_again: 2,
            self.subscribe: 8,
            self.unsubscribe: 6,
            self.broadcast: 12,
            self.broadcast_channel: 12,
            self.broadcast_user: 6,
            self.send: 8,
            self.app_send: 8,
            self.app_close: 1,
            self.close: 2,
            self.disconnect: 2,
            self.leave: 2,
            self.vanish: 2,
            self.say: 6,
            self.stall: 2,
            self.resume: 4,
            self.forget: 3,
        }
        return list(weights), list(weights.values())

    async def run(self, count: int) -> None:
        operations, weights = self.operations()
        for operation in self.random.choices(operations, weights, k=count):
            task = asyncio.get_running_loop().create_task(operation())
            self.tasks.add(task)
            if self.random.random() < 0.2:
                await asyncio.sleep(0)
            if self.random.random() < 0.1:
                self.random.choice(sorted(self.tasks, key=lambda task: task.get_name())).cancel()
            if len(self.tasks) > 60:
                self.reap(await self.some_done())

    async def some_done(self) -> set[asyncio.Task[Any]]:
        # Those that can't end by themselves are the endpoints of peers that stay.
        done, _ = await asyncio.wait(self.tasks, timeout=0.001)
        if not done:
            self.peer().leave()
        return done

    def reap(self, done: set[asyncio.Task[Any]]) -> None:
        self.tasks -= done
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                # Whatever is raised is what an application expects.
                is_expected = isinstance(error, (WebSocketDisconnect, PermissionDenied))
                assert is_expected or self.is_the_servers(error) or self.is_early(error), repr(error)

    @staticmethod
    def is_the_servers(error: BaseException) -> bool:
        # What the app's own send raises after a close, as on uvicorn.
        return isinstance(error, RuntimeError) and "websocket.close" in str(error)

    @staticmethod
    def is_early(error: BaseException) -> bool:
        # For a peer that was never connected.
        return isinstance(error, LifecycleError) and "await `manager.connect" in str(error)

    async def everybody_leaves(self) -> None:
        await asyncio.sleep(0)  # what was begun last makes its peer in its first step
        for peer in self.everybody:
            peer.resume()
            peer.leave()
        while self.tasks:
            done, pending = await asyncio.wait(self.tasks, timeout=5)
            assert done, [task.get_stack() for task in pending]
            self.reap(done)
        # Nobody reads most of them: a send finds out, where the server says so; the rest the app disconnects.
        await self.manager.broadcast_local("good night")
        await eventually(lambda: self.manager.stats().backlog_messages == 0)
        for connection in self.manager.connections:
            self.manager.disconnect(connection)


@pytest.mark.parametrize(
    ("seed", "policy", "operations"),
    [(1, "disconnect", 10_000), (2, "drop_newest", 2000), (3, "drop_oldest", 2000), (4, "conflate", 2000)],
)
async def test_churn_settles_to_zero(seed: int, policy: Policy, operations: int) -> None:
    churn = Churn(seed, policy)
    manager = churn.manager
    await manager.start()
    await churn.run(operations)
    assert manager.stats().connects > operations // 25
    await churn.everybody_leaves()

    # While it runs on: nothing waits for its end.
    await eventually(lambda: not _our_tasks())
    stats = manager.stats()
    assert (stats.connections, stats.users, stats.channels) == (0, 0, 0)
    assert (stats.backlog_bytes, stats.backlog_messages, stats.behind) == (0, 0, 0)
    assert stats.connects == stats.disconnects
    assert manager._core.life.node._slow_consumers.waiting == {}
    assert set(manager._core.life.node._slow_consumers.behind) == set()
    assert churn.began == churn.ended
    assert set(churn.began.values()) == {1}
    assert len(churn.began) == stats.connects
    assert stats.hook_errors == 0
    for peer in churn.everybody:
        assert peer.overlaps == 0
        assert max(Counter(peer.messages).values(), default=1) == 1  # at most once
        assert [event["type"] for event in peer.sent].count("websocket.close") <= 1

    # And it still works.
    churn.is_over = True
    fresh = Peer()
    await manager.connect(fresh.websocket, channels=["fresh"])
    await manager.broadcast_local("hello", channel="fresh")
    assert await fresh.next() == "hello"
    await manager.aclose()
    assert _our_tasks() == set()


def _our_tasks() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task.get_name().startswith("wsbroadcast ")}
