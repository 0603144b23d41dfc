"""Makes a target of a URL, or of a redis-py client that the app has already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from wsbroadcast.engines import URL, split_hosts, url_text
from wsbroadcast.engines.broker.link import Host
from wsbroadcast.engines.redis.target import (
    AbstractConnection,
    Access,
    Connection,
    Redis,
    RedisCluster,
    SentinelConnectionPool,
    SSLConnection,
    Target,
    parse_url,
)
from wsbroadcast.exceptions import ConfigurationError, kind_of

Kind = Literal["server", "sentinel", "cluster"]

SCHEMES: dict[str, tuple[Kind, str, int]] = {
    "redis": ("server", "redis", 6379),
    "redis+cluster": ("cluster", "redis", 6379),
    "redis+sentinel": ("sentinel", "redis", 26379),
    "redis+unix": ("server", "unix", 0),
    "rediss": ("server", "rediss", 6379),
    "rediss+cluster": ("cluster", "rediss", 6379),
    "rediss+sentinel": ("sentinel", "rediss", 26379),
    "unix": ("server", "unix", 0),
}
"""Each scheme of the engine: what it means, redis-py's own scheme for it, and the default port."""

# The options of redis-py that have an effect here, besides all that begin with `ssl_`.
_USED = {
    "client_name",
    "credential_provider",
    "db",
    "password",
    "path",
    "socket_keepalive",
    "socket_keepalive_options",
    "socket_type",
    "username",
}

# The options that have no effect: the engine itself decides how long to wait, when to try again and how to decode. A
# URL may still have them, because the app's cache may use the same URL.
_UNUSED = {
    "decode_responses",
    "encoding",
    "encoding_errors",
    "health_check_interval",
    "legacy_responses",
    "max_connections",
    "protocol",
    "retry_on_timeout",
    "socket_connect_timeout",
    "socket_read_size",
    "socket_timeout",
    "timeout",
}

_OF_SENTINELS = {"sentinel_password", "sentinel_username"}


def split_url(url: URL) -> SplitResult:
    """Split a URL into its parts, so that none of them can be a piece of a password.

    Raises:
        ConfigurationError: If it is no URL of Redis, or has a character that may have ended user and password too
            early. The error repeats no part of the URL, because each part may hold an unquoted password.
    """
    text = url_text(url)
    if text is None:
        raise ConfigurationError(f"the URL of Redis is a str, not {kind_of(url)}; give a client as client=…")
    try:
        parts = split_hosts(text)
        SCHEMES[parts.scheme]
    except (KeyError, ValueError):
        raise ConfigurationError(
            f"a URL of Redis begins with one of {', '.join(f'{name}://' for name in SCHEMES)}"
        ) from None
    if parts.fragment:
        raise ConfigurationError("the URL of Redis has a # in it: in a user or a password it is written %23")
    if "@" in parts.query:
        raise ConfigurationError("the URL of Redis has an @ after its ?: in a user or a password these are %40 and %3F")
    if "@" in parts.path:
        raise ConfigurationError(
            "the URL of Redis has an @ after its first /: it is written %40 there, and / in a user or a password %2F"
        )
    return parts


def target_from_url(url: URL, options: Mapping[str, Any]) -> Target:
    """Make a target of a URL.

    Args:
        url: The URL, with a scheme of `SCHEMES`.
        options: More options of redis-py, which a URL can't hold.

    Raises:
        ConfigurationError: If the URL makes no sense. The error repeats no part of it.
    """
    parts = split_url(url)
    kind, scheme, port = SCHEMES[parts.scheme]
    login, _, places = parts.netloc.rpartition("@")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if scheme == "unix" and (places or not parts.path):
        raise ConfigurationError(
            "the URL of a unix socket is unix:///path/of/the/socket: it has no host, and / in a password is %2F"
        )
    hosts = _hosts(places, port) if scheme != "unix" else ()
    if kind == "server" and len(hosts) > 1:
        raise ConfigurationError(
            f"{parts.scheme}:// has one host: with several hosts use redis+sentinel:// or redis+cluster://"
        )
    if kind == "sentinel":
        return _of_sentinels(scheme, login, hosts, parts.path, query, options)
    return Target(kind=kind, access=_access(scheme, login, parts.path, query, options), hosts=hosts)


def target_from_client(client: object) -> Target:
    """Make a target of a redis-py client. The client itself is neither used nor closed.

    Raises:
        ConfigurationError: If it is no such client, or its settings make no sense.
    """
    if not isinstance(client, (Redis, RedisCluster)):
        raise ConfigurationError(
            f"client must be a redis.asyncio.Redis or RedisCluster, not {kind_of(client)}{_instead_of(client)}"
        )
    try:
        return _of_cluster(client) if isinstance(client, RedisCluster) else _of_client(client)
    except ConfigurationError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a mock, or a client that isn't complete
        raise ConfigurationError(
            f"a {kind_of(client)} doesn't show where it connects to ({type(error).__name__}): give a real client, "
            "or in tests use memory://"
        ) from None


