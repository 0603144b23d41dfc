"""Deploys that nobody notices: a server that is told to end lets its clients go one by one, and then ends as before."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from playwright.async_api import async_playwright
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.typing import Subprotocol

from tests.integration.conftest import ConnectRaw
from tests.integration.test_browser import BROWSER_ARGUMENTS
from tests.support.brokers import free_port
from tests.support.programs import BROWSER, NGINX, needs_browser, needs_nginx
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
from tests.support.sse import Response, request
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
TWO_OF_GUNICORN = replace(GUNICORN, name="gunicorn -w 2", arguments=("-w", "2", *GUNICORN.arguments))
WORKERS = replace(UVICORN, name="uvicorn --workers 2", arguments=("--workers", "2", *UVICORN.arguments))


class Deploy:
    """Servers of one app, linked with each other. Use it with `with`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.engine = f"sqlite:///{directory}/messages.db"
        self._stack = ExitStack()
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self, flavour: Flavour = UVICORN, drain: float | None = 5.0, app: str = APP, port: int | None = None
    ) -> Server:
        """Start one more node, perhaps at the port of one that has ended."""
        if flavour.missing:
            pytest.skip(flavour.missing)
        environment = {
            "WSBROADCAST_TEST_ENGINE": self.engine,
            "BROKER_URL": self.engine,
            "WSBROADCAST_TEST_DRAIN": json.dumps(drain),
        }
        flavour = replace(flavour, environment=flavour.environment | environment)
        self._started += 1
        log = self._directory / f"server-{self._started}.log"
        server = Server(flavour, log, app)
        server.port = port or server.port
        return self._stack.enter_context(server)

    def proxy(self, *servers: Server) -> int:
        """Start an nginx before them, as the documentation shows it; return its port."""
        assert NGINX is not None
        page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
        documented = re.findall(r"^```nginx\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[0]
        port = free_port()
        [parameters] = set(re.findall(r"server 10[.\d]+:8000(.*?);", documented))
        upstream = "".join(f"server 127.0.0.1:{server.port}{parameters};" for server in servers)
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
        self._path = path
        self.move_to(port)
        self._position = ""
        self.received: list[Any] = []
        self.ends: list[tuple[float, int | None, str]] = []
        self.refusals: list[int] = []
        self.failures: list[str] = []
        self.is_connected = asyncio.Event()
        self.connected_at = 0.0

    def move_to(self, port: int) -> None:
        """Come back at another port."""
        self._url = f"ws://127.0.0.1:{port}{self._path}"

    async def run(self) -> None:
        """Come back until it is cancelled."""
        while True:
            try:
                await self._visit()
            except InvalidStatus as refused:
                self.refusals.append(refused.response.status_code)
                await asyncio.sleep(0.05)
            except (OSError, TimeoutError, EOFError, InvalidMessage) as error:
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
async def published(engine: str, pause: float = 0.05) -> AsyncIterator[list[int]]:
    """Publish number after number from outside during the block; all that were taken are in the list afterwards."""
    numbers: list[int] = []
    is_over = asyncio.Event()

    async def publish(publisher: Publisher) -> None:
        while not is_over.is_set():
            await publisher.broadcast(len(numbers), channel="news")
            numbers.append(len(numbers))
            with suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), pause)

    async with Publisher(engine) as publisher:
        task = asyncio.create_task(publish(publisher))
        try:
            yield numbers
        finally:
            is_over.set()
            await task


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
        # 2,000 clients in one process: with more to read it would see closes late, and many at once.
        async with published(deploy.engine, 0.5 if FULL else 0.05) as numbers:
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
    assert {tuple(client.received) for client in clients} == {tuple(numbers)}
    # As the server closed them: a client process that is busy sees some late, and then many at once. Of 1,000 at random
    # moments in 5 s, 100 ms see 20; of few closes they see a larger share.
    closes = _closes(leaving)
    most, seen = most_within(closes, 0.1), most_within([moment for moment, _, _ in ends], 0.1)
    print(f"{there} closes, at most {most} in 100 ms, at most {seen} as the clients saw them")
    print(f"everybody was back after {back:.2f} s, and the server had ended after {seconds:.2f} s")
    assert len(closes) == there
    assert most <= (0.05 if FULL else 0.2) * there
    assert not leaving.complaints(), leaving.log()
    assert not staying.complaints(), staying.log()


