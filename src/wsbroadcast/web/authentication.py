"""Authentication: a FastAPI dependency runs in a scope of its own, which ends before the WebSocket is used."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args, get_origin
from uuid import UUID

from fastapi import Depends, HTTPException, WebSocket, WebSocketException, params
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Send
from starlette.websockets import WebSocketDisconnect, WebSocketState

from wsbroadcast.audience import UserId, broken_rule
from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.concurrency import finished
from wsbroadcast.exceptions import ConfigurationError, PermissionDenied
from wsbroadcast.node.membership import SUBPROTOCOL
from wsbroadcast.options import ExpiresAt, check_positive
from wsbroadcast.protocols.commands import MAX_TOKEN_CHARACTERS
from wsbroadcast.signatures import no_dependency
from wsbroadcast.text import plain, text_of
from wsbroadcast.transports.http import STREAM
from wsbroadcast.web.injection import Injection, begun

_RESULT = "wsbroadcast.authenticated"

REFRESHED = "wsbroadcast.refreshed"
"""The scope's key for a token that a connection goes on with, in place of its first one."""

# The scope's key that is set when somebody has read that token.
_IS_REFRESHED = "wsbroadcast.is_refreshed"


class Authenticator:
    """Resolves a dependency, with its own dependencies; see `Injection`.

    Args:
        dependency: A dependency as in `Depends(…)`, the `Depends` or `Security` itself, or an `Annotated` with one.

    Raises:
        ConfigurationError: If it is something else, or needs a `Request`.
    """

    def __init__(self, dependency: Callable[..., Any] | params.Depends) -> None:
        self._depends = _depends_of(dependency)
        if not callable(self._depends.dependency):
            raise ConfigurationError(f"authenticate is a dependency, as in Depends(…), not {dependency!r:.200}")
        if isinstance(self._depends.dependency, TokenFrom):  # any text would become a user
            raise ConfigurationError(
                "authenticate is a TokenFrom, which finds a token and doesn't check it: pass a function that takes "
                "token: Annotated[str, Depends(TokenFrom(…))] and returns whose it is"
            )
        depends = self._depends

        async def keep(websocket: WebSocket, result: Annotated[Any, depends]) -> None:
            websocket.scope[_RESULT] = result

        self._injection = Injection(keep, "authenticate")

    @property
    def depends(self) -> params.Depends:
        """The dependency, for documents."""
        return self._depends

    async def __call__(self, websocket: WebSocket) -> Any:
        """Return what the dependency returns.

        The dependency sees the same WebSocket. If it accepts the WebSocket, that is accepted, and what it leaves in
        `websocket.state` stays there. Accepting one that is accepted already has no effect.

        Raises:
            Exception: What the dependency raises, also after its `yield`.
        """
        websocket.scope.setdefault("state", {})  # before the scope is copied, so that both share it
        scope = dict(websocket.scope)
        is_accepted = websocket.application_state is WebSocketState.CONNECTED
        receive, send = _from_the_beginning(websocket) if is_accepted else (websocket.receive, websocket.send)
        await self._injection.run(websocket, scope, receive, send)
        websocket.scope.update((key, scope[key]) for key in (SUBPROTOCOL, FIRST_MESSAGE) if key in scope)
        return scope.get(_RESULT)

    async def again(self, websocket: WebSocket, token: str) -> tuple[Any, bool]:
        """Run the dependency for another token of a connection; return its result and whether it has read the token.

        The token takes the place of what `TokenFrom` finds. What the dependency sends goes nowhere, and it receives
        nothing.

        Raises:
            Exception: What the dependency raises.
        """
        scope = {**websocket.scope, REFRESHED: token}
        scope.pop(_RESULT, None)
        await self._injection.run(websocket, scope, *begun())
        return scope.get(_RESULT), _IS_REFRESHED in scope


def _depends_of(dependency: Any) -> params.Depends:
    # Apps name theirs like `CurrentUser = Annotated[User, Depends(current_user)]`. That can be called as well, but then
    # it would make a user of anything that a client writes into the query.
    if get_origin(dependency) is Annotated:
        found = [each for each in get_args(dependency) if isinstance(each, params.Depends)]
        if len(found) != 1 or found[0].dependency is None:
            raise ConfigurationError(f"authenticate is {dependency!r:.200}, which needs one Depends(…) with a function")
        return found[0]
    return dependency if isinstance(dependency, params.Depends) else Depends(dependency)


