"""README and docs: every Python block runs and does what the text around it says, every link leads somewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jwt
import pytest
from fastapi import FastAPI, WebSocket
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosedError

import wsbroadcast
from tests.support import users as users_of_an_app
from tests.support.asgi import Peer
from tests.support.asgi import eventually as until
from tests.support.brokers import Endpoint
from tests.support.examples import announce, follow_news_by_centrifuge, talk_in_rooms_and_hear_news
from tests.support.programs import NODE, needs_node
from tests.support.servers import eventually, serve_here
from tests.support.web import admitted, close_of, denied
from wsbroadcast import (
    ClientTiming,
    CloseCode,
    ConnectionDep,
    ConnectionManager,
    EngineUnavailable,
    History,
    Hook,
    Limits,
    Publisher,
    SlowConsumer,
    Stats,
    WSBroadcastError,
    create_router,
    should_reconnect,
)
from wsbroadcast.command import _parser
from wsbroadcast.options import Timing
from wsbroadcast.stats import EngineStats
from wsbroadcast.web.http_streams import STATUSES

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted(ROOT.glob("docs/*.md")),
        ROOT / "examples/README.md",
    )
}

Namespace = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block of Python."""

    name: str
    """Page and heading, and from the second under a heading on a number."""
    page: str
    line: int
    source: str

    def run(self) -> Namespace:
        """Run it as a module of its own; tracebacks name the page and its line."""
        namespace: Namespace = {"__name__": "block"}
        code = compile("\n" * self.line + self.source, self.page, "exec", dont_inherit=True)
        exec(code, namespace)
        return namespace


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks_of(page: str, wanted: str = "python") -> list[Block]:
    """The fenced blocks of a language."""
    blocks: list[Block] = []
    heading, language, start = "", None, 0
    lines = PAGES[page].splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if language is None:
                language, start = line.removeprefix("```"), number + 1
                continue
            if language == wanted:
                before = sum(block.name.partition("-#")[0] == f"{page}#{heading}" for block in blocks)
                name = f"{page}#{heading}" + (f"-#{before + 1}" if before else "")
                blocks.append(Block(name, page, start, "\n".join(lines[start:number]) + "\n"))
            language = None
        elif language is None and line.startswith("#"):
            heading = slug(line.lstrip("# "))
    return blocks


# Those of "write an engine" are parts of two files, which `tests/test_engine_docs.py` puts together.
BLOCKS = [block for page in PAGES for block in blocks_of(page) if page != "docs/write-an-engine.md"]


# What to do with the blocks that make an app. Each function gets a started client and the block's names.


def refused(client: TestClient, path: str = "/ws", **headers: str) -> int:
    """Return the HTTP status that a handshake is refused with."""
    return denied(client, path, **headers).status_code


