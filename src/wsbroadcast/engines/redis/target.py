"""Where Redis is and how to get in; what redis-py does for us, and what it must not do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wsbroadcast.engines.broker.link import Host
from wsbroadcast.exceptions import ConfigurationError, MissingDependency, kind_of

# All that we use of redis-py, which is installed only with the extra `redis`.
try:
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.connection import (
        AbstractConnection,
        Connection,
        SSLConnection,
        UnixDomainSocketConnection,
        parse_url,
    )
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import SentinelConnectionPool
    from redis.backoff import NoBackoff
    from redis.crc import key_slot
    from redis.exceptions import AuthenticationError, AuthorizationError, DataError, RedisError, ResponseError
except ImportError as error:
    raise MissingDependency('the Redis engine needs redis-py: pip install "wsbroadcast[redis]"') from error

__all__ = [
    "AbstractConnection",
    "AuthenticationError",
    "AuthorizationError",
    "Connection",
    "DataError",
    "NoBackoff",
    "Redis",
    "RedisCluster",
    "RedisError",
    "ResponseError",
    "Retry",
    "SSLConnection",
    "SentinelConnectionPool",
    "UnixDomainSocketConnection",
    "key_slot",
    "parse_url",
]


# The commands that keep what is published, most of them inside of scripts.
_TO_KEEP = "+del +eval +evalsha +get +hmget +hset +info +pexpire +pttl +set +time +xadd +xdel +xrevrange"


class Access:
    """How redis-py gets into a server: over TCP, TLS or a unix socket, as which user.

    Args:
        connection_class: One of redis-py's connections.
        options: What it is made with, but for host and port.

    Raises:
        ConfigurationError: If it can't be made with them.
    """

    def __init__(self, connection_class: type[AbstractConnection], options: Mapping[str, Any]) -> None:
        self._connection_class = connection_class
        self._options = dict(options)
        self._tls: Any = None
        try:
            connection = self.connection(None)
        except (RedisError, AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"redis-py refuses the options: {str(error).partition(chr(10))[0]}") from None
        _check_real(connection)
        if isinstance(connection, SSLConnection):
            self._tls = connection.ssl_context

    @property
    def user(self) -> str:
        """As whom we connect."""
        return self._options.get("username") or "default"

    @property
    def permissions(self) -> str:
        """What the user needs because of the options, as in `ACL SETUSER`; to log in needs nothing."""
        needed = {"db": " +select", "client_name": " +client|setname"}
        return "".join(rule for name, rule in needed.items() if self._options.get(name))

    @property
    def path(self) -> str:
        """The unix socket, or an empty text."""
        return str(self._options.get("path", ""))

    def connection(self, host: Host | None) -> AbstractConnection:
        """Make a connection; it isn't open yet.

        It neither tries again nor ends by a timeout: when to give up is the supervisor's to say.
        """
        options = dict(self._options)
        if host is not None:
            options |= {"host": host.name, "port": host.port}
        connection = self._connection_class(
            **options,
            decode_responses=False,
            health_check_interval=0,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_connect_timeout=None,
            socket_timeout=None,
        )
        if self._tls is not None:
            # Shared, because to load the certificates of the system blocks the event loop for a moment.
            assert isinstance(connection, SSLConnection)
            connection.ssl_context = self._tls
        return connection

    def load_certificates(self) -> None:
        """Read the certificates that the options name; only the first time.

        Raises:
            ConfigurationError: If they can't be used.
        """
        if self._tls is None:
            return
        try:
            self._tls.get()
        except (OSError, ValueError) as error:  # an error of TLS is an OSError
            raise ConfigurationError(f"the options ssl_… for Redis can't be used: {error}") from None


def _check_real(connection: AbstractConnection) -> None:
    # Of redis-py's connections we take the socket over; fakeredis has none, and its own ways to connect and to read.
    kind = type(connection)
    if not isinstance(connection, AbstractConnection) or not (
        kind.read_response is AbstractConnection.read_response
        or kind._connect in (Connection._connect, UnixDomainSocketConnection._connect)
    ):
        raise unreal(connection)


def unreal(connection: object) -> ConfigurationError:
    """Return what to tell about a connection that leads to no server."""
    return ConfigurationError(
        f"a {kind_of(connection)} is not a connection to a server, which RedisEngine needs; in tests use memory://"
    )


@dataclass(frozen=True, kw_only=True)
class Target:
    """One Redis, or the sentinels that know which one, or some nodes of a cluster."""

    kind: Literal["server", "sentinel", "cluster"]
    access: Access
    hosts: tuple[Host, ...] = ()
    """The server, the sentinels or nodes of the cluster; none for a unix socket."""
    service: str = ""
    """What the sentinels call the Redis that is meant."""
    sentinel_access: Access | None = None

    @property
    def address(self) -> str:
        """Where it is, for logs and errors: without user and password."""
        hosts = ",".join(str(host) for host in self.hosts) or self.access.path
        return f"{hosts}/{self.service}" if self.service else hosts

    def permissions(self, prefix: str, *, keeps: bool = False) -> str:
        """What our user needs at a server, as in `ACL SETUSER`; keys only where something is kept."""
        rules = {
            "server": "+publish +subscribe +unsubscribe",
            "sentinel": "+publish +subscribe +unsubscribe +role",
            "cluster": "+spublish +ssubscribe +sunsubscribe +ping +cluster|slots",
        }
        kept = f" ~{prefix}:* {_TO_KEEP}" if keeps else ""
        return f"&{prefix}:* {rules[self.kind]}{self.access.permissions}{kept}"
