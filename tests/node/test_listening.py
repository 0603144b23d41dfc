"""Listeners: broadcasts as an async iterator in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.asgi import turns
from wsbroadcast import (
    Audience,
    ConfigurationError,
    ConnectionManager,
    Delivery,
    History,
    Lagged,
    Listener,
    ListenPolicy,
    Position,
    Recovery,
)
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.history import Replay
from wsbroadcast.testing import Cluster


@pytest.fixture
async def manager() -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager(history={"kept:*": History(messages=5)}) as manager:
        yield manager


async def take(listener: Listener, count: int) -> list[object]:
    async with asyncio.timeout(5):
        return [(await anext(listener)).data for _ in range(count)]


async def is_quiet(listener: Listener) -> bool:
    reading = asyncio.ensure_future(anext(listener))
    await turns()
    reading.cancel()
    await asyncio.wait([reading])
    return reading.cancelled()


@pytest.mark.parametrize("channel", ["kept:1", "1"])
async def test_listener_gets_what_is_broadcast_to_its_channel(manager: ConnectionManager, channel: str) -> None:
    async with manager.listen(channel) as messages:
        for data in ("text", b"bytes", {"a": [1, None]}, "ü"):
            await manager.broadcast(data, channel=channel)
            message = await anext(messages)
            assert (message.channel, message.data) == (channel, data)
            assert (message.position is None) is (channel == "1")
        await manager.broadcast("x", channel="other")
        await manager.broadcast("x")
        await manager.broadcast("x", user=5)
        assert await is_quiet(messages)
    assert manager.stats().connections == 0


async def test_listener_of_a_user_and_of_several_channels(manager: ConnectionManager) -> None:
    async with manager.listen("a", "kept:b", user=5) as messages:
        await manager.broadcast("1", user=5)
        await manager.broadcast("2", channel="a")
        await manager.broadcast("3", channel="kept:b")
        await manager.broadcast("4", channels=["a", "kept:b"])
        assert sorted(map(str, await take(messages, 4))) == ["1", "2", "3", "4"]
        assert await is_quiet(messages)


@pytest.mark.parametrize("channel", ["kept:1", "1"])
async def test_excluded_listener_gets_nothing(manager: ConnectionManager, channel: str) -> None:
    async with manager.listen(channel, user=5) as one, manager.listen(channel, user=6) as other:
        await manager.broadcast("1", channel=channel, exclude=one)
        await manager.broadcast("2", channel=channel, exclude=[one, other])
        await manager.broadcast("3", channel=channel, exclude_users=[6])
        assert (await take(one, 1), await take(other, 1)) == (["3"], ["1"])
        assert await is_quiet(one)
        assert await is_quiet(other)


async def test_listener_since_a_position(manager: ConnectionManager) -> None:
    positions = [(await manager.broadcast(str(number), channel="kept:1")).position for number in range(8)]
    async with manager.listen("kept:1", since=positions[3]) as messages:
        assert messages.recovered == {"kept:1": Recovery(True, "", positions[-1])}
        assert await take(messages, 4) == ["4", "5", "6", "7"]
    async with manager.listen("kept:1", since=positions[1]) as messages:
        assert messages.recovered["kept:1"].reason == "too_many"
        assert await is_quiet(messages)
    async with manager.listen("1", since="x:1") as messages:
        assert messages.recovered == {"1": Recovery(False, "not_kept", None)}


async def test_full_listener_is_told_once_and_goes_on(manager: ConnectionManager) -> None:
    async with manager.listen("1", size=3) as messages:
        for number in range(10):
            await manager.broadcast(str(number), channel="1")
        assert await take(messages, 3) == ["0", "1", "2"]
        with pytest.raises(Lagged) as lagged:
            await anext(messages)
        assert lagged.value.missed == 7
        await manager.broadcast("later", channel="1")
        assert await take(messages, 1) == ["later"]


@pytest.mark.parametrize("policy", ["raise", "drop_oldest"])
async def test_what_a_listener_does_not_get_takes_no_room(manager: ConnectionManager, policy: ListenPolicy) -> None:
    async with manager.listen("1", user=5, size=2, policy=policy) as messages:
        await manager.broadcast("first", channel="1")
        for number in range(10):
            await manager.broadcast(str(number), channel="1", exclude=messages)
            await manager.broadcast(str(number), channel="1", exclude_users=[5])
        await manager.broadcast("second", channel="1")
        assert await take(messages, 2) == ["first", "second"]
        assert await is_quiet(messages)


@pytest.mark.parametrize("policy", ["raise", "drop_oldest"])
async def test_broadcast_to_several_channels_takes_room_once(manager: ConnectionManager, policy: ListenPolicy) -> None:
    async with manager.listen("1", "2", "3", size=2, policy=policy) as messages:
        for text in ("first", "second"):
            await manager.broadcast(text, channels=["1", "2", "3"])
        assert await take(messages, 2) == ["first", "second"]
        assert await is_quiet(messages)


async def test_broadcast_to_several_channels_is_missed_once(manager: ConnectionManager) -> None:
    async with manager.listen("1", "2", size=1) as messages:
        await manager.broadcast("first", channel="1")
        await manager.broadcast("missed", channels=["1", "2"])
        assert await take(messages, 1) == ["first"]
        with pytest.raises(Lagged) as lagged:
            await anext(messages)
        assert lagged.value.missed == 1
        assert await is_quiet(messages)


async def test_full_listener_that_drops_the_oldest(manager: ConnectionManager) -> None:
    async with manager.listen("1", size=3, policy="drop_oldest") as messages:
        for number in range(10):
            await manager.broadcast(str(number), channel="1")
        assert await take(messages, 3) == ["7", "8", "9"]


async def test_listener_reads_on_in_the_history(manager: ConnectionManager) -> None:
    async with manager.listen("kept:1", size=1) as messages:
        for number in range(5):
            await manager.broadcast(str(number), channel="kept:1")
        assert await take(messages, 5) == ["0", "1", "2", "3", "4"]
        for number in range(100):
            await manager.broadcast(str(number), channel="kept:1")
        with pytest.raises(Lagged) as lagged:
            await anext(messages)
        missed = lagged.value.missed
        assert missed is not None
        assert await take(messages, 100 - missed) == [str(number) for number in range(missed, 100)]


async def test_cancelled_read_loses_nothing(manager: ConnectionManager) -> None:
    for channel in ("1", "kept:1"):
        async with manager.listen(channel) as messages:
            for number in range(20):
                reading = asyncio.ensure_future(anext(messages))
                await turns(2)
                await manager.broadcast(str(number), channel=channel)
                if number % 2:
                    await turns(number % 3)
                reading.cancel()
                await asyncio.wait([reading])
                data = await take(messages, 1) if reading.cancelled() else [reading.result().data]
                assert data == [str(number)]


async def test_second_reader_is_an_error(manager: ConnectionManager) -> None:
    async with manager.listen("1") as messages:
        reading = asyncio.ensure_future(anext(messages))
        await turns()
        with pytest.raises(RuntimeError, match="another task"):
            await anext(messages)
        reading.cancel()


async def test_listener_ends_with_the_manager() -> None:
    got = []
    async with ConnectionManager() as manager:

        async def listen() -> None:
            async with manager.listen("1") as messages:
                got.extend([message.data async for message in messages])

        listening = asyncio.ensure_future(listen())
        await turns()
        await manager.broadcast("last", channel="1")
    await listening
    assert got == ["last"]


async def test_hooks_are_not_asked_for_listeners(manager: ConnectionManager) -> None:
    @manager.on_deliver
    async def refuse(delivery: Delivery) -> None:
        assert delivery.recipients == []
        raise RuntimeError("refused")

    async with manager.listen("1", "kept:1") as messages:
        for channel in ("1", "kept:1"):
            with pytest.raises(RuntimeError, match="refused"):
                await manager.broadcast("x", channel=channel)
            assert await take(messages, 1) == ["x"]


@pytest.mark.parametrize("options", [{"size": 0}, {"size": True}, {"policy": "wait"}])
async def test_options_that_make_no_sense(manager: ConnectionManager, options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        async with manager.listen("1", **options):  # type: ignore[arg-type]
            pass


async def test_listener_to_nothing(manager: ConnectionManager) -> None:
    with pytest.raises(ValueError, match=r'name what to listen to: listen\("news"\), or listen\(user=5\)'):
        manager.listen()


async def test_what_a_listener_missed_in_an_outage_is_read() -> None:
    async with (
        Cluster(2, history={"kept": History(messages=10)}) as cluster,
        cluster[1].listen("kept", "plain", user=1) as messages,
    ):
        await cluster[0].broadcast("0", channel="kept")
        assert await take(messages, 1) == ["0"]
        cluster.partition(1)
        for number in range(1, 6):
            await cluster[0].broadcast(str(number), channel="kept")
        cluster.heal()
        assert await take(messages, 5) == ["1", "2", "3", "4", "5"]
        cluster.partition(1)
        for number in range(50):
            await cluster[0].broadcast(str(number), channel="kept")
        cluster.heal()
        with pytest.raises(Lagged):
            await take(messages, 1)
        await cluster[0].broadcast("later", channel="kept")
        assert await take(messages, 1) == ["later"]
        assert Audience.user(1) in messages.audiences


async def test_listener_that_began_while_nothing_could_be_read_is_told() -> None:
    async with Cluster(2, history={"kept": History(messages=10)}) as cluster:
        cluster.partition(1)
        async with cluster[1].listen("kept") as messages:
            await cluster[0].broadcast("missed", channel="kept")
            cluster.heal()
            with pytest.raises(Lagged):
                await take(messages, 1)
            await cluster[0].broadcast("later", channel="kept")
            assert await take(messages, 1) == ["later"]


async def test_history_that_is_forgotten_while_a_listener_looks_for_its_place_in_another() -> None:
    engine = MemoryEngine()
    read, reads = engine.read, 0
    is_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def read_slowly(audience: Audience, since: Position | None, history: History) -> Replay:
        nonlocal reads
        reads += audience.name == "b"
        if audience.name == "b" and reads == 2:
            is_asked.set()
            await may_answer.wait()
        return await read(audience, since, history)

    engine.read = read_slowly  # type: ignore[method-assign]
    async with ConnectionManager(engine, history=History(messages=10)) as manager:
        elsewhere = Position("elsewhere", 1)  # for which it is looked what is newest

        async def listen() -> list[object]:
            async with manager.listen("a", "b", since={"b": elsewhere}) as messages:
                with pytest.raises(Lagged):
                    await take(messages, 1)
                await manager.broadcast("later", channel="a")
                return await take(messages, 1)

        listening = asyncio.create_task(listen())
        await is_asked.wait()
        await manager.forget("a")
        await turns()
        may_answer.set()
        assert await listening == ["later"]
