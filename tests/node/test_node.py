"""One manager in one event loop: slow consumers, the pace of the crowd, and what `stats` says of it."""

from __future__ import annotations

import asyncio

import pytest
from starlette.websockets import WebSocketDisconnect

from tests.support.asgi import Peer, connected, eventually, turns
from wsbroadcast import ConnectionManager, ConnectionState, Delivery, Message, SlowConsumer
from wsbroadcast.options import Policy

# A peer that is stalled from the start holds one message in its `send`; the rest waits in the backlog.


async def _stalled(manager: ConnectionManager) -> Peer:
    [(peer, _)] = await connected(manager, 1)
    peer.stall()
    await manager.broadcast("in flight")
    await eventually(lambda: peer.is_stalled)
    return peer


async def _fill(manager: ConnectionManager, count: int) -> None:
    for number in range(count):
        manager.broadcast_nowait(f"m{number}", key=f"k{number % 3}")
    await turns()


@pytest.mark.parametrize(
    ("policy", "dropped", "kept"),
    [
        ("drop_newest", 6, ["m0", "m1", "m2", "m3"]),
        ("drop_oldest", 6, ["m6", "m7", "m8", "m9"]),
        ("conflate", 7, ["m7", "m8", "m9"]),  # the newest of each key
    ],
)
async def test_policy_says_what_is_kept_for_a_slow_consumer(policy: Policy, dropped: int, kept: list[str]) -> None:
    async with ConnectionManager(
        slow_consumer=SlowConsumer(policy=policy, max_backlog_messages=4, send_timeout=60)
    ) as manager:
        peer = await _stalled(manager)
        await _fill(manager, 10)
        stats = manager.stats()
        assert (stats.backlog_messages, stats.backlog_bytes, stats.behind) == (len(kept), 2 * len(kept), 1)
        assert stats.dropped == {policy: dropped}
        peer.resume()
        assert await peer.wait_messages(1 + len(kept)) == ["in flight", *kept]
        await eventually(lambda: manager.stats().behind == 0)
        assert manager.stats().backlog_bytes == 0
        assert manager.stats().evicted == {}


async def test_conflate_disconnects_when_even_that_does_not_fit() -> None:
    async with ConnectionManager(
        slow_consumer=SlowConsumer(policy="conflate", max_backlog_messages=2, send_timeout=60, close_timeout=0.05)
    ) as manager:
        peer = await _stalled(manager)
        await _fill(manager, 10)
        assert manager.stats().evicted == {"backlog_full": 1}
        peer.resume()


@pytest.mark.parametrize(
    "options",
    [
        SlowConsumer(max_backlog_messages=4, close_timeout=0.05),
        SlowConsumer(max_backlog_bytes=9, close_timeout=0.05),
    ],
)
async def test_disconnect_evicts_when_the_backlog_is_full(
    options: SlowConsumer, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[object] = []
    async with ConnectionManager(slow_consumer=options) as manager:
        manager.on_disconnect(ended.append)
        peer = await _stalled(manager)
        [connection] = manager.connections
        reading = asyncio.ensure_future(peer.websocket.receive_text())
        await _fill(manager, 10)
        assert manager.connections == []  # at once, whatever the peer does
        assert manager.stats().evicted == {"backlog_full": 1}
        assert connection.close_code == 1013
        with pytest.raises(WebSocketDisconnect) as caught:
            await asyncio.wait_for(reading, 5)
        assert caught.value.code == 1013
        await eventually(lambda: connection.state is ConnectionState.CLOSED)
        await eventually(lambda: ended == [connection])
        stats = manager.stats()
        assert (stats.backlog_messages, stats.backlog_bytes, stats.behind) == (0, 0, 0)
        # Four waited, the fifth didn't fit; those after it found nobody.
        assert stats.dropped == {"closed": 5}
        peer.resume()
    assert "slow consumer" in caplog.text
    assert "m0" not in caplog.text.replace(connection.id, "")  # which is random, and may have it


async def test_an_evicted_peer_that_wakes_up_in_time_is_told_why() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=4, close_timeout=60)) as manager:
        peer = await _stalled(manager)
        await _fill(manager, 10)
        assert manager.connections == []
        peer.resume()
        assert await peer.wait_close() == 1013
        assert peer.messages == ["in flight"]


