"""Taking a WebSocket over: what an endpoint sends and receives on it goes through its connection."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, MutableMapping
from functools import cache
from types import MethodType
from typing import Any, Protocol

from starlette.websockets import WebSocket, WebSocketDisconnect

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import ConnectionClosed

Event = MutableMapping[str, Any]

_READERS = ("receive_text", "receive_bytes", "receive_json")


class Taker(Protocol):
    """Who gets what an endpoint does with a WebSocket: a connection, or what is left of one."""

    def send_for_app(self, event: Event) -> Coroutine[Any, Any, None]:
        """Send an event of the app, in its place among the broadcasts."""

    def receive_for_app(self) -> Coroutine[Any, Any, Event]:
        """Return the next event of the peer."""

    def refuse(self, code: int, reason: str) -> Coroutine[Any, Any, ConnectionClosed]:
        """Close because of what the peer sent; return the error for whoever wanted to read it."""


class TakenOver(WebSocket):
    """What the class of a WebSocket is while a connection has it.

    The class is exchanged, rather than methods set on each instance: those would hold the connection in a reference
    cycle, and take memory for each. The readers close a peer that sends something else, where Starlette's fail with
    `KeyError`.
    """

    taker: Taker | None = None
    """Who has it; `None` before and after."""
    kind: type[WebSocket] = WebSocket
    """The class that it had."""

    def send(self, message: Event) -> Coroutine[Any, Any, None]:
        """Send an ASGI event."""
        taker = self.taker
        return self.kind.send(self, message) if taker is None else taker.send_for_app(message)

    def receive(self) -> Coroutine[Any, Any, Event]:
        """Return the next ASGI event."""
        taker = self.taker
        return self.kind.receive(self) if taker is None else taker.receive_for_app()

    async def receive_text(self) -> str:
        """Wait for a text message; a binary one closes with 1003, and is an end like others."""
        text = _event_of(await self.receive()).get("text")
        if isinstance(text, str):
            return text
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a text message")

    async def receive_bytes(self) -> bytes:
        """Wait for a binary message; a text one closes with 1003, and is an end like others."""
        data = _event_of(await self.receive()).get("bytes")
        if isinstance(data, bytes):
            return data
        raise await self._refusal(CloseCode.UNSUPPORTED_DATA, "expected a binary message")

    async def receive_json(self, mode: str = "text") -> Any:
        """Wait for a message that holds JSON; anything else closes with 1003 or 1007, and is an end like others."""
        if mode not in ("text", "binary"):
            raise RuntimeError('The "mode" argument should be "text" or "binary".')
        data = await (self.receive_text() if mode == "text" else self.receive_bytes())
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise await self._refusal(CloseCode.INVALID_DATA, "expected JSON") from None

    async def _refusal(self, code: int, reason: str) -> WebSocketDisconnect:
        if self.taker is None:  # an app's own wrapper has it: what it lets through is all there is
            await self.close(code, reason)
            return ConnectionClosed(code, reason)
        return await self.taker.refuse(code, reason)


Found = tuple[Callable[[Event], Coroutine[Any, Any, None]], Callable[[], Coroutine[Any, Any, Event]]]
"""The `send` and `receive` that a WebSocket had, where they were not simply its class's own."""


def take_over(websocket: WebSocket, taker: Taker) -> Found | None:
    """Let a WebSocket's events go through `taker`; return what it had before, if that was not its class's own."""
    is_wrapped = not is_untouched(websocket)
    if not isinstance(websocket, TakenOver):
        websocket.__class__ = _taken_over(type(websocket))
    if is_wrapped:
        found = (websocket.send, websocket.receive)
        websocket.send = taker.send_for_app  # type: ignore[assignment, method-assign]
        websocket.receive = taker.receive_for_app  # type: ignore[method-assign]
        return found
    websocket.taker = taker  # type: ignore[attr-defined]  # of its new class
    return None


def has(taker: Taker, websocket: WebSocket) -> bool:
    """Tell whether what an endpoint does goes to `taker` first."""
    attributes = vars(websocket)
    if "send" in attributes:
        return getattr(attributes["send"], "__self__", None) is taker
    return attributes.get("taker") is taker


