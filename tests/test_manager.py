"""Broadcasting and sending, as the application sees it."""

from __future__ import annotations

import asyncio
import enum
import time
from typing import Any
from unittest.mock import create_autospec

import pytest
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, connected, eventually, turns
from wsbroadcast import (
    HOLD_BACK,
    Audience,
    ConfigurationError,
    Connection,
    ConnectionClosed,
    ConnectionManager,
    Delivery,
    EncodeError,
    Hook,
    InvalidChannel,
    LifecycleError,
    Limits,
    Message,
    MessageTooLarge,
    PermissionDenied,
    Receipt,
    SlowConsumer,
)


async def _received(pairs: list[tuple[Peer, Connection]]) -> list[list[str | bytes]]:
    await turns()
    return [peer.messages for peer, _ in pairs]


async def _call(manager: ConnectionManager, name: str, message: object, **options: Any) -> None:
    result = getattr(manager, name)(message, **options)
    if result is not None:  # all but broadcast_nowait
        await result


# Construction.


@pytest.mark.parametrize("engine", ["nosuch://host", "localhost", "memory://host", "", 5, None, "redis"])
def test_manager_refuses_an_engine_that_makes_no_sense(engine: Any) -> None:
    with pytest.raises(ConfigurationError):
        ConnectionManager(engine)


def test_manager_refuses_a_hook_class_instead_of_an_object() -> None:
    with pytest.raises(ConfigurationError, match="instance of Hook"):
        ConnectionManager(hooks=[Hook])  # type: ignore[list-item]


def test_manager_is_made_outside_any_event_loop() -> None:
    manager = ConnectionManager()
    assert manager.connections == []
    assert manager.active_connections == []
    assert manager.stats().connections == 0
    assert repr(manager) == "<ConnectionManager memory, 0 connections>"


# Audiences.


async def test_broadcast_without_connections_is_no_error(manager: ConnectionManager) -> None:
    await manager.broadcast("hello")
    await manager.broadcast("hello", channel="nobody")
    await manager.broadcast("hello", user="nobody")
    assert manager.stats().deliveries == 0


async def test_broadcast_takes_a_user_as_text(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 1, user=1)
    await manager.broadcast("a", user="1")
    await manager.broadcast("b", user=1)
    await manager.broadcast("c", user=11)
    assert await _received(pairs) == [["a", "b"]]


async def test_broadcast_keeps_a_channel_and_a_user_of_one_name_apart(manager: ConnectionManager) -> None:
    in_channel = await connected(manager, 1, channels=["x"])
    of_user = await connected(manager, 1, user="x")
    await manager.broadcast("channel", channel="x")
    await manager.broadcast("user", user="x")
    assert await _received(in_channel) == [["channel"]]
    assert await _received(of_user) == [["user"]]


async def test_broadcast_excludes(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 4, channels=["c"])
    (peer_a, a), (_, b), (_, c), _ = pairs
    async with ConnectionManager() as other:
        [(foreign_peer, foreign)] = await connected(other, 1)
        excludes: list[tuple[Any, set[int]]] = [
            (a, {0}),
            (peer_a.websocket, {0}),
            ([a, b], {0, 1}),
            ((peer_a.websocket, c), {0, 2}),
            ({a, b, c}, {0, 1, 2}),
            ((one for one in [a]), {0}),
            (Peer().websocket, set()),
            ([foreign, foreign_peer.websocket], set()),
            ([], set()),
            ((), set()),
        ]
        expected: list[list[str]] = [[], [], [], []]
        for number, (exclude, missing) in enumerate(excludes):
            await manager.broadcast(f"everyone {number}", exclude=exclude)
            for index in set(range(4)) - missing:
                expected[index].append(f"everyone {number}")
        assert await _received(pairs) == expected
    await manager.broadcast("channel", channel="c", exclude=manager.connections)
    assert await _received(pairs) == expected


