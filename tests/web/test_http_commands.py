"""What clients say by POST: to publish and to call, with the rights that they would have on a WebSocket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import eventually
from tests.support.servers import serve_here
from tests.support.sse import Response, read_head, request_bytes
from wsbroadcast import (
    Access,
    Connection,
    ConnectionManager,
    Handshake,
    History,
    Identity,
    Limits,
    PermissionDenied,
    TokenFrom,
    create_router,
    create_sse_router,
)
from wsbroadcast.web import http_streams

JSON = {"content-type": "application/json"}


def served(manager: ConnectionManager, **options: Any) -> TestClient:
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}", http=True, **options))
    return TestClient(app)


def post(client: TestClient, asked: object, path: str = "/ws/news", **headers: str) -> tuple[int, Any]:
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    response = client.post(path, content=content, headers=JSON | headers)
    return response.status_code, response.json()


def test_what_is_posted_reaches_the_channel_and_is_answered_with_its_position() -> None:
    manager = ConnectionManager(history=History())
    with served(manager) as client, client.websocket_connect("/ws/news") as one:
        status, answer = post(client, {"type": "publish", "data": {"x": 1}, "id": 7})
        assert status == 200
        assert answer == {"type": "published", "channel": "news", "position": answer["position"], "id": 7}
        assert one.receive_json() == {"x": 1}


def test_exclude_takes_the_id_that_hello_has_told() -> None:
    manager = ConnectionManager()
    with served(manager) as client, client.websocket_connect("/ws/news", ["wsbroadcast.v1"]) as one:
        hello = one.receive_json()
        assert one.receive_json()["type"] == "subscribed"
        assert post(client, {"type": "publish", "data": "not for one", "exclude": hello["id"]})[0] == 200
        assert post(client, {"type": "publish", "data": "for all"})[0] == 200
        assert one.receive_json()["data"] == "for all"


def test_a_method_is_called() -> None:
    manager = ConnectionManager()

    @manager.method("add")
    async def add(a: int, b: int) -> int:
        return a + b

    with served(manager) as client:
        assert post(client, {"type": "call", "name": "add", "args": {"a": 1, "b": 2}}) == (
            200,
            {"type": "result", "data": 3},
        )
        status, answer = post(client, {"type": "call", "name": "add", "args": {"a": "secret"}})
        assert (status, answer["code"]) == (400, "invalid_arguments")
        assert "secret" not in json.dumps(answer)
        assert post(client, {"type": "call", "name": "no"})[0] == 404


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ([], 400, "invalid_command"),
        (None, 400, "invalid_command"),
        ({"type": "destroy"}, 400, "invalid_command"),
        ({"type": "publish"}, 400, "invalid_command"),
        ({"type": "publish", "channel": 5, "data": 1}, 400, "invalid_command"),
        ({"type": "publish", "channel": "", "data": 1}, 403, "forbidden"),
        ({"type": "publish", "channel": "other", "data": 1}, 403, "forbidden"),
        ({"type": "subscribe", "channel": "news"}, 400, "not_supported"),
        ({"type": "refresh", "token": "x"}, 400, "not_supported"),
        (b"{", 400, "invalid_command"),
        (b"", 400, "invalid_command"),
        (b"\xff", 400, "invalid_command"),
        (b"[" * 60_000, 400, "invalid_command"),
        (b'{"type":"publish","data":1e999}', 400, "invalid_command"),
        (b'{"type":"publish","data":NaN}', 400, "invalid_command"),
        (b'{"type":"publish","data":"\\ud800"}', 400, "invalid_command"),
    ],
)
def test_bad_commands_are_answered_by_code_and_nobody_hears_of_them(asked: object, status: int, code: str) -> None:
    manager = ConnectionManager()
    with served(manager) as client, client.websocket_connect("/ws/news") as one:
        found, answer = post(client, asked)
        assert (found, answer["code"]) == (status, code)
        assert post(client, {"type": "publish", "data": "next"})[0] == 200
        assert one.receive_text() == "next"


def test_inbound_ignore_forbids_to_publish() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_sse_router(manager, "/sse/{channel}"))
    with TestClient(app) as client:
        assert post(client, {"type": "publish", "data": 1}, "/sse/news")[0] == 403


def test_inbound_handle_forbids_to_publish_past_the_hooks() -> None:
    manager = ConnectionManager()

    @manager.on_message
    def moderate(connection: Connection, message: str | bytes) -> None:
        raise PermissionDenied("no")

    with served(manager, inbound="handle") as client:
        status, answer = post(client, {"type": "publish", "data": 1})
        assert (status, answer["code"]) == (403, "forbidden")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_taken_which_no_form_of_another_page_can_send(kind: str) -> None:
    with served(ConnectionManager()) as client:
        response = client.post("/ws/news", content=b'{"type":"publish","data":1}', headers={"content-type": kind})
        assert (response.status_code, response.json()["code"]) == (400, "invalid_command")


@pytest.mark.parametrize("headers", [{"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}])
def test_a_page_of_another_origin_says_nothing(headers: dict[str, str]) -> None:
    with served(ConnectionManager()) as client:
        response = client.post("/ws/news", json={"type": "publish", "data": 1}, headers=headers)
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_who_it_is_and_what_it_may_is_asked_for_each_request() -> None:
    asked: list[tuple[object, str, str | None]] = []

    async def user(token: Annotated[str, Depends(TokenFrom(header=True, first_message=True))]) -> Identity:
        if token == "bad":
            raise HTTPException(401, "no")
        return Identity(token)

    def authorize(connection: Connection | Handshake, action: str, channel: str | None) -> bool:
        asked.append((connection.user, action, channel))
        return connection.user == "ann"

    with served(ConnectionManager(), access=Access(authenticate=user, authorize=authorize)) as client:
        command = {"type": "publish", "data": 1}
        assert client.post("/ws/news", json=command).status_code == 401  # and waits for no first message
        assert client.post("/ws/news", json=command, headers={"authorization": "Bearer bad"}).status_code == 401
        assert post(client, command, authorization="Bearer bob")[0] == 403
        assert post(client, command, authorization="Bearer ann")[0] == 200
        assert asked == [("bob", "publish", "news"), ("ann", "publish", "news")]


def test_the_limits_of_clients_hold_for_requests() -> None:
    manager = ConnectionManager(limits=Limits(max_inbound_bytes=100, max_router_inbound_rate=0.001, inbound_burst=3))
    with served(manager) as client:
        status, answer = post(client, {"type": "publish", "data": "x" * 100})
        assert (status, answer["code"]) == (413, "limit_exceeded")
        assert [post(client, {"type": "publish", "data": "x"})[0] for _ in range(3)] == [200, 200, 429]
    assert manager.stats().limited == {"max_inbound_bytes": 1, "max_router_inbound_rate": 1}


def test_a_channel_that_is_none_is_refused() -> None:
    with served(ConnectionManager()) as client:
        response = client.post("/ws/%00", json={"type": "publish", "data": 1})
        assert response.status_code == 403


def test_without_authorize_a_request_publishes_no_further_than_a_connection() -> None:
    manager = ConnectionManager()
    with served(manager, inbound="commands") as client, client.websocket_connect("/ws/secret") as one:
        command = {"type": "publish", "channel": "secret", "data": "from elsewhere"}
        status, answer = post(client, command)
        assert (status, answer["code"]) == (403, "forbidden")
        with client.websocket_connect("/ws/news", ["wsbroadcast.v1"]) as two:
            assert [two.receive_json()["type"] for _ in range(2)] == ["hello", "subscribed"]
            two.send_json(command)
            assert two.receive_json()["code"] == "forbidden"
        assert post(client, {"type": "publish", "data": "its own"}, "/ws/secret")[0] == 200
        assert one.receive_json() == "its own"


def test_authenticate_may_treat_a_request_as_a_websocket() -> None:
    async def user(websocket: WebSocket) -> str:
        await websocket.accept()
        await websocket.send_text("welcome")
        if "bad" in websocket.query_params:
            await websocket.close(4403, "no")
            raise WebSocketDisconnect(4403)
        return "ann"

    with served(ConnectionManager(), authenticate=user) as client:
        assert post(client, {"type": "publish", "data": 1})[0] == 200
        assert client.head("/ws/news").status_code == 200
        assert client.post("/ws/news?bad", json={"type": "publish", "data": 1}).status_code == 403
        assert client.head("/ws/news?bad").status_code == 403


# On a server, where a client can leave.


@asynccontextmanager
async def posting(port: int, body: bytes, length: int | None = None) -> AsyncIterator[Any]:
    """Send a command, or the beginning of one; yield what reads the answer. The client leaves at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    size = str(len(body) if length is None else length)
    head = {"Content_Type": "application/json", "Content_Length": size, "Connection": "close"}
    writer.write(request_bytes(port, "/ws/news", "POST", **head) + body)

    async def answer() -> tuple[Response, Any]:
        response = await read_head(reader, writer)
        return response, json.loads(await response.whole())

    try:
        yield answer
    finally:
        writer.transport.abort()


