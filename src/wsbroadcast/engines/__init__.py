"""From this process to the other nodes; an engine is picked by the scheme of its URL."""

from __future__ import annotations

from importlib import import_module

from wsbroadcast.engines.contract import Engine
from wsbroadcast.engines.urls import split
from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.text import plain

# The module and class by scheme. A module is imported when its scheme is used, because it imports a driver.
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
    "tls": ("nats", "NATSEngine"),
    "unix": ("redis", "RedisEngine"),
}


def create_engine(engine: str | Engine) -> Engine:
    """Return the engine that a URL names; an engine object is returned as it is.

    Raises:
        ConfigurationError: If no engine has the URL's scheme. The URL itself is not repeated: it may hold a password.
        MissingDependency: If the engine's driver isn't installed.
    """
    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, str):
        raise ConfigurationError(
            f"engine must be a URL or an Engine, not {kind_of(engine)}; "
            "a client that you have may be given to RedisEngine(client=…)"
        )
    url = plain(engine)
    try:
        scheme = split(url).scheme
    except ValueError:
        raise ConfigurationError("the engine's URL can't be parsed") from None  # the parser's error repeats a password
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise ConfigurationError(f"no engine for a URL with the scheme {scheme!r}; known are {known}")
    module, name = _SCHEMES[scheme]
    kind: type[Engine] = getattr(import_module(f"wsbroadcast.engines.{module}"), name)
    return kind.from_url(url)
