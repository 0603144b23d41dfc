"""A broker engine on a fake broker: outages, subscriptions, what it drops, and how it ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from tests.support.asgi import Peer
from tests.support.fake_broker import QUICK, FakeBroker, FakeEngine, FakeLink
from tests.support.servers import eventually
from wsbroadcast import (
    Audience,
    ConfigurationError,
    ConnectionManager,
    EncodeError,
    EngineUnavailable,
    Health,
    LifecycleError,
    Message,
    MessageTooLarge,
    Publication,
)
from wsbroadcast.engines.broker.envelope import Origin, encode
from wsbroadcast.exceptions import EngineError
from wsbroadcast.options import Timing
from wsbroadcast.testing import Recorder

NEWS, SPORT = Audience("channel", "news"), Audience("channel", "sport")
NAME = "wsbroadcast:channel:news"


def news(text: str = "text", audience: Audience = NEWS) -> Publication:
    return Publication(Message.of(text), audience)


class Started:
    """A started engine with its broker and its node."""

    def __init__(self, broker: FakeBroker, engine: FakeEngine, node: Recorder) -> None:
        self.broker, self.engine, self.node = broker, engine, node

    @property
    def payloads(self) -> list[bytes]:
        return [publication.message.payload for publication in self.node.publications]

    async def got(self, *payloads: bytes) -> None:
        async def arrived() -> bool:
            return len(self.node.publications) >= len(payloads)

        await eventually(arrived)
        assert self.payloads == list(payloads)

    async def is_up(self) -> None:
        async def ok() -> bool:
            return (await self.engine.health()).is_ok

        await eventually(ok)

    async def is_down(self) -> None:
        async def not_ok() -> bool:
            return not (await self.engine.health()).is_ok

        await eventually(not_ok)


@pytest.fixture
async def started() -> AsyncIterator[Started]:
    broker, node = FakeBroker(), Recorder()
    engine = FakeEngine(broker)
    await engine.start(node)
    engine.subscribe([NEWS])
    await engine.confirmed([NEWS])
    yield Started(broker, engine, node)
    await engine.aclose()
    assert broker.links == []


async def test_publication_comes_back_from_the_broker(started: Started) -> None:
    await started.engine.publish(news())
    await started.got(b"text")
    assert started.node.publications[0].audience == NEWS


async def test_publications_of_one_turn_go_out_together_and_in_order(started: Started) -> None:
    started.broker.batches.clear()
    await asyncio.gather(*(started.engine.publish(news(str(number))) for number in range(50)))
    assert max(len(batch) for batch in started.broker.batches) == 50
    started.engine.publish_nowait(news("50"))
    await started.engine.publish(news("51"))
    await started.got(*(b"%d" % number for number in range(52)))


async def test_larger_message_than_the_broker_takes_is_refused_at_the_publisher(started: Started) -> None:
    with pytest.raises(MessageTooLarge) as caught:
        await started.engine.publish(news("x" * 5000))
    assert caught.value.size == 5000
    await started.engine.publish(news("x" * caught.value.limit))


async def test_limit_that_was_raised_is_seen_by_the_message_that_needs_it(started: Started) -> None:
    started.broker.max_envelope_bytes = 8192
    await started.engine.publish(news("x" * 5000))
    await started.engine.publish(news("y" * 5000))
    await started.got(b"x" * 5000, b"y" * 5000)
    assert started.broker.limits_read == 1


async def test_limit_that_was_raised_is_seen_after_publish_nowait(started: Started) -> None:
    started.broker.max_envelope_bytes = 8192
    with pytest.raises(MessageTooLarge):
        started.engine.publish_nowait(news("x" * 5000))

    async def is_taken() -> bool:
        try:
            started.engine.publish_nowait(news("x" * 5000))
        except MessageTooLarge:
            return False
        return True

    await eventually(is_taken)
    await started.got(b"x" * 5000)
    assert started.broker.limits_read == 1


async def test_messages_that_are_too_large_ask_for_the_limit_together(started: Started) -> None:
    calls = [started.engine.publish(news("x" * 5000)) for _ in range(100)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, MessageTooLarge) for outcome in outcomes)
    assert started.broker.limits_read == 1
    began = time.monotonic()
    with pytest.raises(MessageTooLarge):
        await started.engine.publish(news("x" * 5000))
    assert started.broker.limits_read == 2
    assert time.monotonic() - began > 0.1  # who sends them one after the other doesn't flood the broker


async def test_limit_of_our_own_is_not_asked_for() -> None:
    broker = FakeBroker()
    engine = FakeEngine(broker, max_message_bytes=100)
    await engine.start(Recorder())
    with pytest.raises(MessageTooLarge) as caught:
        await engine.publish(news("x" * 101))
    assert (caught.value.size, caught.value.limit) == (101, 100)
    assert broker.limits_read == 0
    await engine.aclose()


@pytest.mark.parametrize("fault", ["down", "hung"])
async def test_limit_that_can_not_be_asked_for_stays(started: Started, fault: str) -> None:
    started.broker.is_down = fault == "down"
    if fault == "hung":
        started.broker.is_hung.set()
    with pytest.raises((MessageTooLarge, EngineUnavailable)):
        await started.engine.publish(news("x" * 5000))
    started.broker.is_down = False
    started.broker.is_hung.clear()
    await started.is_up()
    with pytest.raises(MessageTooLarge):
        await started.engine.publish(news("x" * 5000))


async def test_who_waits_for_the_limit_when_the_engine_stops_is_told() -> None:
    broker = FakeBroker()
    engine = FakeEngine(broker)
    await engine.start(Recorder())
    publishing = asyncio.create_task(engine.publish(news("x" * 5000)))
    await asyncio.sleep(0)
    await engine.aclose()
    with pytest.raises((MessageTooLarge, EngineUnavailable)):
        await publishing
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_refusal_of_one_publication_leaves_the_others_alone(started: Started) -> None:
    started.broker.forbidden.add("wsbroadcast:channel:sport")
    good = asyncio.create_task(started.engine.publish(news()))
    with pytest.raises(EngineError):
        await started.engine.publish(news("x", SPORT))
    await good
    assert started.engine.stats().publish_failures == 1


@pytest.mark.parametrize(
    ("refusal", "told", "text"),
    [
        (ConfigurationError("the fake forbids it"), EngineUnavailable, "the fake forbids it; nothing was sent"),
        (PermissionError("no"), EngineUnavailable, "no; nothing was sent"),
        (EngineUnavailable("full"), EngineUnavailable, "full"),
        (EngineError("nonsense"), EngineError, "nonsense"),
        (EncodeError("not that"), EncodeError, "not that"),
        (MessageTooLarge(5, 4), MessageTooLarge, "larger than the limit of 4 bytes"),
        (ValueError("bad"), EngineError, r"the broker refuses the message \(ValueError: bad\)"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_refusal_becomes_an_error_that_publish_documents(
    started: Started, refusal: Exception, told: type[Exception], text: str
) -> None:
    started.broker.forbidden.add(NAME)
    started.broker.refusal = refusal
    with pytest.raises(told, match=text) as caught:
        await started.engine.publish(news())
    assert type(caught.value) is told
    assert caught.value is refusal or caught.value.__cause__ is refusal
    assert started.broker.opened == 1


async def test_refusals_that_nobody_awaits_are_no_flood(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    started.broker.forbidden.add(NAME)
    for _ in range(10):
        for number in range(10):
            started.engine.publish_nowait(news(str(number)))
        await started.engine.publish(news("x", SPORT))
    assert started.engine.stats().publish_failures == 100
    assert [record.message for record in caplog.records] == [
        "messages of broadcast_nowait that were not published: 1, because no"
    ]


async def test_outage_is_survived_announced_once_and_ends_by_itself(started: Started) -> None:
    started.broker.is_down = True
    started.broker.drop_links()
    await started.is_down()
    with pytest.raises(EngineUnavailable, match=r"fake at nowhere:1 is out of reach .*nothing was sent"):
        await started.engine.publish(news("lost"))
    with pytest.raises(EngineUnavailable, match="nothing was sent"):
        started.engine.publish_nowait(news("lost"))
    started.engine.subscribe([SPORT])
    await started.engine.confirmed([SPORT])  # at once: it is wanted
    assert started.node.gaps == []
    started.broker.is_down = False
    await started.is_up()
    await started.engine.publish(news("back", SPORT))
    await started.engine.publish(news("again"))
    await started.got(b"back", b"again")
    assert [gap.engine for gap in started.node.gaps] == ["fake"]
    assert 0 < started.node.gaps[0].seconds < 5
    stats = started.engine.stats()
    assert (stats.reconnects, stats.gaps, stats.publish_failures) == (1, 1, 2)


async def test_hung_broker_fails_a_publish_in_time_and_is_left(started: Started) -> None:
    started.broker.is_hung.set()
    began = time.monotonic()
    with pytest.raises(EngineUnavailable, match="whether the broker took the message isn't known"):
        await started.engine.publish(news("lost"))
    assert time.monotonic() - began < 1
    assert started.broker.links == []
    started.broker.is_hung.clear()
    await started.is_up()
    assert len(started.node.gaps) == 1


async def test_silent_broker_is_found_by_the_probe(started: Started) -> None:
    started.broker.is_hung.set()

    async def left() -> bool:
        return started.broker.links == []

    await eventually(left)
    started.broker.is_hung.clear()
    await started.is_up()


async def test_event_loop_that_was_blocked_is_not_held_against_the_broker(started: Started) -> None:
    for _ in range(3):
        publishing = asyncio.create_task(started.engine.publish(news()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(QUICK.request_timeout * 1.5)  # noqa: ASYNC251  # what an app does by mistake
        await publishing
    assert started.engine.stats().reconnects == 0


async def test_flapping_leaves_the_broker_with_what_is_wanted(started: Started) -> None:
    for _ in range(200):
        started.engine.unsubscribe([NEWS])
        started.engine.subscribe([SPORT])
        await asyncio.sleep(0)
        started.engine.subscribe([NEWS])
        started.engine.unsubscribe([SPORT])
    await started.engine.confirmed([NEWS])

    async def settled() -> bool:
        return started.broker.held == {NAME}

    await eventually(settled)
    await started.engine.publish(news())
    await started.got(b"text")
    assert len(started.broker.subscriptions) < 20


async def test_audiences_of_one_turn_are_one_question_to_the_broker(started: Started) -> None:
    started.broker.subscriptions.clear()
    many = [Audience("channel", str(number)) for number in range(2500)]
    started.engine.subscribe(many)
    await started.engine.confirmed(many)
    assert [len(names) for names in started.broker.subscriptions] == [1000, 1000, 500]


async def test_waiting_for_a_confirmation_ends_when_nobody_wants_it_any_more(started: Started) -> None:
    started.engine.subscribe([SPORT])
    waiting = asyncio.create_task(started.engine.confirmed([SPORT]))
    await asyncio.sleep(0)
    started.engine.unsubscribe([SPORT])
    await asyncio.wait_for(waiting, 1)


async def test_start_without_a_broker_is_degraded_and_heals() -> None:
    broker, node = FakeBroker(), Recorder()
    broker.is_down = True
    engine = FakeEngine(broker)
    await engine.start(node)
    try:
        assert await engine.health() == Health("fake", False, "ConnectionRefusedError: nobody listens")
        engine.subscribe([NEWS])
        await engine.confirmed([NEWS])
        broker.is_down = False
        await Started(broker, engine, node).is_up()
        await engine.publish(news())
        await Started(broker, engine, node).got(b"text")
        assert len(node.gaps) == 1
        assert engine.stats().reconnects == 0
    finally:
        await engine.aclose()


async def test_start_that_fails_fast_raises_and_leaves_nothing() -> None:
    broker = FakeBroker()
    broker.is_down = True
    engine = FakeEngine(broker, fail_fast=True)
    with pytest.raises(EngineUnavailable, match="fake at nowhere:1 can't be reached: ConnectionRefusedError"):
        await engine.start(Recorder())
    broker.is_down = False
    await engine.start(Recorder())  # it can be tried again
    await engine.aclose()


@pytest.mark.parametrize("refused", ["connection", "name of the node"])
async def test_broker_that_refuses_us_is_an_error_at_the_start(refused: str) -> None:
    broker = FakeBroker()
    error = ConfigurationError("the fake refuses user 'ann'")

    async def refuse(names: Sequence[str]) -> None:
        raise error

    if refused == "connection":
        broker.refuses = error
    else:
        broker.on_subscribe = refuse
    engine = FakeEngine(broker)
    with pytest.raises(ConfigurationError, match="refuses user 'ann'"):
        await engine.start(Recorder())
    assert broker.links == []


async def test_start_that_is_cancelled_leaves_nothing() -> None:
    broker = FakeBroker()
    broker.is_hung.set()
    engine = FakeEngine(broker, timing=Timing(connect_timeout=60))
    starting = asyncio.create_task(engine.start(Recorder()))
    await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await engine.health() == Health("fake", False, "not started")


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("loses_cancellation", [False, True])
async def test_end_during_the_start_ends_both(turns: int, loses_cancellation: bool) -> None:
    broker = FakeBroker()
    broker.loses_cancellation = loses_cancellation
    broker.is_hung.set()
    engine = FakeEngine(broker, timing=Timing(connect_timeout=60))
    starting = asyncio.ensure_future(engine.start(Recorder()))
    for _ in range(1 + turns):
        await asyncio.sleep(0)
    await asyncio.wait_for(engine.aclose(), 5)
    with pytest.raises(LifecycleError, match="the fake engine was stopped while it started"):
        await asyncio.wait_for(starting, 5)
    broker.is_hung.clear()
    await engine.start(Recorder())
    await engine.aclose()


async def test_broadcast_nowait_before_the_start_says_what_to_do_and_breaks_nothing() -> None:
    manager = ConnectionManager(FakeEngine(FakeBroker()))
    with pytest.raises(LifecycleError, match="has to start, and broadcast_nowait can't: await `broadcast`"):
        manager.broadcast_nowait("x")
    async with manager:
        manager.broadcast_nowait("y")
        assert (await manager.health()).is_ok


async def test_manager_that_ends_while_its_engine_starts_lets_nobody_wait() -> None:
    broker = FakeBroker()
    broker.is_hung.set()
    manager = ConnectionManager(FakeEngine(broker, timing=Timing(connect_timeout=60)))
    waiting: list[asyncio.Future[Any]] = [
        asyncio.ensure_future(manager.start()),
        asyncio.ensure_future(manager.broadcast("x")),
    ]
    waiting += [asyncio.ensure_future(manager.connect(Peer().websocket)) for _ in range(2)]
    for _ in range(5):
        await asyncio.sleep(0)
    await asyncio.wait_for(manager.aclose(), 5)
    outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert [type(outcome) for outcome in outcomes] == [LifecycleError] * 4
    assert manager.connections == []


async def test_second_start_is_refused(started: Started) -> None:
    with pytest.raises(LifecycleError, match="needs one of its own"):
        await started.engine.start(Recorder())


async def test_end_publishes_what_waits_and_receives_nothing_more(started: Started) -> None:
    started.engine.publish_nowait(news("last"))
    await started.engine.aclose()
    await started.engine.aclose()
    assert [parcel.envelope[-4:] for parcel in started.broker.batches[-1]] == [b"last"]
    count = len(started.node.publications)
    started.broker.send(NAME, b'{"v":1}\nlate')
    with pytest.raises(EngineUnavailable, match="not started"):
        started.engine.publish_nowait(news())
    started.engine.unsubscribe([NEWS])
    assert len(started.node.publications) == count


async def test_end_during_an_outage_does_not_wait(started: Started) -> None:
    started.broker.is_down = True
    started.broker.drop_links()
    await started.is_down()
    await asyncio.wait_for(started.engine.aclose(), 1)


GARBAGE = {
    "header": b"\x80\x04pickle",
    "version": b'{"v":99}\nx',
    "schema": b'{"v":1,"type":"x"}\nx',
    "text": b'{"v":1}\n\xff',
}


async def test_garbage_is_dropped_counted_and_harmless(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    for envelope in GARBAGE.values():
        started.broker.send(NAME, envelope)
    started.broker.send(NAME, b'{"v":1}\ngood')
    await started.got(b"good")
    assert started.engine.stats().bad_envelopes == dict.fromkeys(GARBAGE, 1)
    assert len([record for record in caplog.records if "bad envelope" in record.message]) == 1
    assert "pickle" not in caplog.text


async def test_envelope_in_our_name_that_is_not_ours_is_dropped(started: Started) -> None:
    await started.engine.publish(news("ours"))
    await started.got(b"ours")
    ours = next(parcel.envelope for batch in started.broker.batches for parcel in batch if parcel.name == NAME)
    node = ours.split(b'"')[5].decode()
    started.broker.send(NAME, encode(news("forged"), Origin(node, 10**6)))
    started.broker.send(NAME, ours)  # replayed
    started.broker.send(f"wsbroadcast:node:{node}", b"7777")
    started.broker.send(NAME, b'{"v":1}\ngood')
    await started.got(b"ours", b"good")
    assert started.engine.stats().bad_envelopes == {"forged": 1, "stale": 1, "echo": 1}


@pytest.mark.parametrize("forged", [b"", b"0", b"01", b"-1", b"+1", b"1 ", b"1_0", b"9" * 5000, "\u0661".encode()])
async def test_echo_that_was_never_sent_is_counted(started: Started, forged: bytes) -> None:
    await started.is_up()
    name = started.broker.subscriptions[0][0]
    started.broker.send(name, forged)
    started.broker.send(NAME, b'{"v":1}\ngood')
    await started.got(b"good")
    assert started.engine.stats().bad_envelopes == {"echo": 1}


async def test_echo_that_comes_too_late_is_no_bad_envelope(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    """Something else came in its time, so the link lives on."""
    late: list[tuple[str, bytes]] = []
    send = started.broker.send

    def delay_echoes(name: str, envelope: bytes) -> None:
        if ":node:" in name:
            late.append((name, envelope))
        send(NAME, b'{"v":1}\nsomething else')

    started.broker.send = delay_echoes  # type: ignore[method-assign]
    assert (await started.engine.health()).is_ok
    started.broker.send = send  # type: ignore[method-assign]
    for name, envelope in late:
        send(name, envelope)
    send(NAME, b'{"v":1}\nlast')

    async def last_came() -> bool:
        return started.payloads[-1:] == [b"last"]

    await eventually(last_came)
    assert late
    assert started.broker.opened == 1
    assert started.engine.stats().bad_envelopes == {}
    assert caplog.records == []


async def test_name_that_was_never_asked_for_is_counted(started: Started) -> None:
    started.broker.links[0].names.add("another:channel:news")
    started.broker.send("another:channel:news", b'{"v":1}\nx')
    started.broker.send(NAME, b'{"v":1}\ngood')
    await started.got(b"good")
    assert started.engine.stats().bad_envelopes == {"unknown_name": 1}


async def test_failure_of_what_nobody_awaits_is_counted_and_logged(
    started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    started.broker.is_hung.set()
    started.engine.publish_nowait(news())

    async def logged() -> bool:
        return (
            "messages of broadcast_nowait that were not published: 1, because the connection to the broker is lost"
            in caplog.text
        )

    await eventually(logged)
    assert started.engine.stats().publish_failures >= 1
    started.broker.is_hung.clear()


async def test_publisher_that_gives_up_leaves_no_complaint(started: Started) -> None:
    started.broker.is_hung.set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await started.engine.publish(news())
    await started.is_down()
    started.broker.is_hung.clear()
    await started.is_up()


async def test_health_is_an_echo_through_the_broker(started: Started) -> None:
    assert await started.engine.health() == Health("fake", True)
    started.broker.links[0].names.clear()  # it publishes, and nothing comes back
    health = await started.engine.health()
    assert (health.is_ok, health.detail) in {
        (False, "no answer within 0.1 s"),
        (False, "the connection to the broker is lost (TimeoutError: no answer within 0.1 s)"),
    }


async def test_name_that_the_broker_forbids_is_an_error_for_who_wants_it_alone(
    started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    many = [Audience("channel", str(number)) for number in range(30)]
    started.broker.unsubscribable.add("wsbroadcast:channel:7")
    started.engine.subscribe(many)
    with pytest.raises(EngineUnavailable, match="forbids"):
        await asyncio.wait_for(started.engine.confirmed([many[7]]), 2)
    assert [record.message for record in caplog.records] == ["fake at nowhere:1: the fake forbids one of these names"]
    await started.engine.confirmed(many[:7] + many[8:])
    await started.engine.publish(news("text", many[29]))
    await started.got(b"text")
    assert started.engine.stats().reconnects == 0
    started.engine.unsubscribe([many[7]])
    started.broker.unsubscribable.clear()
    started.engine.subscribe([many[7]])
    await started.engine.confirmed([many[7]])


async def test_forbidden_name_is_asked_for_again_with_the_next_link(started: Started) -> None:
    started.broker.unsubscribable.add("wsbroadcast:channel:sport")
    started.engine.subscribe([SPORT])
    with pytest.raises(EngineUnavailable):
        await started.engine.confirmed([SPORT])
    started.broker.unsubscribable.clear()
    started.broker.drop_links()

    async def held() -> bool:
        return "wsbroadcast:channel:sport" in started.broker.held

    await eventually(held)


async def test_name_that_is_forbidden_no_longer_can_be_joined_after_the_next_link_although_a_member_has_stayed(
    started: Started,
) -> None:
    started.broker.is_down = True
    started.broker.drop_links()
    await started.is_down()
    started.engine.subscribe([SPORT])
    await started.engine.confirmed([SPORT])  # at once, and it can't be taken back
    started.broker.unsubscribable.add("wsbroadcast:channel:sport")
    started.broker.is_down = False
    await started.is_up()
    with pytest.raises(EngineUnavailable, match="forbids"):
        await started.engine.confirmed([SPORT])
    started.broker.unsubscribable.clear()
    started.broker.drop_links()
    await started.is_down()
    await started.is_up()
    await started.engine.confirmed([SPORT])
    assert "wsbroadcast:channel:sport" in started.broker.held


async def test_load_is_not_taken_for_an_outage(started: Started) -> None:
    started.broker.publish_seconds = QUICK.request_timeout / 4
    await asyncio.gather(*(started.engine.publish(news(str(number))) for number in range(4 * 512)))
    assert (await started.engine.health()).is_ok
    assert (started.engine.stats().reconnects, started.node.gaps) == (0, [])


@pytest.mark.parametrize("error", [asyncio.CancelledError("the driver's own"), ValueError("a bug")])
async def test_driver_that_fails_in_a_way_of_its_own_is_survived(started: Started, error: BaseException) -> None:
    started.broker.breaks_on_open = error
    started.broker.drop_links()
    await started.is_down()
    await started.is_up()
    await started.engine.publish(news())
    await started.got(b"text")


BUGS = [
    AssertionError("a bug"),
    AttributeError("a bug"),
    ImportError("a bug"),
    KeyError("a bug"),
    NotImplementedError("a bug"),
    TypeError("a bug"),
    ZeroDivisionError("a bug"),
]

OUTAGES = [OSError("gone"), EOFError("gone"), ValueError("gone"), RuntimeError("gone"), TimeoutError("gone")]


@pytest.mark.parametrize("bug", BUGS, ids=repr)
async def test_error_that_is_no_outage_comes_out_at_the_start(bug: Exception, caplog: pytest.LogCaptureFixture) -> None:
    broker = FakeBroker()
    broker.breaks_on_open = bug
    engine = FakeEngine(broker)
    with pytest.raises(
        EngineError, match=rf"fake at nowhere:1 can't be used: {type(bug).__name__}: .*a bug.* not an outage"
    ) as caught:
        await engine.start(Recorder())
    assert not isinstance(caught.value, (EngineUnavailable, ConfigurationError))
    assert caught.value.__cause__ is bug
    assert caplog.records == []  # the error tells
    await engine.start(Recorder())
    await engine.aclose()


@pytest.mark.parametrize("outage", OUTAGES, ids=repr)
async def test_error_that_may_be_an_outage_is_one(outage: Exception, caplog: pytest.LogCaptureFixture) -> None:
    broker, node = FakeBroker(), Recorder()
    broker.breaks_on_open = outage
    engine = FakeEngine(broker)
    await engine.start(node)
    await Started(broker, engine, node).is_up()
    assert "out of reach" in caplog.text
    assert all(record.levelname == "WARNING" for record in caplog.records)
    await engine.aclose()


async def test_link_that_can_not_be_made_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> FakeLink:
        raise ZeroDivisionError("a bug")

    engine = FakeEngine(FakeBroker())
    monkeypatch.setattr(engine, "new_link", broken)
    with pytest.raises(EngineError, match="can't be used: ZeroDivisionError: a bug"):
        await engine.start(Recorder())


async def test_error_that_is_no_outage_is_seen_later_too(
    started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    async def broken(link: FakeLink) -> None:
        nonlocal tries
        tries += 1
        raise AttributeError("'NoneType' object has no attribute 'transport'")

    async def tried_often() -> bool:
        return tries > 5

    with monkeypatch.context() as patch:
        patch.setattr(FakeLink, "open", broken)
        started.broker.drop_links()
        await eventually(tried_often)
        health = await started.engine.health()
        assert not health.is_ok
        assert re.match("AttributeError: 'NoneType' object .* not an outage but a wrong option", health.detail)
        with pytest.raises(EngineUnavailable, match=r"AttributeError: .* not an outage.*nothing was sent"):
            await started.engine.publish(news())
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]  # once, with a traceback
    assert "fake at nowhere:1 can't be used (AttributeError: 'NoneType'" in told.message
    assert told.exc_info is not None
    await started.is_up()


@pytest.mark.parametrize("hangs", [False, True])
async def test_link_that_can_not_be_dropped_cleanly_is_logged_once_a_minute(
    started: Started, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hangs: bool
) -> None:
    abort, tries = FakeLink.abort, 0

    async def broken(link: FakeLink) -> None:
        nonlocal tries
        tries += 1
        await abort(link)
        if hangs:
            await asyncio.Event().wait()
        raise KeyError("a driver's")

    async def tried_often() -> bool:
        return tries > 2

    with monkeypatch.context() as patch:
        patch.setattr(FakeLink, "abort", broken)
        started.broker.is_down = True
        started.broker.drop_links()
        await eventually(tried_often)
    started.broker.is_down = False
    assert len([record for record in caplog.records if "dropped cleanly" in record.message]) == 1


async def test_forged_place_in_the_order_does_not_silence_a_node(started: Started) -> None:
    def of_another_node(seq: int) -> bytes:
        return encode(news(str(seq)), Origin("another", seq))

    for seq in (1, 2, 10**12, 3, 4, 4, 2):
        started.broker.send(NAME, of_another_node(seq))
    started.broker.send(NAME, b'{"v":1}\nend')
    await started.got(b"1", b"2", b"1000000000000", b"3", b"4", b"end")
    assert started.engine.stats().bad_envelopes == {"stale": 2}


async def test_messages_that_are_missed_before_the_link_is_lost_are_one_gap_with_it(started: Started) -> None:
    inlet = started.broker.links[0].inlet
    assert inlet is not None
    inlet.missed("a buffer was full")
    started.broker.drop_links()
    await started.is_down()
    await started.is_up()
    await asyncio.sleep(0)
    assert len(started.node.gaps) == 1
    assert started.engine.stats().gaps == 1


async def test_gap_begins_when_the_first_of_the_missed_came(started: Started) -> None:
    inlet = started.broker.links[0].inlet
    assert inlet is not None
    now = asyncio.get_running_loop().time()
    inlet.missed("was held back", now - 100)
    inlet.missed("was held back longer", now - 200)
    inlet.missed("a buffer was full")
    started.broker.send(NAME, b'{"v":1}\na sign of life')
    await started.got(b"a sign of life")
    started.broker.drop_links()
    await started.is_down()
    await started.is_up()
    await asyncio.sleep(0)
    (gap,) = started.node.gaps
    assert 200 <= gap.seconds < 300


def test_engine_whose_event_loop_cancels_what_is_left_may_be_started_elsewhere() -> None:
    engine = FakeEngine(FakeBroker())

    async def elsewhere() -> None:
        await engine.start(Recorder())
        await engine.publish(news())
        await engine.aclose()

    async def outlive() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            running = engine._session._running  # type: ignore[union-attr]
            assert running is not None
            await asyncio.wait([running])
            with pytest.raises(EngineUnavailable, match=r"out of reach \(its event loop ends\); nothing was sent"):
                await engine.publish(news())
            await asyncio.to_thread(asyncio.run, elsewhere())
            outlived.append(True)

    async def use() -> asyncio.Task[None]:
        await engine.start(Recorder())
        last = asyncio.create_task(outlive())
        await asyncio.sleep(0)
        return last  # and it is cancelled, together with what the engine runs

    outlived: list[bool] = []
    asyncio.run(use())
    assert outlived == [True]


async def test_failures_of_many_that_nobody_awaits_are_one_line(
    started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    started.broker.is_hung.set()
    for number in range(1000):
        started.engine.publish_nowait(news(str(number)))
    await started.is_down()

    async def told() -> bool:
        return "messages of broadcast_nowait that were not published: 1000, because" in caplog.text

    await eventually(told)
    assert started.engine.stats().publish_failures >= 1000
    assert caplog.text.count("not published") == 1
    started.broker.is_hung.clear()


async def test_publication_whose_caller_gave_up_before_it_went_out_is_not_sent(started: Started) -> None:
    publishing = asyncio.create_task(started.engine.publish(news("given up")))
    session = started.engine._session
    assert session is not None
    while not session.outgoing._waiting:  # noqa: ASYNC110  # an eager task has put it there already
        await asyncio.sleep(0)
    publishing.cancel()
    await started.engine.publish(news("sent"))
    await started.got(b"sent")


async def test_joins_that_wait_end_with_the_engine(started: Started) -> None:
    started.broker.is_hung.set()
    started.engine.subscribe([SPORT])
    waiting = asyncio.create_task(started.engine.confirmed([SPORT]))
    await asyncio.sleep(0)
    await started.engine.aclose()
    await asyncio.wait_for(waiting, 1)
