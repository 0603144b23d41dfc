"""What a manager is in one event loop: its connections, and the way from the engine to them."""

from __future__ import annotations

import asyncio
from collections import Counter

from wsbroadcast.audience import EVERYONE
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency.loops import without_waiting
from wsbroadcast.concurrency.tasks import Tasks
from wsbroadcast.connection import Connection, Manager
from wsbroadcast.delivery.dispatcher import Dispatcher
from wsbroadcast.delivery.registry import Registry
from wsbroadcast.delivery.slow_consumers import Watch
from wsbroadcast.engines.contract import Engine
from wsbroadcast.hooks import Delivery, HookChain, is_delivering
from wsbroadcast.node.membership import Membership
from wsbroadcast.options import Limits, SlowConsumer
from wsbroadcast.publication import Gap, Publication
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
        self.registry = Registry[Connection]()
        self._watch = Watch(slow_consumer, counters)
        self.dispatcher = Dispatcher(self.registry, self._watch)
        self._tasks = Tasks()
        self.membership = Membership(
            manager, self.registry, self.dispatcher, self._watch, hooks, self._tasks, engine, limits
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

    async def receive(self, publication: Publication) -> None:
        """Deliver a publication, through the on_deliver hooks if there are any."""
        if publication.close_code is not None:
            self._dismiss(publication, publication.close_code)
        elif not self._hooks.has("on_deliver"):
            self._deliver(publication)
        elif is_delivering():
            # A hook broadcasts while its own delivery holds the order: this one goes first.
            await self._deliver_through_hooks(publication)
        else:
            async with self._order:
                await self._deliver_through_hooks(publication)

    def receive_nowait(self, publication: Publication) -> None:
        """Deliver a publication without awaiting anything.

        Raises:
            LifecycleError: If an on_deliver hook has to wait.
        """
        if publication.close_code is not None:
            self._dismiss(publication, publication.close_code)
        elif self._hooks.has("on_deliver"):
            without_waiting(self.receive(publication), "an on_deliver hook has to wait, for this message or one before")
        else:
            self._deliver(publication)

    def is_ready(self, publication: Publication) -> bool:
        """Tell whether `receive_nowait` can deliver it now: no hook has to run, the crowd is not behind."""
        if self._hooks.has("on_deliver"):
            return False
        return self.dispatcher.is_ready(publication.audience, publication.exclude)

    async def receive_paced(self, publication: Publication) -> None:
        """Deliver a publication of another node as `receive` does, at the pace of the crowd here."""
        await self.dispatcher.ease(publication.message.size, publication.audience, publication.exclude)
        await self.receive(publication)

    async def gap(self, gap: Gap) -> None:
        """Tell the hooks that messages of other nodes are missing."""
        await self._hooks.observe("on_gap", gap)

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
            backlog_bytes=sum(sink.held_bytes for sink in self._watch.waiting),
            backlog_messages=sum(sink.held_messages for sink in self._watch.waiting),
            behind=len(self._watch.behind),
            engine=self._engine.stats(),
        )

    def is_own_task(self) -> bool:
        """Tell whether the caller runs in one of the background tasks, such as a hook's, that `aclose` waits for."""
        return self._tasks.includes_current()

    async def aclose(self) -> None:
        """Send what was handed over, close every connection, wait for hooks and writers."""
        await self.membership.close_all(CloseCode.GOING_AWAY, "the server is going away")
        await self._tasks.join()
        await self._watch.aclose()

    def _deliver(self, publication: Publication) -> None:
        self._counters.broadcasts += 1
        self.dispatcher.dispatch(publication.message, publication.audience, publication.exclude)

    def _dismiss(self, publication: Publication, code: int) -> None:
        # No hook is asked and nothing is waited for: whoever is no longer welcome doesn't get what waits either.
        reason = publication.message.payload.decode(errors="replace")
        self.membership.dismiss_all(publication.audience, publication.exclude, code, reason)

    async def _deliver_through_hooks(self, publication: Publication) -> None:
        recipients = self.registry.recipients(publication.audience, publication.exclude)
        delivery = Delivery(publication.message, publication.audience, recipients, self._limits)
        await self._hooks.deliver(delivery)
        self._counters.broadcasts += 1
        for message, some in delivery.parts():
            # Who has left the audience while the hooks ran gets nothing any more.
            still_here = [member for member in some if self.registry.is_member(member, publication.audience)]
            if still_here:
                self.dispatcher.dispatch(message, publication.audience, recipients=still_here)
