"""Who is in a channel, on real servers: processes that are killed, frozen, cut off and deployed, and their brokers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import asyncpg
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.protocol import State

from tests.support.asgi import Peer
from tests.support.brokers import BrokerMissing, Endpoint, JetStreamServer, PostgresServer
from tests.support.proxy import FaultProxy
from tests.support.servers import UVICORN, Server, eventually
from wsbroadcast import ConnectionManager, Presence
from wsbroadcast.manager import core_of

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

APP = "tests.support.present:app"

PACE = 1.0 if FULL else 0.3
"""What all times of leases are multiplied by."""

GONE = 13.0
"""Seconds until those are gone whose node has died, at full length: a lease, a sweep, and its moment by chance."""

SLACK = 2.0
"""What a busy machine may need."""

ENGINES = ["sqlite", "redis", "postgres", "nats"]


class Town:
    """Servers of one app, linked with each other, and what the hooks of all of them were told. Use it with `with`."""

    def __init__(self, directory: Path, engine: str, *, pace: float = PACE) -> None:
        self.directory = directory
        self.engine = engine
        self.pace = pace
        self._told = directory / "told"
        self._told.touch()
        self._stack = ExitStack()
        self.servers: list[Server] = []
        self._numbers = count(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self, *, engine: str = "", workers: int = 1, drain: float | None = 0.5, grace: float = 10.0, by: str = "user"
    ) -> Server:
        """Start one more node; `grace` is at full length."""
        flavour = replace(
            UVICORN,
            arguments=(*(("--workers", str(workers)) if workers > 1 else ()), *UVICORN.arguments),
            environment={
                "WSBROADCAST_TEST_ENGINE": engine or self.engine,
                "WSBROADCAST_TEST_TOLD": str(self._told),
                "WSBROADCAST_TEST_PACE": str(self.pace),
                "WSBROADCAST_TEST_PRESENCE": json.dumps(
                    {"grace": grace * self.pace, "by": by, "members_up_to": 100_000}
                ),
                "WSBROADCAST_TEST_DRAIN": json.dumps(drain),
            },
        )
        server = Server(flavour, self.directory / f"server-{next(self._numbers)}.log", APP)
        self.servers.append(self._stack.enter_context(server))
        return server

    async def start_several(self, number: int, **options: Any) -> list[Server]:
        """Start nodes at the same time, which takes as long as it takes the machine's processors."""
        return await asyncio.gather(*(asyncio.to_thread(lambda: self.start(**options)) for _ in range(number)))

    def told(self, channel: str = "news") -> list[str]:
        """Return what hooks were told of a channel, in the order in which they were told."""
        lines = [json.loads(line) for line in self._told.read_bytes().splitlines()]
        return [f"{line['user']} {line['what']}" for line in lines if line["channel"] == channel]

    async def are_told(self, *lines: str, channel: str = "news", timeout: float = 5.0) -> None:
        """Wait until hooks were told as much, and nothing else."""
        await self.are_told_at_least(*lines, channel=channel, timeout=timeout)
        assert Counter(self.told(channel)) == Counter(lines)

    async def are_told_at_least(self, *lines: str, channel: str = "news", timeout: float = 5.0) -> None:
        """Wait until hooks were told this: they are told behind what a server answers."""

        async def as_much() -> bool:
            return Counter(lines) <= Counter(self.told(channel))

        try:
            await eventually(as_much, timeout)
        except AssertionError:
            raise AssertionError(f"{Counter(lines)} isn't in {Counter(self.told(channel))}") from None

    async def there(self, users: Iterable[str], *servers: Server, timeout: float = 5.0) -> None:
        """Wait until all these servers say that exactly these users are there."""
        wanted = set(users)
        found: dict[int, Any] = {}

        async def agree() -> bool:
            for number, server in enumerate(servers):
                there = await members(server)
                found[number] = {"nobody knows"} if there is None else set(there)
            return all(each == wanted for each in found.values())

        try:
            await eventually(agree, timeout)
        except AssertionError:
            differences = [(sorted(each - wanted)[:9], sorted(wanted - each)[:9]) for each in found.values()]
            raise AssertionError(f"too many, too few: {differences}") from None

    def complaints(self) -> list[str]:
        """Return what the servers have written that says something went wrong, but for brokers that were away."""
        return [
            line
            for server in self.servers
            for line in (*server.complaints(), *(each for each in server.log().splitlines() if "envelope" in each))
        ]


