"""Messages with types over a real server: plain clients, clients of events and POST, in one room."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

import httpx2
from fastapi import FastAPI, Header
from pydantic import BaseModel
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.support.servers import serve_here
from wsbroadcast import Connection, ConnectionManager, Limits, create_router

PATIENT_SECONDS = 60


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str


class Typing(BaseModel):
    type: Literal["typing"] = "typing"


class Many(BaseModel):
    type: Literal["many"] = "many"
    items: list[Say | Typing]


class Said(BaseModel):
    type: Literal["said"] = "said"
    text: str
    by: str


def chat(**options: Any) -> tuple[FastAPI, ConnectionManager]:
    manager = ConnectionManager(**options)

    @manager.on(Say)
    async def said(message: Say, channel: str, user_agent: Annotated[str, Header()]) -> None:
        await manager.broadcast(Said(text=message.text, by=user_agent), channel=channel)

    @manager.on(Many)
    async def many(message: Many, connection: Connection) -> None:
        await connection.send(Said(text=f"{len(message.items)}", by="the server"))

    app = FastAPI()
    types: Any = Say | Typing | Many
    app.include_router(create_router(manager, "/rooms/{room}", receives=types, sends=Said | Typing, http=True))
    return app, manager


async def read(client: ClientConnection) -> Any:
    async with asyncio.timeout(PATIENT_SECONDS):
        return json.loads(await client.recv())


async def test_every_kind_of_client_is_understood_in_one_room() -> None:
    app, manager = chat()
    async with serve_here(app) as port:
        at = f"127.0.0.1:{port}/rooms/tea"
        async with (
            connect(f"ws://{at}", user_agent_header="plain") as plain,
            connect(f"ws://{at}", user_agent_header="events", subprotocols=[Subprotocol("wsbroadcast.v1")]) as events,
            httpx2.AsyncClient(headers={"user-agent": "post"}, timeout=PATIENT_SECONDS) as http,
        ):
            assert [(await read(events))["type"] for _ in range(2)] == ["hello", "subscribed"]

            await plain.send('{"type":"say","text":"1"}')
            assert await read(plain) == {"type": "said", "text": "1", "by": "plain"}
            assert (await read(events))["data"] == {"type": "said", "text": "1", "by": "plain"}

            await events.send('{"type":"publish","data":{"type":"say","text":"2"},"id":1}')
            assert await read(plain) == {"type": "said", "text": "2", "by": "events"}
            assert [(await read(events))["type"] for _ in range(2)] == ["message", "handled"]

            answer = await http.post(f"http://{at}", json={"type": "publish", "data": {"type": "say", "text": "3"}})
            assert (answer.status_code, answer.json()) == (200, {"type": "handled", "channel": "tea"})
            assert await read(plain) == {"type": "said", "text": "3", "by": "post"}
            assert (await read(events))["data"]["by"] == "post"

            for broken in ("{", b"\xff\xfe", '{"type":"say"}', '{"type":"shout"}'):
                await plain.send(broken)
                assert (await read(plain))["code"] == "invalid_data"
            await events.send('{"type":"publish","data":{"type":"say"},"id":2}')
            assert (await read(events))["errors"][0]["loc"] == ["say", "text"]
            answer = await http.post(f"http://{at}", json={"type": "publish", "data": {"type": "say"}})
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_data")

            await plain.send('{"type":"typing"}')
            assert await read(plain) == {"type": "typing"}
            assert (await read(events))["data"] == {"type": "typing"}
        assert manager.stats().invalid == 6


async def test_megabyte_of_nonsense_is_answered_shortly_and_the_connection_stays() -> None:
    app, manager = chat(limits=Limits(max_inbound_bytes=2_000_000))
    nonsense = [
        '{"type":"many","items":[' + ",".join(["{}"] * 340_000) + "]}",
        '{"type":"many","items":[' + ",".join(['{"type":"say","text":1}'] * 45_000) + "]}",
        '{"type":"many","items":' + "[" * 500_000 + "]" * 500_000 + "}",
        "[" * 1_000_000,
        '{"type":' * 125_000,
    ]
    async with serve_here(app) as port, connect(f"ws://127.0.0.1:{port}/rooms/tea") as client:
        for raw in nonsense[1:]:
            assert len(raw) >= 1_000_000
            await client.send(raw)
            async with asyncio.timeout(PATIENT_SECONDS):
                answer = await client.recv()
            assert len(answer) < 300
            assert json.loads(answer)["code"] == "invalid_data"
        await client.send(nonsense[0])  # of which each may be a `Typing`
        assert await read(client) == {"type": "said", "text": "340000", "by": "the server"}
    assert manager.stats().invalid == 4
