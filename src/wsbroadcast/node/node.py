"""The node: a manager in one event loop, with its connections, and the way from the engine to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic

from wsbroadcast.audience import EVERYONE
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, Operations
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.engines.contract import Engine, keeps_lease, keeps_presence
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.history import HistoryRules
from wsbroadcast.hooks import Delivery, HookChain, is_delivering
from wsbroadcast.logs import Clock, about, logger
from wsbroadcast.message import JSONDefault, Message
from wsbroadcast.node.continuity import Continuity
from wsbroadcast.node.drain import Drain
from wsbroadcast.node.jobs import Election, Job, Jobs
from wsbroadcast.node.lanes import Lanes, Outbox
from wsbroadcast.node.membership import Membership
from wsbroadcast.node.presence import NodePresence
from wsbroadcast.node.reports import Reports
from wsbroadcast.node.siblings import Siblings
from wsbroadcast.node.streams import NodeStreams
from wsbroadcast.options import ClientTiming, Limits, SlowConsumer
from wsbroadcast.presence import PresenceRules
from wsbroadcast.publication import (
    Control,
    Dismissal,
    Frame,
    Gap,
    NodeMessage,
    PresenceChange,
    Publication,
    Publications,
    Unsubscription,
)
from wsbroadcast.stats import Counters, Stats

# For how many seconds it is remembered who got a broadcast to several audiences.
_REMEMBERED_SECONDS = 10.0


class OnceEach:
    """Remembers who got a broadcast to several audiences, so that each connection gets it once.

    It remembers who *got* it, not who was in an audience: connections come, go and move between its publications. It
    remembers the broadcasts of the last 10 s. Older ones are forgotten when the next one is delivered.

    Args:
        clock: Returns the time in seconds.
        max_remembered: How many connections are remembered over all broadcasts, before the oldest broadcast is
            forgotten.
    """

    def __init__(self, clock: Clock = monotonic, max_remembered: int = 500_000) -> None:
        self._clock = clock
        self._max_remembered = max_remembered
        # By the id of the broadcast: when it was last delivered, and the ids of connections. The oldest is the first.
        self._got: dict[str, tuple[float, set[str]]] = {}
        self._size = 0

    def left(self, broadcast: str, connections: list[Connection]) -> list[Connection]:
        """Return those of the connections that have not got a broadcast yet."""
        if broadcast not in self._got:
            return connections
        got = self._got[broadcast][1]
        return [connection for connection in connections if connection.id not in got]

    def note(self, broadcast: str, connections: list[Connection]) -> None:
        """Remember that these connections got a broadcast."""
        now = self._clock()
        _, got = self._got.pop(broadcast, (now, set[str]()))
        before = len(got)
        got.update([connection.id for connection in connections])
        self._got[broadcast] = now, got
        self._size += len(got) - before
        while self._is_too_much(now):
            _, forgotten = self._got.pop(next(iter(self._got)))
            self._size -= len(forgotten)

    def _is_too_much(self, now: float) -> bool:
        oldest, _ = next(iter(self._got.values()))
        too_many = self._size > self._max_remembered or len(self._got) > self._max_remembered
        return now - oldest > _REMEMBERED_SECONDS or (too_many and len(self._got) > 1)


class Node:
    """Receives publications from the engine and hands them to the connections that are here."""

    def __init__(
        self,
        core: Operations,
        engine: Engine,
        hooks: HookChain,
        slow_consumer: SlowConsumer,
        limits: Limits,
        counters: Counters,
        rules: HistoryRules | None = None,
        client_timing: ClientTiming = ClientTiming(),  # noqa: B008  # frozen
        presence_rules: PresenceRules | None = None,
        jobs: Sequence[Job] = (),
    ) -> None:
        self._engine = engine
        self._links_nodes = engine.links_nodes
        self.registry = Registry[Connection]()
        self._slow_consumers = SlowConsumers(slow_consumer, counters)
        self.dispatcher = Dispatcher(self.registry, self._slow_consumers)
        self.tasks = Tasks()
        """The tasks in the background. `aclose` waits for them."""
        self.continuity = Continuity(
            self, self.registry, self.dispatcher, hooks, core.encode, engine, rules, counters, self.tasks, client_timing
        )
        """The positions of this node and its connections in histories."""
        self.siblings: Siblings | None = None
        """The other nodes; `None` if nothing asks them."""
        self._lease: LeaseKeeper | None = None
        self.presence: NodePresence | None = None
        """Who is in its channels; `None` if no channel has presence."""
        if presence_rules is not None:
            self.presence = NodePresence(
                keeps_presence(engine), self.lease(), presence_rules, hooks, self.tasks, counters, self._say_to_several
            )
        self.membership = Membership(
            core,
            self.registry,
            self.dispatcher,
            self._slow_consumers,
            hooks,
            self.tasks,
            engine,
            limits,
            self.continuity,
            self.presence,
        )
        self.drain = Drain(
            self.registry, self.membership, self.tasks, slow_consumer.close_timeout, self._send_viewers_away
        )
        """Closes the connections before the node ends."""
        self._background = jobs
        self._jobs = Jobs(self._election, hooks.timeout)
        self._hooks = hooks
        self._encode = core.encode
        self._counters = counters
        self.starting = asyncio.Lock()
        """Held while the engine starts."""
        self.entering = 0
        """How many connections are being accepted. The manager counts them."""
        # Keeps publications in order while `on_deliver` hooks run.
        self._order = asyncio.Lock()
        self._lanes = Lanes(self)
        self._once_each = OnceEach()
        self.outbox: Outbox
        """The broadcasts of `broadcast_soon`."""
        self.streams: NodeStreams | None = None
        """The streams of this node; `None` if the app has none."""
        self._is_closed = False

    # For the engine.

    def take(self, publication: Publication | Control) -> None:
        """Deliver a publication, now or after what waits for its audience. It never blocks and never raises."""
        if not isinstance(publication, Publication):
            self._obey(publication)
            return
        if not self.dispatcher.collected:
            publication.taken_at = monotonic()
        if not (self.continuity.is_kept(publication.audience) and self.continuity.take(publication)):
            self.continuity.offer(publication)
            if (self._lanes.waiting and publication.audience in self._lanes.waiting) or not self.is_ready(publication):
                self._lanes.put(publication)
            else:
                self.deliver_now(publication)

    async def deliver(self, publication: Publication | Control) -> None:
        """Deliver a publication of this node, after what waits for its audience; raise what a hook raises."""
        if not isinstance(publication, Publication):
            self._obey(publication)
            return
        if not self.dispatcher.collected:  # it is the first of this turn of the event loop
            publication.taken_at = monotonic()
        if publication.position is not None and (tails := self.continuity.tails) is not None:
            tails.take(publication)
            if tails.deliveries.waits(publication, tails.of(publication.audience)):
                await tails.deliveries.wait_delivered(publication)
        else:
            self.continuity.offer(publication)
            await self._deliver_behind(publication)

    async def _deliver_behind(self, publication: Publication) -> None:
        waiting = self._lanes.waiting
        if not waiting and not self._hooks.has("on_deliver"):
            self._deliver(publication)
        elif publication.audience not in waiting or is_delivering():
            await self._deliver_in_order(publication)
        else:
            async with self._lanes.turn(publication.audience):
                await self._deliver_in_order(publication)

    def gap(self, gap: Gap) -> None:
        """Tell the hooks that messages of other nodes are missing. It never blocks."""
        if not self._is_closed:
            if self.siblings is not None:
                self.siblings.greet_again()
            if self._lease is not None:
                self._lease.suspect()
            if self.presence is not None:
                self.presence.suspect()
            self.tasks.spawn(self.continuity.tell_gap(gap), "on_gap hooks")

    def suspect(self) -> None:
        """Check whether something is missing in histories and presence."""
        if self.continuity.tails is not None and not self._is_closed:
            self.continuity.tails.suspect()

    # For the manager.

    def know_siblings(self) -> Siblings:
        """Return the other nodes. From the first call on, this node takes part in questions to all nodes."""
        if self.siblings is None:
            self.siblings = Siblings(self._engine, self.tasks, Reports(self, self._engine).respond)
            if self._lease is not None:
                self.siblings.use(self._lease)
        return self.siblings

    def know_streams(self, rules: HistoryRules, json_default: JSONDefault | None) -> NodeStreams:
        """Return the streams of this node. From the first call on, histories are kept under these rules.

        Raises:
            ConfigurationError: If the engine can't carry streams.
        """
        if self.streams is None:
            self.continuity.keep(self._engine, rules)
            assert self.continuity.tails is not None
            self.membership.demand.keep(self.continuity.tails)
            self.streams = NodeStreams(
                self._engine, self.lease(), self.continuity, self.membership.demand, json_default
            )
        return self.streams

    def lease(self) -> LeaseKeeper:
        """Return the keeper of this node's lease.

        Raises:
            ConfigurationError: If the engine keeps no leases.
        """
        if self._lease is None:
            self._lease = LeaseKeeper(keeps_lease(self._engine), self.tasks)
            if self.siblings is not None:
                self.siblings.use(self._lease)
        return self._lease

    def count(self, publications: Publications) -> int:
        """Return how many connections here a broadcast is for, each counted once."""
        if len(publications) == 1:
            one = publications[0]
            return self.registry.count(one.audience, one.exclude, one.exclude_users)
        several = [self.registry.recipients(one.audience, one.exclude, one.exclude_users) for one in publications]
        return len(set[Connection]().union(*several))

    def begin_sending(self) -> None:
        """Send what waits in the outbox."""
        self.tasks.spawn(self.outbox.send_all(), "broadcast_soon")

    async def deliver_local(self, publication: Publication) -> None:
        """Deliver a publication that is only for this node.

        It doesn't wait for publications of other nodes, which wait until most clients keep up.
        """
        self.continuity.offer(publication)
        await (self._deliver_in_order if self._links_nodes else self._deliver_behind)(publication)

    def stats(self) -> Stats:
        """Return what the node holds now and has counted so far."""
        counters = self._counters
        # Copies are made first, because it may be called in another thread. More connections don't make it slower.
        waiting = list(self._slow_consumers.waiting)
        return Stats(
            connections=len(self.registry),
            users=len(self.registry.users),
            channels=len(self.registry.channels),
            sinks={kind: number for kind, number in self.membership.sinks.copy().items() if number},
            fast_path_refused={why: number for why, number in self.membership.refused.copy().items() if number},
            connects=counters.connects,
            disconnects=counters.disconnects,
            broadcasts=counters.broadcasts,
            sends=counters.sends,
            deliveries=counters.deliveries,
            dropped=dict(counters.dropped),
            evicted=dict(counters.evicted),
            limited=dict(counters.limited),
            client_errors=dict(counters.client_errors),
            vetoed=counters.vetoed,
            unpublished=counters.unpublished,
            invalid=counters.invalid,
            hook_errors=counters.hook_errors,
            heals=counters.heals,
            recoveries=counters.recoveries,
            refused_recoveries=dict(counters.refused_recoveries),
            unkept=counters.unkept,
            backlog_bytes=sum(sink.held_bytes for sink in waiting),
            backlog_messages=sum(sink.held_messages for sink in waiting),
            behind=len(self._slow_consumers.behind),
            connection_seconds=counters.connection_seconds.snapshot(),
            delivery_seconds=counters.delivery_seconds.snapshot(),
            recovery_seconds=counters.recovery_seconds.snapshot(),
            engine=self._engine.stats(),
        )

    def is_own_task(self) -> bool:
        """Tell whether the caller runs in a background task, such as a hook's, for which `aclose` waits."""
        return self.tasks.includes_current() or self._jobs.includes_current()

    async def aclose(self) -> None:
        """Send what was handed over, close every connection, wait for hooks and writers."""
        await self._jobs.aclose()
        self.drain.end()
        if self.siblings is not None:
            self.siblings.end()
        if self.streams is not None:
            await self.streams.aclose()
        if not self.is_own_task():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._hooks.timeout):
                    await self.outbox.aclose()
        self.continuity.end_listening()
        patience = 0.0 if self._links_nodes else self._hooks.timeout
        await self._lanes.aclose(patience)
        await self.continuity.aclose(patience)
        await self.membership.close_all(CloseCode.GOING_AWAY, "the server is going away")
        if self.presence is not None:
            await self.presence.aclose()
        if self._lease is not None:
            self._lease.end()
        self._is_closed = True
        await self.tasks.join()
        await self._slow_consumers.aclose()

    def begin(self) -> None:
        """Begin all background work, because the engine is started."""
        if self.siblings is not None:
            self.siblings.begin()
        if self.presence is not None and self._links_nodes:
            self.presence.begin()
        self.run_background()

    def run_background(self) -> None:
        """Run the app's background functions, except those that run already."""
        if self._background:
            self._jobs.begin(self._background)

    def _election(self) -> Election:
        engine = keeps_presence(self._engine)
        return Election(engine, self.lease(), self._sweep)

    async def _sweep(self) -> None:
        if self.presence is not None:
            await self.presence.sweep()
        else:
            await keeps_presence(self._engine).sweep()

    def _say_to_several(self, connections: Sequence[Connection], message: Message) -> None:
        self.dispatcher.dispatch(Frame(message, EVERYONE), connections)

    # For lanes and tails.

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether no hook has to run, and most clients keep up."""
        if self._hooks.has("on_deliver"):
            return False
        # With `memory://` a publisher that doesn't await isn't slowed down: the slow-consumer policy handles the rest.
        return not self._links_nodes or self.dispatcher.is_ready(publication.audience, publication.exclude)

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections. Errors are logged."""
        try:
            self._deliver(publication)
        except Exception:  # whatever the error is, the engine must go on
            logger.exception(
                "a message was not delivered", extra=about("delivery.failed", audience=publication.audience.kind)
            )

    async def deliver_paced(self, publication: Publication) -> None:
        """Run the hooks, and hand a publication to the connections when most of them keep up."""
        if self._links_nodes:
            await self.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        await self._deliver_in_order(publication)

    def evict(self, connection: Connection) -> None:
        """Evict a connection that is too far behind."""
        self.membership.evict(connection, "backlog_full")

    def overrun(self, seconds: float) -> None:
        """Report that publications were dropped, because too many wait."""
        logger.warning(
            "messages of the last %.1f s are missing here: more came by the %s engine than connections and hooks take",
            seconds,
            self._engine.name,
            extra=about("engine.overrun", engine=self._engine.name, seconds=seconds),
        )
        if self._links_nodes:
            self.gap(Gap(self._engine.name, seconds))

    # Inside.

    def _send_viewers_away(self) -> None:
        if self.streams is not None:
            self.streams.send_away()

    def _deliver(self, publication: Publication) -> None:
        if publication.traceparent and (tracing := self._hooks.tracing) is not None:
            with tracing.delivering(publication):
                pass  # no code of the app runs here, and what is handed over is written at the end of the turn
        self._counters.broadcasts += 1
        if publication.id is None and not publication.exclude_users:
            self.dispatcher.dispatch(publication)
            if publication.exclude and publication.position is not None:
                self.continuity.tell_position(publication, self._recipients(publication))
        else:
            recipients = self._recipients(publication)
            self._deliver_to(publication, recipients)
            self.continuity.tell_position(publication, recipients)

    def _recipients(self, publication: Publication) -> list[Connection]:
        recipients = self.registry.recipients(publication.audience, publication.exclude, publication.exclude_users)
        recipients = self.continuity.without_behind(publication, recipients)
        return recipients if publication.id is None else self._once_each.left(publication.id, recipients)

    def _deliver_to(self, publication: Publication, recipients: list[Connection]) -> None:
        if publication.id is not None:
            self._once_each.note(publication.id, recipients)
        if recipients:
            self.dispatcher.dispatch(publication, recipients)

    async def _deliver_in_order(self, publication: Publication) -> None:
        if not self._hooks.has("on_deliver"):
            self._deliver(publication)
        elif is_delivering():
            # A hook has made this broadcast while its own delivery holds the lock. This one goes first.
            await self._deliver_through_hooks(publication)
        else:
            async with self._order:
                await self._deliver_through_hooks(publication)

    def _obey(self, control: Control) -> None:
        # No hook runs and nothing is waited for: a dismissed connection doesn't get what waits for it either.
        if isinstance(control, Dismissal):
            if self.streams is not None and control.audience.kind == "user":
                self.streams.dismiss(control.audience.name, control.code, control.reason)
            self.membership.dismiss_all(control.audience, control.exclude, control.code, control.reason)
        elif isinstance(control, Unsubscription):
            self.membership.unsubscribe_all(control.audience, control.channels)
        elif isinstance(control, NodeMessage):
            if self.siblings is not None:
                self.siblings.take(control)
        elif isinstance(control, PresenceChange):
            if self.presence is not None:
                self.presence.take(control)
        else:
            self.continuity.forgotten(control.audience)

    async def _deliver_through_hooks(self, publication: Publication) -> None:
        if publication.traceparent and (tracing := self._hooks.tracing) is not None:
            with tracing.delivering(publication):
                await self._ask_and_hand_over(publication)
        else:
            await self._ask_and_hand_over(publication)

    async def _ask_and_hand_over(self, publication: Publication) -> None:
        delivery = Delivery(publication.message, publication.audience, self._recipients(publication), self._encode)
        await self._hooks.deliver(delivery)
        if not self.continuity.is_due(publication):
            return
        self._counters.broadcasts += 1
        got: list[Connection] = []
        for message, some in delivery._parts():
            # A connection that has left the audience while hooks ran gets nothing; one that is behind gets it later.
            still_here = [member for member in some if self.registry.is_member(member, publication.audience)]
            if publication.id is not None:  # a broadcast of the hook itself may have overtaken this one
                still_here = self._once_each.left(publication.id, still_here)
            self._deliver_to(publication.with_message(message), still_here)
            got += still_here
        self.continuity.tell_position(publication, got)
