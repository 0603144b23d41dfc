"""The examples: each runs as it stands, and does what its docstring says."""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import itertools
import json
import os
import re
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from starlette.testclient import TestClient, WebSocketTestSession

from tests.support.asgi import eventually
from tests.support.brokers import free_port
from tests.support.examples import EXAMPLES, announce, follow_news_by_centrifuge, load, talk_in_rooms_and_hear_news
from tests.support.standins import standins
from tests.support.web import close_of, denied
from wsbroadcast import Publisher

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
    assert client.get("/health").json() == {"engine": "memory", "is_ok": True, "detail": "", "is_ready": True}


def login(client: TestClient) -> None:
    assert "textContent" in client.get("/").text
    assert client.get("/me").status_code == 401
    refused = denied(client, "/chat")
    assert (refused.status_code, refused.text) == (401, "log in first")
    for wrong in ({"name": "ada", "password": "guessed"}, {"name": "eve", "password": "sesame"}):
        assert client.post("/login", json=wrong).status_code == 401
    (endpoint,) = (route.endpoint for route in client.app.routes if getattr(route, "path", "") == "/login")  # type: ignore[attr-defined]
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


def snapshot(client: TestClient) -> None:
    def write(number: int, title: str) -> None:
        assert client.put(f"/tasks/{number}", params={"title": title}).status_code == 204

    assert "wsbroadcast.js" in client.get("/").text  # the page: tests/integration/test_pages.py
    write(1, "milk")
    found = client.get("/tasks").json()
    assert found["tasks"] == [{"id": 1, "title": "milk"}]
    write(2, "tea")
    with client.websocket_connect(f"/follow?since={found['position']}") as plain:
        assert plain.receive_json() == {"id": 2, "title": "tea"}
    path = f"/follow?since={found['position']}"
    with client.websocket_connect(path, subprotocols=["wsbroadcast.v1"]) as page:
        assert [page.receive_json()["type"] for _ in range(2)] == ["hello", "subscribed"]
        write(1, "bread")
        first, second = page.receive_json(), page.receive_json()
        assert (first["data"], second["data"]) == ({"id": 2, "title": "tea"}, {"id": 1, "title": "bread"})
    with client.websocket_connect(f"/follow?since={second['position']}", subprotocols=["wsbroadcast.v1"]) as page:
        assert page.receive_json()["type"] == "hello"
        assert page.receive_json()["recovered"] is True
        write(3, "jam")
        assert page.receive_json()["data"] == {"id": 3, "title": "jam"}


def last_price(client: TestClient) -> None:
    def quote(name: str, price: float) -> None:
        assert client.put(f"/prices/{name}", params={"price": price}).status_code == 204

    for price in (70, 71, 72):
        quote("oil", price)
    quote("gold", 4000)
    with client.websocket_connect("/prices?name=oil&name=tea&name=gold") as late:
        assert sorted([late.receive_text(), late.receive_text()]) == ['{"gold":4000.0}', '{"oil":72.0}']
        quote("tea", 5)
        quote("oil", 73)
        assert [late.receive_json(), late.receive_json()] == [{"tea": 5.0}, {"oil": 73.0}]
    assert client.put("/prices/silver", params={"price": 1}).status_code == 422


