"""The file that links the processes of one machine: what is done to it, and to those who use it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.strict import STRICT
from wsbroadcast import Audience, ConfigurationError, EngineUnavailable, History, Message, Position, Publication
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.broker.link import Keep, KeptParcel, Parcel
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.engines.sqlite.file import bells_of, check_local, file_system
from wsbroadcast.engines.sqlite.store import LATE_SECONDS, Store
from wsbroadcast.history import HistoryRules
from wsbroadcast.options import Timing
from wsbroadcast.testing import Node, Recorder

NEWS = Audience("channel", "news")
KEPT = History(messages=20)
RULES = HistoryRules(KEPT)
NAME = "wsbroadcast:channel:news"
HEAD = b'{"v":1}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "messages.db"


@asynccontextmanager
async def node(path: Path, **options: object) -> AsyncIterator[Node]:
    engine = SQLiteEngine(path, **options)  # type: ignore[arg-type]
    engine.keep(RULES)
    found = Node(engine, Recorder(), 5.0)
    await engine.start(found.recorder)
    try:
        await found.join(NEWS)
        yield found
    finally:
        await engine.aclose()


async def append(node: Node, text: str) -> int:
    assert isinstance(node.engine, SQLiteEngine)
    return (await node.engine.append(Publication(Message.of(text), NEWS), KEPT)).position.offset


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, 1.0)
    store.open_to_write()
    yield store
    store.close()


def kept(text: bytes = b"x", history: History = KEPT, name: str = NAME) -> KeptParcel:
    return KeptParcel(name, HEAD + text, Keep(history))


def rows(path: Path, where: str = "1") -> int:
    with sqlite3.connect(path) as sql:
        (count,) = sql.execute(f"SELECT count(*) FROM wsbroadcast_messages WHERE {where}").fetchone()
    sql.close()
    return int(count)


def remove(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}*"):
        if each.is_file():
            each.unlink()


# Processes.

_WRITER = """
import asyncio, sys
from wsbroadcast import Audience, History, Message, Publication
from wsbroadcast.engines.sqlite import SQLiteEngine
from wsbroadcast.testing import Recorder

async def main():
    engine = SQLiteEngine(sys.argv[1])
    await engine.start(Recorder())
    number = 0
    while True:
        publications = [Publication(Message.of(str(number + n)), Audience("channel", "news")) for n in range(8)]
        done = await asyncio.gather(*(engine.append(each, History(messages=100_000)) for each in publications))
        number += 8
        print(*(each.position.offset for each in done), flush=True)

asyncio.run(main())
"""


def writing(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*STRICT, "-c", _WRITER, os.fspath(path)], stdout=subprocess.PIPE, text=True)


async def test_killed_writer_leaves_no_hole(path: Path) -> None:
    async with node(path) as ours:
        confirmed: list[int] = []
        for _ in range(4):
            with writing(path) as process:
                assert process.stdout is not None
                for _ in range(3):
                    line = await asyncio.to_thread(process.stdout.readline)
                    confirmed += map(int, line.split())
                process.kill()
        last = await append(ours, "last")
        assert await ours.recorder.wait_until(lambda: len(ours.recorder.publications) >= last, 10)
        offsets = [each.offset for each in ours.recorder.publications]
        assert offsets == list(range(1, last + 1))
        assert set(confirmed) <= set(offsets)
        assert [each.previous for each in ours.recorder.publications] == list(range(last))


async def test_frozen_writer_makes_others_fail_in_time_and_lets_them_read(path: Path) -> None:
    frozen = sqlite3.connect(path, isolation_level=None)
    async with node(path) as ours:
        await append(ours, "before")
        frozen.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(EngineUnavailable, match="locked"):
            await append(ours, "refused")
        assert time.monotonic() - began < 2.5
        assert isinstance(ours.engine, SQLiteEngine)
        replay = await ours.engine.read(NEWS, None, KEPT)
        assert [each.data for each in replay.publications] == ["before"]
        frozen.execute("ROLLBACK")
        assert await append(ours, "after") == 2
    frozen.close()


async def test_fork_uses_no_connection_of_its_parent(path: Path) -> None:
    program = f"""
import asyncio, os, sys
from wsbroadcast import ConnectionManager, Publisher
publisher = Publisher("sqlite:///{path}")
async def say(text):
    await publisher.broadcast(text)
asyncio.run(say("parent"))
process = os.fork()
asyncio.run(say("child" if process == 0 else "parent"))
if process == 0:
    os._exit(0)
