"""The one owner of what a socket is sent, and the sink that works on every ASGI server."""

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

# Seconds until `see_off` looks for the first time whether the peer has answered.
_FIRST_PAUSE = 0.001


class AppSend(Turn):
    """Something the app sends itself, in its place among the broadcasts."""

    __slots__ = ("done", "event")

    def __init__(self, event: Event, done: asyncio.Future[None]) -> None:
        self.event = event
        self.done = done

    @property
    def is_close(self) -> bool:
        """Whether it closes the socket: nothing is taken after it."""
        return bool(self.event["type"] == "websocket.close")

    @property
    def size(self) -> int:
        """The payload's size in bytes."""
        content = self.event.get("text") or self.event.get("bytes")
        if isinstance(content, str):
            return len(content.encode(errors="replace"))
        return len(content) if isinstance(content, bytes) else 0  # whatever else it is, the server has refused it


class Close(Turn):
    """The close frame, after everything that was handed over before it."""

    __slots__ = ("code", "reason")

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


class Sink:
    """Where one connection's messages go, in the order in which they are handed over.

    While the peer keeps up there is nothing but this object. When something has to wait, a `Backlog` and one writer
    task are made, and go away when the last of it is written. Only that task writes then: concurrent senders reorder on
    granian, break on uvicorn's legacy protocol and corrupt deflate on hypercorn. A write that was cancelled or failed
    ends the sink: nothing is ever written after it, because nobody knows how much of it went out.
    """

    kind = "asgi"
    """The name under which `stats()` counts it."""
    is_stream = False
    """Whether it is an HTTP response. Then the server doesn't tell in every case that the peer is gone."""

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
        """What waits, or `None` while nothing does."""
        self.is_ended = False
        """Whether nothing more is taken: a close was handed over, or the socket is lost."""
        self.hangs_up = False
        """Whether nothing of the peer is read any more once the close frame is out, for one that floods."""
        self.transport = transport
        """The transport below the server's protocol, where it could be found: it can be aborted."""
        if transport is not None:
            bound_buffer(transport)
        self._slow_consumers = slow_consumers
        # What the server is given of a message.
        self._form = form or unframed()
        # The server's own `send`, for what we send.
        self._send = send
        # Exists as long as the backlog, but for the moment in which that gets its first item.
        self._writer: asyncio.Task[None] | None = None
        self._is_behind = False

    @property
    def held_bytes(self) -> int:
        """Bytes that wait."""
        backlog = self.backlog
        return 0 if backlog is None else backlog.bytes + len(backlog.rest or b"")

    @property
    def held_messages(self) -> int:
        """Messages that wait."""
        backlog = self.backlog
        return 0 if backlog is None else backlog.messages + (backlog.rest is not None)

    @property
    def has_positions(self) -> bool:
        """Whether the client knows where it is in a history."""
        return self._form.has_positions

    @property
    def is_half_full(self) -> bool:
        """Whether half of what may wait is waiting."""
        return self.backlog is not None and self.backlog.is_half_full

    def deliver(self, batch: Batch[Any]) -> None:
        """Hand over a batch. Never waits, never fails; a full backlog is handled by the policy."""
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
                # Who knows where it is gets the rest later, under every policy.
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
        """Send what the app itself sends: after everything handed over before, and before everything after.

        If the caller is cancelled while the event waits, it is withdrawn. Once it is being written, it is finished.

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
            if not turn.is_close:  # a close of what is closed has nothing to complain about
                raise

    def begin_reading(self) -> bool:
        """The app is about to wait for a message; return whether `end_reading` wants to be called afterwards."""
        return False

    def end_reading(self) -> None:
        """The app has its message, or waits no longer."""

    def when_drained(self, call: Callable[[], None]) -> None:
        """Call something once when what waits has gone, or the sink has ended; something has to wait."""
        self._slow_consumers.when_drained(self, call)

    async def drained(self) -> None:
        """Wait until nothing waits any more, at most `close_timeout`."""
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=self._slow_consumers.options.close_timeout)

    async def close(self, code: int, reason: str) -> None:
        """Send what waits and then a close frame. Ends within `close_timeout` when the peer takes nothing.

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
        """Throw away what waits; the messages are counted, the app's own sends learn of it.

        A large message that is partly written is broken off, so nothing but a close may follow it.

        Args:
            keeps_close: Whether a close that waits stays, and is now the next to go out.
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
        """Count messages that were handed over and don't arrive, because the connection has ended."""
        self._slow_consumers.counters.dropped["closed"] += messages

    def end(self) -> None:
        """Write nothing any more: the peer is gone."""
        self.is_ended = True
        if self._writer is None:
            return
        if self._writer is not asyncio.current_task():
            self._writer.cancel()
        self._close_backlog()  # here, because a task that never ran a step is cancelled without its `finally`

    def abort(self) -> None:
        """End at once and cut the socket off, where the server lets us; for a peer that takes nothing."""
        self.end()
        if self.transport is not None:
            self.transport.abort()

    @property
    def is_freed(self) -> bool:
        """Whether the server has let go of the socket; where that can't be known, it is taken for granted."""
        return self.transport is None or (self.transport.is_closing() and unsent_bytes(self.transport) == 0)

    @property
    def is_lost(self) -> bool:
        """Whether the server is letting go of the socket, where that can be known."""
        return self.transport is not None and self.transport.is_closing()

    async def see_off(self) -> None:
        """Wait until the server has let go of the socket; cut it off if the peer does nothing for `close_timeout`.

        A peer that goes on taking what the server holds for it gets up to `send_timeout`. By themselves servers wait
        10 s for the answer to a close, and without limit for a closing transport to drain.
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
        # No server tells. Pauses that double see it before a client that has answered the close can be back.
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        pause = _FIRST_PAUSE
        while not self.is_freed and (left := deadline - loop.time()) > 0:
            await asyncio.sleep(min(pause, left))
            pause *= 2

    @property
    def is_observable(self) -> bool:
        """Whether it is known what the peer takes, as it takes it."""
        return KNOWS_KERNEL and self.transport is not None

    @property
    def outstanding(self) -> int:
        """Bytes that were written and that the peer hasn't taken, as far as it is known."""
        return 0 if self.transport is None else outstanding_bytes(self.transport)

    @property
    def taken(self) -> int:
        """Bytes that the peer has taken while its backlog is open, counted from anywhere: only the difference counts.

        What the server writes itself, such as a pong, makes it smaller and never larger.
        """
        return (0 if self.backlog is None else self.backlog.handed_over) - self.outstanding

    async def ready(self) -> None:
        """Wait until the peer takes more, where that is known: what waits until then can still be thrown away."""

    async def write(self, entry: Entry, backlog: Backlog) -> None:
        """Write one message from the backlog; wait as long as the peer can't take it."""
        await self._send(self._slow_consumers.events.of(entry))
        backlog.hand_over(entry.size)

    def write_rest(self, backlog: Backlog) -> None:
        """Write what the peer takes of a large message; of a sink that writes in pieces."""

    def _hang_up(self) -> None:
        # Servers go on parsing what comes until the peer answers a close: a flood would cost as much as before. In the
        # turn of the close frame, because it makes uvicorn read again.
        if self.hangs_up and self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def _open_backlog(self) -> Backlog:
        self.backlog = Backlog(self._slow_consumers.options)
        return self.backlog

    def _start_writer(self, backlog: Backlog) -> asyncio.Task[None]:
        # With something in the backlog, because an eager task factory runs the writer at once; it may have ended then.
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
                    await self.write(item, backlog)  # if it fails, nobody knows whether it has arrived: not counted
                elif isinstance(item, AppSend):
                    await self._run(item)
                    backlog.hand_over(item.size)
                elif isinstance(item, Close):
                    await self._write_close(item)
        except Exception:
            # Servers raise OSError, RuntimeError or their own: whatever it is, this socket takes no more.
            self.owner.lost(ABNORMAL, "")
        finally:
            self._close_backlog()  # which changes nothing after `end`

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
            return  # withdrawn; a close stands
        try:
            await self.owner.app_send(dict(turn.event))
        except asyncio.CancelledError:
            if not turn.done.done():
                turn.done.set_exception(ConnectionClosed(ABNORMAL))
            raise
        except Exception as error:  # the app's own mistake or the peer's end: the app is told, the next write shows
            if not turn.done.done():
                turn.done.set_exception(error)
            if isinstance(error, WebSocketDisconnect):
                raise  # the peer is gone, and Starlette's state must not tell otherwise to what follows
        else:
            if not turn.done.done():
                turn.done.set_result(None)

    async def _write_close(self, turn: Close) -> None:
        reason = cut_reason(turn.reason)
        for code in fallback_codes(turn.code):
            try:
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
                self._hang_up()
                return
            except OSError:
                return  # the peer is gone: closed all the same
            except Exception:
                if code == CloseCode.NORMAL:
                    return  # refused in every form
