"""Who it is: a FastAPI dependency that is finished before the connection is accepted, and what becomes of it."""

# No postponed annotations: FastAPI reads them, and most dependencies here are local.

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import pytest
from fastapi import (
    Cookie,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Request,
    Security,
    WebSocket,
    WebSocketException,
)
from fastapi.exceptions import FastAPIError
from fastapi.security import SecurityScopes
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.exceptions import WebSocketException as StarletteWebSocketException
from starlette.testclient import TestClient

from tests.support.asgi import Peer, eventually, lifespan, refusal, visit
from tests.support.web import EVERY_APP, MakeApp, admitted, denied, dependency_app, router_app, starlette_app
from wsbroadcast import (
    Access,
    ConfigurationError,
    Connection,
    ConnectionManager,
    Identity,
    PermissionDenied,
    connection_dependency,
    create_router,
    create_routes,
)


@dataclass
class User:
    """What an app's dependency returns."""

    id: int
    name: str


def _finding(found: Any) -> Callable[[], Any]:
    """An `authenticate` that returns something, or raises it."""

    async def authenticate() -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    return authenticate


async def _by_header(x_user: Annotated[str, Header()] = "") -> str | None:
    return x_user or None


# What it returns.


@EVERY_APP
@pytest.mark.parametrize(
    ("found", "options", "user", "has_info"),
    [
        ("ada", {}, "ada", False),
        (7, {}, 7, False),
        (UUID(int=7), {}, UUID(int=7), False),
        (User(7, "ada"), {}, 7, True),
        ({"sub": "ada", "role": "admin"}, {}, "ada", True),
        (User(7, "ada"), {"user_key": lambda user: user.name}, "ada", True),
        ({"uid": 7}, {"user_key": lambda claims: claims["uid"]}, 7, True),
        ("ADA", {"user_key": str.lower}, "ada", False),
        (Identity("ada", info=[1]), {}, "ada", True),
        (Identity("ada"), {"user_key": lambda _: "eve"}, "ada", False),
        (Identity(None, info="guest"), {}, None, True),
    ],
)
async def test_what_it_returns_is_the_connections_user(
    manager: ConnectionManager, make_app: MakeApp, found: Any, options: dict[str, Any], user: Any, has_info: bool
) -> None:
    app = make_app(manager, authenticate=_finding(found), **options)
    async with lifespan(app), visit(app, "/ws") as peer:
        [connection] = manager.connections
        assert connection.user == user
        expected = found.info if isinstance(found, Identity) else found
        assert connection.info == (expected if has_info else None)
        if user is not None:
            await manager.broadcast("for you", user=user)
            assert await peer.next() == "for you"


@EVERY_APP
def test_nobody_is_401_and_says_how(make_app: MakeApp) -> None:
    manager = ConnectionManager()
    with TestClient(make_app(manager, authenticate=_by_header)) as client:
        response = denied(client)
        assert (response.status_code, response.text) == (401, "not authenticated")
        assert response.headers["www-authenticate"] == "Bearer"
        assert manager.stats().connects == 0
        admitted(client, **{"x-user": "ada"})


