"""The engine of a single process: what is published is received at once."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Self

from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.engines.worker_count import warn_of_several_workers
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.publication import Dismissal, Publication


class MemoryEngine(Engine):
    """Reaches the connections of this process only. No I/O, nothing to configure."""

    name = "memory"
    links_nodes = False

    def __init__(self) -> None:
        self._receiver: Receiver | None = None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from `memory://`."""
        if url.removeprefix("memory:").strip("/"):
            raise ConfigurationError("the memory engine takes no host and no path: write memory://")
        return cls()

    async def start(self, receiver: Receiver) -> None:
        """Begin to hand publications to the receiver; warn if this is one of several processes."""
        warn_of_several_workers()
        self._receiver = receiver

    async def aclose(self) -> None:
        """Stop."""
        self._receiver = None

    def publish(self, publication: Publication | Dismissal) -> Coroutine[Any, Any, None]:
        """Deliver to this node's connections; returns when they have it."""
        return self._started().deliver(publication)  # its coroutine, without one of our own around it

    def publish_nowait(self, publication: Publication | Dismissal) -> None:
        """Deliver to this node's connections, behind what waits for `on_deliver` hooks."""
        self._started().take(publication)

    async def health(self) -> Health:
        """Tell whether the engine was started."""
        return Health(self.name, self._receiver is not None, "" if self._receiver else "not started")

    def _started(self) -> Receiver:
        if self._receiver is None:
            raise EngineUnavailable("the memory engine is not started")
        return self._receiver
