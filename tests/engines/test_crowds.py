"""Crowds that come back at once, on every engine: all recover what they missed, and few ask the broker."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.asgi import Peer
from tests.support.brokers import Broker, BrokerMissing, JetStreamServer, PostgresServer, RedisServer
from tests.support.fast import WebSocketsSansIOProtocol
from wsbroadcast import Connection, ConnectionManager, Engine, History, MemoryEngine, Position, Presence
from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.history import Replay
from wsbroadcast.manager import core_of
from wsbroadcast.protocols.events import events
from wsbroadcast.testing import Cluster
from wsbroadcast.transports import SPEAKS

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
CLIENTS, SECONDS = (1000, 10.0) if FULL else (100, 1.0)
CROWD = 10_000 if FULL else 1000
PER_SECOND = 100
HISTORY = History(messages=2000)

# Seconds in which a crowd gets what it missed, all in this process.
_PATIENCE = 60.0

BROKERS: dict[str, tuple[Callable[[], Broker], Callable[[str], KeepingEngine]]] = {
    "redis": (RedisServer, RedisEngine),
    "jetstream": (JetStreamServer, NATSEngine),
    "postgres": (PostgresServer, PostgresEngine),
}


class Member:
    """A client that knows where it is."""

    def __init__(self) -> None:
        self.peer = Peer()
        self.got: list[str] = []
        self.recovered: list[bool] = []
        self.at: Position | None = None
        self.connection: Connection | None = None

    async def come(self, manager: ConnectionManager) -> None:
        self.peer = Peer()
        self.peer.websocket.scope[SPEAKS] = events
        since = {} if self.at is None else {"news": self.at}
        self.connection = await manager.connect(self.peer.websocket, channels=["news"], since=since)

    def read(self) -> None:
        for message in self.peer.messages:
            event = json.loads(message)
            if event["type"] in ("message", "subscribed", "position"):
                self.at = Position.of(event["position"])
            if event["type"] == "message":
                self.got.append(event["data"])
            if event["type"] == "subscribed" and "recovered" in event:
                self.recovered.append(event["recovered"])

    def leave(self) -> None:
        self.read()
        self.peer.vanish()
        assert self.connection is not None
        self.connection.manager.disconnect(self.connection)

    async def has(self, texts: Sequence[str]) -> bool:
        """Wait for the last of these; tell whether exactly they came."""
        last = f'"data":"{texts[-1]}"'
        try:
            await self.peer.wait_for(
                lambda: any(last in each.get("text", "") for each in self.peer.sent[-5:]), _PATIENCE
            )
        except TimeoutError:
            raise AssertionError(f"got {len(self.peer.sent)} events, of late {self.peer.sent[-3:]}") from None
        self.read()
        return self.got == list(texts)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What has to be closed after the managers."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["memory", *BROKERS, "sqlite"])
async def managers(
    request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack
) -> AsyncIterator[list[ConnectionManager]]:
    """Two nodes at one broker; in memory there is one."""
    if request.param == "memory":
        engines: list[Engine] = [MemoryEngine()]
    elif request.param == "sqlite":
        engines = [SQLiteEngine(tmp_path / "messages.db") for _ in range(2)]
    else:
        kind, make = BROKERS[request.param]
        try:
            server = kind()
        except BrokerMissing as missing:
            pytest.skip(str(missing))
        stack.enter_context(server)
        engines = [make(server.url) for _ in range(2)]
    async with running(engines) as some:
        yield some


@asynccontextmanager
async def running(engines: Sequence[Engine]) -> AsyncIterator[list[ConnectionManager]]:
    some = [ConnectionManager(engine, history=HISTORY) for engine in engines]
    for manager in some:
        await manager.start()
    try:
        yield some
    finally:
        for manager in some:
            await manager.aclose()


async def test_crowd_that_was_away_recovers(managers: list[ConnectionManager]) -> None:
    members = [Member() for _ in range(CLIENTS)]
    for number, member in enumerate(members):
        await member.come(managers[number % len(managers)])
    texts = ["first"]
    await managers[-1].broadcast("first", channel="news")
    for member in members:
        await member.peer.wait_messages(3)
        member.leave()
    for number in range(round(SECONDS * PER_SECOND)):
        texts.append(str(number))
        await managers[number % len(managers)].broadcast(str(number), channel="news")
        await asyncio.sleep(1 / PER_SECOND)
    # Each at another node than before.
    await asyncio.gather(*(each.come(managers[-1 - number % len(managers)]) for number, each in enumerate(members)))
    await managers[0].broadcast("last", channel="news")
    assert await asyncio.gather(*(member.has([*texts, "last"]) for member in members)) == [True] * CLIENTS
    assert [member.recovered for member in members] == [[True]] * CLIENTS


async def test_client_that_is_back_at_once_recovers(managers: list[ConnectionManager]) -> None:
    member, texts = Member(), [str(number) for number in range(50)]
    await member.come(managers[0])
    for number, text in enumerate(texts):
        manager = managers[number % len(managers)]
        await member.peer.wait_messages(2)  # the greeting, and where it is
        publishing = asyncio.ensure_future(manager.broadcast(text, channel="news"))
        member.leave()
        await member.come(managers[(number // 2) % len(managers)])
        await publishing
    await managers[0].broadcast("last", channel="news")
    assert await member.has([*texts, "last"])
    assert member.recovered == [True] * 50


async def test_crowd_that_resumes_reads_the_history_once(
    managers: list[ConnectionManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Member()
    await first.come(managers[0])
    texts = [str(number) for number in range(100)]
    for text in texts:
        await managers[0].broadcast(text, channel="news")
    await first.has(texts)
    first.leave()
    since = (await managers[0].history("news")).messages[0].position
    reads = count_reads(managers[-1], monkeypatch)
    members = [Member() for _ in range(CROWD)]
    for member in members:
        member.at = since
    witness = Peer()
    await managers[-1].connect(witness.websocket, channels=["news of others"])
    late: list[float] = []
    crowd = asyncio.ensure_future(come_all(members, managers[-1]))
    while not crowd.done():
        began = time.monotonic()
        await managers[-1].broadcast("live", channel="news of others")
        await witness.next()
        late.append(time.monotonic() - began)
    await crowd
    await managers[0].broadcast("last", channel="news")
    assert await asyncio.gather(*(member.has([*texts[1:], "last"]) for member in members)) == [True] * CROWD
    assert all(member.recovered == [True] for member in members)
    assert reads.count("news") <= 1
    most, usual = max(late), statistics.median(late)
    print(f"while {CROWD} resumed, live messages took {most:.3f} s at most, {usual:.4f} s usually")


async def come_all(members: Sequence[Member], manager: ConnectionManager) -> None:
    # As a server takes them in: some in each turn of the event loop.
    for start in range(0, len(members), 8):
        await asyncio.gather(*(member.come(manager) for member in members[start : start + 8]))


def count_reads(manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    engine: Any = core_of(manager).life.engine
    read = engine.read
    reads: list[str] = []

    async def counted(audience: Audience, *arguments: Any) -> Replay:
        reads.append(audience.name)
        replay: Replay = await read(audience, *arguments)
        return replay

    monkeypatch.setattr(engine, "read", counted)
    return reads


# Who is there, while they come.


class Watcher:
    """A client in a room, on the fast path, that wants to know who else is."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.socket = WebSocketsSansIOProtocol()
        self.connection: Connection | None = None

    async def come(self, manager: ConnectionManager) -> None:
        self.socket = WebSocketsSansIOProtocol()
        self.socket.websocket.scope[SPEAKS] = events
        self.connection = await manager.connect(self.socket.websocket, user=self.user, channels=["room"])
        assert await core_of(manager).watch(self.connection, "room")

    def lose(self) -> None:
        assert self.connection is not None
        self.connection.manager.disconnect(self.connection)

    @property
    def told(self) -> int:
        """How often it was told who is there."""
        return sum(written.count(b'"type":"presence"') for written in self.socket.transport.written)

    def knows(self, count: int) -> bool:
        """Tell whether the last that it was told is that so many are there."""
        wire = b"".join(self.socket.transport.written)
        return wire[wire.rindex(b'"type":"presence"') :].find(b'"count":%d' % count) >= 0


