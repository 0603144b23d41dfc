"""Several Redis servers that belong together: a primary that a sentinel watches, and a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.support.brokers.processes import wait_until
from tests.support.brokers.redis import RedisServer

_SLOTS = 16384


@dataclass(frozen=True)
class RedisSentinel:
    """A primary, its replica, and one sentinel, which promotes the replica a second after the primary has gone."""

    primary: RedisServer
    replica: RedisServer
    sentinel: RedisServer
    service: str = "main"
    """What the sentinel calls the primary."""

    @property
    def address(self) -> tuple[str, int]:
        """Where the sentinel says that the primary is."""
        host, port = self.sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return host, int(port)


@contextmanager
def redis_sentinel(*, tls: bool = False) -> Iterator[RedisSentinel]:
    """Run a primary, a replica that has caught up, and a sentinel that knows both."""
    with ExitStack() as stack:
        primary = stack.enter_context(RedisServer(config={"repl-diskless-sync-delay": "0"}, tls=tls))
        replica = stack.enter_context(RedisServer(config={"replicaof": f"{primary.host} {primary.port}"}, tls=tls))
        wait_until(lambda: replica.command("INFO", "replication")["master_link_status"] == "up")
        settings = {
            "sentinel monitor main": f"{primary.host} {primary.port} 1",
            "sentinel down-after-milliseconds main": "1000",
            "sentinel failover-timeout main": "5000",
        }
        sentinel = stack.enter_context(RedisServer(config=settings, tls=tls, arguments=["--sentinel"]))
        wait_until(lambda: bool(sentinel.command("SENTINEL", "REPLICAS", "main")))
        yield RedisSentinel(primary, replica, sentinel)


@contextmanager
def redis_cluster(nodes: int = 3, *, tls: bool = False) -> Iterator[list[RedisServer]]:
    """Run a cluster of primaries, each with its share of the slots; without one of them it serves the others' slots."""
    settings = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": "1000",
        "cluster-require-full-coverage": "no",
    }
    with ExitStack() as stack:
        servers = [stack.enter_context(RedisServer(config=settings, tls=tls)) for _ in range(nodes)]
        for number, server in enumerate(servers):
            # Nodes of one epoch would have to settle first who has which slot.
            server.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            server.command("CLUSTER", "ADDSLOTS", *range(number * _SLOTS // nodes, (number + 1) * _SLOTS // nodes))
            server.command("CLUSTER", "MEET", servers[0].host, servers[0].port)
        wait_until(lambda: all(_knows_all(server, nodes) for server in servers))
        yield servers


def _knows_all(server: RedisServer, nodes: int) -> bool:
    lines = server.command("CLUSTER", "INFO").splitlines()
    return {"cluster_state:ok", f"cluster_slots_ok:{_SLOTS}", f"cluster_size:{nodes}"} <= set(lines)
