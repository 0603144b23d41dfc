"""The drain: before the server ends, the connections of a node are closed a few at a time, and go to other nodes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from wsbroadcast.audience import EVERYONE
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.logs import about, logger
from wsbroadcast.node.membership import Membership

DRAIN = "drain"
"""The close reason of a drain."""

# A drain takes no longer than at this many connections per second, so that a small app stops at once.
_PER_SECOND = 50

# The shortest pause, in seconds. Connections whose moment comes within it are closed in the same turn.
_STEP_SECONDS = 0.005

# If the event loop was blocked, late closes are made up for at this many times the pace. They aren't made at once,
# because a drain is there to avoid bursts of closes.
_MOST_TIMES_FASTER = 1.5
_SLACK_SECONDS = 0.02

# So many connections are closed before other tasks have a turn.
_AT_ONCE = 50


class Drain:
    """Closes all connections of a node at random moments, so that they don't all come back at the same moment.

    Args:
        registry: The connections.
        membership: Closes them.
        tasks: Runs the drain, in one task.
        close_timeout: Seconds for peers that take nothing, once all connections are closed.
        begun: Called when the drain begins.
    """

    def __init__(
        self,
        registry: Registry[Connection],
        membership: Membership,
        tasks: Tasks,
        close_timeout: float,
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._membership = membership
        self._tasks = tasks
        self._begun = begun
        self.close_timeout = close_timeout
        """Seconds for peers that take nothing, once all connections are closed."""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether the drain has begun; it may be over. No new connection is taken."""
        return self._task is not None

    @property
    def is_over(self) -> bool:
        """Whether all connections have gone."""
        return self._task is not None and self._task.done()

    def begin(self, over: float) -> asyncio.Task[None]:
        """Refuse new connections, and close all others in a task. A second call returns the same task."""
        if self._task is None:
            loop = asyncio.get_running_loop()
            connections = list(self._registry.recipients(EVERYONE))
            seconds = min(over, len(connections) / _PER_SECOND)
            logger.info(
                "draining: %d connections are closed within %.1f s",
                len(connections),
                seconds,
                extra=about("drain.begun", count=len(connections), seconds=seconds),
            )
            begun = loop.time()
            self._membership.turn_away(begun + seconds)
            self._begun()
            self._task = self._tasks.spawn(self._run(connections, begun, seconds), "drain")
        return self._task

    async def run(self, over: float) -> None:
        """Begin the drain, and wait for its end. If the caller is cancelled, the drain goes on."""
        await asyncio.wait({self.begin(over)})

    def end(self) -> None:
        """End the drain at once. The caller closes the connections that are left."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self, connections: list[Connection], begun: float, seconds: float) -> None:
        await self._tasks.begun()
        loop = asyncio.get_running_loop()
        random.shuffle(connections)
        until = begun + seconds
        moments = sorted(random.uniform(begun, until) for _ in connections)  # noqa: S311  # no secret
        gap = seconds / len(connections) / _MOST_TIMES_FASTER if connections else 0.0
        free_at = begun
        for number, (moment, connection) in enumerate(zip(moments, connections, strict=True)):
            due = min(until, max(moment, free_at))
            if (pause := due - loop.time()) > 0:
                await asyncio.sleep(max(pause, _STEP_SECONDS))
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
            free_at = max(free_at, loop.time() - _SLACK_SECONDS) + gap
            self._membership.send_away(connection, CloseCode.SERVICE_RESTART, DRAIN)
        left = until + self.close_timeout - loop.time()
        cut_off = await self._membership.seen_off(max(0.0, left))
        logger.info(
            "drained, and %d peers were cut off that took nothing", cut_off, extra=about("drain.over", count=cut_off)
        )
