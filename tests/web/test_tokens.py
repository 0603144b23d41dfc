"""Where a client may put its token: TokenFrom, alone and behind a router."""

# No postponed annotations: FastAPI reads them.

import asyncio
import time
from contextlib import suppress
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, Refused, eventually, lifespan, refusal, turns, visit
from wsbroadcast import (
    Access,
    ConfigurationError,
    Connection,
    ConnectionManager,
    Limits,
    TokenFrom,
    connection_dependency,
    create_router,
)
from wsbroadcast.protocols.commands import MAX_TOKEN_CHARACTERS

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2ln_bmF0dXJl-ZQ"


def _app(manager: ConnectionManager, source: TokenFrom, **options: Any) -> FastAPI:
    """An app whose user is the token that was found."""

    async def current_user(token: Annotated[str, Depends(source)]) -> str:
        if token == "stolen":
            raise HTTPException(401, "no longer")
        return token[:100]

    app = FastAPI()
    dependencies = options.pop("dependencies", None)
    access = Access(authenticate=current_user, **options)
    app.include_router(create_router(manager, access=access, dependencies=dependencies))

    @app.get("/me")
    async def me(user: Annotated[str, Depends(current_user)]) -> str:
        return user

    return app


EVERYWHERE = TokenFrom(header=True, subprotocol="bearer", cookie="session", query="token")


async def _user(source: TokenFrom, *, query: bytes = b"", **options: Any) -> Any:
    """Connect, and return who it is."""
    manager = ConnectionManager()
    peer = Peer("/ws", **options)
    peer.scope["query_string"] = query
    async with visit(_app(manager, source), "/ws", peer):
        [connection] = manager.connections
        return connection.user


# Where it is found.


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (TokenFrom(header=True), {"headers": [(b"authorization", b"Bearer " + JWT.encode())]}),
        (TokenFrom(header=True), {"headers": [(b"authorization", b"bEARER   " + JWT.encode())]}),
        (TokenFrom(subprotocol="bearer"), {"subprotocols": ["bearer", JWT]}),
        (TokenFrom(subprotocol="bearer"), {"subprotocols": ["chat.v1", "bearer", JWT]}),
        (TokenFrom(cookie="session"), {"headers": [(b"cookie", b"a=b; session=" + JWT.encode() + b"; c=d")]}),
        (TokenFrom(query="token"), {"query": b"a=b&token=" + JWT.encode()}),
    ],
)
async def test_it_is_found_where_it_may_be_and_nowhere_else(source: TokenFrom, options: dict[str, Any]) -> None:
    assert await _user(source, **options) == JWT
    assert await _user(EVERYWHERE, **options) == JWT
    others = [
        TokenFrom(header=True),
        TokenFrom(subprotocol="other"),
        TokenFrom(cookie="other"),
        TokenFrom(query="other"),
    ]
    for other in others:
        if not (source._header and other._header):
            with pytest.raises(Refused):
                await _user(other, **options)


