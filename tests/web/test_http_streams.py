"""Streams of events and long polls through middleware, limits, origins and whatever else stands around them."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import ssl
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from fastapi import FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.servers import eventually, serve_here
from tests.support.sse import Event, Response, request
from wsbroadcast import (
    Access,
    ConnectionManager,
    Delivery,
    History,
    Limits,
    SlowConsumer,
    create_router,
    create_routes,
    create_sse_router,
)
from wsbroadcast.node.admission import Poll, PollLease, Quotas, Violations
from wsbroadcast.stats import Counters

HTTP = pytest.mark.parametrize("http", ["httptools", "h11"])


@asynccontextmanager
async def serving(
    *middleware: Middleware,
    manager: ConnectionManager | None = None,
    http: Any = "httptools",
    server: dict[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[ConnectionManager, int]]:
    """Run an app with a router on uvicorn; yield its manager and the port."""
    if http == "httptools":
        pytest.importorskip("httptools")
    manager = manager or ConnectionManager()
    app = FastAPI(middleware=list(middleware))
    app.include_router(create_sse_router(manager, "/sse/{channel}", **options))
    async with serve_here(app, http=http, **(server or {})) as port:
        yield manager, port


async def gone(manager: ConnectionManager, seconds: float = 5.0) -> None:
    async def is_gone() -> bool:
        return not manager.connections

    await eventually(is_gone, seconds)


async def talk(manager: ConnectionManager, stream: Response) -> None:
    """Prove that what is broadcast arrives, one by one."""
    assert (await stream.event()).name == "hello"
    for number in range(3):
        await manager.broadcast(f"message {number}\n\u2028", channel="news")
        assert (await stream.named("message")).data == f"message {number}\n\u2028"


def sinks(manager: ConnectionManager) -> tuple[dict[str, int], dict[str, int]]:
    stats = manager.stats()
    return dict(stats.sinks), dict(stats.fast_path_refused)


# Middleware.


class Compressor:
    """Compresses each piece of a body as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        compressor = zlib.compressobj(wbits=31)

        async def compress(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-encoding", b"gzip"))
            elif message["type"] == "http.response.body":
                body = compressor.compress(message.get("body", b"")) + compressor.flush(zlib.Z_SYNC_FLUSH)
                message = {**message, "body": body}
            await send(message)

        await self.app(scope, receive, compress if scope["type"] == "http" else send)


class Shouting:
    """Changes bodies and leaves heads alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def shout(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": message.get("body", b"").upper()}
            await send(message)

        await self.app(scope, receive, shout if scope["type"] == "http" else send)


class FromAnotherTask:
    """Sends bodies from a task of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        queue: asyncio.Queue[Message] = asyncio.Queue()

        async def pump() -> None:
            while True:
                message = await queue.get()
                await send(message)
                queue.task_done()

        pumping = asyncio.create_task(pump())
        try:
            await self.app(scope, receive, queue.put)
            await queue.join()
        finally:
            pumping.cancel()


async def nothing(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    return await call_next(request)


SHARED: list[tuple[bytes, bytes]] = [(b"x-shared", b"1")]


@HTTP
@pytest.mark.parametrize(
    "middleware",
    [
        None,
        Middleware(CORSMiddleware, allow_origins=["https://a.example"], allow_credentials=True),
        Middleware(GZipMiddleware, minimum_size=1),
        Middleware(SessionMiddleware, secret_key="x"),
    ],
    ids=["none", "cors", "gzip", "session"],
)
async def test_middleware_that_leaves_events_alone_keeps_the_fast_path(http: str, middleware: Any) -> None:
    async with serving(*[middleware] if middleware else [], http=http, allowed_origins="*") as (manager, port):
        for _ in range(2):
            headers: dict[str, Any] = {"Origin": "https://a.example", "Accept_Encoding": "gzip"}
            async with request(port, "/sse/news", **headers) as stream:
                await talk(manager, stream)
                assert "content-encoding" not in stream.headers
                assert sinks(manager) == ({"uvicorn_sse": 1}, {})
            await gone(manager)


@HTTP
async def test_a_compressor_is_found_and_obeyed(http: str) -> None:
    async with serving(Middleware(Compressor), http=http) as (manager, port):
        for _ in range(2):
            async with request(port, "/sse/news", Accept_Encoding="gzip") as stream:
                assert stream.headers["content-encoding"] == "gzip"
                inflate = zlib.decompressobj(wbits=31)
                text = ""
                while "event: recovered" not in text:
                    text += inflate.decompress(await stream.piece()).decode()
                await manager.broadcast("compressed " * 10, channel="news")
                while "compressed " * 10 not in text:
                    text += inflate.decompress(await stream.piece()).decode()
                assert sinks(manager) == ({"asgi_sse": 1}, {"compressed": 1})
            await gone(manager)


@HTTP
@pytest.mark.parametrize(
    ("middleware", "reason"),
    [
        (Middleware(BaseHTTPMiddleware, dispatch=nothing), "receive is wrapped"),
        (Middleware(FromAnotherTask), "not in chunks"),
    ],
    ids=["base", "task"],
)
async def test_middleware_in_between_works_and_the_end_is_noticed(http: str, middleware: Any, reason: str) -> None:
    async with serving(middleware, http=http) as (manager, port):
        async with request(port, "/sse/news") as stream:
            await talk(manager, stream)
            assert sinks(manager) == ({"asgi_sse": 1}, {reason: 1})
        await gone(manager, 1.0)


async def test_a_body_that_is_changed_goes_through_what_changes_it() -> None:
    async with serving(Middleware(Shouting)) as (manager, port), request(port, "/sse/news") as stream:
        while b"RECOVERED" not in stream.body:
            await stream.piece()
        await manager.broadcast("loud", channel="news")
        while b"DATA: LOUD" not in stream.body:
            await stream.piece()
        assert sinks(manager) == ({"asgi_sse": 1}, {"send is wrapped": 1})


@HTTP
async def test_a_head_that_fails_leaves_the_transport_as_it_was(http: str) -> None:
    cycles: list[Any] = []

    class Failing:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def fail(message: Message) -> None:
                if message["type"] == "http.response.body":
                    raise OSError("broken")
                await send(message)

            cycles.append(getattr(receive, "__self__", None))
            await self.app(scope, receive, fail if scope["type"] == "http" else send)

    async with serving(Middleware(Failing), http=http) as (manager, port):
        async with request(port, "/sse/news") as stream:
            assert stream.status == 200
            await stream.whole()
        assert type(cycles[-1].transport).__name__ != "Recorder"
        assert not manager.connections


async def test_over_tls() -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    with certificate.private_key_and_cert_chain_pem.tempfile() as path:
        trusts = ssl.create_default_context()
        authority.configure_trust(trusts)
        async with serving(server={"ssl_certfile": path, "ssl_keyfile": path}) as (manager, port):
            async with request(port, "/sse/news", tls=trusts) as stream:
                await talk(manager, stream)
                assert sinks(manager) == ({"uvicorn_sse": 1}, {})
            await gone(manager)


# Peers that don't take what they are sent.


@HTTP
@pytest.mark.parametrize("end", ["timeout", "fin", "reset"])
async def test_a_large_message_that_is_broken_off_is_never_completed(http: str, end: str) -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(send_timeout=0.5, close_timeout=0.2))
    async with serving(manager=manager, http=http) as (_, port):  # noqa: SIM117  # the server ends after its clients
        async with request(port, "/sse/news", receive_buffer=4096) as stream:
            await stream.named("recovered")
            for _ in range(8):
                await manager.broadcast("x" * 2**20, channel="news")
            if end == "fin":
                stream.writer.write_eof()
            elif end == "reset":
                stream.reset()
            await gone(manager, 10)
            if end == "reset":
                return
            events = await read_all(stream)
            if not stream.is_cut:  # it was evicted between two messages, and is told so
                assert events.pop().name == "close"
            assert all(event.data == "x" * 2**20 for event in events)


async def read_all(stream: Response) -> list[Event]:
    try:
        return await stream.rest()
    except ConnectionError:
        stream.is_cut = True
        return []


async def test_a_half_closed_client_is_gone() -> None:
    async with serving() as (manager, port), request(port, "/sse/news") as stream:
        await talk(manager, stream)
        stream.writer.write_eof()
        await gone(manager, 1.0)


# Limits (503 and 429 would end an `EventSource` for ever).


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_connections=1),
        Limits(max_connections_per_address=1),
        Limits(max_handshake_rate=0.001, handshake_burst=1),
    ],
    ids=["all", "address", "rate"],
)
async def test_limits_answer_each_kind_of_client(limits: Limits) -> None:
    manager = ConnectionManager(limits=limits)
    async with serving(manager=manager) as (_, port), request(port, "/sse/news") as first:
        await first.named("recovered")
        moments = set()
        for _ in range(5):
            async with request(port, "/sse/news") as stream:
                assert stream.status == 200
                assert await stream.rest() == []
                assert not stream.is_cut
                assert stream.parser.retry is not None
                assert 5000 <= stream.parser.retry <= 10_000
                moments.add(stream.parser.retry)
        assert len(moments) > 1
        for path, accept in (("/sse/news?events=1", "*/*"), ("/sse/news", "application/json")):
            async with request(port, path, Accept=accept) as answer:
                assert answer.status in (429, 503)
        assert sum(manager.stats().limited.values()) == 7
        assert len(manager.connections) == 1


