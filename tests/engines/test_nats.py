"""A manager on a real NATS whose settings change under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.asgi import Peer
from tests.support.brokers import NATSServer
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager, EngineUnavailable, MessageTooLarge

OwnNATS = Callable[..., NATSServer]


@pytest.fixture
async def server(own_nats: OwnNATS) -> NATSServer:
    return await asyncio.to_thread(own_nats, config="max_payload: 1000\n")


@pytest.fixture
async def manager(server: NATSServer) -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager(server.url) as manager:
        yield manager


async def arrives(manager: ConnectionManager, message: str) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket)
    await manager.broadcast(message)
    assert await peer.wait_messages(1) == [message]
    await connection.close()


async def test_max_payload_that_was_raised_is_used_at_once(server: NATSServer, manager: ConnectionManager) -> None:
    with pytest.raises(MessageTooLarge) as caught:
        await manager.broadcast("x" * 1001)
    assert 900 < caught.value.limit < 1000
    await arrives(manager, "x" * caught.value.limit)
    await asyncio.to_thread(server.set_max_payload, 2000)
    await arrives(manager, "y" * 1900)
    await arrives(manager, "z" * 1900)
    with pytest.raises(MessageTooLarge) as caught:
        await manager.broadcast("x" * 2001)
    assert 1900 < caught.value.limit < 2000
    assert manager.stats().engine.reconnects == 0


async def test_max_payload_that_was_lowered_costs_one_outage(server: NATSServer, manager: ConnectionManager) -> None:
    await arrives(manager, "x" * 900)
    await asyncio.to_thread(server.set_max_payload, 500)
    with pytest.raises(EngineUnavailable, match=r"Maximum Payload .* isn't known"):
        await manager.broadcast("x" * 900)

    async def is_back() -> bool:
        return (await manager.health()).is_ok

    await eventually(is_back)
    with pytest.raises(MessageTooLarge) as caught:
        await manager.broadcast("x" * 900)
    await arrives(manager, "y" * caught.value.limit)
    assert manager.stats().engine.reconnects == 1
