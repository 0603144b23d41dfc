"""A client that stops reading: on a real socket, so that the server feels what it feels with any such client."""

import asyncio
import os
import socket
from base64 import b64encode
from typing import Self

_RECEIVE_BUFFER_BYTES = 4096
_HANDSHAKE_TIMEOUT = 5.0
_MAX_ANSWER_BYTES = 16 * 1024

# A masked close frame without a code (RFC 6455, 5.5.1); a key of zeros leaves the empty payload as it is.
_CLOSE_FRAME = b"\x88\x80\x00\x00\x00\x00"


class StalledClient:
    """A WebSocket client that takes the handshake and then nothing more, until it is told to read on.

    Args:
        address: Where the server listens, as an IP address and a port, or what ASGI has instead.
        path: The endpoint's, with its query.

    Raises:
        OSError: If that is no address.
    """

    def __init__(self, address: tuple[str, int | None] | None, path: str) -> None:
        if address is None or address[1] is None:
            raise OSError("the server has no address to connect to")
        self._address = address
        self._path = path
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        # Before it connects, because the first window follows from it. The kernel takes little for a client that
        # reads nothing then, and the server notices soon.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)

    async def connect(self) -> None:
        """Open the connection.

        Raises:
            OSError: If the server can't be reached, doesn't answer, or refuses.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
            await loop.sock_connect(self._socket, self._address)
            await loop.sock_sendall(self._socket, self._handshake())
            answer = b""
            while b"\r\n\r\n" not in answer and len(answer) < _MAX_ANSWER_BYTES:
                data = await loop.sock_recv(self._socket, 1024)
                if not data:
                    break
                answer += data
        status = answer.partition(b"\r\n")[0]
        if b" 101 " not in status + b" ":
            raise ConnectionRefusedError(f"the server answered {status.decode('latin-1')!r}")

    def _handshake(self) -> bytes:
        host, port = self._address
        host = f"[{host}]" if ":" in host else host
        key = b64encode(os.urandom(16)).decode()
        return (
            f"GET {self._path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode("latin-1")

    async def read_on(self) -> None:
        """Read, and throw away, whatever comes; returns when the server has closed the connection."""
        loop = asyncio.get_running_loop()
        # Read at the pace of the first window, what waits would take many seconds more.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
        try:
            while await loop.sock_recv(self._socket, 64 * 1024):
                pass
        except ConnectionError:
            pass

    async def leave(self) -> None:
        """Say goodbye, if the server still listens; returns when that is on its way."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, _CLOSE_FRAME)
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
