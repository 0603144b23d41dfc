"""The sinks of `text/event-stream` responses: through the server's `send`, or uvicorn's transport with shared chunks.

Nothing of the server is patched. If anything looks different from what this module knows, `StreamSink` is used.
"""

from __future__ import annotations

import asyncio
from random import uniform
from typing import Any
from weakref import WeakValueDictionary

from wsbroadcast.close_codes import cut_reason, should_reconnect
from wsbroadcast.delivery.backlog import Backlog, Entry
from wsbroadcast.delivery.frames import Batch, Unframed, WireForm
from wsbroadcast.delivery.sink import Close, Send, Sink
from wsbroadcast.delivery.slow_consumers import Owner, SlowConsumers
from wsbroadcast.delivery.uvicorn import DirectSink, find_transport
from wsbroadcast.message import Encoding, Message
from wsbroadcast.protocols import sse
from wsbroadcast.publication import Protocol

# The random time until a browser comes back is between these, in seconds.
_SOONEST, _LATEST = 1.0, 5.0


def drawn_retry() -> bytes:
    """Return a `retry` field with a random time, because a browser by itself has neither backoff nor jitter."""
    return sse.retry(uniform(_SOONEST, _LATEST))  # noqa: S311  # no secret


def last_event(code: int, reason: str) -> bytes:
    """Return the end of a stream. If the client should come back, it says when."""
    last = sse.close(code, cut_reason(reason))
    return drawn_retry() + last if should_reconnect(code) else last


def chunk(data: bytes) -> bytes:
    """Return a chunk of a response's body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Chunked:
    """The encoding as chunks."""

    def encode(self, message: Message) -> bytes:
        """Return the message as a chunk."""
        return chunk(message.payload)


_UNFRAMED = Unframed()
_CHUNKED = Chunked()

_forms: WeakValueDictionary[tuple[Protocol, Encoding], WireForm] = WeakValueDictionary()


def _form(speaks: Protocol, encoding: Encoding) -> WireForm:
    # All streams with the same protocol and encoding share one. It isn't kept for ever, because each channel may have a
    # protocol of its own.
    form = _forms.get((speaks, encoding))
    if form is None:
        form = _forms[speaks, encoding] = WireForm(speaks, encoding)
    return form


class Stream(Sink):
    """The base of all sinks of event streams."""

    is_stream = True

    __slots__ = ()

    async def _write_close(self, turn: Close) -> None:
        last = last_event(turn.code, turn.reason)
        await self._send({"type": "http.response.body", "body": last, "more_body": False})


class StreamSink(Stream):
    """Sends events as the body of a response, by the server's own `send`."""

    kind = "asgi_sse"

    __slots__ = ()

    async def write(self, entry: Entry, backlog: Backlog) -> None:
        """Write one message from the backlog. It waits as long as the peer can't take it."""
        await self._send({"type": "http.response.body", "body": entry.data, "more_body": True})
        backlog.hand_over(entry.size)


class UvicornStreamSink(Stream, DirectSink):
    """Writes chunks to the transport while it takes more, and waits only when it doesn't."""

    kind = "uvicorn_sse"

    __slots__ = ("_flow", "_is_broken")

    def __init__(
        self,
        owner: Owner,
        slow_consumers: SlowConsumers,
        send: Send,
        transport: asyncio.Transport,
        form: WireForm,
        flow: Any,
    ) -> None:
        super().__init__(owner, slow_consumers, send, transport, form)
        self._transport = transport
        self._flow = flow
        # Whether only a part of a message was written, and the rest dropped.
        self._is_broken = False

    def deliver(self, batch: Batch[Any]) -> None:
        """Write the batch at once. All streams of the channel get the same bytes."""
        if self.backlog is not None or self._flow.write_paused:
            self.enqueue(batch.entries(self._form))
        elif not self.is_ended and not self._transport.is_closing():
            self._transport.write(batch.wire(self._form))
        else:
            self._found_lost(batch)

    async def ready(self) -> None:
        """Wait until the transport takes more."""
        await self._flow.drain()
        if self.is_over:
            raise ConnectionResetError

    @property
    def takes_more(self) -> bool:
        """Whether the transport takes more now."""
        return not self._flow.write_paused

    @property
    def is_over(self) -> bool:
        """Whether nothing may be written any more."""
        return self._transport.is_closing()

    def discard(self, *, keeps_close: bool = False) -> None:
        """Drop what waits. A response that is broken off inside a message can't be finished."""
        if self.backlog is not None and self.backlog.rest is not None:
            self._is_broken = True
        super().discard(keeps_close=keeps_close)

    async def _write_close(self, turn: Close) -> None:
        if self._is_broken:
            self._transport.abort()
        else:
            await super()._write_close(turn)


