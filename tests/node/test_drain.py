"""`manager.drain`: everybody goes to another node before this one ends, a few at a time; and nobody comes in."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket

from tests.support.asgi import Peer, connected, eventually, turns, visit
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import (
    ConfigurationError,
    Connection,
    ConnectionManager,
    History,
    LifecycleError,
    LimitExceeded,
    Limits,
    SlowConsumer,
    TokenFrom,
    create_router,
    should_reconnect,
)
from wsbroadcast.node import drain as drain_module


def is_over(manager: ConnectionManager) -> bool:
    return manager._core.life.node.drain.is_over


async def test_everybody_is_closed_with_a_code_to_come_back_for() -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 20)
        manager.broadcast_nowait("the last word")
        began = monotonic()
        await manager.drain(over=0.2)
        assert monotonic() - began < 1
        assert {peer.end for peer, _ in pairs} == {(1012, "drain")}
        assert all(peer.messages == ["the last word"] for peer, _ in pairs)
        assert should_reconnect(1012)
        assert manager.stats().connections == 0
        assert (manager.stats().disconnects, manager.stats().dropped) == (20, {})


async def test_they_go_at_moments_spread_over_the_time() -> None:
    ends: list[float] = []
    manager = ConnectionManager(limits=Limits(max_connections=200))

    @manager.on_disconnect
    def on_disconnect(connection: Connection) -> None:
        ends.append(monotonic())

    async with manager:
        await connected(manager, 200)
        began = monotonic()
        await manager.drain(over=1.0)
        took = monotonic() - began
    assert len(ends) == 200
    # Of 200 moments at random, each tenth of the time holds 20; six times the standard deviation more is 46.
    tenths = [int((end - began) * 10) for end in ends]
    assert max(map(tenths.count, set(tenths))) < 46
    assert len(set(tenths)) >= 8
    assert 0.8 < took < 1.5


async def test_event_loop_that_was_late_makes_up_for_it_slowly() -> None:
    ends: list[float] = []
    manager = ConnectionManager()

    @manager.on_disconnect
    def on_disconnect(connection: Connection) -> None:
        ends.append(monotonic())

    async with manager:
        await connected(manager, 200)
        draining = asyncio.create_task(manager.drain(over=1.0))
        await eventually(lambda: len(ends) > 20)
        sleep(0.3)  # noqa: ASYNC251  # an event loop that is blocked
        blocked_until = monotonic()
        await draining
    # 60 are late then, and 20 more follow within 100 ms: at one and a half times the pace that makes 30, and a few.
    assert sum(blocked_until <= end < blocked_until + 0.1 for end in ends) < 45
    assert len(ends) == 200


@pytest.mark.parametrize(
    ("connections", "over", "most"), [(0, 5.0, 0.1), (1, 5.0, 0.3), (25, 5.0, 0.9), (60, 0.0, 0.3)]
)
async def test_few_connections_take_little_time(connections: int, over: float, most: float) -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, connections)
        began = monotonic()
        await manager.drain(over)
        assert monotonic() - began < most
        assert all(peer.close_code == 1012 for peer, _ in pairs)


@pytest.mark.parametrize("over", [-1, float("nan"), float("inf"), 10**400, "5", None, True])
async def test_time_that_is_none_is_refused(over: Any) -> None:
    manager = ConnectionManager()
    with pytest.raises(ConfigurationError, match="over must be seconds"):
        await manager.drain(over)
    assert not manager.is_draining
    if over is not None:
        with pytest.raises(ConfigurationError, match="drain must be seconds"):
            ConnectionManager(drain=over)


# Who comes meanwhile, and afterwards.


async def test_newcomer_is_refused_until_the_manager_is_started_again() -> None:
    manager = ConnectionManager()
    await manager.start()
    assert not manager.is_draining
    pairs = await connected(manager, 50)
    draining = asyncio.create_task(manager.drain(over=1.0))
    await turns()
    assert manager.is_draining
    for _ in range(2):  # while it lasts, and afterwards
        peer = Peer(can_deny=True)
        with pytest.raises(LimitExceeded) as caught:
            await manager.connect(peer.websocket)
        assert (caught.value.limit, caught.value.code) == ("draining", 1012)
        assert peer.denial == (503, "draining")
        headers = dict(peer.sent[0]["headers"])
        assert headers[b"retry-after"] == b"1"
        await draining
    assert manager.stats().limited == {"draining": 2}
    assert all(peer.close_code == 1012 for peer, _ in pairs)
    await manager.aclose()
    async with manager:
        assert not manager.is_draining
        await manager.connect(Peer().websocket)


async def test_client_is_told_to_come_back_when_the_drain_is_over() -> None:
    async with ConnectionManager() as manager:
        await connected(manager, 200)
        draining = asyncio.create_task(manager.drain(over=3.5))
        await turns()
        peer = Peer(can_deny=True)
        with pytest.raises(LimitExceeded):
            await manager.connect(peer.websocket)
        assert dict(peer.sent[0]["headers"])[b"retry-after"] == b"4"
        draining.cancel()


async def test_socket_that_is_accepted_already_is_closed() -> None:
    async with ConnectionManager() as manager:
        await manager.drain()
        peer = Peer(can_deny=True)
        await peer.websocket.accept()
        with pytest.raises(LimitExceeded):
            await manager.connect(peer.websocket)
        assert peer.end == (1012, "draining")


@pytest.mark.parametrize("is_routers", [True, False])
async def test_refusal_is_no_error_of_the_endpoint(is_routers: bool, caplog: pytest.LogCaptureFixture) -> None:
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)
    app.include_router(create_router(manager, "/ws"))

    @app.websocket("/own")
    async def own(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        await websocket.receive_text()

    async with manager:
        await manager.drain()
        peer = Peer("/ws" if is_routers else "/own", can_deny=True)
        await app(peer.scope, peer.receive, peer.send)
        assert peer.denial == (503, "draining")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_handshake_that_is_looked_into_is_refused_at_once() -> None:
    manager = ConnectionManager()
    is_known, is_asked = asyncio.Event(), asyncio.Event()

    async def who(websocket: WebSocket) -> str:
        is_asked.set()
        await is_known.wait()
        return "ann"

    app = FastAPI()
    app.include_router(create_router(manager, "/ws", authenticate=who))
    async with manager:
        peer = Peer("/ws", can_deny=True)
        call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
        await is_asked.wait()
        await manager.drain()
        await peer.wait_for(lambda: len(peer.sent) == 2)
        assert peer.denial == (503, "draining")
        is_known.set()
        await call
        assert len(peer.sent) == 2
        assert manager.stats().connections == 0
        assert manager.stats().limited == {"draining": 1}


async def test_socket_that_waits_for_its_first_message_is_closed_at_once() -> None:
    manager = ConnectionManager()
    token = TokenFrom(first_message=10)

    async def who(websocket: WebSocket) -> str:
        return await token(websocket)

    app = FastAPI()
    app.include_router(create_router(manager, "/ws", authenticate=who))
    async with manager, visit(app, "/ws", Peer(can_deny=True)) as peer:
        await peer.wait_for(lambda: peer.accepted is not None)
        await manager.drain()
        await peer.wait_close()
        assert peer.end == (1012, "draining")
        peer.leave(1012)


async def test_socket_in_an_on_connect_hook_is_closed() -> None:
    manager = ConnectionManager()
    is_in, goes_on = asyncio.Event(), asyncio.Event()

    @manager.on_connect
    async def on_connect(connection: Connection) -> None:
        is_in.set()
        await goes_on.wait()

    async with manager:
        peer = Peer(can_deny=True)
        connecting = asyncio.ensure_future(manager.connect(peer.websocket))
        await is_in.wait()
        await manager.drain()
        assert peer.end == (1012, "drain")
        goes_on.set()
        with pytest.raises(Exception, match="closed with code 1012"):
            await connecting
        assert manager.stats().connections == 0


@pytest.mark.parametrize("where", ["subscribing", "accepting"])
async def test_socket_on_its_last_steps_is_refused(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ConnectionManager(FakeEngine(FakeBroker())) as manager:
        membership = manager._core.life.node.membership
        peer = Peer(can_deny=True, suspends=where == "accepting")
        draining: list[asyncio.Task[None]] = []
        hold = membership.demand.hold

        async def hold_and_drain(audiences: Any) -> None:
            await hold(audiences)
            draining.append(asyncio.create_task(manager.drain()))
            if where == "subscribing":
                await turns()

        monkeypatch.setattr(membership.demand, "hold", hold_and_drain)
        with pytest.raises(LimitExceeded):
            await manager.connect(peer.websocket, channels=["news"])
        await draining[0]
        if where == "subscribing":
            assert peer.denial == (503, "draining")
        else:
            assert peer.end == (1012, "draining")
        assert (manager.stats().connections, manager.stats().channels) == (0, 0)


# Peers and apps that take their time.


async def test_peer_that_takes_nothing_is_cut_off() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(close_timeout=0.3)) as manager:
        pairs = await connected(manager, 5)
        pairs[0][0].stall()
        manager.broadcast_nowait("x")
        began = monotonic()
        await manager.drain(over=0.1)
        assert 0.3 <= monotonic() - began < 1.0
        assert [peer.close_code for peer, _ in pairs] == [None, 1012, 1012, 1012, 1012]
        assert manager.stats().connections == 0


async def test_hooks_run_for_everybody() -> None:
    manager = ConnectionManager()
    left: list[tuple[str, int | None]] = []

    @manager.on_unsubscribe
    def on_unsubscribe(connection: Connection, channel: str) -> None:
        left.append((channel, connection.close_code))

    @manager.on_disconnect
    def on_disconnect(connection: Connection) -> None:
        left.append(("", connection.close_code))

    async with manager:
        await connected(manager, 3, channels=["news"])
        await manager.drain()
        await eventually(lambda: len(left) == 6)
    assert sorted(left) == [("", 1012)] * 3 + [("news", 1012)] * 3


# More than one call.


async def test_second_call_waits_for_the_first() -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 20)
        first = asyncio.create_task(manager.drain(over=0.4))
        await turns()
        await manager.drain(over=0)
        assert first.done() or is_over(manager)
        assert all(peer.close_code == 1012 for peer, _ in pairs)
        await first
        await manager.drain()


async def test_caller_that_is_cancelled_doesnt_end_it() -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 20)
        first = asyncio.create_task(manager.drain(over=0.4))
        await turns()
        first.cancel()
        await manager.drain()
        assert is_over(manager)
        assert all(peer.close_code == 1012 for peer, _ in pairs)


async def test_aclose_ends_it_at_once() -> None:
    manager = ConnectionManager()
    await manager.start()
    pairs = await connected(manager, 200)
    draining = asyncio.create_task(manager.drain(over=60))
    await asyncio.sleep(0.1)
    began = monotonic()
    await manager.aclose()
    await draining
    assert monotonic() - began < 1
    assert {peer.close_code for peer, _ in pairs} == {1001, 1012}
    await manager.drain()  # nothing is left to do


async def test_hook_may_wait_for_the_drain_that_aclose_ends() -> None:
    manager = ConnectionManager()

    @manager.on_disconnect
    async def on_disconnect(connection: Connection) -> None:
        await manager.drain()

    await manager.start()
    pairs = await connected(manager, 50)
    draining = asyncio.create_task(manager.drain(over=60))
    await eventually(lambda: any(peer.close_code for peer, _ in pairs))
    await asyncio.wait_for(manager.aclose(), 3)
    await draining


async def test_manager_that_was_never_started_refuses_too() -> None:
    manager = ConnectionManager()
    await manager.drain()
    assert manager.is_draining
    with pytest.raises(LimitExceeded):
        await manager.connect(Peer(can_deny=True).websocket)
    await manager.aclose()


async def test_other_event_loop_is_told_so() -> None:
    async with ConnectionManager() as manager:
        await connected(manager, 1)
        with pytest.raises(LifecycleError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, manager.drain())
        assert not manager.is_draining


async def test_manager_is_ready_from_its_start_to_the_drain() -> None:
    manager = ConnectionManager()
    assert not (await manager.health()).is_ready  # which has started it
    health = await manager.health()
    assert (health.is_ready, health.is_ok) == (True, True)
    await manager.drain()
    health = await manager.health()
    assert (health.is_ready, health.is_ok) == (False, True)
    await manager.aclose()


async def test_event_loop_that_is_late_gives_others_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_module, "_PER_SECOND", 1e9)
    async with ConnectionManager() as manager:
        await connected(manager, 500)
        draining = asyncio.create_task(manager.drain())
        seen = set()
        while not draining.done():
            seen.add(manager.stats().connections)
            await asyncio.sleep(0)
        assert len(seen) >= 9


# Brokers and histories.


async def test_broker_that_is_away_changes_nothing() -> None:
    broker = FakeBroker()
    async with ConnectionManager(FakeEngine(broker)) as manager:
        pairs = await connected(manager, 20, channels=["news"])
        broker.is_down = True
        broker.drop_links()

        async def is_away() -> bool:
            health = await manager.health()
            assert health.is_ready
            return not health.is_ok

        while not await is_away():
            await turns()
        began = monotonic()
        await manager.drain(over=0.2)
        assert monotonic() - began < 1.0
        assert {peer.end for peer, _ in pairs} == {(1012, "drain")}
        with pytest.raises(LimitExceeded):
            await manager.connect(Peer(can_deny=True).websocket, channels=["news"])
        began = monotonic()
    assert monotonic() - began < 1.0


async def test_replay_is_cut_where_the_client_knows_and_goes_on_at_another_node(tmp_path: Path) -> None:
    url, history = f"sqlite:///{tmp_path}/messages.db", History(messages=2000)
    few = SlowConsumer(max_backlog_messages=50)
    leaving, staying = (ConnectionManager(url, history=history, slow_consumer=few) for _ in range(2))
    async with leaving, staying:
        first = (await leaving.broadcast(0, channel="news")).position
        await asyncio.gather(*(leaving.broadcast(number, channel="news") for number in range(1, 1000)))
        seen: list[tuple[int, str]] = []
        position = str(first)
        for manager, count in ((leaving, 1), (staying, 999)):
            app = FastAPI()
            app.include_router(create_router(manager, "/ws/{channel}"))
            peer = Peer("/ws/news", subprotocols=["wsbroadcast.v1"])
            peer.scope["query_string"] = f"since={position}".encode()
            async with visit(app, "/ws/news", peer):
                await peer.wait_for(lambda count=count: len(_messages(peer)) + len(seen) >= count)  # type: ignore[misc]  # noqa: B023
                if manager is leaving:
                    peer.stall()
                    draining = asyncio.create_task(manager.drain(over=0))
                    await turns()
                    peer.resume()
                    await draining
                    assert peer.end == (1012, "drain")
                seen += _messages(peer)
                position = seen[-1][1]
            if manager is leaving:
                assert 0 < len(seen) < 999
        assert [number for number, _ in seen] == list(range(1, 1000))


def _messages(peer: Peer) -> list[tuple[int, str]]:
    events = [json.loads(text) for text in peer.messages]
    return [(event["data"], event["position"]) for event in events if event["type"] == "message"]
