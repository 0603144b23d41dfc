"""Looks after the sinks that have something waiting: who is behind, and who stands still for too long."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, MutableMapping
from contextvars import Context
from typing import Any, Protocol

from wsbroadcast.counters import Counters
from wsbroadcast.options import SlowConsumer

# How often within `send_timeout` a waiting sink is looked at. Ticks of the loop are counted rather than seconds: while
# the loop itself is blocked there are none, so nobody is evicted for the app's own stall.
_TICKS = 8

# How much of `send_timeout` is waited for somebody who takes nothing, where others do: by a tight loop for the tail of
# its crowd, by any broadcaster for those who are no crowd. Healthy clients of a busy machine were seen to take nothing
# for more than a second: the kernel calls a full socket writable only when a third of it is free.
_PATIENCE_PART = 4


NOBODYS = Context()
"""Without any variables, for callbacks of the event loop that are about nobody in particular. None nests in another."""


class Owner(Protocol):
    """Whom a sink tells what became of its socket."""

    def lost(self, code: int, reason: str) -> None:
        """A write failed: the peer is gone."""

    def evict(self, cause: str) -> None:
        """The peer doesn't take what it is sent."""

    @property
    def context(self) -> Context:
        """The context variables that what is done about the socket sees."""

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        """Send an event of the app through Starlette, whose state follows what the app does."""


class Waiting(Protocol):
    """What the watch has to know of a sink."""

    @property
    def owner(self) -> Owner: ...  # noqa: D102
    @property
    def held_bytes(self) -> int: ...  # noqa: D102
    @property
    def held_messages(self) -> int: ...  # noqa: D102
    @property
    def is_half_full(self) -> bool: ...  # noqa: D102
    def progress(self) -> object: ...  # noqa: D102
    def abort(self) -> None: ...  # noqa: D102


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Return what a transport still holds for its peer."""
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        return 0  # CPython's TLS transport after a second `close`, and uvicorn closes twice


class Watch:
    """The waiting sinks of one node. It does nothing, and holds nothing, while every peer keeps up."""

    def __init__(self, options: SlowConsumer, counters: Counters) -> None:
        self.options = options
        self.counters = counters
        self.waiting: dict[Waiting, _Standstill] = {}
        """The sinks with a backlog."""
        self.behind: dict[Waiting, float | None] = {}
        """Those among them that are slow consumers: past their high-water mark. With the time since when `tail` has
        named them."""
        # Broadcasters that wait for the crowd.
        self._waiters: list[asyncio.Future[None]] = []
        self._is_wake_scheduled = False
        self._tick: asyncio.TimerHandle | None = None

    def start_writer(self, sink: Waiting, drain: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a sink's writer; it ends by itself when nothing waits any more, and `writer_ended` follows."""
        loop = asyncio.get_running_loop()
        standstill = self.waiting[sink] = _Standstill(sink)
        if self._tick is None:
            self._tick = loop.call_later(self.options.send_timeout / _TICKS, self._look, context=NOBODYS)
        # A copy of the context, because an eager task factory enters it at once, and it may be entered already.
        writer = loop.create_task(drain, name="wsbroadcast writer", context=sink.owner.context.copy())
        standstill.writer = writer
        return writer

    def writer_ended(self, sink: Waiting) -> None:
        """A sink has nothing waiting any more."""
        self.waiting.pop(sink, None)

    def fell_behind(self, sink: Waiting) -> None:
        """A sink went past its high-water mark."""
        self.behind[sink] = None

    def caught_up(self, sink: Waiting) -> None:
        """A sink is below its high-water mark again."""
        self.behind.pop(sink, None)
        if self._waiters and not self._is_wake_scheduled:
            self._is_wake_scheduled = True
            asyncio.get_running_loop().call_soon(self.wake, context=NOBODYS)  # once for all that catch up in one turn

    def tail(self) -> list[Waiting]:
        """Return the slow consumers that a tight loop should give a moment, because they are about to lose messages.

        Kernel buffers differ by megabytes between sockets, so of a crowd that reads equally fast some fall behind
        earlier than others. From the time when its backlog is half full, each has a while to catch up. One that needs
        longer is a laggard, and nobody waits for it.
        """
        now = asyncio.get_running_loop().time()
        patience = self.options.send_timeout / _PATIENCE_PART
        tail = []
        for sink, since in self.behind.items():
            if since is None and sink.is_half_full:
                since = self.behind[sink] = now
            if since is not None and now - since < patience:
                tail.append(sink)
        return tail

    def stands_still(self, sink: Waiting) -> bool:
        """Tell whether a sink has something waiting, and its peer has taken nothing for a while."""
        standstill = self.waiting.get(sink)
        return standstill is not None and standstill.ticks * _PATIENCE_PART >= _TICKS

    async def wait_for_change(self, deadline: float) -> None:
        """Return after the next `wake`, or at the deadline."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        except TimeoutError:
            pass
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def wake(self) -> None:
        """Let waiting broadcasters look again whether they may go on."""
        self._is_wake_scheduled = False
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def aclose(self) -> None:
        """End every writer and wait for them."""
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        writers = [standstill.writer for standstill in self.waiting.values() if standstill.writer is not None]
        for sink in list(self.waiting):
            sink.abort()
        if writers:
            await asyncio.wait(writers)

    def _look(self) -> None:
        self._tick = None
        for sink, standstill in list(self.waiting.items()):
            standstill.look()
            if standstill.ticks >= _TICKS:
                sink.owner.evict("send_timeout")
        if self.waiting:
            loop = asyncio.get_running_loop()
            self._tick = loop.call_later(self.options.send_timeout / _TICKS, self._look, context=NOBODYS)


class _Standstill:
    """How long a waiting sink has made no progress."""

    __slots__ = ("_progress", "_sink", "ticks", "writer")

    def __init__(self, sink: Waiting) -> None:
        self.writer: asyncio.Task[None] | None = None
        self._sink = sink
        self._progress = sink.progress()
        self.ticks = 0

    def look(self) -> None:
        """Count one more tick, or begin again if the peer took something."""
        progress = self._sink.progress()
        self.ticks = 0 if progress != self._progress else self.ticks + 1
        self._progress = progress
