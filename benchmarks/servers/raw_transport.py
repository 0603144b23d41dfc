"""The floor in Python: an asyncio protocol that writes the same bytes to every transport, and does nothing else.

No HTTP server, no checks, no flow control, no channels; it unmasks nothing, because the load client masks with zeros.
"""

import asyncio
import base64
import hashlib
import json
from typing import cast

from _serve import options, run

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
transports: set[asyncio.Transport] = set()


def frame(payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2) + payload
    return b"\x81\x7f" + size.to_bytes(8) + payload


class Protocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.is_open = self.is_loop = False
        self.received = b""

    def connection_lost(self, error: Exception | None) -> None:
        transports.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.is_open:
            self.upgrade()
        else:
            payloads = self.payloads()
            if self.is_loop:
                payloads = [message.encode() for batch in payloads for message in json.loads(batch)]
            self.broadcast(payloads)

    def upgrade(self) -> None:
        head, end, self.received = self.received.partition(b"\r\n\r\n")
        if not end:
            self.received = head
            return
        self.is_loop = head.startswith(b"GET /loop")
        key = head.lower().partition(b"sec-websocket-key:")[0]
        value = head[len(key) :].partition(b":")[2].partition(b"\r\n")[0].strip()
        accept = base64.b64encode(hashlib.sha1(value + GUID).digest())
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self.is_open = True
        transports.add(self.transport)

    def payloads(self) -> list[bytes]:
        data, at, found = self.received, 0, []
        while len(data) - at >= 6:
            size, start = data[at + 1] & 0x7F, at + 6
            if size == 126:
                size, start = int.from_bytes(data[at + 2 : at + 4]), at + 8
            elif size == 127:
                size, start = int.from_bytes(data[at + 2 : at + 10]), at + 14
            if len(data) < start + size:
                break
            found.append(data[start : start + size])
            at = start + size
        self.received = data[at:]
        return found

    def broadcast(self, payloads: list[bytes]) -> None:
        if payloads:
            joined = b"".join(map(frame, payloads))
            for transport in transports:
                transport.write(joined)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Protocol, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    run(main(options().port), options().loop)
