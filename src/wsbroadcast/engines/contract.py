"""The contract of an engine, which links the nodes. It knows audiences and nodes, never connections."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast, runtime_checkable

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.history import LAST, Appended, History, HistoryRules, Page, Replay, Since, no_history, page_of
from wsbroadcast.publication import Control, Forgetting, Gap, Position, Publication
from wsbroadcast.stats import EngineStats

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether messages travel between the nodes now."""

    engine: str
    """The engine's name."""
    is_ok: bool
    """Whether the engine's own echo came back through the broker."""
    detail: str = ""
    """What is wrong, if anything."""
    is_ready: bool = True
    """Whether this node takes connections: not before its start, nor from the beginning of a drain on. A broker that
    is away changes nothing about it. An engine leaves it to the manager."""


class Receiver(Protocol):
    """What an engine hands publications to: a node."""

    def take(self, publication: Publication | Control) -> None:
        """Take a publication for this node's connections.

        It never blocks and never raises. Publications to one audience are delivered in the order of the calls. They
        wait inside the node while hooks run or most clients are behind. Those that wait for clients hold up no other
        audience.
        """

    def deliver(self, publication: Publication | Control) -> Coroutine[Any, Any, None]:
        """Deliver a publication behind those to its audience that were taken; return when the connections have it.

        For an engine whose publishers are on this node: they go at the pace of the hooks.

        Raises:
            Exception: What an `on_deliver` hook raises; no connection gets the message then.
        """

    def gap(self, gap: Gap) -> None:
        """Take note that messages of other nodes are missing. Never blocks, never raises."""

    def suspect(self) -> None:
        """Take note that messages may be missing now: what has a history is read on. Never blocks, never raises."""


@runtime_checkable
class Transactional(Protocol):
    """What an engine can do whose broker is the app's database."""

    def publish_in(
        self, transaction: object, publication: Publication, history: History | None = None
    ) -> Coroutine[Any, Any, None]:
        """Publish as part of a transaction of the caller's: a commit sends it, a rollback doesn't.

        Args:
            transaction: The caller's.
            publication: What to publish.
            history: How much is kept of its audience; an engine that keeps none isn't asked for it.

        Raises:
            ConfigurationError: If the object is not a connection or session that the engine knows.
        """


@runtime_checkable
class KeepsHistory(Protocol):
    """What an engine can do that keeps publications. To keep, to number and to send is one step: all of it or nothing.

    The place of a publication is its position: the epoch names the history and dies with it, the offset grows. The
    epoch changes whenever something that was confirmed to a publisher may have been lost, and when a history is
    removed; never because publications expire. A publication comes to every node with its position and with the
    offset before it in its audience, so that a node sees where one is missing, and reads it.
    """

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept, before `start`.

        Args:
            rules: What is kept. The engine writes it down beside the data, for those who only publish.
            only_publishes: Whether nobody receives anything here: nothing is written down then, and without rules the
                engine learns those that others have written, each time that it connects.

        Raises:
            ConfigurationError: If the engine can't keep it, as it was made.
        """

    @property
    def rules(self) -> HistoryRules | None:
        """What is kept, as `keep` was told, else as others have said at the broker; `None` if nothing is known."""

    def append(
        self, publication: Publication, history: History, key: str | None = None
    ) -> Coroutine[Any, Any, Appended]:
        """Return once it is kept, and on its way to every node that wants it.

        Args:
            publication: What to publish.
            history: How much is kept of its audience.
            key: Names it in its audience: of several with the same key the first alone is kept and sent, as long as it
                is kept, or for some minutes. All of them return its position.

        Raises:
            EngineUnavailable: As for `publish`; what is not kept is not sent either.
            MessageTooLarge: If it is larger than the broker takes.
            EngineError: If the broker refuses this very publication.
            ConfigurationError: If there is a key, and the engine can't keep keys.
        """

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Take it without waiting for a confirmation; raises what `publish_nowait` raises."""

    def read(self, audience: Audience, since: Position | None, history: History) -> Coroutine[Any, Any, Replay]:
        """Read what came after a position, or the newest that there is of what is kept.

        If the position is of another epoch, that is the newest that there is, whatever the offset.

        What it returns is not older than anything that was confirmed to a publisher before the call. It makes the epoch
        if there is none. It reads nothing that is older than `history.seconds`, and the newest `history.messages` only;
        `Replay.is_complete` tells whether that is everything after the position.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def positions(
        self, audiences: Sequence[Audience], histories: Sequence[History]
    ) -> Coroutine[Any, Any, Sequence[Position]]:
        """Read the newest position of each of these audiences, in one round trip; it makes the epochs that are missing.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def forget(self, audience: Audience) -> Coroutine[Any, Any, None]:
        """Remove the history of an audience; the epoch changes.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """


