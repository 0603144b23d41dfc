"""One connection: who it is, where it is subscribed, what it receives and what it is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from enum import Enum
from secrets import token_urlsafe
from typing import Any, Protocol, Self, TypeVar

from pydantic_core import from_json
from starlette.websockets import WebSocket

from wsbroadcast.audience import UNSET, Unset, UserId
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency.awaitable import AwaitableContext
from wsbroadcast.concurrency.loops import running_loop
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.engines.contract import Health
from wsbroadcast.exceptions import ConnectionClosed, LifecycleError
from wsbroadcast.message import Message
from wsbroadcast.options import ExpiresAt, unix_seconds
from wsbroadcast.signatures import no_dependency
from wsbroadcast.stats import Stats
from wsbroadcast.transports import SCOPE_KEY, STEPPED_ASIDE, Ended, Event, Transport, closed_error

F = TypeVar("F", bound=Callable[..., Any])

Headers = Iterable[tuple[bytes, bytes]]
"""Those of a response."""


class ConnectionState(Enum):
    """Where a connection stands in its life."""

    OPEN = "open"
    """Registered: it receives what its audiences are sent."""
    CLOSING = "closing"
    """Out of the registry; what was handed over before still goes out."""
    CLOSED = "closed"
    """At its end: the peer is gone or a close frame was sent."""


_TRANSITIONS = {
    ConnectionState.OPEN: {ConnectionState.CLOSING, ConnectionState.CLOSED},
    ConnectionState.CLOSING: {ConnectionState.CLOSED},
    ConnectionState.CLOSED: set[ConnectionState](),
}


class Manager(Protocol):
    """Everything public of the manager that a connection belongs to; see `ConnectionManager`.

    The class itself can't be named here: it is built from this module.
    """

    hooks: Any

    @property
    def connections(self) -> list[Connection]: ...  # noqa: D102
    @property
    def active_connections(self) -> list[WebSocket]: ...  # noqa: D102

    async def start(self) -> None: ...  # noqa: D102
    async def aclose(self) -> None: ...  # noqa: D102
    def lifespan(self, app: Any) -> AbstractAsyncContextManager[None]: ...  # noqa: D102
    def bind(self, app: Any) -> None: ...  # noqa: D102
    def stats(self) -> Stats: ...  # noqa: D102
    async def health(self) -> Health: ...  # noqa: D102

    def connect(  # noqa: D102
        self,
        websocket: WebSocket,
        *,
        user: UserId | None = None,
        channels: Iterable[str] = (),
        info: object = None,
        subprotocol: str | None = None,
        headers: Headers | None = None,
        expires_at: ExpiresAt = None,
    ) -> AwaitableContext[Connection]: ...
    def handshake(self, websocket: WebSocket) -> AbstractAsyncContextManager[None]: ...  # noqa: D102
    def disconnect(self, websocket: WebSocket | Connection) -> None: ...  # noqa: D102
    async def close(  # noqa: D102
        self, websocket: WebSocket | Connection, code: int = CloseCode.NORMAL, reason: str = ""
    ) -> None: ...
    async def disconnect_user(  # noqa: D102
        self, user: UserId, *, code: int = CloseCode.UNAUTHENTICATED, reason: str = "", exclude: Exclude = ()
    ) -> None: ...
    async def subscribe(self, connection: WebSocket | Connection, *channels: str) -> None: ...  # noqa: D102
    async def unsubscribe(self, connection: WebSocket | Connection, *channels: str) -> None: ...  # noqa: D102

    async def broadcast(  # noqa: D102
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
        transaction: object = None,
    ) -> None: ...
    async def broadcast_local(  # noqa: D102
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
    ) -> None: ...
    def broadcast_nowait(  # noqa: D102
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
    ) -> None: ...
    def broadcast_threadsafe(  # noqa: D102
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        exclude: Exclude = (),
        key: str | None = None,
    ) -> None: ...
    async def send(self, connection: WebSocket | Connection, message: object) -> None: ...  # noqa: D102
    async def send_personal_message(self, message: object, websocket: WebSocket | Connection) -> None: ...  # noqa: D102

    def on_connect(self, function: F) -> F: ...  # noqa: D102
    def on_disconnect(self, function: F) -> F: ...  # noqa: D102
    def on_message(self, function: F) -> F: ...  # noqa: D102
    def on_subscribe(self, function: F) -> F: ...  # noqa: D102
    def on_unsubscribe(self, function: F) -> F: ...  # noqa: D102
    def on_broadcast(self, function: F) -> F: ...  # noqa: D102
    def on_deliver(self, function: F) -> F: ...  # noqa: D102
    def on_gap(self, function: F) -> F: ...  # noqa: D102
    def on_error(self, function: F) -> F: ...  # noqa: D102


_NO_CHANNELS: frozenset[str] = frozenset()


@no_dependency("take a ConnectionDep")
class Connection:
    """One accepted WebSocket, as `ConnectionManager.connect` returns it.

    It takes over `websocket.send` and `websocket.receive`: what the app sends itself keeps its place among the
    broadcasts, and whichever way the app reads, the connection learns of the peer's end.

    Names with an underscore are for the node that keeps it.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_end",
        "_expiry",
        "_state",
        "_transport",
        "channels",
        "expires_at",
        "id",
        "inbound_full_at",
        "info",
        "sink",
        "user",
        "user_key",
    )

    def __init__(
        self, transport: Transport, *, user: object, user_key: str | None, channels: tuple[str, ...], info: object
    ) -> None:
        self.id = token_urlsafe(12)
        """Unique among all nodes."""
        self.user = user
        """Who is behind the connection, as it was given to `connect`."""
        self.user_key = user_key
        """The text a broadcast to this user is addressed to."""
        self.info: Any = info
        """Whatever the application wants to remember about the connection."""
        self.channels = frozenset(channels) if channels else _NO_CHANNELS
        """The channels it is subscribed to; after its end, those it was in. Change it through `subscribe`."""
        self.expires_at: float | None = None
        """When it ends unless it is renewed, in seconds since 1970; `None` for never."""
        self.sink: Sink = transport.sink
        """Where its messages go."""
        self.inbound_full_at: float | None = None
        """When the bucket of its peer's messages is full again, by the clock of the limits; `None` if nothing limits
        them."""
        self._state = ConnectionState.OPEN
        # The code and reason of its end, while there is one.
        self._end: tuple[int, str] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        # Made when somebody waits for the end.
        self._closed: asyncio.Event | None = None
        self._transport = transport
        transport.attach(self)

    # Where it belongs, and how it stands.

    @property
    def websocket(self) -> WebSocket:
        """The Starlette WebSocket."""
        return self._transport.websocket

    @property
    def manager(self) -> Manager:
        """The manager that keeps this connection."""
        manager: Manager = self._transport.keeper.manager
        return manager

    @property
    def state(self) -> ConnectionState:
        """Where the connection stands."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether it is registered and receives what its audiences are sent."""
        return self._state is ConnectionState.OPEN

    @property
    def close_code(self) -> int | None:
        """The code it ended with, `None` while it is open."""
        return None if self._end is None else self._end[0]

    @property
    def close_reason(self) -> str:
        """The reason that came with the code."""
        return "" if self._end is None else self._end[1]

    # What the application does with it.

    async def send(self, message: object) -> None:
        """Send a message to this connection only, after everything handed over before.

        Raises:
            ConnectionClosed: If the connection has ended.
            EncodeError: If the message can't be sent as text, bytes or JSON.
        """
        await self.manager.send(self, message)

    async def subscribe(self, *channels: str) -> None:
        """Subscribe to channels; every later broadcast to them, from any node, arrives.

        Raises:
            ConnectionClosed: If the connection has ended.
            InvalidChannel: If a name breaks a rule; then none of them is subscribed.
        """
        await self.manager.subscribe(self, *channels)

    async def unsubscribe(self, *channels: str) -> None:
        """Unsubscribe from channels; those it isn't in are passed over."""
        await self.manager.unsubscribe(self, *channels)

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what was handed over before, then close. Idempotent; never hangs on a peer that takes nothing."""
        await self.manager.close(self, code, reason)

    def renew(self, expires_at: ExpiresAt) -> None:
        """Let the connection live until another moment; at that moment it is closed with 4401.

        What waits for it then is not sent. The time of day is looked at once, here; the rest is a monotonic timer's,
        so a clock that is set later changes nothing.

        Args:
            expires_at: Seconds since 1970, or a datetime with a timezone; `None` for ever. One that has passed closes
                it in the next turn of the event loop.

        Raises:
            ConnectionClosed: If the connection has ended.
            LifecycleError: If called from a thread; nothing has changed then.
            ValueError: If it is not a valid time: a datetime without a timezone, NaN.
        """
        seconds = unix_seconds(expires_at)
        if not self.is_open:
            raise closed_error(self)
        loop = running_loop()
        if loop is None:
            raise LifecycleError("from a thread use `anyio.from_thread.run_sync(connection.renew, expires_at)`")
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self.expires_at = seconds
        if seconds is not None:
            delay = max(0.0, seconds - time.time())
            expire, context = self._transport.keeper.expire, self._transport.context
            self._expiry = loop.call_later(delay, expire, self, context=context)

    async def receive(self) -> str | bytes:
        """Wait for the next message of the peer: `str` for a text frame, `bytes` for a binary one.

        Raises:
            ConnectionClosed: If the peer is gone, or the connection was closed from here.
        """
        event = await self._transport.receive()
        if event["type"] == "websocket.disconnect":
            raise closed_error(self)
        text: str | None = event.get("text")  # hypercorn sends both keys, one of them None
        return event["bytes"] if text is None else text

    async def receive_text(self) -> str:
        """Wait for a text message; a binary one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        if isinstance(message, str):
            return message
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a text message")

    async def receive_bytes(self) -> bytes:
        """Wait for a binary message; a text one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        if isinstance(message, bytes):
            return message
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a binary message")

    async def receive_json(self) -> Any:
        """Wait for a message that holds JSON, text or binary; anything else closes this connection with 1007.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        try:
            value = from_json(message, allow_inf_nan=False)
            Message.json(value)  # which 1e999 can't: it is read as infinity
            return value
        except ValueError:  # broken, too deep, or too large a number
            raise await self._refusal(CloseCode.INVALID_DATA, "expected JSON") from None

    async def _refusal(self, code: int, reason: str) -> ConnectionClosed:
        # Close because of what the peer sent; the error is for the caller who wanted to read it.
        await self.close(code, reason)
        return ConnectionClosed(code, reason)

    def __aiter__(self) -> Self:
        """Iterate over the peer's messages until the connection ends; there is no exception to catch."""
        return self

    async def __anext__(self) -> str | bytes:
        try:
            return await self.receive()
        except ConnectionClosed:
            raise StopAsyncIteration from None

    async def wait_closed(self) -> None:
        """Wait for the connection's end, for an endpoint that only sends.

        Messages of the peer are read and thrown away, until another task begins to read: from then on reading, and so
        noticing the peer's end, is that task's.
        """
        event: Event | None = None
        while self._state is not ConnectionState.CLOSED:
            if self.is_open and not self._transport.is_read and event is not STEPPED_ASIDE:
                event = await self._transport.receive(throws_away=True)
                continue
            if self._closed is None:
                self._closed = asyncio.Event()
            await self._closed.wait()

    def __repr__(self) -> str:
        return f"<Connection {self.id} {self._state.value}>"

    # What the node does with it.

    def _enter(self, state: ConnectionState, code: int, reason: str = "") -> None:
        # Go on to another state, with the code and reason of the end; get those who read out of there.
        if state not in _TRANSITIONS[self._state]:
            raise RuntimeError(f"a connection doesn't go from {self._state.value} to {state.value}")
        self._state = state
        if self._end is None:
            self._end = code, reason
        is_closed = state is ConnectionState.CLOSED
        if is_closed and self._expiry is not None:  # until then what waits may still have to be thrown away
            self._expiry.cancel()
            self._expiry = None
        self._transport.interrupt()
        if is_closed and self._closed is not None:
            self._closed.set()


def find_connection(websocket: WebSocket | Connection, manager: object) -> Connection | None:
    """Find a manager's connection behind a WebSocket; `None` if it never had one, or its socket is gone."""
    found = find_known(websocket, manager)
    return found if isinstance(found, Connection) else None


def find_open(websocket: WebSocket | Connection, manager: object) -> Connection | None:
    """Find a manager's connection behind a WebSocket; `None` if it never had one.

    Raises:
        ConnectionClosed: If it has ended.
    """
    found = find_known(websocket, manager)
    if found is None or (isinstance(found, Connection) and found.is_open):
        return found
    raise closed_error(found)


def is_known(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket was connected before, to any manager."""
    return SCOPE_KEY in websocket.scope


def find_known(websocket: WebSocket | Connection, manager: object) -> Connection | Ended | None:
    """Find a manager's connection behind a WebSocket, or what is left of it."""
    found: Any = websocket if isinstance(websocket, Connection) else websocket.scope.get(SCOPE_KEY)
    while found is not None and found.manager is not manager:
        found = found._transport.previous if isinstance(found, Connection) else None
    known: Connection | Ended | None = found
    return known


Exclude = Connection | WebSocket | Iterable[Connection | WebSocket]
"""Who does not get a broadcast."""
