"""One connection: who it is, where it is subscribed, what it receives and what it is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from enum import Enum
from secrets import token_urlsafe
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, Self
from uuid import UUID

from starlette.websockets import WebSocket

from wsbroadcast.audience import Audience, UserId, as_channels
from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.concurrency import AwaitableContext, running_loop
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.exceptions import ConnectionClosed, LifecycleError, kind_of
from wsbroadcast.history import Recovery, SinceOption
from wsbroadcast.message import Message
from wsbroadcast.options import ExpiresAt, unix_seconds
from wsbroadcast.protocols.commands import Refused
from wsbroadcast.protocols.typed import TypedReader, read_json
from wsbroadcast.signatures import no_dependency
from wsbroadcast.stats import Counters
from wsbroadcast.transports import SCOPE_KEY, SEEN_KEY, STEPPED_ASIDE, Ended, Event, Transport, closed_error
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.types import Excludable, Manager

if TYPE_CHECKING:  # the default needs Python 3.13
    from typing_extensions import TypeForm, TypeVar

    Info = TypeVar("Info", default=Any)
else:
    from typing import TypeVar

    Info = TypeVar("Info")

T = TypeVar("T")


class ConnectionState(Enum):
    """Which part of its life a connection is in."""

    OPEN = "open"
    """Registered: it receives what its audiences are sent."""
    CLOSING = "closing"
    """Not registered any more. What was handed over before still goes out."""
    CLOSED = "closed"
    """Over: the peer is gone, or a close frame was sent."""


_TRANSITIONS = {
    ConnectionState.OPEN: {ConnectionState.CLOSING, ConnectionState.CLOSED},
    ConnectionState.CLOSING: {ConnectionState.CLOSED},
    ConnectionState.CLOSED: set[ConnectionState](),
}


class Operations(Protocol):
    """The operations behind a connection's own methods. They ignore what an app overrides in the manager."""

    @property
    def manager(self) -> Manager[Connection]:
        """The manager that keeps the connection."""

    @property
    def counters(self) -> Counters:
        """The counters of the node."""

    def encode(self, message: object, key: str | None = None) -> Message:
        """Encode a message within the limit."""

    async def send(self, websocket: WebSocket | Connection, message: object) -> None:
        """Send a message to a connection."""

    async def subscribe(
        self, websocket: WebSocket | Connection, channels: tuple[str, ...], since: SinceOption = None
    ) -> Recovery | None:
        """Subscribe a connection to channels; for a single channel, return whether it gets what it missed."""

    async def unsubscribe(self, websocket: WebSocket | Connection, channels: tuple[str, ...]) -> None:
        """Unsubscribe a connection from channels."""

    async def close(self, websocket: WebSocket | Connection, code: int, reason: str) -> None:
        """Send what was handed over before, then close and remove."""


# How long before its end a client of `wsbroadcast.v1` is told of it.
_NOTICE_SECONDS = 30.0

_NO_SCOPE: dict[str, Any] = {}
_NO_CHANNELS: frozenset[str] = frozenset()
_NOTHING_RECOVERED: Mapping[str | Audience, Recovery] = MappingProxyType({})


