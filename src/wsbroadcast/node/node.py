"""What a manager is in one event loop: its connections, and the way from the engine to them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from time import monotonic

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, Operations
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.engines.contract import Engine
from wsbroadcast.history import HistoryRules
from wsbroadcast.hooks import Delivery, HookChain, is_delivering
from wsbroadcast.logs import Clock, about, logger
from wsbroadcast.node.continuity import Continuity
from wsbroadcast.node.drain import Drain
from wsbroadcast.node.lanes import Lanes, Outbox
from wsbroadcast.node.membership import Membership
from wsbroadcast.node.reports import Reports
from wsbroadcast.node.siblings import Siblings
from wsbroadcast.options import ClientTiming, Limits, SlowConsumer
from wsbroadcast.publication import (
    Control,
    Dismissal,
    Gap,
    NodeMessage,
    Publication,
    Publications,
    Unsubscription,
)
from wsbroadcast.stats import Counters, Stats

# For how long it is remembered who got a broadcast to several audiences.
_REMEMBERED_SECONDS = 10.0


class OnceEach:
    """Who got a broadcast to several audiences, so that each connection gets it once.

    It is remembered who *got* it, not who was in an audience: between its publications connections come, go and move.
    Remembered are the broadcasts of the last 10 s; older ones are forgotten when the next is delivered.

    Args:
        clock: Tells the time, in seconds.
        max_remembered: How many connections are remembered, of all broadcasts together, before the oldest is forgotten.
    """

    def __init__(self, clock: Clock = monotonic, max_remembered: int = 500_000) -> None:
        self._clock = clock
        self._max_remembered = max_remembered
        # By the broadcast's id, when it was last delivered, and the ids of connections; the oldest is the first.
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
    ) -> None:
        self._engine = engine
        self._links_nodes = engine.links_nodes
        self.registry = Registry[Connection]()
        self._slow_consumers = SlowConsumers(slow_consumer, counters)
        self.dispatcher = Dispatcher(self.registry, self._slow_consumers)
        self.tasks = Tasks()
        """What runs in the background until it has ended; `aclose` waits for it."""
        self.continuity = Continuity(
            self, self.registry, self.dispatcher, hooks, core.encode, engine, rules, counters, self.tasks, client_timing
        )
        """Where this node and its connections are in histories."""
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
        )
        self.drain = Drain(self.registry, self.membership, self.tasks, slow_consumer.close_timeout)
        """Lets its connections go before it ends."""
        self._hooks = hooks
        self._encode = core.encode
        self._counters = counters
        self.starting = asyncio.Lock()
        """Held while the engine starts."""
        self.entering = 0
        """How many are on their way in; the manager counts."""
        # Keeps publications in order while on_deliver hooks take their time.
        self._order = asyncio.Lock()
        self._lanes = Lanes(self)
        self._once_each = OnceEach()
        self.outbox: Outbox
        """Broadcasts that nobody waits for."""
        self.siblings: Siblings | None = None
        """The other nodes, where something asks them."""
        self._is_closed = False

    # What an engine calls.

    def take(self, publication: Publication | Control) -> None:
        """Deliver a publication, now or behind what waits for its audience. Never blocks, never raises."""
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
        """Deliver a publication of this node, behind what waits for its audience; raises what a hook raises."""
        if not isinstance(publication, Publication):
            self._obey(publication)
            return
        if not self.dispatcher.collected:  # of a turn of the event loop the first
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
        """Tell the hooks that messages of other nodes are missing. Never blocks."""
        if not self._is_closed:
            if self.siblings is not None:
                self.siblings.greet_again()
            self.tasks.spawn(self.continuity.tell_gap(gap), "on_gap hooks")

    def suspect(self) -> None:
        """Look whether something is missing of what has a history."""
        if self.continuity.tails is not None and not self._is_closed:
            self.continuity.tails.suspect()

    # What the manager calls.

    def know_siblings(self) -> Siblings:
        """Return the other nodes; from the first call on this one takes part in questions to all of them."""
        if self.siblings is None:
            self.siblings = Siblings(self._engine, self.tasks, Reports(self, self._engine).respond)
        return self.siblings

    def count(self, publications: Publications) -> int:
        """Tell how many connections a broadcast is for, each counted once."""
        if len(publications) == 1:
            one = publications[0]
            return self.registry.count(one.audience, one.exclude, one.exclude_users)
        several = [self.registry.recipients(one.audience, one.exclude, one.exclude_users) for one in publications]
        return len(set[Connection]().union(*several))

    def begin_sending(self) -> None:
        """Send what waits in the outbox."""
        self.tasks.spawn(self.outbox.send_all(), "broadcast_soon")

    async def deliver_local(self, publication: Publication) -> None:
        """Deliver a publication that is for this node only.

        It doesn't wait behind those of other nodes, which wait for most clients to keep up.
        """
        self.continuity.offer(publication)
        await (self._deliver_in_order if self._links_nodes else self._deliver_behind)(publication)

    def stats(self) -> Stats:
        """Return what the node holds now and has counted so far."""
        counters = self._counters
        # Copies first: it may be called in another thread. Nothing here takes longer with more connections.
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
            vetoed=counters.vetoed,
            unpublished=counters.unpublished,
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
        """Tell whether the caller runs in one of the background tasks, such as a hook's, that `aclose` waits for."""
        return self.tasks.includes_current()

    async def aclose(self) -> None:
        """Send what was handed over, close every connection, wait for hooks and writers."""
        self.drain.end()
        if self.siblings is not None:
            self.siblings.end()
        if not self.is_own_task():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._hooks.timeout):
                    await self.outbox.aclose()
        self.continuity.end_listening()
        patience = 0.0 if self._links_nodes else self._hooks.timeout
        await self._lanes.aclose(patience)
        await self.continuity.aclose(patience)
        await self.membership.close_all(CloseCode.GOING_AWAY, "the server is going away")
        self._is_closed = True
        await self.tasks.join()
        await self._slow_consumers.aclose()

    # What the lanes call.

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether no hook has to run, and most clients keep up."""
        if self._hooks.has("on_deliver"):
            return False
        # What is published here and not awaited sets no pace: the slow-consumer policy deals with what doesn't fit.
        return not self._links_nodes or self.dispatcher.is_ready(publication.audience, publication.exclude)

    def deliver_now(self, publication: Publication) -> None:
        """Hand a publication to the connections; what goes wrong is logged."""
        try:
            self._deliver(publication)
        except Exception:  # whatever it is, the engine goes on
            logger.exception(
                "a message was not delivered", extra=about("delivery.failed", audience=publication.audience.kind)
            )

    async def deliver_paced(self, publication: Publication) -> None:
        """Hand it over when most clients keep up, through the hooks."""
        if self._links_nodes:
            await self.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        await self._deliver_in_order(publication)

    def evict(self, connection: Connection) -> None:
        """Let a connection go that is too far behind."""
        self.membership.evict(connection, "backlog_full")

    def overrun(self, seconds: float) -> None:
        """Tell that publications were dropped, because too many wait."""
        logger.warning(
            "messages of the last %.1f s are missing here: more came by the %s engine than connections and hooks take",
            seconds,
            self._engine.name,
            extra=about("engine.overrun", engine=self._engine.name, seconds=seconds),
        )
        if self._links_nodes:
            self.gap(Gap(self._engine.name, seconds))

    # Inside.

    def _deliver(self, publication: Publication) -> None:
        if publication.traceparent and (tracing := self._hooks.tracing) is not None:
            with tracing.delivering(publication):
                pass  # nothing of the app runs here, and what is handed over is written at the end of the turn
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
            # A hook broadcasts while its own delivery holds the order: this one goes first.
            await self._deliver_through_hooks(publication)
        else:
            async with self._order:
                await self._deliver_through_hooks(publication)

    def _obey(self, control: Control) -> None:
        # No hook is asked and nothing is waited for: who is no longer welcome doesn't get what waits either.
        if isinstance(control, Dismissal):
            self.membership.dismiss_all(control.audience, control.exclude, control.code, control.reason)
        elif isinstance(control, Unsubscription):
            self.membership.unsubscribe_all(control.audience, control.channels)
        elif isinstance(control, NodeMessage):
            if self.siblings is not None:
                self.siblings.take(control)
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
            # Who has left the audience while the hooks ran gets nothing any more; who is behind gets it later.
            still_here = [member for member in some if self.registry.is_member(member, publication.audience)]
            if publication.id is not None:  # a hook that broadcasts was overtaken by itself
                still_here = self._once_each.left(publication.id, still_here)
            self._deliver_to(publication.with_message(message), still_here)
            got += still_here
        self.continuity.tell_position(publication, got)
