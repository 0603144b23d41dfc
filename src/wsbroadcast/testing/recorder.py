"""A receiver that keeps what an engine hands to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from wsbroadcast.audience import Audience
from wsbroadcast.engines.base import Gap, Publication


class Recorder:
    """A receiver that keeps publications and gaps, and can be told to fail or to take its time.

    Args:
        is_ready: Whether it can deliver at once; else every publication is awaited, as with slow hooks.
    """

    def __init__(self, *, is_ready: bool = True) -> None:
        self.publications: list[Publication] = []
        """What was received, in order."""
        self.gaps: list[Gap] = []
        """What was reported missing, in order."""
        self.failing: set[Audience] = set()
        """Audiences for which receiving raises `RuntimeError`."""
        self.stalled: set[Audience] = set()
        """Audiences for which receiving never ends."""
        self.failures = 0
        """How often it has raised."""
        self.waiting = 0
        """How many deliveries have begun that never end."""
        self._is_ready = is_ready
        self._changed = asyncio.Event()

    # What an engine calls.

    async def receive(self, publication: Publication) -> None:
        """Keep a publication, in the order of calls."""
        if publication.audience in self.stalled:
            self.waiting += 1
            self._changed.set()
            await asyncio.Event().wait()
        if not self._is_ready:
            await asyncio.sleep(0)
        self.receive_nowait(publication)

    def receive_nowait(self, publication: Publication) -> None:
        """Keep a publication."""
        if publication.audience in self.failing:
            self.failures += 1
            self._changed.set()
            raise RuntimeError("the recorder was told to fail")
        self.publications.append(publication)
        self._changed.set()

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `receive_nowait` will do."""
        return self._is_ready and publication.audience not in self.stalled

    async def receive_paced(self, publication: Publication) -> None:
        """Keep a publication of another node."""
        await self.receive(publication)

    async def gap(self, gap: Gap) -> None:
        """Keep a gap."""
        self.gaps.append(gap)
        self._changed.set()

    # What a test asks.

    def data(self, audience: Audience) -> list[str | bytes]:
        """Return what clients of an audience would have received, in order."""
        return [each.message.data for each in self.publications if each.audience == audience]

    async def wait_until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait until something is true, which only changes when something is received; return whether it is."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
