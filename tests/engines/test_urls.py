"""URLs that name several hosts, IPv6 addresses among them, on every Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import AnyUrl, NatsDsn, PostgresDsn, RedisDsn, Secret, SecretStr, TypeAdapter
from sqlalchemy.engine import make_url

from wsbroadcast import ConfigurationError
from wsbroadcast.engines import create_engine, split_hosts
from wsbroadcast.engines.contract import Engine
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.redis import RedisEngine
from wsbroadcast.engines.sqlite import SQLiteEngine


@pytest.mark.parametrize(
    "hosts", ["a,b:7000,[::1]", "[::1]:7000,a", "[::1],[::2]:7000", "user:p%40w@a,[::1]", "a,[::1"]
)
@pytest.mark.parametrize("rest", ["", "/main?prefix=x&y=[z]#end", "?prefix=x", "//a@b"])
def test_hosts_stay_one_text(hosts: str, rest: str) -> None:
    parts = split_hosts(f"redis+sentinel://{hosts}{rest}")
    assert parts.netloc == hosts
    assert parts._replace(netloc="host") == urlsplit(f"redis+sentinel://host{rest}")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "memory://",
        "memory",
        "redis://",
        "REDIS://Host:1/0",
        " redis://host",
        "redis://ho\nst:1\n",
        "redis:///0",
        "redis:/0",
        "//host/0",
        "unix:///run/redis.sock?db=1",
        "postgresql+asyncpg://user:pass:word@host:5432/db?sslmode=require",
        "nats://token@host:4222?name=a",
        "http://[::1]:8000/a//b?c=d://e#f",
        "1x://host/0",
    ],
)
def test_other_urls_are_split_as_ever(url: str) -> None:
    assert split_hosts(url) == urlsplit(url)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis+sentinel://a,[::1]:7000/main", "a:26379,[::1]:7000/main"),
        ("redis+cluster://a,[::1]", "a:6379,[::1]:6379"),
        ("postgresql://me@a,[::1]:6000/db", "a:5432,[::1]:6000/db"),
        ("nats://a,[::1]:5", "a:4222,[::1]:5"),
    ],
)
def test_engine_takes_an_ipv6_address_after_other_hosts(url: str, address: str) -> None:
    engine = create_engine(url)
    assert getattr(engine, "address", None) == address


@pytest.mark.parametrize("scheme", ["redis+sentinel", "redis+cluster", "postgresql", "nats"])
@pytest.mark.parametrize("hosts", ["a,[::1", "a,::1]"])
def test_engine_refuses_a_bracket_in_the_wrong_place(scheme: str, hosts: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        create_engine(f"{scheme}://user:secret@{hosts}/main")
    assert "secret" not in str(caught.value)
    assert "::1" not in str(caught.value)


# As settings give them.


def as_type(kind: Any, url: str) -> Any:
    return TypeAdapter(kind).validate_python(url)


REDIS, NATS = "redis://:p%40ss@localhost:7/2", "nats://u:p@a:1,b:2"
POSTGRES = "postgresql+asyncpg://u:p@a:1/db?prepared_statement_cache_size=0&channel_binding=require&pgbouncer=true"


@pytest.mark.parametrize(
    ("url", "password"),
    [
        (as_type(RedisDsn, REDIS), "p@ss"),
        (as_type(AnyUrl, REDIS), "p@ss"),
        (SecretStr(REDIS), "p@ss"),
        (as_type(Secret[RedisDsn], REDIS), "p@ss"),
        (as_type(NatsDsn, NATS), "p"),
        (SecretStr(NATS), "p"),
        (as_type(PostgresDsn, POSTGRES), "p"),
        (make_url(POSTGRES), "p"),
        (SecretStr(POSTGRES), "p"),
    ],
)
def test_url_may_be_of_the_types_of_settings(url: Any, password: str) -> None:
    engine: Any = create_engine(url)
    target = engine._target
    options = target.options if hasattr(target, "options") else target.access._options
    assert options["password"] == password
    assert type(engine)(url)._target.address == target.address
    assert "localhost" in target.address or "a:1" in target.address


@pytest.mark.parametrize("url", [None, 5, b"redis://localhost", ["redis://localhost"], object()])
def test_what_is_no_url_is_refused(url: Any) -> None:
    with pytest.raises(ConfigurationError, match="a URL or an Engine, not"):
        create_engine(url)


@pytest.mark.parametrize(
    ("make", "url", "problem"),
    [
        (RedisEngine, "redis://localhost?prefix=shop", "prefix is an argument of RedisEngine"),
        (RedisEngine, "redis+cluster://localhost?fail_fast=true", "fail_fast is an argument of RedisEngine"),
        (NATSEngine, "nats://localhost?prefix=shop", "options are arguments of NATSEngine"),
        (SQLiteEngine, "sqlite:///messages.db", "SQLiteEngine takes the path of a file"),
    ],
)
def test_url_of_a_manager_is_none_of_an_engine(make: Callable[[str], Engine], url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        make(url)
