"""A router's path over HTTP: events (GET), long poll (GET that accepts only JSON), and commands (POST)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from secrets import token_urlsafe
from typing import Any

from fastapi import APIRouter, params
from pydantic_core import from_json, to_json
from starlette.datastructures import Headers
from starlette.exceptions import WebSocketException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from wsbroadcast.audience import Audience, user_key
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import ConnectionClosed, InvalidChannel, LimitExceeded
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.message import Message
from wsbroadcast.node.admission import POLL, Poll, address_of
from wsbroadcast.protocols.commands import MAX_ID_CHARACTERS, Answer, ErrorCode, error_answer
from wsbroadcast.protocols.events import events
from wsbroadcast.protocols.sse import server_sent_events
from wsbroadcast.publication import Position
from wsbroadcast.transports import SPEAKS
from wsbroadcast.transports.http import EventStream, Header, RefusableRequest, stream_headers
from wsbroadcast.transports.long_poll import KEPT_SECONDS, MAX_WAIT_SECONDS, LongPoll
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.typed.sockets import SocketInfo
from wsbroadcast.web.access import Access
from wsbroadcast.web.authentication import Handshake
from wsbroadcast.web.documentation import SINCE, document_http, unique_id
from wsbroadcast.web.event_commands import EventCommands
from wsbroadcast.web.path_channel import PathChannel

MAX_CHANNELS = 100
"""The most channels that one stream may have besides that of its path."""

BODY_SECONDS = 30.0
"""How long the body of a command may take to arrive, in seconds."""

STATUSES: dict[str, int] = {
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.UNKNOWN_METHOD: 404,
    ErrorCode.LIMIT_EXCEEDED: 429,
    ErrorCode.FAILED: 500,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.TIMEOUT: 504,
}
"""The HTTP status by the error code of a command that was not done; 400 for all other codes."""

# The ids of places that are kept between two polls.
_POLL = re.compile("[A-Za-z0-9_-]{16,64}")

Open = Callable[[WebSocket], Awaitable[None]]
"""Serves a connection from its handshake to its end."""


class HTTPStreams:
    """Answers HTTP requests on the path of a router.

    Args:
        manager: Keeps the connections.
        open_: Serves one connection.
        channel: Makes the channel from a path.
        access: Decides who may come in.
        commands: Carries out commands.
        socket: The types of what goes over the path.
    """

    def __init__(
        self,
        manager: ConnectionManager,
        open_: Open,
        channel: PathChannel,
        access: Access,
        commands: EventCommands,
        socket: SocketInfo,
    ) -> None:
        self.socket = socket
        """The types of what goes over the path, for documents."""
        self._core = core_of(manager)
        self._open = open_
        self._access = access
        self._channel = channel
        self._commands = commands

    def add_to(
        self, router: APIRouter, path: str, dependencies: Sequence[params.Depends] | None, *, include_in_schema: bool
    ) -> None:
        """Add its routes to a router. Their OpenAPI comes from separate routes, which are only for documentation."""
        if include_in_schema:
            document_http(router, path, self.socket, _QUERY, [*(dependencies or ()), *self._access._dependencies])
        every: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
            ("GET", self.get, "wsbroadcast_events"),
            ("POST", self.post, "wsbroadcast_command"),
            ("HEAD", self.get, "wsbroadcast_head"),
            ("OPTIONS", self.options, "wsbroadcast_options"),
        ]
        for method, endpoint, name in every:
            router.add_api_route(
                path,
                endpoint,
                methods=[method],
                name=name,
                include_in_schema=False,
                dependencies=None if method == "OPTIONS" else dependencies,
                generate_unique_id_function=unique_id,
            )

    def routes(self, path: str) -> list[BaseRoute]:
        """Return its routes for plain Starlette, where a route for GET also answers HEAD."""
        return [
            Route(path, self.get, methods=["GET"], name="wsbroadcast_events"),
            Route(path, self.post, methods=["POST"], name="wsbroadcast_command"),
            Route(path, self.options, methods=["OPTIONS"]),
        ]

    async def get(self, request: Request) -> Response:
        """Answer with a stream of events, or, to a long poll, with what has come."""
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
        stream = EventStream(
            scope,
            receive,
            send,
            self._access._sharing(request),
            is_event_source=not is_events,
            begin=self._beginning(request, is_events=is_events),
        )
        kept = self._kept(request)
        stream.websocket.scope[SPEAKS] = server_sent_events(kept, is_events=is_events)
        await self._open(stream.websocket)

    def _beginning(self, request: Request, *, is_events: bool) -> Callable[[Connection], Awaitable[None]] | None:
        # Return what is done first for this client; `None` for nothing.
        channels = request.query_params.getlist("channel")[:MAX_CHANNELS] if is_events else []
        watched = request.query_params.getlist("presence")[: MAX_CHANNELS + 1]
        return partial(self._begin, channels, watched, request.path_params) if channels or watched else None

    async def _begin(
        self, channels: list[str], watched: list[str], path: Mapping[str, str], connection: Connection
    ) -> None:
        # Done like commands over a WebSocket, and answered by the same events. A channel is `name` or `name@position`.
        # For presence, an empty name stands for the path's channel.
        session = self._commands.session(self._channel.of(path))
        for each in channels:
            name, at, since = each.rpartition("@")
            try:
                Position.of(since if at else "")
            except ValueError:  # it is only a name, perhaps with an @ in it
                name, since = each, ""
            asked = {"type": "subscribe", "channel": name, "since": since or None, "id": name}
            await self._commands.obey(connection, session, set(), asked)
        for name in dict.fromkeys(watched):
            asked = {"type": "presence", "channel": name}
            await self._commands.obey(connection, session, set(), asked, {"channel": name} if name else {})

    async def _poll(self, wait: float, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        kept = self._kept(request)
        if kept is not None and not (request.query_params.get("since") or request.headers.get("last-event-id")):
            wait = 0.0
        most = self._core.life.node.dispatcher.turn_bytes * 8
        begin = self._beginning(request, is_events=False)
        poll = LongPoll(scope, receive, send, self._access._sharing(request), kept, wait, most, begin)
        poll.websocket.scope[SPEAKS] = events
        if self._core.life.node.membership.admission.quotas.counts_places:
            named = request.query_params.get("id", "")
            if _POLL.fullmatch(named):
                poll.websocket.scope[POLL] = Poll(named, wait + KEPT_SECONDS)
            poll.tell(named if POLL in poll.websocket.scope else token_urlsafe(12))
        await self._open(poll.websocket)

    async def post(self, request: Request) -> Response:
        """Do what a client without a WebSocket asks for: to publish, or to call a method."""
        return Answered(self._obey)

    async def _obey(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        sharing = self._access._sharing(request)
        if (admitted := await self._admit(scope, receive, send, sharing, listens=False)) is None:
            return
        try:
            status, answer = await self._answer(request, *admitted)
        except ClientDisconnect:
            return
        response = Response(to_json(answer), status, media_type="application/json")
        response.headers["cache-control"] = "no-store"
        response.raw_headers += sharing
        await response(scope, receive, send)

    async def _answer(self, request: Request, channel: str | None, who: Handshake) -> tuple[int, Answer]:
        inbound = self._core.life.node.membership.admission.inbound
        address = address_of(request.scope)
        key = address if who.user is None else f"user {user_key(who.user)}"
        try:
            inbound.check_request(key, address)
            asked = await read_json(request, partial(inbound.check_size, who=address))
        except LimitExceeded as error:
            return 413 if error.limit == "max_inbound_bytes" else 429, error_answer(
                ErrorCode.LIMIT_EXCEEDED, error.reason
            )
        except ValueError as error:
            return 400, error_answer(ErrorCode.INVALID_COMMAND, str(error))
        except TimeoutError:
            return 408, error_answer(ErrorCode.INVALID_COMMAND, "the body didn't come in time")
        exclude = asked.get("exclude") if isinstance(asked, dict) else None
        ids = (exclude,) if isinstance(exclude, str) and len(exclude) <= MAX_ID_CHARACTERS else ()
        answer = await self._commands.answer(who, channel, asked, ids, key, partial(left, request))
        return 200 if answer["type"] != "error" else STATUSES.get(answer["code"], 400), answer

    async def _head(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Answer what a GET would be answered: so nobody learns more in this way.
        sharing = self._access._sharing(Request(scope))
        if await self._admit(scope, receive, send, sharing, listens=True) is not None:
            headers = [*stream_headers(is_http_1_1=False), *sharing]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b""})

    async def _admit(
        self, scope: Scope, receive: Receive, send: Send, sharing: Iterable[Header], *, listens: bool
    ) -> tuple[str | None, Handshake] | None:
        # Return the channel and the sender of a request that becomes no connection; `None` if it is gone or refused.
        websocket = RefusableRequest(scope, receive, send, sharing).websocket
        try:
            channel = self._channel.of(websocket.path_params)
            return channel, await self._access._look(websocket, channel if listens else None)
        except (ConnectionClosed, WebSocketException):
            return None
        except InvalidChannel as error:
            await refuse(websocket, 403, CloseCode.POLICY_VIOLATION, f"invalid channel: {error.rule}")
            return None

    async def options(self, request: Request) -> Response:
        """Answer a browser that asks what a page of another origin may do (Fetch, 3.2.2)."""
        return preflight(self._access, request)

    def _kept(self, request: Request) -> str | None:
        # The channel of the path, if it has a history. A wrong name is reported later, when it is joined.
        try:
            name = self._channel.of(request.path_params)
        except InvalidChannel:
            return None
        rules = self._core.rules
        is_kept = name is not None and rules is not None and rules.of(Audience("channel", name)) is not None
        return name if is_kept else None


# The documentation of the parameters.


_TEXT = {"type": "string"}
_QUERY = [
    SINCE,
    {
        "name": "wait",
        "in": "query",
        "schema": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS},
        "description": "For how many seconds a long poll waits.",
    },
    {
        "name": "events",
        "in": "query",
        "schema": {"type": "string", "enum": ["1"]},
        "description": "The data of every event is an object of the protocol `wsbroadcast.v1`.",
    },
    {
        "name": "channel",
        "in": "query",
        "schema": {"type": "array", "items": _TEXT, "maxItems": MAX_CHANNELS},
        "description": "With `events=1`: further channels, as `name` or `name@position`.",
    },
    {
        "name": "presence",
        "in": "query",
        "schema": {"type": "array", "items": _TEXT, "maxItems": MAX_CHANNELS + 1},
        "description": "A channel of the request whose members are sent; empty for that of the path.",
    },
    {
        "name": "id",
        "in": "query",
        "schema": {"type": "string", "pattern": f"^{_POLL.pattern}$"},
        "description": "The `id` of a long poll's last answer, which keeps its place.",
    },
]


def path_parameters(names: Iterable[str]) -> list[dict[str, Any]]:
    """Describe the parameters of a path."""
    return [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]


class Answered(Response):
    """A response that a function writes."""

    def __init__(self, answer: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__()
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the response."""
        await self._answer(scope, receive, send)


