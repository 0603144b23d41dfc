"""A Starlette WebSocket as a transport: what an endpoint sends and receives on it goes through its connection."""

from __future__ import annotations

import asyncio
import itertools
import json
from bisect import insort
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from functools import cache
from types import MethodType
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.close_codes import ABNORMAL, CloseCode, cut_reason, fallback_codes, is_sendable
from wsbroadcast.concurrency import Interruptible
from wsbroadcast.delivery.backlog import Place
from wsbroadcast.delivery.frames import unframed
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.delivery.uvicorn import SERVER_RECEIVE, SERVER_SEND, UvicornSink, find_protocol, find_transport
from wsbroadcast.exceptions import ConnectionClosed, LimitExceeded
from wsbroadcast.publication import Protocol as Speaks
from wsbroadcast.publication import plain
from wsbroadcast.transports import SCOPE_KEY, STEPPED_ASIDE, Ended, Event, Keeper, Owner, closed_error, disconnect_event
from wsbroadcast.transports.http import STREAM, Answer

# Numbers for messages that hooks see, in the order in which these came.
_NUMBERS = itertools.count()


class Taker(Protocol):
    """Gets all that an endpoint does with a WebSocket: a transport, or what is left of a connection."""

    def send(self, event: Event) -> Coroutine[Any, Any, None]:
        """Send an event of the app, in its place among the broadcasts."""

    def receive(self) -> Coroutine[Any, Any, Event]:
        """Return the next event of the peer."""

    def refuse(self, code: int, reason: str) -> Coroutine[Any, Any, ConnectionClosed]:
        """Close the connection because of what the peer sent; return the error for the reader."""


class TakenOver(WebSocket):
    """The class of a WebSocket while a connection has it.

    The class is replaced. Methods on each instance would hold the connection in a reference cycle, and take memory for
    each of them.
    """

    taker: Taker | None = None
    """Gets all that the endpoint does; `None` before and after."""
    kind: type[WebSocket] = WebSocket
    """The class that the WebSocket had."""

    def send(self, message: Event) -> Coroutine[Any, Any, None]:
        """Send an ASGI event."""
        taker = self.taker
        return self.kind.send(self, message) if taker is None else taker.send(message)

    def receive(self) -> Coroutine[Any, Any, Event]:
        """Return the next ASGI event."""
        taker = self.taker
        return self.kind.receive(self) if taker is None else taker.receive()

    def __init_subclass__(cls) -> None:
        """Do nothing. A class of the app may do something for each subclass, but this one only takes its place."""


class Readers(WebSocket):
    """The readers of a WebSocket that is taken over, in place of Starlette's. A class of the app may override them.

    They close the connection of a peer that sends something else, where Starlette's fail with `KeyError`.
    """

    taker: Taker | None

    async def receive_text(self) -> str:
        """Wait for a text message. A binary one closes the connection with 1003, and raises `WebSocketDisconnect`."""
        text = _event_of(await self.receive()).get("text")
        if isinstance(text, str):
            return text
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a text message")

    async def receive_bytes(self) -> bytes:
        """Wait for a binary message. A text one closes the connection with 1003, and raises `WebSocketDisconnect`."""
        data = _event_of(await self.receive()).get("bytes")
        if isinstance(data, bytes):
            return data
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a binary message")

    async def receive_json(self, mode: str = "text") -> Any:
        """Wait for a message of JSON. Anything else closes with 1003 or 1007, and raises `WebSocketDisconnect`."""
        if mode not in ("text", "binary"):
            raise RuntimeError('The "mode" argument should be "text" or "binary".')
        data = await (self.receive_text() if mode == "text" else self.receive_bytes())
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise await self._refusal(CloseCode.INVALID_DATA, "expected JSON") from None

    async def _refusal(self, code: int, reason: str) -> WebSocketDisconnect:
        if self.taker is None:  # a wrapper of the app has the WebSocket
            await self.close(code, reason)
            return ConnectionClosed(code, reason)
        return await self.taker.refuse(code, reason)


Found = tuple[Callable[[Event], Coroutine[Any, Any, None]], Callable[[], Coroutine[Any, Any, Event]]]
"""The `send` and `receive` that a WebSocket had, if they were not those of its class."""


