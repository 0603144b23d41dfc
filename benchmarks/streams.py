"""What a stream costs: to append, at the broker, for a node with many runs, and until a late viewer sees something.

    benchmarks/.venv/main/bin/python benchmarks/streams.py
    benchmarks/.venv/main/bin/python benchmarks/streams.py --scenarios node --engines redis --runs 200

Scenarios:
    append: the CPU time of one `run.append` of a token, in a tight loop.
    calls: appends at the broker for one run and 40 ms, at 50, 500 and 5,000 tokens a second.
    node: a server with 1,000 runs, each of 50 tokens a second for ten seconds and with one viewer over server-sent
        events: its CPU time, beside that of a server that writes the same tokens to bare StreamingResponses and keeps
        nothing. One after the other, so often; medians.
    late: a viewer on another node comes to a run that has 100 kB: until the first byte of the text. Median and longest
        of 50.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.brokers import JetStreamServer, PostgresServer, RedisServer, free_port
from tests.support.servers import serve_here
from wsbroadcast import ConnectionManager, Run, StreamLimits, create_stream_router
from wsbroadcast.manager import core_of

TOKEN = "token "
RATE, SECONDS = 50, 10.0
# So many runs begin at the same time, lest the server is busy with nothing else.
AT_ONCE = 20
LARGE = StreamLimits(max_bytes=16 * 1024 * 1024)


@contextmanager
def memory() -> Iterator[str]:
    yield "memory://"


@contextmanager
def sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/streams.db"


def server(kind: Any) -> Callable[[], Any]:
    @contextmanager
    def run() -> Iterator[str]:
        with kind() as broker:
            yield broker.url

    return run


ENGINES: dict[str, Callable[[], Any]] = {
    "memory": memory,
    "sqlite": sqlite,
    "redis": server(RedisServer),
    "nats": server(JetStreamServer),
    "postgres": server(PostgresServer),
}


def carrier(url: str) -> ConnectionManager:
    manager = ConnectionManager(url)
    core_of(manager).use_streams()
    return manager


# The server of `node`, in a process of its own.


def serve(variant: str, port: int, url: str) -> None:
    """Run one of the servers."""
    app = FastAPI()
    tokens = int(RATE * SECONDS)

    if variant == "ours":
        manager = carrier(url)

        async def produce(run: Run) -> None:
            for _ in range(tokens):
                run.append(TOKEN)
                await asyncio.sleep(1 / RATE)

        @app.post("/begin/{id_}")
        async def begin(id_: str) -> None:
            await manager.start_stream(id_, produce)

        app.include_router(create_stream_router(manager, "/watch/{id}", public=True))
    else:

        async def answer() -> AsyncIterator[str]:
            for number in range(tokens):
                yield f'id: kX2dh0Qb7a_Z:{number}\ndata: {{"type":"text","text":"{TOKEN}"}}\n\n'
                await asyncio.sleep(1 / RATE)
            yield 'data: {"type":"end","state":"done"}\n\n'

        @app.get("/watch/{id_}")
        async def watch(id_: str) -> StreamingResponse:
            return StreamingResponse(answer(), media_type="text/event-stream")

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process, as Linux counts it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(port: int, method: str, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(500):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            break
        except OSError:
            await asyncio.sleep(0.02)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def watch_to_the_end(port: int, number: int, begins: asyncio.Semaphore | None) -> int:
    """Begin a run, among some at once, and read it; return how many bytes came."""
    if begins is not None:
        async with begins:
            _, writer = await ask(port, "POST", f"/begin/{number}")
        writer.close()
    reader, writer = await ask(port, "GET", f"/watch/{number}")
    count, last = 0, b""
    while b'"end"' not in last:
        data = await reader.read(65536)
        if not data:
            raise RuntimeError("a stream broke off")
        count += len(data)
        last = last[-16:] + data
    writer.close()
    return count


async def one_server(variant: str, url: str, runs: int) -> float:
    """Return the CPU seconds that a server takes for all runs."""
    port = free_port()
    process = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs meanwhile
        [sys.executable, __file__, "--serve", variant, "--port", str(port), "--url", url]
    )
    try:
        _, writer = await ask(port, "GET", "/openapi.json")
        writer.close()
        before = cpu_seconds(process.pid)
        begins = asyncio.Semaphore(AT_ONCE) if variant == "ours" else None
        await asyncio.gather(*(watch_to_the_end(port, each, begins) for each in range(runs)))
        return cpu_seconds(process.pid) - before
    finally:
        process.terminate()
        process.wait()


async def node(url: str, runs: int, rounds: int) -> dict[str, str]:
    """Compare the CPU of a server with that of one that keeps nothing."""
    took: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(rounds):
        for variant, seconds in took.items():
            seconds.append(await one_server(variant, url, runs))
    tokens = runs * RATE * SECONDS
    results = {
        f"{variant}, {runs:,} runs": f"{statistics.median(seconds):6.2f} s CPU, "
        f"{statistics.median(seconds) / tokens * 1e6:5.1f} µs a token"
        for variant, seconds in took.items()
    }
    return results | {"ratio": f"{statistics.median(took['ours']) / statistics.median(took['bare']):.2f}"}


async def append(url: str, runs: int, rounds: int) -> dict[str, str]:
    """Append in a tight loop."""
    took = []
    async with carrier(url) as manager:
        for number in range(20):
            async with manager.stream(f"append {number}", limits=LARGE) as run:
                began = time.process_time()
                for _ in range(50_000):
                    run.append(TOKEN)
                took.append((time.process_time() - began) / 50_000)
    return {"append": f"{statistics.median(took) * 1e6:.3f} µs, the slowest of 20 loops {max(took) * 1e6:.3f} µs"}


async def calls(url: str, runs: int, rounds: int) -> dict[str, str]:
    """Count what goes to the broker."""
    results = {}
    async with carrier(url) as manager:
        engine: Any = core_of(manager).life.engine
        real, count = engine.append, 0

        def counting(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return real(*arguments)

        for rate in (50, 500, 5000):
            async with manager.stream(f"calls {rate}", limits=LARGE) as run:
                engine.append, count = counting, 0
                began = asyncio.get_running_loop().time()
                appended = 0
                while (passed := asyncio.get_running_loop().time() - began) < 2:
                    while appended < passed * rate:
                        run.append(TOKEN)
                        appended += 1
                    await asyncio.sleep(0.001)
                results[f"{rate:,} tokens a second"] = f"{count / (passed / 0.04):.2f} calls a run and 40 ms"
                engine.append = real
    return results


async def late(url: str, runs: int, rounds: int) -> dict[str, str]:
    """Come late."""

    async def produce(run: Run) -> None:
        for _ in range(100_000 // len(TOKEN)):
            run.append(TOKEN)
            if run._room % 600 == 0:
                await asyncio.sleep(0.04)
        await asyncio.Event().wait()

    took = []
    async with two_nodes(url) as (here, there):
        app = FastAPI()
        app.include_router(create_stream_router(there, "/watch/{id}", public=True))
        async with serve_here(app) as port:
            run = await here.start_stream("late", produce)
            while run._room > 1024 * 1024 - 99_990:  # noqa: ASYNC110  # a producer tells nobody
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.2)
            for _ in range(50):
                began = time.perf_counter()
                reader, writer = await ask(port, "GET", "/watch/late")
                await reader.readuntil(b'"text":"t')
                took.append(time.perf_counter() - began)
                writer.close()
                await asyncio.sleep(0.01)
            await here.stop_stream("late")
    return {"first byte of 100 kB": f"{statistics.median(took) * 1e3:.1f} ms, the longest {max(took) * 1e3:.1f} ms"}


@asynccontextmanager
async def two_nodes(url: str) -> AsyncIterator[tuple[ConnectionManager, ConnectionManager]]:
    async with carrier(url) as here:
        if url.startswith("memory"):
            yield here, here
        else:
            async with carrier(url) as there:
                yield here, there


SCENARIOS: dict[str, Callable[[str, int, int], Coroutine[Any, Any, dict[str, str]]]] = {
    "append": append,
    "calls": calls,
    "node": node,
    "late": late,
}


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="memory,sqlite,redis,nats,postgres")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=("ours", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", default="memory://", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.port, asked.url)
        return
    for name in asked.engines.split(","):
        for scenario in asked.scenarios.split(","):
            with ENGINES[name]() as url:
                for what, found in asyncio.run(SCENARIOS[scenario](url, asked.runs, asked.rounds)).items():
                    print(f"{name:<9} {scenario:<7} {what:<28} {found}", flush=True)


if __name__ == "__main__":
    main()
