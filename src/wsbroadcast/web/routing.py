"""The router factories: they make endpoints that nobody has to write by hand."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Never, get_args

from fastapi import APIRouter, WebSocket, params
from starlette.exceptions import WebSocketException
from starlette.routing import BaseRoute, WebSocketRoute

from wsbroadcast.audience import EVERYONE, UNSET, Audience
from wsbroadcast.close_codes import CloseCode, is_sendable
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EncodeError,
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
from wsbroadcast.node.core import Core
from wsbroadcast.node.membership import ROUTER, SUBPROTOCOL
from wsbroadcast.protocols import events
from wsbroadcast.protocols.commands import Refused
from wsbroadcast.transports import SPEAKS
from wsbroadcast.transports.http import STREAM
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.typed.message_types import MessageTypes
from wsbroadcast.typed.sockets import SocketInfo
from wsbroadcast.web.access import Access, Authenticate, Authorize, choose_access
from wsbroadcast.web.authentication import MAX_SUBPROTOCOLS
from wsbroadcast.web.client_script import is_script, script_routes
from wsbroadcast.web.commands import Commands, Outage
from wsbroadcast.web.documentation import document_websocket
from wsbroadcast.web.event_commands import Accepts, EventCommands, Inbound
from wsbroadcast.web.http_streams import HTTPStreams
from wsbroadcast.web.inbound import TypedInbound
from wsbroadcast.web.path_channel import PathChannel, Place

# The endpoint behind a router's path. It lets connections in, and treats their messages as the options say.


class Endpoint:
    """The endpoint that `create_router` puts behind its path.

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
        receives: Any = None,
        sends: Any = None,
        has_websocket: bool = True,
        has_http: bool = False,
    ) -> None:
        if not isinstance(manager, ConnectionManager):
            raise ConfigurationError(
                f'a router needs its manager first, not {kind_of(manager)}: create_router(manager, "/ws")'
            )
        if not isinstance(path, str) or (not path.startswith(("/", "{")) and path):
            raise ConfigurationError(f'path begins with a slash, as in "/ws/{{channel}}", not {path!r:.80}')
        _check_messages(inbound, accepts, receives, sends)
        self.manager = manager
        """The manager that keeps its connections."""
        self._core = core_of(manager)
        self._access = access
        self._channel = PathChannel(path, channel)
        self._place = Place(manager, path) if channel is None else None
        types: MessageTypes[Any] | None = None if receives is None else MessageTypes.of(receives, "receives")
        typed = self._typed = None if types is None else TypedInbound(self._core, types)
        everywhere = self._channel.everywhere
        # Whether a channel from a prefix would escape the check of `sends`.
        self._sends_to_everyone = sends is not None and everywhere == EVERYONE
        self.socket = SocketInfo(
            path=path,
            channel=channel,
            receives=types,
            sends=self._core.send_types(everywhere, sends),
            inbound=inbound,
            has_websocket=has_websocket,
            has_http=has_http,
            accepts=accepts,
            manager=manager,
            methods=self._core.methods.by_name,
            others=partial(_others, self._core),
        )
        """The types of what goes over its path, for documents."""
        if types is not None and self.socket.sends is None and inbound in ("broadcast", "commands"):
            types.check_sendable()
        self._inbound = inbound
        self._accepts = accepts
        self._outage = Outage()
        self._commands = Commands(self._core, access, self._outage, include_sender=include_sender, typed=typed)
        self._event_commands = EventCommands(
            self._core,
            access,
            self._commands,
            inbound=inbound,
            accepts=accepts,
            include_sender=include_sender,
            typed=typed,
        )
        self._include_sender = include_sender
        self.http = HTTPStreams(manager, self.open, self._channel, access, self._event_commands, self.socket)
        """Answers HTTP requests on its path."""

    async def open(self, websocket: WebSocket) -> None:
        """Serve one connection from its handshake to its end."""
        try:
            name = self._channel.of(websocket.path_params)
            if name is not None and is_script(websocket.scope["path"]):
                raise InvalidChannel(name, "this is the name of the client's script")
            if name is not None and self._sends_to_everyone:
                raise ConfigurationError(
                    "sends is checked for everyone, but the channel comes from a prefix: pass channel=…, as in "
                    'channel="{room}"'
                )
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
        elif self._typed is not None:
            await self._serve_typed(connection, name, self._typed)
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

    async def _serve_typed(self, connection: Connection, name: str | None, typed: TypedInbound) -> None:
        while True:
            raw = await connection.receive()
            try:
                if self._inbound == "commands":
                    await self._commands.obey(connection, typed.read_command(raw))
                else:
                    await self._take(connection, typed.read(raw), name, typed)
            except (Refused, PermissionDenied, EncodeError, EngineError) as error:
                await connection.send(await self._commands.answer_to(error, connection))

    async def _take(self, connection: Connection, message: Any, name: str | None, typed: TypedInbound) -> None:
        if self._access._authorize is not None:
            await self._access._check(connection, "publish", name)
        if name is not None and name not in connection.channels:
            return  # it was unsubscribed from the path's channel, so there is nobody to send this to
        if await typed.handle(connection, message, name) or self._inbound == "handle":
            return
        publications = typed.publications(message, name, () if self._include_sender else (connection,))
        try:
            await self._core.broadcast(publications)
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
            message = Message.json(message)  # a JSON string goes out as JSON, not as bare text
        if name is not None and name not in connection.channels:
            return  # it was unsubscribed from the path's channel, so there is nobody to send this to
        exclude = () if self._include_sender else (connection,)
        try:
            publications = self._commands.publications(message, UNSET if name is None else name, exclude)
        except MessageTooLarge:
            raise
        except EncodeError as error:  # it isn't of the type that `sends` of the manager says for the channel
            await connection.send(await self._commands.answer_to(error, connection))
            return
        await self._core.broadcast(publications)

    def _ignore(self, error: Exception) -> None:
        # Without a broker nobody can publish. If clients were closed for that, all would reconnect at once, in vain.
        if not isinstance(error, EngineError):
            raise error
        counters = self._core.counters
        counters.unpublished += 1
        self._outage.log("messages of clients are ignored, %d so far: %s", counters.unpublished, error)


