"""Who is in which channel, in SQLite and in Postgres: chance, crowds, crashes, and what others do to the tables."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import asyncpg
import pytest

from tests.support.brokers import Endpoint, PostgresServer
from tests.support.postgres import drop_database, holding
from tests.support.servers import eventually
from tests.support.strict import STRICT
from wsbroadcast import Audience, EngineUnavailable, Message, Publication
from wsbroadcast.engines.broker import DEFAULT_TIMING
from wsbroadcast.engines.broker.envelope import encode
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.broker.presence import PresentEngine
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.engines.sqlite.presence import SWEPT_MEMBERS, Attendance
from wsbroadcast.engines.sqlite.store import Store
from wsbroadcast.options import Timing
from wsbroadcast.presence import Roll
from wsbroadcast.publication import PresenceChange
from wsbroadcast.testing import Recorder

Own = Callable[..., PostgresServer]

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))
STEPS = 4000 if FULL else 300
CHANNELS = [f"room {number}" for number in range(5)]
NAMES = [f"user {number}" for number in range(12)]
LONG = 600.0


class Present(NamedTuple):
    """A node that holds a lease, and has joined all channels."""

    engine: PresentEngine
    recorder: Recorder

    def changes(self, channel: str) -> list[PresenceChange]:
        found = [each for each in self.recorder.controls if isinstance(each, PresenceChange)]
        return [each for each in found if each.audience.name == channel]


class World:
    """A file or a database, those at it, and what somebody does to it who isn't one of them."""

    tables: ClassVar[Sequence[str]] = ("leases", "channels", "members", "holdings")
    never: ClassVar[str]
    """A moment before every other, as SQL has it."""

    def make(self) -> PresentEngine:
        """Return an engine that isn't started."""
        raise NotImplementedError

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        """Run SQL, with `{leases}` for the name of that table."""
        raise NotImplementedError

    @asynccontextmanager
    async def nodes(self, count: int, seconds: float = LONG) -> AsyncIterator[list[Present]]:
        async with asyncio.timeout(240), AsyncExitStack() as stack:
            yield [await self.node(stack, seconds) for _ in range(count)]

    async def node(self, stack: AsyncExitStack, seconds: float = LONG) -> Present:
        """Start one more."""
        node = Present(self.make(), Recorder())
        await node.engine.start(node.recorder)
        stack.push_async_callback(node.engine.aclose)
        audiences = [Audience("channel", channel) for channel in CHANNELS]
        node.engine.subscribe(audiences)
        await node.engine.confirmed(audiences)
        if seconds:
            assert not await node.engine.renew(seconds)
        return node

    async def expire(self, incarnation: str) -> None:
        """Let a lease run out."""
        await self.run(f"UPDATE {{leases}} SET until = {self.never} WHERE incarnation = '{incarnation}'")

    async def check(self) -> None:
        """Compare what is counted in the tables with what they have."""
        wrong = await self.run(
            "SELECT m.member, m.holders, count(h.lease) FROM {members} AS m LEFT JOIN {holdings} AS h "
            "ON h.channel = m.channel AND h.member = m.member GROUP BY m.channel, m.member, m.holders "
            "HAVING m.holders <> count(h.lease)"
        )
        wrong += await self.run(
            "SELECT c.channel, c.size, count(m.member) FROM {channels} AS c LEFT JOIN {members} AS m "
            "ON m.channel = c.id GROUP BY c.id, c.channel, c.size HAVING c.size <> count(m.member)"
        )
        assert wrong == []

    async def rows(self) -> dict[str, int]:
        """Return how many rows each table has."""
        return {each: (await self.run(f"SELECT count(*) FROM {{{each}}}"))[0][0] for each in self.tables}


class File(World):
    never = "-1"

    def __init__(self, path: Path, timing: Timing = DEFAULT_TIMING) -> None:
        self.path = path
        self.timing = timing

    def make(self) -> PresentEngine:
        return SQLiteEngine(self.path, timing=self.timing)

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        names = {each: f"wsbroadcast_{each}" for each in self.tables}
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            return connection.execute(sql.format(**names)).fetchall()


