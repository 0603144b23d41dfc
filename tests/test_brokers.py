"""The brokers that tests start: a test that kills one relies on what is shown here."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import asyncpg
import nats
import pytest
import redis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.support.brokers import (
    Broker,
    BrokerMissing,
    NATSServer,
    PostgresServer,
    RedisSentinel,
    RedisServer,
    processes,
    programs,
)
from tests.support.servers import eventually

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["redis", "nats", "postgres"])
def broker(request: pytest.FixtureRequest) -> Broker:
    start: Callable[[], Broker] = request.getfixturevalue(f"own_{request.param}")
    return start()


async def is_served(broker: Broker, within: float = 5.0) -> bool:
    """Whether a new connection gets an answer."""
    try:
        async with asyncio.timeout(within):
            await greet(broker)
    except OSError:  # also the time-out
        return False
    return True


async def greet(broker: Broker) -> None:
    if isinstance(broker, PostgresServer):
        connection = await asyncpg.connect(broker.url)
        await connection.close()
        return
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    try:
        writer.write(b"PING\r\n")
        assert await reader.readline()
    finally:
        writer.close()


async def test_broker_serves_until_it_is_stopped_or_killed(broker: Broker) -> None:
    assert await is_served(broker)
    for end in (broker.stopped, broker.killed):
        await end()
        assert not broker.is_running
        assert not await is_served(broker)
        await broker.started()
        assert await is_served(broker)


async def test_paused_broker_hangs_until_it_is_resumed(broker: Broker) -> None:
    broker.pause()
    assert not await is_served(broker, within=0.3)
    broker.resume()
    assert await is_served(broker)


@pytest.mark.parametrize("end", ["stop", "kill", "restart", "close"])
def test_paused_broker_can_be_ended(broker: Broker, end: str) -> None:
    broker.pause()
    getattr(broker, end)()
    assert broker.is_running == (end == "restart")


def test_closed_broker_leaves_no_process_and_no_file(broker: Broker) -> None:
    assert broker._process is not None
    pids = processes.tree(broker._process.pid)
    broker.close()
    assert not [pid for pid in pids if processes.is_alive(pid)]
    assert not broker.directory.exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_process_closes_nothing(broker: Broker) -> None:
    child = os.fork()
    if not child:
        broker.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert broker.is_running
    assert broker.directory.exists()


def test_broker_that_does_not_start_says_why(own_redis: Callable[..., RedisServer]) -> None:
    with pytest.raises(AssertionError, match="bogus"):
        own_redis(config={"bogus": "1"})


async def test_paused_postgres_answers_nobody_who_is_connected(
    own_postgres: Callable[[], PostgresServer],
) -> None:
    server = own_postgres()
    connection = await asyncpg.connect(server.url)
    server.pause()
    query = asyncio.ensure_future(connection.fetchval("SELECT 1"))
    done, _ = await asyncio.wait({query}, timeout=0.3)
    assert not done
    server.resume()
    assert await query == 1
    await connection.close()


async def test_redis_and_postgres_keep_their_data_when_killed(
    own_redis: Callable[[], RedisServer], own_postgres: Callable[[], PostgresServer]
) -> None:
    store, database = own_redis(), own_postgres()
    store.command("SET", "key", "value")
    connection = await asyncpg.connect(database.url)
    await connection.execute("CREATE TABLE kept AS SELECT 7 AS number")
    for broker in (store, database):
        await broker.killed()
        await broker.started()
    assert store.command("GET", "key") == "value"
    connection = await asyncpg.connect(database.url)
    assert await connection.fetchval("SELECT number FROM kept") == 7
    await connection.close()


async def test_redis_wants_its_password(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(password="s3 cr@t", users=["alice on >pw ~* resetchannels &news:* +@all"])
    async with Redis.from_url(server.url) as client:
        assert await client.ping()
    async with Redis(port=server.port, username="alice", password="pw") as alice:
        with pytest.raises(redis.exceptions.NoPermissionError):
            await alice.publish("other", "message")
    async with Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as nobody:
        with pytest.raises(redis.AuthenticationError):
            await nobody.ping()


async def test_redis_speaks_tls_and_has_a_unix_socket(own_redis: Callable[..., RedisServer]) -> None:
    server = own_redis(tls=True, password="secret")
    async with Redis.from_url(server.url, ssl_ca_certs=str(server.ca)) as client:
        assert await client.ping()
    async with Redis.from_url(server.url) as distrustful:
        with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await distrustful.ping()
    async with Redis.from_url(server.unix_url) as client:
        assert await client.ping()


def test_redis_comes_from_a_wheel_where_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    program = programs.redis_server.__wrapped__()
    monkeypatch.setattr(programs, "redis_server", lambda: program)
    with RedisServer() as server:
        assert "valkey_version" in server.command("INFO", "server")
    with pytest.raises(BrokerMissing, match="speaks no TLS: apt-get install redis-server"):
        programs.redis_server_with_tls.__wrapped__()


async def test_sentinel_promotes_the_replica(own_sentinel: RedisSentinel) -> None:
    assert own_sentinel.address == (own_sentinel.primary.host, own_sentinel.primary.port)
    own_sentinel.primary.command("SET", "key", "value")
    await own_sentinel.primary.killed()

    async def is_promoted() -> bool:
        return own_sentinel.address[1] == own_sentinel.replica.port

    await eventually(is_promoted, timeout=20)
    assert own_sentinel.replica.command("SET", "key", "other")


async def test_cluster_serves_every_slot(own_cluster: list[RedisServer]) -> None:
    async with RedisCluster.from_url(own_cluster[0].url) as client:
        owners = {client.get_node_from_key(f"key {number}") for number in range(30)}
        assert {owner.port for owner in owners if owner} == {server.port for server in own_cluster}
        for number in range(30):
            await client.set(f"key {number}", "value")


async def test_nats_wants_its_password(own_nats: Callable[..., NATSServer]) -> None:
    server = own_nats(user="alice", password="secret", config="max_payload: 4096")
    client = await nats.connect(server.url, allow_reconnect=False)
    assert client.max_payload == 4096
    await client.close()
    # By hand: the driver leaves the socket of a refused connection open.
    reader, writer = await asyncio.open_connection(server.host, server.port)
    await reader.readline()
    writer.write(b'CONNECT {"user": "alice", "pass": "other"}\r\nPING\r\n')
    assert b"Authorization Violation" in await reader.read()
    writer.close()


async def test_postgres_wants_its_password(own_postgres: Callable[..., PostgresServer]) -> None:
    server = own_postgres(password="it's", config={"max_connections": "12"})
    connection = await asyncpg.connect(server.url)
    assert await connection.fetchval("SHOW max_connections") == "12"
    await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(server.url, password="other")


SCRIPT = """
import sys
from tests.support.brokers import PostgresServer, RedisSentinel, RedisServer, processes
from tests.support.servers import eventually
with RedisServer() as store, PostgresServer() as database:
    database.pause()
    for broker in (store, database):
        print(*filter(processes.is_alive, processes.tree(broker._process.pid)), broker.directory, flush=True)
    sys.stdin.read()
"""


def test_brokers_are_gone_when_the_tests_are_killed(own_redis: object, own_postgres: object) -> None:
    command = (sys.executable, "-c", textwrap.dedent(SCRIPT))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        pids: list[int] = []
        directories: list[Path] = []
        for _ in range(2):
            *numbers, directory = owner.stdout.readline().split()
            pids += map(int, numbers)
            directories.append(Path(os.fsdecode(directory)))
        assert len(pids) > 3
        assert all(map(processes.is_alive, pids))
        owner.send_signal(signal.SIGKILL)
        owner.communicate()
    processes.wait_gone(pids)
    processes.wait_until(lambda: not any(directory.exists() for directory in directories))
