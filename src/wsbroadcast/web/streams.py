"""The router of streams: for viewers that watch a stream, stop it, or ask for its status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple

from fastapi import APIRouter, params
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import compile_path
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketState

from wsbroadcast.audience import user_key
from wsbroadcast.exceptions import (
    ConfigurationError,
    InvalidChannel,
    StreamNotFound,
    kind_of,
)
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.node.membership import SUBPROTOCOL
from wsbroadcast.node.streams import Follower
from wsbroadcast.options import unix_seconds
from wsbroadcast.publication import Position
from wsbroadcast.streams.ledger import Known
from wsbroadcast.transports.http import RefusableRequest, WrittenStream
from wsbroadcast.transports.long_poll import MAX_WAIT_SECONDS
from wsbroadcast.web.access import Access, Authenticate, choose_access
from wsbroadcast.web.http_streams import Answered, path_parameters, prefers_json, preflight, wait_of
from wsbroadcast.web.path_channel import PathChannel
from wsbroadcast.web.viewers import EntriesAsEvents, Viewers


class Admitted(NamedTuple):
    """A request of somebody who may see a stream."""

    known: Known
    """The stream's newest run."""
    viewer: str | None
    """The viewer: a user, as text; `None` if the viewer isn't known."""
    expires_at: float | None
    """Until when the viewer may watch, in seconds since 1970; `None` for no limit."""
    is_owner: bool
    """Whether the viewer may stop it."""


