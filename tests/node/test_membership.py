"""Every way in and every way out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest
from starlette.websockets import WebSocketDisconnect, WebSocketState

from tests.support.asgi import Peer, cancel_at, connected, eventually, turns
from tests.support.fast import WebSocketsSansIOProtocol
from wsbroadcast import (
    CloseCode,
    Connection,
    ConnectionClosed,
    ConnectionManager,
    ConnectionState,
    InvalidChannel,
    LifecycleError,
    Limits,
    PermissionDenied,
    SlowConsumer,
)

# Connecting.


async def test_connect_accepts_and_registers(manager: ConnectionManager) -> None:
    peer = Peer(subprotocols=["chat"])
    connection = await manager.connect(
        peer.websocket,
        user=7,
        channels=["news", "sport", "news"],
        info={"name": "Ada"},
        subprotocol="chat",
        headers=[(b"x-node", b"1")],
    )
    assert peer.accepted == {"type": "websocket.accept", "subprotocol": "chat", "headers": [(b"x-node", b"1")]}
    assert manager.connections == [connection]
    assert manager.active_connections == [peer.websocket]
    assert connection.websocket is peer.websocket
    assert connection.manager is manager
    assert connection.user == 7
    assert connection.info == {"name": "Ada"}
    assert connection.channels == {"news", "sport"}
    assert connection.state is ConnectionState.OPEN
    assert connection.is_open
    assert connection.close_code is None
    stats = manager.stats()
    assert (stats.connections, stats.users, stats.channels, stats.connects) == (1, 1, 2, 1)


async def test_connections_are_listed_in_the_order_in_which_they_came(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 20)
    assert manager.connections == [connection for _, connection in pairs]
    assert manager.active_connections == [peer.websocket for peer, _ in pairs]


async def test_connect_leaves_an_accepted_socket_accepted(manager: ConnectionManager) -> None:
    peer = Peer()
    await peer.websocket.accept("chosen")
    await manager.connect(peer.websocket, subprotocol="ignored")
    assert [event["type"] for event in peer.sent] == ["websocket.accept"]
    await manager.broadcast("hello")
    assert await peer.next() == "hello"


async def test_connect_takes_a_lone_str_as_one_channel(manager: ConnectionManager) -> None:
    connection = await manager.connect(Peer().websocket, channels="news")
    assert connection.channels == {"news"}


@pytest.mark.parametrize("user", ["ada", 5, UUID(int=1)])
async def test_connect_keeps_the_user_as_it_was_given(manager: ConnectionManager, user: Any) -> None:
    connection = await manager.connect(Peer().websocket, user=user)
    assert connection.user is user
    assert connection._user_key == str(user)


async def test_connect_twice_returns_the_same_connection_and_subscribes_it(manager: ConnectionManager) -> None:
    peer = Peer()
    first = await manager.connect(peer.websocket, user="ada", channels=["a"])
    second = await manager.connect(peer.websocket, channels=["b"])
    assert first is second
    assert first.channels == {"a", "b"}
    assert first.user == "ada"
    await manager.broadcast("once")
    await manager.broadcast("b", channel="b")
    assert await peer.wait_messages(2) == ["once", "b"]
    assert manager.stats().connects == 1


@pytest.mark.parametrize("user", ["ada", None])
async def test_connected_socket_does_not_become_another_users(manager: ConnectionManager, user: str | None) -> None:
    connection = await manager.connect(Peer().websocket, user=user, channels=["a"])
    with pytest.raises(ValueError, match="connected already, as another user or without one"):
        await manager.connect(connection.websocket, user="bob", channels=["b"])
    assert connection.user == user
    assert connection.channels == {"a"}
    assert connection.is_open


async def test_connected_socket_expires_when_it_is_said_later(manager: ConnectionManager) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket, user=5)
    assert await manager.connect(peer.websocket, user="5", expires_at=2**33) is connection
    assert connection.expires_at == 2**33
    await manager.connect(peer.websocket)
    assert connection.expires_at == 2**33
    await manager.connect(peer.websocket, expires_at=0)
    assert await peer.wait_close() == 4401


async def test_connect_by_two_tasks_at_once_registers_the_socket_once() -> None:
    async with ConnectionManager(limits=Limits(max_connections=2)) as manager:
        peer = Peer(suspends=True)
        await peer.websocket.receive()  # the handshake event, which only one of them could read
        first, second = await asyncio.gather(
            manager.connect(peer.websocket, channels=["a"]), manager.connect(peer.websocket, channels=["b"])
        )
        assert first is second
        assert first.channels == {"a", "b"}
        assert manager.connections == [first]
        await connected(manager, 1)  # the place that the other task took is free


async def test_connect_again_after_disconnect_makes_a_new_connection(manager: ConnectionManager) -> None:
    seen: list[Any] = []
    manager.on_message(lambda connection, message: seen.append((connection, message)))
    peer = Peer()
    first = await manager.connect(peer.websocket, channels=["a"])
    await manager.broadcast("to the first")
    manager.disconnect(peer.websocket)
    await manager.broadcast("to nobody")
    second = await manager.connect(peer.websocket)
    assert second is not first
    await manager.broadcast("to the second")
    assert await peer.wait_messages(2) == ["to the first", "to the second"]
    peer.say("hello")
    assert await peer.websocket.receive_text() == "hello"
    assert seen == [(second, "hello")]
    assert manager.stats().connections == 1
    assert manager.stats().channels == 0
    peer.leave()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.receive_text()
    assert manager.connections == []


@pytest.mark.parametrize(
    "channels", [[""], ["a" * 5000], ["a", "b\n"], [None], ["\x00"], ["\ud800"], b"news", [b"news"]]
)
async def test_connect_with_an_invalid_channel_accepts_nothing(manager: ConnectionManager, channels: Any) -> None:
    peer = Peer()
    with pytest.raises(InvalidChannel):
        await manager.connect(peer.websocket, channels=channels)
    assert peer.sent == []
    assert manager.connections == []
    assert manager.stats().channels == 0


@pytest.mark.parametrize("user", ["", object(), True, 1.5, b"ada", "a" * 5000, "a\x07", "\ud800"])
async def test_connect_with_an_invalid_user_accepts_nothing(manager: ConnectionManager, user: Any) -> None:
    peer = Peer()
    with pytest.raises(ValueError, match="user"):
        await manager.connect(peer.websocket, user=user)
    assert peer.sent == []
    assert manager.connections == []


@pytest.mark.parametrize("by_app", [True, False])
async def test_connect_on_a_socket_that_has_ended_raises(manager: ConnectionManager, by_app: bool) -> None:
    peer = Peer()
    await peer.websocket.accept()
    if by_app:
        await peer.websocket.close()
    else:
        peer.leave()
        await peer.websocket.receive()
    with pytest.raises(ConnectionClosed):
        await manager.connect(peer.websocket)
    assert manager.connections == []


async def test_connect_on_a_connection_that_was_closed_raises_with_its_code(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    await manager.close(connection, 4001, "enough")
    with pytest.raises(ConnectionClosed) as caught:
        await manager.connect(peer.websocket)
    assert (caught.value.code, caught.value.reason) == (4001, "enough")


async def test_connect_on_a_connection_that_is_being_closed_raises(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    closing = asyncio.ensure_future(manager.close(connection, 4001))
    await asyncio.sleep(0)
    with pytest.raises(ConnectionClosed):
        await manager.connect(peer.websocket)
    await closing
    assert manager.connections == []


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("gone")])
async def test_connect_fails_when_the_peer_leaves_during_the_handshake(error: Exception) -> None:
    async with ConnectionManager(limits=Limits(max_connections=1)) as manager:
        peer = Peer()
        peer.error = error
        with pytest.raises(ConnectionClosed):
            await manager.connect(peer.websocket)
        assert manager.connections == []
        await connected(manager, 1)  # its place is free


async def test_connect_fails_when_the_disconnect_comes_first(manager: ConnectionManager) -> None:
    peer = Peer()
    await peer.receive()
    peer.leave()
    with pytest.raises(ConnectionClosed):
        await manager.connect(peer.websocket)
    assert manager.connections == []


async def test_connect_as_a_context_manager_removes_on_the_way_out(manager: ConnectionManager) -> None:
    peer = Peer()
    async with manager.connect(peer.websocket, channels=["a"]) as connection:
        assert manager.connections == [connection]
        await manager.broadcast("last")
    assert manager.connections == []
    assert peer.messages == ["last"]
    assert peer.close is None  # removed, not closed


async def test_connect_as_a_context_manager_removes_when_the_block_raises(manager: ConnectionManager) -> None:
    peer = Peer()
    with pytest.raises(KeyError):
        async with manager.connect(peer.websocket):
            raise KeyError
    assert manager.connections == []


async def test_connect_to_two_managers_keeps_the_order_of_both(manager: ConnectionManager) -> None:
    peer = Peer()
    async with ConnectionManager() as other:
        await manager.connect(peer.websocket)
        await other.connect(peer.websocket)
        expected = []
        for number in range(0, 30, 3):
            await manager.broadcast(f"{number}")
            await other.broadcast(f"{number + 1}")
            await peer.websocket.send_text(f"{number + 2}")
            expected += [f"{number}", f"{number + 1}", f"{number + 2}"]
        # Each manager keeps its own order and lets nothing of the app's overtake it.
        messages = await peer.wait_messages(30)
        assert sorted(map(int, map(str, messages))) == list(range(30))
        assert [m for m in messages if int(m) % 3 != 1] == [m for m in expected if int(m) % 3 != 1]
        assert [m for m in messages if int(m) % 3 != 0] == [m for m in expected if int(m) % 3 != 0]
        assert peer.overlaps == 0
        peer.leave()
        with pytest.raises(WebSocketDisconnect):
            await peer.websocket.receive_text()
        assert other.connections == []
    assert manager.connections == []


# A hook that refuses.


async def test_connect_refused_by_a_hook_closes_with_1008(manager: ConnectionManager) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)

    @manager.on_connect
    async def refuse(connection: Connection) -> None:
        raise PermissionDenied("not today")

    peer = Peer()
    with pytest.raises(PermissionDenied, match="not today"):
        await manager.connect(peer.websocket, channels=["a"], user=1)
    assert peer.close == {"type": "websocket.close", "code": 1008, "reason": "not today"}
    assert manager.connections == []
    assert (manager.stats().channels, manager.stats().users) == (0, 0)
    await eventually(lambda: len(ended) == 1)
    await turns()
    assert len(ended) == 1


async def test_subscribe_refused_by_a_hook_leaves_that_channel_and_the_rest_out(manager: ConnectionManager) -> None:
    asked: list[str] = []

    @manager.on_subscribe
    async def refuse(connection: Connection, channel: str) -> None:
        asked.append(channel)
        if channel == "secret":
            raise PermissionDenied(channel)

    [(peer, connection)] = await connected(manager, 1)
    with pytest.raises(PermissionDenied):
        await connection.subscribe("open", "secret", "later")
    await connection.subscribe("open")  # which it is in
    assert asked == ["open", "secret"]
    assert connection.channels == {"open"}
    assert manager.stats().channels == 1
    await manager.broadcast("no", channel="secret")
    await manager.broadcast("yes", channel="open")
    assert await peer.next() == "yes"


# Cancelled at any await.


def _hooked(manager: ConnectionManager, seen: list[str]) -> None:
    """Add hooks that suspend, and that say when they begin."""

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        seen.append("connect")
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        seen.append("disconnect")
        await asyncio.sleep(0)

    @manager.on_subscribe
    async def on_subscribe(connection: Connection, channel: str) -> None:
        await asyncio.sleep(0)

    @manager.on_unsubscribe
    async def on_unsubscribe(connection: Connection, channel: str) -> None:
        await asyncio.sleep(0)


async def _at_every_await(attempt: Callable[[int], Awaitable[bool]]) -> int:
    """Call with 1, 2, 3, … until the thing doesn't wait that often; return how often it waits."""
    for step in range(1, 200):
        if not await attempt(step):
            return step - 1
    raise AssertionError("it never ends")


