"""`wsbroadcast types`: a module for pages, checked by `tsc --strict` with the browser's client."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Mount, Router

from tests.support.described_app import Left, Say, app, manager, other
from tests.support.npm import check_types, needs_npm
from tests.test_docs import blocks_of
from wsbroadcast import ConfigurationError, ConnectionManager, create_router, create_routes
from wsbroadcast.command import main
from wsbroadcast.documents.typescript import typescript

ROOT = Path(__file__).parents[2]

USE = """
import { connect } from "./wsbroadcast.js"
import type {
  CommandsChannelSends, LobbySends, Methods, NewsTopicSends, Said, V1WsRoomReceives, V1WsRoomSends,
} from "./ws.js"

const ws = connect<V1WsRoomReceives, V1WsRoomSends, Methods>("/v1/ws/tea")
const lines: string[] = []
function line(said: Said): string {
  return `${said.post.tags.join(", ")} at ${new Date(said.at).toISOString()}, ${said.thread.map(line).join("; ")}`
}
ws.on("message", ({ data, channel, position }) => {
  switch (data.type) {
    case "said": lines.push(line(data)); break
    case "left": lines.push(`${data.user} has left ${channel ?? ""} ${position ?? ""}`); break
    case "notice": lines.push(data.post.headline); break
    default: data satisfies never
  }
  // @ts-expect-error only some have it
  data.user
  // @ts-expect-error no message has it
  data.nothing
})
await ws.publish({ type: "say", text: "hi" }, { key: "k1" })
await ws.publish({ type: "say", text: "hi", reply_to: null })
await ws.publish({ type: "typing" })
// @ts-expect-error the tag is missing, though the model has a default for it
await ws.publish({ text: "hi" })
// @ts-expect-error the text is missing
await ws.publish({ type: "say" })
// @ts-expect-error no such type
await ws.publish({ type: "said" })
// @ts-expect-error no such field
await ws.publish({ type: "typing", text: "hi" })
// @ts-expect-error a number
await ws.publish({ type: "say", text: "hi", reply_to: "1" })

const page = await ws.call("posts", { page: 1 })
const next: string | null = page.next
const ids: number[] = page.items.map(({ id }) => id)
const me: string = await ws.call("who am I")
const nothing: null = await ws.call("ping", {})
// @ts-expect-error an argument is missing
await ws.call("posts", { size: 1 })
// @ts-expect-error arguments are missing
await ws.call("posts")
// @ts-expect-error no such argument
await ws.call("ping", { page: 1 })
// @ts-expect-error no such method
await ws.call("post", { page: 1 })
// @ts-expect-error the result is known
await ws.call<number>("posts", { page: 1 })
void [next, ids, me, nothing, lines]

const commands: CommandsChannelSends = { type: "say", text: "hi" }
const anything: LobbySends = { any: ["thing"] }
// @ts-expect-error who only listens says nothing
const silence: NewsTopicSends = "hi"
void [commands, anything, silence]

const answer = await ws.publish({ type: "say", text: "hi" })
if (answer.type === "handled") console.log("not sent to anybody")

const untyped = connect("/lobby")
untyped.on("message", ({ data }) => data.what.ever)
await untyped.publish(1)
const sum: number = await untyped.call<number>("add", { a: 1 })
const half = connect<Said>("/lobby")
half.on("message", ({ data }) => data.at)
await half.publish({ any: "thing" })
void sum
"""


@needs_npm
def test_page_with_the_client_and_the_types_is_strict(tmp_path: Path) -> None:
    assert main(["js", "--out", str(tmp_path)]) == 0
    (tmp_path / "ws.ts").write_text(typescript(app), encoding="utf-8")
    (tmp_path / "page.ts").write_text(USE, encoding="utf-8")
    check_types(tmp_path, "page.ts", "ws.ts")


def test_page_of_the_docs_shows_what_is_written() -> None:
    (block,) = blocks_of("docs/asyncapi.md")
    (shown,) = blocks_of("docs/asyncapi.md", "ts")
    assert typescript(block.run()["app"]) == shown.source


@needs_npm
def test_page_of_the_docs_is_strict(tmp_path: Path) -> None:
    (written,) = blocks_of("docs/asyncapi.md", "ts")
    (page,) = blocks_of("docs/asyncapi.md", "ts page")
    assert main(["js", "--out", str(tmp_path)]) == 0
    (tmp_path / "ws.ts").write_text(written.source, encoding="utf-8")
    (tmp_path / "page.ts").write_text(page.source, encoding="utf-8")
    check_types(tmp_path, "page.ts")


def test_text_is_the_same_in_every_process() -> None:
    command = [sys.executable, "-m", "wsbroadcast", "types", "tests.support.described_app:app"]
    texts = {
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert texts == {typescript(app).encode()}


def test_one_manager_alone_has_its_sockets_alone() -> None:
    text = typescript(app, other)
    assert "MountedPlaceTenantOtherIdReceives" in text
    assert "V1WsRoom" not in text
    assert "Methods" not in text


def test_sockets_with_the_same_words_have_numbers() -> None:
    twice = FastAPI()
    third = ConnectionManager()
    for path in ("/ws/{room}", "/ws/room", "/"):
        twice.include_router(create_router(third, path, channel="news", receives=Say, script=False))
    text = typescript(twice)
    assert "export type WsRoomSends = Say" in text
    assert "export type WsRoom_2Sends = Say" in text
    assert "export type RootSends = Say" in text


def test_model_with_the_name_of_a_socket_keeps_it() -> None:
    class WsSends(Left):
        pass

    alike = FastAPI()
    alike.include_router(create_router(ConnectionManager(), "/ws", receives=WsSends))
    text = typescript(alike)
    assert "export interface WsSends {" in text
    assert "export type Ws_2Sends = WsSends" in text


def test_starlette_app_has_types_too() -> None:
    plain = Starlette(routes=create_routes(ConnectionManager(), "/ws/{channel}", receives=Say, sends=Left))
    assert "export type WsChannelReceives = Left" in typescript(plain)


def test_sockets_are_found_wherever_routes_are() -> None:
    def routes(path: str) -> list[BaseRoute]:
        return create_routes(ConnectionManager(), path, receives=Say, inbound="handle", script=False)

    hosted = Starlette(routes=[Host("api.example", app=Starlette(routes=routes("/hosted")))])
    assert "export type HostedSends = Say" in typescript(hosted)
    nested = APIRouter(routes=[Mount("/inner/{x:path}", routes=routes("/deep"))])
    made = FastAPI()
    made.include_router(nested, prefix="/outer")
    assert "/** What a page sends to /outer/inner/{x}/deep. */" in typescript(made)
    assert "export type AloneSends = Say" in typescript(Router(routes=routes("/alone")))


@pytest.mark.parametrize("nothing", [FastAPI(), Starlette()])
def test_app_without_sockets_is_an_error(nothing: Starlette) -> None:
    with pytest.raises(ConfigurationError, match="the app has no socket of a router: "):
        typescript(nothing)


def test_what_is_no_app_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="expected a FastAPI or Starlette app, not wsbroadcast"):
        typescript(manager)
