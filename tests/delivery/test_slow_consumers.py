from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from contextvars import Context
from typing import Any, cast

import pytest

from tests.support.asgi import eventually
from wsbroadcast import SlowConsumer
from wsbroadcast.delivery.backlog import Entry, Place
from wsbroadcast.delivery.slow_consumers import Progress, SlowConsumers, unsent_bytes
from wsbroadcast.stats import Counters

SEND_TIMEOUT = 0.08


def watch_with(**options: Any) -> SlowConsumers:
    return SlowConsumers(SlowConsumer(**{"send_timeout": SEND_TIMEOUT, "close_timeout": 0.03, **options}), Counters())


class Waiting:
    """A sink that has something waiting for as long as the test wants."""

    def __init__(self, slow_consumers: SlowConsumers) -> None:
        self.owner = self
        self.held_bytes = self.held_messages = 1
        self.is_half_full = False
        self.taken = 0
        self.evictions = 0
        self.losses = 0
        self._slow_consumers = slow_consumers
        self._may_end = asyncio.Event()
        self.writer = slow_consumers.start_writer(self, self._drain())

    async def _drain(self) -> None:
        await self._may_end.wait()
        self._slow_consumers.writer_ended(self)

    def abort(self) -> None:
        self.writer.cancel()
        self._slow_consumers.writer_ended(self)

    def evict(self, cause: str) -> None:
        assert cause == "send_timeout"
        self.evictions += 1
        self.abort()

    def fall_back(self, place: Place) -> bool:
        return False

    context = Context()

    def lost(self, code: int, reason: str) -> None:
        self.losses += 1

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        raise AssertionError("nobody sends here")

    async def end(self) -> None:
        self._may_end.set()
        await self.writer


async def test_only_the_sink_that_stands_still_is_evicted() -> None:
    slow_consumers = watch_with()
    still, moving = Waiting(slow_consumers), Waiting(slow_consumers)
    async with asyncio.timeout(5):
        while not still.evictions:
            moving.taken += 1
            await asyncio.sleep(0.001)
    assert moving.evictions == 0
    assert set(slow_consumers.waiting) == {moving}
    await moving.end()
    assert not slow_consumers.waiting


async def test_standstill_counts_from_when_the_sink_began_to_wait() -> None:
    slow_consumers = watch_with(send_timeout=0.2)
    first = Waiting(slow_consumers)
    await asyncio.sleep(0.15)
    second = Waiting(slow_consumers)
    began = time.monotonic()
    await eventually(lambda: second.evictions)
    assert first.evictions == 1
    assert time.monotonic() - began > 0.15  # a tick may be at hand when it comes, so not quite send_timeout


async def test_watch_looks_again_after_nothing_was_waiting() -> None:
    slow_consumers = watch_with()
    await Waiting(slow_consumers).end()
    await asyncio.sleep(SEND_TIMEOUT / 2)
    again = Waiting(slow_consumers)
    await eventually(lambda: again.evictions)


async def test_writer_has_a_name_and_its_end_is_noticed() -> None:
    slow_consumers = watch_with()
    sink = Waiting(slow_consumers)
    assert sink.writer.get_name() == "wsbroadcast writer"
    assert list(slow_consumers.waiting) == [sink]
    await sink.end()
    assert not slow_consumers.waiting
    slow_consumers.writer_ended(sink)  # once more is no mistake


async def test_wake_lets_every_waiting_broadcaster_look_again() -> None:
    slow_consumers = watch_with()
    deadline = asyncio.get_running_loop().time() + 60
    waiting = [asyncio.ensure_future(slow_consumers.wait_for_change(deadline)) for _ in range(3)]
    await asyncio.sleep(0)
    assert not any(each.done() for each in waiting)
    waiting[0].cancel()
    slow_consumers.wake()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None), type(None)]


async def test_change_is_waited_for_until_the_deadline() -> None:
    slow_consumers = watch_with()
    async with asyncio.timeout(5):
        await slow_consumers.wait_for_change(asyncio.get_running_loop().time() + 0.01)
        await slow_consumers.wait_for_change(asyncio.get_running_loop().time() - 1)


async def test_crowd_that_catches_up_in_one_turn_wakes_the_broadcasters_once() -> None:
    wakes = 0

    class Counting(SlowConsumers):
        def wake(self) -> None:
            nonlocal wakes
            wakes += 1
            super().wake()

    slow_consumers = Counting(SlowConsumer(), Counters())
    sinks = [Waiting(slow_consumers) for _ in range(3)]
    waiting = asyncio.ensure_future(slow_consumers.wait_for_change(asyncio.get_running_loop().time() + 60))
    await asyncio.sleep(0)
    for sink in sinks:
        slow_consumers.fell_behind(sink)
        slow_consumers.caught_up(sink)
    await waiting
    assert wakes == 1
    for sink in sinks:
        await sink.end()


async def test_peer_is_evicted_at_the_eighth_tick_at_which_it_has_taken_nothing() -> None:
    slow_consumers = SlowConsumers(SlowConsumer(send_timeout=3600), Counters())
    sink = Waiting(slow_consumers)
    for _ in range(8):
        slow_consumers._look()
        assert sink.evictions == 0
    slow_consumers._look()  # the first has only seen where it stood
    assert sink.evictions == 1
    await slow_consumers.aclose()


