"""Every event of the library's logger is on its page, and no record holds what nobody should read there."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
from fastapi import FastAPI, WebSocketException
from fastapi.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import wsbroadcast
from tests.support.asgi import connected, eventually, turns
from wsbroadcast import (
    USERS,
    Audience,
    ConnectionManager,
    Delivery,
    EngineUnavailable,
    History,
    LimitExceeded,
    Limits,
    Message,
    SlowConsumer,
    TokenFrom,
    create_router,
)
from wsbroadcast.audience import for_logs
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.logs import about
from wsbroadcast.testing import Cluster

ROOT = Path(wsbroadcast.__file__).parent
PAGE = (ROOT.parents[1] / "docs" / "logs.md").read_text(encoding="utf-8")
LEVELS = {"info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR"}
SECRET = "s3cr3t-t0k3n"


class Event(NamedTuple):
    name: str
    level: str
    fields: frozenset[str]
    where: str


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(ROOT.rglob("*.py")):
        if "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of = node.func.value
                if isinstance(of, ast.Name) and of.id == "logger":
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def events() -> Iterator[Event]:
    for where, call in calls():
        assert isinstance(call.func, ast.Attribute)
        extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
        assert isinstance(extra, ast.Call), f"{where}: say extra=about(…)"
        assert isinstance(extra.func, ast.Name)
        assert extra.func.id == "about"
        [name] = extra.args
        assert isinstance(name, ast.Constant), f"{where}: an event's name is written out"
        fields = frozenset(str(keyword.arg) for keyword in extra.keywords)
        yield Event(str(name.value), LEVELS[call.func.attr], fields, where)


def test_page_has_every_event_with_its_level_and_fields() -> None:
    levels: dict[str, set[str]] = {}
    fields: dict[str, set[str]] = {}
    for event in events():
        levels.setdefault(event.name, set()).add(event.level)
        fields.setdefault(event.name, set()).update(event.fields)
    rows = re.findall(r"^\| `([\w.]+)` \| ([A-Z, ]+) \| ([^|]*)\| ", PAGE, re.MULTILINE)
    assert [name for name, _, _ in rows] == sorted(levels)
    for name, level, named in rows:
        assert set(level.split(", ")) == levels[name], name
        assert set(re.findall(r"`(\w+)`", named)) == fields[name], name


def test_page_shows_every_field() -> None:
    shown = re.search(r"^FIELDS = \((.*)\)$", PAGE, re.MULTILINE)
    assert shown is not None
    assert set(re.findall(r'"(\w+)"', shown[1])) == {"event"} | {field for event in events() for field in event.fields}


def test_fields_are_no_attributes_of_a_record() -> None:
    record = logging.LogRecord("wsbroadcast", logging.INFO, "", 1, "", (), None)
    taken = {*vars(record), "message", "asctime"}
    for event in events():
        assert not taken & event.fields, event
    assert about("x.y", count=1) == {"event": "x.y", "count": 1}


def test_all_loggers_are_the_one() -> None:
    found = {
        match
        for path in ROOT.rglob("*.py")
        if "demo" not in path.parts
        for match in re.findall(r'getLogger\(("?[\w.]*"?)', path.read_text(encoding="utf-8"))
    }
    assert found == {'"wsbroadcast"'}


# What is never there.


def everything(record: logging.LogRecord) -> str:
    traceback = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
    return f"{record.getMessage()} {vars(record)!r} {traceback}"


def own(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "wsbroadcast"]


def assert_clean(caplog: pytest.LogCaptureFixture, *expected: str) -> None:
    found = own(caplog)
    assert {getattr(record, "event", None) for record in found} == set(expected)
    for record in found:
        assert SECRET not in everything(record), record


async def test_no_record_holds_a_message_or_a_user(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wsbroadcast")
    slow = SlowConsumer(max_backlog_messages=2, send_timeout=60)
    limits = Limits(max_connections_per_user=1, max_outbound_bytes=10_000)
    async with ConnectionManager(slow_consumer=slow, limits=limits) as manager:
        [(peer, _)] = await connected(manager, 1, user=SECRET)
        with pytest.raises(LimitExceeded):
            await connected(manager, 1, user=SECRET)

        @manager.on_deliver
        def fail(delivery: Delivery) -> None:
            raise RuntimeError("a hook of the app")

        manager.broadcast_nowait({"token": SECRET})
        await turns()
        await eventually(lambda: any(getattr(record, "event", "") == "delivery.failed" for record in own(caplog)))
        manager.hooks._functions["on_deliver"] = ()
        peer.stall()
        for _ in range(10):
            manager.broadcast_nowait(Message.of(SECRET), user=SECRET)
        await eventually(lambda: manager.stats().evicted)
        peer.resume()
    assert_clean(caplog, "limit.exceeded", "delivery.failed", "connection.evicted")


async def test_no_record_of_an_outage_holds_a_user(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wsbroadcast")
    async with Cluster(2, history={USERS: History()}) as cluster:
        await connected(cluster[1], 1, user=SECRET)
        await cluster[0].broadcast(SECRET, user=SECRET)
        cluster[1]._core.life.node.continuity.take(
            wsbroadcast.Publication(Message.of(SECRET), Audience.user(SECRET))  # without a position
        )
        tails, audience = cluster[1]._core.life.node.continuity.tails, Audience.user(SECRET)
        assert tails is not None
        tail = tails.of(audience)
        assert tail is not None
        tails._failed(audience, tail, 1, EngineUnavailable("away"))
    assert {"history.unkept", "history.unreadable"} <= {getattr(record, "event", "") for record in own(caplog)}
    for record in own(caplog):
        assert SECRET not in everything(record), record


def test_no_record_of_a_handshake_holds_its_query_or_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "wsbroadcast")

    def user(token: Annotated[str, TokenFrom(query="token", subprotocol="bearer")]) -> str:
        raise WebSocketException(4401)

    manager = ConnectionManager(limits=Limits(max_connections=1))
    app = FastAPI()
    app.include_router(create_router(manager, path="/ws/{room}", authenticate=user))
    app.include_router(create_router(manager, path="/open", inbound="broadcast"))
    with TestClient(app) as client:
        for headers, path in (
            ({}, f"/ws/{SECRET}?token={SECRET}"),
            ({"Sec-WebSocket-Protocol": f"bearer, {SECRET}"}, "/ws/a"),
            ({"Origin": "https://evil.example"}, f"/ws/a?token={SECRET}"),
        ):
            with pytest.raises(WebSocketDisconnect), client.websocket_connect(path, headers=headers):
                raise AssertionError("it was let in")
        with client.websocket_connect(f"/open?token={SECRET}") as socket:
            socket.send_text(f"a message {SECRET}")
            socket.receive_text()
            with pytest.raises(WebSocketDisconnect), client.websocket_connect(f"/open?token={SECRET}"):
                raise AssertionError("it was let in")
    assert_clean(caplog, "handshake.origin_refused", "limit.exceeded")


def test_users_are_hidden_in_names() -> None:
    names = AudienceNames("wsbroadcast", ":")
    user, channel = Audience.user(SECRET), Audience.channel("news")
    assert SECRET not in names.for_logs(names.of(user))
    assert names.for_logs(names.of(channel)) == names.of(channel)
    assert (for_logs(user), for_logs(channel)) == ("user", "channel 'news'")