@needs_nginx
async def test_node_after_node_is_restarted_behind_nginx_and_nobody_is_refused(deploy: Deploy) -> None:
    nodes = [deploy.start(drain=1.0), deploy.start(drain=1.0)]
    port = deploy.proxy(*nodes)
    async with crowd(port, 60) as clients:
        for node in nodes:  # the second one's clients go to the first one, which has refused some a moment ago
            await node.stopped()
            await asyncio.wait_for(asyncio.gather(*(client.is_connected.wait() for client in clients)), 15)
            await asyncio.to_thread(deploy.start, drain=1.0, port=node.port)
    assert sum(len(client.ends) for client in clients) > 60
    assert [refusal for client in clients for refusal in client.refusals] == []
    assert [failure for client in clients for failure in client.failures] == []


@needs_nginx
async def test_without_a_drain_behind_nginx_all_are_closed_at_once(deploy: Deploy) -> None:
    """What is measured above shows the difference."""
    leaving, staying = deploy.start(drain=None), deploy.start(drain=None)
    port = deploy.proxy(leaving, staying)
    async with crowd(port, 2000 if FULL else 200) as clients:
        there = (await leaving.get("/stats"))["connections"]
        await leaving.stopped(timeout=60)
        await asyncio.gather(*(client.is_connected.wait() for client in clients))
    most, seen = most_within(_closes(leaving), 0.1), most_within([end[0] for each in clients for end in each.ends], 0.1)
    print(f"{there} closes, at most {most} in 100 ms, at most {seen} as the clients saw them")
    assert most > 0.3 * there


def _closes(server: Server) -> list[float]:
    """When it has closed its clients, as it says itself."""
    return [float(moment) for moment in re.findall(r"^closed (\S+)", server.log(), re.MULTILINE)]


def _have(clients: list[Client], numbers: list[int], count: int) -> Any:
    async def have() -> bool:
        return len(numbers) >= count and all(len(client.received) >= count for client in clients)

    return have


# Signals.


UVICORNS = (UVICORN, UVICORN_UVLOOP, UVICORN_WSPROTO)


@asynccontextmanager
async def people(server: Server, count: int, path: str = "/ws/news") -> AsyncIterator[list[ClientConnection]]:
    """So many clients that don't come back."""
    async with AsyncExitStack() as stack:
        links = [connect(server.url(path), compression=None, open_timeout=20) for _ in range(count)]
        yield [await stack.enter_async_context(link) for link in links]


async def end_of(link: ClientConnection, timeout: float = 20) -> tuple[int | None, str | None]:
    async with asyncio.timeout(timeout):
        await link.wait_closed()
    return link.close_code, link.close_reason


async def ended(server: Server, timeout: float = 20) -> int:
    """Wait until the process has ended; return its exit code."""
    return await asyncio.to_thread(server.process.wait, timeout)


@pytest.mark.parametrize(
    ("flavour", "number"),
    # gunicorn's SIGINT is its quick shutdown, which it tells its workers by SIGQUIT
    [
        *((flavour, signal.SIGTERM) for flavour in (*UVICORNS, WORKERS, GUNICORN)),
        *((flavour, signal.SIGINT) for flavour in (*UVICORNS, WORKERS)),
    ],
    ids=str,
)
async def test_signal_drains_and_then_ends_the_server_as_before(
    deploy: Deploy, flavour: Flavour, number: signal.Signals
) -> None:
    before = deploy.start(flavour, drain=None)
    before.process.send_signal(number)
    code = await ended(before)
    server = deploy.start(flavour)
    async with people(server, 20) as links, people(server, 5, "/own") as own:
        began = time.monotonic()
        server.process.send_signal(number)
        ends = [await end_of(link) for link in (*links, *own)]
        assert await ended(server) == code
        took = time.monotonic() - began
    assert Counter(ends) == {(1012, "drain"): 25}
    assert took < 4  # 0.4 s for the 20 clients, and what such a server takes to end
    assert not server.complaints(), server.log()