async def test_one_timer_looks_after_all_whatever_an_eviction_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each writer of a close frame began a timer more, and after some hundred evictions eight looks fell into one turn.
    slow_consumers = SlowConsumers(SlowConsumer(send_timeout=3600), Counters())

    class Closing(Waiting):
        def evict(self, cause: str) -> None:
            super().evict(cause)
            closes.append(Waiting(slow_consumers))

    closes: list[Waiting] = []
    sinks = [Closing(slow_consumers) for _ in range(3)]
    for _ in range(8):
        slow_consumers._look()
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def call_later(delay: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        timers.append(loop.call_at(loop.time() + delay, *args, **options))
        return timers[-1]

    monkeypatch.setattr(loop, "call_later", call_later)
    slow_consumers._look()
    assert [sink.evictions for sink in sinks] == [1, 1, 1]
    assert len(closes) == 3
    assert len(timers) == 1
    await slow_consumers.aclose()
    assert timers[0].cancelled()


async def test_events_are_forgotten_when_nothing_waits_any_more() -> None:
    slow_consumers = SlowConsumers(SlowConsumer(), Counters())
    entry = Entry(b"text", 4, is_text=True)
    sinks = [Waiting(slow_consumers) for _ in range(2)]
    event = slow_consumers.events.of(entry)
    await sinks[0].end()
    assert slow_consumers.events.of(entry) is event
    await sinks[1].end()
    assert slow_consumers.events.of(entry) is not event


async def test_sink_that_catches_up_wakes_the_broadcasters() -> None:
    slow_consumers = watch_with()
    sink = Waiting(slow_consumers)
    slow_consumers.fell_behind(sink)
    assert set(slow_consumers.behind) == {sink}
    waiting = asyncio.ensure_future(slow_consumers.wait_for_change(asyncio.get_running_loop().time() + 60))
    await asyncio.sleep(0)
    slow_consumers.caught_up(sink)
    async with asyncio.timeout(5):
        await waiting
    assert set(slow_consumers.behind) == set()
    await sink.end()


async def test_aclose_ends_every_writer_and_waits_for_it() -> None:
    slow_consumers = watch_with()
    sinks = [Waiting(slow_consumers) for _ in range(3)]
    await slow_consumers.aclose()
    assert all(sink.writer.done() for sink in sinks)
    assert not slow_consumers.waiting
    await slow_consumers.aclose()
    await asyncio.sleep(SEND_TIMEOUT * 1.5)
    assert [sink.evictions for sink in sinks] == [0, 0, 0]


async def test_aclose_with_nothing_waiting_returns() -> None:
    await watch_with().aclose()


# The tail of the crowd.


async def test_slow_consumer_is_about_to_lose_messages_from_half_full_until_it_has_caught_up() -> None:
    slow_consumers = watch_with()
    sink = Waiting(slow_consumers)
    slow_consumers.fell_behind(sink)
    assert slow_consumers.tail() == []
    sink.is_half_full = True
    assert slow_consumers.tail() == [sink]
    sink.is_half_full = False
    assert slow_consumers.tail() == [sink]
    del sink.is_half_full  # it isn't asked again: for each broadcast to a long tail that would cost more than the rest
    assert slow_consumers.tail() == [sink]
    slow_consumers.caught_up(sink)
    assert slow_consumers.tail() == []
    await sink.end()


# What a peer takes.


async def progress_of(taken: int, **options: Any) -> tuple[Waiting, Progress]:
    slow_consumers = watch_with(**options)
    sink = Waiting(slow_consumers)
    sink.taken = taken
    progress = slow_consumers.waiting[sink]
    await sink.end()
    return sink, progress


async def test_peer_that_takes_less_than_before_stands_still() -> None:
    sink, progress = await progress_of(1000)
    now = asyncio.get_running_loop().time()
    progress.tick(now)  # the first one only learns where it stands
    ticks = []
    for taken in (994, 988, 988, 988 + 1, 980):  # the server adds pongs to what is outstanding
        sink.taken = taken
        progress.tick(now)
        ticks.append(progress.ticks)
    assert ticks == [1, 2, 3, 0, 1]


async def test_what_a_peer_takes_buys_it_time_at_the_slowest_pace() -> None:
    sink, progress = await progress_of(0, send_timeout=40.0, max_backlog_bytes=80_000)  # 10,000 bytes in 10 s
    now = asyncio.get_running_loop().time() + 100
    progress.look(now)
    assert progress.paid_until < now
    sink.taken = 4_000
    progress.look(now + 1)
    assert progress.paid_until == pytest.approx(now + 4)
    sink.taken = 5_000
    progress.look(now + 2)
    assert progress.paid_until == pytest.approx(now + 5)
    assert progress.took_at == now + 2
    progress.look(now + 7)
    assert progress.took_at == now + 2
    sink.taken += 1
    progress.look(now + 8)
    assert now + 7 < progress.paid_until < now + 7.1  # a byte is something, and buys nearly nothing
    sink.taken += 1_000_000
    progress.look(now + 9)
    assert progress.paid_until == pytest.approx(now + 19)  # nobody pays for longer ahead


def test_transport_that_has_forgotten_its_size_holds_nothing() -> None:
    assert unsent_bytes(cast("asyncio.Transport", object())) == 0
