"""Streams in this process and over the nodes of a cluster: one producer, any number of viewers, one end."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from tests.support.asgi import Peer, turns
from tests.support.servers import eventually
from wsbroadcast import (
    Audience,
    ConfigurationError,
    ConnectionManager,
    Delivery,
    EncodeError,
    History,
    LifecycleError,
    LimitExceeded,
    Message,
    Position,
    Publication,
    Run,
    StreamEnded,
    StreamEntry,
    StreamExists,
    StreamLimits,
    StreamNotFound,
)
from wsbroadcast.engines.lease import LEASE_SECONDS
from wsbroadcast.manager import core_of
from wsbroadcast.streams.ledger import STREAMS, log_of
from wsbroadcast.testing import Cluster

sets_the_clock = pytest.mark.skipif(
    os.environ.get("WSBROADCAST_TEST_LOOP") == "uvloop", reason="the clock of uvloop can't be set"
)


@pytest.fixture
async def manager() -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager() as manager:
        yield manager


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with Cluster(3) as cluster:
        yield cluster


async def hold(run: Run) -> None:
    """Produce nothing, until it is stopped."""
    await asyncio.Event().wait()


async def read(manager: ConnectionManager, id_: str, since: Position | None = None) -> list[StreamEntry]:
    """Everything up to the end."""
    async with asyncio.timeout(20), manager.follow_stream(id_, since=since) as entries:
        return [entry async for entry in entries]


def text_of(entries: list[StreamEntry]) -> str:
    return "".join(entry.text for entry in entries)


def kinds(entries: list[StreamEntry]) -> list[str]:
    return [entry.type for entry in entries]


async def parts(manager: ConnectionManager, run: Run) -> list[Any]:
    """What stands in the log of a run."""
    streams = await core_of(manager).streams()
    return list(await streams.producers.ledger.read_log(run._start))


# What is appended.


async def test_text_is_joined_before_it_is_kept(manager: ConnectionManager) -> None:
    async with manager.stream("1") as run:
        for number in range(5000):
            run.append(f"{number} ")
        run.append("")
    assert len(await parts(manager, run)) == 1
    entries = await read(manager, "1")
    assert kinds(entries) == ["text", "end"]
    assert text_of(entries) == "".join(f"{number} " for number in range(5000))


async def test_data_is_an_entry_of_its_own_in_its_place(manager: ConnectionManager) -> None:
    async with manager.stream("1") as run:
        data: dict[str, Any] = {"n": 1}
        run.append("a")
        run.append("b")
        run.append(data)
        data["n"] = 2
        run.append(data)
        run.append("c")
    entries = await read(manager, "1")
    assert [(each.type, each.text or each.data) for each in entries[:-1]] == [
        ("text", "ab"),
        ("data", {"n": 1}),
        ("data", {"n": 2}),
        ("text", "c"),
    ]
    positions = [each.position for each in entries]
    assert positions == sorted(positions)
    assert len({*positions}) == len(positions)


async def test_what_cannot_be_appended_is_said_at_once_and_the_run_goes_on(manager: ConnectionManager) -> None:
    async with manager.stream("1", limits=StreamLimits(max_bytes=100, max_entries=3, max_entry_bytes=60)) as run:
        for wrong in (None, b"bytes", 5, ["list"]):
            with pytest.raises(TypeError, match="takes a str or a dict"):
                run.append(wrong)  # type: ignore[arg-type]
        with pytest.raises(EncodeError):
            run.append({"x": object()})
        with pytest.raises(EncodeError):
            run.append({"x": float("nan")})
        with pytest.raises(LimitExceeded, match="at most 60 bytes at once"):
            run.append({"x": "y" * 60})
        with pytest.raises(LimitExceeded, match="at most 100 bytes"):
            run.append("x" * 101)
        with pytest.raises(LimitExceeded, match="at most 100 bytes"):
            run.append("ü" * 51)
        run.append("a")
        run.append({})
        run.append("b")
        run.append("c")
        with pytest.raises(LimitExceeded, match="at most 3 entries") as refused:
            run.append({})
        assert refused.value.limit == "max_entries"
    assert text_of(await read(manager, "1")) == "abc"


def nested(levels: int) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for _ in range(levels - 1):
        data = {"": data}
    return data


@pytest.mark.parametrize(
    "data", [nested(205), nested(250), nested(5000), {"x": 10**5000}], ids=["205", "250", "5000", "number"]
)
async def test_data_that_viewers_could_not_read_is_refused(manager: ConnectionManager, data: dict[str, Any]) -> None:
    most = {"deep": nested(190), "number": 10**4000}
    async with manager.stream("1") as run:
        run.append("a")
        with pytest.raises(EncodeError):
            run.append(data)
        run.append(most)
        run.append("b")
    entries = await read(manager, "1")
    assert [each.text or each.data for each in entries[:-1]] == ["a", most, "b"]
    assert entries[-1].state == "done"


async def test_producer_in_a_thread_is_heard_while_nothing_else_happens(manager: ConnectionManager) -> None:
    seen = threading.Semaphore(0)

    def work(run: Run) -> None:
        for number in range(20):
            run.append(f"{number} ")
            assert seen.acquire(timeout=1.0), "nothing else wakes the event loop"

    async def produce(run: Run) -> None:
        await asyncio.to_thread(work, run)

    await manager.start_stream("1", produce)
    async with manager.follow_stream("1") as entries:
        texts = []
        async for entry in entries:
            texts.append(entry.text)
            seen.release()
    assert texts == [*(f"{number} " for number in range(20)), ""]
    assert entries.end == ("done", "")


async def test_thread_that_appends_as_fast_as_it_can_learns_of_a_stop(manager: ConnectionManager) -> None:
    ended: list[str] = []

    def work(run: Run) -> None:
        try:
            for number in itertools.count():
                run.append("x" if number % 1000 else {})
        except StreamEnded as error:
            ended.append(error.state)

    limits = StreamLimits(max_bytes=16 * 1024 * 1024)
    run = await manager.start_stream("1", lambda run: asyncio.to_thread(work, run), limits=limits)
    async with manager.follow_stream("1") as entries:
        await anext(entries)
    await manager.stop_stream("1")

    async def has_ended() -> bool:
        return bool(ended)

    await eventually(has_ended)
    assert (run.state, ended) == ("cancelled", ["cancelled"])


async def test_what_is_appended_in_the_moment_in_which_the_writer_looks_is_written(manager: ConnectionManager) -> None:
    class Held(deque[str | bytes]):
        """The writer, in its thread, takes what is held just before more is."""

        def append(self, entry: str | bytes) -> None:
            self.clear()
            run._is_awake = False
            run._goes_on = False
            assert run._timer is not None
            run._timer.cancel()
            run._timer = None
            super().append(entry)

    run = await manager.start_stream("1", hold)
    async with manager.follow_stream("1") as entries:
        run.append("a")
        assert (await anext(entries)).text == "a"
        run.append("taken")
        run._held = Held(run._held)
        await asyncio.to_thread(run.append, "held")
        async with asyncio.timeout(5):
            assert (await anext(entries)).text == "held"


async def test_any_text_comes_as_it_was(manager: ConnectionManager) -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000), 0x1F600, 0x10FFFF]))
    async with manager.stream("1") as run:
        run.append(text)
        run.append("\ud83d")  # half of a pair, which UTF-8 can't carry
    assert text_of(await read(manager, "1")) == f"{text}?"


async def test_large_text_goes_in_pieces_that_every_broker_takes(manager: ConnectionManager) -> None:
    async with manager.stream("1") as run:
        run.append("\x00" * 1024 * 1024)
        with pytest.raises(LimitExceeded):
            run.append("x")
    assert all(part.message.size < 1024 * 1024 for part in await parts(manager, run))
    entries = await read(manager, "1")
    assert kinds(entries) == ["text"] * 4 + ["end"]
    assert text_of(entries) == "\x00" * 1024 * 1024
    assert await read(manager, "1", entries[1].position) == entries[2:]


@pytest.mark.parametrize(
    "options",
    [{"max_bytes": 0}, {"max_bytes": 2**30}, {"max_entries": 2**20}, {"max_seconds": 10**6}, {"max_seconds": 0}],
)
def test_limits_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        StreamLimits(**options)


async def test_arguments_that_make_no_sense(manager: ConnectionManager) -> None:
    for id_ in ("", "\n", "x" * 201, 5, None):
        with pytest.raises(ValueError, match="stream"):
            manager.stream(id_)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="user"):
        manager.stream("1", user=True)
    with pytest.raises(ConfigurationError, match="ttl"):
        manager.stream("1", ttl=10**6)
    with pytest.raises(ConfigurationError, match="StreamLimits"):
        manager.stream("1", limits=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="takes the run"):
        await manager.start_stream("1", "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position"):
        manager.follow_stream("1", since="x")
    assert await manager.stream_status("1") is None
    assert await manager.stop_stream("1") is False
    with pytest.raises(StreamNotFound, match="no stream '1'"):
        await read(manager, "1")


# The end.


async def test_error_of_the_producer_ends_it_and_passes(manager: ConnectionManager) -> None:
    async def produce() -> None:
        async with manager.stream("1") as run:
            run.append("a")
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        await produce()
    entries = await read(manager, "1")
    assert (kinds(entries), entries[-1].state) == (["text", "end"], "error")
    assert entries[-1].error == "the producer failed (ZeroDivisionError)"


async def test_cancelled_task_is_lost(manager: ConnectionManager) -> None:
    async def produce() -> None:
        async with manager.stream("1") as run:
            run.append("a")
            await asyncio.Event().wait()

    task = asyncio.create_task(produce())

    async def has_begun() -> bool:
        return await manager.stream_status("1") is not None

    await eventually(has_begun)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    entries = await read(manager, "1")
    assert (text_of(entries), entries[-1].state) == ("a", "lost")


async def test_stop_lets_the_block_end_and_nothing_is_appended_any_more(manager: ConnectionManager) -> None:
    async with manager.stream("1") as run:
        run.append("held")
        assert await manager.stop_stream("1") is True
        assert run.cancelled
        run.append("never")
        raise AssertionError("it was stopped")
    assert run.state == "cancelled"
    entries = await read(manager, "1")
    assert (text_of(entries), entries[-1].state) == ("held", "cancelled")
    with pytest.raises(StreamEnded, match="has ended"):
        run.append("x")
    assert await manager.stop_stream("1") is False


async def test_stop_ends_a_block_whose_task_groups_append(
    manager: ConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    async def write(run: Run) -> None:
        while True:
            with suppress(asyncio.CancelledError):
                await turns()
            run.append("x")

    async def write_all(run: Run) -> None:
        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            outer.create_task(write(run))
            inner.create_task(write(run))

    async def produce() -> None:
        async with manager.stream("1") as run:
            await write_all(run)

    producing = asyncio.create_task(produce())

    async def stops() -> bool:
        return await manager.stop_stream("1")

    await eventually(stops)
    await producing
    run = await manager.start_stream("2", write_all)
    await manager.stop_stream("2")
    assert run.task is not None
    await asyncio.wait([run.task])
    assert [(await read(manager, id_))[-1].state for id_ in ("1", "2")] == ["cancelled"] * 2
    assert caplog.text == ""

    async def fail() -> None:
        async with manager.stream("3") as run, asyncio.TaskGroup() as tasks:
            tasks.create_task(write(run))
            await manager.stop_stream("3")
            _ = 1 / 0

    with pytest.raises(ExceptionGroup) as raised:  # what failed beside that isn't kept back
        await fail()
    assert {type(error) for error in raised.value.exceptions} >= {ZeroDivisionError}


async def test_stopped_producer_is_cancelled_and_awaited(manager: ConnectionManager) -> None:
    told: list[str] = []
    begun = asyncio.Event()

    async def produce(run: Run) -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append(run.state)
            raise

    await manager.start_stream("1", produce)
    await begun.wait()
    assert await manager.stop_stream("1") is True
    await turns()
    assert told == ["cancelled"]


async def test_end_of_the_manager_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with Cluster(2) as cluster:
        await cluster[0].start_stream("1", hold)
        async with cluster[1].follow_stream("1") as entries:
            await cluster[0].aclose()
            assert [entry.state async for entry in entries] == ["lost"]
        status = await cluster[1].stream_status("1")
        assert status is not None
        assert status.state == "lost"
    assert caplog.text == ""


async def test_producer_that_does_not_end_holds_up_the_end_of_the_manager_for_a_bounded_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def stubborn(run: Run) -> None:
        begun.set()
        while not may_end.is_set():
            with suppress(asyncio.CancelledError):
                await may_end.wait()

    manager = ConnectionManager()
    await manager.start()
    run = await manager.start_stream("the stubborn", stubborn)
    await begun.wait()
    async with asyncio.timeout(8):
        await manager.aclose()
    assert "the producer of the stream 'the stubborn' doesn't end" in caplog.text
    assert run.state == "lost"
    assert run.task is not None
    may_end.set()
    await run.task


@pytest.mark.parametrize("in_block", [False, True], ids=["task", "block"])
async def test_producer_that_ends_its_own_manager_ends_it(caplog: pytest.LogCaptureFixture, in_block: bool) -> None:
    manager = ConnectionManager()
    ended: list[str] = []

    async def end(run: Run) -> None:
        run.append("a")
        await manager.aclose()
        ended.append(run.state)

    async def end_in_block(run: Run) -> None:
        async with manager.stream("inner") as inner:
            await end(inner)

    for _ in range(2):  # nothing of the first is left in the second
        await manager.start()
        before = len(asyncio.all_tasks())
        run = await manager.start_stream("1", end_in_block if in_block else end)
        assert run.task is not None
        await asyncio.wait([run.task])
        await manager.aclose()
        assert not run.task.cancelled()
        assert run.state == "lost"
        assert len(asyncio.all_tasks()) <= before
    assert ended == ["lost"] * 2
    assert caplog.text == ""


async def test_run_that_takes_too_long_is_ended(manager: ConnectionManager) -> None:
    run = await manager.start_stream("1", hold, limits=StreamLimits(max_seconds=0.1))
    run.append("a")
    entries = await read(manager, "1")
    assert (text_of(entries), entries[-1].state, entries[-1].error) == ("a", "error", "it took too long")


@pytest.mark.parametrize("seed", range(20))
async def test_of_ends_that_race_one_counts(seed: int) -> None:
    async with Cluster(3, seed=seed) as cluster:
        cluster.delay(0.002)
        chance = random.Random(seed)

        async def produce(run: Run) -> None:
            run.append("a")
            await asyncio.sleep(chance.uniform(0, 0.01))

        await cluster[0].start_stream("1", produce)

        async def stop(number: int) -> bool:
            await asyncio.sleep(chance.uniform(0, 0.012))
            return await cluster[number].stop_stream("1")

        reading = [asyncio.create_task(read(manager, "1")) for manager in cluster]
        await asyncio.gather(*map(stop, (0, 1, 2, 1)))
        assert [text_of(await each) for each in reading] == ["a"] * 3
        states = set()
        for manager in cluster:
            entries = await read(manager, "1")
            assert kinds(entries) == ["text", "end"]
            states.add(entries[-1].state)

            async def is_known(manager: ConnectionManager = manager) -> Any:
                status = await manager.stream_status("1")
                return status if status is not None and not status.is_running else None

            states.add((await eventually(is_known)).state)
        assert len(states) == 1
        log = cluster.hub.log(log_of(entries[0].position.epoch))
        assert sum(b'"end"' in part.message.payload for part in log._kept) == 1


# One producer.


async def test_one_producer_at_a_time_over_all_nodes(cluster: Cluster) -> None:
    cluster.delay(0.002)

    async def begin(number: int) -> bool:
        try:
            await cluster[number % 3].start_stream("1", hold)
        except StreamExists:
            return False
        return True

    for _ in range(5):
        begun = await asyncio.gather(*map(begin, range(9)))
        assert sum(begun) == 1
        assert await cluster[0].stop_stream("1")

        async def is_stopped() -> bool:
            status = await cluster[0].stream_status("1")
            return status is not None and not status.is_running

        await eventually(is_stopped)


async def test_nothing_of_an_earlier_run_is_seen(cluster: Cluster) -> None:
    runs: list[str] = []
    async with asyncio.TaskGroup() as tasks:
        old = []
        for number in range(4):
            run = await cluster[number % 3].start_stream("1", hold, user=number)
            runs.append(run.run_id)
            run.append(f"of {number}")
            old += [(number, tasks.create_task(read(manager, "1"))) for manager in cluster]
            await cluster[(number + 1) % 3].stop_stream("1")
            await read(cluster[0], "1")

            async def is_ended(manager: ConnectionManager = cluster[0]) -> bool:
                status = await manager.stream_status("1")
                return status is not None and not status.is_running

            await eventually(is_ended)
    for number, task in old:
        entries = task.result()
        assert text_of(entries) == f"of {number}"
        assert {each.position.epoch for each in entries} == {runs[number]}
    assert len(set(runs)) == 4


# Viewers.


async def test_late_viewer_gets_one_text_and_then_what_comes(cluster: Cluster) -> None:
    run = await cluster[0].start_stream("1", hold)
    async with cluster[1].follow_stream("1") as early:
        seen = []
        for number in range(10):
            run.append(f"{number} ")
            seen.append((await anext(early)).text)
    async with cluster[2].follow_stream("1") as late:
        assert (await anext(late)).text == "".join(seen)
        run.append("more")
        assert (await anext(late)).text == "more"
    assert len(seen) == 10


async def test_slow_viewer_gets_fewer_and_larger_pieces(manager: ConnectionManager) -> None:
    run = await manager.start_stream("1", hold)
    async with manager.follow_stream("1") as slow, manager.follow_stream("1") as quick:
        run.append("0")
        assert (await anext(slow)).text == (await anext(quick)).text == "0"
        for number in range(1, 10):
            run.append(str(number))
            assert (await anext(quick)).text == str(number)
        assert (await anext(slow)).text == "123456789"


async def test_viewer_in_the_moment_before_it_is_kept_sees_it_once(manager: ConnectionManager) -> None:
    run = await manager.start_stream("1", hold)
    run.append("held")
    async with manager.follow_stream("1") as entries:
        assert (await anext(entries)).text == "held"
        await manager.stop_stream("1")
        assert [entry.type async for entry in entries] == ["end"]


async def test_since_goes_on_where_the_viewer_was(cluster: Cluster) -> None:
    async with cluster[0].stream("1") as run:
        run.append("ab")
        run.append({"n": 1})
        run.append("c")
    entries = await read(cluster[1], "1")
    for number, entry in enumerate(entries):
        assert await read(cluster[2], "1", entry.position) == entries[number + 1 :]
    assert await read(cluster[1], "1", Position(run.run_id, 0)) == entries
    for elsewhere in (Position(run.run_id, 99), Position("another", 1)):
        found = await read(cluster[1], "1", elsewhere)
        assert found == [StreamEntry("reset", Position(run.run_id, 0)), *entries]


async def test_stream_is_gone_after_its_time(manager: ConnectionManager) -> None:
    async with manager.stream("1", ttl=0.1) as run:
        run.append("a")

    async def is_gone() -> bool:
        return await manager.stream_status("1") is None

    await eventually(is_gone)
    with pytest.raises(StreamNotFound):
        await read(manager, "1")
    engine: Any = manager._core.life.engine

    async def is_forgotten() -> bool:
        return not engine._logs

    await eventually(is_forgotten)


async def test_manager_that_keeps_nothing_else_carries_streams_and_costs_nothing_before(
    manager: ConnectionManager,
) -> None:
    node = manager._core.life.node
    assert (node.streams, node.continuity.tails) == (None, None)
    async with manager.stream("1") as run:
        run.append("a")
    await manager.broadcast("x", channel="news")
    assert (await manager._core.broadcast(manager._core.publications("x", "news"))).position is None


# What fails.


async def test_reload_in_the_middle_and_tabs_that_join_whenever_over_links_that_are_cut() -> None:
    tokens = [f"t{number} " for number in range(2000)]
    whole = "".join(tokens)
    async with Cluster(3, seed=4) as cluster:
        cluster.hub.lost = cluster.hub.doubled = 0.05
        cluster.delay(0.001)
        chance = random.Random(4)

        async def produce(run: Run) -> None:
            for number, token in enumerate(tokens):
                run.append(token)
                if number % 10 == 0:
                    await asyncio.sleep(0.01)

        await cluster[0].start_stream("1", produce)

        async def tab(number: int) -> str:
            # Reloads as a page does that kept what it has, at another node each time.
            text, since = "", None
            await asyncio.sleep(chance.uniform(0, 1.5))
            while True:
                manager = cluster[chance.randrange(3)]
                try:
                    async with manager.follow_stream("1", since=since) as entries:
                        async with asyncio.timeout(chance.uniform(0.05, 0.6)):
                            async for entry in entries:
                                assert entry.type != "reset"
                                text, since = text + entry.text, entry.position
                                if entry.type == "end":
                                    assert entry.state == "done"
                                    return text
                except (TimeoutError, OSError):
                    pass

        async def cut() -> None:
            for _ in range(6):
                number = chance.randrange(3)
                cluster.partition(number)
                await asyncio.sleep(chance.uniform(0.05, 0.2))
                cluster.heal(number)
                await asyncio.sleep(0.1)

        async with asyncio.timeout(60):
            *texts, _ = await asyncio.gather(*map(tab, range(10)), cut())
        assert texts == [whole] * 10


async def test_short_outage_loses_nothing_and_doubles_nothing(cluster: Cluster) -> None:
    async def produce(run: Run) -> None:
        for number in range(50):
            run.append(f"{number} ")
            await asyncio.sleep(0.02)

    await cluster[0].start_stream("1", produce)
    watching = asyncio.create_task(read(cluster[1], "1"))
    await asyncio.sleep(0.2)
    cluster.partition(0)
    await asyncio.sleep(0.4)
    cluster.heal(0)
    entries = await watching
    assert text_of(entries) == "".join(f"{number} " for number in range(50))
    assert entries[-1].state == "done"


async def test_broker_that_forgets_everything_ends_the_run_as_an_error(cluster: Cluster) -> None:
    run = await cluster[0].start_stream("1", hold)
    async with cluster[1].follow_stream("1") as entries:
        run.append("a")
        assert (await anext(entries)).text == "a"
        await cluster.restart_broker()
        run.append("b")
        rest = [entry async for entry in entries]
        assert (kinds(rest)[-1], rest[-1].state) == ("end", "error")
    assert run.state in ("error", "lost")


@sets_the_clock
async def test_producer_that_is_dead_is_noticed_by_viewers_and_by_who_asks(cluster: Cluster) -> None:
    for id_ in ("watched", "asked", "begun"):
        run = await cluster[0].start_stream(id_, hold)
        run.append(id_)
        async with cluster[1].follow_stream(id_) as entries:
            assert (await anext(entries)).text == id_
    async with cluster[1].follow_stream("watched", since=entries.position) as entries:
        assert [(await anext(entries)).type, (await anext(entries)).text] == ["reset", "watched"]
        await cluster.kill(0)
        reading = asyncio.create_task(anext(entries))
        await cluster.advance(LEASE_SECONDS + 5)
        entry = await reading
        assert (entry.type, entry.state) == ("end", "lost")
    status = await cluster[2].stream_status("asked")
    assert status is not None
    assert status.state == "lost"
    assert kinds(await read(cluster[1], "asked")) == ["text", "end"]
    assert await cluster[2].stop_stream("watched") is False
    run = await cluster[2].start_stream("begun", hold)
    assert kinds(await read(cluster[1], "asked")) == ["text", "end"]
    await cluster[1].stop_stream("begun")
    assert kinds(await read(cluster[1], "begun")) == ["end"]


@sets_the_clock
async def test_node_that_was_cut_off_for_long_loses_its_runs(cluster: Cluster) -> None:
    run = await cluster[0].start_stream("1", hold)
    async with cluster[1].follow_stream("1") as entries:
        run.append("a")
        assert (await anext(entries)).text == "a"
        cluster.partition(0)
        run.append("b")
        reading = asyncio.create_task(anext(entries))
        await cluster.advance(LEASE_SECONDS + 5)
        assert (await reading).state == "lost"
        cluster.heal(0)

        async def knows() -> bool:
            return run.state == "lost"

        await eventually(knows, 10)
    with pytest.raises(StreamEnded):
        run.append("c")
    assert text_of(await read(cluster[2], "1")) == "a"


async def test_stop_that_comes_before_the_start_has_returned_counts(cluster: Cluster) -> None:
    cluster.delay(0.2)
    await cluster[0].start_stream("other", hold)  # from now on it hears what it is asked
    starting = asyncio.create_task(cluster[0].start_stream("1", hold))
    cluster.delay(0.0)

    async def stops() -> bool:
        return await cluster[1].stop_stream("1")

    await eventually(stops)
    run = await starting

    async def is_stopped() -> bool:
        return run.state == "cancelled"

    await eventually(is_stopped)


async def test_start_that_is_cancelled_leaves_the_id_free(cluster: Cluster) -> None:
    await cluster[0].start_stream("other", hold)  # so that the node is alive
    for turn_count in range(1, 40, 3):
        id_ = f"cancelled {turn_count}"
        starting = asyncio.create_task(cluster[0].start_stream(id_, hold))
        await turns(turn_count)
        starting.cancel()
        await asyncio.wait([starting])
        if not starting.cancelled():
            assert await cluster[1].stop_stream(id_)

        async def begins(id_: str = id_) -> bool:
            try:
                await cluster[2].start_stream(id_, hold)
            except StreamExists:
                return False
            return True

        await eventually(begins)


async def test_engine_that_fails_in_a_way_nobody_expects_ends_the_run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Any = core_of(cluster[0]).life.engine
    run = await cluster[0].start_stream("1", hold)
    real = engine.append

    async def fail(publication: Publication, *rest: Any) -> Any:
        if b"bad" in publication.message.payload:
            run.append("while it is written")
            raise ZeroDivisionError
        return await real(publication, *rest)

    monkeypatch.setattr(engine, "append", fail)
    run.append("good")
    async with cluster[1].follow_stream("1") as entries:
        assert (await anext(entries)).text == "good"
        run.append("bad")
        entry = await anext(entries)
        assert (entry.type, entry.state, entry.error) == ("end", "error", "it can't be kept")
    assert "ZeroDivisionError" in caplog.text
    assert run.task is not None
    async with asyncio.timeout(5):
        await asyncio.wait([run.task])  # there is nothing to produce for any more
    with pytest.raises(StreamEnded):
        run.append("more")
    status = await cluster[1].stream_status("1")
    assert status is not None
    assert status.state == "error"


# What stands around it.


async def test_hooks_and_connections_hear_nothing_of_streams() -> None:
    told: list[str] = []
    async with ConnectionManager(history=History()) as manager:

        @manager.on_broadcast
        def on_broadcast(message: Message, audience: Audience) -> None:
            told.append(f"broadcast {audience}")

        @manager.on_deliver
        def on_deliver(delivery: Delivery) -> None:
            told.append(f"deliver {delivery.audience}")

        peer = Peer()
        await manager.connect(peer.websocket, user="ann", channels=["1"])
        async with manager.stream("1", user="ann") as run:
            reading = asyncio.create_task(read(manager, "1"))
            run.append("a")
        assert text_of(await reading) == "a"
        await manager.broadcast("end", channel="1")
        assert await peer.wait_messages(1) == ["end"]
        assert told == ["broadcast Audience(kind='channel', name='1')", "deliver Audience(kind='channel', name='1')"]
        assert manager.stats().deliveries == 1


async def test_manager_that_is_started_again_carries_streams_again() -> None:
    manager = ConnectionManager()
    for number in range(2):
        async with manager:
            assert await manager.stream_status("1") is None  # what memory keeps ends with the manager
            run = await manager.start_stream("1", hold)
            run.append(str(number))
            async with manager.follow_stream("1") as entries:
                assert (await anext(entries)).text == str(number)
                await manager.stop_stream("1")
    with pytest.raises(LifecycleError, match="closed"):
        await manager.start_stream("1", hold)


async def test_event_loops_one_after_another_carry_streams() -> None:
    manager = ConnectionManager()

    async def use() -> str:
        async with manager, manager.stream("1") as run:
            run.append("a")
            run.append("b")
            async with manager.follow_stream("1") as entries:
                return (await anext(entries)).text

    for _ in range(2):
        assert await asyncio.to_thread(asyncio.run, use()) == "ab"


async def test_node_that_closes_while_it_produces_and_watches_leaves_nothing(cluster: Cluster) -> None:
    began = asyncio.get_running_loop().time()
    runs = [await cluster[0].start_stream(str(number), hold) for number in range(20)]
    for run in runs:
        run.append("held")
    watching = [asyncio.create_task(read(cluster[0], str(number))) for number in range(20)]
    others = [asyncio.create_task(read(cluster[1], str(number))) for number in range(20)]
    await turns(20)
    await cluster[0].aclose()
    await asyncio.gather(*watching)
    for each in await asyncio.gather(*others):
        assert (text_of(each), each[-1].state) == ("held", "lost")
    assert asyncio.get_running_loop().time() - began < 5


async def test_viewer_of_two_streams_at_the_same_time_gets_each(manager: ConnectionManager) -> None:
    async with manager.stream("1") as one, manager.stream("2") as two:
        one.append("1")
        two.append("2")
    assert [text_of(await read(manager, id_)) for id_ in ("1", "2")] == ["1", "2"]


async def test_read_that_is_cancelled_loses_nothing(manager: ConnectionManager) -> None:
    run = await manager.start_stream("1", hold)
    async with manager.follow_stream("1") as entries:
        for number in range(5):
            reading = asyncio.ensure_future(anext(entries))
            await turns()
            run.append(str(number))
            if number % 2:
                await asyncio.sleep(0.05)
            reading.cancel()
            await asyncio.wait([reading])
        await manager.stop_stream("1")
        text = "".join([entry.text async for entry in entries])
    assert text.endswith("4")
    assert "01234".endswith(text)


async def test_log_that_something_else_was_written_to_is_read_as_far_as_it_makes_sense(cluster: Cluster) -> None:
    run = await cluster[0].start_stream("1", hold)
    log = log_of(run.run_id)
    engine: Any = core_of(cluster[1]).life.engine
    for payload in (b"nonsense", b"[]", b'{"at":-1,"entries":["x"]}', b'{"at":0,"entries":[5]}', b'{"at":0}'):
        await engine.append(Publication(Message(payload, "json"), log), STREAMS)
    run.append("a")
    async with cluster[1].follow_stream("1") as entries:
        assert (await anext(entries)).text == "a"
        # The same again, and the beginning of it once more with something behind it.
        for payload in (b'{"at":0,"entries":["a"]}', b'{"at":0,"entries":["a","b"]}'):
            await engine.append(Publication(Message(payload, "json"), log), STREAMS)
        assert (await anext(entries)).text == "b"


async def test_hole_that_nothing_fills_is_no_silence(cluster: Cluster) -> None:
    run = await cluster[0].start_stream("1", hold)
    engine: Any = core_of(cluster[1]).life.engine
    async with cluster[1].follow_stream("1") as entries:
        run.append("a")
        assert (await anext(entries)).text == "a"
        payload = b'{"at":5,"entries":["b"]}'
        await engine.append(Publication(Message(payload, "json"), log_of(run.run_id)), STREAMS)
        entry = await anext(entries)
        assert (entry.type, entry.state, entry.error) == ("end", "error", "a part of it is lost")