class Engine(ABC):
    """Carries publications from the node where they are made to every node that wants them, this one included.

    At most once per node; per audience in the order in which the engine took them, the same on every node. An engine
    that can promise only the order of each publishing node, as NATS, says so.
    """

    name: str
    """The name in `health()` and in logs."""
    links_nodes: ClassVar[bool] = True
    """Whether publications reach other nodes too; if not, it is an engine for a single process."""

    @classmethod
    @abstractmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine without any I/O.

        Raises:
            ConfigurationError: If the URL makes no sense to this engine.
        """

    @abstractmethod
    async def start(self, receiver: Receiver) -> None:
        """Begin to hand publications to the receiver.

        A broker that can't be reached is not an error, unless the engine was told to fail fast: it starts degraded,
        says so in `health()`, and heals by itself.

        It may be called again after `aclose`, and without `aclose` when the event loop of the last `start` has ended:
        what was left there is gone, and the engine begins anew.

        Raises:
            LifecycleError: If it runs already, because an engine serves one node, or if `aclose` ends the start.
            ConfigurationError: If the broker refuses us: a wrong password, a missing permission.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
            EngineError: If the engine fails in a way that no broker causes: a driver that doesn't fit, a bug.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Stop; nothing reaches the receiver afterwards. Idempotent. A `start` that runs ends, too."""

    def subscribe(self, audiences: Iterable[Audience]) -> None:  # noqa: B027  # for some engines nothing is right
        """Want publications to these audiences from now on; returns at once, `confirmed` waits.

        An engine that brings every publication to every node has nothing to do here.
        """

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:  # noqa: B027  # for some engines nothing is right
        """No longer want publications to these audiences: they have no members here any more."""

    async def confirmed(self, audiences: Iterable[Audience]) -> None:  # noqa: B027  # for some engines nothing is right
        """Return when every later publication to these wanted audiences, on any node, arrives here.

        During an outage it returns at once: the audiences are wanted, and subscribed when the broker is back. What was
        missed until then is announced as a gap.

        Raises:
            EngineUnavailable: If the broker forbids us one of them.
        """

    @abstractmethod
    async def publish(self, publication: Publication | Control) -> None:
        """Return once the engine has taken the publication.

        Raises:
            EngineUnavailable: If the broker can't be reached, takes no messages now, or forbids us to publish: nothing
                was sent, unless it says `may_have_been_sent`.
            MessageTooLarge: If it is larger than the broker takes.
            EngineError: If the broker refuses this very publication, so that to try again doesn't help.
        """

    @abstractmethod
    def publish_nowait(self, publication: Publication | Control) -> None:
        """Take the publication without waiting for a confirmation.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach; nothing was sent.
            MessageTooLarge: If it is larger than the broker takes.
        """

    def stats(self) -> EngineStats:
        """Return what was counted."""
        return EngineStats()

    @abstractmethod
    async def health(self) -> Health:
        """Tell whether publications arrive, by sending one to ourselves."""


async def each(call: Callable[[P], Awaitable[None]], publications: Iterable[P]) -> None:
    """Call something for each publication, one after another, whatever becomes of the others.

    Raises:
        Exception: The first error.
    """
    errors: list[Exception] = []
    for publication in publications:
        try:
            await call(publication)
        except Exception as error:  # of a hook for one audience; the others get theirs
            errors.append(error)
    if errors:
        raise errors[0]


async def publish(
    engine: Engine, publication: Publication | Control, rules: HistoryRules | None, key: str | None = None
) -> Appended | None:
    """Publish one, and keep it if the rules say so; return where it is kept.

    Raises:
        EngineError: As for `Engine.publish`.
    """
    history = None if rules is None else rules.of(publication.audience)
    if history is None or not isinstance(publication, Publication):
        await engine.publish(publication)
        return None
    # Who has rules has looked whether the engine can keep to them, which takes longer than all the rest.
    return await cast(KeepsHistory, engine).append(publication, history, key)


