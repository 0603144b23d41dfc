"""What it costs to keep what is published, and to send it to those who come back.

    benchmarks/.venv/main/bin/python benchmarks/history.py
    benchmarks/.venv/main/bin/python benchmarks/history.py --scenarios redis,resume --rounds 3

Scenarios:
    redis, nats, postgres: `append` beside the engine's own `publish` and the bare driver's, as `engines.py` has them.
    memory: what an append costs beyond a publish, in one process.
    sqlite: four processes at one file: how long a message takes at 1,000 a second, and how many go through.
    resume: what it costs the server to send each of 10,000 clients 100 messages from memory, before they are written.
    crowd: 10,000 clients that come back to a server at once, and how late the messages of another client are meanwhile,
        beside 10,000 that come back without wanting anything.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines import CHANNEL, CONTENDERS, PAYLOAD, OurReceiver, Publish, Receiver, measure, summarise
from sessions import cores, cpu_seconds, free_port, on_core

from tests.support.asgi import Peer
from tests.support.brokers import JetStreamServer, PostgresServer, RedisServer
from tests.support.fast import WebSocketsSansIOProtocol
from wsbroadcast import Audience, ConnectionManager, History, Message, Publication
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.contract import keeps_history
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.history import HistoryRules

NEWS = Audience("channel", CHANNEL)
CLIENTS = 10_000
MISSED = 100


# Brokers.


@asynccontextmanager
async def kept(url: str) -> AsyncIterator[tuple[Publish, Receiver]]:
    history, receiver = History(messages=100), OurReceiver()
    engine = create_engine(url)
    keeping = keeps_history(engine)
    keeping.keep(HistoryRules(history))
    await engine.start(receiver)
    engine.subscribe([NEWS])
    await engine.confirmed([NEWS])
    yield lambda: keeping.append(Publication(Message.of(PAYLOAD), NEWS), history), receiver
    await engine.aclose()


BROKERS = {"redis": RedisServer, "nats": JetStreamServer, "postgres": PostgresServer}


def broker(name: str, rounds: int) -> None:
    """Measure what keeping costs at a broker."""
    bare, ours = next(iter(CONTENDERS[name])), "wsbroadcast"
    contenders = {ours: CONTENDERS[name][ours], "append": kept, bare: CONTENDERS[name][bare]}
    with BROKERS[name]() as server:
        results = [
            {each: asyncio.run(measure(contender, server.url, 20_000, 64)) for each, contender in contenders.items()}
            for _ in range(rounds)
        ]
    print(f"\n{name}: publish to deliver; the ratio to our own publish in brackets\n")
    print("| | median latency | 64 in flight |\n|---|---|---|")
    for each, one in summarise(results).items():
        latency = f"{one['latency_us']:.0f} µs ({one['latency_us_ratio']:.2f})"
        print(f"| {each} | {latency} | {one['in_flight']:,.0f}/s ({one['in_flight_ratio']:.2f}) |")


# One process.


async def _memory(rounds: int) -> None:
    count = 3000
    plain, keeping = ConnectionManager(), ConnectionManager(history=History())
    spent: dict[ConnectionManager, list[float]] = {plain: [], keeping: []}
    async with plain, keeping:
        for manager in spent:
            await manager.connect(Peer().websocket, channels=[CHANNEL])
        for _ in range(3 * rounds):
            for manager, times in spent.items():
                began = time.process_time()
                for _ in range(count):
                    await manager.broadcast(PAYLOAD, channel="nobody")
                times.append((time.process_time() - began) / count * 1e6)
    publish, append = (statistics.median(times) for times in spent.values())
    print(f"\nmemory: publish {publish:.2f} µs, append {append:.2f} µs: {append - publish:.2f} µs more")


def memory(rounds: int) -> None:
    """Measure what an append costs more than a publish in memory, where nobody gets it."""
    asyncio.run(_memory(rounds))


async def _resume() -> dict[str, float]:
    async with ConnectionManager(history=History(messages=200)) as manager:
        receipts = [await manager.broadcast(PAYLOAD, channel=CHANNEL) for _ in range(MISSED + 50)]
        since = receipts[49].position
        spent = {}
        for name, options in {"plain": {}, "since": {"since": since}}.items():
            protocols = [WebSocketsSansIOProtocol() for _ in range(CLIENTS)]
            began = time.process_time()
            for protocol in protocols:
                await manager.connect(protocol.websocket, channels=[CHANNEL], **options)
            while options and not protocols[-1].transport.written:  # noqa: ASYNC110  # nothing tells when it is done
                await asyncio.sleep(0)
            spent[name] = (time.process_time() - began) / CLIENTS * 1e6
            sizes = {len(b"".join(protocol.transport.written)) for protocol in protocols}
            if options and min(sizes) < MISSED * len(PAYLOAD):
                raise RuntimeError(f"not everything was replayed: {sizes}")
        return spent


def resume(rounds: int) -> None:
    """Measure what a resume costs beside a plain connect, without a socket."""
    results = [asyncio.run(_resume()) for _ in range(rounds)]
    plain, since = (statistics.median(one[name] for one in results) for name in ("plain", "since"))
    print(f"\nresume: connect {plain:.1f} µs; with {MISSED} messages {since:.1f} µs, {since - plain:.1f} more")


# A file.


class _Arrivals(OurReceiver):
    def __init__(self) -> None:
        super().__init__()
        self.late: list[float] = []

    def take(self, publication: Publication) -> None:
        self.arrived()
        if self.count % 10 == 0:
            self.late.append(time.time() - float(publication.message.payload[:20]))


async def _at_file(path: str, rate: float, keeps: bool, barrier: Barrier, seconds: float) -> dict[str, Any]:
    engine, receiver, history = SQLiteEngine(path), _Arrivals(), History(messages=100)
    await engine.start(receiver)
    engine.subscribe([NEWS])
    await engine.confirmed([NEWS])
    barrier.wait()

    async def publish() -> None:
        publication = Publication(Message.of(f"{time.time():020.6f}{PAYLOAD}"), NEWS)
        await (engine.append(publication, history) if keeps else engine.publish(publication))

    sent, began = 0, time.time()
    while time.time() < began + seconds:
        if rate:
            await publish()
            sent += 1
            await asyncio.sleep(1 / rate)
        else:
            await asyncio.gather(*(publish() for _ in range(64)))
            sent += 64
    took = time.time() - began
    barrier.wait()
    await asyncio.sleep(1)
    await engine.aclose()
    return {"sent": sent, "took": took, "got": receiver.count, "median": statistics.median(receiver.late)}


def _worker(results: Any, *args: Any) -> None:
    results.put(asyncio.run(_at_file(*args)))


def sqlite(rounds: int) -> None:
    """Measure four processes at one file."""
    print("\nsqlite, four processes\n\n| | median at 1,000/s | most per second |\n|---|---|---|")
    for keeps in (False, True):
        medians, rates = [], []
        for _ in range(rounds):
            medians.append(statistics.median(one["median"] for one in _four(250, keeps)))
            rates.append(sum(one["sent"] / one["took"] for one in _four(0, keeps)))
        name = "append" if keeps else "publish"
        print(f"| {name} | {statistics.median(medians) * 1e3:.2f} ms | {statistics.median(rates):,.0f}/s |")


def _four(rate: float, keeps: bool) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        barrier, results = context.Barrier(4), context.Queue()
        args = (results, f"{folder}/messages.db", rate, keeps, barrier, 3.0)
        workers = [context.Process(target=_worker, args=args) for _ in range(4)]
        for worker in workers:
            worker.start()
        some = [results.get(timeout=120) for _ in workers]
        for worker in workers:
            worker.join()
    sent = sum(one["sent"] for one in some)
    if any(one["got"] != sent for one in some):
        raise RuntimeError(f"{sent} were sent, and {[one['got'] for one in some]} arrived")
    return some


# A server.

SERVER = """
import asyncio, sys, time
from contextlib import asynccontextmanager
import uvicorn
from fastapi import FastAPI
from wsbroadcast import ConnectionManager, History, create_router
manager = ConnectionManager(history={"news": History(messages=500)})
@asynccontextmanager
async def lifespan(app):
    async with manager:
        async def tell():
            while True:
                await manager.broadcast(time.time(), channel="live")
                await asyncio.sleep(0.01)
        task = asyncio.create_task(tell())
        yield
        task.cancel()
