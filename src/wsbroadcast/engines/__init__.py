"""Engines link this process to the other nodes. The scheme of a URL picks the engine."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Protocol
from urllib.parse import SplitResult, urlsplit

from wsbroadcast.engines.contract import Engine
from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.text import plain

# Module and class by scheme. A module is imported when its scheme is used, because it imports a driver.
_SCHEMES = {
    "memory": ("memory", "MemoryEngine"),
    "nats": ("nats", "NATSEngine"),
    "postgres": ("postgres", "PostgresEngine"),
    "postgresql": ("postgres", "PostgresEngine"),
    "postgresql+asyncpg": ("postgres", "PostgresEngine"),
    "postgresql+psycopg": ("postgres", "PostgresEngine"),
    "redis": ("redis", "RedisEngine"),
    "redis+cluster": ("redis", "RedisEngine"),
    "redis+sentinel": ("redis", "RedisEngine"),
    "redis+unix": ("redis", "RedisEngine"),
    "rediss": ("redis", "RedisEngine"),
    "rediss+cluster": ("redis", "RedisEngine"),
    "rediss+sentinel": ("redis", "RedisEngine"),
    "sqlite": ("sqlite", "SQLiteEngine"),
    "sqlite+aiosqlite": ("sqlite", "SQLiteEngine"),
    "sqlite+pysqlite": ("sqlite", "SQLiteEngine"),
    "tls": ("nats", "NATSEngine"),
    "unix": ("redis", "RedisEngine"),
}


class _Pydantic(Protocol):
    def unicode_string(self) -> str: ...


class _Secret(Protocol):
    def get_secret_value(self) -> str: ...


class _SQLAlchemy(Protocol):
    def render_as_string(self, hide_password: bool = ...) -> str: ...


URL = str | _Pydantic | _Secret | _SQLAlchemy
"""A URL as settings give it: a str, a URL or a secret of pydantic (`RedisDsn`, `SecretStr`), a URL of SQLAlchemy."""


def url_text(url: object) -> str | None:
    """Return the text of a URL, password included; `None` if the object is no URL."""
    if isinstance(url, str):
        return plain(url)
    if hasattr(url, "get_secret_value"):
        return url_text(url.get_secret_value())
    if hasattr(url, "render_as_string"):  # whose `str` hides the password
        return url_text(url.render_as_string(hide_password=False))
    return url_text(url.unicode_string()) if hasattr(url, "unicode_string") else None


def create_engine(engine: URL | Engine) -> Engine:
    """Return the engine that a URL names; an engine object is returned as it is.

    Raises:
        ConfigurationError: If no engine has the URL's scheme. The error doesn't repeat the URL, which may hold a
            password.
        MissingDependency: If the engine's driver isn't installed.
    """
    if isinstance(engine, Engine):
        return engine
    url = url_text(engine)
    if url is None:
        raise ConfigurationError(
            f"engine must be a URL or an Engine, not {kind_of(engine)}; "
            "if that is a Redis client, write RedisEngine(client=…)"
        )
    try:
        scheme = split_hosts(url).scheme
    except ValueError:
        raise ConfigurationError(
            "the engine's URL can't be parsed: expected one such as redis://user:password@host:6379/0, with special "
            "characters of the password percent-encoded"
        ) from None  # the parser's error repeats a password
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise ConfigurationError(
            f"no engine for a URL with the scheme {scheme!r}, such as redis:// in redis://localhost; known are {known}"
        )
    module, name = _SCHEMES[scheme]
    kind: type[Engine] = getattr(import_module(f"wsbroadcast.engines.{module}"), name)
    return kind.from_url(url)


# URLs with several hosts.


_START = re.compile(r"(\s*[a-z][a-z0-9+.-]*:)//([^/?#]*)", re.IGNORECASE)

# `urlsplit` leaves these out, so that a newline after a URL does no harm.
_LEFT_OUT = dict.fromkeys(map(ord, "\t\r\n"))


def split_hosts(url: str) -> SplitResult:
    """Split a URL like `urlsplit`, but allow a list of hosts: `redis+sentinel://a,b:7000,[::1]/main`.

    `urlsplit` of newer Pythons, such as 3.13.5 and 3.14, refuses an IPv6 address after other hosts. The hosts aren't
    checked here. The code that reads them checks them.

    Raises:
        ValueError: If it can't be split.
    """
    url = url.translate(_LEFT_OUT)
    start = _START.match(url)
    if start is None:
        return urlsplit(url)
    scheme, netloc = start.groups()
    return urlsplit(f"{scheme}//{url[start.end() :]}")._replace(netloc=netloc)
