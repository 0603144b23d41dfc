"""The engine of apps that have Redis or Valkey: one server, one that sentinels name, or a cluster."""

from __future__ import annotations

from typing import Any, Self
from urllib.parse import unquote

from wsbroadcast.engines import URL
from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, truth
from wsbroadcast.engines.broker.envelope import MAX_HEADER_BYTES
from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.broker.link import KeepingLink
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.redis.cluster import ClusterLink
from wsbroadcast.engines.redis.history import Written
from wsbroadcast.engines.redis.link import ServerLink
from wsbroadcast.engines.redis.options import split_url, target_from_client, target_from_url
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.options import Timing
from wsbroadcast.text import plain


class RedisEngine(KeepingEngine):
    """Links nodes through the pub/sub of Redis or Valkey, version 5 or later; only what has a history is stored there.

    An audience is a channel, `prefix:channel:news`. The order of the messages to an audience is the same on every node.
    The number of a database means nothing to pub/sub: apps that share a Redis are kept apart by `prefix` alone.

    The user we connect as needs `&prefix:* +publish +subscribe +unsubscribe`; with sentinels `+role` too, and at them
    `+sentinel|get-master-addr-by-name`; in a cluster `&prefix:* +spublish +ssubscribe +sunsubscribe +ping
    +cluster|slots`. Two options need more: a database `+select`, and `client_name` `+client|setname`. A history needs
    `~prefix:* +del +eval +evalsha +get +hmget +hset +info +pexpire +pttl +set +time +xadd +xdel +xrevrange`.

    Redis cuts off a node for which too much waits, by default 32 MiB (`client-output-buffer-limit`), which shows as a
    gap. A single message as large as that would cut off all of them.

    Args:
        url: `redis://user:password@host:6379`, `rediss://…` for TLS, `unix:///path/of/the/socket`,
            `redis+sentinel://host:26379,host:26379/service` or `redis+cluster://host:6379,host:6379`; with TLS
            `rediss+sentinel://…` and `rediss+cluster://…`. Without it `redis://localhost`.
        client: Instead of the URL, a `redis.asyncio.Redis`, one made by a `Sentinel` too, or a `RedisCluster`: the
            engine connects to the same place in the same way. It makes connections of its own and leaves the client
            alone.
        prefix: What all channels begin with; apps that share a Redis take one each.
        fail_fast: Whether `start` raises if Redis can't be reached, instead of beginning degraded.
        max_message_bytes: The largest payload that is taken from Redis or given to it, in bytes.
        timing: How long to wait for Redis.
        options: Those of redis-py's `Redis` that say who we are and how to encrypt, such as `username`, `password`,
            `credential_provider`, `client_name`, `socket_keepalive` and `ssl_ca_certs`; for the sentinels themselves
            `sentinel_username` and `sentinel_password`. Those about timeouts and retries change nothing.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    name = "redis"

    def __init__(
        self,
        url: URL | None = None,
        *,
        client: object = None,
        prefix: str = DEFAULT_PREFIX,
        fail_fast: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        timing: Timing = DEFAULT_TIMING,
        **options: Any,
    ) -> None:
        if client is None:
            self._target = target_from_url("redis://localhost" if url is None else url, options)
        elif url is not None or options:
            raise ConfigurationError("RedisEngine takes a client, or a URL and options: the client has its own")
        else:
            self._target = target_from_client(client)
        super().__init__(
            prefix=prefix,
            address=self._target.address,
            fail_fast=fail_fast,
            max_message_bytes=max_message_bytes,
            timing=timing,
        )
        self._prefix = plain(prefix)
        self._written = Written(self._prefix)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from a URL whose query may hold `prefix`, `fail_fast` and options of redis-py.

        Raises:
            ConfigurationError: If it makes no sense.
        """
        split_url(url)  # else what is named here as wrong may be a part of a password
        place, _, query = url.partition("?")
        ours: dict[str, Any] = {}
        theirs = []
        for option in query.split("&"):
            name, _, value = option.partition("=")
            if name == "prefix":
                ours[name] = unquote(value)
            elif name == "fail_fast":
                ours[name] = truth(name, value, "Redis")
            else:
                theirs.append(option)
        return cls(f"{place}?{'&'.join(theirs)}", **ours)

    def new_link(self) -> KeepingLink:
        """Make a link that isn't open yet."""
        kind = ClusterLink if self._target.kind == "cluster" else ServerLink
        most = self._max_message_bytes + MAX_HEADER_BYTES + 1
        return kind(
            self._target,
            self._prefix,
            self._timing,
            most,
            self.told_rules,
            self._written,
            only_publishes=self.only_publishes,
        )
