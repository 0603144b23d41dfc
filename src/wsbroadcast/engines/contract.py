"""The contract of an engine. An engine links the nodes. It knows audiences and nodes, but no connections."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar, cast, runtime_checkable

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.history import LAST, Appended, History, HistoryRules, Page, Replay, Since, no_history, page_of
from wsbroadcast.presence import Members
from wsbroadcast.publication import Control, Forgetting, Gap, Position, PresenceChange, Publication
from wsbroadcast.stats import EngineStats

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether messages travel between the nodes now."""

    engine: str
    """The engine's name."""
    is_ok: bool
    """Whether a message that the engine sent to itself came back through the broker."""
    detail: str = ""
    """What is wrong; empty if nothing is."""
    is_ready: bool = True
    """Whether this node takes connections. It takes none before its start, and none once a drain has begun. The broker
    may be away: that doesn't count here. The manager sets this, an engine doesn't."""


class Receiver(Protocol):
    """What an engine hands publications to: a node."""

    def take(self, publication: Publication | Control) -> None:
        """Take a publication for this node's connections.

        It never blocks and never raises. Publications to one audience are delivered in the order of the calls. They
        wait inside the node while hooks run, or while most clients of their audience are behind. Publications that
        wait for clients don't delay other audiences.
        """

    def deliver(self, publication: Publication | Control) -> Coroutine[Any, Any, None]:
        """Deliver a publication after all earlier ones to its audience; return when the connections have it.

        It is for an engine whose publishers are all on this node. A publisher then waits for the hooks.

        Raises:
            Exception: If an `on_deliver` hook raises. No connection gets the message then.
        """

    def gap(self, gap: Gap) -> None:
        """Take note that messages of other nodes are missing. It never blocks and never raises."""

    def suspect(self) -> None:
        """Take note that messages may be missing; audiences with a history are read again.

        It never blocks and never raises.
        """


@runtime_checkable
class Transactional(Protocol):
    """An engine that can publish inside a transaction, because its broker is the app's database."""

    def publish_in(
        self, transaction: object, publication: Publication, history: History | None = None
    ) -> Coroutine[Any, Any, None]:
        """Publish as part of the caller's transaction: a commit sends the publication, a rollback doesn't.

        Args:
            transaction: The caller's connection or session.
            publication: What to publish.
            history: How much is kept of its audience. It is passed only to an engine that keeps histories.

        Raises:
            ConfigurationError: If `transaction` is not a connection or session that the engine knows.
        """


@runtime_checkable
class KeepsHistory(Protocol):
    """An engine that keeps publications. It keeps, numbers and sends a publication in one step: all of it or nothing.

    A publication has a position, which is an epoch and an offset. The epoch names the history. The offset grows within
    it. The epoch changes when something that was confirmed to a publisher may have been lost, and when the history is
    removed. It doesn't change when publications expire. Every node gets a publication with its position and with the
    offset before it in its audience. So a node sees that one is missing, and reads it.
    """

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept. It is called before `start`.

        Args:
            rules: What is kept. The engine writes the rules down at the broker, for programs that only publish.
            only_publishes: Whether this program receives nothing. The engine then writes no rules down. If it has no
                rules, it reads those at the broker each time that it connects.

        Raises:
            ConfigurationError: If the engine, with its options, can't keep this.
        """

    @property
    def rules(self) -> HistoryRules | None:
        """What is kept: the rules given to `keep`, else those found at the broker; `None` if there are none yet."""

    def append(
        self, publication: Publication, history: History, key: str | None = None
    ) -> Coroutine[Any, Any, Appended]:
        """Publish and keep; return once the publication is kept and on its way to every node that wants it.

        Args:
            publication: What to publish.
            history: How much is kept of its audience.
            key: A name for the publication in its audience. Of several with the same key only the first is kept and
                sent, and each call returns its position. The key holds as long as the publication is kept, or for some
                minutes.

        Raises:
            EngineUnavailable: As for `publish`. What is not kept is not sent either.
            MessageTooLarge: If the publication is larger than the broker takes.
            EngineError: If the broker refuses this very publication.
            ConfigurationError: If there is a key, and the engine can't keep keys.
        """

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Publish and keep without waiting for a confirmation; raises what `publish_nowait` raises."""

    def read(self, audience: Audience, since: Position | None, history: History) -> Coroutine[Any, Any, Replay]:
        """Read what came after a position, or the newest that is kept if there is no position.

        A position of another epoch counts as none, whatever its offset.

        Everything that was confirmed to a publisher before the call is seen by it. If there is no epoch yet, one is
        made. Only the newest `history.messages` are read, and nothing that is older than `history.seconds`.
        `Replay.is_complete` tells whether that is everything after the position.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def positions(
        self, audiences: Sequence[Audience], histories: Sequence[History]
    ) -> Coroutine[Any, Any, Sequence[Position]]:
        """Read the newest position of each of these audiences in one round trip; missing epochs are made.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def forget(self, audience: Audience) -> Coroutine[Any, Any, None]:
        """Remove the history of an audience; the epoch changes.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """


