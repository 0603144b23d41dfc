"""What documents need to know about a router's path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wsbroadcast.typed.message_types import MessageTypes


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketInfo:
    """The types of what goes over a router's path, for documents: the `socket` of its endpoint."""

    path: str
    """The path of the router, without the prefix of `include_router`."""
    channel: str | None
    """The pattern of its channel, such as `room:{room}`; `None` if the channel is the only parameter, or none."""
    receives: MessageTypes[Any] | None
    """The types of what clients send; `None` for any. Clients of `wsbroadcast.v1`, a POST, and clients of a router that
    carries out commands send it as the `data` of a `publish`."""
    sends: MessageTypes[Any] | None
    """The types of what is broadcast to its channel; `None` for any. Clients of `wsbroadcast.v1` get it as the `data`
    of a `message`. All clients may also get errors."""
    inbound: str
    """What is done with messages of clients: `broadcast`, `commands`, `handle` or `ignore`."""
    has_websocket: bool
    """Whether it takes WebSockets, plain ones and those of the subprotocol `wsbroadcast.v1`."""
    has_http: bool
    """Whether it serves events and long poll by GET, and commands by POST."""
    accepts: str
    """What clients may send: `any`, `text`, `bytes` or `json`."""
    manager: object
    """The manager. It tells apart the sockets of several managers."""
    methods: Mapping[str, Any]
    """The methods that clients may call, by name. Methods that are added later appear here too."""
    others: Callable[[], Iterable[MessageTypes[Any]]]
    """Returns the types of what clients are sent besides `sends`: to their user and to everyone, if they are known."""

    @property
    def takes_publish(self) -> bool:
        """Whether clients may publish."""
        return self.inbound != "ignore"

    @property
    def takes_posted_publish(self) -> bool:
        """Whether clients may publish by POST. `on_message` hooks only see messages of connections."""
        return self.takes_publish and (self.inbound != "handle" or self.receives is not None)