def take_over(websocket: WebSocket, taker: Taker) -> Found | None:
    """Let a WebSocket's events go through `taker`; return its `send` and `receive`, if not those of its class."""
    is_wrapped = not is_untouched(websocket)
    if not isinstance(websocket, TakenOver):
        websocket.__class__ = _taken_over(type(websocket))
    if is_wrapped:
        found = (websocket.send, websocket.receive)
        _exchange(websocket, (taker.send, taker.receive))
        return found
    websocket.taker = taker  # type: ignore[attr-defined]  # of its new class
    return None


def has(taker: Taker, websocket: WebSocket) -> bool:
    """Tell whether all that an endpoint does goes to `taker` first."""
    attributes = vars(websocket)
    has_it = getattr(attributes["send"], "__self__", None) if "send" in attributes else attributes.get("taker")
    return has_it is taker


def hand_on(websocket: WebSocket, taker: Taker | None, found: Found | None) -> None:
    """Give a WebSocket to another taker, or give back the `send` and `receive` that were found."""
    if found is None and "send" in vars(websocket) and taker is not None:
        found = (taker.send, taker.receive)
    if found is not None:
        _exchange(websocket, found)
    else:
        websocket.taker = taker  # type: ignore[attr-defined]  # a connection's WebSocket is a `TakenOver`


def _exchange(websocket: WebSocket, found: Found) -> None:
    websocket.send, websocket.receive = found  # type: ignore[assignment, method-assign]