async def members(server: Server, channel: str = "news") -> dict[str, Any] | None:
    """Return who is there, with their infos; `None` while the broker is away."""
    found: dict[str, Any] | None = (await server.get(f"/presence?{urlencode({'channel': channel})}"))["members"]
    return found


def path(user: str | None, channel: str = "news", **more: str) -> str:
    return "/ws?" + urlencode({"channel": channel} | ({} if user is None else {"user": user}) | more)


async def come(server: Server, user: str | None, channel: str = "news", **more: str) -> ClientConnection:
    return await connect(server.url(path(user, channel, **more)), compression=None, ping_interval=None, open_timeout=30)


@asynccontextmanager
async def crowd(places: Iterable[tuple[Server, str]]) -> AsyncIterator[list[ClientConnection]]:
    """Users at servers, connected inside the block."""
    links: list[ClientConnection] = []
    try:
        for server, user in places:
            links.append(await come(server, user))
        yield links
    finally:
        for link in links:
            link.transport.abort()


def _with_prefix(url: str, prefix: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}prefix={prefix}"


def engine_of(kind: str, request: pytest.FixtureRequest) -> str:
    if kind == "sqlite":
        return f"sqlite:///{request.getfixturevalue('tmp_path') / 'messages.db'}"
    endpoint: Endpoint = request.getfixturevalue("jetstream" if kind == "nats" else f"{kind}_server")
    return _with_prefix(endpoint.url, request.getfixturevalue("prefix"))


@pytest.fixture(scope="module")
def jetstream() -> Iterator[Endpoint]:
    """A NATS with JetStream that many tests share."""
    with _jetstream() as server:
        yield server


