"""Publications that wait on this node: in lanes for hooks or a slow crowd, in the outbox to be published."""

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

# After so many publications of one lane the event loop gets a turn, even if no hook waits for anything.
_TURN_PUBLICATIONS = 64

# All that is dropped within so many seconds is reported once.
_REPORT_SECONDS = 1.0


class Deliverer(Protocol):
    """What the lanes need of their node."""

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `deliver_now` may be called: no hook has to run, and most clients keep up."""

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections. Errors are logged."""

    async def deliver_paced(self, publication: Publication) -> None:
        """Run the hooks, and hand a publication to the connections when most of them keep up."""

    def overrun(self, seconds: float) -> None:
        """Take note that publications of the last seconds were dropped, because too many wait."""


class _Turn:
    """A place in a lane for a caller that delivers by itself."""

    __slots__ = ("begun", "ended")

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()


class Outbox:
    """Broadcasts of `broadcast_soon`, which nobody waits for, in the order of the calls. They come from any thread.

    Args:
        publish: Sends a broadcast.
        max_bytes: How many bytes of payload may wait.
    """

    def __init__(self, publish: Callable[[Publications], Awaitable[object]], max_bytes: int = 16 * 1024 * 1024) -> None:
        self._publish = publish
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._waiting: deque[Publications] = deque()
        self._bytes = 0
        # Whether `send_all` runs, or will soon.
        self._is_busy = False
        self._is_closed = False
        self._idle = asyncio.Event()
        self._failed = 0
        self._throttle = Throttle()

    def put(self, publications: Publications, begin: Callable[[], object]) -> None:
        """Take a broadcast.

        Args:
            publications: What to send.
            begin: Lets `send_all` run. It is called if that doesn't run.

        Raises:
            EngineUnavailable: If too much waits already. Nothing was sent.
            LifecycleError: If the outbox is closed.
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
        """Send what waits. If one can't be sent, it is counted in the log, and the next ones are sent all the same."""
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
        """Take nothing more, and return when all that waits is sent."""
        with self._lock:
            self._is_closed = True
        if self._is_busy:
            self._idle.clear()
            await self._idle.wait()


_Lane: TypeAlias = deque[Publication | _Turn]


class Lanes:
    """Delivers, in order, publications that can't be delivered at once.

    `put` never waits. An audience with a slow crowd delays no other audience. What doesn't fit is dropped, and that is
    reported.

    Args:
        node: Delivers.
        max_publications: How many publications may wait in all lanes together.
        max_bytes: How many bytes of payload these may have together.
    """

    def __init__(self, node: Deliverer, *, max_publications: int = 65_536, max_bytes: int = 32 * 1024 * 1024) -> None:
        self._node = node
        self._max_publications = max_publications
        self._max_bytes = max_bytes
        self.waiting: dict[Audience, _Lane] = {}
        """The lanes in which something waits, by audience."""
        self._publications = 0
        self._bytes = 0
        self._tasks = Tasks()
        self._is_closed = False
        # The timer of the next report of drops.
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
        else:  # the lane has its first publication before the task begins: an eager task runs at once
            lane = self.waiting[audience] = deque((publication,))
            self._tasks.spawn(self._run(audience, lane), f"deliveries to {audience.kind}")

    @asynccontextmanager
    async def turn(self, audience: Audience) -> AsyncIterator[None]:
        """Return a block that runs after all that waits for an audience, and before all that comes later."""
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
            patience: For how many seconds the waiting publications may still be delivered before that.
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
        for audience in list(self.waiting):  # a task that was cancelled before its first step has run no `finally`
            self._end_lane(audience)

    async def _run(self, audience: Audience, lane: _Lane) -> None:
        number = 0
        try:
            await self._tasks.begun()  # the caller of `put` goes on before a hook runs
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
        for left in self.waiting.pop(audience):  # at the end of the node all waiting ends
            if isinstance(left, _Turn):
                left.begun.set()

    async def _deliver_paced(self, publication: Publication) -> None:
        try:
            await self._node.deliver_paced(publication)
        except Exception:  # of a hook: it fails closed, and no caller is here to see the error
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
