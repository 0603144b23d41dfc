"""An HTTP request with a stream of events as its response, in the form of a WebSocket that receives nothing.

So it is admitted, registered, closed and refused like every other connection, and hooks run for it. For the app it is a
Starlette WebSocket, and what the app sends there is an event.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from random import uniform
from typing import Any

from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import Owner, SlowConsumers
from wsbroadcast.delivery.sse import Opened, drawn_retry, last_event
from wsbroadcast.delivery.uvicorn import find_transport
from wsbroadcast.protocols import sse
from wsbroadcast.publication import Protocol as Speaks

STREAM = "wsbroadcast.stream"
"""The key in such a WebSocket's scope for the request."""

Header = tuple[bytes, bytes]

# After these statuses an ordinary client comes back. `EventSource` takes every status but 200 as final.
_LATER = frozenset({429, 502, 503, 504})

# For how many seconds a refused `EventSource` waits before it comes back, if there is no `Retry-After`.
_REFUSED_FOR = 5.0


def websocket_scheme(scope: Scope) -> str:
    """Return the scheme that a WebSocket would have."""
    return "wss" if scope.get("scheme") == "https" else "ws"


def websocket_scope(scope: Scope, answer: Answer) -> Scope:
    """Return the scope of the WebSocket that stands for a request."""
    return {
        **scope,
        "type": "websocket",
        "scheme": websocket_scheme(scope),
        "subprotocols": [],
        "extensions": {"websocket.http.response": {}},
        STREAM: answer,
    }