@pytest.mark.parametrize("flavour", UVICORNS, ids=str)
async def test_one_connection_prolongs_nothing(deploy: Deploy, flavour: Flavour) -> None:
    server = deploy.start(flavour)
    async with people(server, 1) as (link,):
        assert await server.stopped() < 0.5 + (await _end_takes(deploy, flavour))
        assert await end_of(link) == (1012, "drain")


async def _end_takes(deploy: Deploy, flavour: Flavour) -> float:
    """How long this machine takes now to end a server with nobody there, beyond what an idle one takes."""
    return max(0.0, await deploy.start(flavour, drain=None).stopped() - 0.3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_second_signal_passes_at_once(deploy: Deploy, number: signal.Signals) -> None:
    server = deploy.start(drain=60)
    async with people(server, 200) as links:
        server.process.send_signal(number)
        await _first_end(links)
        began = time.monotonic()
        server.process.send_signal(number)
        ends = Counter([await end_of(link) for link in links])
        await ended(server)
        assert time.monotonic() - began < 2
    assert set(ends) == {(1012, "drain"), (1012, "")}
    assert "Application shutdown complete" in server.log()  # uvicorn skips it if its handler is called twice
    assert not server.complaints(), server.log()


async def _first_end(links: list[ClientConnection]) -> None:
    async with asyncio.timeout(10):
        waits = [asyncio.ensure_future(link.wait_closed()) for link in links]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


async def test_signal_after_a_drain_passes_at_once(deploy: Deploy) -> None:
    server = deploy.start()
    async with people(server, 10) as links:
        assert await server.post("/drain?over=0.1") == {"connections": 0, "is_ready": False}
        assert Counter([await end_of(link) for link in links]) == {(1012, "drain"): 10}
        with pytest.raises(InvalidStatus) as caught:
            async with people(server, 1):
                pass
    assert caught.value.response.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    assert await server.stopped() < 1
    assert not server.complaints(), server.log()


async def test_manager_that_leaves_the_signals_alone(deploy: Deploy) -> None:
    server = deploy.start(drain=None)
    async with people(server, 20) as links:
        assert await server.stopped() < 2
        assert Counter([await end_of(link) for link in links]) == {(1012, ""): 20}
    assert server.process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("flavour", [HYPERCORN, GRANIAN, DAPHNE], ids=str)
async def test_server_that_tells_nobody_is_drained_by_a_route(deploy: Deploy, flavour: Flavour) -> None:
    server = deploy.start(flavour)
    async with people(server, 20) as links, people(server, 5, "/own") as own:
        assert await server.post("/drain?over=0.3") == {"connections": 0, "is_ready": False}
        # Daphne takes no registered code, and drops every reason.
        end = (4012, "") if flavour is DAPHNE else (1012, "drain")
        assert Counter([await end_of(link) for link in (*links, *own)]) == {end: 25}
        with pytest.raises(InvalidStatus) as caught:
            async with people(server, 1):
                pass
        assert caught.value.response.status_code == (403 if flavour is DAPHNE else 503)
    if flavour.ends_on_sigterm:
        assert await server.stopped() < 4
        assert "wsbroadcast" not in "".join(server.complaints())


async def test_ends_under_a_storm_of_clients_that_come_back(deploy: Deploy) -> None:
    """Who comes in after uvicorn has closed everybody would be closed by nobody, and uvicorn waits for them."""
    for _ in range(20 if FULL else 3):
        server = deploy.start(drain=0.2)
        async with storm(server.port, 60) as visits:
            await eventually(_more(visits, 100))
            assert await server.stopped(timeout=10) < 5
        assert server.process.returncode == -signal.SIGTERM
        assert not server.complaints(), server.log()


@asynccontextmanager
async def storm(port: int, count: int) -> AsyncIterator[list[float]]:
    """Clients that come and go and come again, but each fifth stays until it is closed; yields when they came."""
    visits: list[float] = []

    async def visit() -> None:
        while True:
            try:
                async with connect(f"ws://127.0.0.1:{port}/ws/news", compression=None, open_timeout=5) as link:
                    visits.append(time.monotonic())
                    if len(visits) % 5 == 0:
                        await link.wait_closed()
                    else:
                        await asyncio.sleep(0.02 * (len(visits) % 3))
            except (OSError, TimeoutError, EOFError, InvalidStatus, InvalidMessage, ConnectionClosed):
                await asyncio.sleep(0.005)

    tasks = [asyncio.create_task(visit()) for _ in range(count)]
    try:
        yield visits
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _more(visits: list[float], count: int) -> Any:
    async def have() -> bool:
        return len(visits) >= count

    return have


# Faults.


async def test_node_that_is_killed_during_its_drain_costs_no_message(deploy: Deploy) -> None:
    leaving, staying = deploy.start(drain=60), deploy.start()
    async with crowd(leaving.port, 100) as clients:
        async with published(deploy.engine) as numbers:
            await eventually(_have(clients, numbers, 5), 20)
            leaving.process.send_signal(signal.SIGTERM)

            async def some_went() -> bool:
                return sum(bool(client.ends) for client in clients) > 20

            await eventually(some_went, 20)
            leaving.kill()
            for client in clients:
                client.move_to(staying.port)
            await asyncio.wait_for(asyncio.gather(*(client.is_connected.wait() for client in clients)), 30)
        await eventually(_have(clients, numbers, len(numbers)), 30)
    assert {tuple(client.received) for client in clients} == {tuple(numbers)}
    codes = Counter(client.ends[0][1] for client in clients)
    assert set(codes) == {1012, 1006}


async def test_drain_while_many_connect(deploy: Deploy) -> None:
    server = deploy.start(drain=0.5)
    count = 10_000 if FULL else 300
    gate = asyncio.Semaphore(100)  # a process has 100 in the backlog of its socket, and this one has its limit of files
    ends: Counter[Any] = Counter()

    async def visit() -> None:
        async with gate:
            try:
                async with connect(server.url("/ws/news"), compression=None, open_timeout=20) as link:
                    ends[await end_of(link)] += 1
            except InvalidStatus as refused:
                ends[refused.response.status_code] += 1
            except (OSError, EOFError, InvalidMessage):
                ends["gone"] += 1

    visits = asyncio.gather(*(visit() for _ in range(count)))

    async def some_came() -> bool:
        stats = await server.get("/stats")
        return bool(stats["connections"] > 30)

    await eventually(some_came)
    assert await server.stopped(timeout=20) < 6
    await visits
    assert ends[(1012, "drain")] > 30
    assert sum(ends.values()) == count
    assert set(ends) <= {(1012, "drain"), (1012, "draining"), 503, "gone"}
    assert not server.complaints(), server.log()


# Servers that are several processes.


async def test_reload_with_open_connections_reloads(deploy: Deploy, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "module.py").write_text("")
    arguments = ("--reload", "--reload-dir", str(watched), *UVICORN.arguments)
    server = deploy.start(replace(UVICORN, name="uvicorn --reload", arguments=arguments))
    before = await server.get("/pid")
    async with people(server, 5) as links, people(server, 1, "/own") as own:
        began = time.monotonic()
        (watched / "module.py").write_text("changed = True")
        assert Counter([await end_of(link) for link in (*links, *own)]) == {(1012, "drain"): 6}

        async def is_another() -> bool:
            return bool(await _answer(server, "/pid") not in (None, before))

        await eventually(is_another, 20)
        assert time.monotonic() - began < 10
    assert not server.complaints(), server.log()


async def _answer(server: Server, path: str) -> Any:
    try:
        return await server.get(path)
    except (OSError, ValueError):  # it is between two processes
        return None


@pytest.mark.parametrize("flavour", [WORKERS, TWO_OF_GUNICORN], ids=str)
async def test_sighup_replaces_the_workers_and_loses_nothing(deploy: Deploy, flavour: Flavour) -> None:
    server = deploy.start(flavour)
    before = await _pids(server)
    async with crowd(server.port, 30) as clients:
        async with published(deploy.engine) as numbers:
            await eventually(_have(clients, numbers, 5), 20)
            server.process.send_signal(signal.SIGHUP)

            async def are_others() -> bool:
                return not before & await _pids(server)

            await eventually(are_others, 30)
            await asyncio.wait_for(asyncio.gather(*(client.is_connected.wait() for client in clients)), 30)
        await eventually(_have(clients, numbers, len(numbers)), 30)
    assert {tuple(client.received) for client in clients} == {tuple(numbers)}
    ends = {(code, reason) for client in clients for _, code, reason in client.ends}
    assert ends <= {(1012, "drain"), (1012, "draining")}
    # A worker that drains answers at the socket that it shares with the others.
    assert {refusal for client in clients for refusal in client.refusals} <= {503}
    assert await server.stopped() < 5
    assert not server.complaints(), server.log()


async def _pids(server: Server) -> set[int]:
    """Those of the two workers, which answer by turns."""
    found: set[Any] = set()

    async def all_found() -> bool:
        found.add(await _answer(server, "/pid"))
        found.discard(None)
        return len(found) >= 2

    await eventually(all_found, 20)
    return found


async def test_sigterm_with_a_stalled_client_lasts_no_longer(deploy: Deploy, connect_raw: ConnectRaw) -> None:
    server = deploy.start(drain=0.5)
    await connect_raw(server, "/ws/news", stalls=True)
    async with people(server, 10) as links:
        readers = [asyncio.ensure_future(_read(link)) for link in links]

        async def is_behind() -> bool:
            await server.post("/flood?messages=16&size=65536")
            return bool((await server.get("/stats"))["backlog_messages"])

        await eventually(is_behind, 20)
        # 0.2 s for eleven, the close_timeout of 1 s, and what a server takes to end.
        assert await server.stopped() < 3
        await asyncio.gather(*readers)
        assert Counter([await end_of(link) for link in links]) == {(1012, "drain"): 10}
    assert not server.complaints(), server.log()


async def _read(link: ClientConnection) -> None:
    with suppress(ConnectionClosed):
        async for _ in link:
            pass


@pytest.mark.skipif(importlib.util.find_spec("sse_starlette") is None, reason="pip install sse-starlette")
@pytest.mark.parametrize("flavour", [*UVICORNS, WORKERS], ids=str)
async def test_streams_of_sse_starlette_end_too(deploy: Deploy, flavour: Flavour) -> None:
    """It finds the server through the signal handler, and looks at its `should_exit`."""
    server = deploy.start(flavour)
    async with people(server, 5) as links, streaming(server.port) as stream:
        server.process.send_signal(signal.SIGTERM)
        assert Counter([await end_of(link) for link in links]) == {(1012, "drain"): 5}
        async with asyncio.timeout(10):
            while await stream.read(4096):
                pass
        await ended(server)
    assert "Traceback" not in server.log()  # uvicorn says of each stream that it was cut, as it does without us


@asynccontextmanager
async def streaming(port: int) -> AsyncIterator[asyncio.StreamReader]:
    """An open stream of server-sent events, of which one has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET /sse HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"data: 0"), 10)
        yield reader
    finally:
        writer.close()


# Event streams, without which no server would end that has one open.


async def close_of(stream: Response) -> tuple[int, str]:
    """Return how a stream has ended, which has said when to come back."""
    event = await stream.named("close")
    assert await stream.rest() == []
    assert not stream.is_cut
    assert stream.parser.retry is not None
    return event.json["code"], event.json["reason"]


@asynccontextmanager
async def streams(server: Server, count: int) -> AsyncIterator[list[Response]]:
    """So many open streams of the router's."""
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(request(server.port, "/ws/news")) for _ in range(count)]
        for stream in opened:
            await stream.named("recovered")
        yield opened