async def test_connect_cancelled_at_any_await_registers_nothing() -> None:
    async def attempt(step: int) -> bool:
        seen: list[str] = []
        async with ConnectionManager() as manager:
            _hooked(manager, seen)
            peer = Peer(suspends=True)
            if not await cancel_at(step, manager.connect(peer.websocket, user=1, channels=["a", "b"])):
                return False
            stats = manager.stats()
            assert (stats.connections, stats.channels, stats.users) == (0, 0, 0)
            assert stats.connects == stats.disconnects
            await eventually(lambda: seen.count("connect") == seen.count("disconnect"))
            # The socket itself is none of its business: it can still be used.
            if peer.accepted is not None:
                await peer.websocket.send_text("still here")
                assert await peer.next() == "still here"
        assert seen.count("connect") == seen.count("disconnect") <= 1
        return True

    assert await _at_every_await(attempt) >= 6  # receive, send, two of on_connect, two of on_subscribe


async def test_connect_in_a_block_cancelled_at_any_await_registers_nothing() -> None:
    async def block(manager: ConnectionManager, peer: Peer) -> None:
        async with manager.connect(peer.websocket, channels=["a"]):
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def attempt(step: int) -> bool:
        seen: list[str] = []
        async with ConnectionManager() as manager:
            _hooked(manager, seen)
            waited = await cancel_at(step, block(manager, Peer(suspends=True)))
            assert manager.connections == []
            assert manager.stats().channels == 0
        assert seen.count("connect") == seen.count("disconnect")
        return waited

    assert await _at_every_await(attempt) >= 7


