"""One accepted WebSocket: who it is, where it is subscribed, what it receives and what it is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, MutableMapping
from enum import Enum
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.admission import Place
from wsbroadcast.close_codes import ABNORMAL, CloseCode, cut_reason, fallback_codes, is_sendable
from wsbroadcast.delivery.sink import Event, Sink
from wsbroadcast.delivery.uvicorn import SERVER_RECEIVE, UvicornSink, find_protocol, find_transport
from wsbroadcast.delivery.watch import Watch
from wsbroadcast.exceptions import ConnectionClosed, LimitExceeded
from wsbroadcast.expiry import ExpiresAt, unix_seconds
from wsbroadcast.reading import Reading
from wsbroadcast.receiving import Receiving
from wsbroadcast.signatures import no_dependency

if TYPE_CHECKING:
    from wsbroadcast.manager import ConnectionManager  # what users reach from a connection; no import at run time


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


class Keeper(Protocol):
    """What a connection needs of the membership that keeps it."""

    def lost(self, connection: Connection, code: int, reason: str) -> None: ...  # noqa: D102
    def evict(self, connection: Connection, cause: str) -> None: ...  # noqa: D102
    def expire(self, connection: Connection) -> None: ...  # noqa: D102
    def leave(self, connection: Connection, code: int, reason: str, state: ConnectionState) -> bool: ...  # noqa: D102
    def see_off(self, connection: Connection) -> None: ...  # noqa: D102
    def before_app_send(self) -> None: ...  # noqa: D102
    def observe_message(self, connection: Connection, message: str | bytes) -> Awaitable[None] | None: ...  # noqa: D102


# Where in its scope a WebSocket's connection stands; whoever wraps `websocket.send` later doesn't hide it there.
_SCOPE_KEY = "wsbroadcast.connection"

_NO_CHANNELS: frozenset[str] = frozenset()


@no_dependency("take a ConnectionDep")
class Connection(Receiving):
    """One accepted WebSocket, as `ConnectionManager.connect` returns it.

    It takes over `websocket.send` and `websocket.receive`: what the app sends itself keeps its place among the
    broadcasts, and whoever reads, the connection learns of the peer's end.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_expiry",
        "_found",
        "_keeper",
        "_reading",
        "_state",
        "channels",
        "close_code",
        "close_reason",
        "closing",
        "expires_at",
        "fast_path_refused",
        "hooks_running",
        "id",
        "inbound_full_at",
        "info",
        "manager",
        "place",
        "previous",
        "sink",
        "user",
        "user_key",
        "websocket",
    )

    def __init__(
        self,
        websocket: WebSocket,
        manager: ConnectionManager,
        keeper: Keeper,
        watch: Watch,
        place: Place,
        *,
        user: object,
        user_key: str | None,
        channels: tuple[str, ...],
        info: object,
    ) -> None:
        self.id = token_urlsafe(12)
        """Unique among all nodes."""
        self.websocket = websocket
        """The Starlette WebSocket."""
        self.manager = manager
        """The manager that keeps this connection."""
        self.user = user
        """Who is behind the connection, as it was given to `connect`."""
        self.user_key = user_key
        """The text a broadcast to this user is addressed to."""
        self.info: Any = info
        """Whatever the application wants to remember about the connection."""
        self.channels = frozenset(channels) if channels else _NO_CHANNELS
        """The channels it is subscribed to; after its end, those it was in. Change it through `subscribe`."""
        self.close_code: int | None = None
        """The code it ended with, `None` while it is open."""
        self.close_reason = ""
        """The reason that came with the code."""
        self.hooks_running = 0
        """Hooks that are told of its coming now; those that are told of its going wait for them."""
        self.expires_at: float | None = None
        """When it ends unless it is renewed, in seconds since 1970; `None` for never."""
        self.inbound_full_at = 0.0
        """What the pace of the peer's messages is measured by (see `Inbound`)."""
        self._expiry: asyncio.TimerHandle | None = None
        self.place = place
        """Given back when the socket is no longer there, and not before."""
        self._keeper = keeper
        self._state = ConnectionState.OPEN
        # Made when somebody waits for the end.
        self._closed: asyncio.Event | None = None
        # Who is inside `receive`, to be interrupted when the connection ends by our side.
        self._reading: Reading | None = None
        self.closing: asyncio.Task[None] | None = None
        """The task that sends the close frame, once there is one."""
        # The `send` and `receive` that were there, if they were not simply the WebSocket's own methods.
        self._found = None if _is_untouched(websocket) else (websocket.send, websocket.receive)
        self.previous: Connection | None = websocket.scope.get(_SCOPE_KEY)
        """The connection that the WebSocket had before, of another manager."""
        websocket.scope[_SCOPE_KEY] = self
        self.sink, self.fast_path_refused = _make_sink(self, websocket, watch)
        websocket.send = self._send_for_app  # type: ignore[method-assign]  # one owner of what a socket is sent
        websocket.receive = self._receive_for_app  # type: ignore[method-assign]  # every end is noticed

    # What the application uses.

    @property
    def state(self) -> ConnectionState:
        """Where the connection stands."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether it is registered and receives what its audiences are sent."""
        return self._state is ConnectionState.OPEN

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
            ValueError: If it is no moment: a datetime without a timezone, NaN.
        """
        seconds = unix_seconds(expires_at)
        if not self.is_open:
            raise self.closed_error()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self.expires_at = seconds
        if seconds is not None:
            delay = max(0.0, seconds - time.time())
            self._expiry = asyncio.get_running_loop().call_later(delay, self._keeper.expire, self)

    async def receive(self) -> str | bytes:
        """Wait for the next message of the peer: `str` for a text frame, `bytes` for a binary one.

        Raises:
            ConnectionClosed: If the peer is gone, or the connection was closed from here.
        """
        event = await self._receive_for_app()
        if event["type"] == "websocket.disconnect":
            raise self.closed_error()
        text: str | None = event.get("text")  # hypercorn sends both keys, one of them None
        return event["bytes"] if text is None else text

    async def wait_closed(self) -> None:
        """Wait for the connection's end, for an endpoint that only sends.

        Messages of the peer are read and thrown away, until another task begins to read: from then on reading, and so
        noticing the peer's end, is that task's.
        """
        event: MutableMapping[str, Any] | None = None
        while self._state is not ConnectionState.CLOSED:
            if self._reading is None and self._state is ConnectionState.OPEN and event is not _STEPPED_ASIDE:
                event = await self._receive_for_app(throws_away=True)
            else:
                await self._wait_closed()

    def __repr__(self) -> str:
        return f"<Connection {self.id} {self._state.value}>"

    # What the membership and the sink use.

    def enter(self, state: ConnectionState, code: int, reason: str = "") -> None:
        """Go on to another state, with the code and reason of the end; interrupt who is reading.

        Raises:
            RuntimeError: If the state can't follow the present one.
        """
        if state not in _TRANSITIONS[self._state]:
            raise RuntimeError(f"a connection doesn't go from {self._state.value} to {state.value}")
        self._state = state
        if self.close_code is None:
            self.close_code = code
            self.close_reason = reason
        if state is ConnectionState.CLOSED and self._expiry is not None:  # until then what waits is not sent after it
            self._expiry.cancel()
            self._expiry = None
        if state is ConnectionState.CLOSED and not self.sink.is_ended:
            self.place.release()  # `disconnect`: what becomes of the socket is the app's affair; else see `see_off`
        if self._reading is not None:
            self._reading.interrupt()  # now: granian sends no close frame while the app is inside `receive`
        if state is ConnectionState.CLOSED and self._closed is not None:
            self._closed.set()

    def lost(self, code: int, reason: str) -> None:
        """The sink or the reader found the peer gone."""
        self._keeper.lost(self, code, reason)

    def evict(self, cause: str) -> None:
        """The sink found that the peer doesn't take what it is sent."""
        self._keeper.evict(self, cause)

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        """Send an event of the app the way it would have gone without this connection."""
        code = event.get("code") if event["type"] == "websocket.close" else None
        try:
            if code is None or not is_sendable(code):
                await self._pass_on(event)
            else:
                await self._pass_close_on(event, code)
        except WebSocketDisconnect:
            # Starlette now counts the app's side as closed, and a later `receive_text` would raise RuntimeError, which
            # no endpoint catches. Its `receive` goes on to the disconnect instead.
            self.websocket.application_state = WebSocketState.CONNECTED
            raise

    def _pass_on(self, event: MutableMapping[str, Any]) -> Awaitable[None]:
        return type(self.websocket).send(self.websocket, event) if self._found is None else self._found[0](event)

    async def _pass_close_on(self, event: MutableMapping[str, Any], code: int) -> None:
        *codes, last = fallback_codes(code)
        for each in codes:
            try:
                return await self._pass_on({**event, "code": each})
            except (OSError, RuntimeError, WebSocketDisconnect):
                raise
            except Exception:  # what daphne says of a code it doesn't take
                self.websocket.application_state = WebSocketState.CONNECTED
        await self._pass_on({**event, "code": last})

    def give_back(self) -> None:
        """Undo the taking over, before the WebSocket is connected anew; not while something waits to be written."""
        if self.sink.backlog is None and getattr(self.websocket.send, "__self__", None) is self:
            if self._found is None:
                del self.websocket.send, self.websocket.receive  # its own methods show again
            else:
                self.websocket.send, self.websocket.receive = self._found
            self.websocket.scope[_SCOPE_KEY] = self.previous

    # What `websocket.send` and `websocket.receive` are while the connection lives.

    async def _send_for_app(self, message: MutableMapping[str, Any]) -> None:
        self._keeper.before_app_send()
        event: Event = message
        if event["type"] == "websocket.close":
            if self.sink.is_ended:
                return  # closed already: nothing to complain about
            event = {**event, "reason": cut_reason(event.get("reason") or "")}
            self._keeper.leave(self, event.get("code", CloseCode.NORMAL), event["reason"], ConnectionState.CLOSING)
        elif self.sink.is_ended:
            raise self.closed_error()
        try:
            await self.sink.send_event(event)
        except WebSocketDisconnect as error:
            if self.closing is None:  # else it was thrown away for a close, and cancelling a write would spoil that
                self.lost(error.code, error.reason)
            raise
        finally:
            if event["type"] == "websocket.close":
                if self._state is ConnectionState.CLOSING:
                    self.enter(ConnectionState.CLOSED, CloseCode.NORMAL)
                self._keeper.see_off(self)

    async def _receive_for_app(self, *, throws_away: bool = False) -> MutableMapping[str, Any]:
        if self._is_over:
            await self._wait_closed()
            return self._disconnect_event()
        if self._reading is not None and self._reading.throws_away:
            self._reading.interrupt()
        reading = self._reading = Reading(throws_away)
        try:
            event = await self._app_receive()
        except asyncio.CancelledError:
            if not reading.take_back():
                raise
            if not self.is_open:
                await self._wait_closed()  # an endpoint that ends earlier makes the server cut off the close frame
            return _STEPPED_ASIDE if self.is_open else self._disconnect_event()
        except (OSError, RuntimeError):
            # Servers and Starlette have a dozen ways of saying that a disconnect was already received.
            event = self._disconnect_event()
        finally:
            reading.finish()
            if self._reading is reading:
                self._reading = None
        if event["type"] == "websocket.disconnect":
            self.lost(event.get("code") or ABNORMAL, event.get("reason") or "")
        elif self.is_open:  # else it is another connection's to observe, or nobody's
            text = event.get("text")
            try:
                observed = self._keeper.observe_message(self, event["bytes"] if text is None else text)
            except LimitExceeded as error:
                self.sink.hangs_up = True
                await self.close(error.code, error.reason)
                return self._disconnect_event()
            if observed is not None:
                await observed
                if self._is_over:
                    return self._disconnect_event()
        return event

    @property
    def _is_over(self) -> bool:
        # Nobody hears any more what the peer says, although the close frame may still have to wait for its turn.
        return self.sink.is_ended and not self.is_open

    def _app_receive(self) -> Awaitable[MutableMapping[str, Any]]:
        # Not a coroutine of its own: one frame less for each connection that waits here.
        return type(self.websocket).receive(self.websocket) if self._found is None else self._found[1]()

    async def _wait_closed(self) -> None:
        if self._state is ConnectionState.CLOSED:
            return
        if self._closed is None:
            self._closed = asyncio.Event()
        await self._closed.wait()

    def _disconnect_event(self) -> MutableMapping[str, Any]:
        code = ABNORMAL if self.close_code is None else self.close_code
        return {"type": "websocket.disconnect", "code": code, "reason": self.close_reason}

    def closed_error(self) -> ConnectionClosed:
        """Make the error for using the connection after its end."""
        return ConnectionClosed(ABNORMAL if self.close_code is None else self.close_code, self.close_reason)


