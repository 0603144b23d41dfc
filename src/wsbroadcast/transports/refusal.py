"""Refusing a WebSocket, if possible before it is accepted, so that a client sees an HTTP status and learns why."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, MutableMapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.close_codes import CloseCode, cut_reason, fallback_codes

_EXTENSION = "websocket.http.response"

# How long a refusal may take; a peer may take nothing.
_SECONDS = 1.0


def can_refuse_handshake(websocket: WebSocket) -> bool:
    """Tell whether a WebSocket is neither accepted nor closed, so that its handshake can still be refused."""
    return (
        websocket.application_state is WebSocketState.CONNECTING
        and websocket.client_state is not WebSocketState.DISCONNECTED
    )


async def refuse_handshake(
    websocket: WebSocket, status: int, body: str, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Refuse the handshake of a WebSocket with an HTTP response.

    Where the server lacks the ASGI extension `websocket.http.response` (daphne does), it is closed before it is
    accepted, which is a bare 403 for the client, whatever the status. Afterwards it is closed: a `close` that follows,
    such as Starlette's for a `WebSocketException`, does nothing. A peer that has gone is not an error, and one that
    takes nothing is given up after a second.

    Args:
        websocket: One that is not accepted yet.
        status: The HTTP status, such as 401, 403, 429 or 503.
        body: What a developer reads who looks at the response; plain text, in UTF-8.
        headers: Response headers besides content-type and content-length; names in lower case.

    Raises:
        RuntimeError: If it is accepted or closed already.
    """
    if not can_refuse_handshake(websocket):
        raise RuntimeError("only a WebSocket that is neither accepted nor closed can be refused; close it instead")
    try:
        async with asyncio.timeout(_SECONDS):
            if websocket.client_state is WebSocketState.CONNECTING:
                await websocket.receive()  # the event that asks for the answer comes first (ASGI, websocket.connect)
            if _EXTENSION in (websocket.scope.get("extensions") or {}):
                await _respond(websocket, status, body.encode("utf-8", "replace"), headers)
            else:
                await websocket.close(CloseCode.POLICY_VIOLATION, cut_reason(body))
    except (OSError, RuntimeError):  # TimeoutError is an OSError
        pass  # the peer has gone, which servers and Starlette say in a dozen ways: it isn't in, and that was the aim
    finally:
        websocket.application_state = WebSocketState.DISCONNECTED  # even if that failed: nobody accepts it now
        mute(websocket)


async def refuse(
    websocket: WebSocket, status: int, code: int, reason: str, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Refuse a WebSocket that is not registered: by HTTP before it is accepted, with a close frame afterwards.

    Never raises and never hangs; a peer that has gone is not an error. A later `close` does nothing.

    Args:
        websocket: Any; one that is closed is left alone.
        status: The HTTP status, as for `refuse_handshake`.
        code: The close code; where the server refuses it, the same plus 3000, or 1000.
        reason: The body of the response, or the reason of the close, cut to 123 bytes of UTF-8.
        headers: Of the response, as for `refuse_handshake`.
    """
    if can_refuse_handshake(websocket):
        await refuse_handshake(websocket, status, reason, headers)
        return
    if websocket.application_state is not WebSocketState.CONNECTED:
        return
    try:
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
    except Exception:  # what daphne says of a code it doesn't like
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
        all_headers.append((b"connection", b"close"))  # else granian keeps the socket for as long as the client likes
    await websocket.send({"type": f"{_EXTENSION}.start", "status": status, "headers": all_headers})
    await websocket.send({"type": f"{_EXTENSION}.body", "body": body})
    await asyncio.sleep(0)  # uvicorn 0.54 logs an error if the app returns before its transport says that it is closed


class Muted:
    """What `websocket.send` is once the end of a WebSocket was said: a close that follows does nothing.

    Args:
        swallows_all: Whether everything else goes nowhere as well; otherwise it is an error.
    """

    def __init__(self, *, swallows_all: bool) -> None:
        self._swallows_all = swallows_all

    async def __call__(self, event: MutableMapping[str, Any]) -> None:
        """Pass nothing on.

        Raises:
            RuntimeError: If it is not a close, unless everything goes nowhere.
        """
        if event["type"] != "websocket.close" and not self._swallows_all:
            raise RuntimeError(f"unexpected {event['type']}: the handshake was refused")


def mute(websocket: WebSocket, *, swallows_all: bool = False) -> None:
    """Let nothing out of a WebSocket any more; see `Muted`."""
    websocket.send = Muted(swallows_all=swallows_all)  # type: ignore[assignment, method-assign]  # the instance's, as Starlette has it
