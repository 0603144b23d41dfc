"""From a URL, or from a client of redis-py that the app has already, to a target."""

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
"""Every scheme of the engine: what it means, redis-py's own scheme for it, the port if none is given."""

# The options of redis-py that make a difference here, besides everything that begins with `ssl_`.
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

# Those that make none: how long to wait, when to try again and how to decode is ours. A URL may have them all the same,
# because it may be the one that the app's cache uses too.
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
    """Split a URL into its parts, none of which can be a part of a password.

    Raises:
        ConfigurationError: If it isn't one of Redis, or a character stands where it may have ended user and password
            too early. Neither the URL nor a part of it is repeated: a password that isn't quoted may be in any of them.
    """
    text = url_text(url)
    if text is None:
        raise ConfigurationError(f"the URL of Redis is a str, not {kind_of(url)}; a client is given by client=…")
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
    """Read a URL.

    Args:
        url: One with a scheme of `SCHEMES`.
        options: More options of redis-py, which a URL can't hold.

    Raises:
        ConfigurationError: If it makes no sense. Neither the URL nor a part of it is repeated.
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
        raise ConfigurationError(f"{parts.scheme}:// has one host; several are those of sentinels or of a cluster")
    if kind == "sentinel":
        return _of_sentinels(scheme, login, hosts, parts.path, query, options)
    return Target(kind=kind, access=_access(scheme, login, parts.path, query, options), hosts=hosts)


def target_from_client(client: object) -> Target:
    """Take over where a client of redis-py connects to, and how; the client itself is neither used nor closed.

    Raises:
        ConfigurationError: If it is not valid.
    """
    if not isinstance(client, (Redis, RedisCluster)):
        raise ConfigurationError(
            f"client must be a redis.asyncio.Redis or RedisCluster, not {kind_of(client)}{_instead_of(client)}"
        )
    try:
        return _of_cluster(client) if isinstance(client, RedisCluster) else _of_client(client)
    except ConfigurationError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a mock, or one that is made by halves
        raise ConfigurationError(
            f"where the client connects to can't be seen, it is a {kind_of(client)}: {type(error).__name__}; "
            "in tests use memory://"
        ) from None


def _instead_of(client: object) -> str:
    # What to write, by what of redis-py it is; the names are the same in its synchronous half.
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
        # Its own class of connections asks the sentinels by itself; we do.
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
    # User and password before the hosts are those of the Redis, as everything else; the sentinels share only TLS.
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
        raise ConfigurationError("what follows the host in the URL of Redis is the number of a database")
    _check_names({**query, **options})
    try:
        read: dict[str, Any] = dict(parse_url(f"{scheme}://{login and login + '@'}{path}?{urlencode(query)}"))
    except ValueError as error:
        # redis-py's own texts name an option; a parser's may repeat a part of the URL.
        why = str(error) if str(error).startswith("Invalid value for ") else "special characters are written as %XX"
        raise ConfigurationError(f"the URL of Redis can't be parsed: {why}") from None
    return _access_of({**read, **options}, read.get("connection_class", Connection))


def _access_of(options: Mapping[str, Any], kind: type[AbstractConnection] | None = None) -> Access:
    used = {name: value for name, value in options.items() if name in _USED or name.startswith("ssl_")}
    return Access(kind or options.get("connection_class", Connection), used)


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _USED | _UNUSED and not name.startswith("ssl_"):
            raise ConfigurationError(f"the Redis engine has no option {name!r:.40}; it takes those of redis-py's Redis")


def _hosts(places: str, port: int) -> tuple[Host, ...]:
    try:
        parts = [urlsplit(f"//{place}") for place in places.split(",")]
        return tuple(Host(part.hostname or "localhost", part.port or port) for part in parts)
    except ValueError:
        raise ConfigurationError("the URL of Redis can't be parsed: a host is written name:port") from None


def _host_of(options: Mapping[str, Any]) -> Host:
    return Host(str(options.get("host", "localhost")), int(options.get("port", 6379)))
