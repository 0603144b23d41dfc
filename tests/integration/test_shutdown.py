"""SIGTERM ends the process, whatever its clients do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.conftest import ConnectRaw
from tests.support.rawclient import CLOSE
from tests.support.servers import (
    APP,
    DAPHNE,
    FLAVOURS,
    GRANIAN,
    UVICORN,
    UVICORN_UVLOOP,
    UVICORN_WSPROTO,
    Flavour,
    Server,
    eventually,
    swarm,
)

LIVED = "tests.support.apps:lived"

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server that the test may end."""
    with ExitStack() as stack:

        def start(flavour: Flavour, app: str = APP) -> Server:
            if flavour.missing:
                pytest.skip(flavour.missing)
            return stack.enter_context(Server(flavour, tmp_path / "log", app))

        yield start


@pytest.mark.parametrize(
    ("flavour", "app"),
    [
        *((flavour, LIVED) for flavour in FLAVOURS),
        (UVICORN, APP),
        (UVICORN_WSPROTO, APP),
        (GRANIAN, APP),
        (DAPHNE, APP),
    ],
    ids=str,
)
async def test_sigterm_ends_a_server_with_open_connections(
    start: Start, flavour: Flavour, app: str, connect_raw: ConnectRaw
) -> None:
    if not flavour.ends_on_sigterm:
        pytest.skip("hypercorn waits for ever on this Python, with any app (pgjones/hypercorn#308)")
    server = start(flavour, app)
    path = "/ws" if app == LIVED else "/m/a/chat"
    clients = [await connect_raw(server, path) for _ in range(10)]
    await clients[0].send("hello")
    assert await clients[0].receive_text() == "hello"
    seconds = await server.stopped()
    assert seconds < 6
    if flavour.package == "hypercorn":  # its own tasks die with a traceback each, whatever the app is
        assert "wsbroadcast" not in server.log()
    else:
        assert not server.complaints(), server.log()
    for client in clients:
        frames = []
        while (frame := await client.receive()) is not None:
            frames.append(frame)
        if flavour.package == "uvicorn":
            assert frames[-1].opcode == CLOSE
            assert frames[-1].close_code == 1012


@pytest.mark.parametrize(
    ("flavour", "endpoint"),
    [
        (UVICORN, "chat"),
        (UVICORN, "listen"),
        (UVICORN_UVLOOP, "forgetful"),
        (UVICORN_WSPROTO, "chat"),
        (UVICORN_WSPROTO, "listen"),
    ],
    ids=str,
)
async def test_sigterm_ends_a_server_with_a_stalled_client(
    start: Start, flavour: Flavour, endpoint: str, connect_raw: ConnectRaw
) -> None:
    server = start(flavour)
    await connect_raw(server, f"/m/a/{endpoint}", stalls=True)
    async with swarm(server.port, f"/m/a/{endpoint}", connections=3, messages=1_000_000):  # the crowd, which reads

        async def is_behind() -> bool:  # the kernel is full then, and the backlog is not
            await server.post("/m/a/flood?messages=16&size=4096")
            stats = await server.get("/m/a/stats")
            assert stats["evicted"] == {}
            return bool(stats["behind"])

        await eventually(is_behind, timeout=20)
        assert await server.stopped() < 5
        assert not server.complaints(), server.log()


@pytest.mark.parametrize(
    ("flavour", "cause"),
    [
        (UVICORN, "backlog_full"),
        (UVICORN, "send_timeout"),
        (UVICORN_WSPROTO, "backlog_full"),
        (UVICORN_WSPROTO, "send_timeout"),
    ],
    ids=str,
)
async def test_sigterm_ends_a_server_after_an_eviction(
    start: Start, flavour: Flavour, cause: str, connect_raw: ConnectRaw
) -> None:
    server = start(flavour)
    await connect_raw(server, "/m/slow-a/chat", stalls=True)
    async with swarm(server.port, "/m/slow-a/chat", connections=3, messages=1_000_000):

        async def is_evicted() -> bool:
            stats = await server.get("/m/slow-a/stats")
            if not stats["evicted"] and (cause == "backlog_full" or not stats["backlog_messages"]):
                await server.post("/m/slow-a/flood?messages=64&size=4096")
            return bool(stats["evicted"] == {cause: 1})

        await eventually(is_evicted, timeout=20)
        assert await server.stopped() < 5
        assert not server.complaints(), server.log()
