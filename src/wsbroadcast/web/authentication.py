"""Running a FastAPI dependency in a scope of its own, which is closed before the WebSocket lives on."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin
from uuid import UUID
from weakref import WeakKeyDictionary, proxy

from fastapi import Depends, HTTPException, WebSocket, WebSocketException, params
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIWebSocketRoute
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocketDisconnect, WebSocketState

from wsbroadcast.audience import UserId
from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.concurrency import finished
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.node.membership import SUBPROTOCOL
from wsbroadcast.options import ExpiresAt, check_positive
from wsbroadcast.protocols.commands import MAX_TOKEN_CHARACTERS
from wsbroadcast.signatures import no_dependency
from wsbroadcast.text import plain
from wsbroadcast.transports.http import STREAM

_RESULT = "wsbroadcast.authenticated"

REFRESHED = "wsbroadcast.refreshed"
"""The scope's key for a token that a connection goes on with, instead of the one that it came with."""

# Is in the scope when somebody has looked at that token.
_IS_REFRESHED = "wsbroadcast.is_refreshed"


class Authenticator:
    """Resolves a dependency, and those it depends on, like an endpoint whose only work that is.

    When it returns, that endpoint has ended: what the dependencies `yield`ed is finished, a database session is back
    in its pool. `app.dependency_overrides` holds.

    Args:
        dependency: A dependency as in `Depends(…)`, the `Depends` or `Security` itself, or an `Annotated` with one.

    Raises:
        ConfigurationError: If it is something else, or wants a `Request`.
    """

    def __init__(self, dependency: Callable[..., Any] | params.Depends) -> None:
        self._depends = _depends_of(dependency)
        if not callable(self._depends.dependency):
            raise ConfigurationError(f"authenticate is a dependency, as in Depends(…), not {dependency!r:.200}")
        if isinstance(self._depends.dependency, TokenFrom):  # any text would be a user
            raise ConfigurationError(
                "authenticate is a TokenFrom, which finds a token and doesn't check it: pass a function that takes "
                "token: Annotated[str, Depends(TokenFrom(…))] and returns whose it is"
            )
        route = self._make_route(self, "/")  # what FastAPI has to say about it, it says now
        _check_parameters(route.dependant)
        # By app, because each has overrides of its own, and by path parameters, which a dependency may ask for.
        self._routes: WeakKeyDictionary[Any, dict[tuple[str, ...], APIWebSocketRoute]] = WeakKeyDictionary()

    async def __call__(self, websocket: WebSocket) -> Any:
        """Return what the dependency returns.

        It sees the same WebSocket: one that it accepts is accepted, what it leaves in `websocket.state` stays there.
        One that is accepted already it may accept again, to no effect.

        Raises:
            Exception: What the dependency raises, also while it is finished.
        """
        websocket.scope.setdefault("state", {})  # before the copy, so that both have the same
        scope = dict(websocket.scope)
        # The app's handlers would answer an exception in here, and nobody would know. Without them it comes out.
        scope.pop("starlette.exception_handlers", None)
        is_accepted = websocket.application_state is WebSocketState.CONNECTED
        receive, send = _from_the_beginning(websocket) if is_accepted else (websocket.receive, websocket.send)
        await self._route(websocket).handle(scope, receive, send)
        websocket.scope.update((key, scope[key]) for key in (SUBPROTOCOL, FIRST_MESSAGE) if key in scope)
        return scope.get(_RESULT)

    async def again(self, websocket: WebSocket, token: str) -> tuple[Any, bool]:
        """Return what the dependency returns for another token of a connection, and whether it has looked at that.

        The token stands in for what `TokenFrom` finds. What the dependency sends goes nowhere, and it reads nothing.

        Raises:
            Exception: What the dependency raises.
        """
        scope = {**websocket.scope, REFRESHED: token}
        scope.pop("starlette.exception_handlers", None)
        scope.pop(_RESULT, None)
        begin = iter(({"type": "websocket.connect"},))

        async def receive() -> Message:
            return next(begin, {"type": "websocket.disconnect", "code": CloseCode.NORMAL})

        async def send(event: Message) -> None:
            pass

        await self._route(websocket).handle(scope, receive, send)
        return scope.get(_RESULT), _IS_REFRESHED in scope

    def _route(self, websocket: WebSocket) -> APIWebSocketRoute:
        app = websocket.scope.get("app", self)
        routes = self._routes.setdefault(app, {})
        names = tuple(websocket.path_params)
        if names not in routes:
            routes[names] = self._make_route(app, "".join(f"/{{{name}}}" for name in names) or "/")
        return routes[names]

    def _make_route(self, app: Any, path: str) -> APIWebSocketRoute:
        async def keep(websocket: WebSocket, result: Annotated[Any, self._depends]) -> None:
            websocket.scope[_RESULT] = result

        overrides = proxy(app) if hasattr(app, "dependency_overrides") else None  # plain Starlette has none
        return APIWebSocketRoute(path, keep, dependency_overrides_provider=overrides)