def _check_messages(inbound: Inbound, accepts: Accepts, receives: Any, sends: Any) -> None:
    if inbound not in get_args(Inbound):
        raise ConfigurationError(f"inbound must be broadcast, commands, handle or ignore, not {inbound!r}")
    if accepts not in get_args(Accepts):
        raise ConfigurationError(f"accepts must be any, text, bytes or json, not {accepts!r}")
    if inbound == "commands" and accepts not in ("any", "json"):
        raise ConfigurationError(f"commands are JSON: accepts must be json, not {accepts!r}")
    if sends is not None and receives is None and inbound in ("broadcast", "commands"):
        raise ConfigurationError(
            'what clients send is broadcast, and must be a type of sends: say receives=…, or inbound="ignore"'
        )
    if receives is not None and (inbound == "ignore" or accepts not in ("any", "json")):
        what = 'inbound="ignore"' if inbound == "ignore" else f'accepts="{accepts}"'
        raise ConfigurationError(f"receives needs clients that send JSON, but {what} doesn't allow that")


def _others(core: Core) -> list[MessageTypes[Any]]:
    # The types of what goes to users and to everyone, as far as the manager knows them.
    found = [core.send_types(each, None) for each in (Audience("user"), EVERYONE)]
    return [each for each in found if each is not None]


# Errors that end a connection without being a failure. In a group of errors, the kind that is named first here counts.
_ENDS = (WebSocketException, MessageTooLarge, ConnectionClosed, LifecycleError)


