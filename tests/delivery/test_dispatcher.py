from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Coroutine, Iterable
from contextvars import Context
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.asgi import turns
from wsbroadcast import Audience, Message, SlowConsumer
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, Batch
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.publication import Publication
from wsbroadcast.stats import Counters


class Recorder:
    """A sink that keeps what it is handed, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.large = 0
        self.taken = 0
        self.outstanding = 0
        self.held_bytes = 0
        self.is_observable = True
        self.is_half_full = False
        self.writer: asyncio.Task[None] | None = None
        self.evictions = 0

    def deliver(self, batch: Batch[Any]) -> None:
        self.batches.append([each.message.data for each in batch.publications])

    is_half_full = False
    context = Context()

    def deliver_large(self, batch: Batch[Any]) -> None:
        self.large += 1
        self.deliver(batch)

    @property
    def owner(self) -> Recorder:
        return self

    def evict(self, cause: str) -> None:
        self.evictions += 1
        self.abort()

    def abort(self) -> None:
        assert self.writer is not None
        self.writer.cancel()

    @property
    def texts(self) -> list[Any]:
        return [text for batch in self.batches for text in batch]


class Member:
    def __init__(self, id: str, user_key: str | None = None, channels: Collection[str] = ()) -> None:  # noqa: A002
        self.id = id
        self._user_key = user_key
        self.channels = frozenset(channels)
        self.recorder = Recorder()

    @property
    def _sink(self) -> Sink:
        return cast(Sink, self.recorder)


class Node:
    """A registry with members in it, and the dispatcher above."""

    def __init__(self, members: Iterable[Member] = (), **options: Any) -> None:
        self.registry = Registry[Member]()
        self.counters = Counters()
        self.slow_consumers = SlowConsumers(SlowConsumer(**options), self.counters)
        self.dispatcher = Dispatcher(self.registry, self.slow_consumers)
        for member in members:
            self.registry.add(member)

    def dispatch(
        self,
        text: str,
        audience: Audience = EVERYONE,
        exclude: Collection[str] = (),
        recipients: list[Member] | None = None,
    ) -> None:
        self.dispatcher.dispatch(Publication(Message.of(text), audience, frozenset(exclude)), recipients)

    def fall_behind(self, *members: Member) -> None:
        for member in members:
            self.slow_consumers.fell_behind(member._sink)

    def stall(self, *members: Member) -> None:
        """Let members fall behind with a writer that gets nowhere."""
        for member in members:
            member.recorder.writer = self.slow_consumers.start_writer(member._sink, self._stalled(member))
        self.fall_behind(*members)

    async def _stalled(self, member: Member) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.slow_consumers.writer_ended(member._sink)
            self.catch_up(member)

    def catch_up(self, member: Member) -> None:
        self.slow_consumers.caught_up(member._sink)


def members(count: int) -> list[Member]:
    return [Member(str(number)) for number in range(count)]


def start(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    return asyncio.get_running_loop().create_task(coroutine)


# What is joined, and when it is delivered.


async def test_messages_of_one_turn_arrive_as_one_batch_within_the_turn() -> None:
    [member] = everybody = members(1)
    node = Node(everybody)
    node.dispatch("one")
    node.dispatch("two")
    assert member.recorder.batches == []
    await turns(1)
    assert member.recorder.batches == [["one", "two"]]
    node.dispatch("three")
    await turns(1)
    assert member.recorder.batches == [["one", "two"], ["three"]]


async def test_turn_is_ended_by_one_callback_however_many_messages_it_has() -> None:
    node = Node(members(1))
    flushes = 0

    class Counting(Dispatcher[Member]):
        def flush(self) -> None:
            nonlocal flushes
            flushes += 1
            super().flush()

    node.dispatcher = Counting(node.registry, node.slow_consumers)
    for text in ("a", "b", "c"):
        node.dispatch(text)
    await turns()
    assert flushes == 1


async def test_other_audience_or_exclusion_begins_a_batch_and_keeps_the_order() -> None:
    ann, bob = Member("ann", channels=["a"]), Member("bob", channels=["a"])
    node = Node([ann, bob])
    node.dispatch("1")
    node.dispatch("2", Audience("channel", "a"))
    node.dispatch("3", Audience("channel", "a"))
    node.dispatch("4", Audience("channel", "a"), exclude=["bob"])
    node.dispatch("5", Audience("connection", "ann"))
    node.dispatch("6")
    await turns()
    assert ann.recorder.batches == [["1"], ["2", "3"], ["4"], ["5"], ["6"]]
    assert bob.recorder.batches == [["1"], ["2", "3"], ["6"]]


async def test_recipients_may_be_named_themselves() -> None:
    everybody = members(3)
    node = Node(everybody)
    node.dispatch("1", recipients=everybody[:2])
    node.dispatch("2", recipients=everybody[:2])
    node.dispatch("3", recipients=everybody[1:])
    node.dispatch("4", Audience("channel", "a"), recipients=everybody[1:])  # whose messages may have keys of their own
    await turns()
    assert [member.recorder.batches for member in everybody] == [
        [["1", "2"]],
        [["1", "2"], ["3"], ["4"]],
        [["3"], ["4"]],
    ]


async def test_large_message_goes_in_pieces_and_keeps_its_place() -> None:
    [member] = everybody = members(1)
    node = Node(everybody)
    node.dispatch("before")
    node.dispatch("x" * (FRAGMENT_BYTES + 1))
    node.dispatch("after")
    await turns()
    assert member.recorder.batches == [["before", "x" * (FRAGMENT_BYTES + 1)], ["after"]]
    assert member.recorder.large == 1
    node.dispatch("x" * FRAGMENT_BYTES)
    await turns()
    assert member.recorder.large == 1


async def test_flush_delivers_at_once_and_once() -> None:
    [member] = everybody = members(1)
    node = Node(everybody)
    node.dispatch("one")
    node.dispatcher.flush()
    assert member.recorder.batches == [["one"]]
    node.dispatcher.flush()
    await turns()
    assert member.recorder.batches == [["one"]]


async def test_who_is_a_member_when_it_is_delivered_gets_it() -> None:
    first, late = members(2)
    node = Node([first])
    node.dispatch("before")
    node.dispatcher.flush()
    node.registry.add(late)
    node.dispatch("after")
    await turns()
    assert (first.recorder.texts, late.recorder.texts) == (["before", "after"], ["after"])


async def test_member_that_leaves_in_the_middle_of_a_flush_disturbs_nobody() -> None:
    leaving, staying = members(2)
    node = Node([leaving, staying])
    keep = leaving.recorder.deliver

    def deliver_and_leave(batch: Batch[Any]) -> None:
        keep(batch)
        node.dispatcher.flush()
        node.registry.remove(leaving)

    leaving.recorder.deliver = deliver_and_leave  # type: ignore[method-assign]
    node.dispatch("1")
    node.dispatch("2", Audience("connection", staying.id))
    node.dispatch("3")
    await turns()
    assert leaving.recorder.texts == ["1"]
    assert staying.recorder.texts == ["1", "2", "3"]


async def test_connection_whose_server_fails_on_a_write_is_lost_and_costs_nobody_else_a_message() -> None:
    class Failing(Recorder):
        losses = 0

        def deliver(self, batch: Batch[Any]) -> None:
            raise ValueError("the server's own")

        def lost(self, code: int, reason: str) -> None:
            self.losses += 1

    everybody = members(3)
    failing = everybody[1].recorder = Failing()
    node = Node(everybody)
    for text in ("x", "x" * (FRAGMENT_BYTES + 1)):
        node.dispatch(text)
        node.dispatcher.flush()
    assert failing.losses == 2
    assert [len(member.recorder.texts) for member in everybody] == [2, 0, 2]


async def test_deliveries_are_counted_by_message_and_connection() -> None:
    node = Node(members(3))
    for text in "ab":
        node.dispatch(text)
    node.dispatch("c", exclude=["0"])
    node.dispatch("d", Audience("channel", "nobody's"))
    await turns()
    assert node.counters.deliveries == 3 + 3 + 2


# A full turn.


@pytest.mark.parametrize(("size", "count"), [(16 * 1024, 1), (1024, 16), (0, 128)])
async def test_full_turn_is_delivered_at_once_and_the_loop_gets_its_chance(size: int, count: int) -> None:
    [member] = everybody = members(1)
    node = Node(everybody)
    for _ in range(count - 1):
        node.dispatch("x" * size)
    assert member.recorder.batches == []
    assert node.dispatcher.is_clear
    node.dispatch("x" * size)
    assert len(member.recorder.texts) == count
    assert not node.dispatcher.is_clear
    easing = start(node.dispatcher.ease(0, EVERYONE))
    await turns(1)
    async with asyncio.timeout(5):
        await easing
    assert node.dispatcher.is_clear
    member.recorder.batches.clear()
    node.dispatch("small")  # and the next turn begins from nothing
    node.dispatch("again")
    assert member.recorder.batches == []
    await turns(1)
    assert member.recorder.batches == [["small", "again"]]


async def broadcast_many(node: Node, name: str, sent: list[str], size: int, count: int) -> None:
    """What `ConnectionManager.broadcast` does, in a tight loop."""
    for _ in range(count):
        if not node.dispatcher.is_clear:
            await node.dispatcher.ease(size, EVERYONE)
        node.dispatch("x" * size)
        sent.append(name)


@pytest.mark.parametrize("size", [20_000, 5_000])
async def test_broadcasters_in_tight_loops_take_turns(size: int) -> None:
    node = Node(members(1))
    sent: list[str] = []
    async with asyncio.timeout(5):
        await asyncio.gather(*(broadcast_many(node, name, sent, size, 40) for name in "abc"))
    assert len(sent) == 120
    assert set(sent[:12]) == set("abc")  # nobody waits until another is done
    assert node.dispatcher.is_clear


async def test_broadcasters_together_fill_no_more_than_a_turn_before_the_loop_gets_its_chance() -> None:
    [member] = everybody = members(1)
    node = Node(everybody)
    sent: list[str] = []
    tasks = [start(broadcast_many(node, str(name), sent, 10_000, 4)) for name in range(50)]
    seen = 0
    async with asyncio.timeout(5):
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            assert len(member.recorder.texts) - seen <= 4  # two fill a turn; another may begin within one of the loop's
            seen = len(member.recorder.texts)
    await turns()
    assert len(member.recorder.texts) == 200


async def queued(node: Node, count: int) -> list[asyncio.Task[None]]:
    """Broadcasters that wait because a turn is full, whether tasks begin at once or in the next turn."""

    async def fill() -> None:
        await asyncio.sleep(0)
        node.dispatch("x" * 20_000)

    async def ease() -> None:
        await asyncio.sleep(0)
        await node.dispatcher.ease(0, EVERYONE)

    tasks = [start(fill()), *(start(ease()) for _ in range(count))]
    while node.dispatcher.is_clear:  # noqa: ASYNC110  # until the first of them waits
        await asyncio.sleep(0)
    return tasks[1:]


async def test_broadcaster_that_is_cancelled_in_the_queue_holds_nobody_up() -> None:
    node = Node(members(1))
    queue = await queued(node, 3)
    queue[0].cancel()
    async with asyncio.timeout(5):
        results = await asyncio.gather(*queue, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None), type(None)]
    assert node.dispatcher.is_clear


async def test_queue_moves_by_a_turn_at_a_time_and_newcomers_go_behind_it() -> None:
    node = Node(members(1))
    queue = await queued(node, 300)
    gone = [0]
    while gone[-1] < 300:
        await asyncio.sleep(0)
        gone.append(sum(each.done() for each in queue))
        assert node.dispatcher.is_clear is (gone[-1] >= 256)
    steps = [after - before for before, after in itertools.pairwise(gone) if after > before]
    assert steps == [128, 128, 44]


# The crowd.


@pytest.mark.parametrize(("behind", "waits"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
async def test_broadcaster_waits_for_more_than_half_of_the_audience(behind: int, waits: bool) -> None:
    everybody = members(4)
    node = Node(everybody)
    node.fall_behind(*everybody[:behind])
    assert node.dispatcher.is_clear is (behind == 0)
    easing = start(node.dispatcher.ease(0, EVERYONE))
    await turns()
    assert easing.done() is not waits
    for member in everybody[2:behind]:
        assert not easing.done()
        node.catch_up(member)
        await turns()
    assert easing.done()


async def test_only_the_audience_matters() -> None:
    inside, outside = [Member(f"in{number}", channels=["a"]) for number in range(3)], members(3)
    node = Node(inside + outside)
    node.fall_behind(*outside)
    async with asyncio.timeout(5):
        await node.dispatcher.ease(0, Audience("channel", "a"))
        await node.dispatcher.ease(0, Audience("channel", "nobody's"))
        await node.dispatcher.ease(0, EVERYONE)
    node.fall_behind(*inside[:2])
    easing = start(node.dispatcher.ease(0, Audience("channel", "a")))
    await turns()
    assert not easing.done()
    node.catch_up(inside[0])
    await easing


async def test_who_is_excluded_is_not_counted() -> None:
    everybody = members(5)
    node = Node(everybody)
    node.fall_behind(*everybody[:2])
    async with asyncio.timeout(5):
        await node.dispatcher.ease(0, EVERYONE, frozenset({"0", "1"}))
    easing = start(node.dispatcher.ease(0, EVERYONE, frozenset({"2", "3"})))
    await turns()
    assert not easing.done()
    node.catch_up(everybody[0])
    await easing


async def test_crowd_that_stays_behind_is_waited_for_no_longer_than_send_timeout() -> None:
    everybody = members(2)
    node = Node(everybody, send_timeout=0.05)
    node.fall_behind(*everybody)
    began = time.monotonic()
    async with asyncio.timeout(5):
        await node.dispatcher.ease(0, EVERYONE)
    assert time.monotonic() - began >= 0.04


async def test_broadcaster_goes_on_when_those_behind_turn_out_to_take_nothing() -> None:
    everybody = members(5)
    node = Node(everybody, send_timeout=4.0)
    node.stall(*everybody[:4])
    easing = start(node.dispatcher.ease(0, EVERYONE))
    await turns()
    assert not easing.done()  # they have only just begun to wait
    began = time.monotonic()
    async with asyncio.timeout(5):
        await easing
    assert time.monotonic() - began < 3  # and not send_timeout
    assert not any(member.recorder.evictions for member in everybody)
    await node.slow_consumers.aclose()


async def test_tight_loop_waits_for_the_tail_that_is_about_to_lose_messages() -> None:
    everybody = members(5)
    node = Node(everybody)
    node.fall_behind(everybody[0])
    everybody[0].recorder.is_half_full = True
    sent: list[str] = []
    loop = start(broadcast_many(node, "loop", sent, 20_000, 3))
    await turns(30)  # many times what it takes where nobody is behind
    assert not loop.done()
    assert len(sent) < 3
    node.catch_up(everybody[0])
    await loop


async def test_broadcaster_that_fills_no_turn_waits_for_no_minority() -> None:
    everybody = members(5)
    node = Node(everybody)
    node.fall_behind(everybody[0])
    everybody[0].recorder.is_half_full = True
    async with asyncio.timeout(5):
        await node.dispatcher.ease(0, EVERYONE)


async def test_tail_of_another_audience_is_not_waited_for() -> None:
    inside, [outside] = [Member(f"in{number}", channels=["a"]) for number in range(3)], members(1)
    node = Node([*inside, outside])
    node.fall_behind(outside)
    outside.recorder.is_half_full = True
    node.dispatch("x" * 20_000)
    async with asyncio.timeout(5):
        await node.dispatcher.ease(0, Audience("channel", "a"))


# Any interleaving.

names = st.sampled_from(["a", "b"])
audiences = st.one_of(
    st.just(EVERYONE),
    names.map(lambda name: Audience("channel", name)),
    names.map(lambda name: Audience("user", name)),
    st.integers(0, 5).map(lambda number: Audience("connection", str(number))),
    st.sets(st.integers(0, 5), max_size=3).map(sorted),
)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("dispatch"), audiences, st.frozensets(st.integers(0, 5).map(str), max_size=2), st.integers(0, 3)
        ),
        st.tuples(st.just("add"), st.sampled_from([None, "a", "b"]), st.frozensets(names)),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.tuples(st.just("subscribe"), st.integers(0, 5), names),
        st.tuples(st.just("unsubscribe"), st.integers(0, 5), names),
        st.tuples(st.just("turn")),
    ),
    max_size=40,
)

SIZES = [1, 100, 6_000, 20_000]


def is_in(member: Member, audience: Audience) -> bool:
    match audience.kind:
        case "everyone":
            return True
        case "channel":
            return audience.name in member.channels
        case "user":
            return audience.name == member._user_key
        case _:
            return audience.name == member.id


@given(operations)
@settings(max_examples=200)
async def test_any_interleaving_gives_each_member_exactly_its_messages_in_order(operations: list[Any]) -> None:
    node = Node()
    everybody: list[Member] = []
    here: list[Member] = []
    expected: dict[Member, list[str]] = {}

    def find(number: int) -> Member | None:
        return next((member for member in here if member.id == str(number)), None)

    for position, (operation, *arguments) in enumerate(operations):
        if operation == "dispatch":
            target, exclude, size = arguments
            text = f"{position}:" + "x" * SIZES[size]
            if isinstance(target, Audience):
                node.dispatch(text, target, exclude)
                recipients = [member for member in here if is_in(member, target) and member.id not in exclude]
            else:
                recipients = [member for member in map(find, target) if member is not None]
                node.dispatch(text, recipients=recipients)
            for member in recipients:
                expected[member].append(text)
        elif operation == "turn":
            await turns(1)
        else:
            node.dispatcher.flush()  # whoever changes the registry does
            if operation == "add":
                member = Member(str(len(everybody)), *arguments)
                everybody.append(member)
                here.append(member)
                expected[member] = []
                node.registry.add(member)
            elif (found := find(arguments[0])) is not None:
                if operation == "remove":
                    here.remove(found)
                    node.registry.remove(found)
                elif operation == "subscribe":
                    node.registry.subscribe(found, arguments[1])
                else:
                    node.registry.unsubscribe(found, arguments[1])
    await turns(2)
    for member in everybody:
        assert member.recorder.texts == expected[member]
    assert node.counters.deliveries == sum(map(len, expected.values()))
    assert node.dispatcher.is_clear


# Those who have yet to be told that they are in an audience.


async def test_what_comes_meanwhile_waits_for_one_that_is_told_first() -> None:
    [one, other] = everybody = [Member(name, channels=["news"]) for name in "ab"]
    node, news = Node(everybody), Audience("channel", "news")
    node.dispatch("before", news)
    node.dispatcher.open(one, news)
    node.dispatch("meanwhile", news)
    node.dispatch("alone", news, recipients=[one])
    node.dispatch("everyone")
    node.dispatcher.flush()
    assert one.recorder.texts == ["before", "everyone"]
    assert other.recorder.texts == ["before", "meanwhile", "everyone"]
    node.dispatch("you are in", Audience("connection", "a"))
    node.dispatcher.opened(one, news)
    node.dispatch("after", news)
    node.dispatcher.flush()
    assert one.recorder.texts == ["before", "everyone", "you are in", "meanwhile", "alone", "after"]
    assert other.recorder.texts == ["before", "meanwhile", "everyone", "after"]
    node.dispatcher.opened(one, news)  # twice is once


async def test_who_is_not_in_it_after_all_is_told_nothing_of_it() -> None:
    [one] = everybody = [Member("a", channels=["news"])]
    node, news = Node(everybody), Audience("channel", "news")
    node.dispatcher.open(one, news)
    node.dispatch("meanwhile", news)
    node.dispatcher.flush()
    node.registry.unsubscribe(one, "news")
    node.dispatcher.opened(one, news)
    assert one.recorder.texts == []


@pytest.mark.parametrize("options", [{"max_backlog_messages": 4}, {"max_backlog_bytes": 5}])
async def test_what_waits_is_bounded_and_the_oldest_makes_room(options: dict[str, int]) -> None:
    [one] = everybody = [Member("a", channels=["news"])]
    node, news = Node(everybody, **options), Audience("channel", "news")
    node.dispatcher.open(one, news)
    for number in range(5):
        node.dispatch(str(number), news)
        node.dispatcher.flush()
    node.dispatcher.opened(one, news)
    node.dispatch("5", news)
    node.dispatcher.flush()
    assert one.recorder.texts == ["3", "4", "5"]
    assert node.counters.dropped == {"opening": 3}
