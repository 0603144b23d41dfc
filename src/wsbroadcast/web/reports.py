"""The answers of the operations router, and how the answers of several nodes become one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from wsbroadcast.node.siblings import Answer, Answers, NodeInfo

# The answers of one node. They come by a broker, so they are checked like messages of a client.


class Head(BaseModel):
    """What a node says before a list: how much there is."""

    total: int = Field(ge=0)
    has_more: bool


class ConnectionReport(BaseModel):
    """One connection."""

    id: str = Field(description="Its id, as in `Connection.id`.")
    user: str | None = Field(description="Its user, as text; null if it has none.")
    channels: list[str] = Field(description="The first 20 of its channels, by name.")
    channel_count: int = Field(description="How many channels it is in.")
    age: float = Field(description="Seconds since it was accepted.")
    address: str | None = Field(description="The peer's address, as the server names it.")
    sink: str = Field(description="How it is written to: `uvicorn` is the fast path, `asgi` works on every server.")
    backlog_bytes: int = Field(description="Bytes that wait for it because it is slow.")
    backlog_messages: int = Field(description="Messages that wait for it because it is slow.")
    node: str = Field("", description="The id of the node that it is connected to.")


class ChannelReport(BaseModel):
    """One channel."""

    name: str = Field(description="Its name.")
    connections: int = Field(description="How many connections are subscribed to it, on the nodes that answered.")


class EngineReport(BaseModel):
    """How a node reaches the others."""

    name: str = Field(description="The engine.")
    is_ok: bool = Field(description="Whether an echo comes back through the broker.")
    detail: str = Field(description="What is wrong, if anything.")


class NodeState(BaseModel):
    """The state of a node."""

    is_draining: bool = Field(description="Whether it sends its connections away and takes no new ones.")
    uptime: float = Field(description="Seconds since it was made.")
    engine: EngineReport
    reconnects: int = Field(description="How often a lost connection to the broker was replaced.")
    gaps: int = Field(description="Outages after which messages of other nodes were missing.")
    bad_envelopes: int = Field(description="Envelopes from the broker that were not valid and were dropped.")
    connections: int = Field(description="Connections now.")
    users: int = Field(description="Users with a connection to this node now.")
    channels: int = Field(description="Channels with a connection to this node now.")
    behind: int = Field(description="Connections past their high-water mark now.")
    backlog_bytes: int = Field(description="Bytes that wait for slow consumers now.")
    backlog_messages: int = Field(description="Messages that wait for slow consumers now.")
    broadcasts: int = Field(description="Broadcasts that were handed over to connections here, since the start.")
    deliveries: int = Field(description="Messages that were handed over to connections here, since the start.")


class DrainState(BaseModel):
    """Whether a drain is for a node."""

    is_meant: bool


H = TypeVar("H")
Item = TypeVar("Item")


class NodeReply(BaseModel, Generic[H, Item]):
    """The answer of a node, as JSON."""

    head: H
    items: list[Item] = []
    is_cut: bool = False


# The answers of the router.


class NodeName(BaseModel):
    """Names a node."""

    id: str = Field(description="Unique, and a new one in each process.")
    host: str = Field(description="The name of its machine or container.")
    pid: int = Field(description="Its process.")

    @classmethod
    def of(cls, info: NodeInfo) -> NodeName:
        """Return the name of a node."""
        return cls(id=info.id, host=info.host, pid=info.pid)


class ClusterReport(BaseModel):
    """What all nodes say together. Numbers count only the nodes that answered."""

    answered: int = Field(description="Nodes that answered within a second.")
    known: int = Field(description="Nodes that are known: this one, and those heard of within 15 s.")
    silent: list[NodeName] = Field(description="Nodes that are known and didn't answer.")
    scope: Literal["cluster", "process"] = Field(
        description="`process`: the engine is `memory://`, which links no nodes, so this is one process alone."
    )


class NodeReport(NodeName, NodeState):
    """A node and its state."""

    server: str = Field(description="The same for the processes of one server, which drain together.")


class Nodes(ClusterReport):
    """The nodes of the app."""

    asked: str = Field(description="The id of the node that was asked.")
    nodes: list[NodeReport]


class Connections(ClusterReport):
    """Connections of all nodes."""

    total: int = Field(description="How many connections fit the question.")
    connections: list[ConnectionReport]
    next: str | None = Field(description="Pass it as `after` for the next page; null if there is none.")


class Channels(ClusterReport):
    """Channels of all nodes."""

    channels: list[ChannelReport]
    next: str | None = Field(description="Pass it as `after` for the next page; null if there is none.")
    is_complete: bool = Field(
        description="Whether these are all. With `sort=size`, each number is exact only if it is true."
    )


class UserReport(ClusterReport):
    """A user's connections on all nodes."""

    user: str
    connections: list[ConnectionReport]
    is_complete: bool = Field(description="Whether these are all.")


class Closed(ClusterReport):
    """The result of closing a user's connections."""

    user: str
    connections: int = Field(description="How many connections the user had on the nodes that answered.")


class Drained(ClusterReport):
    """The result of a drain."""

    nodes: list[NodeName] = Field(description="The nodes that drain: those of this server's processes.")


class Problem(BaseModel):
    """Why there is no answer."""

    detail: str


def reader(head: type[Any], item: type[Any] = dict) -> Callable[[bytes], NodeReply[Any, Any]]:
    """Return a function that reads the answer of a node."""
    reply: type[NodeReply[Any, Any]] = NodeReply[head, item]  # type: ignore[valid-type]
    return reply.model_validate_json


def common(answers: Answers[Any]) -> dict[str, Any]:
    """Return what every answer says about the nodes."""
    return {
        "answered": len(answers.given),
        "known": answers.known,
        "silent": [NodeName.of(info) for info in answers.silent],
        "scope": "cluster" if answers.is_linked else "process",
    }


def page_of(
    given: Iterable[Answer[NodeReply[Head, Item]]],
    key: Callable[[Item], str],
    limit: int,
    combine: Callable[[list[Item]], list[Item]] = list,
) -> tuple[list[Item], str | None]:
    """Merge the pages of several nodes, each ordered by a key; return one page, and where the next one begins.

    If a node has more, nothing is known of what comes after its last item. So the page ends there at the latest.
    """
    items: list[Item] = []
    ends: list[str] = []
    for answer in given:
        items += answer.content.items
        if has_more(answer.content) and answer.content.items:
            ends.append(key(answer.content.items[-1]))
    end = min(ends, default=None)
    known = combine([item for item in items if end is None or key(item) <= end])
    page = sorted(known, key=key)[:limit]
    is_last = end is None and len(page) == len(known)
    return page, None if is_last or not page else key(page[-1])


def has_more(reply: NodeReply[Head, Any]) -> bool:
    """Return whether a node has more than its page holds."""
    return reply.is_cut or reply.head.has_more


def named(given: list[Answer[NodeReply[Head, ConnectionReport]]]) -> list[ConnectionReport]:
    """Return the connections of all nodes, each with its node."""
    for answer in given:
        for item in answer.content.items:
            item.node = answer.node.id
    return [item for answer in given for item in answer.content.items]


def added(items: list[ChannelReport]) -> list[ChannelReport]:
    """Return each channel once, with the connections of all nodes."""
    sums: Counter[str] = Counter()
    for item in items:
        sums[item.name] += item.connections
    return [ChannelReport(name=name, connections=count) for name, count in sums.items()]
