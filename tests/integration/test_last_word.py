"""What an endpoint says before it ends arrives, and then its connection is closed and gone, on every server."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import connect

from tests.integration.test_servers import on_every_server, receive_all
from tests.support.rawclient import RawClient
from tests.support.servers import DAPHNE, Server, eventually, serve_here
from wsbroadcast import Connection, ConnectionManager, Limits
from wsbroadcast.node import membership

HOWS = ["send", "personal", "broadcast", "channel", "user", "nowait", "own"]
CODES = {"return": 1000, "finally": 1000, "raise": 1011, "code": 4008, "with": 1000, "cancelled": 1011}


async def last_words(server: Server, path: str, code: int) -> list[str | bytes]:
    """Return what arrives until the close, which has to come with this code."""
    async with connect(server.url(path), max_size=None) as client:
        messages = await receive_all(client)
        if server.flavour is DAPHNE and 1000 < code < 3000:
            code += 3000  # which refuses the registered codes
        assert client.close_code == code
    return messages


async def expect_tracebacks(server: Server, times: int) -> None:
    """Wait until the server has logged the endpoints' failures, and forget them: they are the app's."""

    async def all_there() -> bool:
        return server.log().count("raise EndpointFailed") >= times  # once in each, near its end

    await eventually(all_there)
    server.mark()


@on_every_server
@pytest.mark.parametrize("end", ["return", "raise", "finally", "code"])
async def test_what_an_endpoint_says_last_arrives(server: Server, room: str, end: str) -> None:
    for how in HOWS:
        messages = await last_words(server, f"{room}/last/{end}/plain/{how}", CODES[end])
        assert messages == ["first", "second", "last"], how
    await server.stats(room, connections=0)
    if end == "raise":
        await expect_tracebacks(server, len(HOWS))


@on_every_server
async def test_what_is_said_in_a_with_block_arrives(server: Server, room: str) -> None:
    for how in HOWS:
        assert await last_words(server, f"{room}/last/with/plain/{how}", 1000) == ["last"], how
    await server.stats(room, connections=0)


@on_every_server
@pytest.mark.parametrize("way", ["wait_for", "gather", "group"])
async def test_connecting_in_another_task_is_the_same(server: Server, room: str, way: str) -> None:
    messages = await last_words(server, f"{room}/last/return/{way}/broadcast", 1000)
    assert messages == ["first", "second", "last"]
    await server.stats(room, connections=0)


@on_every_server
async def test_a_large_message_before_it_arrives_too(server: Server, room: str) -> None:
    size = 3_000_000 if server.flavour is not DAPHNE else 1_000_000  # which sends no larger ones
    [large, *last] = await last_words(server, f"{room}/last/return/plain/send?size={size}", 1000)
    assert (len(large), last) == (size, ["first", "second", "last"])


@on_every_server
async def test_observers_get_everything_and_stay(server: Server, room: str) -> None:
    async with connect(server.url(f"{room}/listen")) as observer:
        await server.stats(room, connections=1)
        for _ in range(3):
            await last_words(server, f"{room}/last/return/plain/broadcast", 1000)
        await server.stats(room, connections=1)
        async with asyncio.timeout(5):
            assert [await observer.recv() for _ in range(9)] == ["first", "second", "last"] * 3


@pytest.mark.parametrize("way", ["close", "vanish"])
async def test_peer_that_goes_while_its_endpoint_only_waits_is_noticed(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uvicorn only: elsewhere nothing but `receive` tells."""
    monkeypatch.setattr(membership, "_LOOK_SECONDS", 0.05)
    ended: list[Connection] = []
    is_over = asyncio.Event()
    app = FastAPI()
    async with ConnectionManager(limits=Limits(max_connections=1)) as manager:
        manager.on_disconnect(ended.append)

        @app.websocket("/ws")
        async def waits(websocket: WebSocket) -> None:
            await manager.connect(websocket, channels=["room"])
            await is_over.wait()

        async with serve_here(app) as port:
            for _ in range(2):  # the place of the first is free
                client = await RawClient.connect(port, "/ws")
                assert len(manager.connections) == 1
                if way == "close":
                    client.close()
                else:
                    client.vanish()

                async def gone() -> bool:
                    return manager.connections == []

                await eventually(gone)
            is_over.set()
        assert len(ended) == 2
