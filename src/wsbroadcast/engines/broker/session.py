"""A broker engine between its start and its end: what goes to the broker, what comes from it, and how well."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from secrets import token_urlsafe

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Patience, Tasks
from wsbroadcast.engines.broker.envelope import BadEnvelope, Origin, decode, encode
from wsbroadcast.engines.broker.health import Echoes, Outages, is_bug
from wsbroadcast.engines.broker.incoming import Freshness
from wsbroadcast.engines.broker.interest import Interest
from wsbroadcast.engines.broker.link import Link, Parcel
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.outgoing import Outbox
from wsbroadcast.engines.broker.supervisor import Supervisor
from wsbroadcast.engines.contract import Health, Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, MessageTooLarge
from wsbroadcast.logs import logger
from wsbroadcast.node.lanes import Inbox
from wsbroadcast.options import Timing
from wsbroadcast.publication import Gap, Publication
from wsbroadcast.stats import EngineCounters

# One warning about bad envelopes in this many seconds: whoever sends garbage sends much.
_WARN_SECONDS = 60.0

# Seconds between two looks at the broker's limits, because some clients send what is too large again and again.
_LOOK_SECONDS = 0.25


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
        self._max_message_bytes = max_message_bytes
        self._receiver = receiver
        self._counters = counters
        self._timing = timing
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self._node = token_urlsafe(9)
        self._published = 0
        self._audiences: dict[str, Audience] = {}
        # Names that are wanted and that the broker has forbidden us on this link.
        self._refusals: dict[str, ConfigurationError] = {}
        self._freshness = Freshness()
        self._inbox = Inbox(receiver, self.missed)
        self._outbox = Outbox(timing.request_timeout, counters)
        self._interest = Interest(timing.linger)
        self._supervisor = Supervisor(new_link, timing, self._interest, self._outbox, self, self)
        self._tasks = Tasks()
        self._echoes = Echoes(names.of_node(self._node), self._outbox, timing.request_timeout)
        self._outages = Outages(where, counters, self._report_gap)
        self._warned_at = -_WARN_SECONDS
        # Looks whether the broker takes more than it did; shared by all whose message is too large meanwhile.
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = -_LOOK_SECONDS
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
        self._interest.want(self._echoes.name)

        def first(error: Exception | None) -> None:
            if not tried.done():
                tried.set_result(error)

        self._running = self._tasks.spawn(self._supervisor.run(first), f"{self._engine} engine")
        try:
            error = await tried
        except BaseException:
            await self.aclose()
            raise
        if error is not None and (fail_fast or isinstance(error, ConfigurationError) or is_bug(error)):
            await self.aclose()
            if isinstance(error, ConfigurationError):
                raise error
            if is_bug(error):
                raise EngineError(f"{self._where} can't be used: {self._outages.trouble}") from error
            raise EngineUnavailable(f"{self._where} can't be reached: {self._outages.trouble}") from error
        self._outages.announce()

    async def aclose(self) -> None:
        """Publish what waits, if that goes quickly, and end."""
        if self._running is None:
            return
        try:
            if self._supervisor.link is not None:
                async with Patience(self._timing.request_timeout):
                    await self._outbox.wait_empty()
        except TimeoutError:
            pass
        finally:
            running, self._running = self._running, None
            running.cancel()
            if self._looking is not None:
                self._looking.cancel()
            self._outages.end()
            self._outbox.fail(f"the {self._engine} engine was stopped")
            self._echoes.fail("stopped")
            await self._inbox.aclose()
            await self._tasks.join()  # among them `running`, which awaits its own

    # To the broker.

    async def publish(self, publication: Publication) -> None:
        """Return once the broker has taken it."""
        try:
            parcel = self._parcel(publication)
        except MessageTooLarge as error:
            if error.size > self._max_message_bytes:
                raise
            await asyncio.wait([self._look_at_limits()])
            parcel = self._parcel(publication)
        await self._outbox.put(parcel)

    def publish_nowait(self, publication: Publication) -> None:
        """Hand it over; that it failed is counted and logged."""
        try:
            self._outbox.put_nowait(self._parcel(publication))
        except MessageTooLarge as error:
            if error.size <= self._max_message_bytes:
                self._look_at_limits()  # for the next one
            raise

    def _parcel(self, publication: Publication) -> Parcel:
        link = self._supervisor.link
        if link is None:
            self._counters.publish_failures += 1
            why = self._outages.trouble or "its event loop ends"
            raise EngineUnavailable(f"{self._where} is out of reach ({why}); nothing was sent")
        if publication.message.size > self._max_message_bytes:  # the other nodes would drop it
            raise MessageTooLarge(publication.message.size, self._max_message_bytes)
        self._published += 1
        envelope = encode(publication, Origin(self._node, self._published))
        if len(envelope) > link.max_envelope_bytes:
            overhead = len(envelope) - publication.message.size
            raise MessageTooLarge(publication.message.size, link.max_envelope_bytes - overhead)
        return Parcel(self._names.of(publication.audience), envelope)

    def _look_at_limits(self) -> asyncio.Task[None]:
        if self._looking is None:
            self._looking = self._tasks.spawn(self._read_limits(), f"{self._engine} engine limits")
        return self._looking

    async def _read_limits(self) -> None:
        try:
            await asyncio.sleep(self._looked_at + _LOOK_SECONDS - self._loop.time())
            link = self._supervisor.link
            if link is not None:
                async with Patience(self._timing.connect_timeout):
                    await link.read_limits()
        except Exception as error:  # whoever publishes is told of the limit that is known
            logger.info("%s doesn't say whether its limits have changed: %s", self._where, error)
        finally:
            self._looked_at = self._loop.time()
            self._looking = None

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Want publications to these audiences."""
        for audience in audiences:
            name = self._names.of(audience)
            self._audiences[name] = audience
            self._interest.want(name)
        self._supervisor.wanted()

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """No longer want them."""
        names = [self._names.of(audience) for audience in audiences]
        for name in names:
            self._audiences.pop(name, None)
            self._refusals.pop(name, None)
            self._interest.unwant(name, self._loop.time())
        self._supervisor.unwanted(names)

    async def confirmed(self, audiences: Iterable[Audience]) -> None:
        """Wait until the broker has confirmed, or is out of reach.

        Raises:
            EngineUnavailable: If it forbids us one of them.
        """
        names = [self._names.of(audience) for audience in audiences]
        await self._supervisor.wait_settled(names)
        if self._refusals:
            for name in names:
                if name in self._refusals:
                    raise EngineUnavailable(str(self._refusals[name])) from self._refusals[name]

    # From the broker: the inlet of its link.

    def take(self, name: str, envelope: bytes) -> None:
        """Deliver an envelope, if it is a good one."""
        self._outages.last_sign = self._loop.time()
        audience = self._audiences.get(name)
        if audience is None:
            self._take_other(name, envelope)
            return
        try:
            publication, origin = decode(envelope, audience, self._max_message_bytes)
            if origin is not None:
                if origin.node == self._node and origin.seq > self._published:
                    raise BadEnvelope("forged")
                if not self._freshness.is_fresh(origin, name):
                    raise BadEnvelope("stale")
        except BadEnvelope as bad:
            self._drop(str(bad), name, len(envelope))
        else:
            self._inbox.put(publication)

    def _take_other(self, name: str, envelope: bytes) -> None:
        if name == self._echoes.name:
            if not self._echoes.take(envelope):
                self._drop("echo", name, len(envelope))
        elif name not in self._interest:  # else it is on its way out: nobody is there any more
            self._drop("unknown_name", name, len(envelope))

    def _drop(self, reason: str, name: str, size: int) -> None:
        self._counters.bad_envelopes[reason] += 1
        now = self._loop.time()
        if now - self._warned_at >= _WARN_SECONDS:
            self._warned_at = now
            logger.warning("%s: dropped a bad envelope (%s), %d bytes under %.200r", self._where, reason, size, name)

    def missed(self, why: str, since: float | None = None) -> None:
        """Report messages that are missing although the link lives on; many such reports are one gap."""
        self._outages.missed(why, since)

    # How well: what the supervisor says, and asks.

    def up(self) -> None:
        """The link is in use."""
        self._outages.up()

    def down(self, why: str, error: Exception) -> None:
        """The link is lost, or could not be opened."""
        self._refusals.clear()  # the next one will ask again
        self._outages.down(why, error)
        self._echoes.fail(why)

    def _report_gap(self, seconds: float) -> None:
        self._tasks.spawn(self._receiver.gap(Gap(self._engine, seconds)), "on_gap hooks")

    def refused(self, name: str, error: ConfigurationError) -> None:
        """The broker forbids us a name; without our own nothing works."""
        if name == self._echoes.name:
            raise error
        self._interest.refuse(name)
        if name in self._audiences:
            self._refusals[name] = error
        logger.error("%s: %s", self._where, error)

    async def echo(self) -> None:
        """Send a message to ourselves through the broker and wait until it is back."""
        await self._echoes.send()

    async def probe(self) -> None:
        """Find out whether messages arrive: an echo, or whatever comes while we wait for it.

        Raises:
            TimeoutError: If nothing comes.
            EngineError: If it could not be sent.
        """
        began = self._loop.time()
        try:
            await self._echoes.send()
        except TimeoutError:
            if self._outages.last_sign <= began:
                raise

    async def health(self) -> Health:
        """Tell whether an echo comes back."""
        if self._supervisor.link is None:
            return Health(self._engine, False, self._outages.trouble)
        try:
            await self.probe()
        except (TimeoutError, EngineError) as error:
            return Health(self._engine, False, str(error))
        return Health(self._engine, True)
