"""Collects the publications of one turn of the event loop, and hands them to the connections in batches."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Generic

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.delivery.backlog import HIGH_WATER_PART
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, Batch
from wsbroadcast.delivery.pace import Pace, R, Wait
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import NOBODYS, SlowConsumers
from wsbroadcast.delivery.uvicorn import UvicornSink
from wsbroadcast.logs import about, logger
from wsbroadcast.publication import NOBODY, Publication

# After so many bytes a turn is delivered, and the event loop runs other tasks. It is enough to join small messages, and
# little enough that other tasks of the app run in between.
_TURN_BYTES = 16 * 1024
_TURN_MESSAGES = 128

# How often, in seconds, a broadcaster that waits for the crowd checks again. No event tells that a peer's kernel has
# taken more, or that the peer's time is over.
_LOOK_AGAIN_SECONDS = 0.05


class Opening(Generic[R]):
    """The batches that wait for a connection until its client was told of a subscription."""

    __slots__ = ("_bytes", "_messages", "batches")

    def __init__(self) -> None:
        self.batches: deque[Batch[R]] = deque()
        """The batches in the order in which they came."""
        self._messages = self._bytes = 0

    def push(self, batch: Batch[R], most: int, most_bytes: int) -> int:
        """Append a batch; return how many messages of older ones were dropped to stay within the limits."""
        self._count(batch, 1)
        self.batches.append(batch)
        dropped = 0
        while len(self.batches) > 1 and (self._messages > most or self._bytes > most_bytes):
            oldest = self.batches.popleft()
            self._count(oldest, -1)
            dropped += oldest.messages
        return dropped

    def _count(self, batch: Batch[R], times: int) -> None:
        self._messages += times * len(batch.publications)
        self._bytes += times * sum(each.message.size for each in batch.publications)


class Dispatcher(Generic[R]):
    """Hands publications to the sinks of one node, in order.

    Nothing is awaited between the registry and a sink. So all connections get a publication that are in the audience at
    that moment. Code that changes the registry calls `flush` first.
    """

    def __init__(self, registry: Registry[R], slow_consumers: SlowConsumers) -> None:
        self._registry = registry
        self._slow_consumers = slow_consumers
        self._pace = Pace(registry, slow_consumers)
        self.behind: Mapping[Audience, Collection[R]] = {}
        """The connections of each audience that are behind in its history, and get no new publications."""
        # The connections of each audience whose clients have yet to be told of the subscription, and what waits for
        # them.
        self._opening: dict[Audience, dict[R, Opening[R]]] = {}
        # One turn must not fill a backlog, however small that is.
        self.turn_bytes = min(_TURN_BYTES, slow_consumers.options.max_backlog_bytes // HIGH_WATER_PART)
        """How many bytes are delivered at once."""
        self.turn_messages = min(_TURN_MESSAGES, slow_consumers.options.max_backlog_messages // HIGH_WATER_PART)
        """How many messages are delivered at once."""
        self.collected: list[Batch[R]] = []
        """The batches of this turn of the event loop so far."""
        self._bytes = 0
        self._messages = 0
        self._is_scheduled = False
        # Set when a turn was full, until the loop has run the writers that it woke.
        self._is_turn_full = False
        # Broadcasters that wait for a turn. The first to come is served first; else one in a tight loop would always
        # win.
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()

    def dispatch(self, publication: Publication, recipients: Sequence[R] | None = None) -> None:
        """Hand a publication to its audience, or to some of it. It is written in this turn of the event loop."""
        batches = self.collected
        if batches and batches[-1].takes(publication, recipients):
            batches[-1].publications.append(publication)
        else:
            batches.append(Batch(publication, recipients))
        self._bytes += publication.message.size
        self._messages += 1
        if self._bytes >= self.turn_bytes or self._messages >= self.turn_messages:
            self.flush()
            if not self._is_turn_full:
                self._is_turn_full = True
                asyncio.get_running_loop().call_soon(self._begin_turn, context=NOBODYS)
        elif not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._end_turn, context=NOBODYS)

    def flush(self) -> None:
        """Deliver what was collected, now."""
        if not self.collected:
            return
        batches, self.collected = self.collected, []
        may_be_large = self._bytes > FRAGMENT_BYTES
        self._bytes = self._messages = 0
        for batch in batches:
            recipients = batch.recipients
            first = batch.publications[0]
            if recipients is None:
                recipients = self._registry.recipients(first.audience, first.exclude)
            if self.behind and first.position is not None and (behind := self.behind.get(first.audience)):
                recipients = [recipient for recipient in recipients if recipient not in behind]
            if self._opening and (opening := self._opening.get(first.audience)):
                recipients = self._without_opening(batch, recipients, opening)
            if may_be_large and batch.is_large:
                self._deliver_large(batch, recipients)
            else:
                UvicornSink.deliver_all(batch, recipients, self._failed)
            if first.__class__ is Publication:  # all publications of a batch are of one class
                self._count(len(recipients) * len(batch.publications))
            if first.taken_at and recipients:
                self._slow_consumers.counters.delivery_seconds.observe(monotonic() - first.taken_at)

    def _without_opening(
        self, batch: Batch[R], recipients: Sequence[R], opening: Mapping[R, Opening[R]]
    ) -> Sequence[R]:
        options, counters = self._slow_consumers.options, self._slow_consumers.counters
        for recipient in recipients:
            if (waiting := opening.get(recipient)) is not None:
                dropped = waiting.push(batch, options.max_backlog_messages // 2, options.max_backlog_bytes // 2)
                if dropped:
                    counters.dropped["opening"] += dropped
        return [recipient for recipient in recipients if recipient not in opening]

    def open(self, recipient: R, audience: Audience) -> None:
        """Let messages to a recipient in an audience wait until `opened`.

        Half a backlog may wait. If there is more, the oldest are dropped, as if the recipient had joined later.
        """
        self.flush()
        self._opening.setdefault(audience, {}).setdefault(recipient, Opening())

    def opened(self, recipient: R, audience: Audience) -> None:
        """Hand over what waited for a recipient, if it is still in the audience."""
        self.flush()
        opening = self._opening.get(audience, {})
        waiting = opening.pop(recipient, None)
        if not opening:
            self._opening.pop(audience, None)
        if waiting is not None and self._registry.is_member(recipient, audience):
            for batch in waiting.batches:
                self.deliver_batch(batch, recipient)

    def deliver_batch(self, batch: Batch[R], recipient: R) -> None:
        """Deliver a batch to one recipient, now. Call `flush` first."""
        if len(batch.publications) == 1 and batch.is_large:
            self._deliver_large(batch, (recipient,))
        else:
            UvicornSink.deliver_all(batch, (recipient,), self._failed)
        self._count(batch.messages)

    def _count(self, messages: int) -> None:
        slow_consumers = self._slow_consumers
        # Postponed messages are delivered, and counted, once there is room.
        slow_consumers.counters.deliveries += messages - slow_consumers.postponed
        slow_consumers.postponed = 0

    def _deliver_large(self, batch: Batch[R], recipients: Sequence[R]) -> None:
        for recipient in recipients:
            try:
                recipient._sink.deliver_large(batch)
            except Exception:
                self._failed(recipient)

    def _failed(self, recipient: R) -> None:
        logger.exception(
            "the server failed on a write", extra=about("write.failed")
        )  # it must not cost the others their message
        recipient._sink.owner.lost(ABNORMAL, "")

    @property
    def is_clear(self) -> bool:
        """Whether a broadcaster may go on without further checks: the turn isn't full and nobody is behind."""
        return not self._is_turn_full and not self._queue and not self._slow_consumers.behind

    def is_ready(self, audience: Audience, exclude: frozenset[str]) -> bool:
        """Tell whether a message for an audience needn't wait: the turn isn't full, and its crowd isn't behind."""
        if self._is_turn_full or self._queue:
            return False
        now = asyncio.get_running_loop().time
        return not self._slow_consumers.behind or not self._pace.must_wait(audience, exclude, Wait(), now())

    async def ease(self, size: int, audience: Audience, exclude: frozenset[str] = NOBODY) -> None:
        """Wait for a place in a turn, and for the recipients for which `Pace` wants to wait; at most `send_timeout`.

        Args:
            size: How many bytes the caller is about to hand over.
            audience: The audience of the message.
            exclude: Ids of connections that don't get it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._pace.longest
        wait = Wait()
        while (began := loop.time()) < deadline:
            if self._is_turn_full or self._queue:
                wait.fills_turns = True
                await self._queue_up(size, deadline)
                began = loop.time()
            if not self._pace.must_wait(audience, exclude, wait, began):
                return
            await self._slow_consumers.wait_for_change(min(deadline, began + _LOOK_AGAIN_SECONDS))
            if wait.patience is not None:
                wait.patience.spend(began, loop.time())

    async def _queue_up(self, size: int, deadline: float) -> None:
        place = asyncio.get_running_loop().create_future()
        self._queue.append((place, size))
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await place

    def _end_turn(self) -> None:
        self._is_scheduled = False
        self.flush()

    def _begin_turn(self) -> None:
        # Serves as many waiting broadcasters as fit into one turn. The others wait for the next turn.
        self._is_turn_full = False
        messages, size = 0, 0
        while self._queue and messages < max(1, self.turn_messages) and size < max(1, self.turn_bytes):
            place, place_size = self._queue.popleft()
            if not place.done():  # else the broadcaster was cancelled, or has waited long enough
                place.set_result(None)
                messages += 1
                size += place_size
        if self._queue:
            self._is_turn_full = True
            asyncio.get_running_loop().call_soon(self._begin_turn, context=NOBODYS)
