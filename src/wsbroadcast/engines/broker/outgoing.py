"""What a node publishes, on its way to the broker: the publications of one turn of the loop go out together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from secrets import token_urlsafe
from time import monotonic

from wsbroadcast.concurrency import Patience, Tasks
from wsbroadcast.engines.broker.envelope import Origin, encode
from wsbroadcast.engines.broker.link import Keep, KeptParcel, Link, Parcel
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.exceptions import ConfigurationError, EncodeError, EngineError, EngineUnavailable, MessageTooLarge
from wsbroadcast.history import Appended
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.options import Timing
from wsbroadcast.publication import Control, NodeMessage, Publication
from wsbroadcast.stats import EngineCounters

# What one call of `Link.publish` gets at most, so that its timeout is for something that can be done in time.
_BATCH_PARCELS = 512
_BATCH_BYTES = 4 * 1024 * 1024

# Seconds between two looks at the broker's limits, because some clients send what is too large again and again.
_LOOK_SECONDS = 0.25

_Taken = asyncio.Future[Appended | None]

# A parcel, and who waits until the broker has taken it.
_Item = tuple[Parcel, _Taken | None]


class Outgoing:
    """Publications in the order of the calls, and who waits for the broker to take them.

    Nothing outlives the connection it was meant for: `fail` tells everybody who waits.

    Args:
        where: The engine and its broker's address, for errors.
        names: How audiences are called at the broker.
        timing: How long to wait for the broker.
        max_message_bytes: The largest payload that other nodes take.
        counters: Where failures are counted.
        max_waiting_bytes: How much `broadcast_nowait` may leave waiting. A caller that awaits holds its message anyway.
    """

    def __init__(
        self,
        where: str,
        names: AudienceNames,
        timing: Timing,
        max_message_bytes: int,
        counters: EngineCounters,
        *,
        max_waiting_bytes: int = 16 * 1024 * 1024,
    ) -> None:
        self.link: Link | None = None
        """The link in use; `None` while there is none."""
        self.node = token_urlsafe(9)
        """What this node calls itself in envelopes."""
        self._where = where
        self._names = names
        self._timing = timing
        self._max_message_bytes = max_message_bytes
        self._counters = counters
        self._max_waiting_bytes = max_waiting_bytes
        self._published = 0
        self._waiting: deque[_Item] = deque()
        self._in_flight: Sequence[_Item] = ()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        # Why there is no link; empty if nothing is wrong.
        self._trouble = "not connected yet"
        self._throttle = Throttle()
        # What carries no publication.
        self._echoes: set[_Taken] = set()
        # Of `broadcast_nowait`, refused since the log was told last.
        self._refused = 0
        self._tasks = Tasks()
        # Looks whether the broker takes more than it did; all messages that are too large wait for one look.
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -_LOOK_SECONDS

    # What a node publishes.

    async def publish(self, publication: Publication | Control, keep: Keep | None = None) -> Appended | None:
        """Return once the broker has taken it, and where it keeps it if it does."""
        try:
            parcel = self._parcel(publication, keep)
        except MessageTooLarge as error:
            if error.size > self._max_message_bytes:
                raise
            await asyncio.wait([self._look_at_limits()])
            parcel = self._parcel(publication, keep)
        return await self._put(parcel)

    def publish_nowait(self, publication: Publication | Control, keep: Keep | None = None) -> None:
        """Hand it over; that it failed is counted and logged.

        Raises:
            EngineUnavailable: If too much is waiting; nothing was sent.
        """
        try:
            parcel = self._parcel(publication, keep)
        except MessageTooLarge as error:
            if error.size <= self._max_message_bytes:
                self._look_at_limits()  # for the next one
            raise
        if self._bytes > self._max_waiting_bytes:
            self._counters.publish_failures += 1
            raise EngineUnavailable(f"{self._bytes} bytes wait for the broker already, which doesn't keep up")
        self._append(parcel, None)

    def put_first(self, parcel: Parcel) -> _Taken:
        """Put a parcel before all that wait, because nothing has to come before it."""
        future = self._put(parcel)
        self._waiting.rotate(1)
        self._echoes.add(future)
        future.add_done_callback(self._echoes.discard)
        return future

    def is_forged(self, origin: Origin) -> bool:
        """Tell whether an envelope says that it comes from here, and has never been published."""
        return origin.node == self.node and origin.seq > self._published

    def away(self) -> EngineUnavailable:
        """Make the error for who needs a link while there is none."""
        why = self._trouble or "its event loop ends"
        return EngineUnavailable(f"{self._where} is out of reach ({why})")

    def _parcel(self, publication: Publication | Control, keep: Keep | None) -> Parcel:
        link = self.link
        if link is None:
            self._counters.publish_failures += not isinstance(publication, NodeMessage)  # which nobody wants to send
            raise EngineUnavailable(f"{self.away()}; nothing was sent")
        if publication.size > self._max_message_bytes:  # the other nodes would drop it
            raise MessageTooLarge(publication.size, self._max_message_bytes)
        self._published += 1
        envelope = encode(publication, Origin(self.node, self._published))
        if len(envelope) > link.max_envelope_bytes:
            overhead = len(envelope) - publication.size
            raise MessageTooLarge(publication.size, link.max_envelope_bytes - overhead)
        name = self._names.of(publication.audience)
        return Parcel(name, envelope) if keep is None else KeptParcel(name, envelope, keep)

    def _look_at_limits(self) -> asyncio.Task[None]:
        if self._looking is None:
            self._looking = self._tasks.spawn(self._read_limits(), "engine limits")
        return self._looking

    async def _read_limits(self) -> None:
        try:
            await asyncio.sleep(self._looked_at + _LOOK_SECONDS - asyncio.get_running_loop().time())
            if self.link is not None:
                async with Patience(self._timing.connect_timeout):
                    await self.link.read_limits()
        except Exception as error:  # who publishes is told of the limit that is known
            logger.info(
                "%s doesn't say whether its limits have changed: %s",
                self._where,
                error,
                extra=about("engine.limits_unknown"),
            )
        finally:
            self._looked_at = asyncio.get_running_loop().time()
            self._looking = None

    def _put(self, parcel: Parcel) -> _Taken:
        future: _Taken = asyncio.get_running_loop().create_future()
        self._append(parcel, future)
        return future

    def _append(self, parcel: Parcel, future: _Taken | None) -> None:
        self._waiting.append((parcel, future))
        self._bytes += len(parcel.envelope)
        self._filled.set()

    # What the supervisor calls.

    def use(self, link: Link) -> None:
        """Publish by this link from now on."""
        self.link = link
        self._trouble = ""

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
        began = monotonic()
        async with Patience(self._timing.request_timeout):
            results = await link.publish([parcel for parcel, _ in batch])
        self._counters.publish_seconds.observe(monotonic() - began)
        for (_, future), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                self._refuse(future, result)
            elif future is not None and not future.done():
                future.set_result(result)

    async def wait_empty(self) -> None:
        """Wait until the broker has taken everything, or it has failed."""
        while self._waiting or self._in_flight:
            self._emptied.clear()
            await self._emptied.wait()

    def fail(self, why: str, trouble: str) -> None:
        """Tell everybody who waits that the link is lost, and forget their parcels, so that none arrives late.

        Args:
            why: What happened.
            trouble: What to tell those who publish while there is no link.
        """
        self._trouble = trouble
        in_flight, self._in_flight = self._in_flight, ()
        waiting, self._waiting = self._waiting, deque()
        self._bytes = 0
        self._filled.clear()
        self._emptied.set()
        unknown = "whether the broker took the message isn't known"
        lost = sum(future is None for _, future in (*in_flight, *waiting))
        for some, consequence in ((in_flight, unknown), (waiting, "nothing was sent")):
            for _, future in some:
                self._counters.publish_failures += future not in self._echoes
                _tell(future, EngineUnavailable(f"{why}; {consequence}", may_have_been_sent=some is in_flight))
        if lost:
            logger.error(
                "not published, of broadcast_nowait: %d, because %s",
                lost,
                why,
                extra=about("publish.failed", count=lost),
            )

    async def aclose(self, why: str) -> None:
        """Tell everybody who still waits, and take nothing more."""
        self.link = None
        self.fail(why, why)
        await self._tasks.cancel()

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

    def _refuse(self, future: _Taken | None, error: Exception) -> None:
        self._counters.publish_failures += future not in self._echoes
        if future is not None:
            _tell(future, _documented(error))
            return
        self._refused += 1
        if self._throttle.is_due("refused"):
            count, self._refused = self._refused, 0
            logger.error(
                "not published, of broadcast_nowait: %d, because %s",
                count,
                error,
                extra=about("publish.failed", count=count),
            )


def _documented(error: Exception) -> Exception:
    # Callers of `broadcast` handle two kinds of errors: this message is wrong, or no message goes out now.
    if isinstance(error, (EngineError, EncodeError)):
        return error
    if isinstance(error, (ConfigurationError, OSError)):
        told: EngineError = EngineUnavailable(f"{error}; nothing was sent")
    else:
        told = EngineError(f"the broker refuses the message ({type(error).__name__}: {error})")
    told.__cause__ = error
    return told


def _tell(future: _Taken | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()  # looked at, because asyncio would complain if the caller was cancelled
