from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, MutableMapping
from contextvars import Context
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.websockets import WebSocketDisconnect

from wsbroadcast import ConnectionClosed, Message, SlowConsumer
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.backlog import Entry, Place
from wsbroadcast.delivery.frames import Batch
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.publication import Publication
from wsbroadcast.stats import Counters

# Long enough for a busy machine, short enough to wait for.
SEND_TIMEOUT = 0.08
CLOSE_TIMEOUT = 0.05
PATIENCE = 5.0


class Peer:
    """A server's `send` towards a peer that takes messages only while it reads."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.started: list[Any] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.error: Exception | None = None
        self.refused_codes: set[int] = set()
        self._is_sending = False

    async def send(self, event: MutableMapping[str, Any]) -> None:
        assert not self._is_sending, "two senders at the same time"
        self._is_sending = True
        try:
            self.started.append(_content(event))
            if event["type"] == "websocket.close" and event["code"] in self.refused_codes:
                raise AssertionError(f"invalid close code {event['code']}")
            await self.reads.wait()
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
            self.taken.append(_content(event))
        finally:
            self._is_sending = False

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        await self.send({**event, "text": f"app: {event.get('text')}"} if event["type"] == "websocket.send" else event)

    def take_one(self) -> None:
        """Let whoever is sending go on, once."""
        self.reads.set()
        self.reads.clear()


def _content(event: Mapping[str, Any]) -> Any:
    if event["type"] == "websocket.close":
        return event["code"], event.get("reason")
    return event["text"] if "text" in event else event["bytes"]


class Transport:
    """What a sink uses of a transport."""

    def __init__(self) -> None:
        self.held = 0
        self.aborts = 0
        self.closing = False

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.held

    def abort(self) -> None:
        self.aborts += 1


class Wire:
    """A sink, its owner, its peer, and the slow consumers of a node that has only this connection."""

    def __init__(self, transport: Transport | None = None, **options: Any) -> None:
        self.options = SlowConsumer(**{"send_timeout": SEND_TIMEOUT, "close_timeout": CLOSE_TIMEOUT, **options})
        self.counters = Counters()
        self.slow_consumers = SlowConsumers(self.options, self.counters)
        self.peer = Peer()
        self.sink = Sink(self, self.slow_consumers, self.peer.send, cast("asyncio.Transport | None", transport))
        self.losses: list[tuple[int, str]] = []
        self.evictions: list[str] = []

    context = Context()

    def lost(self, code: int, reason: str) -> None:
        self.losses.append((code, reason))
        self.sink.end()

    def evict(self, cause: str) -> None:
        self.evictions.append(cause)
        self.sink.end()

    def fall_back(self, place: Place) -> bool:
        return False

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        await self.peer.app_send(event)

    def deliver(self, *values: object, key: str | None = None) -> None:
        publications = [Publication(Message.of(value, key), EVERYONE) for value in values]
        batch = Batch[Any](publications[0])
        batch.publications.extend(publications[1:])
        self.sink.deliver(batch)

    async def drained(self) -> None:
        await until(lambda: self.sink.backlog is None)
        assert not self.slow_consumers.waiting
        assert (self.sink.held_bytes, self.sink.held_messages) == (0, 0)

    async def stalled(self, *values: object) -> None:
        """Deliver to a peer that doesn't read, and wait until the first of it is being written."""
        self.peer.reads.clear()
        before = len(self.peer.started)
        self.deliver(*values)
        await until(lambda: len(self.peer.started) > before)

    def app_sends(self, text: str) -> asyncio.Task[None]:
        return start(self.sink.send_event({"type": "websocket.send", "text": text}))

    def app_closes(self) -> asyncio.Task[None]:
        return start(self.sink.send_event({"type": "websocket.close", "code": 1000, "reason": "bye"}))


def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(coroutine)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # any condition, not only an event
            await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# Order.