@pytest.mark.parametrize("status", [401, 403, 429, 503])
async def test_authenticate_answers_with_its_status_but_for_later(status: int) -> None:
    async def user() -> str:
        raise HTTPException(status, "no\r\ndata: forged\n\n", {"Retry-After": "7", "X-Why": "because"})

    async with serving(authenticate=user) as (_, port):
        async with request(port, "/sse/news") as stream:
            if status < 429:
                assert (stream.status, stream.headers["x-why"]) == (status, "because")
            else:
                assert stream.status == 200
                assert await stream.rest() == []
                assert stream.parser.retry is not None
                assert 7000 <= stream.parser.retry <= 14_000
        async with request(port, "/sse/news?events=1") as answer:
            assert (answer.status, answer.headers["retry-after"]) == (status, "7")


# Origins.


@pytest.mark.parametrize(
    ("allowed", "headers", "status", "shared"),
    [
        (None, {}, 200, None),
        (None, {"Sec_Fetch_Site": "same-origin"}, 200, None),
        (None, {"Sec_Fetch_Site": "none"}, 200, None),
        (None, {"Sec_Fetch_Site": "cross-site"}, 403, None),
        (None, {"Sec_Fetch_Site": "same-site"}, 403, None),
        (None, {"Origin": "https://evil.example"}, 403, None),
        (None, {"Origin": "null"}, 403, None),
        (["https://app.example"], {"Origin": "https://app.example"}, 200, "https://app.example"),
        (["https://app.example"], {"Origin": "https://app.example.evil.example"}, 403, None),
        ("*", {"Origin": "https://any.example"}, 200, "*"),
        ("*", {"Sec_Fetch_Site": "cross-site"}, 200, None),
    ],
)
async def test_origins(allowed: Any, headers: dict[str, Any], status: int, shared: str | None) -> None:
    async with serving(allowed_origins=allowed) as (_, port):
        for accept in ("text/event-stream", "application/json"):
            async with request(port, "/sse/news?wait=0", Accept=accept, **headers) as answer:
                assert answer.status == status
                assert answer.headers.get("access-control-allow-origin") == shared
                is_exact = shared not in (None, "*")
                assert answer.headers.get("access-control-allow-credentials") == ("true" if is_exact else None)
                assert answer.headers.get("vary") == (None if allowed == "*" else "Origin")
        if "Origin" in headers:
            async with request(port, "/sse/news", "OPTIONS", **headers) as answer:
                assert answer.status == (204 if status == 200 else 403)
                assert answer.headers.get("access-control-allow-origin") == shared


