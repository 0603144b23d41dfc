"""The examples: each runs as it stands, and does what its docstring says."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketTestSession

from tests.support.brokers import free_port
from tests.support.examples import EXAMPLES, announce, load, talk_in_rooms_and_hear_news
from tests.support.web import close_of, denied

PATHS = sorted(EXAMPLES.glob("*.py"))


# One function for each example; it gets a started client.


def chat(client: TestClient) -> None:
    assert "<h1>WebSocket Chat</h1>" in client.get("/").text
    with client.websocket_connect("/ws/1") as ada:
        with client.websocket_connect("/ws/2") as bob:
            ada.send_text("hello")
            assert [ada.receive_text(), ada.receive_text()] == ["You wrote: hello", "Client #1 says: hello"]
            assert bob.receive_text() == "Client #1 says: hello"
        assert ada.receive_text() == "Client #2 left the chat"


def router(client: TestClient) -> None:
    talk_in_rooms_and_hear_news(client)
    stats = client.get("/stats").json()
    assert (stats["connects"], stats["broadcasts"]) == (4, 3)


def channels_and_users(client: TestClient) -> None:
    with (
        client.websocket_connect("/ws/ada") as ada,
        client.websocket_connect("/ws/eva") as eva,
        client.websocket_connect("/ws/eva") as other_tab,
    ):
        eva.send_json({"do": "join", "channel": "news"})
        assert eva.receive_json() == {"channels": ["lobby", "news"]}
        ada.send_json({"do": "say", "channel": "news", "text": "hello"})
        assert eva.receive_json() == {"from": "ada", "channel": "news", "text": "hello"}
        ada.send_json({"do": "tell", "user": "eva", "text": "psst"})
        assert eva.receive_json() == other_tab.receive_json() == {"from": "ada", "text": "psst"}
        eva.send_json({"do": "leave", "channel": "news"})
        assert eva.receive_json() == {"channels": ["lobby"]}
        for nonsense in ({"do": "dance"}, ["join"], {"do": "join", "channel": ""}):
            ada.send_json(nonsense)
            assert "error" in ada.receive_json()
        ada.send_text("no JSON")
        assert "error" in ada.receive_json()
        ada.send_bytes(b"{}")
        assert close_of(ada)[0] == 1003


def hooks(client: TestClient) -> None:
    with client.websocket_connect("/ws/eva?mutes=bob&mutes=joe") as eva, client.websocket_connect("/ws/ada") as ada:
        assert eva.receive_json() == {"joined": "ada"}
        with client.websocket_connect("/ws/bob") as bob:
            assert eva.receive_json() == ada.receive_json() == {"joined": "bob"}
            bob.send_text("hello")
            assert bob.receive_json() == ada.receive_json() == {"from": "bob", "text": "hello"}
            ada.send_text("buy now")
            ada.send_text("hello bob")
            assert eva.receive_json() == {"from": "ada", "text": "hello bob"}  # neither bob's words nor the spam
            assert bob.receive_json() == ada.receive_json() == {"from": "ada", "text": "hello bob"}
            bob.send_text("x" * 1001)
            assert close_of(bob)[0] == 1008
        assert eva.receive_json() == ada.receive_json()
    with client.websocket_connect("/ws/root") as root:
        assert close_of(root)[0] == 1008


def http_and_threads(client: TestClient) -> None:
    def next_but_time(socket: WebSocketTestSession) -> Any:
        while "time" in (message := socket.receive_json()):
            pass
        return message

    with client.websocket_connect("/ws") as socket:
        client.post("/announce", params={"text": "hello"})
        assert next_but_time(socket) == {"announcement": "hello"}
        client.post("/report", params={"text": "done"})
        assert next_but_time(socket) == {"report": "done"}
        assert "time" in socket.receive_json()


def starlette(client: TestClient) -> None:
    with (
        client.websocket_connect("/ws/tea") as ada,
        client.websocket_connect("/ws/tea") as bob,
        client.websocket_connect("/ws/coffee") as eva,
    ):
        ada.send_text("hello")
        eva.send_text("not for tea")
        assert bob.receive_text() == "hello"
        assert client.post("/announce/tea", params={"text": "milk"}).status_code == 204
        assert ada.receive_text() == bob.receive_text() == "milk"  # ada's own message didn't come back


def prices(client: TestClient) -> None:
    with client.websocket_connect("/prices/oil") as oil:
        oil.send_text("cheaper, please")  # ignored
        assert [list(oil.receive_json()) for _ in range(3)] == [["oil"]] * 3
        assert client.get("/stats").json()["broadcasts"] >= 3


def engine(client: TestClient) -> None:
    elsewhere = TestClient(load(EXAMPLES / "08_engine.py").app)  # as another process would
    with elsewhere, client.websocket_connect("/ws/news") as ada, elsewhere.websocket_connect("/ws/news") as bob:
        ada.send_text("hello")
        bob.send_text("hi")
        assert sorted([ada.receive_text(), ada.receive_text()]) == ["hello", "hi"]
        assert sorted([bob.receive_text(), bob.receive_text()]) == ["hello", "hi"]


def scale_out(client: TestClient) -> None:
    # With brokers and several workers: tests/integration/test_workers.py.
    announce(client)
    assert client.get("/health").json() == {"engine": "memory", "is_ok": True, "detail": ""}


def login(client: TestClient) -> None:
    assert "textContent" in client.get("/").text
    assert client.get("/me").status_code == 401
    refused = denied(client, "/chat")
    assert (refused.status_code, refused.text) == (401, "log in first")
    for wrong in ({"name": "ada", "password": "guessed"}, {"name": "eve", "password": "sesame"}):
        assert client.post("/login", json=wrong).status_code == 401
    (endpoint,) = (route.endpoint for route in client.app.routes if route.path == "/login")  # type: ignore[attr-defined]
    module = endpoint.__globals__
    module["database"].sessions["old"] = module["Session"]("bob", 0.0)
    assert client.post("/login", json={"name": "ada", "password": "sesame"}).status_code == 204
    assert [session.user for session in module["database"].sessions.values()] == ["ada"], "the expired one is gone"
    assert client.get("/me").json() == "ada"
    with client.websocket_connect("/chat") as tab, client.websocket_connect("/chat") as other_tab:
        assert tab.receive_json() == tab.receive_json() == other_tab.receive_json() == {"joined": "ada"}
        tab.send_text("hello")
        assert tab.receive_json() == other_tab.receive_json() == {"from": "ada", "text": "hello"}
        other_tab.send_bytes(b"\xff")
        assert close_of(other_tab)[0] == 1003
        denied(client, "/chat", origin="https://evil.example")
        assert client.post("/logout").status_code == 204
        assert close_of(tab)[0] == 4401
    denied(client, "/chat")


def private_channels(client: TestClient) -> None:
    def token(user: str) -> str:
        text: str = client.post("/token", params={"user": user}).json()
        return text

    def ask(socket: WebSocketTestSession, kind: str, channel: str) -> Any:
        socket.send_json({"type": kind, "channel": channel, "data": "hello"})
        return socket.receive_json()["type"]

    with (
        client.websocket_connect("/ws") as ada,
        client.websocket_connect("/ws", subprotocols=["bearer", token("root")]) as root,
        client.websocket_connect("/ws", headers={"authorization": f"Bearer {token('eve')}"}) as eve,
    ):
        ada.send_text(token("ada"))
        assert ask(ada, "subscribe", "news") == ask(ada, "subscribe", "private:ada") == "subscribed"
        assert ask(ada, "publish", "news") == ask(eve, "subscribe", "private:ada") == "error"
        assert ask(root, "publish", "news") == "published"
        assert ada.receive_json() == {"type": "message", "channel": "news", "data": "hello"}
        client.post("/tell/ada", params={"text": "psst"})
        assert ada.receive_json() == {"private": "psst"}
        assert ask(eve, "subscribe", "news") == "subscribed"
        client.post("/ban/eve")
        assert close_of(eve)[0] == 4401
    for guess in ("guessed", token("ada")[:-1], "." + token("ada")):
        assert denied(client, authorization=f"Bearer {guess}").status_code == 401
        with client.websocket_connect("/ws") as socket:
            socket.send_text(guess)
            assert close_of(socket)[0] == 4401


EXERCISES: dict[str, Callable[[TestClient], None]] = {
    "01_chat": chat,
    "02_router": router,
    "03_channels_and_users": channels_and_users,
    "04_hooks": hooks,
    "05_http_and_threads": http_and_threads,
    "06_starlette": starlette,
    "07_prices": prices,
    "08_engine": engine,
    "09_scale_out": scale_out,
    "10_login": login,
    "11_private_channels": private_channels,
}

# Examples that want more than the extra `demo`, and don't run in this process alone.
EXTRAS = {"09_scale_out": "demo,nats,postgres,redis"}
RUNS = {"09_scale_out": '"09_scale_out:app", workers=4'}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_example_does_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_URL", f"hub://127.0.0.1:{free_port()}")
    with TestClient(load(path).app) as client:
        EXERCISES[path.stem](client)


def test_table_has_every_example_and_how_to_run_it() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\((\w+\.py)\) \|.*?`(?:\w+=\S+ )?uvicorn (\w+):app", table, re.MULTILINE)
    assert rows == [(path.stem, path.name, path.stem) for path in PATHS]


def test_examples_are_numbered_without_a_break() -> None:
    assert [path.stem[:3] for path in PATHS] == [f"{number:02}_" for number in range(1, len(PATHS) + 1)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_example_has_a_script_header_and_says_how_to_run_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    header = tomllib.loads("\n".join(line.removeprefix("#").strip() for line in lines[start + 1 : end]))
    extras = EXTRAS.get(path.stem, "demo")
    project = importlib.metadata.metadata("wsbroadcast")
    assert header == {"requires-python": project["Requires-Python"], "dependencies": [f"wsbroadcast[{extras}]"]}
    assert f"uvicorn {path.stem}:app" in (ast.get_docstring(ast.parse(source)) or "")
    run = RUNS.get(path.stem, "app")
    assert source.endswith(f'if __name__ == "__main__":\n    import uvicorn\n\n    uvicorn.run({run})\n')
