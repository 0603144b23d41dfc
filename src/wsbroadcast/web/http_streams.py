"""The same channel over HTTP: events (GET), long poll (GET that accepts JSON only), and what clients say (POST)."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from secrets import token_urlsafe

from fastapi import APIRouter, params
from starlette.datastructures import Headers
from starlette.exceptions import WebSocketException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import InvalidChannel
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.node.admission import POLL, Poll
from wsbroadcast.node.membership import SPEAKS
from wsbroadcast.protocols.events import events
from wsbroadcast.protocols.sse import server_sent_events
from wsbroadcast.transports.http import EventStream, Header, stream_headers
from wsbroadcast.transports.long_poll import KEPT_SECONDS, MAX_WAIT_SECONDS, LongPoll
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.web.access import Access
from wsbroadcast.web.path_channel import PathChannel

# What a place is called that is kept between two polls.
_POLL = re.compile("[A-Za-z0-9_-]{16,64}")

Open = Callable[[WebSocket], Awaitable[None]]
"""Serves a connection from its handshake to its end."""


class HTTPStreams:
    """What a router does with HTTP requests on its path.

    Args:
        manager: Keeps the connections.
        open_: Serves one.
        channel: The channel of a path.
        access: Who may come in.
    """

    def __init__(self, manager: ConnectionManager, open_: Open, channel: PathChannel, access: Access) -> None:
        self._core = core_of(manager)
        self._open = open_
        self._access = access
        self._channel = channel

    def add_to(self, router: APIRouter, path: str, dependencies: Sequence[params.Depends] | None) -> None:
        """Add its routes to a router."""
        router.add_api_route(
            path, self.get, methods=["GET"], name="wsbroadcast_http", dependencies=dependencies, response_class=Response
        )
        router.add_api_route(path, self.get, methods=["HEAD"], include_in_schema=False, dependencies=dependencies)
        router.add_api_route(path, self.options, methods=["OPTIONS"], include_in_schema=False)

    def routes(self, path: str) -> list[BaseRoute]:
        """Return its routes for plain Starlette, where GET stands for HEAD too."""
        return [
            Route(path, self.get, methods=["GET"], name="wsbroadcast_http"),
            Route(path, self.options, methods=["OPTIONS"]),
        ]

    async def get(self, request: Request) -> Response:
        """Answer with a stream of events, or with what has come."""
        if request.method == "HEAD":
            return Answered(self._head)
        if prefers_json(request.headers):
            wait = wait_of(request.query_params.get("wait"))
            if wait is None:
                return PlainTextResponse(f"wait is a number of seconds, 0 to {MAX_WAIT_SECONDS:g}", 422)
            return Answered(lambda scope, receive, send: self._poll(wait, scope, receive, send))
        return Answered(self._stream)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        is_events = request.query_params.get("events") == "1"
        stream = EventStream(scope, receive, send, self._access._sharing(request), is_event_source=not is_events)
        kept = self._kept(request)
        stream.websocket.scope[SPEAKS] = server_sent_events(kept, is_events=is_events)
        await self._open(stream.websocket)

    async def _poll(self, wait: float, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        kept = self._kept(request)
        if kept is not None and not request.query_params.get("since"):
            wait = 0.0
        most = self._core.life.node.dispatcher.turn_bytes * 8
        poll = LongPoll(scope, receive, send, self._access._sharing(request), kept, wait, most)
        poll.websocket.scope[SPEAKS] = events
        if self._core.life.node.membership.admission.quotas.counts_places:
            named = request.query_params.get("id", "")
            if _POLL.fullmatch(named):
                poll.websocket.scope[POLL] = Poll(named, wait + KEPT_SECONDS)
            poll.tell(named if POLL in poll.websocket.scope else token_urlsafe(12))
        await self._open(poll.websocket)

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        # What a GET would be answered with, so that nobody learns more by asking this way.
        request = Request(scope)
        sharing = self._access._sharing(request)
        websocket = EventStream(scope, receive, send, sharing, is_event_source=False).websocket
        try:
            channel = self._channel.of(request.path_params)
            await self._access._look(websocket, channel)
        except WebSocketException:
            return
        except InvalidChannel as error:
            await refuse(websocket, 403, CloseCode.POLICY_VIOLATION, f"invalid channel: {error.rule}")
            return
        headers = [*stream_headers(is_http_1_1=False), *sharing]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    async def options(self, request: Request) -> Response:
        """Answer a browser that asks what a page of another origin may do (Fetch, 3.2.2)."""
        sharing = dict(self._access._sharing(request))
        if b"access-control-allow-origin" not in sharing:
            return Head(403, [*sharing.items()])
        allowed = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, last-event-id"),
            (b"access-control-max-age", b"600"),
        ]
        return Head(204, [*sharing.items(), *allowed])

    def _kept(self, request: Request) -> str | None:
        # The channel of the path, if it has a history. What is wrong with its name is said where it is joined.
        try:
            name = self._channel.of(request.path_params)
        except InvalidChannel:
            return None
        rules = self._core.rules
        is_kept = name is not None and rules is not None and rules.of(Audience("channel", name)) is not None
        return name if is_kept else None


class Answered(Response):
    """A response that writes itself."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write it."""
        await self._answer(scope, receive, send)


class Head(Response):
    """A response without a body."""

    def __init__(self, status: int, headers: list[Header]) -> None:
        super().__init__(status_code=status)
        self.raw_headers = headers


def prefers_json(headers: Headers) -> bool:
    """Tell whether a client asks for JSON, and not for events; one that takes anything gets events."""
    kinds = {each.partition(";")[0].strip().lower() for each in headers.get("accept", "").split(",")}
    return "application/json" in kinds and "text/event-stream" not in kinds


def wait_of(text: str | None) -> float | None:
    """Read for how long a poll waits; `None` if it is no such number."""
    if text is None:
        return MAX_WAIT_SECONDS * 2 / 3
    if not text.isascii() or not text.replace(".", "", 1).isdigit():
        return None
    return min(float(text), MAX_WAIT_SECONDS)
