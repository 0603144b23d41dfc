"""Fixtures that several directories of tests share; `tests/conftest.py` imports them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar
from uuid import uuid4

import pytest

from tests.support.brokers import (
    Broker,
    BrokerMissing,
    Endpoint,
    NATSServer,
    PostgresServer,
    RedisSentinel,
    RedisServer,
    programs,
    redis_cluster,
    redis_sentinel,
)

__all__ = [
    "nats_server",
    "own_cluster",
    "own_nats",
    "own_postgres",
    "own_redis",
    "own_sentinel",
    "postgres_server",
    "postgres_template",
    "prefix",
    "redis_server",
    "tls_cluster",
    "tls_sentinel",
]

B = TypeVar("B", bound=Broker)
T = TypeVar("T")

ADDRESSES = {
    "redis": "WSBROADCAST_TEST_REDIS_URL",
    "nats": "WSBROADCAST_TEST_NATS_URL",
    "postgres": "WSBROADCAST_TEST_POSTGRES_URL",
}
"""The variables that name a broker which runs already; then nothing is started."""

PROGRAMS: dict[str, Callable[[], object]] = {
    "redis": programs.redis_server,
    "nats": programs.nats_server,
    "postgres": programs.postgres_programs,
}
"""What finds the program of a broker."""


@pytest.fixture
def prefix() -> str:
    """A prefix that only this test uses, for names at a broker that other tests use too."""
    return f"t{uuid4().hex[:16]}"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Endpoint]:
    """A Redis that many tests share. Use `prefix`, and don't change its settings."""
    yield from _shared(RedisServer)


@pytest.fixture(scope="session")
def nats_server() -> Iterator[Endpoint]:
    """A NATS that many tests share. Use `prefix`."""
    yield from _shared(NATSServer)


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[PostgresServer]:
    """A fresh database to copy, which is faster than making one. It isn't started."""
    server = _made(PostgresServer)
    try:
        server.create()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """A PostgreSQL that many tests share. Use `prefix`."""
    if ADDRESSES["postgres"] in os.environ:
        yield Endpoint(os.environ[ADDRESSES["postgres"]])
    else:
        yield from _shared(PostgresServer, template=request.getfixturevalue("postgres_template"))


@pytest.fixture
def own_redis() -> Iterator[Callable[..., RedisServer]]:
    """Start a Redis for this test alone; it takes the arguments of `RedisServer`."""
    yield from _own(RedisServer)


@pytest.fixture
def own_sentinel() -> Iterator[RedisSentinel]:
    """A primary, a replica and a sentinel for this test alone."""
    yield from _own_group("redis", redis_sentinel())


@pytest.fixture
def own_cluster() -> Iterator[list[RedisServer]]:
    """A Redis cluster of three primaries for this test alone; it takes three seconds to agree."""
    yield from _own_group("redis", redis_cluster())


@pytest.fixture
def tls_sentinel() -> Iterator[RedisSentinel]:
    """Like `own_sentinel`, all of them over TLS only."""
    yield from _own_group("redis", redis_sentinel(tls=True))


@pytest.fixture
def tls_cluster() -> Iterator[list[RedisServer]]:
    """Like `own_cluster`, over TLS only."""
    yield from _own_group("redis", redis_cluster(tls=True))


@pytest.fixture
def own_nats() -> Iterator[Callable[..., NATSServer]]:
    """Start a NATS for this test alone; it takes the arguments of `NATSServer`."""
    yield from _own(NATSServer)


@pytest.fixture
def own_postgres(request: pytest.FixtureRequest) -> Iterator[Callable[..., PostgresServer]]:
    """Start a PostgreSQL for this test alone; it takes the arguments of `PostgresServer`."""
    _skip_unless_ours("postgres")
    yield from _own(PostgresServer, template=request.getfixturevalue("postgres_template"))


def _shared(kind: type[Broker], **options: Any) -> Iterator[Endpoint]:
    url = os.environ.get(ADDRESSES[kind.name])
    if url:
        yield Endpoint(url)
        return
    with _made(kind, **options) as server:
        yield server


def _own(kind: type[B], **fixed: Any) -> Iterator[Callable[..., B]]:
    _skip_unless_ours(kind.name)
    with ExitStack() as stack:

        def own(**options: Any) -> B:
            server = _made(kind, **fixed, **options)
            stack.enter_context(server)
            return server

        yield own


def _own_group(name: str, group: AbstractContextManager[T]) -> Iterator[T]:
    _skip_unless_ours(name)
    with ExitStack() as stack:
        try:
            servers = stack.enter_context(group)
        except BrokerMissing as missing:
            pytest.skip(str(missing))
        yield servers


def _skip_unless_ours(name: str) -> None:
    if ADDRESSES[name] in os.environ:
        pytest.skip(f"{ADDRESSES[name]} names a broker that a test can't stop or configure")
    try:
        PROGRAMS[name]()  # now, for the sake of a test that starts it in a process of its own
    except BrokerMissing as missing:
        pytest.skip(str(missing))


def _made(kind: type[B], **options: Any) -> B:
    try:
        return kind(**options)
    except BrokerMissing as missing:
        pytest.skip(str(missing))
