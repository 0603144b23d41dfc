"""Looks after sinks with a backlog: which ones are behind, and which peers take nothing for too long."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, MutableMapping
from contextvars import Context
from typing import Any, Protocol

from wsbroadcast.delivery.backlog import HIGH_WATER_PART, Place
from wsbroadcast.delivery.frames import Events
from wsbroadcast.options import SlowConsumer
from wsbroadcast.stats import Counters

# How often within `send_timeout` a sink with a backlog is checked. Ticks of the event loop are counted, not seconds:
# while the loop is blocked there are no ticks, so no peer is evicted because the app itself was blocked.
_TICKS = 8

# A peer keeps pace if it takes what makes it a slow consumer within this part of `send_timeout`.
PACE_PART = 4

# For this part of `send_timeout` a peer counts as keeping pace after its backlog was opened.
_TRUST_PART = 40

# After so many seconds the progress of a peer is checked again.
_FRESH_SECONDS = 0.03


NOBODYS = Context()
"""A context without variables, for callbacks of the event loop that concern no connection. They never nest."""


class Owner(Protocol):
    """Is told by a sink what happens to its socket."""

    def lost(self, code: int, reason: str) -> None:
        """Take note that a write failed, because the peer is gone."""

    def evict(self, cause: str) -> None:
        """Take note that the peer doesn't take what it is sent."""

    def fall_back(self, place: Place) -> bool:
        """Take note that a message of a history has no room; return whether it and the next ones are sent later."""

    @property
    def context(self) -> Context:
        """The context variables for all work on the socket."""

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        """Send an event of the app through Starlette, so that Starlette's state follows it."""


class Waiting(Protocol):
    """The part of a sink that is needed here."""

    @property
    def owner(self) -> Owner: ...  # noqa: D102  # as `Sink` says
    @property
    def held_bytes(self) -> int: ...  # noqa: D102  # as `Sink` says
    @property
    def held_messages(self) -> int: ...  # noqa: D102  # as `Sink` says
    @property
    def is_half_full(self) -> bool: ...  # noqa: D102  # as `Sink` says
    @property
    def taken(self) -> int: ...  # noqa: D102  # as `Sink` says
    def abort(self) -> None: ...  # noqa: D102  # as `Sink` says


class Progress:
    """How much one peer takes of what waits for it.

    What it takes gives it time, at the rate of the slowest pace that is still waited for. So it counts how much it
    takes, not how often: a byte now and then gives no time.
    """

    __slots__ = (
        "_has_taken",
        "_looked_at",
        "_pace",
        "_patience",
        "_sink",
        "_taken",
        "paid_until",
        "ticks",
        "took_at",
        "writer",
    )

    def __init__(self, sink: Waiting, options: SlowConsumer, now: float) -> None:
        self.writer: asyncio.Task[None] | None = None
        """The writer task, once it is made."""
        self._sink = sink
        self._patience = options.send_timeout / PACE_PART
        self._pace = options.max_backlog_bytes / HIGH_WATER_PART / self._patience
        # Read only when it is first needed, because most writers have ended before that.
        self._taken: int | None = None
        self._looked_at = self.took_at = now
        """When it was last seen to have taken anything, in seconds of the event loop's clock."""
        self.paid_until = self._looked_at + options.send_timeout / _TRUST_PART
        """Until when it keeps pace, by what it has taken so far."""
        self.ticks = 0
        """For how many ticks it has taken nothing."""
        self._has_taken = False

    def is_stale(self, now: float) -> bool:
        """Tell whether it wasn't checked for a while."""
        return now - self._looked_at >= _FRESH_SECONDS

    def look(self, now: float) -> None:
        """Check what the peer has taken since the last check."""
        taken = self._sink.taken
        if self._taken is not None and taken > self._taken:
            bought = (taken - self._taken) / self._pace
            self.paid_until = min(max(self.paid_until, self._looked_at) + bought, now + self._patience)
            self.took_at = now
            self._has_taken = True
        self._taken = taken
        self._looked_at = now

    def tick(self, now: float) -> None:
        """Count one more tick. If the peer took something since the last one, begin again."""
        is_first = self._taken is None
        self.look(now)
        self.ticks = 0 if self._has_taken or is_first else self.ticks + 1
        self._has_taken = False


