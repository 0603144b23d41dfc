"""The questions about histories that a manager and a publisher answer."""

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
"""Asks the engine something. Its second argument is the rules of what is kept; `None` if they aren't known."""


class KnowsHistory(ABC):
    """A manager or a publisher: something with an engine that keeps what is published."""

    @abstractmethod
    async def _ask(self, question: Question[T]) -> T:
        """Ask the engine, after starting it if necessary."""

    async def position(
        self, channel: str | Unset = UNSET, *, user: UserId | Unset = UNSET, everyone: bool = False
    ) -> Position:
        """Return the newest position of a channel. Everything that was broadcast before the call is at or before it.

        To give a client a snapshot and all later messages, ask for the position first, then load the data, and let the
        client connect or subscribe `since` the position. The client misses nothing; it may get messages that the data
        already includes. A position is a text, in JSON too: give it to the client as it is.

        Args:
            channel: The channel.
            user: Instead of a channel, a user, whose messages have a history of their own.
            everyone: Instead of a channel, the messages to everyone.

        Raises:
            ConfigurationError: If the channel has no history.
            EngineUnavailable: If the broker can't be asked.
            InvalidChannel: If the channel's name breaks a rule.
            ValueError: If no audience is named, or more than one.
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
            channel: The channel.
            user: Instead of a channel, a user, whose messages have a history of their own.
            everyone: Instead of a channel, the messages to everyone.
            since: A position: return the messages after it. If some of these are no longer kept, the newest that are
                kept are returned. `LAST` returns only the newest message. By default all that is kept is read.
            limit: The most messages to return: the first ones after `since`, else the newest.

        Returns:
            Page: The `messages`, each with its `data` and `position`; `is_complete`, which says whether these are all;
            and the `position` to go on from. A route may return the page as it is.

        Raises:
            ConfigurationError: If the channel has no history.
            EngineUnavailable: If the broker can't be asked.
            InvalidChannel: If the channel's name breaks a rule.
            ValueError: If no audience is named, or more than one; or if `since` is no position, or `limit` no positive
                number.
        """
        audience, after = kept_audience(channel, user, everyone), one_since(since)
        check_limit(limit)
        return await self._ask(lambda engine, rules: read_page(engine, rules, audience, after, limit))

    async def forget(
        self, channel: str | Unset = UNSET, *, user: UserId | Unset = UNSET, everyone: bool = False
    ) -> None:
        """Remove what is kept of a channel, so that its history begins anew.

        Clients that come back are told that they missed messages. The arguments are those of `position`.

        Raises:
            ConfigurationError: If the channel has no history.
            EngineUnavailable: If the broker can't be asked. Nothing was removed then, or it isn't known whether.
        """
        audience = kept_audience(channel, user, everyone)
        await self._ask(lambda engine, rules: forget(engine, rules, audience))