@pytest.fixture
def own_jetstream() -> Iterator[Callable[[], JetStreamServer]]:
    """Start one for this test alone."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(_jetstream())


def _jetstream() -> JetStreamServer:
    try:
        return JetStreamServer()
    except BrokerMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=ENGINES)
def town(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Town]:
    with Town(tmp_path, engine_of(request.param, request)) as town:
        yield town


# One user in many places.


async def test_one_user_in_three_tabs_on_two_nodes_joins_and_leaves_once(town: Town) -> None:
    one, two = await town.start_several(2, grace=0.5)
    async with crowd([(one, "ann"), (two, "ann"), (one, "ann"), (two, "bob")]) as tabs:
        await town.there({"ann", "bob"}, one, two)
        assert (await one.get("/user?user=ann")) == {"channels": ["news"], "is_online": True}
        for tab in tabs[:2]:
            tab.transport.abort()
        await town.there({"ann", "bob"}, one, two)
        tabs[2].transport.abort()
        await town.there({"bob"}, one, two)
        await town.are_told("ann joined", "bob joined", "ann left")
        assert (await two.get("/user?user=ann")) == {"channels": [], "is_online": False}
    assert town.complaints() == []


async def test_reload_within_the_grace_also_at_another_node_is_not_told(town: Town) -> None:
    one, two = await town.start_several(2)
    async with crowd([(one, "ann"), (two, "bob")]) as tabs:
        await town.there({"ann", "bob"}, one, two)
        for server in (one, two, one, two):
            tabs[0].transport.abort()
            tabs[0] = await come(server, "ann")
            assert set(await members(server) or ()) == {"ann", "bob"}
        tabs[0].transport.abort()
        await town.there({"bob"}, one, two, timeout=10 * PACE + SLACK)
        await town.are_told("ann joined", "bob joined", "ann left")
    assert town.complaints() == []


async def test_what_an_app_asks_knows_who_has_come_to_this_node_just_now(town: Town) -> None:
    one = town.start()
    async with crowd([]) as tabs:
        for number in range(30):
            tabs.append(await come(one, f"user {number}"))
            await one.get("/health")  # the endpoint runs behind the handshake
            await town.there({f"user {each}" for each in range(number + 1)}, one)
            assert await one.post("/broadcast?channel=news") == number + 1


# Two workers behind one port, and a file.


async def test_two_workers_at_a_file_know_the_same_and_tell_it_once(tmp_path: Path) -> None:
    with Town(tmp_path, f"sqlite:///{tmp_path / 'messages.db'}") as town:
        server = town.start(workers=2, grace=0.5)
        names = {f"user {number}" for number in range(20)}
        async with crowd([(server, name) for name in sorted(names)] * 2) as tabs:
            asked: set[int] = set()

            async def both_know() -> bool:
                found = await server.get("/presence?channel=news")
                if set(found["members"]) == names:
                    asked.add(found["pid"])
                return len(asked) == 2

            await eventually(both_know, 20)
            for tab in tabs:
                tab.transport.abort()
            await town.there([], server, timeout=10)
        await town.are_told(*(f"{name} {what}" for name in names for what in ("joined", "left")))
        assert town.complaints() == []


# Nodes that die, freeze, and are replaced.


async def test_users_of_a_process_that_is_killed_are_gone_in_time_and_told_once(town: Town) -> None:
    dead, *others = await town.start_several(3)
    names = {f"user {number}" for number in range(20)}
    async with crowd([(dead, name) for name in sorted(names)] + [(others[0], "user 0"), (others[1], "bob")]):
        await town.there(names | {"bob"}, dead, *others)
        dead.kill()
        await town.there({"user 0", "bob"}, *others, timeout=GONE * town.pace + SLACK)
        await town.are_told(
            *(f"{name} joined" for name in (*names, "bob")), *(f"{name} left" for name in names - {"user 0"})
        )
    assert town.complaints() == []


async def test_that_a_process_was_killed_is_told_also_where_nobody_is(town: Town) -> None:
    dead, _ = await town.start_several(2)
    async with crowd([(dead, "ann")]):
        await town.there({"ann"}, dead)
        dead.kill()
        await town.are_told("ann joined", "ann left", timeout=GONE * town.pace + SLACK)


async def test_process_that_was_frozen_leaves_no_ghost_and_comes_back_once(town: Town) -> None:
    frozen, other = await town.start_several(2, grace=1.0)
    async with crowd([(frozen, "ann"), (frozen, "cid"), (other, "bob")]) as tabs:
        await town.there({"ann", "bob", "cid"}, frozen, other)
        frozen.process.send_signal(signal.SIGSTOP)
        try:
            await town.there({"bob"}, other, timeout=GONE * town.pace + SLACK)
            tabs[1].transport.abort()  # who is gone meanwhile doesn't come back
        finally:
            frozen.process.send_signal(signal.SIGCONT)
        joined = [f"{name} joined" for name in ("ann", "bob", "cid")]
        await town.there({"ann", "bob"}, frozen, other, timeout=5 * town.pace + SLACK)
        told = [*joined, "ann left", "cid left", "ann joined"]
        await town.are_told_at_least(*told)
        tabs[0].transport.abort()
        await town.there({"bob"}, frozen, other, timeout=1 * town.pace + SLACK)
        await town.are_told_at_least(*told, "ann left")
        more = Counter(town.told()) - Counter([*told, "ann left"])
        assert more in (Counter(), Counter({"cid joined": 1, "cid left": 1}))
    assert town.complaints() == []


@dataclass
class Visitor:
    """A client that comes back at once, wherever it is sent to."""

    user: str
    server: Server
    is_connected: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, servers: list[Server]) -> None:
        while True:
            with suppress(OSError, EOFError, ConnectionClosed, Exception):
                async with await come(self.server, self.user) as link:
                    self.is_connected.set()
                    await link.wait_closed()
            self.is_connected.clear()
            self.server = random.choice(servers)
            await asyncio.sleep(0.01)


async def test_nobody_is_told_of_a_deploy_of_all_nodes_one_by_one(town: Town) -> None:
    serving = await town.start_several(3)
    names = sorted(f"user {number}" for number in range(30))
    visitors = [Visitor(name, serving[number % 3]) for number, name in enumerate(names)]
    tasks = [asyncio.create_task(visitor.run(serving)) for visitor in visitors]
    try:
        await town.there(names, *serving, timeout=10)
        for _ in range(3):
            leaving = serving.pop(0)
            serving.append(await asyncio.to_thread(town.start))
            await leaving.stopped(timeout=20)
            await asyncio.gather(*(visitor.is_connected.wait() for visitor in visitors))
            await town.there(names, *serving)
        # Longer than what the nodes that have ended hold.
        marks = [await come(serving[0], "mark")]
        await town.there([*names, "mark"], *serving)
        marks[0].transport.abort()
        await town.there(names, *serving, timeout=GONE * town.pace + SLACK)
        await town.are_told(*(f"{name} joined" for name in (*names, "mark")), "mark left")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert town.complaints() == []


@pytest.mark.parametrize("kind", ["redis", "postgres", "nats"])
async def test_step_of_which_nobody_knows_whether_it_was_made_counts_once(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    engine = engine_of(kind, request)
    # At full pace, so that the lease holds until the node has seen that it hears nothing.
    with Town(tmp_path, engine, pace=1.0) as town:
        async with FaultProxy(Endpoint(engine)) as proxy:
            one, two = town.start(engine=proxy.url, grace=0.3), town.start(grace=0.3)
            async with crowd([(one, "ann"), (one, "bob"), (one, "cid")]) as tabs:
                tabs.append(await come(one, "dan", "room"))
                await town.there({"ann", "bob", "cid"}, one, two)
                await eventually(lambda: _has(two, "room", ["dan"]))
                proxy.drop_replies()
                tabs[0].transport.abort()
                await one.post("/subscribe?user=bob&channel=room")
                await eventually(lambda: _waits_for_answers(one, 2), 10)
                proxy.heal()
                await town.there({"bob", "cid"}, one, two, timeout=10)
                assert await _has(one, "room", ["bob", "dan"])
                await town.are_told_at_least("ann joined", "bob joined", "cid joined")
                await town.are_told_at_least("dan joined", channel="room")
                told = Counter([*town.told(), *(f"{line} room" for line in town.told("room"))])
                assert told.pop("ann left", 0) <= 1
                assert told.pop("bob joined room", 0) <= 1
                assert told == Counter(["ann joined", "bob joined", "cid joined", "dan joined room"])
                tabs[1].transport.abort()
                await town.there({"cid"}, one, two)
                await eventually(lambda: _has(two, "room", ["dan"]))
                await town.are_told_at_least("bob left", channel="room")
                assert Counter(town.told("room"))["bob left"] == 1
        assert town.complaints() == []


async def _waits_for_answers(server: Server, channels: int) -> bool:
    return bool((await server.get("/left_over"))["_unknown"] >= channels)


# Brokers that are away for a moment.


def _remove(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()


@pytest.fixture(
    params=["redis that keeps", "redis that forgets", "postgres that keeps", "postgres that crashes", "sqlite", "nats"]
)
def restarted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Callable[[], object], bool]:
    """An engine's URL, what restarts its broker, and whether that remembers who was there."""
    kind, _, how = request.param.partition(" that ")
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'messages.db'}", lambda: _remove(tmp_path / "messages.db"), False
    if kind == "nats":
        return (nats := request.getfixturevalue("own_jetstream")()).url, nats.restart, False
    if kind == "redis":
        config = {} if how == "keeps" else {"appendonly": "no"}
        return (redis := request.getfixturevalue("own_redis")(config=config)).url, redis.restart, how == "keeps"
    postgres: PostgresServer = request.getfixturevalue("own_postgres")()

    def crash() -> None:
        postgres.kill()
        postgres.start()

    return postgres.url, postgres.restart if how == "keeps" else crash, how == "keeps"