@no_dependency("take a ConnectionDep")
class Connection(Generic[Info]):
    """One accepted WebSocket, stream of events or long poll, as `ConnectionManager.connect` returns it.

    It takes over `websocket.send` and `websocket.receive`. So what the app sends itself keeps its place among the
    broadcasts, and the connection notices the peer's end in whichever way the app reads.

    The WebSocket's own readers close a peer that sends something else: bytes to `receive_text` or text to
    `receive_bytes` with 1003, broken JSON to `receive_json` with 1007. The endpoint sees a `WebSocketDisconnect`.

    When the endpoint returns, what was handed over goes out. Then the connection is closed with 1000, or with 1011 if
    the endpoint raised something. This holds for endpoints that call `ConnectionManager.connect` themselves, too.

    Names with an underscore are for the node that keeps it.
    """

    __slots__ = (
        "__weakref__",
        "_closed",
        "_end",
        "_expiry",
        "_inbound_full_at",
        "_opened_at",
        "_shown",
        "_sink",
        "_state",
        "_transport",
        "_user_key",
        "channels",
        "expires_at",
        "id",
        "info",
        "recovered",
        "user",
    )

    def __init__(
        self,
        transport: Transport,
        *,
        user: UserId | None,
        user_key: str | None,
        channels: tuple[str, ...],
        info: Info,
    ) -> None:
        self.id = token_urlsafe(12)
        """Unique among all nodes."""
        # `Any`: else a type checker would ask whether it is `None` where the app knows that it isn't.
        self.user: UserId | Any = user
        """The user that was given to `connect`; `None` if none was given."""
        self._user_key = user_key
        """The user as text: broadcasts to the user are addressed to it."""
        self.info = info
        """Anything that the app wants to remember about the connection. `Connection[Member]` gives its type."""
        self.channels = frozenset(channels) if channels else _NO_CHANNELS
        """The channels it is subscribed to; after its end, those it was in. Change them through `subscribe`."""
        self.recovered: Mapping[str | Audience, Recovery] = _NOTHING_RECOVERED
        """Whether it got what it missed: by channel, and by audience for its user's and everyone's messages. It holds
        only what `since=` of `connect` and `subscribe` named, so it is empty if no `since` was given."""
        self.expires_at: float | None = None
        """When the connection ends unless it is renewed, in seconds since 1970; `None` for never."""
        self._shown = b""
        """What others see of it, as JSON, if presence has nothing else to say."""
        self._sink: Sink = transport.sink
        """Where its messages go."""
        self._opened_at = time.monotonic()
        """When it was accepted, by the monotonic clock."""
        self._inbound_full_at: float | None = None
        """When the peer may send a full burst of messages again, by the clock of the limits; `None` if nothing limits
        them."""
        self._state = ConnectionState.OPEN
        # The code and reason of its end; `None` before.
        self._end: tuple[int, str] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        # Made when a task waits for the end.
        self._closed: asyncio.Event | None = None
        self._transport = transport
        transport.attach(self)

    # Its place and its state.

    @property
    def websocket(self) -> WebSocket:
        """The Starlette WebSocket. For a stream or a poll it stands for the request, and receives nothing.

        Then it has the headers, the query and the `state` of the request. What is sent by it becomes an event or a
        message.
        """
        return self._transport.websocket

    @property
    def manager(self) -> Manager[Connection[Any]]:
        """The manager that keeps this connection."""
        return self._core.manager

    @property
    def _core(self) -> Operations:
        core: Operations = self._transport.keeper.core
        return core

    @property
    def state(self) -> ConnectionState:
        """Which part of its life the connection is in."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether it is registered and receives what its audiences are sent."""
        return self._state is ConnectionState.OPEN

    @property
    def close_code(self) -> int | None:
        """The code it ended with; `None` while it is open."""
        return None if self._end is None else self._end[0]

    @property
    def close_reason(self) -> str:
        """The reason that came with the code."""
        return "" if self._end is None else self._end[1]

    # What the app does with it.

    async def send(self, message: object) -> None:
        """Send a message to this connection only, after everything that was handed over before.

        Raises:
            ConnectionClosed: If the connection has ended.
            EncodeError: If the message can't be sent as text, bytes or JSON.
        """
        await self._core.send(self, message)

    async def subscribe(self, *channels: str, since: SinceOption = None) -> Recovery | None:
        """Subscribe to channels; every later broadcast to them, from any node, arrives.

        Args:
            channels: Names of channels.
            since: The position after which it wants what it missed; see `ConnectionManager.connect`.

        Returns:
            Recovery | None: With `since` and one channel: whether it gets what it missed. For several channels,
            `recovered` has the answers.

        Raises:
            ConnectionClosed: If the connection has ended.
            InvalidChannel: If a name breaks a rule; then it is subscribed to none of them.
            ValueError: If `since` is no position of these channels.
        """
        return await self._core.subscribe(self, as_channels(channels), since)

    async def unsubscribe(self, *channels: str) -> None:
        """Unsubscribe from channels. Channels it isn't in are ignored."""
        await self._core.unsubscribe(self, as_channels(channels))

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Send what was handed over before, then close. Idempotent. Never hangs on a peer that takes nothing."""
        await self._core.close(self, code, reason)

    def renew(self, expires_at: ExpiresAt) -> None:
        """Let the connection live until another moment. At that moment it is closed with 4401.

        Messages that still wait for it then are not sent. The time of day is read once, here. Then a monotonic timer
        runs, so setting the clock later changes nothing. A client that speaks events is told 30 s before the end, or in
        the middle of the time that is left, if that is less than a minute.

        Args:
            expires_at: Seconds since 1970, or a datetime with a timezone; `None` for never. A moment that has passed
                closes the connection in the next turn of the event loop.

        Raises:
            ConnectionClosed: If the connection has ended.
            LifecycleError: If called from a thread; nothing has changed then.
            ValueError: If it is not a valid time, such as a datetime without a timezone, or NaN.
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
            self._expire_in(max(0.0, seconds - time.time()), loop, tells=self._sink.has_positions)

    def _expire_in(self, delay: float, loop: asyncio.AbstractEventLoop, *, tells: bool) -> None:
        keeper, context = self._transport.keeper, self._transport.context
        if not tells or not delay:
            self._expiry = loop.call_later(delay, keeper.expire, self, context=context)
            return
        # At most half of the time before the end: a client with a short token isn't told as soon as it has come.
        notice = min(_NOTICE_SECONDS, delay / 2)

        def tell() -> None:
            self._expire_in(notice, loop, tells=False)
            if self.expires_at is not None:
                keeper.expiring(self, self.expires_at, notice)

        self._expiry = loop.call_later(delay - notice, tell, context=context)

    async def receive(self) -> str | bytes:
        """Wait for the next message of the peer; return `str` for a text frame, `bytes` for a binary one.

        Raises:
            ConnectionClosed: If the peer is gone, or the connection was closed from this side.
        """
        event = await self._transport.receive()
        if event["type"] == "websocket.disconnect":
            raise closed_error(self)
        text: str | None = event.get("text")  # hypercorn sends both keys, one of them None
        return event["bytes"] if text is None else text

    async def receive_text(self) -> str:
        """Wait for a text message. A binary one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, for this or another reason.
        """
        message = await self.receive()
        if isinstance(message, str):
            return message
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a text message")

    async def receive_bytes(self) -> bytes:
        """Wait for a binary message. A text one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, for this or another reason.
        """
        message = await self.receive()
        if isinstance(message, bytes):
            return message
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a binary message")

    async def receive_json(self) -> Any:
        """Wait for a message that holds JSON, as text or binary; return its value. Anything else closes with 1007.

        Raises:
            ConnectionClosed: If the connection has ended, for this or another reason.
        """
        message = await self.receive()
        try:
            return read_json(message)
        except ValueError:
            raise await self._refusal(CloseCode.INVALID_DATA, "expected JSON") from None

    async def _refusal(self, code: int, reason: str) -> ConnectionClosed:
        # Close because of what the peer sent. The error is for the caller that wanted to read it.
        await self.close(code, reason)
        return ConnectionClosed(code, reason)

    def __aiter__(self) -> Self:
        """Iterate over the peer's messages until the connection ends. No exception needs to be caught."""
        return self

    async def __anext__(self) -> str | bytes:
        try:
            return await self.receive()
        except ConnectionClosed:
            raise StopAsyncIteration from None

    def typed(self, types: TypeForm[T]) -> AsyncIterator[T]:
        """Iterate over the peer's messages as objects of their types, until the connection ends.

        ```
        async for message in connection.typed(Say | Typing):
            match message:
                case Say(text=text): ...
        ```

        A message that isn't JSON, or not of these types, is answered with an error code and counted in
        `stats().invalid`. The connection stays open.

        Args:
            types: A model, a dataclass, a `TypedDict`, or a union of these, as for `receives` of `create_router`.

        Raises:
            ConfigurationError: If pydantic can't read the types from JSON, or nothing tells members of a union apart.
        """
        reader = TypedReader(MessageTypes.of(types, "typed"), self._core.counters)
        return self._read_by(reader)

    async def _read_by(self, reader: TypedReader) -> AsyncIterator[Any]:
        async for raw in self:
            try:
                message = reader.read(raw)
            except Refused as refused:
                with suppress(ConnectionClosed):
                    await self.send(refused.answer)
                continue
            yield message

    async def wait_closed(self) -> None:
        """Wait for the connection's end, for an endpoint that only sends.

        The peer's messages are read and thrown away, until another task begins to read. From then on that task reads,
        and notices the peer's end.
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

    # For the node.

    def _enter(self, state: ConnectionState, code: int, reason: str = "") -> None:
        # Go to another state, with the code and reason of the end, and wake those that wait for a message.
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
    """Find a manager's connection of a WebSocket; `None` if it never had one, or its socket is gone.

    Raises:
        TypeError: If it is neither a WebSocket nor a Connection.
    """
    found = find_known(websocket, manager)
    return found if isinstance(found, Connection) else None


def find_open(websocket: WebSocket | Connection, manager: object) -> Connection:
    """Find a manager's open connection of a WebSocket.

    Raises:
        ConnectionClosed: If it has ended.
        LifecycleError: If `connect` was never called for it.
        TypeError: If it is neither a WebSocket nor a Connection.
    """
    found = find_known(websocket, manager)
    if isinstance(found, Connection) and found.is_open:
        return found
    if found is None and getattr(websocket, "scope", _NO_SCOPE).get(SEEN_KEY) is not manager:
        raise LifecycleError("the WebSocket is not connected to this manager: await `manager.connect(websocket)` first")
    raise ConnectionClosed(ABNORMAL, "it is not connected") if found is None else closed_error(found)


def is_known(websocket: WebSocket) -> bool:
    """Return whether a WebSocket was connected before, to any manager."""
    return SCOPE_KEY in websocket.scope


def find_known(websocket: WebSocket | Connection, manager: object) -> Connection | Ended | None:
    """Find a manager's connection of a WebSocket, or what is left of it after its end.

    Raises:
        TypeError: If it is neither a WebSocket nor a Connection.
    """
    found: Any = websocket
    if not isinstance(websocket, Connection):
        try:
            found = websocket.scope.get(SCOPE_KEY)
        except AttributeError:
            raise TypeError(_not_a_websocket(websocket)) from None
    while found is not None and found.manager is not manager:
        found = found._transport.previous if isinstance(found, Connection) else None
    known: Connection | Ended | None = found
    return known


def _not_a_websocket(value: object) -> str:
    text = f"expected a WebSocket or a Connection, not {kind_of(value)}"
    if isinstance(value, AwaitableContext):
        return f"{text}: an `await` is missing before `connect`"
    if isinstance(value, (str, bytes, int, UUID)):
        return (
            f"{text}; for a user's connections call broadcast(…, user=…) or close_user(…), for a channel "
            "broadcast(…, channel=…)"
        )
    return text


Exclude = Connection | WebSocket | Excludable | Iterable[Connection | WebSocket | Excludable]
"""The connections that don't get a broadcast: one, or several."""


# What `connect` returns.

_AWAIT = "an `await` is missing: connection = await manager.connect(websocket)"


class Connecting(AwaitableContext[Connection]):
    """What `connect` returns: await it for the connection, or use it with `async with`."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"this has no {name}, because {_AWAIT}" if not name.startswith("__") else name)

    def send(self, value: Any) -> Any:
        """Resume the coroutine. Any value means that it was taken for a connection: that is an error."""
        if value is not None:
            raise TypeError(_AWAIT)
        return super().send(value)
