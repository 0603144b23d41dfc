"""The end of an endpoint ends its connection: at the end of the ASGI call, however it was connected."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import fastapi
import pytest
from fastapi import Depends, FastAPI, WebSocket, WebSocketException
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Mount, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, eventually, turns, visit
from wsbroadcast import (
    Connection,
    ConnectionClosed,
    ConnectionManager,
    FastPath,
    Limits,
    PermissionDenied,
    SlowConsumer,
)
from wsbroadcast.transports.exit_stack import Exits

Endpoint = Callable[[WebSocket], Awaitable[None]]


def app_of(endpoint: Endpoint, **options: Any) -> FastAPI:
    app = FastAPI(**options)
    app.add_api_websocket_route("/ws", endpoint)
    return app


async def run(app: Any, peer: Peer | None = None) -> Peer:
    """Run an app's endpoint to its end; what it raises is its own affair."""
    peer = peer or Peer()
    async with asyncio.timeout(5):
        try:
            await app(peer.scope, peer.receive, peer.send)
        except (Exception, asyncio.CancelledError):
            pass
    return peer


async def test_fastapi_has_the_exit_stack() -> None:
    stacks: list[object] = []

    async def endpoint(websocket: WebSocket) -> None:
        stacks.append(websocket.scope.get("fastapi_middleware_astack"))
        await websocket.accept()

    await run(app_of(endpoint))
    assert isinstance(stacks[0], AsyncExitStack), f"FastAPI {fastapi.__version__} has it no longer"


@pytest.mark.parametrize(("error", "code"), [(None, 1000), (ValueError(), 1011)])
async def test_connection_of_an_endpoint_that_never_disconnects_is_gone_with_it(
    manager: ConnectionManager, error: Exception | None, code: int
) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)

    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket, channels=["room"])
        if error is not None:
            raise error

    peer = await run(app_of(endpoint))
    assert manager.connections == []
    assert peer.close_code == code
    await eventually(lambda: len(ended) == 1)
    assert ended[0].close_code == peer.close_code
    assert manager.stats().channels == 0


async def test_an_own_close_keeps_its_code(manager: ConnectionManager) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await websocket.close(4009)

    peer = await run(app_of(endpoint))
    assert [event["code"] for event in peer.sent if event["type"] == "websocket.close"] == [4009]


async def test_close_of_the_apps_own_in_another_task_is_waited_for(manager: ConnectionManager) -> None:
    peer, closing = Peer(), asyncio.Event()

    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        peer.stall()
        await manager.broadcast("held")
        tasks.append(asyncio.create_task(websocket.close(4009)))
        await turns()
        closing.set()

    tasks: list[asyncio.Task[None]] = []
    call = asyncio.create_task(run(app_of(endpoint), peer))
    await closing.wait()
    await turns(100)
    assert not call.done()
    peer.resume()
    await call
    assert (peer.messages, peer.close_code) == (["held"], 4009)


async def test_exception_handlers_speak_before_it(manager: ConnectionManager) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        raise ValueError

    async def handle(websocket: WebSocket, error: Exception) -> None:
        await manager.send(websocket, "sorry")
        await websocket.close(4009)

    app = app_of(endpoint)
    app.add_exception_handler(ValueError, handle)
    peer = await run(app)
    assert (peer.messages, peer.close_code) == (["sorry"], 4009)


async def test_websocket_exception_keeps_its_code(manager: ConnectionManager) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        raise WebSocketException(4008)

    assert (await run(app_of(endpoint))).close_code == 4008


@pytest.mark.parametrize(
    ("error", "code"),
    [(WebSocketException(4123), 4123), (PermissionDenied("no"), 1008), (WebSocketException(1005), 1011)],
)
async def test_exception_in_a_task_group_keeps_a_code_that_can_be_sent(
    manager: ConnectionManager, error: Exception, code: int
) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)  # a task that starts eagerly would fail inside `create_task`, in the endpoint itself
        raise error

    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    assert (await run(app_of(endpoint))).close_code == code


@pytest.mark.parametrize("scope", [None, "function"])
async def test_dependency_may_connect_and_speak_in_its_teardown(manager: ConnectionManager, scope: Any) -> None:
    async def connected(websocket: WebSocket) -> AsyncIterator[Connection]:
        connection = await manager.connect(websocket)
        try:
            yield connection
        finally:
            await manager.broadcast("from the teardown")

    depends = Depends(connected) if scope is None else Depends(connected, scope=scope)

    async def endpoint(connection: Any = depends) -> None:
        await manager.broadcast("from the endpoint")

    peer = await run(app_of(endpoint))
    assert (peer.messages, peer.close_code) == (["from the endpoint", "from the teardown"], 1000)


async def test_task_that_outlives_its_endpoint_is_told(manager: ConnectionManager) -> None:
    errors: list[Exception] = []
    tasks: list[asyncio.Task[None]] = []
    is_over = asyncio.Event()

    async def later(connection: Connection) -> None:
        await is_over.wait()
        try:
            await connection.send("too late")
        except ConnectionClosed as error:
            errors.append(error)

    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.connect(websocket)
        tasks.append(asyncio.create_task(later(connection)))

    await run(app_of(endpoint))
    is_over.set()
    await asyncio.wait_for(tasks[0], 5)
    assert [error.code for error in errors if isinstance(error, ConnectionClosed)] == [1000]


