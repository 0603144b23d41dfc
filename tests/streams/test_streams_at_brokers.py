"""Streams over real brokers: what holds in memory holds there, also while links are cut and brokers are away."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.streams.test_streams import hold, kinds, read, text_of
from tests.support.brokers import BrokerMissing, Endpoint, JetStreamServer, RedisServer
from tests.support.brokers.base import environment
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from wsbroadcast import ConnectionManager, Publisher, Run, StreamEnded, StreamExists
from wsbroadcast.manager import core_of
from wsbroadcast.publishing.host import Host

ROOT = Path(__file__).parents[2]
ENGINES = ["sqlite", "redis", "nats", "postgres"]
FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))


def with_prefix(url: str, prefix: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}prefix={prefix}"


@pytest.fixture(params=ENGINES)
def url(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/streams.db"
    return with_prefix(endpoint_of(request).url, prefix)


@pytest.fixture(scope="module")
def jetstream_server() -> Iterator[Endpoint]:
    with JetStreamServer() as server:
        yield server


def endpoint_of(request: pytest.FixtureRequest) -> Endpoint:
    name = "jetstream" if request.param == "nats" else request.param
    try:
        endpoint: Endpoint = request.getfixturevalue(f"{name}_server")
    except BrokerMissing as missing:
        pytest.skip(str(missing))
    return endpoint


def carrier(url: str) -> ConnectionManager:
    """A manager of which is known before its start that it carries streams, as a router would say."""
    manager = ConnectionManager(url)
    core_of(manager).use_streams()
    return manager


@pytest.fixture
async def nodes(url: str) -> AsyncIterator[list[ConnectionManager]]:
    async with carrier(url) as first, carrier(url) as second, carrier(url) as third:
        yield [first, second, third]


async def test_run_is_read_on_every_node(nodes: list[ConnectionManager]) -> None:
    async with nodes[0].stream("1", user=7) as run:
        reading = [asyncio.create_task(read(manager, "1")) for manager in nodes]
        for number in range(100):
            run.append(f"{number} ")
            await asyncio.sleep(0.005)
            if number == 50:
                run.append({"half": True})
                reading += [asyncio.create_task(read(manager, "1")) for manager in nodes]
    whole = "".join(f"{number} " for number in range(100))
    for each in await asyncio.gather(*reading):
        assert text_of(each) == whole
        assert (each[-1].state, [entry.data for entry in each if entry.type == "data"]) == ("done", [{"half": True}])
    for manager in nodes:
        status = await manager.stream_status("1")
        assert status is not None
        assert (status.state, status.user, status.run) == ("done", "7", run.run_id)
        assert kinds(await read(manager, "1")) == ["text", "data", "text", "end"]


async def test_stop_reaches_the_producer_on_another_node(nodes: list[ConnectionManager]) -> None:
    for number in range(3):
        run = await nodes[0].start_stream("1", hold)
        run.append(f"of {number}")
        with pytest.raises(StreamExists):
            await nodes[1].start_stream("1", hold)
        assert await nodes[2].stop_stream("1") is True
        entries = await read(nodes[1], "1")
        assert (text_of(entries), entries[-1].state) == (f"of {number}", "cancelled")

        async def is_ended() -> bool:
            status = await nodes[1].stream_status("1")
            return status is not None and not status.is_running

        await eventually(is_ended)
        assert await nodes[2].stop_stream("1") is False


async def test_one_of_many_begins(nodes: list[ConnectionManager]) -> None:
    async def begin(number: int) -> bool:
        try:
            await nodes[number % 3].start_stream("1", hold)
        except StreamExists:
            return False
        return True

    assert sum(await asyncio.gather(*map(begin, range(9)))) == 1


async def test_publisher_produces_for_the_viewers_of_an_app(nodes: list[ConnectionManager], url: str) -> None:
    def work() -> str:
        with Publisher(url) as publisher:
            with publisher.stream("1", user="ann") as run:
                for number in range(200):
                    run.append(f"{number} ")
            with publisher.stream("2") as run:
                run.append("x")
                while not run.cancelled:  # as one that waits for its model
                    time.sleep(0.01)
            return run.state

    async def stop() -> None:
        async def has_begun() -> bool:
            return await nodes[1].stop_stream("2")

        await eventually(has_begun, 10)

    working = asyncio.create_task(asyncio.to_thread(work))

    async def begun() -> Any:
        return await nodes[0].stream_status("1")

    await eventually(begun, 10)
    entries = await read(nodes[0], "1")
    assert text_of(entries) == "".join(f"{number} " for number in range(200))
    assert entries[-1].state == "done"
    await stop()
    assert await working == "cancelled"
    async with Publisher(url) as publisher:
        async with publisher.stream("3") as run:
            run.append("async")
            assert await publisher.stop_stream("3") is True
        status = await publisher.stream_status("3")
        assert status is not None
        assert status.state == "cancelled"
    assert text_of(await read(nodes[2], "3")) == "async"


async def test_first_use_of_a_manager_that_runs_already(url: str) -> None:
    async with ConnectionManager(url) as here, ConnectionManager(url) as there:
        await here.broadcast("x")
        async with here.stream("1") as run:
            run.append("a")
        assert text_of(await read(there, "1")) == "a"


@pytest.fixture(params=["redis", "nats", "postgres"])
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    return endpoint_of(request)


async def test_links_that_are_cut_leave_no_hole_and_no_double(endpoint: Endpoint, prefix: str) -> None:
    chance = random.Random(1)

    async def produce(run: Run) -> None:
        for number in range(300):
            run.append(f"{number} ")
            await asyncio.sleep(0.01)

    async with FaultProxy(endpoint) as producers, FaultProxy(endpoint) as viewers:
        urls = with_prefix(producers.url, prefix), with_prefix(viewers.url, prefix)
        async with carrier(urls[0]) as here, carrier(urls[1]) as there:
            await here.start_stream("1", produce)
            reading = [asyncio.create_task(read(there, "1")) for _ in range(3)]
            for _ in range(4):
                await asyncio.sleep(chance.uniform(0.1, 0.5))
                chance.choice([producers.reset, viewers.reset, producers.drop_replies])()
                await asyncio.sleep(0.1)
                producers.heal()
            whole = "".join(f"{number} " for number in range(300))
            for entries in await asyncio.gather(*reading):
                assert (text_of(entries), entries[-1].state) == (whole, "done")


async def test_broker_that_is_away_for_five_seconds(own_redis: Callable[..., RedisServer], prefix: str) -> None:
    redis = own_redis()

    async def produce(run: Run) -> None:
        for number in range(700):
            run.append(f"{number} ")
            await asyncio.sleep(0.01)

    async with (
        FaultProxy(redis) as proxy,
        carrier(with_prefix(proxy.url, prefix)) as here,
        carrier(with_prefix(redis.url, prefix)) as there,
    ):
        run = await here.start_stream("1", produce)
        reading = asyncio.create_task(read(there, "1"))
        await asyncio.sleep(0.5)
        proxy.refuse()
        proxy.reset()
        await asyncio.sleep(5)
        proxy.heal()
        entries = await reading
        assert (text_of(entries), entries[-1].state) == ("".join(f"{number} " for number in range(700)), "done")
        assert run.state == "done"


async def test_broker_that_has_lost_everything_ends_a_run(own_redis: Callable[..., RedisServer], prefix: str) -> None:
    redis = own_redis()
    async with carrier(with_prefix(redis.url, prefix)) as here, carrier(with_prefix(redis.url, prefix)) as there:
        run = await here.start_stream("1", hold)
        async with there.follow_stream("1") as entries:
            run.append("a")
            assert (await anext(entries)).text == "a"
            await redis.killed()
            await redis.started()
            run.append("b")
            async with asyncio.timeout(15):
                rest = [entry async for entry in entries]
        assert rest[-1].state in ("error", "lost")
        assert not any(entry.text for entry in rest) or kinds(rest) == ["text", "end"]
        assert run.state in ("error", "lost")


@pytest.mark.parametrize("url", ENGINES if FULL else ["sqlite"], indirect=True)
async def test_producer_whose_process_is_killed_is_lost_within_15_seconds(url: str) -> None:
    async with carrier(url) as here, carrier(url) as there:
        program = [sys.executable, "-m", "tests.support.producing", url, "1"]
        process = await asyncio.create_subprocess_exec(*program, cwd=ROOT, env=environment())
        try:

            async def has_begun() -> Any:
                return await here.stream_status("1")

            await eventually(has_begun, 20)
            async with here.follow_stream("1") as some, there.follow_stream("1") as others:
                texts = [(await anext(each)).text for each in (some, others)]
                process.kill()
                killed = asyncio.get_running_loop().time()
                for number, entries in enumerate((some, others)):
                    async with asyncio.timeout(20):
                        async for entry in entries:
                            texts[number] += entry.text
                    assert (entry.type, entry.state) == ("end", "lost")
                assert asyncio.get_running_loop().time() - killed <= 15
            assert texts[0] == texts[1]
            numbers = texts[0].split()
            assert numbers == [str(number) for number in range(len(numbers))]
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        status = await there.stream_status("1")
        assert status is not None
        assert status.state == "lost"
        async with there.stream("1") as run:
            run.append("again")
        assert text_of(await read(here, "1")) == "again"


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_publisher_that_closes_loses_what_it_produces(url: str) -> None:
    async with carrier(url) as manager:
        for is_threaded in (False, True):
            publisher = Publisher(url)
            stream = publisher.stream("1")
            if is_threaded:
                run = await asyncio.to_thread(stream.__enter__)
            else:
                run = await stream.__aenter__()
            run.append("a")
            await publisher.aclose()
            entries = await read(manager, "1")
            assert (text_of(entries), entries[-1].state, run.state) == ("a", "lost", "lost")
            with pytest.raises(StreamEnded):
                run.append("b")
            if is_threaded:
                await asyncio.to_thread(stream.__exit__, None, None, None)
            else:
                await stream.__aexit__(None, None, None)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_block_of_a_publisher_that_is_interrupted_where_it_begins_leaves_no_run_behind(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Host.submit

    def submit(host: Host, call: Callable[[Host], Any]) -> Any:
        real(host, call).result()
        raise KeyboardInterrupt  # as by a signal, or a soft time limit

    async with carrier(url) as manager:
        publisher = Publisher(url)
        await asyncio.to_thread(publisher.broadcast_threadsafe, "x")  # from now on it runs in a thread of its own
        with monkeypatch.context() as patch:
            patch.setattr(Host, "submit", submit)
            with pytest.raises(KeyboardInterrupt):
                publisher.stream("1").__enter__()

        async def is_lost() -> bool:
            status = await manager.stream_status("1")
            return status is not None and status.state == "lost"

        await eventually(is_lost)
        await publisher.aclose()


async def test_redis_cluster_carries_streams(own_cluster: list[RedisServer]) -> None:
    url = f"redis+cluster://{own_cluster[0].host}:{own_cluster[0].port}"
    async with carrier(url) as here, carrier(url) as there:
        for number in range(5):
            async with here.stream(f"of {number}") as run:
                run.append(f"{number}")
            assert text_of(await read(there, f"of {number}")) == str(number)
        await here.start_stream("stopped", hold)
        assert await there.stop_stream("stopped")
        assert kinds(await read(there, "stopped")) == ["end"]
