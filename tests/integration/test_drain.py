"""Deploys that nobody notices: a server that is told to end lets its clients go one by one, and then ends as before."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.typing import Subprotocol

from tests.support.brokers import free_port
from tests.support.programs import NGINX, needs_nginx
from tests.support.servers import (
    DAPHNE,
    GRANIAN,
    HYPERCORN,
    ROOT,
    UVICORN,
    UVICORN_UVLOOP,
    UVICORN_WSPROTO,
    Flavour,
    Server,
    eventually,
)
from wsbroadcast import Publisher

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

EVENTS = Subprotocol("wsbroadcast.v1")

APP = "tests.support.deployed:app"

GUNICORN = Flavour(
    "gunicorn",
    "gunicorn",
    ("-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:{port}", "{app}"),
    requires=("uvicorn_worker",),
)
WORKERS = replace(UVICORN, name="uvicorn --workers 2", arguments=("--workers", "2", *UVICORN.arguments))


class Deploy:
    """Servers of one app, linked with each other. Use it with `with`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.engine = f"sqlite:///{directory}/messages.db"
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, flavour: Flavour = UVICORN, drain: float | None = 5.0, app: str = APP) -> Server:
        """Start one more node."""
        if flavour.missing:
            pytest.skip(flavour.missing)
        environment = {
            "WSBROADCAST_TEST_ENGINE": self.engine,
            "BROKER_URL": self.engine,
            "WSBROADCAST_TEST_DRAIN": json.dumps(drain),
        }
        flavour = replace(flavour, environment=flavour.environment | environment)
        log = self._directory / f"{free_port()}.log"
        return self._stack.enter_context(Server(flavour, log, app))

    def proxy(self, *servers: Server) -> int:
        """Start an nginx before them, as the documentation shows it; return its port."""
        assert NGINX is not None
        page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
        documented = re.findall(r"^```nginx\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
        port = free_port()
        upstream = "".join(f"server 127.0.0.1:{server.port};" for server in servers)
        documented, count = re.subn(r"(upstream app \{).*?\}", rf"\1{upstream}}}", documented, flags=re.DOTALL)
        assert count == 1
        assert documented.count("listen 443 ssl") == 1
        documented = documented.replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        paths = "".join(
            f"{name}_temp_path {self._directory}/{name};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        config = self._directory / "nginx.conf"
        config.write_text(
            f"daemon off; master_process off; pid {self._directory}/nginx.pid; error_log {self._directory}/error.log;"
            f"worker_rlimit_nofile 16384; events {{ worker_connections 8192; }}"
            f"http {{ access_log off; {paths} {documented} }}"
        )
        process = subprocess.Popen(
            [NGINX, "-p", str(self._directory), "-c", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(process.wait, 10)
        self._stack.callback(process.terminate)
        deadline = time.monotonic() + 10
        while not _listens(port):
            assert process.poll() is None, (self._directory / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return port


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploy]:
    with Deploy(tmp_path) as deploy:
        yield deploy


class Client:
    """A client that speaks events and comes back at once, from where it was. It notes all that it sees."""

    def __init__(self, port: int, path: str = "/ws/news") -> None:
        self._url = f"ws://127.0.0.1:{port}{path}"
        self._position = ""
        self.received: list[Any] = []
        self.ends: list[tuple[float, int | None, str]] = []
        self.refusals: list[int] = []
        self.failures: list[str] = []
        self.is_connected = asyncio.Event()
        self.connected_at = 0.0

    async def run(self) -> None:
        """Come back until it is cancelled."""
        while True:
            try:
                await self._visit()
            except InvalidStatus as refused:
                self.refusals.append(refused.response.status_code)
                await asyncio.sleep(0.05)
            except (OSError, TimeoutError, EOFError) as error:
                self.failures.append(repr(error))
                await asyncio.sleep(0.05)

    async def _visit(self) -> None:
        url = f"{self._url}?since={self._position}"
        async with connect(url, subprotocols=[EVENTS], compression=None, open_timeout=30) as link:
            self.connected_at = time.monotonic()
            try:
                async for text in link:
                    self._take(json.loads(text))
            except ConnectionClosed:
                pass
            self.is_connected.clear()
            self.ends.append((time.monotonic(), link.close_code, link.close_reason or ""))

    def _take(self, event: dict[str, Any]) -> None:
        if event["type"] == "message":
            self.received.append(event["data"])
        elif event["type"] == "gap" or event.get("recovered") is False:
            self.failures.append(str(event))
        if event["type"] == "subscribed":
            self.is_connected.set()
        self._position = event.get("position", self._position)


@asynccontextmanager
async def crowd(port: int, count: int) -> AsyncIterator[list[Client]]:
    """So many clients, connected inside the block."""
    clients = [Client(port) for _ in range(count)]
    async with AsyncExitStack() as stack:
        tasks = []
        for start in range(0, count, 50):  # a backlog of 100 wants no more at once
            some = clients[start : start + 50]
            tasks += [asyncio.create_task(client.run()) for client in some]
            await asyncio.wait_for(asyncio.gather(*(client.is_connected.wait() for client in some)), 30)

        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        stack.push_async_callback(end)
        yield clients


@asynccontextmanager
async def published(engine: str) -> AsyncIterator[list[int]]:
    """Publish number after number from outside during the block; all that were taken are in the list afterwards."""
    numbers: list[int] = []

    async def publish(publisher: Publisher) -> None:
        while True:
            await publisher.broadcast(len(numbers), channel="news")
            numbers.append(len(numbers))
            await asyncio.sleep(0.05)

    async with Publisher(engine) as publisher:
        task = asyncio.create_task(publish(publisher))
        try:
            yield numbers
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def most_within(moments: list[float], seconds: float) -> int:
    """The most moments of any interval of so many seconds."""
    moments = sorted(moments)
    first = most = 0
    for last, moment in enumerate(moments):
        while moment - moments[first] > seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


@needs_nginx
async def test_deploy_behind_nginx_is_noticed_by_nobody(deploy: Deploy) -> None:
    count, over = (2000, 5.0) if FULL else (200, 2.0)
    leaving, staying = deploy.start(drain=over), deploy.start(drain=over)
    port = deploy.proxy(leaving, staying)
    async with crowd(port, count) as clients:
        there = (await leaving.get("/stats"))["connections"]
        assert 0.4 * count < there < 0.6 * count
        async with published(deploy.engine) as numbers:
            await eventually(_have(clients, numbers, 5), 20)
            began = time.monotonic()
            seconds = await leaving.stopped(timeout=60)
            await asyncio.gather(*(client.is_connected.wait() for client in clients))
            back = max(client.connected_at for client in clients) - began
            await eventually(_have(clients, numbers, len(numbers) + 5), 30)
        await eventually(_have(clients, numbers, len(numbers)), 30)
        assert (await staying.get("/stats"))["connections"] == count
    lasts = min(over, there / 50)
    assert back < lasts + 2
    assert seconds < lasts + 2
    assert leaving.process.returncode == -signal.SIGTERM
    ends = [end for client in clients for end in client.ends]
    assert Counter((code, reason) for _, code, reason in ends) == {(1012, "drain"): there}
    assert [refusal for client in clients for refusal in client.refusals] == []
    assert [failure for client in clients for failure in client.failures] == []
    assert {tuple(client.received[-len(numbers) :]) for client in clients} == {tuple(numbers)}
    # At random, 100 ms see 2 % of 5 s; of few closes they may see more, and 1,000 are enough to say so.
    most = most_within([moment for moment, _, _ in ends], 0.1)
    assert most <= (0.05 if FULL else 0.2) * there
    assert not leaving.complaints(), leaving.log()
    assert not staying.complaints(), staying.log()


def _have(clients: list[Client], numbers: list[int], count: int) -> Any:
    async def have() -> bool:
        return len(numbers) >= count and all(len(client.received) >= count for client in clients)

    return have