async def test_after_a_restart_of_the_broker_all_is_right_within_a_lease(
    restarted: tuple[str, Callable[[], object], bool], tmp_path: Path
) -> None:
    url, restart, keeps = restarted
    with Town(tmp_path, url) as town:
        one, two = await town.start_several(2, grace=1.0)
        async with crowd([(one, "ann"), (two, "ann"), (two, "bob"), (one, "cid")]) as tabs:
            await town.there({"ann", "bob", "cid"}, one, two)
            watcher = Watcher(await come(one, None, watches="1"))
            await watcher.sees({"ann", "bob", "cid"})
            restarting = asyncio.create_task(asyncio.to_thread(restart))
            tabs[3].transport.abort()
            tabs.append(await come_in_the_end(two, "dan"))
            await restarting
            tabs.append(await come_in_the_end(one, "eve"))
            await town.there({"ann", "bob", "dan", "eve"}, one, two, timeout=10 * town.pace + SLACK)
            await watcher.sees({"ann", "bob", "dan", "eve"})
            told = Counter(town.told())
            assert not {"ann left", "bob left", "dan left", "eve left"} & set(told)
            if keeps:
                await town.are_told(*(f"{name} joined" for name in ("ann", "bob", "cid", "dan", "eve")), "cid left")
        assert town.complaints() == []