class SlowConsumers:
    """The sinks of one node that have a backlog. While all peers keep up, it does nothing and holds nothing."""

    def __init__(self, options: SlowConsumer, counters: Counters) -> None:
        self.options = options
        self.counters = counters
        self.postponed = 0
        """How many messages of the batch that is being delivered are sent later, to clients that know positions."""
        self.events = Events()
        """The events for servers that make the frames themselves."""
        self.waiting: dict[Waiting, Progress] = {}
        """The sinks with a backlog."""
        self.behind: dict[Waiting, bool] = {}
        """The slow consumers among them, which are past their high-water mark; and whether they were half full."""
        # Called once when a sink has nothing waiting any more.
        self._drained: dict[Waiting, list[Callable[[], None]]] = {}
        # Done at the next change. It is set while a broadcaster waits for one.
        self._change: asyncio.Future[None] | None = None
        self._is_wake_scheduled = False
        self._tick: asyncio.TimerHandle | None = None

    def start_writer(self, sink: Waiting, drain: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a sink's writer. It ends by itself when nothing waits any more, and calls `writer_ended`."""
        loop = asyncio.get_running_loop()
        progress = self.waiting[sink] = Progress(sink, self.options, loop.time())
        self._look_later()
        # A copy of the context, because an eager task enters it at once, and the caller may be in it already.
        writer = loop.create_task(drain, name="wsbroadcast writer", context=sink.owner.context.copy())
        progress.writer = writer
        return writer

    def writer_ended(self, sink: Waiting) -> None:
        """Take note that a sink has nothing waiting any more."""
        self.waiting.pop(sink, None)
        if not self.waiting:
            self.events.clear()
        for call in self._drained.pop(sink, ()):
            call()

    def when_drained(self, sink: Waiting, call: Callable[[], None]) -> None:
        """Call something once, when a sink has nothing waiting any more or has ended."""
        self._drained.setdefault(sink, []).append(call)

    def fell_behind(self, sink: Waiting) -> None:
        """Take note that a sink went past its high-water mark."""
        self.behind[sink] = False
        if sink in self.waiting:
            self.waiting[sink].look(asyncio.get_running_loop().time())

    def caught_up(self, sink: Waiting) -> None:
        """Take note that a sink is below its high-water mark again."""
        self.behind.pop(sink, None)
        if self._change is not None and not self._is_wake_scheduled:
            self._is_wake_scheduled = True
            asyncio.get_running_loop().call_soon(
                self.wake, context=NOBODYS
            )  # once for all sinks that catch up in one turn

    def tail(self) -> list[Waiting]:
        """Return the slow consumers that may soon lose messages: those that were half full and haven't caught up yet.

        Kernel buffers differ by megabytes between sockets. So of a crowd that reads equally fast, some fall behind
        earlier than others.
        """
        for sink, was_half_full in self.behind.items():
            if not was_half_full and sink.is_half_full:
                self.behind[sink] = True
        return [sink for sink, was_half_full in self.behind.items() if was_half_full]

    def progress(self, sink: Waiting, now: float) -> Progress | None:
        """Return the present progress of a sink; `None` if nothing waits there."""
        progress = self.waiting.get(sink)
        if progress is not None and progress.is_stale(now):
            progress.look(now)
        return progress

    async def wait_for_change(self, deadline: float) -> None:
        """Return after the next `wake`, or at the deadline."""
        loop = asyncio.get_running_loop()
        if self._change is None:
            self._change = loop.create_future()
        await asyncio.wait((self._change,), timeout=max(0.0, deadline - loop.time()))

    def wake(self) -> None:
        """Let waiting broadcasters check again whether they may go on."""
        self._is_wake_scheduled = False
        change, self._change = self._change, None
        if change is not None:
            change.set_result(None)

    async def aclose(self) -> None:
        """Cancel all writers, and wait until they have ended."""
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        writers = [progress.writer for progress in self.waiting.values() if progress.writer is not None]
        for sink in list(self.waiting):
            sink.abort()
        if writers:
            await asyncio.wait(writers)

    def _look(self) -> None:
        self._tick = None
        now = asyncio.get_running_loop().time()
        for sink, progress in list(self.waiting.items()):
            progress.tick(now)
            if progress.ticks >= _TICKS:
                sink.owner.evict("send_timeout")
        if self.waiting:
            self._look_later()

    def _look_later(self) -> None:
        # There is only one timer. A check that evicts starts writers for close frames, and so comes here before it
        # ends.
        if self._tick is None:
            loop = asyncio.get_running_loop()
            self._tick = loop.call_later(self.options.send_timeout / _TICKS, self._look, context=NOBODYS)


# Bytes that were written but not taken by the peer: in the transport, and in the kernel below it.


KNOWS_KERNEL = sys.platform == "linux"
"""Whether the kernel tells how much it holds. If it doesn't, a slow peer seems to take nothing for long: a kernel
reports a socket as writable, and the transport goes on, only when a third of some megabytes is free."""

# The default of asyncio and uvloop for a transport without TLS.
_HIGH_WATER_BYTES = 64 * 1024


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Return how many bytes a transport still holds for its peer."""
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        return 0  # raised by CPython's TLS transport after a second `close`; uvicorn closes twice


def bound_buffer(transport: asyncio.Transport) -> None:
    """Let a TLS transport report that it is full at the same size as others. Its own default is 512 KiB."""
    get_extra_info = getattr(transport, "get_extra_info", None)
    if get_extra_info is not None and get_extra_info("sslcontext") is not None:
        transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)


def outstanding_bytes(transport: asyncio.Transport) -> int:
    """Return how many bytes a transport and, if that is known, the kernel still hold for the peer."""
    return unsent_bytes(transport) + _in_kernel(transport)


if sys.platform == "linux":
    from fcntl import ioctl
    from termios import TIOCOUTQ  # for a socket it is SIOCOUTQ: bytes that aren't acknowledged (tcp(7), unix(7))

    def _in_kernel(transport: asyncio.Transport) -> int:
        try:
            fd = transport.get_extra_info("socket").fileno()
            return 0 if fd < 0 else int.from_bytes(ioctl(fd, TIOCOUTQ, bytes(4)), sys.byteorder)
        except (AttributeError, OSError):
            return 0  # closed, or a socket that doesn't tell

else:

    def _in_kernel(transport: asyncio.Transport) -> int:
        return 0
