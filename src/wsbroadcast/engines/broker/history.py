"""What engines share whose broker keeps what is published."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from secrets import token_urlsafe
from typing import TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker import BrokerEngine
from wsbroadcast.engines.broker.link import Keep, KeepingLink
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.publication import MAX_OFFSET, Position, Publication

T = TypeVar("T")


def new_epoch() -> str:
    """Return a name for a new history."""
    return token_urlsafe(9)


class KeepingEngine(BrokerEngine):
    """An engine whose broker keeps what is published; its links are `KeepingLink`s."""

    told_rules: HistoryRules | None = None
    """What `keep` was told is kept; `new_link` passes it on."""
    only_publishes: bool = False
    """Whether nobody receives anything here, as `keep` was told; `new_link` passes it on."""

    @abstractmethod
    def new_link(self) -> KeepingLink:
        """Make a link that isn't open yet, with `told_rules` and `only_publishes`."""

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept, before `start`."""
        self.told_rules, self.only_publishes = rules, only_publishes

    @property
    def rules(self) -> HistoryRules | None:
        """What is kept, as `keep` was told, else as the broker said when the link was opened."""
        link = self.link
        return link.rules if self.told_rules is None and isinstance(link, KeepingLink) else self.told_rules

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        """Return once the broker keeps it; publications of one turn of the loop go out together."""
        appended = await self._started().outgoing.publish(publication, Keep(history, key))
        assert appended is not None, "a link says where it keeps what it was to keep"
        return appended

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Hand it over; if the broker doesn't take it, that is counted and logged."""
        self._started().outgoing.publish_nowait(publication, Keep(history))

    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        """Read what the broker keeps of an audience."""
        name = self.names.of(audience)
        offset = None if since is None or not 0 <= since.offset <= MAX_OFFSET else since.offset
        stretch = await self._ask(lambda link: link.read_kept(name, offset, history))
        if since is not None and offset and since.epoch != stretch.top.epoch:
            # Another history has begun: its offsets have nothing to do with that one's.
            stretch = await self._ask(lambda link: link.read_kept(name, None, history))
        return self._started().replay(audience, stretch, history)

    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        """Ask the broker where audiences are."""
        names = [self.names.of(audience) for audience in audiences]
        return await self._ask(lambda link: link.read_positions(names, histories)) if names else []

    async def forget(self, audience: Audience) -> None:
        """Remove what the broker keeps of an audience."""
        await self._ask(lambda link: link.forget(self.names.of(audience)))

    async def _ask(self, question: Callable[[KeepingLink], Awaitable[T]]) -> T:
        outgoing = self._started().outgoing
        link = outgoing.link
        if link is None:
            raise outgoing.away()
        assert isinstance(link, KeepingLink)
        try:
            async with Patience(self._timing.request_timeout):
                return await question(link)
        except EngineError:
            raise
        except ConfigurationError as error:
            raise EngineUnavailable(str(error)) from error
        except TimeoutError as error:
            raise EngineUnavailable(f"the broker doesn't answer in {self._timing.request_timeout} s") from error
        except OSError as error:
            raise EngineUnavailable(f"the connection to the broker is lost ({error})") from error
        except Exception as error:  # whatever a driver raises
            raise EngineError(f"the broker can't be asked ({type(error).__name__}: {error})") from error
