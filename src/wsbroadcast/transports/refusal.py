"""Refuses a WebSocket, if possible before it is accepted, so that the client sees an HTTP status and a reason."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.close_codes import CloseCode, cut_reason, fallback_codes
from wsbroadcast.transports import SPEAKS

_EXTENSION = "websocket.http.response"

# How many seconds a refusal may take, because a peer may take nothing.
_SECONDS = 1.0


def can_refuse_handshake(websocket: WebSocket) -> bool:
    """Tell whether the handshake of a WebSocket can still be refused: it is neither accepted nor closed."""
    return (
        websocket.application_state is WebSocketState.CONNECTING
        and websocket.client_state is not WebSocketState.DISCONNECTED
    )


async def refuse_handshake(
    websocket: WebSocket, status: int, body: str, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Refuse the handshake of a WebSocket with an HTTP response.

    If the server lacks the ASGI extension `websocket.http.response`, as daphne does, the WebSocket is closed before it
    is accepted. The client sees only a bare 403 then, whatever the status. Afterwards the WebSocket is closed: a
    `close` that follows, such as Starlette's for a `WebSocketException`, does nothing. If the peer has gone, that is no
    error. A peer that takes nothing is given up after a second.

    Args:
        websocket: A WebSocket that is not accepted yet.
        status: The HTTP status, such as 401, 403, 429 or 503.
        body: A text for the developer who looks at the response; plain text, in UTF-8.
        headers: Response headers besides content-type and content-length; names in lower case.

    Raises:
        RuntimeError: If the WebSocket is accepted or closed already.
    """
    if not can_refuse_handshake(websocket):
        raise RuntimeError("only a WebSocket that is neither accepted nor closed can be refused; close it instead")
    try:
        async with asyncio.timeout(_SECONDS):
            if websocket.client_state is WebSocketState.CONNECTING:
                await websocket.receive()  # `websocket.connect` has to be received before the answer (ASGI)
            if _EXTENSION in (websocket.scope.get("extensions") or {}):
                await _respond(websocket, status, body.encode("utf-8", "replace"), headers)
            else:
                await websocket.close(CloseCode.POLICY_VIOLATION, cut_reason(body))
    except (OSError, RuntimeError):  # TimeoutError is an OSError
        pass  # the peer has gone, for which servers and Starlette raise many errors; so it isn't connected either
    finally:
        websocket.application_state = WebSocketState.DISCONNECTED  # even if that failed, so that nobody accepts it
        mute(websocket)


async def refuse(
    websocket: WebSocket,
    status: int,
    code: int,
    reason: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    limit: str = "",
) -> None:
    """Refuse a WebSocket that is not registered: by HTTP before it is accepted, with a close frame after that.

    It never raises and never hangs. If the peer has gone, that is no error. A later `close` does nothing.

    Args:
        websocket: The WebSocket. If it is closed, nothing is done.
        status: The HTTP status, as for `refuse_handshake`.
        code: The close code. If the server refuses it, the code plus 3000 is tried, then 1000.
        reason: The body of the response, or the close reason, cut to 123 bytes of UTF-8.
        headers: The headers of the response, as for `refuse_handshake`.
        limit: The limit that was passed. Some protocols have their own codes for limits.
    """
    if can_refuse_handshake(websocket):
        await refuse_handshake(websocket, status, reason, headers)
        return
    if websocket.application_state is not WebSocketState.CONNECTED:
        return
    try:
        closing = getattr(websocket.scope.get(SPEAKS), "closing", None)
        if closing is not None:
            code, reason = closing(code, reason, limit)
        async with asyncio.timeout(_SECONDS):
            for each in fallback_codes(code):
                if await _close(websocket, each, cut_reason(reason)):
                    break
    except TimeoutError:
        pass
    finally:
        websocket.application_state = WebSocketState.DISCONNECTED
        mute(websocket)


async def _close(websocket: WebSocket, code: int, reason: str) -> bool:
    try:
        await websocket.close(int(code), reason)  # daphne takes no IntEnum
    except (OSError, WebSocketDisconnect):
        return True  # the peer is gone
    except Exception:  # daphne raises it for a code that it refuses
        websocket.application_state = WebSocketState.CONNECTED
        return False
    return True


async def _respond(websocket: WebSocket, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> None:
    all_headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        *headers,
    ]
    if websocket.scope.get("http_version", "1.1") == "1.1":  # HTTP/2 forbids it (RFC 9113, 8.2.2)
        all_headers.append((b"connection", b"close"))  # else granian keeps the socket as long as the client wants
    await websocket.send({"type": f"{_EXTENSION}.start", "status": status, "headers": all_headers})
    await websocket.send({"type": f"{_EXTENSION}.body", "body": body})
    await asyncio.sleep(0)  # uvicorn 0.54 logs an error if the app returns before its transport says that it is closed


class Muted:
    """Replaces `websocket.send` after the end of a WebSocket. A close event does nothing.

    Args:
        swallows_all: Whether all other events do nothing either. If not, they are errors.
    """

    def __init__(self, *, swallows_all: bool) -> None:
        self._swallows_all = swallows_all

    async def __call__(self, event: MutableMapping[str, Any]) -> None:
        """Send nothing.

        Raises:
            RuntimeError: If the event is not a close, unless `swallows_all` is true.
        """
        if event["type"] != "websocket.close" and not self._swallows_all:
            raise RuntimeError(f"unexpected {event['type']}: the handshake was refused")


def mute(websocket: WebSocket, *, swallows_all: bool = False) -> None:
    """Let a WebSocket send nothing any more; see `Muted`."""
    websocket.send = Muted(swallows_all=swallows_all)  # type: ignore[assignment, method-assign]  # the instance's, as Starlette has it