async def test_subscribe_cancelled_at_any_await_half_registers_nothing() -> None:
    async def attempt(step: int) -> bool:
        async with ConnectionManager() as manager:
            _hooked(manager, [])
            peer = Peer()
            connection = await manager.connect(peer.websocket)
            waited = await cancel_at(step, manager.subscribe(connection, "a", "b", "c"))
            # What it says and who gets a broadcast agree.
            for channel in ("a", "b", "c"):
                await manager.broadcast(channel, channel=channel)
            await manager.broadcast("end")
            messages = await peer.wait_messages(len(connection.channels) + 1)
            assert messages == [*sorted(connection.channels), "end"]
            assert manager.stats().channels == len(connection.channels) == min(step - 1, 3)
        return waited

    assert await _at_every_await(attempt) == 3


async def test_unsubscribe_cancelled_at_any_await_half_registers_nothing() -> None:
    async def attempt(step: int) -> bool:
        async with ConnectionManager() as manager:
            _hooked(manager, [])
            connection = await manager.connect(Peer().websocket, channels=["a", "b"])
            waited = await cancel_at(step, manager.unsubscribe(connection, "a", "b"))
            assert manager.stats().channels == len(connection.channels)
        return waited

    assert await _at_every_await(attempt) == 2


async def test_broadcast_cancelled_at_any_await_reaches_all_or_nobody() -> None:
    async def attempt(step: int) -> bool:
        async with ConnectionManager() as manager:

            @manager.on_broadcast
            async def on_broadcast(message: object, audience: object) -> object:
                await asyncio.sleep(0)
                return message

            @manager.on_deliver
            async def on_deliver(delivery: object) -> None:
                await asyncio.sleep(0)

            pairs = await connected(manager, 3)
            waited = await cancel_at(step, manager.broadcast("first"))
            await manager.broadcast("second")  # no lock was left behind
            expected = ["second"] if waited else ["first", "second"]
            for peer, _ in pairs:
                assert await peer.wait_messages(len(expected)) == expected
        return waited

    assert await _at_every_await(attempt) == 2


