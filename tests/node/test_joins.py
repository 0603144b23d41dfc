"""Members and the broker: joins wait for it, and it holds what somebody here is in, no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support import servers
from tests.support.asgi import Peer, cancel_at, eventually, turns
from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import (
    ConfigurationError,
    Connection,
    ConnectionClosed,
    ConnectionManager,
    EngineUnavailable,
    Gap,
    Hook,
    LifecycleError,
    PermissionDenied,
)


class Diary(Hook):
    """Writes down what it is told, and what the broker held then."""

    def __init__(self, broker: FakeBroker) -> None:
        self.broker = broker
        self.told: list[str] = []
        self.held: list[set[str]] = []
        self.gaps: list[Gap] = []

    async def on_connect(self, connection: Connection) -> None:
        self.told.append("connect")
        self.held.append(self.broker.held)

    async def on_disconnect(self, connection: Connection) -> None:
        self.told.append("disconnect")

    async def on_subscribe(self, connection: Connection, channel: str) -> None:
        self.told.append(f"subscribe {channel}")
        self.held.append(self.broker.held)
        if channel == "forbidden":
            raise PermissionDenied("no")

    async def on_unsubscribe(self, connection: Connection, channel: str) -> None:
        self.told.append(f"unsubscribe {channel}")

    async def on_gap(self, gap: Gap) -> None:
        self.gaps.append(gap)


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def diary(broker: FakeBroker) -> Diary:
    return Diary(broker)


@pytest.fixture
async def manager(broker: FakeBroker, diary: Diary) -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager(FakeEngine(broker), hooks=[diary]) as manager:
        yield manager
    assert broker.links == []


def names(*some: str) -> set[str]:
    return {f"wsbroadcast:{name}" for name in some}


async def settled(broker: FakeBroker, *some: str) -> None:
    await eventually(lambda: broker.held == names(*some))


async def test_connect_returns_when_the_broker_has_confirmed(
    manager: ConnectionManager, broker: FakeBroker, diary: Diary
) -> None:
    await manager.connect(Peer().websocket, user=7, channels=["news"])
    assert broker.held == names("everyone", "user:7", "channel:news")
    assert diary.held == [broker.held, broker.held], "hooks run when messages arrive"


async def test_broadcast_comes_back_through_the_broker(manager: ConnectionManager) -> None:
    peers = [Peer(), Peer()]
    connections = [await manager.connect(peer.websocket, user=7, channels=["news"]) for peer in peers]
    await manager.broadcast("1", channel="news", exclude=connections[0])
    await manager.broadcast({"n": 2}, user=7)
    await manager.broadcast(b"3")
    manager.broadcast_nowait("4")
    assert await peers[1].wait_messages(4) == ["1", '{"n":2}', b"3", "4"]
    assert await peers[0].wait_messages(3) == ['{"n":2}', b"3", "4"]


async def test_audience_is_held_until_its_last_member_has_left(manager: ConnectionManager, broker: FakeBroker) -> None:
    first = await manager.connect(Peer().websocket, channels=["news"])
    second = await manager.connect(Peer().websocket, channels=["news"])
    manager.disconnect(first)
    await manager.subscribe(second, "sport")
    await manager.unsubscribe(second, "news")
    await settled(broker, "everyone", "channel:sport")
    manager.disconnect(second)
    await settled(broker)


async def test_several_channels_are_one_question(manager: ConnectionManager, broker: FakeBroker) -> None:
    connection = await manager.connect(Peer().websocket)
    broker.subscriptions.clear()
    await manager.subscribe(connection, *(f"c{number}" for number in range(100)))
    assert [len(asked) for asked in broker.subscriptions] == [100]


async def test_channels_after_a_refused_one_are_not_held(manager: ConnectionManager, broker: FakeBroker) -> None:
    connection = await manager.connect(Peer().websocket)
    with pytest.raises(PermissionDenied):
        await manager.subscribe(connection, "news", "forbidden", "sport")
    assert connection.channels == {"news"}
    await settled(broker, "everyone", "channel:news")


async def test_peer_that_leaves_while_the_broker_is_asked_was_never_there(
    manager: ConnectionManager, broker: FakeBroker, diary: Diary
) -> None:
    peer = Peer()
    broker.is_hung.set()
    connecting = asyncio.create_task(_connect(manager, peer))
    await turns()
    peer.vanish()
    broker.is_hung.clear()
    with pytest.raises(ConnectionClosed):
        await connecting
    await turns()
    assert diary.told == []
    await settled(broker)


async def test_connect_that_is_cancelled_anywhere_leaves_nothing(
    manager: ConnectionManager, broker: FakeBroker, diary: Diary
) -> None:
    step = 0
    while await cancel_at(step, _connect(manager, Peer())):
        step += 1
        assert manager.connections == []
        await settled(broker)
        assert diary.told.count("connect") == diary.told.count("disconnect")
    assert step > 1


async def test_subscribe_that_is_cancelled_anywhere_leaves_nothing(
    manager: ConnectionManager, broker: FakeBroker, diary: Diary
) -> None:
    connection = await manager.connect(Peer().websocket)
    step = 0
    while await cancel_at(step, manager.subscribe(connection, "news", "sport")):
        step += 1
        await manager.unsubscribe(connection, "news", "sport")
        await settled(broker, "everyone")
        for channel in ("news", "sport"):
            assert diary.told.count(f"subscribe {channel}") == diary.told.count(f"unsubscribe {channel}")
    assert step > 1
    assert connection.channels == {"news", "sport"}


async def test_outage_lets_people_in_and_serves_them_locally(
    manager: ConnectionManager, broker: FakeBroker, diary: Diary
) -> None:
    peer = Peer()
    await manager.connect(peer.websocket)
    broker.is_down = True
    broker.drop_links()
    await _until(manager, is_ok=False)
    late = Peer()
    await manager.connect(late.websocket, channels=["news"])
    await manager.broadcast_local("here", channel="news")
    assert await late.wait_messages(1) == ["here"]
    with pytest.raises(EngineUnavailable):
        await manager.broadcast("everywhere")
    broker.is_down = False
    await _until(manager, is_ok=True)
    await manager.broadcast("back", channel="news")
    assert await late.wait_messages(2) == ["here", "back"]
    assert peer.messages == []
    assert [gap.engine for gap in diary.gaps] == ["fake"]
    assert manager.stats().engine.gaps == 1


async def test_connect_that_waits_for_the_broker_ends_with_the_manager(
    manager: ConnectionManager, broker: FakeBroker, diary: Diary
) -> None:
    broker.is_hung.set()
    connecting = asyncio.create_task(_connect(manager, Peer()))
    await turns()
    await manager.aclose()
    with pytest.raises(LifecycleError):
        await asyncio.wait_for(connecting, 5)
    assert diary.told == []


async def test_audience_that_is_about_to_get_a_member_is_held_whoever_leaves_it(
    manager: ConnectionManager, broker: FakeBroker
) -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()

    @manager.on_subscribe
    async def slow(connection: Connection, channel: str) -> None:
        if channel == "slow":
            entered.set()
            await go_on.wait()

    joining = await manager.connect(Peer().websocket)
    task = asyncio.create_task(manager.subscribe(joining, "slow", "x"))
    await entered.wait()
    other = await manager.connect(Peer().websocket, channels=["x"])
    manager.disconnect(other)
    await asyncio.sleep(0.05)  # longer than a name lingers
    assert "wsbroadcast:channel:x" in broker.held
    go_on.set()
    await task
    assert broker.held >= names("channel:slow", "channel:x")


async def test_transaction_is_refused_by_an_engine_that_has_none(manager: ConnectionManager) -> None:
    with pytest.raises(ConfigurationError, match="the fake engine can't publish inside a transaction"):
        await manager.broadcast("text", transaction=object())


async def test_manager_runs_again_in_another_loop(broker: FakeBroker) -> None:
    manager = ConnectionManager(FakeEngine(broker))
    peer = Peer()

    def elsewhere() -> None:
        async def use() -> None:
            await manager.connect(Peer().websocket)

        asyncio.run(use())

    await asyncio.to_thread(elsewhere)
    broker.links.clear()
    await manager.connect(peer.websocket, channels=["news"])
    await manager.broadcast("text", channel="news")
    assert await peer.wait_messages(1) == ["text"]
    await manager.aclose()


async def _connect(manager: ConnectionManager, peer: Peer) -> None:
    connection = await manager.connect(peer.websocket, user=7, channels=["news", "sport"])
    manager.disconnect(connection)


async def _until(manager: ConnectionManager, *, is_ok: bool) -> None:
    async def so() -> bool:
        return (await manager.health()).is_ok is is_ok

    await servers.eventually(so)
