"""What was written to a peer and not taken by it: in the transport, and in the kernel below."""

from __future__ import annotations

import asyncio
import sys

KNOWS_KERNEL = sys.platform == "linux"
"""Whether the kernel tells what it holds. Where it doesn't, a peer that reads slowly seems to stand still for long: a
kernel calls a socket writable, and the transport moves, only when a third of megabytes is free."""

# asyncio's and uvloop's for a transport without TLS.
_HIGH_WATER_BYTES = 64 * 1024


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Return what a transport still holds for its peer."""
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        return 0  # CPython's TLS transport after a second `close`, and uvicorn closes twice


def bound_buffer(transport: asyncio.Transport) -> None:
    """Let a TLS transport say that it is full when any other would: its own default is 512 KiB."""
    get_extra_info = getattr(transport, "get_extra_info", None)
    if get_extra_info is not None and get_extra_info("sslcontext") is not None:
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)


def outstanding_bytes(transport: asyncio.Transport) -> int:
    """Return what a transport and, where that is known, the kernel still hold for the peer."""
    return unsent_bytes(transport) + _in_kernel(transport)


if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ  # SIOCOUTQ for a socket: what the other side hasn't acknowledged (tcp(7), unix(7))

    def _in_kernel(transport: asyncio.Transport) -> int:
        try:
            fd = transport.get_extra_info("socket").fileno()
            return 0 if fd < 0 else int.from_bytes(ioctl(fd, TIOCOUTQ, bytes(4)), sys.byteorder)
        except (AttributeError, OSError):
            return 0  # closed, or no socket that counts

else:

    def _in_kernel(transport: asyncio.Transport) -> int:
        return 0
