"""What came from the broker, on its way to this node's connections, at the pace of each audience's crowd."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.logs import logger
from wsbroadcast.publication import Publication

# What may wait here for crowds that are behind and for hooks that take their time.
_MAX_BYTES = 32 * 1024 * 1024
_MAX_PUBLICATIONS = 65_536


class Inbox:
    """Delivers at once where nothing stands in the way, else in order, one lane for each audience.

    The reader of the broker never waits: a crowd that is behind holds up its own audience and no other. What doesn't
    fit is dropped, and said to be missed.

    Args:
        receiver: The node.
        missed: Called when something was dropped.
    """

    def __init__(self, receiver: Receiver, missed: Callable[[str], None]) -> None:
        self._receiver = receiver
        self._missed = missed
        self._lanes: dict[Audience, deque[Publication]] = {}
        self._publications = 0
        self._bytes = 0
        self._tasks = Tasks()

    def put(self, publication: Publication) -> None:
        """Deliver a publication, now or when its turn has come. One that closes waits for nothing and nobody."""
        audience = publication.audience
        lane = self._lanes.get(audience)
        if publication.close_code is not None or (lane is None and self._receiver.is_ready(publication)):
            self._deliver(publication)
            return
        if self._bytes >= _MAX_BYTES or self._publications >= _MAX_PUBLICATIONS:
            self._missed("more came from the broker than the connections here take")
            return
        self._publications += 1
        self._bytes += publication.message.size
        if lane is not None:
            lane.append(publication)
        else:  # with the first in it: an eager task factory runs the task at once
            lane = self._lanes[audience] = deque((publication,))
            self._tasks.spawn(self._run(audience, lane), f"deliveries to {audience.kind}")

    async def aclose(self) -> None:
        """Forget what waits."""
        await self._tasks.cancel()
        self._lanes.clear()

    async def _run(self, audience: Audience, lane: deque[Publication]) -> None:
        try:
            while lane:
                publication = self._take(lane)
                if self._receiver.is_ready(publication):
                    self._deliver(publication)
                else:
                    await self._deliver_paced(publication)
        finally:
            del self._lanes[audience]

    def _take(self, lane: deque[Publication]) -> Publication:
        publication = lane.popleft()
        self._publications -= 1
        self._bytes -= publication.message.size
        return publication

    def _deliver(self, publication: Publication) -> None:
        try:
            self._receiver.receive_nowait(publication)
        except Exception:  # whatever it is, the reader of the broker goes on
            logger.exception("a message from the broker was not delivered")

    async def _deliver_paced(self, publication: Publication) -> None:
        try:
            await self._receiver.receive_paced(publication)
        except Exception:  # a hook's: it fails closed, and there is no caller here to see it
            logger.exception("a message from the broker was not delivered")
