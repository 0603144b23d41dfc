"""Where the fast path is found on a real uvicorn, and where it falls back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvicorn
from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosedError

from tests.support.servers import eventually, serve_here
from wsbroadcast import ConnectionManager, FastPath


class WrapsReceive:
    """What OpenTelemetry's middleware does to `receive`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def wrapped() -> Any:
            return await receive()

        await self.app(scope, wrapped, send)


def endpoint_of(manager: ConnectionManager) -> Any:
    async def endpoint(websocket: WebSocket) -> None:
        async with manager.connect(websocket) as connection:
            async for message in connection:
                await manager.broadcast(message)

    return endpoint


def make_app(manager: ConnectionManager) -> FastAPI:
    app = FastAPI()
    app.add_api_websocket_route("/ws", endpoint_of(manager))
    return app


async def echo(manager: ConnectionManager, client: Any) -> dict[str, int]:
    await client.send("hello")
    assert await asyncio.wait_for(client.recv(), 5) == "hello"
    return manager.stats().sinks


async def test_wrapped_receive_falls_back() -> None:
    manager = ConnectionManager()
    app = make_app(manager)
    app.add_middleware(WrapsReceive)
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        assert await echo(manager, client) == {"asgi": 1}
        assert manager.stats().fast_path_refused == {"receive is wrapped": 1}


class Redacts:
    """A middleware that changes what is sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sender(event: Any) -> None:
            if "text" in event:
                event = {**event, "text": event["text"].replace("secret", "******")}
            await send(event)

        await self.app(scope, receive, sender if scope["type"] == "websocket" else send)


@pytest.mark.parametrize("where", ["app", "mounted", "route"])
async def test_wrapped_send_falls_back_so_that_it_sees_everything(where: str) -> None:
    manager = ConnectionManager()
    inner = make_app(manager)
    app: Any = inner
    if where == "app":
        app.add_middleware(Redacts)
    elif where == "mounted":
        app = FastAPI()
        app.mount("/", Redacts(inner))
    else:
        app = Starlette(routes=[WebSocketRoute("/ws", Redacts(WebSocketRoute("/ws", endpoint_of(manager)).app))])
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        await client.send("a secret")
        assert await asyncio.wait_for(client.recv(), 5) == "a ******"
        assert manager.stats().sinks == {"asgi": 1}
        assert manager.stats().fast_path_refused == {"send is wrapped": 1}


async def test_starlettes_own_layers_are_seen_through() -> None:
    """Handlers of exceptions, middlewares that leave WebSockets alone, apps in apps."""
    manager = ConnectionManager()
    app: Any = make_app(manager)
    for depth in range(3):
        app.add_exception_handler(KeyError, lambda websocket, error: None)
        app.add_middleware(BaseHTTPMiddleware, dispatch=lambda request, call_next: call_next(request))
        app.add_middleware(GZipMiddleware)
        outer: Any = FastAPI() if depth % 2 else Starlette()
        outer.mount("/", app)
        app = outer
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        assert await echo(manager, client) == {"uvicorn": 1}


async def test_sessions_of_starlette_are_seen_through() -> None:
    manager = ConnectionManager()
    app = make_app(manager)
    app.add_middleware(SessionMiddleware, secret_key="secret")
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        assert await echo(manager, client) == {"uvicorn": 1}


class RedactsUnderTheNameOfAnother(Redacts):
    """As decorators do it, it takes the name of what it wraps."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        @functools.wraps(send)
        async def sender(event: Any) -> None:
            if "text" in event:
                event = {**event, "text": event["text"].replace("secret", "******")}
            await send(event)

        await self.app(scope, receive, sender)


async def test_wrapper_under_the_name_of_starlettes_is_a_wrapper() -> None:
    manager = ConnectionManager()
    app = make_app(manager)
    app.add_middleware(RedactsUnderTheNameOfAnother)
    app.add_middleware(SessionMiddleware, secret_key="secret")
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        await client.send("a secret")
        assert await asyncio.wait_for(client.recv(), 5) == "a ******"


async def test_fast_path_layer_passes_by_nothing_that_is_around_it() -> None:
    manager = ConnectionManager()
    app = Redacts(FastPath(make_app(manager)))
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        await client.send("a secret")
        assert await asyncio.wait_for(client.recv(), 5) == "a ******"
        assert manager.stats().fast_path_refused == {"send is wrapped": 1}