class Head(Response):
    """A response without a body."""

    def __init__(self, status: int, headers: list[Header]) -> None:
        super().__init__(status_code=status)
        self.raw_headers = headers


def preflight(access: Access, request: Request) -> Response:
    """Answer a browser that asks what a page of another origin may do (Fetch, 3.2.2)."""
    sharing = dict(access._sharing(request))
    if b"access-control-allow-origin" not in sharing:
        return Head(403, [*sharing.items()])
    allowed = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, last-event-id"),
        (b"access-control-max-age", b"600"),
    ]
    return Head(204, [*sharing.items(), *allowed])


async def read_json(request: Request, check: Callable[[int], None]) -> object:
    """Return the JSON in the body of a request.

    Raises:
        LimitExceeded: If it is too large.
        ValueError: If it isn't JSON, or its content type doesn't say so. A form of another page can't say so.
        TimeoutError: If it doesn't come in time.
        ClientDisconnect: If the client leaves before its end.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ValueError("a command is JSON: send it with the content-type application/json")
    body = bytearray()
    async with asyncio.timeout(BODY_SECONDS):
        async for part in request.stream():
            body += part
            check(len(body))
    try:
        value = from_json(bytes(body), allow_inf_nan=False)
        Message.json(value)  # 1e999 fails here: it was read as infinity
    except ValueError:
        raise ValueError("the body is not valid JSON") from None
    return value


async def left(request: Request) -> None:
    """Return when a client whose request was read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def prefers_json(headers: Headers) -> bool:
    """Return whether a client asks for JSON and not for events. A client that takes anything gets events."""
    kinds = {each.partition(";")[0].strip().lower() for each in headers.get("accept", "").split(",")}
    return "application/json" in kinds and "text/event-stream" not in kinds


def wait_of(text: str | None) -> float | None:
    """Return for how many seconds a poll waits; `None` if the text is no such number."""
    if text is None:
        return MAX_WAIT_SECONDS * 2 / 3
    if not text.isascii() or not text.replace(".", "", 1).isdigit():
        return None
    return min(float(text), MAX_WAIT_SECONDS)