async def test_only_browsers() -> None:
    access = Access(allow_missing_origin=False)
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 403),
    ]
    async with serving(access=access) as (_, port):
        for headers, status in cases:
            async with request(port, "/sse/news", **headers) as answer:
                assert answer.status == status


# Bad input.


@pytest.mark.parametrize(
    "position",
    [
        "garbage",
        "a:b",
        "e:99999999999999999999999",
        "e:-1",
        "é",
        "x" * 60_000,
        "a:1 id: forged",
        "%0Aid:x",
        "..",
        "e:1, e:2",
    ],
)
async def test_a_position_that_is_none_is_told_and_disturbs_nobody(position: str) -> None:
    manager = ConnectionManager(history={"news": History(messages=5)})
    async with serving(manager=manager, server={"h11_max_incomplete_event_size": 2**17}) as (_, port):
        await manager.broadcast("before", channel="news")
        headers: dict[str, Any] = {"Last_Event_ID": position}
        for path in ("/sse/news",):
            async with request(port, path, **headers) as stream:
                assert stream.status == 200
                recovered = (await stream.named("recovered")).json
                assert recovered["recovered"] is False
                assert position not in stream.body.decode() or len(position) < 5
                await manager.broadcast("after", channel="news")
                assert (await stream.event()).data == "after"
            async with request(port, path, Accept="application/json", **headers) as answer:
                assert answer.status == 200
                assert (await answer.json())["recovered"] is False