@pytest.mark.parametrize("flavour", [*UVICORNS, WORKERS, GUNICORN], ids=str)
async def test_open_streams_are_drained_and_hold_up_no_end(deploy: Deploy, flavour: Flavour) -> None:
    server = deploy.start(flavour)
    async with streams(server, 5) as opened, people(server, 5) as links:
        server.process.send_signal(signal.SIGTERM)
        assert Counter([await close_of(stream) for stream in opened]) == {(1012, "drain"): 5}
        assert Counter([await end_of(link) for link in links]) == {(1012, "drain"): 5}
        await ended(server, 8)
    assert not server.complaints(), server.log()


async def test_poll_that_waits_is_answered_by_a_drain(deploy: Deploy) -> None:
    server = deploy.start()
    epoch = (await server.get("/position/news"))["epoch"]
    poll = asyncio.create_task(_poll(server, f"/ws/news?since={epoch}:0&wait=30"))

    async def is_there() -> bool:
        return bool((await server.get("/stats"))["sinks"] == {"long_poll": 1})

    await eventually(is_there)
    assert await server.stopped() < 2
    assert (await poll) == {"position": f"{epoch}:0", "recovered": True, "messages": []}


async def _poll(server: Server, path: str) -> Any:
    async with request(server.port, path, accept="application/json") as response:
        return await response.json()