def _instead_of(client: object) -> str:
    # What to write instead, by the class of redis-py. Its synchronous classes have the same names.
    if isinstance(client, str):
        return ": a URL is the first argument"
    known = {
        "Redis": ", which blocks the event loop",
        "RedisCluster": ", which blocks the event loop",
        "Sentinel": ": take what its `master_for` returns",
        "BlockingConnectionPool": ": take redis.asyncio.Redis(connection_pool=…)",
        "ConnectionPool": ": take redis.asyncio.Redis(connection_pool=…)",
    }
    names = (each.__name__ for each in type(client).__mro__ if each.__module__.partition(".")[0] == "redis")
    return next((known[name] for name in names if name in known), "")


def _of_cluster(client: RedisCluster) -> Target:
    nodes = client.nodes_manager.startup_nodes.values()
    hosts = tuple(Host(str(node.host), int(node.port)) for node in nodes)
    return Target(kind="cluster", access=_access_of(client.connection_kwargs), hosts=hosts)


def _of_client(client: Redis) -> Target:
    pool = client.connection_pool
    if isinstance(pool, SentinelConnectionPool):
        # The client's own class of connections asks the sentinels by itself. Here the link does that.
        kind = SSLConnection if issubclass(pool.connection_class, SSLConnection) else Connection
        sentinels = [each.connection_pool for each in pool.sentinel_manager.sentinels]
        return Target(
            kind="sentinel",
            access=_access_of(pool.connection_kwargs, kind),
            hosts=tuple(_host_of(each.connection_kwargs) for each in sentinels),
            service=str(pool.service_name),
            sentinel_access=_access_of(sentinels[0].connection_kwargs, sentinels[0].connection_class),
        )
    access = _access_of(pool.connection_kwargs, pool.connection_class)
    return Target(kind="server", access=access, hosts=() if access.path else (_host_of(pool.connection_kwargs),))


def _of_sentinels(
    scheme: str, login: str, hosts: tuple[Host, ...], path: str, query: dict[str, str], options: Mapping[str, Any]
) -> Target:
    # User and password before the hosts are for Redis, and so are all options. For the sentinels only TLS is used.
    service = unquote(path.strip("/"))
    if not service:
        raise ConfigurationError("the URL ends with the name of a service: redis+sentinel://host1,host2/service")
    return Target(
        kind="sentinel",
        access=_access(scheme, login, "", _without_theirs(query), _without_theirs(options)),
        hosts=hosts,
        service=service,
        sentinel_access=_access(scheme, "", "", _theirs(query), _theirs(options)),
    )


def _theirs(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("sentinel_"): value
        for name, value in options.items()
        if name in _OF_SENTINELS or name.startswith("ssl_")
    }


def _without_theirs(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _OF_SENTINELS}


def _access(scheme: str, login: str, path: str, query: Mapping[str, Any], options: Mapping[str, Any]) -> Access:
    if scheme != "unix" and path.strip("/") and not path.strip("/").isdecimal():
        raise ConfigurationError("after the host, the URL of Redis has the number of a database, such as /0")
    for name in ("prefix", "fail_fast"):  # which stand in the URL of a manager; `from_url` has taken them out
        if name in query:
            raise ConfigurationError(f"{name} is an argument of RedisEngine, and not in its URL")
    _check_names({**query, **options})
    try:
        read: dict[str, Any] = dict(parse_url(f"{scheme}://{login and login + '@'}{path}?{urlencode(query)}"))
    except ValueError as error:
        # redis-py's own texts only name an option. A parser's text may repeat a part of the URL.
        why = str(error) if str(error).startswith("Invalid value for ") else "special characters are written as %XX"
        raise ConfigurationError(f"the URL of Redis can't be parsed: {why}") from None
    return _access_of({**read, **options}, read.get("connection_class", Connection))


def _access_of(options: Mapping[str, Any], kind: type[AbstractConnection] | None = None) -> Access:
    used = {name: value for name, value in options.items() if name in _USED or name.startswith("ssl_")}
    return Access(kind or options.get("connection_class", Connection), used)


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _USED | _UNUSED and not name.startswith("ssl_"):
            raise ConfigurationError(
                f"the Redis engine has no option {name!r:.40}: it takes prefix, fail_fast and those of redis-py's Redis"
            )


def _hosts(places: str, port: int) -> tuple[Host, ...]:
    try:
        parts = [urlsplit(f"//{place}") for place in places.split(",")]
        return tuple(Host(part.hostname or "localhost", part.port or port) for part in parts)
    except ValueError:
        raise ConfigurationError("the URL of Redis can't be parsed: a host is written name:port") from None


def _host_of(options: Mapping[str, Any]) -> Host:
    return Host(str(options.get("host", "localhost")), int(options.get("port", 6379)))