def app_of(manager: ConnectionManager) -> FastAPI:
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}", http=True))
    return app


CALL = b'{"type":"call","name":"wait"}'


async def test_what_a_client_has_called_is_cancelled_when_it_leaves() -> None:
    manager = ConnectionManager()
    ran: list[str] = []

    @manager.method("wait")
    async def wait() -> None:
        ran.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            ran.append("ended")

    async with serve_here(app_of(manager)) as port:
        async with posting(port, CALL):
            await eventually(lambda: ran == ["begun"])
        await eventually(lambda: ran == ["begun", "ended"])


async def test_so_many_calls_of_a_client_run_at_once_on_requests_of_its_own_as_well() -> None:
    manager = ConnectionManager()
    entered, release = threading.Event(), threading.Event()
    begun: list[int] = []

    @manager.method("wait")
    async def wait() -> None:
        begun.append(1)
        await asyncio.Event().wait()

    @manager.method("thread")
    def thread() -> None:
        entered.set()
        release.wait(10)

    async with serve_here(app_of(manager)) as port, AsyncExitStack() as stack:
        async with posting(port, CALL.replace(b"wait", b"thread")):
            await eventually(entered.is_set)
        for _ in range(15):
            await stack.enter_async_context(posting(port, CALL))
        await eventually(lambda: len(begun) == 15)
        async with posting(port, CALL) as answer:  # the thread's client has left, and the thread runs on
            response, said = await answer()
            assert (response.status, said["code"]) == (429, "limit_exceeded")
        release.set()
        await eventually(lambda: "wsbroadcast call of thread" not in {task.get_name() for task in asyncio.all_tasks()})
        async with posting(port, CALL):
            await eventually(lambda: len(begun) == 16)