assert os.waitpid(process, 0)[1] == 0
"""
    quiet = "-Wignore::DeprecationWarning"
    await asyncio.to_thread(subprocess.run, [sys.executable, quiet, "-c", program], check=True, timeout=30)
    assert rows(path, "name LIKE '%everyone'") == 3


# The file.


async def test_replaced_file_is_noticed(path: Path) -> None:
    async with node(path) as ours:
        await append(ours, "before")
        remove(path)
        assert await ours.recorder.wait_until(lambda: ours.recorder.gaps, 5)
        while True:
            try:
                offset = await append(ours, "after")
                break
            except EngineUnavailable:
                await asyncio.sleep(0.01)
        assert offset == 1
        assert rows(path, "kept = 1") == 1


async def test_emptied_table_goes_on_with_its_ids(path: Path) -> None:
    async with node(path) as ours:
        await append(ours, "1")
        await ours.receives(["1"])
        with sqlite3.connect(path) as sql:
            sql.execute("DELETE FROM wsbroadcast_messages")
        sql.close()
        assert await append(ours, "2") == 2
        await ours.receives(["1", "2"])
        assert ours.recorder.gaps == []


def test_file_is_for_its_owner_alone(path: Path, store: Store) -> None:
    store.append([kept()], 0.0)
    for each in path.parent.glob("messages.db*"):
        assert each.stat().st_mode & 0o077 == 0, each


def test_other_boot_begins_all_histories_anew(path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = store.append([kept()], time.time())
    store.close()
    again = Store(path, 1.0)
    again.open_to_write()
    (same,) = again.append([kept()], time.time())
    again.close()
    assert first is not None
    assert same is not None
    assert same.position == Position(first.position.epoch, 2)
    boot = path.with_name("boot_id")
    boot.write_text("another")
    monkeypatch.setattr("wsbroadcast.engines.sqlite.store._BOOT_ID", boot)
    store.__init__(path, 1.0)  # type: ignore[misc]
    store.open_to_write()
    assert store.positions([NAME]) == {}
    assert store.kept(NAME, 0, KEPT, time.time()) is None
    (other,) = store.append([kept()], time.time())
    assert other is not None
    assert (other.position.epoch != first.position.epoch, other.position.offset) == (True, 1)


async def test_copied_file_begins_all_histories_anew(path: Path, tmp_path: Path) -> None:
    async with node(path) as ours:
        await append(ours, "before")
        assert isinstance(ours.engine, SQLiteEngine)
        (at,) = await ours.engine.positions([NEWS], [KEPT])
    shutil.copy(path, tmp_path / "copy.db")
    assert rows(tmp_path / "copy.db", "kept = 1") == 1  # and not in the write-ahead log
    async with node(tmp_path / "copy.db") as ours:
        assert isinstance(ours.engine, SQLiteEngine)
        assert not (await ours.engine.read(NEWS, at, KEPT)).is_complete(at)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 100, b"\0" * 4096])
def test_other_file_is_refused(path: Path, content: bytes) -> None:
    async def use() -> None:
        async with node(path):
            pass

    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="not an SQLite file"):
        asyncio.run(use())
    assert path.read_bytes() == content


async def test_process_that_closes_the_file_is_not_taken_for_the_last_one(path: Path) -> None:
    """Else it removes the write-ahead log that others go on writing to, and what they write is lost."""
    visit = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('PRAGMA user_version'); c.close()"
    async with node(path) as one, node(path) as another:  # each opens it twice
        await append(one, "before")
        log = path.with_name("messages.db-wal")
        inode = log.stat().st_ino
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", visit, str(path)], check=True)
        assert log.stat().st_ino == inode
        await append(another, "after")
        read = (
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
            "print(*c.execute('SELECT max(place) FROM wsbroadcast_places'))"
        )
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", read, str(path)], check=True, capture_output=True, text=True
        )
        assert done.stdout.strip() == "(2,)"


async def test_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no directory for"):
        async with node(tmp_path / "none" / "messages.db"):
            pass
    with pytest.raises(ConfigurationError, match="is a directory"):
        async with node(tmp_path):
            pass


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/data/x.db", "nfs4"), ("/data/deep/x.db", "ext4"), ("/x.db", "overlay"), ("/with space/x.db", "cifs")],
)
def test_file_system_is_found(path: str, kind: str) -> None:
    mounts = r"""