class Nowhere:
    """Replaces a transport whose peer is gone, because uvloop's raises on a write."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        """Write nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Recorder:
    """Replaces the transport of one of uvicorn's request cycles while a head is sent, and remembers what is written.

    No attribute tells what middleware does to a response. So chunks may be written to the transport directly only if
    the head says that the body is in chunks, and the first chunk comes out unchanged.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.written = b""
        """The bytes that were written."""

    def write(self, data: bytes) -> None:
        """Write bytes, and remember them."""
        self.written += data
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def refusal(self, first: bytes) -> str:
        """Return why chunks may not be written directly; empty if they may.

        Args:
            first: The bytes that were sent as the beginning of the body.
        """
        head, _, body = self.written.partition(b"\r\n\r\n")
        lines = {line.lower().replace(b" ", b"") for line in head.split(b"\r\n")[1:]}
        if any(line.startswith(b"content-encoding:") for line in lines):
            return "compressed"
        if b"transfer-encoding:chunked" not in lines:
            return "not in chunks"
        return "" if body == chunk(first) else "send is wrapped"


class Opened:
    """A stream whose head is sent. Its sink is made of it."""

    def __init__(self, send: Send, receive: object) -> None:
        self._send = send
        self._receive = receive
        self._cycle, self.refused = _find_cycle(receive)
        """Why the fast path is refused; empty if it isn't."""
        self.is_open = False
        """Whether the head is sent."""

    async def open(self, head: dict[str, Any], first: bytes) -> None:
        """Send the head and the beginning of the body."""
        self.is_open = True
        cycle = self._cycle
        if cycle is None:
            await self._begin(head, first)
            return
        real = cycle.transport
        recorder = cycle.transport = Recorder(real)
        try:
            await self._begin(head, first)
        finally:
            if cycle.transport is recorder:  # else another request of this connection has replaced it
                cycle.transport = real
        self.refused = recorder.refusal(first)

    async def finish(self) -> None:
        """End the response, if uvicorn hasn't noticed that the peer is gone, and nothing else has ended it.

        uvicorn tells only the last request of a peer that the peer is gone, not earlier requests that are still
        answered.
        """
        cycle = self._cycle
        if cycle is None or not self.is_open or not cycle.transport.is_closing():
            return
        is_over = getattr(cycle, "disconnected", True) or getattr(cycle, "response_complete", True)
        if is_over or cycle.flow.write_paused:  # to end it would wait until the transport takes more
            return
        real, cycle.transport = cycle.transport, Nowhere(cycle.transport)
        try:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            cycle.transport = real

    async def _begin(self, head: dict[str, Any], first: bytes) -> None:
        await self._send(head)
        await self._send({"type": "http.response.body", "body": first, "more_body": True})

    def sink(self, owner: Owner, slow_consumers: SlowConsumers, speaks: Protocol) -> Sink:
        """Make the sink of the stream: the fast one if possible."""
        if self._cycle is None or self.refused:
            transport = find_transport(self._receive)
            return StreamSink(owner, slow_consumers, self._send, transport, _form(speaks, _UNFRAMED))
        form = _form(speaks, _CHUNKED)
        return UvicornStreamSink(owner, slow_consumers, self._send, self._cycle.transport, form, self._cycle.flow)


def _find_cycle(receive: object) -> tuple[Any, str]:
    cycle = getattr(receive, "__self__", None)
    if cycle is None:
        return None, "receive is wrapped"
    kind = type(cycle)
    if kind.__name__ != "RequestResponseCycle" or not kind.__module__.startswith("uvicorn."):
        return None, f"server protocol {kind.__name__}"
    flow = getattr(cycle, "flow", None)
    is_known = isinstance(getattr(flow, "write_paused", None), bool) and callable(getattr(flow, "drain", None))
    if not is_known or find_transport(receive) is None:
        return None, "unknown uvicorn"
    return cycle, ""
