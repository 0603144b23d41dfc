"""Which audiences the engine brings to a node: those with a member here, and those that are about to get one."""

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
        registry: Knows who is in which audience.
        tails: Are opened for audiences with a history; `None` if there are none.
    """

    def __init__(self, engine: Engine, registry: Registry[Any], tails: Tails | None = None) -> None:
        self._engine = engine
        self._registry = registry
        self._tails = tails
        # Audiences that are about to get a member, by how many.
        self._held: dict[Audience, int] = {}
        # Whether the engine wants to know; one that brings everything to every node doesn't.
        self._is_asked = (
            type(engine).subscribe is not Engine.subscribe or type(engine).confirmed is not Engine.confirmed
        )

    def audiences(self, user_key: str | None, channels: Iterable[str]) -> list[Audience]:
        """Return what has to be held for a new connection; nothing where neither engine nor tails want to know."""
        if not self._is_asked and self._tails is None:
            return []
        audiences = [EVERYONE, *(Audience("channel", channel) for channel in channels)]
        return audiences if user_key is None else [*audiences, Audience("user", user_key)]

    async def hold(self, audiences: Sequence[Audience]) -> None:
        """Want audiences that are about to get a member; return when the engine has confirmed.

        They stay wanted until `release`, even if their last member leaves. A connection that becomes a member before
        that gets what any node publishes from then on.
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
        """Undo a `hold`: the audiences have their member by now, or won't get it."""
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
        """Stop wanting those of the audiences that have no member and are not held."""
        for audience in audiences:
            if audience not in self._held and not self._registry.members(audience):
                self._engine.unsubscribe((audience,))
                if self._tails is not None:
                    self._tails.close(audience)
