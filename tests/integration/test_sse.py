"""Streams of events and long polls on real servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest

from tests.support.servers import (
    DAPHNE,
    STREAM_FLAVOURS,
    UVICORN_DEBUG,
    UVICORN_H11,
    UVICORN_HTTPTOOLS,
    Flavour,
    Server,
    eventually,
)
from tests.support.sse import Response, request

APP = "tests.support.streams:app"

NOTICED = {"uvicorn": 1.0, "hypercorn": 1.0, "granian": 1.0, "daphne": 1.0}
"""Seconds within which a client that leaves is gone from the registry."""


@pytest.fixture(scope="module", params=STREAM_FLAVOURS, ids=str)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flavour: Flavour = request.param
    if flavour.missing:
        pytest.skip(flavour.missing)
    with Server(flavour, tmp_path_factory.mktemp(flavour.name) / "log", APP) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.mark()
    yield running
    assert not running.complaints(), running.log()


@pytest.fixture
def channel() -> str:
    return f"kept-{uuid4().hex}"


async def say(server: Server, channel: str, text: str, **options: Any) -> str | None:
    """Broadcast; return the position."""
    more = "".join(f"&{name}={value}" for name, value in options.items())
    answer = await server.post(f"/broadcast?channel={channel}&text={quote(text)}{more}")
    position: str | None = answer["position"]
    return position


async def quiet(server: Server, name: str = "main", seconds: float = 5.0) -> dict[str, Any]:
    """Wait until nobody is connected, and nothing of anybody is left; return the state."""

    async def is_quiet() -> Any:
        state = await server.get(f"/state?name={name}")
        return state if not (state["connections"] or state["tasks"] or state["channels"]) else None

    try:
        found: dict[str, Any] = await eventually(is_quiet, seconds)
    except AssertionError:
        raise AssertionError(await server.get(f"/state?name={name}")) from None
    return found


async def came(server: Server, name: str = "main", number: int = 1) -> None:
    async def has_come() -> bool:
        return bool((await server.get(f"/state?name={name}"))["connections"] == number)

    await eventually(has_come)


async def test_a_stream_from_its_beginning_to_its_end(server: Server, channel: str) -> None:
    before = await quiet(server)
    async with request(server.port, f"/sse/{channel}", Accept="text/event-stream") as stream:
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.headers["x-accel-buffering"] == "no"
        assert {"no-cache", "no-transform"} <= set(stream.headers["cache-control"].split(", "))
        hello = await stream.event()
        assert (hello.name, hello.json["type"]) == ("hello", "hello")
        recovered = await stream.event()
        assert recovered.name == "recovered"
        assert recovered.id == recovered.json["position"]
        assert stream.parser.retry is not None
        assert 1000 <= stream.parser.retry <= 5000
        state = await server.get("/state")
        fast = server.flavour.package == "uvicorn"
        assert state["sinks"] == {"uvicorn_sse" if fast else "asgi_sse": 1}
        assert bool(state["refused"]) is not fast
        positions = [await say(server, channel, text) for text in ("one", "two\nlines", "drei \u2028 ü")]
        events = await stream.take(3)
        assert [(event.name, event.data) for event in events] == [
            ("message", "one"),
            ("message", "two\nlines"),
            ("message", "drei \u2028 ü"),
        ]
        assert [event.id for event in events] == positions
        await server.post("/send")
        own = await stream.take(3)
        assert [(event.name, event.data) for event in own] == [
            ("message", "own text"),
            ("message", '{"own":"json"}'),
            ("binary", "/w=="),
        ]
        assert {event.id for event in own} == {positions[-1]}
    started = time.monotonic()
    after = await quiet(server)
    assert time.monotonic() - started < NOTICED[server.flavour.package]
    assert after["hooked"]["connect"] == after["hooked"]["disconnect"] == before["hooked"].get("connect", 0) + 1
    assert after["living"] == 0


async def test_who_comes_back_gets_what_it_missed(server: Server, channel: str) -> None:
    first = await say(server, channel, "first")
    second = await say(server, channel, "second")
    third = await say(server, channel, "third")

    async def seen(path: str, **headers: Any) -> tuple[Any, list[str]]:
        async with request(server.port, path, **headers) as stream:
            recovered = (await stream.named("recovered")).json
            await say(server, channel, "end")
            texts = []
            while (event := await stream.event()).data != "end":
                texts.append(event.data)
            await say(server, channel, "after")
            assert (await stream.event()).data == "after"
        return recovered, texts

    recovered, texts = await seen(f"/sse/{channel}?since={first}")
    assert recovered["recovered"] is True
    assert texts == ["second", "third"]
    recovered, texts = await seen(f"/sse/{channel}?since={first}", Last_Event_ID=str(second))
    assert recovered["recovered"] is True
    assert texts[0] == "third"
    assert third is not None
    lost, texts = await seen(f"/sse/{channel}?since=other-epoch:3")
    assert lost["recovered"] is False
    assert lost["reason"]
    assert texts == []
    for text in range(25):
        await say(server, channel, str(text))
    lost, texts = await seen(f"/sse/{channel}", Last_Event_ID=str(first))
    assert lost["recovered"] is False
    assert lost["position"]
    fresh, texts = await seen(f"/both/{channel}")
    assert "recovered" not in fresh
    assert texts == []
    await quiet(server)


async def end_of(stream: Response) -> dict[str, Any]:
    """Read to the end, which is said and whole; return how."""
    events = await stream.rest()
    assert not stream.is_cut
    assert events[-1].name == "close"
    found: dict[str, Any] = events[-1].json
    return found


@pytest.mark.parametrize("how", ["close", "later", "aclose"])
async def test_the_app_ends_a_stream(server: Server, channel: str, how: str) -> None:
    name = "slow" if how == "aclose" else "main"
    async with request(server.port, f"/slow/{channel}" if how == "aclose" else f"/sse/{channel}") as stream:
        await stream.named("hello")
        await say(server, channel, "last words", name=name)
        path = {"close": "/close?code=4403&reason=no", "later": "/close?code=1013&reason=later", "aclose": "/aclose"}
        await server.post(path[how])
        assert (await stream.named("message")).data == "last words"
        end = await end_of(stream)
    expected = {"close": (4403, "no"), "later": (1013, "later"), "aclose": (1001, "the server is going away")}[how]
    assert (end["code"], end["reason"]) == expected
    await quiet(server, name)


async def test_a_user_is_closed_and_a_token_expires(server: Server, channel: str) -> None:
    async with request(server.port, f"/member/{channel}?token=ann") as stream:
        await stream.named("hello")
        await server.post("/close_user?user=ann")
        assert (await end_of(stream))["code"] == 4401
    async with request(server.port, f"/member/{channel}?token=short") as stream:
        end = await end_of(stream)
        assert (end["code"], end["reason"]) == (4401, "it has expired")
    await quiet(server, "members")


async def test_a_hook_refuses(server: Server, channel: str) -> None:
    async with request(server.port, f"/hook/{channel}") as stream:
        end = await end_of(stream)
        assert (end["code"], end["reason"]) == (1008, "the hook says no")
    await quiet(server, "refusing")


async def test_who_may_not_come_in_learns_it_by_status(server: Server, channel: str) -> None:
    for accept in ("text/event-stream", "application/json"):
        async with request(server.port, f"/member/{channel}", Accept=accept) as answer:
            assert (answer.status, await answer.whole()) == (401, b"not authenticated")
        async with request(server.port, f"/sse/{channel}", Accept=accept, Origin="https://evil.example") as answer:
            assert answer.status == 403
        async with request(server.port, "/sse/%0Anews", Accept=accept) as answer:
            assert answer.status == 403
            assert b"invalid channel" in await answer.whole()
    await quiet(server, "members")


async def test_head_is_answered_at_once(server: Server, channel: str) -> None:
    before = (await quiet(server))["hooked"].get("connect", 0)
    async with request(server.port, f"/sse/{channel}", "HEAD") as answer:
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
    async with request(server.port, f"/member/{channel}", "HEAD") as answer:
        assert answer.status == 401
    async with request(server.port, "/sse/%0Anews", "HEAD") as answer:
        assert answer.status == 403
    assert (await quiet(server))["hooked"].get("connect", 0) == before


async def test_a_client_that_vanishes_is_noticed(server: Server, channel: str) -> None:
    for way in ("close", "reset"):
        async with request(server.port, f"/sse/{channel}") as stream:
            await stream.named("recovered")
            await came(server)
            started = time.monotonic()
            getattr(stream, way)()
            await quiet(server)
            assert time.monotonic() - started < NOTICED[server.flavour.package]


async def test_http_1_0(server: Server, channel: str) -> None:
    async with request(server.port, f"/sse/{channel}", version="1.0") as stream:
        assert stream.status == 200
        assert (await stream.event()).name == "hello"
        await say(server, channel, "to an old client")
        while (event := await stream.event()).name != "message":
            pass
        assert event.data == "to an old client"
        await server.post("/close?code=1000")
        assert (await stream.rest())[-1].json["code"] == 1000
    await quiet(server)


async def test_a_second_request_behind_a_stream_leaves_nothing(server: Server, channel: str) -> None:
    baseline = await quiet(server)
    streams = []
    async with asyncio.timeout(20):
        for _ in range(20):
            context = request(server.port, f"/sse/{channel}")
            stream = await context.__aenter__()
            await stream.named("recovered")
            stream.writer.write(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            await stream.writer.drain()
            streams.append((context, stream))
        if server.flavour in (UVICORN_DEBUG, UVICORN_HTTPTOOLS):  # others end what the request stands behind
            await came(server, number=20)
            await say(server, channel, "to all")
            for _, stream in streams:
                assert (await stream.event()).data == "to all"
        for context, stream in streams:
            stream.reset()
            await context.__aexit__(None, None, None)

        async def is_everybody_gone() -> bool:
            # uvicorn doesn't read now: a write, as the comments that keep streams alive are, shows that they are gone.
            await say(server, channel, "to nobody")
            return not (await server.get("/state"))["connections"]

        await eventually(is_everybody_gone, 15)
        after = await quiet(server, seconds=15)

        async def are_tasks_gone() -> bool:
            return bool((await server.get("/state"))["all_tasks"] <= baseline["all_tasks"])

        await eventually(are_tasks_gone)
    assert after["living"] == 0
    if server.flavour is UVICORN_H11:  # a 400 behind a head with `connection: close` is an error of its own there
        server.mark()


async def test_a_stalled_stream_is_evicted_and_disturbs_nobody(server: Server, channel: str) -> None:
    async with request(server.port, f"/slow/{channel}", receive_buffer=4096) as stalled:
        await stalled.named("hello")
        async with request(server.port, f"/slow/{channel}") as other:
            await other.named("recovered")
            flooding = asyncio.create_task(server.post(f"/flood?name=slow&size=16384&times=600&channel={channel}"))
            numbers = [int(event.data[:8]) for event in await other.take(600)]
            assert numbers == list(range(600))
            await flooding

            async def is_out() -> bool:
                return bool((await server.get("/state?name=slow"))["connections"] == 1)

            if server.flavour is DAPHNE:  # takes everything and never says what it holds
                return
            await eventually(is_out, 15)
            assert (await server.get("/state?name=slow"))["evicted"]
    await quiet(server, "slow")
    assert server.peak_resident_bytes() < 250e6


# Long poll.


async def poll(server: Server, path: str) -> tuple[int, Any]:
    async with request(server.port, path, Accept="application/json") as answer:
        return answer.status, await answer.json()


async def test_a_poll(server: Server, channel: str) -> None:
    status, first = await poll(server, f"/sse/{channel}")
    assert status == 200
    assert first["messages"] == []
    assert first["position"]
    waiting = asyncio.create_task(poll(server, f"/sse/{channel}?since={first['position']}"))
    await came(server)
    position = await say(server, channel, "one")
    status, answer = await waiting
    assert status == 200
    assert [message["data"] for message in answer["messages"]] == ["one"]
    assert answer["position"] == position == answer["messages"][0]["position"]
    assert answer["recovered"] is True
    again = await poll(server, f"/sse/{channel}?since={first['position']}")
    assert [message["data"] for message in again[1]["messages"]] == ["one"]
    empty = await poll(server, f"/sse/{channel}?since={position}&wait=0.2")
    assert empty[1]["messages"] == []
    assert empty[1]["position"] == position
    await quiet(server)


async def test_a_poller_that_leaves_is_noticed(server: Server, channel: str) -> None:
    _, first = await poll(server, f"/sse/{channel}")
    sock_reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        f"GET /sse/{channel}?since={first['position']} HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\n".encode()
    )
    await came(server)
    started = time.monotonic()
    writer.close()
    await quiet(server)
    assert time.monotonic() - started < NOTICED[server.flavour.package]
    assert await sock_reader.read() == b""


async def test_a_user_is_closed_while_it_polls(server: Server, channel: str) -> None:
    waiting = asyncio.create_task(poll(server, f"/member/{channel}?token=ann"))
    await came(server, "members")
    await server.post("/close_user?user=ann")
    status, answer = await waiting
    assert (status, answer["code"]) == (401, 4401)
    await quiet(server, "members")