def hand_on(websocket: WebSocket, taker: Taker | None, found: Found | None) -> None:
    """Let somebody else have what goes through `taker` so far, or give back what was found."""
    if found is not None:
        websocket.send, websocket.receive = found  # type: ignore[assignment, method-assign]
    elif "send" in vars(websocket) and taker is not None:
        websocket.send = taker.send_for_app  # type: ignore[assignment, method-assign]
        websocket.receive = taker.receive_for_app  # type: ignore[method-assign]
    else:
        websocket.taker = taker  # type: ignore[attr-defined]  # a connection's WebSocket is a `TakenOver`


def is_untouched(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket's `send` and `receive` go straight to its class: nobody wrapped or has them."""
    attributes = vars(websocket)
    return attributes.get("taker") is None and "send" not in attributes and "receive" not in attributes


def is_plain(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket receives as Starlette's class does."""
    kind = websocket.kind if isinstance(websocket, TakenOver) else type(websocket)
    return kind.receive is WebSocket.receive


def own_send(websocket: WebSocket) -> Callable[[Event], Coroutine[Any, Any, None]] | None:
    """Return the `send` of a class of the app's own, which may change what goes out; `None` if it is Starlette's."""
    kind = websocket.kind if isinstance(websocket, TakenOver) else type(websocket)
    return None if kind.send is WebSocket.send else MethodType(kind.send, websocket)


# What a user sees of it, in an error for example, is the class that it was.
TakenOver.__name__ = TakenOver.__qualname__ = "WebSocket"


@cache
def _taken_over(kind: type[WebSocket]) -> type[TakenOver]:
    if kind is WebSocket:
        return TakenOver
    # A class of the app's own: its readers stay as they are.
    own = {name: getattr(kind, name) for name in _READERS if getattr(kind, name) is not getattr(WebSocket, name)}
    return type(kind.__name__, (TakenOver, kind), {"kind": kind, **own})


def _event_of(event: Event) -> Event:
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event["code"], event.get("reason"))
    return event


class Ended:
    """What is left of a connection when its socket is gone: its code and reason, and nothing that holds the rest.

    Without it, the WebSocket, its scope and the connection would hold each other until the garbage collector comes.
    """

    __slots__ = ("code", "manager", "previous", "reason")

    def __init__(self, manager: object, code: int, reason: str) -> None:
        self.manager = manager
        """Whose connection it was."""
        self.previous = None
        """No other connection is behind it."""
        self.code = code
        """The code it ended with."""
        self.reason = reason
        """The reason that came with the code."""

    def closed_error(self) -> ConnectionClosed:
        """Make the error for using the connection after its end."""
        return ConnectionClosed(self.code, self.reason)

    async def send_for_app(self, event: Event) -> None:
        """Raise; a close has nothing to complain about."""
        if event["type"] != "websocket.close":
            raise self.closed_error()

    async def receive_for_app(self) -> Event:
        """Say that it is disconnected."""
        return {"type": "websocket.disconnect", "code": self.code, "reason": self.reason}

    async def refuse(self, code: int, reason: str) -> ConnectionClosed:
        """It is closed already."""
        return self.closed_error()


# A task that waits inside `receive`, and how to get it out of there.


class Reading:
    """A task inside `receive` that may have to be interrupted.

    As `asyncio.timeout` does it: our own cancellation is taken back, anybody else's passes through.
    """

    __slots__ = ("_cancelling", "_is_interrupted", "_is_taken_back", "_task", "before", "throws_away")

    def __init__(self, throws_away: bool, before: Reading | None) -> None:
        self.throws_away = throws_away
        """Whether it only waits for the end, and steps aside for whoever wants the messages."""
        self.before = before
        """The one that began before it and still waits, if another task reads as well."""
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._is_interrupted = False
        self._is_taken_back = False

    def interrupt(self) -> None:
        """Make the task come out of `receive`."""
        if self._task is not None and self._task is not asyncio.current_task() and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def without(self, ended: Reading) -> Reading | None:
        """Return the readings from this one on, without one that has ended."""
        if self is ended:
            return self.before
        if self.before is not None:
            self.before = self.before.without(ended)
        return self

    def take_back(self) -> bool:
        """Undo our own cancellation; return whether it was the only one."""
        if not self._is_interrupted or self._is_taken_back or self._task is None:
            return False
        self._is_taken_back = True
        return self._task.uncancel() <= self._cancelling

    def finish(self) -> None:
        """Undo our own cancellation if `receive` has swallowed it."""
        self.take_back()
