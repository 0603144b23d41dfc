"""Connections that are sent away: because their time is over, or because somebody said so, on whatever node."""

from __future__ import annotations

import asyncio
import gc
import math
import time
import weakref
from datetime import UTC, datetime
from typing import Any

import pytest
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, connected, eventually, turns
from tests.support.fake_broker import FailingEngine, FakeBroker, FakeEngine
from tests.support.fast import WebSocketsSansIOProtocol
from wsbroadcast import (
    Audience,
    CloseCode,
    Connection,
    ConnectionClosed,
    ConnectionManager,
    ConnectionState,
    Delivery,
    EngineError,
    EngineUnavailable,
    LifecycleError,
    Limits,
    PermissionDenied,
)
from wsbroadcast.publication import Dismissal

# Expiry.


async def test_connection_is_closed_when_it_expires(manager: ConnectionManager) -> None:
    peer, other = Peer(), Peer()
    expires_at = time.time() + 0.3
    connection = await manager.connect(peer.websocket, expires_at=expires_at)
    staying = await manager.connect(other.websocket)
    assert (connection.expires_at, staying.expires_at) == (expires_at, None)
    with pytest.raises(WebSocketDisconnect) as caught:
        await asyncio.wait_for(peer.websocket.receive_text(), 5)
    assert time.time() - expires_at > -0.01
    assert caught.value.code == 4401
    await peer.wait_close()
    assert peer.end == (CloseCode.UNAUTHENTICATED, "it has expired")
    assert manager.connections == [staying]


async def test_clock_that_is_set_changes_nothing(manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket, expires_at=time.time() + 3600)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    await asyncio.sleep(0)
    await turns()
    assert connection.is_open
    monkeypatch.setattr(time, "time", lambda: real() - 7200)
    connection.renew(real() - 7200 + 0.02)
    assert await peer.wait_close() == 4401


@pytest.mark.parametrize("expires_at", [0, -1.0, datetime(2020, 1, 1, tzinfo=UTC)])
async def test_what_has_expired_is_not_let_in(manager: ConnectionManager, expires_at: Any) -> None:
    peer = Peer(can_deny=True)
    with pytest.raises(PermissionDenied, match="expired"):
        await manager.connect(peer.websocket, user="ann", expires_at=expires_at)
    assert peer.denial == (401, "it has expired")
    assert manager.stats().connects == 0


async def test_what_expires_now_is_not_let_in(manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    with pytest.raises(PermissionDenied):
        await manager.connect(Peer().websocket, expires_at=1_800_000_000)
    await manager.connect(Peer().websocket, expires_at=1_800_000_001)


async def test_accepted_socket_that_has_expired_is_closed(manager: ConnectionManager) -> None:
    peer = Peer()
    await peer.websocket.accept()
    with pytest.raises(PermissionDenied):
        await manager.connect(peer.websocket, expires_at=0)
    assert peer.close_code == 4401


@pytest.mark.parametrize("expires_at", [datetime(2030, 1, 1), math.nan, "2030-01-01", True])
async def test_what_is_no_moment_lets_nobody_in(expires_at: Any) -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))
    peer = Peer()
    with pytest.raises(ValueError, match="expires_at"):
        await manager.connect(peer.websocket, expires_at=expires_at)
    assert peer.sent == []
    connection = await manager.connect(peer.websocket)  # nothing is held
    with pytest.raises(ValueError, match="expires_at"):
        connection.renew(expires_at)
    assert connection.is_open


@pytest.mark.parametrize("is_expiry", [True, False])
async def test_what_waits_is_not_sent_after_the_moment(manager: ConnectionManager, is_expiry: bool) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket, user="ann", expires_at=time.time() + 3600)
    peer.stall()
    for number in range(5):
        await manager.broadcast(str(number))
    await eventually(lambda: peer.is_stalled)
    own = asyncio.create_task(peer.websocket.send_text("own"))
    await turns()
    if is_expiry:
        connection.renew(0)
    else:
        await manager.close_user("ann")
    await turns()
    await manager.broadcast("afterwards", user="ann")
    peer.resume()
    assert await peer.wait_close() == 4401
    assert peer.messages == ["0"]  # which was on its way
    with pytest.raises(ConnectionClosed):
        await own
    assert manager.stats().dropped == {"closed": 4}


@pytest.mark.parametrize("is_expiry", [True, False])
async def test_what_waits_for_a_close_is_not_sent_after_the_moment_either(
    manager: ConnectionManager, is_expiry: bool
) -> None:
    peer = WebSocketsSansIOProtocol()
    connection = await manager.connect(peer.websocket, user="ada")
    peer.stall()
    await manager.broadcast("waits")
    if is_expiry:
        connection.renew(time.time() + 0.05)  # the close begins before it, in the next turn
    closing = asyncio.create_task(connection.close(4000))
    await eventually(lambda: not connection.is_open)
    if not is_expiry:
        await manager.close_user("ada")
    await eventually(lambda: connection._sink.held_messages == 0)
    peer.resume()
    await closing
    assert peer.messages == ["<close>"]
    assert connection.close_code == 4000
    assert manager.stats().dropped == {"closed": 1}