def _end_of(error: Exception, connection: Connection) -> tuple[int, str]:
    match error:
        case WebSocketException():
            return error.code, error.reason or ""
        case MessageTooLarge():
            return CloseCode.MESSAGE_TOO_BIG, str(error)
        case ConnectionClosed():
            return CloseCode.NORMAL, ""  # it has its close code already
        case LifecycleError() if not connection.is_open:
            return CloseCode.NORMAL, ""  # the manager has ended and has closed it
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
    receives: Any = None,
    sends: Any = None,
    include_in_schema: bool = True,
    **moved: Never,
) -> APIRouter:
    """Make a router with one WebSocket endpoint, for `app.include_router`.

    A path parameter subscribes: every connection to `/ws/{channel}` is subscribed to the channel in its URL. What a
    client sends is broadcast to that channel, or to everyone if the path has no channel. The router brings the
    manager's lifespan along, and binds the manager to the app, so that `ManagerDep` finds it.

    Before a connection is accepted, these steps happen in this order: `dependencies` run, its origin is checked, the
    manager's limits decide whether there is room, `authenticate` returns who the client is, and `authorize` whether it
    may subscribe to the path's channel. A client that may not come in gets an HTTP response that says why.

    While the broker is out of reach, connections stay. What clients send is ignored and counted in
    `stats().unpublished`, a command is answered with `unavailable`, and the log has one warning a minute.

    Args:
        manager: The manager that keeps the connections.
        path: The path of the endpoint, after the prefix of `include_router`. A parameter may be in the prefix too.
        channel: A pattern that makes the channel from path parameters, such as `"{tenant}:{room}"`. By default it is
            the only parameter, also of a prefix or a mount. Then clients can choose any channel. A pattern such as
            `"room:{room}"` keeps them away from your other channels. Several parameters need a pattern: without one,
            rooms of different tenants would be the same. Each of them but the last must not hold the text that follows
            it in the pattern; otherwise the handshake is refused with 403. Without a parameter there is no channel, and
            clients get what goes to everyone. If two paths of one manager make the same channels without a pattern,
            there is a warning.
        inbound: What is done with messages of clients. `broadcast` sends them to the path's channel; `commands` carries
            them out as commands; `handle` leaves them to the `on_message` hooks; `ignore` does nothing. With `handle`,
            what a client of events publishes goes to the path's channel.
        accepts: What clients may send. Anything else closes that connection with 1003, or with 1007 for broken JSON.
        include_sender: Whether a client gets its own messages back.
        authenticate: A FastAPI dependency that returns who the client is; see `Access`.
        authorize: Decides what a connection may do with a channel; see `Access`.
        allowed_origins: The pages that may connect; see `Access`.
        access: An `Access` in place of these three. It has more options and may be shared.
        dependencies: FastAPI dependencies that run first. Those that `yield` end together with the connection.
        http: Whether the path serves HTTP as well: events and long poll by GET, commands by POST; see
            `create_sse_router`.
        script: Whether the browser's client is served beside the endpoint, as `wsbroadcast.js`. Everybody may load it.
        receives: The type of what clients send, which pydantic reads from JSON: a model, a dataclass, a `TypedDict`, or
            a union of these, such as `Say | Typing`. Anything else is answered with an error, and counted. A message is
            passed to the handler of its type (`ConnectionManager.on`). If there is none, `inbound` decides. It is an
            error with `inbound="ignore"`, and if `accepts` is text or bytes.
        sends: The type of what is broadcast to the channels of this path. `sends` of `ConnectionManager` may say it for
            all channels; see there. If clients' messages are broadcast, it needs `receives`.
        include_in_schema: Whether the path is in the app's OpenAPI, and so in its `/docs`: as a socket, with the
            schemas of both directions and the frames of the protocol.
        moved: Nothing: these options have moved to `Access`.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = choose_access(access, authenticate, authorize, allowed_origins, moved)
    endpoint = Endpoint(
        manager,
        path,
        access,
        channel=channel,
        inbound=inbound,
        accepts=accepts,
        include_sender=include_sender,
        receives=receives,
        sends=sends,
        has_http=http,
    )
    router = APIRouter(lifespan=manager.lifespan, routes=script_routes(path) if script else None)
    router.add_api_websocket_route(path, endpoint.open, name="wsbroadcast", dependencies=dependencies)
    if include_in_schema:
        document_websocket(router, path, endpoint.socket, [*(dependencies or ()), *access._dependencies])
    if http:
        endpoint.http.add_to(router, path, dependencies, include_in_schema=include_in_schema)
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
    receives: Any = None,
    sends: Any = None,
    include_in_schema: bool = True,
    **moved: Never,
) -> APIRouter:
    """Make a router that serves server-sent events: `new EventSource("/sse/news")` listens to them.

    A stream is a `Connection` like any other: it is in `connections`, runs hooks, and has a backlog, a policy and an
    end. If the channel of the path has a history, the `id` of an event is its position. A browser that reconnects by
    itself sends the last `id`, and gets what it missed. `?since=` in the URL does the same for the first time. The
    first event is `hello`, and `recovered` says whether everything that was missed follows. Bytes are sent as base64 in
    events named `binary`. A request that accepts `application/json` but no events is a long poll: `?since=…&wait=20`
    waits up to 20 seconds.

    Args:
        manager: The manager that keeps the connections.
        path: As for `create_router`.
        channel: As for `create_router`.
        inbound: What is done with commands that clients POST: `ignore`, or `broadcast` what they publish.
        authenticate: A FastAPI dependency that returns who the client is; see `Access`.
        authorize: Decides what a connection may do with a channel; see `Access`.
        allowed_origins: The pages that may connect; see `Access`.
        access: An `Access` in place of these three. It has more options and may be shared.
        dependencies: FastAPI dependencies that run first.
        script: As for `create_router`.
        receives: As for `create_router`.
        sends: As for `create_router`.
        include_in_schema: Whether the path is in the app's OpenAPI, and so in its `/docs`.
        moved: Nothing: these options have moved to `Access`.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = choose_access(access, authenticate, authorize, allowed_origins, moved)
    endpoint = Endpoint(
        manager,
        path,
        access,
        channel=channel,
        inbound=inbound,
        accepts="any",
        include_sender=True,
        receives=receives,
        sends=sends,
        has_websocket=False,
        has_http=True,
    )
    router = APIRouter(lifespan=manager.lifespan, routes=script_routes(path) if script else None)
    endpoint.http.add_to(router, path, dependencies, include_in_schema=include_in_schema)
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
    receives: Any = None,
    sends: Any = None,
    **moved: Never,
) -> list[BaseRoute]:
    """Make the endpoint of `create_router` as routes for plain Starlette. Pass `manager.lifespan` to `Starlette`.

    `authenticate` is a FastAPI dependency here too. With `http` the path also serves events and long poll.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    access = choose_access(access, authenticate, authorize, allowed_origins, moved)
    endpoint = Endpoint(
        manager,
        path,
        access,
        channel=channel,
        inbound=inbound,
        accepts=accepts,
        include_sender=include_sender,
        receives=receives,
        sends=sends,
        has_http=http,
    )
    routes: list[BaseRoute] = [
        *(script_routes(path) if script else ()),
        WebSocketRoute(path, endpoint.open, name="wsbroadcast"),
    ]
    return routes + endpoint.http.routes(path) if http else routes