async def test_a_stream_of_events_has_further_channels() -> None:
    manager = ConnectionManager(history=History(messages=5))

    def authorize(connection: Any, action: str, channel: str | None) -> bool:
        return channel != "secret"

    async with serving(manager=manager, authorize=authorize) as (_, port):
        before = (await manager.broadcast(1, channel="kept@home")).position
        await manager.broadcast(2, channel="kept@home")
        # A name may look like a position, or have an @ itself.
        names = ["room:1", "a@b", f"kept@home@{before}", "secret", "", "x@", "@", "%00"]
        query = "&".join(f"channel={each}" for each in names)
        async with request(port, f"/sse/news?events=1&{query}") as stream:
            said = [(await stream.event()).json for _ in range(11)]
            assert [each["type"] for each in said[:2]] == ["hello", "subscribed"]
            answers = [each.get("channel") or each.get("code") for each in said[2:] if each["type"] != "message"]
            assert answers == [
                *("room:1", "a@b", "kept@home", "forbidden"),
                *("invalid_channel", "x@", "@", "invalid_channel"),
            ]
            assert [each["id"] for each in said[2:] if each["type"] != "message"] == [
                *names[:2],
                "kept@home",
                "secret",
                "",
                "x@",
                "@",
                "\0",
            ]
            assert [each["data"] for each in said if each["type"] == "message"] == [2]
            assert [each["channel"] for each in said if each.get("recovered")] == ["kept@home"]
            await manager.broadcast(3, channel="room:1")
            assert (await stream.event()).json["data"] == 3
        async with request(port, "/sse/news?" + "&".join(["channel=room:1"] * 2)) as stream:  # a plain stream has one
            await stream.named("recovered")
            assert manager.stats().channels == 1


async def test_more_channels_than_one_may_have_are_refused_one_by_one() -> None:
    manager = ConnectionManager(limits=Limits(max_channels_per_connection=3))
    async with serving(manager=manager, authorize=lambda *_: True) as (_, port):
        query = "&".join(f"channel=c{number}" for number in range(3_000))
        async with request(port, f"/sse/news?events=1&{query}") as stream:
            said = [(await stream.event()).json for _ in range(102)]
            assert [each.get("code") for each in said] == [None] * 4 + ["limit_exceeded"] * 98
            await manager.broadcast("still here", channel="c1")
            assert (await stream.event()).json["data"] == "still here"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/event-stream"),
        ("*/*", "text/event-stream"),
        ("text/html, application/json;q=0.9", "application/json"),
        ("application/json", "application/json"),
        ("APPLICATION/JSON", "application/json"),
        ("application/json, text/event-stream", "text/event-stream"),
        ("application/*", "text/event-stream"),
        ("text/plain;application/json-seq", "text/event-stream"),
        ("application/jsonish", "text/event-stream"),
        (",;=", "text/event-stream"),
    ],
)
async def test_what_a_client_accepts(accept: str, kind: str) -> None:
    async with serving() as (_, port), request(port, "/sse/news?wait=0", Accept=accept) as answer:
        assert answer.status == 200
        assert answer.headers["content-type"].partition(";")[0] == kind