@pytest.mark.parametrize("middleware", [Redacts, WrapsReceive])
async def test_fast_path_layer_keeps_it_around_what_wraps_send_or_receive(middleware: Any) -> None:
    manager = ConnectionManager()
    app = make_app(manager)
    app.add_middleware(middleware)
    async with serve_here(FastPath(app)) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        assert await echo(manager, client) == {"uvicorn": 1}


async def test_fast_path_over_a_unix_socket(tmp_path: Path) -> None:
    manager = ConnectionManager()
    path = tmp_path / "app.sock"
    server = uvicorn.Server(uvicorn.Config(make_app(manager), uds=str(path), log_level="warning"))
    serving = asyncio.create_task(server.serve())
    try:
        await eventually(lambda: asyncio.sleep(0, server.started))
        async with unix_connect(str(path), "ws://localhost/ws") as client:
            assert await echo(manager, client) == {"uvicorn": 1}
    finally:
        server.should_exit = True
        await serving


def certificate_in(folder: Path) -> tuple[str, ssl.SSLContext]:
    """Write a certificate with its key, and return the file and the context of a client that trusts it."""
    authority = trustme.CA()
    path = folder / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return str(path), trust


async def test_fast_path_over_tls(tmp_path: Path) -> None:
    certificate, trust = certificate_in(tmp_path)
    manager = ConnectionManager()
    async with (
        serve_here(make_app(manager), ssl_certfile=certificate) as port,
        connect(f"wss://127.0.0.1:{port}/ws", ssl=trust, max_size=None) as client,
    ):
        assert await echo(manager, client) == {"uvicorn": 1}
        big = "x" * 3_000_000
        await manager.broadcast(big)
        assert await asyncio.wait_for(client.recv(), 10) == big


async def test_peer_that_is_gone_over_tls_costs_the_others_nothing(tmp_path: Path) -> None:
    certificate, trust = certificate_in(tmp_path)
    manager = ConnectionManager()
    app = FastAPI()
    leave = asyncio.Event()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await leave.wait()  # doesn't read, so nobody learns that a peer is gone until something is sent

    async with (
        serve_here(app, ssl_certfile=certificate) as port,
        connect(f"wss://127.0.0.1:{port}/ws", ssl=trust) as one,
        connect(f"wss://127.0.0.1:{port}/ws", ssl=trust) as gone,
        connect(f"wss://127.0.0.1:{port}/ws", ssl=trust) as two,
    ):
        await eventually(lambda: asyncio.sleep(0, len(manager.connections) == 3))
        await gone.close()
        for number in range(3):
            await manager.broadcast(f"hello {number}")
            await asyncio.sleep(0)
        for client in (one, two):
            assert [await asyncio.wait_for(client.recv(), 5) for _ in range(3)] == ["hello 0", "hello 1", "hello 2"]
        await eventually(lambda: asyncio.sleep(0, len(manager.connections) == 2))
        leave.set()


async def rest(client: ClientConnection) -> list[str | bytes]:
    received: list[str | bytes] = []
    with contextlib.suppress(ConnectionClosedError):
        async for message in client:
            received.append(message)  # noqa: PERF401  # what came before the error counts
    return received


async def test_app_s_own_close_lets_what_waits_for_the_turn_go_first() -> None:
    manager = ConnectionManager()
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        manager.broadcast_nowait("last words")
        await websocket.close(4000)
        manager.broadcast_nowait("too late")

    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/ws") as client:
        assert await rest(client) == ["last words"]
        assert client.close_code == 4000


@pytest.mark.parametrize("end", ["abort", "shutdown", "reset"])
async def test_connection_that_ends_before_the_turn_does_raises_nothing(
    end: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = ConnectionManager()
    async with (
        serve_here(make_app(manager)) as port,
        connect(f"ws://127.0.0.1:{port}/ws") as client,
        connect(f"ws://127.0.0.1:{port}/ws") as other,
    ):
        await eventually(lambda: asyncio.sleep(0, len(manager.connections) == 2))
        protocol = manager.connections[0].websocket._receive.__self__  # type: ignore[attr-defined]
        manager.broadcast_nowait("to whoever is there")
        if end == "abort":
            protocol.transport.abort()
        elif end == "shutdown":  # what SIGTERM makes uvicorn do
            protocol.shutdown()
        else:
            client.transport.abort()
        assert await asyncio.wait_for(other.recv(), 5) == "to whoever is there"
        await eventually(lambda: asyncio.sleep(0, len(manager.connections) == 1))
        received = await rest(client) if end == "shutdown" else []
        assert received == []  # nothing behind the close frame
        assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
