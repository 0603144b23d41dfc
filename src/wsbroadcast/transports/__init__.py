"""The ways in which a peer is connected, one in each file. Here is what a connection and its transport share."""

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
"""The key in a WebSocket's scope for its connection. A later wrapper of `websocket.send` doesn't hide it."""

SPEAKS = "wsbroadcast.speaks"
"""The key in a WebSocket's scope for the protocol that its client speaks, unless that is `plain`."""

SEEN_KEY = "wsbroadcast.seen_by"
"""The key in a WebSocket's scope for the manager that was last told to connect it, with success or not."""

STEPPED_ASIDE: Event = {"type": "wsbroadcast.stepped_aside"}
"""The event for a reader that throws messages away, when another task begins to read."""


class Owner(Protocol):
    """What a transport needs of its connection."""

    @property
    def is_open(self) -> bool:
        """Whether it is registered."""

    @property
    def close_code(self) -> int | None:
        """The close code; `None` while it is open."""

    @property
    def close_reason(self) -> str:
        """The close reason."""

    async def close(self, code: int, reason: str) -> None:
        """Send what was handed over before, then close."""

    async def wait_closed(self) -> None:
        """Wait for its end."""


class Keeper(Protocol):
    """Is told by a transport what happens to its connection. The membership of a node is one."""

    @property
    def manager(self) -> Any:
        """The manager of the connections."""

    @property
    def core(self) -> Any:
        """The operations that methods of connections call."""

    def lost(self, connection: Any, code: int, reason: str) -> None:
        """Take note that the peer is gone."""

    def evict(self, connection: Any, cause: str) -> None:
        """Take note that the peer doesn't take what it is sent."""

    def fall_back(self, connection: Any, audience: Audience, offset: int) -> bool:
        """Take note that a connection has no room after an offset; return whether it is sent the rest later."""

    def expiring(self, connection: Any, expires_at: float, seconds: float) -> None:
        """Take note that a connection expires in so many seconds, unless it is renewed."""

    def expire(self, connection: Any) -> None:
        """Take note that a connection has expired, and wasn't renewed."""

    def before_app_send(self) -> None:
        """Take note that the app is about to send something itself."""

    def app_closes(self, connection: Any, code: int, reason: str) -> None:
        """Take note that the app is about to close the WebSocket itself."""

    def app_closed(self, connection: Any) -> None:
        """Take note that the app's own close is out, or has failed."""

    def is_closing(self, connection: Any) -> bool:
        """Tell whether the connection is being closed by the library, or was closed by it."""

    def observe_message(self, connection: Any, message: str | bytes) -> Awaitable[None] | None:
        """Return what to await before the endpoint gets a message; `None` if there is nothing.

        Raises:
            LimitExceeded: If the message goes past a limit.
        """

    def observe_again(self, connection: Any, message: str | bytes) -> Awaitable[None]:
        """Return what to await before the endpoint gets a message whose hooks were cancelled. Limits don't count it."""


class Transport(Protocol):
    """What a connection needs of the way in which its peer is connected."""

    keeper: Keeper
    """Is told what happens."""
    sink: Sink
    """Takes the messages."""
    websocket: WebSocket
    """The WebSocket of the endpoint."""
    context: Context
    """The context variables of the call that connected it. Later work for the connection sees a copy."""
    fast_path_refused: str
    """Why the connection isn't on the fast path; empty if it is."""
    previous: object
    """The connection that the WebSocket had before, of another manager; `None` if it had none."""

    @property
    def is_read(self) -> bool:
        """Whether a task waits for a message of the peer now."""

    def attach(self, owner: Owner) -> None:
        """Take over the WebSocket: from now on all that the endpoint does goes through here."""

    async def receive(self, *, throws_away: bool = False) -> Event:
        """Return the next event of the peer, or a disconnect event. If the call is cancelled, nothing is lost.

        Args:
            throws_away: Whether the caller only waits for the end, and stops as soon as another task reads.
        """

    def interrupt(self) -> None:
        """Make all tasks come out of `receive`, because the connection has ended."""

    def give_back(self) -> None:
        """Give the WebSocket back, unless something waits to be written."""

    def let_go(self) -> None:
        """Drop all references to the connection, because the socket is gone."""


class Ended:
    """Replaces a connection when its socket is gone. It has the code and reason, and no reference to the rest.

    Without it, the WebSocket, its scope and the connection would hold each other until the garbage collector comes.
    """

    __slots__ = ("close_code", "close_reason", "manager")

    is_open = False
    context = Context()

    def __init__(self, manager: object, owner: Owner) -> None:
        self.manager = manager
        """The manager of the connection."""
        self.close_code, self.close_reason = end_of(owner)
        """The close code and reason."""

    async def close(self, code: int, reason: str) -> None:
        """Do nothing: it is closed already."""

    async def wait_closed(self) -> None:
        """Return at once: it is closed already."""

    # For its sink.

    def lost(self, code: int, reason: str) -> None:
        """Do nothing: it is closed already."""

    def evict(self, cause: str) -> None:
        """Do nothing: it is closed already."""

    def fall_back(self, place: Place) -> bool:
        """Return false: it is closed already."""
        return False

    async def app_send(self, event: Event) -> None:
        """Send nothing any more."""

    # For the endpoint.

    async def send(self, event: Event) -> None:
        """Raise an error, except for a close event."""
        if event["type"] != "websocket.close":
            raise closed_error(self)

    async def receive(self) -> Event:
        """Return a disconnect event."""
        return disconnect_event(self)

    async def refuse(self, code: int, reason: str) -> ConnectionClosed:
        """Return the error: it is closed already."""
        return closed_error(self)


def end_of(owner: Owner) -> tuple[int, str]:
    """Return the close code and reason of a connection."""
    return ABNORMAL if owner.close_code is None else owner.close_code, owner.close_reason


def closed_error(owner: Owner) -> ConnectionClosed:
    """Make the error for using a connection after its end."""
    return ConnectionClosed(*end_of(owner))


def disconnect_event(owner: Owner) -> Event:
    """Make the event that says that a connection has ended."""
    code, reason = end_of(owner)
    return {"type": "websocket.disconnect", "code": code, "reason": reason}
