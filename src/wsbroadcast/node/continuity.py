"""Histories on one node: clients are told positions and get what they missed, listeners read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from time import monotonic
from typing import Protocol

from starlette.requests import HTTPConnection

from wsbroadcast.audience import EVERYONE, LOGS, Audience, for_logs
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.engines.contract import Engine, keeps_history
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.history import NOW, NOWHERE, HistoryRules, Reason, Recovery, SinceByAudience
from wsbroadcast.hooks import Delivery, Encode, HookChain
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.event_clients import SPEAKER, Beginning, EventClients
from wsbroadcast.node.listening import Listener
from wsbroadcast.node.replays import Found, Replays
from wsbroadcast.node.tail import batch_of
from wsbroadcast.node.tails import Tails
from wsbroadcast.options import ClientTiming
from wsbroadcast.publication import Gap, Position, Publication
from wsbroadcast.stats import Counters

FoundByAudience = Mapping[Audience, Found]
"""Which histories can be had for a connection that will be registered soon, by audience."""


class Host(Protocol):
    """What `Continuity` needs of its node."""

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `deliver_now` may be called: no hook has to run, and most clients keep up."""

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections. Errors are logged."""

    async def deliver_paced(self, publication: Publication) -> None:
        """Run the hooks, and hand a publication to the connections when most of them keep up."""

    def evict(self, connection: Connection) -> None:
        """Evict a slow consumer."""


class Continuity:
    """The positions of this node in the histories of its audiences, and those of its connections.

    Args:
        node: Delivers.
        registry: Knows which connections are in which audience.
        dispatcher: Hands messages to connections.
        hooks: Run for replays, and are told of gaps.
        encode: Encodes what hooks return instead of a message.
        engine: Keeps what is published.
        rules: What is kept; `None` for nothing.
        counters: Where recoveries are counted.
        tasks: Run hooks in the background.
        timing: The times that clients of events are told.
    """

    def __init__(
        self,
        node: Host,
        registry: Registry[Connection],
        dispatcher: Dispatcher[Connection],
        hooks: HookChain,
        encode: Encode,
        engine: Engine,
        rules: HistoryRules | None,
        counters: Counters,
        tasks: Tasks,
        timing: ClientTiming,
    ) -> None:
        self._node = node
        self._registry = registry
        self._dispatcher = dispatcher
        self._hooks = hooks
        self._encode = encode
        self._engine_name = engine.name
        self._counters = counters
        self._tasks = tasks
        self._throttle = Throttle()
        self._listeners: dict[Audience, set[Listener]] = {}
        self.clients = EventClients(registry, dispatcher, timing)
        """The connections whose clients know positions."""
        self.say = self.clients.say
        """Sends one of them a message of its protocol, after everything handed over before."""
        self.tails: Tails | None = None
        """The newest parts of the histories; `None` if nothing is kept."""
        self._replays: Replays | None = None
        if rules is not None:
            self.keep(engine, rules)

    def keep(self, engine: Engine, rules: HistoryRules) -> None:
        """Use histories under these rules from now on. A second call does nothing."""
        if self.tails is None:
            turn = (self._dispatcher.turn_messages, self._dispatcher.turn_bytes)
            self.tails = Tails(self, keeps_history(engine), rules, self._counters, *turn)
            self._replays = Replays(self, self.tails, self._dispatcher, self._counters)
            self._dispatcher.behind = self._replays.cursors

    # Publications from the engine.

    def is_kept(self, audience: Audience) -> bool:
        """Tell whether an audience has a history."""
        return self.tails is not None and self.tails.history(audience) is not None

    def take(self, publication: Publication) -> bool:
        """Take a publication to an audience with a history; tell whether it has a position."""
        if publication.position is not None and self.tails is not None:
            self.tails.take(publication)
            return True
        self._counters.unkept += 1
        if self._throttle.is_due("unkept"):
            logger.warning(
                "messages came that their history did not keep, %d so far, the last to %s: their publisher doesn't "
                "know the history=, and clients that were away never get them",
                self._counters.unkept,
                for_logs(publication.audience),
                extra=about("history.unkept", count=self._counters.unkept),
            )
        return False

    def forgotten(self, audience: Audience) -> None:
        """Read the history of an audience again, because it was removed."""
        if self.tails is not None:
            self.tails.forgotten(audience)

    async def tell_gap(self, gap: Gap) -> None:
        """Read what was missed in an outage; call the hooks for audiences for which that can't be done."""
        await self._tasks.begun()  # the engine goes on first
        broken = await self.tails.heal() if self.tails is not None else ()
        if self._hooks.has("on_gap") and (audiences := self._unhealed(broken)):
            await self._hooks.observe("on_gap", replace(gap, audiences=audiences))

    def _unhealed(self, broken: Collection[Audience]) -> frozenset[Audience]:
        registry = self._registry
        audiences = [EVERYONE] if len(registry) else []
        audiences += [Audience("channel", name) for name in registry.channels]
        audiences += [Audience("user", name) for name in registry.users]
        return frozenset(each for each in audiences if not self.is_kept(each) or each in broken)

    # Listeners.

    @asynccontextmanager
    async def listen(self, listener: Listener, since: SinceByAudience) -> AsyncIterator[None]:
        """Let a listener get what is published, for the length of a block. Its audiences are held."""
        for audience in listener.audiences:
            self._listeners.setdefault(audience, set()).add(listener)
        try:
            await self._begin_listening(listener, since)
            yield
        finally:
            for audience in listener.audiences:
                self._listeners[audience].discard(listener)
                if not self._listeners[audience]:
                    del self._listeners[audience]

    async def _begin_listening(self, listener: Listener, since: SinceByAudience) -> None:
        places: dict[Audience, Position] = {}
        for audience in listener.audiences:
            if self._replays is None or not self.is_kept(audience):
                recovery, begins = Recovery(False, "not_kept", None), None
            else:
                recovery, begins = await self._replays.locate(audience, since.get(audience, NOW))
                begins = begins or recovery.position
            if audience in since:
                listener.recovered[audience.name if audience.kind == "channel" else audience] = recovery
            if begins is not None:
                places[audience] = begins
        listener.begin(self.tails, places)

    def offer(self, publication: Publication) -> None:
        """Give listeners a publication that is not kept."""
        if self._listeners:
            for listener in self._listeners.get(publication.audience, ()):
                listener.offer(publication)

    # Connections.

    async def locate(self, websocket: HTTPConnection, joining: Joining) -> FoundByAudience | None:
        """Find out what can be had for a connection whose client is told so as soon as it is registered.

        The caller holds its audiences. For other connections it returns `None`.

        Raises:
            EngineUnavailable: If the broker has to be asked, and can't be.
        """
        speaker = websocket.scope.get(SPEAKER)
        if speaker is None or not speaker.begins_at_once or self._replays is None:
            return None if speaker is None or not speaker.begins_at_once else {}
        found: dict[Audience, Found] = {}
        for audience, since in self._since_now(joining).items():
            if self.is_kept(audience):
                found[audience] = await self._replays.locate(audience, since)
                if found[audience][0].reason == "unavailable":
                    raise EngineUnavailable("the history can't be read now")
        return found

    def enter(self, connection: Connection, joining: Joining, found: FoundByAudience | None) -> SinceByAudience:
        """Greet a connection that is registered now; return the audiences in which it gets nothing until `recover`."""
        since = joining.since
        if connection._sink.has_positions:
            since = self._since_now(joining)
            if found is not None:
                self._begin(connection, since, found)
                return NOWHERE
            self.clients.greet(connection, {})
        self.hold(connection, since)
        return since

    def _begin(self, connection: Connection, since: SinceByAudience, found: FoundByAudience) -> None:
        beginnings: dict[Audience, Beginning] = {}
        carries = self.clients.speaker(connection).carries
        for audience, position in since.items():

            def announce(
                recovery: Recovery,
                begins: Position | None,
                missed: Sequence[Publication],
                audience: Audience = audience,
            ) -> None:
                beginnings[audience] = Beginning(recovery, since[audience] is not NOW, begins, missed)
                nonlocal carries
                carries -= sum(each.size for each in missed)

            if audience in found and self._replays is not None:
                self._replays.hold(connection, audience)
                self._replays.begin(
                    connection, audience, position, found[audience], announce, carries, began=monotonic()
                )
            else:
                announce(Recovery(False, "not_kept", None), None, ())
            if position is not NOW:
                self._note(connection, audience, beginnings[audience].recovery)
        self.clients.greet(connection, beginnings)

    def _since_now(self, joining: Joining) -> SinceByAudience:
        # A client that knows positions is told where each audience begins.
        own = [EVERYONE, *([] if joining.user_key is None else [Audience("user", joining.user_key)])]
        audiences = [Audience("channel", channel) for channel in joining.channels]
        audiences += [audience for audience in own if self.is_kept(audience)]
        return dict.fromkeys(audiences, NOW) | dict(joining.since)

    def hold(self, connection: Connection, since: SinceByAudience) -> None:
        """Send a connection nothing of these audiences until `recover`.

        Of an audience without a history it gets everything at once, because nobody could send that later.
        """
        if self._replays is not None:
            for audience in since:
                if self.is_kept(audience) and self._registry.is_member(connection, audience):
                    self._replays.hold(connection, audience)

    async def recover(self, connection: Connection, since: SinceByAudience, id_: object = None) -> None:
        """Send a connection what it missed, as far as possible. `connection.recovered` says whether it gets all.

        Call it once, when no hook can refuse the connection any more. A client that knows positions is told where each
        audience begins.

        Args:
            connection: The connection.
            since: The places after which it wants what it missed.
            id_: The id of the client's command.
        """
        carries = self.clients.speaker(connection).carries if connection._sink.has_positions else 0
        for audience, position in since.items():

            def announce(
                recovery: Recovery,
                begins: Position | None,
                missed: Sequence[Publication] = (),
                audience: Audience = audience,
            ) -> None:
                if connection._sink.has_positions and connection.is_open:
                    beginning = Beginning(recovery, since[audience] is not NOW, begins, missed)
                    speaker = self.clients.speaker(connection)
                    self.say(connection, speaker.subscribed(connection, audience, beginning, id_))

            is_kept = self.is_kept(audience)
            if self._replays is None or not is_kept or not self._registry.is_member(connection, audience):
                recovery = Recovery(False, "unavailable" if is_kept else "not_kept", None)
                announce(recovery, None)
                if position is not NOW:
                    self._counters.refused_recoveries[recovery.reason] += 1
            elif position is NOW and not self._replays.is_held(connection, audience):
                announce(recovery := Recovery(True, "", None), self._replays.place(connection, audience))
            else:
                recovery = await self._replays.start(connection, audience, position, announce, carries)
            if position is not NOW:
                self._note(connection, audience, recovery)

    def _note(self, connection: Connection, audience: Audience, recovery: Recovery) -> None:
        key = audience.name if audience.kind == "channel" else audience
        connection.recovered = {**connection.recovered, key: recovery}

    def tells_of_subscriptions(self, connection: Connection) -> bool:
        """Tell whether a client is told when the app subscribes it."""
        return connection._sink.has_positions and self.clients.speaker(connection).is_told_of_subscriptions

    @contextmanager
    def opening(self, connection: Connection, audiences: Iterable[Audience]) -> Generator[None]:
        """Let messages to a client wait until the end of a block, if it has to be told of the subscription first."""
        waiting = list(audiences) if self.tells_of_subscriptions(connection) else []
        for audience in waiting:
            self._dispatcher.open(connection, audience)
        try:
            yield
        finally:
            for audience in waiting:
                self._dispatcher.opened(connection, audience)

    def left_channel(self, connection: Connection, channel: str) -> None:
        """Forget a connection's position in a channel, and tell its client that it has left."""
        if self._replays is not None:
            self._replays.left(connection, Audience("channel", channel))
        if connection._sink.has_positions:
            self.say(connection, self.clients.speaker(connection).left(connection, channel))

    def left(self, connection: Connection) -> None:
        """Forget a connection's positions."""
        if self._replays is not None and self._replays.cursors:
            self._replays.left(connection)
        self.clients.left(connection)

    def fall_back(self, connection: Connection, audience: Audience, offset: int) -> bool:
        """Send a connection later what comes after an offset, because its backlog has no room now."""
        return self._replays is not None and self._replays.fall_back(connection, audience, offset)

    def without_behind(self, publication: Publication, recipients: list[Connection]) -> list[Connection]:
        """Return the recipients of a publication without those that are behind, which get it later."""
        if publication.position is None or self._replays is None or not self._replays.cursors:
            return recipients
        behind = self._replays.behind(publication.audience)
        return [recipient for recipient in recipients if recipient not in behind]

    def is_due(self, publication: Publication) -> bool:
        """Tell whether a publication that waited for hooks may still be delivered."""
        return self.tails is None or self.tails.is_due(publication)

    def tell_position(self, publication: Publication, recipients: Collection[Connection]) -> None:
        """Tell clients of the audience that know positions, but don't get a publication, the position after it."""
        if publication.position is None or self._replays is None or not len(self.clients):
            return
        out = {*recipients, *self._replays.behind(publication.audience)}
        members = self._registry.recipients(publication.audience)
        some = [each for each in members if each._sink.has_positions and each not in out]
        if some:
            self._dispatcher.dispatch(publication.withheld(), some)

    # For tails and replays.

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether no hook has to run, and most clients keep up."""
        return publication.audience.kind in LOGS or self._node.is_ready(publication)

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections."""
        if publication.audience.kind not in LOGS:
            self._node.deliver_now(publication)

    async def deliver_paced(self, publication: Publication) -> None:
        """Run the hooks, and hand a publication to the connections when most of them keep up."""
        await self._node.deliver_paced(publication)

    def delivered(self, audience: Audience) -> None:
        """Let replays go on that wait for this position of the audience."""
        if self._replays is not None and self._replays.cursors:
            self._replays.moved(audience)

    def withheld(self, publication: Publication) -> None:
        """Tell clients that know positions the position after a publication that nobody gets."""
        self.tell_position(publication, ())

    def arrived(self, audience: Audience) -> None:
        """Let listeners read on."""
        if self._listeners and self.tails is not None and (tail := self.tails.of(audience)) is not None:
            for listener in self._listeners.get(audience, ()):
                listener.arrived(audience, tail)

    def broken(self, audience: Audience, reason: Reason, seconds: float | None) -> None:
        """Tell the connections of an audience that messages are missing and can't be read any more."""
        assert self._replays is not None
        self._replays.broken(audience)
        for connection in self._registry.recipients(audience):
            if not self._replays.is_held(connection, audience):
                self._tell_gap_to(connection, audience, reason)
        tail = None if self.tails is None else self.tails.of(audience)
        for listener in self._listeners.get(audience, ()):
            listener.broken(audience, None if tail is None else tail.delivered_position)
        if seconds is not None and self._registry.members(audience):
            gap = Gap(self._engine_name, seconds, frozenset((audience,)))
            self._tasks.spawn(self._hooks.observe("on_gap", gap), "on_gap hooks")

    @property
    def has_hooks(self) -> bool:
        """Whether `on_deliver` hooks have to be asked."""
        return self._hooks.has("on_deliver")

    async def replay_through_hooks(
        self, publication: Publication, connection: Connection, has_room: Callable[[], Awaitable[bool]]
    ) -> None:
        """Run the hooks for a publication that one connection has missed, and hand it to that connection.

        Args:
            publication: The publication.
            connection: The connection that missed it.
            has_room: Returns when the connection takes more, and whether the publication is still due then.
        """
        seen = await self.through_hooks(publication, connection)
        if not await has_room():
            return
        self._dispatcher.flush()
        if seen is not None:
            self._dispatcher.deliver_batch(batch_of([seen]), connection)
        elif connection._sink.has_positions:
            self._dispatcher.deliver_batch(batch_of([publication.withheld()]), connection)

    async def through_hooks(self, publication: Publication, connection: Connection) -> Publication | None:
        """Return what a connection gets of a publication that it has missed; `None` if hooks withhold it."""
        if not self.has_hooks:
            return publication
        delivery = Delivery(publication.message, publication.audience, [connection], self._encode, is_replay=True)
        await self._hooks.deliver(delivery)
        return next((publication.with_message(message) for message, some in delivery._parts() if some), None)

    def lost_track(self, audience: Audience, connection: Connection, reason: Reason) -> None:
        """Tell a connection that what it was promised is gone; evict it if its client can't be told."""
        self._counters.refused_recoveries[reason] += 1
        if connection._sink.has_positions:
            self._tell_gap_to(connection, audience, reason)
        else:
            self._node.evict(connection)

    def _tell_gap_to(self, connection: Connection, audience: Audience, reason: Reason) -> None:
        tail = None if self.tails is None else self.tails.of(audience)
        if connection._sink.has_positions and tail is not None:
            message = self.clients.speaker(connection).lost(connection, audience, reason, tail.delivered_position)
            self.say(connection, message)
            if message is None:
                self.hold(connection, {audience: NOW})

    # The end.

    def end_listening(self) -> None:
        """End all listeners."""
        for listener in {each for some in self._listeners.values() for each in some}:
            listener.end()

    async def aclose(self, patience: float) -> None:
        """Deliver what waits for at most so many seconds, then end."""
        if self.tails is not None and self._replays is not None:
            await self.tails.aclose(patience)
            await self._replays.aclose()