@pytest.mark.parametrize("wait", ["", "-1", "x", "1e3", "nan", "inf", "1.2.3", "٣", ".", "1 2"])
async def test_a_bad_wait_is_said(wait: str) -> None:
    path = f"/sse/news?wait={quote(wait)}"
    async with serving() as (_, port), request(port, path, Accept="application/json") as answer:
        assert answer.status == 422
        assert b"seconds" in await answer.whole()


# Long poll.


class Poller:
    """A client that polls a channel."""

    def __init__(self, port: int, channel: str = "news") -> None:
        self.port = port
        self.channel = channel
        self.position: str | None = None
        self.answers: list[Any] = []

    async def poll(self, wait: float = 20.0) -> Any:
        since = f"&since={self.position}" if self.position else ""
        path = f"/sse/{self.channel}?wait={wait:g}{since}"
        async with request(self.port, path, Accept="application/json") as answer:
            assert answer.status == 200
            assert answer.headers["cache-control"] == "no-store"
            found = await answer.json()
        self.position = found["position"]
        self.answers.append(found)
        return found


async def test_messages_that_come_together_are_answered_together() -> None:
    manager = ConnectionManager(history={"news": History(messages=50)})
    async with serving(manager=manager) as (_, port):
        poller = Poller(port)
        await poller.poll()
        polling = asyncio.create_task(poller.poll())

        async def waits() -> bool:
            return bool(manager.connections)

        await eventually(waits)
        for data in ("one", {"two": 2}, b"\xff"):
            await manager.broadcast(data, channel="news")
        answer = await polling
        assert [message["data"] for message in answer["messages"]] == ["one", {"two": 2}, "/w=="]
        assert answer["messages"][2]["encoding"] == "base64"
        assert answer["recovered"] is True
        assert answer["position"] == answer["messages"][2]["position"]


async def test_nothing_is_lost_or_doubled_over_many_polls() -> None:
    rng = random.Random(14)
    manager = ConnectionManager(history={"news": History(messages=10_000)})
    async with serving(manager=manager) as (_, port):
        poller = Poller(port)
        await poller.poll()
        for number in range(5000):
            await manager.broadcast(f"{number} " + "x" * rng.randrange(300), channel="news")

        async def go_on() -> None:
            for number in range(5000, 5600):
                await manager.broadcast(f"{number} ", channel="news")
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.01)

        going = asyncio.create_task(go_on())
        numbers: list[int] = []
        while len(numbers) < 5600:
            answer = await poller.poll(5)
            assert answer["recovered"] is True
            numbers += [int(message["data"].split()[0]) for message in answer["messages"]]
        await going
        assert numbers == list(range(5600))
        assert len(poller.answers) > 3


@pytest.mark.parametrize("hooks", [False, True])
async def test_a_poll_that_does_not_wait_gets_what_was_missed(hooks: bool) -> None:
    manager = ConnectionManager(history={"news": History(messages=10_000)})
    if hooks:

        @manager.on_deliver
        async def deliver(delivery: Delivery) -> None:
            await asyncio.sleep(0)

    async with serving(manager=manager) as (_, port):
        poller = Poller(port)
        await poller.poll(0)
        begin = poller.position
        for number in range(3000):
            await manager.broadcast(number, channel="news")
        numbers: list[int] = []
        while (answer := await poller.poll(0))["messages"]:
            assert answer["recovered"] is True
            numbers += [message["data"] for message in answer["messages"]]
        assert numbers == list(range(3000))
        headers: dict[str, Any] = {"Accept": "application/json", "Last_Event_ID": str(begin)}
        async with request(port, "/sse/news?wait=0", **headers) as response:
            assert (await response.json())["messages"][0]["data"] == 0


async def test_a_poll_that_does_not_wait_goes_past_what_is_not_for_it() -> None:
    async def user() -> str:
        return "ann"

    manager = ConnectionManager(history={"news": History(messages=10)})
    async with serving(manager=manager, authenticate=user) as (_, port):
        poller = Poller(port)
        await poller.poll(0)
        receipt = await manager.broadcast("not for ann", channel="news", exclude_users="ann")
        async with asyncio.timeout(3):
            answer = await poller.poll(0)
        assert (answer["recovered"], answer["messages"], answer["position"]) == (True, [], receipt.position)


