"""What a node publishes, on its way to the broker. Publications of one turn of the loop go out together."""

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

# How many parcels one call of `Link.publish` gets at most, so that it can be done within its timeout.
_BATCH_PARCELS = 512
_BATCH_BYTES = 4 * 1024 * 1024

# Seconds between two questions for the broker's limits. Some clients send what is too large again and again.
_LOOK_SECONDS = 0.25

_Taken = asyncio.Future[Appended | None]

# A parcel, and the future of the caller that waits until the broker has taken it.
_Item = tuple[Parcel, _Taken | None]


class Outgoing:
    """Publications in the order of the calls, and the callers that wait until the broker has taken them.

    When a link is lost, nothing that waited for it is sent later: `fail` tells all callers.

    Args:
        where: The engine and its broker's address, for errors.
        names: The names of audiences at the broker.
        timing: How long to wait for the broker.
        max_message_bytes: The largest payload that other nodes take, in bytes.
        counters: Where failures are counted.
        max_waiting_bytes: How many bytes `broadcast_nowait` may leave waiting. Callers that await have no limit.
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
        """The id of this node in envelopes."""
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
        # The futures of parcels that carry no publication.
        self._echoes: set[_Taken] = set()
        # How many of `broadcast_nowait` were refused since the last line in the log.
        self._refused = 0
        self._tasks = Tasks()
        # Asks the broker for its limits. All messages that are too large wait for one such question.
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -_LOOK_SECONDS

    # What a node publishes.

    async def publish(self, publication: Publication | Control, keep: Keep | None = None) -> Appended | None:
        """Return once the broker has taken the publication; return where it is kept, if it is."""
        try:
            parcel = self._parcel(publication, keep)
        except MessageTooLarge as error:
            if error.size > self._max_message_bytes:
                raise
            await asyncio.wait([self._look_at_limits()])
            parcel = self._parcel(publication, keep)
        return await self._put(parcel)

    def publish_nowait(self, publication: Publication | Control, keep: Keep | None = None) -> None:
        """Hand over a publication. If it fails later, that is counted and logged.

        Raises:
            EngineUnavailable: If there is no link, or too much waits already. Nothing was sent.
            MessageTooLarge: If the publication is larger than the broker or the other nodes take.
        """
        try:
            parcel = self._parcel(publication, keep)
        except MessageTooLarge as error:
            if error.size <= self._max_message_bytes:
                self._look_at_limits()  # for the next message
            raise
        if self._bytes > self._max_waiting_bytes:
            self._counters.publish_failures += 1
            raise EngineUnavailable(f"the broker doesn't keep up: {self._bytes} bytes wait for it; nothing was sent")
        self._append(parcel, None)

    def put_first(self, parcel: Parcel) -> _Taken:
        """Put a parcel before all that wait. It is for parcels that need no order, such as echoes."""
        future = self._put(parcel)
        self._waiting.rotate(1)
        self._echoes.add(future)
        future.add_done_callback(self._echoes.discard)
        return future

    def is_forged(self, origin: Origin) -> bool:
        """Tell whether an envelope claims to come from this node, but has a number that it hasn't used yet."""
        return origin.node == self.node and origin.seq > self._published

    def away(self) -> EngineUnavailable:
        """Make the error for a caller that needs a link while there is none."""
        why = self._trouble or "its event loop ends"
        return EngineUnavailable(f"{self._where} is out of reach ({why})")

    def _parcel(self, publication: Publication | Control, keep: Keep | None) -> Parcel:
        link = self.link
        if link is None:
            self._counters.publish_failures += not isinstance(publication, NodeMessage)  # no app publishes it
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
        except Exception as error:  # callers then get an error with the limit that is known
            logger.info(
                "%s can't be asked whether its limits have changed: %s",
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

    # For the supervisor.

    def use(self, link: Link) -> None:
        """Publish by this link from now on."""
        self.link = link
        self._trouble = ""

    async def send(self, link: Link) -> None:
        """Publish what comes, until the link fails. It runs as a task while the link is used."""
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
        """Tell all waiting callers that the link is lost, and drop their parcels, so that none arrives late.

        Args:
            why: What happened.
            trouble: What to tell callers that publish while there is no link.
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
                "messages of broadcast_nowait that were not published: %d, because %s",
                lost,
                why,
                extra=about("publish.failed", count=lost),
            )

    async def aclose(self, why: str) -> None:
        """Tell all callers that still wait, and take nothing more."""
        self.link = None
        self.fail(why, why)
        await self._tasks.cancel()

    def _take(self) -> Sequence[_Item]:
        batch: list[_Item] = []
        size = 0
        while self._waiting and len(batch) < _BATCH_PARCELS and size < _BATCH_BYTES:
            parcel, future = item = self._waiting.popleft()
            size += len(parcel.envelope)
            if future is None or not future.cancelled():  # else the caller has given up
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
                "messages of broadcast_nowait that were not published: %d, because %s",
                count,
                error,
                extra=about("publish.failed", count=count),
            )


def _documented(error: Exception) -> Exception:
    # Callers of `broadcast` handle two kinds of errors: this message is wrong, or no message can go out now.
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
        future.exception()  # marked as retrieved, because asyncio would log it if the caller was cancelled
