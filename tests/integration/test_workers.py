"""Several workers behind one port, and a broker between them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.support.brokers import Endpoint, RedisServer
from tests.support.rawclient import RawClient
from tests.support.servers import UVICORN, Server, eventually, swarm

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

APP = "tests.support.scaled:app"

# The same, with a history.
KEEPING = "tests.support.scaled:keeping_app"


def workers(count: int, engine: str, log: Path, app: str = APP) -> Server:
    flavour = replace(
        UVICORN,
        name=f"uvicorn --workers {count}",
        arguments=("--workers", str(count), *UVICORN.arguments),
        environment={"WSBROADCAST_TEST_ENGINE": engine, "BROKER_URL": engine},
    )
    return Server(flavour, log / "server.log", app, identifies_itself=app in (APP, KEEPING))


@pytest.fixture(params=["redis", "nats", "postgres"])
def engine(request: pytest.FixtureRequest, prefix: str) -> str:
    endpoint: Endpoint = request.getfixturevalue(f"{request.param}_server")
    return _with_prefix(endpoint.url, prefix)


def _with_prefix(url: str, prefix: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}prefix={prefix}"


async def pids(server: Server, count: int) -> list[int]:
    """Ask until every worker has answered."""
    found: set[int] = set()

    async def all_found() -> bool:
        found.add((await server.get("/stats"))["pid"])
        return len(found) == count

    await eventually(all_found, timeout=20)
    return sorted(found)


async def test_message_reaches_the_connections_of_every_worker(engine: str, tmp_path: Path) -> None:
    with workers(2, engine, tmp_path) as server:
        await pids(server, 2)
        async with swarm(server.port, "/ws/news", connections=40, messages=300) as clients:
            await asyncio.gather(
                *(server.post(f"/publish/news?first={first}&count=50&publishers=5") for first in range(0, 300, 50))
            )
            result = await clients.result()
        assert (result["received"], result["missing"], result["doubled"]) == (40 * 300, 0, 0)
        assert server.complaints() == []


@asynccontextmanager
async def listeners(server: Server, count: int) -> AsyncIterator[list[RawClient]]:
    clients: list[RawClient] = []
    try:
        while len(clients) < count:
            clients.append(await RawClient.connect(server.port, "/ws/news"))
        yield clients
    finally:
        for client in clients:
            client.close()


async def test_example_works_with_four_workers(engine: str, tmp_path: Path) -> None:
    with workers(4, engine, tmp_path, "examples.09_scale_out:app") as server:
        async with listeners(server, 20) as clients:
            await server.post("/announce/news?text=hello")
            assert {await client.receive_text() for client in clients} == {"hello"}
        assert (await server.get("/health"))["is_ok"]
        assert server.complaints() == []


CONNECTIONS, MESSAGES = (1000, 1000) if FULL else (200, 200)


async def test_four_workers_lose_nothing_and_keep_one_order(
    redis_server: Endpoint, prefix: str, tmp_path: Path
) -> None:
    with workers(4, _with_prefix(redis_server.url, prefix), tmp_path) as server:
        await pids(server, 4)
        async with swarm(server.port, "/ws/news", connections=CONNECTIONS, messages=MESSAGES) as clients:
            step = MESSAGES // 8
            await asyncio.gather(
                *(
                    server.post(f"/publish/news?first={first}&count={step}&publishers=4")
                    for first in range(0, MESSAGES, step)
                )
            )
            result = await clients.result()
        assert result["received"] == CONNECTIONS * MESSAGES
        assert (result["missing"], result["doubled"], result["orders"]) == (0, 0, 1), result
        assert server.complaints() == []


async def test_worker_that_is_killed_takes_nobody_with_it(
    own_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    redis = own_redis()
    with workers(2, redis.url, tmp_path) as server:
        first, _ = await pids(server, 2)
        async with listeners(server, 20) as clients:
            while not await _has_subscribers(redis, 2):  # the kernel gave all of them to one worker
                clients.append(await RawClient.connect(server.port, "/ws/news"))
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: _has_subscribers(redis, 1))
            await server.post("/publish/news?first=7&count=1")
            received = await asyncio.gather(*(client.receive() for client in clients))
            assert {frame.payload for frame in received if frame} == {b"00000007"}
            assert 0 < sum(frame is not None for frame in received) < len(clients)
        await eventually(lambda: _has_subscribers(redis, 0))


def _subscribers(redis: RedisServer) -> int:
    reply: Any = redis.command("PUBSUB", "NUMSUB", "wsbroadcast:channel:news")
    return int(reply[1])


async def _has_subscribers(redis: RedisServer, count: int) -> bool:
    return await asyncio.to_thread(_subscribers, redis) == count


# A file between the workers, and no broker.

DELIVERIES = (1000, 1000) if FULL else (40, 200)
SOME_WORKERS = 4 if FULL else 2  # a start takes longest


async def _publish_all(server: Server, messages: int, first: int = 0) -> None:
    step = messages // 8
    await asyncio.gather(
        *(
            server.post(f"/publish/news?first={start}&count={step}&publishers=4")
            for start in range(first, first + messages, step)
        )
    )


def _file(directory: Path) -> str:
    return f"sqlite:///{directory / 'messages.db'}"


async def test_four_workers_at_a_file_lose_nothing_and_keep_one_order(tmp_path: Path) -> None:
    connections, messages = DELIVERIES
    with workers(4, _file(tmp_path), tmp_path, KEEPING) as server:
        await pids(server, 4)
        async with swarm(server.port, "/ws/news", connections=connections, messages=messages) as clients:
            await _publish_all(server, messages)
            result = await clients.result(timeout=300)
        assert result["received"] == connections * messages
        assert (result["missing"], result["doubled"], result["orders"]) == (0, 0, 1), result
        assert await server.get("/position/news") == {"epoch": ANY, "offset": messages}
        assert server.complaints() == []


async def test_worker_at_a_file_that_is_killed_takes_nobody_with_it(tmp_path: Path) -> None:
    with workers(SOME_WORKERS, _file(tmp_path), tmp_path, KEEPING) as server:
        for number, pid in enumerate((await pids(server, SOME_WORKERS))[1:]):
            before = (await server.get("/position/news"))["offset"]
            publishing = asyncio.ensure_future(_publish_some(server, f"first={number}&count=20"))
            os.kill(pid, signal.SIGKILL)
            await publishing
            async with listeners(server, 8) as clients:
                await server.post("/publish/news?first=7&count=1")
                received = await asyncio.gather(*(client.receive() for client in clients))
                # A client that the kernel had given to the worker that was killed is gone with it.
                assert {frame.payload for frame in received if frame} == {b"00000007"}
            assert (await server.get("/position/news"))["offset"] > before


async def _publish_some(server: Server, query: str) -> None:
    with suppress(OSError, ValueError):  # the worker that was asked may be the one that is killed
        await server.post(f"/publish/news?{query}")


async def test_workers_that_start_again_at_a_file_go_on_where_it_was(tmp_path: Path) -> None:
    with workers(SOME_WORKERS, _file(tmp_path), tmp_path, KEEPING) as server:
        await _publish_all(server, 80)
        before = await server.get("/position/news")
        server.kill()  # all of them, with `kill -9`
    with workers(SOME_WORKERS, _file(tmp_path), tmp_path, KEEPING) as server:
        assert await server.get("/position/news") == before
        async with swarm(server.port, "/ws/news", connections=20, messages=80) as clients:
            await _publish_all(server, 80)
            result = await clients.result()
        assert (result["received"], result["missing"], result["doubled"], result["orders"]) == (1600, 0, 0, 1), result
        assert await server.get("/position/news") == {"epoch": before["epoch"], "offset": 160}
        assert len(await server.get("/history/news")) == 100
