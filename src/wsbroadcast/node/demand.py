"""Which audiences the engine brings to a node: those with a member here, and those that are about to get one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.engines.contract import Engine


class Wanted:
    """Keeps what the engine is asked for in step with the registry.

    Args:
        engine: Is told when an audience is wanted, and when it no longer is.
        registry: Knows who is in which audience.
    """

    def __init__(self, engine: Engine, registry: Registry[Any]) -> None:
        self._engine = engine
        self._registry = registry
        # Audiences that are about to get a member, by how many.
        self._expected: dict[Audience, int] = {}
        # Whether the engine wants to know; one that brings everything to every node doesn't.
        self._is_asked = (
            type(engine).subscribe is not Engine.subscribe or type(engine).confirmed is not Engine.confirmed
        )

    def audiences(self, user_key: str | None, channels: Iterable[str]) -> list[Audience]:
        """Return what a new connection has to be expected in; nothing where the engine doesn't want to know."""
        if not self._is_asked:
            return []
        audiences = [EVERYONE, *(Audience("channel", channel) for channel in channels)]
        return audiences if user_key is None else [*audiences, Audience("user", user_key)]

    def expecting(self, audiences: Sequence[Audience]) -> Expecting:
        """Return a block inside which audiences are wanted and confirmed, whoever leaves them meanwhile.

        Who becomes a member in there gets what is published from then on, on any node.
        """
        return Expecting(self, audiences)

    def left(self, audiences: Iterable[Audience]) -> None:
        """Want audiences no longer that nobody is in, or about to be."""
        for audience in audiences:
            if audience not in self._expected and not self._registry.members(audience):
                self._engine.unsubscribe((audience,))

    async def expect(self, audiences: Sequence[Audience]) -> None:
        """Want audiences that are about to get a member; return when the engine has confirmed."""
        for audience in audiences:
            self._expected[audience] = self._expected.get(audience, 0) + 1
        self._engine.subscribe(audiences)
        try:
            await self._engine.confirmed(audiences)
        except BaseException:
            self.expected(audiences)
            raise

    def expected(self, audiences: Sequence[Audience]) -> None:
        """They have their member by now, or won't get it."""
        for audience in audiences:
            count = self._expected[audience] - 1
            if count:
                self._expected[audience] = count
            else:
                del self._expected[audience]
        self.left(audiences)


class Expecting:
    """The block that `Wanted.expecting` returns."""

    __slots__ = ("_audiences", "_wanted")

    def __init__(self, wanted: Wanted, audiences: Sequence[Audience]) -> None:
        self._wanted = wanted
        self._audiences = audiences

    async def __aenter__(self) -> None:
        await self._wanted.expect(self._audiences)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wanted.expected(self._audiences)
