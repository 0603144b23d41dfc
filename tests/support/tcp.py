"""A TCP server in the test's event loop, which leaves nothing behind."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[int]:
    """Run `serve(reader, writer)` for each connection, and close the connection afterwards; yield the port.

    At the end whatever still runs is cancelled, and each connection is closed. Not `asyncio.start_server`: in
    Python 3.11 it leaks a connection that comes while it is closed.
    """
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    async def run(sock: socket.socket) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await serve(reader, writer)
            await writer.drain()
        except (OSError, EOFError):
            pass  # the peer is gone
        except asyncio.CancelledError:
            transport.abort()  # the test is over: nothing that is unsent keeps it open
        finally:
            writer.close()

    def accept() -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # it is gone already
        tasks.add(task := loop.create_task(run(sock)))
        task.add_done_callback(tasks.discard)

    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        loop.add_reader(listener, accept)
        try:
            yield listener.getsockname()[1]
        finally:
            loop.remove_reader(listener)
            await asyncio.sleep(0)  # a task that never began would not close its socket
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            await asyncio.sleep(0)  # a transport closes its socket in the next turn
