"""The end of a node that nobody notices: its connections go to others, a few at a time, before the server ends."""

from __future__ import annotations

import asyncio
import random

from wsbroadcast.audience import EVERYONE
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.logs import about, logger
from wsbroadcast.node.membership import Membership

DRAIN = "drain"
"""The reason that a connection is closed with."""

# Fewer connections don't take all the time that they are given, so that a small app stops at once.
_PER_SECOND = 50

# The shortest pause: those whose moment comes within it are closed in the same turn.
_STEP_SECONDS = 0.005

# What is late, because the event loop was, is made up for at this many times the pace, and not at once: a burst of
# closes is what a drain is there against. So much of a delay is let pass.
_MOST_TIMES_FASTER = 1.5
_SLACK_SECONDS = 0.02

# So many are closed before others have a turn.
_AT_ONCE = 50


class Drain:
    """Closes all connections of a node at random moments, so that they don't come back at the same one.

    It knows connections and how they are closed, never what kind of transport they have.

    Args:
        registry: The connections.
        membership: Closes them.
        tasks: Runs it: one task.
        close_timeout: Seconds for a peer that takes nothing, once all are closed.
    """

    def __init__(
        self, registry: Registry[Connection], membership: Membership, tasks: Tasks, close_timeout: float
    ) -> None:
        self._registry = registry
        self._membership = membership
        self._tasks = tasks
        self.close_timeout = close_timeout
        """Seconds for a peer that takes nothing, once all are closed."""
        self._task: asyncio.Task[None] | None = None

    @property
    def is_begun(self) -> bool:
        """Whether it has begun, and perhaps is over: nobody comes in any more."""
        return self._task is not None

    @property
    def is_over(self) -> bool:
        """Whether everybody has gone."""
        return self._task is not None and self._task.done()

    def begin(self, over: float) -> asyncio.Task[None]:
        """Refuse newcomers from now on, and close everybody in a task; if that was begun before, return its task."""
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
            self._task = self._tasks.spawn(self._run(connections, begun, seconds), "drain")
        return self._task

    async def run(self, over: float) -> None:
        """Do the same, and wait for the end; a caller that is cancelled doesn't end it."""
        await asyncio.wait({self.begin(over)})

    def end(self) -> None:
        """End it at once: whoever is still there is closed by who calls this."""
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
