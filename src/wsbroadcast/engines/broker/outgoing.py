"""What a node publishes, on its way to the broker: the publications of one turn of the loop go out together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.link import Link, Parcel
from wsbroadcast.exceptions import ConfigurationError, EncodeError, EngineError, EngineUnavailable
from wsbroadcast.logs import Throttle, logger
from wsbroadcast.stats import EngineCounters

# What one call of `Link.publish` gets at most, so that its timeout is for something that can be done in time.
_BATCH_PARCELS = 512
_BATCH_BYTES = 4 * 1024 * 1024

# What `broadcast_nowait` may leave waiting; whoever awaits holds the message anyway.
_MAX_WAITING_BYTES = 16 * 1024 * 1024


# A parcel, and who waits until the broker has taken it.
_Item = tuple[Parcel, asyncio.Future[None] | None]


class Outbox:
    """Parcels in the order of the calls, and who waits for the broker to take them.

    Nothing outlives the connection it was meant for: `fail` tells everybody that waits.
    """

    def __init__(self, timeout: float, counters: EngineCounters) -> None:
        self._timeout = timeout
        self._counters = counters
        self._waiting: deque[_Item] = deque()
        self._in_flight: Sequence[_Item] = ()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._throttle = Throttle()
        # Of `broadcast_nowait`, refused since the log was told last.
        self._refused = 0

    def put(self, parcel: Parcel) -> asyncio.Future[None]:
        """Put a parcel at the end; the future is done when the broker has taken it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._append(parcel, future)
        return future

    def put_first(self, parcel: Parcel) -> asyncio.Future[None]:
        """Put a parcel before all that wait, because nothing has to come before it."""
        future = self.put(parcel)
        self._waiting.rotate(1)
        return future

    def put_nowait(self, parcel: Parcel) -> None:
        """Put a parcel at the end; if the broker doesn't take it, that is counted and logged.

        Raises:
            EngineUnavailable: If too much is waiting; nothing was sent.
        """
        if self._bytes > _MAX_WAITING_BYTES:
            self._counters.publish_failures += 1
            raise EngineUnavailable(f"{self._bytes} bytes wait for the broker already, which doesn't keep up")
        self._append(parcel, None)

    def _append(self, parcel: Parcel, future: asyncio.Future[None] | None) -> None:
        self._waiting.append((parcel, future))
        self._bytes += len(parcel.envelope)
        self._filled.set()

    async def send(self, link: Link) -> None:
        """Publish what comes, until the link fails; runs as a task while the link is used."""
        while True:
            await self._filled.wait()
            batch = self._in_flight = self._take()
            if batch:
                await self._publish(link, batch)
                self._in_flight = ()
            if not self._waiting:
                self._emptied.set()

    async def _publish(self, link: Link, batch: Sequence[_Item]) -> None:
        async with Patience(self._timeout):
            refusals = await link.publish([parcel for parcel, _ in batch])
        for (_, future), refusal in zip(batch, refusals, strict=True):
            if refusal is not None:
                self._refuse(future, refusal)
            elif future is not None and not future.done():
                future.set_result(None)

    async def wait_empty(self) -> None:
        """Wait until the broker has taken everything, or it has failed."""
        while self._waiting or self._in_flight:
            self._emptied.clear()
            await self._emptied.wait()

    def fail(self, why: str) -> None:
        """The link is lost: tell everybody who waits, and forget their parcels, so that none arrives late."""
        in_flight, self._in_flight = self._in_flight, ()
        waiting, self._waiting = self._waiting, deque()
        self._bytes = 0
        self._filled.clear()
        self._emptied.set()
        unknown = "whether the broker took the message isn't known"
        lost = sum(future is None for _, future in (*in_flight, *waiting))
        for some, consequence in ((in_flight, unknown), (waiting, "nothing was sent")):
            for _, future in some:
                self._counters.publish_failures += 1
                _tell(future, EngineUnavailable(f"{why}; {consequence}"))
        if lost:
            logger.error("not published, of broadcast_nowait: %d, because %s", lost, why)

    def _take(self) -> Sequence[_Item]:
        batch: list[_Item] = []
        size = 0
        while self._waiting and len(batch) < _BATCH_PARCELS and size < _BATCH_BYTES:
            parcel, future = item = self._waiting.popleft()
            size += len(parcel.envelope)
            if future is None or not future.cancelled():  # else its caller has given up
                batch.append(item)
        self._bytes -= size
        if not self._waiting:
            self._filled.clear()
        return batch

    def _refuse(self, future: asyncio.Future[None] | None, error: Exception) -> None:
        self._counters.publish_failures += 1
        if future is not None:
            _tell(future, _documented(error))
            return
        self._refused += 1
        if self._throttle.is_due("refused"):
            count, self._refused = self._refused, 0
            logger.error("not published, of broadcast_nowait: %d, because %s", count, error)


def _documented(error: Exception) -> Exception:
    # Whoever publishes handles few kinds of errors: this message is wrong, or no message goes out now.
    if isinstance(error, (EngineError, EncodeError)):
        return error
    if isinstance(error, (ConfigurationError, OSError)):
        told: EngineError = EngineUnavailable(f"{error}; nothing was sent")
    else:
        told = EngineError(f"the broker refuses the message ({type(error).__name__}: {error})")
    told.__cause__ = error
    return told


def _tell(future: asyncio.Future[None] | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()  # looked at: who was cancelled meanwhile leaves nobody to complain to
