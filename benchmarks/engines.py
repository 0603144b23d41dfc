"""What an engine costs beside its bare driver, and beside the Redis backends of two peers: publish to deliver.

    benchmarks/.venv/main/bin/python benchmarks/engines.py

One process, one event loop, a real broker on this machine, from the PATH or a wheel. Each round runs all in turn;
ratios are taken within a round, and the table shows their medians. Bare nats-py publishes without knowing whether
the server took it; "confirmed" waits for that, as the engine does, and "nowait" is `publish_nowait`, which doesn't.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.brokers import NATSServer, PostgresServer, RedisServer
from wsbroadcast import Audience, Gap, Message, Publication
from wsbroadcast.engines import create_engine

PAYLOAD = "x" * 128
CHANNEL = "news"


class Receiver:
    """Counts what arrives."""

    def __init__(self) -> None:
        self.count = 0
        self.wanted = 0
        self.enough = asyncio.Event()

    def arrived(self) -> None:
        self.count += 1
        if self.count >= self.wanted:
            self.enough.set()

    async def wait(self, more: int, during: Awaitable[object]) -> None:
        """Return when so many more have arrived, and what causes them is done."""
        self.wanted = self.count + more
        self.enough.clear()
        await during
        await self.enough.wait()


class OurReceiver(Receiver):
    def take(self, publication: Publication) -> None:
        self.arrived()

    async def deliver(self, publication: Publication) -> None:
        self.arrived()

    def gap(self, gap: Gap) -> None:
        raise RuntimeError("a gap in a benchmark")


Publish = Callable[[], Awaitable[object]]
Contender = Callable[[str], AbstractAsyncContextManager[tuple[Publish, Receiver]]]


@asynccontextmanager
async def ours(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    engine, receiver = create_engine(url), OurReceiver()
    await engine.start(receiver)
    audience = Audience("channel", CHANNEL)
    engine.subscribe([audience])
    await engine.confirmed([audience])
    yield lambda: engine.publish(Publication(Message.of(PAYLOAD), audience)), receiver
    await engine.aclose()


@asynccontextmanager
async def ours_nowait(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    engine, receiver = create_engine(url), OurReceiver()
    await engine.start(receiver)
    audience = Audience("channel", CHANNEL)
    engine.subscribe([audience])
    await engine.confirmed([audience])

    async def publish() -> None:
        engine.publish_nowait(Publication(Message.of(PAYLOAD), audience))

    yield publish, receiver
    await engine.aclose()


@asynccontextmanager
async def bare_redis(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    from redis.asyncio import Redis

    client, receiver = Redis.from_url(url), Receiver()
    pubsub = client.pubsub()
    await pubsub.subscribe(CHANNEL)

    async def listen() -> None:
        async for message in pubsub.listen():
            if message["type"] == "message":
                receiver.arrived()

    task = asyncio.create_task(listen())
    yield lambda: client.publish(CHANNEL, PAYLOAD), receiver
    task.cancel()
    await asyncio.wait([task])
    await pubsub.aclose()
    await client.aclose()


@asynccontextmanager
async def bare_nats(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    import nats

    client, receiver = await nats.connect(url), Receiver()

    async def on_message(message: Any) -> None:
        receiver.arrived()

    await client.subscribe(CHANNEL, cb=on_message)
    await client.flush()
    payload = PAYLOAD.encode()
    yield lambda: client.publish(CHANNEL, payload), receiver
    await client.close()


@asynccontextmanager
async def confirmed_nats(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    import nats

    async with bare_nats(url) as (_, receiver):
        client, payload = await nats.connect(url), PAYLOAD.encode()

        async def publish() -> None:
            await client.publish(CHANNEL, payload)
            await client.flush()

        yield publish, receiver
        await client.close()


@asynccontextmanager
async def bare_postgres(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    import asyncpg

    receiver = Receiver()
    listener = await asyncpg.connect(url)
    pool = await asyncpg.create_pool(url, min_size=4, max_size=4)
    numbers = iter(range(10**9))
    await listener.add_listener(CHANNEL, lambda *_: receiver.arrived())

    async def publish() -> None:
        # A payload of its own: Postgres merges equal ones of one transaction, and a program would have to prevent that.
        await pool.execute("SELECT pg_notify($1, $2)", CHANNEL, f"{next(numbers)}{PAYLOAD}")

    yield publish, receiver
    await pool.close()
    await listener.close()


@asynccontextmanager
async def litestar_redis(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    from litestar.channels.backends.redis import RedisChannelsPubSubBackend
    from redis.asyncio import Redis

    client, receiver = Redis.from_url(url), Receiver()
    backend = RedisChannelsPubSubBackend(redis=client)
    await backend.on_startup()
    await backend.subscribe([CHANNEL])

    async def listen() -> None:
        async for _ in backend.stream_events():
            receiver.arrived()

    task = asyncio.create_task(listen())
    payload = PAYLOAD.encode()
    yield lambda: backend.publish(payload, [CHANNEL]), receiver
    task.cancel()
    await asyncio.wait([task])
    await backend.on_shutdown()
    await client.aclose()


@asynccontextmanager
async def broadcaster_redis(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    from broadcaster import Broadcast

    receiver = Receiver()
    async with Broadcast(url) as broadcast, broadcast.subscribe(CHANNEL) as subscriber:

        async def listen() -> None:
            async for _ in subscriber:
                receiver.arrived()

        task = asyncio.create_task(listen())
        yield lambda: broadcast.publish(CHANNEL, PAYLOAD), receiver
        task.cancel()
        await asyncio.wait([task])


async def latency(publish: Publish, receiver: Receiver, messages: int) -> float:
    """Return the median microseconds from the call to the arrival, one message at a time."""
    times = []
    for _ in range(messages):
        began = time.perf_counter()
        await receiver.wait(1, publish())
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


async def throughput(publish: Publish, receiver: Receiver, messages: int, tasks: int) -> float:
    """Return messages per second, published by so many tasks that each await every call."""

    async def some() -> None:
        for _ in range(messages // tasks):
            await publish()

    began = time.perf_counter()
    await receiver.wait(messages // tasks * tasks, asyncio.gather(*(some() for _ in range(tasks))))
    return messages / (time.perf_counter() - began)


BROKERS = {"redis": RedisServer, "nats": NATSServer, "postgres": PostgresServer}
CONTENDERS: dict[str, dict[str, Contender]] = {
    "redis": {
        "redis-py": bare_redis,
        "wsbroadcast": ours,
        "litestar": litestar_redis,
        "broadcaster": broadcaster_redis,
    },
    "nats": {
        "nats-py": bare_nats,
        "nats-py, confirmed": confirmed_nats,
        "wsbroadcast": ours,
        "wsbroadcast, nowait": ours_nowait,
    },
    "postgres": {"asyncpg": bare_postgres, "wsbroadcast": ours},
}


async def measure(contender: Contender, url: str, messages: int, tasks: int) -> dict[str, float]:
    """Run one contender once."""
    async with asyncio.timeout(120), contender(url) as (publish, receiver):
        await throughput(publish, receiver, messages // 10, tasks)  # warm
        return {
            "latency_us": await latency(publish, receiver, messages // 10),
            "one_at_a_time": await throughput(publish, receiver, messages // 10, 1),
            "in_flight": await throughput(publish, receiver, messages, tasks),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--tasks", type=int, default=64, help="publishing tasks in the throughput run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", default="redis,nats,postgres")
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if options.loop == "uvloop":
        import uvloop

        run: Callable[..., Any] = uvloop.run
    else:
        run = asyncio.run
    results = {}
    for engine in options.engines.split(","):
        with BROKERS[engine]() as broker:
            rounds = []
            for number in range(options.rounds):
                print(f"{engine}: round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
                rounds.append(
                    {
                        name: run(measure(contender, broker.url, options.messages, options.tasks))
                        for name, contender in CONTENDERS[engine].items()
                    }
                )
        results[engine] = summarise(rounds)
        show(engine, results[engine], options.tasks)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, and those of the ratios to the first contender, the bare driver."""
    bare = next(iter(rounds[0]))
    return {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        | {
            f"{key}_ratio": statistics.median(one[name][key] / one[bare][key] for one in rounds)
            for key in rounds[0][name]
        }
        for name in rounds[0]
    }


def show(engine: str, summary: dict[str, dict[str, float]], tasks: int) -> None:
    """Print one table."""
    print(f"\n{engine}: publish to deliver, 128 bytes; the ratio to the bare driver in brackets\n")
    print(f"| | median latency | one at a time | {tasks} in flight |")
    print("|---|---|---|---|")
    for name, one in summary.items():
        cells = [f"{one['latency_us']:.0f} µs ({one['latency_us_ratio']:.2f})"]
        cells += [f"{one[key]:,.0f}/s ({one[f'{key}_ratio']:.2f})" for key in ("one_at_a_time", "in_flight")]
        print(f"| {name} | {' | '.join(cells)} |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