async def test_broadcast_excludes_one_that_has_left(manager: ConnectionManager) -> None:
    [(peer, connection), (other, _)] = await connected(manager, 2)
    manager.disconnect(connection)
    await manager.broadcast("hello", exclude=peer.websocket)
    assert await other.next() == "hello"


async def test_subscribe_and_unsubscribe_change_who_gets_what(manager: ConnectionManager) -> None:
    [(peer, connection)] = pairs = await connected(manager, 1)
    await manager.broadcast("1", channel="a")
    await manager.subscribe(peer.websocket, "a", "b")
    await manager.broadcast("2", channel="a")
    await connection.unsubscribe("a", "never")
    await manager.broadcast("3", channel="a")
    await manager.broadcast("4", channel="b")
    await connection.subscribe("a")
    await manager.broadcast("5", channel="a")
    assert await _received(pairs) == [["2", "4", "5"]]
    await manager.unsubscribe(peer.websocket, "a", "b")
    assert manager.stats().channels == 0


async def test_a_message_goes_to_those_who_were_there_when_it_was_broadcast(manager: ConnectionManager) -> None:
    early = await connected(manager, 1)
    await manager.broadcast("before")
    late = await connected(manager, 1)
    await manager.broadcast("after")
    assert await _received(early) == [["before", "after"]]
    assert await _received(late) == [["after"]]


@pytest.mark.parametrize("call", ["broadcast", "broadcast_local", "broadcast_nowait"])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"channel": None}, InvalidChannel),
        ({"channel": "a\nb"}, InvalidChannel),
        ({"channel": ["a"]}, InvalidChannel),
        ({"user": None}, ValueError),
        ({"user": ""}, ValueError),
        ({"channel": "a", "user": "b"}, ValueError),
    ],
)
async def test_broadcast_to_no_audience_raises_and_reaches_nobody(
    manager: ConnectionManager, call: str, options: dict[str, Any], error: type[Exception]
) -> None:
    pairs = await connected(manager, 2, channels=["a"], user="b")
    with pytest.raises(error):
        await _call(manager, call, "hello", **options)
    assert await _received(pairs) == [[], []]
    assert manager.stats().broadcasts == 0


@pytest.mark.parametrize("name", [None, "", "x" * 5000, "\x7f", 5])
async def test_subscribe_with_one_invalid_channel_subscribes_none(manager: ConnectionManager, name: Any) -> None:
    [(_, connection)] = await connected(manager, 1)
    with pytest.raises(InvalidChannel) as caught:
        await connection.subscribe("good", name)
    assert caught.value.channel == name
    assert len(str(caught.value)) < 300
    with pytest.raises(InvalidChannel):
        await connection.unsubscribe(name)
    assert connection.channels == set()


# Messages.


class _Color(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("message", "received"),
    [
        ("é 😀 \x00", "é 😀 \x00"),
        ("", ""),
        (b"\x00\xff", b"\x00\xff"),
        (memoryview(b"abcdef")[::2], b"ace"),
        (_Color.RED, "red"),
        (Message.of("ready"), "ready"),
        ({"a": {"b": (1, None)}}, '{"a":{"b":[1,null]}}'),
    ],
)
async def test_broadcast_sends_text_and_bytes_as_they_are_and_anything_else_as_json(
    manager: ConnectionManager, message: object, received: object
) -> None:
    [(peer, _)] = await connected(manager, 1)
    await manager.broadcast(message)
    assert await peer.next() == received


@pytest.mark.parametrize("call", ["broadcast", "broadcast_local", "broadcast_nowait", "send"])
@pytest.mark.parametrize("message", ["\ud800", {"a": [1.0, float("nan")]}, object()])
async def test_a_message_that_cannot_be_sent_raises_and_reaches_nobody(
    manager: ConnectionManager, call: str, message: object
) -> None:
    [(peer, connection)] = pairs = await connected(manager, 1)
    with pytest.raises(EncodeError):
        await (connection.send(message) if call == "send" else _call(manager, call, message))
    assert await _received(pairs) == [[]]
    await manager.broadcast("next")
    assert await peer.next() == "next"


