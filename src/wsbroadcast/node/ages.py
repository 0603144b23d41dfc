"""The largest age of connections. It makes them spread over the nodes again from time to time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import Context
from heapq import heapify, heappop, heappush

from wsbroadcast.connection import Connection

# By this part of the age a connection may live longer or shorter.
_AGE_SPREAD = 0.1

# Connections whose moment comes within so many seconds are closed in the same turn.
_SLACK_SECONDS = 0.005


class Ages:
    """Closes each connection at its own random age, so that connections that came together don't go together.

    Args:
        seconds: The age in seconds. Each connection's is up to a tenth shorter or longer.
        close: Closes a connection.
    """

    def __init__(self, seconds: float, close: Callable[[Connection], None]) -> None:
        self._seconds = seconds
        self._close = close
        # The connections by the moment at which they are closed. Some may have left already.
        self._due: list[tuple[float, str, Connection]] = []
        self._left = 0
        # The timer for the first of them, while there are any.
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, connection: Connection) -> None:
        """Remember a connection that has come."""
        age = self._seconds * random.uniform(1 - _AGE_SPREAD, 1 + _AGE_SPREAD)  # noqa: S311  # no secret
        heappush(self._due, (asyncio.get_running_loop().time() + age, connection.id, connection))
        self._set_timer()

    def left(self) -> None:
        """Take note that a connection has left. Those that have left are removed when they are half of all."""
        self._left += 1
        if self._left * 2 >= len(self._due):
            self._due = [each for each in self._due if each[2].is_open]
            heapify(self._due)
            self._left = 0
            self._set_timer()

    def end(self) -> None:
        """Close no more connections."""
        self._due.clear()
        self._set_timer()

    def _set_timer(self) -> None:
        first = self._due[0][0] if self._due else None
        if self._timer is not None:
            if self._timer.when() == first:
                return
            self._timer.cancel()
            self._timer = None
        if first is not None:
            self._timer = asyncio.get_running_loop().call_at(first, self._close_due, context=Context())

    def _close_due(self) -> None:
        until = asyncio.get_running_loop().time() + _SLACK_SECONDS
        due = []
        while self._due and self._due[0][0] <= until:
            due.append(heappop(self._due)[2])
        for connection in due:
            self._close(connection)
        self._set_timer()
