"""Messages of a node to itself, which show that others arrive too."""

from __future__ import annotations

import asyncio

from wsbroadcast.engines.link import Parcel
from wsbroadcast.engines.outbox import Outbox
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.loops import Patience

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
