"""A broker engine between its start and its end: what goes to the broker, what comes from it, and how well."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from typing import Any

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Patience, Tasks
from wsbroadcast.engines.broker.health import Echoes, LinkHealth, is_bug
from wsbroadcast.engines.broker.incoming import Incoming
from wsbroadcast.engines.broker.interest import Interest
from wsbroadcast.engines.broker.link import Link
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.engines.broker.supervisor import Supervisor
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, LifecycleError
from wsbroadcast.options import Timing
from wsbroadcast.stats import EngineCounters


class Session:
    """One node's life at a broker, in one event loop.

    Args:
        engine: The engine's name, for health, gaps and logs.
        where: The engine and its broker's address, for logs and errors.
        names: How audiences are called at the broker.
        new_link: Makes a link that isn't open yet.
        timing: How long to wait for the broker.
        max_message_bytes: The largest payload that is taken from the broker.
        receiver: The node.
        counters: What is counted.
    """

    def __init__(
        self,
        engine: str,
        where: str,
        names: AudienceNames,
        new_link: Callable[[], Link],
        timing: Timing,
        max_message_bytes: int,
        receiver: Receiver,
        counters: EngineCounters,
    ) -> None:
        self._engine = engine
        self._where = where
        self._names = names
        self._timing = timing
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._interest = Interest(timing.linger)
        self.outgoing = Outgoing(where, names, timing, max_message_bytes, counters)
        """What goes to the broker."""
        echoes = Echoes(names.of_node(self.outgoing.node), self.outgoing, timing.request_timeout)
        self.health = LinkHealth(engine, where, echoes, self.outgoing, receiver, counters)
        """How well it goes."""
        self._incoming = Incoming(
            where, max_message_bytes, self._interest, self.outgoing, self.health, receiver, counters
        )
        self._supervisor = Supervisor(new_link, timing, self._interest, self.outgoing, self.health, self._incoming)
        self._tasks = Tasks()
        self._running: asyncio.Task[None] | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its event loop still runs; a process that was forked off has only a copy, which doesn't.

        At its end `asyncio.run` cancels what is left, and for that runs the loop again.
        """
        is_running = self._running is not None and not self._running.cancelling()  # `None` while it ends, too
        return self._process == os.getpid() and self._loop.is_running() and is_running

    async def start(self, *, fail_fast: bool) -> None:
        """Try to reach the broker once, and go on trying; what `Engine.start` promises."""
        tried: asyncio.Future[Exception | None] = self._loop.create_future()
        self._interest.want(self.health.echoes.name)

        def first(error: Exception | None) -> None:
            if not tried.done():
                tried.set_result(error)

        self._running = self._tasks.spawn(self._supervisor.run(first), f"{self._engine} engine")
        try:
            ends: set[asyncio.Future[Any]] = {tried, self._running}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except BaseException:
            await self.aclose()
            raise
        if not tried.done() or self._running is None:
            raise LifecycleError(f"the {self._engine} engine was stopped while it started")
        error = tried.result()
        if error is not None and (fail_fast or isinstance(error, ConfigurationError) or is_bug(error)):
            await self.aclose()
            if isinstance(error, ConfigurationError):
                raise error
            if is_bug(error):
                raise EngineError(f"{self._where} can't be used: {self.health.trouble}") from error
            raise EngineUnavailable(f"{self._where} can't be reached: {self.health.trouble}") from error
        self.health.announce()

    async def aclose(self) -> None:
        """Publish what waits, if that goes quickly, and end."""
        if self._running is None:
            return
        try:
            if self.outgoing.link is not None:
                async with Patience(self._timing.request_timeout):
                    await self.outgoing.wait_empty()
        except TimeoutError:
            pass
        finally:
            running, self._running = self._running, None
            if running is not None:  # else another call has ended it
                running.cancel()
            self.health.end()
            await self.outgoing.aclose(f"the {self._engine} engine was stopped")
            await self._tasks.join()  # that is `running`, which awaits its own

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Want publications to these audiences."""
        for audience in audiences:
            name = self._names.of(audience)
            self._incoming.audiences[name] = audience
            self._interest.want(name)
        self._supervisor.wanted()

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """No longer want them."""
        names = [self._names.of(audience) for audience in audiences]
        for name in names:
            self._incoming.audiences.pop(name, None)
            self._interest.unwant(name, self._loop.time())
        self._supervisor.unwanted(names)

    async def confirmed(self, audiences: Iterable[Audience]) -> None:
        """Wait until the broker has confirmed, or is out of reach.

        Raises:
            EngineUnavailable: If it forbids us one of them.
        """
        names = [self._names.of(audience) for audience in audiences]
        await self._supervisor.wait_settled(names)
        refusal = self._interest.refusal(names)
        if refusal is not None:
            raise EngineUnavailable(str(refusal)) from refusal