@runtime_checkable
class KeepsLease(Protocol):
    """An engine that knows which nodes are alive.

    A node holds a lease, and is an *incarnation* as long as it holds that one. When the lease runs out, this
    incarnation is dead for all nodes, for good. A process that was only frozen goes on as another incarnation.
    """

    uses_lease: bool
    """Whether leases will be used here: see `Engine.uses_lease`."""

    @property
    def incarnation(self) -> str:
        """The name of this node's lease, unique over all nodes and times. It changes when the lease was lost."""

    def renew(self, seconds: float) -> Coroutine[Any, Any, bool]:
        """Hold the lease for so many seconds from now on; take a new one if there is none.

        Returns:
            bool: Whether it is the same lease as before. If not, the old one ran out, or the broker has forgotten it.
            `incarnation` is another one then, and what was entered under the old one will be removed.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer. The lease may run out.
        """

    def alive(self) -> Coroutine[Any, Any, frozenset[str]]:
        """Return the incarnations that hold a lease; this node's is one of them, if it has a lease.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """


@runtime_checkable
class KeepsPresence(KeepsLease, Protocol):
    """An engine that knows who is in a channel, over all nodes.

    A member is in a channel while at least one incarnation that holds its lease has entered it. A member joins with
    the first entry and leaves with the last. The broker decides which is the first or last in the step that writes it,
    so each change is made once. Each step may be repeated if its outcome isn't known. Each change has a version, which
    grows by one per channel. The change is returned to the caller, and sent as a `PresenceChange` to the nodes that
    are subscribed to the channel.

    Members and channels are texts of up to 200 bytes. Call `renew` first: the other methods need a lease.
    """

    def enter(self, channel: str, members: Mapping[str, bytes]) -> Coroutine[Any, Any, PresenceChange | None]:
        """Say that members are in a channel on this node.

        Args:
            channel: The channel.
            members: The info that others see, by member. The newest info of a member replaces older info.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer: repeat it.
        """

    def leave(self, channel: str, members: Iterable[str]) -> Coroutine[Any, Any, PresenceChange | None]:
        """Say that members are no longer in a channel on this node.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer: repeat it.
        """

    def members(self, channel: str) -> Coroutine[Any, Any, Members]:
        """Return who is in a channel, over all nodes, and the version of the newest change.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def count(self, channel: str) -> Coroutine[Any, Any, int]:
        """Return how many are in a channel, over all nodes.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def channels_of(self, member: str) -> Coroutine[Any, Any, frozenset[str]]:
        """Return the channels that a member is in, over all nodes.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """

    def sweep(self) -> Coroutine[Any, Any, Sequence[PresenceChange]]:
        """Remove what was entered by incarnations whose lease has run out. Any node may call it at any time.

        If several nodes call it at the same time, each change is made by one of them. One call takes a bounded time, so
        it may leave some for the next call.

        Returns:
            Sequence[PresenceChange]: The changes that this call has made.

        Raises:
            EngineUnavailable: If the broker can't be reached, or doesn't answer.
        """


class Engine(ABC):
    """Carries publications from the node where they are made to every node that wants them, this one included.

    A node gets each publication at most once. Publications to one audience come in the order in which the engine took
    them, the same on every node. Some engines, such as NATS, keep only the order of each publishing node; they say so.
    """

    name: str
    """The name in `health()` and in logs."""
    uses_lease: bool = False
    """Whether `KeepsLease` or `KeepsPresence` will be used here. It is set before `start`, so that an engine whose
    broker can't do it refuses to start."""
    links_nodes: ClassVar[bool] = True
    """Whether publications reach other nodes. If not, the engine is for a single process."""

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

        If the broker can't be reached, the engine starts without it: `health()` says so, and the engine connects as
        soon as it can. An engine that was told to fail fast raises instead.

        It may be called again after `aclose`. It may also be called again without `aclose` once the event loop of the
        last `start` has ended: the engine forgets what was left there, and begins anew.

        Raises:
            LifecycleError: If the engine runs already, because an engine serves one node; or if `aclose` is called
                meanwhile.
            ConfigurationError: If the broker refuses the engine: a wrong password, a missing permission.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
            EngineError: If the engine fails for a reason of its own: a driver that doesn't fit, a bug.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Stop. Nothing reaches the receiver afterwards. A `start` that still runs ends too. It may be called twice."""

    async def ready_to_keep(self) -> None:  # noqa: B027  # most engines have nothing to do here
        """Return when the engine keeps what `keep` was told, also if `keep` was called after `start`.

        Raises:
            EngineUnavailable: If the broker can't be reached, or has no rules and none were given to `keep`.
            ConfigurationError: If the broker can't keep it.
        """

    def subscribe(self, audiences: Iterable[Audience]) -> None:  # noqa: B027  # some engines have nothing to do here
        """Ask for publications to these audiences from now on. It returns at once; `confirmed` waits.

        An engine that brings every publication to every node has nothing to do here.
        """

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:  # noqa: B027  # some engines have nothing to do here
        """Ask for no more publications to these audiences: they have no connections here any more."""

    async def confirmed(self, audiences: Iterable[Audience]) -> None:  # noqa: B027  # some engines have nothing to do
        """Return when every later publication to these subscribed audiences, on any node, arrives here.

        During an outage it returns at once. The audiences are subscribed when the broker is back, and what was missed
        until then is announced as a gap.

        Raises:
            EngineUnavailable: If the broker forbids this node to subscribe to one of them.
        """

    @abstractmethod
    async def publish(self, publication: Publication | Control) -> None:
        """Return once the engine has taken the publication.

        Raises:
            EngineUnavailable: If the broker can't be reached, takes no messages now, or forbids this node to publish.
                Nothing was sent, unless the error's `may_have_been_sent` is true.
            MessageTooLarge: If the publication is larger than the broker takes.
            EngineError: If the broker refuses this very publication. Trying again doesn't help.
        """

    @abstractmethod
    def publish_nowait(self, publication: Publication | Control) -> None:
        """Take the publication without waiting for a confirmation.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach. Nothing was sent.
            MessageTooLarge: If the publication is larger than the broker takes.
        """

    def stats(self) -> EngineStats:
        """Return what the engine has counted."""
        return EngineStats()

    @abstractmethod
    async def health(self) -> Health:
        """Tell whether publications arrive. The engine sends a message to itself to find out."""


