"""The fast path over a fake of uvicorn's protocol."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import Any

import pytest

from tests.support.asgi import turns
from tests.support.fast import Transport, WebSocketsSansIOProtocol
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.backlog import Place
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, FRAMED, PIECE_BYTES, Batch
from wsbroadcast.delivery.slow_consumers import SlowConsumers
from wsbroadcast.delivery.uvicorn import UvicornSink, find_protocol, find_transport
from wsbroadcast.message import Message
from wsbroadcast.options import SlowConsumer
from wsbroadcast.publication import Publication
from wsbroadcast.stats import Counters


class Owner:
    context = Context()

    def __init__(self, protocol: WebSocketsSansIOProtocol) -> None:
        self.protocol = protocol
        self.app_sent: list[dict[str, Any]] = []
        self.lost_with: list[int] = []
        self.evicted: list[str] = []

    def lost(self, code: int, reason: str) -> None:
        self.lost_with.append(code)

    def evict(self, cause: str) -> None:
        self.evicted.append(cause)

    def fall_back(self, place: Place) -> bool:
        return False

    async def app_send(self, event: Any) -> None:
        await self.protocol.writable.wait()
        self.app_sent.append(event)
        self.protocol.transport.written.append(event.get("text", event["type"]).encode())


class Bench:
    def __init__(self, options: SlowConsumer | None = None) -> None:
        self.protocol = WebSocketsSansIOProtocol()
        self.protocol.handshake_complete = True
        self.owner = Owner(self.protocol)
        self.slow_consumers = SlowConsumers(options or SlowConsumer(), Counters())
        self.sink = UvicornSink(self.owner, self.slow_consumers, self.owner.app_send, self.protocol)

    def deliver(self, *texts: str) -> None:
        publications = [Publication(Message.of(text), EVERYONE) for text in texts]
        batch: Batch[Any] = Batch(publications[0])
        batch.publications.extend(publications[1:])
        self.sink.deliver(batch)

    async def drained(self) -> None:
        for _ in range(100):
            if self.sink.backlog is None:
                return
            await asyncio.sleep(0)
        raise AssertionError("the backlog is still there")

    @property
    def written(self) -> bytes:
        return b"".join(self.protocol.transport.written)


def frames(*texts: str) -> bytes:
    return b"".join(Message.of(text)._wire(FRAMED) for text in texts)


async def test_batch_is_one_write_while_the_transport_takes_more() -> None:
    bench = Bench()
    bench.deliver("a", "b", "c")
    assert bench.protocol.transport.written == [frames("a", "b", "c")]
    assert bench.sink.backlog is None


async def test_batch_is_the_same_bytes_for_every_connection() -> None:
    one, other = Bench(), Bench()
    batch: Batch[Any] = Batch(Publication(Message.of("a"), EVERYONE))
    one.sink.deliver(batch)
    other.sink.deliver(batch)
    assert one.protocol.transport.written[0] is other.protocol.transport.written[0]


@pytest.mark.parametrize("hangs_up", [False, True])
async def test_flood_is_not_read_any_more_once_the_close_is_out(hangs_up: bool) -> None:
    bench = Bench()
    transport = bench.protocol.transport
    bench.sink.hangs_up = hangs_up
    await bench.sink.close(1008, "too many messages")
    assert bench.written == b"websocket.close"
    assert transport.reads is not hangs_up
    assert not transport.is_closing()  # the peer gets the close frame first


async def test_messages_wait_in_order_while_the_transport_is_full() -> None:
    bench = Bench()
    bench.protocol.writable.clear()
    bench.deliver("a")
    bench.deliver("b", "c")
    await asyncio.sleep(0)
    assert bench.written == b""
    assert bench.sink.held_messages >= 2
    bench.protocol.writable.set()
    bench.deliver("d")  # not ahead of what waits
    await bench.drained()
    assert bench.written == frames("a", "b", "c", "d")


async def test_app_send_keeps_its_place_behind_a_backlog() -> None:
    bench = Bench()
    bench.protocol.writable.clear()
    bench.deliver("a")
    own = asyncio.create_task(bench.sink.send_event({"type": "websocket.send", "text": "own"}))
    await asyncio.sleep(0)
    bench.deliver("b")
    bench.protocol.writable.set()
    await own
    await bench.drained()
    assert bench.written == frames("a") + b"own" + frames("b")


@pytest.mark.parametrize("end", ["close_sent", "closing"])
async def test_nothing_is_written_after_the_end(end: str) -> None:
    bench = Bench()
    if end == "close_sent":
        bench.protocol.close_sent = True
    else:
        bench.protocol.transport.closing = True
    bench.deliver("a")
    assert bench.written == b""
    assert bench.owner.lost_with == [1006]
    assert bench.slow_consumers.counters.dropped == {"closed": 1}


async def test_backlog_is_dropped_when_the_transport_closes_meanwhile() -> None:
    bench = Bench()
    bench.protocol.writable.clear()
    bench.deliver("a", "b")
    bench.protocol.transport.closing = True
    bench.protocol.writable.set()  # as uvicorn does when the connection is lost
    await bench.drained()
    assert bench.written == b""
    assert bench.owner.lost_with == [1006]
    assert bench.slow_consumers.counters.dropped["closed"] >= 1


async def test_close_waits_for_the_backlog() -> None:
    bench = Bench()
    bench.protocol.writable.clear()
    bench.deliver("a")
    closing = asyncio.create_task(bench.sink.close(1000, "bye"))
    await asyncio.sleep(0)
    bench.protocol.writable.set()
    await closing
    assert bench.written == frames("a") + b"websocket.close"
    assert bench.owner.app_sent[-1] == {"type": "websocket.close", "code": 1000, "reason": "bye"}


async def test_close_aborts_a_peer_that_takes_nothing() -> None:
    bench = Bench(SlowConsumer(close_timeout=0.02))
    bench.protocol.writable.clear()
    bench.deliver("a")
    await bench.sink.close(1000, "")
    assert bench.protocol.transport.aborted
    assert bench.written == b""


# Large messages.


class Full(Transport):
    """A transport that is full after each write, until the test says otherwise."""

    def __init__(self, protocol: WebSocketsSansIOProtocol) -> None:
        super().__init__()
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        super().write(data)
        self._protocol.writable.clear()


async def partly_written(options: SlowConsumer | None = None) -> tuple[Bench, str]:
    """A bench that has written the first piece of a large message, and the message."""
    bench = Bench(options)
    transport = Full(bench.protocol)
    bench.protocol.transport = transport
    bench.sink = UvicornSink(bench.owner, bench.slow_consumers, bench.owner.app_send, bench.protocol)
    text = "x" * (3 * FRAGMENT_BYTES + 5)
    batch: Batch[Any] = Batch(Publication(Message.of(text), EVERYONE))
    bench.sink.deliver_large(batch)
    await turns()
    assert bench.written == Message.of(text)._wire(FRAMED)[:PIECE_BYTES]
    return bench, text


async def take_everything(bench: Bench) -> None:
    async with asyncio.timeout(5):
        while bench.sink.backlog is not None:
            bench.protocol.writable.set()
            await asyncio.sleep(0)


async def test_large_message_is_written_piece_by_piece_and_nothing_else_comes_in_between() -> None:
    bench, text = await partly_written()
    assert bench.sink.held_messages == 1
    assert bench.sink.held_bytes == len(Message.of(text)._wire(FRAMED)) - PIECE_BYTES
    bench.deliver("behind it")
    own = asyncio.create_task(bench.sink.send_event({"type": "websocket.send", "text": "own"}))
    await turns()
    await take_everything(bench)
    await own
    assert bench.written == frames(text) + frames("behind it") + b"own"
    pieces = bench.protocol.transport.written
    assert [len(piece) for piece in pieces[:4]] == [PIECE_BYTES] * 3 + [2 + 5]
    assert bench.slow_consumers.counters.dropped == {}


async def test_pieces_of_a_large_message_are_not_copied_for_each_connection() -> None:
    batch: Batch[Any] = Batch(Publication(Message.of("x" * 300_000), EVERYONE))
    benches = Bench(), Bench()
    for bench in benches:
        bench.sink.deliver_large(batch)
        await take_everything(bench)
    first, second = (bench.protocol.transport.written for bench in benches)
    assert isinstance(first[1], memoryview)
    assert first[1].obj is second[1].obj


async def test_close_comes_after_the_whole_of_a_large_message() -> None:
    bench, text = await partly_written()
    closing = asyncio.create_task(bench.sink.close(1000, ""))
    await turns()
    await take_everything(bench)
    await closing
    assert bench.written == frames(text) + b"websocket.close"


async def test_what_is_thrown_away_breaks_a_large_message_off_between_two_frames() -> None:
    bench, text = await partly_written()
    bench.deliver("behind it")
    bench.sink.discard()
    closing = asyncio.create_task(bench.sink.close(1013, ""))
    await turns()
    await take_everything(bench)
    await closing
    assert bench.written == Message.of(text)._wire(FRAMED)[:PIECE_BYTES] + b"websocket.close"
    assert bench.slow_consumers.counters.dropped == {"closed": 2}


@pytest.mark.parametrize("end", ["closing", "end"])
async def test_connection_that_ends_in_the_middle_of_a_large_message_gets_nothing_more(end: str) -> None:
    bench, text = await partly_written()
    if end == "closing":
        bench.protocol.transport.closing = True
        bench.protocol.writable.set()
    else:
        bench.sink.end()
    await turns()
    assert bench.sink.backlog is None
    assert bench.written == Message.of(text)._wire(FRAMED)[:PIECE_BYTES]
    assert bench.slow_consumers.counters.dropped == {"closed": 1}
    assert bench.owner.lost_with == ([1006] if end == "closing" else [])


async def test_tls_transport_says_that_it_is_full_when_any_other_would() -> None:
    class Encrypted(Transport):
        high: int | None = None

        def get_extra_info(self, name: str) -> object:
            return object() if name == "sslcontext" else None

        def set_write_buffer_limits(self, high: int) -> None:
            self.high = high

    protocol = WebSocketsSansIOProtocol()
    protocol.transport = transport = Encrypted()
    UvicornSink(Owner(protocol), SlowConsumers(SlowConsumer(), Counters()), protocol.receive, protocol)  # type: ignore[arg-type]
    assert transport.high == 64 * 1024


def test_protocol_is_found_behind_its_own_receive() -> None:
    protocol = WebSocketsSansIOProtocol()
    protocol.handshake_complete = True
    assert find_protocol(protocol.receive, protocol.send) == (protocol, "")


def test_protocol_that_never_says_it_is_full_is_refused() -> None:
    class WebSocketsSansIOProtocol(asyncio.Protocol):
        __module__ = "uvicorn.before_0_52_1"

        def __init__(self) -> None:
            self.transport = Transport()
            self.writable = asyncio.Event()
            self.handshake_complete, self.close_sent = True, False

        async def receive(self) -> None: ...

    assert find_protocol(WebSocketsSansIOProtocol().receive, None) == (None, "unknown uvicorn: pause_writing")


async def _wrapped() -> None: ...


@pytest.mark.parametrize("attribute", ["transport", "writable", "handshake_complete", "close_sent"])
def test_protocol_without_what_is_needed_is_refused(attribute: str) -> None:
    protocol = WebSocketsSansIOProtocol()
    delattr(protocol, attribute)
    found, reason = find_protocol(protocol.receive, protocol.send)
    assert found is None
    assert attribute in reason


def test_other_receives_are_refused_with_the_reason() -> None:
    assert find_protocol(_wrapped, None) == (None, "receive is wrapped")
    assert find_protocol(asyncio.Queue().get, None) == (None, "server protocol Queue")
    assert find_protocol(None, None) == (None, "receive is wrapped")


def test_transport_is_found_on_uvicorn_only() -> None:
    protocol = WebSocketsSansIOProtocol()
    assert find_transport(protocol.receive) is protocol.transport  # type: ignore[comparison-overlap]  # a fake
    assert find_transport(asyncio.Queue().get) is None
    assert find_transport(_wrapped) is None
