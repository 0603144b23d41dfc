"""What it costs to know who is in a channel.

    benchmarks/.venv/main/bin/python benchmarks/presence.py
    benchmarks/.venv/main/bin/python benchmarks/presence.py --engines redis --scenarios enter,read --rounds 3

Each number stands beside what one `publish` of the same engine takes in the same run, one after the other; in brackets
how many of these it is.

Scenarios:
    enter: 10,000 members come to a channel, 100 at a time, and once one at a time; the 10,000 leave as they came.
    read: the 10,000 members are read by another node, for the first time and again, and counted.
    sweep: a node with 2,500 members in a channel has died, another one sweeps, and the longest time that a publish of
        a third one takes meanwhile. Not in memory, where nobody dies alone.
    idle: a lease is renewed, and a sweep finds nothing, by a node that is in 10,000 channels.
    receipt: a broadcast of a manager with presence, whose receipt tells how many of 10,000 it reaches, beside one of a
        manager without presence ("publish" here), in turns; and what processor time of this process both take.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import CHANNEL, PAYLOAD, OurReceiver

from tests.support.brokers import JetStreamServer, PostgresServer, RedisServer, ValkeyServer
from wsbroadcast import Audience, ConnectionManager, Message, Presence, Publication
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.contract import Engine, keeps_presence
from wsbroadcast.manager import core_of

NEWS = Audience("channel", CHANNEL)
MEMBERS, BATCH, DEAD, CHANNELS = 10_000, 100, 2_500, 10_000
PAIRS, EACH = 15, 200
INFO = b'{"name":"Ann Example","picture":"https://example.org/ann.png"}'

Results = dict[str, float]
"""Seconds, by what took them."""


@contextmanager
def sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/messages.db"


@contextmanager
def memory() -> Iterator[str]:
    yield "memory://"


def server(kind: Any) -> Callable[[], Any]:
    @contextmanager
    def run() -> Iterator[str]:
        with kind() as broker:
            yield broker.url

    return run


ENGINES = {
    "memory": memory,
    "sqlite": sqlite,
    "redis": server(RedisServer),
    "valkey": server(ValkeyServer),
    "nats": server(JetStreamServer),
    "postgres": server(PostgresServer),
}


@asynccontextmanager
async def running(url: str, nodes: int) -> AsyncIterator[list[Engine]]:
    """Start engines that hold a lease, and have subscribed to the channel."""
    async with AsyncExitStack() as stack:
        engines = []
        for _ in range(nodes):
            engine = create_engine(url)
            await engine.start(OurReceiver())  # type: ignore[arg-type]
            stack.push_async_callback(engine.aclose)
            engine.subscribe([NEWS])
            await engine.confirmed([NEWS])
            await keeps_presence(engine).renew(600)
            engines.append(engine)
        yield engines


async def timed(work: Callable[[], Coroutine[Any, Any, object]], times: int = 1) -> float:
    """Return the seconds that something takes, the median of several times."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        await work()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def publishing(engine: Engine) -> Callable[[], Coroutine[Any, Any, object]]:
    async def publish() -> None:
        await engine.publish(Publication(Message.of(PAYLOAD), NEWS))

    return publish


async def fill(engine: Engine, members: int, batch: int = BATCH) -> None:
    for start in range(0, members, batch):
        some = {f"user {number}": INFO for number in range(start, min(start + batch, members))}
        await keeps_presence(engine).enter(CHANNEL, some)


async def enter(url: str) -> Results:
    """Let members come."""
    async with running(url, 1) as (engine,):
        results = {f"{MEMBERS:,} members, by {BATCH}": await timed(lambda: fill(engine, MEMBERS))}
        numbers = iter(range(500))

        async def one() -> None:
            await keeps_presence(engine).enter(CHANNEL, {f"late {next(numbers)}": INFO})

        async def leave() -> None:
            for start in range(0, MEMBERS, BATCH):
                some = [f"user {number}" for number in range(start, start + BATCH)]
                await keeps_presence(engine).leave(CHANNEL, some)

        results |= {"one member": await timed(one, 500), "publish": await timed(publishing(engine), 500)}
        return results | {f"{MEMBERS:,} members leave, by {BATCH}": await timed(leave)}


