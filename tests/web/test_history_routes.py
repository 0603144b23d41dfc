"""Routes of FastAPI that answer with what `position` and `history` return, as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from pydantic import BaseModel
from starlette.testclient import TestClient

from wsbroadcast import ConnectionManager, History, Page, Position, Publication


class Room(BaseModel):
    """A model of the app's own."""

    name: str
    since: Position
    page: Page


def make_app(manager: ConnectionManager) -> FastAPI:
    app = FastAPI(lifespan=manager.lifespan, separate_input_output_schemas=False)

    @app.post("/say")
    async def say() -> list[Position | None]:
        return [(await manager.broadcast(data, channel="news")).position for data in ({"a": None}, b"\xff", "text")]

    @app.get("/plain")
    async def plain():  # type: ignore[no-untyped-def]  # as in a tutorial
        return await manager.history("news")

    @app.get("/inside")
    async def inside() -> dict[str, Any]:
        return {"page": await manager.history("news")}

    @app.get("/typed")
    async def typed() -> Page:
        return await manager.history("news")

    @app.get("/messages")
    async def messages() -> list[Publication]:
        return list((await manager.history("news")).messages)

    @app.get("/model", response_model=Room)
    async def model() -> dict[str, Any]:
        return {"name": "news", "since": await manager.position("news"), "page": await manager.history("news")}

    @app.get("/position")
    async def position():  # type: ignore[no-untyped-def]
        return {"position": await manager.position("news")}

    @app.get("/since")
    async def since(since: Position | None = None) -> list[str]:
        return [str(each.data) for each in (await manager.history("news", since=since)).messages]

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, since: Position | None = None) -> None:
        connection = await manager.connect(websocket, channels=["news"], since=since)
        await connection.send({"recovered": since is not None and connection.recovered["news"].recovered})
        await connection.wait_closed()

    return app


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(make_app(ConnectionManager(history={"news": History(messages=10)}))) as client:
        yield client


def test_page_is_an_answer(client: TestClient) -> None:
    at = client.post("/say").json()
    messages = [
        {"channel": "news", "data": {"a": None}, "position": at[0]},
        {"channel": "news", "data": "/w==", "encoding": "base64", "position": at[1]},
        {"channel": "news", "data": "text", "position": at[2]},
    ]
    page = {"messages": messages, "position": at[2], "is_complete": True}
    for path, expected in (
        ("/plain", page),
        ("/inside", {"page": page}),
        ("/typed", page),
        ("/messages", messages),
        ("/model", {"name": "news", "since": at[2], "page": page}),
        ("/position", {"position": at[2]}),
    ):
        answer = client.get(path)
        assert (path, answer.status_code, answer.json()) == (path, 200, expected)


def test_answers_are_documented(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/typed"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["type"] == "object"
    (parameter,) = paths["/since"]["get"]["parameters"]
    assert {"type": "string"} in parameter["schema"]["anyOf"]


def test_position_is_a_parameter(client: TestClient) -> None:
    at = client.post("/say").json()
    assert client.get("/since").json()[1:] == ["b'\\xff'", "text"]
    assert client.get("/since", params={"since": at[1]}).json() == ["text"]
    answer = client.get("/since", params={"since": "nonsense"})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", "since"])
    for since, recovered in ((at[2], True), ("other:1", False)):
        with client.websocket_connect(f"/ws?since={since}") as socket:
            assert socket.receive_json() == {"recovered": recovered}
