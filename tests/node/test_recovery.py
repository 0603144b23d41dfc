"""Connections that come back get what they missed, or are told that it can't be had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually, turns
from wsbroadcast import (
    EVERYONE,
    LAST,
    USERS,
    Audience,
    ConfigurationError,
    ConnectionManager,
    Delivery,
    EngineUnavailable,
    Gap,
    History,
    MemoryEngine,
    Position,
    Recovery,
    SlowConsumer,
)
from wsbroadcast.history import Replay

NEWS = Audience.channel("news")
KEPT = History(messages=10)


@pytest.fixture
async def manager() -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager(history={"*": KEPT, USERS: KEPT, EVERYONE: KEPT}) as manager:
        yield manager


async def say(manager: ConnectionManager, first: int, last: int, **options: Any) -> list[Position]:
    options = options or {"channel": "news"}
    receipts = [await manager.broadcast(str(number), **options) for number in range(first, last + 1)]
    return [receipt.position for receipt in receipts if receipt.position is not None]


async def come_back(manager: ConnectionManager, since: Any, **options: Any) -> tuple[Peer, Recovery]:
    peer = Peer()
    connection = await manager.connect(peer.websocket, channels=["news"], since=since, **options)
    return peer, connection.recovered["news"]


def texts(first: int, last: int) -> list[str]:
    return [str(number) for number in range(first, last + 1)]


def test_history_that_is_longer_than_it_is_remembered_says_what_to_raise() -> None:
    with pytest.raises(ConfigurationError, match=r"Raise remember as well, as in History\(seconds=604800, remember="):
        History(seconds=7 * 86_400)
    assert History(seconds=604_800, remember=604_800).remember == 604_800


@pytest.mark.parametrize(
    "options", [{"messages": 10**9 + 1}, {"messages": 10**30}, {"remember": 1e300}, {"seconds": 1e10, "remember": 1e10}]
)
def test_history_of_more_than_brokers_can_count_to_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"History\.(messages|seconds|remember) is at most [13],"):
        History(**options)


async def test_receipt_says_where_the_message_is_kept(manager: ConnectionManager) -> None:
    one, two = await say(manager, 1, 2)
    assert (one.epoch, one.offset, two.offset) == (two.epoch, 1, 2)
    assert await manager.position("news") == two


async def test_who_comes_back_gets_what_it_missed_and_what_follows(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 8)
    peer, recovery = await come_back(manager, positions[2])
    assert recovery == Recovery(True, "", positions[-1])
    await say(manager, 9, 12)
    assert await peer.wait_messages(9) == texts(4, 12)


async def test_who_has_missed_nothing_gets_nothing(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 3)
    peer, recovery = await come_back(manager, str(positions[-1]))
    assert recovery.recovered
    await say(manager, 4, 4)
    assert await peer.wait_messages(1) == ["4"]


async def test_who_has_missed_too_much_is_told_and_gets_nothing_older(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 30)
    back = [await come_back(manager, since) for since in (positions[19], positions[18], positions[0])]
    await manager.broadcast("live", channel="news")
    for (peer, recovery), reason in zip(back, ("", "too_many", "too_many"), strict=True):
        assert recovery == Recovery(not reason, reason, positions[-1])  # type: ignore[arg-type]
        await peer.wait_for(lambda: "live" in peer.messages)  # noqa: B023
        assert peer.messages == ["live"] if reason else [*texts(21, 30), "live"]


@pytest.mark.parametrize(
    "since",
    [
        *("", "garbage", ":", "x:", ":1", "x:-1", "x:1e3", "x:" + "9" * 40, "x" * 1_000_000, "x:1", "\0", "ä:1"),
        *(Position("", 1), Position("other", 1), Position("other", -1), Position("other", 10**30)),
    ],
)
async def test_position_that_is_none_is_refused(manager: ConnectionManager, since: str | Position) -> None:
    await say(manager, 1, 3)
    peer, recovery = await come_back(manager, since)
    assert recovery == Recovery(False, "epoch", await manager.position("news"))
    await manager.broadcast("live", channel="news")
    assert await peer.wait_messages(1) == ["live"]


@pytest.mark.parametrize("offset", [-1, 4, 10**30])
async def test_offset_that_never_was_is_refused(manager: ConnectionManager, offset: int) -> None:
    positions = await say(manager, 1, 3)
    _, recovery = await come_back(manager, Position(positions[0].epoch, offset))
    assert (recovery.recovered, recovery.position) == (False, positions[-1])


async def test_position_of_another_channel_is_refused(manager: ConnectionManager) -> None:
    await say(manager, 1, 3)
    (other,) = await say(manager, 1, 1, channel="other")
    _, recovery = await come_back(manager, other)
    assert recovery.reason == "epoch"


@pytest.mark.parametrize(
    "since", [5, 1.5, b"x:1", ("x", 1), ["x", 1], {"news": 5}, {"other": "x:1"}, {5: "x:1"}, object()]
)
async def test_since_that_is_no_position_is_an_error(manager: ConnectionManager, since: Any) -> None:
    peer = Peer()
    with pytest.raises(ValueError, match="since"):
        await manager.connect(peer.websocket, channels=["news"], since=since)
    assert peer.accepted is None


async def test_last_message_alone(manager: ConnectionManager) -> None:
    peer, recovery = await come_back(manager, LAST)
    assert recovery.recovered
    await say(manager, 1, 3)
    assert await peer.wait_messages(3) == texts(1, 3)
    peer, recovery = await come_back(manager, LAST)
    await say(manager, 4, 4)
    assert await peer.wait_messages(2) == texts(3, 4)


async def test_messages_of_a_user_and_of_everyone_are_recovered(manager: ConnectionManager) -> None:
    mine = await say(manager, 1, 2, user=5)
    everyones = await say(manager, 3, 4, to=EVERYONE)
    peer = Peer()
    since = {Audience.user(5): mine[0], EVERYONE: everyones[0], "news": None}
    connection = await manager.connect(peer.websocket, user=5, channels=["news"], since=since)
    assert sorted(await peer.wait_messages(2)) == ["2", "4"]
    assert connection.recovered == {
        Audience.user(5): Recovery(True, "", mine[1]),
        EVERYONE: Recovery(True, "", everyones[1]),
    }
    with pytest.raises(ValueError, match="neither a joined channel nor"):
        await manager.connect(Peer().websocket, user=6, since={Audience.user(5): mine[0]})


async def test_subscribe_since(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 5)
    peer = Peer()
    connection = await manager.connect(peer.websocket)
    assert await manager.subscribe(connection, "other") is None
    assert await connection.subscribe("news", since=positions[1]) == Recovery(True, "", positions[-1])
    await say(manager, 6, 6)
    assert await peer.wait_messages(4) == texts(3, 6)


async def test_channel_without_history_can_t_be_recovered() -> None:
    async with ConnectionManager(history={"kept:*": KEPT}) as manager:
        receipt = await manager.broadcast("1", channel="news")
        assert receipt.position is None
        _, recovery = await come_back(manager, "x:1")
        assert recovery == Recovery(False, "not_kept", None)
        connection = await manager.connect(Peer().websocket)
        assert await connection.subscribe("other", since="x:1") == Recovery(False, "not_kept", None)
        assert await connection.subscribe("kept:1", since="x:1") == Recovery(
            False, "epoch", await manager.position("kept:1")
        )
        assert manager.stats().refused_recoveries == {"not_kept": 2, "epoch": 1}
        with pytest.raises(ConfigurationError, match="nothing is kept for the channel 'news'"):
            await manager.position("news")


async def test_manager_without_history_recovers_nothing() -> None:
    async with ConnectionManager() as manager:
        peer, recovery = await come_back(manager, "x:1")
        assert recovery == Recovery(False, "not_kept", None)
        assert manager.stats().refused_recoveries == {"not_kept": 1}
        await manager.broadcast("live", channel="news")
        assert await peer.wait_messages(1) == ["live"]


async def test_who_named_no_position_recovers_nothing(manager: ConnectionManager) -> None:
    connection = await manager.connect(Peer().websocket, channels=["news"])
    assert connection.recovered == {}
    assert manager.stats().refused_recoveries == {}


@pytest.mark.parametrize(
    "since",
    [{"epoch": "x", "offset": 1}, {"news": {"epoch": "x", "offset": 1}}, {"news": ["x", 1]}, ["x", 1], ("x", 1), 5],
)
async def test_error_says_what_a_position_looks_like(manager: ConnectionManager, since: Any) -> None:
    with pytest.raises(ValueError, match=r'^since .*"kX2dh0Qb7a_Z:17"'):
        await manager.connect(Peer().websocket, channels=["news"], since=since)
    with pytest.raises(ValueError, match=r'^since is a dict .*"kX2dh0Qb7a_Z:17"'):
        await manager.connect(Peer().websocket, channels=["news", "other"], since="x:1")


async def test_connect_that_hooks_refuse_replays_nothing(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 5)

    @manager.on_connect
    async def refuse(connection: object) -> bool:
        await say(manager, 6, 6)
        return False

    peer = Peer()
    with pytest.raises(Exception, match="not allowed"):
        await manager.connect(peer.websocket, channels=["news"], since=positions[0])
    assert peer.messages == []


async def test_what_comes_while_hooks_run_comes_behind_the_replay(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 3)
    goes_on = asyncio.Event()

    @manager.on_connect
    async def wait(connection: object) -> None:
        await goes_on.wait()

    peer = Peer()
    connecting = asyncio.ensure_future(
        asyncio.wait_for(manager.connect(peer.websocket, channels=["news"], since=positions[0]), 5)
    )
    await eventually(lambda: manager.connections)
    await say(manager, 4, 5)
    await turns()
    assert peer.messages == []
    goes_on.set()
    await connecting
    await say(manager, 6, 6)
    assert await peer.wait_messages(5) == texts(2, 6)


async def test_on_deliver_hooks_see_what_is_replayed(manager: ConnectionManager) -> None:
    seen: list[tuple[str, bool]] = []
    positions = await say(manager, 1, 4)

    @manager.on_deliver
    async def look(delivery: Delivery) -> None:
        await asyncio.sleep(0)
        seen.append((str(delivery.message.data), delivery.is_replay))
        if delivery.message.data == "3":
            delivery.recipients.clear()

    peer, _ = await come_back(manager, positions[0])
    await say(manager, 5, 6)
    assert await peer.wait_messages(4) == ["2", "4", "5", "6"]
    assert [text for text, is_replay in seen if is_replay][:3] == ["2", "3", "4"]


async def test_excluded_user_gets_it_in_no_replay(manager: ConnectionManager) -> None:
    at = await manager.position("news")
    await manager.broadcast("1", channel="news", exclude_users=[5])
    await manager.broadcast("2", channel="news")
    for user, expected in ((5, ["2"]), (6, ["1", "2"])):
        peer, recovery = await come_back(manager, at, user=user)
        assert recovery.recovered
        await turns(10)
        assert peer.messages == expected


async def test_slow_connection_is_replayed_as_it_takes(manager: ConnectionManager) -> None:
    big = History(messages=2000)
    async with ConnectionManager(history=big) as manager:
        at = await manager.position("news")
        for number in range(2000):
            await manager.broadcast(f"{number} {'x' * 1000}", channel="news")
        peer = Peer()
        await manager.connect(peer.websocket, channels=["news"], since=at)
        peer.stall()
        await manager.broadcast("live", channel="news")
        await turns(20)
        assert manager.stats().backlog_bytes < 64 * 1024
        peer.resume()
        messages = await peer.wait_messages(2001)
        assert [str(text).split()[0] for text in messages] == [*map(str, range(2000)), "live"]
        assert manager.stats().dropped == {}


@pytest.mark.parametrize("has_hook", [False, True], ids=["plain", "hook"])
@pytest.mark.parametrize("room", [1, 2, 3, 64, 1024])
async def test_who_comes_back_to_many_channels_is_replayed_as_it_takes(room: int, has_hook: bool) -> None:
    manager = ConnectionManager(history=KEPT, slow_consumer=SlowConsumer(max_backlog_messages=room))
    if has_hook:

        @manager.on_deliver
        async def wait(delivery: Delivery) -> None:
            await asyncio.sleep(0)

    channels = [f"room:{number}" for number in range(8 if room < 4 else 100)]
    async with manager:
        since = {channel: await manager.position(channel) for channel in channels}
        for channel in channels:
            await say(manager, 1, 10, channel=channel)
        peer = Peer()
        connection = await manager.connect(peer.websocket, channels=channels, since=since)
        assert all(recovery.recovered for recovery in connection.recovered.values())
        messages = await peer.wait_messages(10 * len(channels))
        assert sorted(messages) == sorted(texts(1, 10) * len(channels))
        assert manager.stats().dropped == manager.stats().evicted == {}


async def test_thousand_come_back_at_once(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 5)
    peers = [Peer() for _ in range(1000)]
    await asyncio.gather(
        *(asyncio.wait_for(manager.connect(p.websocket, channels=["news"], since=positions[1]), 30) for p in peers)
    )
    await say(manager, 6, 6)
    for peer in peers:
        assert await peer.wait_messages(4) == texts(3, 6)
    await eventually(lambda: manager.stats().recoveries == 1000)


async def test_idempotency_key_sends_once(manager: ConnectionManager) -> None:
    peer = Peer()
    await manager.connect(peer.websocket, channels=["news"])
    receipts = [await manager.broadcast("once", channel="news", idempotency_key="a") for _ in range(3)]
    assert [receipt.is_repeat for receipt in receipts] == [False, True, True]
    assert len({receipt.position for receipt in receipts}) == 1
    await say(manager, 2, 2)
    assert await peer.wait_messages(2) == ["once", "2"]


@pytest.mark.parametrize("key", ["", "x" * 201, "ä" * 101, "\ud800", b"a", 5, True, ["a"], float("nan")])
async def test_idempotency_key_is_a_short_text(manager: ConnectionManager, key: Any) -> None:
    with pytest.raises(ValueError, match="idempotency_key is a text of 1 to 200 bytes of UTF-8, not"):
        await manager.broadcast("x", channel="news", idempotency_key=key)
    assert (await manager.position("news")).offset == 0


async def test_idempotency_key_needs_a_history() -> None:
    async with ConnectionManager() as manager:
        with pytest.raises(ConfigurationError, match="idempotency_key needs a history"):
            await manager.broadcast("x", channel="news", idempotency_key="a")


@pytest.mark.parametrize("since", [None, LAST, "garbage"])
@pytest.mark.parametrize("limit", [0, -1, True, 1.5, float("nan"), "5", [], -(10**30)])
async def test_limit_is_a_positive_number(manager: ConnectionManager, since: Any, limit: Any) -> None:
    with pytest.raises(ValueError, match="limit is a positive number of messages, not"):
        await manager.history("news", since=since, limit=limit)


async def test_history_is_read_page_by_page(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 8)
    page = await manager.history("news")
    assert [each.data for each in page.messages] == texts(1, 8)
    assert (page.position, page.is_complete) == (positions[-1], True)
    page = await manager.history("news", limit=3)
    assert [each.data for each in page.messages] == texts(6, 8)
    page = await manager.history("news", since=positions[1], limit=3)
    assert [each.data for each in page.messages] == texts(3, 5)
    page = await manager.history("news", since=page.position, limit=30)
    assert [each.data for each in page.messages] == texts(6, 8)
    assert not (await manager.history("news", since="other:1")).is_complete


async def test_forgotten_history_is_gone(manager: ConnectionManager) -> None:
    positions = await say(manager, 1, 3)
    peer, _ = await come_back(manager, positions[-1])
    await manager.forget("news")
    _, recovery = await come_back(manager, positions[-1])
    assert recovery.reason == "epoch"
    assert (await manager.history("news")).messages == []
    (at,) = await say(manager, 4, 4)
    assert at.offset == 1
    assert await peer.wait_messages(1) == ["4"]


async def test_subscribe_that_is_cancelled_while_it_looks_is_none() -> None:
    engine = MemoryEngine()
    read = engine.read
    is_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def read_slowly(audience: Audience, since: Position | None, history: History) -> Replay:
        if since is not None and audience == NEWS:
            is_asked.set()
            await may_answer.wait()
        return await read(audience, since, history)

    engine.read = read_slowly  # type: ignore[method-assign]
    async with ConnectionManager(engine, history=KEPT) as manager:
        peer = Peer()
        connection = await manager.connect(peer.websocket, channels=["other"])
        elsewhere = Position("elsewhere", 1)  # for which it is looked what is newest
        task = asyncio.create_task(manager.subscribe(connection, "news", since=elsewhere))
        await is_asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert connection.channels == {"other"}
        may_answer.set()
        recovery = await manager.subscribe(connection, "news", since=elsewhere)
        assert recovery is not None
        assert recovery.reason == "epoch"
        await manager.broadcast("live", channel="news")
        assert await peer.wait_messages(1) == ["live"]


async def test_position_of_nowhere_is_no_gap_for_others_while_nothing_can_be_read() -> None:
    engine, gaps = MemoryEngine(), []

    async def fail(audience: Audience, since: Position | None, history: History) -> Replay:
        raise EngineUnavailable("not now")

    async with ConnectionManager(engine, history=KEPT) as manager:

        @manager.on_gap
        async def tell(gap: Gap) -> None:
            gaps.append(gap)

        peer = Peer()
        await manager.connect(peer.websocket, channels=["news"])
        engine.read = fail  # type: ignore[method-assign]
        _, recovery = await come_back(manager, "garbage")
        assert recovery.reason == "unavailable"
        for number in range(3):
            manager.broadcast_nowait(str(number), channel="news")
        assert await peer.wait_messages(3) == ["0", "1", "2"]
        assert (gaps, manager.stats().engine.gaps) == ([], 0)
