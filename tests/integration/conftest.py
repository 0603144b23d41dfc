"""Servers for the integration tests: each flavour is started once, when the first test wants it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack
from uuid import uuid4

import pytest

from tests.support.centrifuge_sdks import Clients, some
from tests.support.rawclient import RawClient
from tests.support.servers import Flavour, Server


class Pool:
    """The servers that run, by flavour."""

    def __init__(self, directory: pytest.TempPathFactory) -> None:
        self._directory = directory
        self._servers: dict[str, Server] = {}
        self.stack = ExitStack()

    def get(self, flavour: Flavour) -> Server:
        """Return the running server of a flavour; one that a test has ended is started anew."""
        server = self._servers.get(flavour.name)
        if server is None or server.process.poll() is not None:
            log = self._directory.mktemp(flavour.name) / "log"
            server = self._servers[flavour.name] = self.stack.enter_context(Server(flavour, log))
        return server


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory)
    with pool.stack:
        yield pool


@pytest.fixture
def server(request: pytest.FixtureRequest, servers: Pool) -> Iterator[Server]:
    """The running server of the flavour that the test is parametrised with; it must not complain of anything."""
    flavour: Flavour = request.param
    if flavour.missing:
        pytest.skip(flavour.missing)
    server = servers.get(flavour)
    server.mark()
    yield server
    assert not server.complaints(), server.log()


ConnectRaw = Callable[..., Awaitable[RawClient]]


@pytest.fixture
def connect_raw() -> Iterator[ConnectRaw]:
    """Connect raw clients, closed after the test. One that `stalls` has a small buffer, and nobody reads from it."""
    with ExitStack() as stack:

        async def connect_raw(server: Server, path: str, *, stalls: bool = False) -> RawClient:
            client = await RawClient.connect(server.port, path, receive_buffer=4096 if stalls else None)
            stack.callback(client.close)
            return client

        yield connect_raw


@pytest.fixture
def room() -> str:
    """The path of a manager that only this test uses."""
    return f"/m/{uuid4().hex}"


@pytest.fixture
def slow_room() -> str:
    """The same with a `send_timeout` of one second."""
    return f"/m/slow-{uuid4().hex}"


@pytest.fixture
async def sdk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Clients]:
    """Clients of the Centrifuge SDK that the test is parametrised with."""
    async with some(request.param, tmp_path_factory) as found:
        yield found