async def test_a_channel_without_history_waits_for_what_comes() -> None:
    async with serving() as (manager, port):
        poller = Poller(port)
        polling = asyncio.create_task(poller.poll())

        async def waits() -> bool:
            return bool(manager.connections)

        await eventually(waits)
        await manager.broadcast("now", channel="news")
        answer = await polling
        assert [message["data"] for message in answer["messages"]] == ["now"]
        assert answer["position"] is None


async def test_plain_starlette_and_one_path_for_all() -> None:
    manager = ConnectionManager()
    app = Starlette(routes=create_routes(manager, "/ws/{channel}", http=True), lifespan=manager.lifespan)
    other = ConnectionManager()
    both = FastAPI()
    both.include_router(create_router(other, "/ws/{channel}", http=True))
    for each, keeper in ((app, manager), (both, other)):
        async with serve_here(each) as port:
            async with request(port, "/ws/news") as stream:
                await talk(keeper, stream)
            async with request(port, "/ws/news?wait=0", Accept="application/json") as answer:
                assert (await answer.json())["messages"] == []
            async with request(port, "/ws/news", "HEAD") as answer:
                assert answer.status == 200
            async with request(port, "/ws/news", "OPTIONS", Origin=f"http://127.0.0.1:{port}") as answer:
                assert answer.status == 204
            await gone(keeper)


async def test_many_streams_of_one_address_leave_nothing() -> None:
    manager = ConnectionManager(limits=Limits(max_connections_per_address=50))
    async with serving(manager=manager) as (_, port):
        streams = [request(port, "/sse/news") for _ in range(200)]
        answers = [await each.__aenter__() for each in streams]
        connections = [weakref.ref(each) for each in manager.connections]
        assert len(connections) == 50
        assert {answer.status for answer in answers} == {200}
        for each in streams:
            await each.__aexit__(None, None, None)
        await gone(manager)

        async def is_nothing_left() -> bool:  # the server's tasks end after that
            gc.collect()
            return all(each() is None for each in connections)

        await eventually(is_nothing_left)


async def test_what_finds_no_room_in_a_poll_and_is_not_kept_is_counted() -> None:
    manager = ConnectionManager()
    async with serving(manager=manager) as (_, port):

        async def poll() -> Any:
            async with request(port, "/sse/news?wait=10", Accept="application/json") as answer:
                return await answer.json()

        polling = asyncio.create_task(poll())

        async def is_there() -> bool:
            return bool(manager.connections)

        await eventually(is_there)
        for letter in "abc":
            manager.broadcast_nowait(letter * 200_000, channel="news")
        assert [each["data"][0] for each in (await polling)["messages"]] == ["a"]
        await gone(manager)
        assert manager.stats().dropped == {"closed": 2}


async def test_a_poller_keeps_its_place_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsbroadcast.web.http_streams.KEPT_SECONDS", 0.3)
    manager = ConnectionManager(limits=Limits(max_connections=2, max_connections_per_address=2))
    async with serving(manager=manager) as (_, port):

        async def poll(query: str = "") -> tuple[int, Any]:
            async with request(port, f"/sse/news?wait=0{query}", Accept="application/json") as answer:
                body = await answer.whole()
                return answer.status, json.loads(body) if answer.status == 200 else None

        names = []
        for _ in range(2):
            status, answer = await poll()
            assert status == 200
            names.append(answer["id"])
        for _ in range(3):
            for name in names:
                status, answer = await poll(f"&id={name}")
                assert (status, answer["id"]) == (200, name)
        assert (await poll())[0] == 429  # both places are kept
        assert (await poll("&id=" + "x" * 20))[0] == 429

        async def has_room() -> bool:
            return (await poll())[0] == 200

        await eventually(has_room)
        for name in ("short", "x" * 65, "a b" * 10, "%0A" * 20):  # is no name of ours: nothing is kept
            for _ in range(4):
                assert (await poll(f"&id={name.replace(' ', '%20')}"))[0] == 200