def readme_chat(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        with client.websocket_connect("/ws") as bob:
            ada.send_text("hello")
            assert ada.receive_text() == bob.receive_text() == "Broadcast: hello"
        ada.send_text("alone")
        assert ada.receive_text() == "Broadcast: alone"
        assert len(block["manager"].active_connections) == 1


def readme_rooms_and_news(client: TestClient, block: Namespace) -> None:
    talk_in_rooms_and_hear_news(client)


def typed_chat(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/rooms/tea?user=ada") as ada, client.websocket_connect("/rooms/tea?user=bob") as bob:
        ada.send_json({"type": "say", "text": "milk?"})
        assert ada.receive_json() == bob.receive_json() == {"type": "said", "text": "milk?", "by": "ada"}
        bob.send_json({"type": "typing", "more": 1})
        assert ada.receive_json() == bob.receive_json() == {"type": "typing"}
        ada.send_json({"type": "say", "text": ""})
        (shown,) = blocks_of("docs/typed-messages.md", "json")
        assert ada.receive_json() == json.loads(shown.source)


def typed_seats(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/shows/one", headers={"user": "ada"}) as ada:
        for answer in ({"seat": 5, "by": "ada"}, {"type": "error", "code": "sold_out", "text": "somebody sits there"}):
            ada.send_json({"seat": 5})
            assert ada.receive_json() == answer


def typed_endpoint(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as socket:
        for message, answer in (
            ({"type": "add", "number": 2}, {"total": 2}),
            ({"type": "add", "number": 3}, {"total": 5}),
            ({"type": "reset"}, {"total": 0}),
        ):
            socket.send_json(message)
            assert socket.receive_json() == answer
        socket.send_json({"type": "add"})
        assert socket.receive_json()["code"] == "invalid_data"


@contextmanager
def in_two_rooms(client: TestClient, path: str) -> Iterator[None]:
    """Talk in two rooms, and stay there."""
    with (
        client.websocket_connect(f"{path}tea") as ada,
        client.websocket_connect(f"{path}tea") as bob,
        client.websocket_connect(f"{path}coffee") as eva,
    ):
        ada.send_text("milk?")
        assert ada.receive_text() == bob.receive_text() == "milk?"
        eva.send_text("sugar?")
        assert eva.receive_text() == "sugar?"
        yield


def tutorial_page(client: TestClient, path: str) -> None:
    """The page of the tutorial comes from the app itself."""
    assert client.get(path).text == blocks_of("docs/tutorial.md", "html")[0].source


def tutorial_chat(client: TestClient, block: Namespace) -> None:
    tutorial_page(client, "/chat/ada")
    with client.websocket_connect("/ws/chat/ada") as ada:
        with client.websocket_connect("/ws/chat/bob") as bob:
            ada.send_text("hello")
            assert [ada.receive_text(), ada.receive_text()] == ["You wrote: hello", "ada says: hello"]
            assert bob.receive_text() == "ada says: hello"
        assert ada.receive_text() == "bob left the chat"


def tutorial_rooms(client: TestClient, block: Namespace) -> None:
    tutorial_page(client, "/rooms/tea")
    with in_two_rooms(client, "/ws/rooms/"):
        assert block["manager"].connections[0].channels == {"room:tea"}


def tutorial_users(client: TestClient, block: Namespace) -> None:
    assert refused(client, "/ws/inbox") == client.get("/inbox").status_code == 401
    assert client.get("/login/ada").status_code == 200
    tutorial_page(client, "/inbox")
    bobs = {"cookie": "session=secret-of-bob"}
    with client.websocket_connect("/ws/inbox") as one, client.websocket_connect("/ws/inbox") as two:
        client.cookies.clear()
        with client.websocket_connect("/ws/inbox", headers=bobs) as bob:
            one.send_text("bob: are you there?")
            assert bob.receive_text() == "from ada: are you there?"
            assert one.receive_text() == two.receive_text() == "to bob: are you there?"
            bob.send_text("ada: yes")
            assert one.receive_text() == two.receive_text() == "from bob: yes"
            assert bob.receive_text() == "to ada: yes"


def tutorial_hooks(client: TestClient, block: Namespace) -> None:
    tutorial_page(client, "/chat/ada")
    with client.websocket_connect("/ws/chat/ada") as ada:
        assert ada.receive_text() == "Welcome, ada!"
        with client.websocket_connect("/ws/chat/bob") as bob:
            assert bob.receive_text() == "Welcome, bob!"
            assert ada.receive_text() == "bob came, 2 here"
            bob.send_text("the password is sesame")
            assert ada.receive_text() == bob.receive_text() == "bob: the password is ******"
            bob.send_text("spam")
            assert close_of(bob) == (1008, "no spam")
        assert ada.receive_text() == "bob left, 1 here"


def tutorial_news(client: TestClient, block: Namespace) -> None:
    tutorial_page(client, "/news")
    with client.websocket_connect("/ws/news") as ada, client.websocket_connect("/ws/news") as bob:
        ada.send_text("nobody gets this")
        assert client.post("/announce", params={"text": "hello"}).json() == {"listeners": 2}
        assert ada.receive_json() == bob.receive_json() == {"news": "hello"}


def http_route(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/news") as ada:
        assert client.post("/publish", params={"headline": "hello"}).json() == {"listeners": 1}
        assert ada.receive_json() == {"headline": "hello"}


def echo(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        ada.send_text("hello")
        assert ada.receive_text() == "hello"


def threads(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        client.post("/report", params={"text": "done"})
        assert ada.receive_text() == "done"
        client.post("/import")
        assert [ada.receive_json()["imported"] for _ in range(3)] == [1, 2, 3]


def background_task(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        first = ada.receive_json()["tick"]
        assert ada.receive_json()["tick"] == first + 1
        assert client.post("/order").status_code == 200
        while (message := ada.receive_json()) != {"order": "new"}:
            assert "tick" in message


def database_row(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        client.post("/posts", params={"text": "hello"})
        assert ada.receive_json() == {"id": 1, "text": "hello"}
    block["engine"].dispose()


def rows_after_commit(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        for number, path in enumerate(("/in-a-thread", "/in-the-loop"), 1):
            assert client.post(path, params={"text": path}).status_code == 200
            assert ada.receive_json() == {"id": number, "text": path}
        with block["Session"](block["engine"]) as session:
            add_with_savepoints(session, block["Post"])
            session.rollback()
            add_with_savepoints(session, block["Post"])
            session.commit()
        client.post("/in-a-thread", params={"text": "last"})
        texts: list[str] = []
        while texts[-1:] != ["last"]:
            texts.append(ada.receive_json()["text"])
        assert texts == ["before", "kept", "after", "last"]
    block["engine"].dispose()


def add_with_savepoints(session: Any, row: Callable[..., Any]) -> None:
    """Add rows in a transaction: those called "undone" are taken back by the rollback of a savepoint."""

    def add(text: str) -> None:
        session.add(row(text=text))
        session.flush()

    add("before")
    with session.begin_nested():
        add("kept")
        savepoint = session.begin_nested()
        add("undone")
        savepoint.rollback()
    savepoint = session.begin_nested()
    with session.begin_nested():
        add("undone in a savepoint that ended well")
    add("undone too")
    savepoint.rollback()
    add("after")


def several_rooms(client: TestClient, block: Namespace) -> None:
    with (
        client.websocket_connect("/ws?user=ada&topic=cats") as ada,
        client.websocket_connect("/ws?user=bob&topic=cats") as bob,
        client.websocket_connect("/ws?user=root&topic=admins") as root,
    ):
        post = {"author": "ada", "topics": ["cats", "admins"], "text": "hello"}
        assert client.post("/posts", json=post).status_code == 200
        client.post("/invitations/ada")
        assert bob.receive_json() == root.receive_json() == post
        assert ada.receive_json() == root.receive_json() == {"invited": "ada"}


def nobody_there(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/ada") as ada:
        for user in ("ada", "bob"):
            client.post(f"/notify/{user}", params={"text": "hello"})
        assert ada.receive_text() == "hello"
    assert block["mails"] == [("bob", "hello")]


def local_ticks(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        assert ada.receive_json()["time"] < ada.receive_json()["time"]
        assert block["manager"].stats().broadcasts > 1


def leader(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        first = ada.receive_json()["tick"]
        assert ada.receive_json()["tick"] == first + 1


def only_sends(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/feed") as ada:
        assert "hello" in ada.receive_json()
        ada.send_text("ignored")
        client.portal.call(block["manager"].broadcast, "news")  # type: ignore[union-attr]
        assert ada.receive_text() == "news"


def access(client: TestClient, block: Namespace) -> None:
    for path in ("/ws", "/chat/news"):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect(path):
            pass
    with (
        client.websocket_connect("/ws?token=secret") as ada,
        client.websocket_connect("/chat/news?token=secret") as eva,
    ):
        ada.send_bytes(b"\xff")
        ada.send_text("hello")
        assert ada.receive_json() == eva.receive_json() == {"from": "ada", "text": "hello"}
        assert block["manager"].stats().users == 1
    with client.websocket_connect("/chat/private-news?token=secret") as bob:
        assert close_of(bob) == (1008, "not for you")


def rooms_of_a_class(client: TestClient, block: Namespace) -> None:
    with in_two_rooms(client, "/ws/"):
        assert [client.get(f"/members/{room}").json() for room in ("tea", "coffee", "milk")] == [2, 1, 0]


def users_of_a_class(client: TestClient, block: Namespace) -> None:
    with (
        client.websocket_connect("/ws/ada") as ada,
        client.websocket_connect("/ws/bob") as bob,
        client.websocket_connect("/ws/bob") as other_tab,
    ):
        ada.send_text("bob are you there?")
        assert bob.receive_text() == other_tab.receive_text() == "ada: are you there?"
        bob.send_text("ada yes")
        assert ada.receive_text() == "bob: yes"


def next_of(socket: WebSocketTestSession, kind: str) -> Any:
    """The next event of a type, in a connection that speaks events."""
    while (event := socket.receive_json())["type"] != kind:
        pass
    return event


def as_with_socketio(client: TestClient, block: Namespace) -> None:
    assert refused(client, "/ws/tea") == refused(client, "/ws/tea", authorization="Bearer wrong") == 401

    def come() -> WebSocketTestSession:
        return client.websocket_connect("/ws/tea", subprotocols=["wsbroadcast.v1", "bearer", "secret-of-ada"])

    with come() as ada, come() as other:
        ada.send_json({"type": "publish", "id": 1, "data": {"text": "hello"}})
        assert next_of(other, "message")["data"] == next_of(ada, "message")["data"] == {"text": "hello"}
        ada.send_json({"type": "call", "id": 2, "name": "rename", "args": {"name": "Ada"}})
        assert next_of(other, "message")["data"] == {"renamed": "Ada"}
        answer = ada.receive_json()
        while answer.get("id") != 2:
            assert answer["type"] != "message", "the caller is excluded"
            answer = ada.receive_json()
        assert answer["data"] == {"name": "Ada"}


def beside_django(client: TestClient, block: Namespace) -> None:
    def token(**claims: Any) -> str:
        return jwt.encode(claims, block["SECRET"], "HS256")

    assert refused(client, "/ws/tea", authorization=f"Bearer {token(sub='ada')}") == 401
    good = token(sub="ada", exp=time.time() + 60)
    with client.websocket_connect("/ws/tea", headers={"authorization": f"Bearer {good}"}) as ada:
        (connection,) = block["manager"].connections
        assert (connection.user, connection.channels) == ("ada", {"room:tea"})
        ada.send_text("nobody gets this")
        assert client.portal is not None
        client.portal.call(partial(block["manager"].broadcast, {"order": 5}, channel="room:tea"))
        assert ada.receive_json() == {"order": 5}


def as_with_centrifugo(client: TestClient, block: Namespace) -> None:
    ada = {"authorization": "Bearer secret-of-ada"}
    with client.websocket_connect("/ws", headers=ada) as socket:
        for channel, answer in (("chat:news", "subscribed"), ("other", "error")):
            socket.send_json({"type": "subscribe", "channel": channel})
            assert socket.receive_json()["type"] == answer
        position = client.post("/news", params={"text": "hello"}).json()["position"]
        assert socket.receive_json() == {"text": "hello"}
        assert client.portal is not None
        assert len(client.portal.call(block["manager"].presence, "chat:news")) == 1
    client.post("/news", params={"text": "again"})
    with client.websocket_connect("/ws", headers=ada, subprotocols=["wsbroadcast.v1"]) as socket:
        socket.send_json({"type": "subscribe", "channel": "chat:news", "since": position})
        assert next_of(socket, "subscribed")["recovered"] is True
        assert next_of(socket, "message")["data"] == {"text": "again"}


def ban(client: TestClient, block: Namespace) -> None:
    with (
        client.websocket_connect("/ws/ada") as ada,
        client.websocket_connect("/ws/ada") as other_tab,
        client.websocket_connect("/ws/bob") as bob,
    ):
        assert client.post("/ban/ada").status_code == 200
        for socket in (ada, other_tab):
            assert close_of(socket) == (1008, "banned")
        assert refused(client, "/ws/ada") == 403
        bob.send_text("still here")
        assert bob.receive_text() == "still here"
        bob.send_text("bye")
        assert close_of(bob) == (1000, "")


def bad_input(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        ada.send_json({"channel": "news", "text": "hello"})
        assert ada.receive_json() == {"channel": "news", "text": "hello"}
        for nonsense in ("{", "[1]", '{"channel": "", "text": ""}', json.dumps({"channel": "x" * 5000, "text": ""})):
            ada.send_text(nonsense)
            assert "error" in ada.receive_json()
        ada.send_bytes(b"{}")
        assert close_of(ada)[0] == 1003


def by_role(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/guest") as guest, client.websocket_connect("/ws/bot") as bot:
        bot.send_text("one")
        assert guest.receive_text() == "somebody said something"
        with client.websocket_connect("/ws/staff") as staff:
            staff.send_text("two")
            assert staff.receive_text() == "two"
            assert guest.receive_text() == "somebody said something"
        client.portal.call(block["manager"].send, block["manager"].connections[1], "three")  # type: ignore[union-attr]
        assert bot.receive_text() == "three"


def prices(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/prices") as ada:
        client.put("/prices/oil", params={"price": 70.5})
        assert ada.receive_json() == {"oil": 70.5}


def stats(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws"):
        assert client.get("/stats").json()["connections"] == 1
        assert client.get("/health").json() == {"engine": "memory", "is_ok": True, "detail": "", "is_ready": True}


def order(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws") as ada:
        assert [ada.receive_text() for _ in range(3)] == ["1", "2", "3"]
        assert close_of(ada) == (1000, "")


def scale_out(client: TestClient, block: Namespace) -> None:
    announce(client)


def try_again(client: TestClient, block: Namespace) -> None:
    async def unavailable() -> None:
        raise EngineUnavailable("the broker is away")

    async def endpoint(websocket: WebSocket) -> None:
        await block["manager"].connect(websocket)
        await unavailable()

    async def dependent(connection: ConnectionDep) -> None:
        await unavailable()

    app = block["app"]
    app.add_api_route("/unavailable", unavailable)
    app.add_api_websocket_route("/connected", endpoint)
    app.add_api_websocket_route("/dependent", dependent)
    announce(client)
    answer = client.get("/unavailable")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    with client.websocket_connect("/connected") as ada, client.websocket_connect("/dependent") as bob:
        assert close_of(ada)[0] == CloseCode.TRY_AGAIN_LATER
        assert close_of(bob)[0] == CloseCode.INTERNAL_ERROR


def authenticate(client: TestClient, block: Namespace) -> None:
    assert refused(client, "/ws/news") == refused(client, "/ws/news", **{"x-key": "guessed"}) == 401
    with (
        client.websocket_connect("/ws/news", headers={"x-key": "secret-of-ada"}) as ada,
        client.websocket_connect("/ws/news", headers={"x-key": "secret-of-bob"}) as bob,
    ):
        client.post("/notify/ada", params={"text": "for ada"})
        assert ada.receive_json() == {"text": "for ada"}
        bob.send_text("hello")
        assert ada.receive_text() == bob.receive_text() == "hello"


def json_web_token(client: TestClient, block: Namespace) -> None:
    def token(key: str = block["KEY"], algorithm: str = "HS256", **claims: Any) -> str:
        claims = {"sub": "ada", "aud": "chat", "exp": time.time() + 60, **claims}
        return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm)

    wrong = [
        token("another key, as long as the right one"),
        token("", "none"),
        token(aud="other"),
        token(exp=time.time() - 1),
        token(exp=None),
        token(sub=None),
        token()[:-4],
        "a.b.c",
    ]
    for text in wrong:
        assert refused(client, "/ws/news", authorization=f"Bearer {text}") == 401
        assert client.get("/me", headers={"authorization": f"Bearer {text}"}).status_code == 401
        with client.websocket_connect("/ws/news") as socket:
            socket.send_text(text)
            assert close_of(socket) == (4401, "no valid token")
    assert client.get("/me", headers={"authorization": f"Bearer {token()}"}).json() == {"user": "ada"}
    with (
        client.websocket_connect("/ws/news", headers={"authorization": f"Bearer {token()}"}) as by_header,
        client.websocket_connect("/ws/news", subprotocols=["bearer", token()]) as by_subprotocol,
        client.websocket_connect("/ws/news") as by_message,
    ):
        assert by_subprotocol.accepted_subprotocol == "bearer"
        by_message.send_text(token())
        by_message.send_text("hello")
        for socket in (by_header, by_subprotocol, by_message):
            assert socket.receive_text() == "hello"
    soon = token(exp=int(time.time()) + 2)  # in one to two seconds: PyJWT has whole ones
    with client.websocket_connect("/ws/news", headers={"authorization": f"Bearer {soon}"}) as socket:
        assert close_of(socket)[0] == 4401


def session_cookie(client: TestClient, block: Namespace) -> None:
    assert refused(client) == 401
    assert client.post("/login", params={"user": "ada", "password": "guessed"}).status_code == 401
    assert refused(client) == 401
    assert client.post("/login", params={"user": "ada", "password": "sesame"}).status_code == 200
    with client.websocket_connect("/ws") as ada:
        ada.send_text("hello")
        assert ada.receive_text() == "hello"
        assert block["manager"].stats().users == 1
        client.post("/logout")
        assert close_of(ada) == (4401, "logged out")
    assert refused(client) == 401


def fastapi_users(client: TestClient, block: Namespace) -> None:
    for cookie in ("fastapiusersauth=guessed", "fastapiusersauth=token-of-bob", "other=token-of-ada"):
        assert refused(client, cookie=cookie) == 401
    with client.websocket_connect("/ws", headers={"cookie": "fastapiusersauth=token-of-ada"}) as ada:
        ada.send_text("hello")
        assert ada.receive_text() == "hello"
        assert users_of_an_app.open_sessions == []


def own_endpoint(client: TestClient, block: Namespace) -> None:
    assert refused(client, "/ws/tea", authorization="Bearer guessed") == 401
    assert refused(client, "/ws/tea", authorization="Bearer secret-of-ada", origin="https://evil.example") == 403
    known = {"authorization": "Bearer secret-of-ada"}
    with (
        client.websocket_connect("/ws/tea", headers=known) as ada,
        client.websocket_connect("/ws/milk", headers=known) as eva,
    ):
        assert ada.receive_json() == eva.receive_json() == {"hello": "ada"}
        with client.websocket_connect("/ws/tea") as other_tab:
            other_tab.send_text("secret-of-ada")
            assert other_tab.receive_json() == {"hello": "ada"}
            other_tab.send_text("hi")
            assert ada.receive_json() == other_tab.receive_json() == {"from": "ada", "text": "hi"}
            other_tab.send_bytes(b"\xff")
            assert close_of(other_tab)[0] == 1003
        ada.send_text("still here")
        assert ada.receive_json() == {"from": "ada", "text": "still here"}
        eva.send_text("next")
        assert eva.receive_json() == {"from": "ada", "text": "next"}


def channel_rights(client: TestClient, block: Namespace) -> None:
    ada_s, bob_s = ({"authorization": f"Bearer secret-of-{name}"} for name in ("ada", "bob"))

    def ask(socket: WebSocketTestSession, kind: str, channel: str) -> Any:
        socket.send_json({"type": kind, "channel": channel, "data": 42})
        return socket.receive_json()

    no = {"type": "error", "code": "forbidden", "text": "not allowed"}
    with client.websocket_connect("/ws", headers=ada_s) as ada, client.websocket_connect("/ws", headers=bob_s) as bob:
        assert ask(bob, "subscribe", "news") == {"type": "subscribed", "channel": "news"}
        assert ask(bob, "publish", "news") == ask(bob, "subscribe", "inbox:ada") == ask(bob, "subscribe", "x") == no
        assert ask(ada, "publish", "news") == {"type": "published", "channel": "news"}
        assert bob.receive_json() == {"type": "message", "channel": "news", "data": 42}
        assert ask(bob, "unsubscribe", "news") == {"type": "unsubscribed", "channel": "news"}
        assert refused(client, "/listen/inbox:ada", **bob_s) == refused(client, "/listen/other", **ada_s) == 403
        with client.websocket_connect("/listen/inbox:ada", headers=ada_s) as inbox:
            client.portal.call(partial(block["manager"].broadcast, "psst", channel="inbox:ada"))  # type: ignore[union-attr]
            assert inbox.receive_text() == "psst"


def log_out(client: TestClient, block: Namespace) -> None:
    assert refused(client) == refused(client, cookie="session=guessed") == 401
    ada, bob, database = {"cookie": "session=secret-of-ada"}, {"cookie": "session=secret-of-bob"}, block["database"]
    with client.websocket_connect("/ws", headers=ada) as tab, client.websocket_connect("/ws", headers=bob) as other:
        assert client.post("/logout", headers=ada).status_code == 204
        assert close_of(tab) == (4401, "logged out")
        assert refused(client, **ada) == 401
        del database.users["secret-of-bob"]  # on another node, which can't say so: the broker is out of reach
        gap = wsbroadcast.Gap("redis", 3.0)
        client.portal.call(block["manager"].hooks.observe, "on_gap", gap)  # type: ignore[union-attr]
        assert close_of(other) == (4401, "logged out")

    async def find_and_log_out(session: str) -> str | None:  # in the middle of the handshake
        user: str | None = database.users.pop(session, None)
        return user

    database.users["secret-of-ada"] = "ada"
    database.user_of = find_and_log_out
    with client.websocket_connect("/ws", headers=ada) as tab:
        assert close_of(tab) == (1008, "logged out")


def other_origins(client: TestClient, block: Namespace) -> None:
    for origin in ("https://app.example", "http://localhost:5173"):
        admitted(client, origin=origin)
    for origin in ("https://evil.example", "http://app.example", "http://testserver", "http://localhost:5174"):
        assert refused(client, origin=origin) == 403
    admitted(client)


def named_origins(client: TestClient, block: Namespace) -> None:
    admitted(client, origin="https://www.app.example")
    assert refused(client, origin="http://testserver") == 403


def say(client: TestClient, block: Namespace, channel: str, *texts: str) -> list[str]:
    """Broadcast to a channel; return the positions."""
    assert client.portal is not None
    found = [client.portal.call(partial(block["manager"].broadcast, text, channel=channel)) for text in texts]
    return [str(receipt.position) for receipt in found]


def events_with_positions(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/room:1", subprotocols=["wsbroadcast.v1"]) as ada:
        assert [ada.receive_json()["type"] for _ in range(2)] == ["hello", "subscribed"]
        first, last = say(client, block, "room:1", "1", "2")
        assert [ada.receive_json()["position"] for _ in range(2)] == [first, last]
    with client.websocket_connect(f"/ws/room:1?since={first}", subprotocols=["wsbroadcast.v1"]) as ada:
        assert ada.receive_json()["type"] == "hello"
        assert ada.receive_json()["recovered"] is True
        assert ada.receive_json()["data"] == "2"


def comes_back(client: TestClient, block: Namespace) -> None:
    first, _ = say(client, block, "feed", "1", "2")
    with client.websocket_connect(f"/feed?since={first}") as ada:
        assert ada.receive_text() == "2"
    with client.websocket_connect("/feed?since=nonsense") as ada:
        assert ada.receive_text() == "reload"


def news_by_centrifuge(client: TestClient, block: Namespace) -> None:
    token = client.post("/token", params={"user": "ada"}).json()
    assert jwt.decode(token, block["SECRET"], ["HS256"])["exp"] > time.time()
    follow_news_by_centrifuge(client, token, "/news")


def metrics(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws"):
        page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'wsbroadcast_connections{node="web-1",sink="asgi"} 1' in page.text.splitlines()


def snapshot_and_follow(client: TestClient, block: Namespace) -> None:
    since = client.get("/prices").json()["since"]
    say(client, block, "prices", "72")
    with client.websocket_connect(f"/ws/prices?since={since}") as ada:
        assert ada.receive_text() == "72"
    with client.websocket_connect("/ws/prices?since=last") as ada:
        assert ada.receive_text() == "72"


def channels_by_path(client: TestClient, block: Namespace) -> None:
    with in_two_rooms(client, "/"):
        pass


def watch(client: TestClient, block: Namespace) -> None:
    cache = block["cache"]
    cache.update(tea=1, milk=2)
    assert client.put("/products/tea").status_code == 204
    assert client.portal is not None
    client.portal.call(until, lambda: cache == {"milk": 2})


def snapshot(client: TestClient, block: Namespace) -> None:
    found = client.get("/tasks").json()
    assert found["tasks"] == ["milk"]
    client.post("/tasks", params={"title": "tea"})
    with client.websocket_connect(f"/follow?since={found['position']}") as page:
        client.post("/tasks", params={"title": "jam"})
        assert [page.receive_text(), page.receive_text()] == ["tea", "jam"]


def operations(client: TestClient, block: Namespace) -> None:
    assert client.get("/operations/nodes").status_code == 401
    assert client.get("/operations/ready").text == "ready"
    client.auth = ("ops", "a long secret")
    with client.websocket_connect("/ws/tea") as one, client.websocket_connect("/ws/tea") as two:
        one.send_text("milk?")
        assert one.receive_text() == two.receive_text() == "milk?"
        routes = ("nodes", "connections?limit=1", "channels")
        for route, example in zip(routes, blocks_of("docs/operations.md", "json"), strict=True):
            assert alike(client.get(f"/operations/{route}").json(), json.loads(example.source)), route
        for line in PAGES["docs/operations.md"].partition("## Routes")[2].splitlines():
            if route_of := re.match(r"\| `(GET|POST) (/operations/[^`]*)` \|", line):
                path = route_of[2].replace("{user}", "ada")
                expected = 404 if path.endswith("ada") else 202 if path.endswith("drain") else 200
                assert client.request(route_of[1], path).status_code == expected, line
        assert block["manager"].is_draining


def alike(found: Any, example: Any) -> bool:
    """Tell whether the example has the fields that were found, and where it holds for every answer, what is in them."""
    if isinstance(found, dict) and isinstance(example, dict):
        return found.keys() == example.keys() and all(alike(found[key], example[key]) for key in found)
    if isinstance(found, list) and isinstance(example, list):
        return len(found) == len(example) and all(map(alike, found, example))
    return type(found) is type(example) and (not isinstance(found, (bool, int)) or found == example or found > 100)


def drained(client: TestClient, block: Namespace) -> None:
    assert client.get("/ready").json() is True
    with client.websocket_connect("/ws/news") as ada:
        client.post("/internal/drain").raise_for_status()
        with pytest.raises(WebSocketDisconnect) as caught:
            ada.receive_text()
    assert (caught.value.code, caught.value.reason) == (1012, "drain")
    assert client.get("/ready").status_code == 503
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("/ws/news"):
        pass
    assert refused.value.status_code == 503


def events_over_http(client: TestClient, block: Namespace) -> None:
    def poll(query: str = "") -> Any:
        return client.get(f"/sse/news{query}", headers={"Accept": "application/json"}).json()

    at = poll()["position"]
    client.post("/news", params={"text": "hello"})
    answer = poll(f"?since={at}&wait=20")
    assert answer["recovered"] is True
    assert [(each["type"], each["data"]) for each in answer["messages"]] == [("message", "hello")]
    assert set(answer) == {"position", "recovered", "messages"}


def posted(client: TestClient, block: Namespace) -> None:
    section = PAGES["docs/sse.md"].partition("## Publish and call")[2].partition("\n## ")[0]
    (console,) = re.findall(r"^```console\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    lines = console.splitlines()
    found: set[int] = set()
    with client.websocket_connect("/rooms/tea") as one:
        for command, expected in zip(lines[::2], lines[1::2], strict=True):
            *_, header, _, body, url = shlex.split(command.removeprefix("$ "))
            name, _, value = header.partition(": ")
            answer = client.post(url.partition(":8000")[2], content=body, headers={name: value})
            assert answer.json() == json.loads(expected), command
            found.add(answer.status_code)
        assert one.receive_text() == "hello"
    told = {int(status) for status in re.findall(r"^\| (\d{3}) \|", section, re.MULTILINE)}
    assert told == {200, 400, 408, 413, *STATUSES.values()} > found


ANN = {"x-user": "ann"}


def ui_messages(client: TestClient, block: Namespace) -> None:
    # With the SDK itself, as the recipes that follow: tests/integration/test_front_ends.py.
    asked = {"id": "1", "messages": []}
    found = client.post("/api/chat", json=asked, headers=ANN).text
    assert '"messageId"' in found
    assert found.endswith('data: {"type":"finish"}\n\ndata: [DONE]\n\n')
    assert client.get("/api/chat/1/stream", headers=ANN).status_code == 204
    assert client.post("/api/chat/1/stop", headers=ANN).status_code == 204
    assert client.post("/api/chat", json={**asked, "id": "\0"}, headers=ANN).status_code == 422


def ag_ui(client: TestClient, block: Namespace) -> None:
    asked = {"threadId": "1", "runId": "2", "messages": []}
    first, second = (client.post("/agent", json=asked, headers=ANN).text for _ in range(2))
    assert first == second
    assert first.endswith('data: {"type": "RUN_FINISHED", "threadId": "1", "runId": "2"}\n\n')
    assert client.post("/agent/2/stop", headers=ANN).status_code == 204


def openai_chunks(client: TestClient, block: Namespace) -> None:
    asked, key = {"model": "any", "messages": []}, {"authorization": "Bearer sk-ann"}
    found = client.post("/v1/chat/completions", json=asked, headers=key).text
    assert found.endswith('"finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
    assert client.post("/v1/chat/completions/none/stop", headers=key).status_code == 404


def answered(client: TestClient, block: Namespace) -> None:
    ann = {"authorization": "Bearer ann"}
    id_ = client.post("/ask?prompt=hello+world", headers=ann).json()["id"]
    events = client.get(f"/runs/{id_}", headers=ann).text.split("\n\n")
    entries = [json.loads(line[6:]) for event in events for line in event.splitlines() if line.startswith("data: ")]
    assert entries[0]["data"] == {"model": "scripted"}
    assert "".join(each.get("text", "") for each in entries) == "You said: hello world "
    assert (entries[-1]["type"], entries[-1]["state"]) == ("end", "done")
    assert client.get(f"/runs/{id_}", headers=ann | {"last-event-id": entries[-1]["position"]}).status_code == 204
    assert client.get(f"/runs/{id_}/status", headers=ann).json()["state"] == "done"
    assert client.post(f"/runs/{id_}/stop", headers=ann).json() == {"stopped": False}
    assert client.get(f"/runs/{id_}", headers={"authorization": "Bearer bob"}).status_code == 404
    section = PAGES["docs/streams.md"].partition("## What comes")[2].partition("## ")[0]
    assert {each["type"] for each in entries} | {"reset"} == set(
        re.findall(r'^\| `\{"type": "(\w+)"', section, re.MULTILINE)
    )


def members_of(client: TestClient, room: str) -> list[tuple[str, Any]]:
    return sorted((member["user"], member["info"]) for member in client.get(f"/rooms/{room}/members").json())


def online(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/tea?user=ada"), client.websocket_connect("/ws/milk?user=ada"):
        with client.websocket_connect("/ws/tea?user=ada"), client.websocket_connect("/ws/tea?user=bob"):
            assert members_of(client, "tea") == [("ada", None), ("bob", None)]
            assert client.get("/rooms/tea/count").json() == 2
        assert members_of(client, "tea") == [("ada", None), ("bob", None)]  # in his grace
    found = client.get("/users/ada").json()
    assert found == {"online": True, "rooms": found["rooms"]}
    assert set(found["rooms"]) == {"room:tea", "room:milk"}
    assert client.get("/users/eva").json() == {"online": False, "rooms": []}
    (text,) = re.findall(r"answers `(\[.*?\])`", PAGES["docs/presence.md"])
    (shown,) = json.loads(text)
    assert shown in client.get("/rooms/tea/members").json()


def seen_of_a_member(client: TestClient, block: Namespace) -> None:
    assert refused(client, "/ws/tea?token=guessed") == 401
    with client.websocket_connect("/ws/tea?token=secret-of-ada"):
        (text,) = re.findall(r"`(\[.*?\])` is the answer", PAGES["docs/presence.md"])
        assert client.get("/rooms/tea/members").json() == json.loads(text)


def mails_for_who_is_not_there(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws?user=ada") as ada:
        for user in ("ada", "bob"):
            client.post(f"/notify/{user}", params={"text": "hello"})
        assert ada.receive_text() == "hello"
    assert block["mails"] == [("bob", "hello")]


def last_seen(client: TestClient, block: Namespace) -> None:
    assert client.get("/seen/ada").json() == "never"
    with client.websocket_connect("/ws/tea?user=ada"):
        assert client.get("/seen/ada").json() == "online"
        assert client.portal is not None
        client.portal.call(until, lambda: block["read"]("ada"))
        before = block["read"]("ada")
        client.portal.call(block["manager"].close_user, "ada")
        client.portal.call(until, lambda: block["read"]("ada") > before)
    assert client.get("/seen/ada").json() == "0 s ago"


def typing(client: TestClient, block: Namespace) -> None:
    def come(user: str) -> Any:
        return client.websocket_connect(f"/ws/tea?user={user}", subprotocols=["wsbroadcast.v1"])

    with come("ada") as ada, come("bob") as bob:
        bob.send_json({"type": "call", "id": 1, "name": "typing"})
        assert next_of(bob, "result")["id"] == 1
        heard = next_of(ada, "message")
        assert (heard["channel"], heard["data"]) == ("typing:room:tea", {"typing": "bob"})
        ada.send_json({"type": "publish", "id": 1, "data": "hi"})
        assert next_of(bob, "message")["data"] == "hi"
        assert client.portal is not None
        kept = client.portal.call(partial(block["manager"].history, "room:tea"))
        assert [each.data for each in kept.messages] == ["hi"]


def described(client: TestClient, block: Namespace) -> None:
    with client.websocket_connect("/ws/tea") as ada:
        ada.send_json({"type": "say", "text": "hello"})
        said = ada.receive_json()
        assert (said["type"], said["text"]) == ("said", "hello")
        ada.send_json({"type": "typing"})
        assert ada.receive_json() == {"type": "busy"}
    document = client.get("/asyncapi.json").json()
    assert document == block["manager"].asyncapi(block["app"])
    assert set(document["channels"]) == {"ws_room", "ws_room_events"}
    assert set(client.get("/openapi.json").json()["paths"]) == {"/ws/{room}#websocket"}
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 200


EXERCISES: dict[str, Callable[[TestClient, Namespace], None]] = {
    "README.md#wsbroadcast": readme_chat,
    "README.md#what-it-does-for-you": readme_rooms_and_news,
    "docs/asyncapi.md#the-app": described,
    "docs/behind-a-proxy.md#the-server": named_origins,
    "docs/deployment.md#drain-by-hand": drained,
    "docs/explanation.md#order": order,
    "docs/from-a-class-of-your-own.md#a-dict-of-rooms": rooms_of_a_class,
    "docs/from-a-class-of-your-own.md#a-dict-of-users": users_of_a_class,
    "docs/from-centrifugo.md#from-centrifugo": as_with_centrifugo,
    "docs/from-django-channels.md#django-beside-fastapi": beside_django,
    "docs/from-python-socketio.md#from-python-socketio": as_with_socketio,
    "docs/history.md#come-back": comes_back,
    "docs/history.md#snapshot-and-follow": snapshot_and_follow,
    "docs/history.md#turn-it-on": events_with_positions,
    "docs/streams.md#ag-ui": ag_ui,
    "docs/streams.md#openai-chunks": openai_chunks,
    "docs/streams.md#vercel-ai-sdk": ui_messages,
    "docs/how-to-authenticate.md#a-dependency-that-says-who-it-is": authenticate,
    "docs/how-to-authenticate.md#a-jwt": json_web_token,
    "docs/how-to-authenticate.md#a-session-cookie": session_cookie,
    "docs/how-to-authenticate.md#fastapi-users": fastapi_users,
    "docs/how-to-authenticate.md#an-endpoint-of-your-own": own_endpoint,
    "docs/how-to-authenticate.md#who-may-do-what-with-a-channel": channel_rights,
    "docs/how-to-authenticate.md#log-out-expire-ban": log_out,
    "docs/how-to-authenticate.md#pages-of-another-origin": other_origins,
    "docs/how-to.md#send-from-an-http-route": http_route,
    "docs/how-to.md#send-from-an-http-route-#2": echo,
    "docs/how-to.md#send-to-several-rooms-or-to-all-but-some": several_rooms,
    "docs/how-to.md#know-whether-anybody-was-there": nobody_there,
    "docs/how-to.md#send-from-a-thread": threads,
    "docs/how-to.md#send-from-a-background-task": background_task,
    "docs/how-to.md#send-a-row-of-your-database": database_row,
    "docs/how-to.md#send-a-row-of-your-database-#2": rows_after_commit,
    "docs/how-to.md#write-an-endpoint-that-only-sends": only_sends,
    "docs/how-to.md#let-only-some-people-in": access,
    "docs/how-to.md#close-a-connection-or-throw-a-user-out": ban,
    "docs/how-to.md#handle-bad-input-from-clients": bad_input,
    "docs/how-to.md#send-something-else-to-some-of-the-recipients": by_role,
    "docs/how-to.md#choose-what-happens-to-slow-consumers": prices,
    "docs/how-to.md#see-what-is-going-on": stats,
    "docs/centrifuge.md#the-app": news_by_centrifuge,
    "docs/observe.md#prometheus": metrics,
    "docs/presence.md#turn-it-on": online,
    "docs/presence.md#what-others-see": seen_of_a_member,
    "docs/presence.md#is-anybody-there": mails_for_who_is_not_there,
    "docs/presence.md#last-seen": last_seen,
    "docs/presence.md#typing": typing,
    "docs/from-broadcaster.md#from-encodebroadcaster": channels_by_path,
    "docs/listen.md#listen": watch,
    "docs/operations.md#add-it-to-your-app": operations,
    "docs/listen.md#snapshot-and-follow": snapshot,
    "docs/servers.md#uvicorn": echo,
    "docs/sse.md#publish-and-call": posted,
    "docs/sse.md#the-app": events_over_http,
    "docs/scale-out.md#two-workers": scale_out,
    "docs/streams.md#the-app": answered,
    "docs/scale-out.md#what-changes-with-a-broker-#2": try_again,
    "docs/scale-out.md#background-tasks": local_ticks,
    "docs/scale-out.md#background-tasks-#2": leader,
    "docs/tutorial.md#1-a-chat": tutorial_chat,
    "docs/tutorial.md#2-rooms": tutorial_rooms,
    "docs/tutorial.md#3-users": tutorial_users,
    "docs/tutorial.md#4-hooks": tutorial_hooks,
    "docs/tutorial.md#5-messages-from-an-http-route": tutorial_news,
    "docs/typed-messages.md#a-chat-with-types": typed_chat,
    "docs/typed-messages.md#functions-that-handle-messages": typed_seats,
    "docs/typed-messages.md#in-an-endpoint-of-your-own": typed_endpoint,
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What blocks find: the tutorial's page, a broker's URL and others in the environment, and a bit of Celery."""
    (page,) = blocks_of("docs/tutorial.md", "html")
    (tmp_path / "page.html").write_text(page.source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    celery = ModuleType("celery")
    celery.shared_task = lambda **options: lambda function: function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "celery", celery)
    monkeypatch.setenv("WSBROADCAST_ENGINE", "redis://localhost")
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'app.db'}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block_runs_and_does_what_the_text_says(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "users", users_of_an_app)
    if "pydantic_ai" in block.source:
        pytest.importorskip("pydantic_ai")
    namespace = block.run()
    tests = [function for name, function in namespace.items() if name.startswith("test_")]
    for test in tests:
        run_test(test)
    if "app" in namespace and not tests:
        with TestClient(namespace["app"]) as client:
            EXERCISES[block.name](client, namespace)


def run_test(test: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
    """Run a test that a block defines."""
    if inspect.iscoroutinefunction(test):
        asyncio.run(test())
    else:
        test()


def test_every_exercise_has_its_block() -> None:
    assert EXERCISES.keys() <= {block.name for block in BLOCKS}


async def test_ban_of_the_how_to_waits_for_no_slow_tab() -> None:
    (block,) = [block for block in BLOCKS if block.name == "docs/how-to.md#close-a-connection-or-throw-a-user-out"]
    names = block.run()
    slow, good = Peer(), Peer()
    async with names["manager"] as manager:
        for peer in (slow, good):
            await manager.connect(peer.websocket, user="ada")
        slow.stall()
        for _ in range(SlowConsumer().max_backlog_messages):
            manager.broadcast_nowait("a lot", exclude=good.websocket)
        async with asyncio.timeout(SlowConsumer().send_timeout / 2):
            await names["ban"]("ada", manager)
            assert await good.wait_close() == CloseCode.POLICY_VIOLATION


# A clock that a script sets, and timers that it ends.
CLOCK = """
let now = 0, timers = 0
const due = new Map(), performance = { now: () => now }
const setTimeout = (forget) => due.set(++timers, forget) && timers
const clearTimeout = (timer) => due.delete(timer)
"""

# Says "typing" three times within a second, hears it of two others, and goes on to where it has been forgotten.
TYPING = """
const calls = []
let shown = []
const ws = { call: async (name) => { calls.push(name); throw new Error("lost") } }
for (const at of [0, 500, 999]) { now = at; onInput(ws) }
const draw = (names) => { shown = names }
const known = ["bob", "eva", "bob"].map((user) => onMessage({ data: { typing: user } }, draw))
const seen = shown
known.push(onMessage({ data: "hi" }, draw))
now = 3000
onInput(ws)
for (const forget of due.values()) forget()
console.log(JSON.stringify({ calls, seen, known, shown }))
"""


@needs_node
def test_page_says_that_somebody_types_now_and_then_and_forgets_it() -> None:
    (block,) = (each for each in blocks_of("docs/presence.md", "js") if each.name == "docs/presence.md#typing")
    done = subprocess.run([NODE, "-e", CLOCK + block.source + TYPING], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == {
        "calls": ["typing", "typing"],
        "seen": ["bob", "eva"],
        "known": [True, True, True, False],
        "shown": [],
    }


OUTSIDE = [
    block
    for block in BLOCKS
    if block.name.startswith(("docs/how-to.md#publish-from-outside", "docs/from-django-channels.md"))
    and "Publisher(" in block.source
]


@pytest.mark.parametrize(
    ("block", "message"),
    [*zip(OUTSIDE, ['{"order":5}', '{"prices":"new"}', '{"report":"/reports/may.pdf"}', '{"minute":2}'], strict=True)],
    ids=["Django", "script", "Celery", "async"],
)
async def test_publisher_of_the_how_to_reaches_an_app(
    block: Block, message: str, redis_server: Endpoint, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{redis_server.url}?prefix={prefix}"
    monkeypatch.setenv("WSBROADCAST_ENGINE", url)
    peer = Peer()
    async with ConnectionManager(url) as manager:
        await manager.connect(peer.websocket, user=7, channels=["prices", "clock", "room:tea"])
        names = block.run()
        if "main" in names:
            await asyncio.to_thread(lambda: run_test(names["main"]))
        else:
            if "build_report" in names:
                await asyncio.to_thread(names["build_report"], 7, "may")
            else:
                await asyncio.to_thread(names["order_was_saved"], 5, "tea")
            await asyncio.to_thread(names["publisher"].close)

        async def is_there() -> bool:
            return message in [event.get("text") for event in peer.sent]

        await eventually(is_there)


MAINS = [block for block in BLOCKS if block.page == "docs/listen.md" and "async def main" in block.source]


@pytest.mark.parametrize("block", MAINS, ids=lambda block: block.name)
def test_program_about_listening_finds_what_it_says(block: Block) -> None:
    run_test(block.run()["main"])


def test_there_are_programs_about_listening() -> None:
    assert len(MAINS) == 3


async def test_process_that_publishes_prices_ends_when_it_is_told_to(
    redis_server: Endpoint, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (block for block in BLOCKS if block.name == "docs/scale-out.md#background-tasks-#3")
    url = f"{redis_server.url}?prefix={prefix}"
    monkeypatch.setenv("WSBROADCAST_ENGINE", url)
    peer = Peer()
    async with ConnectionManager(url) as manager:
        await manager.connect(peer.websocket, channels=["prices"])
        publishing = asyncio.create_task(block.run()["main"]())
        assert (await peer.wait_messages(2))[:2] == ['{"gold":2345.6}'] * 2
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(publishing, 5)
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


def test_shell_commands_of_the_how_to_are_understood() -> None:
    (block,) = blocks_of("docs/how-to.md", "sh")
    commands = [line.rpartition("python -m wsbroadcast ")[2] for line in block.source.splitlines()[1:]]
    parsed = [_parser().parse_args(shlex.split(command.partition(" < ")[0])) for command in commands]
    assert [one.texts for one in parsed] == [
        ["hello"],
        ['{"maintenance": "in 10 minutes"}'],
        [],
        [],
        ["the report is out"],
    ]
    assert [one.channel or one.user for one in parsed] == ["news", None, "log", "42", "news"]


# The pages among each other, and against the code.


def links_of(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_page_has_nothing_that_a_merge_left_undecided(page: str) -> None:
    assert re.findall(r"^(?:<{7}|\|{7}|>{7}) .*$", PAGES[page], flags=re.MULTILINE) == []


def test_docs_are_all_linked_from_their_index() -> None:
    pages = {page for page in PAGES if page.startswith("docs/")} - {"docs/README.md"}
    assert {f"docs/{link}" for link in links_of("docs/README.md")} >= pages


REFERENCE = PAGES["docs/reference.md"]


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("ConnectionManager", ConnectionManager),
        ("Connection", wsbroadcast.Connection),
        ("Publisher", Publisher),
    ],
)
def test_reference_lists_what_a_class_can_do_and_nothing_else(section: str, kind: type) -> None:
    table = REFERENCE.partition(f"\n## {section}\n")[2].partition("\n|---|---|")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"`([a-z_]+)`", table)) == public_names_of(kind)


def test_reference_has_every_hook() -> None:
    section = REFERENCE.partition("\n## Hooks\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)\(", section, re.MULTILINE)) == public_names_of(Hook)


def test_reference_says_where_the_names_for_engines_are() -> None:
    table = REFERENCE.partition("\n### Engines of your own\n")[2].partition("\n|---|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines()]
    assert len(rows) == 9
    for _, names, place in rows:
        (module,) = re.findall(r"`(wsbroadcast[\w.]*)`", place)
        home = importlib.import_module(module)
        assert [name for name in re.findall(r"`(\w+)`", names) if not hasattr(home, name)] == []


def public_names_of(kind: type) -> list[str]:
    return sorted(name for name in dir(kind) if not name.startswith("_"))


@pytest.mark.parametrize("options", [SlowConsumer, Limits, Timing])
def test_reference_has_every_option_with_its_default(options: type[SlowConsumer | Limits | Timing]) -> None:
    for field in dataclasses.fields(options):
        number = f"{field.default:,}" if isinstance(field.default, (int, float)) else str(field.default)
        if field.default_factory is not dataclasses.MISSING:
            number = str(field.default_factory())
        default = f'`"{field.default}"`' if isinstance(field.default, str) else number
        assert re.search(rf"^\| `{field.name}` \| {re.escape(default)}( s| bytes)? \|", REFERENCE, re.MULTILINE), (
            field.name
        )


@pytest.mark.parametrize(("heading", "stats"), [("\n## Stats\n", Stats), ("\n### EngineStats\n", EngineStats)])
def test_reference_has_every_field_of_stats(heading: str, stats: type[Stats | EngineStats]) -> None:
    fields = {field.name for field in dataclasses.fields(stats)}
    section = re.split(r"\n##", REFERENCE.partition(heading)[2])[0]
    named = {
        name for row in re.findall(r"^\| (`.+?`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == fields


def test_reference_has_every_close_code_and_whether_to_come_back() -> None:
    rows = re.findall(r"^\| `CloseCode\.(\w+)` \| (\d+) \|.*\| (yes|no) \|$", REFERENCE, re.MULTILINE)
    assert rows == [(code.name, str(code.value), "yes" if should_reconnect(code) else "no") for code in CloseCode]


def test_reference_has_the_tree_of_errors() -> None:
    def below(kind: type[BaseException]) -> dict[str, Any]:
        ours = (child for child in kind.__subclasses__() if child.__module__ == WSBroadcastError.__module__)
        return {child.__name__: below(child) for child in ours}

    tree = REFERENCE.partition("\n## Errors")[2].partition("```")[2].partition("```")[0]
    found: dict[str, Any] = {}
    path = [found]
    for indent, name in re.findall(r"^([│├└─ ]*)(\w+)", tree.strip(), re.MULTILINE):
        del path[len(indent) // 4 + 1 :]
        path.append(path[-1].setdefault(name, {}))
    assert found == {"WSBroadcastError": below(WSBroadcastError)}


def test_clients_come_back_for_the_codes_of_should_reconnect() -> None:
    client = (ROOT / "src/wsbroadcast/client/wsbroadcast.js").read_text(encoding="utf-8")
    texts = [PAGES["docs/how-to.md"], client]
    lists = [re.search(r"COMES_BACK = [\[{]([\d, ]+)[\]}]", text) for text in texts]
    right = {int(code) for code in {1006, *CloseCode} if should_reconnect(code)}
    assert [found and {int(code) for code in found[1].split(",")} for found in lists] == [right] * 2


def test_client_in_another_language_misses_nothing() -> None:
    (block,) = (block for block in BLOCKS if block.name == "docs/how-to.md#write-a-client-in-another-language")
    asyncio.run(_follow(block.run()["follow"]))


async def _follow(follow: Callable[..., Coroutine[Any, Any, None]]) -> None:
    manager = ConnectionManager(history=History(messages=5), client_timing=ClientTiming(reconnect_min=0.01))
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}"))
    got: list[Any] = []

    async def on_message(data: Any) -> None:
        got.append(data)

    async def snapshot() -> str:
        position = str(await manager.position("news"))
        got.append("snapshot")
        return position

    async with serve_here(app) as port:
        following = asyncio.create_task(follow(f"ws://127.0.0.1:{port}/ws/news", on_message, snapshot))
        try:
            await until(lambda: manager.connections)
            for number in range(3):
                await manager.broadcast(number, channel="news")
            await until(lambda: len(got) == 4)
            await manager.close(manager.connections[0], 1012)
            for number in range(3, 6):
                await manager.broadcast(number, channel="news")
            await until(lambda: len(got) == 7)
            await manager.forget("news")
            await until(lambda: got.count("snapshot") == 2)
            await manager.broadcast(6, channel="news")
            await until(lambda: got[-1] == 6)
            assert got == ["snapshot", 0, 1, 2, 3, 4, 5, "snapshot", 6]
            await manager.close(manager.connections[0], 1008)
            with pytest.raises(ConnectionClosedError):
                await asyncio.wait_for(following, 5)
        finally:
            following.cancel()


def test_readme_has_a_command_for_the_demo_and_one_for_the_tests() -> None:
    commands = [command for block in blocks_of("README.md", "") for command in block.source.splitlines()]
    assert commands == ["pip install wsbroadcast", "scripts/demo", "scripts/test"]
    assert "\nscripts/test " in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", PAGES["docs/servers.md"], re.MULTILINE))
    wanted = [f"{name}>={lowest[title]}" for name, title in (("fastapi", "FastAPI"), ("starlette", "Starlette"))]
    assert project["dependencies"] == wanted
    assert project["requires-python"] == f">={lowest['Python']}"
    highest = re.findall(r"^\| Python \| [\d.]+ \| ([\d.]+) \|", PAGES["docs/servers.md"], re.MULTILINE)
    tried = [name.rpartition(" ")[2] for name in project["classifiers"] if ":: 3." in name]
    assert [tried[0], tried[-1]] == [lowest["Python"], *highest]