async def test_sigterm_with_one_open_stream_ends_at_once(deploy: Deploy) -> None:
    server = deploy.start()
    async with streams(server, 1):
        assert await server.stopped() < 2


async def test_reload_with_an_open_stream_reloads(deploy: Deploy, tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "module.py").write_text("")
    arguments = ("--reload", "--reload-dir", str(watched), *UVICORN.arguments)
    server = deploy.start(replace(UVICORN, name="uvicorn --reload", arguments=arguments))
    before = await server.get("/pid")
    async with streams(server, 2) as opened:
        (watched / "module.py").write_text("changed = True")
        assert Counter([await close_of(stream) for stream in opened]) == {(1012, "drain"): 2}

        async def is_another() -> bool:
            return bool(await _answer(server, "/pid") not in (None, before))

        await eventually(is_another, 20)


async def test_stream_that_meets_a_drain_is_told_when_to_come_back(deploy: Deploy) -> None:
    server = deploy.start()
    async with people(server, 100):  # which takes two seconds
        draining = asyncio.create_task(server.post("/drain?over=2"))

        async def is_refused() -> bool:
            async with request(server.port, "/ws/news") as stream:
                events = await stream.rest() if stream.headers["content-type"].startswith("text/event") else None
                assert stream.status == 200  # any other ends a browser's EventSource for ever
                return events == [] and stream.parser.retry is not None

        await eventually(is_refused)
        async with request(server.port, "/ws/news?events=1") as stream:
            assert stream.status == 503
            assert int(stream.headers["retry-after"]) >= 1
        await draining