async def test_a_message_past_the_limit_raises_and_reaches_nobody() -> None:
    async with ConnectionManager(limits=Limits(max_outbound_bytes=10)) as manager:
        [(peer, connection)] = await connected(manager, 1)
        for message in ("x" * 11, "é" * 6, b"x" * 11, ["x" * 7]):
            with pytest.raises(MessageTooLarge) as caught:
                await manager.broadcast(message)
            assert (caught.value.limit, caught.value.size > 10) == (10, True)
            with pytest.raises(MessageTooLarge):
                await connection.send(message)
        await manager.broadcast("x" * 10)
        assert await peer.next() == "x" * 10


async def test_a_message_is_encoded_once_whatever_becomes_of_the_object(manager: ConnectionManager) -> None:
    [(peer, _)] = await connected(manager, 1)
    value = {"n": 1}
    await manager.broadcast(value)
    value["n"] = 2
    assert await peer.next() == '{"n":1}'


async def test_a_hook_that_makes_a_message_too_large_reaches_nobody() -> None:
    async with ConnectionManager(limits=Limits(max_outbound_bytes=10)) as manager:
        manager.on_broadcast(lambda message, audience: "x" * 11)
        pairs = await connected(manager, 1)
        with pytest.raises(MessageTooLarge):
            await manager.broadcast("short")
        assert await _received(pairs) == [[]]


# The other ways to broadcast, and to one.


async def test_broadcast_local_reaches_this_node(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 2, channels=["a"])
    await manager.broadcast_local("hello", channel="a", exclude=pairs[0][1])
    assert await _received(pairs) == [[], ["hello"]]


async def test_broadcast_nowait_keeps_its_place_among_the_others(manager: ConnectionManager) -> None:
    [(peer, connection)] = pairs = await connected(manager, 1)
    await manager.broadcast("1")
    manager.broadcast_nowait("2")
    await connection.send("3")
    manager.broadcast_nowait("4")
    await manager.broadcast_local("5")
    await manager.send_personal_message("6", peer.websocket)
    assert await _received(pairs) == [["1", "2", "3", "4", "5", "6"]]


async def test_broadcast_nowait_works_from_a_plain_callback(manager: ConnectionManager) -> None:
    @manager.on_broadcast
    async def shout(message: Message, audience: Audience) -> str:
        return str(message.data).upper()

    [(peer, _)] = await connected(manager, 1)
    asyncio.get_running_loop().call_soon(manager.broadcast_nowait, "hello")
    assert await peer.next() == "HELLO"


async def test_broadcast_nowait_with_a_hook_that_waits_says_what_to_do(manager: ConnectionManager) -> None:
    @manager.on_broadcast
    async def wait(message: Message, audience: Audience) -> Message:
        await asyncio.sleep(0)
        return message

    [(peer, _)] = pairs = await connected(manager, 1)
    with pytest.raises(LifecycleError, match=r"an on_broadcast hook has to wait.*await `broadcast`"):
        manager.broadcast_nowait("hello")
    assert await _received(pairs) == [[]]
    await manager.broadcast("hello")
    assert await peer.next() == "hello"


async def test_send_reaches_one_connection(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 3, user="ada", channels=["a"])
    await manager.send(pairs[0][1], {"a": 1})
    await manager.send(pairs[0][0].websocket, b"b")
    await manager.send_personal_message("c", pairs[1][0].websocket)
    await manager.send_personal_message("d", pairs[1][1])
    assert await _received(pairs) == [['{"a":1}', b"b"], ["c", "d"], []]
    assert manager.stats().sends == 4


