"""The fast path: writing shared frames to the transport of uvicorn's default WebSocket protocol.

Nothing of the server is patched. If anything looks different from what this module knows, `Sink` is used.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from types import CodeType, FunctionType
from typing import Any, Protocol, cast

from wsbroadcast.close_codes import ABNORMAL
from wsbroadcast.delivery.backlog import Backlog, Entry
from wsbroadcast.delivery.frames import PIECE_BYTES, Batch, WireForm, wire_form
from wsbroadcast.delivery.sink import Event, Send, Sink
from wsbroadcast.delivery.slow_consumers import Owner, SlowConsumers
from wsbroadcast.publication import Protocol as Speaks
from wsbroadcast.publication import plain

SERVER_RECEIVE = "wsbroadcast.receive"
"""The key in a scope for the server's own `receive`, if a middleware wraps it (see `FastPath`)."""

SERVER_SEND = "wsbroadcast.send"
"""The key in a scope for the `send` that came with it."""


class Recipient(Protocol):
    """Something that has a sink."""

    @property
    def _sink(self) -> Sink: ...


class DirectSink(Sink):
    """Writes to the transport below a server's protocol. Large messages are written in pieces, as it takes them."""

    __slots__ = ("_transport",)

    def __init__(
        self, owner: Owner, slow_consumers: SlowConsumers, send: Send, transport: asyncio.Transport, form: WireForm
    ) -> None:
        super().__init__(owner, slow_consumers, send, transport, form)
        self._transport = transport  # the same as `transport`, but never None

    @property
    @abstractmethod
    def takes_more(self) -> bool:
        """Whether the transport takes more now."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing may be written any more."""

    def _found_lost(self, batch: Batch[Any]) -> None:
        self.count_lost(batch.messages)
        if not self.is_ended:
            self.owner.lost(ABNORMAL, "")

    def deliver_large(self, batch: Batch[Any]) -> None:
        """Write as much of the batch as the transport takes, and let the rest wait."""
        entries = iter(batch.entries(self._form))
        if self.backlog is not None or not self.takes_more:
            self.enqueue(entries)
            return
        for entry in entries:
            rest = self._write_pieces(memoryview(entry.data))
            if rest is not None:
                self._open_backlog().rest = rest
                self.enqueue(entries)
                return

    async def write(self, entry: Entry, backlog: Backlog) -> None:
        """Write one message from the backlog, or as much of a large one as the transport takes."""
        if len(entry.data) <= PIECE_BYTES:
            self._transport.write(entry.data)
        else:
            backlog.rest = self._write_pieces(memoryview(entry.data))
        backlog.hand_over(len(entry.data) - len(backlog.rest or b""))

    def write_rest(self, backlog: Backlog) -> None:
        """Write the next pieces of a large message."""
        assert backlog.rest is not None
        before = len(backlog.rest)
        backlog.rest = self._write_pieces(backlog.rest)
        backlog.hand_over(before - len(backlog.rest or b""))

    def _write_pieces(self, data: memoryview) -> memoryview | None:
        # A transport keeps what it can't send at once, and copies it on some versions of Python. So it gets no more
        # than it asks for, and all connections share the rest. For a WebSocket each piece is a whole frame, because the
        # server may write a frame of its own before the next one.
        while self.takes_more and not self.is_over:
            self._transport.write(data[:PIECE_BYTES])
            data = data[PIECE_BYTES:]
            if not data:
                return None
        return data


