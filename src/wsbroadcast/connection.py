"""One accepted WebSocket: who it is, where it is subscribed, what it receives and what it is sent."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, MutableMapping
from contextvars import Context, copy_context
from enum import Enum
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.close_codes import ABNORMAL, CloseCode, cut_reason, fallback_codes, is_sendable
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import Watch
from wsbroadcast.delivery.uvicorn import SERVER_RECEIVE, SERVER_SEND, UvicornSink, find_protocol, find_transport
from wsbroadcast.exceptions import ConnectionClosed, LimitExceeded
from wsbroadcast.node.quotas import InboundPace, Place
from wsbroadcast.options import ExpiresAt, unix_seconds
from wsbroadcast.signatures import no_dependency
from wsbroadcast.transports.websocket import (
    Ended,
    Reading,
    TakenOver,
    hand_on,
    has,
    is_plain,
    is_untouched,
    own_send,
    take_over,
)

if TYPE_CHECKING:
    from wsbroadcast.manager import ConnectionManager  # what users reach from a connection; no import at run time
from typing import Self

from pydantic_core import from_json

from wsbroadcast.message import Message


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
class Connection:
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
        "_kept",
        "_reading",
        "_state",
        "channels",
        "close_code",
        "close_reason",
        "closing",
        "context",
        "expires_at",
        "fast_path_refused",
        "hooks_running",
        "id",
        "inbound_full_at",
        "inbound_pace",
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
        self.inbound_pace: InboundPace | None = None
        """What that pace may be; `None` for any."""
        self._expiry: asyncio.TimerHandle | None = None
        self.place = place
        """Given back when the socket is no longer there, and not before."""
        self._keeper = keeper
        self._state = ConnectionState.OPEN
        # Made when somebody waits for the end.
        self._closed: asyncio.Event | None = None
        # Who is inside `receive`, the last first, to be interrupted when the connection ends by our side.
        self._reading: Reading | None = None
        # Messages whose hooks had not ended when the read was cancelled; the next read gets them.
        self._kept: deque[tuple[MutableMapping[str, Any], Awaitable[None] | None]] | None = None
        self.closing: asyncio.Future[None] | None = None
        """Done when the close frame is out or the peer was given up; `None` while nobody closes."""
        self.context = copy_context()
        """That of its `connect`; what is done about the connection later runs in a copy of it."""
        self.previous: Connection | Ended | None = websocket.scope.get(_SCOPE_KEY)
        """The connection that the WebSocket had before, of another manager."""
        websocket.scope[_SCOPE_KEY] = self
        self.sink, self.fast_path_refused = _make_sink(self, websocket, watch)
        # Whoever writes, one owner keeps the order; whoever reads, every end is noticed.
        self._found = take_over(websocket, self)

    # What the application uses.

    @property
    def state(self) -> ConnectionState:
        """Where the connection stands."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether it is registered and receives what its audiences are sent."""
        return self._state is ConnectionState.OPEN

    @property
    def is_read(self) -> bool:
        """Whether somebody waits for a message of the peer now."""
        return self._reading is not None

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
            self._expiry = asyncio.get_running_loop().call_later(delay, self._keeper.expire, self, context=self.context)

    async def receive(self) -> str | bytes:
        """Wait for the next message of the peer: `str` for a text frame, `bytes` for a binary one.

        Raises:
            ConnectionClosed: If the peer is gone, or the connection was closed from here.
        """
        event = await self.receive_for_app()
        if event["type"] == "websocket.disconnect":
            raise self.closed_error()
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
        raise await self.refuse(CloseCode.UNSUPPORTED_DATA, "expected a text message")

    async def receive_bytes(self) -> bytes:
        """Wait for a binary message; a text one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        if isinstance(message, bytes):
            return message
        raise await self.refuse(CloseCode.UNSUPPORTED_DATA, "expected a binary message")

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
            raise await self.refuse(CloseCode.INVALID_DATA, "expected JSON") from None

    async def refuse(self, code: int, reason: str) -> ConnectionClosed:
        """Close because of what the peer sent; return the error for whoever wanted to read it."""
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
        event: MutableMapping[str, Any] | None = None
        while self._state is not ConnectionState.CLOSED:
            if self._reading is None and self._state is ConnectionState.OPEN and event is not _STEPPED_ASIDE:
                event = await self.receive_for_app(throws_away=True)
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
        reading = self._reading
        while reading is not None:
            reading.interrupt()  # now: granian sends no close frame while the app is inside `receive`
            reading = reading.before
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
        websocket = self.websocket
        assert isinstance(websocket, TakenOver)
        return websocket.kind.send(websocket, event) if self._found is None else self._found[0](event)

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
        if self.sink.backlog is None and has(self, self.websocket):
            hand_on(self.websocket, None, self._found)
            if self.previous is None:
                del self.websocket.scope[_SCOPE_KEY]
            else:
                self.websocket.scope[_SCOPE_KEY] = self.previous
            self.sink.is_ended = True  # what is left of it closes nothing

    def let_go(self) -> None:
        """The socket is gone: give the place back, and hold nothing that holds this connection."""
        self.place.release()
        self.sink.owner = _NOBODY
        ended = Ended(self.manager, ABNORMAL if self.close_code is None else self.close_code, self.close_reason)
        if has(self, self.websocket):
            hand_on(self.websocket, ended, None)
        if self.websocket.scope.get(_SCOPE_KEY) is self:
            self.websocket.scope[_SCOPE_KEY] = ended

    # What `websocket.send` and `websocket.receive` are while the connection lives.

    async def send_for_app(self, event: MutableMapping[str, Any]) -> None:
        """Send an event of the app, in its place among the broadcasts.

        Raises:
            ConnectionClosed: If the connection has ended.
        """
        self._keeper.before_app_send()
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

    async def receive_for_app(self, *, throws_away: bool = False) -> MutableMapping[str, Any]:
        """Return the next event of the peer, or that it is disconnected. A read that is cancelled loses nothing."""
        if self._state is not ConnectionState.OPEN:
            return await self._receive_after_the_end()
        if self._kept:
            return await self._observed(*self._kept.popleft())
        if self._reading is not None and self._reading.throws_away:
            self._reading.interrupt()
        reading = self._reading = Reading(throws_away, self._reading)
        spares = self.sink.begin_reading()
        try:
            event = await self._receive_below()
        except asyncio.CancelledError:
            if not reading.take_back():
                raise
            return _STEPPED_ASIDE if self.is_open else await self._receive_after_the_end()
        except (OSError, RuntimeError):
            # Servers and Starlette have a dozen ways of saying that a disconnect was already received.
            event = self._disconnect_event()
        finally:
            if spares:
                self.sink.end_reading()
            reading.finish()
            if self._reading is not None:
                self._reading = self._reading.without(reading)
        if event["type"] == "websocket.disconnect":
            self.lost(event.get("code") or ABNORMAL, event.get("reason") or "")
            return event
        if self._state is not ConnectionState.OPEN:
            return event if self._is_anothers else await self._receive_after_the_end()
        try:
            observing = self._observe(event)
        except LimitExceeded as error:
            self.sink.hangs_up = True
            await self.close(error.code, error.reason)
            return self._disconnect_event()
        return event if observing is None else await self._observed(event, observing)

    def _observe(self, event: MutableMapping[str, Any]) -> Awaitable[None] | None:
        text = event.get("text")
        return self._keeper.observe_message(self, event["bytes"] if text is None else text)

    async def _observed(
        self, event: MutableMapping[str, Any], observing: Awaitable[None] | None
    ) -> MutableMapping[str, Any]:
        observing = observing or self._observe(event)
        try:
            if isinstance(observing, asyncio.Task):
                await asyncio.wait({observing})  # which doesn't cancel it
                observing.result()
            elif observing is not None:
                await observing
        except asyncio.CancelledError:
            if self._kept is None:
                self._kept = deque()
            # Hooks that were not expected to wait have been cancelled, and run again.
            self._kept.append((event, observing if isinstance(observing, asyncio.Task) else None))
            raise
        return event if self.is_open else self._disconnect_event()

    async def _receive_after_the_end(self) -> MutableMapping[str, Any]:
        # Who is out of the registry is out of reach for limits, hooks and `disconnect_user`: nobody hears it any more,
        # although its close frame may still have to wait for its turn.
        if self._is_anothers:
            return await self._receive_below()
        await self._wait_closed()  # an endpoint that ends earlier makes the server cut off the close frame
        return self._disconnect_event()

    @property
    def _is_anothers(self) -> bool:
        # Out of this manager's registry, and the connection of another one, which reads through this one.
        return not self.sink.is_ended and self.websocket.scope.get(_SCOPE_KEY) is not self

    def _receive_below(self) -> Awaitable[MutableMapping[str, Any]]:
        # Not a coroutine of its own: one frame less for each connection that waits here.
        websocket = self.websocket
        assert isinstance(websocket, TakenOver)
        return websocket.kind.receive(websocket) if self._found is None else self._found[1]()

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


class _Nobody:
    """The owner of the sink of a connection that is gone."""

    context = Context()

    def lost(self, code: int, reason: str) -> None:
        """Nobody is left."""

    def evict(self, cause: str) -> None:
        """Nobody is left."""

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        """Nobody is left."""


_NOBODY = _Nobody()


def find_connection(websocket: WebSocket | Connection, manager: ConnectionManager) -> Connection | None:
    """Find a manager's connection behind a WebSocket; `None` if it never had one, or its socket is gone."""
    found = find_known(websocket, manager)
    return found if isinstance(found, Connection) else None


