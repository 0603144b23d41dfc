"""Since when messages may be missing, and telling it once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.link import Parcel
from wsbroadcast.engines.broker.outgoing import Outbox
from wsbroadcast.exceptions import EngineUnavailable, WSBroadcastError
from wsbroadcast.logs import logger
from wsbroadcast.stats import EngineCounters

# Messages that are missed while the link lives on are reported as one gap, this long after the first.
_MISSED_SECONDS = 1.0


# What neither a broker nor the way to it raises, nor a driver about them.
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
    """Tell whether an error is no outage: a driver or an option that doesn't fit, or a bug. Trying again mends none."""
    return isinstance(error, _BUGS) and not isinstance(error, WSBroadcastError)


class Outages:
    """One gap for each outage, whatever it was.

    Args:
        where: The engine and its broker's address, for logs.
        counters: Where reconnects and gaps are counted.
        report: Called with the seconds for which messages may be missing.
    """

    def __init__(self, where: str, counters: EngineCounters, report: Callable[[float], None]) -> None:
        self._where = where
        self._counters = counters
        self._report = report
        self._loop = asyncio.get_running_loop()
        self.trouble = "not connected yet"
        """Why nothing travels; empty while it does."""
        self.last_sign = self._loop.time()
        """When the last message came from the broker."""
        self._since: float | None = self.last_sign
        self._was_up = False
        self._has_failed = False
        self._is_announced = False
        # The timer of a gap that is about to be reported, and since when messages are missing.
        self._missed: tuple[asyncio.TimerHandle, float] | None = None
        self._is_ended = False

    def announce(self) -> None:
        """The engine has started, degraded perhaps: from now on trouble is logged, because no error tells of it."""
        self._is_announced = True
        if self.trouble:
            self._log()

    def up(self) -> None:
        """The link is in use: if there was trouble before, messages are missing."""
        since, self._since = self._since, None
        why, self.trouble = self.trouble, ""
        if self._was_up:
            self._counters.reconnects += 1
        if since is not None and (self._was_up or self._has_failed):
            self._tell(since, why)
        self._was_up = True

    def down(self, why: str, error: Exception | None = None) -> None:
        """The link is lost, or could not be opened; because of an error, if there is one to look at."""
        if is_bug(error):
            why = f"{why}, which is no outage but a wrong option, a driver that doesn't fit, or a bug"
        self._has_failed = True
        if self._since is None:
            self._since = self.last_sign
        if self._missed is not None:  # one gap for both
            timer, since = self._missed
            timer.cancel()
            self._missed = None
            self._since = min(self._since, since)
        is_new, self.trouble = why != self.trouble, why
        if is_new and self._is_announced:
            self._log(error if is_bug(error) else None)

    def missed(self, why: str, since: float | None = None) -> None:
        """Messages are missing although the link lives on; many such calls are one gap, from the earliest on."""
        if self._is_ended:
            return
        began = self.last_sign if since is None else since
        if self._missed is None:
            self._missed = (self._loop.call_later(_MISSED_SECONDS, self._tell_missed, why), began)
        else:
            timer, earlier = self._missed
            self._missed = (timer, min(earlier, began))

    def _tell_missed(self, why: str) -> None:
        if self._missed is not None:
            (_, since), self._missed = self._missed, None
            self._tell(since, why)

    def end(self) -> None:
        """Report nothing any more."""
        self._is_ended = True
        if self._missed is not None:
            self._missed[0].cancel()

    def _log(self, bug: Exception | None = None) -> None:
        if bug is None:
            logger.warning("%s is out of reach (%s); trying again until it is back", self._where, self.trouble)
        else:
            logger.error("%s can't be used (%s)", self._where, self.trouble, exc_info=bug)

    def _tell(self, since: float, why: str) -> None:
        seconds = self._loop.time() - since
        self._counters.gaps += 1
        logger.warning("%s: messages of the last %.1f s may be missing (%s)", self._where, seconds, why)
        self._report(seconds)


# Messages of a node to itself, which show that others arrive too.


# More than the number of any echo has; the bytes of others may be long.
_MAX_DIGITS = 18


class Echoes:
    """Sends them, and recognises them when they are back.

    Args:
        name: The node's own name at the broker.
        outbox: The way there.
        timeout: Seconds after which one counts as lost.
    """

    def __init__(self, name: str, outbox: Outbox, timeout: float) -> None:
        self.name = name
        """The name under which they come back."""
        self._outbox = outbox
        self._timeout = timeout
        self._sent = 0
        self._awaited: dict[bytes, asyncio.Future[None]] = {}

    async def send(self) -> None:
        """Send one through the broker and wait until it is back.

        Raises:
            TimeoutError: If it isn't back in time.
            EngineError: If it could not be sent.
        """
        self._sent += 1
        token = b"%d" % self._sent
        echo = self._awaited[token] = asyncio.get_running_loop().create_future()
        try:
            async with Patience(self._timeout):
                await self._outbox.put_first(Parcel(self.name, token))
                await echo
        finally:
            self._awaited.pop(token, None)

    def take(self, envelope: bytes) -> bool:
        """Take what came under our name; return whether it is one of ours, be it late."""
        echo = self._awaited.pop(envelope, None)
        if echo is None:
            return self._was_sent(envelope)
        if not echo.done():
            echo.set_result(None)
        return True

    def _was_sent(self, envelope: bytes) -> bool:
        # By its number: to remember each one that nobody waits for any more would want an end for those that are lost.
        number = int(envelope) if envelope.isdigit() and len(envelope) <= _MAX_DIGITS else 0
        return 0 < number <= self._sent and envelope == b"%d" % number

    def fail(self, why: str) -> None:
        """None of them will come back."""
        for echo in self._awaited.values():
            if not echo.done():
                echo.set_exception(EngineUnavailable(f"the connection to the broker is lost ({why})"))
                echo.exception()  # looked at: who waits may be cancelled in this turn of the loop
        self._awaited.clear()