async def test_a_backlog_that_stands_still_evicts_after_the_send_timeout() -> None:
    options = SlowConsumer(send_timeout=0.2, close_timeout=0.05)
    async with ConnectionManager(slow_consumer=options) as manager:
        [(healthy, _)] = await connected(manager, 1)
        began = asyncio.get_running_loop().time()
        peer = await _stalled(manager)
        await eventually(lambda: len(manager.connections) == 1)
        assert asyncio.get_running_loop().time() - began >= 0.15
        assert manager.stats().evicted == {"send_timeout": 1}
        await manager.broadcast("goes on")
        assert await healthy.wait_messages(2) == ["in flight", "goes on"]
        peer.resume()


async def test_a_peer_that_is_slow_but_takes_something_is_not_evicted() -> None:
    options = SlowConsumer(send_timeout=0.2, max_backlog_messages=1000)
    async with ConnectionManager(slow_consumer=options) as manager:
        peer = await _stalled(manager)
        await _fill(manager, 50)
        taken = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + 0.6  # three times the timeout
        while loop.time() < end:
            peer.resume()
            taken += 1
            await peer.wait_messages(taken)
            peer.stall()
            await asyncio.sleep(0.02)
        assert manager.stats().evicted == {}
        assert len(manager.connections) == 1
        peer.resume()
        await peer.wait_messages(51)


async def test_a_message_larger_than_the_bound_goes_to_one_that_has_nothing_waiting() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_bytes=10)) as manager:
        [(peer, _)] = await connected(manager, 1)
        for number in range(5):
            await manager.broadcast(f"{number}" * 100)
        assert len(await peer.wait_messages(5)) == 5
        assert manager.stats().evicted == {}


@pytest.mark.parametrize(
    "options",
    [
        SlowConsumer(),
        SlowConsumer(max_backlog_messages=64),
        SlowConsumer(max_backlog_messages=4),
        SlowConsumer(max_backlog_messages=1),
        SlowConsumer(max_backlog_bytes=4096),
        SlowConsumer(max_backlog_bytes=1),
    ],
)
@pytest.mark.parametrize("suspends", [False, True])
async def test_a_tight_loop_of_awaited_broadcasts_evicts_no_healthy_peer(options: SlowConsumer, suspends: bool) -> None:
    async with ConnectionManager(slow_consumer=options) as manager:
        peers = [Peer(suspends=suspends) for _ in range(5)]
        for peer in peers:
            await manager.connect(peer.websocket)
        expected = [f"{number:0100}" for number in range(1000)]
        for message in expected:
            await manager.broadcast(message)
        for peer in peers:
            assert await peer.wait_messages(1000) == expected
        assert manager.stats().evicted == {}
        assert manager.stats().dropped == {}


async def test_a_tight_loop_of_sends_to_one_connection_evicts_it_not() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=16)) as manager:
        peer = Peer(suspends=True)
        connection = await manager.connect(peer.websocket)
        for number in range(1000):
            await connection.send(str(number))
        assert await peer.wait_messages(1000) == [str(number) for number in range(1000)]


# The pace of the crowd.


async def _behind(manager: ConnectionManager, peers: list[Peer]) -> None:
    """Put peers behind."""
    for peer in peers:
        peer.stall()
    while manager.stats().behind < len(peers):
        manager.broadcast_nowait("held")
        await turns()


async def test_a_crowd_that_is_behind_is_waited_for() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=80, send_timeout=60)) as manager:
        pairs = await connected(manager, 4)
        await _behind(manager, [peer for peer, _ in pairs[:3]])
        held = asyncio.ensure_future(manager.broadcast("held"))
        excluding = asyncio.ensure_future(manager.broadcast("two of three", exclude=pairs[3][1]))
        await turns(50)
        assert not held.done()
        assert not excluding.done()
        # Two of four is no longer more than half.
        pairs[0][0].resume()
        await asyncio.wait_for(held, 5)
        for peer, _ in pairs:
            peer.resume()
        await asyncio.wait_for(excluding, 5)
        assert manager.stats().evicted == {}


