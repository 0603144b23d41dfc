"""Real brokers as child processes on free ports of 127.0.0.1, with their data in a temporary directory.

Use them with `with`: a broker runs inside the block, and is gone afterwards. Blocking methods have async twins:
`started`, `stopped`, `killed`, `restarted`.
"""

from tests.support.brokers.base import HOST, Broker, Endpoint, free_port
from tests.support.brokers.nats import JetStreamServer, NATSServer, jetstream_cluster
from tests.support.brokers.postgres import PostgresServer
from tests.support.brokers.programs import BrokerMissing
from tests.support.brokers.redis import RedisServer, ValkeyServer
from tests.support.brokers.redis_groups import RedisSentinel, redis_cluster, redis_sentinel

__all__ = [
    "HOST",
    "Broker",
    "BrokerMissing",
    "Endpoint",
    "JetStreamServer",
    "NATSServer",
    "PostgresServer",
    "RedisSentinel",
    "RedisServer",
    "ValkeyServer",
    "free_port",
    "jetstream_cluster",
    "redis_cluster",
    "redis_sentinel",
]
