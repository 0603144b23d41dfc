"""The base of all engines with a broker. `BrokerEngine`, `Link`, `Inlet`, `Parcel` and `reset` are for new engines."""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import Patience, Tasks
from wsbroadcast.engines.broker.health import Echoes, LinkHealth, is_bug
from wsbroadcast.engines.broker.incoming import Incoming
from wsbroadcast.engines.broker.interest import Interest
from wsbroadcast.engines.broker.link import Inlet, Link, Parcel, Stretch, reset
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX, AudienceNames
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.engines.broker.supervisor import Supervisor
from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, LifecycleError
from wsbroadcast.history import History, Replay
from wsbroadcast.options import Limits, Timing, check_count
from wsbroadcast.publication import Control, Publication
from wsbroadcast.stats import EngineCounters, EngineStats

__all__ = ["BrokerEngine", "Inlet", "Link", "Parcel", "reset"]

DEFAULT_TIMING = Timing()

MAX_MESSAGE_BYTES = Limits().max_outbound_bytes
"""The largest payload that is taken from a broker, by default: the largest that a manager sends, in bytes."""


_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def truth(option: str, value: str, broker: str) -> bool:
    """Read an option of a URL that is true or false.

    Raises:
        ConfigurationError: If it is neither true nor false.
    """
    if value.lower() not in _TRUTH:
        raise ConfigurationError(f"{option} in the URL of {broker} is true or false, not {value!r:.80}")
    return _TRUTH[value.lower()]


class BrokerEngine(Engine):
    """An engine that links nodes by a broker.

    It recovers from every outage by itself. Until the broker is back, publishing raises `EngineUnavailable`, and local
    broadcasts go on. Then every audience is subscribed again, and one gap is reported.

    Args:
        prefix: The beginning of all names at the broker. Apps that share a broker need different prefixes.
        separator: What the broker puts between the parts of a name.
        address: The broker's address for logs and errors, without a password.
        fail_fast: Whether `start` raises if the broker can't be reached. Otherwise it starts without the broker.
        max_message_bytes: The largest payload that is taken from the broker, in bytes.
        timing: How long to wait for the broker.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    name = "broker"

    def __init__(
        self,
        *,
        prefix: str = DEFAULT_PREFIX,
        separator: str = ":",
        address: str = "",
        fail_fast: bool = False,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        check_count("max_message_bytes", max_message_bytes)
        if not isinstance(fail_fast, bool):
            raise ConfigurationError(f"fail_fast must be True or False, not {fail_fast!r:.80}")
        if not isinstance(timing, Timing):
            raise ConfigurationError(f"timing is a Timing(…), not {timing!r:.80}")
        self.names = AudienceNames(prefix, separator)
        """The names of audiences at the broker."""
        self.address = address
        """The broker's address, without a password."""
        self._fail_fast = fail_fast
        self._max_message_bytes = max_message_bytes
        self._timing = timing
        self._counters = EngineCounters()
        self._session: Session | None = None

    @abstractmethod
    def new_link(self) -> Link:
        """Make a link that isn't open yet."""

    @property
    def link(self) -> Link | None:
        """The link in use; `None` while there is none."""
        return None if self._session is None else self._session.outgoing.link

    async def start(self, receiver: Receiver) -> None:
        """Connect, and stay connected until `aclose`. It promises what `Engine.start` does."""
        if self._session is not None and self._session.is_alive:
            raise LifecycleError(f"the {self.name} engine is started already: each manager needs one of its own")
        session = self._session = Session(
            self.name,
            f"{self.name} at {self.address}",
            self.names,
            self.new_link,
            self._timing,
            self._max_message_bytes,
            receiver,
            self._counters,
        )
        try:
            await session.start(fail_fast=self._fail_fast)
        except BaseException:
            if self._session is session:  # else the engine was started anew in another event loop
                self._session = None
            raise

    async def aclose(self) -> None:
        """Publish what still waits, if that is quick, and disconnect. It may be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.aclose()

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Ask for publications to these audiences from now on. It returns at once; `confirmed` waits."""
        self._started().subscribe(audiences)

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """Ask for no more publications to these audiences. The broker is told after a moment."""
        if self._session is not None:  # else the subscriptions ended with the session
            self._session.unsubscribe(audiences)

    def confirmed(self, audiences: Iterable[Audience]) -> Coroutine[Any, Any, None]:
        """Return when the broker has confirmed these subscriptions, or at once while it is out of reach.

        Raises:
            EngineUnavailable: If the broker forbids this node to subscribe to one of them.
        """
        return self._started().confirmed(audiences)

    def publish(self, publication: Publication | Control) -> Coroutine[Any, Any, Any]:
        """Return once the broker has taken the publication. Publications of one turn of the loop go out together.

        Raises:
            EngineUnavailable: If the broker is out of reach, doesn't answer in time, takes no messages now, or forbids
                this node to publish.
            MessageTooLarge: If the publication is larger than the broker takes.
            EngineError: If the broker refuses this very publication.
        """
        return self._started().outgoing.publish(publication)

    def publish_nowait(self, publication: Publication | Control) -> None:
        """Hand over the publication. If the broker doesn't take it, that is counted and logged.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach, or too much waits for it already.
            MessageTooLarge: If the publication is larger than the broker takes.
        """
        self._started().outgoing.publish_nowait(publication)

    async def health(self) -> Health:
        """Tell whether a message that the engine sends to itself comes back through the broker."""
        if self._session is None:
            return Health(self.name, False, "not started")
        return await self._session.health.health()

    def stats(self) -> EngineStats:
        """Return what was counted since the engine was made."""
        return self._counters.snapshot(is_connected=self.link is not None)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    def _started(self) -> Session:
        if self._session is None:
            raise EngineUnavailable(f"the {self.name} engine is not started")
        return self._session