async def test_send_cancelled_while_it_waits_sends_nothing() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=8)) as manager:
        [(peer, connection)] = await connected(manager, 1)
        peer.stall()
        while manager.stats().behind == 0:
            await connection.send("held")
            await turns()
        task = asyncio.ensure_future(connection.send("cancelled"))
        await turns()
        assert not task.done()
        task.cancel()
        await asyncio.wait({task})
        peer.resume()
        await connection.send("end")
        await peer.wait_for(lambda: "end" in peer.messages)
        assert "cancelled" not in peer.messages


async def test_close_cancelled_at_any_await_closes_all_the_same() -> None:
    async def attempt(step: int) -> bool:
        async with ConnectionManager() as manager:
            peer = Peer(suspends=True)  # else a task that starts eagerly closes without waiting
            connection = await manager.connect(peer.websocket)
            await manager.broadcast("before")
            waited = await cancel_at(step, manager.close(connection, 4000))
            await connection.close()
            assert connection.state is ConnectionState.CLOSED
            assert peer.messages == ["before"]
            assert peer.close_code == 4000
        return waited

    assert await _at_every_await(attempt) >= 1


# Leaving.


async def test_disconnect_is_synchronous_and_idempotent(manager: ConnectionManager) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    [(peer, connection)] = await connected(manager, 1, channels=["a"], user="ada")
    manager.disconnect(peer.websocket)
    assert manager.connections == []
    manager.disconnect(peer.websocket)
    manager.disconnect(connection)
    assert connection.state is ConnectionState.CLOSED
    assert connection.close_code == 1006
    assert connection.channels == {"a"}  # those it was in
    stats = manager.stats()
    assert (stats.connections, stats.channels, stats.users, stats.disconnects) == (0, 0, 0, 1)
    await eventually(lambda: bool(ended))
    await turns()
    assert ended == [connection]
    assert peer.close is None