class Inbox(BaseHTTPRequestHandler):
    """Another service, that takes every second post."""

    got: ClassVar[list[tuple[str, str]]] = []
    count = itertools.count()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        is_down = next(self.count) % 2 == 0
        if not is_down:
            self.got.append((body, self.headers["idempotency-key"]))
        self.send_response(503 if is_down else 204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def inbox() -> Iterator[list[tuple[str, str]]]:
    Inbox.got.clear()
    port = int(os.environ["WEBHOOK_URL"].rpartition(":")[2])
    with ThreadingHTTPServer(("127.0.0.1", port), Inbox) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Inbox.got
        server.shutdown()
        thread.join()


def webhooks(client: TestClient) -> None:
    def order(client: TestClient, *items: str) -> None:
        for item in items:
            assert client.post("/orders", params={"item": item}).status_code == 204

    def is_posted(*items: str) -> bool:
        return [json.loads(body)["item"] for body, _ in got] == list(items)

    def wait(*items: str) -> None:
        deadline = time.monotonic() + 20
        while not is_posted(*items):
            assert time.monotonic() < deadline, got
            time.sleep(0.01)

    order(client, "tea")  # nobody is there yet to take it
    with inbox() as got:
        wait("tea")
        order(client, "milk", "jam")
        wait("tea", "milk", "jam")
        saved = Path("webhooks.position")
        while saved.read_text() != got[-1][1]:
            time.sleep(0.01)
    client.__exit__()  # the app ends; what is ordered elsewhere is kept, because the app has said so
    with Publisher("sqlite:///webhooks.db") as publisher:
        for item in ("bread", "butter"):
            publisher.broadcast_threadsafe({"item": item}, channel="orders")
    with inbox() as got:
        with TestClient(load(EXAMPLES / "14_webhooks.py").app):
            wait("bread", "butter")
        assert len({key for _, key in got}) == 2
        saved.write_text("nonsense")
        with TestClient(load(EXAMPLES / "14_webhooks.py").app) as again:
            order(again, "eggs")
            wait("bread", "butter", "tea", "milk", "jam", "bread", "butter", "eggs")  # all that is kept


def graphql(client: TestClient) -> None:
    example = sys.modules["example_15_graphql"]
    assert client.portal is not None

    async def talk() -> None:
        say, messages = example.Mutation().say, example.Subscription().messages
        live = messages("tea")
        hearing = asyncio.ensure_future(anext(live))
        await eventually(lambda: example.manager._core.life.node.continuity._listeners)
        first = await say("tea", "one")
        assert await hearing == example.Message("one", first)
        await live.aclose()
        second = await say("tea", "two")
        async with aclosing(messages("tea", since=first)) as later:
            assert await anext(later) == example.Message("two", second)
        room = await example.Query().room("tea")
        assert (room.messages, room.position) == (
            [example.Message("one", first), example.Message("two", second)],
            second,
        )
        with pytest.raises(ValueError, match="too much was missed"):
            await anext(messages("tea", since="nonsense"))
        assert not example.manager._core.life.node.continuity._listeners

    client.portal.call(talk)


def documents(client: TestClient) -> None:
    def until(socket: WebSocketTestSession, last: bytes) -> list[bytes]:
        got: list[bytes] = []
        while not got or got[-1] != last:
            message = socket.receive_bytes()
            if not message.startswith((b"\0\0", b"\0\1")):  # what one of the copies has, or lacks
                got.append(message)
        return got

    example = load(EXAMPLES / "16_documents.py")
    elsewhere = TestClient(example.app)  # as another worker would
    with (
        elsewhere,
        client.websocket_connect("/documents/notes") as ada,
        elsewhere.websocket_connect("/documents/notes") as eva,
    ):
        ada.send_text("not of this protocol")
        ada.send_bytes(b"")
        ada.send_bytes(b"\0\2hello")
        assert until(eva, b"\0\2hello") == [b"\0\2hello"]
        eva.send_bytes(b"\0\2hi")
        assert until(ada, b"\0\2hi") == [b"\0\2hello", b"\0\2hi"]
        ada.send_bytes(b"\1cursor")
        assert until(eva, b"\1cursor") == [b"\0\2hi", b"\1cursor"], "each update is sent once"
        with elsewhere.websocket_connect("/documents/notes") as bob:
            bob.send_bytes(b"\0\0hi")
            while bob.receive_bytes() != b"\0\1hello":
                bob.send_bytes(b"\0\0hi")  # this worker's copy may be a moment behind its pages
        for nonsense in (b"\0", b"\0\7", b"\0\2"):
            with client.websocket_connect("/documents/notes") as mallory:
                mallory.send_bytes(nonsense)
                while (message := mallory.receive())["type"] != "websocket.close":
                    pass
                assert message["code"] == 1007
        assert elsewhere.portal is not None
        elsewhere.portal.call(catch_up, example)


async def catch_up(example: ModuleType) -> None:
    """A copy that missed more than is kept asks the others for it; that they have nothing is an answer, too."""
    copy = example.Doc()
    nothing = example.handle_sync_message(b"\0", copy)
    assert example.handle_sync_message(nothing[1:], copy) is None
    copy.apply_update(b"mine")
    async with example.manager.listen("x", size=2) as behind, example.manager.listen("x") as hears:
        others = example.Others("x", copy, behind)
        for message in (b"\1first", b"\1second", b"\1last"):
            await example.manager.broadcast(message, channel="x")
        assert [(await anext(hears)).data for _ in range(3)] == [b"\1first", b"\1second", b"\1last"]
        assert [await others.recv(), await others.recv()] == [b"\1first", b"\1second"]
        reading = asyncio.ensure_future(others.recv())
        assert (await anext(hears)).data == b"\0\0mine"
        await example.manager.broadcast(b"\1more", channel="x")
        assert await reading == b"\1more"
        for suffix in ("", "-shm", "-wal"):
            os.unlink(f"documents.db{suffix}")
        await others.send(b"\1kept")  # as soon as there is another
        await eventually(lambda: example.manager.stats().engine.reconnects)


def broadcaster(client: TestClient) -> None:
    with client.websocket_connect("/") as ada:
        with client.websocket_connect("/") as bob:
            ada.send_text("hello")
            assert ada.receive_text() == bob.receive_text() == "hello"
        ada.send_text("alone")
        assert ada.receive_text() == "alone"
    assert client.portal is not None
    client.portal.call(come_from_broadcaster, sys.modules["example_17_broadcaster"])


async def come_from_broadcaster(example: ModuleType) -> None:
    async with example.Broadcast("memory://") as broadcast, broadcast.subscribe("b") as other:
        async with broadcast.subscribe("a") as subscriber:
            await broadcast.publish("a", {"n": 1})
            await broadcast.publish(channel="b", message="two")
            assert await subscriber.get() == example.Event("a", {"n": 1})
            waiting = asyncio.ensure_future(subscriber.get())
            await asyncio.sleep(0)
        with pytest.raises(example.Unsubscribed):
            await waiting
        assert [event async for event in subscriber] == []
        assert await anext(other) == example.Event("b", "two")
    with pytest.raises(ValueError, match="no engine for a URL with the scheme 'kafka'"):
        example.Broadcast("kafka://localhost")


def operations(client: TestClient) -> None:
    assert client.get("/operations/nodes").status_code == 401
    assert client.get("/operations/ready").text == "ready"
    with client.websocket_connect("/ws/tea") as ada, client.websocket_connect("/ws/tea") as bob:
        ada.send_text("milk?")
        assert ada.receive_text() == bob.receive_text() == "milk?"
        client.auth = ("ops", "sesame")
        found = client.get("/operations/channels").json()
        assert (found["channels"], found["scope"]) == ([{"name": "tea", "connections": 2}], "cluster")
        assert "<title>Operations</title>" in client.get("/operations/").text


def who_is_online(client: TestClient) -> None:
    example = sys.modules["example_19_who_is_online"]
    elsewhere = TestClient(load(EXAMPLES / "19_who_is_online.py").app)  # as another worker would be
    assert "textContent" in client.get("/").text

    def is_here(*users: str) -> bool:
        return bool(client.get("/rooms/tea").json() == elsewhere.get("/rooms/tea").json() == list(users))

    with elsewhere, client.websocket_connect("/ws/tea?user=ada") as ada:
        with elsewhere.websocket_connect("/ws/tea?user=bob"), client.websocket_connect("/ws/tea?user=bob"):
            assert sorted([ada.receive_text(), ada.receive_text()]) == ["ada is here", "bob is here"]
            assert is_here("ada", "bob")
        assert is_here("ada", "bob")  # in his grace
        assert client.post("/tell/ada", params={"text": "psst"}).json() == {"is_online": True}
        assert ada.receive_text() == "psst"
        assert client.post("/tell/eva", params={"text": "hello"}).json() == {"is_online": False}
        assert example.mails == [("eva", "hello")]
        assert elsewhere.portal is not None
        elsewhere.portal.call(sys.modules["example_19_who_is_online"].manager.close_user, "bob")
    with client.websocket_connect("/ws/tea?user=eva", subprotocols=["wsbroadcast.v1"]) as eva:
        eva.send_json({"type": "presence", "id": 1})
        while (event := eva.receive_json())["type"] != "presence":
            pass
        assert {"user": "eva", "info": {"colour": example.COLOURS[sum(b"eva") % 4]}} in event["members"]


def events_of(response: Any) -> list[Any]:
    """What a stream of events holds."""
    return [
        json.loads(line.removeprefix("data: "))
        for line in response.text.splitlines()
        if line.startswith("data: ") and line != "data: [DONE]"
    ]


def answers(client: TestClient) -> None:
    # With a model, in a browser, on four workers: tests/integration/test_stream_pages.py.
    assert client.post("/questions", params={"question": "why?"}).status_code == 401
    assert "EventSource" in client.get("/").text
    example: Any = sys.modules["example_20_answers"]
    example.LONG = "Because."
    number = client.post("/questions", params={"question": "why?"}).json()
    entries = events_of(client.get(f"/answers/{number}"))
    assert "".join(entry.get("text", "") for entry in entries) == "You have asked: why? Because. "
    assert entries[-1]["state"] == "done"
    client.cookies.clear()
    client.cookies.set("user", "somebody else")
    assert client.get(f"/answers/{number}").status_code == 404


def agent(client: TestClient) -> None:
    def ask(text: str, chat: str = "1") -> Any:
        message = {"role": "user", "parts": [{"type": "text", "text": text}]}
        return client.post("/api/chat", json={"id": chat, "messages": [message]})

    found = events_of(ask("how is it?"))
    kinds = [chunk["type"] for chunk in found]
    assert kinds[:3] == ["start", "tool-input-available", "tool-output-available"]
    assert found[2]["output"] == f"It rains in {found[1]['input']['city']}."
    assert (kinds[3], kinds[-1]) == ("text-start", "finish")
    assert "It rains" in "".join(chunk.get("delta", "") for chunk in found)
    assert len(sys.modules["example_21_agent"].saved["chat:guest:1"]) == 4
    assert events_of(ask("and now?"))[-1] == {"type": "finish"}
    assert len(sys.modules["example_21_agent"].saved["chat:guest:1"]) > 4
    assert client.get("/api/chat/1/stream").status_code == 204
    assert client.post("/api/chat/1/stop").status_code == 204
    assert ask("hi", "no id").status_code == 422


def types_(client: TestClient) -> None:
    assert denied(client, "/auctions/lamp").status_code == 403
    with (
        client.websocket_connect("/auctions/lamp?name=ada") as ada,
        client.websocket_connect("/auctions/lamp?name=bob") as bob,
    ):
        ada.send_json({"type": "bid", "amount": 10})
        price = ada.receive_json()
        assert bob.receive_json() == price == {"type": "new_price", "amount": 10, "by": "ada", "at": price["at"]}
        bob.send_json({"type": "bid", "amount": 5})
        assert bob.receive_json() == {"type": "error", "code": "too_low", "text": "more than 10, please"}
        bob.send_json({"type": "bid"})
        assert bob.receive_json()["errors"] == [{"loc": ["bid", "amount"], "type": "missing", "msg": "Field required"}]
        bob.send_json({"type": "cheer", "emoji": "🔥"})
        assert ada.receive_json() == bob.receive_json() == {"type": "cheer", "emoji": "🔥"}


def centrifuge(client: TestClient) -> None:
    token = client.post("/token", params={"user": "ada"}).json()
    follow_news_by_centrifuge(client, token, "/announce")


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
    "12_snapshot": snapshot,
    "13_last_price": last_price,
    "14_webhooks": webhooks,
    "15_graphql": graphql,
    "16_documents": documents,
    "17_broadcaster": broadcaster,
    "18_operations": operations,
    "19_who_is_online": who_is_online,
    "20_answers": answers,
    "21_agent": agent,
    "22_types": types_,
    "23_centrifuge": centrifuge,
}