@EVERY_APP
@pytest.mark.parametrize(
    ("user", "rule"),
    [
        ("", "it is empty"),
        ("\u2603" * 67, "it has 201 bytes, the limit is 200"),
        ("ada\n", "it has control characters"),
        ("\ud800", "it has a lone surrogate, which UTF-8 can't carry"),
        (10**200, "it has 201 bytes, the limit is 200"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda user: user, Identity, lambda user: {"sub": user}, lambda user: User(user, "ada")]
)
def test_text_that_can_be_no_user_is_403_and_says_why(
    make_app: MakeApp, make: Callable[[Any], Any], user: str | int, rule: str
) -> None:
    manager = ConnectionManager()
    with TestClient(make_app(manager, authenticate=_finding(make(user)))) as client:
        response = denied(client)
        assert (response.status_code, response.text) == (403, f"invalid user: {rule}")
        assert manager.stats().connects == 0


async def _somebody() -> str:
    return "ada"


def _in_a_generator() -> Iterator[str]:
    yield "ada"


@EVERY_APP
@pytest.mark.parametrize("found", [object(), {}, {"sub": None}, 1.5, User(None, "ada"), ["ada"]])  # type: ignore[arg-type]
async def test_a_result_that_is_nobody_is_the_apps_error(
    manager: ConnectionManager, make_app: MakeApp, found: Any
) -> None:
    app = make_app(manager, authenticate=_finding(found))
    async with lifespan(app):
        with pytest.raises((ConfigurationError, ValueError)):
            await refusal(app)
    assert manager.stats().connects == 0


class _AsyncKey:
    async def __call__(self, user: object) -> str:
        return "ada"


WRONG: list[tuple[Callable[[], Any], str]] = [
    (_somebody, "what authenticate returned is a coroutine that nobody awaits"),
    (lambda: _in_a_generator(), "what authenticate returned is a generator"),
    (lambda: True, "authenticate returned True, which doesn't say who it is"),
    (lambda: False, "authenticate returned False, which doesn't say who it is"),
    (lambda: Identity(_somebody()), "the user that authenticate found is a coroutine"),  # type: ignore[arg-type]
    (lambda: Identity("ada", expires_at=_somebody()), "the expires_at that authenticate found is a coroutine"),  # type: ignore[arg-type]
]


@EVERY_APP
@pytest.mark.parametrize(
    ("make", "user_key", "text"),
    [
        *((make, user_key, text) for make, text in WRONG for user_key in (None, str)),
        (lambda: "ada", _AsyncKey(), "the user that authenticate found is a coroutine that nobody awaits"),
        (lambda: "ada", lambda user: None, "user_key returned None for a str: it has to return the user's id"),
    ],
)
async def test_what_does_not_say_who_it_is_is_the_apps_error_that_says_what_is_wrong(
    manager: ConnectionManager, make_app: MakeApp, make: Callable[[], Any], user_key: Any, text: str
) -> None:
    async def authenticate() -> Any:
        return make()

    app = make_app(manager, authenticate=authenticate, user_key=user_key)
    async with lifespan(app):
        with pytest.raises(ConfigurationError, match=text):
            await refusal(app)
    assert manager.stats().connects == 0


def test_user_key_that_is_async_is_refused_at_once() -> None:
    async def user_key(user: str) -> str:
        return user

    with pytest.raises(ConfigurationError, match="user_key is a plain function"):
        Access(authenticate=_somebody, user_key=user_key)  # type: ignore[arg-type]


# How it refuses.


def _grouped(error: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("unhandled errors in a TaskGroup", [ExceptionGroup("inner", [error])])


WRAPS = pytest.mark.parametrize("wrap", [lambda error: error, _grouped], ids=["bare", "group"])


class _Unknown(Exception):
    pass


@EVERY_APP
@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (HTTPException(401, "who are you?", {"WWW-Authenticate": "Digest"}), 401, "who are you?"),
        (HTTPException(403), 403, "Forbidden"),
        (HTTPException(429, "slowly", {"Retry-After": "5"}), 429, "slowly"),
        (HTTPException(401, {"code": 7}, {"Content-Type": "text/html", "Content-Length": "1"}), 401, '{"code":7}'),
        (StarletteHTTPException(402, "pay first"), 402, "pay first"),
        (PermissionDenied("not today"), 403, "not today"),
        (WebSocketException(4003, "no entry"), 403, "no entry"),
        (StarletteWebSocketException(4123, "not you"), 403, "not you"),
        (WebSocketException(1008), 403, ""),
    ],
    ids=repr,
)
@WRAPS
def test_a_refusal_is_an_http_response_also_out_of_a_task_group(
    make_app: MakeApp, error: Exception, status: int, text: str, wrap: Callable[[Exception], Exception]
) -> None:
    manager = ConnectionManager()
    with TestClient(make_app(manager, authenticate=_finding(wrap(error)))) as client:
        response = denied(client)
        assert (response.status_code, response.text) == (status, text)
        assert response.headers["content-type"] == "text/plain; charset=utf-8"
        for name, value in (getattr(error, "headers", None) or {}).items():
            if name not in ("Content-Type", "Content-Length"):
                assert response.headers[name] == value
    assert manager.stats().connects == 0


