"""Whether a link carries messages: messages of a node to itself, outages, and one gap for each outage."""

from __future__ import annotations

import asyncio

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.engines.contract import Health, Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, WSBroadcastError
from wsbroadcast.logs import about, logger
from wsbroadcast.publication import Gap
from wsbroadcast.stats import EngineCounters

# Errors that neither a broker nor the network causes.
_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)


def is_bug(error: BaseException | None) -> bool:
    """Tell whether an error is no outage, but a wrong option or driver, or a bug. Trying again doesn't help then."""
    return isinstance(error, _BUGS) and not isinstance(error, WSBroadcastError)


# No number of an echo has more digits. Bytes that others send may be long.
_MAX_DIGITS = 18


class Echoes:
    """Messages of a node to itself. If they come back through the broker, other messages arrive too.

    Args:
        name: The node's own name at the broker.
        outgoing: Sends them to the broker.
        timeout: Seconds after which one counts as lost.
    """

    def __init__(self, name: str, outgoing: Outgoing, timeout: float) -> None:
        self.name = name
        """The name under which they come back."""
        self._outgoing = outgoing
        self._timeout = timeout
        self._sent = 0
        self._awaited: dict[bytes, asyncio.Future[None]] = {}

    async def send(self) -> None:
        """Send one through the broker, and wait until it is back.

        Raises:
            TimeoutError: If it isn't back in time.
            EngineError: If it could not be sent.
        """
        self._sent += 1
        token = b"%d" % self._sent
        echo = self._awaited[token] = asyncio.get_running_loop().create_future()
        try:
            async with Patience(self._timeout):
                await self._outgoing.put_first(Parcel(self.name, token))
                await echo
        finally:
            self._awaited.pop(token, None)

    def take(self, envelope: bytes) -> bool:
        """Take what came under the node's own name; return whether it is an echo, which may be late."""
        echo = self._awaited.pop(envelope, None)
        if echo is None:
            return self._was_sent(envelope)
        if not echo.done():
            echo.set_result(None)
        return True

    def _was_sent(self, envelope: bytes) -> bool:
        # Checked by its number. A memory of echoes that came too late would grow with each one that is lost.
        number = int(envelope) if envelope.isdigit() and len(envelope) <= _MAX_DIGITS else 0
        return 0 < number <= self._sent and envelope == b"%d" % number

    def fail(self, why: str) -> None:
        """Take note that none of them will come back."""
        for echo in self._awaited.values():
            if not echo.done():
                echo.set_exception(EngineUnavailable(f"the connection to the broker is lost ({why})"))
                echo.exception()  # marked as retrieved: the waiting call may be cancelled in this turn of the loop
        self._awaited.clear()


