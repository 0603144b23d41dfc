"""The base of engines whose broker keeps what is published."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from secrets import token_urlsafe
from typing import TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker import BrokerEngine, Session
from wsbroadcast.engines.broker.link import Keep, KeepingLink
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.publication import MAX_OFFSET, Position, Publication

T = TypeVar("T")

# How often, in seconds, it is checked whether there is another link.
_LOOK_SECONDS = 0.01


def new_epoch() -> str:
    """Return a name for a new history."""
    return token_urlsafe(9)


class KeepingEngine(BrokerEngine):
    """An engine whose broker keeps what is published. Its links are `KeepingLink`s."""

    told_rules: HistoryRules | None = None
    """The rules given to `keep`. `new_link` passes them on."""
    only_publishes: bool = False
    """Whether this program receives nothing, as given to `keep`. `new_link` passes it on."""

    @abstractmethod
    def new_link(self) -> KeepingLink:
        """Make a link that isn't open yet, with `told_rules` and `only_publishes`."""

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept. It is called before `start`."""
        self.told_rules, self.only_publishes = rules, only_publishes

    async def ready_to_keep(self) -> None:
        """Return when the broker keeps what `keep` was told. After `start`, that needs another link."""
        session = self._started()
        async with session.relinking:
            link = self._keeping_link(session)
            if link.rules is not None or link.keeps_without_rules:
                return
            await link.abort()
            try:
                async with asyncio.timeout(2 * self._timing.connect_timeout + self._timing.request_timeout):
                    while session.outgoing.link in (None, link):  # noqa: ASYNC110  # the supervisor tells nobody
                        await asyncio.sleep(_LOOK_SECONDS)
            except TimeoutError:
                raise session.outgoing.away() from None
            if self._keeping_link(session).rules is None:
                raise EngineUnavailable(
                    f"{self.name} at {self.address} keeps nothing yet: first start an app whose manager has history=… "
                    "or a router of streams"
                )

    def _keeping_link(self, session: Session) -> KeepingLink:
        link = session.outgoing.link
        if link is None:
            raise session.outgoing.away()
        assert isinstance(link, KeepingLink)
        return link

    @property
    def rules(self) -> HistoryRules | None:
        """What is kept: the rules given to `keep`, else those found at the broker when the link was opened."""
        link = self.link
        return link.rules if self.told_rules is None and isinstance(link, KeepingLink) else self.told_rules

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        """Return once the broker keeps the publication. Publications of one turn of the loop go out together."""
        appended = await self._started().outgoing.publish(publication, Keep(history, key))
        assert appended is not None, "a link says where it keeps what it was to keep"
        return appended

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Hand over a publication to be kept. If the broker doesn't take it, that is counted and logged."""
        self._started().outgoing.publish_nowait(publication, Keep(history))

    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        """Read what the broker keeps of an audience."""
        name = self.names.of(audience)
        offset = None if since is None or not 0 <= since.offset <= MAX_OFFSET else since.offset
        stretch = await self._ask(lambda link: link.read_kept(name, offset, history))
        if since is not None and offset and since.epoch != stretch.top.epoch:
            # Another history has begun, so the offset of the old one means nothing.
            stretch = await self._ask(lambda link: link.read_kept(name, None, history))
        return self._started().replay(audience, stretch, history)

    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        """Ask the broker for the newest positions of audiences."""
        names = [self.names.of(audience) for audience in audiences]
        return await self._ask(lambda link: link.read_positions(names, histories)) if names else []

    async def forget(self, audience: Audience) -> None:
        """Remove what the broker keeps of an audience."""
        await self._ask(lambda link: link.forget(self.names.of(audience)))

    async def _ask(self, question: Callable[[KeepingLink], Awaitable[T]]) -> T:
        link = self._keeping_link(self._started())
        try:
            async with Patience(self._timing.request_timeout):
                return await question(link)
        except EngineError:
            raise
        except ConfigurationError as error:
            raise EngineUnavailable(str(error)) from error
        except TimeoutError as error:
            raise EngineUnavailable(f"the broker doesn't answer within {self._timing.request_timeout} s") from error
        except OSError as error:
            raise EngineUnavailable(f"the connection to the broker is lost ({error})") from error
        except Exception as error:  # a driver may raise anything
            raise EngineError(f"the broker can't be asked ({type(error).__name__}: {error})") from error