async def test_messages_go_out_in_order_and_nothing_stays() -> None:
    wire = Wire()
    wire.deliver("one", b"two")
    wire.deliver({"three": 3})
    assert wire.peer.taken == []  # handing over never waits
    await wire.drained()
    assert wire.peer.taken == ["one", b"two", '{"three":3}']
    assert wire.evictions == []


async def test_app_sends_in_their_place_among_the_messages() -> None:
    wire = Wire()
    await wire.stalled("one")
    first = wire.app_sends("first")
    await turns()
    wire.deliver("two")
    second = wire.app_sends("second")
    await turns()
    wire.deliver("three")
    wire.peer.reads.set()
    await asyncio.gather(first, second)
    await wire.drained()
    assert wire.peer.taken == ["one", "app: first", "two", "app: second", "three"]


async def test_app_send_returns_when_it_is_written_and_not_before() -> None:
    wire = Wire()
    await wire.stalled("one")
    sending = wire.app_sends("mine")
    await turns()
    assert not sending.done()
    wire.peer.take_one()
    await until(lambda: wire.peer.started[-1] == "app: mine")
    assert not sending.done()
    wire.peer.take_one()
    await sending
    assert wire.peer.taken == ["one", "app: mine"]


@pytest.mark.parametrize(
    ("error", "losses"), [(RuntimeError("the app's own mistake"), []), (WebSocketDisconnect(1006), [(1006, "")])]
)
async def test_app_learns_of_its_own_mistake_and_the_rest_goes_on_unless_the_peer_is_gone(
    error: Exception, losses: list[tuple[int, str]]
) -> None:
    wire = Wire()
    await wire.stalled("one")
    sending = wire.app_sends("mistake")
    await turns()
    wire.deliver("two")
    wire.peer.take_one()
    await until(lambda: wire.peer.started[-1] == "app: mistake")
    wire.peer.error = error
    wire.peer.take_one()
    with pytest.raises(type(error)) as caught:
        await sending
    assert caught.value is error
    wire.peer.error = None
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == (["one"] if losses else ["one", "two"])
    assert wire.losses == losses


async def test_app_learns_what_came_of_the_send_in_which_the_sink_ends() -> None:
    wire = Wire()

    async def app_send(event: MutableMapping[str, Any]) -> None:
        wire.sink.end()  # as when the server finds the peer gone
        await asyncio.sleep(0)  # a middleware's, on the way back
        raise RuntimeError("the peer is gone")

    wire.app_send = app_send  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the peer is gone"):
        await wire.app_sends("mine")


async def test_app_send_cancelled_while_it_waits_is_withdrawn() -> None:
    wire = Wire()
    await wire.stalled("one")
    sending = wire.app_sends("mine")
    await turns()
    wire.deliver("two")
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert [type(item) for item in wire.sink.backlog or ()] == [Entry]  # its text isn't kept
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == ["one", "two"]


async def test_app_send_cancelled_while_it_is_written_goes_out_whole() -> None:
    wire = Wire()
    wire.peer.reads.clear()
    sending = wire.app_sends("mine")
    await until(lambda: wire.peer.started == ["app: mine"])
    wire.deliver("two")
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == ["app: mine", "two"]


async def test_app_send_cancelled_in_the_turn_in_which_its_own_comes_is_withdrawn() -> None:
    wire = Wire()
    await wire.stalled("one")
    sending = wire.app_sends("mine")
    await turns()
    wire.deliver("two")
    wire.peer.reads.set()
    await turns(1)
    sending.cancel()  # the writer comes to it before the task learns that it is cancelled
    await wire.drained()
    assert sending.cancelled()
    assert wire.peer.taken == ["one", "two"]


@pytest.mark.parametrize("end", ["lost", "error"])
async def test_app_send_cancelled_while_it_is_written_may_fail_in_silence(end: str) -> None:
    wire = Wire()
    wire.peer.reads.clear()
    sending = wire.app_sends("mine")
    await until(lambda: wire.peer.started)
    sending.cancel()
    await turns()
    if end == "lost":
        wire.sink.end()
    else:
        wire.peer.error = RuntimeError("nobody asks any more")
        wire.peer.reads.set()
    await wire.drained()
    await turns()
    assert sending.cancelled()
    assert wire.peer.taken == []
    assert wire.losses == []