async def test_disconnect_of_an_unknown_socket_does_nothing(manager: ConnectionManager) -> None:
    async with ConnectionManager() as other:
        [(peer, connection)] = await connected(other, 1)
        manager.disconnect(Peer().websocket)
        manager.disconnect(peer.websocket)
        manager.disconnect(connection)
        assert other.connections == [connection]


async def test_disconnect_during_a_broadcast_hurts_nobody(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 10)

    @manager.on_deliver
    async def leave(delivery: object) -> None:
        for _, connection in pairs[::2]:
            manager.disconnect(connection)
        await asyncio.sleep(0)
        manager.disconnect(pairs[1][1])

    await manager.broadcast("hello")
    for peer, _ in pairs[3::2]:
        assert await peer.next() == "hello"
    await turns()
    assert [peer.messages for peer, _ in pairs[::2]] == [[]] * 5
    assert pairs[1][0].messages == []
    assert len(manager.connections) == 4


async def test_disconnect_lets_out_what_was_broadcast_before(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    await manager.broadcast("before")
    manager.disconnect(connection)
    await manager.broadcast("after")
    assert await peer.next() == "before"
    await turns()
    assert peer.messages == ["before"]


@pytest.mark.parametrize("way", ["disconnect", "unsubscribe"])
async def test_who_leaves_wakes_a_broadcaster_that_waits_for_the_crowd(way: str) -> None:
    options = SlowConsumer(max_backlog_messages=8, send_timeout=60)
    async with ConnectionManager(slow_consumer=options) as manager:
        [(peer, connection)] = await connected(manager, 1, channels=["a"])
        peer.stall()
        while manager.stats().behind == 0:
            manager.broadcast_nowait("held", channel="a")
            await turns()
        task = asyncio.ensure_future(manager.broadcast("waits", channel="a"))
        await turns()
        assert not task.done()
        if way == "disconnect":
            manager.disconnect(connection)
        else:
            await connection.unsubscribe("a")
        await turns()
        assert task.done()  # without waiting for the next look
        peer.resume()


async def _about_to_be_evicted(manager: ConnectionManager) -> tuple[Peer, Connection]:
    """Return a connection whose backlog is full, with one message more handed over but not delivered yet."""
    [(peer, connection)] = await connected(manager, 1, channels=["a"])
    peer.stall()
    manager.broadcast_nowait("in flight")
    await eventually(lambda: peer.is_stalled)
    for _ in range(16):
        manager.broadcast_nowait("held")
    await turns()
    assert manager.stats().backlog_messages == 16
    manager.broadcast_nowait("one too many")
    return peer, connection


async def test_subscribe_of_one_that_is_evicted_by_what_was_handed_over_before_leaves_nothing() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=16, close_timeout=0.05)) as manager:
        peer, connection = await _about_to_be_evicted(manager)
        with pytest.raises(ConnectionClosed):
            await connection.subscribe("b")
        assert manager.stats().evicted == {"backlog_full": 1}
        assert manager.stats().channels == 0
        peer.resume()


@pytest.mark.parametrize("way", ["aclose", "close", "disconnect", "apps own close"])
async def test_the_end_of_one_that_is_evicted_by_what_was_handed_over_before_comes_once(way: str) -> None:
    ended: list[Connection] = []
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=16, close_timeout=5)) as manager:
        manager.on_disconnect(ended.append)
        peer, connection = await _about_to_be_evicted(manager)
        match way:
            case "aclose":
                ending = asyncio.ensure_future(manager.aclose())
            case "close":
                ending = asyncio.ensure_future(connection.close())
            case "disconnect":
                manager.disconnect(connection)
                ending = asyncio.ensure_future(asyncio.sleep(0))
            case _:
                ending = asyncio.ensure_future(peer.websocket.close())
        await turns()
        assert connection.close_code == 1013
        peer.resume()
        await asyncio.wait_for(ending, 5)
        assert await peer.wait_close() == 1013
        assert peer.messages == ["in flight"]
        await eventually(lambda: bool(ended))
        await turns()
        assert ended == [connection]
        assert [event["type"] for event in peer.sent].count("websocket.close") == 1


async def test_unsubscribe_of_one_that_is_evicted_by_what_was_handed_over_before_is_told_once() -> None:
    seen: list[str] = []
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=16, close_timeout=0.05)) as manager:
        manager.on_unsubscribe(lambda connection, channel: seen.append(channel))
        peer, connection = await _about_to_be_evicted(manager)
        await connection.unsubscribe("a")
        assert manager.stats().evicted == {"backlog_full": 1}
        await eventually(lambda: bool(seen))
        await turns()
        assert seen == ["a"]
        peer.resume()


