"""`Limits.max_connection_age`: connections go and come back, each at an age of its own."""

from __future__ import annotations

import asyncio
import gc
import weakref
from time import monotonic

import pytest

from tests.support.asgi import Peer, connected, eventually
from wsbroadcast import Connection, ConnectionManager, Limits
from wsbroadcast.node.ages import Ages


def ages_of(manager: ConnectionManager) -> Ages:
    ages = manager._core.life.node.membership._ages
    assert ages is not None
    return ages


async def test_connections_are_closed_at_an_age_of_their_own() -> None:
    ends: list[float] = []
    manager = ConnectionManager(limits=Limits(max_connection_age=1.0))

    @manager.on_disconnect
    def on_disconnect(connection: Connection) -> None:
        ends.append(monotonic())

    async with manager:
        began = monotonic()
        pairs = await connected(manager, 100)
        took = monotonic() - began
        await manager.broadcast("before the end")
        await eventually(lambda: len(ends) == 100)
    assert {peer.end for peer, _ in pairs} == {(1012, "max_connection_age")}
    assert all(peer.messages == ["before the end"] for peer, _ in pairs)
    ages = [end - began for end in ends]
    assert min(ages) >= 0.9
    assert max(ages) < 1.1 + took + 0.5
    assert max(ages) - min(ages) > 0.1  # of 100 between 0.9 and 1.1


async def test_who_has_left_is_forgotten_long_before() -> None:
    async with ConnectionManager(limits=Limits(max_connection_age=3600)) as manager:
        (_, stays), *_ = await connected(manager, 1)
        for _ in range(1000):
            peer = Peer()
            connection = await manager.connect(peer.websocket)
            manager.disconnect(connection)
        gone = weakref.ref(connection)
        del connection, peer
        ages = ages_of(manager)
        assert len(ages._due) <= 2
        manager.disconnect(stays)
        assert (ages._due, ages._timer) == ([], None)
        gc.collect()
        assert gone() is None


async def test_one_timer_serves_all() -> None:
    async with ConnectionManager(limits=Limits(max_connection_age=3600)) as manager:
        loop = asyncio.get_running_loop()
        before = len(loop._scheduled)  # type: ignore[attr-defined]
        await connected(manager, 50)
        alive = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        assert len(alive) <= before + 2  # and the look for sockets that are gone
        first = ages_of(manager)._due[0][0]
        timer = ages_of(manager)._timer
        assert timer is not None
        assert timer.when() == first


async def test_close_of_the_manager_ends_it() -> None:
    manager = ConnectionManager(limits=Limits(max_connection_age=3600))
    await manager.start()
    ages = ages_of(manager)
    await connected(manager, 10)
    await manager.aclose()
    assert (ages._due, ages._timer) == ([], None)


@pytest.mark.parametrize("leaves", [0, 3])
async def test_drain_and_age_close_nobody_twice(leaves: int) -> None:
    async with ConnectionManager(limits=Limits(max_connection_age=0.05)) as manager:
        pairs = await connected(manager, 10)
        for _, connection in pairs[:leaves]:
            manager.disconnect(connection)
        await manager.drain(over=0.2)
        await eventually(lambda: all(peer.close_code for peer, _ in pairs[leaves:]))
        assert manager.stats().disconnects == 10


async def test_nothing_is_there_unless_it_is_set() -> None:
    async with ConnectionManager() as manager:
        await connected(manager, 1)
        assert manager._core.life.node.membership._ages is None
