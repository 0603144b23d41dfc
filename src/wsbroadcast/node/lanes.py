"""What waits on this node: for hooks or a crowd that is behind, in a lane for each audience; to be published."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Protocol, TypeAlias

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.publication import Publication, Publications

# A lane delivers no more than this before the event loop gets its chance, although no hook waits for anything.
_TURN_PUBLICATIONS = 64

# What is dropped is reported once for all that is dropped within this time.
_REPORT_SECONDS = 1.0


class Deliverer(Protocol):
    """What the lanes ask of their node."""

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `deliver_now` may be called: no hook has to run, and most clients keep up."""

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections; what goes wrong is logged."""

    async def deliver_paced(self, publication: Publication) -> None:
        """Hand it over when most clients keep up, through the hooks."""

    def overrun(self, seconds: float) -> None:
        """Publications of the last seconds were dropped, because too many wait."""


class _Turn:
    """A place in a lane for somebody who delivers by himself."""

    __slots__ = ("begun", "ended")

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()


class Outbox:
    """Broadcasts that nobody waits for, in the order in which they came, from any thread.

    Args:
        publish: Sends one.
        max_bytes: How many bytes of payload may wait.
    """

    def __init__(self, publish: Callable[[Publications], Awaitable[object]], max_bytes: int = 16 * 1024 * 1024) -> None:
        self._publish = publish
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[Publications] = deque()
        self._bytes = 0
        # Whether somebody sends, or is about to.
        self._is_busy = False
        self._is_closed = False
        self._idle = asyncio.Event()
        self._failed = 0
        self._throttle = Throttle()

    def put(self, publications: Publications, begin: Callable[[], object]) -> None:
        """Take a broadcast.

        Args:
            publications: What to send.
            begin: Lets `send_all` run; called unless it runs.

        Raises:
            EngineUnavailable: If too much waits.
            LifecycleError: If it is closed.
        """
        size = sum(publication.size for publication in publications)
        with self._lock:
            if self._is_closed:
                raise LifecycleError("the manager is being closed")
            if self._waiting and self._bytes + size > self._max_bytes:
                raise EngineUnavailable(f"{self._bytes} bytes wait to be broadcast already; nothing was sent")
            self._waiting.append(publications)
            self._bytes += size
            is_first, self._is_busy = not self._is_busy, True
        if is_first:
            begin()

    async def send_all(self) -> None:
        """Send what waits. What can't be sent is counted in the log, and what waits behind it is sent all the same."""
        while (publications := self._next()) is not None:
            try:
                await self._publish(publications)
            except Exception as error:
                self._failed += 1
                if self._throttle.is_due(type(error).__name__):
                    logger.error(
                        "broadcast_soon: not sent so far: %d",
                        self._failed,
                        exc_info=error,
                        extra=about("publish.failed", count=self._failed),
                    )
        self._idle.set()

    def _next(self) -> Publications | None:
        with self._lock:
            if not self._waiting:
                self._is_busy = False
                return None
            publications = self._waiting.popleft()
            self._bytes -= sum(publication.size for publication in publications)
            return publications

    async def aclose(self) -> None:
        """Take nothing more; return when what waits is sent."""
        with self._lock:
            self._is_closed = True
        if self._is_busy:
            self._idle.clear()
            await self._idle.wait()


_Lane: TypeAlias = deque[Publication | _Turn]


class Lanes:
    """Delivers in order what can't be delivered at once.

    Putting something in never waits. An audience whose crowd is behind holds up no other audience. What doesn't
    fit is dropped, and reported.

    Args:
        node: Delivers.
        max_publications: How many may wait in all lanes.
        max_bytes: How many bytes of payload they may have.
    """

    def __init__(self, node: Deliverer, *, max_publications: int = 65_536, max_bytes: int = 32 * 1024 * 1024) -> None:
        self._node = node
        self._max_publications = max_publications
        self._max_bytes = max_bytes
        self.waiting: dict[Audience, _Lane] = {}
        """What waits, by audience; an audience that nothing waits for isn't in it."""
        self._publications = 0
        self._bytes = 0
        self._tasks = Tasks()
        self._is_closed = False
        # The timer of a report about what was dropped.
        self._report: asyncio.TimerHandle | None = None

    def put(self, publication: Publication) -> None:
        """Deliver a publication when its turn has come."""
        audience = publication.audience
        lane = self.waiting.get(audience)
        if self._bytes >= self._max_bytes or self._publications >= self._max_publications or self._is_closed:
            self._drop()
            return
        self._publications += 1
        self._bytes += publication.message.size
        if lane is not None:
            lane.append(publication)
        else:  # with the first in it: an eager task factory runs the task at once
            lane = self.waiting[audience] = deque((publication,))
            self._tasks.spawn(self._run(audience, lane), f"deliveries to {audience.kind}")

    @asynccontextmanager
    async def turn(self, audience: Audience) -> AsyncIterator[None]:
        """Return a block that runs when everything that waits for an audience is delivered, and before what comes."""
        lane = self.waiting.get(audience)
        if lane is None:
            yield
            return
        turn = _Turn()
        lane.append(turn)
        try:
            await turn.begun.wait()
            yield
        finally:
            turn.ended.set()

    async def aclose(self, patience: float = 0.0) -> None:
        """Take nothing more that would have to wait, and forget what waits.

        Args:
            patience: Seconds for which what waits may still be delivered.
        """
        self._is_closed = True
        if patience and len(self._tasks):
            try:
                async with asyncio.timeout(patience):
                    await self._tasks.join()
            except TimeoutError:
                pass
        if self._report is not None:
            self._report.cancel()
        await self._tasks.cancel()
        for audience in list(self.waiting):  # a task that never ran a step was cancelled without its `finally`
            self._end_lane(audience)

    async def _run(self, audience: Audience, lane: _Lane) -> None:
        number = 0
        try:
            await self._tasks.begun()  # who puts something in goes on before a hook runs
            while lane:
                number += 1
                first = lane.popleft()
                if isinstance(first, _Turn):
                    first.begun.set()
                    await first.ended.wait()
                    continue
                self._publications -= 1
                self._bytes -= first.message.size
                if self._node.is_ready(first):
                    self._node.deliver_now(first)
                else:
                    await self._deliver_paced(first)
                if number % _TURN_PUBLICATIONS == 0:
                    await asyncio.sleep(0)
        finally:
            self._end_lane(audience)

    def _end_lane(self, audience: Audience) -> None:
        for left in self.waiting.pop(audience):  # at the end of the node nobody is kept waiting
            if isinstance(left, _Turn):
                left.begun.set()

    async def _deliver_paced(self, publication: Publication) -> None:
        try:
            await self._node.deliver_paced(publication)
        except Exception:  # a hook's: it fails closed, and there is no caller here to see it
            logger.exception(
                "a message was not delivered", extra=about("delivery.failed", audience=publication.audience.kind)
            )

    def _drop(self) -> None:
        if self._report is None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._report = loop.call_later(_REPORT_SECONDS, self._tell, loop.time(), context=Context())

    def _tell(self, since: float) -> None:
        self._report = None
        self._node.overrun(asyncio.get_running_loop().time() - since)
