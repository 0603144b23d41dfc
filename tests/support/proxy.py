"""A TCP proxy in front of a broker or another server. It simulates faults of the network on command."""

from __future__ import annotations

import asyncio
import inspect
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from tests.support.brokers import HOST, Endpoint, free_port
from tests.support.pipes import Fates, Faults, Pipe


class FaultProxy:
    """Forwards connections to an endpoint, with faults that can be switched at any time.

    It runs in a thread with an event loop of its own: a test that blocks its loop doesn't stop the network, and the
    proxy's tasks are none of the test's. A fault is in force when its method returns; only what the kernel has taken
    before still arrives. Faults add up. `heal` ends them all, but a connection that has lost bytes stays lost: it
    hears nothing any more, not even that the other side closes, like one whose route is gone.

    A client is accepted before the endpoint is asked, and reset if that can't be reached.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.host = HOST
        self.port = free_port()
        self.accepted = 0
        """How many connections there have been."""
        self._faults = Faults()
        self._pipes: set[Pipe] = set()
        self._listener: socket.socket | None = None

    @property
    def url(self) -> str:
        """The endpoint's URL, but through the proxy."""
        parts = urlsplit(self._endpoint.url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}{HOST}:{self.port}").geturl()

    @property
    def open(self) -> int:
        """How many clients are connected."""
        return sum(not pipe.client_is_gone for pipe in tuple(self._pipes))

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Accept connections."""
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._thread.start()
        try:
            self._do(self._listen)
        except OSError:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Reset every connection, accept no more, and end the thread."""
        self._do(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()

    def pause(self) -> None:
        """Hold all bytes, both ways, until `resume`; connections are still accepted."""
        self._do(self._faults.flowing.clear)

    def resume(self) -> None:
        """Deliver what was held, and go on."""
        self._do(self._faults.flowing.set)

    def delay(self, seconds: float) -> None:
        """Deliver what comes from now on so much later, each way, in order."""

        def delay() -> None:
            self._faults.delay = seconds

        self._do(delay)

    def cut(self, *, requests: int | None = None, replies: int | None = None) -> None:
        """Let so many more bytes pass one way, then reset; for each connection, present and future.

        With 0 the next byte doesn't pass any more.
        """

        def cut() -> None:
            for fates in self._all_fates():
                fates.requests.limit = requests if requests is not None else fates.requests.limit
                fates.replies.limit = replies if replies is not None else fates.replies.limit

        self._do(cut)

    def reset(self) -> None:
        """Reset all connections, both ways. New ones work."""
        self._do(self._reset)

    def black_hole(self) -> None:
        """Drop all bytes, both ways. New connections are accepted, and their bytes are dropped too."""

        def black_hole() -> None:
            for fates in self._all_fates():
                fates.requests.swallows = fates.replies.swallows = True

        self._do(black_hole)

    def drop_replies(self) -> None:
        """Drop what the endpoint sends. What clients send arrives."""

        def drop_replies() -> None:
            for fates in self._all_fates():
                fates.replies.swallows = True

        self._do(drop_replies)

    def refuse(self) -> None:
        """Refuse new connections; those that are open stay."""
        self._do(self._close)

    def heal(self) -> None:
        """End every fault; a connection that has lost bytes stays lost."""
        self._do(self._heal)

    def _do(self, action: Callable[[], object]) -> None:
        """Run it in the thread of the proxy, and wait: so nothing is switched in the middle of a write."""

        async def run() -> None:
            result = action()
            if inspect.isawaitable(result):
                await result

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(timeout=10)

    def _all_fates(self) -> list[Fates]:
        return [self._faults.fates, *(pipe.fates for pipe in self._pipes)]

    def _listen(self) -> None:
        # Not `asyncio.start_server`: in Python 3.11 it leaks a connection that comes while it is closed.
        if self._listener is None:
            self._listener = socket.create_server((HOST, self.port), backlog=1024)
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # it is gone already
        self.accepted += 1
        pipe = Pipe(self._endpoint, self._faults, sock)
        self._pipes.add(pipe)
        pipe.task.add_done_callback(lambda task: self._pipes.remove(pipe))

    def _close(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _heal(self) -> None:
        self._faults.fates = Fates()
        self._faults.delay = 0.0
        self._faults.flowing.set()
        for pipe in self._pipes:
            pipe.fates.requests.limit = pipe.fates.replies.limit = None
        self._listen()

    async def _reset(self) -> None:
        pipes = list(self._pipes)
        for pipe in pipes:
            pipe.task.cancel()
        if pipes:
            await asyncio.wait([pipe.task for pipe in pipes])
        await asyncio.sleep(0)  # an aborted transport closes its socket in the next turn

    async def _end(self) -> None:
        self._close()
        await self._reset()
