"""Where a client may put its token, for an `authenticate` dependency that only has to check it."""

# No postponed annotations here: FastAPI reads them.

import asyncio

from fastapi import HTTPException, WebSocket, WebSocketException
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketDisconnect, WebSocketState

from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.membership import SUBPROTOCOL
from wsbroadcast.options import check_positive
from wsbroadcast.signatures import no_dependency
from wsbroadcast.text import plain

MAX_TOKEN_CHARACTERS = 8192
"""A longer token is none."""

MAX_SUBPROTOCOLS = 32
"""As many of the subprotocols that a client offers are looked at."""

FIRST_MESSAGE = "wsbroadcast.first_message"
"""Where in the scope a token that came as the first message stands, for whoever asks for it again."""


@no_dependency("name the places, as in Depends(TokenFrom(header=True))")
class TokenFrom:
    """A dependency that finds a token: `token: Annotated[str, Depends(TokenFrom(cookie="session"))]`.

    It looks in the places that are named, in this order: header, subprotocol, cookie, query, first message. A token is
    1 to 8,192 visible ASCII characters; anything else is none. On an HTTP route the places that only a WebSocket has
    are passed over.

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
        ConfigurationError: If no place is named, or the seconds are none.
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
            HTTPException: With 401, if there is none.
            WebSocketException: With 4401, if there was none in the first message either.
        """
        token = self._from_handshake(connection)
        if token is not None:
            return token
        if self._deadline and isinstance(connection, WebSocket):
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
