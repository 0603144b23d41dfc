"""The same app on every server, with the clients that people use."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.integration.conftest import ConnectRaw
from tests.support.apps import MIXED_OTHERS, MIXED_OWN
from tests.support.servers import (
    DAPHNE,
    FLAVOURS,
    GRANIAN,
    UVICORN,
    UVICORN_UVLOOP,
    UVICORN_WSPROTO,
    Server,
    eventually,
)

on_every_server = pytest.mark.parametrize("server", FLAVOURS, ids=str, indirect=True)

TIMEOUT = 10.0


async def receive(client: ClientConnection, count: int) -> list[str | bytes]:
    async with asyncio.timeout(TIMEOUT):
        return [await client.recv() for _ in range(count)]


async def receive_all(client: ClientConnection) -> list[str | bytes]:
    """Return what arrives until the connection is closed."""
    messages: list[str | bytes] = []
    try:
        async with asyncio.timeout(TIMEOUT):
            while True:
                messages.append(await client.recv())
    except ConnectionClosed:
        return messages


async def ended(server: Server, room: str, connects: int) -> None:
    """Wait until the hooks of a manager have seen so many connections go, once, and nothing is left of them."""
    await server.stats(room, connections=0, on_disconnect=connects, on_disconnect_twice=0, tasks=0)


async def example_connections(server: Server, example: str, count: int) -> dict[str, Any]:
    async def reached() -> dict[str, Any] | None:
        stats: dict[str, Any] = (await server.get("/examples"))[example]
        return stats if stats["connections"] == count else None

    stats: dict[str, Any] = await eventually(reached)
    return stats


def sinks(server: Server, count: int) -> dict[str, int]:
    """What `stats().sinks` says when that many are connected: nobody falls off the fast path unnoticed."""
    return {"uvicorn" if server.flavour.fast_path else "asgi": count}


def assert_compresses(server: Server, client: ClientConnection) -> None:
    expected = [] if server.flavour in (GRANIAN, DAPHNE) else ["permessage-deflate"]
    assert [extension.name for extension in client.protocol.extensions] == expected


@on_every_server
async def test_tutorial_runs_unchanged(server: Server) -> None:
    path = server.url("/tutorial/ws/")
    async with connect(f"{path}1") as one, connect(f"{path}2") as two, connect(f"{path}3") as three:
        stats = await example_connections(server, "tutorial", 3)
        assert stats["sinks"] == sinks(server, 3)
        assert_compresses(server, one)
        text = "hello " * 50  # long enough to be compressed
        await one.send(text)
        assert await receive(one, 2) == [f"You wrote: {text}", f"Client #1 says: {text}"]
        assert await receive(two, 1) == [f"Client #1 says: {text}"]
        await two.send("hi")
        assert await receive(two, 2) == ["You wrote: hi", "Client #2 says: hi"]
        assert await receive(one, 1) == ["Client #2 says: hi"]
        await three.close()
        assert await receive(one, 1) == ["Client #3 left the chat"]
        assert await receive(two, 1) == ["Client #3 left the chat"]
        assert await receive_all(three) == [f"Client #1 says: {text}", "Client #2 says: hi"]
    await example_connections(server, "tutorial", 0)


@on_every_server
async def test_seed_runs_unchanged(server: Server) -> None:
    path = server.url("/seed/ws")
    async with connect(path) as one, connect(path) as two:
        stats = await example_connections(server, "seed", 2)
        assert stats["sinks"] == sinks(server, 2)
        for number in range(100):
            await one.send(f"{number}")
        expected = [f"Broadcast: {number}" for number in range(100)]
        assert await receive(one, 100) == expected
        assert await receive(two, 100) == expected
    await example_connections(server, "seed", 0)


@on_every_server
async def test_mixed_sends_keep_the_order_of_the_code(server: Server, room: str) -> None:
    listening = server.url(f"{room}/listen")
    async with connect(server.url(f"{room}/mixed")) as own, connect(listening) as one, connect(listening) as two:
        await server.stats(room, connections=3)
        await own.send("go")
        received = await asyncio.gather(
            receive_all(own), receive(one, len(MIXED_OTHERS)), receive(two, len(MIXED_OTHERS))
        )
        own_messages, *others = received
        assert own_messages == MIXED_OWN
        assert others == [MIXED_OTHERS, MIXED_OTHERS]
        assert own.close_code == 4001
    await server.stats(room, connections=0)


@on_every_server
@pytest.mark.parametrize("code", [4000, 1008])
async def test_close_from_another_task_ends_receive_text(server: Server, room: str, code: int) -> None:
    path = server.url(f"{room}/chat")
    async with connect(path) as one, connect(path) as two:
        await server.stats(room, connections=2)
        reason = "ü" * 100  # 200 bytes, of which 122 fit
        await server.post(f"{room}/close?code={code}&last_words=50&reason={'%C3%BC' * 100}")
        expected = [f"{number:08}" for number in range(50)]
        assert await receive_all(one) == expected
        assert await receive_all(two) == expected
        # Daphne refuses the registered codes and forgets reasons.
        assert one.close_code == (code if code >= 3000 or server.flavour != DAPHNE else code + 3000)
        assert one.close_reason == (reason[:61] if server.flavour != DAPHNE else "")

    await server.stats(room, ends=[f"disconnect {code}"] * 2)
    await ended(server, room, 2)


@on_every_server
@pytest.mark.parametrize("endpoint", ["chat", "listen", "forgetful"])
async def test_close_delivers_what_was_broadcast_before(server: Server, room: str, endpoint: str) -> None:
    path = server.url(f"{room}/{endpoint}")
    async with connect(path, compression=None) as one, connect(path, compression=None) as two:
        await server.stats(room, connections=2)
        closing = asyncio.create_task(server.post(f"{room}/close?code=4000&last_words=600&size=10000"))
        received = await asyncio.gather(receive_all(one), receive_all(two))
        await closing
        for messages in received:
            assert [message[:8] for message in messages] == [f"{number:08}" for number in range(600)]
        assert (one.close_code, two.close_code) == (4000, 4000)
    stats = await server.stats(room, connections=0)
    assert stats["dropped"] == {}


@on_every_server
@pytest.mark.parametrize("endpoint", ["chat", "listen", "forgetful"])
async def test_every_end_is_noticed(server: Server, room: str, endpoint: str, connect_raw: ConnectRaw) -> None:
    """Whether the endpoint calls `disconnect` or not, and whether the client says goodbye or not."""
    path = f"{room}/{endpoint}"
    vanishing = await connect_raw(server, path)
    ending = await connect_raw(server, path)
    async with connect(server.url(path)) as staying:
        async with connect(server.url(path)):
            await server.stats(room, connections=4)
            vanishing.vanish()
            ending.close()
        await server.stats(room, connections=1)
        await server.post(f"{room}/broadcast?text=still+here")
        assert await receive(staying, 1) == ["still here"]
    await server.stats(room, connections=0)
    await ended(server, room, 4)


@pytest.mark.parametrize("server", [UVICORN, UVICORN_UVLOOP, UVICORN_WSPROTO], ids=str, indirect=True)
async def test_end_is_noticed_by_the_next_broadcast_if_nobody_receives(
    server: Server, room: str, connect_raw: ConnectRaw
) -> None:
    """Uvicorn only: elsewhere a send to a peer that is gone succeeds, and only `receive` would tell."""
    path = f"{room}/deaf"
    vanishing, ending = await connect_raw(server, path), await connect_raw(server, path)
    await server.stats(room, connections=2)
    vanishing.vanish()
    ending.close()

    async def everybody_left() -> bool:
        await server.post(f"{room}/broadcast?text=tick")
        return bool((await server.get(f"{room}/stats"))["connections"] == 0)

    await eventually(everybody_left)
    await ended(server, room, 2)
