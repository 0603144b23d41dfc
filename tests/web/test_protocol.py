"""The protocol events beyond messages: pings, tokens that end, publishing once, and commands that are none."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from itertools import product
from typing import Annotated, Any, Literal, TypeVar, get_args

import pytest
from fastapi import Depends, HTTPException
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.asgi import eventually, turns
from tests.support.web import router_app
from tests.web.test_events import KEPT, EventPeer, serving
from wsbroadcast import (
    Access,
    ClientTiming,
    ConfigurationError,
    Connection,
    ConnectionManager,
    ErrorCode,
    Handshake,
    Identity,
    Limits,
    Presence,
    SlowConsumer,
    TokenFrom,
)
from wsbroadcast import connection as connection_module
from wsbroadcast.manager import core_of
from wsbroadcast.protocols.commands import (
    _READERS,
    MAX_CALLS,
    Call,
    Command,
    Ping,
    Pong,
    Publish,
    Refused,
    Session,
    Watch,
    error_answer,
    id_of,
)
from wsbroadcast.web.commands import Commands, Outage
from wsbroadcast.web.event_commands import EventCommands

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

T = TypeVar("T")

SOON = ClientTiming(ping_interval=0.05, reconnect_min=1.5, reconnect_max=60)


async def answer_to(peer: EventPeer, **command: Any) -> dict[str, Any]:
    """Send a command; return its answer without the id."""
    id_ = f"c{len(peer.events)}"
    peer.ask(**command, id=id_)
    await eventually(lambda: any(event.get("id") == id_ and event["type"] != "message" for event in peer.events))
    (answer,) = [event for event in peer.events if event.get("id") == id_]
    return {name: value for name, value in answer.items() if name != "id"}


# Pings, and what `hello` says.


async def test_clients_of_events_are_pinged_and_no_others() -> None:
    manager = ConnectionManager(client_timing=SOON)
    async with serving(manager) as client:
        plain, peer, other = client("news", subprotocols=()), client("news"), client("news")
        (hello, *_) = await peer.wait_events(2)
        assert hello["ping"] == 0.05
        assert hello["reconnect"] == {"min": 1.5, "max": 60}
        await eventually(lambda: len(peer.of("ping")) >= 2 and len(other.of("ping")) >= 2)
        assert peer.of("ping")[0] == {"type": "ping"}
        assert plain.messages == []


async def test_nothing_pings_where_nobody_speaks_events() -> None:
    manager = ConnectionManager(client_timing=SOON)
    async with serving(manager) as client:
        plain, peer = client("news", subprotocols=()), client("news")
        clients = manager._core.life.node.continuity.clients
        await eventually(lambda: len(manager.connections) == 2)
        assert list(clients._timers) == [False]
        peer.leave()
        await eventually(lambda: len(manager.connections) == 1)
        assert clients._timers == {}
        assert plain.messages == []
    assert len(clients) == 0


async def test_crowd_is_pinged_in_parts_with_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsbroadcast.node.event_clients._AT_ONCE", 2)
    manager = ConnectionManager(client_timing=SOON)
    async with serving(manager) as client:
        peers = [client("news") for _ in range(5)]
        await eventually(lambda: all(peer.of("ping") for peer in peers))


async def test_ping_is_not_the_message_that_is_too_many() -> None:
    manager = ConnectionManager(client_timing=SOON, slow_consumer=SlowConsumer(max_backlog_messages=16))
    async with serving(manager) as client:
        slow, peer = client("slow"), client("news")
        await slow.wait_events(2)
        slow.stall()
        for number in range(16):
            manager.broadcast_nowait(number, channel="slow")
            await asyncio.sleep(0)
        pings = len(peer.of("ping"))
        await eventually(lambda: len(peer.of("ping")) >= pings + 3)
        assert manager.stats().evicted == {}
        slow.resume()
        await eventually(lambda: len(slow.of("message")) == 16)
        assert await answer_to(slow, type="ping") == {"type": "pong"}


async def test_client_may_ping_and_answer_pings() -> None:
    async with serving(ConnectionManager()) as client:
        peer = client("news")
        assert await answer_to(peer, type="ping") == {"type": "pong"}
        peer.ask(type="pong", id="x")
        assert await answer_to(peer, type="ping") == {"type": "pong"}
        assert [event for event in peer.events if event.get("id") == "x"] == []


@pytest.mark.parametrize("options", [{"ping_interval": 0}, {"reconnect_min": 30.0}, {"call_timeout": float("nan")}])
def test_timing_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="ClientTiming"):
        ClientTiming(**options)


def test_manager_wants_a_timing() -> None:
    with pytest.raises(ConfigurationError, match="ClientTiming"):
        ConnectionManager(client_timing=5)  # type: ignore[arg-type]


# Tokens.


async def current_user(
    token: Annotated[str, Depends(TokenFrom(query="token", subprotocol="bearer"))],
) -> Identity | None:
    """Tokens say whose they are, and for how many seconds from now they hold."""
    user, _, seconds = token.partition(".")
    if user == "down":
        raise HTTPException(503, "no database")
    if user == "broken":
        raise ZeroDivisionError("secret")
    if user == "nobody":
        raise HTTPException(403, "invalid")
    return (
        None if user == "none" else Identity(user, {"token": token}, time.time() + float(seconds) if seconds else None)
    )


def with_token(client: Any, token: str) -> EventPeer:
    peer: EventPeer = client("news", subprotocols=("wsbroadcast.v1", "bearer", token))
    return peer


async def test_client_goes_on_with_another_token() -> None:
    manager = ConnectionManager()
    async with serving(manager, authenticate=current_user) as client:
        peer = with_token(client, "ada.1000")
        await peer.wait_events(2)
        assert peer.subprotocol == "wsbroadcast.v1"
        (connection,) = manager.connections
        first = connection.expires_at
        refreshed = await answer_to(peer, type="refresh", token="ada.2000")
        assert refreshed == {"type": "refreshed", "expires_at": connection.expires_at}
        assert first is not None
        assert connection.expires_at is not None
        assert connection.expires_at > first + 900
        assert connection.info == {"token": "ada.2000"}
        connection.info = "mine"
        assert await answer_to(peer, type="refresh", token="ada") == {"type": "refreshed"}
        assert connection.expires_at is None
        assert connection.info == "mine"


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("bob.1000", "forbidden"),
        ("none", "unauthenticated"),
        ("nobody", "unauthenticated"),
        ("x" * 201, "unauthenticated"),
        ("ada.-5", "unauthenticated"),
        ("a b", "unauthenticated"),
        ("é", "unauthenticated"),
        ("down", "unavailable"),
        ("broken", "failed"),
        ("", "invalid_command"),
        ("x" * 8193, "invalid_command"),
        (None, "invalid_command"),
        (["ada"], "invalid_command"),
    ],
)
async def test_token_that_does_not_do_changes_nothing(token: Any, code: str) -> None:
    manager = ConnectionManager()
    async with serving(manager, authenticate=current_user) as client:
        peer = with_token(client, "ada.1000")
        await peer.wait_events(2)
        (connection,) = manager.connections
        before = connection.expires_at, connection.info, connection.user
        answer = await answer_to(peer, type="refresh", token=token)
        assert (answer["type"], answer["code"]) == ("error", code)
        assert "secret" not in str(answer)
        assert (connection.expires_at, connection.info, connection.user) == before
        assert connection.is_open


async def test_token_of_a_megabyte_closes_who_sent_it_and_nobody_else() -> None:
    manager = ConnectionManager()
    async with serving(manager, authenticate=current_user) as client:
        peer, other = with_token(client, "ada"), with_token(client, "bob")
        await other.wait_events(2)
        peer.ask(type="refresh", token="x" * 2**20)
        assert await peer.wait_close() == 1009
        assert await answer_to(other, type="ping") == {"type": "pong"}


async def no_token() -> str:
    return "ada"


@pytest.mark.parametrize("options", [{}, {"authenticate": no_token}])
async def test_server_that_takes_no_token_says_so(options: dict[str, Any]) -> None:
    async with serving(ConnectionManager(), **options) as client:
        answer = await answer_to(client("news"), type="refresh", token="ada.1000")
        assert answer["code"] == "not_supported"


async def test_client_is_told_before_its_token_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_NOTICE_SECONDS", 0.3)
    manager = ConnectionManager()
    async with serving(manager, authenticate=current_user) as client:
        peer, late = with_token(client, "ada.0.4"), with_token(client, "ada.0.4")
        plain = client("news", subprotocols=("bearer", "ada.0.4"))
        await peer.wait_events(2)
        await eventually(lambda: peer.of("expiring") and late.of("expiring"))
        (told,) = peer.of("expiring")
        assert told["seconds"] == pytest.approx(0.2, abs=0.01)  # in the middle, when that is later
        assert told["expires_at"] == manager.connections[0].expires_at
        assert (await answer_to(peer, type="refresh", token="ada.1000"))["type"] == "refreshed"
        assert await late.wait_close() == 4401
        assert plain.messages == []
        assert len(peer.of("expiring")) == 1
        assert await answer_to(peer, type="ping") == {"type": "pong"}


# To publish.


async def test_publish_without_a_channel_goes_where_the_path_leads() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer, plain = client("room:1"), client("room:1", subprotocols=())
        await peer.wait_events(2)
        answer = await answer_to(peer, type="publish", data="hello")
        at = str(await manager.position("room:1"))
        assert answer == {"type": "published", "channel": "room:1", "position": at}
        assert await plain.wait_messages(1) == ["hello"]
        assert peer.of("message") == [{"type": "message", "channel": "room:1", "data": "hello", "position": at}]


@pytest.mark.parametrize(
    ("accepts", "data", "encoding", "sent"),
    [
        ("any", "text", None, "text"),
        ("any", {"a": 1}, None, '{"a":1}'),
        ("any", "/wA=", "base64", b"\xff\0"),
        ("text", "text", None, "text"),
        ("text", {"a": 1}, None, None),
        ("text", "/wA=", "base64", None),
        ("bytes", "/wA=", "base64", b"\xff\0"),
        ("bytes", "text", None, None),
        ("bytes", "no base 64", "base64", None),
        ("json", "text", None, '"text"'),
        ("json", [1], None, "[1]"),
        ("json", "/wA=", "base64", None),
    ],
)
async def test_what_is_published_is_what_the_router_accepts(
    accepts: str, data: Any, encoding: str | None, sent: Any
) -> None:
    async with serving(ConnectionManager(), accepts=accepts) as client:
        peer, plain = client("news"), client("news", subprotocols=())
        await peer.wait_events(2)
        answer = await answer_to(peer, type="publish", data=data, encoding=encoding)
        assert answer.get("code") == (None if sent is not None else "invalid_data")
        await turns()
        assert plain.messages == ([] if sent is None else [sent])


async def test_publish_with_a_key_is_done_once() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager, authenticate=current_user) as client:
        ada = client("room:1", subprotocols=("wsbroadcast.v1", "bearer", "ada"))
        bob = client("room:1", subprotocols=("wsbroadcast.v1", "bearer", "bob"))
        await ada.wait_events(2)
        await bob.wait_events(2)
        first = await answer_to(ada, type="publish", data=1, idempotency_key="k")
        again = await answer_to(ada, type="publish", data=1, idempotency_key="k")
        assert again == first | {"is_repeat": True}
        assert "is_repeat" not in await answer_to(bob, type="publish", data=2, idempotency_key="k")
        await eventually(lambda: len(bob.of("message")) == 2)
        assert [message["data"] for message in bob.of("message")] == [1, 2]


async def test_key_of_a_client_without_a_user_is_that_of_its_random_id() -> None:
    manager = ConnectionManager(history=KEPT)
    async with serving(manager) as client:
        peer, plain = client("room:1"), client("unkept")
        ask = {"type": "publish", "data": 1, "idempotency_key": "k"}
        assert (await answer_to(peer, **ask))["code"] == "invalid_command"
        assert (await answer_to(peer, **ask, client="short"))["code"] == "invalid_command"
        assert "is_repeat" not in await answer_to(peer, **ask, client="a" * 16)
        assert "is_repeat" not in await answer_to(peer, **ask, client="b" * 16)
        assert (await answer_to(peer, **ask, client="a" * 16))["is_repeat"]
        assert (await answer_to(plain, **ask, client="a" * 16))["code"] == "not_supported"


def test_nobody_uses_up_somebody_elses_key() -> None:
    def key(user: str | None, key: str, client: str | None = None) -> str | None:
        return Publish("news", 1, None, key, client).key_of(user)

    users = ["a", "a:b", 'a","b', "client"]
    keys = ["c", "b:c", 'b","c']
    made = [key(user, each) for user, each in product(users, keys)]
    made += [key(None, each, client) for client, each in product(users, keys)]
    assert len(set(made)) == 2 * len(users) * len(keys)
    assert Publish("news", 1).key_of("a") is None


@pytest.mark.parametrize(
    ("inbound", "code"),
    [("broadcast", None), ("handle", "forbidden"), ("ignore", "forbidden"), ("commands", "invalid_command")],
)
async def test_path_that_names_no_channel_publishes_to_everyone(inbound: str, code: str | None) -> None:
    manager = ConnectionManager()
    app = router_app(manager, "/ws", inbound=inbound)
    peer = EventPeer(path="/ws", subprotocols=("wsbroadcast.v1",))
    async with manager:
        task = asyncio.create_task(app(peer.scope, peer.receive, peer.send))
        answer = await answer_to(peer, type="publish", data=1)
        assert answer.get("code") == code
        if code is None:
            assert answer == {"type": "published", "to": "everyone"}
        assert (await answer_to(peer, type="publish", channel="news", data=1))["code"] == "forbidden"
    await task


# Requests without a connection.


def requests(manager: ConnectionManager, **options: Any) -> tuple[EventCommands, Callable[[str | None], Handshake]]:
    """Make what obeys the commands of requests, and what makes who asks."""
    access = Access(authorize=options.pop("authorize", None))
    core = core_of(manager)
    commands = Commands(core, access, Outage(), include_sender=True)
    options = dict[str, Any](inbound="broadcast", accepts="any", include_sender=True) | options
    websocket = EventPeer(path="/ws").websocket
    return EventCommands(core, access, commands, **options), lambda user: Handshake(websocket, user)


async def test_request_publishes_and_calls() -> None:
    manager = ConnectionManager(history=KEPT)
    manager.method("double")(double)
    manager.method("own")(own)
    obeys, who = requests(manager)
    async with serving(manager) as client:
        peer, other = client("room:1"), client("room:1")
        await peer.wait_events(2)
        await other.wait_events(2)

        async def ask(user: str | None = None, exclude: tuple[str, ...] = (), **command: Any) -> dict[str, Any]:
            return await obeys.answer(who(user), "room:1", command, exclude, None, stays)

        ids = [connection.id for connection in manager.connections]
        published = await ask(type="publish", data="hello", exclude=(ids[0],), id=5)
        at = str(await manager.position("room:1"))
        assert published == {"type": "published", "channel": "room:1", "position": at, "id": 5}
        await eventually(lambda: other.of("message"))
        assert peer.of("message") == []
        key: dict[str, Any] = {"type": "publish", "data": 1, "idempotency_key": "k"}
        assert (await ask(**key))["code"] == "invalid_command"
        assert "is_repeat" not in await ask("ada", **key)
        assert (await ask("ada", **key))["is_repeat"]
        assert (await ask(type="publish", channel="room:2", data=1))["code"] == "forbidden"
        assert await ask(type="call", name="double", args={"number": 4}) == {"type": "result", "data": 8}
        assert (await ask(type="call", name="double", args={"number": "x"}))["code"] == "invalid_arguments"
        assert (await ask(type="call", name="own"))["code"] == "not_supported"
        assert (await ask(type="call", name="none"))["code"] == "unknown_method"
        for kind in ("subscribe", "unsubscribe"):
            assert (await ask(type=kind, channel="room:1"))["code"] == "not_supported"
        for kind in ("ping", "pong"):
            assert (await ask(type=kind))["code"] == "not_supported"
        assert (await ask(type="refresh", token="x"))["code"] == "not_supported"
        assert (await ask(type="dance"))["code"] == "invalid_command"


async def test_request_that_may_not_or_takes_too_long() -> None:
    manager = ConnectionManager(client_timing=ClientTiming(call_timeout=0.02))
    ends: list[str] = []

    @manager.method("wait")
    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    def authorize(connection: Any, action: str, channel: str | None) -> bool:
        return action == "call" and connection.user == "ada"

    obeys, who = requests(manager, authorize=authorize)
    async with manager:
        wanted = {"type": "call", "name": "wait"}

        async def ask(user: str, command: dict[str, Any]) -> Any:
            return await obeys.answer(who(user), "news", command, (), None, stays)

        assert (await ask("ada", wanted))["code"] == "timeout"
        await eventually(lambda: ends)
        assert (await ask("bob", wanted))["code"] == "forbidden"
        assert (await ask("ada", {"type": "publish", "data": 1}))["code"] == "forbidden"
        asking = asyncio.create_task(ask("ada", wanted))
        await turns()
        asking.cancel()  # whoever asked has gone
        await eventually(lambda: len(ends) == 2)


async def stays() -> None:
    """A client that doesn't leave."""
    await asyncio.Event().wait()


