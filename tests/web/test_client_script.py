"""The browser's client as it is served, printed, packed and typed."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hatchling.build import build_wheel
from starlette.applications import Starlette
from starlette.testclient import TestClient

from tests.support.servers import ROOT
from tests.support.web import denied
from wsbroadcast import ConnectionManager, create_router, create_routes, create_script_router
from wsbroadcast.command import main
from wsbroadcast.web.client_script import DIRECTORY, client_script

MINIFIED = (DIRECTORY / "wsbroadcast.min.js").read_bytes()
NPM = shutil.which("npm")

needs_npm = pytest.mark.skipif(NPM is None, reason="no npm on the PATH: apt-get install npm")


def client_of(path: str, prefix: str = "", **options: Any) -> TestClient:
    app = FastAPI()
    app.include_router(create_router(ConnectionManager(), path, **options), prefix=prefix)
    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "prefix", "script"),
    [
        ("/ws/{channel}", "", "/ws/wsbroadcast.js"),
        ("/ws", "", "/ws/wsbroadcast.js"),
        ("/{channel}", "", "/wsbroadcast.js"),
        ("/{channel}", "/live", "/live/wsbroadcast.js"),
        ("/ws/room-{room}", "", "/ws/wsbroadcast.js"),
        ("", "/ws", "/ws/wsbroadcast.js"),
        ("/rooms/{room}/ws", "/{tenant}", "/acme/rooms/wsbroadcast.js"),
    ],
)
def test_script_is_beside_the_socket(path: str, prefix: str, script: str) -> None:
    options = {"channel": "{tenant}:{room}"} if "tenant" in prefix else {}
    client = client_of(path, prefix, **options)
    response = client.get(script)
    assert response.content == MINIFIED
    assert response.headers["content-type"] == "text/javascript; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.headers["vary"] == "Accept-Encoding"
    hashed = client.get(script.replace(".js", f".{client_script().hash}.js"))
    assert hashed.content == MINIFIED
    assert hashed.headers["cache-control"] == "public, max-age=31536000, immutable"
    other = client.get(script.replace(".js", ".0123456789abcdef.js"))  # a page of another version, in a deploy
    assert (other.content, other.headers["cache-control"]) == (MINIFIED, "no-cache")


def test_script_is_not_sent_again_to_who_has_it() -> None:
    client = client_of("/ws/{channel}")
    for accepted in ("", "gzip"):
        first = client.get("/ws/wsbroadcast.js", headers={"accept-encoding": accepted})
        tag = first.headers["etag"]
        for known in (tag, f"W/{tag}", f'"x", {tag}'):
            again = client.get("/ws/wsbroadcast.js", headers={"accept-encoding": accepted, "if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get("/ws/wsbroadcast.js", headers={"if-none-match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("br, GZIP;q=0.5", "gzip"),
        ("*", "gzip"),
        ("", None),
        ("br", None),
        ("gzip;q=0", None),
        ("gzip; q=0.000", None),
    ],
)
def test_script_is_compressed_for_who_takes_that(accepted: str, encoding: str | None) -> None:
    response = client_of("/ws").get("/ws/wsbroadcast.js", headers={"accept-encoding": accepted})
    assert response.headers.get("content-encoding") == encoding
    assert response.content == MINIFIED
    assert int(response.headers["content-length"]) == (
        len(MINIFIED) if encoding is None else (DIRECTORY / "wsbroadcast.min.js.gz").stat().st_size
    )


def test_script_answers_head() -> None:
    response = client_of("/ws").head("/ws/wsbroadcast.js", headers={"accept-encoding": ""})
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == str(len(MINIFIED))


def test_channel_of_the_script_s_name_is_refused() -> None:
    client = client_of("/ws/{channel}")
    for name in ("wsbroadcast.js", f"wsbroadcast.{client_script().hash}.js"):
        assert "the client's script" in denied(client, f"/ws/{name}").text
    patterned = client_of("/ws/{room}", channel="room:{room}")
    assert denied(patterned, "/ws/wsbroadcast.js").status_code == 403
    with client, client.websocket_connect("/ws/wsbroadcast.json") as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"


def test_starlette_serves_it_and_apps_of_their_own_endpoints() -> None:
    manager = ConnectionManager()
    starlette = TestClient(Starlette(routes=create_routes(manager, "/ws/{channel}"), lifespan=manager.lifespan))
    assert starlette.get("/ws/wsbroadcast.js").content == MINIFIED
    app = FastAPI()
    app.include_router(create_script_router())
    assert TestClient(app).get("/wsbroadcast.js").content == MINIFIED
    assert TestClient(app).get(f"/{client_script().name}").headers["cache-control"].endswith("immutable")
    assert "/wsbroadcast.js" not in TestClient(app).get("/openapi.json").text


def test_router_may_leave_it_out() -> None:
    assert client_of("/ws/{channel}", script=False).get("/ws/wsbroadcast.js").status_code == 404


# What is committed.


def test_what_is_served_is_made_of_the_source() -> None:
    lines = [line.split("  ") for line in (DIRECTORY / "hashes").read_text().splitlines()]
    recorded = {name: digest for digest, name in lines}
    for name, digest in recorded.items():
        assert hashlib.sha256((DIRECTORY / name).read_bytes()).hexdigest() == digest, "run scripts/client"
    assert recorded.keys() == {"wsbroadcast.js", "wsbroadcast.min.js"}
    assert gzip.decompress((DIRECTORY / "wsbroadcast.min.js.gz").read_bytes()) == MINIFIED


def test_client_is_small() -> None:
    assert (DIRECTORY / "wsbroadcast.min.js.gz").stat().st_size <= 3000
    assert len((DIRECTORY / "wsbroadcast.js").read_text(encoding="utf-8").splitlines()) <= 250
    assert "eval" not in MINIFIED.decode()
    assert not re.search(r"\bimport\b", MINIFIED.decode())


@needs_npm
def test_script_that_makes_it_makes_the_same(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts/client", tmp_path], check=True, capture_output=True)
    assert (tmp_path / "wsbroadcast.min.js").read_bytes() == MINIFIED
    assert (tmp_path / "hashes").read_text() == (DIRECTORY / "hashes").read_text()


USE = """
import { connect, type CommandError, type Status } from "./wsbroadcast.js"