async def come_in_the_end(server: Server, user: str) -> ClientConnection:
    """Come to a server whose broker may be away, which is not to be waited for in each try."""
    while True:
        with suppress(OSError, EOFError, TimeoutError, WebSocketException):
            return await come(server, user)
        await asyncio.sleep(0.05)


class Watcher:
    """A client that is told who is there: a list, then what changes."""

    def __init__(self, link: ClientConnection) -> None:
        self.link = link
        self.version = 0
        self.members: dict[str, Any] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with suppress(ConnectionClosed):
            async for text in self.link:
                self._take(json.loads(text))

    def _take(self, said: dict[str, Any]) -> None:
        if "previous" in said:
            assert said["previous"] == self.version, "a hole"
            for user in said["left"]:
                del self.members[user]
            self.members |= {each["user"]: each["info"] for each in said["joined"]}
        else:
            self.members = {each["user"]: each["info"] for each in said["members"]}
        self.version = said["version"]

    async def sees(self, users: Iterable[str], timeout: float = 5.0) -> None:
        """Wait until all that it was told comes to this."""
        wanted = set(users)

        async def agrees() -> bool:
            if self._reading.done():
                self._reading.result()
            return set(self.members) == wanted

        await eventually(agrees, timeout)


# What may happen, by chance.


@dataclass
class Place:
    """A node, and how it reaches its broker."""

    server: Server
    proxy: FaultProxy | None
    only: str
    """A user who is only here."""
    is_reachable: bool = True
    is_calm: bool = True
    """Whether clients may come."""
    is_left_alone: bool = False
    """Whether none may go: who comes and goes in the moment in which a node is lost may not be told to hooks."""
    watcher: Watcher | None = None


@dataclass
class Tab:
    user: str
    place: Place
    link: ClientConnection


CHANCES = {"come": 50, "lose": 25, "close": 10, "intend": 3}


