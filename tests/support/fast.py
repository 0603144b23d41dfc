"""A peer behind a fake of uvicorn's default protocol, so that the fast path is taken without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.websockets import WebSocket

Event = MutableMapping[str, Any]


class Transport:
    """Takes what is written. The test sets how much waits in it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closing = False
        self.aborted = False
        self.reads = True

    def write(self, data: bytes) -> None:
        assert not self.closing, "written to a transport that is closing"
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reads = False

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = self.closing = True


class _Connection:
    extensions: tuple[object, ...] = ()


class WebSocketsSansIOProtocol:
    """What the fast path knows of uvicorn's protocol; texts and short frames only."""

    __module__ = "uvicorn.fake"

    def __init__(self) -> None:
        self.transport = Transport()
        self.writable = asyncio.Event()
        self.writable.set()
        self.handshake_complete = False
        self.close_sent = False
        self.conn = _Connection()
        self.inbox: asyncio.Queue[Event] = asyncio.Queue()
        self.inbox.put_nowait({"type": "websocket.connect"})
        scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b"", "extensions": {}}
        self.websocket = WebSocket(scope, self.receive, self.send)

    async def receive(self) -> Event:
        return await self.inbox.get()

    async def send(self, event: Event) -> None:
        await self.writable.wait()
        assert not self.close_sent, "sent after a close"
        if event["type"] == "websocket.accept":
            self.handshake_complete = True
        elif event["type"] == "websocket.close":
            self.close_sent = True
            self.transport.write(b"\x88\x00")
            self.inbox.put_nowait({"type": "websocket.disconnect", "code": event["code"]})
            asyncio.get_running_loop().call_soon(self.transport.close)  # the peer answers
        else:
            payload = event["text"].encode()
            assert len(payload) < 126
            self.transport.write(bytes((0x81, len(payload))) + payload)

    def stall(self) -> None:
        self.writable.clear()

    def resume(self) -> None:
        self.writable.set()

    @property
    def messages(self) -> list[str]:
        """The texts the peer got; a close frame is `<close>`."""
        data, messages = b"".join(self.transport.written), []
        while data:
            size = data[1]
            assert size < 126
            messages.append("<close>" if data[0] == 0x88 else data[2 : 2 + size].decode())
            data = data[2 + size :]
        return messages