@EVERY_APP
@pytest.mark.parametrize("where", ["before", "after"])
async def test_an_error_of_the_app_never_lets_anybody_in(
    manager: ConnectionManager, make_app: MakeApp, where: str
) -> None:
    async def session() -> AsyncIterator[None]:
        yield
        if where == "after":
            raise _Unknown("the commit failed: password=hunter2")

    async def authenticate(session: Annotated[None, Depends(session)]) -> str:
        if where == "before":
            raise _Unknown("the database is gone: password=hunter2")
        return "ada"

    app = make_app(manager, authenticate=authenticate)
    peer = Peer("/ws")
    async with lifespan(app):
        with pytest.raises(_Unknown):
            await refusal(app, peer=peer)
    assert peer.sent == []  # the server's own 500; nothing of the exception's text
    assert manager.stats().connects == 0


@EVERY_APP
async def test_a_parameter_that_is_missing_refuses_without_repeating_what_came(make_app: MakeApp) -> None:
    async def authenticate(number: Annotated[int, Header()]) -> int:
        return number

    app = make_app(ConnectionManager(), authenticate=authenticate)
    for headers in ([], [(b"number", b"<script>")]):
        peer = Peer("/ws", headers=headers)
        async with lifespan(app):
            assert await refusal(app, peer=peer) == 1008
        assert "script" not in str(peer.sent)


async def test_a_broken_header_of_a_refusal_is_the_apps_error() -> None:
    error = HTTPException(401, headers={"x-who": "\u20ac"})
    with pytest.raises(UnicodeEncodeError):
        await refusal(router_app(ConnectionManager(), authenticate=_finding(error)))


# When it runs.


