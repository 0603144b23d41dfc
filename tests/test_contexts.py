"""Whose context variables code sees: what is about a connection sees those of its `connect`, whoever causes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest

from tests.support.asgi import Peer, connected, eventually
from tests.support.brokers import NATSServer
from wsbroadcast import Connection, ConnectionManager, SlowConsumer
from wsbroadcast.hooks import Delivery
from wsbroadcast.publication import Gap

tenant: ContextVar[str] = ContextVar("tenant", default="nobody's")


async def bobs(manager: ConnectionManager, peer: Peer | None = None, **options: Any) -> tuple[Peer, Connection]:
    """Connect bob, in a task of his own."""
    peer = peer or Peer()

    async def connect() -> Connection:
        tenant.set("bob's")
        return await manager.connect(peer.websocket, user="bob", channels=["room"], **options)

    return peer, await asyncio.create_task(connect())


async def close(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    await connection.close()


async def disconnect(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    manager.disconnect(connection)


async def close_user(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    await manager.close_user("bob")


async def fill(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    peer.stall()
    for number in range(4):
        await manager.broadcast(f"{number}")


async def stall(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    peer.stall()
    await manager.broadcast("held")


async def expire(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    connection.renew(0)


async def break_off(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    peer.vanish()
    await manager.broadcast("nobody takes this")


async def end(manager: ConnectionManager, peer: Peer, connection: Connection) -> None:
    await manager.aclose()


WAYS = [close, disconnect, close_user, fill, stall, expire, break_off, end]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_hooks_about_a_connections_end_see_its_own(way: Callable[..., Any]) -> None:
    seen: dict[str, str] = {}
    options = SlowConsumer(max_backlog_messages=2, send_timeout=0.2, close_timeout=0.05)
    async with ConnectionManager(slow_consumer=options) as manager:

        @manager.on_disconnect
        async def on_disconnect(connection: Connection) -> None:
            await asyncio.sleep(0)
            seen["on_disconnect"] = tenant.get()

        manager.on_unsubscribe(lambda connection, channel: seen.update(on_unsubscribe=tenant.get()))
        peer, connection = await bobs(manager)
        tenant.set("ada's")
        await way(manager, peer, connection)
        await eventually(lambda: len(seen) == 2)
        assert seen == {"on_disconnect": "bob's", "on_unsubscribe": "bob's"}
        peer.resume()


async def test_writes_to_a_connection_see_its_own() -> None:
    seen: list[str] = []
    async with ConnectionManager() as manager:
        peer = Peer()
        take = peer.send

        async def send(event: Any) -> None:
            seen.append(tenant.get())
            await take(event)

        peer.websocket._send = send
        await bobs(manager, peer)
        tenant.set("ada's")
        await manager.broadcast("hello")
        await eventually(lambda: peer.messages == ["hello"])
    assert set(seen) == {"bob's"}


async def test_on_message_sees_the_readers() -> None:
    seen: list[str] = []
    async with ConnectionManager() as manager:
        manager.on_message(lambda connection, message: seen.append(tenant.get()))
        [(peer, connection)] = await connected(manager, 1)
        tenant.set("the reader's")
        peer.say("hello")
        await connection.receive()
    assert seen == ["the reader's"]


async def test_hooks_about_nobody_see_nobodys(own_nats: Callable[..., NATSServer]) -> None:
    """What comes from a broker, and its outages, are not the affair of whoever connected first."""
    seen: dict[str, str] = {}
    tenant.set("ada's")
    server = own_nats()
    async with ConnectionManager(server.url) as manager, ConnectionManager(server.url) as other:

        @manager.on_deliver
        def on_deliver(delivery: Delivery) -> None:
            seen["on_deliver"] = tenant.get()

        @manager.on_gap
        def on_gap(gap: Gap) -> None:
            seen["on_gap"] = tenant.get()

        peer = Peer()
        await manager.connect(peer.websocket, channels=["room"])
        await other.broadcast("hello", channel="room")
        await eventually(lambda: "on_deliver" in seen)
        server.kill()
        server.start()
        await eventually(lambda: "on_gap" in seen)
    assert seen == {"on_deliver": "nobody's", "on_gap": "nobody's"}
