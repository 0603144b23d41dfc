"""What a node answers about itself: its connections, its channels, and its health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from heapq import nlargest, nsmallest
from typing import Any, Protocol

from wsbroadcast.audience import EVERYONE
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.engines.contract import Engine
from wsbroadcast.node.drain import Drain
from wsbroadcast.node.siblings import Reply, Siblings
from wsbroadcast.stats import Stats

MAX_LIMIT = 500
"""How many connections or channels one answer has at most."""

MAX_CHANNELS_SHOWN = 20
"""How many channels of one connection an answer has at most."""

MAX_OVER = 3600.0
"""The longest time of a drain, in seconds."""

_SHOWN = ("connections", "users", "channels", "behind", "backlog_bytes", "backlog_messages", "broadcasts", "deliveries")

_ECHO_SECONDS = 0.5

# Each node names so many times more large channels than are wanted, because the answers of nodes are added up.
_MORE = 10


def connections_of(registry: Registry[Connection], arguments: Mapping[str, Any]) -> Reply:
    """Describe connections: those after an id in the order of ids, or those with the largest backlogs.

    Raises:
        ValueError: If the arguments make no sense.
    """
    match arguments:
        case {
            "limit": int() as limit,
            "after": str() as after,
            "channel": str() | None as channel,
            "user": str() | None as user,
            "slow": bool() as slow,
        } if 0 < limit <= MAX_LIMIT:
            pass
        case _:
            raise ValueError("these are not the arguments of a question about connections")
    found: Iterable[Connection] = registry.recipients(EVERYONE)
    if user is not None:
        found = registry.users.get(user, ())
    if channel is not None:
        found = (each for each in found if channel in each.channels)
    if slow:
        found = [each for each in found if each._sink.held_bytes]
        total = len(found)
        chosen = nlargest(limit, found, key=lambda each: each._sink.held_bytes)
    else:
        found = list(found)
        total = len(found)
        chosen = nsmallest(limit + 1, (each for each in found if each.id > after), key=lambda each: each.id)
    now = time.monotonic()
    return Reply({"total": total, "has_more": len(chosen) > limit}, (_described(each, now) for each in chosen[:limit]))


def _described(connection: Connection, now: float) -> dict[str, Any]:
    sink, channels = connection._sink, sorted(connection.channels)
    return {
        "id": connection.id,
        "user": connection._user_key,
        "channels": channels[:MAX_CHANNELS_SHOWN],
        "channel_count": len(channels),
        "age": round(now - connection._opened_at, 1),
        "address": _address_of(connection),
        "sink": sink.kind,
        "backlog_bytes": sink.held_bytes,
        "backlog_messages": sink.held_messages,
    }


def _address_of(connection: Connection) -> str | None:
    client = connection.websocket.client
    return None if client is None else str(client.host)[:64]


def channels_of(registry: Registry[Connection], arguments: Mapping[str, Any]) -> Reply:
    """List channels, with the number of their connections here: those after a name, or the largest.

    Raises:
        ValueError: If the arguments make no sense.
    """
    match arguments:
        case {
            "limit": int() as limit,
            "after": str() as after,
            "prefix": str() as prefix,
            "largest": bool() as largest,
        }:
            if not 0 < limit <= MAX_LIMIT:
                raise ValueError("a question about channels has another limit")
        case _:
            raise ValueError("these are not the arguments of a question about channels")
    names = [name for name in registry.channels if name.startswith(prefix)]
    if largest:
        limit *= _MORE
        chosen = nlargest(limit + 1, names, key=lambda name: len(registry.channels[name]))
    else:
        chosen = nsmallest(limit + 1, (name for name in names if name > after))
    items = ({"name": name, "connections": len(registry.channels[name])} for name in _present(chosen[:limit], registry))
    return Reply({"total": len(names), "has_more": len(chosen) > limit}, items)


def _present(names: Iterable[str], registry: Registry[Connection]) -> Iterator[str]:
    return (name for name in names if name in registry.channels)


class Node(Protocol):
    """What reports need of a node."""

    registry: Registry[Connection]
    drain: Drain

    def stats(self) -> Stats: ...  # noqa: D102  # as the node says
    def know_siblings(self) -> Siblings: ...  # noqa: D102


class Reports:
    """Answers the questions of other nodes, and those of this one.

    Args:
        node: The node that is described.
        engine: Tells the health of the broker.
    """

    def __init__(self, node: Node, engine: Engine) -> None:
        self._node = node
        self._engine = engine
        self._began = time.monotonic()

    async def respond(self, topic: str, arguments: Mapping[str, Any]) -> Reply:
        """Answer a question.

        Raises:
            ValueError: If the question isn't understood, such as one of a newer release.
        """
        match topic:
            case "node":
                return Reply(await self._node_itself())
            case "stats":
                return Reply(asdict(self._node.stats()))
            case "connections":
                return connections_of(self._node.registry, arguments)
            case "channels":
                return channels_of(self._node.registry, arguments)
            case "drain":
                return self._drain(arguments)
        raise ValueError(f"there is no topic {topic!r:.80}")

    async def _node_itself(self) -> dict[str, Any]:
        stats = self._node.stats()
        return {
            "is_draining": self._node.drain.is_begun,
            "uptime": round(time.monotonic() - self._began, 1),
            "engine": await self._health(),
            "reconnects": stats.engine.reconnects,
            "gaps": stats.engine.gaps,
            "bad_envelopes": sum(stats.engine.bad_envelopes.values()),
        } | {name: getattr(stats, name) for name in _SHOWN}

    async def _health(self) -> dict[str, Any]:
        # If the echo takes longer than the answer may take, that counts as trouble.
        try:
            async with asyncio.timeout(_ECHO_SECONDS):
                health = await self._engine.health()
        except TimeoutError:
            return {"name": self._engine.name, "is_ok": False, "detail": f"no echo within {_ECHO_SECONDS} s"}
        return {"name": health.engine, "is_ok": health.is_ok, "detail": health.detail[:500]}

    def _drain(self, arguments: Mapping[str, Any]) -> Reply:
        match arguments:
            case {"family": str() as family, "over": int() | float() as over} if 0 <= over <= MAX_OVER:
                siblings = self._node.know_siblings()
                is_meant = family == siblings.me.family
                if is_meant:
                    self._node.drain.begin(over)
                return Reply({"is_meant": is_meant})
        raise ValueError("these are not the arguments of a drain")