async def test_app_close_comes_after_what_was_handed_over_and_nothing_after_it() -> None:
    wire = Wire()
    await wire.stalled("one", "two")
    closing = wire.app_closes()
    await turns()
    wire.deliver("too late")
    with pytest.raises(ConnectionClosed):
        await wire.sink.send_event({"type": "websocket.send", "text": "too late"})
    wire.peer.reads.set()
    await closing
    await wire.drained()
    assert wire.peer.taken == ["one", "two", (1000, "bye")]


async def test_app_close_stands_though_the_app_is_cancelled() -> None:
    wire = Wire()
    await wire.stalled("one")
    closing = wire.app_closes()
    await turns()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == ["one", (1000, "bye")]


Step = tuple[str, int]
steps = st.lists(
    st.tuples(st.sampled_from(["deliver", "app sends", "cancel", "take", "turns"]), st.integers(0, 4)), max_size=30
)


@given(steps)
@settings(max_examples=150)
async def test_any_interleaving_keeps_the_order_of_calls(steps: list[Step]) -> None:
    wire = Wire(send_timeout=60)
    wire.peer.reads.clear()
    called: list[str] = []
    sending: dict[str, asyncio.Task[None]] = {}
    cancelled: set[str] = set()
    for number, (step, amount) in enumerate(steps):
        if step == "deliver":
            texts = [f"{number}.{part}" for part in range(amount + 1)]
            called += texts
            wire.deliver(*texts)
        elif step == "app sends":
            called.append(f"app: {number}")
            sending[f"app: {number}"] = wire.app_sends(str(number))
            await turns(1)  # a task begins when the loop comes to it
        elif step == "cancel" and amount < len(sending):
            text, task = list(sending.items())[amount]
            if task.cancel():
                cancelled.add(text)
        elif step == "take":
            for _ in range(amount):
                wire.peer.take_one()
                await turns()
        else:
            await turns(amount)
    wire.peer.reads.set()
    await asyncio.gather(*sending.values(), return_exceptions=True)
    await wire.drained()
    taken = wire.peer.taken
    assert [text for text in called if text in taken] == taken  # each once and in order
    assert set(called) - set(taken) <= cancelled  # only what was taken back is missing
    assert not wire.losses
    assert not wire.evictions


# Close.


async def test_close_sends_what_was_handed_over_and_then_the_code() -> None:
    wire = Wire()
    wire.deliver("one", "two")
    await wire.sink.close(1001, "x" * 200)
    wire.deliver("too late")
    assert wire.peer.taken == ["one", "two", (1001, "x" * 123)]
    await wire.drained()
    assert wire.counters.dropped == {"closed": 1}


async def test_close_towards_a_peer_that_takes_nothing_ends_after_close_timeout() -> None:
    transport = Transport()
    wire = Wire(transport, send_timeout=60)
    await wire.stalled("one", "two", "three")
    app = wire.app_sends("mine")
    await turns()
    began = time.monotonic()
    async with asyncio.timeout(PATIENCE):
        await wire.sink.close(1000, "")
    assert time.monotonic() - began >= CLOSE_TIMEOUT * 0.9
    with pytest.raises(ConnectionClosed):
        await asyncio.wait_for(app, PATIENCE)
    assert transport.aborts == 1
    assert wire.counters.dropped == {"closed": 2}  # the first may be on its way
    wire.peer.reads.set()
    await turns()
    assert wire.peer.taken == []  # a write that was cut off is never followed by another
    await wire.drained()


async def test_close_towards_a_peer_that_takes_nothing_ends_without_a_transport_too() -> None:
    wire = Wire(send_timeout=60)
    await wire.stalled("one", "two")
    async with asyncio.timeout(PATIENCE):
        await wire.sink.close(1000, "")
    assert wire.counters.dropped == {"closed": 1}
    await wire.drained()