# What `wait_closed` gets when another task begins to read.
_STEPPED_ASIDE: MutableMapping[str, Any] = {"type": "wsbroadcast.stepped_aside"}


def find_connection(websocket: WebSocket | Connection, manager: ConnectionManager) -> Connection | None:
    """Find a manager's connection behind a WebSocket; `None` if it never had one."""
    connection = websocket if isinstance(websocket, Connection) else websocket.scope.get(_SCOPE_KEY)
    while connection is not None and connection.manager is not manager:
        connection = connection.previous
    return connection


def _is_untouched(websocket: WebSocket) -> bool:
    return getattr(websocket.send, "__self__", None) is websocket


def _make_sink(connection: Connection, websocket: WebSocket, watch: Watch) -> tuple[Sink, str]:
    if not _is_untouched(websocket):
        # Somebody else owns this socket's writes already, such as another manager: go through it, in its order.
        return Sink(connection, watch, websocket.send), "send is taken over"
    # Ours go to the server directly: Starlette's state then says only what the app itself did.
    send = getattr(websocket, "_send", websocket.send)
    receive = websocket.scope.get(SERVER_RECEIVE) or getattr(websocket, "_receive", None)
    protocol, refused = find_protocol(receive)
    if protocol is not None:
        return UvicornSink(connection, watch, send, protocol), ""
    return Sink(connection, watch, send, find_transport(receive)), refused