def _depends_of(dependency: Any) -> params.Depends:
    # `CurrentUser = Annotated[User, Depends(current_user)]` is how apps name theirs. It can be called, and would make a
    # user of whatever a client writes into the query.
    if get_origin(dependency) is Annotated:
        found = [each for each in get_args(dependency) if isinstance(each, params.Depends)]
        if len(found) != 1 or found[0].dependency is None:
            raise ConfigurationError(f"authenticate is {dependency!r:.200}, which needs one Depends(…) with a function")
        return found[0]
    return dependency if isinstance(dependency, params.Depends) else Depends(dependency)


def _check_parameters(dependant: Dependant) -> None:
    # FastAPI has no `Request` to give for a WebSocket, and calls without it.
    for each in dependant.dependencies:
        if each.request_param_name is not None:
            raise ConfigurationError(
                f"authenticate runs for a WebSocket, and {each.call!r:.200} wants a Request: take an HTTPConnection, "
                "which serves both, or a WebSocket; TokenFrom finds tokens"
            )
        _check_parameters(each)


def _from_the_beginning(websocket: WebSocket) -> tuple[Receive, Send]:
    # What Starlette expects of a WebSocket that is new to it: first the connect event, and an accept before messages.
    is_begun = False

    async def receive() -> Message:
        nonlocal is_begun
        if is_begun:
            return await websocket.receive()
        is_begun = True
        return {"type": "websocket.connect"}

    async def send(event: Message) -> None:
        if event["type"] != "websocket.accept":
            await websocket.send(event)

    return receive, send


# Who is behind a connection, as the app's own dependency says.


UserKey = Callable[[Any], UserId]
"""Makes the id of a user from what `authenticate` returned."""


@no_dependency("a client would say in the query who it is; return one from a function that finds it out")
@dataclass(frozen=True, slots=True)
class Identity:
    """Who is behind a connection, and until when; what `authenticate` may return."""

    user: UserId | None
    """The user's id; becomes `connection.user`."""
    info: Any = field(default=None, repr=False)
    """Whatever the app wants to find again; becomes `connection.info`."""
    expires_at: ExpiresAt = None
    """When the connection is closed with 4401: seconds since 1970, or a datetime with a timezone. `None` is never."""


@no_dependency("a client would say in the query who it is; authorize gets one")
@dataclass(frozen=True, slots=True)
class Handshake:
    """A connection that isn't accepted yet, as `authorize` sees it, or a POST: what of a `Connection` is known then."""

    websocket: WebSocket
    """The Starlette WebSocket; of an HTTP request one that stands for it."""
    user: UserId | None
    """Who asks to come in, `None` if there is no `authenticate`."""
    info: Any = field(default=None, repr=False)
    """What `authenticate` returned, unless that was an id."""
    channels: frozenset[str] = frozenset()
    """It is in none yet."""


def identity_of(found: Any, user_key: UserKey | None) -> Identity:
    """Make an identity of what `authenticate` returned: an id, the claims of a token, or an object that has an id.

    Args:
        found: Not `None`. An id is the user itself; of claims, `sub` is the user and `exp` the expiry (RFC 7519, 4.1);
            of anything else, `id` is the user. Claims and objects are kept as `info`.
        user_key: Makes the id instead.

    Raises:
        ConfigurationError: If there is not an id in it, or something in it has yet to run.
    """
    identity = found if isinstance(found, Identity) else _identity(found, user_key)
    finished(identity.user, "the user that authenticate found")
    finished(identity.expires_at, "the expires_at that authenticate found")
    return identity


def _identity(found: Any, user_key: UserKey | None) -> Identity:
    finished(found, "what authenticate returned")
    if isinstance(found, bool) or found == "":
        raise ConfigurationError(
            f"authenticate returned {found!r}, which doesn't say who it is: return the user's id, or None to refuse"
        )
    is_id = isinstance(found, (str, int, UUID))
    expires_at = found.get("exp") if isinstance(found, Mapping) else None
    if user_key is not None:
        return Identity(_user_by(user_key, found), None if is_id else found, expires_at)
    return Identity(found, None) if is_id else Identity(_user_in(found), found, expires_at)


def _user_in(found: Any) -> UserId:
    is_claims = isinstance(found, Mapping)
    user: UserId | None = found.get("sub") if is_claims else getattr(found, "id", None)
    if user is None:
        raise ConfigurationError(
            f"authenticate returned a {type(found).__name__} with no {'sub' if is_claims else 'id'}: pass "
            "user_key=…, which makes the user's id of it, or return the id or an Identity"
        )
    return user


def _user_by(user_key: UserKey, found: Any) -> UserId:
    user: UserId | None = user_key(found)
    if user is None:
        raise ConfigurationError(f"user_key returned None for a {type(found).__name__}: it has to return the user's id")
    return user


# Where a client may put its token, for an `authenticate` dependency that only has to check it.


MAX_SUBPROTOCOLS = 32
"""As many of the subprotocols that a client offers are looked at."""

FIRST_MESSAGE = "wsbroadcast.first_message"
"""The scope's key for a token that came as the first message, for a dependency that asks for it again."""


