"""The link to Postgres and servers of its own: those that refuse us, break down or are special."""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import trustme

from tests.support.brokers import Endpoint, PostgresServer, free_port
from tests.support.postgres import Run, drop_database, living, new_link, until
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from wsbroadcast.engines.postgres import PostgresEngine
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.options import Timing
from wsbroadcast.testing import Recorder

SECRET = "s3cr3t/@:#"
QUOTED = "s3cr3t%2F%40%3A%23"

Own = Callable[..., PostgresServer]


@pytest.fixture
async def run(postgres_server: Endpoint) -> AsyncIterator[Run]:
    connection = await asyncpg.connect(postgres_server.url)
    try:
        yield connection.fetchval
    finally:
        await connection.close()


async def refusal(url: str, prefix: str, **options: Any) -> Exception:
    """Open a link and return what it raises; nothing is left behind."""
    before = asyncio.all_tasks()
    link = new_link(url, prefix, **options)
    try:
        await link.open()
    except Exception as error:
        return error
    finally:
        await link.abort()
        await until(lambda: asyncio.all_tasks() <= before)
        gc.collect()
    raise AssertionError("it was not refused")


def texts(error: BaseException | None) -> Iterator[str]:
    """All that a traceback would show of an error and those behind it."""
    while error is not None:
        yield f"{error!r} {error}"
        error = error.__cause__ or error.__context__


# Refused, for good.


async def test_wrong_credentials_are_told_without_the_password(own_postgres: Own, prefix: str) -> None:
    server = own_postgres(password=SECRET)
    assert QUOTED in server.url
    async with living(server.url, prefix) as life:
        assert await life.publish(("news", b"x")) == [None]
    wrong = {
        server.url.replace(QUOTED, f"{QUOTED}x"): 'password authentication failed for user "postgres"',
        server.url.replace(f":{QUOTED}", ""): "",
        server.url.replace("postgres:", "nobody:"): 'password authentication failed for user "nobody"',
        server.url.removesuffix("postgres") + "nothing": 'database "nothing" does not exist',
    }
    for url, reason in wrong.items():
        error = await refusal(url, prefix)
        assert isinstance(error, ConfigurationError), url
        assert str(error).startswith(f"postgres at 127.0.0.1:{server.port}/")
        assert reason in str(error)
        assert error.__cause__ is error.__context__ is None
        assert not any("s3cr3t" in text for text in texts(error))


async def test_option_that_asyncpg_refuses_is_told(postgres_server: Endpoint, prefix: str) -> None:
    error = await refusal(postgres_server.url, prefix, command_timeout="x")
    assert isinstance(error, ConfigurationError)
    assert "can't be used: invalid command_timeout value" in str(error)


async def test_option_of_the_wrong_type_is_no_outage(postgres_server: Endpoint, prefix: str) -> None:
    assert isinstance(await refusal(postgres_server.url, prefix, statement_cache_size="x"), TypeError)


@pytest.mark.parametrize(
    ("statements", "reason"),
    [
        (["CREATE ROLE {0} NOLOGIN"], "is not permitted to log in"),
        (["CREATE ROLE {0} LOGIN", "REVOKE CONNECT ON DATABASE {0} FROM PUBLIC"], "permission denied for database"),
    ],
)
async def test_role_that_may_not_connect_is_told(
    postgres_server: Endpoint, prefix: str, run: Run, statements: list[str], reason: str
) -> None:
    await run(f"CREATE DATABASE {prefix}")
    for statement in statements:
        await run(statement.format(prefix))
    host = f"{postgres_server.host}:{postgres_server.port}"
    error = await refusal(f"postgres://{prefix}@{host}/{prefix}", prefix)
    await drop_database(run, prefix)
    await run(f"DROP ROLE {prefix}")
    assert isinstance(error, ConfigurationError)
    assert reason in str(error)