@asynccontextmanager
async def watching(app: FastAPI) -> AsyncIterator[tuple[int, list[BaseException | None]]]:
    """Serve an app; yield the port, and the errors with which requests ended, or `None`."""
    ended: list[BaseException | None] = []

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        except BaseException as error:
            ended.append(error)
        else:
            if scope["type"] == "http":
                ended.append(None)

    async with serve_here(watched) as port:
        yield port, ended


async def test_a_client_that_leaves_inside_its_command_is_no_error() -> None:
    async with watching(app_of(ConnectionManager())) as (port, ended):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = {"Content_Type": "application/json", "Content_Length": "100", "Expect": "100-continue"}
        writer.write(request_bytes(port, "/ws/news", "POST", **head))
        await reader.readuntil(b"\r\n\r\n")  # it is being read
        writer.transport.abort()
        await eventually(lambda: ended)
    assert ended == [None]


@pytest.mark.parametrize("method", ["POST", "HEAD", "GET"])
async def test_a_client_that_leaves_while_it_is_asked_who_it_is_is_no_error(method: str) -> None:
    asked: list[str] = []

    async def user(websocket: WebSocket) -> str:
        await websocket.accept()
        asked.append(method)
        return await websocket.receive_text()  # which no request ever sends

    app = FastAPI()
    app.include_router(create_router(ConnectionManager(), "/ws/{channel}", http=True, authenticate=user))
    async with watching(app) as (port, ended):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes(port, "/ws/news", method))
        await eventually(lambda: asked)
        writer.transport.abort()
        await eventually(lambda: ended)
    assert ended == [None]


async def test_a_body_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_streams, "BODY_SECONDS", 0.1)
    async with serve_here(app_of(ConnectionManager())) as port, posting(port, b"{", 100) as answer:
        response, said = await answer()
        assert (response.status, said["code"]) == (408, "invalid_command")