class Session:
    """What an engine has from `start` to `aclose`, in one event loop.

    Args:
        engine: The engine's name, for health, gaps and logs.
        where: The engine and its broker's address, for logs and errors.
        names: The names of audiences at the broker.
        new_link: Makes a link that isn't open yet.
        timing: How long to wait for the broker.
        max_message_bytes: The largest payload that is taken from the broker, in bytes.
        receiver: The node.
        counters: Where everything is counted.
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
        """Whether messages travel."""
        self._incoming = Incoming(
            where, names, max_message_bytes, self._interest, self.outgoing, self.health, receiver, counters
        )
        self._supervisor = Supervisor(new_link, timing, self._interest, self.outgoing, self.health, self._incoming)
        self._tasks = Tasks()
        self._running: asyncio.Task[None] | None = None
        self.relinking = asyncio.Lock()
        """Held while a link is replaced by another one."""

    @property
    def is_alive(self) -> bool:
        """Whether the session's event loop still runs. In a forked process it doesn't: that has only a copy of it.

        At its end `asyncio.run` cancels all tasks that are left, and runs the loop again for that. This doesn't count.
        """
        is_running = self._running is not None and not self._running.cancelling()  # `None` while it ends, too
        return self._process == os.getpid() and self._loop.is_running() and is_running

    def replay(self, audience: Audience, stretch: Stretch, history: History) -> Replay:
        """Make publications of what the broker has kept of an audience."""
        return self._incoming.replay(audience, stretch, history)

    async def start(self, *, fail_fast: bool) -> None:
        """Try to reach the broker, return after the first attempt, and go on. It promises what `Engine.start` does."""
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
        """Publish what still waits, if that is quick, and end."""
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
            if running is not None:  # else another call of `aclose` has ended it
                running.cancel()
            self.health.end()
            await self.outgoing.aclose(f"the {self._engine} engine was stopped")
            await self._tasks.join()  # these are `running` alone, which awaits the tasks that it has started

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Ask for publications to these audiences."""
        for audience in audiences:
            name = self._names.of(audience)
            self._incoming.audiences[name] = audience
            self._interest.want(name)
        self._supervisor.wanted()

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """Ask for no more publications to these audiences."""
        names = [self._names.of(audience) for audience in audiences]
        for name in names:
            self._incoming.audiences.pop(name, None)
            self._interest.unwant(name, self._loop.time())
        self._supervisor.unwanted(names)

    async def confirmed(self, audiences: Iterable[Audience]) -> None:
        """Wait until the broker has confirmed the subscriptions, or is out of reach.

        Raises:
            EngineUnavailable: If the broker forbids this node to subscribe to one of them.
        """
        names = [self._names.of(audience) for audience in audiences]
        await self._supervisor.wait_settled(names)
        refusal = self._interest.refusal(names)
        if refusal is not None:
            raise EngineUnavailable(str(refusal)) from refusal