class Database(World):
    never = "'-infinity'"

    def __init__(self, url: str, prefix: str, **options: Any) -> None:
        self.url = url
        self.prefix = prefix
        self.options = options

    def make(self) -> PresentEngine:
        return PostgresEngine(self.url, prefix=self.prefix, **self.options)

    async def run(self, sql: str) -> list[tuple[Any, ...]]:
        names = {each: f'"{self.prefix}_presence_{each}"' for each in self.tables}
        connection = await asyncpg.connect(self.url)
        try:
            return [tuple(row) for row in await connection.fetch(sql.format(**names))]
        finally:
            await connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "messages.db"


@pytest.fixture
def database(postgres_server: Endpoint, prefix: str) -> Database:
    return Database(postgres_server.url, prefix)


@pytest.fixture(params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest) -> World:
    if request.param == "sqlite":
        return File(request.getfixturevalue("path"))
    found: Database = request.getfixturevalue("database")
    return found


def told(changes: Sequence[PresenceChange]) -> list[tuple[str, int, dict[str, bytes], frozenset[str], str]]:
    return sorted((each.audience.name, each.version, dict(each.joined), each.left, each.by) for each in changes)


async def agree(node: Present, channel: str) -> None:
    """Wait until a node was told what is so, and compare: the versions have no hole, and lead there."""
    found = await node.engine.members(channel)
    assert await node.engine.count(channel) == len(found.members)
    assert await node.recorder.wait_until(lambda: len(node.changes(channel)) >= found.version, 10)
    members: dict[str, bytes] = {}
    for version, change in enumerate(node.changes(channel), 1):
        assert change.version == version
        assert not change.joined.keys() & members.keys()
        assert change.left <= members.keys()
        members |= change.joined
        members = {name: info for name, info in members.items() if name not in change.left}
    assert members.keys() == found.members.keys()


# Chance.


class Chances:
    """Random steps of nodes that come and go, at a world and at a model."""

    def __init__(self, world: World, stack: AsyncExitStack, seed: int) -> None:
        self.world = world
        self.chance = random.Random(seed)  # a seeded test
        self.model = Roll()
        self.nodes: list[Present] = []
        self.dead: set[str] = set()
        self.born: list[str] = []
        self._stack = stack

    async def begin(self) -> None:
        """Begin a node."""
        self.nodes.append(await self.world.node(self._stack))
        self.born.append(self.nodes[-1].engine.incarnation)

    async def step(self) -> None:
        """Do something, and compare what is told of it."""
        node, kind = self.chance.choice(self.nodes), self.chance.random()
        if kind < 0.86:
            for _ in range(self.chance.choice((1, 1, 1, 2))):  # the second time its outcome wasn't known
                await self.change(node)
        elif kind < 0.9:
            await self.die(node)
        elif kind < 0.94:
            await self.freeze(node)
        else:
            await self.sweep()

    async def change(self, node: Present) -> None:
        channel, incarnation = self.chance.choice(CHANNELS), node.engine.incarnation
        some = self.chance.sample(NAMES, self.chance.randint(1, 4))
        if self.chance.random() < 0.55:
            infos = {name: b'"%d"' % self.chance.randint(1, 3) for name in some}
            got, meant = await node.engine.enter(channel, infos), self.model.enter(channel, incarnation, infos)
        else:
            got, meant = await node.engine.leave(channel, some), self.model.leave(channel, incarnation, some)
        assert told([got] if got else []) == told([meant] if meant else [])

    async def die(self, node: Present) -> None:
        """End a node without a word, and begin another one."""
        await self.world.expire(node.engine.incarnation)
        self.dead.add(node.engine.incarnation)
        await node.engine.aclose()
        self.nodes.remove(node)
        await self.begin()

    async def freeze(self, node: Present) -> None:
        """Let a node miss its time, and go on."""
        before = node.engine.incarnation
        await self.world.expire(before)
        self.dead.add(before)
        if self.chance.random() < 0.5:
            assert await node.engine.enter(self.chance.choice(CHANNELS), {"a ghost": b""}) is None
        assert not await node.engine.renew(LONG)
        assert node.engine.incarnation not in self.dead
        self.born.append(node.engine.incarnation)

    async def sweep(self) -> None:
        """Let two sweep at once."""
        swept = await asyncio.gather(*(node.engine.sweep() for node in self.chance.sample(self.nodes, 2)))
        got = [change for changes in swept for change in changes]
        dead = sorted(self.dead, key=self.born.index)  # the oldest lease first
        meant = [change for incarnation in dead for change in self.model.drop(incarnation)]
        assert told(got) == told(meant)
        self.dead.clear()

    async def compare(self) -> None:
        """Compare everything with the model."""
        await self.sweep()
        await self.world.check()
        for node in self.nodes[:2]:
            assert await node.engine.alive() == {each.engine.incarnation for each in self.nodes}
            for channel in CHANNELS:
                assert await node.engine.members(channel) == self.model.members(channel)
            for name in NAMES:
                assert await node.engine.channels_of(name) == self.model.channels_of(name)