interface Task { id: number; title: string }
const ws = connect<Task>("/ws/room:1", { token: async () => "secret", state: () => "epoch:1" })
const off: () => void = ws.on("message", ({ data, position }) => {
  const title: string = data.title
  void [title, position]
})
ws.on("status", (status: Status, closed) => { if (status === "closed") console.log(closed?.code) })
ws.on("error", (error) => console.log((error as CommandError).code))
const sum: number = await ws.call<number>("add", { a: 1 })
const repeated: boolean | undefined = (await ws.publish({ id: 1 }, { key: "once" })).is_repeat
await ws.subscribe("room:2", { since: "epoch:1" })
const here = ws.members<{ name: string }>()
ws.on("presence", ({ channel, left }) => {
  const names: string[] = [...here.values()].map(({ info }) => info.name)
  void [channel, names, left?.length, here.count]
})
off(); ws.close(); void [sum, repeated, ws.status]
// @ts-expect-error there is no such event
ws.on("mesage", () => {})
// @ts-expect-error it is the client's
here.clear()
// @ts-expect-error it can't be set
ws.status = "open"
"""


@needs_npm
def test_types_are_strict(tmp_path: Path) -> None:
    assert main(["js", "--out", str(tmp_path)]) == 0
    (tmp_path / "use.ts").write_text(USE)
    options = ["--strict", "--noEmit", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom", "use.ts"]
    (tmp_path / "package.json").write_text('{"type": "module"}')
    done = subprocess.run(
        [NPM or "npm", "exec", "--yes", "--package=typescript@5.9.3", "--", "tsc", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_prints_and_copies_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["js"]) == 0
    assert capsys.readouterr().out == (DIRECTORY / "wsbroadcast.js").read_text(encoding="utf-8")
    assert main(["js", "--out", str(tmp_path / "src/vendor")]) == 0
    for name in ("wsbroadcast.js", "wsbroadcast.d.ts"):
        assert (tmp_path / "src/vendor" / name).read_bytes() == (DIRECTORY / name).read_bytes()
    assert main(["js", "--sri"]) == 0
    assert capsys.readouterr().out == f"{client_script().name} {client_script().integrity}\n"
    (tmp_path / "file").write_text("")
    assert main(["js", "--out", str(tmp_path / "file")]) == 1
    assert "can't write" in capsys.readouterr().err


def test_wheel_has_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    wheel = build_wheel(str(tmp_path))
    names = {Path(name).name for name in zipfile.ZipFile(tmp_path / wheel).namelist() if "/client/" in name}
    assert names == {path.name for path in DIRECTORY.iterdir()}
