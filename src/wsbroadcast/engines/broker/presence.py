"""The base of engines whose broker knows who is in a channel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from secrets import token_urlsafe
from typing import TypeVar, cast

from wsbroadcast.engines.broker.history import KeepingEngine
from wsbroadcast.engines.broker.link import KeepingLink
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.presence import Members
from wsbroadcast.publication import PresenceChange

T = TypeVar("T")


class PresenceStore(ABC):
    """The steps of `KeepsPresence` at a broker.

    All may be called at any time while the link is open, also while others run. The caller puts a timeout around each.
    Before the first call nothing is done at the broker: no round trip, no key, no table.
    """

    @abstractmethod
    async def renew(self, incarnation: str, fresh: str, seconds: float) -> bool:
        """Renew the lease of an incarnation. Take a new one if it has run out, or if its entries may have been lost.

        Args:
            incarnation: Whose lease is renewed; empty if there is none yet.
            fresh: The incarnation that gets the new lease.
            seconds: For how many seconds from now on the lease holds.

        Returns:
            bool: Whether `incarnation` still has its lease. If not, `fresh` has one.
        """

    @abstractmethod
    async def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""

    @abstractmethod
    async def enter(self, channel: str, incarnation: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Add members, and send the change, in one step.

        If the incarnation holds no lease, nobody is added, or the next sweep removes who was.
        """

    @abstractmethod
    async def leave(self, channel: str, incarnation: str, members: Collection[str]) -> PresenceChange | None:
        """Remove members, and send the change, in one step."""

    @abstractmethod
    async def members(self, channel: str) -> Members:
        """Return who is in a channel, and the version."""

    @abstractmethod
    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""

    @abstractmethod
    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""

    @abstractmethod
    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove all or some of what was entered by incarnations whose lease has run out."""


class PresentLink(KeepingLink):
    """A link to a broker that knows who is in a channel."""

    presence: PresenceStore
    """The steps at the broker."""


class PresentEngine(KeepingEngine):
    """An engine whose broker knows who is in a channel. Its links are `PresentLink`s."""

    _incarnation = ""

    @abstractmethod
    def new_link(self) -> PresentLink:
        """Make a link that isn't open yet."""

    async def start(self, receiver: Receiver) -> None:
        """Connect, and stay connected until `aclose`. A lease of an earlier start isn't used again."""
        await super().start(receiver)
        self._incarnation = ""

    @property
    def incarnation(self) -> str:
        """The name of this node's lease; empty before the first `renew`."""
        return self._incarnation

    async def renew(self, seconds: float) -> bool:
        """Renew the lease, or take a new one."""
        fresh = token_urlsafe(9)
        is_same = await self._at(lambda store: store.renew(self._incarnation, fresh, seconds))
        if not is_same:
            self._incarnation = fresh
        return is_same

    async def alive(self) -> frozenset[str]:
        """Return the incarnations that hold a lease."""
        return await self._at(lambda store: store.alive())

    async def enter(self, channel: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Say that members are in a channel."""
        if not members:
            return None
        return await self._at(lambda store: store.enter(channel, self._incarnation, members))

    async def leave(self, channel: str, members: Iterable[str]) -> PresenceChange | None:
        """Say that members are no longer in a channel."""
        names = set(members)
        return await self._at(lambda store: store.leave(channel, self._incarnation, names)) if names else None

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        return await self._at(lambda store: store.members(channel))

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        return await self._at(lambda store: store.count(channel))

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        return await self._at(lambda store: store.channels_of(member))

    async def sweep(self) -> Sequence[PresenceChange]:
        """Remove what nodes have left behind whose lease has run out."""
        return await self._at(lambda store: store.sweep())

    async def _at(self, step: Callable[[PresenceStore], Awaitable[T]]) -> T:
        return await self._ask(lambda link: step(cast(PresentLink, link).presence))