@pytest.mark.parametrize("seed", range(2))
async def test_random_steps_with_crashes(world: World, seed: int) -> None:
    async with AsyncExitStack() as stack, asyncio.timeout(240):
        chances = Chances(world, stack, seed)
        watcher = await world.node(stack, 0.0)
        for _ in range(4):
            await chances.begin()
        for _ in range(STEPS // 2):
            await chances.step()
        await chances.compare()
        for channel in CHANNELS:
            await agree(watcher, channel)


async def test_many_nodes_at_once_agree(world: World) -> None:
    """Eight nodes enter and leave many channels at the same time, while two of them die: no deadlock, no hole."""
    chance = random.Random(8)  # a seeded test
    async with world.nodes(8) as nodes:
        said: dict[tuple[str, str, str], bool] = {}

        async def live(node: Present) -> None:
            for _ in range(40):
                channel, some = chance.choice(CHANNELS), chance.sample(NAMES, 4)
                comes = chance.random() < 0.6
                said.update({(node.engine.incarnation, channel, name): comes for name in some})
                await (
                    node.engine.enter(channel, dict.fromkeys(some, b"1")) if comes else node.engine.leave(channel, some)
                )

        await asyncio.gather(*(live(node) for node in nodes))
        for node in nodes[:2]:
            await world.expire(node.engine.incarnation)
        gone = {node.engine.incarnation for node in nodes[:2]}
        await asyncio.gather(*(node.engine.sweep() for node in nodes[2:]), live(nodes[7]))
        await nodes[7].engine.sweep()
        await world.check()
        for channel in CHANNELS:
            there = {name for (by, where, name), is_in in said.items() if is_in and where == channel and by not in gone}
            assert (await nodes[3].engine.members(channel)).members.keys() == there
            for node in nodes[2:]:
                await agree(node, channel)


# Leases and sweeps.


async def test_sweeps_are_bounded_and_each_change_is_made_once(world: World) -> None:
    crowd = [f"user {number}" for number in range(2 * SWEPT_MEMBERS + 200)]
    async with world.nodes(3) as (dead, *others):
        await dead.engine.enter(CHANNELS[0], dict.fromkeys(crowd[:-150], b""))
        await dead.engine.enter(CHANNELS[1], dict.fromkeys(crowd[-150:], b""))
        await others[0].engine.enter(CHANNELS[0], {crowd[0]: b""})
        await world.expire(dead.engine.incarnation)
        left: list[str] = []
        while swept := await asyncio.gather(*(node.engine.sweep() for node in others)):
            some = [name for changes in swept for change in changes for name in change.left]
            assert len(some) <= len(others) * SWEPT_MEMBERS
            assert {change.by for changes in swept for change in changes} <= {dead.engine.incarnation}
            left += some
            if not some:
                break
        assert sorted(left) == sorted(crowd[1:])
        assert await world.rows() == {"leases": 2, "channels": 2, "members": 1, "holdings": 1}
        await agree(others[1], CHANNELS[0])


@pytest.mark.parametrize("lost", [["leases"], ["leases", "members", "holdings"], list(World.tables)])
async def test_lease_that_is_lost_is_not_taken_again(world: World, lost: list[str]) -> None:
    async with world.nodes(2) as (node, other):
        await node.engine.enter(CHANNELS[0], {"ann": b""})
        before = node.engine.incarnation
        for table in lost:
            await world.run(f"DELETE FROM {{{table}}}")
        assert await node.engine.enter(CHANNELS[0], {"bob": b""}) is None
        assert not await node.engine.renew(LONG)
        assert node.engine.incarnation != before
        await other.engine.sweep()
        assert (await other.engine.members(CHANNELS[0])).members == {}
        assert await node.engine.enter(CHANNELS[0], {"ann": b""}) is not None
        assert (await other.engine.members(CHANNELS[0])).members == {"ann": b""}
        assert await node.engine.renew(LONG)


async def test_tables_that_are_taken_away_are_made_anew(world: World) -> None:
    async with world.nodes(2) as (node, other):
        before = node.engine.incarnation
        await node.engine.enter(CHANNELS[0], {"ann": b""})
        for table in world.tables:
            await world.run(f"DROP TABLE {{{table}}} {'CASCADE' if isinstance(world, Database) else ''}")
        if isinstance(world, File):  # it says so once
            with pytest.raises(EngineUnavailable, match="no such table"):
                await node.engine.renew(LONG)
        assert not await node.engine.renew(LONG)
        assert await other.engine.members(CHANNELS[0]) == (0, {})
        assert node.engine.incarnation != before
        assert await node.engine.enter(CHANNELS[0], {"ann": b""}) is not None
        assert (await other.engine.members(CHANNELS[0])).members == {"ann": b""}


async def test_who_says_nothing_leaves_no_table(world: World) -> None:
    async with world.nodes(1, 0.0) as (node,):
        await node.engine.publish(Publication(Message.of("x"), Audience("channel", CHANNELS[0])))
        sql = "SELECT relname FROM pg_class" if isinstance(world, Database) else "SELECT name FROM sqlite_master"
        found = [name for (name,) in await world.run(sql)]
        start = f"{world.prefix}_presence" if isinstance(world, Database) else "wsbroadcast_leases"
        assert [name for name in found if name.startswith(start)] == []
        assert not await node.engine.renew(LONG)  # later than the file or the schema was made
        assert [name for name in found if name.startswith(start)] != await world.run(sql)


async def test_nodes_that_begin_at_once_make_the_tables_once(world: World) -> None:
    async with world.nodes(6, 0.0) as nodes:
        assert await asyncio.gather(*(node.engine.renew(LONG) for node in nodes)) == [False] * len(nodes)
        assert await nodes[0].engine.alive() == {node.engine.incarnation for node in nodes}
        await asyncio.gather(*(node.engine.enter(CHANNELS[0], {"ann": b""}) for node in nodes))
        for node in nodes:
            await agree(node, CHANNELS[0])


async def test_empty_channels_are_forgotten_in_the_end(world: World) -> None:
    async with world.nodes(1) as (node,):
        for channel in CHANNELS:
            await node.engine.enter(channel, {"ann": b""})
        for channel in CHANNELS[1:]:
            await node.engine.leave(channel, ["ann"])
        await node.engine.sweep()
        assert (await world.rows())["channels"] == len(CHANNELS)
        assert (await node.engine.members(CHANNELS[1])).version == 2
        past = "'-infinity'" if isinstance(world, Database) else "1"
        await world.run(f"UPDATE {{channels}} SET forget_at = {past} WHERE forget_at IS NOT NULL")
        await node.engine.sweep()
        assert (await world.rows())["channels"] == 1
        assert (await node.engine.members(CHANNELS[1])).version == 0


# A file.

_NODE = """
import asyncio, os, sys, threading
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.testing import Recorder

class Engine(SQLiteEngine):
    fatal = None
    def _pack(self, change):  # in the transaction
        if self.fatal is not None:
            print("in the transaction", flush=True)
            os.kill(os.getpid(), self.fatal)
            threading.Event().wait()  # a signal may take a moment
        return super()._pack(change)

async def main():
    engine = Engine(sys.argv[1])
    await engine.start(Recorder())
    await engine.renew(600.0)
    await engine.enter("room 0", {f"{os.getpid()} {number}": b"" for number in range(20)})
    await engine.enter("room 0", {"both": b""})
    engine.fatal = int(sys.argv[2])
    print(engine.incarnation, flush=True)
    await engine.enter("room 0", {f"never {number}": b"" for number in range(20)})

asyncio.run(main())
"""


def started(path: Path, fatal: signal.Signals) -> subprocess.Popen[str]:
    command = [*STRICT, "-c", _NODE, os.fspath(path), str(int(fatal))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@asynccontextmanager
async def in_transaction(path: Path, fatal: signal.Signals) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """A process that was killed or stopped in a transaction, and its incarnation."""
    with started(path, fatal) as process:
        try:
            assert process.stdout is not None
            incarnation = (await asyncio.to_thread(process.stdout.readline)).strip()
            assert await asyncio.to_thread(process.stdout.readline) == "in the transaction\n"
            yield process, incarnation
        finally:
            process.kill()


async def test_who_is_killed_in_a_transaction_leaves_no_half_step(path: Path) -> None:
    world = File(path)
    async with world.nodes(2) as (node, other):
        await node.engine.enter(CHANNELS[0], {"both": b""})
        for _ in range(3):
            async with in_transaction(path, signal.SIGKILL) as (process, incarnation):
                assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
                await world.check()
                assert await node.engine.count(CHANNELS[0]) == 21
                assert incarnation in await other.engine.alive()
                await world.expire(incarnation)
                (change,) = await other.engine.sweep()
                assert change.left == {f"{process.pid} {number}" for number in range(20)}
        assert (await node.engine.members(CHANNELS[0])).members == {"both": b""}
        for each in (node, other):
            await agree(each, CHANNELS[0])


async def test_others_fail_in_time_while_a_process_is_stopped_in_a_transaction(path: Path) -> None:
    # No echo, which would fail as well, and end the link.
    async with File(path, Timing(probe_interval=60)).nodes(2) as (node, other):
        async with in_transaction(path, signal.SIGSTOP) as (process, incarnation):
            steps: list[Callable[[], Awaitable[object]]] = [
                lambda: node.engine.enter(CHANNELS[0], {"ann": b""}),
                lambda: node.engine.renew(LONG),
                lambda: node.engine.leave(CHANNELS[0], ["ann"]),
            ]
            for step in steps:
                began = time.monotonic()
                with pytest.raises(EngineUnavailable):
                    await step()
                assert time.monotonic() - began < 2.5
            assert await other.engine.count(CHANNELS[0]) == 21  # who reads goes on
            process.kill()
            await asyncio.to_thread(process.wait)
            assert incarnation in await other.engine.alive()
        assert await node.engine.renew(LONG)
        assert await node.engine.enter(CHANNELS[0], {"ann": b""}) is not None
        await File(path).check()


async def test_replaced_file_ends_the_lease(path: Path) -> None:
    async with File(path).nodes(1) as (node,):
        before = node.engine.incarnation
        await node.engine.enter(CHANNELS[0], {"ann": b""})
        for each in path.parent.glob(f"{path.name}*"):
            if each.is_file():
                each.unlink()
        assert await node.recorder.wait_until(lambda: node.recorder.gaps, 5)

        async def is_another() -> bool:
            try:
                return not await node.engine.renew(LONG)
            except EngineUnavailable:
                return False

        await eventually(is_another)
        assert node.engine.incarnation != before
        assert await node.engine.members(CHANNELS[0]) == (0, {})


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, 1.0)
    store.open_to_write()
    yield store
    store.close()


def pack(change: PresenceChange) -> Parcel:
    return Parcel(f"wsbroadcast:channel:{change.audience.name}", encode(change, None))


def attendance(store: Store, prefix: str = "wsbroadcast", **options: Any) -> Attendance:
    found = Attendance(store, prefix, pack, **options)
    found.make()
    return found


def test_clock_that_is_set_changes_no_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    who = attendance(store)
    assert not who.renew("", "one", 60.0)
    now = time.time()
    for jump in (-7 * 86_400, 7 * 86_400):
        monkeypatch.setattr(time, "time", lambda jump=jump: now + jump)
        assert who.enter("news", "one", {f"ann {jump}": b""}) is not None
        assert who.renew("one", "two", 60.0)
        assert who.sweep() == []
    assert who.alive() == {"one"}


def test_lease_runs_out_and_never_comes_back(store: Store) -> None:
    moment = 1000.0
    who = attendance(store, clock=lambda: moment)
    assert not who.renew("", "one", 10.0)
    assert who.enter("news", "one", {"ann": b""}) is not None
    moment = 1010.0
    assert who.alive() == frozenset()
    assert who.enter("news", "one", {"bob": b""}) is None
    assert not who.renew("one", "two", 10.0)
    assert who.enter("news", "two", {"ann": b""}) is None
    assert who.sweep() == []  # nobody left: the other one has her
    assert who.members("news") == (1, {"ann": b""})


def test_lease_ends_with_the_boot(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it the clock begins anew, so that a lease of before would hold for days."""
    who = attendance(store)
    assert not who.renew("", "one", 60.0)
    assert who.enter("news", "one", {"ann": b""}) is not None
    boot = path.with_name("boot_id")
    boot.write_text("another")
    monkeypatch.setattr("wsbroadcast.engines.sqlite.store._BOOT_ID", boot)
    again = attendance(store)
    assert again.alive() == frozenset()
    (change,) = again.sweep()
    assert (change.version, change.left) == (2, frozenset({"ann"}))


def test_apps_that_share_a_file_know_nothing_of_each_other(store: Store) -> None:
    one, other = attendance(store, "one"), attendance(store, "other")
    for who, name in ((one, "a"), (other, "b")):
        assert not who.renew("", name, 0.0)  # it is over at once
        assert not who.renew("", f"{name} 2", 60.0)
        assert who.enter("news", f"{name} 2", {"ann": b"", name: b""}) is not None
    assert one.members("news") == (1, {"ann": b"", "a": b""})
    assert one.alive() == {"a 2"}
    assert other.channels_of("a") == frozenset()
    assert one.sweep() == []
    assert not other.renew("a 2", "b 3", 60.0)


async def test_file_of_before_goes_on(path: Path, tmp_path: Path) -> None:
    """A node that has never heard of presence reads on, and so does one at a copy of the file."""
    async with File(path).nodes(1, 0.0) as (old,):
        await old.engine.publish(Publication(Message.of("before"), Audience("channel", CHANNELS[0])))
        async with File(path).nodes(1) as (new,):
            await new.engine.enter(CHANNELS[0], {"ann": b""})
            await new.engine.publish(Publication(Message.of("after"), Audience("channel", CHANNELS[0])))
            assert await old.recorder.wait_until(lambda: len(old.recorder.publications) == 2, 5)
            assert old.recorder.gaps == []
    shutil.copy(path, tmp_path / "copy.db")
    async with File(tmp_path / "copy.db").nodes(1) as (node,):
        assert (await node.engine.members(CHANNELS[0])).members == {"ann": b""}


# A database.


async def test_step_that_waits_too_long_is_refused_and_may_be_repeated(database: Database) -> None:
    async with database.nodes(2) as (node, other):
        await node.engine.enter(CHANNELS[0], {"ann": b""})
        async with holding(database.url, f'SELECT * FROM "{database.prefix}_presence_channels" FOR UPDATE'):
            began = time.monotonic()
            with pytest.raises(EngineUnavailable, match="lock timeout"):
                await node.engine.enter(CHANNELS[0], {"bob": b""})
            assert time.monotonic() - began < 2.5
            assert await other.engine.count(CHANNELS[0]) == 1
            assert await node.engine.enter(CHANNELS[1], {"bob": b""}) is not None
        assert await node.engine.enter(CHANNELS[0], {"bob": b""}) is not None
        await agree(other, CHANNELS[0])


async def test_database_of_another_isolation_and_encoding(postgres_server: Endpoint, prefix: str) -> None:
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE DATABASE {prefix} ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    await admin.execute(f"ALTER DATABASE {prefix} SET default_transaction_isolation = 'serializable'")
    database = Database(postgres_server.url.removesuffix("postgres") + prefix, prefix)
    try:
        async with database.nodes(4) as nodes:
            names = ["ä", "\N{GRINNING FACE}", '"', "\\u0041", "x" * 200, "\N{EURO SIGN}" * 66]
            for name in names:
                await asyncio.gather(*(node.engine.enter(CHANNELS[0], {name: f'"{name}"'.encode()}) for node in nodes))
            found = await nodes[1].engine.members(CHANNELS[0])
            assert found == (len(names), {name: f'"{name}"'.encode() for name in names})
            for node in nodes:
                await agree(node, CHANNELS[0])
    finally:
        await drop_database(admin.fetchval, prefix)
        await admin.close()


async def test_role_that_may_not_is_told_what_to_run(postgres_server: Endpoint, prefix: str) -> None:
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE ROLE {prefix} LOGIN PASSWORD 'x'")
    await admin.execute(f"CREATE DATABASE {prefix}")
    where = postgres_server.url.removesuffix("postgres") + prefix
    own = await asyncpg.connect(where)
    await own.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    database = Database(where, prefix, user=prefix, password="x")  # of the test's own
    try:
        async with database.nodes(1, 0.0) as (node,):
            with pytest.raises(EngineUnavailable, match="an administrator has to run: GRANT USAGE, CREATE ON SCHEMA"):
                await node.engine.renew(LONG)
            assert isinstance(node.engine, PostgresEngine)
            await own.execute(node.engine.presence_sql)
            with pytest.raises(EngineUnavailable, match="administrator has to run: GRANT USAGE ON SCHEMA") as caught:
                await node.engine.renew(LONG)
            await own.execute(str(caught.value).rpartition("has to run: ")[2])
            assert not await node.engine.renew(LONG)
            crowd = dict.fromkeys((f"user {number}" for number in range(1000)), b"")
            assert await node.engine.enter(CHANNELS[0], crowd) is not None  # by way of the table for large envelopes
            await agree(node, CHANNELS[0])
    finally:
        await own.close()
        await drop_database(admin.fetchval, prefix)
        await admin.execute(f"DROP ROLE {prefix}")
        await admin.close()


async def test_crash_of_the_server_ends_all_leases(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    database = Database(server.url, prefix)
    async with database.nodes(2) as (node, other):
        await node.engine.enter(CHANNELS[0], {"ann": b""})
        before, link = node.engine.incarnation, node.engine.link
        sql = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%presence_enter%' AND pid <> pg_backend_pid()"
        ((pid,),) = await database.run(sql)
        os.kill(pid, signal.SIGKILL)
        assert await node.recorder.wait_until(lambda: node.recorder.gaps, 20)
        assert await other.recorder.wait_until(lambda: other.recorder.gaps, 20)
        assert node.engine.link is not link
        assert await other.engine.members(CHANNELS[0]) == (0, {})
        assert not await node.engine.renew(LONG)
        assert node.engine.incarnation != before
        assert await node.engine.enter(CHANNELS[0], {"ann": b""}) is not None
        assert (await other.engine.members(CHANNELS[0])).members == {"ann": b""}


async def test_restart_of_the_server_keeps_leases(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    async with Database(server.url, prefix).nodes(2) as (node, other):
        await node.engine.enter(CHANNELS[0], {"ann": b""})
        await server.stopped()
        with pytest.raises(EngineUnavailable):
            await node.engine.enter(CHANNELS[0], {"bob": b""})
        await server.started()
        for each in (node, other):
            recorder = each.recorder
            assert await recorder.wait_until(lambda recorder=recorder: recorder.gaps, 20)  # type: ignore[misc]
            assert await each.engine.renew(LONG)
        assert await node.engine.enter(CHANNELS[0], {"bob": b""}) is not None
        assert (await other.engine.members(CHANNELS[0])).members.keys() == {"ann", "bob"}
        assert (await other.engine.members(CHANNELS[0])).version == 2
