"""Messages of clients that have types: read, handled or broadcast, and answered by code where they don't fit."""

# No postponed annotations: FastAPI reads them, and most functions here are local.

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from fastapi import BackgroundTasks, Body, Depends, FastAPI, Header, HTTPException, Request, WebSocket
from pydantic import BaseModel, ConfigDict, Discriminator, Field, SecretStr, Tag, field_validator
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from typing_extensions import TypedDict

from tests.support.asgi import eventually
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import (
    EVERYONE,
    Access,
    Audience,
    CallError,
    ConfigurationError,
    Connection,
    ConnectionDep,
    ConnectionManager,
    History,
    Limits,
    Message,
    PermissionDenied,
    create_router,
    create_routes,
    create_sse_router,
)
from wsbroadcast.testing import Peer

EVENTS = ["wsbroadcast.v1"]
SECRET = "s3cret-of-a-client"


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str


class Typing(BaseModel):
    type: Literal["typing"] = "typing"


class Said(BaseModel):
    type: Literal["said"] = "said"
    text: str
    by: str = "somebody"


class Short(BaseModel):
    type: Literal["say"] = "say"
    text: str = Field(max_length=3)


class Dated(BaseModel):
    model_config = ConfigDict(strict=True)
    at: date


class Leave(TypedDict):
    type: Literal["leave"]


class Login(BaseModel):
    type: Literal["login"] = "login"
    password: SecretStr


class Faulty(BaseModel):
    type: Literal["faulty"] = "faulty"
    key: str

    @field_validator("key")
    @classmethod
    def look_up(cls, key: str) -> str:
        return {"a": "b"}[key]


