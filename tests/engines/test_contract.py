"""Every engine is a right engine: the contract, over each of them and real brokers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import ClassVar

import pytest

from tests.support.brokers import Broker, BrokerMissing, NATSServer, PostgresServer, RedisServer
from tests.support.examples import EXAMPLES, load
from wsbroadcast import Engine, MemoryEngine
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.options import Timing
from wsbroadcast.testing import BrokerContract, EngineContract, HistoryContract

hub = load(EXAMPLES / "08_engine.py")

# So short that names are given back to the broker while a test goes on.
TIMING = Timing(linger=0.02)


class TestMemory(HistoryContract, EngineContract):
    def make_engine(self) -> Engine:
        return MemoryEngine()


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


class TestRedis(RealBroker):
    kind = RedisServer
    engine = RedisEngine


class TestNATS(RealBroker):
    kind = NATSServer
    engine = NATSEngine
    has_one_order = False


class TestPostgres(HistoryContract, RealBroker):
    kind = PostgresServer
    engine = PostgresEngine
