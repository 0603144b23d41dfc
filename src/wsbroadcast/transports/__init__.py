"""How a peer is connected: one file for each way. Here is what a connection and its transport know of each other."""

from __future__ import annotations

from collections.abc import Awaitable, MutableMapping
from contextvars import Context
from typing import Any, Protocol

from starlette.websockets import WebSocket

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.delivery.backlog import Place
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.exceptions import ConnectionClosed

Event = MutableMapping[str, Any]
"""An ASGI event."""

SCOPE_KEY = "wsbroadcast.connection"
"""Where in its scope a WebSocket's connection stands, so that a later wrapper of `websocket.send` doesn't hide it."""

SEEN_KEY = "wsbroadcast.seen_by"
"""Where in its scope the manager stands that was told to connect a WebSocket last, whatever came of it."""

STEPPED_ASIDE: Event = {"type": "wsbroadcast.stepped_aside"}
"""What a reader that throws messages away gets when another task begins to read."""


class Owner(Protocol):
    """What a transport knows of the connection that it belongs to."""

    @property
    def is_open(self) -> bool:
        """Whether it is registered."""

    @property
    def close_code(self) -> int | None:
        """The code it ended with, `None` while it is open."""

    @property
    def close_reason(self) -> str:
        """The reason that came with the code."""

    async def close(self, code: int, reason: str) -> None:
        """Send what was handed over before, then close."""

    async def wait_closed(self) -> None:
        """Wait for its end."""


class Keeper(Protocol):
    """Whom a transport tells what happens to its connection. The membership of a node is one."""

    @property
    def manager(self) -> Any:
        """The manager whose connections it keeps."""

    @property
    def core(self) -> Any:
        """Does what a connection is told to do."""

    def lost(self, connection: Any, code: int, reason: str) -> None:
        """The peer is gone."""

    def evict(self, connection: Any, cause: str) -> None:
        """The peer doesn't take what it is sent."""

    def fall_back(self, connection: Any, audience: Audience, offset: int) -> bool:
        """A connection has no room for what comes after a place; return whether it is sent that when it has."""

    def expiring(self, connection: Any, expires_at: float, seconds: float) -> None:
        """A connection ends in so many seconds, unless it is renewed."""

    def expire(self, connection: Any) -> None:
        """The moment has come at which the connection had to be renewed."""

    def before_app_send(self) -> None:
        """The app is about to send something itself."""

    def app_closes(self, connection: Any, code: int, reason: str) -> None:
        """The app is about to close the socket itself."""

    def app_closed(self, connection: Any) -> None:
        """The app's own close is out, or has failed."""

    def is_closing(self, connection: Any) -> bool:
        """Tell whether we are closing the connection, or have closed it."""

    def observe_message(self, connection: Any, message: str | bytes) -> Awaitable[None] | None:
        """Return what to await before the endpoint gets a message, or `None` if there is nothing.

        Raises:
            LimitExceeded: If the message goes past a limit.
        """

    def observe_again(self, connection: Any, message: str | bytes) -> Awaitable[None]:
        """Return what to await before the endpoint gets a message whose hooks were cancelled; no limit counts it."""


class Transport(Protocol):
    """What a connection needs of the way in which its peer is connected."""

    keeper: Keeper
    """Who is told what happens."""
    sink: Sink
    """Where messages go."""
    websocket: WebSocket
    """What the endpoint was given."""
    context: Context
    """The context variables of the call that connected it; what is done about the connection later sees a copy."""
    fast_path_refused: str
    """Why the sink is not the fast one; empty if it is."""
    previous: object
    """The connection that the WebSocket had before, of another manager."""

    @property
    def is_read(self) -> bool:
        """Whether somebody waits for a message of the peer now."""

    def attach(self, owner: Owner) -> None:
        """Begin: from now on what the endpoint does goes through here."""

    async def receive(self, *, throws_away: bool = False) -> Event:
        """Return the next event of the peer, or that it is disconnected. A read that is cancelled loses nothing.

        Args:
            throws_away: Whether the caller only waits for the end, and steps aside as soon as another task reads.
        """

    def interrupt(self) -> None:
        """Get everybody out of `receive`: the connection has ended."""

    def give_back(self) -> None:
        """Undo the taking over, unless something waits to be written."""

    def let_go(self) -> None:
        """The socket is gone: hold nothing any more that holds the connection."""


class Ended:
    """What is left of a connection when its socket is gone: its code and reason, and nothing that holds the rest.

    Without it, the WebSocket, its scope and the connection would hold each other until the garbage collector comes.
    """

    __slots__ = ("close_code", "close_reason", "manager")

    is_open = False
    context = Context()

    def __init__(self, manager: object, owner: Owner) -> None:
        self.manager = manager
        """Whose connection it was."""
        self.close_code, self.close_reason = end_of(owner)
        """The code and reason it ended with."""

    async def close(self, code: int, reason: str) -> None:
        """It is closed already."""

    async def wait_closed(self) -> None:
        """It is closed already."""

    # What its sink may still say.

    def lost(self, code: int, reason: str) -> None:
        """It is known already."""

    def evict(self, cause: str) -> None:
        """It is closed already."""

    def fall_back(self, place: Place) -> bool:
        """It is closed already."""
        return False

    async def app_send(self, event: Event) -> None:
        """Nothing goes out any more."""

    # What the endpoint may still do with the WebSocket.

    async def send(self, event: Event) -> None:
        """Raise; a close has nothing to complain about."""
        if event["type"] != "websocket.close":
            raise closed_error(self)

    async def receive(self) -> Event:
        """Say that it is disconnected."""
        return disconnect_event(self)

    async def refuse(self, code: int, reason: str) -> ConnectionClosed:
        """It is closed already."""
        return closed_error(self)


def end_of(owner: Owner) -> tuple[int, str]:
    """Return the code and reason with which a connection ended."""
    return ABNORMAL if owner.close_code is None else owner.close_code, owner.close_reason


def closed_error(owner: Owner) -> ConnectionClosed:
    """Make the error for using a connection after its end."""
    return ConnectionClosed(*end_of(owner))


def disconnect_event(owner: Owner) -> Event:
    """Make the event that says that a connection has ended."""
    code, reason = end_of(owner)
    return {"type": "websocket.disconnect", "code": code, "reason": reason}