22 1 0:20 / / rw,relatime shared:1 - overlay overlay rw
23 22 0:21 / /data rw,relatime shared:2 - nfs4 server:/x rw
24 23 8:1 / /data/deep rw,relatime - ext4 /dev/sda1 rw
25 22 0:22 / /with\040space rw - cifs //server/share rw
broken
"""
    assert file_system(Path(path), mounts) == kind


def test_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("22 1 0:20 / / rw - nfs server:/x rw\n")
    monkeypatch.setattr("wsbroadcast.engines.sqlite.file._MOUNTS", mounts)
    with pytest.raises(ConfigurationError, match=r"network file system \(nfs\)"):
        check_local(tmp_path / "messages.db")
    mounts.unlink()
    check_local(tmp_path / "messages.db")


# Rows come and go.


def test_rows_go_when_they_are_late_and_no_longer_kept(path: Path, store: Store) -> None:
    history = History(messages=10, seconds=1000)
    for second in range(300):
        parcels = [kept(history=history), kept(history=history), Parcel("other", HEAD)]
        store.append(parcels, float(second))
    assert rows(path, "kept = 1") <= 10 + 2 * (LATE_SECONDS + 2) + 400
    for second in range(300, 900):
        store.append([kept(history=history)], float(second))
    assert rows(path, "kept = 0") == 0
    assert rows(path, "kept = 1") <= 10 + LATE_SECONDS + 61
    stretch = store.kept(NAME, 0, history, 900.0)
    assert stretch is not None
    assert [entry.offset for entry in stretch.entries] == list(range(1191, 1201))
    assert stretch.base == 1190


def test_quiet_channels_lose_their_rows_and_in_the_end_their_place(path: Path, store: Store) -> None:
    short = History(messages=10, seconds=10, remember=1000)
    for number in range(50):
        store.append([kept(history=short, name=f"quiet {number}")], 0.0)
    for second in range(100, 200, 5):
        store.append([Parcel("other", HEAD)], float(second))
    assert rows(path, "kept = 1") == 0
    assert len(store.positions([f"quiet {number}" for number in range(50)])) == 50
    for second in range(2000, 2100, 10):
        store.append([Parcel("other", HEAD)], float(second))
    assert store.positions([f"quiet {number}" for number in range(50)]) == {}


def test_transaction_that_is_given_up_leaves_nothing(path: Path, store: Store) -> None:
    store.append([kept()], 0.0)
    store.is_over = True
    with pytest.raises(EngineUnavailable):
        store.append([kept(), Parcel("other", HEAD)], 0.0)
    assert rows(path) == 1


# Bells.


async def test_lost_bell_delays_by_half_a_second(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with node(path) as one, node(path) as other:
        await append(one, "0")
        await other.receives(["0"])
        monkeypatch.setattr("wsbroadcast.engines.sqlite.link.Bell.ring", lambda bell: None)
        began = time.monotonic()
        await append(one, "1")
        await other.receives(["0", "1"])
        assert time.monotonic() - began < 2.0


async def test_stale_socket_is_removed(path: Path) -> None:
    async with node(path) as ours:
        stale = bells_of(path) / "1-stale"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
            dead.bind(os.fspath(stale))
        (bells_of(path) / "not a socket").write_text("")
        await append(ours, "1")
        assert not stale.exists()
    assert [each.name for each in bells_of(path).iterdir()] == []


def test_bells_of_a_long_path_are_elsewhere() -> None:
    long = Path("/data") / ("x" * 150) / "messages.db"
    assert len(os.fsencode(bells_of(long) / ("x" * 24))) < 108
    assert bells_of(long) != bells_of(long.with_name("other.db"))
    assert bells_of(Path("/data/m.db")).parent == Path("/data")


async def test_node_that_was_away_too_long_is_told(path: Path) -> None:
    async with node(path, timing=Timing(probe_interval=60)) as ours:
        assert isinstance(ours.engine, SQLiteEngine)
        link = ours.engine.link
        with sqlite3.connect(path) as sql:
            sql.execute("UPDATE sqlite_sequence SET seq = seq + 5 WHERE name = 'wsbroadcast_messages'")
        sql.close()
        await append(ours, "1")
        assert await ours.recorder.wait_until(lambda: ours.recorder.gaps, 5)
        assert ours.engine.link is link


# The URL.


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:////tmp/a%20b.db", "/tmp/a b.db"),
        ("sqlite:///a.db", f"{os.getcwd()}/a.db"),
        ("sqlite+aiosqlite:///a/b.db?prefix=x&fail_fast=true", f"{os.getcwd()}/a/b.db"),
    ],
)
def test_url(url: str, path: str) -> None:
    engine = create_engine(url)
    assert isinstance(engine, SQLiteEngine)
    assert engine.address == path


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite://host/a.db", "sqlite:///a.db?x=1", "sqlite:a.db"]
)
def test_url_that_makes_no_sense(url: str) -> None:
    with pytest.raises(ConfigurationError):
        create_engine(url)