def double(number: int) -> int:
    return 2 * number


async def own(connection: Connection) -> str:
    return connection.id


# What is no command.

WRONG: list[Any] = [
    None,
    1,
    "ping",
    [],
    [{"type": "ping"}],
    {},
    {"type": None},
    {"type": ["ping"]},
    {"type": "PING"},
    {"type": "dance"},
    {"type": "hello"},
    {"type": "subscribe"},
    {"type": "subscribe", "channel": 1},
    {"type": "subscribe", "channel": "news", "since": 5},
    {"type": "subscribe", "channel": "news", "since": {"epoch": "x", "offset": 1}},
    {"type": "unsubscribe", "channel": ["news"]},
    {"type": "presence", "channel": 1},
    {"type": "presence", "channel": {"news": 1}},
    {"type": "presence", "watch": "no"},
    {"type": "presence", "watch": 0},
    {"type": "publish"},
    {"type": "publish", "channel": "news"},
    {"type": "publish", "channel": 5, "data": 1},
    {"type": "publish", "channel": "news", "data": 1, "encoding": "base64"},
    {"type": "publish", "channel": "news", "data": "x", "encoding": "hex"},
    {"type": "publish", "channel": "news", "data": 1, "idempotency_key": ""},
    {"type": "publish", "channel": "news", "data": 1, "idempotency_key": "x" * 201},
    {"type": "publish", "channel": "news", "data": 1, "idempotency_key": 7},
    {"type": "call"},
    {"type": "call", "name": ""},
    {"type": "call", "name": 5},
    {"type": "call", "name": "x" * 201},
    {"type": "call", "name": "add", "args": [1, 2]},
    {"type": "refresh"},
    {"type": "refresh", "token": 5},
]


