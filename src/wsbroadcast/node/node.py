"""What a manager is in one event loop: its connections, and the way from the engine to them."""

from __future__ import annotations

import asyncio
from collections import Counter

from wsbroadcast.audience import EVERYONE
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, Manager
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.engines.contract import Engine
from wsbroadcast.hooks import Delivery, HookChain, is_delivering
from wsbroadcast.logs import logger
from wsbroadcast.node.lanes import Lanes
from wsbroadcast.node.membership import Membership
from wsbroadcast.options import Limits, SlowConsumer
from wsbroadcast.publication import Dismissal, Gap, Publication
from wsbroadcast.stats import Counters, Stats


class Node:
    """Receives publications from the engine and hands them to the connections that are here."""

    def __init__(
        self,
        manager: Manager,
        engine: Engine,
        hooks: HookChain,
        slow_consumer: SlowConsumer,
        limits: Limits,
        counters: Counters,
    ) -> None:
        self._engine = engine
        self._links_nodes = engine.links_nodes
        self.registry = Registry[Connection]()
        self._slow_consumers = SlowConsumers(slow_consumer, counters)
        self.dispatcher = Dispatcher(self.registry, self._slow_consumers)
        self._tasks = Tasks()
        self.membership = Membership(
            manager, self.registry, self.dispatcher, self._slow_consumers, hooks, self._tasks, engine, limits
        )
        self._hooks = hooks
        self._limits = limits
        self._counters = counters
        self.starting = asyncio.Lock()
        """Held while the engine starts."""
        self.entering = 0
        """How many are on their way in; the manager counts."""
        # Keeps publications in order while on_deliver hooks take their time.
        self._order = asyncio.Lock()
        self._lanes = Lanes(self)
        self._is_closed = False

    # What an engine calls.

    def take(self, publication: Publication | Dismissal) -> None:
        """Deliver a publication, now or behind what waits for its audience. Never blocks, never raises."""
        if isinstance(publication, Dismissal):
            self._dismiss(publication)
        elif (self._lanes.waiting and publication.audience in self._lanes.waiting) or not self.is_ready(publication):
            self._lanes.put(publication)
        else:
            self.deliver_now(publication)

    async def deliver(self, publication: Publication | Dismissal) -> None:
        """Deliver a publication of this node, behind what waits for its audience; raises what a hook raises."""
        waiting = self._lanes.waiting
        if isinstance(publication, Dismissal):
            self._dismiss(publication)
        elif not waiting and not self._hooks.has("on_deliver"):
            self._deliver(publication)
        elif publication.audience not in waiting or is_delivering():
            await self._deliver_in_order(publication)
        else:
            async with self._lanes.turn(publication.audience):
                await self._deliver_in_order(publication)

    def gap(self, gap: Gap) -> None:
        """Tell the hooks that messages of other nodes are missing. Never blocks."""
        if not self._is_closed:
            self._tasks.spawn(self._tell_gap(gap), "on_gap hooks")

    # What the manager calls.

    async def deliver_local(self, publication: Publication) -> None:
        """Deliver a publication that is for this node only.

        It doesn't wait behind those of other nodes, which wait for most clients to keep up.
        """
        await (self._deliver_in_order if self._links_nodes else self.deliver)(publication)

    def stats(self) -> Stats:
        """Return what the node holds now and has counted so far."""
        connections = self.registry.recipients(EVERYONE)
        counters = self._counters
        return Stats(
            connections=len(connections),
            users=len(self.registry.users),
            channels=len(self.registry.channels),
            sinks=dict(Counter(connection.sink.kind for connection in connections)),
            fast_path_refused=dict(Counter(why for c in connections if (why := c._transport.fast_path_refused))),
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
            backlog_bytes=sum(sink.held_bytes for sink in self._slow_consumers.waiting),
            backlog_messages=sum(sink.held_messages for sink in self._slow_consumers.waiting),
            behind=len(self._slow_consumers.behind),
            engine=self._engine.stats(),
        )

    def is_own_task(self) -> bool:
        """Tell whether the caller runs in one of the background tasks, such as a hook's, that `aclose` waits for."""
        return self._tasks.includes_current()

    async def aclose(self) -> None:
        """Send what was handed over, close every connection, wait for hooks and writers."""
        await self._lanes.aclose(patience=0.0 if self._links_nodes else self._hooks.timeout)
        await self.membership.close_all(CloseCode.GOING_AWAY, "the server is going away")
        self._is_closed = True
        await self._tasks.join()
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
            self._counters.broadcasts += 1
            self.dispatcher.dispatch(publication)
        except Exception:  # whatever it is, the engine goes on
            logger.exception("a message was not delivered")

    async def deliver_paced(self, publication: Publication) -> None:
        """Hand it over when most clients keep up, through the hooks."""
        if self._links_nodes:
            await self.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        await self._deliver_in_order(publication)

    def overrun(self, seconds: float) -> None:
        """Tell that publications were dropped, because too many wait."""
        logger.warning(
            "messages of the last %.1f s are missing here: more came by the %s engine than connections and hooks take",
            seconds,
            self._engine.name,
        )
        if self._links_nodes:
            self.gap(Gap(self._engine.name, seconds))

    # Inside.

    async def _tell_gap(self, gap: Gap) -> None:
        await self._tasks.begun()  # the engine goes on first
        await self._hooks.observe("on_gap", gap)

    def _deliver(self, publication: Publication) -> None:
        self._counters.broadcasts += 1
        self.dispatcher.dispatch(publication)

    async def _deliver_in_order(self, publication: Publication) -> None:
        if not self._hooks.has("on_deliver"):
            self._deliver(publication)
        elif is_delivering():
            # A hook broadcasts while its own delivery holds the order: this one goes first.
            await self._deliver_through_hooks(publication)
        else:
            async with self._order:
                await self._deliver_through_hooks(publication)

    def _dismiss(self, dismissal: Dismissal) -> None:
        # No hook is asked and nothing is waited for: who is no longer welcome doesn't get what waits either.
        self.membership.dismiss_all(dismissal.audience, dismissal.exclude, dismissal.code, dismissal.reason)

    async def _deliver_through_hooks(self, publication: Publication) -> None:
        recipients = self.registry.recipients(publication.audience, publication.exclude)
        delivery = Delivery(publication.message, publication.audience, recipients, self._limits)
        await self._hooks.deliver(delivery)
        self._counters.broadcasts += 1
        for message, some in delivery.parts():
            # Who has left the audience while the hooks ran gets nothing any more.
            still_here = [member for member in some if self.registry.is_member(member, publication.audience)]
            if still_here:
                self.dispatcher.dispatch(publication.with_message(message), still_here)
