"""Streams on real servers: what comes, where the viewer goes on, and that nothing is left of who leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from uuid import uuid4

import pytest
from websockets.asyncio.client import connect

from tests.support.servers import STREAM_FLAVOURS, Flavour, Server, eventually
from tests.support.sse import request


@pytest.fixture(scope="module", params=STREAM_FLAVOURS, ids=str)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flavour: Flavour = request.param
    if flavour.missing:
        pytest.skip(flavour.missing)
    log = tmp_path_factory.mktemp(flavour.name) / "log"
    with Server(flavour, log, "tests.support.streaming:app") as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.mark()
    yield running
    assert not running.complaints(), running.log()


async def test_viewers_of_a_real_server_see_the_same(server: Server) -> None:
    id_, count = uuid4().hex, 60
    whole = "".join(f"{number} " for number in range(count))
    await server.post(f"/begin/{id_}?count={count}")
    async with request(server.port, f"/runs/{id_}") as stream:
        first = await stream.event()
    text, last = first.json["text"], first.id
    async with request(server.port, f"/runs/{id_}", last_event_id=last) as stream:
        events = await stream.rest()
    assert text + "".join(event.json.get("text", "") for event in events) == whole
    assert (events[-1].json["type"], events[-1].json["state"]) == ("end", "done")
    async with request(server.port, f"/runs/{id_}", last_event_id=events[-1].id, connection="close") as stream:
        assert stream.status == 204
    async with connect(f"ws://127.0.0.1:{server.port}/runs/{id_}") as socket:
        entries = [json.loads(message) async for message in socket]
    assert ("".join(each.get("text", "") for each in entries), entries[-1]["state"]) == (whole, "done")
    async with request(server.port, f"/runs/{id_}", accept="application/json") as answer:
        told = await answer.json()
    assert (told["state"], "".join(each.get("text", "") for each in told["entries"])) == ("done", whole)
    async with request(server.port, "/runs/nobodys") as stream:
        assert stream.status == 404


async def test_viewer_that_leaves_a_real_server_is_gone(server: Server) -> None:
    id_ = uuid4().hex
    await server.post(f"/begin/{id_}?count=400")
    for vanishes in (False, True):
        async with request(server.port, f"/runs/{id_}") as stream:
            await stream.event()
            if vanishes:
                stream.reset()
        async with connect(f"ws://127.0.0.1:{server.port}/runs/{id_}") as socket:
            await socket.recv()

    async def is_gone() -> bool:
        return bool((await server.get("/state"))["viewers"] == 0)

    await eventually(is_gone, 5)
    async with request(server.port, f"/runs/{id_}/status") as answer:
        assert (await answer.json())["state"] == "running"
    async with request(server.port, f"/runs/{id_}/stop", "POST", content_length="0") as answer:
        assert await answer.json() == {"stopped": True}
