"""The troubleshooting page: each message that it quotes is really written, and what it says of a cause is so."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException, WebSocket, WebSocketException
from starlette.testclient import TestClient
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.support.asgi import Peer, eventually
from tests.support.brokers.processes import wait_until
from tests.support.servers import serve_here
from tests.support.web import router_app
from tests.test_docs import PAGES, blocks_of
from wsbroadcast import (
    HOLD_BACK,
    Audience,
    Connection,
    ConnectionDep,
    ConnectionManager,
    History,
    HoldBack,
    Limits,
    ManagerDep,
    Message,
    PermissionDenied,
    SlowConsumer,
    create_router,
)
from wsbroadcast.testing import Cluster
from wsbroadcast.testing import Peer as Client

PAGE = "docs/troubleshooting.md"
QUOTES = [block.source.strip() for block in blocks_of(PAGE, "text")]

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch


def said_by(call: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # its text is what is asked for
        call()
    return str(caught.value)


# What makes the messages. Each returns what was raised, or leaves it in the log.


async def origin(log: Log, patch: Patch) -> None:
    with TestClient(router_app(ConnectionManager())) as client, pytest.raises(Exception):  # noqa: B017, PT011
        client.websocket_connect("/ws", headers={"origin": "http://localhost:5173"}).__enter__()


async def no_websocket_library(log: Log, patch: Patch) -> None:
    async with serve_here(router_app(ConnectionManager()), ws="none") as port:
        patch.setattr(logging.getLogger("uvicorn"), "propagate", True)  # where `log` hears it
        assert await status_of(port, "/ws") == 404


async def not_bound(log: Log, patch: Patch) -> str:
    app = FastAPI()

    @app.get("/")
    async def route(manager: ManagerDep) -> None: ...

    with TestClient(app) as client:
        return said_by(lambda: client.get("/"))


async def not_connected(log: Log, patch: Patch) -> str:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.receive_text()

    with TestClient(app) as client:
        return said_by(client.websocket_connect("/ws").__enter__)


async def other_loop(log: Log, patch: Patch) -> str:
    manager = ConnectionManager()
    with TestClient(router_app(manager)):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            await manager.broadcast("hello")
        return str(caught.value)


async def not_awaited(log: Log, patch: Patch) -> str:
    with pytest.warns(RuntimeWarning) as caught:
        ConnectionManager().broadcast("hello")  # type: ignore[unused-coroutine]
    (warning,) = caught
    return f"{warning.category.__name__}: {warning.message}"


async def several_workers(log: Log, patch: Patch) -> None:
    patch.setenv("WEB_CONCURRENCY", "4")
    async with ConnectionManager():
        pass


async def slow(log: Log, patch: Patch) -> None:
    peer = Peer()
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=2, close_timeout=0.01)) as manager:
        await manager.connect(peer.websocket)
        peer.stall()
        for _ in range(4):
            manager.broadcast_nowait("hello")
            await asyncio.sleep(0)
        await eventually(lambda: not manager.connections)


async def closed_before(log: Log, patch: Patch) -> str:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()
        await websocket.send_text("hello")

    def visit() -> None:
        with TestClient(app) as client, client.websocket_connect("/ws"):
            pass

    return said_by(visit)


async def in_a_thread(log: Log, patch: Patch) -> str:
    manager = ConnectionManager()
    return await asyncio.to_thread(said_by, lambda: manager.broadcast_nowait("hello"))


async def in_its_own_loop(log: Log, patch: Patch) -> str:
    async with ConnectionManager() as manager:
        return said_by(lambda: manager.broadcast_threadsafe("hello"))


async def not_started(log: Log, patch: Patch) -> str:
    return await asyncio.to_thread(said_by, lambda: ConnectionManager().broadcast_threadsafe("hello"))


async def closed(log: Log, patch: Patch) -> str:
    async with ConnectionManager() as manager:
        pass
    return said_by(lambda: manager.broadcast_nowait("hello"))


# In the order of the page.
SCENES: list[Callable[[Log, Patch], Awaitable[str | None]]] = [
    origin,
    no_websocket_library,
    not_bound,
    not_connected,
    other_loop,
    not_awaited,
    several_workers,
    slow,
    closed_before,
    other_loop,
    in_a_thread,
    in_its_own_loop,
    not_started,
    closed,
]


@pytest.mark.parametrize(
    ("quote", "scene"), [*zip(QUOTES, SCENES, strict=True)], ids=lambda it: getattr(it, "__name__", "")
)
async def test_quoted_message_is_written(
    quote: str, scene: Callable[[Log, Patch], Awaitable[str | None]], caplog: Log, monkeypatch: Patch
) -> None:
    caplog.set_level(logging.WARNING)
    raised = await scene(caplog, monkeypatch)
    messages = [raised] if raised is not None else [record.getMessage() for record in caplog.records]
    pattern = re.compile(re.escape(quote).replace("…", ".+"))
    assert [message for message in messages if pattern.fullmatch(message)], messages


# Statuses and codes, from a real server.


async def status_of(port: int, path: str, **headers: str) -> int:
    """Return the status of a handshake; 101 if it succeeds."""
    try:
        async with connect(f"ws://127.0.0.1:{port}{path}", proxy=None, additional_headers=headers):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


async def end_of(port: int, path: str, *messages: str | bytes) -> tuple[int | None, str | None]:
    """Connect, say something, and return the code and the reason of the end."""
    async with asyncio.timeout(10), connect(f"ws://127.0.0.1:{port}{path}", proxy=None) as client:
        with suppress(ConnectionClosed):
            for message in messages:
                await client.send(message)
            while True:
                await client.recv()
    return client.close_code, client.close_reason


async def test_handshakes_are_refused_with_what_the_page_says(caplog: Log) -> None:
    caplog.set_level(logging.CRITICAL, "uvicorn")
    manager = ConnectionManager(limits=Limits(max_connections_per_user=1, max_connections=3))
    app = FastAPI(lifespan=manager.lifespan)

    def nobody() -> None: ...

    def ada() -> str:
        return "ada"

    def forbidden() -> str:
        raise HTTPException(403)

    def no(connection: object, action: str, channel: str | None) -> bool:
        return False

    app.include_router(create_router(manager, "/ws"))
    app.include_router(create_router(manager, "/rooms/{room}"))
    app.include_router(create_router(manager, "/denied/{room}", authorize=no))
    app.include_router(create_router(manager, "/nobody", authenticate=nobody))
    app.include_router(create_router(manager, "/ada", authenticate=ada))
    app.include_router(create_router(manager, "/forbidden", authenticate=forbidden))

    @app.websocket("/parameter")
    async def parameter(websocket: WebSocket, number: int) -> None: ...

    @app.websocket("/refuses")
    async def refuses(websocket: WebSocket) -> None:
        raise WebSocketException(1008)

    async with serve_here(app) as port:
        elsewhere = {"origin": f"http://localhost:{port}"}
        assert await status_of(port, "/ws") == 101
        assert await status_of(port, "/ws", **elsewhere) == 403
        for path in ("/nowhere", "/ws/", "/parameter", "/parameter?number=x", "/refuses", "/forbidden", "/denied/tea"):
            assert (path, await status_of(port, path)) == (path, 403)
        assert await status_of(port, "/rooms/" + "x" * 201) == 403
        assert await status_of(port, "/nobody") == 401
        async with connect(f"ws://127.0.0.1:{port}/ada", proxy=None):
            assert await status_of(port, "/ada") == 429
            async with (
                connect(f"ws://127.0.0.1:{port}/ws", proxy=None),
                connect(f"ws://127.0.0.1:{port}/ws", proxy=None),
            ):
                assert await status_of(port, "/ws") == 503
        assert manager.stats().limited == {"max_connections_per_user": 1, "max_connections": 1}


async def test_connections_end_with_what_the_page_says(caplog: Log) -> None:
    caplog.set_level(logging.CRITICAL, "uvicorn")
    manager = ConnectionManager(limits=Limits(max_inbound_rate=0.001, inbound_burst=1))
    app = FastAPI(lifespan=manager.lifespan)
    app.include_router(create_router(manager, "/json", accepts="json"))
    app.include_router(create_router(manager, "/text", accepts="text"))

    @app.websocket("/returns")
    async def returns(connection: ConnectionDep) -> None: ...

    @app.websocket("/raises")
    async def raises(connection: ConnectionDep) -> None:
        raise HTTPException(404)

    @app.websocket("/parameter")
    async def parameter(connection: ConnectionDep, number: int) -> None: ...

    @app.websocket("/denies")
    async def denies(connection: ConnectionDep) -> None:
        raise PermissionDenied("too late")

    rows = {
        (int(code), reason)
        for code, reasons in re.findall(r"^\| (\d{4}) \| ?([^|]*?) ?\|", PAGES[PAGE], re.MULTILINE)
        for reason in reasons.split(", ")
    }
    async with serve_here(app) as port:
        ends = [
            await end_of(port, "/returns"),
            await end_of(port, "/raises"),
            await end_of(port, "/parameter"),
            await end_of(port, "/text", b"bytes"),
            await end_of(port, "/json", "{broken"),
            await end_of(port, "/text", "x" * 65_537),
        ]
        assert [code for code, _ in ends] == [1000, 1011, 1011, 1003, 1007, 1009]
        assert rows.issuperset(ends)
        assert await end_of(port, "/denies") == (1008, "too late")
        assert await end_of(port, "/text", "one", "two") == (1008, "too many messages (max_inbound_rate)")
    async with ConnectionManager(limits=Limits(max_connections_per_user=1, when_full="oldest")) as one_each:
        async with asyncio.timeout(10):
            first = await one_each.connect(Peer().websocket, user="ada")
            await one_each.connect(Peer().websocket, user="ada")
            await first.wait_closed()
        assert first.close_code == 4409
        assert (first.close_code, first.close_reason) in rows
    assert rows >= {
        (1008, "too many messages (max_inbound_rate)"),
        (1008, "too many messages (max_router_inbound_rate)"),
        (1012, ""),
        (1013, "slow consumer"),
        (1011, "keepalive ping timeout"),
    }


# What `stats` tells of a message that nobody gets.


async def test_stats_tell_why_nobody_gets_a_message() -> None:
    peer = Peer()
    async with ConnectionManager() as manager:
        connection = await manager.connect(peer.websocket, channels=["news"])
        await manager.broadcast("hello", channel="News")
        stats = manager.stats()
        assert (stats.broadcasts, stats.deliveries) == (1, 0)
        await manager.broadcast("hello", channel="news")
        await peer.next()
        stats = manager.stats()
        assert (stats.broadcasts, stats.deliveries) == (2, 1)
        assert connection.channels == {"news"}

        @manager.on_broadcast
        async def holds_back(message: Message, audience: Audience) -> HoldBack:
            return HOLD_BACK

        await manager.broadcast("hello", channel="news")
        stats = manager.stats()
        assert (stats.broadcasts, stats.vetoed) == (2, 1)


async def test_on_message_runs_only_where_the_endpoint_reads() -> None:
    heard: list[Any] = []
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    done = threading.Event()

    @manager.on_message
    async def hear(connection: Connection, message: str | bytes) -> None:
        heard.append(message)

    @app.websocket("/deaf")
    async def deaf(connection: ConnectionDep) -> None:
        await asyncio.to_thread(done.wait)

    @app.websocket("/reads")
    async def reads(connection: ConnectionDep) -> None:
        await connection.wait_closed()

    with TestClient(app) as client:
        with client.websocket_connect("/deaf") as socket:
            socket.send_text("one")
            done.set()
        with client.websocket_connect("/reads") as socket:
            socket.send_text("two")
            await asyncio.to_thread(wait_until, lambda: heard == ["two"])


def test_client_without_with_gives_each_socket_a_loop_of_its_own() -> None:
    manager = ConnectionManager()
    client = TestClient(router_app(manager))
    with client.websocket_connect("/ws"):
        assert "another event loop" in said_by(client.websocket_connect("/ws").__enter__)
    with TestClient(router_app(manager)) as client, client.websocket_connect("/ws"), client.websocket_connect("/ws"):
        pass
    with TestClient(router_app(manager)) as client, client.websocket_connect("/ws"):  # the app has ended once
        pass


# What comes back, and what tests leave behind.


async def recovery_at(manager: ConnectionManager, since: str) -> tuple[bool, str]:
    """Come back to a channel, and return what becomes of what was missed."""
    connection = await manager.connect(Peer().websocket, channels=["news"], since=since)
    recovered = connection.recovered["news"]
    manager.disconnect(connection.websocket)
    return recovered.recovered, recovered.reason


async def position_of(manager: ConnectionManager) -> str:
    return str(await manager.position("news"))


async def test_reasons_of_the_page_are_those_of_its_causes() -> None:
    kept = {"*": History(messages=3, seconds=300, remember=300, max_kept_bytes=100)}
    async with ConnectionManager(history=kept) as one, ConnectionManager(history=kept) as other:
        await one.broadcast("first", channel="news")
        await other.broadcast("first", channel="news")
        since = await position_of(one)
        await one.broadcast("second", channel="news")
        told = {
            "come back": await recovery_at(one, since),
            "another worker": await recovery_at(other, since),
            "no position": await recovery_at(one, "x"),
        }
        await one.broadcast("x" * 101, channel="news")
        told["too large"] = await recovery_at(one, since)
        await one.forget("news")
        told["forgotten"] = await recovery_at(one, since)
        since = await position_of(one)
        for number in range(4):
            await one.broadcast(number, channel="news")
        told["too many"] = await recovery_at(one, since)
        assert one.stats().refused_recoveries == {"epoch": 2, "expired": 1, "too_many": 1}
    async with ConnectionManager(history={"talk": History()}) as other:
        told["no history"] = await recovery_at(other, since)
    async with Cluster(1, history=kept) as cluster:
        manager = cluster[0]
        since = await position_of(manager)
        await manager.broadcast("missed", channel="news")
        await cluster.advance(301)
        told["too old"] = await recovery_at(manager, since)
        cluster.partition()
        told["outage"] = await recovery_at(manager, since)
    assert told == {
        "come back": (True, ""),
        "another worker": (False, "epoch"),
        "no position": (False, "epoch"),
        "too large": (False, "expired"),
        "forgotten": (False, "epoch"),
        "too many": (False, "too_many"),
        "too old": (False, "expired"),
        "outage": (False, "unavailable"),
        "no history": (False, "not_kept"),
    }


async def test_peer_finds_what_a_lifespan_yields_only_where_it_runs() -> None:
    manager = ConnectionManager(history=History())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        async with manager:
            yield {"greeting": "hello"}

    app = FastAPI(lifespan=lifespan)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket, channels=["news"])
        await manager.broadcast(websocket.state.greeting, channel="news")

    with pytest.raises(AttributeError, match="'State' object has no attribute 'greeting'"):
        async with Client(app, "/ws"):
            pass
    async with app.router.lifespan_context(app) as state, Client(app, "/ws", state=state) as peer:
        assert await peer.receive() == "hello"
        assert len((await manager.history("news")).messages) == 1
    async with manager:
        assert not (await manager.history("news")).messages


def test_history_outlives_a_test_that_ends_no_manager() -> None:
    manager = ConnectionManager(history=History())

    async def test() -> int:
        await manager.broadcast("hello", channel="news")
        return len((await manager.history("news")).messages)

    assert [asyncio.run(test()), asyncio.run(test())] == [1, 2]