async def test_a_place_kept_by_a_poll_gives_way_to_a_newer_connection_of_its_user() -> None:
    async def user() -> str:
        return "ann"

    manager = ConnectionManager(limits=Limits(max_connections_per_user=1, when_full="oldest"))
    async with serving(manager=manager, authenticate=user) as (_, port):
        for _ in range(2):
            async with request(port, f"/sse/news?wait=0&id={'x' * 16}", Accept="application/json") as answer:
                assert answer.status == 200
        async with request(port, "/sse/news") as stream:
            assert (await stream.event()).name == "hello"


async def test_the_next_poll_takes_no_place_from_its_users_other_connections() -> None:
    async def user() -> str:
        return "ann"

    manager = ConnectionManager(limits=Limits(max_connections_per_user=2, when_full="oldest"))
    async with serving(manager=manager, authenticate=user) as (_, port), request(port, "/sse/news") as stream:
        assert (await stream.event()).name == "hello"
        name = "x" * 20
        for _ in range(3):
            async with request(port, f"/sse/news?wait=0&id={name}", Accept="application/json") as answer:
                assert (await answer.json())["id"] == name
        await manager.broadcast("still here", channel="news")
        assert (await stream.named("message")).data == "still here"


async def test_a_place_kept_by_a_poll_is_that_of_the_user_who_polled_last() -> None:
    async def user(connection: HTTPConnection) -> str:
        return connection.query_params["user"]

    manager = ConnectionManager(limits=Limits(max_connections_per_user=1))
    async with serving(manager=manager, authenticate=user) as (_, port):

        async def poll(user: str, name: str) -> int:
            path = f"/sse/news?wait=0&user={user}&id={name * 20}"
            async with request(port, path, Accept="application/json") as answer:
                return answer.status

        assert [await poll("ann", "x"), await poll("bob", "x")] == [200, 200]
        assert await poll("ann", "y") == 200  # she has left her first place to bob
        assert await poll("bob", "z") == 429


async def test_polls_of_one_name_at_once_count_each() -> None:
    manager = ConnectionManager(limits=Limits(max_connections_per_address=3), history={"news": History()})
    async with serving(manager=manager) as (_, port):
        position = await manager.position("news")

        async def poll() -> int:
            path = f"/sse/news?since={position}&id={'x' * 20}"
            async with request(port, path, Accept="application/json") as answer:
                return answer.status

        polls = [asyncio.create_task(poll()) for _ in range(20)]

        async def are_refused() -> bool:
            return sum(each.done() for each in polls) == 17

        await eventually(are_refused)
        await manager.broadcast("now", channel="news")
        assert sorted([await each for each in polls]) == [200] * 3 + [429] * 17
        await gone(manager)
        assert await poll() == 200  # one place is kept, by that name


def test_a_place_kept_by_a_poll_is_that_of_one_address() -> None:
    quotas = Quotas(Limits(max_connections_per_address=1), Violations(Counters()))
    kept = PollLease(quotas, "1.2.3.4", "x" * 20, 30.0)
    quotas.polls[kept.name] = kept
    assert quotas.admit("1.2.3.4", Poll("x" * 20, 30.0)) is kept
    quotas.polls[kept.name] = kept
    assert quotas.admit("1.2.3.5", Poll("x" * 20, 30.0)) is not kept


def test_the_documentation_of_the_app_names_what_a_request_may_say() -> None:
    app = FastAPI()
    app.include_router(create_router(ConnectionManager(), "/ws/{channel}", http=True))
    listen = app.openapi()["paths"]["/ws/{channel}"]["get"]
    said = {each["name"] for each in listen["parameters"] if each["in"] == "query"}
    assert said == {"since", "wait", "events", "channel", "presence", "id"}


async def test_nothing_is_told_where_nothing_is_counted() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=None, max_connections_per_address=None))
    path = "/sse/news?wait=0"
    async with serving(manager=manager) as (_, port), request(port, path, Accept="application/json") as answer:
        assert set(await answer.json()) == {"position", "recovered", "messages"}
