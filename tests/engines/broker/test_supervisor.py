from __future__ import annotations

import asyncio
import gc
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from tests.support.fake_broker import FakeBroker, FakeEngine
from tests.support.servers import eventually
from wsbroadcast import Audience, ConfigurationError, EngineUnavailable
from wsbroadcast.options import Timing
from wsbroadcast.testing import Recorder

NEWS, SPORT = Audience("channel", "news"), Audience("channel", "sport")

# The fake answers as soon as it is let; what it isn't asked in these tests is to give up.
PATIENT = Timing(request_timeout=10, probe_interval=10, max_backoff=0.02, linger=1e-9)


def name_of(audience: Audience) -> str:
    return f"wsbroadcast:{audience.kind}:{audience.name}"


class Rush:
    """Somebody joins an audience of his own during every subscription: there is always one more to ask for."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()

    async def __call__(self, names: Sequence[str]) -> None:
        self._engine.subscribe([Audience("user", str(next(self._numbers)))])


@asynccontextmanager
async def started(broker: FakeBroker, *audiences: Audience, timing: Timing = PATIENT) -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(broker, timing=timing)
    await engine.start(Recorder())
    try:
        engine.subscribe(audiences)
        await engine.confirmed(audiences)
        yield engine
    finally:
        await engine.aclose()


async def is_up(engine: FakeEngine, is_ok: bool = True) -> None:
    async def told() -> bool:
        return (await engine.health()).is_ok is is_ok

    await eventually(told)


async def out_of_reach(broker: FakeBroker, engine: FakeEngine) -> None:
    broker.is_down = True
    broker.drop_links()
    await is_up(engine, False)


async def test_join_is_confirmed_although_others_join_all_the_time() -> None:
    broker = FakeBroker()
    async with started(broker) as engine:
        broker.on_subscribe = Rush(engine)
        engine.subscribe([NEWS])
        await asyncio.wait_for(engine.confirmed([NEWS]), 2)
        assert name_of(NEWS) in broker.held


async def test_name_is_released_although_others_join_all_the_time() -> None:
    broker = FakeBroker()
    async with started(broker, NEWS) as engine:
        broker.on_subscribe = Rush(engine)
        engine.subscribe([SPORT])
        engine.unsubscribe([NEWS])

        async def is_released() -> bool:
            return [name_of(NEWS)] in broker.releases

        await eventually(is_released)
        engine.subscribe([NEWS])  # while the broker releases it, or afterwards
        await asyncio.wait_for(engine.confirmed([NEWS]), 2)
        assert name_of(NEWS) in broker.held


async def test_link_goes_up_although_others_join_all_the_time() -> None:
    broker = FakeBroker()
    async with started(broker, NEWS) as engine:
        await out_of_reach(broker, engine)
        broker.on_subscribe = Rush(engine)
        broker.is_down = False
        await is_up(engine)


async def test_who_has_not_waited_is_subscribed_before_the_end_of_the_outage_is_announced() -> None:
    broker = FakeBroker()
    was_up: list[bool] = []
    async with started(broker, NEWS) as engine:
        await out_of_reach(broker, engine)

        async def join_another(names: Sequence[str]) -> None:
            broker.on_subscribe = look
            engine.subscribe([SPORT])
            await engine.confirmed([SPORT])  # at once: only the echo will show whether the broker is back

        async def look(names: Sequence[str]) -> None:
            was_up.append((await engine.health()).is_ok)

        broker.on_subscribe = join_another
        broker.is_down = False
        await is_up(engine)
        assert was_up == [False]
        assert broker.held == {name_of(NEWS), name_of(SPORT)}


async def test_who_joins_while_the_last_names_are_asked_for_waits_until_his_own_is_held() -> None:
    broker = FakeBroker()
    joining: list[asyncio.Task[None]] = []
    late = Audience("channel", "late")
    async with started(broker, NEWS) as engine:
        await out_of_reach(broker, engine)

        async def join(audience: Audience) -> None:
            engine.subscribe([audience])
            await engine.confirmed([audience])
            assert name_of(audience) in broker.held

        async def first_pass(names: Sequence[str]) -> None:
            broker.on_subscribe = last_pass
            engine.subscribe([SPORT])

        async def last_pass(names: Sequence[str]) -> None:
            broker.on_subscribe = None
            joining.append(asyncio.create_task(join(late)))
            await asyncio.sleep(0)
            assert not joining[0].done()

        broker.on_subscribe = first_pass
        broker.is_down = False
        await is_up(engine)
        await asyncio.wait_for(joining[0], 2)


async def test_join_is_not_held_up_by_the_names_of_others() -> None:
    broker, answers = FakeBroker(), asyncio.Event()
    many = [Audience("channel", str(number)) for number in range(2500)]
    async with started(broker) as engine:

        async def answer_the_first(names: Sequence[str]) -> None:
            if name_of(many[0]) not in names:
                await answers.wait()

        broker.on_subscribe = answer_the_first
        engine.subscribe(many)
        await asyncio.wait_for(engine.confirmed(many[:1000]), 2)
        assert len(broker.held) == 1000
        waiting, leaving = (asyncio.create_task(engine.confirmed(many[1000:1001])) for _ in range(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        leaving.cancel()  # which is about nobody else
        answers.set()
        await asyncio.wait_for(waiting, 2)


async def test_join_is_not_held_up_by_names_that_are_released() -> None:
    broker = FakeBroker()
    asked: list[int | str] = []
    many = [Audience("channel", str(number)) for number in range(2500)]
    async with started(broker, *many) as engine:

        async def subscribed(names: Sequence[str]) -> None:
            asked.extend(names)

        async def unsubscribed(names: Sequence[str]) -> None:
            asked.append(len(names))
            engine.subscribe([NEWS])

        broker.on_subscribe, broker.on_unsubscribe = subscribed, unsubscribed
        engine.unsubscribe(many)

        async def all_are_released() -> bool:
            return broker.held == {name_of(NEWS)}

        await eventually(all_are_released)
        assert asked == [1000, name_of(NEWS), 1000, 500]


async def test_nobody_waits_for_a_name_that_is_wanted_no_longer() -> None:
    broker, answers = FakeBroker(), asyncio.Event()
    async with started(broker) as engine:

        async def wait(names: Sequence[str]) -> None:
            await answers.wait()

        broker.on_subscribe = wait
        engine.subscribe([NEWS])
        waiting = asyncio.create_task(engine.confirmed([NEWS]))
        await asyncio.sleep(0)
        engine.unsubscribe([NEWS])
        await asyncio.wait_for(waiting, 2)
        answers.set()


async def test_pauses_between_attempts_double_up_to_a_maximum_and_begin_anew_after_a_link(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = FakeBroker()
    pauses: list[float] = []

    def shortest(least: float, most: float) -> float:
        pauses.append(most)
        return least

    async def has_paused() -> bool:
        return len(pauses) >= 5

    monkeypatch.setattr(random, "uniform", shortest)
    async with started(broker, timing=replace(PATIENT, max_backoff=0.3)) as engine:
        for _ in range(2):
            await out_of_reach(broker, engine)
            await eventually(has_paused)
            assert pauses[:5] == [0.05, 0.1, 0.2, 0.3, 0.3]
            broker.is_down = False
            await is_up(engine)
            pauses.clear()


async def test_broker_that_lets_us_in_and_carries_nothing_is_not_back() -> None:
    broker = FakeBroker()
    kept: list[tuple[str, bytes]] = []
    async with started(broker, NEWS) as engine:
        await out_of_reach(broker, engine)
        send = broker.send
        broker.send = lambda *parcel: kept.append(parcel)  # type: ignore[method-assign]
        broker.is_down = False

        async def is_tried() -> bool:
            return bool(kept)

        await eventually(is_tried)
        assert broker.held == {name_of(NEWS)}
        assert not (await engine.health()).is_ok
        broker.send = send  # type: ignore[method-assign]
        send(*kept[0])
        await is_up(engine)


async def test_link_that_ends_without_an_error_is_lost_too() -> None:
    broker = FakeBroker()
    async with started(broker, NEWS) as engine:
        broker.is_down = True
        broker.drop_links(None)
        await asyncio.wait_for(is_up(engine, False), 2)


@pytest.mark.parametrize(
    ("second", "told"), [(OSError("second"), "ConnectionResetError: first"), (ConfigurationError("second"), "second")]
)
async def test_of_two_errors_the_first_is_told_unless_the_second_is_a_refusal(second: Exception, told: str) -> None:
    broker = FakeBroker()

    async def fail_twice(names: Sequence[str]) -> None:
        broker.drop_links("first")
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise second

    broker.on_subscribe = fail_twice
    with pytest.raises((EngineUnavailable, ConfigurationError), match=told):
        await asyncio.wait_for(FakeEngine(broker, fail_fast=True, timing=PATIENT).start(Recorder()), 2)


@pytest.mark.parametrize("turns", range(8))
async def test_end_ends_in_every_turn_of_the_loop_in_which_a_link_is_being_lost(
    turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    broker = FakeBroker()
    engine = FakeEngine(broker)
    await engine.start(Recorder())
    broker.is_down = True
    broker.drop_links()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(2):
        await engine.aclose()
    del engine, broker
    gc.collect()
    assert "never retrieved" not in caplog.text
