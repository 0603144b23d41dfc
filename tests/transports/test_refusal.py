from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from starlette.websockets import WebSocketState

from tests.support.asgi import Peer
from wsbroadcast import ConnectionClosed, ConnectionManager
from wsbroadcast.transports.refusal import can_refuse_handshake, refuse, refuse_handshake


@pytest.mark.parametrize("is_received", [False, True])
async def test_denial_is_an_http_response(is_received: bool) -> None:
    peer = Peer(can_deny=True)
    if is_received:
        await peer.websocket.receive()
    assert can_refuse_handshake(peer.websocket)
    await refuse_handshake(peer.websocket, 429, "too many ü", [(b"retry-after", b"3")])
    start, body = peer.sent
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
    assert dict(start["headers"]) == {
        b"content-type": b"text/plain; charset=utf-8",
        b"content-length": b"11",
        b"retry-after": b"3",
        b"connection": b"close",
    }
    assert body == {"type": "websocket.http.response.body", "body": "too many ü".encode()}
    assert not can_refuse_handshake(peer.websocket)


async def test_http_2_has_no_connection_header() -> None:
    peer = Peer(can_deny=True)
    peer.scope["http_version"] = "2"
    await refuse_handshake(peer.websocket, 403, "")
    assert b"connection" not in dict(peer.sent[0]["headers"])


@pytest.mark.parametrize("extensions", [{}, None, "missing"])
async def test_server_without_the_extension_closes(extensions: Any) -> None:
    peer = Peer()
    peer.scope["extensions"] = extensions
    if extensions == "missing":
        del peer.scope["extensions"]
    await refuse_handshake(peer.websocket, 429, "ü" * 100)
    assert peer.sent == [{"type": "websocket.close", "code": 1008, "reason": "ü" * 61}]


@pytest.mark.parametrize("error", [OSError("gone"), RuntimeError("gone")])
async def test_peer_that_has_gone_is_no_error(error: Exception) -> None:
    peer = Peer(can_deny=True)
    peer.error = error
    await refuse_handshake(peer.websocket, 429, "")
    assert peer.websocket.application_state is WebSocketState.DISCONNECTED


async def test_peer_that_left_before_is_no_error() -> None:
    peer = Peer(can_deny=True)
    peer._inbox.get_nowait()
    peer.leave()
    await refuse_handshake(peer.websocket, 429, "")
    assert peer.sent == []


async def test_denied_socket_cannot_be_connected() -> None:
    peer = Peer(can_deny=True)
    await refuse_handshake(peer.websocket, 429, "")
    with pytest.raises(ConnectionClosed):
        await ConnectionManager().connect(peer.websocket)
    assert peer.accepted is None


async def test_close_after_a_denial_does_nothing() -> None:
    peer = Peer(can_deny=True)
    await refuse_handshake(peer.websocket, 429, "")
    await peer.websocket.close(1008, "as Starlette does for a WebSocketException")
    assert len(peer.sent) == 2
    with pytest.raises(RuntimeError, match="refused"):
        await peer.websocket.send_text("too late")


@pytest.mark.parametrize("end", ["accept", "close"])
async def test_only_a_handshake_can_be_denied(end: str) -> None:
    peer = Peer(can_deny=True)
    await getattr(peer.websocket, end)()
    with pytest.raises(RuntimeError, match="neither accepted nor closed"):
        await refuse_handshake(peer.websocket, 429, "")
    assert not can_refuse_handshake(peer.websocket)


# Refusing whatever state it is in.


async def test_handshake_is_refused_by_http() -> None:
    peer = Peer(can_deny=True)
    await refuse(peer.websocket, 429, 1008, "too many")
    assert peer.sent[0]["status"] == 429


@pytest.mark.parametrize(("refuses", "code"), [((), 1008), ((1008,), 4008), ((1008, 4008), 1000)])
async def test_accepted_socket_is_closed(refuses: tuple[int, ...], code: int) -> None:
    peer = Peer(refuses=refuses, can_deny=True)
    await peer.websocket.accept()
    await refuse(peer.websocket, 429, 1008, "x" * 200)
    assert peer.end == (code, "x" * 123)
    await peer.websocket.close()
    assert len(peer.sent) == 2


async def test_server_that_refuses_every_code_is_left_alone() -> None:
    peer = Peer(refuses=(1008, 4008, 1000))
    await peer.websocket.accept()
    await refuse(peer.websocket, 429, 1008, "")
    assert peer.close is None
    assert peer.websocket.application_state is WebSocketState.DISCONNECTED


async def test_closed_socket_is_left_alone() -> None:
    peer = Peer()
    await peer.websocket.close()
    await refuse(peer.websocket, 429, 1008, "")
    assert len(peer.sent) == 1


async def test_accepted_peer_that_has_gone_is_no_error() -> None:
    peer = Peer()
    await peer.websocket.accept()
    peer.vanish()
    await refuse(peer.websocket, 429, 1008, "")


@pytest.mark.parametrize("where", ["accepted", "by http", "by close"])
async def test_peer_that_takes_nothing_holds_nobody_up(where: str) -> None:
    peer = Peer(can_deny=True) if where == "by http" else Peer()
    if where == "accepted":
        await peer.websocket.accept()
    peer.stall()
    started = time.monotonic()
    async with asyncio.timeout(5):
        await refuse(peer.websocket, 429, 1008, "")
    assert time.monotonic() - started < 3
    assert peer.websocket.application_state is WebSocketState.DISCONNECTED
