"""Clients that vanish, stall or come in crowds, on real sockets."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ConnectRaw
from tests.support.servers import (
    DAPHNE,
    GRANIAN,
    HYPERCORN,
    UVICORN,
    UVICORN_DEBUG,
    UVICORN_UVLOOP,
    UVICORN_WSPROTO,
    Flavour,
    Server,
    eventually,
    swarm,
)

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
"""Whether to run with the full numbers, which takes minutes."""

KIB = 1024


def on(*flavours: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", flavours, ids=str, indirect=True)


@pytest.fixture(autouse=True)
def many_sockets() -> None:
    """Allow more open files than the usual 1,024, here and in the processes started from here."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def poll_health(server: Server, until: asyncio.Task[Any]) -> list[float]:
    """Ask the health route again and again; return how long each answer took, in seconds."""
    latencies = []
    while not until.done():
        started = time.monotonic()
        await server.get("/health")
        latencies.append(time.monotonic() - started)
    return latencies


async def everybody_left(server: Server, room: str, connects: int) -> None:
    """Wait until a manager has no connection, its hooks have seen each of them go, once, and nothing is left."""
    gone = {"connections": 0, "on_disconnect": connects, "on_disconnect_twice": 0, "tasks": 0, "backlog_messages": 0}
    assert (await server.stats(room, **gone))["evicted"] == {}


def assert_complete(result: dict[str, Any], connections: int, messages: int) -> None:
    """Everybody got everything once, in order."""
    expected = {"complete": connections, "received": connections * messages, "lost": 0, "doubled_or_disordered": 0}
    assert {name: result[name] for name in expected} == expected, result


@on(UVICORN, UVICORN_UVLOOP, UVICORN_DEBUG, UVICORN_WSPROTO, HYPERCORN, GRANIAN, DAPHNE)
async def test_client_vanishing_in_a_broadcast_disturbs_nobody(
    server: Server, room: str, connect_raw: ConnectRaw
) -> None:
    messages = 1000
    async with swarm(server.port, f"{room}/forgetful", connections=10, messages=messages) as others:
        vanishing = [await connect_raw(server, f"{room}/forgetful") for _ in range(5)]
        await server.stats(room, connections=15)
        flood = asyncio.create_task(server.post(f"{room}/flood?messages={messages}&size=1024"))
        for client in vanishing:
            await client.receive_text()
            client.vanish()
        await flood
        assert_complete(await others.result(), 10, messages)
        await server.stats(room, connections=10)
    await everybody_left(server, room, 15)


@pytest.mark.parametrize(
    ("server", "size"),
    [
        (UVICORN, 1000),
        (UVICORN_UVLOOP, 1000),
        (UVICORN_WSPROTO, 1000 if FULL else 200),
        (HYPERCORN, 1000 if FULL else 100),
        (GRANIAN, 1000 if FULL else 200),
    ],
    ids=str,
    indirect=["server"],
)
async def test_a_thousand_vanishing_at_once_disturb_nobody(server: Server, room: str, size: int) -> None:
    messages = 2000
    async with (
        swarm(server.port, f"{room}/forgetful", connections=20, messages=messages) as others,
        swarm(server.port, f"{room}/forgetful", connections=size, messages=messages) as vanishing,
    ):
        await server.stats(room, connections=size + 20)
        flood = asyncio.create_task(server.post(f"{room}/flood?messages={messages}&size=128"))

        async def under_way() -> bool:
            return bool((await server.get(f"{room}/stats"))["broadcasts"] > 100)

        await eventually(under_way)
        await vanishing.vanish()
        await server.stats(room, connections=20)
        await flood
        assert_complete(await others.result(), 20, messages)
    await everybody_left(server, room, size + 20)