async def test_close_waits_for_a_peer_that_goes_on_taking() -> None:
    wire = Wire(send_timeout=60, close_timeout=0.1)
    await wire.stalled(*map(str, range(6)))
    closing = start(wire.sink.close(1000, "done"))
    while not closing.done():
        await asyncio.sleep(0.03)
        wire.peer.take_one()
    await closing
    assert wire.peer.taken == [*map(str, range(6)), (1000, "done")]


async def test_close_gives_a_peer_that_goes_on_taking_no_more_than_send_timeout() -> None:
    transport = Transport()
    wire = Wire(transport, send_timeout=0.2, close_timeout=0.05)
    wire.evict = lambda cause: None  # type: ignore[method-assign]  # it is closing already
    await wire.stalled(*map(str, range(1000)))
    closing = start(wire.sink.close(1000, ""))
    async with asyncio.timeout(PATIENCE):
        while not closing.done():
            await asyncio.sleep(0.01)
            wire.peer.take_one()
    assert transport.aborts == 1
    assert wire.counters.dropped["closed"] > 0
    assert wire.peer.taken == [str(number) for number in range(len(wire.peer.taken))]
    await wire.drained()


@pytest.mark.parametrize(
    ("refused", "expected"),
    [(set(), [(1013, "slow")]), ({1013}, [(4013, "slow")]), ({1013, 4013}, [(1000, "slow")]), ({1013, 4013, 1000}, [])],
)
async def test_close_code_that_the_server_refuses_falls_back(refused: set[int], expected: list[Any]) -> None:
    wire = Wire()
    wire.peer.refused_codes = refused
    await wire.sink.close(1013, "slow")
    assert wire.peer.taken == expected
    assert wire.losses == []
    await wire.drained()


async def test_close_code_of_the_app_has_no_other_form() -> None:
    wire = Wire()
    wire.peer.refused_codes = {4321}
    await wire.sink.close(4321, "")
    assert wire.peer.started == [(4321, "")]
    assert wire.losses == []


async def test_close_of_a_socket_that_is_gone_is_no_loss() -> None:
    wire = Wire()
    wire.peer.error = ConnectionResetError()
    await wire.sink.close(1013, "")
    assert wire.peer.started == [(1013, "")]  # the other codes would fail the same way
    assert wire.losses == []


# Loss.


@pytest.mark.parametrize("error", [OSError(), ConnectionResetError(), RuntimeError("after close"), KeyError("odd")])
async def test_failed_write_is_reported_once_and_ends_the_sink(error: Exception) -> None:
    wire = Wire()
    await wire.stalled("one", "two", "three")
    app = wire.app_sends("mine")
    await turns()
    wire.peer.error = error
    wire.peer.reads.set()
    with pytest.raises(ConnectionClosed):
        await app
    await wire.drained()
    assert wire.losses == [(1006, "")]
    assert wire.counters.dropped == {"closed": 2}
    wire.peer.error = None
    wire.deliver("late")
    with pytest.raises(ConnectionClosed):
        await wire.sink.send_event({"type": "websocket.send", "text": "late"})
    await turns()
    assert wire.peer.started == ["one"]


async def test_end_cancels_what_is_being_written() -> None:
    wire = Wire()
    await wire.stalled("one", "two")
    app = wire.app_sends("mine")
    await turns()
    wire.sink.end()
    wire.sink.end()
    with pytest.raises(ConnectionClosed):
        await app
    await wire.drained()
    wire.peer.reads.set()
    await turns()
    assert (wire.peer.started, wire.peer.taken) == (["one"], [])
    assert wire.losses == []


async def test_app_send_learns_that_it_was_cut_off_while_written() -> None:
    wire = Wire()
    wire.peer.reads.clear()
    sending = wire.app_sends("mine")
    await until(lambda: wire.peer.started)
    wire.sink.end()
    with pytest.raises(ConnectionClosed):
        await sending


