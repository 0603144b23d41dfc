"""Delivers publications from the tails to the connections, in order, at the pace of hooks and slow crowds."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.history import Reason
from wsbroadcast.hooks import is_delivering
from wsbroadcast.logs import about, logger
from wsbroadcast.node.tail import Tail
from wsbroadcast.publication import Publication

# After so many publications of one tail the event loop gets a turn, even if no hook waits for anything.
_TURN_PUBLICATIONS = 64


class Deliverer(Protocol):
    """What the tails need of their node."""

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `deliver_now` may be called: no hook has to run, and most clients keep up."""

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections. Errors are logged."""

    async def deliver_paced(self, publication: Publication) -> None:
        """Run the hooks, and hand a publication to the connections when most of them keep up."""

    def delivered(self, audience: Audience) -> None:
        """Take note that a publication was handed over. Replays that waited for that position go on."""

    def withheld(self, publication: Publication) -> None:
        """Take note that a hook has failed. Nobody gets the publication; clients that know positions are told of it."""

    def arrived(self, audience: Audience) -> None:
        """Take note that a tail has more. Listeners may read on."""

    def broken(self, audience: Audience, reason: Reason, seconds: float | None) -> None:
        """Take note that publications are missing and can't be read any more. The tail begins anew after them.

        They were published within the last `seconds`; `None` if they are reported with the rest of an outage.
        """


class Deliveries:
    """Delivers what is in the tails. Publishers of this node may wait for it.

    Args:
        node: Hands publications to the connections.
    """

    def __init__(self, node: Deliverer) -> None:
        self._node = node
        # `_running`: the audiences that a task delivers to. `_in_flight`: those that it waits for inside a delivery.
        self._running: set[Audience] = set()
        self._in_flight: set[Audience] = set()
        # The futures of publishers that wait until their publication is delivered, by audience and offset.
        self._waiters: dict[Audience, dict[int, asyncio.Future[None]]] = {}
        self._tasks = Tasks()

    def is_running(self, audience: Audience) -> bool:
        """Tell whether a delivery waits for hooks or a slow crowd. Later publications are delivered after it."""
        return audience in self._running

    def is_in_flight(self, audience: Audience) -> bool:
        """Tell whether a publication is being delivered. Its recipients are fixed already then."""
        return audience in self._in_flight

    def next(self, publication: Publication, audience: Audience, tail: Tail) -> None:
        """Deliver a publication that has just come, if nothing waits before it."""
        if self._node.is_ready(publication):
            self._node.deliver_now(publication)
            tail.delivered = tail.top
            self._node.delivered(audience)
        else:
            self._run(audience, tail)

    def go_on(self, audience: Audience, tail: Tail) -> None:
        """Deliver everything in a tail that isn't delivered yet."""
        if audience in self._running:
            return
        while (publication := tail.next()) is not None:
            if not self._node.is_ready(publication):
                self._run(audience, tail)
                return
            self._node.deliver_now(publication)
            tail.delivered = publication.offset
        self._node.delivered(audience)

    def _run(self, audience: Audience, tail: Tail) -> None:
        self._running.add(audience)
        self._tasks.spawn(self._deliver_all(audience, tail), f"deliveries to {audience.kind}")

    async def _deliver_all(self, audience: Audience, tail: Tail) -> None:
        number = 0
        try:
            await self._tasks.begun()  # the caller goes on before a hook runs
            while (publication := tail.next()) is not None:
                number += 1
                await self._deliver_one(audience, tail, publication)
                if number % _TURN_PUBLICATIONS == 0:
                    await asyncio.sleep(0)
        finally:
            self._running.discard(audience)
            self._in_flight.discard(audience)
            self._settle(audience, None, None)
        self._node.delivered(audience)

    async def _deliver_one(self, audience: Audience, tail: Tail, publication: Publication) -> None:
        epoch = tail.epoch
        failure: Exception | None = None
        if self._node.is_ready(publication):
            self._node.deliver_now(publication)
        else:
            self._in_flight.add(audience)
            try:
                await self._node.deliver_paced(publication)
            except Exception as error:
                failure = error
                if tail.epoch == epoch and tail.delivered < publication.offset:
                    self._node.withheld(publication)
            finally:
                self._in_flight.discard(audience)
        if tail.epoch == epoch:  # else the tail has begun anew meanwhile
            tail.delivered = max(tail.delivered, publication.offset)
        if not self._settle(audience, publication.offset, failure) and failure is not None:
            logger.error(
                "a message was not delivered", exc_info=failure, extra=about("delivery.failed", audience=audience.kind)
            )
        self._node.delivered(audience)

    def _settle(self, audience: Audience, offset: int | None, failure: Exception | None) -> bool:
        # Returns whether somebody waited for that publication. Without an offset all waiting ends.
        waiters = self._waiters.get(audience)
        if waiters is None:
            return False
        if offset is None:
            del self._waiters[audience]
            settled = list(waiters.values())
        else:
            settled = [waiter for waiter in (waiters.pop(offset, None),) if waiter is not None]
        for waiter in settled:
            if waiter.done():
                continue
            if failure is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(failure)
        return bool(settled)

    # Waiting publishers.

    def waits(self, publication: Publication, tail: Tail | None) -> bool:
        """Tell whether a publication of this node isn't delivered yet, and its publisher should wait for that.

        A hook that broadcasts to the audience that it runs for doesn't wait, because its own delivery comes first.
        """
        return tail is not None and tail.delivered < publication.offset <= tail.top and not is_delivering()

    async def wait_delivered(self, publication: Publication) -> None:
        """Return when the connections have a publication for which `waits` is true; raise what a hook raises.

        If the caller is cancelled, the publication is still delivered: it is kept already.
        """
        audience, offset = publication.audience, publication.offset
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(audience, {})[offset] = waiter
        await waiter

    def broken(self, audience: Audience) -> None:
        """End all waiting for an audience, because its tail has begun anew."""
        self._settle(audience, None, None)

    async def aclose(self, patience: float) -> None:
        """Deliver what waits for at most so many seconds, then end."""
        if patience and len(self._tasks):
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._tasks.join()
        await self._tasks.cancel()
        for audience in list(self._waiters):
            self._settle(audience, None, None)
