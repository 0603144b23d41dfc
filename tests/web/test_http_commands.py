"""What clients say by POST: to publish and to call, with the rights that they would have on a WebSocket."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from starlette.testclient import TestClient

from wsbroadcast import (
    Access,
    Connection,
    ConnectionManager,
    Handshake,
    History,
    Identity,
    Limits,
    TokenFrom,
    create_router,
    create_sse_router,
)

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