def _from_the_beginning(websocket: WebSocket) -> tuple[Receive, Send]:
    # Act like a WebSocket that is new to Starlette: first the connect event, and an accept before any message.
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


# Who is behind a connection, according to the app's own dependency.


UserKey = Callable[[Any], UserId]
"""Returns the id of a user from what `authenticate` returned."""


@no_dependency("a client would say in the query who it is; return one from a function that finds it out")
@dataclass(frozen=True, slots=True)
class Identity:
    """Who is behind a connection, and until when. `authenticate` may return it."""

    user: UserId | None
    """The user's id. It becomes `connection.user`."""
    info: Any = field(default=None, repr=False)
    """Anything that the app wants to find again. It becomes `connection.info`."""
    expires_at: ExpiresAt = None
    """When the connection is closed with 4401: seconds since 1970, or a datetime with a timezone. `None` for never."""


@no_dependency("a client would say in the query who it is; authorize gets one")
@dataclass(frozen=True, slots=True)
class Handshake:
    """What is known of a connection before it is accepted, or of the sender of a POST. `authorize` gets it."""

    websocket: WebSocket
    """The Starlette WebSocket. For an HTTP request it stands for the request."""
    user: UserId | None
    """The user who asks to come in; `None` if there is no `authenticate`."""
    info: Any = field(default=None, repr=False)
    """What `authenticate` returned, unless that was only an id."""
    channels: frozenset[str] = frozenset()
    """Always empty: it is in no channel yet."""


def identity_of(found: Any, user_key: UserKey | None) -> Identity:
    """Return the identity in what `authenticate` returned: an id, the claims of a token, or an object with an id.

    Args:
        found: Not `None`. An id is the user itself. In claims, `sub` is the user and `exp` the expiry (RFC 7519, 4.1).
            In anything else, `id` is the user. Claims and objects are kept as `info`.
        user_key: If given, it returns the id instead.

    Raises:
        ConfigurationError: If there is no id in it, or something in it has yet to run.
        PermissionDenied: If the id's text breaks a rule for names. It may be what a client has written.
    """
    identity = found if isinstance(found, Identity) else _identity(found, user_key)
    finished(identity.user, "the user that authenticate found")
    finished(identity.expires_at, "the expires_at that authenticate found")
    if isinstance(identity.user, (str, int)) and (rule := broken_rule(text_of(identity.user))) is not None:
        raise PermissionDenied(f"invalid user: {rule}")
    return identity


def _identity(found: Any, user_key: UserKey | None) -> Identity:
    finished(found, "what authenticate returned")
    if isinstance(found, bool):
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


# Where a client may put its token. Then an `authenticate` dependency only has to check it.


MAX_SUBPROTOCOLS = 32
"""So many of the subprotocols that a client offers are read; the others are ignored."""

FIRST_MESSAGE = "wsbroadcast.first_message"
"""The scope's key for a token that came as the first message. A dependency that asks again gets it from there."""


@no_dependency("name the places, as in Depends(TokenFrom(header=True))")
class TokenFrom:
    """A dependency that finds a token: `token: Annotated[str, Depends(TokenFrom(cookie="session"))]`.

    It looks in the named places, in this order: header, subprotocol, cookie, query, first message. A token is 1 to
    8,192 visible ASCII characters. Anything else is rejected. On an HTTP route, places that only a WebSocket has are
    ignored.

    Without a token it raises 401. After a first message that isn't one, the WebSocket is closed with 4401.

    Args:
        header: Whether to take `Authorization: Bearer …`. Programs can send it. Browsers can't, with a WebSocket.
        subprotocol: The name before the token in `new WebSocket(url, ["bearer", token])`. The connection is accepted
            with this name, never with the token.
        cookie: The name of a cookie.
        query: The name of a query parameter. Servers and proxies write it into their access logs.
        first_message: Seconds to wait for the token as the first message, as text; `True` means 10. For this the
            WebSocket is accepted, if it wasn't before, but is in no channel. If nothing comes in time, or something
            else, it is closed with 4401. A dependency that asks again gets the same token.

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
                "TokenFrom needs a place: header=True, subprotocol=, cookie=, query= or first_message="
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
            WebSocketException: With 4401, if none came in the first message either.
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
    """Remember the first subprotocol that a client offers and the endpoint speaks: it is accepted with that one."""
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
        if websocket.application_state is WebSocketState.CONNECTING:  # it may have been accepted before
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
