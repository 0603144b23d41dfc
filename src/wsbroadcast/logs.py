"""The logger of the package, and what keeps the log short."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

logger = logging.getLogger("wsbroadcast")


def about(event: str, **fields: object) -> dict[str, object]:
    """Return the `extra` of a log record: the name of the event, which stays when its text is improved, and its fields.

    No field holds what a client has sent: no message, query or token, no user's name. docs/logs.md lists all events.
    """
    return {"event": event, **fields}


Clock = Callable[[], float]
"""Returns the seconds of a clock that only goes forward."""

# Something that happens again and again is logged once in so many seconds.
_LOG_SECONDS = 60.0


class Throttle:
    """Lets each subject into the log once a minute."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._quiet_until: dict[str, float] = {}

    def is_due(self, subject: str) -> bool:
        """Tell whether to log now. If so, it is not due again for a minute. No client may choose the subject."""
        now = self._clock()
        if now < self._quiet_until.get(subject, now):
            return False
        self._quiet_until[subject] = now + _LOG_SECONDS
        return True