async def each(call: Callable[[P], Awaitable[None]], publications: Iterable[P]) -> None:
    """Call something for each publication, one after another. An error of one doesn't stop the others.

    Raises:
        Exception: The first error, after all were called.
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
    """Publish one publication; if the rules say so, keep it and return its position.

    Raises:
        EngineError: As for `Engine.publish`.
    """
    history = None if rules is None else rules.of(publication.audience)
    if history is None or not isinstance(publication, Publication):
        await engine.publish(publication)
        return None
    # Not checked with `isinstance` here, which would take longer than all the rest. It was checked when the rules came.
    return await cast(KeepsHistory, engine).append(publication, history, key)


async def publish_all(
    engine: Engine,
    publications: Sequence[Publication | Control],
    rules: HistoryRules | None = None,
    key: str | None = None,
) -> dict[Audience, Appended]:
    """Publish several in this order; return once the engine has taken all of them.

    Returns:
        dict[Audience, Appended]: The position of each publication that is kept.

    Raises:
        EngineUnavailable: As for `publish`. The error's `positions` has the audiences that were taken.
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
        EngineUnavailable: As for `publish_nowait`. The error's `positions` has the audiences that were taken.
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
    """Publish several in the caller's transaction.

    Raises:
        ConfigurationError: If the engine can't publish inside a transaction, or not inside this one.
    """
    for publication in publications:
        history = None if rules is None else rules.of(publication.audience)
        if history is None:
            await transactional(engine).publish_in(transaction, publication)
        else:
            await transactional(engine).publish_in(transaction, publication, history)


def transactional(engine: Engine) -> Transactional:
    """Return the engine, typed as one that can publish inside a transaction.

    Raises:
        ConfigurationError: If it can't.
    """
    if not isinstance(engine, Transactional):
        raise ConfigurationError(
            f"the {engine.name} engine can't publish inside a transaction: use postgresql://, or leave transaction= out"
        )
    return engine


# Histories, for managers and publishers.


async def position_of(engine: Engine, rules: HistoryRules | None, audience: Audience) -> Position:
    """Return the newest position of an audience.

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


def keeps_lease(engine: Engine) -> KeepsLease:
    """Return the engine, typed as one that keeps leases.

    Raises:
        ConfigurationError: If it keeps none.
    """
    if not isinstance(engine, KeepsLease):
        raise ConfigurationError(
            f"the {engine.name} engine keeps no leases, which tell nodes whether the others are alive: use memory://, "
            "sqlite:///, redis://, nats:// with JetStream, or postgresql://"
        )
    return engine


def keeps_presence(engine: Engine) -> KeepsPresence:
    """Return the engine, typed as one that knows who is in a channel.

    Raises:
        ConfigurationError: If it doesn't.
    """
    if not isinstance(engine, KeepsPresence):
        raise ConfigurationError(
            f"the {engine.name} engine keeps no presence: leave presence= out, or use memory://, sqlite:///, redis://, "
            "nats:// with JetStream, or postgresql://"
        )
    return engine


def keeps_history(engine: Engine) -> KeepsHistory:
    """Return the engine, typed as one that keeps what is published.

    Raises:
        ConfigurationError: If it can't.
    """
    if not isinstance(engine, KeepsHistory):
        raise ConfigurationError(
            f"the {engine.name} engine keeps no history: leave history= out, or use memory://, sqlite:///, redis://, "
            "nats:// with JetStream, or postgresql://"
        )
    return engine
