"""What goes on across connections on one node: who is told where it is, gets what it missed, or listens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Protocol

from wsbroadcast.audience import EVERYONE, Audience, for_logs
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.engines.contract import Engine, keeps_history
from wsbroadcast.history import NOW, HistoryRules, Reason, Recovery, SinceByAudience
from wsbroadcast.hooks import Delivery, Encode, HookChain
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.node.admission import Joining
from wsbroadcast.node.event_clients import EventClients
from wsbroadcast.node.listening import Listener
from wsbroadcast.node.replays import Replays
from wsbroadcast.node.tail import batch_of
from wsbroadcast.node.tails import Tails
from wsbroadcast.options import ClientTiming
from wsbroadcast.protocols import events
from wsbroadcast.publication import Gap, Position, Publication
from wsbroadcast.stats import Counters


class Host(Protocol):
    """What it asks of its node."""

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `deliver_now` may be called: no hook has to run, and most clients keep up."""

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections; what goes wrong is logged."""

    async def deliver_paced(self, publication: Publication) -> None:
        """Hand it over when most clients keep up, through the hooks."""

    def evict(self, connection: Connection) -> None:
        """Let a slow consumer go."""


class Continuity:
    """Where this node is in the histories of its audiences, and its connections in them.

    Args:
        node: Delivers.
        registry: Knows who is in which audience.
        dispatcher: Hands over to connections.
        hooks: Are asked about what is replayed, and told of gaps.
        encode: Encodes what hooks give in place of a message.
        engine: Keeps what is published.
        rules: Say what is kept; `None` for nothing.
        counters: Where is counted what was recovered.
        tasks: Run hooks in the background.
        timing: What clients of events are told to do when.
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
        """The connections that know where they are in histories."""
        self.say = self.clients.say
        """Sends one of them something of its protocol's, behind everything handed over before."""
        self.tails: Tails | None = None
        """What is here of the histories; `None` where nothing is kept."""
        self._replays: Replays | None = None
        if rules is not None:
            turn = (dispatcher.turn_messages, dispatcher.turn_bytes)
            self.tails = Tails(self, keeps_history(engine), rules, counters, *turn)
            self._replays = Replays(self, self.tails, dispatcher, counters)
            dispatcher.behind = self._replays.cursors

    # What comes from the engine.

    def is_kept(self, audience: Audience) -> bool:
        """Tell whether an audience has a history."""
        return self.tails is not None and self.tails.history(audience) is not None

    def take(self, publication: Publication) -> bool:
        """Take a publication to an audience with a history; tell whether it has a place there."""
        if publication.position is not None and self.tails is not None:
            self.tails.take(publication)
            return True
        self._counters.unkept += 1
        if self._throttle.is_due("unkept"):
            logger.warning(
                "messages came that were published past the history of their audience, %d so far, the last to %s: who "
                "publishes them doesn't know that it is kept, and nobody gets them again",
                self._counters.unkept,
                for_logs(publication.audience),
                extra=about("history.unkept", count=self._counters.unkept),
            )
        return False

    def forgotten(self, audience: Audience) -> None:
        """Read the history of an audience anew, because it was removed."""
        if self.tails is not None:
            self.tails.forgotten(audience)

    async def tell_gap(self, gap: Gap) -> None:
        """Read what was missed in an outage; ask hooks about audiences for which that can't be done."""
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

    def enter(self, connection: Connection, joining: Joining) -> SinceByAudience:
        """Greet a connection that is registered now; return where it has to `recover`, and gets nothing until then."""
        since = joining.since
        if connection._sink.has_positions:
            since = self._since_now(joining)
            self.clients.greet(connection)
        self.hold(connection, since)
        return since

    def _since_now(self, joining: Joining) -> SinceByAudience:
        # A client that knows where it is is told where it begins.
        own = [EVERYONE, *([] if joining.user_key is None else [Audience("user", joining.user_key)])]
        audiences = [Audience("channel", channel) for channel in joining.channels]
        audiences += [audience for audience in own if self.is_kept(audience)]
        return dict.fromkeys(audiences, NOW) | dict(joining.since)

    def hold(self, connection: Connection, since: SinceByAudience) -> None:
        """Let a member get nothing of these audiences until it has to `recover`.

        Where nothing is kept it gets at once what comes: nobody could send it later.
        """
        if self._replays is not None:
            for audience in since:
                if self.is_kept(audience) and self._registry.is_member(connection, audience):
                    self._replays.hold(connection, audience)

    async def recover(self, connection: Connection, since: SinceByAudience, id_: object = None) -> None:
        """Send a connection what it missed, as far as that can be done; `connection.recovered` says what became of it.

        Call it once, when nothing can keep the connection from its audiences any more. A client that knows where it is
        is told where each audience begins.

        Args:
            connection: Which.
            since: Since when it wants what it missed.
            id_: That of the client's command.
        """
        for audience, position in since.items():

            def announce(recovery: Recovery, begins: Position | None, audience: Audience = audience) -> None:
                if connection._sink.has_positions and connection.is_open:
                    asked = None if since[audience] is NOW else recovery
                    self.say(connection, events.subscribed(audience, asked, begins, id_))

            is_kept = self.is_kept(audience)
            if self._replays is None or not is_kept or not self._registry.is_member(connection, audience):
                recovery = Recovery(False, "unavailable" if is_kept else "not_kept", None)
                announce(recovery, None)
                if position is not NOW:
                    self._counters.refused_recoveries[recovery.reason] += 1
            elif position is NOW and not self._replays.is_held(connection, audience):
                announce(recovery := Recovery(True, "", None), self._replays.place(connection, audience))
            else:
                recovery = await self._replays.start(connection, audience, position, announce)
            if position is not NOW:
                key = audience.name if audience.kind == "channel" else audience
                connection.recovered = {**connection.recovered, key: recovery}

    def left_channel(self, connection: Connection, channel: str) -> None:
        """Forget where a connection is in a channel."""
        if self._replays is not None:
            self._replays.left(connection, Audience("channel", channel))

    def left(self, connection: Connection) -> None:
        """Forget where a connection is."""
        if self._replays is not None and self._replays.cursors:
            self._replays.left(connection)
        self.clients.left(connection)

    def fall_back(self, connection: Connection, audience: Audience, offset: int) -> bool:
        """A connection that knows where it is has no room for what comes after a place: it gets it later."""
        return self._replays is not None and self._replays.fall_back(connection, audience, offset)

    def without_behind(self, publication: Publication, recipients: list[Connection]) -> list[Connection]:
        """Return the recipients of a publication without those that are behind, and get it later."""
        if publication.position is None or self._replays is None or not self._replays.cursors:
            return recipients
        behind = self._replays.behind(publication.audience)
        return [recipient for recipient in recipients if recipient not in behind]

    def is_due(self, publication: Publication) -> bool:
        """Tell whether a publication that waited for hooks may still be delivered."""
        return self.tails is None or self.tails.is_due(publication)

    def tell_position(self, publication: Publication, recipients: Collection[Connection]) -> None:
        """Tell those in the audience that know where they are, and don't get a publication, that they are past it."""
        if publication.position is None or self._replays is None or not len(self.clients):
            return
        out = {*recipients, *self._replays.behind(publication.audience)}
        members = self._registry.recipients(publication.audience)
        some = [each for each in members if each._sink.has_positions and each not in out]
        if some:
            self._dispatcher.dispatch(publication.withheld(), some)

    # What the tails and the replays call.

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether no hook has to run, and most clients keep up."""
        return self._node.is_ready(publication)

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections."""
        self._node.deliver_now(publication)

    async def deliver_paced(self, publication: Publication) -> None:
        """Hand it over when most clients keep up, through the hooks."""
        await self._node.deliver_paced(publication)

    def delivered(self, audience: Audience) -> None:
        """Let those go on who wait for the place up to which the members of an audience have got everything."""
        if self._replays is not None and self._replays.cursors:
            self._replays.moved(audience)

    def withheld(self, publication: Publication) -> None:
        """Tell those who know where they are that they are past a publication that nobody gets."""
        self.tell_position(publication, ())

    def arrived(self, audience: Audience) -> None:
        """Let listeners read on."""
        if self._listeners and self.tails is not None and (tail := self.tails.of(audience)) is not None:
            for listener in self._listeners.get(audience, ()):
                listener.arrived(audience, tail)

    def broken(self, audience: Audience, reason: Reason, seconds: float | None) -> None:
        """Tell the members of an audience that something is missing in its history, and can't be read any more."""
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
        """Hand a publication that a connection has missed to it alone, through the hooks.

        Args:
            publication: What was missed.
            connection: By whom.
            has_room: Returns when the connection takes more, and whether it is still due then.
        """
        delivery = Delivery(publication.message, publication.audience, [connection], self._encode, is_replay=True)
        await self._hooks.deliver(delivery)
        if not await has_room():
            return
        self._dispatcher.flush()
        for message, some in delivery._parts():
            if some:
                self._dispatcher.deliver_batch(batch_of([publication.with_message(message)]), connection)
                return
        if connection._sink.has_positions:
            self._dispatcher.deliver_batch(batch_of([publication.withheld()]), connection)

    def lost_track(self, audience: Audience, connection: Connection, reason: Reason) -> None:
        """Tell a connection that what it was promised is gone; let one go that can't be told."""
        self._counters.refused_recoveries[reason] += 1
        if connection._sink.has_positions:
            self._tell_gap_to(connection, audience, reason)
        else:
            self._node.evict(connection)

    def _tell_gap_to(self, connection: Connection, audience: Audience, reason: Reason) -> None:
        tail = None if self.tails is None else self.tails.of(audience)
        if connection._sink.has_positions and tail is not None:
            self.say(connection, events.gap(audience, reason, tail.delivered_position))

    # The end.

    def end_listening(self) -> None:
        """Let listeners come to their end."""
        for listener in {each for some in self._listeners.values() for each in some}:
            listener.end()

    async def aclose(self, patience: float) -> None:
        """End; what waits may still be delivered for so many seconds."""
        if self.tails is not None and self._replays is not None:
            await self.tails.aclose(patience)
            await self._replays.aclose()
