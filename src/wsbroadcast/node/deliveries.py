"""What is in the tails, on its way to the connections: in order, at the pace of hooks and crowds."""

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

# A tail delivers no more than this before the event loop gets its chance, although no hook waits for anything.
_TURN_PUBLICATIONS = 64


class Deliverer(Protocol):
    """What the tails ask of their node."""

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `deliver_now` may be called: no hook has to run, and most clients keep up."""

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections; what goes wrong is logged."""

    async def deliver_paced(self, publication: Publication) -> None:
        """Hand it over when most clients keep up, through the hooks."""

    def delivered(self, audience: Audience) -> None:
        """A publication was handed over: who waits for that place goes on."""

    def withheld(self, publication: Publication) -> None:
        """A hook has failed: nobody gets a publication, and who knows where it is is told that it is past it."""

    def arrived(self, audience: Audience) -> None:
        """There is more in a tail: listeners may read on."""

    def broken(self, audience: Audience, reason: Reason, seconds: float | None) -> None:
        """Something is missing that can't be read any more; the tail has begun anew behind it.

        It came within so many seconds; `None` if it is told with the rest of an outage.
        """


class Deliveries:
    """Delivers what is in a tail, and lets those wait who have published it.

    Args:
        node: Hands it over.
    """

    def __init__(self, node: Deliverer) -> None:
        self._node = node
        # The audiences whose publications a task delivers, and those of them for which it waits inside a delivery.
        self._running: set[Audience] = set()
        self._in_flight: set[Audience] = set()
        # Who waits until a publication of this node is delivered, by audience and offset.
        self._waiters: dict[Audience, dict[int, asyncio.Future[None]]] = {}
        self._tasks = Tasks()

    def is_running(self, audience: Audience) -> bool:
        """Tell whether something waits for hooks or a crowd, so that what comes is delivered behind it."""
        return audience in self._running

    def is_in_flight(self, audience: Audience) -> bool:
        """Tell whether a publication is being delivered, so that it is settled already who gets it."""
        return audience in self._in_flight

    def next(self, publication: Publication, audience: Audience, tail: Tail) -> None:
        """Deliver what has come just now, and nothing waits before it."""
        if self._node.is_ready(publication):
            self._node.deliver_now(publication)
            tail.delivered = tail.top
            self._node.delivered(audience)
        else:
            self._run(audience, tail)

    def go_on(self, audience: Audience, tail: Tail) -> None:
        """Deliver whatever is in a tail and isn't delivered."""
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
            await self._tasks.begun()  # who puts something in goes on before a hook runs
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
        if tail.epoch == epoch:  # else there was a break meanwhile, and it has begun anew
            tail.delivered = max(tail.delivered, publication.offset)
        if not self._settle(audience, publication.offset, failure) and failure is not None:
            logger.error(
                "a message was not delivered", exc_info=failure, extra=about("delivery.failed", audience=audience.kind)
            )
        self._node.delivered(audience)

    def _settle(self, audience: Audience, offset: int | None, failure: Exception | None) -> bool:
        # Whether somebody waited for that publication; without an offset nobody waits any more.
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

    # Who waits.

    def waits(self, publication: Publication, tail: Tail | None) -> bool:
        """Tell whether a publication of this node that was taken is still to be delivered, and may be waited for.

        A hook that broadcasts to the audience that it is asked about doesn't wait, because its own message goes first.
        """
        return tail is not None and tail.delivered < publication.offset <= tail.top and not is_delivering()

    async def wait_delivered(self, publication: Publication) -> None:
        """Return when the connections have a publication that `waits`; raises what a hook raises.

        Who is cancelled doesn't keep it from anybody: it is kept already.
        """
        audience, offset = publication.audience, publication.offset
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(audience, {})[offset] = waiter
        await waiter

    def broken(self, audience: Audience) -> None:
        """Let nobody wait any more: the tail has begun anew."""
        self._settle(audience, None, None)

    async def aclose(self, patience: float) -> None:
        """End; what waits may still be delivered for so many seconds."""
        if patience and len(self._tasks):
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._tasks.join()
        await self._tasks.cancel()
        for audience in list(self._waiters):
            self._settle(audience, None, None)