async def read(url: str) -> Results:
    """Read who is there."""
    async with running(url, 1 if url.startswith("memory") else 2) as engines:
        await fill(engines[0], MEMBERS)
        reader = keeps_presence(engines[-1])
        first = await timed(lambda: reader.members(CHANNEL))
        if len((await reader.members(CHANNEL)).members) != MEMBERS:
            raise RuntimeError("not all members were read")
        return {
            f"{MEMBERS:,} members read for the first time": first,
            f"{MEMBERS:,} members read": await timed(lambda: reader.members(CHANNEL), 10),
            "counted": await timed(lambda: reader.count(CHANNEL), 200),
            "channels of a member": await timed(lambda: reader.channels_of("user 1"), 200),
            "publish": await timed(publishing(engines[-1]), 500),
        }


async def sweep(url: str) -> Results:
    """Let a node die, and sweep."""
    if url.startswith("memory"):
        return {}
    async with running(url, 3) as (dead, sweeper, other):
        publish = publishing(other)
        results = {"publish": await timed(publish, 500)}
        await fill(dead, DEAD)
        gone = keeps_presence(dead).incarnation
        await keeps_presence(dead).renew(0.05)
        while gone in await keeps_presence(sweeper).alive():  # noqa: ASYNC110  # nothing tells when it is over
            await asyncio.sleep(0.05)
        longest = 0.0

        async def stand_by() -> None:
            nonlocal longest
            while True:
                longest = max(longest, await timed(publish))

        watching = asyncio.create_task(stand_by())
        began = time.perf_counter()
        left = 0
        while left < DEAD:
            left += sum(len(change.left) for change in await keeps_presence(sweeper).sweep())
        took = time.perf_counter() - began
        watching.cancel()
        return {f"{DEAD:,} members swept": took, "the longest publish meanwhile": longest, **results}


async def idle(url: str) -> Results:
    """Be in many channels, and do nothing."""
    async with running(url, 1) as (engine,):
        present = keeps_presence(engine)
        for start in range(0, CHANNELS, 100):
            await asyncio.gather(
                *(present.enter(f"room {number}", {"ann": INFO}) for number in range(start, start + 100))
            )
        return {
            f"renewed, in {CHANNELS:,} channels": await timed(lambda: present.renew(600), 200),
            "sweep that finds nothing": await timed(present.sweep, 200),
            "publish": await timed(publishing(engine), 500),
        }


async def receipt(url: str) -> Results:
    """Broadcast with a receipt that counts, and without."""
    async with AsyncExitStack() as stack:
        managers = [ConnectionManager(url, presence=presence) for presence in (Presence(), None)]
        for manager in managers:
            await stack.enter_async_context(manager)
        engine = core_of(managers[0]).life.engine
        await keeps_presence(engine).renew(600)
        await fill(engine, MEMBERS)
        if (await managers[0].broadcast(PAYLOAD, channel=CHANNEL)).members != MEMBERS:
            raise RuntimeError("not all members were counted")
        took: dict[str, list[float]] = {name: [] for name in ("counted", "its processor time", "publish", "other")}
        for _ in range(PAIRS):
            for manager, wall, busy in zip(
                managers, ("counted", "publish"), ("its processor time", "other"), strict=True
            ):
                began, began_busy = time.perf_counter(), time.process_time()
                for _ in range(EACH):
                    await manager.broadcast(PAYLOAD, channel=CHANNEL)
                took[wall].append((time.perf_counter() - began) / EACH)
                took[busy].append((time.process_time() - began_busy) / EACH)
        median = {name: statistics.median(some) for name, some in took.items()}
        return {
            f"broadcast that counts {MEMBERS:,}": median["counted"],
            "its processor time": median["its processor time"],
            "that of a broadcast without presence": median["other"],
            "publish": median["publish"],
        }


SCENARIOS: dict[str, Callable[[str], Coroutine[Any, Any, Results]]] = {
    "enter": enter,
    "read": read,
    "sweep": sweep,
    "idle": idle,
    "receipt": receipt,
}


def show(scenario: str, engine: str, rounds: list[Results]) -> None:
    """Print the medians."""
    for what in rounds[0]:
        if what != "publish":
            took = statistics.median(each[what] for each in rounds)
            ratio = statistics.median(each[what] / each["publish"] for each in rounds)
            print(f"| {scenario} | {engine} | {what} | {took * 1000:.3f} ms | {ratio:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| scenario | engine | what | takes | in publishes |\n|---|---|---|---|---|")
    for name in options.scenarios.split(","):
        for engine in options.engines.split(","):
            rounds = []
            for _ in range(options.rounds):
                with ENGINES[engine]() as url:
                    rounds.append(asyncio.run(SCENARIOS[name](url)))
            show(name, engine, rounds)


if __name__ == "__main__":
    main()
