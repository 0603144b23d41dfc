"""The door of a node: who is let in, how the others are refused, and what those inside may do."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.websockets import WebSocket

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import LimitExceeded, PermissionDenied
from wsbroadcast.node.quotas import PER_USER, REFUSALS, Admission, Breaches, Inbound, Place, address_of
from wsbroadcast.options import Limits
from wsbroadcast.stats import Counters
from wsbroadcast.transports.refusal import refuse

EXPIRED = "it has expired"
"""What a client is told when `expires_at` has come."""

# Where in its scope a handshake has the places that are held for it until it is connected, one for each admission.
_PLACES_KEY = "wsbroadcast.places"


class Door:
    """Applies `Limits` to WebSockets. A place is taken in one step, before anything is awaited."""

    def __init__(self, limits: Limits, counters: Counters) -> None:
        breaches = Breaches(counters)
        self.admission = Admission(limits, breaches)
        """The places that are taken."""
        self.check_channels = self.admission.check_channels
        """Raises `LimitExceeded` for too many channels of one connection."""
        self.inbound = Inbound(limits, breaches)
        """How fast messages may come."""
        self.check_message = self.inbound.check
        """Raises `LimitExceeded` for a message that is too large, or one too many."""

    async def admit(
        self, websocket: WebSocket, user: str | None, channels: tuple[str, ...], expires_at: float | None
    ) -> Place:
        """Take a place for a WebSocket that is about to be accepted, or refuse it.

        Raises:
            LimitExceeded: If there is none, or the channels are too many; it has its answer.
            PermissionDenied: If it has expired; it has its answer.
        """
        place = self._take_over(websocket) or await self._take_place(websocket)
        try:
            place.take(PER_USER, user)
            self.check_channels(len(channels), websocket.scope.get("client"))
            if expires_at is not None and expires_at <= time.time():
                raise PermissionDenied(EXPIRED)
        except LimitExceeded as error:
            place.release()
            await _refuse(websocket, error)
            raise
        except PermissionDenied:
            place.release()
            await refuse(websocket, 401, CloseCode.UNAUTHENTICATED, EXPIRED)
            raise
        return place

    @asynccontextmanager
    async def handshake(self, websocket: WebSocket) -> AsyncGenerator[None]:
        """Hold a place for a handshake; `admit` takes it over. Inside another such block it is the same place.

        Raises:
            LimitExceeded: If there is none; it has its answer.
        """
        places: dict[Admission, Place] = websocket.scope.setdefault(_PLACES_KEY, {})
        if self.admission in places:
            yield
            return
        place = places[self.admission] = await self._take_place(websocket)
        try:
            yield
        finally:
            if places.get(self.admission) is place:  # else it is a connection's now
                del places[self.admission]
                place.release()

    def _take_over(self, websocket: WebSocket) -> Place | None:
        places: dict[Admission, Place] = websocket.scope.get(_PLACES_KEY, {})
        return places.pop(self.admission, None)

    async def _take_place(self, websocket: WebSocket) -> Place:
        try:
            return self.admission.admit(address_of(websocket.scope) if self.admission.needs_address else None)
        except LimitExceeded as error:
            await _refuse(websocket, error)
            raise


async def _refuse(websocket: WebSocket, error: LimitExceeded) -> None:
    await refuse(websocket, REFUSALS[error.limit].status, error.code, error.reason)