async def test_what_waits_for_the_apps_own_close_is_not_sent_to_a_user_who_was_disconnected(
    manager: ConnectionManager,
) -> None:
    users = {WebSocketsSansIOProtocol(): user for user in ("ada", "ada", "bob")}
    peer, spared, other = users
    spare = [await manager.connect(each.websocket, user=user) for each, user in users.items()][1]
    for each in users:
        each.stall()
    await manager.broadcast("waits")
    closing = asyncio.gather(*(each.websocket.close(4000) for each in users))
    await eventually(lambda: not manager.connections)
    await manager.close_user("ada", exclude=spare)
    for each in users:
        each.resume()
    await closing
    assert peer.messages == ["<close>"]
    assert spared.messages == other.messages == ["waits", "<close>"]


async def test_renewing_puts_the_moment_off(manager: ConnectionManager) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket, expires_at=time.time() + 0.3)
    connection.renew(time.time() + 3600)
    await asyncio.sleep(0.35)  # for what must not happen
    assert connection.is_open
    connection.renew(None)
    assert connection.expires_at is None
    connection.renew(time.time() + 0.02)
    assert await peer.wait_close() == 4401


async def test_renewing_to_the_past_ends_it(manager: ConnectionManager) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket)
    connection.renew(time.time() - 1)
    assert await peer.wait_close() == 4401
    with pytest.raises(ConnectionClosed):
        connection.renew(time.time() + 3600)