async def publish_all(
    engine: Engine,
    publications: Sequence[Publication | Control],
    rules: HistoryRules | None = None,
    key: str | None = None,
) -> dict[Audience, Appended]:
    """Publish several, in this order; return once the engine has taken all of them, and where it keeps which.

    Raises:
        EngineUnavailable: As for `publish`; `positions` has those that were taken.
        EngineError: As for `publish`.
    """
    appended: dict[Audience, Appended] = {}

    async def publish_one(publication: Publication | Control) -> None:
        if (found := await publish(engine, publication, rules, key)) is not None:
            appended[publication.audience] = found

    if len(publications) == 1:
        await publish_one(publications[0])
        return appended
    if not engine.links_nodes:
        await each(publish_one, publications)
        return appended
    # In one turn, so that they go to the broker in one call.
    results = await asyncio.gather(*map(publish_one, publications), return_exceptions=True)
    errors = [result for result in results if result is not None]
    for error in errors[:1]:
        if isinstance(error, EngineUnavailable):
            taken = [each.audience for each, result in zip(publications, results, strict=True) if result is None]
            error.positions = {
                audience: appended[audience].position if audience in appended else None for audience in taken
            }
            error.may_have_been_sent = any(getattr(each, "may_have_been_sent", False) for each in errors)
        raise error
    return appended


def publish_all_nowait(engine: Engine, publications: Sequence[Publication], rules: HistoryRules | None = None) -> None:
    """Publish several without waiting, in this order.

    Raises:
        EngineUnavailable: As for `publish_nowait`; `positions` has those that were taken.
    """
    for number, publication in enumerate(publications):
        history = None if rules is None else rules.of(publication.audience)
        try:
            if history is None:
                engine.publish_nowait(publication)
            else:
                cast(KeepsHistory, engine).append_nowait(publication, history)
        except EngineUnavailable as error:
            error.positions = {each.audience: each.position for each in publications[:number]}
            raise


async def publish_in(
    engine: Engine, transaction: object, publications: Sequence[Publication], rules: HistoryRules | None
) -> None:
    """Publish several in a transaction of the caller's.

    Raises:
        ConfigurationError: If the engine can't, or not in this one.
    """
    for publication in publications:
        history = None if rules is None else rules.of(publication.audience)
        if history is None:
            await transactional(engine).publish_in(transaction, publication)
        else:
            await transactional(engine).publish_in(transaction, publication, history)


def transactional(engine: Engine) -> Transactional:
    """Return the engine itself, if it can publish inside a transaction.

    Raises:
        ConfigurationError: If it can't.
    """
    if not isinstance(engine, Transactional):
        raise ConfigurationError(f"the {engine.name} engine can't publish inside a transaction, Postgres can")
    return engine


# What a manager and a publisher do with a history.


async def position_of(engine: Engine, rules: HistoryRules | None, audience: Audience) -> Position:
    """Ask where an audience is.

    Raises:
        ConfigurationError: If it has no history.
        EngineUnavailable: If the broker can't be asked.
    """
    (position,) = await keeps_history(engine).positions([audience], [_history(rules, audience)])
    return position


async def read_page(
    engine: Engine, rules: HistoryRules | None, audience: Audience, since: Since | None, limit: int | None
) -> Page:
    """Read what is kept of an audience.

    Raises:
        ConfigurationError: If it has no history.
        EngineUnavailable: If the broker can't be asked.
    """
    position = since if isinstance(since, Position) else None
    replay = await keeps_history(engine).read(audience, position, _history(rules, audience))
    return page_of(replay, position, 1 if since is LAST else limit)


async def forget(engine: Engine, rules: HistoryRules | None, audience: Audience) -> None:
    """Remove what is kept of an audience, and let all nodes know.

    Raises:
        ConfigurationError: If it has no history.
        EngineUnavailable: If the broker can't be asked.
    """
    _history(rules, audience)
    await keeps_history(engine).forget(audience)
    await engine.publish(Forgetting(audience))


def _history(rules: HistoryRules | None, audience: Audience) -> History:
    history = None if rules is None else rules.of(audience)
    if history is None:
        raise ConfigurationError(no_history(audience))
    return history


def keeps_history(engine: Engine) -> KeepsHistory:
    """Return the engine itself, if it can keep what is published.

    Raises:
        ConfigurationError: If it can't.
    """
    if not isinstance(engine, KeepsHistory):
        raise ConfigurationError(
            f"the {engine.name} engine keeps no history: leave history= out, or use memory://, sqlite:///, redis://, "
            "nats:// with JetStream, or postgresql://"
        )
    return engine
