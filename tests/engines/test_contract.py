"""Every engine is a right engine: the contract, over each of them and real brokers."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.brokers import (
    Broker,
    BrokerMissing,
    JetStreamServer,
    PostgresServer,
    RedisServer,
    ValkeyServer,
)
from tests.support.examples import EXAMPLES, load
from wsbroadcast import ConfigurationError, Engine, MemoryEngine
from wsbroadcast.engines.contract import keeps_presence
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.options import Timing
from wsbroadcast.testing import BrokerContract, EngineContract, HistoryContract, PresenceContract
from wsbroadcast.testing.hub import Hub, HubEngine

hub = load(EXAMPLES / "08_engine.py")

# So short that names are given back to the broker while a test goes on.
TIMING = Timing(linger=0.02)


class TestMemory(PresenceContract, HistoryContract, EngineContract):
    has_leases = False

    def make_engine(self) -> Engine:
        return MemoryEngine()


class TestHub(PresenceContract, HistoryContract, EngineContract):
    """The engine of `wsbroadcast.testing.Cluster`."""

    short = 0.05

    node_count = 3

    @pytest.fixture(autouse=True)
    def own_hub(self) -> None:
        self.linked = Hub()

    def make_engine(self) -> Engine:
        return HubEngine(self.linked)


class TestExample(BrokerContract):
    @pytest.fixture(autouse=True)
    async def run_hub(self) -> AsyncIterator[None]:
        self.hub = hub.Hub()
        await self.hub.start()
        yield
        await self.hub.stop()

    def make_engine(self) -> Engine:
        engine: Engine = hub.HubEngine(port=self.hub.port)
        return engine

    async def stop_broker(self) -> None:
        await self.hub.stop()

    async def start_broker(self) -> None:
        await self.hub.start()


class TestSQLite(PresenceContract, HistoryContract, BrokerContract):
    """The file may be taken away, and another lie in its place."""

    @pytest.fixture(autouse=True)
    def own_file(self, tmp_path: Path) -> Iterator[None]:
        self.path = tmp_path / "messages.db"
        # Stays locked to the end: who has opened it must not begin to use it when it has gone.
        self.others: list[sqlite3.Connection] = []
        yield
        for other in self.others:
            other.close()

    def make_engine(self) -> Engine:
        return SQLiteEngine(self.path, timing=TIMING)

    async def stop_broker(self) -> None:
        for each in sorted(self.path.parent.glob("messages.db*")):
            if each.is_file():
                each.rename(each.with_name(f"away {each.name}"))
        self.others.append(sqlite3.connect(self.path, isolation_level=None))
        self.others[-1].execute("BEGIN EXCLUSIVE")

    async def start_broker(self) -> None:
        away = sorted(self.path.parent.glob("away messages.db*"), reverse=True)  # the file itself last
        for each in away:
            each.replace(each.with_name(each.name.removeprefix("away ")))
        if not away:
            self.path.unlink()


@pytest.fixture(scope="class")
def own_broker(request: pytest.FixtureRequest) -> Iterator[None]:
    """One broker for all tests of a class, which the contract stops and starts."""
    try:
        request.cls.server = request.cls.kind()
    except BrokerMissing as missing:
        pytest.skip(str(missing))
    with request.cls.server:
        yield


@pytest.mark.usefixtures("own_broker")
class RealBroker(BrokerContract):
    flapping_seconds = 5 * TIMING.linger

    kind: ClassVar[type[Broker]]
    engine: ClassVar[Callable[..., Engine]]
    server: ClassVar[Broker]

    def make_engine(self) -> Engine:
        return type(self).engine(self.server.url, prefix=self.prefix, timing=TIMING)

    @pytest.fixture(autouse=True)
    def own_prefix(self, prefix: str) -> None:
        self.prefix = prefix

    async def stop_broker(self) -> None:
        await self.server.stopped()

    async def start_broker(self) -> None:
        await self.server.started()


class TestRedis(PresenceContract, HistoryContract, RealBroker):
    kind = RedisServer
    engine = RedisEngine


class TestValkey(PresenceContract, HistoryContract, RealBroker):
    kind = ValkeyServer
    engine = RedisEngine


class TestNATS(PresenceContract, HistoryContract, RealBroker):
    kind = JetStreamServer
    engine = NATSEngine
    has_one_order = False
    is_dense = False  # the offsets of all audiences are numbers of one stream
    keeps_large = True  # JetStream numbers only what it keeps


class TestPostgres(PresenceContract, HistoryContract, RealBroker):
    kind = PostgresServer
    engine = PostgresEngine


def test_engine_without_presence_says_who_has_it() -> None:
    with pytest.raises(ConfigurationError, match=r"the hub engine keeps no presence: .* use memory:.*, nats:"):
        keeps_presence(hub.HubEngine())
