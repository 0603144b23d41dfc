"""The sink: the only object that writes to a connection's socket. This one works on every ASGI server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from starlette.websockets import WebSocketDisconnect

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import ABNORMAL, CloseCode, cut_reason, fallback_codes
from wsbroadcast.delivery.backlog import Backlog, BacklogFull, Entry, Turn
from wsbroadcast.delivery.frames import Batch, WireForm, unframed
from wsbroadcast.delivery.slow_consumers import (
    KNOWS_KERNEL,
    Owner,
    SlowConsumers,
    bound_buffer,
    outstanding_bytes,
    unsent_bytes,
)
from wsbroadcast.exceptions import ConnectionClosed

Event = Mapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Seconds until `see_off` first checks whether the peer has answered.
_FIRST_PAUSE = 0.001


class AppSend(Turn):
    """An event that the app sends itself, in its place among the broadcasts."""

    __slots__ = ("done", "event")

    def __init__(self, event: Event, done: asyncio.Future[None]) -> None:
        self.event = event
        self.done = done

    @property
    def is_close(self) -> bool:
        """Whether it is a close event. Nothing is taken after it."""
        return bool(self.event["type"] == "websocket.close")

    @property
    def size(self) -> int:
        """The payload's size in bytes."""
        content = self.event.get("text") or self.event.get("bytes")
        if isinstance(content, str):
            return len(content.encode(errors="replace"))
        return len(content) if isinstance(content, bytes) else 0  # the server has refused anything else


class Close(Turn):
    """A close frame, after everything that was handed over before it."""

    __slots__ = ("code", "reason")

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