def find_open(websocket: WebSocket | Connection, manager: ConnectionManager) -> Connection | None:
    """Find a manager's connection behind a WebSocket; `None` if it never had one.

    Raises:
        ConnectionClosed: If it has ended.
    """
    found = find_known(websocket, manager)
    if found is None or (isinstance(found, Connection) and found.is_open):
        return found
    raise found.closed_error()


def is_known(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket was connected before, to whichever manager."""
    return _SCOPE_KEY in websocket.scope


def find_known(websocket: WebSocket | Connection, manager: ConnectionManager) -> Connection | Ended | None:
    """Find a manager's connection behind a WebSocket, or what is left of it."""
    found = websocket if isinstance(websocket, Connection) else websocket.scope.get(_SCOPE_KEY)
    while found is not None and found.manager is not manager:
        found = found.previous
    return found


def _make_sink(connection: Connection, websocket: WebSocket, watch: Watch) -> tuple[Sink, str]:
    if not is_untouched(websocket):
        # Somebody else owns this socket's writes already, such as another manager: go through it, in its order.
        return Sink(connection, watch, websocket.send), "send is taken over"
    if (own := own_send(websocket)) is not None:
        return Sink(connection, watch, own), "send is taken over"
    # Ours go to the server directly: Starlette's state then says only what the app itself did.
    send = getattr(websocket, "_send", websocket.send)
    shown = websocket.scope.get(SERVER_RECEIVE)
    receive = shown or getattr(websocket, "_receive", None)
    protocol, refused = find_protocol(receive, send if shown is None else websocket.scope.get(SERVER_SEND))
    if protocol is not None:
        own = getattr(websocket, "_receive", None)
        is_read_directly = is_plain(websocket) and getattr(own, "__self__", None) is protocol
        return UvicornSink(connection, watch, send, protocol, is_read_directly=is_read_directly), ""
    return Sink(connection, watch, send, find_transport(receive)), refused
