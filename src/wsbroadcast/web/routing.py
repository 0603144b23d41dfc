"""The router factory: an endpoint that nobody has to write."""

from collections.abc import Callable, Sequence
from string import Formatter
from typing import Any, Literal, get_args

from fastapi import APIRouter, WebSocket, WebSocketException, params
from starlette.routing import WebSocketRoute, compile_path

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    InvalidChannel,
    MessageTooLarge,
    PermissionDenied,
)
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.message import Message

Inbound = Literal["broadcast", "handle", "ignore"]
Accepts = Literal["any", "text", "bytes", "json"]


def create_router(
    manager: ConnectionManager,
    path: str = "/ws",
    *,
    channel: str | None = None,
    inbound: Inbound = "broadcast",
    accepts: Accepts = "any",
    include_sender: bool = True,
    dependencies: Sequence[params.Depends] | None = None,
) -> APIRouter:
    """Make a router with one WebSocket endpoint, for `app.include_router`.

    A path parameter subscribes: every connection to `/ws/{channel}` is subscribed to the channel in its URL. What a
    client sends is broadcast to that channel, or to everyone if there is none. The router carries the manager's
    lifespan and binds it to the app, so that `ManagerDep` finds it.

    Args:
        manager: The manager that keeps the connections.
        path: Where the endpoint is, behind the prefix of `include_router`. The prefix may hold the parameter too.
        channel: A pattern that makes the channel from path parameters, such as `"{tenant}:{room}"`. By default it is
            the parameter `channel`, or else the only one there is.
        inbound: `broadcast` what clients send, leave it to the `on_message` hooks (`handle`), or `ignore` it.
        accepts: What clients may send; anything else closes that connection with 1003, or 1007 for broken JSON.
        include_sender: Whether a client gets its own messages back.
        dependencies: FastAPI dependencies that run before the connection is accepted.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    router = APIRouter(lifespan=manager.lifespan)
    endpoint = _Endpoint(manager, path, channel, inbound, accepts, include_sender).open
    router.add_api_websocket_route(path, endpoint, name="wsbroadcast", dependencies=dependencies)
    return router


def create_routes(
    manager: ConnectionManager,
    path: str = "/ws",
    *,
    channel: str | None = None,
    inbound: Inbound = "broadcast",
    accepts: Accepts = "any",
    include_sender: bool = True,
) -> list[WebSocketRoute]:
    """Make the same endpoint as routes for plain Starlette; pass `manager.lifespan` to `Starlette` yourself.

    Raises:
        ConfigurationError: If an option makes no sense.
    """
    endpoint = _Endpoint(manager, path, channel, inbound, accepts, include_sender).open
    return [WebSocketRoute(path, endpoint, name="wsbroadcast")]


class _Endpoint:
    """The endpoint behind a path: lets connections in, and does with their messages what the options say."""

    def __init__(
        self,
        manager: ConnectionManager,
        path: str,
        channel: str | None,
        inbound: Inbound,
        accepts: Accepts,
        include_sender: bool,
    ) -> None:
        if inbound not in get_args(Inbound):
            raise ConfigurationError(f"inbound must be broadcast, handle or ignore, not {inbound!r}")
        if accepts not in get_args(Accepts):
            raise ConfigurationError(f"accepts must be any, text, bytes or json, not {accepts!r}")
        self._manager = manager
        self._pattern = _channel_pattern(path, channel)
        self._inbound = inbound
        self._accepts = accepts
        self._include_sender = include_sender

    async def open(self, websocket: WebSocket) -> None:
        """Serve one connection from its handshake to its end."""
        name = _channel_of(websocket, self._pattern)
        try:
            connection = await self._manager.connect(websocket, channels=() if name is None else (name,))
        except (ConnectionClosed, PermissionDenied):
            return  # gone, or closed already
        except InvalidChannel as error:
            raise WebSocketException(CloseCode.POLICY_VIOLATION, f"invalid channel: {error.rule}") from error
        code, reason = CloseCode.INTERNAL_ERROR, ""
        try:
            await self._serve(connection, name)
            code = CloseCode.NORMAL
        except ConnectionClosed:
            pass
        except PermissionDenied as denied:
            code, reason = CloseCode.POLICY_VIOLATION, str(denied)
        except MessageTooLarge as error:
            code, reason = CloseCode.MESSAGE_TOO_BIG, str(error)
        finally:
            if connection.is_open:
                await connection.close(code, reason)

    async def _serve(self, connection: Connection, name: str | None) -> None:
        if self._inbound == "ignore":
            await connection.wait_closed()
            return
        exclude = () if self._include_sender else (connection,)
        read = _READERS[self._accepts]
        while True:
            message = await read(connection)
            if self._inbound == "handle":
                continue
            if self._accepts == "json":
                message = Message.json(message)  # a JSON string goes out as one, not as bare text
            if name is None:
                await self._manager.broadcast(message, exclude=exclude)
            elif name in connection.channels:  # who was unsubscribed from it has nobody to talk to
                await self._manager.broadcast(message, channel=name, exclude=exclude)


_READERS: dict[str, Callable[[Connection], Any]] = {
    "any": Connection.receive,
    "text": Connection.receive_text,
    "bytes": Connection.receive_bytes,
    "json": Connection.receive_json,
}


def _channel_pattern(path: str, channel: str | None) -> str | None:
    if channel is not None:
        try:
            fields = [field for _, field, _, _ in Formatter().parse(channel) if field is not None]
        except ValueError as error:
            raise ConfigurationError(f"channel pattern {channel!r}: {error}") from error
        if not all(field.isidentifier() for field in fields):
            raise ConfigurationError(f"channel pattern {channel!r} may name path parameters only, such as {{room}}")
        return channel
    names = list(compile_path(path)[2])
    if "channel" in names:
        return "{channel}"
    if len(names) > 1:
        raise ConfigurationError(f"{path} has several parameters: say which make the channel, channel='{{{names[0]}}}'")
    return f"{{{names[0]}}}" if names else None


def _channel_of(websocket: WebSocket, pattern: str | None) -> str | None:
    parameters = websocket.path_params
    if pattern is None:
        # The path has none, but the prefix it was included under may.
        value = parameters.get("channel")
        return None if value is None else str(value)
    try:
        return pattern.format_map(parameters)
    except KeyError as error:
        raise ConfigurationError(f"channel pattern {pattern!r} names {error}, which is no path parameter") from error