async def test_role_that_may_not_notify_is_told(postgres_server: Endpoint, prefix: str, run: Run) -> None:
    await run(f"CREATE DATABASE {prefix}")
    await run(f"CREATE ROLE {prefix} LOGIN")
    connection = await asyncpg.connect(postgres_server.url.removesuffix("postgres") + prefix)
    await connection.execute("REVOKE EXECUTE ON FUNCTION pg_notify FROM PUBLIC")
    await connection.close()
    host = f"{postgres_server.host}:{postgres_server.port}"
    error = await refusal(f"postgres://{prefix}@{host}/{prefix}", prefix)
    await drop_database(run, prefix)
    await run(f"DROP ROLE {prefix}")
    assert isinstance(error, ConfigurationError)
    assert "permission denied for function pg_notify" in str(error)


async def test_option_that_the_server_lacks_is_told(postgres_server: Endpoint, prefix: str) -> None:
    error = await refusal(f"{postgres_server.url}?options=-c%20colour=blue", prefix)
    assert isinstance(error, ConfigurationError)
    assert 'unrecognized configuration parameter "colour"' in str(error)


async def test_engine_that_is_refused_does_not_start(own_postgres: Own, prefix: str) -> None:
    server = own_postgres(password=SECRET)
    engine = PostgresEngine.from_url(server.url.replace(QUOTED, f"{QUOTED}x"))
    with pytest.raises(ConfigurationError, match="password authentication failed") as caught:
        await engine.start(Recorder())
    assert not any("s3cr3t" in text for text in texts(caught.value))


# Not to be had now.


async def test_closed_port_is_out_of_reach(prefix: str) -> None:
    error = await refusal(f"postgres://ann:{QUOTED}@127.0.0.1:{free_port()}/app", prefix)
    assert isinstance(error, OSError)
    assert not isinstance(error, ConfigurationError)


async def test_too_many_connections_are_out_of_reach(postgres_server: Endpoint, prefix: str, run: Run) -> None:
    await run(f"CREATE ROLE {prefix} LOGIN CONNECTION LIMIT 1")
    error = await refusal(postgres_server.url.replace("postgres@", f"{prefix}@"), prefix)
    await run(f"DROP ROLE {prefix}")
    assert not isinstance(error, ConfigurationError)
    assert "too many connections" in str(error)