LISTEN = """
(url) => {
  window.seen = []; window.finals = 0;
  const source = window.source = new EventSource(url);
  source.onmessage = (event) => seen.push(event.data);
  source.onerror = () => { window.finals += source.readyState == 2 };
  return new Promise((opened) => source.addEventListener("recovered", () => opened(), { once: true }));
}
"""


@needs_nginx
@needs_browser
async def test_event_source_goes_to_the_other_node_and_misses_nothing(deploy: Deploy) -> None:
    servers = [deploy.start(drain=1.0), deploy.start(drain=1.0)]
    port = deploy.proxy(*servers)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{port}/health")
        await page.evaluate(LISTEN, "/ws/news")
        async with published(deploy.engine, 0.05) as numbers:
            await page.wait_for_function("seen.length > 5")
            there = [(await server.get("/stats"))["connections"] for server in servers]
            leaving = servers[there.index(1)]
            await leaving.stopped(timeout=20)
            await page.wait_for_function(f"seen.length > {len(numbers) + 5}", timeout=20_000)
        await page.wait_for_function(f"seen.length >= {len(numbers)}", timeout=20_000)
        assert [json.loads(each) for each in await page.evaluate("seen")] == numbers
        assert await page.evaluate("[finals, source.readyState]") == [0, 1]
        await browser.close()
