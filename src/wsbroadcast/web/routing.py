"""The router factory: an endpoint that nobody has to write."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Never, get_args

from fastapi import APIRouter, WebSocket, params
from starlette.exceptions import WebSocketException
from starlette.routing import BaseRoute, WebSocketRoute

from wsbroadcast.audience import UNSET
from wsbroadcast.close_codes import CloseCode, is_sendable
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EngineError,
    InvalidChannel,
    LifecycleError,
    MessageTooLarge,
    PermissionDenied,
    kind_of,
    ungrouped,
)
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.message import Message
from wsbroadcast.node.membership import ROUTER, SPEAKS, SUBPROTOCOL
from wsbroadcast.protocols import events
from wsbroadcast.transports.http import STREAM
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.web.access import Access, Authenticate, Authorize, choose_access
from wsbroadcast.web.authentication import MAX_SUBPROTOCOLS
from wsbroadcast.web.client_script import is_script, script_routes
from wsbroadcast.web.commands import Commands, Outage
from wsbroadcast.web.event_commands import Accepts, EventCommands, Inbound
from wsbroadcast.web.http_streams import HTTPStreams
from wsbroadcast.web.path_channel import PathChannel, Place

# The endpoint behind a router's path: lets connections in, and does with their messages what the options say.


class Endpoint:
    """What `create_router` puts behind its path.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    def __init__(
        self,
        manager: ConnectionManager,
        path: str,
        access: Access,
        *,
        channel: str | None,
        inbound: Inbound,
        accepts: Accepts,
        include_sender: bool,
    ) -> None:
        if not isinstance(manager, ConnectionManager):
            raise ConfigurationError(
                f'a router needs its manager first, not {kind_of(manager)}: create_router(manager, "/ws")'
            )
        if not isinstance(path, str) or (not path.startswith(("/", "{")) and path):
            raise ConfigurationError(f'path begins with a slash, as in "/ws/{{channel}}"; this is {path!r:.80}')
        if inbound not in get_args(Inbound):
            raise ConfigurationError(f"inbound must be broadcast, commands, handle or ignore, not {inbound!r}")
        if accepts not in get_args(Accepts):
            raise ConfigurationError(f"accepts must be any, text, bytes or json, not {accepts!r}")
        if inbound == "commands" and accepts not in ("any", "json"):
            raise ConfigurationError(f"commands are JSON: accepts must be json, not {accepts!r}")
        self.manager = manager
        """The manager that keeps its connections."""
        self._core = core_of(manager)
        self._access = access
        self._channel = PathChannel(path, channel)
        self._place = Place(manager, path) if channel is None else None
        self._inbound = inbound
        self._accepts = accepts
        self._outage = Outage()
        self._commands = Commands(self._core, access, self._outage, include_sender=include_sender)
        self._event_commands = EventCommands(
            self._core, access, self._commands, inbound=inbound, accepts=accepts, include_sender=include_sender
        )
        self._include_sender = include_sender
        self.http = HTTPStreams(manager, self.open, self._channel, access, self._event_commands)
        """What it does with HTTP requests."""

    async def open(self, websocket: WebSocket) -> None:
        """Serve one connection from its handshake to its end."""
        try:
            name = self._channel.of(websocket.path_params)
            if name is not None and is_script(websocket.scope["path"]):
                raise InvalidChannel(name, "this is the name of the client's script")
            if self._place is not None and name is not None:
                self._place.see(websocket.scope, websocket.path_params)
            websocket.scope[ROUTER] = True
            if events.SUBPROTOCOL in websocket.scope.get("subprotocols", ())[:MAX_SUBPROTOCOLS]:
                websocket.scope[SUBPROTOCOL] = events.SUBPROTOCOL
                websocket.scope[SPEAKS] = events.events
            connection = await self._access._connect(self.manager, websocket, name)
        except (ConnectionClosed, WebSocketException):
            return  # gone, or refused and told so
        except InvalidChannel as error:
            await refuse(websocket, 403, CloseCode.POLICY_VIOLATION, f"invalid channel: {error.rule}")
            return
        code: int = CloseCode.INTERNAL_ERROR
        reason = ""
        try:
            await self._serve(connection, name)
            code = CloseCode.NORMAL
        except Exception as error:
            code, reason = _end_of(ungrouped(error, *_ENDS), connection)
        finally:
            if connection.is_open:
                await connection.close(code if is_sendable(code) else CloseCode.INTERNAL_ERROR, reason)

    async def _serve(self, connection: Connection, name: str | None) -> None:
        if (answer := connection.websocket.scope.get(STREAM)) is not None:
            await answer.serve(connection)
        elif connection._sink.has_positions:
            await self._event_commands.serve(connection, name)
        elif self._inbound == "ignore":
            await connection.wait_closed()
        elif self._inbound == "commands":
            while True:
                await self._commands.obey(connection, await connection.receive_json())
        else:
            read = _READERS[self._accepts]
            while True:
                message = await read(connection)
                if self._inbound == "broadcast":
                    try:
                        await self._broadcast(connection, message, name)
                    except Exception as error:
                        self._ignore(ungrouped(error, EngineError))

    async def _broadcast(self, connection: Connection, message: object, name: str | None) -> None:
        if self._access._authorize is not None:
            try:
                await self._access._check(connection, "publish", name)
            except PermissionDenied as denied:
                await connection.send(await self._access._denied(connection, denied))
                return
        if self._accepts == "json":
            message = Message.json(message)  # a JSON string goes out as one, not as bare text
        if name is not None and name not in connection.channels:
            return  # who was unsubscribed from it has nobody to talk to
        exclude = () if self._include_sender else (connection,)
        await self._core.broadcast(self._core.publications(message, UNSET if name is None else name, exclude=exclude))

    def _ignore(self, error: Exception) -> None:
        # The broker is everybody's trouble: were they closed for it, all would come back at once, and find it again.
        if not isinstance(error, EngineError):
            raise error
        counters = self._core.counters
        counters.unpublished += 1
        self._outage.log("messages of clients are ignored, %d so far: %s", counters.unpublished, error)