# Examples that want more than the extra `demo`, and don't run in this process alone.
EXTRAS = {"09_scale_out": "demo,nats,postgres,redis", "23_centrifuge": "centrifuge,demo"}
RUNS = {"09_scale_out": '"09_scale_out:app", workers=4'}
MORE = {
    "12_snapshot": ["sqlmodel"],
    "15_graphql": ["strawberry-graphql[fastapi]"],
    "16_documents": ["pycrdt"],
    "20_answers": ["openai"],
    "21_agent": ["pydantic-ai-slim[openai]>=2"],
}
BROKERS = {"16_documents": "sqlite:///documents.db"}


# What an example imports and only the tests of all of them install.
IMPORTS = {"20_answers": "openai", "21_agent": "pydantic_ai"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_example_does_what_it_says(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if path.stem in IMPORTS:
        pytest.importorskip(IMPORTS[path.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HUB_URL", f"hub://127.0.0.1:{free_port()}")
    monkeypatch.setenv("TOKEN_SECRET", "of thirty-two bytes, so that nobody warns")
    monkeypatch.setenv("WEBHOOK_URL", f"http://127.0.0.1:{free_port()}")
    if path.stem in BROKERS:
        monkeypatch.setenv("BROKER_URL", BROKERS[path.stem])
    for name, module in standins().items():
        monkeypatch.setitem(sys.modules, name, module)
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
    dependencies = [f"wsbroadcast[{extras}]", *MORE.get(path.stem, [])]
    project = importlib.metadata.metadata("wsbroadcast")
    assert header == {"requires-python": project["Requires-Python"], "dependencies": dependencies}
    assert f"uvicorn {path.stem}:app" in (ast.get_docstring(ast.parse(source)) or "")
    run = RUNS.get(path.stem, "app")
    assert source.endswith(f'if __name__ == "__main__":\n    import uvicorn\n\n    uvicorn.run({run})\n')