class Story:
    """Users with tabs at three nodes, and what happens to both."""

    def __init__(self, town: Town, seed: int, crowd: int) -> None:
        self.town = town
        self._chance = random.Random(seed)
        self._crowd = crowd
        self.places: list[Place] = []
        self.tabs: list[Tab] = []
        self._numbers = count()
        self._proxies = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(self.open() for _ in range(3)))
        return self

    async def __aexit__(self, *error: object) -> None:
        for tab in self.tabs:
            tab.link.transport.abort()
        for place in self.places:
            place.server.process.send_signal(signal.SIGCONT)
        await self._proxies.aclose()

    async def open(self) -> None:
        """Start one more node, with one user, and one who watches."""
        proxy, engine = None, self.town.engine
        if not engine.startswith("sqlite"):
            proxy = await self._proxies.enter_async_context(FaultProxy(Endpoint(engine)))
            engine = proxy.url
        server = await asyncio.to_thread(lambda: self.town.start(engine=engine, grace=2.0))
        place = Place(server, proxy, f"only {next(self._numbers)}")
        place.watcher = Watcher(await come(server, None, watches="1"))
        self.tabs.append(Tab(place.only, place, await come(server, place.only)))
        self.places.append(place)

    async def step(self) -> None:
        """Let something happen to somebody."""
        calm = [place for place in self.places if place.is_calm]
        left_alone = {tab.user for tab in self.tabs if tab.place.is_left_alone}  # who is closed is so everywhere
        loose = [tab for tab in self.tabs if tab.user.startswith("user ") and tab.user not in left_alone]
        what = self._chance.choices(list(CHANCES), list(CHANCES.values()))[0]
        if what == "come" or not loose:
            user, place = f"user {self._chance.randrange(self._crowd)}", self._chance.choice(calm)
            with suppress(OSError, EOFError, TimeoutError, WebSocketException):  # the node may just be killed
                self.tabs.append(Tab(user, place, await come(place.server, user)))
            return
        tab = self._chance.choice(loose)
        if what == "intend":
            await self._chance.choice(calm).server.post(f"/close_user?{urlencode({'user': tab.user})}")
        elif what == "lose" or not tab.place.is_calm:
            tab.link.transport.abort()
            self.tabs.remove(tab)
        else:
            await tab.link.close()
            self.tabs.remove(tab)

    async def happen(self, what: str, place: Place) -> None:
        """Freeze, cut off or kill a node, until others see it."""
        place.is_calm, place.is_left_alone = False, True
        await eventually(lambda: self._is_quiet(place), 5 * self.town.pace + 2 * SLACK)
        place.is_left_alone = False
        if what == "freeze":
            place.server.process.send_signal(signal.SIGSTOP)
        elif what == "cut":
            assert place.proxy is not None
            place.proxy.black_hole()
        else:
            place.is_reachable = False
            self.places.remove(place)
            place.server.kill()
        try:
            await self._is_gone(place)
        finally:
            if what == "freeze":
                place.server.process.send_signal(signal.SIGCONT)
            elif place.proxy is not None and what == "cut":
                place.proxy.heal()
            place.is_calm = place.is_reachable
        if what == "kill":
            await self.open()

    async def _is_quiet(self, place: Place) -> bool:
        there = {tab.user for tab in self.tabs if tab.place is place and tab.link.state is State.OPEN}
        left = await place.server.get("/left_over")
        is_busy = any(left[kind] for kind in ("_dirty", "_graces", "_untold", "_agreeing"))
        return not is_busy and there <= {*replayed(self.town.told())}

    async def _is_gone(self, place: Place) -> None:
        async def is_gone() -> bool:
            calm = [each for each in self.places if each.is_calm]
            found = await members(calm[0].server) if calm else None
            return found is not None and place.only not in found

        await eventually(is_gone, GONE * self.town.pace + 2 * SLACK)

    @property
    def there(self) -> set[str]:
        """Who has an open connection."""
        return {tab.user for tab in self.tabs if tab.link.state is State.OPEN}

    async def settles(self) -> None:
        """Wait until all nodes and all who watch say what is true, and hooks were told what comes to the same."""
        timeout = (GONE + 5.0) * self.town.pace + 2 * SLACK
        servers = [place.server for place in self.places]
        await self.town.there(self.there, *servers, timeout=timeout)
        for place in self.places:
            assert place.watcher is not None
            await place.watcher.sees(self.there, timeout)

        async def are_told() -> bool:
            return replayed(self.town.told()) == dict.fromkeys(self.there, 1)

        try:
            await eventually(are_told)
        except AssertionError:
            pytest.fail(f"{set(replayed(self.town.told()).items()) ^ {(user, 1) for user in self.there}}")


def replayed(lines: Iterable[str]) -> dict[str, int]:
    """Return by user how often it has joined more often than left, as hooks were told, where that isn't 0."""
    times = Counter[str]()
    for line in lines:
        user, _, what = line.rpartition(" ")
        times[user] += 1 if what == "joined" else -1
    return {user: number for user, number in times.items() if number}