async def test_expiring_while_the_hooks_run_says_goodbye_after_them(
    manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        connection.renew(0)
        await connection.wait_closed()
        seen.append("connect")

    @manager.on_disconnect
    def on_disconnect(connection: Connection) -> None:
        seen.append(f"disconnect {connection.close_code}")

    with pytest.raises(ConnectionClosed) as caught:
        await manager.connect(Peer().websocket)
    assert caught.value.code == 4401
    await eventually(lambda: len(seen) == 2)
    assert seen == ["connect", "disconnect 4401"]


async def test_timer_is_no_task_and_holds_nothing_that_has_ended(manager: ConnectionManager) -> None:
    before = asyncio.all_tasks()
    pairs = await connected(manager, 10, expires_at=time.time() + 3600)
    assert asyncio.all_tasks() == before
    references = [weakref.ref(connection) for _, connection in pairs]
    for _, connection in pairs:
        manager.disconnect(connection)
    del pairs, _, connection
    await turns()
    gc.collect()
    assert [reference() for reference in references] == [None] * 10


# Disconnecting a user.


async def test_user_is_disconnected_and_nobody_else(manager: ConnectionManager) -> None:
    anns = await connected(manager, 3, user="ann")
    others = [*await connected(manager, 1, user="bob"), *await connected(manager, 1)]
    await manager.close_user("ann", reason="signed out")
    for peer, connection in anns:
        await peer.wait_close()
        assert peer.end == (4401, "signed out")
        assert (connection.close_code, connection.close_reason) == (4401, "signed out")
    assert manager.connections == [connection for _, connection in others]
    assert manager.stats().users == 1
    assert not any(peer.close for peer, _ in others)


async def test_some_connections_of_a_user_may_stay(manager: ConnectionManager) -> None:
    pairs = await connected(manager, 3, user="ann")
    await manager.close_user("ann", exclude=pairs[1][0].websocket)
    await eventually(lambda: sum(peer.close is not None for peer, _ in pairs) == 2)
    assert manager.connections == [pairs[1][1]]


async def test_message_that_hooks_look_at_is_not_delivered_to_who_was_disconnected_meanwhile(
    manager: ConnectionManager,
) -> None:
    go = asyncio.Event()

    @manager.on_deliver
    async def on_deliver(delivery: Delivery) -> None:
        await go.wait()

    (ann, _), (bob, _) = [*await connected(manager, 1, user="ann"), *await connected(manager, 1, user="bob")]
    broadcasting = asyncio.create_task(manager.broadcast("secret"))
    await turns()
    await manager.close_user("ann")  # isn't held up by the hook, and doesn't run it
    assert await ann.wait_close() == 4401
    go.set()
    await broadcasting
    assert await bob.next() == "secret"
    assert ann.messages == []


@pytest.mark.parametrize("user", [None, "", True, 1.5, "a\nb"])
async def test_nobody_is_no_user(manager: ConnectionManager, user: Any) -> None:
    await connected(manager, 2)
    with pytest.raises(ValueError, match="user"):
        await manager.close_user(user)
    assert len(manager.connections) == 2


@pytest.mark.parametrize("code", [0, 999, 1005, 1006, 1015, 2999, 5000])
async def test_code_that_cannot_be_sent_disconnects_nobody(manager: ConnectionManager, code: int) -> None:
    await connected(manager, 1, user="ann")
    with pytest.raises(ValueError, match="close code"):
        await manager.close_user("ann", code=code)
    assert len(manager.connections) == 1


async def test_reason_is_cut_and_may_be_anything(manager: ConnectionManager) -> None:
    ((peer, _),) = await connected(manager, 1, user="ann")
    await manager.close_user("ann", reason="ü\ud800" + "x" * 1000)
    await peer.wait_close()
    assert peer.end == (4401, "ü?" + "x" * 120)


async def test_user_is_disconnected_on_every_node() -> None:
    broker = FakeBroker()
    async with ConnectionManager(FakeEngine(broker)) as here, ConnectionManager(FakeEngine(broker)) as there:
        pairs = [*await connected(here, 2, user="ann"), *await connected(there, 2, user="ann")]
        ((bob, _),) = await connected(there, 1, user="bob")
        await here.close_user("ann", reason="signed out")
        for peer, _ in pairs:
            assert await peer.wait_close() == 4401
        assert (len(here.connections), len(there.connections)) == (0, 1)
        assert bob.close is None


@pytest.mark.parametrize("error", [EngineUnavailable("gone"), EngineError("read-only")])
async def test_broker_that_does_not_take_it_leaves_none_of_this_node(error: EngineError) -> None:
    async with ConnectionManager(FailingEngine(error)) as manager:
        ((peer, _),) = await connected(manager, 1, user="ann")
        with pytest.raises(type(error)):
            await manager.close_user("ann")
        assert await peer.wait_close() == 4401


async def test_closed_manager_disconnects_nobody() -> None:
    manager = ConnectionManager()
    async with manager:
        pass
    with pytest.raises(LifecycleError):
        await manager.close_user("ann")


# Publications that close.


@pytest.mark.parametrize(
    ("audience", "stay"),
    [
        (Audience("everyone"), []),
        (Audience("channel", "a"), [1, 2]),
        (Audience("user", "bob"), [0, 2]),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_dismissal_reaches_any_audience(
    manager: ConnectionManager, audience: Audience, stay: list[int], waits: bool
) -> None:
    @manager.on_deliver
    async def on_deliver(delivery: Delivery) -> None:
        raise AssertionError("nothing is delivered")

    pairs = [
        *await connected(manager, 1, channels=["a"]),
        *await connected(manager, 1, user="bob"),
        *await connected(manager, 1),
    ]
    node = manager._core.life.node
    publication = Dismissal(audience, 1012, "maintenance")
    if waits:
        await node.deliver(publication)
    else:
        node.take(publication)
    assert manager.connections == [pairs[index][1] for index in stay]
    for index, (peer, connection) in enumerate(pairs):
        if index not in stay:
            assert await peer.wait_close() == 1012
            assert connection.close_reason == "maintenance"
    assert manager.stats().broadcasts == 0


# What the peer says meanwhile.


@pytest.mark.parametrize("end", ["close", "evict", "expire", "close_user", "app_close"])
async def test_who_was_sent_away_is_not_heard_though_the_close_frame_has_to_wait(
    manager: ConnectionManager, end: str
) -> None:
    peer = Peer()
    connection = await manager.connect(peer.websocket, user="ann")
    peer.stall()
    match end:
        case "close":
            closing = asyncio.create_task(connection.close())
        case "evict":
            connection._sink.owner.evict("send_timeout")
        case "expire":
            connection.renew(0)
        case "close_user":
            await manager.close_user("ann")
        case "app_close":
            closing = asyncio.create_task(peer.websocket.close())
    await eventually(lambda: connection.state is ConnectionState.CLOSING)
    peer.say("after it")
    reading = asyncio.create_task(connection.receive())
    await turns()
    peer.resume()
    with pytest.raises(WebSocketDisconnect) as caught:
        await reading
    assert caught.value.code == connection.close_code
    if end in ("close", "app_close"):
        await closing


async def test_message_is_not_heard_whose_hooks_run_when_its_sender_is_sent_away(manager: ConnectionManager) -> None:
    peer = Peer()
    gate = asyncio.Event()

    @manager.on_message
    async def on_message(connection: Connection, message: str | bytes) -> None:
        await gate.wait()

    await manager.connect(peer.websocket, user="ann")
    reading = asyncio.create_task(peer.websocket.receive_text())
    peer.say("before it")
    await turns()
    await manager.close_user("ann")
    gate.set()
    with pytest.raises(WebSocketDisconnect):
        await reading