async def test_app_close_of_what_ends_meanwhile_has_nothing_to_complain_about() -> None:
    wire = Wire()
    await wire.stalled("one")
    closing = wire.app_closes()
    await turns()
    wire.sink.end()
    await asyncio.wait_for(closing, PATIENCE)


async def test_end_before_the_writer_began_leaves_nothing() -> None:
    wire = Wire()
    wire.deliver("one")
    wire.sink.end()
    assert wire.sink.backlog is None
    assert not wire.slow_consumers.waiting
    await turns()
    assert len(wire.peer.started) + wire.counters.dropped["closed"] == 1  # an eager task has begun


async def test_discard_counts_and_the_sink_goes_on() -> None:
    wire = Wire()
    await wire.stalled("one", "two", "three")
    wire.sink.discard()
    assert wire.counters.dropped == {"closed": 2}
    wire.deliver("four")
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == ["one", "four"]
    wire.sink.discard()
    assert wire.counters.dropped == {"closed": 2}


@pytest.mark.parametrize("is_apps", [False, True])
async def test_discard_keeps_a_close_that_waits_if_it_is_told_to(is_apps: bool) -> None:
    wire = Wire()
    await wire.stalled("one", "two")
    closing = wire.app_closes() if is_apps else start(wire.sink.close(1000, "bye"))
    await turns()
    wire.sink.discard(keeps_close=True)
    wire.peer.reads.set()
    await closing
    assert wire.peer.taken == ["one", (1000, "bye")]
    assert wire.counters.dropped == {"closed": 1}


async def test_peer_that_does_not_answer_the_close_is_cut_off_after_close_timeout() -> None:
    transport = Transport()
    wire = Wire(transport)
    assert not wire.sink.is_freed
    started = time.monotonic()
    await wire.sink.see_off()
    assert transport.aborts == 1
    assert time.monotonic() - started >= CLOSE_TIMEOUT


async def test_peer_that_answers_the_close_is_let_go_at_once() -> None:
    transport = Transport()
    wire = Wire(transport, close_timeout=PATIENCE)
    leaving = start(wire.sink.see_off())
    await turns()
    assert not leaving.done()
    transport.closing = True
    async with asyncio.timeout(PATIENCE / 2):
        await leaving
    assert transport.aborts == 0


@pytest.mark.parametrize("is_closing", [False, True])
async def test_peer_that_takes_nothing_after_the_close_is_cut_off(is_closing: bool) -> None:
    transport = Transport()
    transport.held = 1
    transport.closing = is_closing
    async with asyncio.timeout(PATIENCE):
        await Wire(transport, send_timeout=60).sink.see_off()
    assert transport.aborts == 1


@pytest.mark.parametrize(("send_timeout", "aborts"), [(PATIENCE, 0), (SEND_TIMEOUT, 1)])
async def test_peer_that_goes_on_taking_after_the_close_gets_send_timeout(send_timeout: float, aborts: int) -> None:
    transport = Transport()
    transport.held = 200
    transport.closing = True
    leaving = start(Wire(transport, send_timeout=send_timeout).sink.see_off())
    while not leaving.done():
        transport.held = max(0, transport.held - 1)
        await asyncio.sleep(0.001)
    assert transport.aborts == aborts
    assert (transport.held > 0) is bool(aborts)


async def test_nothing_is_waited_for_without_a_transport() -> None:
    sink = Wire().sink
    assert sink.is_freed
    await sink.see_off()


# A full backlog.


async def test_overflow_evicts_under_disconnect() -> None:
    wire = Wire(policy="disconnect", max_backlog_messages=3)
    await wire.stalled("being written")
    wire.deliver("one", "two", "three")
    assert wire.evictions == []
    wire.deliver("four", "five", "six")
    assert wire.evictions == ["backlog_full"]
    assert wire.counters.dropped == {"closed": 6}  # every message that was handed over and won't arrive
    await wire.drained()


async def test_overflow_drops_what_comes_under_drop_newest() -> None:
    wire = Wire(policy="drop_newest", max_backlog_messages=2)
    await wire.stalled("being written")
    wire.deliver("one", "two", "three", "four")
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == ["being written", "one", "two"]
    assert wire.counters.dropped == {"drop_newest": 2}
    assert wire.evictions == []


