"""Who a client of the Centrifuge protocol is, found out from its token or by a FastAPI dependency."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from inspect import iscoroutinefunction
from typing import Any, NoReturn

from fastapi import HTTPException, WebSocketException
from fastapi.exceptions import WebSocketRequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.websockets import WebSocket, WebSocketDisconnect

from wsbroadcast.audience import UserId, user_key
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import PermissionDenied, ungrouped
from wsbroadcast.options import unix_seconds
from wsbroadcast.protocols.centrifuge.codes import Disconnect, Disconnected, ErrorCode, Failed
from wsbroadcast.protocols.centrifuge.keys import InvalidToken
from wsbroadcast.protocols.centrifuge.session import Subscription
from wsbroadcast.protocols.centrifuge.speech import json_bytes, value_of
from wsbroadcast.protocols.centrifuge.tokens import CentrifugeTokens, ExpiredToken
from wsbroadcast.web.access import Access
from wsbroadcast.web.authentication import Handshake, identity_of

Channels = Iterable[str] | Mapping[str, object]
"""The channels that a client is put into when it connects. A dict has what the client is told with each of them."""

ChannelsOf = Channels | Callable[[Handshake, Any], Channels | Awaitable[Channels]]
"""Channels for all clients, or a function that returns them for one client: `(handshake, data)`."""

# Errors by which `authenticate` may refuse.
_ANSWERED = (
    ExpiredToken,
    InvalidToken,
    HTTPException,
    WebSocketException,
    WebSocketRequestValidationError,
    WebSocketDisconnect,
)


@dataclass(frozen=True, slots=True)
class Identified:
    """Who a client is."""

    user: UserId | None
    info: Any = None
    """It becomes `connection.info`."""
    shown: bytes = b""
    """What others see of it, as JSON."""
    expires_at: float | None = None
    """When it ends, unless it shows another token by then."""
    is_refreshed: bool = False
    """Whether it may show another token."""
    channels: Mapping[str, Subscription] = field(default_factory=dict)
    """The channels that its token puts it into."""


class Identities:
    """Finds out who clients are.

    Args:
        access: Authenticates clients without a token, or reads tokens if `tokens` is `None`.
        tokens: Reads tokens; `None` if `access` does.
        channels: The channels that clients are put into.
    """

    def __init__(self, access: Access, tokens: CentrifugeTokens | None, channels: ChannelsOf | None) -> None:
        self._access = access
        self.tokens = tokens
        """Reads tokens."""
        self._channels = channels

    async def identify(self, websocket: WebSocket, request: Mapping[str, Any]) -> Identified:
        """Find out who connects.

        Args:
            websocket: The WebSocket, accepted.
            request: What the client has sent to connect.

        Raises:
            Failed: If its token has expired, or nobody can tell now.
            Disconnected: If it may not come in.
        """
        token: str = request.get("token", "") or _bearer(request.get("headers", {}))
        if token and self.tokens is not None:
            return self._by_token(token)
        identity = await self._by_dependency(websocket, token)
        if identity.expires_at is not None and identity.expires_at <= time.time():
            raise Failed(ErrorCode.TOKEN_EXPIRED if token else ErrorCode.EXPIRED)
        return identity

    async def refreshed(self, connection: Connection, token: str) -> Identified:
        """Find out until when a connection may go on with another token.

        Raises:
            Disconnected: If the token is not valid, or another user's.
            Failed: If nobody can tell now.
        """
        try:
            by_tokens = self.tokens is not None
            identity = self._by_token(token) if by_tokens else await self._by_dependency(connection.websocket, token)
        except Failed as failed:
            if failed.code is ErrorCode.TOKEN_EXPIRED:
                raise Disconnected(Disconnect.EXPIRED) from None
            raise
        if (None if identity.user is None else user_key(identity.user)) != connection._user_key:
            raise Disconnected(Disconnect.INVALID_TOKEN)
        if identity.expires_at is not None and identity.expires_at <= time.time():
            raise Disconnected(Disconnect.EXPIRED)
        return identity

    def _by_token(self, token: str) -> Identified:
        assert self.tokens is not None
        try:
            found = self.tokens.connection(token)
        except ExpiredToken:
            raise Failed(ErrorCode.TOKEN_EXPIRED) from None
        except InvalidToken:
            raise Disconnected(Disconnect.INVALID_TOKEN) from None
        channels = {
            channel: Subscription(is_server_side=True, info=json_bytes(each.info), data=json_bytes(each.data))
            for channel, each in found.channels.items()
        }
        return Identified(found.user, found, json_bytes(found.info), found.expires_at, True, channels)

    async def _by_dependency(self, websocket: WebSocket, token: str) -> Identified:
        authenticate = self._access._authenticate
        if authenticate is None:
            if self.tokens is not None:
                raise Disconnected(Disconnect.PERMISSION_DENIED, "a token is needed")
            return Identified(None)
        is_used = False
        try:
            if token:
                found, is_used = await authenticate.again(websocket, token)
            else:
                found = await authenticate(websocket)
        except Exception as error:
            _refuse(ungrouped(error, *_ANSWERED), has_token=bool(token))
        if found is None:
            raise Disconnected(Disconnect.INVALID_TOKEN if token else Disconnect.PERMISSION_DENIED)
        try:
            identity = identity_of(found, self._access._user_key)
        except PermissionDenied as denied:
            _refuse(denied, has_token=bool(token))
        return Identified(identity.user, identity.info, b"", unix_seconds(identity.expires_at), is_used)

    async def channels(self, handshake: Handshake, data: bytes) -> dict[str, Subscription]:
        """Return the channels that the router puts a client into."""
        if self._channels is None:
            return {}
        found: Any = self._channels
        if callable(found):
            found = await called(found, handshake, value_of(data))
        if isinstance(found, Mapping):
            return {name: Subscription(is_server_side=True, data=json_bytes(each)) for name, each in found.items()}
        return {name: Subscription(is_server_side=True) for name in found}


async def called(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function of the app. If it isn't `async def`, it runs in a thread, as in FastAPI's endpoints."""
    if iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
        return await function(*arguments)
    result = await run_in_threadpool(function, *arguments)
    return await result if isinstance(result, Awaitable) else result


def _refuse(error: Exception, *, has_token: bool) -> NoReturn:
    refused = Disconnect.INVALID_TOKEN if has_token else Disconnect.PERMISSION_DENIED
    match error:
        case ExpiredToken():
            raise Failed(ErrorCode.TOKEN_EXPIRED) from None
        case InvalidToken():
            raise Disconnected(Disconnect.INVALID_TOKEN) from None
        case HTTPException(status_code=status) if status >= 500:
            raise Failed(ErrorCode.INTERNAL, "try again later") from error
        case HTTPException(status_code=429):
            raise Failed(ErrorCode.TOO_MANY_REQUESTS) from error
        case HTTPException(status_code=401):
            raise Disconnected(refused) from error
        case PermissionDenied() | HTTPException():
            raise Disconnected(Disconnect.PERMISSION_DENIED) from error
        case WebSocketException(code=code, reason=reason) if 3000 <= code <= 4999:  # the app's own
            raise Disconnected(code, reason or "") from error
        case WebSocketException() | WebSocketRequestValidationError() | WebSocketDisconnect():
            raise Disconnected(refused) from error
    raise error


def _bearer(headers: Mapping[str, str]) -> str:
    # Browsers can't set headers of a WebSocket, so clients send them in their first command.
    for name, value in headers.items():
        scheme, _, token = value.partition(" ")
        if name.lower() == "authorization" and scheme.lower() == "bearer":
            return token.strip()
    return ""