@pytest.mark.parametrize("is_read", [False, True])
async def test_socket_that_is_gone_is_noticed_at_the_second_look_unless_it_is_read(
    manager: ConnectionManager, is_read: bool
) -> None:
    protocol = WebSocketsSansIOProtocol()
    connection = await manager.connect(protocol.websocket)
    reading = asyncio.ensure_future(connection.receive() if is_read else asyncio.sleep(0))
    await turns()
    membership = manager._core.life.node.membership
    protocol.transport.closing = True
    membership._look_around()
    assert connection.is_open  # its endpoint may be about to read
    membership._look_around()
    assert connection.is_open is is_read
    reading.cancel()


# Closing.


async def test_close_loses_nothing_to_a_peer_that_takes_its_time(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.stall()
    for number in range(10):
        await manager.broadcast(str(number))
    closing = asyncio.ensure_future(connection.close())
    await turns()
    assert connection.state is ConnectionState.CLOSING
    assert manager.connections == []
    connection._sink.owner.evict("send_timeout")  # too late: the close has a timeout of its own
    peer.resume()
    await closing
    assert len(peer.messages) == 10
    assert peer.close_code == 1000


async def test_close_is_idempotent(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    await connection.close(4000)
    await connection.close(4001)
    await manager.close(peer.websocket, 4002)
    manager.disconnect(connection)
    assert [event["code"] for event in peer.sent if event["type"] == "websocket.close"] == [4000]
    assert connection.close_code == 4000


async def test_close_by_several_tasks_at_once_closes_once(manager: ConnectionManager) -> None:
    peer = Peer(suspends=True)
    attempts: list[int] = []
    take = peer.send

    async def send(event: Any) -> None:
        attempts.extend([event["code"]] if event["type"] == "websocket.close" else [])
        await take(event)

    peer.websocket._send = send
    connection = await manager.connect(peer.websocket)
    await asyncio.gather(*(connection.close(4000 + number) for number in range(5)))
    assert attempts == [4000]
    assert peer.overlaps == 0


async def test_close_of_an_unknown_socket_leaves_it_alone(manager: ConnectionManager) -> None:
    peer = Peer()
    await peer.websocket.accept()
    await manager.close(peer.websocket)
    assert peer.close is None
    assert peer.websocket.application_state is WebSocketState.CONNECTED


async def test_close_after_disconnect_closes_the_socket(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    manager.disconnect(connection)
    await manager.close(connection, 4000)
    assert peer.close_code == 4000


async def test_close_after_the_peer_has_left_does_nothing(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    peer.leave(4444, "bye")
    await connection.wait_closed()
    await connection.close(4000)
    assert (connection.close_code, connection.close_reason) == (4444, "bye")


async def test_close_gives_up_a_peer_that_takes_nothing() -> None:
    options = SlowConsumer(close_timeout=0.05)
    async with ConnectionManager(slow_consumer=options) as manager:
        [(peer, connection)] = await connected(manager, 1)
        peer.stall()
        await manager.broadcast("held")
        await asyncio.wait_for(connection.close(), 2)
        await asyncio.wait_for(connection.close(), 2)
        assert connection.state is ConnectionState.CLOSED
        assert manager.stats().backlog_messages == 0
        assert peer.sent[-1]["type"] == "websocket.accept"
        peer.resume()
        await turns()
        assert peer.sent[-1]["type"] == "websocket.accept"  # nothing is ever written after a write that was cut off


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, -1])
async def test_close_with_a_code_that_no_frame_may_carry_raises(manager: ConnectionManager, code: int) -> None:
    [(peer, connection)] = await connected(manager, 1)
    with pytest.raises(ValueError, match=str(code)):
        await connection.close(code)
    assert connection.is_open
    assert peer.close is None


@pytest.mark.parametrize(
    ("refuses", "sent"), [({1013}, 4013), ({1013, 4013}, 1000), ({1013, 4013, 1000}, None), ({4013}, 1013)]
)
async def test_close_falls_back_where_the_server_refuses_a_code(
    manager: ConnectionManager, refuses: set[int], sent: int | None
) -> None:
    peer = Peer(refuses=refuses)
    connection = await manager.connect(peer.websocket)
    await connection.close(1013)
    assert peer.close_code == sent
    assert connection.state is ConnectionState.CLOSED
    assert connection.close_code == 1013


@pytest.mark.parametrize(
    ("code", "refuses", "sent"), [(1008, {1008}, 4008), (1008, {1008, 4008}, 1000), (CloseCode.NORMAL, set(), 1000)]
)
async def test_close_of_the_app_falls_back_too(
    manager: ConnectionManager, code: int, refuses: set[int], sent: int
) -> None:
    peer = Peer(refuses=refuses)
    connection = await manager.connect(peer.websocket)
    await peer.websocket.close(code, "why")
    assert peer.end == (sent, "why")
    assert peer.close is not None
    assert type(peer.close["code"]) is int  # daphne takes no IntEnum
    assert peer.websocket.application_state is WebSocketState.DISCONNECTED
    assert (connection.state, connection.close_code) == (ConnectionState.CLOSED, code)


async def test_close_of_the_app_is_tried_once_if_the_peer_is_gone(manager: ConnectionManager) -> None:
    peer = Peer()
    await manager.connect(peer.websocket)
    peer.vanish()
    with pytest.raises(WebSocketDisconnect):
        await peer.websocket.close(1008)
    assert manager.connections == []


async def test_close_of_the_app_with_a_code_that_no_frame_carries_is_its_error(manager: ConnectionManager) -> None:
    peer = Peer(refuses={1005})
    await manager.connect(peer.websocket)
    with pytest.raises(ValueError, match="invalid close code"):
        await peer.websocket.close(1005)


@pytest.mark.parametrize(
    ("reason", "sent"),
    [
        ("x" * 123, "x" * 123),
        ("x" * 124, "x" * 123),
        ("ä" * 100, "ä" * 61),
        ("x" + "😀" * 100, "x" + "😀" * 30),
        ("a\ud800b", "a?b"),
        ("", ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("is_apps", [False, True])
async def test_close_cuts_a_long_reason_at_a_character_border(
    manager: ConnectionManager, reason: Any, sent: str, is_apps: bool
) -> None:
    [(peer, connection)] = await connected(manager, 1)
    await (peer.websocket if is_apps else connection).close(4000, reason)
    assert peer.close == {"type": "websocket.close", "code": 4000, "reason": sent}


# The app's own close.


async def test_the_apps_own_close_removes_the_connection(manager: ConnectionManager) -> None:
    ended: list[Connection] = []
    manager.on_disconnect(ended.append)
    [(peer, connection)] = await connected(manager, 1)
    await manager.broadcast("before")
    await peer.websocket.close(4005, "mine")
    assert peer.messages == ["before"]
    assert peer.close == {"type": "websocket.close", "code": 4005, "reason": "mine"}
    assert connection.state is ConnectionState.CLOSED
    assert (connection.close_code, connection.close_reason) == (4005, "mine")
    assert manager.connections == []
    await eventually(lambda: ended == [connection])


async def test_the_apps_own_close_towards_a_peer_that_takes_nothing_ends_within_the_send_timeout() -> None:
    options = SlowConsumer(send_timeout=0.1, close_timeout=0.05)
    async with ConnectionManager(slow_consumer=options) as manager:
        [(peer, connection)] = await connected(manager, 1)
        peer.stall()
        await manager.broadcast("held")
        await asyncio.wait_for(peer.websocket.close(), 2)
        assert connection.state is ConnectionState.CLOSED
        peer.resume()


async def test_the_apps_own_send_after_a_close_raises_what_its_except_clause_catches(
    manager: ConnectionManager,
) -> None:
    [(peer, connection)] = await connected(manager, 1)
    await connection.close(4000, "over")
    with pytest.raises(WebSocketDisconnect) as caught:
        await peer.websocket.send_text("late")
    assert (caught.value.code, caught.value.reason) == (4000, "over")


async def test_nothing_follows_a_close_of_the_same_turn(manager: ConnectionManager) -> None:
    [(peer, connection)] = await connected(manager, 1)
    closing = asyncio.ensure_future(connection.close())
    await asyncio.sleep(0)
    with pytest.raises(ConnectionClosed):
        await peer.websocket.send_text("late")
    with pytest.raises(ConnectionClosed):
        await connection.send("late")
    await manager.broadcast("late")
    await closing
    assert [event["type"] for event in peer.sent] == ["websocket.accept", "websocket.close"]


# After the manager's end.


async def test_connect_while_the_manager_closes_is_refused() -> None:
    manager = ConnectionManager()
    await manager.start()
    latecomer = Peer()
    errors: list[BaseException] = []

    @manager.on_disconnect
    async def reconnect(connection: Connection) -> None:
        try:
            await manager.connect(latecomer.websocket)
        except LifecycleError as error:
            errors.append(error)

    await connected(manager, 1)
    await manager.aclose()
    assert len(errors) == 1
    assert latecomer.sent == []
    assert manager.connections == []


async def test_connect_that_is_still_accepting_when_the_manager_closes_registers_nothing() -> None:
    manager = ConnectionManager()
    await manager.start()
    peer = Peer()
    peer.stall()
    connecting = asyncio.ensure_future(manager.connect(peer.websocket))
    await turns()
    await manager.aclose()
    peer.resume()
    with pytest.raises(LifecycleError):
        await connecting
    assert manager.stats().connects == 0


async def test_socket_is_found_though_the_app_wraps_its_send(manager: ConnectionManager) -> None:
    [(peer, connection), (other, _)] = await connected(manager, 2)
    send = peer.websocket.send

    async def logging_send(message: Any) -> None:
        await send(message)

    peer.websocket.send = logging_send  # type: ignore[method-assign]
    await manager.broadcast("to the others", exclude=peer.websocket)
    await eventually(lambda: other.messages == ["to the others"])
    assert peer.messages == []
    manager.disconnect(peer.websocket)
    assert not connection.is_open


async def test_socket_can_be_connected_again_and_again(manager: ConnectionManager) -> None:
    peer = Peer()
    for _ in range(2000):  # no frame deeper each time
        await manager.connect(peer.websocket)
        manager.disconnect(peer.websocket)
    connection = await manager.connect(peer.websocket)
    assert (
        connection._transport.fast_path_refused == "receive is wrapped"
        or connection._transport.fast_path_refused.startswith("server")
    )
    await manager.broadcast("hello")
    await eventually(lambda: peer.messages == ["hello"])


async def test_on_unsubscribe_waits_for_on_subscribe_to_end(manager: ConnectionManager) -> None:
    seen: list[str] = []
    release = asyncio.Event()

    @manager.on_subscribe
    async def insert(connection: Connection, channel: str) -> None:
        await release.wait()
        seen.append("inserted")

    manager.on_unsubscribe(lambda connection, channel: seen.append("deleted"))
    [(_, connection)] = await connected(manager, 1)
    subscribing = asyncio.ensure_future(connection.subscribe("a"))
    await turns()
    manager.disconnect(connection)
    await turns()
    release.set()
    with pytest.raises(ConnectionClosed):
        await subscribing
    await eventually(lambda: seen == ["inserted", "deleted"])


async def test_end_is_told_after_a_user_has_left_all_its_channels(manager: ConnectionManager) -> None:
    seen: list[str] = []

    @manager.on_unsubscribe
    async def on_unsubscribe(connection: Connection, channel: str) -> None:
        await turns()
        seen.append(channel)

    manager.on_disconnect(lambda connection: seen.append("ended"))
    [(_, connection)] = await connected(manager, 1, user="ann", channels=["a", "b", "c"])
    await manager.unsubscribe_user("ann", "a", "b")
    manager.disconnect(connection)
    await eventually(lambda: "ended" in seen)
    assert seen == ["a", "b", "c", "ended"]


@pytest.mark.parametrize("why", ["unsubscribed", "refused"])
async def test_end_is_told_when_hooks_know_that_the_connection_has_left_its_channel(
    why: str, manager: ConnectionManager
) -> None:
    seen: list[str] = []
    release = asyncio.Event()

    @manager.on_subscribe
    async def on_subscribe(connection: Connection, channel: str) -> None:
        if why == "refused":
            raise PermissionDenied("no")

    @manager.on_unsubscribe
    async def on_unsubscribe(connection: Connection, channel: str) -> None:
        seen.append("leaves")
        await release.wait()
        seen.append("has left")

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        seen.append("ended")

    connection = await manager.connect(Peer().websocket)
    if why == "refused":
        with pytest.raises(PermissionDenied):
            await manager.subscribe(connection, "news")
        leaving = None
    else:
        await manager.subscribe(connection, "news")
        leaving = asyncio.create_task(manager.unsubscribe(connection, "news"))
    await eventually(lambda: bool(seen))
    manager.disconnect(connection)
    await turns()
    assert seen == ["leaves"]
    release.set()
    await eventually(lambda: len(seen) == 3)
    assert seen == ["leaves", "has left", "ended"]
    if leaving is not None:
        await leaving