async def test_overflow_drops_what_waited_longest_under_drop_oldest() -> None:
    wire = Wire(policy="drop_oldest", max_backlog_bytes=8)
    await wire.stalled("being written")
    wire.deliver("one", "two", "three", "four")
    wire.peer.reads.set()
    await wire.drained()
    assert wire.peer.taken == ["being written", "four"]
    assert wire.counters.dropped == {"drop_oldest": 3}
    assert wire.evictions == []


async def test_conflate_keeps_the_newest_of_each_key_and_evicts_when_that_is_too_much() -> None:
    wire = Wire(policy="conflate", max_backlog_messages=2)
    await wire.stalled("being written")
    for price in range(100):
        wire.deliver(price, key="a")
        wire.deliver(-price, key="b")
    assert wire.counters.dropped == {"conflate": 198}
    assert wire.sink.held_messages == 2
    wire.peer.take_one()
    await until(lambda: wire.sink.held_messages == 1)
    wire.deliver("new", key="c")
    assert wire.evictions == []
    wire.deliver("one too many")
    assert wire.evictions == ["backlog_full"]
    assert wire.counters.dropped == {"conflate": 198, "closed": 3}


async def test_sink_is_behind_from_an_eighth_of_its_backlog_until_it_is_below() -> None:
    wire = Wire(max_backlog_messages=16, send_timeout=60)
    await wire.stalled("being written")
    wire.deliver("one", "two")
    assert set(wire.slow_consumers.behind) == set()
    wire.deliver("three")
    assert set(wire.slow_consumers.behind) == {wire.sink}
    wire.peer.take_one()
    await until(lambda: wire.sink.held_messages == 2)
    wire.peer.take_one()
    await until(lambda: set(wire.slow_consumers.behind) == set())
    wire.peer.reads.set()
    await wire.drained()


async def test_sink_that_ends_is_not_behind_any_more() -> None:
    wire = Wire(max_backlog_messages=8)
    await wire.stalled("being written", "one", "two")
    assert set(wire.slow_consumers.behind) == {wire.sink}
    wire.sink.end()
    assert set(wire.slow_consumers.behind) == set()


# A backlog that stands still.


async def test_backlog_that_stands_still_for_send_timeout_is_evicted() -> None:
    wire = Wire()
    began = time.monotonic()
    await wire.stalled("one")
    await until(lambda: wire.evictions)
    assert wire.evictions == ["send_timeout"]
    assert time.monotonic() - began >= SEND_TIMEOUT * 0.9  # the clock of uvloop is a coarse one


async def test_backlog_that_moves_is_not_evicted_however_long_it_takes() -> None:
    wire = Wire(send_timeout=0.2)
    await wire.stalled(*map(str, range(25)))
    async with asyncio.timeout(PATIENCE):
        while len(wire.peer.taken) < 20:  # three times send_timeout
            await asyncio.sleep(0.03)
            wire.peer.take_one()
    assert wire.evictions == []
    wire.peer.reads.set()
    await wire.drained()


async def test_transport_that_drains_is_progress_too() -> None:
    transport = Transport()
    transport.held = 1_000_000
    wire = Wire(transport, send_timeout=0.2)
    await wire.stalled("one large message")
    ends_at = time.monotonic() + 0.6
    while time.monotonic() < ends_at:
        await asyncio.sleep(0.03)
        transport.held -= 1
    assert wire.evictions == []
    await until(lambda: wire.evictions)  # and now it stands still
    assert wire.evictions == ["send_timeout"]


async def test_nobody_is_evicted_for_a_loop_that_was_blocked() -> None:
    wire = Wire(send_timeout=0.2)
    await wire.stalled("one")
    for _ in range(3):
        time.sleep(0.25)  # noqa: ASYNC251  # the classic mistake
        await asyncio.sleep(0)
    assert wire.evictions == []
    wire.peer.reads.set()
    await wire.drained()