@no_dependency("name the places, as in Depends(TokenFrom(header=True))")
class TokenFrom:
    """A dependency that finds a token: `token: Annotated[str, Depends(TokenFrom(cookie="session"))]`.

    It looks in the places that are named, in this order: header, subprotocol, cookie, query, first message. A token is
    1 to 8,192 visible ASCII characters; anything else is rejected. On an HTTP route the places that only a WebSocket
    has are passed over.

    Args:
        header: Whether to take `Authorization: Bearer …`. Browsers can't send it with a WebSocket; programs can.
        subprotocol: The name before the token in `new WebSocket(url, ["bearer", token])`; it is what the connection is
            accepted with, never the token.
        cookie: The name of a cookie.
        query: The name of a query parameter. Servers and proxies write it into their access logs.
        first_message: Seconds to wait for the token as the first message, as text; `True` is 10. The WebSocket is
            accepted then, if it wasn't before, and in no channel; one that says nothing in time, or something else, is
            closed with 4401. Asked for again, it is the same token.

    Raises:
        ConfigurationError: If no place is named, or the seconds aren't valid.
    """

    def __init__(
        self,
        *,
        header: bool = False,
        subprotocol: str | None = None,
        cookie: str | None = None,
        query: str | None = None,
        first_message: bool | float = False,
    ) -> None:
        if not any((header, subprotocol, cookie, query, first_message)):
            raise ConfigurationError(
                "TokenFrom wants a place: header=True, subprotocol=, cookie=, query= or first_message="
            )
        self._deadline = 10.0 if first_message is True else first_message
        if first_message:
            check_positive("first_message", self._deadline)
        self._header = header
        self._subprotocol, self._cookie, self._query = (
            name if name is None else plain(name) for name in (subprotocol, cookie, query)
        )

    async def __call__(self, connection: HTTPConnection) -> str:
        """Return the token.

        Raises:
            HTTPException: With 401, if no token is found.
            WebSocketException: With 4401, if there was none in the first message either.
        """
        token: str | None
        if REFRESHED in connection.scope:
            connection.scope[_IS_REFRESHED] = True
            token = connection.scope[REFRESHED]
            if _is_token(token):
                return token
            raise HTTPException(401, "no token", {"WWW-Authenticate": "Bearer"})
        token = self._from_handshake(connection)
        if token is not None:
            return token
        if self._deadline and isinstance(connection, WebSocket) and STREAM not in connection.scope:
            if FIRST_MESSAGE not in connection.scope:
                connection.scope[FIRST_MESSAGE] = await _first_message(connection, self._deadline)
            first: str = connection.scope[FIRST_MESSAGE]
            return first
        raise HTTPException(401, "no token", {"WWW-Authenticate": "Bearer"})

    def _from_handshake(self, connection: HTTPConnection) -> str | None:
        candidates = [
            _from_header(connection) if self._header else None,
            self._from_subprotocol(connection),
            connection.cookies.get(self._cookie) if self._cookie else None,
            connection.query_params.get(self._query) if self._query else None,
        ]
        return next((token for token in candidates if _is_token(token)), None)

    def _from_subprotocol(self, connection: HTTPConnection) -> str | None:
        offered: list[str] = connection.scope.get("subprotocols", [])[:MAX_SUBPROTOCOLS]
        if self._subprotocol is None or self._subprotocol not in offered[:-1]:
            return None
        connection.scope.setdefault(SUBPROTOCOL, self._subprotocol)  # browsers insist on an answer to their offer
        return offered[offered.index(self._subprotocol) + 1]


def choose_subprotocol(websocket: WebSocket, spoken: tuple[str, ...]) -> None:
    """Remember the first subprotocol that a client offers and the endpoint speaks, to accept with."""
    for offered in websocket.scope.get("subprotocols", [])[:MAX_SUBPROTOCOLS]:
        if offered in spoken:
            websocket.scope.setdefault(SUBPROTOCOL, offered)


def _from_header(connection: HTTPConnection) -> str | None:
    values = connection.headers.getlist("authorization")
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip(" ") if scheme.lower() == "bearer" else None


def _is_token(text: object) -> bool:
    return (
        isinstance(text, str)
        and 0 < len(text) <= MAX_TOKEN_CHARACTERS
        and text.isascii()
        and text.isprintable()
        and " " not in text
    )


async def _first_message(websocket: WebSocket, deadline: float) -> str:
    try:
        if websocket.application_state is WebSocketState.CONNECTING:  # else somebody accepted it before
            await websocket.accept(websocket.scope.get(SUBPROTOCOL))
        async with asyncio.timeout(deadline):
            event = await websocket.receive()
    except TimeoutError:
        raise WebSocketException(CloseCode.UNAUTHENTICATED, "no token came in time") from None
    except OSError:
        raise WebSocketDisconnect(ABNORMAL) from None
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event.get("code", ABNORMAL))
    if not _is_token(event.get("text")):
        raise WebSocketException(CloseCode.UNAUTHENTICATED, "the first message has to be the token")
    token: str = event["text"]
    return token