# What may end a connection without being an error; of a group of them the first counts that is named first here.
_ENDS = (WebSocketException, MessageTooLarge, ConnectionClosed, LifecycleError)


def _end_of(error: Exception, connection: Connection) -> tuple[int, str]:
    match error:
        case WebSocketException():
            return error.code, error.reason or ""
        case MessageTooLarge():
            return CloseCode.MESSAGE_TOO_BIG, str(error)
        case ConnectionClosed():
            return CloseCode.NORMAL, ""  # it has its code
        case LifecycleError() if not connection.is_open:
            return CloseCode.NORMAL, ""  # the manager has ended, and closed it
    raise error


_READERS: dict[str, Callable[[Connection], Any]] = {
    "any": Connection.receive,
    "text": Connection.receive_text,
    "bytes": Connection.receive_bytes,
    "json": Connection.receive_json,
}


# The factories.


def create_router(
    manager: ConnectionManager,
    path: str = "/ws",
    *,
    channel: str | None = None,
    inbound: Inbound = "broadcast",
    accepts: Accepts = "any",
    include_sender: bool = True,
    authenticate: Authenticate | None = None,
    authorize: Authorize | None = None,
    allowed_origins: Iterable[str] | None = None,
    access: Access | None = None,
    dependencies: Sequence[params.Depends] | None = None,
    http: bool = False,
    script: bool = True,
    **moved: Never,
) -> APIRouter:
    """Make a router with one WebSocket endpoint, for `app.include_router`.

    A path parameter subscribes: every connection to `/ws/{channel}` is subscribed to the channel in its URL. What a
    client sends is broadcast to that channel, or to everyone if the path names no channel. The router carries the
    manager's lifespan and binds it to the app, so that `ManagerDep` finds it.

    Before a connection is accepted, in this order: `dependencies` run, its origin is checked, the manager's limits say
    whether there is room, `authenticate` says who it is, and `authorize` whether it may subscribe to the path's
    channel. Who may not come in gets an HTTP response that says why.

    Args:
        manager: The manager that keeps the connections.
        path: Where the endpoint is, behind the prefix of `include_router`. The prefix may hold the parameter too.
        channel: A pattern that makes the channel from path parameters, such as `"{tenant}:{room}"`. By default it is
            the only parameter there is, of a prefix or a mount too. Clients choose it freely then; a pattern such as
            `"room:{room}"` keeps them away from other channels of yours.
        inbound: `broadcast` what clients send, obey the `commands` that they send, leave it to the `on_message` hooks
            (`handle`), or `ignore` it.
        accepts: What clients may send; anything else closes that connection with 1003, or 1007 for broken JSON.
        include_sender: Whether a client gets its own messages back.
        authenticate: A FastAPI dependency that says who it is; see `Access`.
        authorize: Says what a connection may do with a channel; see `Access`.
        allowed_origins: The pages that may connect; see `Access`.
        access: An `Access` instead of these three, which has more options and may be shared.
        dependencies: FastAPI dependencies that run first. Those that `yield` end with the connection.
        http: Whether the path serves HTTP as well: events and long poll by GET, and what clients say by POST; see
            `create_sse_router`.
        script: Whether the browser's client is served beside the endpoint, as `wsbroadcast.js`; to anybody.
        moved: None: what was here before is an option of `Access`.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = choose_access(access, authenticate, authorize, allowed_origins, moved)
    endpoint = Endpoint(
        manager, path, access, channel=channel, inbound=inbound, accepts=accepts, include_sender=include_sender
    )
    router = APIRouter(lifespan=manager.lifespan, routes=script_routes(path) if script else None)
    router.add_api_websocket_route(path, endpoint.open, name="wsbroadcast", dependencies=dependencies)
    if http:
        endpoint.http.add_to(router, path, dependencies)
    return router


def create_sse_router(
    manager: ConnectionManager,
    path: str = "/sse",
    *,
    channel: str | None = None,
    inbound: Inbound = "ignore",
    authenticate: Authenticate | None = None,
    authorize: Authorize | None = None,
    allowed_origins: Iterable[str] | None = None,
    access: Access | None = None,
    dependencies: Sequence[params.Depends] | None = None,
    script: bool = True,
    **moved: Never,
) -> APIRouter:
    """Make a router that serves server-sent events, to which `new EventSource("/sse/news")` listens.

    A stream is a `Connection` like any other: in `connections`, in hooks, with a backlog, a policy and an end. Where
    the channel of the path has a history, an event's `id` is its position, so that a browser which comes back by itself
    gets what it missed: it sends the last `id`, and `?since=` of the URL is for the first time. An event `hello` comes
    first, and `recovered` says whether everything that was missed follows. Bytes are base64 in events named `binary`.
    A request that accepts `application/json` and no events is a long poll: `?since=…&wait=20` waits up to 20 seconds.

    Args:
        manager: The manager that keeps the connections.
        path: As for `create_router`.
        channel: As for `create_router`.
        inbound: What becomes of commands that clients POST: `ignore`, or `broadcast` what they publish.
        authenticate: A FastAPI dependency that says who it is; see `Access`.
        authorize: Says what a connection may do with a channel; see `Access`.
        allowed_origins: The pages that may connect; see `Access`.
        access: An `Access` instead of these three, which has more options and may be shared.
        dependencies: FastAPI dependencies that run first.
        script: As for `create_router`.
        moved: None.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = choose_access(access, authenticate, authorize, allowed_origins, moved)
    endpoint = Endpoint(manager, path, access, channel=channel, inbound=inbound, accepts="any", include_sender=True)
    router = APIRouter(lifespan=manager.lifespan, routes=script_routes(path) if script else None)
    endpoint.http.add_to(router, path, dependencies)
    return router


def create_routes(
    manager: ConnectionManager,
    path: str = "/ws",
    *,
    channel: str | None = None,
    inbound: Inbound = "broadcast",
    accepts: Accepts = "any",
    include_sender: bool = True,
    authenticate: Authenticate | None = None,
    authorize: Authorize | None = None,
    allowed_origins: Iterable[str] | None = None,
    access: Access | None = None,
    script: bool = True,
    http: bool = False,
    **moved: Never,
) -> list[BaseRoute]:
    """Make the same endpoint as routes for plain Starlette; pass `manager.lifespan` to `Starlette` yourself.

    `authenticate` is a FastAPI dependency here too. With `http` the path serves events and long poll as well.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = choose_access(access, authenticate, authorize, allowed_origins, moved)
    endpoint = Endpoint(
        manager, path, access, channel=channel, inbound=inbound, accepts=accepts, include_sender=include_sender
    )
    routes: list[BaseRoute] = [
        *(script_routes(path) if script else ()),
        WebSocketRoute(path, endpoint.open, name="wsbroadcast"),
    ]
    return routes + endpoint.http.routes(path) if http else routes
