"""AsyncAPI: the document is valid, tools read it, and what really comes over the wire is what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field, create_model
from starlette.applications import Starlette
from starlette.testclient import TestClient, WebSocketTestSession

from tests.support.described_app import Left, Said, Say, Typing, app, manager
from tests.support.field_types import CASES, REFUSED
from tests.support.npm import installed, needs_npm, run_script
from tests.test_docs import blocks_of
from wsbroadcast import ConfigurationError, ConnectionManager, create_asyncapi_router, create_router, create_routes
from wsbroadcast.documents.asyncapi import asyncapi
from wsbroadcast.documents.draft7 import draft7

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("@asyncapi/specs@6", "@asyncapi/parser@3", "@asyncapi/modelina@5", "ajv@8")
    return installed(tmp_path_factory, *names)


def check(packages: Path, document: dict[str, Any], *options: str) -> Any:
    report = run_script(packages, "asyncapi.mjs", document, *options)
    assert report["errors"] == []
    assert [each for each in report["diagnostics"] if each["code"] != "asyncapi-latest-version"] == []
    assert report["version"] == "3.0.0"
    return report


def messages(document: dict[str, Any], channel: str) -> dict[str, Any]:
    return {
        key: document["components"]["messages"][each["$ref"].rpartition("/")[2]]["payload"]
        for key, each in document["channels"][channel]["messages"].items()
    }


@needs_npm
def test_document_is_valid_and_tools_read_it(packages: Path) -> None:
    document = asyncapi(app)
    report = check(packages, document, "models")
    assert report["channels"] == [
        "v1_ws_room",
        "v1_ws_room_events",
        "v1_ws_room_http",
        "lobby",
        "lobby_events",
        "commands_channel",
        "commands_channel_events",
        "texts",
        "texts_events",
        "news_topic_http",
        "mounted_place_tenant_other_id",
        "mounted_place_tenant_other_id_events",
    ]
    operations = {each["id"]: each for each in report["operations"]}
    said = operations["receive_v1_ws_room"]
    assert (said["action"], said["address"], said["messages"]) == ("receive", "/v1/ws/{room}", ["Say", "Typing"])
    sent = operations["send_v1_ws_room"]
    assert (sent["action"], sent["messages"]) == ("send", ["Said", "Left", "Notice", "error"])
    publish = operations["receive_v1_ws_room_events_publish"]
    assert (publish["messages"], publish["reply"]) == (["publish"], ["published", "handled", "error"])
    call = operations["receive_v1_ws_room_http_call_posts"]
    assert (call["messages"], call["reply"]) == (["call_posts"], ["result_posts", "error"])
    assert operations["receive_v1_ws_room_events_pong"]["reply"] is None
    assert operations["send_news_topic_http"]["messages"][:2] == ["Left", "Notice"]
    assert not any(each.startswith("receive_news_topic_http_publish") for each in operations)
    assert {"Say", "Typing", "Said", "Left", "Notice"} <= set(report["models"])


@needs_npm
def test_every_field_type_is_in_a_valid_document(packages: Path) -> None:
    fields: dict[str, dict[str, Any]] = {
        name: {"type": (Literal[name], ...), "value": (case.type, ...)} for name, case in CASES.items()
    }
    models = {name: create_model(f"M_{name}", **each) for name, each in fields.items()}
    union = Annotated[Union[*models.values()], Field(discriminator="type")]  # type: ignore[valid-type]
    methods = ConnectionManager()
    wide = FastAPI()

    async def all_(given: Any) -> Any:
        return given

    all_.__annotations__ = {"given": union, "return": union}
    methods.method("all")(all_)
    wide.include_router(create_router(methods, "/ws"))
    document = methods.asyncapi(wide)
    assert len(document["components"]["schemas"]) > len(models)
    check(packages, document)


@needs_npm
def test_what_comes_over_the_wire_is_what_the_document_says(packages: Path) -> None:
    (block,) = blocks_of("docs/asyncapi.md")
    found = block.run()
    document = found["manager"].asyncapi(found["app"])
    said: dict[str, list[Any]] = {"ws_room": [], "ws_room_events": []}
    told: dict[str, list[Any]] = {"ws_room": [], "ws_room_events": []}

    def talk(socket: WebSocketTestSession, channel: str, *messages: Any) -> None:
        for message in messages:
            socket.send_json(message)
            said[channel].append(message)
            told[channel].append(socket.receive_json())

    with TestClient(found["app"]) as client:
        with client.websocket_connect("/ws/tea") as plain:
            talk(plain, "ws_room", {"type": "say", "text": "hi"}, {"type": "typing"})
            plain.send_json({"type": "say"})
            told["ws_room"].append(plain.receive_json())
        with client.websocket_connect("/ws/tea", subprotocols=["wsbroadcast.v1"]) as events:
            told["ws_room_events"] += [events.receive_json(), events.receive_json()]
            talk(
                events,
                "ws_room_events",
                {"type": "ping", "id": 1},
                {"type": "call", "name": "now", "id": "2"},
                {"type": "publish", "data": {"type": "typing"}, "id": 3},
            )
            told["ws_room_events"].append(events.receive_json())
            events.send_json({"type": "publish", "data": {"type": "typo"}, "id": 4})
            told["ws_room_events"].append(events.receive_json())
    assert [each["type"] for each in told["ws_room"]] == ["said", "busy", "error"]
    assert {each["type"] for each in told["ws_room_events"]} == {
        *("hello", "subscribed", "pong", "result", "message", "handled", "error")
    }
    for channel in said:
        for action, values in (("receive", said[channel]), ("send", told[channel])):
            assert unfit(packages, document, channel, action, values) == []
    assert len(unfit(packages, document, "ws_room", "receive", told["ws_room"])) == 3
    assert len(unfit(packages, document, "ws_room", "send", said["ws_room"])) == 2


def unfit(packages: Path, document: dict[str, Any], channel: str, action: str, values: list[Any]) -> Any:
    """Values that are no message of an operation of the channel, or of its reply."""
    keys: list[str] = []
    for operation in document["operations"].values():
        is_here = operation["channel"]["$ref"] == f"#/channels/{channel}"
        reply = operation.get("reply", {}).get("messages", []) if action == "send" else []
        if is_here:
            keys += [each["$ref"] for each in reply + (operation["messages"] if operation["action"] == action else [])]
    payloads = messages(document, channel)
    any_of = [payloads[key.rpartition("/")[2]] for key in dict.fromkeys(keys)]
    schema = {"anyOf": any_of, "components": document["components"]}
    return run_script(packages, "ajv.mjs", {"schema": schema, "values": values})


def test_document_says_what_the_app_is() -> None:
    info = asyncapi(app)["info"]
    assert (info["title"], info["version"]) == ("Chat", "1.2.3")
    assert info["description"].startswith("Rooms to talk in.\n\n")
    plain = asyncapi(Starlette(routes=create_routes(ConnectionManager(), "/ws")))["info"]
    assert (plain["title"], plain["version"]) == ("Sockets", "0.1.0")


def test_both_directions_have_schemas_of_their_own() -> None:
    document = asyncapi(app)
    plain = messages(document, "v1_ws_room")
    assert plain["Say"] == {"$ref": "#/components/schemas/Say"}
    schemas = document["components"]["schemas"]
    assert schemas["Say"]["required"] == ["text", "type"]  # the tag of a union, whatever its default
    assert schemas["Said"]["required"] == ["type", "at", "post", "thread"]  # what is sent has every field
    events = messages(document, "v1_ws_room_events")
    assert [each["$ref"].rpartition("/")[2] for each in events["publish"]["properties"]["data"]["oneOf"]] == [
        "Say",
        "Typing",
    ]
    assert [each["$ref"].rpartition("/")[2] for each in events["message"]["properties"]["data"]["anyOf"]] == [
        "Said",
        "Left",
        "Notice",
    ]
    assert events["hello"]["required"] == ["type", "id", "version", "ping", "reconnect"]
    assert document["channels"]["v1_ws_room_events"]["bindings"]["ws"]["headers"]["properties"] == {
        "Sec-WebSocket-Protocol": {"type": "string", "const": "wsbroadcast.v1"}
    }


def test_methods_have_their_arguments_and_results() -> None:
    events = messages(asyncapi(app), "v1_ws_room_events")
    call = events["call_posts"]
    assert call["properties"]["name"] == {"const": "posts"}
    assert call["properties"]["args"] == {
        "type": "object",
        "properties": {"page": {"type": "integer"}, "size": {"type": "integer", "maximum": 100}},
        "required": ["page"],
        "additionalProperties": False,
    }
    assert call["required"] == ["type", "name", "args"]
    assert events["call_ping"]["required"] == ["type", "name"]
    assert events["result_posts"]["properties"]["data"] == {"$ref": "#/components/schemas/Page_Post_"}
    assert events["result_ping"]["properties"]["data"] == {"type": "null"}


def test_untyped_sockets_say_what_they_take() -> None:
    document = asyncapi(app)
    assert messages(document, "lobby")["received"] == {}
    received = document["components"]["messages"]["texts.received"]
    assert (received["contentType"], received["payload"]) == ("text/plain", {"type": "string"})
    commands = messages(document, "commands_channel")
    assert set(commands) == {
        *("subscribe", "unsubscribe", "publish"),
        *("subscribed", "unsubscribed", "published", "handled", "message", "error"),
    }


def test_prefixes_and_mounts_are_in_the_address() -> None:
    channel = asyncapi(app)["channels"]["mounted_place_tenant_other_id"]
    assert channel["address"] == "/mounted/{place}/{tenant}/other/{id}"
    assert set(channel["parameters"]) == {"place", "tenant", "id"}


def test_document_of_a_manager_has_its_sockets_alone() -> None:
    assert "v1_ws_room" in manager.asyncapi(app)["channels"]
    assert "mounted_place_tenant_other_id" not in manager.asyncapi(app)["channels"]


def test_document_is_the_same_in_every_process() -> None:
    command = [sys.executable, "-m", "wsbroadcast", "asyncapi", "tests.support.described_app:app"]
    texts = {
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert json.loads(texts.pop()) == asyncapi(app)


def test_app_without_sockets_of_the_manager_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="the app has no socket of a router of this manager"):
        ConnectionManager().asyncapi(app)


def test_method_without_schema_is_an_error_that_names_it() -> None:
    odd = ConnectionManager()

    async def call(given: Any) -> None: ...

    call.__annotations__["given"] = REFUSED["callable"]
    odd.method("odd")(call)
    wrong = FastAPI()
    wrong.include_router(create_router(odd, "/ws"))
    with pytest.raises(ConfigurationError, match="the arguments of method 'odd' can't be documented"):
        odd.asyncapi(wrong)


def test_router_serves_the_document_it_has_made_once() -> None:
    served = FastAPI()
    third = ConnectionManager()
    served.include_router(create_router(third, "/ws", receives=Say | Typing, sends=Said | Left))
    served.include_router(create_asyncapi_router(third, "/docs/asyncapi.json"))
    with TestClient(served) as client:
        response = client.get("/docs/asyncapi.json")
        assert response.headers["content-type"] == "application/json"
        assert response.json() == third.asyncapi(served)
        third.method("late")(lambda: None)
        assert client.get("/docs/asyncapi.json").content == response.content
        assert "/docs/asyncapi.json" not in client.get("/openapi.json").json()["paths"]


def test_router_wants_a_manager() -> None:
    with pytest.raises(ConfigurationError, match="a router needs its manager first, not fastapi"):
        create_asyncapi_router(FastAPI())  # type: ignore[arg-type]


# The dialect.


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"prefixItems": [{}], "items": False}, {"items": [{}], "additionalItems": False}),
        ({"$ref": "#/a", "title": "A"}, {"allOf": [{"$ref": "#/a"}], "title": "A"}),
        ({"oneOf": [{}], "discriminator": {"propertyName": "a"}}, {"oneOf": [{}]}),
        (
            {"properties": {"$ref": {"type": "string"}, "prefixItems": {"$ref": "#/a", "default": 1}}},
            {"properties": {"$ref": {"type": "string"}, "prefixItems": {"allOf": [{"$ref": "#/a"}], "default": 1}}},
        ),
        ({"default": {"prefixItems": [1]}, "const": [{"$ref": 1, "a": 2}]},) * 2,
        ({"additionalProperties": {"prefixItems": [{}]}}, {"additionalProperties": {"items": [{}]}}),
        ({"items": True}, {"items": True}),
    ],
)
def test_schema_says_the_same_in_draft_7(schema: dict[str, Any], found: dict[str, Any]) -> None:
    assert draft7(schema) == found


class Wrong(BaseModel):
    value: int


def test_definition_keeps_what_only_looks_like_a_keyword() -> None:
    odd = create_model("Odd", discriminator=(Wrong, ...), prefixItems=(list[int], ...), required=(bool, False))
    made = FastAPI()
    made.include_router(create_router(ConnectionManager(), "/ws", receives=odd))
    properties = asyncapi(made)["components"]["schemas"]["Odd"]["properties"]
    assert set(properties) == {"discriminator", "prefixItems", "required"}
