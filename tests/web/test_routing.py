"""The router factory."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket, WebSocketException
from fastapi.routing import APIWebSocketRoute
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.routing import Mount, Router, WebSocketRoute
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, eventually, lifespan, refusal, turns, visit
from tests.support.fake_broker import FailingEngine, FakeBroker, FakeEngine
from tests.support.web import denied, router_app
from wsbroadcast import (
    Audience,
    ConfigurationError,
    Connection,
    ConnectionManager,
    EngineError,
    EngineUnavailable,
    Limits,
    ManagerDep,
    Message,
    PermissionDenied,
    create_router,
    create_routes,
)

# Options.


@pytest.mark.parametrize(
    ("path", "options", "match"),
    [
        ("/ws", {"inbound": "nothing"}, "inbound"),
        ("/ws", {"accepts": "xml"}, "accepts"),
        ("/ws/{a}/{b}", {}, "several parameters"),
        ("/ws/{a}", {"channel": "{a"}, "channel pattern"),
        ("/ws/{a}", {"channel": "{}"}, "channel pattern"),
        ("/ws/{a}", {"channel": "{0}"}, "channel pattern"),
        ("/ws/{a}", {"channel": "{a.__class__}"}, "channel pattern"),
        ("/ws/{a}", {"channel": "{a[0]}"}, "channel pattern"),
        ("/ws/{a}", {"channel": "{a!r}"}, "channel pattern"),
        ("/ws/{a}", {"channel": "{a:>9}"}, "channel pattern"),
        ("/ws/{a}/{b}", {"channel": "{a}{b}"}, "needs a text between"),
    ],
)
@pytest.mark.parametrize("factory", [create_router, create_routes])
def test_an_option_that_makes_no_sense_is_refused(factory: Any, path: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        factory(ConnectionManager(), path, **options)


async def test_a_pattern_with_an_unknown_parameter_is_an_error_of_the_app() -> None:
    app = router_app(ConnectionManager(), "/ws/{a}", channel="{b}")
    async with lifespan(app):
        with pytest.raises(ConfigurationError, match="not a path parameter"):
            await refusal(app, "/ws/x")


# Who hears whom.


@pytest.mark.parametrize(
    ("path", "options", "url", "channels"),
    [
        ("/ws", {}, "/ws", set()),
        ("/ws/{channel}", {}, "/ws/news", {"news"}),
        ("/ws/{room}", {}, "/ws/news", {"news"}),
        ("/ws/{room}/{channel}", {"channel": "{channel}"}, "/ws/lobby/news", {"news"}),
        ("/ws/{room:path}", {}, "/ws/a/b/c", {"a/b/c"}),
        ("/ws/{number:int}", {}, "/ws/042", {"42"}),
        ("/ws/{number:float}", {}, "/ws/1.5", {"1.5"}),
        (
            "/ws/{id:uuid}",
            {},
            "/ws/00000000-0000-0000-0000-000000000001",
            {"00000000-0000-0000-0000-000000000001"},
        ),
        ("/ws/{tenant}/{room}", {"channel": "{tenant}:{room}"}, "/ws/acme/x", {"acme:x"}),
        ("/ws/{tenant}/{room}", {"channel": "{room}"}, "/ws/acme/x", {"x"}),
        ("/ws/{tenant}/{room}", {"channel": "{tenant}:{room}"}, "/ws/acme/eu:x", {"acme:eu:x"}),
        ("/ws/{tenant}/{room}", {"channel": "a-{tenant}-{room}-z"}, "/ws/acme/x-y", {"a-acme-x-y-z"}),
        ("/ws/{room}", {"channel": "{{{room}}}"}, "/ws/x", {"{x}"}),
        ("/ws/{room}", {"channel": "fixed"}, "/ws/x", {"fixed"}),
        ("/ws", {"channel": "fixed"}, "/ws", {"fixed"}),
        ("/ws/{room}", {}, "/ws/é 😀", {"é 😀"}),
        ("/ws/{room}", {}, "/ws/{evil}", {"{evil}"}),
    ],
)
async def test_path_parameters_subscribe(
    manager: ConnectionManager, path: str, options: dict[str, Any], url: str, channels: set[str]
) -> None:
    app = router_app(manager, path, **options)
    async with lifespan(app), visit(app, url) as peer:
        [connection] = manager.connections
        assert connection.channels == channels
        peer.say("hello")
        assert await peer.next() == "hello"


@pytest.mark.parametrize("url", ["/ws/" + "x" * 201, "/ws/a\x00b", "/ws/a\nb", "/ws/\u2028"])
async def test_an_invalid_channel_in_the_url_is_refused_before_it_is_accepted(
    manager: ConnectionManager, url: str
) -> None:
    app = router_app(manager, "/ws/{channel}")
    async with lifespan(app):
        assert await refusal(app, url) == 1008
        assert manager.stats().connects == 0


@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        ("{tenant}:{room}", "/ws/acme:eu/plans"),
        ("{tenant}::{room}", "/ws/acme:/plans"),
        ("{room}/{tenant}/x", "/ws/a/b/c"),
    ],
)
async def test_parameters_that_could_make_the_channel_of_others_are_refused(
    manager: ConnectionManager, pattern: str, url: str
) -> None:
    app = router_app(manager, "/ws/{tenant}/{room:path}", channel=pattern)
    async with lifespan(app):
        await refusal(app, url)
        assert manager.stats().connects == 0


# Inbound.


async def test_inbound_ignore_reads_and_forgets(manager: ConnectionManager) -> None:
    app = router_app(manager, inbound="ignore")
    async with lifespan(app), visit(app, "/ws") as peer:
        for number in range(20):
            peer.say(str(number))
        await turns(50)
        await manager.broadcast("news")
        assert await peer.next() == "news"
        peer.leave()
        await eventually(lambda: manager.connections == [])


async def test_inbound_handle_leaves_it_to_the_hooks(manager: ConnectionManager) -> None:
    @manager.on_message
    async def answer(connection: Connection, message: str | bytes) -> None:
        await connection.send(f"you said {message!r}")

    app = router_app(manager, "/ws/{channel}", inbound="handle")
    async with lifespan(app), visit(app, "/ws/a") as a, visit(app, "/ws/a") as b:
        a.say("hello")
        assert await a.next() == "you said 'hello'"
        b.say("x")
        assert await b.next() == "you said 'x'"
        assert a.messages == ["you said 'hello'"]


@pytest.mark.parametrize("inbound", ["broadcast", "handle", "ignore"])
async def test_a_message_that_a_hook_refuses_closes_with_1008(manager: ConnectionManager, inbound: str) -> None:
    @manager.on_message
    async def refuse(connection: Connection, message: str | bytes) -> None:
        raise PermissionDenied("read only")

    app = router_app(manager, inbound=inbound)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.say("hello")
        await peer.wait_close()
        assert peer.end == (1008, "read only")
        assert manager.connections == []
        assert peer.messages == []


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [(PermissionDenied("no"), 1008), (WebSocketException(4123, "no"), 4123), (WebSocketException(1, "no"), 1011)],
)
async def test_a_broadcast_that_a_hook_refuses_closes_with_the_refusals_code(
    manager: ConnectionManager, error: Exception, code: int, is_grouped: bool
) -> None:
    @manager.on_broadcast
    async def refuse(message: Message, audience: Audience) -> object:
        raise ExceptionGroup("a task group", [error]) if is_grouped else error

    app = router_app(manager)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.say("hello")
        await peer.wait_close()
        assert peer.end == (code, "no")


# A broker that is gone.


async def _kill(broker: FakeBroker) -> None:
    broker.is_down = True
    broker.drop_links()
    await eventually(lambda: not broker.links)


async def test_messages_of_clients_are_ignored_and_counted_while_the_broker_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = FakeBroker()
    manager = ConnectionManager(FakeEngine(broker))
    app = router_app(manager, "/ws/{channel}")
    async with lifespan(app), visit(app, "/ws/news") as ada, visit(app, "/ws/news") as bob:
        await _kill(broker)
        caplog.clear()
        for number in range(10):
            ada.say(f"a {number}")
            bob.say(f"b {number}")
        await eventually(lambda: manager.stats().unpublished == 20)
        assert manager.stats().engine.publish_failures == 20
        assert (ada.close, bob.close, len(manager.connections)) == (None, None, 2)
        [warning] = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
        assert warning.startswith("messages of clients are ignored, 1 so far: fake at nowhere:1 is out of reach")
        broker.is_down = False
        await eventually(lambda: manager.stats().engine.reconnects == 1)
        ada.say("again")
        assert await bob.next() == "again"
    assert [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info] == []


@pytest.mark.parametrize(
    "error", [EngineError("read-only"), EngineUnavailable("gone"), ExceptionGroup("several", [EngineError("one")])]
)
async def test_every_error_of_an_engine_is_its_trouble_and_not_the_client_s(error: Exception) -> None:
    manager = ConnectionManager(FailingEngine(error))
    app = router_app(manager)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.say("hello")
        peer.say("hello")
        await eventually(lambda: manager.stats().unpublished == 2)
        assert peer.close is None


async def test_engine_error_of_a_hook_is_no_reason_to_close(manager: ConnectionManager) -> None:
    @manager.on_broadcast
    async def archive(message: Message, audience: Audience) -> object:
        raise EngineUnavailable("the archive is gone")

    app = router_app(manager)
    async with lifespan(app), visit(app, "/ws") as peer:
        peer.say("hello")
        await eventually(lambda: manager.stats().unpublished == 1)
        assert peer.close is None


async def test_error_of_a_hook_closes_with_1011(manager: ConnectionManager) -> None:
    @manager.on_broadcast
    async def fail(message: Message, audience: Audience) -> object:
        raise KeyError("broken")

    app = router_app(manager)
    async with lifespan(app):
        peer = Peer("/ws")
        peer.say("hello")
        with pytest.raises(KeyError):
            async with visit(app, "/ws", peer):
                assert await peer.wait_close() == 1011
        assert manager.connections == []
    assert manager.stats().unpublished == 0


@pytest.mark.parametrize("inbound", ["broadcast", "commands"])
async def test_message_that_waits_while_the_manager_ends_is_no_error(manager: ConnectionManager, inbound: str) -> None:
    waits, goes_on = asyncio.Event(), asyncio.Event()

    @manager.on_broadcast
    async def wait(message: Message, audience: Audience) -> Message:
        waits.set()
        await goes_on.wait()
        return message

    app = router_app(manager, "/ws/{channel}", inbound=inbound)
    async with visit(app, "/ws/news") as peer:
        peer.say('{"type": "publish", "channel": "news", "data": 1}')
        await waits.wait()
        closing = asyncio.ensure_future(manager.aclose())
        assert await peer.wait_close() == 1001
        goes_on.set()
        await closing
    assert manager.stats().unpublished == 0


async def test_engine_that_fails_fast_refuses_handshakes_with_503(caplog: pytest.LogCaptureFixture) -> None:
    broker = FakeBroker()
    broker.is_down = True
    app = router_app(ConnectionManager(FakeEngine(broker, fail_fast=True)))
    for _ in range(3):
        peer = Peer("/ws", can_deny=True)
        await app(peer.scope, peer.receive, peer.send)
        assert peer.denial[0] == 503
    [warning] = [record.getMessage() for record in caplog.records if "handshake" in record.getMessage()]
    assert warning.startswith("refused a handshake: fake at nowhere:1 can't be reached")


async def test_a_connection_that_a_hook_refuses_is_closed_with_1008_and_no_error(manager: ConnectionManager) -> None:
    @manager.on_connect
    async def refuse(connection: Connection) -> None:
        raise PermissionDenied("not today")

    app = router_app(manager)
    async with lifespan(app), visit(app, "/ws") as peer:
        assert await peer.wait_close() == 1008


async def test_a_peer_that_leaves_during_the_handshake_is_no_error(manager: ConnectionManager) -> None:
    app = router_app(manager)
    async with lifespan(app):
        peer = Peer("/ws")
        peer.error = OSError("gone")
        await refusal(app, peer=peer)
        peer = Peer("/ws")
        await peer.receive()
        peer.leave()
        await refusal(app, peer=peer)
        assert manager.connections == []


# What clients may send.


@pytest.mark.parametrize("has_both_keys", [False, True])
@pytest.mark.parametrize(
    ("accepts", "data", "code"),
    [
        ("text", b"bytes", 1003),
        ("bytes", "text", 1003),
        ("json", "{", 1007),
        ("json", "", 1007),
        ("json", "[" * 60_000, 1007),
        ("json", "NaN", 1007),
        ("json", "1e999", 1007),
        ("json", b"\xff\xfe", 1007),
        ("json", '"\\ud800"', 1007),
    ],
)
@pytest.mark.parametrize("inbound", ["broadcast", "handle"])
async def test_a_message_of_the_wrong_kind_closes_that_connection_alone(
    manager: ConnectionManager, accepts: str, data: str | bytes, code: int, inbound: str, has_both_keys: bool
) -> None:
    app = router_app(manager, accepts=accepts, inbound=inbound)
    async with lifespan(app), visit(app, "/ws") as healthy:
        async with visit(app, "/ws", has_both_keys=has_both_keys) as peer:
            peer.say(data)
            assert await peer.wait_close() == code
            assert peer.end != (code, "")
        await manager.broadcast("still here")
        assert await healthy.next() == "still here"


@pytest.mark.parametrize(
    ("accepts", "data", "heard"),
    [
        ("any", "text", "text"),
        ("any", b"bytes", b"bytes"),
        ("any", "", ""),
        ("text", "text", "text"),
        ("bytes", b"bytes", b"bytes"),
        ("json", ' {"a": [1, 2.5, null, "é"]} ', '{"a":[1,2.5,null,"é"]}'),
        ("json", b"[1]", "[1]"),
        ("json", "null", "null"),
        ("json", '"NaN"', '"NaN"'),
        ("json", '"text"', '"text"'),
        ("json", "[" * 100 + "]" * 100, "[" * 100 + "]" * 100),
        ("json", "9" * 4000, "9" * 4000),
    ],
)
async def test_a_message_of_the_right_kind_is_broadcast(accepts: str, data: str | bytes, heard: str | bytes) -> None:
    app = router_app(ConnectionManager(), accepts=accepts)
    async with lifespan(app), visit(app, "/ws") as a, visit(app, "/ws") as b:
        a.say(data)
        assert await b.next() == heard


@pytest.mark.parametrize(
    "data",
    ["[" * depth + "]" * depth for depth in (190, 200, 201, 210, 254, 255, 256, 300, 1000)]
    + ["9" * 5000, "[" + "9" * 5000 + ', "NaN"]', '{"a":1e308}', "1e400", "-1e400"],
    ids=lambda data: f"{data[:3]}{len(data)}",
)
async def test_json_at_the_edge_is_either_broadcast_or_closes_with_1007(manager: ConnectionManager, data: str) -> None:
    app = router_app(manager, accepts="json")
    async with lifespan(app), visit(app, "/ws") as healthy:
        async with visit(app, "/ws") as peer:
            peer.say(data)
            await peer.wait_for(lambda: bool(peer.messages) or peer.close is not None)
            assert peer.close_code in (None, 1007)
        await manager.broadcast("still here")
        await healthy.wait_for(lambda: "still here" in healthy.messages)


async def test_a_message_past_the_limit_closes_that_connection_alone_with_1009() -> None:
    manager = ConnectionManager(limits=Limits(max_outbound_bytes=100))
    app = router_app(manager)
    async with lifespan(app), visit(app, "/ws") as healthy:
        async with visit(app, "/ws") as peer:
            peer.say("x" * 101)
            assert await peer.wait_close() == 1009
        healthy.say("x" * 100)
        assert await healthy.next() == "x" * 100


# Including.


async def test_a_router_works_nested_with_prefixes(manager: ConnectionManager) -> None:
    inner, outer = APIRouter(prefix="/inner"), APIRouter(prefix="/outer")
    inner.include_router(create_router(manager, "/ws/{channel}"), prefix="/api")
    outer.include_router(inner, prefix="/between")
    app = FastAPI()
    app.include_router(outer, prefix="/v1")
    async with lifespan(app), visit(app, "/v1/outer/between/inner/api/ws/news") as peer:
        assert app.state.wsbroadcast_managers == (manager,)
        await manager.broadcast("hello", channel="news")
        assert await peer.next() == "hello"
    assert peer.is_gone
    assert manager.stats().connections == 0


@pytest.mark.parametrize("name", ["channel", "room"])
@pytest.mark.parametrize("is_mounted", [False, True])
async def test_what_is_around_the_path_may_hold_the_parameter(
    manager: ConnectionManager, name: str, is_mounted: bool
) -> None:
    app = FastAPI()
    if is_mounted:
        app.mount(f"/{{{name}}}", router_app(manager))
    else:
        app = router_app(manager, prefix=f"/{{{name}}}")
    async with visit(app, "/news/ws") as peer, visit(app, "/sport/ws") as other:
        await manager.broadcast("hello", channel="news")
        assert await peer.next() == "hello"
        assert other.messages == []


def _prefixed(manager: ConnectionManager, path: str, **options: Any) -> Any:
    return router_app(manager, path, prefix="/{tenant}", **options)


def _prefixed_twice(manager: ConnectionManager, path: str, **options: Any) -> Any:
    inner, app = APIRouter(prefix="/{tenant}"), FastAPI()
    inner.include_router(create_router(manager, path, **options))
    app.include_router(inner)
    return app


def _mounted(manager: ConnectionManager, path: str, **options: Any) -> Any:
    app = FastAPI()
    app.mount("/{tenant}", router_app(manager, path, **options))
    return app


def _mounted_twice(manager: ConnectionManager, path: str, **options: Any) -> Any:
    middle, app = FastAPI(), FastAPI()
    middle.mount("", router_app(manager, path, **options))
    app.mount("/{tenant}", middle)
    return app


def _mounted_in_starlette(manager: ConnectionManager, path: str, **options: Any) -> Any:
    return Starlette(routes=[Mount("/{tenant}", routes=create_routes(manager, path, **options))])


SURROUNDINGS = pytest.mark.parametrize(
    "surround", [_prefixed, _prefixed_twice, _mounted, _mounted_twice, _mounted_in_starlette]
)


@pytest.mark.parametrize("name", ["room", "channel"])
@SURROUNDINGS
async def test_a_parameter_around_the_path_is_not_left_out_in_silence(
    manager: ConnectionManager, surround: Callable[..., Any], name: str
) -> None:
    app = surround(manager, f"/ws/{{{name}}}")
    with pytest.raises(ConfigurationError, match=rf"say which make the channel, channel='\{{tenant\}}:\{{{name}\}}'"):
        async with visit(app, "/acme/ws/general"):
            pass
    assert manager.stats().connects == 0
    app = surround(manager, f"/ws/{{{name}}}", channel=f"{{tenant}}:{{{name}}}")
    async with visit(app, "/acme/ws/general") as acme, visit(app, "/other/ws/general") as other:
        assert [connection.channels for connection in manager.connections] == [{"acme:general"}, {"other:general"}]
        other.say("for others")
        acme.say("for acme")
        assert (await acme.next(), await other.next()) == ("for acme", "for others")


@SURROUNDINGS
async def test_a_pattern_that_leaves_out_a_parameter_around_the_path_is_warned_of(
    manager: ConnectionManager, surround: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    app = surround(manager, "/ws/{room}", channel="room:{room}")
    async with visit(app, "/acme/ws/general"), visit(app, "/other/ws/general"):
        assert [connection.channels for connection in manager.connections] == [{"room:general"}] * 2
    assert [record.levelname for record in caplog.records if "same for every tenant" in record.getMessage()] == [
        "WARNING"
    ]


# Two routers that make the same channels.


def _namesakes(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    return [message for message in messages if "make the same channels" in message]


def _warning(first: str, second: str) -> str:
    return (
        f"{first} and {second} make the same channels, so their clients hear each other: pass "
        "channel='typing:{room}' to one, or channel='{room}' if that is meant"
    )


@pytest.mark.parametrize("create", [create_router, create_routes])
def test_two_paths_that_make_the_same_channels_are_warned_of(
    create: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    manager = ConnectionManager()
    kept = [create(manager, "/ws/rooms/{room}"), create(manager, "/ws/typing/{room}")]
    assert _namesakes(caplog) == [_warning("/ws/rooms/{room}", "/ws/typing/{room}")]
    kept += [create(manager, "/ws/typing/{room}"), create(manager, "/ws/rooms/{room}")]  # in another app
    assert len(_namesakes(caplog)) == 1
    del kept


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("/ws/rooms/{room}", None), ("/ws/rooms/{room}", None)),
        (("/ws/rooms/{room}", None), ("/ws/typing/{room}", "typing:{room}")),
        (("/ws/rooms/{room}", None), ("/ws/listen/{room}", "{room}")),
        (("/ws/rooms/{room}", "room:{room}"), ("/ws/listen/{room}", "room:{room}")),
        (("/ws", None), ("/feed", None)),
        (("/ws/rooms/{room}", None), ("/feed", None)),
        (("/feed", None), ("/ws/rooms/{room}", None)),
    ],
)
async def test_what_is_the_same_on_purpose_is_not_warned_of(
    manager: ConnectionManager,
    first: tuple[str, str | None],
    second: tuple[str, str | None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    for path, pattern in (first, second):
        app.include_router(create_router(manager, path, channel=pattern), prefix="/api")
    async with lifespan(app):
        for path, _ in (first, second):
            async with visit(app, "/api" + path.format(room="lobby")):
                pass
    assert _namesakes(caplog) == []


def test_routers_of_two_managers_have_channels_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    kept = [
        create_router(ConnectionManager(), "/ws/rooms/{room}"),
        create_router(ConnectionManager(), "/ws/typing/{room}"),
    ]
    assert _namesakes(caplog) == []
    del kept


async def test_a_router_that_is_gone_has_no_namesakes(
    manager: ConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    create_router(manager, "/ws/rooms/{room}")
    gc.collect()
    create_router(manager, "/ws/typing/{room}")
    assert _namesakes(caplog) == []


def _around_by_prefix(app: Any, around: str, manager: ConnectionManager, path: str) -> None:
    app.include_router(create_router(manager, path), prefix=around)


def _around_by_mount(app: Any, around: str, manager: ConnectionManager, path: str) -> None:
    app.mount(around, router_app(manager, path))


@pytest.mark.parametrize("put", [_around_by_prefix, _around_by_mount])
@pytest.mark.parametrize(
    ("paths", "arounds", "places"),
    [
        (("/{room}", "/{room}"), ("/ws/rooms", "/ws/typing"), ("/ws/rooms/{room}", "/ws/typing/{room}")),
        (("/ws", "/ws"), ("/rooms/{room}", "/typing/{room}"), ("/rooms/{room}/ws", "/typing/{room}/ws")),
        (("/rooms/{room}", "/ws"), ("/ws", "/typing/{room}"), ("/ws/rooms/{room}", "/typing/{room}/ws")),
    ],
)
async def test_two_prefixes_that_make_the_same_channels_are_warned_of_when_somebody_comes(
    manager: ConnectionManager,
    put: Callable[..., None],
    paths: tuple[str, str],
    arounds: tuple[str, str],
    places: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = FastAPI()
    for path, around in zip(paths, arounds, strict=True):
        put(app, around, manager, path)
    for _ in range(2):
        for path, around in zip(paths, arounds, strict=True):
            async with visit(app, (around + path).format(room="lobby")):
                pass
    assert _namesakes(caplog) == [_warning(*places)]


async def test_a_router_included_twice_shares_its_manager_and_its_life() -> None:
    manager = ConnectionManager()
    router = create_router(manager, "/ws/{channel}")
    app = FastAPI()
    app.include_router(router, prefix="/a")
    app.include_router(router, prefix="/b")
    async with lifespan(app), visit(app, "/a/ws/x") as a, visit(app, "/b/ws/x") as b:
        a.say("hello")
        assert await b.next() == "hello"
    async with lifespan(app), visit(app, "/a/ws/x") as a:
        a.say("again")
        assert await a.next() == "again"


async def test_two_routers_of_one_manager_and_two_managers_in_one_app() -> None:
    chat, feed = ConnectionManager(), ConnectionManager()
    app = FastAPI()
    app.include_router(create_router(chat, "/chat"))
    app.include_router(create_router(chat, "/also-chat"))
    app.include_router(create_router(feed, "/feed"))
    async with lifespan(app), visit(app, "/chat") as a, visit(app, "/also-chat") as b, visit(app, "/feed") as c:
        a.say("hello")
        assert await b.next() == "hello"
        await feed.broadcast("news")
        assert await c.wait_messages(1) == ["news"]
        assert a.messages == ["hello"]


async def test_the_router_carries_the_managers_life_beside_the_apps_own() -> None:
    events: list[str] = []
    manager = ConnectionManager()

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        events.append("start")
        yield {"answer": 42}
        events.append("end")

    app = FastAPI(lifespan=own)
    app.include_router(create_router(manager))
    async with lifespan(app):
        peer = Peer("/ws")
        call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
        await eventually(lambda: bool(manager.connections))
    assert peer.close_code == 1001  # the app's end closes what is open
    peer.leave()
    await asyncio.wait_for(call, 5)
    assert events == ["start", "end"]


async def test_the_router_works_without_a_lifespan() -> None:
    manager = ConnectionManager()
    app = router_app(manager)
    async with visit(app, "/ws") as peer:  # daphne runs no lifespan
        peer.say("hello")
        assert await peer.next() == "hello"
    await manager.aclose()


async def test_manager_dep_finds_the_routers_manager() -> None:
    manager = ConnectionManager()
    app = router_app(manager)

    @app.get("/count")
    async def count(manager: ManagerDep) -> int:
        return manager.stats().connects

    with TestClient(app) as client, client.websocket_connect("/ws") as websocket:
        websocket.send_text("hello")
        assert websocket.receive_text() == "hello"
        assert client.get("/count").json() == 1


# Dependencies.


async def _no_entry() -> None:
    raise WebSocketException(4003, "no entry")


async def _no_entry_by_http() -> None:
    raise HTTPException(401)


async def _token(websocket: WebSocket, token: str = "") -> None:
    if token != "secret":
        raise WebSocketException(1008)


@pytest.mark.parametrize("where", ["create_router", "include_router", "FastAPI"])
async def test_a_dependency_that_fails_refuses_before_the_connection_is_accepted(
    manager: ConnectionManager, where: str
) -> None:
    dependencies = [Depends(_no_entry)]
    app = FastAPI(dependencies=dependencies if where == "FastAPI" else None)
    app.include_router(
        create_router(manager, dependencies=dependencies if where == "create_router" else None),
        dependencies=dependencies if where == "include_router" else None,
    )
    async with lifespan(app):
        assert await refusal(app) == 4003
        assert manager.stats().connects == 0


def test_a_dependency_may_answer_with_http_and_let_others_pass() -> None:
    manager = ConnectionManager()
    app = FastAPI()
    app.include_router(create_router(manager, "/closed", dependencies=[Depends(_no_entry_by_http)]))
    app.include_router(create_router(manager, "/open", dependencies=[Depends(_token)]))
    with TestClient(app) as client:
        assert denied(client, "/closed").status_code == 401
        with pytest.raises(WebSocketDisconnect) as caught, client.websocket_connect("/open?token=wrong"):
            pass
        assert caught.value.code == 1008
        with client.websocket_connect("/open?token=secret") as websocket:
            websocket.send_json({"a": 1})
            assert websocket.receive_json() == {"a": 1}
    assert manager.stats().connects == 1


# Starlette.


@pytest.mark.parametrize("is_mounted", [False, True])
async def test_routes_for_plain_starlette(manager: ConnectionManager, is_mounted: bool) -> None:
    routes = create_routes(manager, "/ws/{channel}", include_sender=False)
    app = Starlette(
        routes=[Mount("/api", app=Router(routes=routes))] if is_mounted else routes, lifespan=manager.lifespan
    )
    url = "/api/ws/news" if is_mounted else "/ws/news"
    async with lifespan(app), visit(app, url) as a, visit(app, url) as b:
        a.say("hello")
        assert await b.next() == "hello"
        assert a.messages == []
        assert app.state.wsbroadcast_managers == (manager,)


async def test_router_broadcasts_to_the_channel_of_its_path_only(manager: ConnectionManager) -> None:
    @manager.on_connect
    async def everybody_hears_announcements(connection: Connection) -> None:
        await connection.subscribe("announcements")

    app = router_app(manager, "/ws/{channel}")
    async with visit(app, "/ws/a") as one, visit(app, "/ws/a") as two, visit(app, "/ws/b") as other:
        one.say("hello")
        await eventually(lambda: one.messages == two.messages == ["hello"])
        await manager.broadcast("everyone")
        await eventually(lambda: other.messages == ["everyone"])
        assert one.messages == ["hello", "everyone"]


async def test_who_was_unsubscribed_from_the_path_s_channel_is_not_heard(manager: ConnectionManager) -> None:
    app = router_app(manager, "/ws/{channel}")
    async with visit(app, "/ws/a") as kicked, visit(app, "/ws/b") as other:
        await manager.unsubscribe(manager.connections[0], "a")
        kicked.say("is anybody there?")
        await turns(20)
        assert (kicked.messages, other.messages) == ([], [])


@pytest.mark.parametrize("inbound", ["broadcast", "commands"])
def test_router_adds_no_http_route_but_the_script_s(inbound: Any) -> None:
    router = create_router(ConnectionManager(), "/ws/{channel}", inbound=inbound, script=False, include_in_schema=False)
    assert [type(route) for route in router.routes] == [APIWebSocketRoute]
    assert [type(route) for route in create_routes(ConnectionManager(), script=False)] == [WebSocketRoute]
    app = FastAPI(openapi_url=None)
    app.include_router(router)
    with TestClient(app) as client:
        assert {client.request(method, "/ws/news").status_code for method in ("GET", "POST", "PUT", "DELETE")} == {404}