async def test_only_the_recipients_are_the_crowd() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=80, send_timeout=60)) as manager:
        slow = await connected(manager, 3, channels=["slow"])
        [(fast, connection)] = await connected(manager, 1, channels=["fast"], user="ada")
        await _behind(manager, [peer for peer, _ in slow])
        async with asyncio.timeout(5):
            await manager.broadcast("fast", channel="fast")
            await manager.broadcast("ada", user="ada")
            await connection.send("one")
            await manager.broadcast("rest", exclude=[one for _, one in slow])
            await manager.broadcast("nobody", channel="nobody")
        held = asyncio.ensure_future(manager.broadcast("slow", channel="slow"))
        await turns(50)
        assert not held.done()
        for peer, _ in slow:
            peer.resume()
        await asyncio.wait_for(held, 5)
        await fast.wait_for(lambda: fast.messages[-4:] == ["fast", "ada", "one", "rest"])


async def test_send_waits_for_its_one_recipient_and_notices_its_end() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=8, send_timeout=60)) as manager:
        [(peer, connection)] = await connected(manager, 1)
        await _behind(manager, [peer])
        held = asyncio.ensure_future(connection.send("held"))
        await turns(50)
        assert not held.done()
        peer.resume()
        await asyncio.wait_for(held, 5)
        await _behind(manager, [peer])
        held = asyncio.ensure_future(connection.send("held"))
        await turns()
        manager.disconnect(connection)
        with pytest.raises(WebSocketDisconnect):
            await asyncio.wait_for(held, 5)
        peer.resume()


@pytest.mark.parametrize("way", ["peer leaves", "close", "evict", "unsubscribe", "disconnect"])
async def test_a_waiting_broadcaster_goes_on_when_the_crowd_dissolves(way: str) -> None:
    options = SlowConsumer(max_backlog_messages=80, send_timeout=60, close_timeout=30)
    async with ConnectionManager(slow_consumer=options) as manager:
        [(peer, connection)] = await connected(manager, 1, channels=["a"])
        await _behind(manager, [peer])
        held = asyncio.ensure_future(manager.broadcast("held", channel="a"))
        await turns()
        assert not held.done()
        reading = asyncio.ensure_future(connection.wait_closed())
        await turns()
        ending: asyncio.Future[None] | None = None
        match way:
            case "peer leaves":
                peer.leave()
            case "close":
                ending = asyncio.ensure_future(connection.close())
            case "evict":
                for _ in range(100):
                    manager.broadcast_nowait("too much")
            case "unsubscribe":
                await connection.unsubscribe("a")
            case "disconnect":
                manager.disconnect(connection)
        await asyncio.wait_for(held, 5)
        peer.resume()
        if way == "unsubscribe":
            peer.leave()
        await asyncio.wait_for(reading, 5)
        if ending is not None:
            await ending


# What the app sends itself to a slow peer.


async def test_the_apps_own_send_waits_behind_the_backlog_and_learns_of_the_end() -> None:
    options = SlowConsumer(send_timeout=0.1, close_timeout=0.05)
    async with ConnectionManager(slow_consumer=options) as manager:
        peer = await _stalled(manager)
        sending = asyncio.ensure_future(peer.websocket.send_text("mine"))
        await turns()
        assert not sending.done()
        with pytest.raises(WebSocketDisconnect):
            await asyncio.wait_for(sending, 5)
        peer.resume()


async def test_the_apps_own_send_that_is_cancelled_while_it_waits_is_withdrawn() -> None:
    async with ConnectionManager() as manager:
        peer = await _stalled(manager)
        sending = asyncio.ensure_future(peer.websocket.send_text("mine"))
        await turns()
        sending.cancel()
        await asyncio.wait({sending})
        peer.resume()
        await manager.broadcast("end")
        assert await peer.wait_messages(2) == ["in flight", "end"]


async def test_the_apps_own_send_that_is_cancelled_while_it_is_written_is_finished() -> None:
    async with ConnectionManager() as manager:
        [(peer, _)] = await connected(manager, 1)
        peer.stall()
        sending = asyncio.ensure_future(peer.websocket.send_text("mine"))
        await eventually(lambda: peer.is_stalled)
        sending.cancel()
        await asyncio.wait({sending})
        await manager.broadcast("end")
        peer.resume()
        assert await peer.wait_messages(2) == ["mine", "end"]
        assert peer.overlaps == 0