class StreamRoutes:
    """The routes that `create_stream_router` puts behind its path.

    Args:
        manager: Carries the streams.
        path: The path of the router.
        stream: The pattern of the id.
        access: Returns who a viewer is.
        is_public: Whether everybody may watch.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    def __init__(
        self, manager: ConnectionManager, path: str, stream: str | None, access: Access, *, is_public: bool
    ) -> None:
        if not isinstance(manager, ConnectionManager):
            raise ConfigurationError(f"a router needs its manager first, not {kind_of(manager)}")
        if not isinstance(path, str) or (not path.startswith(("/", "{")) and path):
            raise ConfigurationError(f'path begins with a slash, as in "/runs/{{id}}", not {path!r:.80}')
        if stream is None and not compile_path(path)[2]:
            raise ConfigurationError(f'the path {path!r:.80} names no stream: write "/runs/{{id}}", or pass stream="…"')
        if not is_public and not access._authenticates:
            raise ConfigurationError(
                "a stream is shown only to its owner, so a router has to know who the viewer is: pass authenticate=…, "
                "or public=True to show every stream to everybody who knows its id"
            )
        self._core = core_of(manager)
        self._core.use_streams()
        self._access = access
        self._id = PathChannel(path, stream)
        self._is_public = is_public
        self._viewers = Viewers(self._core)
        self._throttle = Throttle()

    def add_to(self, router: APIRouter, path: str, dependencies: Sequence[params.Depends] | None) -> None:
        """Add its routes to a router."""
        parameters = path_parameters(compile_path(path)[2])
        shared: dict[str, Any] = {"dependencies": dependencies, "response_class": Response}
        router.add_api_route(
            path,
            self.watch,
            methods=["GET"],
            name="wsbroadcast_stream",
            summary="Watch a stream by server-sent events, or by long poll",
            openapi_extra={"parameters": [*parameters, *_QUERY]},
            responses={200: _ENTRIES, 204: {"description": "It has ended, and all was seen"}, 404: _NO_STREAM},
            **shared,
        )
        router.add_api_route(
            f"{path}/stop",
            self.stop,
            methods=["POST"],
            name="wsbroadcast_stream_stop",
            summary="Stop a stream",
            openapi_extra={"parameters": parameters},
            responses={200: _json("Whether there was one to stop", {"stopped": {"type": "boolean"}}), 404: _NO_STREAM},
            **shared,
        )
        router.add_api_route(
            f"{path}/status",
            self.status,
            methods=["GET"],
            name="wsbroadcast_stream_status",
            summary="Get the status of a stream",
            openapi_extra={"parameters": parameters},
            responses={200: _json("Its status", _STATUS), 404: _NO_STREAM},
            **shared,
        )
        for each in (path, f"{path}/stop", f"{path}/status"):
            router.add_api_route(each, self.options, methods=["OPTIONS"], include_in_schema=False)
        router.add_api_websocket_route(path, self.open, name="wsbroadcast_stream_socket", dependencies=dependencies)

    # Requests.

    async def watch(self, request: Request) -> Response:
        """Answer with what is in a stream, and what comes next."""
        if not prefers_json(request.headers):
            return Answered(self._stream)
        wait = wait_of(request.query_params.get("wait"))
        if wait is None:
            return PlainTextResponse(f"wait is a number of seconds, 0 to {MAX_WAIT_SECONDS:g}", 422)
        return Answered(lambda scope, receive, send: self._poll(wait, scope, receive, send))

    async def stop(self, request: Request) -> Response:
        """Stop a stream."""
        return Answered(self._stop)

    async def status(self, request: Request) -> Response:
        """Answer with the status of a stream."""
        return Answered(self._tell)

    async def options(self, request: Request) -> Response:
        """Answer a browser that asks what a page of another origin may do."""
        return preflight(self._access, request)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        stream = WrittenStream(scope, receive, send, self._access._sharing(request), is_event_source=True)
        since = since_of(request.headers.get("last-event-id") or request.query_params.get("since"))
        async with self._viewers.answering(stream.websocket):
            admitted = await self._let_in(stream.websocket)
            if admitted.known.is_over:
                await stream.say_nothing()
                return
            async with self._following(stream.websocket, admitted, since, stream.left) as follower:
                entries = follower.take_nowait()
                if since is not None and not entries and follower.is_over:
                    await stream.say_nothing()
                    return
                await stream.begin_with()
                await self._viewers.write(stream, follower, entries, EntriesAsEvents())

    async def _poll(self, wait: float, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        sharing = self._access._sharing(request)
        asked = RefusableRequest(scope, receive, send, sharing)
        since = since_of(request.query_params.get("since") or request.headers.get("last-event-id"))
        async with self._viewers.answering(asked.websocket):
            admitted = await self._let_in(asked.websocket)
            if admitted.known.is_over:
                raise StreamNotFound(admitted.known.start.id)
            async with self._following(asked.websocket, admitted, since, asked.left) as follower:
                entries = follower.take_nowait() or await follower.take(wait)
                state = "running" if follower.end is None else follower.end.state
                told = {"position": follower.position, "state": state, "entries": entries}
                await _respond(to_json(told), sharing, scope, receive, send)

    async def _stop(self, scope: Scope, receive: Receive, send: Send) -> None:
        sharing = self._access._sharing(Request(scope))
        asked = RefusableRequest(scope, receive, send, sharing)
        async with self._viewers.answering(asked.websocket):
            admitted = await self._let_in(asked.websocket)
            if not admitted.is_owner:
                raise StreamNotFound(admitted.known.start.id)
            stopped = await self._core.stop_stream(admitted.known.start.id)
            await _respond(to_json({"stopped": stopped}), sharing, scope, receive, send)

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        sharing = self._access._sharing(Request(scope))
        asked = RefusableRequest(scope, receive, send, sharing)
        async with self._viewers.answering(asked.websocket):
            admitted = await self._let_in(asked.websocket)
            if admitted.known.is_over:
                raise StreamNotFound(admitted.known.start.id)
            told = dict(admitted.known.status)
            if not admitted.is_owner:
                del told["user"]
            await _respond(to_json(told), sharing, scope, receive, send)

    async def open(self, websocket: WebSocket) -> None:
        """Send what is in a stream, and what comes next, as messages of a WebSocket."""
        since = since_of(websocket.query_params.get("since"))
        async with self._viewers.answering(websocket):
            admitted = await self._let_in(websocket)
            if admitted.known.is_over:
                raise StreamNotFound(admitted.known.start.id)

            async def left() -> None:
                while (await websocket.receive())["type"] != "websocket.disconnect":
                    pass  # viewers have nothing to say

            if websocket.application_state is WebSocketState.CONNECTING:  # a token as first message has accepted it
                await websocket.accept(websocket.scope.get(SUBPROTOCOL))
            async with self._following(websocket, admitted, since, left) as follower:
                await self._viewers.send(websocket, follower)

    # Who may see a stream.

    async def _let_in(self, websocket: WebSocket) -> Admitted:
        identity = await self._access._who(websocket)
        viewer = None if identity.user is None else user_key(identity.user)
        try:
            id_ = self._id.of(websocket.path_params)
        except InvalidChannel as error:
            raise StreamNotFound(str(error.channel)) from None
        known = None if id_ is None else await self._core.find_stream(id_)
        if known is None or id_ is None:
            raise StreamNotFound(str(id_))
        user = known.start.user
        is_owner = self._is_public if user is None else viewer == user
        if not is_owner and not self._is_public:  # a stranger gets the same answer as for a stream that doesn't exist
            self._warn_of_nobodys(known)
            raise StreamNotFound(id_)
        await self._viewers.let_in(websocket)
        return Admitted(known, viewer, unix_seconds(identity.expires_at), is_owner)

    def _warn_of_nobodys(self, known: Known) -> None:
        if known.start.user is None and self._throttle.is_due("nobody's"):
            logger.warning(
                "the stream %r has no owner, so a router shows it to nobody: begin it with user=…, or make the router "
                "with public=True",
                known.start.id,
                extra=about("stream.without_owner"),
            )

    def _following(
        self, websocket: WebSocket, admitted: Admitted, since: Position | None, left: Callable[[], Awaitable[None]]
    ) -> AbstractAsyncContextManager[Follower]:
        id_, viewer, expires_at = admitted.known.start.id, admitted.viewer, admitted.expires_at
        return self._viewers.following(websocket, id_, viewer, left, since=since, expires_at=expires_at)


async def _respond(
    body: bytes, sharing: Iterable[tuple[bytes, bytes]], scope: Scope, receive: Receive, send: Send
) -> None:
    response = Response(body, media_type="application/json")
    response.headers["cache-control"] = "no-store"
    response.raw_headers += sharing
    await response(scope, receive, send)


def since_of(text: str | None) -> Position | None:
    """Read the position of a viewer. A text that is no position becomes a position of no run."""
    if not text:
        return None
    try:
        return Position.of(text)
    except ValueError:
        return Position("", 0)


# The documentation of the answers.

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}


def _json(description: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_STATE = {"type": "string", "enum": ["running", "done", "error", "cancelled", "lost"]}
_STATUS = {
    "id": _TEXT,
    "run": _TEXT,
    "user": {"type": ["string", "null"]},
    "state": _STATE,
    "started_at": _NUMBER,
    "ended_at": {"type": ["number", "null"]},
    "error": _TEXT,
}
_ENTRY = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "enum": ["text", "data", "end", "reset"]},
        "text": _TEXT,
        "data": {"type": "object"},
        "state": _STATE,
        "error": _TEXT,
        "position": _TEXT,
    },
}
_POLLED = {"position": _TEXT, "state": _STATE, "entries": {"type": "array", "items": _ENTRY}}
_ENTRIES = _json("The entries of the stream, and those that come next", _POLLED)
_ENTRIES["content"]["text/event-stream"] = {"schema": _TEXT}
_NO_STREAM = {"description": "There is no such stream, or it belongs to somebody else"}
_QUERY = [
    {"name": "since", "in": "query", "schema": _TEXT, "description": "The position of the last entry that was seen."},
    {
        "name": "wait",
        "in": "query",
        "schema": {"type": "number", "minimum": 0, "maximum": MAX_WAIT_SECONDS},
        "description": "For how many seconds a long poll waits.",
    },
]


def create_stream_router(
    manager: ConnectionManager,
    path: str = "/streams/{id}",
    *,
    stream: str | None = None,
    authenticate: Authenticate | None = None,
    allowed_origins: Iterable[str] | None = None,
    access: Access | None = None,
    public: bool = False,
    dependencies: Sequence[params.Depends] | None = None,
) -> APIRouter:
    """Make a router to watch and stop streams, for `app.include_router`.

    | | |
    |---|---|
    | `GET /streams/{id}` | the entries as server-sent events, for `new EventSource(…)`; for JSON, a long poll |
    | `WS /streams/{id}` | the entries as messages of a WebSocket |
    | `POST /streams/{id}/stop` | stops it: `{"stopped": true}` |
    | `GET /streams/{id}/status` | its status |

    The data of an event, and a message, is an entry as JSON: `{"type": "text", "text": "…", "position": "…"}`, with
    `data` for data. The last one is `{"type": "end", "state": "done", "position": "…"}`. The `id` of an event is the
    position, so a browser that reconnects gets what it missed. Other clients name it in `?since=`. If the position is
    of an earlier run, an entry `reset` comes first. If the viewer has seen the end, the answer is 204, and an
    `EventSource` doesn't come back after that.

    A stream is shown only to its owner, the `user` that it was begun with. Everybody else gets 404, as if there were no
    such stream.

    Args:
        manager: The manager that carries the streams.
        path: The path of the routes, after the prefix of `include_router`.
        stream: A pattern that makes the id from path parameters, such as `"chat:{id}"`. By default it is the only
            parameter.
        authenticate: A FastAPI dependency that returns who the viewer is; see `Access`.
        allowed_origins: The pages that may ask; see `Access`.
        access: An `Access` in place of these two. It has more options and may be shared. Its `authorize` isn't asked.
        public: Whether everybody who knows an id may watch. Only the owner can stop it, or everybody if it has none.
        dependencies: FastAPI dependencies that run first.

    Raises:
        ConfigurationError: If an option makes no sense, if the manager's engine can't carry streams, or if there is
            neither `authenticate` nor `public=True`.
    """
    access = choose_access(access, authenticate, None, allowed_origins, {})
    routes = StreamRoutes(manager, path, stream, access, is_public=public)
    router = APIRouter(lifespan=manager.lifespan)
    routes.add_to(router, path, dependencies)
    return router
