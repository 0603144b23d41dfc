"""RFC 6455 frames from a server to a client. No I/O.

A server's frames are not masked (RFC 6455, 5.1), so one frame serves every connection.
"""

from __future__ import annotations

from wsbroadcast.message import Message

_FIN = 0x80
_TEXT = 0x01
_BINARY = 0x02


def frame_header(opcode: int, size: int) -> bytes:
    """Return the header of an unfragmented, unmasked frame (RFC 6455, 5.2)."""
    if size < 126:
        return bytes((_FIN | opcode, size))
    if size < 65536:
        return bytes((_FIN | opcode, 126)) + size.to_bytes(2)
    return bytes((_FIN | opcode, 127)) + size.to_bytes(8)


class WireForm:
    """One way of putting a message on the wire. Connections with the same wire form share the same bytes."""

    def frame(self, message: Message) -> bytes:
        """Return the message's frame, made once per message and wire form."""
        frame = message.frames.get(self)
        if frame is None:
            frame = message.frames[self] = self._encode(message)
        return frame

    def _encode(self, message: Message) -> bytes:
        return frame_header(_TEXT if message.is_text else _BINARY, message.size) + message.payload


PLAIN = WireForm()
"""The payload is the frame."""