# Stats.


async def test_stats_count_what_happens() -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 3, user="ada", channels=["a"]) + await connected(manager, 1, user="bob")
        await manager.broadcast("1")
        await manager.broadcast("2", channel="a")
        await manager.broadcast("3", user="bob", exclude=pairs[3][1])
        await pairs[0][1].send("4")
        await turns()
        stats = manager.stats()
        assert (stats.connections, stats.users, stats.channels) == (4, 2, 1)
        assert (stats.connects, stats.disconnects) == (4, 0)
        assert (stats.broadcasts, stats.sends, stats.deliveries) == (3, 1, 4 + 3 + 0 + 1)
        assert stats.sinks == {"asgi": 4}
        assert sum(stats.fast_path_refused.values()) == 4
        assert (stats.dropped, stats.evicted, stats.vetoed, stats.hook_errors) == ({}, {}, 0, 0)
        assert (stats.backlog_bytes, stats.backlog_messages, stats.behind) == (0, 0, 0)


async def test_nothing_is_left_of_a_peer_that_kept_up(caplog: pytest.LogCaptureFixture) -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 10)
        for number in range(100):
            await manager.broadcast(str(number))
        for peer, _ in pairs:
            await peer.wait_messages(100)
        await turns()
        # No task per connection while everybody keeps up.
        assert [task for task in asyncio.all_tasks() if task.get_name().startswith("wsbroadcast")] == []
    assert [record for record in caplog.records if record.name == "wsbroadcast"] == []


async def test_who_unsubscribed_while_on_deliver_ran_gets_nothing() -> None:
    manager = ConnectionManager()
    release = asyncio.Event()

    @manager.on_deliver
    async def slowly(delivery: object) -> None:
        await release.wait()

    [(peer, connection), (other, _)] = await connected(manager, 2, channels=["a"])
    broadcasting = asyncio.ensure_future(manager.broadcast("hello", channel="a"))
    await turns()
    await connection.unsubscribe("a")
    release.set()
    await broadcasting
    await eventually(lambda: other.messages == ["hello"])
    assert peer.messages == []
    await manager.aclose()


async def test_key_of_one_audience_replaces_nothing_of_another() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(policy="conflate")) as manager:
        [(peer, connection)] = await connected(manager, 1, user="ann", channels=["a", "b"])
        peer.stall()
        await manager.broadcast("being written")
        await eventually(lambda: peer.is_stalled)
        for age in ("old", "new"):
            await manager.broadcast(f"{age} to a", channel="a", key="gold")
            await manager.broadcast(f"{age} to b", channel="b", key="gold")
            await manager.broadcast(f"{age} to everyone", key="gold")
            await manager.broadcast(f"{age} to ann", user="ann", key="gold")
            manager._core.life.node.dispatcher.flush()
            await connection.send(Message.of(f"{age} and private", "gold"))
        await eventually(lambda: manager.stats().backlog_messages == 5)
        peer.resume()
        assert (await peer.wait_messages(6))[1:] == [
            "new to a",
            "new to b",
            "new to everyone",
            "new to ann",
            "new and private",
        ]
        assert manager.stats().dropped == {"conflate": 5}


async def test_key_keeps_its_audience_through_an_on_deliver_hook() -> None:
    async with ConnectionManager(slow_consumer=SlowConsumer(policy="conflate")) as manager:
        [(peer, _)] = await connected(manager, 1, channels=["a", "b"])

        @manager.on_deliver
        def replace_some(delivery: Delivery) -> None:
            if delivery.message.data == "new to b":
                delivery.replace(delivery.recipients[0], "instead, to b")

        peer.stall()
        await manager.broadcast("being written")
        await eventually(lambda: peer.is_stalled)
        for age in ("old", "new"):
            for channel in "ab":
                await manager.broadcast(f"{age} to {channel}", channel=channel, key="gold")
        await eventually(lambda: manager.stats().backlog_messages == 2)
        peer.resume()
        assert (await peer.wait_messages(3))[1:] == ["new to a", "instead, to b"]