@contextmanager
def longest_turn() -> Iterator[list[float]]:
    """Measure the turns of the event loop; the first number is the longest, in seconds of this thread's own time.

    What other programs take doesn't count. The garbage collector is off: how long it looks at a crowd of connections is
    no matter of who is told what.
    """
    longest = [0.0]

    async def watch() -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            longest[0] = max(longest[0], now - before)
            before = now

    gc.collect()
    gc.disable()
    watching = asyncio.ensure_future(watch())
    try:
        yield longest
    finally:
        watching.cancel()
        gc.enable()


@asynccontextmanager
async def rooms(kind: str) -> AsyncIterator[Sequence[ConnectionManager]]:
    presence = Presence(grace=60.0)
    if kind == "cluster":
        async with Cluster(2, presence=presence) as cluster:
            yield cluster.managers
    else:
        async with ConnectionManager(presence=presence) as manager:
            yield [manager]


@pytest.mark.parametrize("kind", ["memory", "cluster"])
async def test_crowd_that_comes_back_is_told_little_and_holds_up_nothing(kind: str) -> None:
    seconds = 5.0 if FULL else 0.5
    watchers = [Watcher(f"user {number}") for number in range(CROWD)]
    async with rooms(kind) as managers:
        for phase in ("came", "came back"):
            with longest_turn() as longest:
                began = time.monotonic()
                for number, watcher in enumerate(watchers):
                    await watcher.come(managers[number % len(managers)])
                    ahead = began + seconds * number / CROWD - time.monotonic()
                    await asyncio.sleep(max(0.0, ahead))
                took = time.monotonic() - began
                async with asyncio.timeout(_PATIENCE):
                    while not all(watcher.knows(CROWD) for watcher in watchers):  # noqa: ASYNC110  # no event tells
                        await asyncio.sleep(0.5)
                waited = time.monotonic() - began
            told = [watcher.told for watcher in watchers]
            print(
                f"{CROWD} {phase} within {took:.1f} s: each was told {max(told)} times at most, "
                f"{sum(told) / CROWD:.1f} on average; the longest turn took {longest[0] * 1000:.1f} ms"
            )
            assert max(told) <= (1 if phase == "came back" else 2 + waited)
            assert longest[0] < 0.05
            for number, watcher in enumerate(watchers):
                watcher.lose()
                if number % 10 == 0:
                    await asyncio.sleep(0)
            assert await managers[0].presence_count("room") == CROWD  # nobody has left