def app_of(manager: ConnectionManager, path: str = "/ws/{channel}", **options: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(create_router(manager, path, **({"receives": Say | Typing} | options)))
    return app


@asynccontextmanager
async def talking(app: Any, *paths: str, subprotocols: list[str] | None = None) -> AsyncIterator[list[Peer]]:
    """Run an app, and yield clients of it that have read what they are greeted with."""
    async with app.router.lifespan_context(app):
        peers = [Peer(app, path, subprotocols=subprotocols or []) for path in paths]
        for peer in peers:
            await peer.__aenter__()
            if subprotocols:
                await peer.receive_json()
                await peer.receive_json()
        try:
            yield peers
        finally:
            for peer in peers:
                await peer.__aexit__(None, None, None)


def error(code: str, text: str, **more: Any) -> dict[str, Any]:
    return {"type": "error", "code": code, "text": text, **more}


UNFIT = [
    ("{", {"loc": [], "type": "json_invalid", "msg": "Invalid JSON"}),
    (b"\xff", {"loc": [], "type": "json_invalid", "msg": "Invalid JSON"}),
    ("[]", {"loc": [], "type": "dict_type"}),
    ('{"type":"say"}', {"loc": ["say", "text"], "type": "missing", "msg": "Field required"}),
    (f'{{"type":"{SECRET}"}}', {"loc": [], "type": "union_tag_invalid"}),
    (f'{{"type":"say","text":["{SECRET}"]}}', {"loc": ["say", "text"], "type": "string_type"}),
]


# What doesn't fit.


@pytest.mark.parametrize("inbound", ["broadcast", "handle"])
async def test_message_that_does_not_fit_is_answered_and_counted(inbound: str) -> None:
    manager = ConnectionManager()
    async with talking(app_of(manager, inbound=inbound), "/ws/a", "/ws/a") as (peer, other):
        for count, (raw, mistake) in enumerate(UNFIT, 1):
            await peer.send(raw)
            answer = await peer.receive_json()
            assert answer | {"errors": []} == error("invalid_data", "the data doesn't fit", errors=[])
            assert answer["errors"][0] | mistake == answer["errors"][0]
            assert SECRET not in str(answer)
            assert manager.stats().invalid == count
        await other.send("{")
        assert (await other.receive_json())["code"] == "invalid_data"  # and nothing came before
        assert peer.close_code is None


@pytest.mark.parametrize(
    "asked", [{"type": "say"}, {"type": SECRET}, "text", [1], None, {"type": "say", "text": 1e400}]
)
async def test_data_of_a_publish_that_does_not_fit_is_answered_and_counted(asked: Any) -> None:
    manager = ConnectionManager()
    frame = json.dumps({"type": "publish", "data": asked, "id": 3}).replace("Infinity", "1e400")
    async with talking(app_of(manager), "/ws/a", subprotocols=EVENTS) as (peer,):
        await peer.send(frame)
        answer = await peer.receive_json()
        if "1e400" in frame:
            assert answer == error("invalid_command", "a command is JSON")
        else:
            assert answer | {"errors": []} == error("invalid_data", "the data doesn't fit", errors=[], id=3)
            assert SECRET not in str(answer)
        await peer.send({"type": "ping", "id": 4})
        assert await peer.receive_json() == {"type": "pong", "id": 4}
    assert manager.stats().invalid == 1


async def test_broken_json_of_events_is_an_error_with_types_and_a_close_without() -> None:
    async with talking(app_of(ConnectionManager()), "/ws/a", subprotocols=EVENTS) as (peer,):
        for _ in range(2):
            await peer.send("{")
            assert await peer.receive_json() == error("invalid_command", "a command is JSON")
    async with talking(app_of(ConnectionManager(), receives=None), "/ws/a", subprotocols=EVENTS) as (peer,):
        await peer.send("{")
        assert await peer.wait_closed() == 1007


async def test_strict_model_is_read_by_the_rules_of_json_whichever_way_it_comes() -> None:
    for subprotocols in ([], EVENTS):
        async with talking(app_of(ConnectionManager(), receives=Dated), "/ws/a", subprotocols=subprotocols) as (peer,):
            await peer.send(Dated(at=date(2026, 1, 2)))
            assert await peer.receive(Dated) == Dated(at=date(2026, 1, 2))


async def test_bytes_are_no_data_of_a_type() -> None:
    async with talking(app_of(ConnectionManager()), "/ws/a", subprotocols=EVENTS) as (peer,):
        await peer.send({"type": "publish", "data": "/wA=", "encoding": "base64"})
        assert (await peer.receive_json())["code"] == "invalid_data"


def posted(client: TestClient, data: Any, **more: Any) -> tuple[int, Any]:
    response = client.post("/ws/a", json={"type": "publish", "data": data, **more})
    return response.status_code, response.json()


def test_posts_are_answered_like_events() -> None:
    manager = ConnectionManager()
    with TestClient(app_of(manager, http=True)) as client, client.websocket_connect("/ws/a") as socket:
        status, answer = posted(client, {"type": "say"})
        assert (status, answer["code"], answer["errors"][0]["loc"]) == (400, "invalid_data", ["say", "text"])
        assert posted(client, {"type": "say", "text": "hi"}) == (200, {"type": "published", "channel": "a"})
        assert socket.receive_json() == {"type": "say", "text": "hi"}
        assert client.post("/ws/a", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert manager.stats().invalid == 1


# What fits, and no function handles.


async def test_message_without_a_handler_is_broadcast_as_its_type_has_it() -> None:
    manager = ConnectionManager()
    async with talking(app_of(manager), "/ws/a", "/ws/a") as (peer, other):
        await peer.send('{ "text":"hi", "type":"say", "more":1 }')
        for each in (peer, other):
            assert await each.receive() == '{"type":"say","text":"hi"}'
    assert manager.stats().invalid == 0


async def test_sender_may_be_left_out() -> None:
    async with talking(app_of(ConnectionManager(), include_sender=False), "/ws/a", "/ws/a") as (peer, other):
        await peer.send(Say(text="1"))
        assert await other.receive(Say | Typing) == Say(text="1")
        await other.send(Typing())
        assert await peer.receive(Say | Typing) == Typing()


async def test_typed_dict_is_broadcast_and_handled() -> None:
    manager = ConnectionManager()
    left: list[Any] = []
    async with talking(app_of(manager, receives=Say | Leave), "/ws/a") as (peer,):
        await peer.send({"type": "leave"})
        assert await peer.receive_json() == {"type": "leave"}

        @manager.on(Leave)
        async def leave(message: Leave, connection: Connection) -> None:
            left.append(message)
            await connection.send("bye")

        await peer.send({"type": "leave"})
        assert await peer.receive() == "bye"
        assert left == [{"type": "leave"}]


async def test_single_text_is_broadcast_as_json() -> None:
    async with talking(app_of(ConnectionManager(), receives=str), "/ws/a") as (peer,):
        await peer.send('"hi"')
        assert await peer.receive() == '"hi"'


async def test_message_without_a_handler_is_checked_by_what_is_sent() -> None:
    manager = ConnectionManager()
    async with talking(app_of(manager, sends=Short | Typing), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        assert await peer.receive_json() == {"type": "say", "text": "hi"}
        await peer.send(Say(text=SECRET))
        answer = await peer.receive_json()
        assert answer["code"] == "invalid_data"
        assert SECRET not in str(answer)
    assert manager.stats().invalid == 1


async def test_commands_publish_data_of_the_types() -> None:
    manager = ConnectionManager(sends={"b": Short | Typing})
    handled: list[Any] = []

    @manager.on(Typing)
    def typing(message: Typing, channel: str) -> None:
        handled.append((message, channel))

    app = app_of(manager, inbound="commands", authorize=lambda connection, action, channel: True)
    async with talking(app, "/ws/a") as (peer,):
        await peer.send("{")
        assert await peer.receive_json() == error("invalid_command", "a command is JSON")
        await peer.send({"type": "publish", "channel": "a", "data": {"type": "say", "text": "hi", "x": 1}, "id": 1})
        assert await peer.receive() == '{"type":"message","channel":"a","data":{"type":"say","text":"hi"}}'
        assert await peer.receive_json() == {"type": "published", "channel": "a", "id": 1}
        await peer.send({"type": "publish", "channel": "a", "data": {"type": "say"}, "id": 2})
        assert (await peer.receive_json())["code"] == "invalid_data"
        await peer.send({"type": "publish", "channel": "a", "data": {"type": "typing"}, "id": 3})
        assert await peer.receive_json() == {"type": "handled", "channel": "a", "id": 3}
        await peer.send({"type": "publish", "channel": "b", "data": {"type": "say", "text": SECRET}, "id": 4})
        assert (await peer.receive_json())["code"] == "invalid_data"
    assert handled == [(Typing(), "a")]


# What the manager says of a channel holds for routers without types, too.


async def test_client_of_a_router_without_types_is_told_what_the_channel_takes() -> None:
    manager = ConnectionManager(sends={"*": Said})
    app = app_of(manager, receives=None, accepts="json")
    async with talking(app, "/ws/a") as (peer,):
        await peer.send({"type": "said", "text": "hi", "more": 1})
        assert await peer.receive_json() == {"type": "said", "text": "hi", "by": "somebody"}
        await peer.send({"type": SECRET})
        assert await peer.receive_json() == error("invalid_data", "the data can't be sent, or is too large")
    assert manager.stats().invalid == 1


@pytest.mark.parametrize(("inbound", "subprotocols"), [("commands", []), ("commands", EVENTS), ("broadcast", EVENTS)])
async def test_command_is_told_what_the_channel_takes_where_the_router_has_no_types(
    inbound: str, subprotocols: list[str]
) -> None:
    manager = ConnectionManager(sends={"*": Said})
    app = app_of(manager, receives=None, inbound=inbound)
    async with talking(app, "/ws/a", subprotocols=subprotocols) as (peer,):
        await peer.send({"type": "publish", "channel": "a", "data": {"type": SECRET}})
        assert await peer.receive_json() == error("invalid_data", "the data can't be sent, or is too large")
        await peer.send({"type": "publish", "channel": "a", "data": {"type": "said", "text": "hi"}})
        assert (await peer.receive_json())["data"] == {"type": "said", "text": "hi", "by": "somebody"}
    assert manager.stats().invalid == 1


async def test_what_a_hook_makes_of_a_command_is_checked_too() -> None:
    manager = ConnectionManager(sends={"*": Said})
    instead: list[Any] = []

    @manager.on_broadcast
    async def change(message: Message, audience: Audience) -> object:
        return instead.pop(0)(json.loads(message.payload))

    async with talking(app_of(manager, receives=Said, inbound="commands"), "/ws/a") as (peer,):
        for make in (lambda sent: sent | {"data": {"text": 1}}, lambda sent: sent["data"], lambda sent: "text"):
            instead.append(make)
            await peer.send({"type": "publish", "channel": "a", "data": {"text": "hi"}})
            assert (await peer.receive_json())["code"] == "invalid_data"
        instead.append(lambda sent: sent | {"data": sent["data"] | {"by": "ada", "more": SECRET}})
        await peer.send({"type": "publish", "channel": "a", "data": {"text": "hi"}})
        message = {"type": "message", "channel": "a", "data": {"type": "said", "text": "hi", "by": "ada"}}
        assert await peer.receive_json() == message


# Functions that handle.


async def test_handler_is_called_with_the_message_the_connection_and_the_channel() -> None:
    manager = ConnectionManager()

    @manager.on(Say)
    async def said(message: Say, connection: Connection, channel: str) -> None:
        await manager.broadcast(Said(text=message.text, by=f"{connection.user}"), channel=channel)

    app = app_of(manager, authenticate=lambda: "ada", sends=Said | Typing, http=True)
    async with talking(app, "/ws/a", "/ws/a") as (peer, other):
        await peer.send(Say(text="hi"))
        for each in (peer, other):
            assert await each.receive(Said) == Said(text="hi", by="ada")
        await peer.send(Typing())
        assert await other.receive(Typing) == Typing()


async def test_handled_publish_of_events_is_answered() -> None:
    manager = ConnectionManager(history=History())
    seen: list[Any] = []

    @manager.on(Say)
    async def said(message: Say, channel: str) -> None:
        seen.append((message.text, channel))

    async with talking(app_of(manager), "/ws/a", subprotocols=EVENTS) as (peer,):
        await peer.send({"type": "publish", "data": {"type": "say", "text": "hi"}, "id": 1})
        assert await peer.receive_json() == {"type": "handled", "channel": "a", "id": 1}
        await peer.send({"type": "publish", "data": {"type": "typing"}, "id": 2})
        assert (await peer.receive_json())["data"] == {"type": "typing"}
        assert (await peer.receive_json())["type"] == "published"
        publish = {"type": "publish", "data": {"type": "say", "text": "2"}, "idempotency_key": "k", "client": "c" * 16}
        await peer.send(publish)
        assert (await peer.receive_json())["code"] == "not_supported"
    assert seen == [("hi", "a")]


def test_handler_is_called_for_posts_that_need_no_connection() -> None:
    manager = ConnectionManager()
    seen: list[Any] = []

    @manager.on(Typing)
    def typing(message: Typing, channel: str, websocket: WebSocket) -> None:
        seen.append((channel, websocket.headers["x-name"], threading.current_thread() is threading.main_thread()))

    @manager.on(Say)
    async def said(message: Say, connection: Connection) -> None:
        raise AssertionError

    with TestClient(app_of(manager, http=True, inbound="handle", receives=Say | Typing | Leave)) as client:
        client.headers["x-name"] = "ada"
        assert posted(client, {"type": "typing"}) == (200, {"type": "handled", "channel": "a"})
        status, answer = posted(client, {"type": "say", "text": "x"})
        assert (status, answer["code"]) == (400, "not_supported")
        status, answer = posted(client, {"type": "leave"})  # nobody handles it
        assert (status, answer["code"]) == (403, "forbidden")
    assert seen == [("a", "ada", False)]


async def test_function_of_a_union_handles_each_of_its_members() -> None:
    manager = ConnectionManager()
    seen: list[Any] = []

    @manager.on(Say | Typing)
    async def both(message: Annotated[Say | Typing, "either"]) -> None:
        seen.append(message)

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Typing())
        await peer.send(Say(text="x"))
        await peer.send("{")
        await peer.receive_json()
    assert seen == [Typing(), Say(text="x")]


async def test_function_may_tell_members_apart_that_are_no_models() -> None:
    manager = ConnectionManager()
    several = Annotated[
        Annotated[list[int], Tag("list")] | Annotated[Leave, Tag("leave")] | Annotated[str, Tag("text")],
        Discriminator(lambda value: {list: "list", dict: "leave"}.get(type(value), "text")),
    ]

    @manager.on(list[int])
    async def numbers(message: list[int], connection: Connection) -> None:
        await connection.send({"sum": sum(message)})

    @manager.on(Leave)
    async def left(message: Leave, connection: Connection) -> None:
        await connection.send({"left": message["type"]})

    async with talking(app_of(manager, receives=several), "/ws/a") as (peer,):
        for raw, answer in (("[1,2]", {"sum": 3}), ('{"type":"leave"}', {"left": "leave"}), ('"hi"', "hi")):
            await peer.send(raw)
            assert await peer.receive_json() == answer


async def test_messages_are_handled_one_after_the_other() -> None:
    manager = ConnectionManager()
    steps: list[str] = []
    gate = asyncio.Event()

    @manager.on(Say)
    async def said(message: Say) -> None:
        steps.append(f"{message.text} begins")
        if message.text == "1":
            await gate.wait()
        steps.append(f"{message.text} ends")

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Say(text="1"))
        await peer.send(Say(text="2"))
        await eventually(lambda: steps == ["1 begins"])
        gate.set()
        await eventually(lambda: len(steps) == 4)
    assert steps == ["1 begins", "1 ends", "2 begins", "2 ends"]


@pytest.mark.parametrize("subprotocols", [[], EVENTS])
@pytest.mark.parametrize(
    ("raised", "answer"),
    [
        (CallError("sold_out", "no seats"), error("sold_out", "no seats")),
        (PermissionDenied("not yours"), error("forbidden", "not yours")),
        (HTTPException(403, "not yours"), error("forbidden", "not yours")),
        (HTTPException(500, SECRET), error("failed", "a mistake of the server's")),
        (KeyError(SECRET), error("failed", "a mistake of the server's")),
        (asyncio.CancelledError(), error("failed", "a mistake of the server's")),
        (ExceptionGroup("some", [PermissionDenied("not yours")]), error("forbidden", "not yours")),
    ],
)
async def test_handler_that_raises_answers_by_code_and_never_closes(
    raised: BaseException, answer: dict[str, Any], subprotocols: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    manager = ConnectionManager()

    @manager.on(Say)
    async def said(message: Say) -> None:
        raise raised

    async with talking(app_of(manager), "/ws/a", subprotocols=subprotocols) as (peer,):
        for _ in range(2):
            await peer.send(Say(text="hi"))
            assert await peer.receive_json() == answer
    failed = answer["code"] == "failed"
    assert [each.event for each in caplog.records] == ["handler.failed"] * 2 * failed  # type: ignore[attr-defined]
    assert manager.stats().hook_errors == 2 * failed


async def test_handler_that_the_server_cancels_is_no_failure() -> None:
    manager = ConnectionManager()
    tasks: list[Any] = []

    @manager.on(Say)
    async def said(message: Say) -> None:
        tasks.append(asyncio.current_task())
        await asyncio.Event().wait()

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        await eventually(lambda: tasks)
        tasks[0].cancel()
        assert await peer.wait_closed() == 1011
    assert manager.stats().hook_errors == 0


async def test_plain_function_may_return_what_is_awaited() -> None:
    manager = ConnectionManager()

    async def answer(connection: Connection) -> None:
        await connection.send("answered")

    @manager.on(Say)
    def said(message: Say, connection: Connection) -> Any:
        return answer(connection)

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        assert await peer.receive() == "answered"


async def test_handler_whose_await_is_missing_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    manager = ConnectionManager()

    @manager.on(Say)
    def said(message: Say) -> Any:
        return asyncio.get_event_loop_policy  # nothing to await

    @manager.on(Typing)
    async def typing(message: Typing) -> Any:
        return said_later()

    async def said_later() -> None: ...

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        await peer.send(Typing())
        assert (await peer.receive_json())["code"] == "failed"
    assert "await" in caplog.text


async def test_handler_may_close_the_connection() -> None:
    manager = ConnectionManager()

    @manager.on(Say)
    async def said(message: Say, connection: Connection) -> None:
        await connection.close(4000, "bye")
        await connection.send("too late")

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        assert await peer.wait_closed() == 4000
    assert manager.stats().hook_errors == 0


async def test_denied_client_is_closed_where_the_access_says_so() -> None:
    manager = ConnectionManager()

    @manager.on(Say)
    async def said(message: Say) -> None:
        raise PermissionDenied("not yours")

    async with talking(app_of(manager, access=Access(on_denied="close")), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        assert await peer.wait_closed() == 4403


@pytest.mark.parametrize("inbound", ["broadcast", "handle"])
async def test_authorize_is_asked_before_a_message_is_handled(inbound: str) -> None:
    manager = ConnectionManager()
    asked: list[Any] = []

    def authorize(connection: Any, action: str, channel: str | None) -> bool:
        asked.append((action, channel))
        return action == "subscribe"

    @manager.on(Say)
    async def said(message: Say) -> None:
        raise AssertionError

    async with talking(app_of(manager, authorize=authorize, inbound=inbound), "/ws/a") as (peer,):
        for message in (Say(text="hi"), Typing()):
            await peer.send(message)
            assert await peer.receive_json() == error("forbidden", "not allowed")
    assert asked[-2:] == [("publish", "a")] * 2


async def test_who_was_unsubscribed_is_not_heard() -> None:
    manager = ConnectionManager()
    seen: list[Any] = []

    @manager.on(Say)
    async def said(message: Say) -> None:
        seen.append(message)

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await manager.connections[0].unsubscribe("a")
        await peer.send(Say(text="hi"))
        await peer.send("{")
        assert (await peer.receive_json())["code"] == "invalid_data"
    assert seen == []


async def test_hook_on_message_sees_what_comes_before_it_is_read() -> None:
    manager = ConnectionManager()
    seen: list[Any] = []

    @manager.on_message
    def look(connection: Connection, message: str | bytes) -> None:
        seen.append(message)

    async with talking(app_of(manager, inbound="handle"), "/ws/a") as (peer,):
        await peer.send('{"type":"typing"}')
        await peer.send("{")
        assert (await peer.receive_json())["code"] == "invalid_data"
    assert seen == ['{"type":"typing"}', "{"]


# A broker that is away.


async def test_outage_ends_nobody() -> None:
    broker = FakeBroker()
    manager = ConnectionManager(FakeEngine(broker))

    @manager.on(Say)
    async def said(message: Say, channel: str) -> None:
        await manager.broadcast(message, channel=channel)

    async with talking(app_of(manager), "/ws/a") as (peer,):
        broker.is_down = True
        broker.drop_links()
        await eventually(lambda: not broker.links)
        await peer.send(Typing())
        await eventually(lambda: manager.stats().unpublished == 1)
        await peer.send(Say(text="hi"))
        assert await peer.receive_json() == error("unavailable", "try again later")
        assert manager.stats().hook_errors == 0


# Validators that fail.


@pytest.mark.parametrize("subprotocols", [[], EVENTS])
async def test_validator_that_fails_closes_nothing_and_tells_nothing(
    subprotocols: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    manager = ConnectionManager()
    async with talking(app_of(manager, receives=Faulty), "/ws/a", subprotocols=subprotocols) as (peer,):
        for _ in range(3):
            await peer.send(json.dumps(_as_sent({"type": "faulty", "key": SECRET}, subprotocols)))
            assert await peer.receive_json() == error("failed", "a mistake of the server's")
    assert [each.event for each in caplog.records] == ["validator.failed"]  # type: ignore[attr-defined]
    assert manager.stats().invalid == 3


class FaultyOut(BaseModel):
    type: Literal["say"] = "say"
    text: str

    @field_validator("text")
    @classmethod
    def look_up(cls, text: str) -> str:
        return {"a": "b"}[text]


@pytest.mark.parametrize("subprotocols", [[], EVENTS])
async def test_validator_of_what_is_sent_may_fail_too(subprotocols: list[str]) -> None:
    manager = ConnectionManager()
    async with talking(app_of(manager, sends=FaultyOut), "/ws/a", subprotocols=subprotocols) as (peer,):
        for _ in range(2):
            await peer.send(Say(text=SECRET))
            assert await peer.receive_json() == error("failed", "a mistake of the server's")
    assert manager.stats().invalid == 2


def _as_sent(data: Any, subprotocols: list[str]) -> Any:
    return {"type": "publish", "data": data} if subprotocols else data


# FastAPI's dependencies.


async def test_dependencies_of_a_handler_are_fastapis() -> None:
    manager = ConnectionManager()
    steps: list[str] = []

    async def session(user_agent: Annotated[str, Header()]) -> AsyncIterator[str]:
        steps.append("opened")
        yield f"session of {user_agent}"
        steps.append("closed")

    def name() -> str:
        return "real"

    @manager.on(Say)
    async def said(
        message: Say,
        connection: Connection,
        db: Annotated[str, Depends(session)],
        who: Annotated[str, Depends(name)],
        host: Annotated[str, Header()],
        channel: str,
    ) -> None:
        steps.append("handled")
        await connection.send({"db": db, "who": who, "host": host, "channel": channel})

    app = app_of(manager)
    app.dependency_overrides[name] = lambda: "overridden"
    async with app.router.lifespan_context(app), Peer(app, "/ws/a", headers={"user-agent": "test"}) as peer:
        for count in (1, 2):
            await peer.send(Say(text="hi"))
            assert await peer.receive_json() == {
                "db": "session of test",
                "who": "overridden",
                "host": "testserver",
                "channel": "a",
            }
            await eventually(lambda count=count: len(steps) == 3 * count)  # type: ignore[misc]
    assert steps == ["opened", "handled", "closed"] * 2


async def test_dependency_that_refuses_answers_by_code() -> None:
    manager = ConnectionManager()

    def refuse() -> None:
        raise HTTPException(401, "who are you?")

    def wants(token: Annotated[int, Header()]) -> int:
        return token

    @manager.on(Say)
    async def said(message: Say, user: Annotated[None, Depends(refuse)]) -> None:
        raise AssertionError

    @manager.on(Typing)
    async def typing(message: Typing, token: Annotated[int, Depends(wants)]) -> None:
        raise AssertionError

    app = app_of(manager)
    async with app.router.lifespan_context(app), Peer(app, "/ws/a", headers={"token": SECRET}) as peer:
        await peer.send(Say(text="hi"))
        assert await peer.receive_json() == error("forbidden", "who are you?")
        await peer.send(Typing())
        assert await peer.receive_json() == error("forbidden", "the handshake lacks a parameter, or one is wrong")


async def test_dependency_cannot_read_or_write_the_socket() -> None:
    manager = ConnectionManager()

    async def read(websocket: WebSocket) -> str:
        await websocket.accept()
        await websocket.send_text("nobody gets this")
        with pytest.raises(WebSocketDisconnect):
            await websocket.receive_text()
        return "read"

    @manager.on(Say)
    async def said(message: Say, connection: Connection, found: Annotated[str, Depends(read)]) -> None:
        await connection.send(found)

    async with talking(app_of(manager), "/ws/a") as (peer,):
        await peer.send(Say(text="hi"))
        assert await peer.receive() == "read"


async def test_plain_starlette_has_handlers_too() -> None:
    manager = ConnectionManager()

    @manager.on(Say)
    async def said(message: Say, connection: Connection, host: Annotated[str, Header()]) -> None:
        await connection.send(host)

    routes = create_routes(manager, "/ws/{channel}", receives=Say | Typing)
    app = Starlette(routes=routes, lifespan=manager.lifespan)
    async with app.router.lifespan_context(app), Peer(app, "/ws/a") as peer:
        await peer.send(Say(text="hi"))
        assert await peer.receive() == "testserver"


def _takes_request(request: Request) -> None: ...
def _takes_tasks(tasks: BackgroundTasks) -> None: ...
def _takes_body(body: Annotated[Say, Body()]) -> None: ...
async def _plain(message: Say, limit: int = 5) -> None: ...
async def _request(message: Say, found: Annotated[None, Depends(_takes_request)]) -> None: ...
async def _tasks(message: Say, found: Annotated[None, Depends(_takes_tasks)]) -> None: ...
async def _body(message: Say, found: Annotated[None, Depends(_takes_body)]) -> None: ...
async def _connects(message: Say, connection: ConnectionDep) -> None: ...
async def _nothing() -> None: ...
async def _other(message: Typing) -> None: ...
async def _more(*message: Say) -> None: ...
async def _unknown(message: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


BAD_HANDLERS = [
    (_plain, "_plain takes limit: int = 5, which is neither the message"),
    (_request, "_request runs for a WebSocket, and .* wants a Request"),
    (_tasks, "_tasks wants BackgroundTasks"),
    (_body, "_body wants the body of a request"),
    (_connects, "_connects is called for a connection: write connection: Connection"),
    (_nothing, "no parameter of _nothing is the message: annotate one as Say"),
    (_other, "no parameter of _other is the message"),
    (_more, r"given by name, and \*message: .* can't be"),
    (_unknown, "the parameters of _unknown can't be read"),
]


@pytest.mark.parametrize(("function", "said"), BAD_HANDLERS)
def test_handler_that_cannot_be_called_is_refused_when_it_is_made(function: Any, said: str) -> None:
    manager = ConnectionManager()
    create_router(manager, "/ws/{channel}", receives=Say | Typing)
    with pytest.raises(ConfigurationError, match=said):
        manager.on(Say)(function)
    manager.on(Say)(lambda message: None)  # nothing is left of it


def test_handler_that_was_there_before_its_router_is_refused_with_the_router() -> None:
    manager = ConnectionManager()
    manager.on(Say)(_plain)
    with pytest.raises(ConfigurationError, match="_plain takes limit"):
        create_router(manager, "/ws/{channel}", receives=Say | Typing)


def test_type_has_one_handler() -> None:
    manager = ConnectionManager()

    @manager.on(Say | Typing)
    async def one(message: Say | Typing) -> None: ...

    with pytest.raises(ConfigurationError, match=r"messages of type Say are handled by .*one already"):
        manager.on(Say)(one)
    with pytest.raises(ConfigurationError, match=r"write @manager\.on\(Say\)"):
        manager.on(one)


# What a router may be told.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inbound": "ignore"}, 'but inbound="ignore" does'),
        ({"accepts": "text"}, 'but accepts="text" does'),
        ({"accepts": "bytes"}, 'but accepts="bytes" does'),
        ({"receives": Say | Short}, "type is 'say' in Say and in Short"),
        ({"receives": None, "sends": Said}, "say receives=…"),
        ({"receives": Login}, r"receives can't be sent as JSON: Login\.password: a secret"),
        ({"receives": Say, "sends": Login}, r"sends can't be sent as JSON: Login\.password"),
    ],
)
def test_router_refuses_what_makes_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        app_of(ConnectionManager(), **options)
    with pytest.raises(ConfigurationError, match=said):
        create_routes(ConnectionManager(), "/ws/{channel}", **({"receives": Say} | options))


async def test_secret_is_received_where_it_is_not_broadcast() -> None:
    manager = ConnectionManager()

    @manager.on(Login)
    async def login(message: Login, connection: Connection) -> None:
        await connection.send(message.password.get_secret_value())

    async with talking(app_of(manager, receives=Login, inbound="handle"), "/ws/a") as (peer,):
        await peer.send({"password": "pw"})
        assert await peer.receive() == "pw"


def test_routers_say_what_goes_over_their_paths() -> None:
    manager = ConnectionManager(sends={"chat:*": Said})
    router = create_router(manager, "/ws/{room}", channel="chat:{room}", receives=Say | Typing, http=True)
    sockets = [route.endpoint.__self__.socket for route in router.routes if hasattr(route.endpoint, "__self__")]  # type: ignore[attr-defined]
    assert len({id(each) for each in sockets}) == 1
    socket = sockets[0]
    assert socket.receives.members == (Say, Typing)
    assert socket.sends.members == (Said,)
    assert (socket.path, socket.channel, socket.inbound) == ("/ws/{room}", "chat:{room}", "broadcast")
    assert (socket.has_websocket, socket.has_http) == (True, True)
    (sse, *_) = create_sse_router(manager, "/sse", sends=Said, script=False, include_in_schema=False).routes
    assert sse.endpoint.__self__.socket.has_websocket is False  # type: ignore[attr-defined]
    (*_, last) = create_router(ConnectionManager(), "/ws", include_in_schema=False).routes
    assert last.endpoint.__self__.socket.receives is None  # type: ignore[attr-defined]


async def test_channel_of_a_prefix_needs_a_pattern_for_what_is_sent() -> None:
    manager = ConnectionManager(sends={EVERYONE: Said})
    app = FastAPI()
    app.include_router(create_router(manager, "/ws", receives=Say), prefix="/{room}")
    async with talking(app, "/a/ws") as (peer,):
        await peer.send(Say(text="hi"))
        assert await peer.receive(Say) == Say(text="hi")
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_router(manager, "/ws", receives=Say, sends=Say), prefix="/{room}")
    async with app.router.lifespan_context(app):
        with pytest.raises(ConfigurationError, match="the channel comes from a prefix"):
            async with Peer(app, "/a/ws"):
                pass


# Limits.


async def test_flood_of_what_does_not_fit_is_limited() -> None:
    manager = ConnectionManager(limits=Limits(max_inbound_rate=1.0, inbound_burst=5))
    async with talking(app_of(manager), "/ws/a") as (peer,):
        for _ in range(20):
            await peer.send("{")
        assert await peer.wait_closed() == 1008
    assert manager.stats().invalid <= 6


# In an endpoint of one's own.


class StrictSay(BaseModel):
    model_config = ConfigDict(strict=True)
    text: str


async def test_endpoint_iterates_over_messages_of_types() -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    ended: list[str] = []

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep) -> None:
        async for message in connection.typed(Say | Typing):
            match message:
                case Say(text=text):
                    await connection.send(f"said {text}")
                case Typing():
                    await connection.send("typing")
        ended.append("here")

    async with app.router.lifespan_context(app), Peer(app, "/ws") as peer:
        await peer.send(Say(text="hi"))
        assert await peer.receive() == "said hi"
        for raw, _ in UNFIT:
            await peer.send(raw)
            answer = await peer.receive_json()
            assert answer["code"] == "invalid_data"
            assert SECRET not in str(answer)
        await peer.send(Typing())
        assert await peer.receive() == "typing"
        await peer.close()
        assert ended == ["here"]
    assert manager.stats().invalid == len(UNFIT)


async def test_iteration_refuses_types_that_are_none() -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    refused: list[Exception] = []

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep) -> None:
        try:
            connection.typed(Say | Short)
        except ConfigurationError as error:
            refused.append(error)

    async with app.router.lifespan_context(app), Peer(app, "/ws") as peer:
        await peer.wait_closed()
    assert "in Say and in Short" in str(refused[0])


async def test_iteration_ends_where_the_answer_finds_nobody() -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    ended = asyncio.Event()

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep) -> None:
        async for _ in connection.typed(StrictSay):
            raise AssertionError
        ended.set()

    async with app.router.lifespan_context(app), Peer(app, "/ws") as peer:
        peer.stall()
        await peer.send("{")
        peer.vanish()
        await peer.close()
        await asyncio.wait_for(ended.wait(), 5)
