"""The audiences that a node asks the engine for: those with a connection here, and those that will soon have one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.engines.contract import Engine
from wsbroadcast.node.tails import Tails


class Demand:
    """Keeps what the engine is asked for in step with the registry.

    Args:
        engine: Is told when an audience is wanted, and when it no longer is.
        registry: Knows which connections are in which audience.
        tails: Are opened for audiences with a history; `None` if there are none.
    """

    def __init__(self, engine: Engine, registry: Registry[Any], tails: Tails | None = None) -> None:
        self._engine = engine
        self._registry = registry
        self._tails = tails
        # How many holds there are for each audience that will soon have a connection.
        self._held: dict[Audience, int] = {}
        # Whether the engine has to be told. An engine that brings everything to every node hasn't.
        self._is_asked = (
            type(engine).subscribe is not Engine.subscribe or type(engine).confirmed is not Engine.confirmed
        )

    def keep(self, tails: Tails) -> None:
        """Open tails too from now on."""
        self._tails = tails

    def audiences(self, user_key: str | None, channels: Iterable[str]) -> list[Audience]:
        """Return the audiences to hold for a new connection; none if neither the engine nor the tails need it."""
        if not self._is_asked and self._tails is None:
            return []
        audiences = [EVERYONE, *(Audience("channel", channel) for channel in channels)]
        return audiences if user_key is None else [*audiences, Audience("user", user_key)]

    async def hold(self, audiences: Sequence[Audience]) -> None:
        """Ask for audiences that will soon have a connection; return when the engine has confirmed.

        They stay wanted until `release`, even if their last connection leaves. A connection that joins before `release`
        gets everything that any node publishes from then on.
        """
        for audience in audiences:
            self._held[audience] = self._held.get(audience, 0) + 1
        try:
            self._engine.subscribe(audiences)
            await self._engine.confirmed(audiences)
            if self._tails is not None:
                await self._tails.open(audiences)
        except BaseException:
            self.release(audiences)
            raise

    def release(self, audiences: Sequence[Audience]) -> None:
        """Undo a `hold`. The connection has joined by now, or won't."""
        for audience in audiences:
            count = self._held[audience] - 1
            if count:
                self._held[audience] = count
            else:
                del self._held[audience]
        self.left(audiences)

    @asynccontextmanager
    async def holding(self, audiences: Sequence[Audience]) -> AsyncGenerator[None]:
        """Hold audiences for the length of a block."""
        await self.hold(audiences)
        try:
            yield
        finally:
            self.release(audiences)

    def left(self, audiences: Iterable[Audience]) -> None:
        """Ask no more for those of the audiences that have no connection here and aren't held."""
        for audience in audiences:
            if audience not in self._held and not self._registry.members(audience):
                self._engine.unsubscribe((audience,))
                if self._tails is not None:
                    self._tails.close(audience)