class Sink:
    """Sends the messages of one connection, in the order in which they are handed over.

    While the peer keeps up, there is only this object. When something has to wait, a `Backlog` and one writer task are
    made, and removed when all is written. Only that task writes then. Concurrent senders reorder messages on granian,
    break on uvicorn's legacy protocol, and corrupt deflate on hypercorn. A write that was cancelled or has failed ends
    the sink: nothing is written after it, because nobody knows how much of it was sent.
    """

    kind = "asgi"
    """The name under which `stats()` counts it."""
    is_stream = False
    """Whether it is an HTTP response. The server doesn't always tell then that the peer is gone."""

    __slots__ = (
        "_form",
        "_is_behind",
        "_send",
        "_slow_consumers",
        "_writer",
        "backlog",
        "hangs_up",
        "is_ended",
        "owner",
        "transport",
    )

    def __init__(
        self,
        owner: Owner,
        slow_consumers: SlowConsumers,
        send: Send,
        transport: asyncio.Transport | None = None,
        form: WireForm | None = None,
    ) -> None:
        self.owner = owner
        self.backlog: Backlog | None = None
        """The waiting messages; `None` while none wait."""
        self.is_ended = False
        """Whether nothing more is taken, because a close was handed over or the socket is lost."""
        self.hangs_up = False
        """Whether nothing of the peer is read any more after the close frame, because the peer floods."""
        self.transport = transport
        """The transport below the server's protocol, which can be aborted; `None` if it wasn't found."""
        if transport is not None:
            bound_buffer(transport)
        self._slow_consumers = slow_consumers
        # The form in which the server gets messages.
        self._form = form or unframed()
        # The server's own `send`, for messages of the library.
        self._send = send
        # Exists as long as the backlog, except for the moment in which that gets its first item.
        self._writer: asyncio.Task[None] | None = None
        self._is_behind = False

    @property
    def held_bytes(self) -> int:
        """How many bytes wait."""
        backlog = self.backlog
        return 0 if backlog is None else backlog.bytes + len(backlog.rest or b"")

    @property
    def held_messages(self) -> int:
        """How many messages wait."""
        backlog = self.backlog
        return 0 if backlog is None else backlog.messages + (backlog.rest is not None)

    @property
    def has_positions(self) -> bool:
        """Whether the client knows positions."""
        return self._form.has_positions

    @property
    def is_half_full(self) -> bool:
        """Whether half of a limit is waiting."""
        return self.backlog is not None and self.backlog.is_half_full

    def deliver(self, batch: Batch[Any]) -> None:
        """Hand over a batch. It never waits and never fails. If the backlog is full, the policy decides."""
        self.enqueue(batch.entries(self._form))

    def deliver_large(self, batch: Batch[Any]) -> None:
        """Hand over a batch with a message that is too large for one write."""
        self.enqueue(batch.entries(self._form))

    def enqueue(self, entries: Iterable[Entry]) -> None:
        """Put messages into the backlog for the writer task."""
        if self.is_ended:
            self.count_lost(sum(1 for _ in entries))
            return
        backlog = self.backlog or self._open_backlog()
        rest = iter(entries)
        left_behind: set[Audience] | None = None
        for entry in rest:
            if entry.place is not None:
                # A client that knows positions gets the others later, whatever the policy.
                if left_behind is not None and entry.place.audience in left_behind:
                    self._slow_consumers.postponed += 1
                    continue
                if not backlog.has_room_for(entry) and self.owner.fall_back(entry.place):
                    self._slow_consumers.postponed += 1
                    left_behind = {entry.place.audience, *(left_behind or ())}
                    continue
            try:
                dropped = backlog.push(entry)
            except BacklogFull:
                self.count_lost(1 + sum(1 for _ in rest))
                self.owner.evict("backlog_full")
                return
            if dropped:
                self._slow_consumers.counters.dropped[str(entry.policy)] += dropped
        if not self._is_behind and backlog.is_past_high_water:
            self._is_behind = True
            self._slow_consumers.fell_behind(self)
        if self._writer is None:
            self._start_writer(backlog)

    async def send_event(self, event: Event) -> None:
        """Send an event of the app, after everything handed over before and before everything handed over later.

        If the caller is cancelled while the event waits, the event isn't sent. Once it is being written, it is
        finished.

        Raises:
            ConnectionClosed: If the connection ended before its turn came.
        """
        if self.is_ended:
            raise ConnectionClosed(ABNORMAL)
        backlog = self.backlog or self._open_backlog()
        turn = AppSend(event, asyncio.get_running_loop().create_future())
        backlog.push_turn(turn)
        if turn.is_close:
            self.is_ended = True
        if self._writer is None:
            self._start_writer(backlog)
        try:
            await turn.done
        except asyncio.CancelledError:
            if not turn.is_close:
                backlog.remove_turn(turn)
            raise
        except ConnectionClosed:
            if not turn.is_close:  # to close something twice is no error
                raise

    def begin_reading(self) -> bool:
        """Take note that the app is about to wait for a message; return whether `end_reading` must be called."""
        return False

    def end_reading(self) -> None:
        """Take note that the app has its message, or waits no longer."""

    def when_drained(self, call: Callable[[], None]) -> None:
        """Call something once, when nothing waits any more or the sink has ended. Something must be waiting now."""
        self._slow_consumers.when_drained(self, call)

    async def drained(self) -> None:
        """Return when nothing waits any more, after `close_timeout` at most."""
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=self._slow_consumers.options.close_timeout)

    async def close(self, code: int, reason: str) -> None:
        """Send what waits, then a close frame. If the peer takes nothing, it ends within `close_timeout`.

        A peer that goes on taking gets up to `send_timeout`. What could not be sent by then is dropped and counted.
        """
        options = self._slow_consumers.options
        self.is_ended = True
        backlog = self.backlog or self._open_backlog()
        backlog.push_turn(Close(code, reason))
        writer = self._writer or self._start_writer(backlog)
        deadline = asyncio.get_running_loop().time() + options.send_timeout
        before: int | None = None
        while not writer.done() and (before is None or self.taken > before):
            if asyncio.get_running_loop().time() >= deadline:
                break
            before = self.taken
            await asyncio.wait({writer}, timeout=options.close_timeout)
        if not writer.done():
            self.abort()
            await asyncio.wait({writer}, timeout=options.close_timeout)

    def discard(self, *, keeps_close: bool = False) -> None:
        """Drop what waits. Messages are counted as dropped, and sends of the app raise an error.

        A large message that is partly written is broken off, so only a close may follow it.

        Args:
            keeps_close: Whether a waiting close stays. It is sent next then.
        """
        backlog = self.backlog
        if backlog is None:
            return
        if backlog.rest is not None:
            backlog.rest = None
            self.count_lost(1)
        close: Turn | None = None
        while (item := backlog.pop()) is not None:
            if isinstance(item, Entry):
                self.count_lost(1)
            elif keeps_close and (isinstance(item, Close) or (isinstance(item, AppSend) and item.is_close)):
                close = item
            elif isinstance(item, AppSend) and not item.done.done():
                item.done.set_exception(ConnectionClosed(ABNORMAL))
        if close is not None:
            backlog.push_turn(close)

    def count_lost(self, messages: int) -> None:
        """Count messages that were handed over but don't arrive, because the connection has ended."""
        self._slow_consumers.counters.dropped["closed"] += messages

    def end(self) -> None:
        """Write nothing any more, because the peer is gone."""
        self.is_ended = True
        if self._writer is None:
            return
        if self._writer is not asyncio.current_task():
            self._writer.cancel()
        self._close_backlog()  # here, because a task that is cancelled before its first step runs no `finally`

    def abort(self) -> None:
        """End at once and abort the socket, if the server allows it. It is for a peer that takes nothing."""
        self.end()
        if self.transport is not None:
            self.transport.abort()

    @property
    def is_freed(self) -> bool:
        """Whether the server has freed the socket; true if that can't be known."""
        return self.transport is None or (self.transport.is_closing() and unsent_bytes(self.transport) == 0)

    @property
    def is_lost(self) -> bool:
        """Whether the server is closing the socket; false if that can't be known."""
        return self.transport is not None and self.transport.is_closing()

    async def see_off(self) -> None:
        """Wait until the server has freed the socket. Abort it if the peer does nothing for `close_timeout`.

        A peer that goes on taking what the server holds for it gets up to `send_timeout`. Servers themselves wait 10 s
        for the answer to a close, and without a limit for a closing transport to drain.
        """
        loop = asyncio.get_running_loop()
        options = self._slow_consumers.options
        deadline = loop.time() + options.send_timeout
        before = sys.maxsize
        while self.transport is not None and not self.is_freed:
            if self.outstanding >= before or loop.time() >= deadline:
                self.transport.abort()
                return
            before = self.outstanding
            await self._freed_within(options.close_timeout)

    async def _freed_within(self, seconds: float) -> None:
        # No server tells when the socket is freed. Pauses begin short and double, so that it is seen before a client
        # that has answered the close can come back.
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        pause = _FIRST_PAUSE
        while not self.is_freed and (left := deadline - loop.time()) > 0:
            await asyncio.sleep(min(pause, left))
            pause *= 2

    @property
    def is_observable(self) -> bool:
        """Whether it is known at any time how much the peer has taken."""
        return KNOWS_KERNEL and self.transport is not None

    @property
    def outstanding(self) -> int:
        """Return how many written bytes the peer hasn't taken yet, as far as that is known."""
        return 0 if self.transport is None else outstanding_bytes(self.transport)

    @property
    def taken(self) -> int:
        """Return how many bytes the peer has taken while its backlog is open. Only differences of it mean something.

        Bytes that the server writes itself, such as pongs, make it smaller, never larger.
        """
        return (0 if self.backlog is None else self.backlog.handed_over) - self.outstanding

    async def ready(self) -> None:
        """Wait until the peer takes more, if that is known. What waits until then can still be dropped."""

    async def write(self, entry: Entry, backlog: Backlog) -> None:
        """Write one message from the backlog. It waits as long as the peer can't take it."""
        await self._send(self._slow_consumers.events.of(entry))
        backlog.hand_over(entry.size)

    def write_rest(self, backlog: Backlog) -> None:
        """Write as much of a large message as the peer takes, if this sink writes in pieces."""

    def _hang_up(self) -> None:
        # Servers go on reading until the peer answers a close, so a flood would cost as much as before. It is done in
        # the turn of the close frame, because that makes uvicorn read again.
        if self.hangs_up and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def _open_backlog(self) -> Backlog:
        self.backlog = Backlog(self._slow_consumers.options)
        return self.backlog

    def _start_writer(self, backlog: Backlog) -> asyncio.Task[None]:
        # The backlog has its first item already, because an eager writer runs at once. It may have ended afterwards.
        writer = self._slow_consumers.start_writer(self, self._drain(backlog))
        self._writer = None if writer.done() else writer
        return writer

    async def _drain(self, backlog: Backlog) -> None:
        try:
            while not backlog.is_empty:
                await self.ready()
                if backlog.rest is not None:
                    self.write_rest(backlog)
                    continue
                item = backlog.pop()
                if self._is_behind and not backlog.is_past_high_water:
                    self._catch_up()
                if isinstance(item, Entry):
                    await self.write(item, backlog)  # not counted if it fails, because it may have arrived
                elif isinstance(item, AppSend):
                    await self._run(item)
                    backlog.hand_over(item.size)
                elif isinstance(item, Close):
                    await self._write_close(item)
        except Exception:
            # Servers raise OSError, RuntimeError or their own errors. After any of them this socket takes no more.
            self.owner.lost(ABNORMAL, "")
        finally:
            self._close_backlog()  # changes nothing after `end`

    def _close_backlog(self) -> None:
        self.discard()
        self.backlog = None
        self._writer = None
        if self._is_behind:
            self._catch_up()
        self._slow_consumers.writer_ended(self)

    def _catch_up(self) -> None:
        self._is_behind = False
        self._slow_consumers.caught_up(self)

    async def _run(self, turn: AppSend) -> None:
        if turn.done.done() and not turn.is_close:
            return  # the caller was cancelled; a close is still sent
        try:
            await self.owner.app_send(dict(turn.event))
        except asyncio.CancelledError:
            if not turn.done.done():
                turn.done.set_exception(ConnectionClosed(ABNORMAL))
            raise
        except Exception as error:  # a mistake of the app, or the peer's end, which the next write shows
            if not turn.done.done():
                turn.done.set_exception(error)
            if isinstance(error, WebSocketDisconnect):
                raise  # the peer is gone, and Starlette's state must show that
        else:
            if not turn.done.done():
                turn.done.set_result(None)

    async def _write_close(self, turn: Close) -> None:
        wanted, reason = self._form.closing(turn.code, turn.reason)
        reason = cut_reason(reason)
        for code in fallback_codes(wanted):
            try:
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
                self._hang_up()
                return
            except OSError:
                return  # the peer is gone, so it is closed anyway
            except Exception:
                if code == CloseCode.NORMAL:
                    return  # the server has refused all codes