class Log:
    """What happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def session(self) -> AsyncIterator[str]:
        self.events.append("session opens")
        try:
            yield "session"
        finally:
            self.events.append("session closes")

    def sync_session(self) -> Iterator[str]:
        self.events.append("sync session opens")
        yield "session"
        self.events.append("sync session closes")


@EVERY_APP
async def test_what_it_yields_is_finished_before_the_connection_is_accepted(make_app: MakeApp) -> None:
    log = Log()
    manager = ConnectionManager()
    manager.on_connect(lambda connection: log.events.append("connected"))

    async def user(one: Annotated[str, Depends(log.session)]) -> AsyncIterator[str]:
        log.events.append("user")
        yield "ada"
        log.events.append("user found")

    async def authenticate(
        user: Annotated[str, Depends(user)],
        two: Annotated[str, Depends(log.sync_session)],
        three: Annotated[str, Depends(log.session, scope="function", use_cache=False)],
    ) -> str:
        log.events.append("authenticate")
        return user

    app = make_app(manager, authenticate=authenticate)
    peer = Peer("/ws")
    async with lifespan(app), visit(app, "/ws", peer):
        assert peer.accepted is not None
        assert log.events == [
            *("session opens", "user", "sync session opens", "session opens", "authenticate"),
            *("session closes", "sync session closes", "user found", "session closes", "connected"),
        ]
        assert [connection.user for connection in manager.connections] == ["ada"]


async def test_it_runs_after_the_origin_check_and_the_limits_and_before_authorize() -> None:
    order: list[str] = []

    async def authenticate() -> str:
        order.append("authenticate")
        return "ada"

    async def authorize(connection: Any, action: str, channel: str) -> bool:
        order.append(f"{action} {channel} as {connection.user}")
        return True

    app = router_app(ConnectionManager(), "/ws/{channel}", authenticate=authenticate, authorize=authorize)
    await refusal(app, "/ws/news", headers=[(b"origin", b"https://evil.example")])
    assert order == []
    async with visit(app, "/ws/news"):
        assert order == ["authenticate", "subscribe news as ada"]


@EVERY_APP
async def test_it_is_an_ordinary_dependency(make_app: MakeApp) -> None:
    """Path, query, headers, cookies, `def`, security scopes, and the WebSocket itself."""
    seen: list[Any] = []

    def plain(websocket: WebSocket) -> str:
        websocket.state.seen = "by a plain function"
        return "plain"

    async def authenticate(
        websocket: WebSocket,
        tenant: str,
        scopes: SecurityScopes,
        q: int = 0,
        session: Annotated[str, Cookie()] = "",
        other: str = Depends(plain),
    ) -> str:
        seen.extend([tenant, scopes.scopes, q, session, other, websocket.url.path])
        return "ada"

    manager = ConnectionManager()
    app = make_app(manager, "/{tenant}/ws", authenticate=Security(authenticate, scopes=["read"]))
    peer = Peer("/acme/ws", headers=[(b"cookie", b"session=s3")])
    peer.scope["query_string"] = b"q=7"
    del peer.scope["state"]  # as on daphne
    async with lifespan(app), visit(app, "/acme/ws", peer):
        assert seen == ["acme", ["read"], 7, "s3", "plain", "/acme/ws"]
        assert manager.connections[0].websocket.state.seen == "by a plain function"


async def test_the_prefix_may_hold_a_parameter_of_it() -> None:
    async def authenticate(tenant: str) -> str:
        return f"somebody of {tenant}"

    manager = ConnectionManager()
    pattern = "{tenant}:{channel}"
    app = router_app(manager, "/ws/{channel}", prefix="/{tenant}", channel=pattern, authenticate=authenticate)
    async with visit(app, "/acme/ws/news"), visit(app, "/umbrella/ws/news"):
        assert [one.user for one in manager.connections] == ["somebody of acme", "somebody of umbrella"]


@pytest.mark.parametrize("make_app", [router_app, dependency_app])
async def test_overrides_hold_for_it_and_for_what_it_depends_on(make_app: MakeApp) -> None:
    async def token() -> str:
        raise HTTPException(401)

    async def authenticate(token: str = Depends(token)) -> str:
        return token

    manager = ConnectionManager()
    app = make_app(manager, authenticate=authenticate)
    async with lifespan(app):
        await refusal(app)
        app.dependency_overrides[token] = lambda: "test token"
        async with visit(app, "/ws"):
            assert manager.connections[0].user == "test token"
        app.dependency_overrides[authenticate] = lambda: "test user"
        async with visit(app, "/ws"):
            assert manager.connections[-1].user == "test user"
        app.dependency_overrides.clear()
        await refusal(app)


async def test_each_app_has_its_own_overrides() -> None:
    async def authenticate() -> str:
        return "real"

    manager = ConnectionManager()
    router = create_router(manager, authenticate=authenticate)
    one, other = FastAPI(), FastAPI()
    one.include_router(router)
    other.include_router(router)
    other.dependency_overrides[authenticate] = lambda: "overridden"
    async with visit(one, "/ws"), visit(other, "/ws"), visit(one, "/ws"):
        assert [connection.user for connection in manager.connections] == ["real", "overridden", "real"]


async def test_many_at_once_do_not_get_mixed_up() -> None:
    async def authenticate(x_user: Annotated[str, Header()]) -> str:
        await asyncio.sleep(0)
        return x_user

    manager = ConnectionManager()
    app = router_app(manager, authenticate=authenticate)

    names = [f"user{number}" for number in range(50)]

    async def stay(name: str, leave: asyncio.Event) -> None:
        async with visit(app, "/ws", headers=[(b"x-user", name.encode()), (b"x-other", b"y")]):
            await leave.wait()

    leave = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for name in names:
            group.create_task(stay(name, leave))
        await eventually(lambda: len(manager.connections) == 50)
        assert sorted(str(connection.user) for connection in manager.connections) == sorted(names)
        for connection in manager.connections:
            assert connection.websocket.headers["x-user"] == connection.user
        leave.set()


@EVERY_APP
async def test_it_may_accept_by_itself_and_then_refuses_with_a_close(make_app: MakeApp) -> None:
    async def authenticate(websocket: WebSocket) -> str | None:
        await websocket.accept()
        word = await websocket.receive_text()
        if word == "forbidden":
            raise HTTPException(403, "not you")
        if word == "broken":
            raise _Unknown("secret")
        if word == "own":
            raise WebSocketException(4999, "own code")
        if word == "closed":
            await websocket.close(4998)
            return None
        return word or None

    manager = ConnectionManager()
    app = make_app(manager, authenticate=authenticate)
    async with lifespan(app):
        async with visit(app, "/ws") as peer:
            peer.say("ada")
            await eventually(lambda: len(manager.connections) == 1)
            await manager.broadcast("welcome", user="ada")
            assert await peer.next() == "welcome"
        for word, code, reason in [
            ("", 4401, "not authenticated"),
            ("forbidden", 4403, "not you"),
            ("own", 4999, "own code"),
            ("closed", 4998, ""),
        ]:
            async with visit(app, "/ws") as peer:
                peer.say(word)
                await peer.wait_close()
                assert peer.end == (code, reason)
        peer = Peer("/ws")
        peer.say("broken")
        with pytest.raises(_Unknown):
            async with visit(app, "/ws", peer):
                await peer.wait_close()
        assert (peer.close_code, peer.messages) == (1011, [])
        assert "secret" not in str(peer.sent)
        async with visit(app, "/ws") as peer:
            peer.leave()  # while it waits: no error
    assert manager.connections == []
    assert manager.stats().connects == 1


# Until when.


def _in(seconds: float) -> float:
    return time.time() + seconds


@EVERY_APP
@pytest.mark.parametrize(
    "make",
    [
        lambda: Identity("ada", expires_at=_in(0.4)),
        lambda: Identity("ada", expires_at=datetime.now(UTC) + timedelta(seconds=0.4)),
        lambda: {"sub": "ada", "exp": _in(0.4)},
    ],
)
async def test_it_is_closed_at_its_expiry(
    manager: ConnectionManager, make_app: MakeApp, make: Callable[[], Any]
) -> None:
    async def authenticate() -> Any:
        return make()

    app = make_app(manager, authenticate=authenticate)
    async with lifespan(app), visit(app, "/ws") as peer:
        assert await peer.wait_close() == 4401
        assert manager.stats().connects == 1


@EVERY_APP
def test_what_has_expired_is_401(make_app: MakeApp) -> None:
    manager = ConnectionManager()
    with TestClient(make_app(manager, authenticate=_finding(Identity("ada", expires_at=_in(-1))))) as client:
        assert denied(client).status_code == 401
    assert manager.stats().connects == 0


# Options, and the path's channel.


@pytest.mark.parametrize("options", [{"authenticate": "current_user"}, {"authenticate": 1}, {"user_key": str}])
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    for factory in (create_router, create_routes):
        with pytest.raises(ConfigurationError):
            factory(ConnectionManager(), **options)
    with pytest.raises(ConfigurationError):
        connection_dependency(**options)


@EVERY_APP
def test_the_alias_of_a_dependency_is_that_dependency(make_app: MakeApp) -> None:
    manager = ConnectionManager()
    app = make_app(manager, authenticate=Annotated[str, Depends(_by_header)])
    with TestClient(app) as client:
        for url in ("/ws", "/ws?args=1&kwargs=2"):
            assert denied(client, url).status_code == 401
        with client.websocket_connect("/ws", headers={"x-user": "ada"}) as ada:
            ada.send_text("I am in")
            assert ada.receive_text() == "I am in"
            assert [connection.user for connection in manager.connections] == ["ada"]


@pytest.mark.parametrize("alias", [Annotated[str, "ada"], Annotated[str, Depends()]])
def test_an_alias_of_no_dependency_is_refused(alias: Any) -> None:
    with pytest.raises(ConfigurationError, match="one Depends"):
        create_router(ConnectionManager(), authenticate=alias)


def test_a_dependency_that_wants_a_request_is_refused_and_told_what_to_take() -> None:
    def session(request: Request) -> str:
        return request.cookies["session"]

    async def authenticate(session: Annotated[str, Depends(session)]) -> str:
        return session

    for dependency in (session, authenticate):
        with pytest.raises(ConfigurationError, match="wants a Request: take an HTTPConnection"):
            create_router(ConnectionManager(), authenticate=dependency)


def test_a_dependency_that_makes_no_sense_to_fastapi_is_its_error_at_once() -> None:
    async def session() -> AsyncIterator[None]:
        yield

    async def authenticate(session: Annotated[None, Depends(session, scope="function")]) -> AsyncIterator[str]:
        yield "ada"

    with pytest.raises(FastAPIError):
        create_router(ConnectionManager(), authenticate=authenticate)


@pytest.mark.parametrize("make_app", [router_app, starlette_app])
def test_authorize_is_asked_for_the_paths_channel_before_anybody_is_accepted(make_app: MakeApp) -> None:
    async def authorize(connection: Any, action: str, channel: str) -> bool:
        assert connection.channels == frozenset()
        assert connection.websocket.headers["x-user"] == connection.user
        return action == "subscribe" and channel == f"private:{connection.user}"

    manager = ConnectionManager()
    seen: list[str] = []
    manager.on_connect(lambda connection: seen.append(connection.user))
    app = make_app(manager, "/ws/{channel}", authenticate=_by_header, authorize=authorize)
    with TestClient(app) as client:
        for channel, text in (
            ("private:eve", "not allowed"),
            ("private:ada:more", "not allowed"),
            ("news", "not allowed"),
            ("x" * 201, "invalid channel: it has 201 bytes, the limit is 200"),
            ("a%0Ab", "invalid channel: it has control characters"),
        ):
            response = denied(client, f"/ws/{channel}", **{"x-user": "ada"})
            assert (response.status_code, response.text) == (403, text)
        assert seen == []
        admitted(client, "/ws/private:ada", **{"x-user": "ada"})
    assert seen == ["ada"]


@pytest.mark.parametrize("answer", [False, 0, "", [], None, 0.0])
def test_authorize_denies_unless_it_says_yes(answer: Any) -> None:
    app = router_app(ConnectionManager(), "/ws/{channel}", authorize=lambda connection, action, channel: answer)
    with TestClient(app) as client:
        response = denied(client, "/ws/news")
        assert (response.status_code, response.text) == (403, "not allowed")


class _NumpyBool:
    """What a comparison in numpy returns: true, and no bool."""

    def __bool__(self) -> bool:
        return True


async def _no() -> bool:
    return False


async def _forgotten() -> Any:
    return _no()


def _bools() -> Iterator[bool]:
    yield True


NO_BOOLS = pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: 1, "authorize has to return True or False, not int: "),
        (lambda: "no", "authorize has to return True or False, not str: "),
        (lambda: {"allowed": False}, "authorize has to return True or False, not dict: "),
        (_NumpyBool, "authorize has to return True or False, not _NumpyBool: "),
        (_forgotten, "what authorize returned is a coroutine that nobody awaits: an `await` is missing"),
        (_bools, "what authorize returned is a generator, and nothing of it has run"),
    ],
)


@NO_BOOLS
async def test_authorize_that_returns_no_bool_lets_nobody_in(
    manager: ConnectionManager, make: Callable[[], Any], text: str
) -> None:
    app = router_app(manager, "/ws/{channel}", authorize=lambda connection, action, channel: make())
    with pytest.raises(ConfigurationError, match=text):
        await refusal(app, "/ws/news")
    assert manager.stats().connects == 0


@NO_BOOLS
@pytest.mark.parametrize(
    ("inbound", "said"),
    [
        ("broadcast", "hello"),
        ("commands", '{"type": "subscribe", "channel": "news"}'),
        ("commands", '{"type": "publish", "channel": "news", "data": 1}'),
    ],
)
async def test_authorize_that_returns_no_bool_lets_nobody_do_anything(
    manager: ConnectionManager, make: Callable[[], Any], text: str, inbound: str, said: str
) -> None:
    is_in = False

    async def authorize(connection: Any, action: str, channel: str) -> Any:
        made = make() if is_in else True
        return await made if isinstance(made, Awaitable) else made

    app = router_app(manager, "/ws/{channel}", inbound=inbound, authorize=authorize)
    peer = Peer("/ws/lobby")
    call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
    await peer.wait_for(lambda: peer.accepted is not None)
    is_in = True
    peer.say(said)
    assert await peer.wait_close() == 1011
    with pytest.raises(ConfigurationError, match=text):
        await call
    assert (peer.messages, manager.stats().broadcasts, manager.stats().channels) == ([], 0, 0)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (HTTPException(404, "banned"), 403, "banned"),
        (HTTPException(404, {"why": "banned"}), 403, '{"why":"banned"}'),
        (HTTPException(503, "no database"), 503, '{"detail":"no database"}'),
        (PermissionDenied("no such room"), 403, "no such room"),
        (WebSocketException(4123, "no such room"), 403, "no such room"),
        (StarletteWebSocketException(4123, "no such room"), 403, "no such room"),
    ],
)
@WRAPS
def test_authorize_may_deny_or_fail_as_fastapi_does(
    error: Exception, status: int, text: str, wrap: Callable[[Exception], Exception]
) -> None:
    def authorize(connection: Any, action: str, channel: str) -> bool:
        raise wrap(error)

    with TestClient(router_app(ConnectionManager(), "/ws/{channel}", authorize=authorize)) as client:
        response = denied(client, "/ws/news")
    assert (response.status_code, response.text) == (status, text)


async def test_an_error_in_authorize_lets_nobody_in(manager: ConnectionManager) -> None:
    def authorize(connection: Any, action: str, channel: str) -> bool:
        raise _Unknown

    with pytest.raises(_Unknown):
        await refusal(router_app(manager, "/ws/{channel}", authorize=authorize), "/ws/news")
    assert manager.stats().connects == 0


async def test_who_was_sent_away_is_asked_anew_and_keeps_nothing() -> None:
    rights = {("ada", "news"), ("ada", "private")}
    tokens = {"token-of-ada": "ada"}
    asked: list[tuple[str, str]] = []

    async def current_user(x_user: Annotated[str, Header()] = "") -> str | None:
        return tokens.get(x_user)

    def authorize(connection: Any, action: str, channel: str) -> bool:
        asked.append((action, channel))
        return (connection.user, channel) in rights

    manager = ConnectionManager()
    app = router_app(manager, "/ws/{channel}", inbound="commands", authenticate=current_user, authorize=authorize)
    headers = [(b"x-user", b"token-of-ada")]
    async with visit(app, "/ws/private", headers=headers) as ada:
        rights.remove(("ada", "private"))
        await manager.close_user("ada")
        assert await ada.wait_close() == 4401
    asked.clear()
    await refusal(app, "/ws/private", headers=headers)
    assert asked == [("subscribe", "private")]
    async with visit(app, "/ws/news", headers=headers) as ada:  # the token is good, the right is gone
        assert asked[1:] == [("subscribe", "news")]
        ada.say('{"type": "subscribe", "channel": "private"}')
        assert "forbidden" in str(await ada.next())
        await manager.broadcast("secret", channel="private")
        assert manager.connections[0].channels == {"news"}
        del tokens["token-of-ada"]
        await manager.close_user("ada")
        assert await ada.wait_close() == 4401
    asked.clear()
    await refusal(app, "/ws/news", headers=headers)
    assert asked == []
    assert manager.stats().connections == manager.stats().users == manager.stats().channels == 0
    assert "secret" not in ada.messages


async def test_who_is_sent_away_during_its_handshake_is_caught_by_a_hook() -> None:
    sessions = {"token-of-ada": "ada"}
    manager = ConnectionManager()

    async def current_user(x_user: Annotated[str, Header()] = "") -> str | None:
        return sessions.get(x_user)

    @manager.on_connect
    async def look_again(connection: Connection) -> None:
        if connection.user not in sessions.values():
            raise PermissionDenied("logged out")

    app = router_app(manager, authenticate=current_user)
    peer = Peer(headers=[(b"x-user", b"token-of-ada")])
    peer.stall()  # authenticated, and not accepted yet
    call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
    await eventually(lambda: peer._sending == 1)
    sessions.clear()
    await manager.close_user("ada")
    peer.resume()
    assert await peer.wait_close() == 1008
    await asyncio.wait_for(call, 5)
    assert manager.connections == []


# Exceptions out of a task group.


@WRAPS
@pytest.mark.parametrize(
    "error",
    [
        HTTPException(404, "no such room"),
        PermissionDenied("no such room"),
        WebSocketException(4123, "no such room"),
        StarletteWebSocketException(4123, "no such room"),
    ],
)
async def test_denial_of_authorize_may_come_out_of_a_task_group(
    error: Exception, wrap: Callable[[Exception], Exception]
) -> None:
    async def authorize(connection: Any, action: str, channel: str) -> bool:
        if channel == "news":
            return True
        raise wrap(error)

    app = router_app(ConnectionManager(), "/ws/{channel}", inbound="commands", authorize=authorize)
    async with visit(app, "/ws/news") as peer:
        peer.say('{"type": "subscribe", "channel": "other"}')
        assert await peer.next() == '{"type":"error","code":"forbidden","text":"no such room"}'


async def test_peer_that_leaves_the_task_group_of_authenticate_is_no_error() -> None:
    async def authenticate(websocket: WebSocket) -> str:
        await websocket.accept()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(websocket.receive_text())
        return first.result()

    manager = ConnectionManager()
    async with visit(router_app(manager, authenticate=authenticate), "/ws") as peer:
        peer.leave()
    assert manager.stats().connects == 0


# Nothing leaks.


def test_an_identity_does_not_show_what_it_holds() -> None:
    assert "hunter2" not in repr(Identity("ada", info={"password": "hunter2"}))
