"""The manager and the connection as FastAPI dependencies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket, WebSocketDisconnect, WebSocketException
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.exceptions import WebSocketException as StarletteException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.websockets import WebSocketDisconnect as StarletteDisconnect

from tests.support.asgi import Peer, Refused, eventually, lifespan, visit
from wsbroadcast import (
    ConfigurationError,
    Connection,
    ConnectionDep,
    ConnectionManager,
    ManagerDep,
    PermissionDenied,
    connection_dependency,
    create_router,
    create_routes,
    get_connection,
    get_manager,
)

# ManagerDep.


def _announcing_app(manager: ConnectionManager | None) -> FastAPI:
    app = FastAPI() if manager is None else FastAPI(lifespan=manager.lifespan)

    @app.post("/announce")
    async def announce(text: str, manager: ManagerDep) -> int:
        await manager.broadcast(text)
        return manager.stats().connections

    @app.post("/announce-sync")
    def announce_from_a_thread(text: str, manager: ManagerDep) -> None:
        manager.broadcast_threadsafe(text)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, manager: ManagerDep) -> None:
        async with manager.connect(websocket) as connection:
            await connection.wait_closed()

    return app


def test_manager_dep_works_on_http_and_websocket_routes() -> None:
    manager = ConnectionManager()
    with TestClient(_announcing_app(manager)) as client, client.websocket_connect("/ws") as websocket:
        assert client.post("/announce?text=hello").json() == 1
        assert websocket.receive_text() == "hello"
        assert client.post("/announce-sync?text=from a thread").status_code == 200
        assert websocket.receive_text() == "from a thread"
    assert manager.stats().connections == 0


def test_manager_dep_without_a_manager_says_what_to_do() -> None:
    with TestClient(_announcing_app(None)) as client:
        with pytest.raises(ConfigurationError, match="lifespan"):
            client.post("/announce?text=hello")
        with pytest.raises(ConfigurationError, match=r"manager\.bind"), client.websocket_connect("/ws"):
            pass


def test_manager_dep_finds_a_manager_that_was_bound_by_hand() -> None:
    app = _announcing_app(None)
    ConnectionManager().bind(app)
    with TestClient(app) as client:
        assert client.post("/announce?text=hello").json() == 0


def test_manager_dep_is_replaced_by_dependency_overrides() -> None:
    app = _announcing_app(ConnectionManager())
    other = ConnectionManager()
    app.dependency_overrides[get_manager] = lambda: other
    with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
        assert client.post("/announce?text=hello").json() == 1
        assert websocket.receive_text() == "hello"
        assert other.stats().connects == 1


def test_each_app_has_its_own_manager() -> None:
    first, second = ConnectionManager(), ConnectionManager()
    with TestClient(_announcing_app(first)) as a, TestClient(_announcing_app(second)) as b:
        a.post("/announce?text=hello")
        b.post("/announce?text=hello")
        b.post("/announce?text=hello")
    assert (first.stats().broadcasts, second.stats().broadcasts) == (1, 2)


# Apps that are mounted: nobody runs their lifespan.


@asynccontextmanager
async def _own_lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with MANAGERS[0].lifespan(app):
        yield


MANAGERS: list[ConnectionManager] = []


def _bound_by_lifespan(manager: ConnectionManager, child: Any) -> Any:
    app = FastAPI(lifespan=manager.lifespan)
    app.mount("/sub", child)
    return app


def _bound_by_a_lifespan_of_ones_own(manager: ConnectionManager, child: Any) -> Any:
    MANAGERS[:] = [manager]
    app = FastAPI(lifespan=_own_lifespan)
    app.mount("/sub", child)
    return app


def _bound_by_hand(manager: ConnectionManager, child: Any) -> Any:
    app = FastAPI()
    manager.bind(app)
    app.mount("/sub", child)
    return app


def _bound_by_a_router(manager: ConnectionManager, child: Any) -> Any:
    app = FastAPI()
    app.mount("/sub", child)
    app.include_router(create_router(manager, "/router"))
    return app


def _in_starlette(manager: ConnectionManager, child: Any) -> Any:
    return Starlette(routes=[Mount("/sub", child)], lifespan=manager.lifespan)


def _behind_a_middleware(manager: ConnectionManager, child: Any) -> Any:
    return _bound_by_lifespan(manager, GZipMiddleware(child))


def _two_deep(manager: ConnectionManager, child: Any) -> Any:
    middle = FastAPI()
    middle.mount("/sub", child)
    app = FastAPI(lifespan=manager.lifespan)
    app.mount("", middle)
    return app


def _router_in_the_child(manager: ConnectionManager, child: Any) -> Any:
    child.include_router(create_router(manager, "/router"))
    app = FastAPI()
    app.mount("/sub", child)
    return app


def _router_in_a_router_in_the_child(manager: ConnectionManager, child: Any) -> Any:
    outer = APIRouter(prefix="/outer")
    outer.include_router(create_router(manager, "/router"), prefix="/inner")
    child.include_router(outer)
    app = Starlette(routes=[Mount("/sub", child)])
    return app


def _routes_in_the_child(manager: ConnectionManager, child: Any) -> Any:
    child.router.routes.append(Mount("/more", routes=create_routes(manager, "/router")))
    return Starlette(routes=[Mount("/sub", child)])


def _bound_to_the_child(manager: ConnectionManager, child: Any) -> Any:
    manager.bind(child)
    return _bound_by_lifespan(ConnectionManager(), child)  # the nearer one counts


MOUNTS = pytest.mark.parametrize(
    "mount",
    [
        _bound_by_lifespan,
        _bound_by_a_lifespan_of_ones_own,
        _bound_by_hand,
        _bound_by_a_router,
        _in_starlette,
        _behind_a_middleware,
        _two_deep,
        _router_in_the_child,
        _router_in_a_router_in_the_child,
        _routes_in_the_child,
        _bound_to_the_child,
    ],
)


def _child() -> FastAPI:
    child = _announcing_app(None)

    @child.websocket("/dep")
    async def endpoint(connection: ConnectionDep) -> None:
        await connection.wait_closed()

    return child


@MOUNTS
def test_manager_is_found_in_a_mounted_app(mount: Callable[[ConnectionManager, Any], Any]) -> None:
    manager = ConnectionManager()
    with TestClient(mount(manager, _child())) as client:
        assert client.post("/sub/announce?text=hello").json() == 0
        with client.websocket_connect("/sub/dep") as a, client.websocket_connect("/sub/ws") as b:
            assert client.post("/sub/announce?text=hello").json() == 2
            assert (a.receive_text(), b.receive_text()) == ("hello", "hello")
            assert client.post("/sub/announce-sync?text=from a thread").status_code == 200
            assert a.receive_text() == "from a thread"


def test_manager_is_found_in_a_mounted_starlette_app() -> None:
    async def announce(request: Request) -> JSONResponse:
        found = await get_manager(request)
        return JSONResponse(found is manager)

    manager = ConnectionManager()
    with TestClient(_bound_by_lifespan(manager, Starlette(routes=[Route("/announce", announce)]))) as client:
        assert client.get("/sub/announce").json() is True


def test_lifespan_of_a_mounted_app_that_is_a_manager_s_says_which() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.mount("/sub", _announcing_app(manager))
    with TestClient(app) as client:
        assert client.post("/sub/announce?text=hello").json() == 0
    assert manager.stats().broadcasts == 1


def test_lifespan_that_was_not_run_says_which() -> None:
    manager = ConnectionManager()
    child = _child()
    client = TestClient(_bound_by_lifespan(manager, child))  # without `with`
    assert client.post("/sub/announce?text=hello").json() == 0
    assert TestClient(_announcing_app(manager)).post("/announce?text=hello").status_code == 200


def test_mounted_app_keeps_nothing_of_the_app_around_it() -> None:
    first, second, child = ConnectionManager(), ConnectionManager(), _child()
    for manager in (first, second):
        with TestClient(_bound_by_lifespan(manager, child)) as client:
            client.post("/sub/announce?text=hello")
    assert (first.stats().broadcasts, second.stats().broadcasts) == (1, 1)


def test_mounted_app_without_a_manager_is_told_of_its_own() -> None:
    app = FastAPI()
    app.mount("/sub", _child())
    text = r"mounted in another one: a lifespan runs for the outermost app only\. Call manager\.bind\(sub_app\)"
    with TestClient(app) as client:
        with pytest.raises(ConfigurationError, match=text):
            client.post("/sub/announce?text=hello")
        with pytest.raises(ConfigurationError, match=text), client.websocket_connect("/sub/dep"):
            pass


def test_several_managers_of_the_outer_app_are_too_many_for_a_mounted_one() -> None:
    app = _bound_by_lifespan(ConnectionManager(), _child())
    app.include_router(create_router(ConnectionManager(), "/router"))
    with TestClient(app) as client, pytest.raises(ConfigurationError, match="2 ConnectionManagers are bound"):
        client.post("/sub/announce?text=hello")


# ConnectionDep.

Endpoint = Callable[[Connection], Any]


def _app(manager: ConnectionManager, body: Endpoint) -> FastAPI:
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep) -> None:
        await body(connection)

    return app


async def test_connection_dep_is_accepted_and_registered(manager: ConnectionManager) -> None:
    async def echo(connection: Connection) -> None:
        assert connection in connection.manager.connections
        async for message in connection:
            await connection.manager.broadcast(message)

    app = _app(manager, echo)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.say("hello")
        assert await peer.next() == "hello"
        assert len(manager.connections) == 1
        peer.leave()
        await eventually(lambda: manager.connections == [])


@pytest.mark.parametrize(
    ("raised", "code", "escapes"),
    [
        (None, 1000, None),
        (KeyError("broken"), 1011, KeyError),
        (WebSocketException(4003, "chosen"), 4003, None),
        (StarletteException(4003, "chosen"), 4003, None),
        (PermissionDenied("not yours"), 1008, None),
        (WebSocketDisconnect(1001), 1000, None),
        (StarletteDisconnect(1001), 1000, None),
    ],
    ids=[
        "return",
        "error",
        "WebSocketException",
        "Starlette's own",
        "PermissionDenied",
        "WebSocketDisconnect",
        "Starlette's",
    ],
)
async def test_connection_dep_is_removed_and_closed_whichever_way_the_endpoint_ends(
    raised: Exception | None, code: int, escapes: type[Exception] | None
) -> None:
    ended: list[Connection] = []
    manager = ConnectionManager()
    manager.on_disconnect(ended.append)

    async def body(connection: Connection) -> None:
        await connection.manager.broadcast("before")
        await connection.receive()
        if raised is not None:
            raise raised

    app = _app(manager, body)
    async with lifespan(app):
        peer = Peer("/ws")

        async def session() -> None:
            async with visit(app, "/ws", peer):
                peer.say("go")
                assert await peer.wait_close() == code

        if escapes is None:
            await session()
        else:
            with pytest.raises(escapes):
                await session()
        assert peer.messages == ["before"]
        assert manager.connections == []
        await eventually(lambda: len(ended) == 1)
        assert peer.end == (ended[0].close_code, ended[0].close_reason)
        if isinstance(raised, (WebSocketException, PermissionDenied)):
            reason = raised.reason if isinstance(raised, WebSocketException) else str(raised)
            assert peer.end == (code, reason)


# What a task group makes of a single error, and of several.


async def _in_asyncio(*jobs: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for job in jobs:
            tasks.create_task(_run(job))


async def _in_anyio(*jobs: Callable[[], Awaitable[None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for job in jobs:
            tasks.start_soon(_run, job)


async def _nested(*jobs: Callable[[], Awaitable[None]]) -> None:
    await _in_asyncio(lambda: _in_anyio(*jobs))


async def _run(job: Callable[[], Awaitable[None]]) -> None:
    await asyncio.sleep(0)  # a task that starts eagerly would fail inside `create_task`
    await job()


EVERY_GROUP = pytest.mark.parametrize("run", [_in_asyncio, _in_anyio, _nested])


@EVERY_GROUP
async def test_peer_that_leaves_a_task_group_is_no_error_of_the_endpoint(manager: ConnectionManager, run: Any) -> None:
    async def body(connection: Connection) -> None:
        async def read() -> None:
            while True:
                await connection.websocket.receive_text()

        await run(read, read, connection.wait_closed)

    app = _app(manager, body)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.leave(1001)
        await eventually(lambda: manager.connections == [])
    assert peer.close is None


@pytest.mark.parametrize(
    ("raised", "code", "reason"),
    [
        (PermissionDenied("not yours"), 1008, "not yours"),
        (WebSocketException(4123, "chosen"), 4123, "chosen"),
        (StarletteException(4123, "chosen"), 4123, "chosen"),
        (WebSocketDisconnect(1001), 1000, ""),
    ],
)
@EVERY_GROUP
async def test_what_an_endpoint_raises_in_a_task_group_is_its_end(
    manager: ConnectionManager, run: Any, raised: Exception, code: int, reason: str
) -> None:
    async def body(connection: Connection) -> None:
        async def fail() -> None:
            raise raised

        await run(fail, connection.wait_closed)

    app = _app(manager, body)
    async with lifespan(app), visit(app, "/ws") as peer:
        await peer.wait_close()
        assert peer.end == (code, reason)
    assert manager.connections == []


@EVERY_GROUP
async def test_error_in_a_task_group_stays_an_error(manager: ConnectionManager, run: Any) -> None:
    async def body(connection: Connection) -> None:
        async def fail() -> None:
            raise KeyError("broken")

        async def deny() -> None:
            raise PermissionDenied

        await run(fail, deny)

    app = _app(manager, body)
    async with lifespan(app):
        peer = Peer("/ws")
        with pytest.raises(ExceptionGroup):
            async with visit(app, "/ws", peer):
                assert await peer.wait_close() == 1011


async def test_connection_dep_is_removed_when_the_endpoint_raises_an_http_exception(manager: ConnectionManager) -> None:
    async def body(connection: Connection) -> None:
        raise HTTPException(403)

    app = _app(manager, body)
    async with lifespan(app):
        peer = Peer("/ws")
        # FastAPI then tries to answer with HTTP on an open WebSocket, which is an error on every server.
        with pytest.raises((RuntimeError, OSError)):
            async with visit(app, "/ws", peer):
                assert await peer.wait_close() == 1011
        assert manager.connections == []


async def test_connection_dep_is_removed_when_the_endpoint_is_cancelled(manager: ConnectionManager) -> None:
    app = _app(manager, lambda connection: asyncio.Event().wait())
    async with lifespan(app):
        peer = Peer("/ws")
        call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
        await eventually(lambda: bool(manager.connections))
        call.cancel()
        await asyncio.wait({call}, timeout=5)
        assert call.cancelled()
        assert manager.connections == []
        assert peer.close_code == 1011


@pytest.mark.parametrize("reader", ["receive", "receive_text", "websocket"])
async def test_a_peer_that_leaves_is_no_error_of_the_endpoint(manager: ConnectionManager, reader: str) -> None:
    async def body(connection: Connection) -> None:
        while True:
            if reader == "websocket":
                await connection.websocket.receive_text()
            else:
                await getattr(connection, reader)()

    app = _app(manager, body)
    async with lifespan(app):
        async with visit(app, "/ws") as peer:
            peer.say("hello")
            peer.leave(1001)
            await eventually(lambda: manager.connections == [])
        assert peer.close is None


async def test_a_close_from_elsewhere_is_no_error_of_the_endpoint(manager: ConnectionManager) -> None:
    async def body(connection: Connection) -> None:
        while True:
            await connection.websocket.receive_text()

    app = _app(manager, body)
    async with lifespan(app), visit(app, "/ws") as peer:
        await manager.close(manager.connections[0], 4000, "enough")
        assert peer.close_code == 4000


async def test_a_dead_peer_found_by_the_endpoints_own_send_is_no_error(manager: ConnectionManager) -> None:
    async def body(connection: Connection) -> None:
        await connection.receive()
        await connection.websocket.send_text("to nobody")
        await connection.send("to nobody")

    app = _app(manager, body)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.vanish()
        peer.say("go")
        await eventually(lambda: manager.connections == [])


async def test_an_endpoint_that_closes_by_itself_is_closed_once(manager: ConnectionManager) -> None:
    async def body(connection: Connection) -> None:
        await connection.close(4000)

    app = _app(manager, body)
    async with lifespan(app), visit(app, "/ws") as peer:
        assert await peer.wait_close() == 4000
    assert [event["type"] for event in peer.sent].count("websocket.close") == 1


async def test_connection_dep_refused_by_a_hook_is_closed_with_1008(manager: ConnectionManager) -> None:
    @manager.on_connect
    async def refuse(connection: Connection) -> None:
        raise PermissionDenied("not today")

    async def body(connection: Connection) -> None:
        raise AssertionError("the endpoint must not run")

    app = _app(manager, body)
    async with lifespan(app), visit(app, "/ws") as peer:
        await peer.wait_close()
        assert peer.end == (1008, "not today")


@pytest.mark.parametrize("way", ["disconnect", "error"])
async def test_a_peer_that_leaves_during_the_handshake_registers_nothing(manager: ConnectionManager, way: str) -> None:
    async def body(connection: Connection) -> None:
        raise AssertionError("the endpoint must not run")

    app = _app(manager, body)
    async with lifespan(app):
        peer = Peer("/ws")
        if way == "disconnect":
            await peer.receive()
            peer.leave()
        else:
            peer.error = OSError("gone")
        with pytest.raises((Refused, StarletteDisconnect, OSError)):
            async with visit(app, "/ws", peer):
                raise AssertionError("it was accepted")
        assert manager.connections == []


async def _subscribed(connection: ConnectionDep, channel: str) -> Connection:
    await connection.subscribe(channel)
    return connection


async def test_connection_dep_is_shared_within_a_request_and_composes(manager: ConnectionManager) -> None:
    app = FastAPI(lifespan=manager.lifespan)
    router = APIRouter(prefix="/api")

    @router.websocket("/{channel}")
    async def endpoint(
        one: Annotated[Connection, Depends(_subscribed)], other: ConnectionDep, connections: ManagerDep
    ) -> None:
        assert one is other
        assert connections is manager
        await one.wait_closed()

    app.include_router(router)
    async with lifespan(app), visit(app, "/api/news") as peer:
        await eventually(lambda: manager.stats().channels == 1)
        await manager.broadcast("hello", channel="news")
        assert await peer.next() == "hello"


async def test_connection_dep_can_be_replaced_with_options_of_ones_own(manager: ConnectionManager) -> None:
    async def as_ada(websocket: WebSocket, manager: ManagerDep) -> Any:
        async with manager.connect(websocket, user="ada") as connection:
            yield connection

    app = _app(manager, lambda connection: connection.wait_closed())
    app.dependency_overrides[get_connection] = as_ada
    async with lifespan(app), visit(app, "/ws") as peer:
        await manager.broadcast("hello", user="ada")
        assert await peer.next() == "hello"


async def test_a_connection_dependency_may_name_its_manager() -> None:
    chat, news = ConnectionManager(), ConnectionManager()
    app = FastAPI(lifespan=chat.lifespan)
    news.bind(app)
    Reader = Annotated[Connection, Depends(connection_dependency(news))]  # noqa: N806

    async def endpoint(connection: Any) -> None:
        await connection.wait_closed()

    endpoint.__annotations__["connection"] = Reader  # which a postponed annotation could not name
    app.websocket("/ws")(endpoint)
    async with lifespan(app), visit(app, "/ws"):
        assert (len(chat.connections), len(news.connections)) == (0, 1)
    await news.aclose()


async def test_two_managers_in_one_app_have_to_be_told_apart() -> None:
    app = _announcing_app(None)
    ConnectionManager().bind(app)
    ConnectionManager().bind(app)
    with pytest.raises(ConfigurationError, match="2 ConnectionManagers are bound"):
        TestClient(app).post("/announce?text=hello")
