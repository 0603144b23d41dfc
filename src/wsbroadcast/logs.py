"""The logger of the package, and what keeps floods out of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

logger = logging.getLogger("wsbroadcast")


def about(event: str, **fields: object) -> dict[str, object]:
    """Return what a log record says beside its text, as its `extra`: the event's name, which stays, and its fields.

    No field holds what a client has sent: no message, no query, no token, no user's name. docs/logs.md has them all.
    """
    return {"event": event, **fields}


Clock = Callable[[], float]
"""Seconds of a clock that only goes forward."""

# What happens again and again is logged once in so many seconds.
_LOG_SECONDS = 60.0


class Throttle:
    """Lets a flood into the log once a minute."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._quiet_until: dict[str, float] = {}

    def is_due(self, subject: str) -> bool:
        """Tell whether to log now, and if so not again for a minute. Subjects are ours, never a client's."""
        now = self._clock()
        if now < self._quiet_until.get(subject, now):
            return False
        self._quiet_until[subject] = now + _LOG_SECONDS
        return True
