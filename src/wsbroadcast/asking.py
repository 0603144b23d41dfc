"""What a manager and a publisher can be asked about histories."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from wsbroadcast.audience import UNSET, Unset, UserId
from wsbroadcast.engines.contract import Engine, forget, position_of, read_page
from wsbroadcast.history import HistoryRules, Page, Since, check_limit, kept_audience, one_since
from wsbroadcast.publication import Position

T = TypeVar("T")

Question = Callable[[Engine, HistoryRules | None], Coroutine[Any, Any, T]]
"""What is asked of an engine, and what is kept as far as it is known."""


class KnowsHistory(ABC):
    """Something with an engine that keeps what is published."""

    @abstractmethod
    async def _ask(self, question: Question[T]) -> T:
        """Ask the engine, once it is started."""

    async def position(
        self, channel: str | Unset = UNSET, *, user: UserId | Unset = UNSET, everyone: bool = False
    ) -> Position:
        """Return where a channel is now. Everything that was broadcast before the call is behind it.

        To hand somebody a snapshot and let it follow: ask for the position first, load the data, and let the client
        connect or subscribe `since` it. It may get what the data has already, and misses nothing. A position is a
        text, in JSON too: give it to the client as it is.

        Args:
            channel: Which channel.
            user: A user instead, whose messages have a history of their own.
            everyone: What goes to everyone instead.

        Raises:
            ConfigurationError: If it has no history.
            EngineUnavailable: If the broker can't be asked.
        """
        audience = kept_audience(channel, user, everyone)
        return await self._ask(lambda engine, rules: position_of(engine, rules, audience))

    async def history(
        self,
        channel: str | Unset = UNSET,
        *,
        user: UserId | Unset = UNSET,
        everyone: bool = False,
        since: Since | str | None = None,
        limit: int | None = None,
    ) -> Page:
        """Read what is kept of a channel.

        Args:
            channel: Which channel.
            user: A user instead, whose messages have a history of their own.
            everyone: What goes to everyone instead.
            since: Only what came after this position, if all of that is kept; `LAST` for the newest message alone.
            limit: At most so many messages.

        Returns:
            Page: The `messages`, each with its `data` and `position`; whether they are all (`is_complete`); and the
            `position` to go on from. A route may return it as it is.

        Raises:
            ConfigurationError: If it has no history.
            EngineUnavailable: If the broker can't be asked.
            ValueError: If `since` is no position, or `limit` not a positive number.
        """
        audience, after = kept_audience(channel, user, everyone), one_since(since)
        check_limit(limit)
        return await self._ask(lambda engine, rules: read_page(engine, rules, audience, after, limit))

    async def forget(
        self, channel: str | Unset = UNSET, *, user: UserId | Unset = UNSET, everyone: bool = False
    ) -> None:
        """Remove what is kept of a channel: it begins anew, and who comes back is told that it missed something.

        Raises:
            ConfigurationError: If it has no history.
            EngineUnavailable: If the broker can't be asked; then nothing was removed, or it isn't known.
        """
        audience = kept_audience(channel, user, everyone)
        await self._ask(lambda engine, rules: forget(engine, rules, audience))