class Answer(ABC):
    """Answers a request. It makes a WebSocket that stands for the request, and a response of what is sent there.

    Args:
        scope: The scope of the request.
        receive: The `receive` of the request.
        send: The `send` of the request, as middleware has wrapped it.
        headers: The headers of every response, such as those of CORS.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Iterable[Header]) -> None:
        self._receive = receive
        self._send = send
        self._headers = tuple(headers)
        self._has_begun = False
        self.websocket = WebSocket(websocket_scope(scope, self), self._next, self._say)
        """The WebSocket that stands for the request."""

    @abstractmethod
    def make_sink(self, owner: Owner, slow_consumers: SlowConsumers, speaks: Speaks) -> tuple[Sink, str]:
        """Make its sink; return it with why it isn't the fast one."""

    @abstractmethod
    async def serve(self, connection: Any) -> None:
        """Return when the connection has ended, or the answer can be given."""

    async def left(self) -> None:
        """Return when the peer has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # The `receive` and `send` of the WebSocket.

    async def _next(self) -> MutableMapping[str, Any]:
        if not self._has_begun:
            self._has_begun = True
            return {"type": "websocket.connect"}
        while (await self._receive())["type"] != "http.disconnect":
            pass  # the body of the request isn't used
        return {"type": "websocket.disconnect", "code": ABNORMAL, "reason": ""}

    @abstractmethod
    async def _say(self, event: MutableMapping[str, Any]) -> None: ...


class EventStream(Answer):
    """One `text/event-stream` response.

    Args:
        scope: The scope of the request.
        receive: The `receive` of the request.
        send: The `send` of the request, as middleware has wrapped it.
        headers: The headers of every response, such as those of CORS.
        is_event_source: Whether the client may be a browser's `EventSource`. That takes every status but 200 as final,
            so it is told when to come back instead.
        begin: Called with the connection once it is registered.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: Iterable[Header],
        *,
        is_event_source: bool,
        begin: Callable[[Any], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(scope, receive, send, headers)
        self._is_event_source = is_event_source
        self._begin = begin
        self._is_http_1_1 = scope.get("http_version", "1.1") == "1.1"
        self._opened = Opened(send, receive)
        # Whether an `EventSource` was refused, and is told to come back later.
        self._later = False

    def make_sink(self, owner: Owner, slow_consumers: SlowConsumers, speaks: Speaks) -> tuple[Sink, str]:
        """Make its sink; return it with why it isn't the fast one."""
        return self._opened.sink(owner, slow_consumers, speaks), self._opened.refused

    async def serve(self, connection: Any) -> None:
        """Wait for the connection's end."""
        try:
            if self._begin is not None:
                await self._begin(connection)
            await connection.wait_closed()
        finally:
            await self._opened.finish()

    async def _say(self, event: MutableMapping[str, Any]) -> None:
        match event["type"]:
            case "websocket.accept":
                await self._accept(event.get("headers") or ())
            case "websocket.send":
                text = event.get("text")
                await self._write(sse.app_event(event["bytes"] if text is None else text))
            case "websocket.close" if self._opened.is_open:
                await self._write(last_event(event.get("code") or 1000, event.get("reason") or ""), more_body=False)
            case "websocket.close":
                await self._respond(403, ())
                await self._write(b"", more_body=False)
            case "websocket.http.response.start":
                await self._respond(event["status"], event["headers"])
            case "websocket.http.response.body":
                body = event.get("body", b"")
                if self._later:
                    body = sse.comment(body)
                await self._write(body, more_body=event.get("more_body", False))

    async def _write(self, body: bytes, *, more_body: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def _accept(self, headers: Iterable[Header]) -> None:
        await self._opened.open(
            self._head(200, (*stream_headers(is_http_1_1=self._is_http_1_1), *headers)), drawn_retry()
        )

    async def _respond(self, status: int, headers: Iterable[Header]) -> None:
        if status not in _LATER or not self._is_event_source:
            await self._send(self._head(status, headers))
            return
        self._later = True
        seconds = _seconds(headers) or _REFUSED_FOR
        await self._send(self._head(200, stream_headers(is_http_1_1=self._is_http_1_1)))
        await self._write(sse.retry(uniform(seconds, 2 * seconds)))  # noqa: S311  # no secret

    def _head(self, status: int, headers: Iterable[Header]) -> dict[str, Any]:
        # Each response has its own list, because some middleware changes it in place.
        return {"type": "http.response.start", "status": status, "headers": [*headers, *self._headers]}


class WrittenStream(EventStream):
    """A stream whose events are written by its caller."""

    async def begin_with(self) -> None:
        """Send the head of the response."""
        await self._accept(())

    async def write(self, events: bytes) -> None:
        """Send events. It waits as long as the peer can't take them."""
        await self._write(events)

    async def end(self, events: bytes = b"") -> None:
        """Send the last events, and end the response."""
        await self._write(events, more_body=False)

    async def say_nothing(self) -> None:
        """Answer with 204, after which an `EventSource` doesn't come back (WHATWG HTML, 9.2.3)."""
        await self._send(self._head(204, ()))
        await self._send({"type": "http.response.body", "body": b""})

    def abort(self) -> None:
        """Cut off a stream whose peer takes nothing, or is gone."""
        transport = find_transport(self._receive)
        if transport is not None:
            transport.abort()

    async def wind_up(self) -> None:
        """Tell the server that nothing follows, if it doesn't know that the peer is gone."""
        await self._opened.finish()


class RefusableRequest(EventStream):
    """A request that becomes no stream, but is checked like one. It can be refused; nothing else is sent.

    Args:
        scope: The scope of the request.
        receive: The `receive` of the request.
        send: The `send` of the request.
        headers: The headers of every response.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, headers: Iterable[Header]) -> None:
        super().__init__(scope, receive, send, headers, is_event_source=False)

    async def _say(self, event: MutableMapping[str, Any]) -> None:
        if event["type"] not in ("websocket.accept", "websocket.send"):
            await super()._say(event)


def stream_headers(*, is_http_1_1: bool) -> list[Header]:
    """Return the headers of an event stream. They keep proxies from caching, changing or buffering it."""
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache, no-store, no-transform"),
        (b"x-accel-buffering", b"no"),
    ]
    if is_http_1_1:  # HTTP/2 forbids it (RFC 9113, 8.2.2)
        headers.append((b"connection", b"close"))  # the socket ends with it, so untaken bytes delay no later request
    return headers


def _seconds(headers: Iterable[Header]) -> float | None:
    for name, value in headers:
        if name.lower() == b"retry-after" and value.isdigit():
            return float(value)
    return None