@pytest.mark.parametrize("seed", range(3 if FULL else 1))
async def test_all_nodes_know_the_same_whatever_happens(town: Town, seed: int) -> None:
    steps, crowd = (1500, 1000) if FULL else (80, 30)
    is_cut_off = not town.engine.startswith("sqlite")  # nothing is between a process and its file
    async with Story(town, seed, crowd) as story:
        for _ in range(4 * crowd if FULL else crowd):
            await story.step()
        for kinds in [("freeze", "cut"), ("kill",)] if is_cut_off else [("freeze", "kill")]:
            chosen = story.places[: len(kinds)]
            for place in chosen:
                place.is_calm = False  # all of them now: none of these is asked about the other ones
            happening = asyncio.gather(*map(story.happen, kinds, chosen))
            done = 0
            while not happening.done() or done < steps:
                await story.step()
                done += 1
                await asyncio.sleep(0.01)  # else a test of two processors does nothing else
            await happening
        await story.settles()
    assert town.complaints() == []


# What clients and apps may come with.

ODD = [
    "it's",
    '"quoted"',
    "room:1:*",
    "*",
    ">",
    "..",
    "a.b.c",
    "with  spaces",
    "{braces}",
    "back\\slash",
    "%41",
    "🙂👩‍👩‍👧",
    "ünï",
    "x" * 200,
    "é" * 100,
    "-1",
    "null",
    "a/b?c#d",
    "$1; DROP TABLE wsbroadcast_members",
    "\u202eright to left",
]


async def test_odd_names_of_users_and_channels(town: Town) -> None:
    one, two = await town.start_several(2, grace=0.1)
    tabs = [await come(one, name, name) for name in ODD]
    shared = [await come(two, name, "shared") for name in ODD]
    await eventually(lambda: _has(one, "shared", ODD))
    for name in ODD:
        assert await members(two, name) == {name: None}
        found = await two.get(f"/user?{urlencode({'user': name})}")
        assert found == {"channels": sorted({name, "shared"}), "is_online": True}
    for tab in (*tabs, *shared):
        tab.transport.abort()
    for name in ODD:
        await eventually(lambda: _has(two, name, []))  # noqa: B023
        await town.are_told(f"{name} joined", f"{name} left", channel=name)
    assert await two.get(f"/user?{urlencode({'user': ODD[0]})}") == {"channels": [], "is_online": False}
    assert town.complaints() == []


async def _has(server: Server, channel: str, users: Iterable[str]) -> bool:
    return set(await members(server, channel) or {}) == set(users)


async def test_each_connection_may_count(town: Town) -> None:
    one, two = await town.start_several(2, grace=0.0, by="connection")
    async with crowd([(one, "ann"), (two, "ann"), (two, "bob")]) as tabs:
        await eventually(lambda: _are(two, 3))
        assert (await one.get("/user?user=ann")) == {"channels": ["news"], "is_online": True}
        tabs[0].transport.abort()
        await eventually(lambda: _are(two, 2))
        assert (await one.get("/user?user=ann")) == {"channels": ["news"], "is_online": True}
        tabs[1].transport.abort()
        await eventually(lambda: _are(one, 1))

        async def is_nowhere() -> bool:
            return bool(await one.get("/user?user=ann") == {"channels": [], "is_online": False})

        await eventually(is_nowhere)
    assert town.complaints() == []


async def _are(server: Server, number: int) -> bool:
    return len(await members(server) or ()) == number