class UvicornSink(DirectSink):
    """Writes to the transport while it takes more, and waits for `writable` only when it doesn't."""

    kind = "uvicorn"

    __slots__ = ("_inbox", "_protocol", "_writable")

    def __init__(
        self,
        owner: Owner,
        slow_consumers: SlowConsumers,
        send: Send,
        protocol: Any,
        *,
        speaks: Speaks = plain,
        is_read_directly: bool = False,
    ) -> None:
        super().__init__(owner, slow_consumers, send, protocol.transport, _take_over_compression(protocol, speaks))
        self._protocol = protocol
        self._writable: asyncio.Event = protocol.writable
        # The queue of messages that the app hasn't read, if the protocol is known well enough (see `begin_reading`).
        self._inbox: asyncio.Queue[Any] | None = _inbox_of(protocol) if is_read_directly else None

    def deliver(self, batch: Batch[Any]) -> None:
        """Write the batch at once. All connections get the same bytes."""
        if self.backlog is not None or not self._writable.is_set():
            self.enqueue(batch.entries(self._form))
        elif not self._protocol.close_sent and not self._transport.is_closing():
            self._transport.write(batch.wire(self._form))
        else:
            self._found_lost(batch)

    @staticmethod
    def deliver_all(batch: Batch[Any], recipients: Iterable[Recipient], failed: Callable[[Any], None]) -> None:
        """Hand a batch to all recipients, whatever kind of sink they have.

        Most of a broadcast's time is spent here. The loop repeats the code of `deliver`, because a call for each
        connection would take a twelfth of that time.

        Args:
            batch: The batch.
            recipients: The recipients.
            failed: Called in an `except` block with a recipient for which the server failed. The others get the batch.
        """
        form: WireForm | None = None
        wire = b""
        for recipient in recipients:
            sink = recipient._sink
            try:
                if sink.__class__ is not UvicornSink:
                    sink.deliver(batch)
                elif sink.backlog is not None or not sink._writable.is_set():
                    sink.enqueue(batch.entries(sink._form))
                elif not sink._protocol.close_sent and not (transport := sink._transport).is_closing():
                    if sink._form is not form:
                        form = sink._form
                        wire = batch.wire(form)
                    transport.write(wire)
                else:
                    sink._found_lost(batch)
            except Exception:
                failed(recipient)

    async def send_event(self, event: Event) -> None:
        """Send an event of the app; directly while nothing waits."""
        if self.backlog is not None or not self._writable.is_set():
            await super().send_event(event)
            return
        if event["type"] == "websocket.close":
            self.is_ended = True
        await self.owner.app_send(dict(event))  # doesn't suspend while the transport takes more

    def begin_reading(self) -> bool:
        """Save the two system calls with which uvicorn stops and resumes reading for each message.

        uvicorn stops reading while a message waits that the app hasn't asked for. A message that the app already waits
        for is taken in the same turn of the loop. So the protocol is told that reading is stopped, and doesn't stop it.
        At most one more read of the transport is held than without this. It is done only if nothing is between the app
        and the server's `receive`: messages that wait there would let a client fill the memory.
        """
        if self._inbox is None or self._protocol.read_paused or not self._inbox.empty():
            return False
        self._protocol.read_paused = True
        return True

    def end_reading(self) -> None:
        """Let the protocol stop reading again. If no message came, it would go on believing that it has stopped.

        If it has really stopped, because another reader took the message before, it must go on knowing that.
        """
        if self._transport.is_reading():
            self._protocol.read_paused = False

    async def ready(self) -> None:
        """Wait until the transport takes more."""
        await self._writable.wait()
        if self.is_over:
            raise ConnectionResetError

    @property
    def takes_more(self) -> bool:
        """Whether the transport takes more now."""
        return self._writable.is_set()

    @property
    def is_over(self) -> bool:
        """Whether nothing may be written any more."""
        return bool(self._protocol.close_sent) or self._transport.is_closing()


def find_protocol(receive: object, send: object) -> tuple[Any, str]:
    """Find uvicorn's protocol object behind an ASGI `receive` and `send`.

    Args:
        receive: The `receive` of the WebSocket, or the server's own if `FastPath` is used.
        send: The `send` of the WebSocket; `None` if its wrappers may be skipped.

    Returns:
        The protocol and an empty text, or `None` and the reason why the fast path is refused.
    """
    protocol = getattr(receive, "__self__", None)
    if protocol is None:
        return None, "receive is wrapped"
    kind = type(protocol)
    if kind.__name__ != "WebSocketsSansIOProtocol" or not kind.__module__.startswith("uvicorn."):
        return None, f"server protocol {kind.__name__}"
    if send is not None and getattr(_below_starlette(send), "__self__", None) is not protocol:
        return None, "send is wrapped"
    unknown = [name for name, kind in _ATTRIBUTES.items() if not isinstance(getattr(protocol, name, None), kind)]
    if find_transport(receive) is None:
        unknown.append("transport")
    if getattr(kind, "pause_writing", None) is asyncio.BaseProtocol.pause_writing:
        unknown.append("pause_writing")  # before uvicorn 0.52.1 `writable` is never cleared, so no peer would seem slow
    if unknown:
        return None, f"unknown uvicorn: {', '.join(unknown)}"
    if not protocol.handshake_complete:  # once it is, it stays so
        return None, "the handshake is not complete"
    return protocol, ""


