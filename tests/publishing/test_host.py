"""Where a publisher's engine runs; what it does for a publisher is tested with that."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import NoReturn

import pytest

from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import Audience, EngineUnavailable, Gap, Health, LifecycleError, Message, Publication
from wsbroadcast.publishing.calls import HasEnded, Ticket
from wsbroadcast.publishing.host import Home, Nobody, OwnHome

PUBLICATION = Publication(Message.of("text"), Audience("everyone"))


async def publish(home: Home, ticket: Ticket) -> None:
    await home.publish(PUBLICATION, ticket)


async def test_nobody_takes_everything_and_does_nothing() -> None:
    nobody = Nobody()
    nobody.take(PUBLICATION)
    await nobody.deliver(PUBLICATION)
    nobody.gap(Gap("fake", 1.0))


async def test_home_that_was_ended_refuses() -> None:
    broker = FakeBroker()
    home = Home(FakeEngine(broker), asyncio.get_running_loop())
    assert not home.is_started
    assert await home.start()
    await home.publish(PUBLICATION)
    assert (home.is_started, home.has_ended) == (True, False)
    await home.end()
    await home.end()
    assert (home.is_started, home.has_ended) == (False, True)
    for call in (home.start(), home.publish(PUBLICATION), home.health()):
        with pytest.raises(LifecycleError, match="closed"):
            await call
    assert broker.opened == 1


async def test_engine_that_fails_on_its_way_is_no_error_nobody_looked_at(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller has given up by then; the next one begins again."""
    monkeypatch.setattr("wsbroadcast.publishing.host._START_SECONDS", 0.01)
    fails = asyncio.Event()

    class Failing(FakeEngine):
        async def start(self, receiver: object) -> None:
            await fails.wait()
            raise EngineUnavailable("too late")

    home = Home(Failing(FakeBroker()), asyncio.get_running_loop())
    assert not await home.start()
    assert await home.health() == Health("fake", False, "not connected yet")
    fails.set()
    with pytest.raises(EngineUnavailable, match="too late"):
        await home.start()
    with pytest.raises(EngineUnavailable, match="too late"):
        await home.start()
    await home.end()
    del home
    gc.collect()
    assert caplog.records == []


async def test_engine_is_started_when_the_home_before_is_over() -> None:
    broker, before = FakeBroker(), OwnHome(FakeEngine(FakeBroker()))
    home = Home(FakeEngine(broker), asyncio.get_running_loop(), before)
    publishing = asyncio.create_task(home.publish(PUBLICATION))
    await asyncio.sleep(0)
    assert not home.is_over
    assert broker.opened == 0
    before.stop()
    await publishing
    assert broker.opened == 1
    await home.end()
    assert home.is_over


async def test_home_that_ends_while_it_waits_for_the_one_before_starts_nothing() -> None:
    broker, before = FakeBroker(), OwnHome(FakeEngine(FakeBroker()))
    home = Home(FakeEngine(broker), asyncio.get_running_loop(), before)
    publishing = asyncio.create_task(home.publish(PUBLICATION))
    await asyncio.sleep(0)
    await home.end()
    with pytest.raises(HasEnded):
        await publishing
    assert not home.is_over  # because the one before isn't
    await asyncio.to_thread(before.end_threadsafe)
    assert home.is_over
    assert broker.opened == 0


def test_call_to_an_event_loop_that_is_closed_was_not_made() -> None:
    loop = asyncio.new_event_loop()
    home = Home(FakeEngine(FakeBroker()), loop)
    loop.close()
    assert home.has_ended
    with pytest.raises(HasEnded):
        home.do_threadsafe(publish)
    home.stop()
    home.end_threadsafe()


async def test_call_to_a_home_that_has_ended_was_not_made() -> None:
    home = Home(FakeEngine(FakeBroker()), asyncio.get_running_loop())
    await home.end()
    with pytest.raises(HasEnded):
        await asyncio.to_thread(home.do_threadsafe, publish)


def test_own_home_may_be_told_to_stop_again() -> None:
    home = OwnHome(FakeEngine(FakeBroker()))
    home.stop()
    home.end_threadsafe()
    home.stop()
    assert home.has_ended


def test_own_home_without_a_thread_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="new thread"):
        OwnHome(FakeEngine(FakeBroker()))
    gc.collect()  # an event loop that wasn't closed would complain