async def test_info_that_is_too_large_is_not_shown(town: Town) -> None:
    (one,) = await town.start_several(1)
    async with crowd([(one, "bob")]) as tabs:
        tabs += [await come(one, "ann", info="huge"), await come(one, "cid", info="painter")]
        await town.there({"ann", "bob", "cid"}, one)
        assert await members(one) == {"ann": None, "bob": None, "cid": "painter"}
    assert "Presence.info failed, so a member has no info: it has 1000002 bytes" in one.log()


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize(("length", "crowd"), [(500, 600), (30_000, 150)])
async def test_what_is_seen_of_many_fits_into_what_a_broker_takes(
    kind: str, length: int, crowd: int, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    engine, presence = engine_of(kind, request), Presence(info=lambda _: "é" * length, max_info_bytes=65_536)
    async with ConnectionManager(engine, presence=presence) as one, ConnectionManager(engine, presence=presence) as two:
        names = {f"user {number}" for number in range(crowd)}
        watcher = await one.connect(Peer().websocket, channels=["news"])
        here, there = core_of(one).life.node.presence, core_of(two).life.node.presence
        assert here is not None
        assert there is not None
        await core_of(one).watch(watcher, "news")
        async with there._agreeing:  # so that all come in one step
            for name in names:
                await two.connect(Peer().websocket, user=name, channels=["news"])

        async def has_come() -> bool:
            return len(here.watches._watches["news"].members) == 1 + crowd

        await eventually(has_come, 20)
        assert {member.info for member in await one.presence("news")} == {"é" * length}
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


FLAPPING = 100_000 if FULL else 500


async def test_nothing_is_left_of_channels_that_flap_and_of_who_has_gone(town: Town) -> None:
    one, two = await town.start_several(2, grace=0.1)
    async with crowd([(one, "ann"), (two, "bob")]) as tabs:
        await town.there({"ann", "bob"}, one, two)
        for first in range(0, FLAPPING, FLAPPING // 10):
            await one.post(f"/flap?first={first}&count={FLAPPING // 10}")
        await eventually(lambda: _holds(one, 2), 60)  # the channel and all who are online
        assert (await one.get("/user?user=ann"))["channels"] == ["news"]
        for tab in tabs:
            tab.transport.abort()
        await town.there([], one, two)
        await eventually(lambda: _holds(one, 0))
    for server in (one, two):
        await server.stopped(20)
    assert town.complaints() == []
    if not town.engine.startswith("nats"):
        left = await (_left_in_redis if town.engine.startswith("redis") else _left_in_tables)(town.engine)
        # Of the channels remain their versions, for ten minutes.
        assert {kind: number for kind, number in left.items() if kind not in ("versions", "leases")} == {}
        assert left["versions"] <= FLAPPING + 3
        assert left["leases"] <= 2


async def _holds(server: Server, channels: int) -> bool:
    left = await server.get("/left_over")
    return bool(left["_here"] == channels and not left["_dirty"] and not left["_graces"] and not left["_unknown"])


async def _left_in_redis(url: str) -> Counter[str]:
    import redis.asyncio

    left = Counter[str]()
    prefix = url.partition("prefix=")[2]
    async with redis.asyncio.Redis.from_url(url.partition("?")[0]) as client:
        async for key in client.scan_iter(match=f"{prefix}:*", count=1000):
            kind = key.decode().split(":")[1]
            kind = {"state": "versions"}.get(kind, kind)
            left[kind] += await client.zcard(key) if kind == "leases" else 1
            assert 0 < await client.pttl(key) <= (90_000_000 if kind == "leases" else 600_000)
    return left


async def _left_in_tables(url: str) -> Counter[str]:
    names = {"members": "members", "holdings": "holdings", "leases": "leases", "channels": "versions"}
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            counts = {
                name: database.execute(f"SELECT count(*) FROM wsbroadcast_{name}").fetchone()[0] for name in names
            }
            forgotten = "SELECT count(*), max(forget_at) FROM wsbroadcast_channels WHERE size = 0"
            number, last = database.execute(forgotten).fetchone()
            assert last < time.time() + 600
    else:
        prefix = url.partition("prefix=")[2]
        connection = await asyncpg.connect(url.partition("?")[0])
        try:
            table = f"{prefix}_presence_"
            counts = {name: await connection.fetchval(f"SELECT count(*) FROM {table}{name}") for name in names}
            number = await connection.fetchval(
                f"SELECT count(*) FROM {table}channels WHERE size = 0 AND forget_at < now() + interval '10 min'"
            )
        finally:
            await connection.close()
    assert number == counts["channels"]
    return +Counter({names[name]: count for name, count in counts.items()})
