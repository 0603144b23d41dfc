"""The engine for apps that have Redis or Valkey: one server, a server that sentinels watch, or a cluster."""

from __future__ import annotations

from typing import Any, Self
from urllib.parse import unquote

from wsbroadcast.engines import URL
from wsbroadcast.engines.broker import DEFAULT_TIMING, MAX_MESSAGE_BYTES, truth
from wsbroadcast.engines.broker.envelope import MAX_HEADER_BYTES
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX
from wsbroadcast.engines.broker.presence import PresentEngine, PresentLink
from wsbroadcast.engines.redis.cluster import ClusterLink
from wsbroadcast.engines.redis.history import Written
from wsbroadcast.engines.redis.link import ServerLink
from wsbroadcast.engines.redis.options import split_url, target_from_client, target_from_url
from wsbroadcast.engines.redis.presence import Held
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.options import Timing
from wsbroadcast.text import plain


class RedisEngine(PresentEngine):
    """Links nodes through the pub/sub of Redis or Valkey, version 5 or later. Only histories and presence are stored.

    Each audience has a pub/sub channel, such as `prefix:channel:news`. The order of the messages to an audience is the
    same on every node. Pub/sub ignores the number of a database: only `prefix` separates apps that share a Redis.

    The user that connects needs `&prefix:* +publish +subscribe +unsubscribe`; with sentinels `+role` too, and at them
    `+sentinel|get-master-addr-by-name`; in a cluster `&prefix:* +spublish +ssubscribe +sunsubscribe +ping
    +cluster|slots`. Two options need more: a database `+select`, and `client_name` `+client|setname`. A history needs
    `~prefix:* +del +eval +evalsha +get +hmget +hset +info +pexpire +pttl +set +time +xadd +xdel +xrevrange`. Presence
    needs `~prefix:* +eval +evalsha +exists +hdel +hexists +hget +hgetall +hincrby +hkeys +hlen +hmget +hscan +hset
    +info +pexpire +sadd +srandmember +srem +sscan +time +zadd +zrangebyscore +zrem +zscore`.

    Redis disconnects a node if too much waits for it, by default 32 MiB (`client-output-buffer-limit`). This shows as a
    gap. A single message of that size would disconnect all nodes.

    Args:
        url: `redis://user:password@host:6379`, `rediss://…` for TLS, `unix:///path/of/the/socket`,
            `redis+sentinel://host:26379,host:26379/service` or `redis+cluster://host:6379,host:6379`; with TLS
            `rediss+sentinel://…` and `rediss+cluster://…`. By default `redis://localhost`.
        client: Instead of a URL, a `redis.asyncio.Redis`, also one made by a `Sentinel`, or a `RedisCluster`. The
            engine connects to the same place in the same way. It makes its own connections, and doesn't use the client.
        prefix: The beginning of all names. Apps that share a Redis need different prefixes.
        fail_fast: Whether `start` raises if Redis can't be reached. Otherwise it starts without Redis.
        max_message_bytes: The largest payload that is taken from Redis or given to it, in bytes.
        timing: How long to wait for Redis.
        options: Options of redis-py's `Redis` for login and encryption, such as `username`, `password`,
            `credential_provider`, `client_name`, `socket_keepalive` and `ssl_ca_certs`; and `sentinel_username` and
            `sentinel_password` for the sentinels themselves. Options for timeouts and retries have no effect.

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
            raise ConfigurationError(
                "RedisEngine takes a client, or a URL and options, not both: the client has its own"
            )
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
        self._held = Held()

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from a URL. Its query may have `prefix`, `fail_fast` and options of redis-py.

        Raises:
            ConfigurationError: If the URL makes no sense.
        """
        split_url(url)  # else an error below might repeat a part of a password
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

    def new_link(self) -> PresentLink:
        """Make a link that isn't open yet."""
        kind = ClusterLink if self._target.kind == "cluster" else ServerLink
        most = self._max_message_bytes + MAX_HEADER_BYTES + 1
        return kind(
            self._target,
            self._prefix,
            self.names,
            self._timing,
            most,
            self.told_rules,
            self._written,
            self._held,
            only_publishes=self.only_publishes,
        )