async def test_the_first_place_that_has_one_counts() -> None:
    options: dict[str, Any] = {
        "headers": [(b"authorization", b"Bearer header"), (b"cookie", b"session=cookie")],
        "subprotocols": ["bearer", "subprotocol"],
        "query": b"token=query",
    }
    assert await _user(EVERYWHERE, **options) == "header"
    options["headers"][0] = (b"authorization", b"Basic dXNlcjpwYXNz")
    assert await _user(EVERYWHERE, **options) == "subprotocol"
    options["subprotocols"] = ["bearer"]
    assert await _user(EVERYWHERE, **options) == "cookie"
    options["headers"].pop()
    assert await _user(EVERYWHERE, **options) == "query"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"headers": [(b"authorization", b"")]},
        {"headers": [(b"authorization", b"Bearer")]},
        {"headers": [(b"authorization", b"Bearer ")]},
        {"headers": [(b"authorization", b"Bearer\t" + JWT.encode())]},
        {"headers": [(b"authorization", b"Bearer a b")]},
        {"headers": [(b"authorization", b"Basic dXNlcjpwYXNz")]},
        {"headers": [(b"authorization", JWT.encode())]},
        {"headers": [(b"authorization", b"Bearer " + JWT.encode())] * 2},
        {"headers": [(b"authorization", b"Bearer \x80\xff")]},
        {"headers": [(b"authorization", b"Bearer a\x00b")]},
        {"headers": [(b"authorization", b"Bearer a\x1b[2J")]},
        {"headers": [(b"authorization", b"Bearer " + b"x" * (MAX_TOKEN_CHARACTERS + 1))]},
        {"headers": [(b"cookie", b"session=")]},
        {"headers": [(b"cookie", b"session=\xe9\x80")]},
        {"headers": [(b"cookie", b"\xff" * 1000)]},
        {"headers": [(b"cookie", b"session=" + b"x" * (MAX_TOKEN_CHARACTERS + 1))]},
        {"subprotocols": []},
        {"subprotocols": ["bearer"]},
        {"subprotocols": [JWT]},
        {"subprotocols": [JWT, "bearer"]},
        {"subprotocols": ["Bearer", JWT]},
        {"subprotocols": ["bearer", ""]},
        {"subprotocols": ["bearer", "\x80\xff"]},
        {"subprotocols": [f"p{number}" for number in range(10_000)] + ["bearer", JWT]},
        {"query": b"token="},
        {"query": b"token=%00"},
        {"query": b"token=%FF%FE"},
        {"query": b"token=a%20b"},
        {"query": b"token=a%0d%0ab"},
        {"query": b"token=" + b"x" * (MAX_TOKEN_CHARACTERS + 1)},
        {"query": b"&&&=&%&token"},
    ],
    ids=lambda options: str(options)[:60],
)
async def test_what_is_no_token_is_none(options: dict[str, Any]) -> None:
    with pytest.raises(Refused) as refused:
        await _user(EVERYWHERE, **options)
    assert refused.value.code == 1008


@given(
    st.lists(st.tuples(st.sampled_from([b"authorization", b"cookie"]), st.binary(max_size=60)), max_size=3),
    st.lists(st.sampled_from(["bearer", "a", "", "\x80\xff"]), max_size=4),
    st.binary(max_size=60),
)
async def test_no_handshake_makes_it_fail(
    headers: list[tuple[bytes, bytes]], subprotocols: list[str], query: bytes
) -> None:
    peer = Peer("/ws", headers=headers, subprotocols=subprotocols)
    peer.scope["query_string"] = query
    token = "none"
    with suppress(HTTPException):
        token = await EVERYWHERE(peer.websocket)
    assert token.isascii()
    assert token.isprintable()


def test_without_a_token_it_is_401_that_says_so() -> None:
    with TestClient(_app(ConnectionManager(), EVERYWHERE)) as client:
        with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws"):
            pass
        assert (refused.value.status_code, refused.value.text) == (401, "no token")
        assert refused.value.headers["www-authenticate"] == "Bearer"


def test_the_same_dependency_serves_http_routes() -> None:
    source = TokenFrom(header=True, subprotocol="bearer", cookie="session", query="token", first_message=True)
    with TestClient(_app(ConnectionManager(), source)) as client:
        assert client.get("/me", headers={"authorization": f"Bearer {JWT}"}).json() == JWT
        assert client.get("/me?token=ada").json() == "ada"
        assert client.get("/me", headers={"cookie": "session=ada"}).json() == "ada"
        response = client.get("/me", headers={"sec-websocket-protocol": f"bearer, {JWT}"})
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cookie": ""},
        {"first_message": 0},
        {"first_message": -1},
        {"first_message": "10"},
        {"first_message": 1e999},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        TokenFrom(**options)


# Subprotocols.


@pytest.mark.parametrize(
    ("offered", "spoken", "accepted"),
    [
        (["bearer", JWT], (), "bearer"),
        (["chat.v1", "bearer", JWT], (), "bearer"),
        (["chat.v1", "bearer", JWT], ("chat.v1",), "chat.v1"),
        (["chat.v2", "chat.v1", "bearer", JWT], ("chat.v1", "chat.v2"), "chat.v2"),
        (["bearer", JWT, "chat.v1"], "chat.v1", "chat.v1"),
        (["bearer", "chat.v1"], ("chat.v2",), "bearer"),
    ],
)
async def test_the_answer_is_the_apps_protocol_or_the_name_before_the_token(
    offered: list[str], spoken: Any, accepted: str
) -> None:
    app = _app(ConnectionManager(), EVERYWHERE, subprotocols=spoken)
    async with visit(app, "/ws", subprotocols=offered) as peer:
        assert peer.subprotocol == accepted


