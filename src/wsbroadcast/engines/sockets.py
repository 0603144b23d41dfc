"""What the drivers don't do with their sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys

# Two shorts on Windows, two ints elsewhere: do linger, for no time at all.
_NO_LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


def no_linger(transport: asyncio.BaseTransport) -> None:
    """Make every later close of the connection a reset (RFC 9293, 3.10.5), whoever closes it.

    The kernel then drops what it could not send yet. It is no use to a unix socket, whose peer has at once what was
    written, and not there on transports without a socket.
    """
    # Closed already: None or a closed socket, of which uvloop says ValueError and everybody else OSError. Over
    # TLS, once somebody has closed it twice, asyncio's `get_extra_info` itself says AttributeError.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


def reset(transport: asyncio.BaseTransport) -> None:
    """Close the connection with a reset: nothing that is still in a buffer, ours or the kernel's, is sent any more.

    Takes every transport, one over TLS too, and one that is closed. The socket is gone a turn of the event loop later.
    """
    no_linger(transport)
    # By name: uvloop's transports are none of asyncio's classes.
    getattr(transport, "abort", transport.close)()