async def test_connection_after_another_on_the_same_socket_is_not_ended_by_the_first(
    manager: ConnectionManager,
) -> None:
    seen: list[bool] = []

    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        manager.disconnect(websocket)
        connection = await manager.connect(websocket)
        await manager.broadcast("once")
        await asyncio.sleep(0)
        seen.append(connection.is_open)

    peer = await run(app_of(endpoint))
    assert (seen, peer.messages, peer.close_code) == ([True], ["once"], 1000)
    assert [event["type"] for event in peer.sent].count("websocket.close") == 1


async def test_two_managers_on_one_socket_close_it_once(manager: ConnectionManager) -> None:
    async with ConnectionManager() as other:

        async def endpoint(websocket: WebSocket) -> None:
            await manager.connect(websocket)
            await other.connect(websocket)
            await manager.broadcast("one")
            await other.broadcast("two")

        peer = await run(app_of(endpoint))
        assert sorted(peer.messages, key=str) == ["one", "two"]
        assert [event["type"] for event in peer.sent].count("websocket.close") == 1
        assert (manager.connections, other.connections) == ([], [])


async def test_stalled_peer_does_not_hold_up_the_end_for_long() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(close_timeout=0.05)) as manager:
        peer = Peer()

        async def endpoint(websocket: WebSocket) -> None:
            await manager.connect(websocket)
            peer.stall()
            await manager.broadcast("held")

        await run(app_of(endpoint), peer)
        assert manager.connections == []
        peer.resume()


def test_starlette_learns_it_from_the_lifespan() -> None:
    manager = ConnectionManager()

    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await manager.broadcast("last")

    routes = [WebSocketRoute("/ws", endpoint), Mount("/sub", Starlette(routes=[WebSocketRoute("/ws", endpoint)]))]
    with TestClient(Starlette(routes=routes, lifespan=manager.lifespan)) as client:
        for path in ("/ws", "/sub/ws"):
            with client.websocket_connect(path) as websocket:
                assert websocket.receive_text() == "last"
                with pytest.raises(WebSocketDisconnect) as end:
                    websocket.receive_text()
                assert end.value.code == 1000
        assert manager.stats().disconnects == 2


async def test_middleware_that_connects_is_an_endpoint_too() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))

    class Connects:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            websocket = WebSocket(scope, receive, send)
            await manager.connect(websocket)
            await manager.broadcast("last")

    app = FastAPI()
    app.add_middleware(Connects)
    app.middleware_stack = app.build_middleware_stack()  # as a server's lifespan does it
    async with manager.lifespan(app):
        for _ in range(3):
            peer = await run(app)
            assert (peer.messages, peer.close_code) == (["last"], 1000)


async def test_starlette_learns_it_from_the_fast_path(manager: ConnectionManager) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await manager.broadcast("last")

    peer = await run(FastPath(Starlette(routes=[WebSocketRoute("/ws", endpoint)])))
    assert (peer.messages, peer.close_code) == (["last"], 1000)


@pytest.mark.parametrize("outer", [FastAPI, Starlette])
async def test_mounted_app_learns_it(manager: ConnectionManager, outer: type[Starlette]) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await manager.broadcast("last")

    app = outer()
    app.mount("/sub", app_of(endpoint))
    peer = await run(app, Peer("/sub/ws"))
    assert (peer.messages, peer.close_code) == (["last"], 1000)


# Who is out of the registry.


@pytest.mark.parametrize("who", ["hook", "another task"])
async def test_removed_connection_is_read_no_longer(manager: ConnectionManager, who: str) -> None:
    published: list[str] = []

    @manager.on_message
    async def remove(connection: Connection, message: str | bytes) -> None:
        if message == "out":
            manager.disconnect(connection)

    async def endpoint(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        try:
            while True:
                text = await websocket.receive_text()
                if text == "out, says another task":
                    await asyncio.create_task(asyncio.to_thread(lambda: None))
                    manager.disconnect(websocket)
                published.append(text)
        except WebSocketDisconnect:
            pass

    async with visit(app_of(endpoint), "/ws") as peer:
        for text in ("one", "out" if who == "hook" else "out, says another task", "two", "three"):
            peer.say(text)
        assert await peer.wait_close() == 1000
        await turns()
    assert [text for text in published if not text.startswith("out")] == ["one"]


# Hooks that are told.


@pytest.mark.parametrize("ends", ["disconnect", "aclose"])
async def test_hook_that_hangs_for_each_channel_holds_up_the_end_once(ends: str) -> None:
    """20 channels and a timeout of half a second: not ten seconds."""
    told: list[str] = []
    manager = ConnectionManager(hook_timeout=0.5)
    await manager.start()

    @manager.on_unsubscribe
    async def hangs(connection: Connection, channel: str) -> None:
        told.append(channel)
        await asyncio.Event().wait()

    manager.on_disconnect(lambda connection: told.append("on_disconnect"))
    names = [f"channel-{number:02}" for number in range(20)]
    await manager.connect(Peer().websocket, channels=names)
    async with asyncio.timeout(5):
        if ends == "aclose":
            await manager.aclose()
        else:
            manager.disconnect(manager.connections[0])
            await eventually(lambda: told[-1:] == ["on_disconnect"])
    assert told == [*names, "on_disconnect"]  # each was told, and cut off where it waits
    assert manager.stats().hook_errors == 20
    await manager.aclose()


async def test_every_exit_of_a_call_runs_whatever_another_raises() -> None:
    ran: list[str] = []
    exits = Exits()

    async def last(*error: object) -> None:
        ran.append("last")

    async def failing(*error: object) -> None:
        ran.append("failing")
        raise ValueError("of the first that failed")

    exits.push_async_exit(last)
    exits.push_async_exit(failing)
    with pytest.raises(ValueError, match="of the first that failed"):
        await exits.close(None)
    assert ran == ["failing", "last"]