def _below_starlette(send: object) -> object:
    # Starlette itself wraps `send`: once for each app and route that handles exceptions, and once for sessions. These
    # wrappers pass on all events of a WebSocket.
    while isinstance(send, FunctionType) and (closure := send.__closure__) is not None:
        if send.__code__ is _SENDER:
            send = closure[_SENDER_SEND].cell_contents
        elif (send.__globals__.get("__name__"), send.__code__.co_qualname) == _SESSION_SENDER:
            send = closure[send.__code__.co_freevars.index("send")].cell_contents
        else:
            break
    return send


def _find_sender() -> CodeType | None:
    # The wrapper is recognized by its code object, because others may look like it. If it isn't found, each wrapped
    # `send` counts as wrapped by something unknown.
    try:
        from starlette._exception_handler import wrap_app_handling_exceptions
    except ImportError:
        return None
    for wrapped_app in wrap_app_handling_exceptions.__code__.co_consts:
        for sender in getattr(wrapped_app, "co_consts", ()):
            if getattr(sender, "co_name", "") == "sender" and "send" in sender.co_freevars:
                return cast(CodeType, sender)
    return None


# Found by the name of its module, which needs a package that may be missing; and by the name of its code, because
# `functools.wraps` copies other names to wrappers.
_SESSION_SENDER = ("starlette.middleware.sessions", "SessionMiddleware.__call__.<locals>.send_wrapper")

_SENDER = _find_sender()
_SENDER_SEND = 0 if _SENDER is None else _SENDER.co_freevars.index("send")


def _inbox_of(protocol: Any) -> asyncio.Queue[Any] | None:
    inbox = getattr(protocol, "queue", None)
    is_known = isinstance(getattr(protocol, "read_paused", None), bool) and hasattr(protocol.transport, "is_reading")
    return inbox if is_known and isinstance(inbox, asyncio.Queue) else None


def _take_over_compression(protocol: Any, speaks: Speaks) -> WireForm:
    # If permessage-deflate was negotiated, messages of the library are compressed once for all connections. The
    # server's compressor for this connection doesn't see these, so it must no longer refer to earlier messages. That is
    # allowed at any message (RFC 7692, 7.2.1), and it saves the memory of its context.
    for extension in getattr(protocol.conn, "extensions", ()):
        window_bits = getattr(extension, "local_max_window_bits", None)
        if (
            extension.name == "permessage-deflate"
            and isinstance(window_bits, int)
            and isinstance(getattr(extension, "local_no_context_takeover", None), bool)
        ):
            if not extension.local_no_context_takeover:
                extension.local_no_context_takeover = True
                del extension.encoder
            return wire_form(speaks, window_bits)
    return wire_form(speaks)  # every receiver takes it, whether compression was negotiated or not


def find_transport(receive: object) -> asyncio.Transport | None:
    """Find the transport behind any of uvicorn's protocols, so that a stalled peer can be aborted."""
    protocol = getattr(receive, "__self__", None)
    if not type(protocol).__module__.startswith("uvicorn."):
        return None
    transport = getattr(protocol, "transport", None)
    # uvloop's transports are not of asyncio's classes, so their methods are checked, once for each class.
    kind: Any = type(transport)
    return transport if _is_transport(kind) else None


@cache
def _is_transport(kind: type) -> bool:
    return all(callable(getattr(kind, name, None)) for name in _TRANSPORT_METHODS)


_ATTRIBUTES: dict[str, type] = {"writable": asyncio.Event, "handshake_complete": bool, "close_sent": bool}
_TRANSPORT_METHODS = ("write", "abort", "is_closing", "get_write_buffer_size")