class LinkHealth:
    """The state of the links of one session. The supervisor reports it here. Each outage becomes one gap.

    Args:
        engine: The engine's name, for gaps.
        where: The engine and its broker's address, for logs.
        echoes: The messages of the node to itself.
        outgoing: Is told when the link is lost.
        receiver: Is told of gaps.
        counters: Where reconnects and gaps are counted.
        missed_seconds: If messages are missed while the link stays, all are reported as one gap, so many seconds after
            the first.
    """

    def __init__(
        self,
        engine: str,
        where: str,
        echoes: Echoes,
        outgoing: Outgoing,
        receiver: Receiver,
        counters: EngineCounters,
        *,
        missed_seconds: float = 1.0,
    ) -> None:
        self.echoes = echoes
        """The messages of the node to itself."""
        self._engine = engine
        self._where = where
        self._outgoing = outgoing
        self._receiver = receiver
        self._counters = counters
        self._missed_seconds = missed_seconds
        self._loop = asyncio.get_running_loop()
        self.trouble = "not connected yet"
        """Why no messages travel; empty while they do."""
        self.last_sign = self._loop.time()
        """When the last message came from the broker, in seconds of the event loop's clock."""
        self._since: float | None = self.last_sign
        self._was_up = False
        self._has_failed = False
        self._is_announced = False
        # The timer of a gap that will be reported, and since when messages are missing.
        self._missed: tuple[asyncio.TimerHandle, float] | None = None
        self._is_ended = False

    def announce(self) -> None:
        """Take note that `start` has returned. From now on trouble is logged, because no error tells of it."""
        self._is_announced = True
        if self.trouble:
            self._log()

    def up(self) -> None:
        """Take note that a link is in use. If there was trouble before, messages are missing."""
        since, self._since = self._since, None
        why, self.trouble = self.trouble, ""
        if self._was_up:
            self._counters.reconnects += 1
        if since is not None and (self._was_up or self._has_failed):
            self._tell(since, why)
        self._was_up = True

    def down(self, why: str, error: Exception) -> None:
        """Take note that the link is lost, or could not be opened."""
        lost = why
        if is_bug(error):
            why = f"{why}, which is not an outage but a wrong option, a driver that doesn't fit, or a bug"
        self._has_failed = True
        if self._since is None:
            self._since = self.last_sign
        if self._missed is not None:  # the missed messages and this outage are reported as one gap
            timer, since = self._missed
            timer.cancel()
            self._missed = None
            self._since = min(self._since, since)
        is_new, self.trouble = why != self.trouble, why
        if is_new and self._is_announced:
            self._log(error if is_bug(error) else None)
        self.echoes.fail(lost)
        self._outgoing.fail(f"the connection to the broker is lost ({lost})", self.trouble)

    def missed(self, why: str, since: float | None = None) -> None:
        """Take note that messages are missing although the link stays. Many calls become one gap, from the earliest."""
        if self._is_ended:
            return
        self._receiver.suspect()
        began = self.last_sign if since is None else since
        if self._missed is None:
            self._missed = (self._loop.call_later(self._missed_seconds, self._tell_missed, why), began)
        else:
            timer, earlier = self._missed
            self._missed = (timer, min(earlier, began))

    def _tell_missed(self, why: str) -> None:
        if self._missed is not None:
            (_, since), self._missed = self._missed, None
            self._tell(since, why)

    def refused(self, name: str, error: ConfigurationError) -> None:
        """Take note that the broker forbids this node to subscribe to a name.

        Raises:
            ConfigurationError: If it is the node's own name, without which nothing works.
        """
        if name == self.echoes.name:
            raise error
        logger.error("%s: %s", self._where, error, extra=about("engine.forbidden", engine=self._engine))

    async def probe(self) -> None:
        """Find out whether messages arrive: send an echo. Any other message that comes meanwhile will do.

        Raises:
            TimeoutError: If no message comes.
            EngineError: If the echo could not be sent.
        """
        began = self._loop.time()
        try:
            await self.echoes.send()
        except TimeoutError:
            if self.last_sign <= began:
                raise
        else:
            self._counters.round_trip_seconds.observe(self._loop.time() - began)

    async def health(self) -> Health:
        """Tell whether an echo comes back."""
        if self._outgoing.link is None:
            return Health(self._engine, False, self.trouble)
        try:
            await self.probe()
        except (TimeoutError, EngineError) as error:
            return Health(self._engine, False, str(error))
        return Health(self._engine, True)

    def end(self) -> None:
        """Report nothing from now on."""
        self._is_ended = True
        if self._missed is not None:
            self._missed[0].cancel()
        self.echoes.fail("stopped")

    def _log(self, bug: Exception | None = None) -> None:
        if bug is None:
            logger.warning(
                "%s is out of reach (%s); trying again until it is back",
                self._where,
                self.trouble,
                extra=about("engine.down", engine=self._engine),
            )
        else:
            logger.error(
                "%s can't be used (%s)",
                self._where,
                self.trouble,
                exc_info=bug,
                extra=about("engine.unusable", engine=self._engine),
            )

    def _tell(self, since: float, why: str) -> None:
        seconds = self._loop.time() - since
        self._counters.gaps += 1
        logger.warning(
            "%s: messages of the last %.1f s may be missing (%s)",
            self._where,
            seconds,
            why,
            extra=about("engine.gap", engine=self._engine, seconds=seconds),
        )
        self._receiver.gap(Gap(self._engine, seconds))
