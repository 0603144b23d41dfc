"""The connections of a node that speak events: they are greeted, and pinged by one timer for all."""

from __future__ import annotations

import asyncio
from contextvars import Context

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.message import Message
from wsbroadcast.options import ClientTiming
from wsbroadcast.protocols import events
from wsbroadcast.publication import Frame

# So many are pinged in one turn of the event loop.
_AT_ONCE = 1000


class EventClients:
    """Greets and pings. Nothing runs while there are none.

    Args:
        registry: Knows the connections.
        dispatcher: Hands over to them.
        timing: When.
    """

    def __init__(
        self, registry: Registry[Connection], dispatcher: Dispatcher[Connection], timing: ClientTiming
    ) -> None:
        self._registry = registry
        self._dispatcher = dispatcher
        self._timing = timing
        # How many there are: of WebSockets, and of streams over HTTP.
        self._counts = {False: 0, True: 0}
        # The next pings of either.
        self._timers: dict[bool, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def say(self, connection: Connection, message: Message) -> None:
        """Send one something of its protocol's, behind everything handed over before."""
        self._dispatcher.dispatch(Frame(message, Audience("connection", connection.id)))

    def greet(self, connection: Connection) -> None:
        """Take in one that is registered now."""
        is_stream = connection._sink.is_stream
        self._counts[is_stream] += 1
        self.say(connection, events.hello(connection.id, self._timing, self._interval(is_stream)))
        if is_stream not in self._timers:
            self._ping_later(is_stream)

    def left(self, connection: Connection) -> None:
        """One has gone, or another connection."""
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
        # The bytes are made once. A turn of the event loop takes some, so that nobody waits for all of them. Where
        # something waits to be taken a ping would say nothing new, and fill a backlog.
        some = [each for each in connections[:_AT_ONCE] if each.is_open and each._sink.backlog is None]
        if some:
            self._dispatcher.dispatch(Frame(events.PING, EVERYONE), some)
        if rest := connections[_AT_ONCE:]:
            asyncio.get_running_loop().call_soon(self._ping, rest, context=Context())