@pytest.mark.parametrize("inbound", ["broadcast", "commands", "handle"])
async def test_command_of_a_wrong_shape_is_answered_and_disturbs_nobody(inbound: str) -> None:
    manager = ConnectionManager()
    async with serving(manager, inbound=inbound) as client:
        peer, other = client("news"), client("news")
        await peer.wait_events(2)
        await other.wait_events(2)
        for count, wrong in enumerate(WRONG, 1):
            peer.say(json.dumps(wrong))
            await eventually(lambda count=count: len(peer.of("error")) == count)  # type: ignore[misc]
        assert {answer["code"] for answer in peer.of("error")} == {"invalid_command"}
        assert len(other.events) == 2
        assert await answer_to(peer, type="publish", channel="news", data="still here") is not None
        assert (await other.wait_events(3))[2]["data"] == "still here"


async def test_client_that_subscribes_to_thousands_of_channels_is_stopped() -> None:
    manager = ConnectionManager(limits=Limits(max_router_inbound_rate=None))
    yes = lambda connection, action, channel: True  # noqa: E731
    async with serving(manager, inbound="commands", authorize=yes) as client:
        peer, other = client("news"), client("news")
        count = 10_000 if FULL else 2_000
        for number in range(count):
            peer.ask(type="subscribe", channel=f"room:{number}", since="garbage" * 20)
        await eventually(lambda: len(peer.messages) == count + 2)
        assert len(peer.of("subscribed")) == 100
        assert {answer["code"] for answer in peer.of("error")} == {"limit_exceeded"}
        assert manager.stats().channels == 100
        assert await answer_to(other, type="ping") == {"type": "pong"}


