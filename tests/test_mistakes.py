"""What people write who begin: each mistake is answered at once, and the answer says what to write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, cast

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer
from wsbroadcast import (
    Access,
    ConfigurationError,
    Connection,
    ConnectionDep,
    ConnectionManager,
    EncodeError,
    Hook,
    InvalidChannel,
    LifecycleError,
    Limits,
    ManagerDep,
    Message,
    Publisher,
    SlowConsumer,
    TokenFrom,
    connection_dependency,
    create_router,
)


class Mine(Hook):
    pass


class User:
    id = 5


# Any, because a type checker would report most of it.
Manager: Any = ConnectionManager
router: Any = create_router


class NoInit(ConnectionManager):
    def __init__(self) -> None:
        self.rooms: dict[str, set[WebSocket]] = {}


class OwnList(ConnectionManager):
    def __init__(self) -> None:
        super().__init__()
        self.active_connections = []


def request() -> Request:
    return Request({"type": "http", "headers": [], "method": "GET", "path": "/"})


def no_channel(connection: object, action: str) -> bool:
    return True


async def current_user() -> str:
    return "ada"


MAKING: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("a client instead of a URL", lambda: Manager(object()), ConfigurationError, "a URL or an Engine"),
    ("no scheme", lambda: Manager("localhost:6379"), ConfigurationError, "redis://localhost"),
    ("a misspelt scheme", lambda: Manager("reddis://localhost"), ConfigurationError, "redis://localhost"),
    ("one hook", lambda: Manager(hooks=Mine()), ConfigurationError, r"hooks=\[Mine"),
    ("a class as a hook", lambda: Manager(hooks=[Mine]), ConfigurationError, "an instance of Hook"),
    ("a function as a hook", lambda: Manager(hooks=[print]), ConfigurationError, "an instance of Hook"),
    ("a policy's name", lambda: Manager(slow_consumer="drop"), ConfigurationError, "drop_newest"),
    ("no list of hooks", lambda: Manager(hooks=None), ConfigurationError, r"hooks=\[MyHook"),
    ("oldest of nothing", lambda: Limits(when_full="oldest"), ConfigurationError, "needs max_connections_per_user"),
    ("a channel's number", lambda: SlowConsumer(by_channel={1: "conflate"}), ConfigurationError, "a dict of policies"),  # type: ignore[dict-item]
    ("json_default of nothing", lambda: Manager(json_default=lambda: 1), ConfigurationError, r"called with \(value\)"),
    ("limits as a dict", lambda: Manager(limits={"max_connections": 5}), ConfigurationError, r"a Limits\("),
    ("limits of zero", lambda: Limits(max_connections=0), ConfigurationError, "greater than 0"),
    ("half a connection", lambda: Limits(max_connections=2.5), ConfigurationError, "whole number"),  # type: ignore[arg-type]
    ("no time for hooks", lambda: Manager(hook_timeout=0), ConfigurationError, "hook_timeout must be a positive"),
    ("policies as a list", lambda: SlowConsumer(by_channel=["a"]), ConfigurationError, "a dict of policies"),  # type: ignore[arg-type]
    ("json_default as a text", lambda: Manager(json_default="str"), ConfigurationError, "is a function, not str"),
    ("no super().__init__", lambda: NoInit().connections, LifecycleError, r"super\(\).__init__\(\)"),
    ("a list of one's own", OwnList, ConfigurationError, "remove the line"),
    ("a publisher for memory", lambda: Publisher("memory://"), ConfigurationError, "redis://localhost"),
    ("a token from nowhere", TokenFrom, ConfigurationError, "header=True"),
    ("no manager", lambda: router("/ws"), ConfigurationError, r"create_router\(manager"),
    ("no slash", lambda: router(Manager(), "ws"), ConfigurationError, "begins with a slash"),
    ("a misspelt inbound", lambda: router(Manager(), inbound="brodcast"), ConfigurationError, "commands, handle"),
    ("an option that moved", lambda: router(Manager(), on_denied="close"), ConfigurationError, r"access=Access\(on_d"),
    ("an unknown option", lambda: router(Manager(), chanel="a"), ConfigurationError, "no option 'chanel'"),
    (
        "both ways of access",
        lambda: router(Manager(), access=Access(), authenticate=current_user),
        ConfigurationError,
        r"Access\(authenticate=",
    ),
    ("access as a word", lambda: router(Manager(), access="open"), ConfigurationError, r"an Access\("),
    (
        "authorize without a channel",
        lambda: router(Manager(), authorize=no_channel),
        ConfigurationError,
        r"called with \(connection, action, channel\), which no_channel",
    ),
    (
        "a token as a user",
        lambda: router(Manager(), authenticate=TokenFrom(header=True)),
        ConfigurationError,
        "doesn't check it",
    ),
    ("a name as a user", lambda: router(Manager(), authenticate="ada"), ConfigurationError, "as in Depends"),
    (
        "subprotocols of a dependency",
        lambda: connection_dependency(subprotocols=["a"]),  # type: ignore[arg-type]
        ConfigurationError,
        r"Access\(subprotocols=",
    ),
    ("a decorator with parentheses", lambda: Manager().on_connect(), ConfigurationError, "without parentheses"),
    ("a lifespan with parentheses", lambda: Manager().lifespan(), ConfigurationError, "without parentheses"),
    (
        "a hook with too many parameters",
        lambda: Manager().on_connect(lambda connection, channel: None),
        ConfigurationError,
        r"called with \(connection\)",
    ),
    (
        "a hook with too few",
        lambda: Manager().on_subscribe(lambda connection: None),
        ConfigurationError,
        r"called with \(connection, channel\)",
    ),
    ("a hook that is no function", lambda: Manager().on_gap("log"), ConfigurationError, "is a function, not str"),
    (
        "connect as a dependency",
        lambda: FastAPI().websocket("/ws")(_endpoint_with(ConnectionManager().connect)),
        ConfigurationError,
        "ConnectionDep",
    ),
    (
        "the class as a dependency",
        lambda: FastAPI().get("/")(_endpoint_with(ConnectionManager)),
        ConfigurationError,
        "ManagerDep",
    ),
]


def _endpoint_with(dependency: Any) -> Any:
    async def endpoint(value: Any = Depends(dependency)) -> None: ...  # noqa: B008

    return endpoint


@pytest.mark.parametrize(("make", "kind", "answer"), [each[1:] for each in MAKING], ids=[each[0] for each in MAKING])
def test_making(make: Callable[[], object], kind: type[Exception], answer: str) -> None:
    with pytest.raises(kind, match=answer):
        make()


Use = Callable[[Any, WebSocket, Connection], Awaitable[object] | object]

USING: list[tuple[str, Use, type[Exception], str]] = [
    ("no await", lambda m, ws, c: m.connect(Peer().websocket).id, AttributeError, "`await` is missing"),
    ("no await before send", lambda m, ws, c: m.connect(Peer().websocket).send("x"), TypeError, "`await` is missing"),
    ("sent before it is awaited", lambda m, ws, c: m.send(m.connect(ws), "x"), TypeError, "`await` is missing"),
    ("a client's number", lambda m, ws, c: m.connect(5), TypeError, r"connect\(websocket, user=…"),
    ("a request", lambda m, ws, c: m.connect(request()), TypeError, r"@app.websocket\("),
    ("connected", lambda m, ws, c: m.connect(c), TypeError, "it is connected"),
    ("a user's object", lambda m, ws, c: m.connect(Peer().websocket, user=User()), ValueError, "pass the object's id"),
    ("no channel", lambda m, ws, c: m.connect(Peer().websocket, channels=[None]), InvalidChannel, "a channel is a str"),
    (
        "a time without a zone",
        lambda m, ws, c: m.connect(Peer().websocket, expires_at=datetime.now()),
        ValueError,
        "no timezone",
    ),
    ("somebody else", lambda m, ws, c: m.connect(ws, user="bob"), ValueError, "disconnect it first"),
    (
        "a socket that nobody connected",
        lambda m, ws, c: m.send(Peer().websocket, "x"),
        LifecycleError,
        "await `manager",
    ),
    ("swapped", lambda m, ws, c: m.send_personal_message(ws, "x"), TypeError, r"send\(connection, message\)"),
    ("swapped the other way", lambda m, ws, c: m.send("x", ws), TypeError, r"send\(connection, message\)"),
    ("a name instead of a socket", lambda m, ws, c: m.send("ada", "x"), TypeError, r"broadcast\(…, user=…"),
    ("a name to disconnect", lambda m, ws, c: m.disconnect("ada"), TypeError, r"close_user\("),
    ("a number to close", lambda m, ws, c: m.close(5), TypeError, r"close_user\("),
    ("nobody", lambda m, ws, c: m.broadcast("x", user=None), ValueError, "pass the object's id"),
    ("nowhere", lambda m, ws, c: m.broadcast("x", channel=None), InvalidChannel, "a channel is a str"),
    ("two ways", lambda m, ws, c: m.broadcast("x", channel="a", user="b"), ValueError, r"to=\[Audience.channel"),
    ("a name as an audience", lambda m, ws, c: m.broadcast("x", to="news"), ValueError, r"Audience.channel\("),
    ("a socket as an audience", lambda m, ws, c: m.broadcast("x", to=ws), ValueError, "await `send`"),
    ("channels as None", lambda m, ws, c: m.broadcast("x", channels=None), ValueError, "a list of names"),
    ("a user to exclude", lambda m, ws, c: m.broadcast("x", exclude="ada"), TypeError, "exclude_users="),
    ("an object", lambda m, ws, c: m.broadcast({"a": [object()]}), EncodeError, r"at a\[0\].*json_default="),
    ("not a number", lambda m, ws, c: m.broadcast({"a": float("nan")}), EncodeError, "send None instead"),
    ("a number as a key", lambda m, ws, c: m.broadcast("x", key=5), EncodeError, "a key is a str"),
    ("a thread's way in the loop", lambda m, ws, c: m.broadcast_threadsafe("x"), LifecycleError, "broadcast_soon"),
    ("no channel to leave", lambda m, ws, c: m.unsubscribe_user("ada"), ValueError, "name the channels"),
    ("a code of nobody's", lambda m, ws, c: m.close_user("ada", code=5000), ValueError, "3000-4999"),
    (
        "subscribed before",
        lambda m, ws, c: m.subscribe(Peer().websocket, "a"),
        LifecycleError,
        "await `manager.connect",
    ),
    ("a coroutine sent", lambda m, ws, c: c.send(asyncio.sleep(0)), EncodeError, "an `await` is missing"),
    ("a reason for a code", lambda m, ws, c: m.close(c, "bye"), ValueError, "3000-4999"),
    ("a code as text", lambda m, ws, c: m.close_user("ada", code="4000"), ValueError, "3000-4999"),
    ("bytes as a user", lambda m, ws, c: m.broadcast("x", exclude_users=b"ada"), ValueError, "a user is a str"),
]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(("use", "kind", "answer"), [each[1:] for each in USING], ids=[each[0] for each in USING])
async def test_using(use: Use, kind: type[Exception], answer: str) -> None:
    async with ConnectionManager() as manager:
        peer = Peer()
        connection = await manager.connect(peer.websocket, user="ada")
        with pytest.raises(kind, match=answer):
            await _call(use, manager, peer.websocket, connection)


async def _call(use: Use, *arguments: Any) -> None:
    done = use(*arguments)
    if isinstance(done, Awaitable):
        await done


def test_there_are_enough_of_them() -> None:
    assert len(MAKING) + len(USING) >= 48


# What shows when the app runs.


def client(app: FastAPI) -> TestClient:
    return TestClient(app, headers={"origin": "http://testserver"})


def test_connection_of_an_http_route() -> None:
    app = FastAPI(lifespan=ConnectionManager().lifespan)

    @app.get("/")
    async def endpoint(connection: ConnectionDep) -> None: ...

    with client(app) as http, pytest.raises(ConfigurationError, match="take a ManagerDep in an HTTP endpoint"):
        http.get("/")


def test_http_exception_of_a_websocket_s_endpoint(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI(lifespan=ConnectionManager().lifespan)

    @app.websocket("/")
    async def endpoint(connection: ConnectionDep) -> None:
        raise HTTPException(403, "no")

    with client(app) as http, http.websocket_connect("/") as socket, pytest.raises(WebSocketDisconnect) as ended:
        socket.receive_text()
    assert ended.value.code == 1011
    assert "raise PermissionDenied(text)" in caplog.text


def test_two_managers_and_no_manager() -> None:
    app = FastAPI()

    @app.get("/")
    async def endpoint(manager: ManagerDep) -> None: ...

    with client(app) as http, pytest.raises(ConfigurationError, match="no ConnectionManager is bound"):
        http.get("/")
    for _ in range(2):
        ConnectionManager().bind(app)
    with client(app) as http, pytest.raises(ConfigurationError, match="connection_dependency"):
        http.get("/")


async def test_guard_that_cannot_be_called_refuses() -> None:
    manager = ConnectionManager()
    manager.on_connect(cast(Any, max))  # written in C, so that its parameters aren't seen before
    with pytest.raises(Exception, match="not allowed"):
        await manager.connect(Peer().websocket)
    assert manager.connections == []
    await manager.aclose()


@pytest.mark.parametrize("is_async", [True, False])
async def test_guard_that_a_decorator_hides_refuses_too(is_async: bool) -> None:
    def guard(connection: Connection, more: object) -> bool:
        return True

    def hidden(*arguments: Any) -> Any:
        return cast(Any, guard)(*arguments)

    async def hidden_later(*arguments: Any) -> Any:
        return cast(Any, guard)(*arguments)

    manager = ConnectionManager()
    manager.on_connect(hidden_later if is_async else hidden)
    with pytest.raises(Exception, match="not allowed"):
        await manager.connect(Peer().websocket)
    await manager.aclose()


def test_misspelt_event_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Guard(Hook):
        def on_conect(self, connection: Connection) -> bool:
            return False

        def on_fire(self) -> None: ...

    ConnectionManager(hooks=[Guard()])
    assert [record.getMessage() for record in caplog.records] == [
        f"{Guard.__qualname__}.on_conect is never called: did you mean on_connect?"
    ]


async def test_guard_that_forgets_to_await_refuses(caplog: pytest.LogCaptureFixture) -> None:
    async def may(connection: Connection) -> bool:
        return True

    manager = ConnectionManager()
    manager.on_connect(lambda connection: [may(connection)][0])
    await manager.connect(Peer().websocket)  # a plain function may hand on its coroutine

    async def forgets(connection: Connection) -> Any:
        return may(connection)

    manager.on_connect(forgets)
    with pytest.raises(Exception, match="not allowed"):
        await manager.connect(Peer().websocket)
    assert "an `await` is missing" in caplog.text
    await manager.aclose()


def test_hook_that_may_return_none_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    manager = ConnectionManager()

    @manager.on_broadcast
    def old_guard(message: Message, audience: object) -> Message | None:
        return None

    assert "return HOLD_BACK" in caplog.text


def test_broadcast_before_the_app_runs() -> None:
    with pytest.raises(LifecycleError, match=r"start the app with manager.lifespan"):
        ConnectionManager().broadcast_threadsafe("x")
    with pytest.raises(LifecycleError, match=r"start the app with manager.lifespan"):
        ConnectionManager().broadcast_soon("x")
