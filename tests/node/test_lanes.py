"""What waits on a node: for hooks, or for a crowd that is behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.support.asgi import Peer, connected, eventually, turns
from wsbroadcast import EVERYONE, Audience, ConnectionManager, Delivery, Gap, MemoryEngine, Message, Publication
from wsbroadcast.node.lanes import Lanes

NEWS, SPORT = Audience("channel", "news"), Audience("channel", "sport")


def news(text: str, audience: Audience = NEWS) -> Publication:
    return Publication(Message.of(text), audience)


class Deliverer:
    """Takes its time over an audience that is behind."""

    def __init__(self) -> None:
        self.delivered: list[str] = []
        self.overruns: list[float] = []
        self.behind: set[Audience] = set()
        self.moved = asyncio.Event()
        self.fails = False

    async def until(self, lanes: Lanes) -> list[str]:
        """Wait until nothing waits; return what was delivered."""
        await eventually(lambda: not lanes.waiting)
        return self.delivered

    def is_ready(self, publication: Publication) -> bool:
        return publication.audience not in self.behind

    def deliver_now(self, publication: Publication) -> None:
        self.delivered.append(str(publication.message.data))

    async def deliver_paced(self, publication: Publication) -> None:
        while publication.audience in self.behind:
            await self.moved.wait()
        if self.fails:
            raise KeyError("a hook's")
        self.deliver_now(publication)

    def overrun(self, seconds: float) -> None:
        self.overruns.append(seconds)

    def catch_up(self) -> None:
        self.behind.clear()
        self.moved.set()


@pytest.fixture
def node() -> Deliverer:
    return Deliverer()


@pytest.fixture
async def lanes(node: Deliverer) -> AsyncIterator[Lanes]:
    lanes = Lanes(node, max_publications=3, max_bytes=100)
    yield lanes
    await lanes.aclose()


async def test_crowd_that_is_behind_holds_up_its_own_audience_only(node: Deliverer, lanes: Lanes) -> None:
    node.behind.add(NEWS)
    lanes.put(news("1"))
    lanes.put(news("2"))
    lanes.put(news("sport", SPORT))
    await turns()
    assert node.delivered == ["sport"]
    node.catch_up()
    lanes.put(news("3"))  # behind those that wait, though its crowd is ready
    assert await node.until(lanes) == ["sport", "1", "2", "3"]


@pytest.mark.parametrize("size", [1, 50])
async def test_what_does_not_fit_is_dropped_and_reported_once(size: int, node: Deliverer, lanes: Lanes) -> None:
    node.behind.add(NEWS)
    lanes.put(news("0" * size))
    await turns()  # it has left its lane, and is delivered by and by
    began = asyncio.get_running_loop().time()
    for number in range(1, 10):
        lanes.put(news(f"{number}" * size))
    node.catch_up()
    fitting = 3 if size == 1 else 2
    assert await node.until(lanes) == [f"{number}" * size for number in range(fitting + 1)]
    lanes.put(news("last"))
    assert (await node.until(lanes))[-1] == "last"
    await eventually(lambda: bool(node.overruns))
    (seconds,) = node.overruns
    assert 0.9 < seconds <= asyncio.get_running_loop().time() - began


async def test_delivery_that_raises_stops_nothing(
    node: Deliverer, lanes: Lanes, caplog: pytest.LogCaptureFixture
) -> None:
    node.fails = True
    node.behind.add(NEWS)
    lanes.put(news("1"))
    await turns()
    lanes.put(news("2"))
    node.catch_up()
    assert await node.until(lanes) == ["2"]
    assert caplog.text.count("was not delivered") == 1


async def test_turn_comes_behind_what_waits_and_before_what_follows(node: Deliverer, lanes: Lanes) -> None:
    async def by_itself(text: str) -> None:
        async with lanes.turn(NEWS):
            await asyncio.sleep(0)
            node.delivered.append(text)

    await by_itself("at once")
    node.behind.add(NEWS)
    lanes.put(news("1"))
    first = asyncio.create_task(by_itself("2"))
    given_up = asyncio.create_task(by_itself("never"))
    await turns()
    lanes.put(news("3"))
    last = asyncio.create_task(by_itself("4"))
    await turns()
    given_up.cancel()
    assert node.delivered == ["at once"]
    node.catch_up()
    await asyncio.gather(first, last)
    assert node.delivered == ["at once", "1", "2", "3", "4"]
    assert given_up.cancelled()


async def test_end_forgets_what_waits_and_keeps_nobody_waiting(node: Deliverer, lanes: Lanes) -> None:
    async def by_itself() -> None:
        async with lanes.turn(NEWS):
            pass

    node.behind.add(NEWS)
    lanes.put(news("1"))
    waiting = asyncio.create_task(by_itself())
    for number in range(9):
        lanes.put(news(f"{number}"))
    await turns()
    await lanes.aclose()
    await asyncio.wait_for(waiting, 5)
    lanes.put(news("late"))
    node.catch_up()
    await turns()
    assert (node.delivered, node.overruns) == ([], [])
    assert not lanes.waiting


async def test_end_before_a_lane_has_begun_keeps_nobody_waiting(node: Deliverer, lanes: Lanes) -> None:
    async def by_itself() -> None:
        async with lanes.turn(NEWS):
            pass

    node.behind.add(NEWS)
    lanes.put(news("1"))
    turn = by_itself()
    turn.send(None)  # it has its place before the lane's task runs its first step
    await lanes.aclose()
    with pytest.raises(StopIteration):
        turn.send(None)
    assert not lanes.waiting
    assert node.delivered == []


async def test_end_may_be_patient(node: Deliverer, lanes: Lanes) -> None:
    node.behind.add(NEWS)
    lanes.put(news("1"))
    lanes.put(news("2"))
    closing = asyncio.create_task(lanes.aclose(patience=60))
    await turns()
    assert not closing.done()
    node.catch_up()
    await asyncio.wait_for(closing, 5)
    assert node.delivered == ["1", "2"]


# In a manager.


async def test_broadcasts_that_are_awaited_and_not_awaited_keep_their_order_through_hooks_that_wait(
    manager: ConnectionManager,
) -> None:
    @manager.on_deliver
    async def slower_first(delivery: Delivery) -> None:
        for _ in range(20 - int(delivery.message.data)):
            await asyncio.sleep(0)

    [(peer, _)] = await connected(manager, 1)

    async def nowait(text: str) -> None:
        manager.broadcast_nowait(text)

    calls: list[Callable[[str], Awaitable[object]]] = [
        manager.broadcast,
        nowait,
        manager.broadcast_local,
        nowait,
        nowait,
    ]
    await asyncio.gather(*(calls[number % 5](str(number)) for number in range(20)))
    assert await peer.wait_messages(20) == [str(number) for number in range(20)]


async def test_awaited_broadcast_comes_back_when_what_was_not_awaited_is_delivered_too(
    manager: ConnectionManager,
) -> None:
    @manager.on_deliver
    async def wait(delivery: Delivery) -> None:
        await asyncio.sleep(0)

    [(peer, _)] = await connected(manager, 1)
    manager.broadcast_nowait("1")
    manager.broadcast_nowait("2")
    await manager.broadcast("3")
    assert await peer.wait_messages(3) == ["1", "2", "3"]


async def test_hook_broadcasts_without_waiting_for_what_waits_for_it(manager: ConnectionManager) -> None:
    @manager.on_deliver
    async def log(delivery: Delivery) -> None:
        if delivery.message.data == "1":
            await manager.broadcast("from the hook")
            manager.broadcast_nowait("later")

    [(peer, _)] = await connected(manager, 1)
    manager.broadcast_nowait("1")
    manager.broadcast_nowait("2")
    async with asyncio.timeout(5):
        await manager.broadcast("3")
    messages = await peer.wait_messages(5)
    # "later" comes behind what was there before it: all of it, unless tasks begin at once.
    assert [message for message in messages if message != "later"] == ["from the hook", "1", "2", "3"]
    assert messages.index("later") > messages.index("1")


async def test_hook_that_answers_without_awaiting_leaves_the_event_loop_to_others(manager: ConnectionManager) -> None:
    count = 0

    @manager.on_deliver
    def echo(delivery: Delivery) -> None:
        nonlocal count
        count += 1
        if not is_enough:
            manager.broadcast_nowait("echo")

    is_enough = False
    manager.broadcast_nowait("one")
    await eventually(lambda: count > 1000)
    is_enough = True


async def test_failing_hook_of_what_is_not_awaited_is_logged(
    manager: ConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    @manager.on_deliver
    def fail(delivery: Delivery) -> None:
        if delivery.message.data == "bad":
            raise KeyError("broken")

    [(peer, _)] = await connected(manager, 1)
    manager.broadcast_nowait("bad")
    manager.broadcast_nowait("good")
    assert await peer.wait_messages(1) == ["good"]
    assert "a message was not delivered" in caplog.text
    assert manager.stats().hook_errors == 1


async def test_end_of_the_manager_sends_what_waits_for_hooks() -> None:
    async with ConnectionManager() as manager:

        @manager.on_deliver
        async def wait(delivery: Delivery) -> None:
            await asyncio.sleep(0)

        peer = Peer()
        await manager.connect(peer.websocket)
        for number in range(5):
            manager.broadcast_nowait(f"{number}")
    await peer.wait_close()
    assert peer.messages == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("engine", ["memory", "other"])
async def test_what_a_node_drops_is_one_gap_unless_there_are_no_other_nodes(
    engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Linking(MemoryEngine):
        name = "other"
        links_nodes = True

    gaps: list[Gap] = []
    go = asyncio.Event()
    async with ConnectionManager(Linking() if engine == "other" else MemoryEngine()) as manager:

        @manager.on_deliver
        async def wait(delivery: Delivery) -> None:
            await go.wait()

        manager.on_gap(gaps.append)
        await connected(manager, 1)
        manager._core.life.node._lanes = Lanes(manager._core.life.node, max_publications=3)
        for number in range(10):
            manager.broadcast_nowait(f"{number}")
        await eventually(lambda: "are missing here" in caplog.text)
        await turns()
        go.set()
    assert caplog.text.count("are missing here") == 1
    assert [(gap.engine, gap.audiences) for gap in gaps] == (
        [] if engine == "memory" else [("other", frozenset((EVERYONE,)))]
    )


async def test_engine_that_reports_after_the_end_is_not_heard(manager: ConnectionManager) -> None:
    gaps: list[Gap] = []
    manager.on_gap(gaps.append)
    node = manager._core.life.node
    await manager.aclose()
    node.gap(Gap("fake", 1.0))
    node.take(news("late"))
    await turns()
    assert gaps == []
