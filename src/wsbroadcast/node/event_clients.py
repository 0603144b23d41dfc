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
        self.count = 0
        """How many there are."""
        self._timer: asyncio.TimerHandle | None = None

    def say(self, connection: Connection, message: Message) -> None:
        """Send one something of its protocol's, behind everything handed over before."""
        self._dispatcher.dispatch(Frame(message, Audience("connection", connection.id)))

    def greet(self, connection: Connection) -> None:
        """Take in one that is registered now."""
        self.count += 1
        self.say(connection, events.hello(connection.id, self._timing))
        if self._timer is None:
            self._ping_later()

    def left(self, connection: Connection) -> None:
        """One has gone, or another connection."""
        if connection._sink.has_positions:
            self.count -= 1
            if not self.count and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _ping_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._timing.ping_interval, self._ping_all, context=Context())

    def _ping_all(self) -> None:
        self._ping_later()
        self._ping([each for each in self._registry.by_id.values() if each._sink.has_positions])

    def _ping(self, connections: list[Connection]) -> None:
        # The bytes are made once. A turn of the event loop takes some, so that nobody waits for all of them. Where
        # something waits to be taken a ping would say nothing new, and fill a backlog.
        some = [each for each in connections[:_AT_ONCE] if each.is_open and each._sink.backlog is None]
        if some:
            self._dispatcher.dispatch(Frame(events.PING, EVERYONE), some)
        if rest := connections[_AT_ONCE:]:
            asyncio.get_running_loop().call_soon(self._ping, rest, context=Context())