@pytest.mark.parametrize(
    ("offered", "accepted"),
    [([], None), (["other"], None), (["other", "chat.v1"], "chat.v1"), (["x"] * 10_000 + ["chat.v1"], None)],
)
async def test_without_a_token_only_the_apps_protocol_is_answered(offered: list[str], accepted: str | None) -> None:
    app = FastAPI()
    app.include_router(create_router(ConnectionManager(), access=Access(subprotocols=["chat.v1"])))
    async with visit(app, "/ws", subprotocols=offered) as peer:
        assert peer.subprotocol == accepted


# The first message.


@pytest.mark.parametrize("subprotocols", [[], ["chat.v1"]])
async def test_the_first_message_may_be_the_token(manager: ConnectionManager, subprotocols: list[str]) -> None:
    app = _app(manager, TokenFrom(first_message=True), subprotocols=["chat.v1"])
    async with visit(app, "/ws", subprotocols=subprotocols) as peer:
        assert peer.subprotocol == (subprotocols[0] if subprotocols else None)
        await manager.broadcast("nobody hears this")
        assert manager.stats().connections == 0
        peer.say(JWT)
        await eventually(lambda: len(manager.connections) == 1)
        assert manager.connections[0].user == JWT
        peer.say("hello")
        assert await peer.next() == "hello"


@pytest.mark.parametrize("is_router", [False, True])
async def test_the_first_message_may_be_the_token_of_a_socket_that_is_accepted(
    manager: ConnectionManager, is_router: bool
) -> None:
    source = TokenFrom(first_message=True)
    peer = Peer()
    if not is_router:
        await peer.websocket.accept()
        peer.say(JWT)
        assert await source(peer.websocket) == JWT
    else:

        async def accept(websocket: WebSocket) -> None:
            await websocket.accept()

        async with visit(_app(manager, source, dependencies=[Depends(accept)]), "/ws", peer):
            peer.say(JWT)
            await eventually(lambda: len(manager.connections) == 1)
            assert manager.connections[0].user == JWT
            peer.say("hello")
            assert await peer.next() == "hello"
    assert [event["type"] for event in peer.sent].count("websocket.accept") == 1


@pytest.mark.parametrize("is_first", [True, False])
async def test_the_first_message_serves_all_who_ask_for_the_token(is_first: bool) -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    async def current_user(token: Annotated[str, Depends(TokenFrom(first_message=True))]) -> str:
        return f"user of {token}"

    User = Annotated[str, Depends(current_user)]  # noqa: N806
    Member = Annotated[Connection, Depends(connection_dependency(authenticate=current_user))]  # noqa: N806

    @app.websocket("/user-first")
    async def user_first(user: User, connection: Member) -> None:
        await connection.send([user, connection.user])

    @app.websocket("/user-last")
    async def user_last(connection: Member, user: User) -> None:
        await connection.send([user, connection.user])

    async with lifespan(app), visit(app, "/user-first" if is_first else "/user-last") as peer:
        peer.say("ada")
        assert await peer.next() == '["user of ada","user of ada"]'


async def test_an_endpoint_that_connects_by_itself_accepts_with_the_name_before_the_token(
    manager: ConnectionManager,
) -> None:
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket, token: Annotated[str, Depends(EVERYWHERE)]) -> None:
        async with manager.connect(websocket, user=token) as connection:
            await connection.wait_closed()

    async with lifespan(app), visit(app, "/ws", subprotocols=["bearer", JWT]) as peer:
        assert peer.subprotocol == "bearer"


async def test_a_token_of_the_handshake_is_not_waited_for() -> None:
    source = TokenFrom(header=True, first_message=True)
    assert await _user(source, headers=[(b"authorization", b"Bearer ada")]) == "ada"


