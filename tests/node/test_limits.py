"""`Limits` seen from the app: what is refused, how the client learns of it, and that nothing is held afterwards."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from tests.support.asgi import Peer, cancel_at, connected, eventually, turns, visit
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import (
    Connection,
    ConnectionClosed,
    ConnectionManager,
    EngineUnavailable,
    LimitExceeded,
    Limits,
    PermissionDenied,
    create_router,
    should_reconnect,
)
from wsbroadcast.engines.broker import DEFAULT_TIMING
from wsbroadcast.node.admission import IN_ALL, PER_ADDRESS, PER_USER
from wsbroadcast.transports import closed_error


def places(manager: ConnectionManager) -> dict[str, dict[str, int]]:
    counted = manager._core.life.node.membership.admission.quotas.counted
    return {name: each.taken for name, each in counted.items() if each.taken}


REFUSALS = [
    (IN_ALL, 503, 1013, "too many connections here"),
    (PER_USER, 429, 1008, "too many connections of this user"),
    (PER_ADDRESS, 429, 1008, "too many connections from this address"),
]


@pytest.mark.parametrize(("limit", "status", "code", "text"), REFUSALS)
async def test_connection_beyond_a_limit_is_refused_before_it_is_accepted(
    limit: str, status: int, code: int, text: str
) -> None:
    manager = ConnectionManager(limits=Limits(**dict[str, Any]({limit: 2})))
    pairs = await connected(manager, 2, user="ann")
    peer = Peer(can_deny=True)
    with pytest.raises(LimitExceeded) as caught:
        await manager.connect(peer.websocket, user="ann")
    assert (caught.value.limit, caught.value.code, str(caught.value)) == (limit, code, text)
    assert peer.accepted is None
    assert peer.denial == (status, text)
    assert len(manager.connections) == 2
    assert manager.stats().limited == {limit: 1}
    pairs[0][0].leave()
    manager.disconnect(pairs[0][1])
    await manager.connect(Peer().websocket, user="ann")  # there is room again
    assert len(manager.connections) == 2
    await manager.aclose()
    assert manager.stats().connections == 0


@pytest.mark.parametrize(("limit", "status", "code", "text"), REFUSALS)
@pytest.mark.parametrize("refuses", [(), (1008, 1013)])
async def test_socket_that_is_accepted_already_is_closed_with_a_reason(
    limit: str, status: int, code: int, text: str, refuses: tuple[int, ...]
) -> None:
    manager = ConnectionManager(limits=Limits(**dict[str, Any]({limit: 1})))
    await connected(manager, 1, user="ann")
    peer = Peer(refuses=refuses, can_deny=True)
    await peer.websocket.accept()
    with pytest.raises(LimitExceeded):
        await manager.connect(peer.websocket, user="ann")
    assert peer.end == (code + 3000 if refuses else code, text)
    await peer.websocket.close(1008)  # as Starlette does for an error that nobody catches: nothing happens
    assert len(peer.sent) == 2


@pytest.mark.parametrize(("limit", "status", "code", "text"), REFUSALS)
async def test_handshakes_at_the_same_time_do_not_get_past_a_limit(
    limit: str, status: int, code: int, text: str
) -> None:
    manager = ConnectionManager(limits=Limits(**dict[str, Any]({limit: 10})))
    peers = [Peer(suspends=True, can_deny=True) for _ in range(40)]
    most = 0

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        nonlocal most
        most = max(most, len(manager.connections))
        await turns(3)

    results = await asyncio.gather(
        *(manager.connect(peer.websocket, user="ann") for peer in peers), return_exceptions=True
    )
    assert sum(isinstance(result, Connection) for result in results) == 10
    assert sum(isinstance(result, LimitExceeded) for result in results) == 30
    assert most == len(manager.connections) == 10
    assert sum(peer.accepted is not None for peer in peers) == 10
    assert [peer.denial[0] for peer in peers if peer.accepted is None] == [status] * 30
    for peer in peers:
        peer.leave()
    for connection in manager.connections:
        manager.disconnect(connection)
    assert places(manager) == {}


# Whatever happens, the place is given back.


ALL = Limits(max_connections=1, max_connections_per_user=1, max_connections_per_address=1)


@pytest.mark.parametrize("fault", ["failed accept", "refusing hook"])
async def test_connect_that_fails_gives_the_place_back(fault: str) -> None:
    manager = ConnectionManager(limits=ALL)

    @manager.on_connect
    def on_connect(connection: Connection) -> None:
        raise PermissionDenied("not today")

    for _ in range(3):
        peer = Peer()
        if fault == "failed accept":
            peer.error = OSError("the client disconnected")
        with pytest.raises(ConnectionClosed if peer.error else PermissionDenied):
            await manager.connect(peer.websocket, user="ann")
    assert places(manager) == {}


@pytest.mark.parametrize("is_accepted", [False, True])
async def test_cancelled_connect_gives_the_place_back_wherever_it_waits(is_accepted: bool) -> None:
    manager = ConnectionManager(limits=ALL)

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        await turns(2)

    step = 1
    while True:
        peer = Peer(suspends=True)
        if is_accepted:
            await peer.websocket.accept()
        waited = await cancel_at(step, manager.connect(peer.websocket, user="ann"))
        if not waited:
            break
        assert places(manager) == {}
        assert manager.connections == []
        step += 1
    assert step > 2
    assert places(manager) == {IN_ALL: {"": 1}, PER_USER: {"ann": 1}, PER_ADDRESS: {"testclient": 1}}


async def test_cancelled_refusal_holds_nothing() -> None:
    manager = ConnectionManager(limits=ALL)
    await connected(manager, 1, user="ann")
    before = places(manager)
    step = 1
    while True:
        peer = Peer(suspends=True, can_deny=True)

        async def connect(peer: Peer = peer) -> None:
            with pytest.raises(LimitExceeded):
                await manager.connect(peer.websocket, user="bob")

        if not await cancel_at(step, connect()):
            break
        assert places(manager) == before
        assert peer.websocket.application_state is WebSocketState.DISCONNECTED  # nobody can accept it any more
        step += 1
    assert step > 2


@pytest.mark.parametrize("end", ["leave", "disconnect", "close", "app_close", "evict", "expire", "close_user"])
async def test_every_end_gives_the_place_back(end: str) -> None:
    manager = ConnectionManager(limits=ALL)
    for _ in range(2):
        peer = Peer()
        connection = await manager.connect(peer.websocket, user="ann")
        match end:
            case "leave":
                peer.leave()
                with pytest.raises(ConnectionClosed):
                    await connection.receive()
            case "disconnect":
                manager.disconnect(connection)
            case "close":
                await connection.close()
            case "app_close":
                await peer.websocket.close()
            case "evict":
                connection._sink.owner.evict("send_timeout")
            case "expire":
                connection.renew(0)
            case "close_user":
                await manager.close_user("ann")
        await eventually(lambda: places(manager) == {})
    assert manager.connections == []


async def test_place_is_held_until_the_socket_is_closed() -> None:
    manager = ConnectionManager(limits=ALL)
    peer = Peer()
    connection = await manager.connect(peer.websocket)
    peer.stall()
    await manager.broadcast("waits")
    closing = asyncio.create_task(connection.close())
    await turns()
    assert manager.connections == []
    with pytest.raises(LimitExceeded):
        await manager.connect(Peer().websocket)
    peer.resume()
    await closing
    await manager.connect(Peer().websocket)


async def test_two_at_once_for_the_same_socket_leave_one_place_taken() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=2))
    peer = Peer(suspends=True)
    await peer.websocket.accept()
    one, two = await asyncio.gather(manager.connect(peer.websocket), manager.connect(peer.websocket))
    assert one is two
    assert places(manager)[IN_ALL] == {"": 1}


async def test_restarted_manager_starts_counting_anew() -> None:
    manager = ConnectionManager(limits=ALL)
    async with manager:
        await connected(manager, 1)
    async with manager:
        await connected(manager, 1)


# The oldest connection of a user goes instead.


ONE_EACH = Limits(max_connections_per_user=1, max_connections=3, when_full="oldest")


async def test_oldest_connection_of_a_user_gives_its_place_to_a_new_one() -> None:
    async with ConnectionManager(limits=ONE_EACH) as manager:
        [(old, connection)] = await connected(manager, 1, user="ann")
        [(other, _)] = await connected(manager, 1, user="ben")
        [(new, _)] = await connected(manager, 1, user="ann")
        assert not connection.is_open
        await eventually(lambda: old.close_code == 4409)
        assert not should_reconnect(4409)
        await manager.broadcast("hello")
        assert await new.wait_messages(1) == await other.wait_messages(1) == ["hello"]
        assert old.messages == []
        assert places(manager) == {IN_ALL: {"": 2}, PER_USER: {"ann": 1, "ben": 1}}
        assert manager.stats().limited == {}
    assert places(manager) == {}


@pytest.mark.parametrize("fault", ["stall", "vanish"])
async def test_dead_connection_holds_up_nobody(fault: str) -> None:
    async with ConnectionManager(limits=ONE_EACH) as manager:
        [(old, _)] = await connected(manager, 1, user="ann")
        getattr(old, fault)()
        [(new, _)] = await connected(manager, 1, user="ann")
        await manager.broadcast("hello", user="ann")
        assert await new.wait_messages(1) == ["hello"]
        old.resume()


async def test_handshakes_of_one_user_at_once_leave_one_connection() -> None:
    async with ConnectionManager(limits=ONE_EACH) as manager:
        peers = [Peer(suspends=True, can_deny=True) for _ in range(20)]
        results = await asyncio.gather(
            *(manager.connect(peer.websocket, user="ann") for peer in peers), return_exceptions=True
        )
        # One that is still being accepted can't be closed: who comes then is refused.
        assert {type(result) for result in results} <= {Connection, LimitExceeded, ConnectionClosed}
        assert len(manager.connections) == 1
        assert places(manager)[PER_USER] == {"ann": 1}
    assert places(manager) == {}


async def test_limit_in_all_still_holds_for_who_would_take_a_place() -> None:
    async with ConnectionManager(limits=ONE_EACH) as manager:
        pairs = [(await connected(manager, 1, user=name))[0] for name in ("ann", "ben", "cal")]
        with pytest.raises(LimitExceeded):
            await manager.connect(Peer(can_deny=True).websocket, user="ann")
        assert all(connection.is_open for _, connection in pairs)


# A place for a handshake that is looked into.


async def test_handshake_that_is_looked_into_counts_already() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1, max_handshake_rate=0.001, handshake_burst=2))
    first, second = Peer(), Peer(can_deny=True)
    async with manager.handshake(first.websocket):
        with pytest.raises(LimitExceeded):
            async with manager.handshake(second.websocket):
                raise AssertionError("the block runs")
        assert second.denial[0] == 503
        await manager.connect(first.websocket, user="ann")
    assert places(manager) == {IN_ALL: {"": 1}}
    assert len(manager.connections) == 1
    manager.disconnect(first.websocket)
    assert places(manager) == {}


async def test_socket_that_is_connected_takes_no_second_place() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))
    peer = Peer()
    async with manager.handshake(peer.websocket):
        connection = await manager.connect(peer.websocket)
        async with manager.handshake(peer.websocket):
            assert await manager.connect(peer.websocket) is connection
    assert connection.is_open
    assert places(manager) == {IN_ALL: {"": 1}}
    manager.disconnect(peer.websocket)
    assert places(manager) == {}


async def test_handshake_that_comes_to_nothing_gives_its_place_back() -> None:
    manager = ConnectionManager(limits=ALL)
    for _ in range(3):
        async with manager.handshake(Peer().websocket):
            assert places(manager) == {IN_ALL: {"": 1}, PER_ADDRESS: {"testclient": 1}}
    with pytest.raises(ZeroDivisionError):
        async with manager.handshake(Peer().websocket):
            raise ZeroDivisionError
    assert places(manager) == {}


async def test_nested_handshakes_have_one_place() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1, max_handshake_rate=0.001, handshake_burst=2))
    peer = Peer()
    async with manager.handshake(peer.websocket):
        async with manager.handshake(peer.websocket):
            assert places(manager) == {IN_ALL: {"": 1}}
            await manager.connect(peer.websocket)
        assert places(manager) == {IN_ALL: {"": 1}}
    manager.disconnect(peer.websocket)
    assert places(manager) == {}
    async with manager.handshake(peer.websocket):
        async with manager.handshake(peer.websocket):
            pass
        assert places(manager) == {IN_ALL: {"": 1}}
    assert places(manager) == {}


async def test_nested_handshakes_of_two_managers_have_a_place_each() -> None:
    one, other = ConnectionManager(limits=ALL), ConnectionManager(limits=ALL)
    peer = Peer()
    async with one.handshake(peer.websocket), other.handshake(peer.websocket):
        await one.connect(peer.websocket)
        await other.connect(peer.websocket)
        assert places(one)[IN_ALL] == places(other)[IN_ALL] == {"": 1}
    one.disconnect(peer.websocket)
    other.disconnect(peer.websocket)
    assert places(one) == places(other) == {}


async def test_handshakes_have_their_place_while_the_engine_starts() -> None:
    broker = FakeBroker()
    broker.is_hung.set()
    manager = ConnectionManager(FakeEngine(broker, timing=DEFAULT_TIMING), limits=Limits(max_connections=2))

    async def shake_hands(peer: Peer) -> None:
        async with manager.handshake(peer.websocket):
            raise AssertionError("the block runs")

    peers = [Peer(can_deny=True) for _ in range(5)]
    tasks = [asyncio.create_task(shake_hands(peer)) for peer in peers]
    await eventually(lambda: sum(task.done() for task in tasks) == 3)
    assert [peer.denial[0] for peer in peers[2:]] == [503] * 3
    assert places(manager) == {IN_ALL: {"": 2}}
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert places(manager) == {}


async def test_start_that_fails_gives_the_places_back() -> None:
    broker = FakeBroker()
    broker.is_down = True
    manager = ConnectionManager(FakeEngine(broker, fail_fast=True), limits=ALL)
    with pytest.raises(EngineUnavailable):
        async with manager.handshake(Peer().websocket):
            raise AssertionError("the block runs")
    assert places(manager) == {}
    broker.is_down = False
    await manager.broadcast("starts it")
    assert (await manager.health()).is_ok
    await manager.aclose()


# Channels.


async def test_connection_may_be_in_so_many_channels() -> None:
    manager = ConnectionManager(limits=Limits(max_channels_per_connection=3))
    ((_, connection),) = await connected(manager, 1, channels=["a", "b"])
    with pytest.raises(LimitExceeded):
        await connection.subscribe("c", "d")  # both or none
    assert connection.channels == {"a", "b"}
    assert manager.stats().limited == {"max_channels_per_connection": 1}
    await connection.subscribe("b", "c", "a")  # none of them twice
    assert connection.channels == {"a", "b", "c"}
    with pytest.raises(LimitExceeded) as caught:
        await connection.subscribe("d")
    assert (caught.value.limit, str(caught.value)) == ("max_channels_per_connection", "too many channels")
    assert connection.is_open
    assert connection.channels == {"a", "b", "c"}
    await connection.unsubscribe("a")
    await connection.subscribe("d")


async def test_subscribing_at_the_same_time_gets_not_past_the_limit() -> None:
    manager = ConnectionManager(limits=Limits(max_channels_per_connection=10))

    @manager.on_subscribe
    async def on_subscribe(connection: Connection, channel: str) -> None:
        await turns(3)

    ((_, connection),) = await connected(manager, 1)
    results = await asyncio.gather(
        *(connection.subscribe(f"a{number}", f"b{number}") for number in range(20)), return_exceptions=True
    )
    assert len(connection.channels) == 10
    assert any(isinstance(result, LimitExceeded) for result in results)


async def test_handshake_for_too_many_channels_is_refused() -> None:
    manager = ConnectionManager()
    await manager.connect(Peer().websocket, channels=[str(number) for number in range(100)])
    peer = Peer(can_deny=True)
    with pytest.raises(LimitExceeded):
        await manager.connect(peer.websocket, channels=[str(number) for number in range(101)])
    assert peer.denial == (403, "too many channels")
    assert places(manager) == {}


# Messages of clients.


@pytest.fixture
def watched() -> tuple[ConnectionManager, list[str | bytes]]:
    """A manager with small limits, and the messages that its on_message hook saw."""
    manager = ConnectionManager(limits=Limits(max_inbound_bytes=10, max_inbound_rate=0.001, inbound_burst=3))
    seen: list[str | bytes] = []

    @manager.on_message
    def on_message(connection: Connection, message: str | bytes) -> None:
        seen.append(message)

    return manager, seen


Watched = tuple[ConnectionManager, list[str | bytes]]


async def read(way: str, websocket: WebSocket, connection: Connection) -> Any:
    """Receive in one of the ways that an endpoint has."""
    match way:
        case "connection.receive":
            return await connection.receive()
        case "connection.receive_json":
            return await connection.receive_json()
        case "async for":
            async for message in connection:
                return message
            raise closed_error(connection)
        case "websocket.receive":
            event = await websocket.receive()
            websocket._raise_on_disconnect(event)
            return event["text"]
        case "websocket.receive_json":
            return await websocket.receive_json()
        case "websocket.iter_text":
            async for message in websocket.iter_text():
                return message
            raise closed_error(connection)
    return await websocket.receive_text()


WAYS = [
    "connection.receive",
    "connection.receive_json",
    "async for",
    "websocket.receive",
    "websocket.receive_text",
    "websocket.receive_json",
    "websocket.iter_text",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("has_both_keys", [False, True])
async def test_message_that_is_too_big_closes_however_it_is_read(
    watched: Watched, way: str, has_both_keys: bool
) -> None:
    manager, seen = watched
    peer = Peer(has_both_keys=has_both_keys)
    connection = await manager.connect(peer.websocket)
    peer.say("1234567890")
    assert str(await read(way, peer.websocket, connection)) == "1234567890"
    peer.say("{not JSON at all")
    with pytest.raises(WebSocketDisconnect) as caught:
        await read(way, peer.websocket, connection)
    assert caught.value.code == 1009
    assert peer.end == (1009, "message too big")
    assert seen == ["1234567890"]  # no hook saw the other
    assert manager.stats().limited == {"max_inbound_bytes": 1}
    assert manager.connections == []


@pytest.mark.parametrize("way", WAYS)
async def test_one_message_too_many_closes_however_it_is_read(watched: Watched, way: str) -> None:
    manager, seen = watched
    peer, other = Peer(), Peer()
    connection = await manager.connect(peer.websocket)
    await manager.connect(other.websocket)
    for number in range(4):
        peer.say(str(number))
    for number in range(3):
        assert str(await read(way, peer.websocket, connection)) == str(number)
    with pytest.raises(WebSocketDisconnect) as caught:
        await read(way, peer.websocket, connection)
    assert caught.value.code == 1008
    assert peer.end == (1008, "too many messages (max_inbound_rate)")
    assert seen == ["0", "1", "2"]
    assert manager.stats().limited == {"max_inbound_rate": 1}
    other.say("x")
    assert await other.websocket.receive_text() == "x"  # each connection for itself


async def test_messages_that_are_thrown_away_count_too(watched: Watched) -> None:
    manager, _ = watched
    peer = Peer()
    connection = await manager.connect(peer.websocket)
    for _ in range(4):
        peer.say("x")
    await connection.wait_closed()
    assert peer.close_code == 1008


@pytest.mark.parametrize("has_hook", [False, True])
async def test_tasks_of_a_connection_stay_few_however_much_it_says(has_hook: bool) -> None:
    manager = ConnectionManager(limits=Limits(max_router_inbound_rate=None))
    counts: set[int] = set()

    def count(*_: object) -> None:
        counts.add(len(asyncio.all_tasks()))

    if has_hook:
        manager.on_message(count)
        manager.on_deliver(count)
    app = FastAPI()
    app.include_router(create_router(manager))
    before = len(asyncio.all_tasks())
    peer = Peer()
    async with visit(app, "/ws", peer):
        for number in range(2000):
            peer.say(str(number))
        while len(peer.sent) <= 2000:  # the first is the accept
            await asyncio.sleep(0)
            count()
    assert max(counts) <= before + 2, "the app's call and a writer"


# The app that catches nothing.


async def test_limit_that_nobody_catches_is_no_error_of_the_app() -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1, max_channels_per_connection=1))
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        connection = await manager.connect(websocket)
        await connection.subscribe(await websocket.receive_text())
        await connection.subscribe(await websocket.receive_text())

    async with visit(app, "/ws") as peer:
        refused = Peer("/ws", can_deny=True)
        await app(refused.scope, refused.receive, refused.send)  # nothing escapes
        assert refused.denial[0] == 503
        peer.say("a")
        peer.say("b")
        await peer.wait_close()
        assert peer.end == (1008, "too many channels")
    assert places(manager) == {}


@pytest.mark.parametrize(
    ("options", "own", "router"),
    [
        ({}, None, "max_router_inbound_rate"),
        ({"max_router_inbound_rate": None}, None, None),
        ({"max_inbound_rate": 0.001}, "max_inbound_rate", "max_inbound_rate"),
        ({"max_inbound_rate": 0.001, "max_router_inbound_rate": None}, "max_inbound_rate", "max_inbound_rate"),
    ],
)
@pytest.mark.parametrize("is_router", [False, True])
async def test_router_has_a_rate_and_an_own_endpoint_none_unless_it_is_set(
    options: dict[str, Any], own: str | None, router: str | None, is_router: bool
) -> None:
    """A client that says the next thing when the answer to the last has come meets no limit in an endpoint."""
    manager = ConnectionManager(limits=Limits(**{"inbound_burst": 5, **options}))
    app = FastAPI()
    if is_router:
        app.include_router(create_router(manager, "/ws"))
    else:

        @app.websocket("/ws")
        async def endpoint(websocket: WebSocket) -> None:
            await manager.connect(websocket)
            try:
                while True:
                    await manager.broadcast(await websocket.receive_text())
            except WebSocketDisconnect:
                manager.disconnect(websocket)

    limit = router if is_router else own
    async with visit(app, "/ws") as peer:
        for number in range(400):
            peer.say(str(number))
        if limit is None:
            assert len(await peer.wait_messages(400)) == 400
        else:
            await peer.wait_close()
            assert peer.end == (1008, f"too many messages ({limit})")
            assert manager.stats().limited == {limit: 1}
