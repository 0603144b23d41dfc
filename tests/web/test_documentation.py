"""Sockets in FastAPI's own documentation: there, valid, and in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Header
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from playwright.async_api import async_playwright
from pydantic import Field
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from tests.support.demo import BROWSER_ARGUMENTS
from tests.support.described_app import Left, Said, Say, Typing, app
from tests.support.npm import installed, needs_npm, run_script
from tests.support.programs import BROWSER, needs_browser
from tests.support.servers import serve_here
from wsbroadcast import ConnectionManager, create_router, create_routes, create_sse_router

REF = "#/components/schemas/"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory, "@seriousme/openapi-schema-validator@2", "swagger-ui-dist@5")


def group(schema: Any, title: str) -> dict[str, Any]:
    """The frames of one way to speak, by their titles; a reference by its name."""
    for each in schema["anyOf"]:
        if each["title"] == title:
            return {
                member.get("title") or member["$ref"].removeprefix(REF): member
                for found in each["anyOf"]
                for member in (found.get("oneOf") or ([found] if "title" in found else found.get("anyOf")) or [found])
            }
    raise AssertionError(title)


def body(operation: Any) -> Any:
    return operation["requestBody"]["content"]["application/json"]["schema"]


def response(operation: Any, status: str) -> Any:
    return operation["responses"][status]["content"]["application/json"]["schema"]


@needs_npm
def test_document_is_valid(packages: Path) -> None:
    report = run_script(packages, "openapi.mjs", app.openapi())
    assert report == {"valid": True, "errors": [], "version": "3.1"}


def test_socket_has_both_directions_and_the_frames() -> None:
    document = app.openapi()
    socket = document["paths"]["/v1/ws/{room}#websocket"]["get"]
    assert socket["tags"] == ["rooms"]
    assert [each["name"] for each in socket["parameters"]] == ["room", "since"]
    assert set(group(body(socket), "plain")) == {"Say", "Typing"}
    said = group(body(socket), "wsbroadcast.v1")
    assert set(said) == {
        *("publish", "call", "subscribe", "unsubscribe", "presence", "refresh", "ping", "pong"),
    }
    assert [each["$ref"] for each in said["publish"]["properties"]["data"]["oneOf"]] == [f"{REF}Say", f"{REF}Typing"]
    sent = response(socket, "1XX")
    assert set(group(sent, "plain")) == {"Said", "Left", "Notice", "error"}
    told = group(sent, "wsbroadcast.v1")
    assert set(told) == {
        *("hello", "subscribed", "message", "position", "gap", "ping", "presence", "expiring"),
        *("unsubscribed", "unwatched", "refreshed", "pong", "published", "handled", "result", "error"),
    }
    assert {f"{REF}Said", f"{REF}Left", f"{REF}Notice"} == {
        each["$ref"] for each in told["message"]["properties"]["data"]["anyOf"]
    }
    assert {"Say", "Typing", "Said", "Left", "Notice"} <= set(document["components"]["schemas"])


def test_http_of_the_same_path_is_typed() -> None:
    path = app.openapi()["paths"]["/v1/ws/{room}"]
    assert set(path) == {"get", "post"}
    polled = response(path["get"], "200")
    assert "text/event-stream" in path["get"]["responses"]["200"]["content"]
    assert {each["title"] for each in polled["properties"]["messages"]["items"]["anyOf"]} >= {"message", "subscribed"}
    assert [each["title"] for each in body(path["post"])["anyOf"]] == ["publish", "call", "call", "call"]
    assert [each["title"] for each in response(path["post"], "200")["anyOf"]] == [
        *("published", "handled", "result", "result", "result")
    ]
    assert response(path["post"], "4XX")["properties"]["type"] == {"type": "string", "const": "error"}
    assert {each["name"] for each in path["get"]["parameters"]} == {
        *("room", "since", "wait", "events", "channel", "presence", "id")
    }


def test_page_of_the_app_at_the_same_path_is_found_and_documented() -> None:
    document = app.openapi()
    assert document["paths"]["/lobby"]["get"]["summary"] == "Page Of The Lobby"
    assert "/lobby#websocket" in document["paths"]
    with TestClient(app) as client:
        assert client.get("/lobby").json() == {"id": 1, "tags": []}
        assert client.post("/lobby").status_code == 405
        assert client.get("/texts").status_code == 404
        with client.websocket_connect("/lobby") as socket:
            socket.send_text("hi")


def test_http_of_a_router_answers_as_before() -> None:
    with TestClient(app) as client:
        assert client.get("/v1/ws/tea?wait=0", headers={"accept": "application/json"}).json()["messages"] == []
        done = client.post("/v1/ws/tea", json={"type": "call", "name": "posts", "args": {"page": 3}})
        assert done.json() == {"type": "result", "data": {"items": [{"id": 3, "tags": []}], "next": None}}
        wrong = client.post("/v1/ws/tea", json={"type": "publish", "data": {"type": "say"}})
        assert (wrong.status_code, wrong.json()["code"]) == (400, "invalid_data")


def test_documentation_can_be_left_out() -> None:
    quiet = FastAPI()
    manager = ConnectionManager()
    quiet.include_router(create_router(manager, "/ws/{channel}", http=True, include_in_schema=False))
    quiet.include_router(create_sse_router(manager, "/sse", include_in_schema=False))
    quiet.include_router(create_router(manager, "/other", receives=Say), include_in_schema=False)
    assert quiet.openapi()["paths"] == {}


def test_schemas_of_the_app_keep_their_names() -> None:
    # Frames have no names of their own, so none is another's.
    class ErrorFrame(Say):
        pass

    without, with_ = FastAPI(), FastAPI()
    for each in (without, with_):
        each.add_api_route("/frame", lambda: None, response_model=ErrorFrame)
    with_.include_router(create_router(ConnectionManager(), "/ws", receives=Say | Typing, sends=Said | Left))
    assert without.openapi()["components"]["schemas"].items() <= with_.openapi()["components"]["schemas"].items()
    assert {"ErrorFrame", "Say", "Typing", "Said", "Left", "Post"} == set(with_.openapi()["components"]["schemas"])


def test_methods_that_come_later_are_in_it() -> None:
    late = FastAPI()
    manager = ConnectionManager()
    late.include_router(create_router(manager, "/ws", inbound="ignore"))

    @manager.method("say")
    async def say(what: Say, loud: bool = False) -> Said:
        raise NotImplementedError

    socket = late.openapi()["paths"]["/ws#websocket"]["get"]
    call = {each["title"]: each for each in body(socket)["anyOf"]}["call"]
    assert call["properties"]["args"] == {"$ref": f"{REF}arguments_of_say"}
    arguments = late.openapi()["components"]["schemas"]["arguments_of_say"]
    assert arguments["properties"]["what"] == {"$ref": f"{REF}Say"}
    assert arguments["properties"]["loud"] == {"type": "boolean", "title": "Loud"}
    assert arguments["required"] == ["what"]
    result = group(response(socket, "1XX"), "wsbroadcast.v1")["result"]
    assert result["properties"]["data"] == {"$ref": f"{REF}Said"}
    assert set(late.openapi()["components"]["schemas"]) == {"Post", "Said", "Say", "arguments_of_say"}


def test_method_without_schema_leaves_the_rest() -> None:
    async def odd(way: Any) -> Any: ...

    odd.__annotations__ = {"way": Callable[[], int], "return": Callable[[], int]}
    made = FastAPI()
    manager = ConnectionManager()
    manager.method("odd")(odd)
    made.include_router(create_router(manager, "/ws", receives=Say))
    with TestClient(made) as client:
        socket = client.get("/openapi.json").json()["paths"]["/ws#websocket"]["get"]
    call = group(body(socket), "wsbroadcast.v1")["call"]
    assert call["properties"]["args"] == {"description": "A type without a JSON Schema."}
    assert "Say" in group(body(socket), "plain")


def test_parameters_of_dependencies_are_documented_once() -> None:
    async def language(websocket: WebSocket, channel: str, lang: str = "en") -> None: ...

    async def who(x_key: Annotated[str, Header()], lang: str = "en") -> str:
        return x_key

    made = FastAPI()
    router = create_router(
        ConnectionManager(), "/ws/{channel:path}", dependencies=[Depends(language)], authenticate=who, http=True
    )
    made.include_router(router, prefix="/v1")
    command = made.openapi()["paths"]["/v1/ws/{channel}"]["post"]
    assert [each["name"] for each in command["parameters"]] == ["channel", "lang", "x-key"]
    socket = made.openapi()["paths"]["/v1/ws/{channel}#websocket"]["get"]
    assert [(each["in"], each["name"]) for each in socket["parameters"]] == [
        ("path", "channel"),
        ("query", "lang"),
        ("header", "x-key"),
        ("query", "since"),
    ]


def test_app_that_names_operations_by_their_tags_works() -> None:
    # The recipe of FastAPI's documentation, for which a route without tags is an error.
    def by_tag(route: APIRoute) -> str:
        return f"{route.tags[0]}-{route.name}"

    named = FastAPI(generate_unique_id_function=by_tag)
    manager = ConnectionManager()
    named.include_router(create_router(manager, "/ws/{channel}", http=True))
    named.include_router(create_sse_router(manager, "/sse/{channel}", channel="sse:{channel}"))
    ids = [each["operationId"] for path in named.openapi()["paths"].values() for each in path.values()]
    assert len(ids) == len(set(ids)) == 5


def test_nested_routers_and_a_router_that_is_included_twice() -> None:
    inner = create_router(ConnectionManager(), "/ws/{channel}", receives=Say)
    outer = APIRouter(prefix="/outer")
    outer.include_router(inner, prefix="/one")
    made = FastAPI()
    made.include_router(outer)
    made.include_router(inner, prefix="/two", tags=["two"])
    assert set(made.openapi()["paths"]) == {"/outer/one/ws/{channel}#websocket", "/two/ws/{channel}#websocket"}


def test_starlette_app_has_no_route_more() -> None:
    routes = create_routes(ConnectionManager(), "/ws/{channel}", receives=Say, http=True, script=False)
    assert [type(each) for each in routes][1:] == [Route] * 3
    assert not [each for each in routes if isinstance(each, APIRoute)]
    Starlette(routes=routes)


def test_annotated_types_with_a_discriminator_of_their_own_are_kept() -> None:
    made = FastAPI()
    union = Annotated[Said | Left, Field(discriminator="type")]
    made.include_router(create_router(ConnectionManager(), "/ws", inbound="ignore", sends=union))
    data = group(response(made.openapi()["paths"]["/ws#websocket"]["get"], "1XX"), "wsbroadcast.v1")["message"]
    assert data["properties"]["data"]["discriminator"]["propertyName"] == "type"


@needs_npm
@needs_browser
async def test_docs_page_shows_the_socket(packages: Path) -> None:
    # As /docs, with the files of Swagger UI from here.
    shown = FastAPI()
    shown.mount("/files", StaticFiles(directory=packages / "node_modules" / "swagger-ui-dist"))
    router = create_router(ConnectionManager(), "/ws/{channel}", receives=Say | Typing, sends=Said | Left, http=True)
    shown.include_router(router)

    @shown.get("/page", include_in_schema=False)
    def page() -> Any:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="docs",
            swagger_js_url="/files/swagger-ui-bundle.js",
            swagger_css_url="/files/swagger-ui.css",
            swagger_ui_parameters={"docExpansion": "full", "defaultModelRendering": "model"},
        )

    async with serve_here(shown) as port, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        tab = await browser.new_page()
        failures: list[str] = []
        tab.on("pageerror", lambda error: failures.append(str(error)))
        await tab.goto(f"http://127.0.0.1:{port}/page")
        socket = tab.locator(".opblock", has_text="/ws/{channel}#websocket")
        await socket.locator(".opblock-section-request-body").get_by_text("What A Client Sends").wait_for()
        text = await socket.inner_text()
        for word in ("A WebSocket", "Request body", "101", "1XX", "What a client is sent", "since"):
            assert word in text
        assert await tab.locator(".opblock").count() == 3
        assert await tab.locator(".errors-wrapper").count() == 0
        assert failures == []
        await browser.close()


def test_swagger_of_the_app_is_where_it_was() -> None:
    with TestClient(app) as client:
        assert client.get("/docs").status_code == 200
        assert client.get("/openapi.json").json()["info"]["title"] == "Chat"