async def test_standby_is_out_of_reach_until_it_is_promoted(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    server.stop()
    (server.directory / "data" / "standby.signal").touch()
    server.start()
    error = await refusal(server.url, prefix)
    assert isinstance(error, EngineUnavailable)
    assert "is a hot standby, which has no LISTEN" in str(error)
    connection = await asyncpg.connect(server.url)
    try:
        await connection.execute("SELECT pg_promote()")
    finally:
        await connection.close()
    async with living(server.url, prefix) as life:
        assert await life.publish(("news", b"x")) == [None]


async def test_first_host_that_is_down_is_passed_over(postgres_server: Endpoint, prefix: str) -> None:
    url = postgres_server.url.replace("@", f"@127.0.0.1:{free_port()},")
    async with living(url, prefix) as life:
        assert await life.publish(("news", b"x")) == [None]


async def test_first_host_that_does_not_answer_is_passed_over(postgres_server: Endpoint, prefix: str) -> None:
    async with FaultProxy(postgres_server) as proxy:
        proxy.black_hole()
        url = postgres_server.url.replace("@", f"@{proxy.host}:{proxy.port},")
        engine = PostgresEngine(url, prefix=prefix, timing=Timing(connect_timeout=0.3))
        await engine.start(Recorder())
        assert not (await engine.health()).is_ok

        async def is_ok() -> bool:
            return (await engine.health()).is_ok

        await eventually(is_ok)
        await engine.aclose()


# Lost.


async def test_server_that_is_killed_is_a_loss(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    async with living(server.url, prefix) as life:
        await server.killed()
        assert isinstance(await life.lost(), ConnectionError)
        with pytest.raises(Exception, match="closed"):
            await life.publish(("news", b"x"))


async def test_server_that_stops_is_a_loss(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    async with living(server.url, prefix) as life:
        publishing = asyncio.create_task(_publish_until_it_fails(life.publish))
        await server.stopped()
        assert isinstance(await life.lost(), ConnectionError)
        assert await publishing is not None


async def _publish_until_it_fails(publish: Callable[..., object]) -> Exception:
    while True:
        try:
            errors = await publish(("news", b"x"))  # type: ignore[misc]
            assert errors == [None], "a loss is raised, not returned"
        except AssertionError:
            raise
        except Exception as error:
            return error


async def test_server_that_hangs_is_given_up_at_once(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    before = asyncio.all_tasks()
    async with living(server.url, prefix) as life:
        await life.link.subscribe([life.name("news")])
        server.pause()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await life.publish(("news", b"x"))
        assert not life.reading.done()
        async with asyncio.timeout(5):
            await life.link.abort()
        server.resume()
        assert life.pile.parcels == []
    await until(lambda: asyncio.all_tasks() <= before)
    gc.collect()


async def test_bytes_that_are_under_way_at_abort_never_arrive(own_postgres: Own, prefix: str) -> None:
    server = own_postgres()
    async with living(server.url, prefix) as witness, FaultProxy(server) as proxy:
        await witness.link.subscribe([witness.name("news")])
        async with living(proxy.url, prefix) as life:
            proxy.black_hole()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await life.publish(*[("news", b"late")] * 1000)
        proxy.heal()
        await witness.publish(("news", b"now"))
        await witness.arrives("news", b"now")


# Other ways to reach it.


@pytest.fixture
def socket_directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="wsbroadcast-"))
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


async def test_unix_socket(own_postgres: Own, prefix: str, socket_directory: Path) -> None:
    server = own_postgres(config={"unix_socket_directories": str(socket_directory)})
    url = f"postgres://postgres@/postgres?host={socket_directory}&port={server.port}"
    before = asyncio.all_tasks()
    async with living(url, prefix) as life:
        assert await life.link._notifier._connection.fetchval("SELECT inet_server_addr()") is None
        await life.link.subscribe([life.name("news")])
        assert await life.publish(("news", bytes(10_000))) == [None]
        await life.arrives("news", bytes(10_000))
    assert asyncio.all_tasks() <= before
    gc.collect()


async def switch_on_tls(server: PostgresServer, authority: trustme.CA) -> None:
    pair = server.directory / "server.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pair)
    pair.chmod(0o600)
    if server.user:
        shutil.chown(pair, server.user)
    connection = await asyncpg.connect(server.url)
    try:
        for setting, value in {"ssl_cert_file": pair, "ssl_key_file": pair, "ssl": "on"}.items():
            await connection.execute(f"ALTER SYSTEM SET {setting} = '{value}'")
        await connection.execute("SELECT pg_reload_conf()")
    except asyncpg.InvalidParameterValueError as error:
        pytest.skip(f"this PostgreSQL can't: {error}: apt-get install postgresql")
    finally:
        await connection.close()


@pytest.mark.parametrize("sslmode", ["require", "verify-full"])
async def test_server_without_tls_that_must_have_it_is_told(own_postgres: Own, tmp_path: Path, sslmode: str) -> None:
    server = own_postgres(password=SECRET)
    trustme.CA().cert_pem.write_to_path(tmp_path / "ca.pem")
    engine = PostgresEngine.from_url(f"{server.url}?sslmode={sslmode}&sslrootcert={tmp_path}/ca.pem")
    with pytest.raises(ConfigurationError) as caught:
        await engine.start(Recorder())
    expected = f"postgres at 127.0.0.1:{server.port}/postgres offers no TLS: write sslmode=prefer to do without"
    assert str(caught.value) == expected
    assert not any("s3cr3t" in text for text in texts(caught.value))


async def test_tls(own_postgres: Own, prefix: str, tmp_path: Path) -> None:
    server = own_postgres()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    await switch_on_tls(server, authority)
    verified = f"{server.url}?sslmode=verify-full&sslrootcert={tmp_path}"
    before = asyncio.all_tasks()
    async with living(f"{verified}/ca.pem", prefix) as life:
        encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await life.link._notifier._connection.fetchval(encrypted) is True
        await life.link.subscribe([life.name("news")])
        assert await life.publish(("news", bytes(10_000))) == [None]
        await life.arrives("news", bytes(10_000))
    assert asyncio.all_tasks() <= before
    error = await refusal(f"{verified}/other.pem", prefix)
    assert isinstance(error, ConfigurationError)
    assert "CERTIFICATE_VERIFY_FAILED" in str(error)
