"""Access: a handshake's origin, identity and rights are checked, in this order, before it is accepted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from inspect import iscoroutinefunction
from time import time
from typing import Any, Literal, NoReturn, Protocol, get_args

from fastapi import WebSocket, params
from fastapi.exceptions import WebSocketRequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.audience import EVERYONE, Audience, UserId, user_key
from wsbroadcast.close_codes import CloseCode, is_sendable
from wsbroadcast.concurrency import finished
from wsbroadcast.connection import Connection
from wsbroadcast.exceptions import (
    ConfigurationError,
    ConnectionClosed,
    EngineError,
    LimitExceeded,
    PermissionDenied,
    kind_of,
    ungrouped,
)
from wsbroadcast.history import SinceOption
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.manager import ConnectionManager, core_of
from wsbroadcast.node.admission import Joining
from wsbroadcast.options import unix_seconds
from wsbroadcast.protocols.commands import ErrorCode, Refused, error_answer
from wsbroadcast.signatures import check_callable, no_dependency
from wsbroadcast.text import plain
from wsbroadcast.transports import closed_error
from wsbroadcast.transports.http import websocket_scheme
from wsbroadcast.transports.refusal import can_refuse_handshake, mute, refuse, refuse_handshake
from wsbroadcast.web.authentication import Authenticator, Handshake, Identity, UserKey, choose_subprotocol, identity_of
from wsbroadcast.web.origin import AllowedOrigins

Action = Literal["subscribe", "publish", "presence", "call"]
"""What a client asks to do: something with a channel, or to `call` a method."""

Authenticate = Callable[..., Any] | params.Depends
"""A FastAPI dependency that returns who the client is."""


class Authorize(Protocol):
    """Decides whether a connection may do something with a channel. It may be `def` or `async def`.

    It always runs in the event loop. It should refuse an action that it doesn't know: later versions may ask about
    others.
    """

    def __call__(
        self, connection: Connection | Handshake, action: Action, channel: str | None, /
    ) -> bool | Awaitable[bool]:
        """Return whether it may. Only `True` allows it.

        Args:
            connection: The connection that asks; a `Handshake` before it is accepted, and for a POST.
            action: What it asks to do. `call` is asked about only if the manager has methods (`manager.method`).
                `presence` is asked about only for channels with presence: whether a member is told who is in it.
            channel: The channel; `None` for everyone; for `call` the name of the method.
        """


OnDenied = Literal["error", "close"]
"""What a client gets if it does something that it may not do."""

# The key in the scope of a WebSocket for what `authenticate` returned last.
_INFO = "wsbroadcast.info"

# So many origins are logged, each once, and after that one a minute: a client can make up any number of them.
_MAX_LOGGED = 100

_NO_HEADERS: Mapping[str, str] = {}
# Headers of a response that `refuse_handshake` writes itself.
_OURS = {"content-length", "content-type", "connection"}

# Errors by which `authenticate` may refuse. In a group of errors, the kind that is named first here counts.
_ANSWERED = (HTTPException, WebSocketException, WebSocketRequestValidationError, WebSocketDisconnect)

# The close code for the HTTP status of a refusal, if the WebSocket was accepted already.
_CODES = {401: CloseCode.UNAUTHENTICATED, 403: CloseCode.FORBIDDEN}


@no_dependency("pass it on: create_router(manager, access=…), connection_dependency(access=…)")
class Access:
    """Who may connect, and what clients may do. Routers, routes and dependencies may share one.

    Args:
        authenticate: A FastAPI dependency that returns the user, claims, an object with an `id`, or an `Identity`.
            `None` refuses with 401. Dependencies of it that `yield` end before the connection is accepted.
        authorize: `authorize(connection, action, channel)` returns whether a connection may `subscribe` to a channel,
            or `publish` to it; the channel is `None` for everyone. Only `True` allows it. Before the connection is
            accepted, it gets a `Handshake`. If the manager has methods, it is also asked whether a connection may
            `call` one, with the name of the method in place of the channel.
        allowed_origins: The pages that may connect, such as `["https://app.example"]`, exact in scheme, host and port;
            `"*"` for every page. By default only pages of the server itself: of the scheme and `Host` of the handshake.
        allow_missing_origin: Whether a client without an `Origin` header may connect. No browser is such a client.
        user_key: Returns the user's id from what `authenticate` returned.
        on_denied: What a client gets that may not do something: an `error` message, or a `close` with 4403.
        subprotocols: The subprotocols that the endpoint speaks. The first one that the client offers is accepted.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    def __init__(
        self,
        *,
        authenticate: Authenticate | None = None,
        authorize: Authorize | None = None,
        allowed_origins: Iterable[str] | None = None,
        allow_missing_origin: bool = True,
        user_key: UserKey | None = None,
        on_denied: OnDenied = "error",
        subprotocols: Iterable[str] = (),
    ) -> None:
        if on_denied not in get_args(OnDenied):
            raise ConfigurationError(f"on_denied must be error or close, not {on_denied!r}")
        if user_key is not None and authenticate is None:
            raise ConfigurationError("user_key makes a user of what authenticate returns: pass authenticate as well")
        if iscoroutinefunction(user_key):
            raise ConfigurationError("user_key is a plain function: do what has to wait in authenticate")
        self._origins = AllowedOrigins(allowed_origins, allow_missing=allow_missing_origin)
        self._authenticate = None if authenticate is None else Authenticator(authenticate)
        self._user_key = user_key
        if authorize is not None:
            check_callable(authorize, ("connection", "action", "channel"), "authorize")
        self._authorize = authorize
        self._on_denied = on_denied
        self._subprotocols = (
            (plain(subprotocols),) if isinstance(subprotocols, str) else tuple(plain(each) for each in subprotocols)
        )
        self._logged: set[str] = set()
        self._throttle = Throttle()

    async def _connect(
        self, manager: ConnectionManager, websocket: WebSocket, channel: str | None = None
    ) -> Connection:
        """Let a handshake in and register it, subscribed to a channel if one is named.

        Raises:
            WebSocketException: If it may not come in. It has been answered, so Starlette's close for it has no effect.
            ConnectionClosed: If its peer is gone.
            Exception: A mistake of the app. The handshake is not accepted, or closed with 1011 if it was.
        """
        await self._check_origin(websocket)
        try:
            async with core_of(manager).handshake(websocket):
                identity = await self._admit(websocket, channel)
                if identity.info is not None:
                    websocket.scope[_INFO] = identity.info
                channels = () if channel is None else (channel,)
                joining = partial(
                    Joining.of,
                    identity.user,
                    channels,
                    identity.info,
                    expires_at=identity.expires_at,
                    since=_since_of(websocket, channel, identity.user),
                )
                return await core_of(manager).connect(websocket, joining)
        except (WebSocketException, ConnectionClosed):
            raise
        except EngineError as error:  # from an engine that fails fast and that this handshake has started
            if self._throttle.is_due("engine"):
                logger.warning("refused a handshake: %s", error, extra=about("handshake.unavailable"))
            await _refuse(websocket, 503, "try again later", code=CloseCode.TRY_AGAIN_LATER)
        except Exception:
            if not can_refuse_handshake(websocket):  # otherwise the server answers with 500
                await refuse(websocket, 500, CloseCode.INTERNAL_ERROR, "")
            raise

    async def _look(self, websocket: WebSocket, channel: str | None = None) -> Handshake:
        """Check a request over HTTP without letting anybody in, and whether it may see a channel.

        Raises:
            WebSocketException: If it may not. It has been answered.
        """
        await self._check_origin(websocket)
        identity = await self._admit(websocket, channel)
        return Handshake(websocket, identity.user, identity.info)

    async def _who(self, websocket: WebSocket) -> Identity:
        """Return who asks for something that only its owner may see.

        Raises:
            WebSocketException: If nobody may ask. It has been answered.
        """
        await self._check_origin(websocket)
        return await self._admit(websocket, None)

    @property
    def _dependencies(self) -> list[params.Depends]:
        # The dependencies that requests must satisfy, for documents.
        return [] if self._authenticate is None else [self._authenticate.depends]

    @property
    def _authenticates(self) -> bool:
        """Whether there is an `authenticate`."""
        return self._authenticate is not None

    def _sharing(self, connection: HTTPConnection) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers that let the page read the response to its request."""
        return self._origins.sharing(websocket_scheme(connection.scope), connection.scope["headers"])

    async def _admit(self, websocket: WebSocket, channel: str | None) -> Identity:
        choose_subprotocol(websocket, self._subprotocols)
        identity = await self._identify(websocket)
        if channel is not None and self._authorize is not None:
            try:
                await self._check(Handshake(websocket, identity.user, identity.info), "subscribe", channel)
            except PermissionDenied as denied:
                await _refuse(websocket, 403, str(denied))
        return identity

    async def _check(self, connection: Connection | Handshake, action: Action, channel: str | None) -> None:
        """Ask `authorize`, which must be there.

        Raises:
            PermissionDenied: If it returns something false, or raises this, another `WebSocketException`, or an
                `HTTPException` of 4xx.
            ConnectionClosed: If the connection has ended meanwhile.
            ConfigurationError: If it returns something true that isn't `True`, such as a coroutine.
        """
        assert self._authorize is not None
        try:
            allowed = self._authorize(connection, action, channel)
            if isinstance(allowed, Awaitable):
                allowed = await allowed
        except Exception as error:
            denial = denial_of(ungrouped(error, HTTPException, WebSocketException), connection)
            if denial is error:
                raise
            raise denial from error
        is_allowed = _is_yes(allowed)
        if isinstance(connection, Connection) and not connection.is_open:  # nobody can act for a closed connection
            raise closed_error(connection)
        if not is_allowed:
            raise PermissionDenied("not allowed")

    async def _refresh(self, connection: Connection, token: str) -> float | None:
        """Let a connection go on with another token of its user; return when it expires.

        Raises:
            Refused: If the token isn't valid, is another user's, or `authenticate` takes no token by `TokenFrom`.
            ConnectionClosed: If the connection has ended meanwhile.
        """
        identity = await self._identify_again(connection.websocket, token)
        expires_at = unix_seconds(identity.expires_at)
        if not connection.is_open:
            raise closed_error(connection)
        if (None if identity.user is None else user_key(identity.user)) != connection._user_key:
            raise Refused(ErrorCode.FORBIDDEN, "the token is another user's")
        if expires_at is not None and expires_at <= time():
            raise Refused(ErrorCode.UNAUTHENTICATED, "the token has expired")
        scope = connection.websocket.scope
        if connection.info is scope.get(_INFO):  # otherwise the app has put something of its own there
            connection.info = scope[_INFO] = identity.info
        connection.renew(expires_at)
        return expires_at

    async def _identify_again(self, websocket: WebSocket, token: str) -> Identity:
        if self._authenticate is None:
            raise Refused(ErrorCode.NOT_SUPPORTED, "nobody is authenticated here")
        try:
            found, is_used = await self._authenticate.again(websocket, token)
        except Exception as error:
            match ungrouped(error, *_ANSWERED):
                case HTTPException(status_code=status) if status >= 500:
                    raise Refused(ErrorCode.UNAVAILABLE, "try again later") from error
                case HTTPException() | WebSocketException() | WebSocketRequestValidationError() | WebSocketDisconnect():
                    raise Refused(ErrorCode.UNAUTHENTICATED, "the token is not valid") from error
            raise
        if not is_used:
            raise Refused(ErrorCode.NOT_SUPPORTED, "authenticate takes no token by TokenFrom")
        if found is None:
            raise Refused(ErrorCode.UNAUTHENTICATED, "the token is not valid")
        try:
            return identity_of(found, self._user_key)
        except PermissionDenied as denied:
            raise Refused(ErrorCode.UNAUTHENTICATED, "the token is not valid") from denied

    async def _denied(self, connection: Connection, denied: PermissionDenied) -> dict[str, Any]:
        """Return the message for a connection that may not do something, or close it with 4403.

        Raises:
            ConnectionClosed: If it was closed.
        """
        if self._on_denied == "close":
            await connection.close(CloseCode.FORBIDDEN, str(denied))
            raise closed_error(connection)
        return error_answer(ErrorCode.FORBIDDEN, str(denied))

    async def _check_origin(self, websocket: WebSocket) -> None:
        refusal = self._origins.refusal(websocket.scope.get("scheme", "ws"), websocket.scope["headers"])
        if refusal is None:
            return
        has_room = len(self._logged) < _MAX_LOGGED
        if refusal not in self._logged and (has_room or self._throttle.is_due("origin")):
            logger.warning("refused a handshake: %s", refusal, extra=about("handshake.origin_refused"))
            if has_room:
                self._logged.add(refusal)
        await _refuse(websocket, 403, refusal)

    async def _identify(self, websocket: WebSocket) -> Identity:
        if self._authenticate is None:
            return Identity(None)
        try:
            found = await self._authenticate(websocket)
        except Exception as error:
            await _answer(websocket, ungrouped(error, *_ANSWERED))
        if found is None:
            await _refuse(websocket, 401, "not authenticated", {"WWW-Authenticate": "Bearer"})
        try:
            return identity_of(found, self._user_key)
        except PermissionDenied as denied:
            await _answer(websocket, denied)


def _since_of(websocket: WebSocket, channel: str | None, user: UserId | None) -> SinceOption:
    # The position after which a client wants what it missed, for the path's channel, its user and everyone. An empty
    # text is none. What a browser's `EventSource` has seen last counts before its URL, because it reuses the URL.
    query = dict(websocket.query_params)
    if last := websocket.headers.get("last-event-id"):
        query["since"] = last
    audiences = {
        "since": channel,
        "since_user": None if user is None else Audience.user(user),
        "since_everyone": EVERYONE,
    }
    wanted = {each: query[name] for name, each in audiences.items() if each is not None and query.get(name)}
    return wanted or None


# Options that routers and dependencies took before there was an `Access`.
_MOVED = ("allow_missing_origin", "on_denied", "subprotocols", "user_key")


def choose_access(
    access: Access | None,
    authenticate: Authenticate | None,
    authorize: Authorize | None,
    allowed_origins: Iterable[str] | None,
    others: Mapping[str, object],
) -> Access:
    """Return the access that a router or dependency was given, or make one of the three options that they take.

    Raises:
        ConfigurationError: If an option makes no sense, is unknown, or is given beside `access`.
    """
    for name in others:
        moved = f"{name} is an option of Access: pass access=Access({name}=…, …)" if name in _MOVED else None
        raise ConfigurationError(moved or f"there is no option {name!r:.80}")
    given = {"authenticate": authenticate, "authorize": authorize, "allowed_origins": allowed_origins}
    if access is None:
        return Access(authenticate=authenticate, authorize=authorize, allowed_origins=allowed_origins)
    if not isinstance(access, Access):
        raise ConfigurationError(f"access is an Access(…), not {kind_of(access)}")
    for name, value in given.items():
        if value is not None:
            raise ConfigurationError(f"{name} belongs in the Access: pass only access=Access({name}=…, …)")
    return access


def _is_yes(allowed: object) -> bool:
    if allowed is True:
        return True
    if finished(allowed, "what authorize returned"):  # a row, a number, a Future: nobody knows what they mean
        raise ConfigurationError(
            f"authorize has to return True or False, not {type(allowed).__name__}: return a comparison, or bool(…)"
        )
    return False


def denial_of(error: Exception, connection: Connection | Handshake) -> Exception:
    """Return the `PermissionDenied` that an error of a dependency or of `authorize` means, or the error itself."""
    match error:
        case HTTPException(status_code=status) if status < 500:
            return PermissionDenied(_text(error.detail))
        case HTTPException(status_code=status) if isinstance(connection, Connection):
            # Starlette would not report it: there is nobody to answer any more.
            return RuntimeError(f"authorize failed with status {status}")
        case WebSocketException() if not isinstance(error, (PermissionDenied, LimitExceeded)):
            return PermissionDenied(error.reason or "not allowed")
    return error  # the handshake is answered with its status


async def _answer(websocket: WebSocket, error: Exception) -> NoReturn:
    match error:
        case HTTPException():
            await _refuse(websocket, error.status_code, _text(error.detail), error.headers or {})
        case PermissionDenied():
            await _refuse(websocket, 403, str(error))
        case WebSocketException():
            await _refuse(websocket, 403, error.reason or "", code=error.code)
        case WebSocketRequestValidationError():  # its text repeats what came
            await _refuse(websocket, 403, "the handshake lacks a parameter, or one is wrong")
        case WebSocketDisconnect():
            raise ConnectionClosed(error.code, error.reason or "") from error
        case _:
            raise error


async def _refuse(
    websocket: WebSocket, status: int, text: str, headers: Mapping[str, str] = _NO_HEADERS, code: int | None = None
) -> NoReturn:
    if can_refuse_handshake(websocket):
        await refuse_handshake(
            websocket, status, text, [_encoded(*pair) for pair in headers.items() if pair[0].lower() not in _OURS]
        )
    else:
        code = _CODES.get(status, CloseCode.POLICY_VIOLATION) if code is None else code
        await refuse(websocket, status, code if is_sendable(code) else CloseCode.POLICY_VIOLATION, text)
    raise end_quietly(websocket)


def _text(detail: Any) -> str:
    return plain(detail) if isinstance(detail, str) else to_json(detail, fallback=str).decode()  # it may be any JSON


def _encoded(name: str, value: str) -> tuple[bytes, bytes]:
    return name.lower().encode("latin-1"), value.encode("latin-1")


def end_quietly(websocket: WebSocket) -> WebSocketException:
    """Return the error that ends an endpoint, or keeps it from running, when its WebSocket is closed or its peer gone.

    It is a `WebSocketException`, because anything else that leaves a dependency is logged as an error. FastAPI closes
    the WebSocket for it, and that close has no effect.
    """
    mute(websocket, swallows_all=True)
    return WebSocketException(CloseCode.POLICY_VIOLATION)