def is_untouched(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket's `send` and `receive` are those of its class: nothing wraps them."""
    attributes = vars(websocket)
    return attributes.get("taker") is None and "send" not in attributes and "receive" not in attributes


def is_plain(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket receives as Starlette's class does."""
    kind = websocket.kind if isinstance(websocket, TakenOver) else type(websocket)
    return kind.receive is WebSocket.receive


def own_send(websocket: WebSocket) -> Callable[[Event], Coroutine[Any, Any, None]] | None:
    """Return the `send` of a class of the app, which may change what is sent; `None` if it is Starlette's."""
    kind = websocket.kind if isinstance(websocket, TakenOver) else type(websocket)
    return None if kind.send is WebSocket.send else MethodType(kind.send, websocket)


@cache
def _taken_over(kind: type[WebSocket]) -> type[WebSocket]:
    # It keeps the name of the class that it replaces, which users see in errors, for example.
    own = () if kind is WebSocket else (kind,)
    return type(kind.__name__, (TakenOver, *own, Readers), {"kind": kind})


def _event_of(event: Event) -> Event:
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event["code"], event.get("reason"))
    return event


class WebSocketTransport:
    """Takes over `websocket.send` and `websocket.receive` for a connection.

    What the app sends itself keeps its place among the broadcasts. If any reader gets the peer's disconnect, the
    connection ends.

    Args:
        websocket: The accepted WebSocket of the endpoint.
        slow_consumers: Looks after connections with a backlog.
        keeper: Is told what happens.
        speaks: The protocol of the client.
    """

    __slots__ = (
        "_found",
        "_kept",
        "_reading",
        "context",
        "fast_path_refused",
        "keeper",
        "owner",
        "previous",
        "sink",
        "websocket",
    )

    def __init__(
        self, websocket: WebSocket, slow_consumers: SlowConsumers, keeper: Keeper, speaks: Speaks = plain
    ) -> None:
        self.websocket = websocket
        self.keeper = keeper
        self.owner: Owner
        """The connection, from `attach` to `let_go`; after that an `Ended`."""
        self.context = copy_context()
        self.previous: object = websocket.scope.get(SCOPE_KEY)
        self.sink, self.fast_path_refused = _make_sink(self, websocket, slow_consumers, speaks)
        # Set by `attach`, if the WebSocket's `send` and `receive` were not those of its class.
        self._found: Found | None = None
        # The tasks inside `receive`, the last one first. They are interrupted when the library ends the connection.
        self._reading: Interruptible | None = None
        # Messages whose hooks had not ended when the read was cancelled, by their numbers. The next read gets them.
        # `None` while there were none and the connection is open, so that a read has only one thing to check.
        self._kept: deque[tuple[int, Event, Awaitable[None] | None]] | None = None

    # For the connection; see `Transport`.

    @property
    def is_read(self) -> bool:
        """Whether a task waits for a message of the peer now."""
        return self._reading is not None

    def attach(self, owner: Owner) -> None:
        """Take over the WebSocket: from now on all that the endpoint does goes through here."""
        self.owner = owner
        self.websocket.scope[SCOPE_KEY] = owner
        self._found = take_over(self.websocket, self)

    def interrupt(self) -> None:
        """Make all tasks come out of `receive`, because the connection has ended."""
        self._kept = self._kept or deque()
        reading = self._reading
        while reading is not None:
            reading.interrupt()  # at once, because granian sends no close frame while the app is inside `receive`
            reading = reading.before

    def give_back(self) -> None:
        """Give the WebSocket back before it is connected again, unless something waits to be written."""
        if self.sink.backlog is None and has(self, self.websocket):
            hand_on(self.websocket, None, self._found)
            if self.previous is None:
                del self.websocket.scope[SCOPE_KEY]
            else:
                self.websocket.scope[SCOPE_KEY] = self.previous
            self.sink.is_ended = True  # so that this transport doesn't close the WebSocket any more

    def let_go(self) -> None:
        """Drop all references to the connection, because the socket is gone."""
        owner = self.owner
        ended = self.owner = self.sink.owner = Ended(self.keeper.manager, owner)
        if has(self, self.websocket):
            hand_on(self.websocket, ended, None)
        if self.websocket.scope.get(SCOPE_KEY) is owner:
            self.websocket.scope[SCOPE_KEY] = ended

    # For the sink.

    def lost(self, code: int, reason: str) -> None:
        """Take note that the sink found the peer gone."""
        self.keeper.lost(self.owner, code, reason)

    def evict(self, cause: str) -> None:
        """Take note that the sink found that the peer doesn't take what it is sent."""
        self.keeper.evict(self.owner, cause)

    def fall_back(self, place: Place) -> bool:
        """Take note that the sink has no room for a message of a history; return whether it is sent later."""
        return self.keeper.fall_back(self.owner, place.audience, place.previous)

    async def app_send(self, event: Event) -> None:
        """Send an event of the app as it would be sent without the connection."""
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

    def _pass_on(self, event: Event) -> Awaitable[None]:
        websocket = self.websocket
        assert isinstance(websocket, TakenOver)
        return websocket.kind.send(websocket, event) if self._found is None else self._found[0](event)

    async def _pass_close_on(self, event: Event, code: int) -> None:
        *codes, last = fallback_codes(code)
        for each in codes:
            try:
                return await self._pass_on({**event, "code": each})
            except (OSError, RuntimeError, WebSocketDisconnect):
                raise
            except Exception:  # daphne raises it for a code that it refuses
                self.websocket.application_state = WebSocketState.CONNECTED
        await self._pass_on({**event, "code": last})

    # These replace `websocket.send` and `websocket.receive` while the connection lives. The connection may be let go
    # while one of them waits, so each reads `owner` only once.

    async def send(self, event: Event) -> None:
        """Send an event of the app, in its place among the broadcasts.

        Raises:
            ConnectionClosed: If the connection has ended.
        """
        owner, keeper, sink = self.owner, self.keeper, self.sink
        keeper.before_app_send()
        if is_close := event["type"] == "websocket.close":
            if sink.is_ended:
                return  # it is closed already, which is no error for a close
            event = {**event, "reason": cut_reason(event.get("reason") or "")}
            keeper.app_closes(owner, event.get("code", CloseCode.NORMAL), event["reason"])
        elif sink.is_ended:
            raise closed_error(owner)
        try:
            await sink.send_event(event)
        except WebSocketDisconnect as error:
            if not keeper.is_closing(owner):  # else a close has dropped the event, and `lost` would cancel that close
                keeper.lost(owner, error.code, error.reason)
            raise
        finally:
            if is_close:
                keeper.app_closed(owner)

    async def receive(self, *, throws_away: bool = False) -> Event:
        """Return the next event of the peer, or a disconnect event. If the call is cancelled, nothing is lost."""
        owner = self.owner
        if self._kept is not None:
            if not owner.is_open:
                return await self._receive_after_the_end(owner)
            if self._kept:
                return await self._observed(owner, *self._kept.popleft())
        if self._reading is not None and self._reading.throws_away:
            self._reading.interrupt()
        reading = self._reading = Interruptible(throws_away, self._reading)
        spares = self.sink.begin_reading()
        try:
            event = await self._receive_below()
        except asyncio.CancelledError:
            if not reading.take_back():
                raise
            return STEPPED_ASIDE if owner.is_open else await self._receive_after_the_end(owner)
        except (OSError, RuntimeError):
            # Servers and Starlette raise many different errors if a disconnect was already received.
            event = disconnect_event(owner)
        finally:
            if spares:
                self.sink.end_reading()
            reading.take_back()  # `receive` may have swallowed our cancellation
            if self._reading is not None:
                self._reading = self._reading.without(reading)
        if event["type"] == "websocket.disconnect":
            self.keeper.lost(owner, event.get("code") or ABNORMAL, event.get("reason") or "")
            return event
        if self._kept is not None and not owner.is_open:
            return event if self._is_anothers(owner) else await self._receive_after_the_end(owner)
        try:
            observing = self._observe(owner, event)
        except LimitExceeded as error:
            self.sink.hangs_up = True
            await owner.close(error.code, error.reason)
            return disconnect_event(owner)
        return event if observing is None else await self._observed(owner, next(_NUMBERS), event, observing)

    def _observe(self, owner: Owner, event: Event) -> Awaitable[None] | None:
        text = event.get("text")
        return self.keeper.observe_message(owner, event["bytes"] if text is None else text)

    async def _observed(self, owner: Owner, number: int, event: Event, observing: Awaitable[None] | None) -> Event:
        if observing is None:
            text = event.get("text")
            observing = self.keeper.observe_again(owner, event["bytes"] if text is None else text)
        try:
            if isinstance(observing, asyncio.Task):
                await asyncio.wait({observing})  # if this is cancelled, the hooks go on
                observing.result()
            else:
                await observing
        except asyncio.CancelledError:
            # Hooks that were not expected to wait were cancelled. They run again.
            self._kept = self._kept or deque()
            insort(self._kept, (number, event, observing if isinstance(observing, asyncio.Task) else None))
            raise
        return event if owner.is_open else disconnect_event(owner)

    async def _receive_after_the_end(self, owner: Owner) -> Event:
        # Limits, hooks and `close_user` don't apply to a connection that has left the registry. So the endpoint gets no
        # message of its peer any more, even if the close frame still waits for its turn.
        if self._is_anothers(owner):
            return await self._receive_below()
        await owner.wait_closed()  # an endpoint that ends earlier makes the server cut off the close frame
        return disconnect_event(owner)

    def _is_anothers(self, owner: Owner) -> bool:
        # It has left this manager's registry, and another manager has the WebSocket, and reads through this transport.
        return not self.sink.is_ended and self.websocket.scope.get(SCOPE_KEY) is not owner

    def _receive_below(self) -> Awaitable[Event]:
        # It is no coroutine, which saves a frame for each connection that waits here.
        websocket = self.websocket
        assert isinstance(websocket, TakenOver)
        return websocket.kind.receive(websocket) if self._found is None else self._found[1]()

    async def refuse(self, code: int, reason: str) -> ConnectionClosed:
        """Close the connection because of what the peer sent; return the error for the reader."""
        await self.owner.close(code, reason)
        return ConnectionClosed(code, reason)


def _make_sink(
    transport: WebSocketTransport, websocket: WebSocket, slow_consumers: SlowConsumers, speaks: Speaks
) -> tuple[Sink, str]:
    stream: Answer | None = websocket.scope.get(STREAM)
    form = unframed(plain if stream is not None else speaks)  # a stream makes the events itself
    if not is_untouched(websocket):
        # Something else writes to this WebSocket already, such as another manager. Go through it, in its order.
        return Sink(transport, slow_consumers, websocket.send, form=form), "send is taken over"
    if (own := own_send(websocket)) is not None:
        return Sink(transport, slow_consumers, own, form=form), "send is taken over"
    if stream is not None:
        return stream.make_sink(transport, slow_consumers, speaks)
    # Messages of the library go to the server directly, so Starlette's state shows only what the app itself did.
    send = getattr(websocket, "_send", websocket.send)
    shown = websocket.scope.get(SERVER_RECEIVE)
    own_receive = getattr(websocket, "_receive", None)
    receive = shown or own_receive
    protocol, refused = find_protocol(receive, send if shown is None else websocket.scope.get(SERVER_SEND))
    if protocol is not None:
        is_read_directly = is_plain(websocket) and getattr(own_receive, "__self__", None) is protocol
        sink = UvicornSink(transport, slow_consumers, send, protocol, speaks=speaks, is_read_directly=is_read_directly)
        return sink, ""
    return Sink(transport, slow_consumers, send, find_transport(receive), form), refused
