"""Where Redis is, and how redis-py connects and logs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wsbroadcast.engines.broker.link import Host
from wsbroadcast.exceptions import ConfigurationError, MissingDependency, kind_of

# All that is used of redis-py, which is installed only with the extra `redis`.
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


# The commands that keep what is published. Most of them are called inside scripts.
_TO_KEEP = "+del +eval +evalsha +get +hmget +hset +info +pexpire +pttl +set +time +xadd +xdel +xrevrange"

TO_BE_PRESENT = (
    "~{prefix}:* +eval +evalsha +exists +hdel +hexists +hget +hgetall +hincrby +hkeys +hlen +hmget +hscan +hset +info "
    "+pexpire +sadd +srandmember +srem +sscan +time +zadd +zrangebyscore +zrem +zscore"
)
"""The additional permissions for presence, as in `ACL SETUSER`."""


class Access:
    """How redis-py connects to a server and logs in: over TCP, TLS or a unix socket, and as which user.

    Args:
        connection_class: A class of redis-py's connections.
        options: Its arguments, except host and port.

    Raises:
        ConfigurationError: If redis-py refuses the options.
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
        """The name of the user."""
        return self._options.get("username") or "default"

    @property
    def permissions(self) -> str:
        """The permissions that the options need, as in `ACL SETUSER`. Logging in needs none."""
        needed = {"db": " +select", "client_name": " +client|setname"}
        return "".join(rule for name, rule in needed.items() if self._options.get(name))

    @property
    def path(self) -> str:
        """The path of the unix socket; empty if there is none."""
        return str(self._options.get("path", ""))

    def connection(self, host: Host | None) -> AbstractConnection:
        """Make a connection that isn't open yet.

        It has no retries and no timeouts, because the supervisor decides when to give up.
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
            # Shared by all connections, because loading the system's certificates blocks the event loop for a moment.
            assert isinstance(connection, SSLConnection)
            connection.ssl_context = self._tls
        return connection

    def load_certificates(self) -> None:
        """Read the certificates that the options name. Later calls do nothing.

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
    # The link takes over the socket of redis-py's connection. fakeredis has no socket, and connects in its own way.
    kind = type(connection)
    if not isinstance(connection, AbstractConnection) or not (
        kind.read_response is AbstractConnection.read_response
        or kind._connect in (Connection._connect, UnixDomainSocketConnection._connect)
    ):
        raise unreal(connection)


def unreal(connection: object) -> ConfigurationError:
    """Return the error for a connection that leads to no server."""
    return ConfigurationError(
        f"a {kind_of(connection)} is not a connection to a server, which RedisEngine needs; in tests use memory://"
    )


@dataclass(frozen=True, kw_only=True)
class Target:
    """A Redis server, or the sentinels that know it, or some nodes of a cluster."""

    kind: Literal["server", "sentinel", "cluster"]
    access: Access
    hosts: tuple[Host, ...] = ()
    """The server, the sentinels, or nodes of the cluster; empty for a unix socket."""
    service: str = ""
    """The name by which the sentinels know the Redis."""
    sentinel_access: Access | None = None

    @property
    def address(self) -> str:
        """The address for logs and errors, without user and password."""
        hosts = ",".join(str(host) for host in self.hosts) or self.access.path
        return f"{hosts}/{self.service}" if self.service else hosts

    def permissions(self, prefix: str, *, keeps: bool = False) -> str:
        """Return the permissions that the user needs, as in `ACL SETUSER`; those for keys only if something is kept."""
        rules = {
            "server": "+publish +subscribe +unsubscribe",
            "sentinel": "+publish +subscribe +unsubscribe +role",
            "cluster": "+spublish +ssubscribe +sunsubscribe +ping +cluster|slots",
        }
        kept = f" ~{prefix}:* {_TO_KEEP}" if keeps else ""
        return f"&{prefix}:* {rules[self.kind]}{self.access.permissions}{kept}"
