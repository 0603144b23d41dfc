"""The connections of a node whose clients know positions. They are told in their protocol, and pinged by one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextvars import Context
from typing import NamedTuple, Protocol

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.history import Recovery
from wsbroadcast.message import Message
from wsbroadcast.options import ClientTiming
from wsbroadcast.protocols import events
from wsbroadcast.publication import Frame, Position, Publication

# How many connections are pinged in one turn of the event loop.
_AT_ONCE = 1000

SPEAKER = "wsbroadcast.speaker"
"""The key in a WebSocket's scope for its `Speaker`, if its client speaks another protocol than events."""


class Beginning(NamedTuple):
    """The position from which on a client gets the publications of an audience."""

    recovery: Recovery
    """Whether it gets what it missed."""
    is_asked: bool
    """Whether it has asked for what it missed."""
    since: Position | None
    """The position after which publications begin; `None` if it isn't known, or nothing is kept."""
    missed: Sequence[Publication] = ()
    """The first publications that it has missed, which it is told together with this. The others follow."""


Beginnings = Mapping[Audience, Beginning]


class Speaker(Protocol):
    """Makes what a client that knows positions is told, in its protocol. No method waits for anything."""

    carries: int
    """How many bytes of missed publications a `Beginning` may have."""
    is_told_of_subscriptions: bool
    """Whether the client is told when the app subscribes or unsubscribes it."""
    begins_at_once: bool
    """Whether `hello` says where all audiences begin."""

    def hello(self, connection: Connection, interval: float, beginnings: Beginnings) -> Message:
        """Return the first message for a client, which is registered now.

        Args:
            connection: The connection.
            interval: Seconds between two pings.
            beginnings: Where its audiences begin; empty unless `begins_at_once`.
        """

    def subscribed(
        self, connection: Connection, audience: Audience, beginning: Beginning, id_: object
    ) -> Message | None:
        """Return the message that says where an audience begins."""

    def lost(
        self, connection: Connection, audience: Audience, reason: str, position: Position | None
    ) -> Message | None:
        """Return the message that says that publications are missing and can't be had any more.

        It is `None` if the client will leave the audience at once, and gets nothing until then.
        """

    def left(self, connection: Connection, channel: str) -> Message | None:
        """Return the message for a client that has left a channel; `None` for none."""

    def expiring(self, connection: Connection, expires_at: float, seconds: float) -> Message | None:
        """Return the message that says, some time before, when the connection expires."""

    def ping(self, connection: Connection) -> Message | None:
        """Return the ping; `None` for none this time."""


class EventSpeaker:
    """Speaks events, the protocol `wsbroadcast.v1`.

    Args:
        timing: The times that clients are told.
    """

    carries = 0
    is_told_of_subscriptions = False
    begins_at_once = False

    def __init__(self, timing: ClientTiming) -> None:
        self._timing = timing

    def hello(self, connection: Connection, interval: float, beginnings: Beginnings) -> Message:
        """Return the greeting; see `Speaker`."""
        return events.hello(connection.id, self._timing, interval)

    def subscribed(
        self, connection: Connection, audience: Audience, beginning: Beginning, id_: object
    ) -> Message | None:
        """Return where an audience begins; see `Speaker`."""
        recovery = beginning.recovery if beginning.is_asked else None
        return events.subscribed(audience, recovery, beginning.since, id_)

    def lost(
        self, connection: Connection, audience: Audience, reason: str, position: Position | None
    ) -> Message | None:
        """Return that something is missing; see `Speaker`."""
        return events.gap(audience, reason, position)

    def left(self, connection: Connection, channel: str) -> Message | None:
        """Return nothing. The client is told by the answer to its command."""
        return None

    def expiring(self, connection: Connection, expires_at: float, seconds: float) -> Message | None:
        """Return that the connection expires soon; see `Speaker`."""
        return events.expiring(expires_at, seconds)

    def ping(self, connection: Connection) -> Message | None:
        """Return a ping; see `Speaker`. If something waits for the client, a ping would only fill its backlog."""
        return events.PING if connection._sink.backlog is None else None


class EventClients:
    """Greets and pings clients that know positions. Nothing runs while there are none.

    Args:
        registry: Knows the connections.
        dispatcher: Hands messages to them.
        timing: The times of pings.
    """

    def __init__(
        self, registry: Registry[Connection], dispatcher: Dispatcher[Connection], timing: ClientTiming
    ) -> None:
        self._registry = registry
        self._dispatcher = dispatcher
        self._timing = timing
        self._events = EventSpeaker(timing)
        # How many connections there are: WebSockets (`False`), and streams over HTTP (`True`).
        self._counts = {False: 0, True: 0}
        # The timers of the next pings of both.
        self._timers: dict[bool, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def speaker(self, connection: Connection) -> Speaker:
        """Return the speaker of a connection."""
        found: Speaker = connection.websocket.scope.get(SPEAKER, self._events)
        return found

    def say(self, connection: Connection, message: Message | None) -> None:
        """Send a connection a message of its protocol, after everything handed over before."""
        if message is not None:
            self._dispatcher.dispatch(Frame(message, Audience("connection", connection.id)))

    def greet(self, connection: Connection, beginnings: Beginnings) -> None:
        """Send the first message to a connection that is registered now."""
        is_stream = connection._sink.is_stream
        self._counts[is_stream] += 1
        self.say(connection, self.speaker(connection).hello(connection, self._interval(is_stream), beginnings))
        if is_stream not in self._timers:
            self._ping_later(is_stream)

    def left(self, connection: Connection) -> None:
        """Take note that a connection has left, of any kind."""
        if connection._sink.has_positions:
            is_stream = connection._sink.is_stream
            self._counts[is_stream] -= 1
            if not self._counts[is_stream] and is_stream in self._timers:
                self._timers.pop(is_stream).cancel()

    def _interval(self, is_stream: bool) -> float:
        return self._timing.stream_ping_interval if is_stream else self._timing.ping_interval

    def _ping_later(self, is_stream: bool) -> None:
        call_later = asyncio.get_running_loop().call_later
        self._timers[is_stream] = call_later(self._interval(is_stream), self._ping_all, is_stream, context=Context())

    def _ping_all(self, is_stream: bool) -> None:
        self._ping_later(is_stream)
        connections = self._registry.by_id.values()
        sinks = ((each, each._sink) for each in connections)
        self._ping([each for each, sink in sinks if sink.has_positions and sink.is_stream is is_stream])

    def _ping(self, connections: list[Connection]) -> None:
        # The bytes are made once. Each turn of the event loop pings some, so that other work needn't wait for all.
        some: dict[Message, list[Connection]] = {}
        for each in connections[:_AT_ONCE]:
            if each.is_open and (message := self.speaker(each).ping(each)) is not None:
                some.setdefault(message, []).append(each)
        for message, recipients in some.items():
            self._dispatcher.dispatch(Frame(message, EVERYONE), recipients)
        if rest := connections[_AT_ONCE:]:
            asyncio.get_running_loop().call_soon(self._ping, rest, context=Context())
