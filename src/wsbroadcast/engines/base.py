"""The contract of an engine, which links the nodes. It knows audiences and nodes, never connections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

from wsbroadcast.audience import Audience
from wsbroadcast.message import Message


class Publication(NamedTuple):
    """One broadcast between its origin and the nodes."""

    message: Message
    audience: Audience
    exclude: frozenset[str] = frozenset()
    """Ids of connections that don't get it, wherever they are."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An outage of the broker: what other nodes published meanwhile never came."""

    engine: str
    """The engine's name."""
    seconds: float
    """How long it lasted."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether messages travel between the nodes now."""

    engine: str
    """The engine's name."""
    is_ok: bool
    """Whether the engine's own echo came back through the broker."""
    detail: str = ""
    """What is wrong, if anything."""


class Receiver(Protocol):
    """What an engine hands to a node."""

    def receive(self, publication: Publication) -> Coroutine[Any, Any, None]:
        """Deliver a publication to this node's connections; in the order of calls."""

    def receive_nowait(self, publication: Publication) -> None:
        """Deliver it without awaiting; only hooks that are plain functions can run."""

    def gap(self, gap: Gap) -> Coroutine[Any, Any, None]:
        """Messages of other nodes are missing."""


class Engine(ABC):
    """Carries publications from the node where they are made to every node that wants them, this one included.

    At most once per node; per audience in the order in which the engine took them, the same on every node.
    """

    name: str
    """The name in `health()` and in logs."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine without any I/O.

        Raises:
            ConfigurationError: If the URL makes no sense to this engine.
        """

    @abstractmethod
    async def start(self, receiver: Receiver) -> None:
        """Begin to hand publications to the receiver."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop; nothing reaches the receiver afterwards. Idempotent."""

    @abstractmethod
    async def publish(self, publication: Publication) -> None:
        """Return once the engine has taken the publication.

        Raises:
            EngineUnavailable: If the broker can't be reached; nothing was sent.
        """

    @abstractmethod
    def publish_nowait(self, publication: Publication) -> None:
        """Take the publication without waiting for a confirmation.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach; nothing was sent.
        """

    @abstractmethod
    async def health(self) -> Health:
        """Tell whether publications arrive, by sending one to ourselves."""