app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/ws/{channel}"))
@app.get("/fill")
async def fill():
    some = [await manager.broadcast("x" * 128, channel="news") for _ in range(101)]
    return str(some[0].position)
uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
"""


_SENT = re.compile(rb'"data":([0-9.]+)[,}]')


class _Client(asyncio.Protocol):
    """Asks for a channel, and counts what comes."""

    def __init__(self, path: str, take: Callable[[bytes], bool]) -> None:
        self._path = path
        self._take = take
        self._left = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["Host: localhost", "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Key: {key}"]
        lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: wsbroadcast.v1"]
        transport.write(f"GET {self._path} HTTP/1.1\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        self._left = (self._left + data)[-4096:]
        if self._take(data) and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("the server ended a connection"))


def _bystand(port: int, ready: Any, over: Any, results: Any) -> None:
    asyncio.run(_stand_by(port, ready, over, results))


async def _stand_by(port: int, ready: Any, over: Any, results: Any) -> None:
    late: list[float] = []

    def take(data: bytes) -> bool:
        now = time.time()
        late.extend(now - float(sent) for sent in _SENT.findall(data))
        return True

    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: _Client("/ws/live", take), "127.0.0.1", port)
    await asyncio.sleep(1)
    late.clear()
    ready.set()
    await asyncio.to_thread(over.wait)
    results.put(late)


async def _crowd(port: int, wants: bool) -> float:
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /fill HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    since = json.loads((await reader.read()).rpartition(b"\r\n\r\n")[2])
    writer.close()
    path = f"/ws/news?since={since}" if wants else "/ws/news"
    counts = [0] * CLIENTS

    def count(number: int) -> Callable[[bytes], bool]:
        def take(data: bytes) -> bool:
            counts[number] += data.count(b'"message"')
            return counts[number] >= MISSED if wants else b'"subscribed"' in data

        return take

    began = time.time()
    free = asyncio.Semaphore(500)

    async def come(number: int) -> None:
        async with free:
            _, client = await loop.create_connection(lambda: _Client(path, count(number)), "127.0.0.1", port)
            await client.done

    await asyncio.gather(*(come(number) for number in range(CLIENTS)))
    return time.time() - began


def crowd(rounds: int) -> None:
    """Measure how late the messages of others are while 10,000 clients come back."""
    server_core, load_core = cores()
    print(f"\n{CLIENTS:,} clients come back; how late the messages of another one are meanwhile\n")
    print("| | took | median | 99 % | most | server CPU for each |\n|---|---|---|---|---|---|")
    os.sched_setaffinity(0, {load_core})
    for wants in (False, True):
        results = []
        for _ in range(rounds):
            port = free_port()
            command = [sys.executable, "-c", SERVER, str(port)]
            with subprocess.Popen(command, preexec_fn=on_core(server_core)) as server:
                try:
                    asyncio.run(_await_server(port))
                    results.append(_beside(port, wants, server.pid))
                finally:
                    server.kill()
        one = {key: statistics.median(result[key] for result in results) for key in results[0]}
        cells = [f"{one['took']:.1f} s", *(f"{one[key] * 1e3:.1f} ms" for key in ("median", "p99", "most"))]
        cells.append(f"{one['cpu'] * 1e6:.0f} µs")
        name = f"each gets {MISSED} messages that it missed" if wants else "they want nothing"
        print(f"| {name} | {' | '.join(cells)} |")


def _beside(port: int, wants: bool, server: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ready, over, late = context.Event(), context.Event(), context.Queue()
    bystander = context.Process(target=_bystand, args=(port, ready, over, late))
    bystander.start()
    ready.wait(60)
    before = cpu_seconds(server)
    took = asyncio.run(_crowd(port, wants))
    cpu = (cpu_seconds(server) - before) / CLIENTS
    over.set()
    some = late.get(timeout=60)
    bystander.join()
    median, p99 = statistics.median(some), statistics.quantiles(some, n=100)[98]
    return {"took": took, "median": median, "p99": p99, "most": max(some), "cpu": cpu}


async def _await_server(port: int) -> None:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.05)


SCENARIOS: dict[str, Callable[[int], None]] = {
    **{name: lambda rounds, name=name: broker(name, rounds) for name in BROKERS},  # type: ignore[misc]
    "memory": memory,
    "sqlite": sqlite,
    "resume": resume,
    "crowd": crowd,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in options.scenarios.split(","):
        SCENARIOS[name](options.rounds)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
