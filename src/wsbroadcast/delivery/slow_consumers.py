"""Looks after the sinks that have something waiting: who is behind, and who stands still for too long."""

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

# How often within `send_timeout` a waiting sink is looked at. Ticks of the loop are counted rather than seconds: while
# the loop itself is blocked there are none, so nobody is evicted for the app's own stall.
_TICKS = 8

# A peer keeps pace if it takes what makes it a slow consumer within this part of `send_timeout`.
PACE_PART = 4

# For how much of `send_timeout` a peer that has only begun to wait is trusted to go on taking.
_TRUST_PART = 40

# How old what is known of a peer may be before it is looked at again.
_FRESH_SECONDS = 0.03


NOBODYS = Context()
"""Without any variables, for callbacks of the event loop that are about nobody in particular. None nests in another."""


class Owner(Protocol):
    """Whom a sink tells what became of its socket."""

    def lost(self, code: int, reason: str) -> None:
        """A write failed: the peer is gone."""

    def evict(self, cause: str) -> None:
        """The peer doesn't take what it is sent."""

    def fall_back(self, place: Place) -> bool:
        """A message from a history doesn't fit; return whether it and what follows are sent when there is room."""

    @property
    def context(self) -> Context:
        """The context variables that what is done about the socket sees."""

    async def app_send(self, event: MutableMapping[str, Any]) -> None:
        """Send an event of the app through Starlette, whose state follows what the app does."""


class Waiting(Protocol):
    """What has to be known of a sink."""

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
    """How one peer gets on with what waits for it.

    What it takes buys it time, at the price of the slowest pace that others are held to. So it doesn't matter how often
    it moves, but how much it takes: a byte now and then buys nothing.
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
        """What writes, once it has been made."""
        self._sink = sink
        self._patience = options.send_timeout / PACE_PART
        self._pace = options.max_backlog_bytes / HIGH_WATER_PART / self._patience
        # Not asked for now: most writers have ended before anybody wants to know.
        self._taken: int | None = None
        self._looked_at = self.took_at = now
        """When it was last seen to have taken anything."""
        self.paid_until = self._looked_at + options.send_timeout / _TRUST_PART
        """Until when it keeps pace, by what it has taken so far."""
        self.ticks = 0
        """How many ticks it has stood still for."""
        self._has_taken = False

    def is_stale(self, now: float) -> bool:
        """Tell whether it was not looked at for a while."""
        return now - self._looked_at >= _FRESH_SECONDS

    def look(self, now: float) -> None:
        """See what it has taken since the last look."""
        taken = self._sink.taken
        if self._taken is not None and taken > self._taken:
            bought = (taken - self._taken) / self._pace
            self.paid_until = min(max(self.paid_until, self._looked_at) + bought, now + self._patience)
            self.took_at = now
            self._has_taken = True
        self._taken = taken
        self._looked_at = now

    def tick(self, now: float) -> None:
        """Count one more tick, or begin again if the peer took something since the last."""
        is_first = self._taken is None
        self.look(now)
        self.ticks = 0 if self._has_taken or is_first else self.ticks + 1
        self._has_taken = False


class SlowConsumers:
    """The waiting sinks of one node. It does nothing, and holds nothing, while every peer keeps up."""

    def __init__(self, options: SlowConsumer, counters: Counters) -> None:
        self.options = options
        self.counters = counters
        self.postponed = 0
        """How many messages of the batch that is being delivered are delivered later, to those who know where they
        are."""
        self.events = Events()
        """What is written to servers that make the frames themselves."""
        self.waiting: dict[Waiting, Progress] = {}
        """The sinks with a backlog."""
        self.behind: dict[Waiting, bool] = {}
        """Those among them that are slow consumers: past their high-water mark. With whether they were half full."""
        # What is called once when a sink has nothing waiting any more.
        self._drained: dict[Waiting, list[Callable[[], None]]] = {}
        # Done at the next change; there while a broadcaster waits for one.
        self._change: asyncio.Future[None] | None = None
        self._is_wake_scheduled = False
        self._tick: asyncio.TimerHandle | None = None

    def start_writer(self, sink: Waiting, drain: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a sink's writer; it ends by itself when nothing waits any more, and `writer_ended` follows."""
        loop = asyncio.get_running_loop()
        progress = self.waiting[sink] = Progress(sink, self.options, loop.time())
        self._look_later()
        # A copy of the context, because an eager task factory enters it at once, and it may be entered already.
        writer = loop.create_task(drain, name="wsbroadcast writer", context=sink.owner.context.copy())
        progress.writer = writer
        return writer

    def writer_ended(self, sink: Waiting) -> None:
        """A sink has nothing waiting any more."""
        self.waiting.pop(sink, None)
        if not self.waiting:
            self.events.clear()
        for call in self._drained.pop(sink, ()):
            call()

    def when_drained(self, sink: Waiting, call: Callable[[], None]) -> None:
        """Call something once when a sink has nothing waiting any more, also because it has ended."""
        self._drained.setdefault(sink, []).append(call)

    def fell_behind(self, sink: Waiting) -> None:
        """A sink went past its high-water mark."""
        self.behind[sink] = False
        if sink in self.waiting:
            self.waiting[sink].look(asyncio.get_running_loop().time())

    def caught_up(self, sink: Waiting) -> None:
        """A sink is below its high-water mark again."""
        self.behind.pop(sink, None)
        if self._change is not None and not self._is_wake_scheduled:
            self._is_wake_scheduled = True
            asyncio.get_running_loop().call_soon(self.wake, context=NOBODYS)  # once for all that catch up in one turn

    def tail(self) -> list[Waiting]:
        """Return the slow consumers that are about to lose messages: from half full until they have caught up.

        Kernel buffers differ by megabytes between sockets, so of a crowd that reads equally fast some fall behind
        earlier than others.
        """
        for sink, was_half_full in self.behind.items():
            if not was_half_full and sink.is_half_full:
                self.behind[sink] = True
        return [sink for sink, was_half_full in self.behind.items() if was_half_full]

    def progress(self, sink: Waiting, now: float) -> Progress | None:
        """Return how a sink that waits gets on, as of now."""
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
        """Let waiting broadcasters look again whether they may go on."""
        self._is_wake_scheduled = False
        change, self._change = self._change, None
        if change is not None:
            change.set_result(None)

    async def aclose(self) -> None:
        """End every writer and wait for them."""
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
        # One timer for all: a look that evicts starts the writers of close frames, and so comes here before its end.
        if self._tick is None:
            loop = asyncio.get_running_loop()
            self._tick = loop.call_later(self.options.send_timeout / _TICKS, self._look, context=NOBODYS)


# What was written to a peer and not taken by it: in the transport, and in the kernel below.


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