async def test_client_that_floods_is_closed() -> None:
    manager = ConnectionManager()
    async with serving(manager) as client:
        peer, other = client("news"), client("news")
        for _ in range(10_000):
            peer.ask(type="ping")
        assert await peer.wait_close() == 1008
        assert await answer_to(other, type="ping") == {"type": "pong"}


# The state machine, whatever is sent.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("channel", "since", "watch", "data", "encoding", "idempotency_key", "client", "name", "args", "token", "id")
VALUES = JSON | st.sampled_from(["news", "last", "base64", "x" * 16, "x" * 10_000, {"a": 1}])
COMMANDS = JSON | st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.sampled_from([*_READERS, "", "hello"]) | JSON,
    st.dictionaries(st.sampled_from(FIELDS), VALUES),
)


def outcome_of(function: Callable[[], T]) -> T | Refused:
    try:
        return function()
    except Refused as refused:
        return refused


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([None, "news"]),
    st.sampled_from(["nowhere", "path", "path_or_everyone", "anywhere"]),
    st.lists(COMMANDS, max_size=30),
)
def test_session_answers_everything_and_allows_no_more_than_inbound(
    path: str | None, publishes: Literal["nowhere", "path", "path_or_everyone", "anywhere"], asked: list[Any]
) -> None:
    session = Session(path, publishes)
    for command in asked:
        assert isinstance(id_of(command).get("id", ""), (str, int))
        read = outcome_of(lambda command=command: session.read(command))  # type: ignore[misc]
        if isinstance(read, Refused):
            assert read.answer["type"] == "error"
            assert read.answer["code"] in set(ErrorCode)
            json.dumps(read.answer)
            continue
        assert isinstance(read, get_args(Command))
        if isinstance(read, Publish):
            assert publishes != "nowhere"
            assert read.channel == path or publishes == "anywhere"
            assert read.channel is not None or publishes == "path_or_everyone"
            key = outcome_of(lambda read=read: read.key_of(None))  # type: ignore[misc]
            assert key is None or isinstance(key, Refused) or len(key) == 64
        elif isinstance(read, Call):
            assert session.calls < MAX_CALLS
            session.begun()
        elif isinstance(read, Watch):
            assert read.channel
        elif isinstance(read, (Ping, Pong)):
            assert command["type"] in ("ping", "pong")
    assert 0 <= session.calls <= MAX_CALLS


def test_codes_are_texts() -> None:
    assert error_answer(ErrorCode.FORBIDDEN, "no") == {"type": "error", "code": "forbidden", "text": "no"}


@settings(max_examples=30, deadline=None)
@given(st.lists(COMMANDS, min_size=1, max_size=20))
def test_server_survives_whatever_is_sent_and_serves_the_others(asked: list[Any]) -> None:
    async def run() -> None:
        manager = ConnectionManager(history=KEPT, presence=Presence())
        manager.method("name")(lambda a: a)
        async with serving(manager, inbound="commands", authorize=lambda connection, action, channel: True) as client:
            peer, other = client("room:1"), client("room:1")
            await peer.wait_events(2)
            for command in asked:
                peer.say(json.dumps(command))
            peer.ask(type="ping", id="end of the list")
            await eventually(lambda: peer.end or any(e.get("id") == "end of the list" for e in peer.events))
            if peer.end:
                assert peer.end[0] in (1007, 1009)
            assert await answer_to(other, type="ping") == {"type": "pong"}

    asyncio.run(run())
