"""`wsbroadcast.testing.Peer`: a client whose every wait ends, and says what came instead."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import pytest
from fastapi import FastAPI, HTTPException, WebSocket, WebSocketException
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocketDisconnect

import wsbroadcast.testing
from wsbroadcast import (
    ConfigurationError,
    ConnectionDep,
    ConnectionManager,
    History,
    LifecycleError,
    SlowConsumer,
    create_router,
)
from wsbroadcast.testing import Cluster, Peer, Refused

Endpoint = Callable[[WebSocket], Any]


def app_of(endpoint: Endpoint) -> Starlette:
    return Starlette(routes=[WebSocketRoute("/ws", endpoint)])


async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    while True:
        event = await websocket.receive()
        if event["type"] == "websocket.disconnect":
            return
        await websocket.send({**event, "type": "websocket.send"})


async def silent(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.receive_text()


# What goes well.


async def test_text_bytes_and_json_go_there_and_come_back() -> None:
    async with Peer(app_of(echo)) as peer:
        for message in ("hello", "", b"\x00\xff"):
            await peer.send(message)
            assert await peer.receive() == message
        for value in ({"ü": [1, None]}, [1], 5, None, True):
            await peer.send(value)
            assert await peer.receive_json() == value
        await peer.expect_nothing(0.01)
        assert peer.messages[:3] == ["hello", "", b"\x00\xff"]
        assert peer.messages[-1] == "true"


async def test_app_sees_what_the_client_says_of_itself() -> None:
    seen: dict[str, Any] = {}

    async def endpoint(websocket: WebSocket) -> None:
        seen.update(websocket.query_params, path=websocket.url.path, cookie=websocket.cookies["a"])
        seen.update(host=websocket.headers["host"], state=websocket.state.database)
        await websocket.accept(subprotocol=websocket.scope["subprotocols"][1])
        seen["offered"] = websocket.headers["sec-websocket-protocol"]
        await websocket.close()

    headers = {"Cookie": "a=b", "Host": "example.org"}
    state = {"database": "db"}
    app = Starlette(routes=[WebSocketRoute("/ws/{room}", endpoint)])
    async with Peer(
        app, "/ws/a%20b?since=x%3A1", headers=headers, subprotocols=["one", "wsbroadcast.v1"], state=state
    ) as peer:
        assert peer.subprotocol == "wsbroadcast.v1"
        assert await peer.wait_closed() == 1000
    assert seen == {
        "since": "x:1",
        "path": "/ws/a b",
        "cookie": "b",
        "host": "example.org",
        "state": "db",
        "offered": "one, wsbroadcast.v1",
    }
    async with Peer(app_of(echo), headers=[("x-one", "1"), ("x-one", "2")]) as peer:
        assert peer.subprotocol is None


async def test_peer_of_a_fastapi_app_and_its_lifespan() -> None:
    manager = ConnectionManager()
    states: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        states.append("began")
        manager.bind(app)
        async with manager:
            yield {"name": "app"}
        states.append("ended")

    app = FastAPI(lifespan=lifespan)

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep, websocket: WebSocket) -> None:
        await connection.send(websocket.state.name)
        async for message in connection:
            await manager.broadcast(message)

    async with app.router.lifespan_context(app) as state:
        assert states == ["began"]
        async with Peer(app, state=state) as ada, Peer(app, state=state) as bob:
            assert await ada.receive() == await bob.receive() == "app"
            await ada.send("hello")
            assert await ada.receive() == await bob.receive() == "hello"
        assert manager.connections == []
    assert states == ["began", "ended"]


async def test_app_that_wants_its_lifespan_says_so() -> None:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(connection: ConnectionDep) -> None:
        pass

    with pytest.raises(ConfigurationError, match="no ConnectionManager is bound"):
        async with Peer(app):
            pass


# How it ends.


async def test_client_closes() -> None:
    ends: list[tuple[int, str | None]] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await websocket.receive_text()
        except WebSocketDisconnect as end:
            ends.append((end.code, end.reason))

    async with Peer(app_of(endpoint)) as peer:
        await peer.close(4000, "enough")
        assert ends == [(4000, "enough")]
        with pytest.raises(AssertionError, match=r"'more' can't be sent to /ws: the client has left"):
            await peer.send("more")
        with pytest.raises(AssertionError, match=r"waited for a message of /ws, but the client has left"):
            await peer.receive()
        await peer.close()
    async with Peer(app_of(endpoint)):
        pass
    assert ends == [(4000, "enough"), (1000, "")]


async def test_server_closes() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("one")
        await websocket.close(4401, "log in")
        with pytest.raises(RuntimeError):
            await websocket.send_text("two")
        assert (await websocket.receive())["code"] == 4401

    async with Peer(app_of(endpoint)) as peer:
        assert await peer.wait_closed() == 4401
        assert (peer.close_code, peer.close_reason) == (4401, "log in")
        assert await peer.receive() == "one"
        with pytest.raises(AssertionError, match=r"waited for a message of /ws, but the server closed with 4401, 'log"):
            await peer.receive()
        with pytest.raises(AssertionError, match="can't be sent to /ws: the server closed with 4401"):
            await peer.send("more")
        with pytest.raises(
            AssertionError, match=r"expected nothing of /ws for 0\.1 s, but the server closed with 4401"
        ):
            await peer.expect_nothing()


async def test_client_goes_without_a_word() -> None:
    goes_on = asyncio.Event()
    seen: list[Any] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await goes_on.wait()
        try:
            await websocket.send_text("lost")
        except WebSocketDisconnect as end:
            seen.append(end.code)
        seen.append((await websocket.receive())["code"])

    async with Peer(app_of(endpoint)) as peer:
        peer.vanish()
        goes_on.set()
        with pytest.raises(AssertionError, match="the client has left"):
            await peer.receive()
        assert peer.messages == []
    assert seen == [1006, 1006]


async def test_client_that_takes_nothing() -> None:
    sent: list[str] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            text = await websocket.receive_text()
            await websocket.send_text(text)
            sent.append(text)

    with pytest.raises(WebSocketDisconnect):  # noqa: PT012  # the endpoint doesn't catch it
        async with Peer(app_of(endpoint)) as peer:
            peer.stall()
            await peer.send("1")
            await peer.expect_nothing(0.01)
            assert sent == []
            peer.resume()
            assert await peer.receive() == "1"
            peer.stall()
            await peer.send("2")  # and leaves with this on the way
    assert sent == ["1"]


async def test_slow_consumer_is_seen_to_be_closed() -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=3))
    app = FastAPI()
    app.include_router(create_router(manager, "/ws"))
    async with manager, Peer(app) as slow, Peer(app) as quick:
        slow.stall()
        for number in range(10):
            await manager.broadcast(str(number))
            assert await quick.receive() == str(number)
        slow.resume()
        assert (await slow.wait_closed(), slow.close_reason) == (1013, "slow consumer")


async def test_killed_node_is_gone_without_a_close_frame() -> None:
    async with Cluster(2) as cluster:
        app = FastAPI()
        app.include_router(create_router(cluster[0], "/ws"))
        async with Peer(app) as peer:
            await cluster.kill(0)
            with pytest.raises(AssertionError, match="went without a close frame"):
                await peer.receive()
            assert await peer.wait_closed() == 1006


# The handshake.


async def test_refusal_with_an_http_response() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.send_denial_response(PlainTextResponse("no valid token", 401))

    with pytest.raises(Refused, match=r"the app refused /ws\?a=b with HTTP status 401: 'no valid token'") as refused:
        async with Peer(app_of(endpoint), "/ws?a=b"):
            pass
    assert (refused.value.status, refused.value.text, refused.value.code) == (401, "no valid token", None)


async def test_refusal_with_a_close_code() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        raise WebSocketException(1008, "not you")

    with pytest.raises(Refused, match=r"HTTP status 403: close code 1008, 'not you'") as refused:
        async with Peer(app_of(endpoint)):
            pass
    assert (refused.value.status, refused.value.code, refused.value.reason) == (403, 1008, "not you")
    with pytest.raises(Refused, match=r"/other with HTTP status 403: .* a path that Starlette doesn't know"):
        async with Peer(app_of(endpoint), "/other"):
            pass


async def test_refusal_by_a_router() -> None:
    async def nobody() -> None:
        raise HTTPException(401, "log in first")

    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_router(manager, "/ws", authenticate=nobody))
    async with manager:
        with pytest.raises(Refused, match="log in first") as refused:
            async with Peer(app):
                pass
    assert refused.value.status == 401


async def test_app_that_fails_before_it_accepts() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        raise LookupError("no such room")

    with pytest.raises(LookupError, match="no such room"):
        async with Peer(app_of(endpoint)):
            pass


async def test_app_that_returns_before_it_accepts() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        return

    with pytest.raises(AssertionError, match="neither accepted nor refused"):
        async with Peer(app_of(endpoint)):
            pass


async def test_app_that_never_answers() -> None:
    ended: list[bool] = []

    async def endpoint(websocket: WebSocket) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(
        TimeoutError, match=r"waited 0\.05 s for an answer to the handshake of /ws: .* neither accepted"
    ):
        async with Peer(app_of(endpoint), timeout=0.05):
            pass
    assert ended == [True]


# What fails.


async def test_waits_that_end_without_what_they_were_for() -> None:
    async with Peer(app_of(echo), timeout=0.05) as peer:
        with pytest.raises(TimeoutError, match=r"^waited 0\.05 s for a message of /ws: .* nothing has come so far$"):
            await peer.receive()
        await peer.send("one")
        with pytest.raises(AssertionError, match=r"expected nothing of /ws for 0\.2 s, but 'one' came"):
            await peer.expect_nothing(0.2)
        with pytest.raises(AssertionError, match=r"waited for JSON of /ws, but 'one' came"):
            await peer.receive_json()
        with pytest.raises(TimeoutError, match=r"waited 0\.01 s for a message .* the last that came: 'one'"):
            await peer.receive_json(timeout=0.01)
        with pytest.raises(TimeoutError, match=r"waited 0\.01 s for a close of /ws: the connection is open"):
            await peer.wait_closed(0.01)
        await peer.send(b"x" * 1000)
        assert len(await peer.receive()) == 1000
        with pytest.raises(TimeoutError) as error:
            await peer.receive()
        assert len(str(error.value)) < 300


async def test_what_the_app_raises_is_raised_by_the_test() -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        raise LookupError("no such room")

    with pytest.raises(LookupError, match="no such room"):
        async with Peer(app_of(endpoint)):
            await asyncio.sleep(0)
    for wait in (Peer.receive, Peer.wait_closed, Peer.expect_nothing):
        with pytest.raises(AssertionError, match=r"/ws.* but the app raised LookupError\('no such room'\)") as error:
            async with Peer(app_of(endpoint)) as peer:
                await wait(peer)
        assert isinstance(error.value.__cause__, LookupError)
        assert not hasattr(error.value, "__notes__")
    with pytest.raises(ZeroDivisionError) as other:
        async with Peer(app_of(endpoint)) as peer:
            _ = 1 / 0
    assert other.value.__notes__ == ["the app raised LookupError('no such room')"]


async def test_endpoint_that_goes_on_is_cut_off() -> None:
    ended: list[bool] = []

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    with pytest.raises(TimeoutError, match=r"went on 0\.05 s after the client had left"):
        async with Peer(app_of(endpoint), timeout=0.05):
            pass
    with pytest.raises(ZeroDivisionError) as error:
        async with Peer(app_of(endpoint), timeout=0.05):
            _ = 1 / 0
    assert "went on" in error.value.__notes__[0]
    assert ended == [True, True]


async def test_test_that_is_cut_off_leaves_nothing_behind() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), Peer(app_of(silent), timeout=60) as peer:
            await peer.receive()


async def test_app_that_breaks_the_protocol_is_told() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "http.response.start", "status": 200})

    with pytest.raises(RuntimeError, match=r"the app sends http\.response\.start"):
        async with Peer(app):
            await asyncio.sleep(0)


async def test_app_that_goes_on_after_its_close_is_told() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000})
        await send({"type": "websocket.send", "text": "more"})

    with pytest.raises(RuntimeError, match=r"the app sends websocket\.send after the end"):
        async with Peer(app):
            pass


async def test_peer_that_is_not_connected_says_what_to_write() -> None:
    peer = Peer(app_of(echo))
    with pytest.raises(LifecycleError, match=r'async with Peer\(app, "/ws"\) as peer'):
        await peer.send("hello")
    for use in (peer.receive, peer.receive_json, peer.expect_nothing, peer.wait_closed, peer.close):
        with pytest.raises(LifecycleError, match="isn't connected"):
            await use()
    with pytest.raises(LifecycleError, match="isn't connected"):
        peer.vanish()
    async with peer:
        pass
    with pytest.raises(LifecycleError, match="make another one"):
        async with peer:
            pass


@pytest.mark.parametrize("path", ["ws", "", "ws://localhost/ws", None, b"/ws"])
def test_path_that_is_none(path: Any) -> None:
    with pytest.raises(ValueError, match="a path begins with a slash"):
        Peer(app_of(echo), path)


def test_subprotocols_that_are_one_text() -> None:
    with pytest.raises(ValueError, match=r"write subprotocols=\['wsbroadcast\.v1'\]"):
        Peer(app_of(echo), subprotocols="wsbroadcast.v1")


async def test_errors_of_the_app_are_not_logged_as_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.close()
        raise LookupError("after the refusal")

    with caplog.at_level(logging.ERROR), pytest.raises(Refused):
        async with Peer(app_of(endpoint)):
            pass
    gc.collect()
    assert caplog.records == []


# Events.


async def test_peer_speaks_events_and_comes_back() -> None:
    manager = ConnectionManager(history=History(messages=10))
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}"))
    async with manager:
        async with Peer(app, "/ws/news", subprotocols=["wsbroadcast.v1"]) as peer:
            assert (await peer.receive_json())["type"] == "hello"
            assert (await peer.receive_json())["type"] == "subscribed"
            await manager.broadcast("1", channel="news")
            position = (await peer.receive_json())["position"]
        await manager.broadcast("2", channel="news")
        async with Peer(app, f"/ws/news?since={position}", subprotocols=["wsbroadcast.v1"]) as peer:
            await peer.receive_json()
            assert (await peer.receive_json())["recovered"]
            assert (await peer.receive_json())["data"] == "2"
            await peer.expect_nothing(0.01)


# Messages with types.


class Said(BaseModel):
    type: Literal["said"] = "said"
    text: str
    sent_at: date = Field(default=date(2026, 1, 2), alias="at")


@dataclass
class Move:
    x: int


async def test_peer_sends_and_receives_models() -> None:
    async with Peer(app_of(echo)) as peer:
        await peer.send(Said(text="hi"))
        assert peer.messages == [] or peer.messages == ['{"type":"said","text":"hi","at":"2026-01-02"}']
        assert await peer.receive(Said) == Said(text="hi")
        await peer.send({"moves": [Move(1)], "at": date(2026, 1, 2)})
        assert await peer.receive() == '{"moves":[{"x":1}],"at":"2026-01-02"}'
        await peer.send(Move(2))
        assert await peer.receive(Move, timeout=5.0) == Move(2)
        with pytest.raises(TypeError):
            await peer.send(object())


async def test_peer_says_what_came_instead_of_what_is_expected() -> None:
    async with Peer(app_of(echo)) as peer:
        for message, said in (
            ('{"type":"said"}', 'waited for Said of /ws, but \'{"type":"said"}\' came: text: Field required'),
            ("text", "waited for Said of /ws, but 'text' came: Invalid JSON"),
        ):
            await peer.send(message)
            with pytest.raises(AssertionError) as caught:
                await peer.receive(Said)
            assert str(caught.value) == said
        with pytest.raises(TimeoutError):
            await peer.receive(Said, timeout=0.01)
        with pytest.raises(TimeoutError):
            await peer.receive(0.01)


async def test_peer_of_events_publishes_models_and_looks_into_messages() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_router(manager, "/ws/{channel}", receives=Said))
    async with manager, Peer(app, "/ws/news", subprotocols=["wsbroadcast.v1"]) as peer:
        for text in ("1", "2"):
            await peer.send(Said(text=text))
            assert await peer.receive(Said) == Said(text=text)
        await peer.send({"type": "publish", "data": {"type": "said"}})
        with pytest.raises(AssertionError, match=r"waited for Said of /ws/news, but .*invalid_data"):
            await peer.receive(Said)
        await peer.expect_nothing(0.01)


def test_peer_and_cluster_want_no_plugin_of_pytest() -> None:
    code = "import sys; from wsbroadcast.testing import Cluster, Peer; print('pytest_asyncio' in sys.modules)"
    code += "; import pytest, wsbroadcast.testing as t; print('wsbroadcast.testing.contract' in sys.modules, dir(t))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False\nFalse ")
    assert "'EngineContract'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'Peers'"):
        wsbroadcast.testing.Peers  # noqa: B018