async def test_send_to_one_that_is_not_here_raises(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    await connection.close(4000, "over")
    for target in (connection, peer.websocket):
        with pytest.raises(ConnectionClosed) as caught:
            await manager.send(target, "late")
        assert (caught.value.code, caught.value.reason) == (4000, "over")
        with pytest.raises(ConnectionClosed):
            await manager.subscribe(target, "a")
        await manager.unsubscribe(target, "a")
    for call in (manager.send, manager.subscribe):
        with pytest.raises(LifecycleError, match=r"await `manager.connect\(websocket\)`"):
            await call(Peer().websocket, "a")
    await manager.unsubscribe(Peer().websocket, "a")
    assert manager.stats().channels == 0


# Order.


async def test_concurrent_senders_never_overlap_on_one_socket(manager: ConnectionManager) -> None:
    peer = Peer(suspends=True)
    connection = await manager.connect(peer.websocket)

    async def broadcasts(name: str) -> None:
        for number in range(50):
            await manager.broadcast(f"{name} {number}")

    async def sends(name: str) -> None:
        for number in range(50):
            await peer.websocket.send_text(f"{name} {number}")

    await asyncio.gather(*(broadcasts(f"b{n}") for n in range(5)), *(sends(f"s{n}") for n in range(5)))
    messages = [str(message) for message in await peer.wait_messages(500)]
    for name in {message.split()[0] for message in messages}:
        assert [m for m in messages if m.startswith(f"{name} ")] == [f"{name} {number}" for number in range(50)]
    assert peer.overlaps == 0
    assert connection.is_open


async def test_recipients_get_the_messages_in_the_same_order(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 5)

    async def broadcasts(name: str) -> None:
        for number in range(200):
            await manager.broadcast(f"{name} {number}")

    await asyncio.gather(*(broadcasts(name) for name in "abc"))
    received = await asyncio.gather(*(peer.wait_messages(600) for peer, _ in pairs))
    assert all(messages == received[0] for messages in received)


# Dead peers.


@pytest.mark.parametrize(
    "error", [OSError("gone"), RuntimeError("closed"), ConnectionResetError(), KeyError("x"), WebSocketDisconnect(1006)]
)
async def test_a_dead_peer_never_makes_a_broadcast_fail(manager: ConnectionManager, error: Exception) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    pairs = await connected(manager, 5)
    dead, connection = pairs[2]
    dead.error = error
    await manager.broadcast("first")
    await manager.broadcast("second")
    await eventually(lambda: ended == [connection])
    await manager.broadcast("third")
    for peer, _ in pairs[:2] + pairs[3:]:
        assert await peer.wait_messages(3) == ["first", "second", "third"]
    assert dead.messages == []
    assert connection not in manager.connections
    assert connection.close_code == 1006
    await turns()
    assert ended == [connection]


async def test_a_crowd_that_vanishes_at_once_leaves_nothing(
    manager: ConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []
    manager.on_disconnect(lambda connection: ended.append(connection.id))
    pairs = await connected(manager, 1000, channels=["a"], user="ada")
    survivors = await connected(manager, 3, channels=["a"])
    await manager.broadcast("before")
    for peer, _ in pairs:
        peer.vanish()
    for number in range(10):
        await manager.broadcast(str(number))
    for peer, _ in survivors:
        assert await peer.wait_messages(11) == ["before", *map(str, range(10))]
    await eventually(lambda: len(ended) == 1000)
    assert set(ended) == {connection.id for _, connection in pairs}
    assert manager.connections == [connection for _, connection in survivors]
    assert manager.stats().users == 0
    assert [record for record in caplog.records if record.name == "wsbroadcast"] == []


async def test_a_server_that_hides_the_peers_end_is_no_error(manager: ConnectionManager) -> None:
    peer = Peer(is_silent=True)
    connection = await manager.connect(peer.websocket)
    peer.leave()
    await manager.broadcast("to nobody")
    await peer.websocket.send_text("to nobody")
    await turns()
    assert connection.is_open  # nobody could know yet
    await connection.wait_closed()
    assert manager.connections == []
    await connection.close()


async def test_the_apps_own_send_to_a_dead_peer_raises_and_removes(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.vanish()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.send_text("hello")
    assert manager.connections == []
    with pytest.raises(WebSocketDisconnect):  # not RuntimeError, which no endpoint catches
        await peer.websocket.receive_text()
    assert connection.close_code == 1006


async def test_the_apps_own_sends_to_a_dead_peer_all_raise_what_an_endpoint_catches(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.stall()
    sends = [asyncio.ensure_future(peer.websocket.send_text("hello")) for _ in range(3)]
    await eventually(lambda: peer.is_stalled)
    peer.vanish()
    peer.resume()
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert all(isinstance(result, WebSocketDisconnect) for result in results), results
    assert not connection.is_open


async def test_the_apps_own_send_that_was_cancelled_finds_the_peer_gone_all_the_same(
    manager: ConnectionManager,
) -> None:
    [(peer, _)] = await connected(manager, 1)
    peer.stall()
    send = asyncio.ensure_future(peer.websocket.send_text("hello"))
    await eventually(lambda: peer.is_stalled)
    send.cancel()
    await asyncio.wait({send})
    peer.vanish()
    peer.resume()
    await eventually(lambda: manager.connections == [])
    for call in (lambda: peer.websocket.send_text("again"), peer.websocket.receive_text):
        with pytest.raises(WebSocketDisconnect):
            await call()


async def test_the_apps_own_mistake_is_the_apps(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    with pytest.raises(RuntimeError, match=r"websocket\.send"):
        await peer.websocket.accept()
    with pytest.raises(TypeError):
        await peer.websocket.send_json({1, 2})
    peer.error = UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
    with pytest.raises(UnicodeEncodeError):
        await peer.websocket.send_text("\ud800")
    peer.error = None
    await manager.broadcast("still here")
    assert await peer.next() == "still here"
    assert connection.is_open


# Hooks, through the manager.


async def test_hooks_see_subscriptions_at_connect_and_at_the_end(manager: ConnectionManager) -> None:
    seen: list[tuple[str, str]] = []
    manager.on_connect(lambda connection: seen.append(("connect", "")))
    manager.on_subscribe(lambda connection, channel: seen.append(("subscribe", channel)))
    manager.on_unsubscribe(lambda connection, channel: seen.append(("unsubscribe", channel)))
    manager.on_disconnect(lambda connection: seen.append(("disconnect", "")))
    [(_, connection)] = await connected(manager, 1, channels=["a", "b"])
    await connection.subscribe("b", "c")
    await connection.unsubscribe("a", "never")
    manager.disconnect(connection)
    await eventually(lambda: ("disconnect", "") in seen)
    assert seen == [
        ("connect", ""),
        ("subscribe", "a"),
        ("subscribe", "b"),
        ("subscribe", "c"),
        ("unsubscribe", "a"),
        ("unsubscribe", "b"),
        ("unsubscribe", "c"),
        ("disconnect", ""),
    ]


async def test_on_disconnect_waits_for_on_connect_to_end(manager: ConnectionManager) -> None:
    seen: list[str] = []
    release = asyncio.Event()

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        await release.wait()
        seen.append("connect")

    manager.on_disconnect(lambda connection: seen.append("disconnect"))
    peer = Peer()
    connecting = asyncio.ensure_future(manager.connect(peer.websocket))
    await eventually(lambda: bool(manager.connections))
    manager.disconnect(peer.websocket)
    await turns()
    assert seen == []
    release.set()
    with pytest.raises(ConnectionClosed):
        await connecting
    await eventually(lambda: seen == ["connect", "disconnect"])


async def test_on_unsubscribe_runs_for_each_channel_whose_on_subscribe_began(manager: ConnectionManager) -> None:
    seen: list[tuple[str, str]] = []
    manager.on_subscribe(lambda connection, channel: seen.append(("subscribe", channel)))
    manager.on_unsubscribe(lambda connection, channel: seen.append(("unsubscribe", channel)))

    @manager.on_subscribe
    def refuse(connection: Connection, channel: str) -> None:
        if channel == "secret":
            raise PermissionDenied("no")

    with pytest.raises(PermissionDenied):
        await manager.connect(Peer().websocket, channels=["a", "secret", "never"])
    await eventually(lambda: len(seen) == 4)
    assert seen[:2] == [("subscribe", "a"), ("subscribe", "secret")]
    assert sorted(seen[2:]) == [("unsubscribe", "a"), ("unsubscribe", "secret")]

    seen.clear()
    connection = await manager.connect(Peer().websocket)
    with pytest.raises(PermissionDenied):
        await connection.subscribe("secret")
    await eventually(lambda: seen == [("subscribe", "secret"), ("unsubscribe", "secret")])
    assert connection.channels == set()


async def test_refused_connection_has_no_on_unsubscribe(manager: ConnectionManager) -> None:
    seen: list[str] = []

    @manager.on_connect
    def refuse(connection: Connection) -> None:
        raise PermissionDenied("no")

    manager.on_unsubscribe(lambda connection, channel: seen.append(channel))
    manager.on_disconnect(lambda connection: seen.append("disconnect"))
    with pytest.raises(PermissionDenied):
        await manager.connect(Peer().websocket, channels=["a"])
    await eventually(lambda: seen != [])
    assert seen == ["disconnect"]


async def test_on_broadcast_runs_once_and_changes_or_vetoes(manager: ConnectionManager) -> None:
    seen: list[tuple[object, Audience]] = []

    @manager.on_broadcast
    async def change(message: Message, audience: Audience) -> object:
        seen.append((message.data, audience))
        return HOLD_BACK if message.data == "secret" else {"was": message.data}

    pairs = await connected(manager, 3)
    await manager.broadcast("hello")
    await manager.broadcast("secret")
    manager.broadcast_nowait("secret")
    assert await _received(pairs) == [['{"was":"hello"}']] * 3
    assert seen == [(text, Audience("everyone")) for text in ("hello", "secret", "secret")]
    assert manager.stats().vetoed == 2


@pytest.mark.parametrize("event", ["on_broadcast", "on_deliver"])
async def test_a_broadcast_hook_that_raises_fails_closed(manager: ConnectionManager, event: str) -> None:
    def fail(*args: object) -> None:
        raise KeyError("broken")

    getattr(manager, event)(fail)
    pairs = await connected(manager, 2)
    for call in (manager.broadcast, manager.broadcast_local):
        with pytest.raises(KeyError, match="broken"):
            await call("hello")
    if event == "on_broadcast":
        with pytest.raises(KeyError, match="broken"):
            manager.broadcast_nowait("hello")
    else:  # it runs later, and the log tells
        manager.broadcast_nowait("hello")
        await eventually(lambda: manager.stats().hook_errors == 3)
    assert await _received(pairs) == [[], []]
    assert manager.stats().hook_errors == 3


@pytest.mark.parametrize("event", ["on_connect", "on_disconnect", "on_message", "on_subscribe", "on_unsubscribe"])
@pytest.mark.parametrize("fault", ["raises", "hangs"])
async def test_an_observer_that_fails_stops_nothing(event: str, fault: str) -> None:
    errors: list[tuple[Exception, str]] = []

    async def fail(*args: object) -> None:
        if fault == "raises":
            raise KeyError("broken")
        await asyncio.Event().wait()

    async with ConnectionManager(hook_timeout=0.02) as manager:
        getattr(manager, event)(fail)
        manager.on_error(lambda error, where: errors.append((error, where)))
        [(peer, connection)] = await connected(manager, 1)
        await connection.subscribe("a")
        await manager.broadcast("hello", channel="a")
        assert await peer.next() == "hello"
        peer.say("back")
        assert await peer.websocket.receive_text() == "back"
        await connection.unsubscribe("a")
        await connection.close()
        await eventually(lambda: len(errors) == 1)
        [(error, where)] = errors
        assert isinstance(error, KeyError if fault == "raises" else TimeoutError)
        assert event in where
        assert manager.stats().hook_errors == 1


async def test_on_deliver_removes_and_replaces(manager: ConnectionManager) -> None:
    [(_, first), (_, second), _] = pairs = await connected(manager, 3)

    @manager.on_deliver
    async def filtered(delivery: Delivery) -> None:
        assert delivery.recipients == [connection for _, connection in pairs]
        delivery.recipients.remove(first)
        delivery.replace(second, {"instead": 1})

    await manager.broadcast("hello")
    assert await _received(pairs) == [[], ['{"instead":1}'], ["hello"]]
    assert (manager.stats().broadcasts, manager.stats().deliveries) == (1, 2)


async def test_on_deliver_adds_nobody_and_doubles_nobody(manager: ConnectionManager) -> None:
    other_manager = ConnectionManager()
    [(inside, a), (excluded, b)] = await connected(manager, 2, channels=["room"])
    [(elsewhere, c), (gone, d)] = await connected(manager, 2)
    [(foreign, e)] = await connected(other_manager, 1, channels=["room"])
    manager.disconnect(d)

    @manager.on_deliver
    def everybody_i_know(delivery: Delivery) -> None:
        assert delivery.recipients == [a]  # who is not excluded
        delivery.recipients += [a, b, c, d, e, a]

    await manager.broadcast("text", channel="room", exclude=b)
    await inside.wait_messages(1)
    await turns()
    assert [peer.messages for peer in (inside, excluded, elsewhere, gone, foreign)] == [["text"], [], [], [], []]
    await other_manager.aclose()


async def test_on_deliver_that_fails_for_one_message_lets_the_next_pass(manager: ConnectionManager) -> None:
    @manager.on_deliver
    async def fail(delivery: Delivery) -> None:
        await asyncio.sleep(0)
        if delivery.message.data == "bad":
            raise KeyError

    [(peer, _)] = await connected(manager, 1)
    results = await asyncio.gather(*(manager.broadcast(m) for m in ("a", "bad", "b")), return_exceptions=True)
    assert [type(result) for result in results] == [Receipt, KeyError, Receipt]
    assert await peer.wait_messages(2) == ["a", "b"]


@pytest.mark.parametrize("event", ["on_connect", "on_message", "on_subscribe", "on_unsubscribe"])
@pytest.mark.parametrize("act", ["broadcast", "disconnect", "close", "subscribe", "send"])
async def test_an_observer_may_act_on_its_own_connection(manager: ConnectionManager, event: str, act: str) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    acted: list[str] = []

    async def hook(connection: Connection, *args: object) -> None:
        if acted:
            return
        acted.append(act)
        if act == "broadcast":
            await manager.broadcast("from the hook")
        elif act == "disconnect":
            manager.disconnect(connection)
        elif act == "close":
            await connection.close(4000)
        elif act == "subscribe":
            await connection.subscribe("more")
        else:
            await connection.send("from the hook")

    [(watching, _)] = await connected(manager, 1)
    getattr(manager, event)(hook)
    peer = Peer()

    async def endpoint() -> None:
        connection = await manager.connect(peer.websocket)
        await connection.subscribe("a")
        await connection.unsubscribe("a")
        await peer.websocket.receive_text()

    task = asyncio.ensure_future(endpoint())
    await peer.wait_for(lambda: peer.accepted is not None)
    peer.say("one")
    await turns(20)
    peer.leave()
    await asyncio.wait({task}, timeout=5)
    # What the endpoint sees is the end, if anything: nothing that its `except WebSocketDisconnect` doesn't catch.
    assert isinstance(task.exception(), WebSocketDisconnect | None)
    assert acted == [act]
    manager.disconnect(peer.websocket)
    await eventually(lambda: len(ended) == 1)
    assert watching.messages == (["from the hook"] if act == "broadcast" else [])
    assert peer.messages == (["from the hook"] if act in ("broadcast", "send") else [])
    assert len(manager.connections) == 1
    assert peer.close_code == (4000 if act == "close" else None)


async def test_on_disconnect_may_broadcast_disconnect_and_close(manager: ConnectionManager) -> None:
    @manager.on_disconnect
    async def goodbye(connection: Connection) -> None:
        manager.disconnect(connection)
        await connection.close()
        await manager.broadcast(f"{connection.user} left")

    [(peer, _)] = await connected(manager, 1)
    [(_, leaving)] = await connected(manager, 1, user="ada")
    await leaving.close()
    assert await peer.next() == "ada left"


async def test_broadcast_hooks_may_broadcast_and_close(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    [(doomed, doomed_connection)] = await connected(manager, 1)

    @manager.on_broadcast
    async def audit(message: Message, audience: Audience) -> Message:
        if audience.kind == "everyone":
            await manager.broadcast("audit", channel="audit")
        return message

    @manager.on_deliver
    async def close_one(delivery: Delivery) -> None:
        if delivery.message.data == "close":
            await manager.broadcast_local("from on_deliver")
            await doomed_connection.close(4000)

    await connection.subscribe("audit")
    await asyncio.wait_for(manager.broadcast("close"), 5)
    assert await peer.wait_messages(4) == ["audit", "audit", "from on_deliver", "close"]
    assert await doomed.wait_close() == 4000
    assert doomed.messages == ["from on_deliver"]


@pytest.mark.parametrize("event", ["on_broadcast", "on_deliver"])
async def test_a_hook_that_answers_its_own_broadcasts_is_stopped(manager: ConnectionManager, event: str) -> None:
    calls: list[int] = []

    async def echo(*args: object) -> object:
        calls.append(1)
        await manager.broadcast("echo")
        return args[0]

    getattr(manager, event)(echo)
    pairs = await connected(manager, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"an {event} hook broadcasts from within itself"):
            await asyncio.wait_for(manager.broadcast("hello"), 5)
        calls.append(0)
    assert 2 <= calls.index(0) <= 16
    assert calls == 2 * calls[: calls.index(0) + 1]  # what the first one used was given back
    assert await _received(pairs) == [[]]


async def test_a_hook_that_blocks_the_loop_is_named_and_evicts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def block(connection: Connection) -> None:
        time.sleep(0.6)  # the mistake it is about; longer than the timeout below, several times over

    async with ConnectionManager(slow_consumer=SlowConsumer(send_timeout=0.2, close_timeout=0.1)) as manager:
        pairs = await connected(manager, 3)
        for peer, _ in pairs:
            peer.stall()
        await manager.broadcast("held")
        manager.hooks.blocked_seconds = 0.5
        manager.on_connect(block)
        late = Peer()
        await manager.connect(late.websocket)
        for peer, _ in pairs:
            peer.resume()
        for peer, _ in pairs:
            assert await peer.next() == "held"
        assert manager.stats().evicted == {}
        assert len(manager.connections) == 4
    assert any("block" in r.getMessage() and "blocked the event loop" in r.getMessage() for r in caplog.records)


async def test_connect_can_be_mocked_by_its_signature() -> None:
    mock = create_autospec(ConnectionManager, instance=True)
    await mock.connect("websocket", user=1, channels=["a"], info={}, expires_at=None)
    with pytest.raises(TypeError):
        mock.connect("websocket", nonsense=1)


@pytest.mark.parametrize("function", [None, "text", 1])
def test_hook_that_cannot_be_called_is_refused(function: Any) -> None:
    with pytest.raises(ConfigurationError, match="the hook for on_message is a function, not"):
        ConnectionManager().on_message(function)
