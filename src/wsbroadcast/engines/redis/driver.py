"""All that we use of redis-py, which is installed only with the extra `redis`."""

from __future__ import annotations

from wsbroadcast.exceptions import MissingDependency

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
