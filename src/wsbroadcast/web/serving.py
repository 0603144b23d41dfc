"""The endpoint behind a router's path: lets connections in, and does with their messages what the options say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from fastapi import WebSocket
from starlette.exceptions import WebSocketException

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
    ungrouped,
)
from wsbroadcast.manager import ConnectionManager, count_unpublished
from wsbroadcast.message import Message
from wsbroadcast.node.membership import ROUTER
from wsbroadcast.transports.refusal import refuse
from wsbroadcast.web.access import Access
from wsbroadcast.web.commands import Commands, Outage
from wsbroadcast.web.path_channel import PathChannel, Place

Inbound = Literal["broadcast", "commands", "handle", "ignore"]
Accepts = Literal["any", "text", "bytes", "json"]


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
        if inbound not in get_args(Inbound):
            raise ConfigurationError(f"inbound must be broadcast, commands, handle or ignore, not {inbound!r}")
        if accepts not in get_args(Accepts):
            raise ConfigurationError(f"accepts must be any, text, bytes or json, not {accepts!r}")
        if inbound == "commands" and accepts not in ("any", "json"):
            raise ConfigurationError(f"commands are JSON: accepts must be json, not {accepts!r}")
        self.manager = manager
        """The manager that keeps its connections."""
        self._access = access
        self._channel = PathChannel(path, channel)
        self._place = Place(manager, path) if channel is None else None
        self._inbound = inbound
        self._accepts = accepts
        self._outage = Outage()
        self._commands = Commands(access, self._outage, include_sender=include_sender)
        self._include_sender = include_sender

    async def open(self, websocket: WebSocket) -> None:
        """Serve one connection from its handshake to its end."""
        try:
            name = self._channel.of(websocket.path_params)
            if self._place is not None and name is not None:
                self._place.see(websocket.scope, websocket.path_params)
            websocket.scope[ROUTER] = True
            connection = await self._access.connect(self.manager, websocket, name)
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
        if self._inbound == "ignore":
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
        if self._access.authorize is not None:
            try:
                await self._access.check(connection, "publish", name)
            except PermissionDenied as denied:
                await connection.send(await self._access.denied(connection, denied))
                return
        if self._accepts == "json":
            message = Message.json(message)  # a JSON string goes out as one, not as bare text
        if name is not None and name not in connection.channels:
            return  # who was unsubscribed from it has nobody to talk to
        exclude = () if self._include_sender else (connection,)
        await self.manager.broadcast(message, channel=UNSET if name is None else name, exclude=exclude)

    def _ignore(self, error: Exception) -> None:
        # The broker is everybody's trouble: were they closed for it, all would come back at once, and find it again.
        if not isinstance(error, EngineError):
            raise error
        self._outage.log("messages of clients are ignored, %d so far: %s", count_unpublished(self.manager), error)


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
