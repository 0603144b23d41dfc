"""What all engines with a broker have in common; one of them is a `Link` and a class of twenty lines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Coroutine, Iterable
from typing import Any

from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.link import Link
from wsbroadcast.engines.broker.names import DEFAULT_PREFIX, AudienceNames
from wsbroadcast.engines.broker.session import Session
from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, LifecycleError
from wsbroadcast.options import Timing, check_count
from wsbroadcast.publication import Publication
from wsbroadcast.stats import EngineCounters, EngineStats

DEFAULT_TIMING = Timing()


_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def truth(option: str, value: str, broker: str) -> bool:
    """Return what an option in a URL says.

    Raises:
        ConfigurationError: If it says neither true nor false.
    """
    if value.lower() not in _TRUTH:
        raise ConfigurationError(f"{option} in the URL of {broker} is true or false, not {value!r:.80}")
    return _TRUTH[value.lower()]


class BrokerEngine(Engine):
    """An engine whose nodes are linked by a broker.

    It survives every outage by itself: publishing raises `EngineUnavailable` meanwhile, local broadcasts go on, and
    when the broker is back, every audience is subscribed again and one gap is reported.

    Args:
        prefix: What all names at the broker begin with; apps that share one take a prefix each.
        separator: What the broker puts between the parts of a name.
        address: Where the broker is, for logs and errors; without a password.
        fail_fast: Whether `start` raises if the broker can't be reached, instead of beginning degraded.
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
        max_message_bytes: int = 16 * 1024 * 1024,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        check_count("max_message_bytes", max_message_bytes)
        if not isinstance(fail_fast, bool):
            raise ConfigurationError(f"fail_fast must be True or False, not {fail_fast!r:.80}")
        if not isinstance(timing, Timing):
            raise ConfigurationError(f"timing is a Timing(…), not {timing!r:.80}")
        self.names = AudienceNames(prefix, separator)
        """How audiences are called at the broker."""
        self.address = address
        """Where the broker is, without a password."""
        self._fail_fast = fail_fast
        self._max_message_bytes = max_message_bytes
        self._timing = timing
        self._counters = EngineCounters()
        self._session: Session | None = None

    @abstractmethod
    def new_link(self) -> Link:
        """Make a link that isn't open yet."""

    async def start(self, receiver: Receiver) -> None:
        """Connect, and stay connected until `aclose`; what `Engine.start` promises."""
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
            if self._session is session:  # else another event loop has begun anew meanwhile
                self._session = None
            raise

    async def aclose(self) -> None:
        """Publish what waits, if that goes quickly, and disconnect. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.aclose()

    def subscribe(self, audiences: Iterable[Audience]) -> None:
        """Want publications to these audiences from now on; returns at once, `confirmed` waits."""
        self._started().subscribe(audiences)

    def unsubscribe(self, audiences: Iterable[Audience]) -> None:
        """No longer want publications to these audiences; after a moment the broker is told."""
        if self._session is not None:  # else it went with the session
            self._session.unsubscribe(audiences)

    def confirmed(self, audiences: Iterable[Audience]) -> Coroutine[Any, Any, None]:
        """Return when the broker has confirmed these wanted audiences, or at once while it is out of reach.

        Raises:
            EngineUnavailable: If it forbids us one of them.
        """
        return self._started().confirmed(audiences)

    def publish(self, publication: Publication) -> Coroutine[Any, Any, None]:
        """Return once the broker has taken the publication; publications of one turn of the loop go out together.

        Raises:
            EngineUnavailable: If the broker is out of reach, doesn't answer in time, takes no messages now, or forbids
                us to publish.
            MessageTooLarge: If it is larger than the broker takes.
            EngineError: If the broker refuses this very publication.
        """
        return self._started().publish(publication)

    def publish_nowait(self, publication: Publication) -> None:
        """Hand over the publication; if the broker doesn't take it, that is counted and logged.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach, or too much waits for it.
            MessageTooLarge: If it is larger than the broker takes.
        """
        self._started().publish_nowait(publication)

    async def health(self) -> Health:
        """Tell whether a message to ourselves comes back through the broker."""
        if self._session is None:
            return Health(self.name, False, "not started")
        return await self._session.health()

    def stats(self) -> EngineStats:
        """Return what was counted since the engine was made."""
        return self._counters.snapshot()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    def _started(self) -> Session:
        if self._session is None:
            raise EngineUnavailable(f"the {self.name} engine is not started")
        return self._session
