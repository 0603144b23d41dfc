"""Four workers behind one port without a broker: each says at a port of its own what it has."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families as parse

from tests.support.brokers import free_port
from tests.support.rawclient import RawClient
from tests.support.servers import UVICORN, Server, eventually

CONNECTIONS = 24


def scrape(port: int) -> float | None:
    """The connections of the worker at a port; `None` if there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            page = answer.read().decode()
    except (OSError, urllib.error.URLError):
        return None
    [family] = [family for family in parse(page) if family.name == "wsbroadcast_connections"]
    return float(sum(sample.value for sample in family.samples))


async def test_each_of_four_workers_serves_its_own_metrics(tmp_path: Path) -> None:
    first = free_port()
    flavour = replace(
        UVICORN,
        name="uvicorn --workers 4",
        arguments=("--workers", "4", *UVICORN.arguments),
        environment={"METRICS_PORT": str(first)},
    )
    server = Server(flavour, tmp_path / "server.log", "tests.support.metered:app", identifies_itself=False)
    with server:

        async def found() -> list[float]:
            pages = [await asyncio.to_thread(scrape, port) for port in range(first, first + 16)]
            return [page for page in pages if page is not None]

        async def all_workers() -> bool:
            return len(await found()) == 4

        await eventually(all_workers, timeout=30)
        clients = [await RawClient.connect(server.port, "/ws/news") for _ in range(CONNECTIONS)]
        try:

            async def all_connections() -> bool:
                return sum(await found()) == CONNECTIONS

            await eventually(all_connections, timeout=10)
        finally:
            for client in clients:
                client.close()
