"""The lease of a node, which tells other nodes that this one is alive. It is renewed while something here needs it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import KeepsLease
from wsbroadcast.exceptions import EngineError
from wsbroadcast.logs import Throttle, about, logger

LEASE_SECONDS = 10.0
"""Seconds for which a node counts as alive after it last renewed its lease."""

RENEW_SECONDS = 3.0
"""Seconds between two renewals."""

MARGIN_SECONDS = 2.0
"""A node that can't renew its lease takes it for lost so many seconds before its end: clocks differ, tasks are late."""

# Seconds until a renewal is tried again that has failed: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0


class LeaseKeeper:
    """Renews the lease of a node while it has holders. Nothing runs while it has none.

    Args:
        engine: Keeps the lease at the broker.
        tasks: The tasks of the node.
    """

    def __init__(self, engine: KeepsLease, tasks: Tasks) -> None:
        self.engine = engine
        """Keeps the lease at the broker."""
        engine.uses_lease = True
        self._tasks = tasks
        self.generation = 0
        """Grows by one with each new lease; 0 before the first. What was entered at the broker under an earlier lease
        is removed, or will be soon."""
        self.on_another = list[Callable[[], None]]()
        """Called when the node has got its first lease, and each time that it has got another one."""
        self._renewed_at = 0.0
        self._holders = set[object]()
        self._renewing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        # Set at the next renewal, or when something else has changed. It is replaced each time.
        self._changed = asyncio.Event()
        self._throttle = Throttle()
        self._is_ended = False

    @property
    def incarnation(self) -> str:
        """The name of the lease."""
        return self.engine.incarnation

    @property
    def seconds_left(self) -> float:
        """How many seconds the lease can be relied on."""
        return self._renewed_at + LEASE_SECONDS - MARGIN_SECONDS - _now() if self.generation else 0.0

    def hold(self, holder: object) -> None:
        """Add a holder, and renew the lease from now on. A holder counts once."""
        self._holders.add(holder)
        if not self._is_ended and (self._task is None or self._task.done()):
            self._task = self._tasks.spawn(self._renew(), "lease")

    def release(self, holder: object) -> None:
        """Remove a holder. After the last one the lease isn't renewed any more."""
        self._holders.discard(holder)
        self._notify()

    async def ensure(self) -> int:
        """Renew the lease if that is due, and return its `generation`.

        Raises:
            EngineUnavailable: If the broker can't be reached.
        """
        async with self._renewing:
            now = _now()
            if not self.generation or now - self._renewed_at >= RENEW_SECONDS:
                is_same = await self.engine.renew(LEASE_SECONDS)
                self._renewed_at = now
                if not is_same or not self.generation:
                    self._take_note_of_another()
                self._notify()
            return self.generation

    def _take_note_of_another(self) -> None:
        self.generation += 1
        if self.generation > 1:
            logger.info("the lease of this node had run out: it goes on with a new one", extra=about("lease.lost"))
        for call in self.on_another:
            call()

    def suspect(self) -> None:
        """Renew the lease at once. The broker was away, and may have forgotten it."""
        self._renewed_at -= RENEW_SECONDS
        self._notify()

    async def lost(self, generation: int) -> None:
        """Return when the lease of this generation can't be relied on any more."""
        while self.generation == generation and not self._is_ended and (left := self.seconds_left) > 0:
            await self._wait(left)

    async def stay(self, seconds: float) -> None:
        """Let the lease hold for so many more seconds, and renew it no more after that.

        Raises:
            EngineUnavailable: If the broker can't be reached.
        """
        self.end()
        if self.generation:
            await self.engine.renew(seconds)

    def end(self) -> None:
        """Renew the lease no more, whatever holders it has."""
        self._is_ended = True
        self._holders.clear()
        self._notify()
        if self._task is not None:
            self._task.cancel()

    async def _renew(self) -> None:
        await self._tasks.begun()
        pause = _FIRST_PAUSE
        while self._holders:
            try:
                await self.ensure()
            except EngineError as error:
                if self._throttle.is_due("lease"):
                    text = "the lease of this node can't be renewed just now: %s"
                    logger.warning(text, error, extra=about("lease.unavailable"))
                await self._wait(pause * random.uniform(0.5, 1.0))  # noqa: S311  # no secret
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = _FIRST_PAUSE
                await self._wait(self._renewed_at + RENEW_SECONDS - _now())

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _now() -> float:
    return asyncio.get_running_loop().time()
