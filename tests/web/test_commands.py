"""What clients may do with channels: the commands of a router, and `authorize` before each of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st

from tests.support.asgi import Peer, eventually, lifespan, turns, visit
from tests.support.fake_broker import FailingEngine, FakeBroker, FakeEngine
from tests.support.web import router_app
from wsbroadcast import (
    Access,
    ConfigurationError,
    Connection,
    ConnectionManager,
    Delivery,
    EngineError,
    EngineUnavailable,
    Limits,
    PermissionDenied,
    create_router,
    create_routes,
)

_app = partial(router_app, inbound="commands")


async def _ask(peer: Peer, command: Any) -> Any:
    """Send a command and return the answer."""
    peer.say(command if isinstance(command, (str, bytes)) else json.dumps(command))
    return json.loads(await peer.next())


def _command(kind: str, channel: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "channel": channel, **more}


class _Pondering:
    """An `authorize` that says yes when it may; about some actions at once."""

    def __init__(self, *about: str) -> None:
        self.about = about
        self.asked = asyncio.Event()
        self.may_decide = asyncio.Event()

    async def __call__(self, connection: Any, action: str, channel: str) -> bool:
        if action in self.about:
            self.asked.set()
            await self.may_decide.wait()
        return True


def _anything(connection: Any, action: str, channel: str) -> bool:
    return True


FORBIDDEN = {"type": "error", "code": "forbidden", "text": "not allowed"}

_PUBLISH = json.dumps(_command("publish", "news", data=1))


# What the commands do.


async def test_commands_subscribe_publish_and_unsubscribe(manager: ConnectionManager) -> None:
    app = _app(manager, authorize=_anything)
    async with visit(app, "/ws") as ada, visit(app, "/ws") as bob:
        assert await _ask(ada, _command("subscribe", "news")) == {"type": "subscribed", "channel": "news"}
        assert manager.connections[0].channels == {"news"}
        assert await _ask(bob, _command("publish", "news", data={"n": 1})) == {"type": "published", "channel": "news"}
        assert json.loads(await ada.next()) == {"type": "message", "channel": "news", "data": {"n": 1}}
        assert await _ask(ada, _command("unsubscribe", "news")) == {"type": "unsubscribed", "channel": "news"}
        assert await _ask(bob, _command("publish", "news", data=2)) == {"type": "published", "channel": "news"}
        await turns(20)
        assert len(ada.messages) == 3
        assert manager.stats().channels == 0


@pytest.mark.parametrize("data", [None, 0, "text", [], {}, {"type": "error"}, "é\n😀", [[[1.5, None, True]]]])
async def test_any_json_is_published_as_it_is(data: Any) -> None:
    app = _app(ConnectionManager(), "/ws/{channel}")
    async with visit(app, "/ws/news") as ada, visit(app, "/ws/news") as bob:
        assert (await _ask(ada, _command("publish", "news", data=data)))["type"] == "message"
        assert json.loads(await bob.next()) == {"type": "message", "channel": "news", "data": data}


@pytest.mark.parametrize("include_sender", [True, False])
async def test_a_publisher_gets_its_own_message_unless_told_otherwise(include_sender: bool) -> None:
    app = _app(ConnectionManager(), "/ws/{channel}", include_sender=include_sender)
    async with visit(app, "/ws/news") as peer:
        peer.say(json.dumps(_command("publish", "news", data=1)))
        await eventually(lambda: any('"published"' in str(message) for message in peer.messages))
        assert any('"message"' in str(message) for message in peer.messages) == include_sender


@pytest.mark.parametrize("number", [0, 1, -1, 2**63, "", "a", "x" * 200])
@pytest.mark.parametrize(
    "command", [_command("subscribe", "news"), _command("subscribe", "\x00"), _command("dance", "news")]
)
async def test_an_answer_has_the_commands_id(number: Any, command: dict[str, Any]) -> None:
    async with visit(_app(ConnectionManager(), authorize=_anything), "/ws") as peer:
        assert (await _ask(peer, {**command, "id": number}))["id"] == number
        assert "id" not in await _ask(peer, command)


@pytest.mark.parametrize("number", [None, 1.5, [], {}, "x" * 201, 10**200, -(10**200), 10**4000])
async def test_an_id_that_is_none_is_left_out(number: Any) -> None:
    async with visit(_app(ConnectionManager(), authorize=_anything), "/ws") as peer:
        answer = await _ask(peer, _command("subscribe", "news", id=number))
        assert answer == {"type": "subscribed", "channel": "news"}


async def test_commands_may_come_as_binary_frames() -> None:
    async with visit(_app(ConnectionManager(), authorize=_anything), "/ws") as peer:
        assert await _ask(peer, b'{"type": "subscribe", "channel": "news"}') == {
            "type": "subscribed",
            "channel": "news",
        }


# What is no command.


@pytest.mark.parametrize(
    "command",
    [
        None,
        1,
        "subscribe",
        [],
        [{"type": "subscribe", "channel": "news"}],
        {},
        {"type": "subscribe"},
        {"channel": "news"},
        {"type": "dance", "channel": "news"},
        {"type": ["subscribe"], "channel": "news"},
        {"type": "SUBSCRIBE", "channel": "news"},
        {"type": "subscribe", "channel": None},
        {"type": "subscribe", "channel": 1},
        {"type": "subscribe", "channel": ["news"]},
        {"type": "publish", "channel": "news"},
    ],
    ids=str,
)
async def test_what_is_no_command_is_an_error_and_changes_nothing(manager: ConnectionManager, command: Any) -> None:
    async with visit(_app(manager, authorize=_anything), "/ws") as peer:
        answer = await _ask(peer, json.dumps(command))
        assert (answer["type"], answer["code"]) == ("error", "invalid_command")
        assert manager.connections[0].channels == frozenset()
        assert manager.stats().broadcasts == 0
        assert (await _ask(peer, _command("subscribe", "news")))["type"] == "subscribed"


@pytest.mark.parametrize("frame", ["", "{", "NaN", '"\\ud800"', "[" * 60_000, b"\xff\xfe", '{"a": 1e999}'])
async def test_what_is_no_json_closes_that_connection_alone(manager: ConnectionManager, frame: str | bytes) -> None:
    app = _app(manager, authorize=_anything)
    async with visit(app, "/ws") as healthy:
        async with visit(app, "/ws") as peer:
            peer.say(frame)
            assert await peer.wait_close() == 1007
        assert (await _ask(healthy, _command("subscribe", "news")))["type"] == "subscribed"


@pytest.mark.parametrize("channel", ["", "\x00", "a\r\nPUB x 1", "a\u2028b", "x" * 201, "x" * 5000])
@pytest.mark.parametrize("kind", ["subscribe", "unsubscribe", "publish"])
async def test_a_name_that_is_no_channel_is_an_error_that_does_not_repeat_it(kind: str, channel: str) -> None:
    asked: list[str] = []

    def authorize(connection: Any, action: str, channel: str) -> bool:
        asked.append(channel)
        return True

    manager = ConnectionManager()
    async with visit(_app(manager, authorize=authorize), "/ws") as peer:
        answer = await _ask(peer, _command(kind, channel, data=1))
        assert (answer["type"], answer["code"]) == ("error", "invalid_channel")
        assert len(str(answer)) < 200
        assert manager.connections[0].channels == frozenset()
    assert asked == []


@pytest.mark.parametrize(
    "channel", ["*", ">", "a.>", "news[a-z]", "__keyspace@0__:*", '"; DROP', "é", "e\u0301", "a b"]
)
async def test_a_name_means_itself_and_nothing_else(manager: ConnectionManager, channel: str) -> None:
    app = _app(manager, authorize=_anything)
    async with visit(app, "/ws") as wild, visit(app, "/ws") as other:
        assert (await _ask(wild, _command("subscribe", channel)))["channel"] == channel
        await manager.broadcast("not for wild", channel="news")
        await manager.broadcast("not for wild", channel="a.b")
        assert (await _ask(other, _command("publish", channel, data=1)))["type"] == "published"
        assert json.loads(await wild.next()) == {"type": "message", "channel": channel, "data": 1}


async def test_too_many_channels_are_an_error_and_nothing_more() -> None:
    manager = ConnectionManager(limits=Limits(max_channels_per_connection=2))
    async with visit(_app(manager, authorize=_anything), "/ws") as peer:
        for name in ("a", "b"):
            assert (await _ask(peer, _command("subscribe", name)))["type"] == "subscribed"
        answer = await _ask(peer, _command("subscribe", "c", id=7))
        assert (answer["type"], answer["code"], answer["id"]) == ("error", "limit_exceeded", 7)
        assert manager.connections[0].channels == {"a", "b"}
        await _ask(peer, _command("unsubscribe", "a"))
        assert (await _ask(peer, _command("subscribe", "c")))["type"] == "subscribed"


UNAVAILABLE = {"type": "error", "code": "unavailable", "text": "try again later"}


@pytest.mark.parametrize(
    "error",
    [
        EngineUnavailable("no route to redis://:hunter2@internal:6379"),
        EngineError("the database is read-only: hunter2"),
        ExceptionGroup("several", [EngineError("hunter2")]),
    ],
)
async def test_a_broker_that_is_gone_is_an_error_without_a_word_about_it(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with visit(_app(ConnectionManager(FailingEngine(error)), "/ws/{channel}"), "/ws/news") as peer:
        for _ in range(3):
            assert await _ask(peer, _command("publish", "news", data=1)) == UNAVAILABLE
        assert peer.close is None
    [warning] = [record for record in caplog.records if record.name == "wsbroadcast"]
    assert (warning.levelname, warning.exc_info) == ("WARNING", None)


async def test_commands_go_on_while_the_broker_is_gone() -> None:
    broker = FakeBroker()
    manager = ConnectionManager(FakeEngine(broker))
    app = _app(manager, authorize=_anything)
    async with lifespan(app), visit(app, "/ws") as peer:
        broker.is_down = True
        broker.drop_links()
        await eventually(lambda: not broker.links)
        assert (await _ask(peer, _command("subscribe", "news")))["type"] == "subscribed"
        assert await _ask(peer, _command("publish", "news", data=1)) == UNAVAILABLE
        assert (await _ask(peer, _command("unsubscribe", "news")))["type"] == "unsubscribed"
        broker.is_down = False
        await eventually(lambda: manager.stats().engine.reconnects == 1)
        assert (await _ask(peer, _command("publish", "news", data=1)))["type"] == "published"
        assert manager.stats().unpublished == 0  # the client was told


async def test_channel_that_the_broker_forbids_is_unavailable() -> None:
    broker = FakeBroker()
    broker.unsubscribable.add("wsbroadcast:channel:secret")
    manager = ConnectionManager(FakeEngine(broker))
    app = _app(manager, authorize=_anything)
    async with lifespan(app), visit(app, "/ws") as peer:
        assert await _ask(peer, _command("subscribe", "secret")) == UNAVAILABLE
        assert (await _ask(peer, _command("subscribe", "news")))["type"] == "subscribed"
        assert manager.connections[0].channels == {"news"}


async def test_data_that_is_too_large_is_an_error() -> None:
    manager = ConnectionManager(limits=Limits(max_outbound_bytes=100))
    async with visit(_app(manager, "/ws/{channel}"), "/ws/news") as peer:
        answer = await _ask(peer, _command("publish", "news", data="x" * 100))
        assert (answer["type"], answer["code"]) == ("error", "invalid_data")


async def test_an_error_of_the_app_closes_with_1011_and_says_nothing() -> None:
    def authorize(connection: Any, action: str, channel: str) -> bool:
        raise KeyError("hunter2")

    peer = Peer("/ws")
    peer.say(json.dumps(_command("subscribe", "news")))
    app = _app(ConnectionManager(), authorize=authorize)
    with pytest.raises(KeyError):
        await app(peer.scope, peer.receive, peer.send)
    assert peer.close_code == 1011
    assert "hunter2" not in str(peer.sent)


# Who may.


async def test_without_authorize_a_client_has_what_the_path_and_the_app_gave_it(manager: ConnectionManager) -> None:
    @manager.on_connect
    async def subscribe(connection: Connection) -> None:
        await connection.subscribe("given")

    async with visit(_app(manager, "/ws/{channel}"), "/ws/path") as peer:
        for channel in ("path", "given"):
            assert (await _ask(peer, _command("subscribe", channel)))["type"] == "subscribed"
        for channel in ("private:42", "room/../admin", "PATH", "path "):
            assert await _ask(peer, _command("subscribe", channel)) == FORBIDDEN
            assert await _ask(peer, _command("publish", channel, data=1)) == FORBIDDEN
        assert manager.connections[0].channels == {"path", "given"}
        assert (await _ask(peer, _command("unsubscribe", "path")))["type"] == "unsubscribed"
        assert await _ask(peer, _command("subscribe", "path")) == FORBIDDEN
        assert await _ask(peer, _command("publish", "path", data=1)) == FORBIDDEN
        assert manager.stats().broadcasts == 0


@pytest.mark.parametrize("is_async", [True, False])
async def test_authorize_decides_by_connection_action_and_channel(is_async: bool) -> None:
    asked: list[tuple[Any, str, str]] = []

    def authorize(connection: Any, action: str, channel: str) -> bool:
        asked.append((connection, action, channel))
        return (action, channel) in {("subscribe", "news"), ("publish", "inbox")}

    async def authorize_async(connection: Any, action: str, channel: str) -> bool:
        await asyncio.sleep(0)
        return authorize(connection, action, channel)

    manager = ConnectionManager()
    async with visit(_app(manager, authorize=authorize_async if is_async else authorize), "/ws") as peer:
        assert (await _ask(peer, _command("subscribe", "news")))["type"] == "subscribed"
        assert await _ask(peer, _command("publish", "news", data=1)) == FORBIDDEN
        assert await _ask(peer, _command("subscribe", "inbox")) == FORBIDDEN
        assert (await _ask(peer, _command("publish", "inbox", data=1)))["type"] == "published"
        [connection] = manager.connections
        assert connection.channels == {"news"}
        assert asked == [
            (connection, "subscribe", "news"),
            (connection, "subscribe", "news"),  # and again when it is done
            (connection, "publish", "news"),
            (connection, "subscribe", "inbox"),
            (connection, "publish", "inbox"),
        ]


@pytest.mark.parametrize("error", [HTTPException(403, "muted"), PermissionDenied("muted")])
@pytest.mark.parametrize("kind", ["publish", "subscribe"])
async def test_a_denial_says_what_authorize_says(error: Exception, kind: str) -> None:
    def authorize(connection: Any, action: str, channel: str) -> bool:
        raise error

    async with visit(_app(ConnectionManager(), authorize=authorize), "/ws") as peer:
        assert await _ask(peer, _command(kind, "news", data=1)) == FORBIDDEN | {"text": "muted"}


async def test_who_may_subscribe_if_nobody_can_say_in_the_end_is_not_subscribed() -> None:
    answers: list[bool | Exception] = [True, EngineUnavailable("where the rights are")]

    def authorize(connection: Any, action: str, channel: str) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    manager = ConnectionManager()
    async with visit(_app(manager, authorize=authorize), "/ws") as peer:
        assert await _ask(peer, _command("subscribe", "private")) == UNAVAILABLE
        assert manager.connections[0].channels == frozenset()


async def test_a_failure_of_authorize_is_not_kept_quiet() -> None:
    def authorize(connection: Any, action: str, channel: str) -> bool:
        raise HTTPException(503, "no database")

    with pytest.raises(RuntimeError, match="authorize failed with status 503"):  # noqa: PT012  # as the server sees it
        async with visit(_app(ConnectionManager(), authorize=authorize), "/ws") as peer:
            peer.say(json.dumps(_command("publish", "news", data=1)))
            assert await peer.wait_close() == 1011


async def test_nothing_of_a_channel_arrives_before_authorize_has_said_yes() -> None:
    authorize = _Pondering("subscribe")
    manager = ConnectionManager()
    async with visit(_app(manager, authorize=authorize), "/ws") as peer:
        peer.say(json.dumps(_command("subscribe", "private")))
        await authorize.asked.wait()
        await manager.broadcast("secret", channel="private")
        assert manager.connections[0].channels == frozenset()
        authorize.may_decide.set()
        assert json.loads(await peer.next()) == {"type": "subscribed", "channel": "private"}
        await manager.broadcast("now", channel="private")
        assert await peer.next() == "now"
        assert "secret" not in peer.messages


@pytest.mark.parametrize("inbound", ["commands", "broadcast"])
async def test_authorize_is_asked_again_at_each_publish(inbound: str) -> None:
    rights = {"subscribe", "publish"}
    manager = ConnectionManager()
    app = _app(manager, "/ws/{channel}", inbound=inbound, authorize=lambda c, action, channel: action in rights)
    command = json.dumps(_command("publish", "news", data=1))
    async with visit(app, "/ws/news") as ada, visit(app, "/ws/news") as bob:
        ada.say(command)
        await bob.next()
        rights.remove("publish")
        ada.say(command)
        await eventually(lambda: any("forbidden" in str(message) for message in ada.messages))
        rights.add("publish")
        ada.say(command)
        await bob.next()
        assert len(bob.messages) == 2


@pytest.mark.parametrize("inbound", ["commands", "broadcast"])
async def test_a_denial_may_close_instead(inbound: str) -> None:
    def authorize(connection: Any, action: str, channel: str | None) -> bool:
        if action == "publish":
            raise PermissionDenied("read only")
        return True

    manager = ConnectionManager()
    app = _app(manager, "/ws/{channel}", inbound=inbound, access=Access(authorize=authorize, on_denied="close"))
    async with visit(app, "/ws/news") as peer, visit(app, "/ws/news") as other:
        peer.say(json.dumps(_command("publish", "news", data=1)))
        await peer.wait_close()
        assert peer.end == (4403, "read only")
        assert peer.messages == []
        await manager.broadcast("still here")
        assert await other.next() == "still here"


async def test_a_hook_that_refuses_a_channel_is_a_denial_too(manager: ConnectionManager) -> None:
    @manager.on_subscribe
    async def refuse(connection: Connection, channel: str) -> None:
        raise PermissionDenied("full")

    async with visit(_app(manager, authorize=_anything), "/ws") as peer:
        assert (await _ask(peer, _command("subscribe", "news")))["text"] == "full"
        assert manager.connections[0].channels == frozenset()


async def test_what_is_broadcast_to_everyone_is_asked_for_as_none() -> None:
    asked: list[tuple[str, str | None]] = []

    def authorize(connection: Any, action: str, channel: str | None) -> bool:
        asked.append((action, channel))
        return len(asked) > 1

    app = _app(ConnectionManager(), inbound="broadcast", authorize=authorize)
    async with visit(app, "/ws") as peer, visit(app, "/ws") as other:
        assert await _ask(peer, "hello") == FORBIDDEN
        peer.say("hello again")
        assert await other.next() == "hello again"
        assert asked == [("publish", None)] * 2


async def test_who_left_while_authorize_thought_about_it_is_no_error() -> None:
    authorize = _Pondering("subscribe")
    manager = ConnectionManager()
    async with visit(_app(manager, authorize=authorize), "/ws") as peer:
        peer.say(json.dumps(_command("subscribe", "news")))
        await authorize.asked.wait()
        await manager.close(manager.connections[0])
        authorize.may_decide.set()
    assert manager.stats().channels == 0


async def test_a_denied_channel_never_reaches_a_recipient() -> None:
    """Even one that deliveries are hooked for."""
    manager = ConnectionManager()
    delivered: list[int] = []

    @manager.on_deliver
    def count(delivery: Delivery) -> None:
        delivered.append(len(delivery.recipients))

    async with visit(_app(manager), "/ws") as peer:
        assert await _ask(peer, _command("subscribe", "private:42")) == FORBIDDEN
        await manager.broadcast("secret", channel="private:42")
        assert delivered == [0]


@pytest.mark.parametrize(("inbound", "text"), [("commands", _PUBLISH), ("broadcast", "hello")])
async def test_who_was_closed_while_authorize_thought_about_it_publishes_nothing(inbound: str, text: str) -> None:
    authorize = _Pondering("publish")
    manager = ConnectionManager()
    app = _app(manager, "/ws/{channel}", inbound=inbound, authenticate=lambda: "ada", authorize=authorize)
    listener = Peer()
    await manager.connect(listener.websocket, channels=["news"])
    async with visit(app, "/ws/news") as peer:
        peer.say(text)
        await authorize.asked.wait()
        await manager.close_user("ada")
        assert await peer.wait_close() == 4401
        authorize.may_decide.set()
    assert listener.messages == []
    assert manager.stats().broadcasts == 0


async def test_a_right_that_is_taken_back_while_it_is_subscribed_is_gone() -> None:
    broker = FakeBroker()
    manager = ConnectionManager(FakeEngine(broker))
    rights = {"secret"}

    def authorize(connection: Any, action: str, channel: str) -> bool:
        return channel in rights

    app = _app(manager, authorize=authorize)
    async with lifespan(app), visit(app, "/ws") as peer:
        [connection] = manager.connections
        peer.say(json.dumps(_command("subscribe", "secret")))
        while "secret" not in str(broker.subscriptions):  # noqa: ASYNC110  # turn by turn: an answer takes one
            await asyncio.sleep(0)
        rights.clear()  # when the broker was asked, and hasn't answered
        assert connection.channels == frozenset()
        await manager.unsubscribe(connection, "secret")
        assert json.loads(await peer.next()) == FORBIDDEN
        assert connection.channels == frozenset()


# Options.


@pytest.mark.parametrize(
    "options",
    [
        {"inbound": "command"},
        {"inbound": "commands", "accepts": "text"},
        {"inbound": "commands", "accepts": "bytes"},
        {"on_denied": "close"},
        {"access": "close"},
    ],
)
@pytest.mark.parametrize("factory", [create_router, create_routes])
def test_an_option_that_makes_no_sense_is_refused(factory: Callable[..., Any], options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        factory(ConnectionManager(), **options)


# Anything may come.

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
_COMMANDS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["subscribe", "unsubscribe", "publish", "message"]) | _JSON,
        "channel": st.text(max_size=10) | _JSON,
        "data": _JSON,
        "id": _JSON,
    },
)


@given(st.lists(_COMMANDS | _JSON, max_size=5))
async def test_every_command_gets_one_answer_whatever_it_is(commands: list[Any]) -> None:
    manager = ConnectionManager()
    async with visit(_app(manager, authorize=_anything, include_sender=False), "/ws") as peer:
        for command in commands:
            answer = await _ask(peer, json.dumps(command))
            assert answer["type"] in {"subscribed", "unsubscribed", "published", "error"}
        await turns()
        assert len(peer.messages) == len(commands)
        assert len(manager.connections) == 1
    await manager.aclose()
