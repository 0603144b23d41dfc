"""Since when messages may be missing, and telling it once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from wsbroadcast.counters import EngineCounters
from wsbroadcast.exceptions import WSBroadcastError

logger = logging.getLogger("wsbroadcast")

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