@pytest.mark.parametrize(
    ("server", "messages"),
    [(UVICORN, 20_000), (UVICORN_UVLOOP, 20_000 if FULL else 5_000), (UVICORN_WSPROTO, 20_000 if FULL else 3_000)],
    ids=str,
    indirect=["server"],
)
async def test_tight_loop_evicts_nobody_and_starves_nothing(
    server: Server, room: str, messages: int, record_property: Any
) -> None:
    async with swarm(server.port, f"{room}/listen", connections=50, messages=messages) as crowd:
        await server.stats(room, connections=50)
        flood = asyncio.create_task(server.post(f"{room}/flood?messages={messages}&size={KIB}"))
        latencies = await poll_health(server, flood)
        await flood
        stats = await server.get(f"{room}/stats")
        assert stats["evicted"] == {}
        assert_complete(await crowd.result(), 50, messages)
    record_property("health_median_ms", round(statistics.median(latencies) * 1000, 1))
    record_property("health_max_ms", round(max(latencies) * 1000, 1))
    assert len(latencies) >= 10  # the loop was shared: a loop that is starved answers once, at the end


@on(UVICORN)
async def test_majority_that_never_reads_is_not_waited_for_until_it_is_evicted(
    server: Server, room: str, connect_raw: ConnectRaw
) -> None:
    messages = 6 * KIB  # more than the kernel takes for anybody
    async with swarm(server.port, f"{room}/listen", connections=10, messages=messages) as others:
        for _ in range(40):
            await connect_raw(server, f"{room}/listen", stalls=True)
        await server.stats(room, connections=50)
        await server.post(f"{room}/flood?messages={messages}&size={KIB}")
        assert_complete(await others.result(), 10, messages)
        stats = await server.stats(room, connections=10)
    assert stats["evicted"] == {"backlog_full": 40}  # not "send_timeout", which is how long a crowd is waited for


@pytest.mark.parametrize("flavour", [UVICORN, UVICORN_UVLOOP, UVICORN_WSPROTO], ids=str)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
async def test_stalled_client_costs_its_bound_and_nothing_else(
    flavour: Flavour, tmp_path: Path, connect_raw: ConnectRaw
) -> None:
    messages = 12 * KIB  # 12 MiB to each
    # A server of its own: in a used one the allocator has kept enough to hide what this costs.
    with Server(flavour, tmp_path / "log") as server:
        peaks = []
        for room in ("/m/everybody-reads", "/m/one-stalls"):
            async with swarm(server.port, f"{room}/listen", connections=5, messages=messages) as others:
                if room == "/m/one-stalls":
                    await connect_raw(server, f"{room}/listen", stalls=True)
                    await server.stats(room, connections=6)
                else:
                    await server.stats(room, connections=5)
                await server.post(f"{room}/flood?messages={messages}&size={KIB}")
                assert_complete(await others.result(), 5, messages)
                stats = await server.stats(room, connections=5)
                peaks.append(server.peak_resident_bytes())
            await server.stats(room, connections=0)
        assert stats["evicted"] == {"backlog_full": 1}
        # 1 MiB of payload in the backlog, the objects around it, and the crumbs of an allocator.
        assert peaks[1] - peaks[0] < 4 * KIB * KIB
        assert not server.complaints(), server.log()


@pytest.mark.parametrize(
    ("server", "size", "messages"),
    [
        (UVICORN, 1000 if FULL else 200, 1000),
        (UVICORN_UVLOOP, 1000 if FULL else 200, 1000),
        (UVICORN_WSPROTO, 200 if FULL else 50, 1000),
        (HYPERCORN, 200 if FULL else 50, 500),
        (GRANIAN, 200 if FULL else 50, 500),
        (DAPHNE, 200 if FULL else 50, 500),
    ],
    ids=str,
    indirect=["server"],
)
async def test_crowd_loses_doubles_and_disorders_nothing(server: Server, room: str, size: int, messages: int) -> None:
    async with swarm(server.port, f"{room}/listen", connections=size, messages=messages) as crowd:
        await server.stats(room, connections=size)
        await server.post(f"{room}/flood?messages={messages}&size=128")
        assert_complete(await crowd.result(), size, messages)
        stats = await server.get(f"{room}/stats")
        assert (stats["evicted"], stats["dropped"]) == ({}, {})
        assert stats["deliveries"] == size * messages
    await server.stats(room, connections=0)