async def test_who_says_nothing_is_closed_with_4401_in_time(manager: ConnectionManager) -> None:
    started = time.monotonic()
    async with visit(_app(manager, TokenFrom(first_message=0.1)), "/ws") as peer:
        assert await peer.wait_close() == 4401
        assert time.monotonic() - started >= 0.1
        assert peer.close is not None
        assert peer.close["reason"] == "no token came in time"
        await turns()
        assert manager.stats().connects == 0


def test_the_deadline_is_ten_seconds() -> None:
    assert TokenFrom(first_message=True)._deadline == 10


@pytest.mark.parametrize(
    "first", [b"bytes", b"", "", " ", "two words", "é", "a\x00b", "x" * (MAX_TOKEN_CHARACTERS + 1), "\ud800", "stolen"]
)
@pytest.mark.parametrize("has_both_keys", [False, True])
async def test_a_first_message_that_is_no_token_closes_with_4401(
    manager: ConnectionManager, first: str | bytes, has_both_keys: bool
) -> None:
    async with visit(_app(manager, TokenFrom(first_message=True)), "/ws", has_both_keys=has_both_keys) as peer:
        peer.say(first)
        peer.say("hello")
        assert await peer.wait_close() == 4401
    assert manager.stats().connects == 0
    assert peer.messages == []


@pytest.mark.parametrize("how", ["leaves", "fails to be accepted"])
async def test_who_goes_before_it_says_who_it_is_is_no_error(manager: ConnectionManager, how: str) -> None:
    app = _app(manager, TokenFrom(first_message=True))
    peer = Peer("/ws")
    if how == "leaves":
        async with visit(app, "/ws", peer):
            peer.leave()
    else:
        peer.error = OSError("gone")
        await refusal(app, peer=peer)
    assert manager.stats().connects == 0


async def test_who_has_not_said_who_it_is_counts_for_the_limits_alone() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=2))
    app = _app(manager, TokenFrom(first_message=True))
    async with visit(app, "/ws") as silent, visit(app, "/ws") as ada:
        ada.say("ada")
        await eventually(lambda: len(manager.connections) == 1)
        await refusal(app)
        assert manager.stats().limited == {"max_connections": 1}
        silent.leave()
        await turns(20)
        async with visit(app, "/ws") as eve:
            eve.say("eve")
            await eventually(lambda: len(manager.connections) == 2)


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))
    app = _app(manager, TokenFrom(first_message=True))
    peer = Peer("/ws")
    call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
    await peer.wait_for(lambda: peer.accepted is not None)
    call.cancel()
    await asyncio.wait({call})
    assert call.cancelled()
    async with visit(app, "/ws") as ada:
        ada.say("ada")
        await eventually(lambda: len(manager.connections) == 1)


async def test_a_hook_sees_only_who_has_said_who_it_is(manager: ConnectionManager) -> None:
    seen: list[str] = []

    @manager.on_connect
    async def greet(connection: Connection) -> None:
        seen.append(str(connection.user))
        await connection.send("welcome")

    app = _app(manager, TokenFrom(first_message=True))
    async with lifespan(app), visit(app, "/ws") as peer:
        await turns(20)
        assert seen == []
        peer.say("ada")
        assert await peer.next() == "welcome"
        assert seen == ["ada"]


# Nothing leaks.


def test_no_token_reaches_our_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "wsbroadcast")
    source = TokenFrom(header=True, subprotocol="bearer", cookie="session", query="token", first_message=0.05)

    async def refuse(token: Annotated[str, Depends(source)]) -> None:
        return None

    app = FastAPI()
    app.include_router(create_router(ConnectionManager(), authenticate=refuse))
    with TestClient(app) as client:
        for headers in ({"authorization": "Bearer SECRET"}, {"cookie": "session=SECRET"}, {}):
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws?token=SECRET", headers=headers):
                pass
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/ws", subprotocols=["bearer", "SECRET"]):
            pass
        with client.websocket_connect("/ws") as socket:
            socket.send_text("SECRET")
            with pytest.raises(WebSocketDisconnect):
                socket.receive_text()
    assert "SECRET" not in "".join(record.getMessage() for record in caplog.records if record.name == "wsbroadcast")
