"""The proxy that makes faults: a test of a fault proves nothing if the fault didn't happen."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.support.brokers import Endpoint
from tests.support.proxy import FaultProxy
from tests.support.servers import eventually
from tests.support.tcp import serving

Connect = Callable[[], Awaitable["Peer"]]

# Closing sends a reset, and throws away what is unsent.
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Peer:
    """One side of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self, size: int, timeout: float = 5.0) -> bytes:
        async with asyncio.timeout(timeout):
            return await self.reader.readexactly(size)

    async def hears_nothing(self, timeout: float = 0.15) -> bool:
        """Whether nothing comes, neither bytes nor an end."""
        try:
            async with asyncio.timeout(timeout):
                await self.reader.read(1)
        except TimeoutError:
            return True
        return False

    async def is_reset(self, timeout: float = 5.0) -> bool:
        """Whether the connection ends with a reset, and not as if all were well."""
        async with asyncio.timeout(timeout):
            try:
                await self.reader.read(1)
            except ConnectionResetError:
                return True
        return False


class Recorder(Endpoint):
    """A server that keeps its side of each connection for the test."""

    def __init__(self, port: int, peers: asyncio.Queue[Peer]) -> None:
        super().__init__(f"tcp://user:secret@127.0.0.1:{port}/0")
        self.peers = peers


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def recorder(stack: AsyncExitStack) -> Recorder:
    peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.put_nowait(Peer(reader, writer))
        await asyncio.Future()

    return Recorder(await stack.enter_async_context(serving(keep)), peers)


@pytest.fixture
async def proxy(recorder: Recorder, stack: AsyncExitStack) -> FaultProxy:
    return await stack.enter_async_context(FaultProxy(recorder))


@pytest.fixture
def connect(proxy: FaultProxy, stack: AsyncExitStack) -> Connect:
    async def connect() -> Peer:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        stack.callback(writer.close)
        return Peer(reader, writer)

    return connect


@pytest.fixture
async def pair(connect: Connect, recorder: Recorder) -> tuple[Peer, Peer]:
    """A client and the endpoint's side of its connection, which stands all the way."""
    client = await connect()
    server = await recorder.peers.get()
    await server.send(b"welcome")
    assert await client.receive(7) == b"welcome"
    return client, server


async def test_proxy_forwards_both_ways_and_the_end(proxy: FaultProxy, pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    data = bytes(range(256)) * 4096
    sending = asyncio.ensure_future(client.send(data))
    assert await server.receive(len(data)) == data
    await sending
    client.writer.write_eof()
    assert await server.reader.read() == b""
    await server.send(b"reply")
    server.writer.close()
    assert await client.reader.read() == b"reply"

    async def is_over() -> bool:
        return proxy.open == 0

    await eventually(is_over)
    assert proxy.accepted == 1


async def test_url_leads_through_the_proxy(proxy: FaultProxy) -> None:
    assert proxy.url == f"tcp://user:secret@127.0.0.1:{proxy.port}/0"


async def test_reset_of_one_side_reaches_the_other(pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    client.writer.get_extra_info("socket").setsockopt(*RESET)
    client.writer.transport.abort()
    assert await server.is_reset()


async def test_unreachable_endpoint_resets_the_client(stack: AsyncExitStack, proxy: FaultProxy) -> None:
    outer = await stack.enter_async_context(FaultProxy(Endpoint(proxy.url)))
    proxy.refuse()

    def ask() -> None:
        with socket.create_connection((outer.host, outer.port), 5) as client:
            client.recv(1)

    with pytest.raises(ConnectionResetError):
        ask()


async def test_paused_bytes_arrive_on_resume(proxy: FaultProxy, pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    proxy.pause()
    await client.send(b"request")
    await server.send(b"reply")
    assert await server.hears_nothing()
    assert await client.hears_nothing()
    proxy.resume()
    assert await server.receive(7) == b"request"
    assert await client.receive(5) == b"reply"


async def test_paused_proxy_holds_little(proxy: FaultProxy, pair: tuple[Peer, Peer]) -> None:
    client, _ = pair
    proxy.pause()
    sending = asyncio.ensure_future(client.send(bytes(64 * 1024 * 1024)))
    done, _ = await asyncio.wait([sending], timeout=0.3)
    assert not done
    sending.cancel()
    client.writer.transport.abort()


async def test_delay_is_kept_each_way_and_keeps_the_order(proxy: FaultProxy, pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    proxy.delay(0.2)
    started = time.monotonic()
    await client.send(b"one")
    assert await server.receive(3) == b"one"
    assert time.monotonic() - started >= 0.2
    await server.send(b"two")
    assert await client.receive(3) == b"two"
    assert time.monotonic() - started >= 0.4
    await client.send(b"late ")
    assert await server.hears_nothing(0.05)  # so that it is taken while the delay holds
    proxy.delay(0)
    await client.send(b"early")
    assert await server.receive(10) == b"late early"


async def test_cut_passes_exactly_so_many_bytes(proxy: FaultProxy, pair: tuple[Peer, Peer], connect: Connect) -> None:
    client, server = pair
    proxy.cut(requests=5)
    await client.send(b"123")
    assert await server.receive(3) == b"123"
    await server.send(b"reply")
    assert await client.receive(5) == b"reply"
    await client.send(b"45678")
    assert await server.receive(2) == b"45"
    assert await server.is_reset()
    assert await client.is_reset()


async def test_cut_of_replies_holds_for_new_connections_until_healed(
    proxy: FaultProxy, recorder: Recorder, connect: Connect
) -> None:
    proxy.cut(replies=0)
    client = await connect()
    server = await recorder.peers.get()
    await client.send(b"request")
    assert await server.receive(7) == b"request"
    await server.send(b"reply")
    assert await client.is_reset()
    proxy.heal()
    client = await connect()
    server = await recorder.peers.get()
    await server.send(b"reply")
    assert await client.receive(5) == b"reply"


async def test_reset_resets_both_sides_now(proxy: FaultProxy, pair: tuple[Peer, Peer], connect: Connect) -> None:
    client, server = pair
    proxy.reset()
    assert await client.is_reset()
    assert await server.is_reset()
    assert proxy.open == 0
    assert await (await connect()).hears_nothing()


async def test_black_hole_swallows_everything_for_good(
    proxy: FaultProxy, pair: tuple[Peer, Peer], recorder: Recorder, connect: Connect
) -> None:
    client, server = pair
    proxy.black_hole()
    await client.send(bytes(8 * 1024 * 1024))  # more than any buffer takes: it is read
    await server.send(b"reply")
    dark = await connect()
    await dark.send(bytes(8 * 1024 * 1024))
    assert await client.hears_nothing()
    assert await server.hears_nothing()
    assert await dark.hears_nothing()
    assert recorder.peers.empty()
    proxy.heal()
    await client.send(b"more")
    client.writer.close()
    assert await server.hears_nothing()
    assert await dark.hears_nothing()
    fresh = await connect()
    await fresh.send(b"hello")
    assert await (await recorder.peers.get()).receive(5) == b"hello"


async def test_dropped_replies_don_t_stop_requests(
    proxy: FaultProxy, pair: tuple[Peer, Peer], recorder: Recorder, connect: Connect
) -> None:
    client, server = pair
    proxy.drop_replies()
    await client.send(b"request")
    assert await server.receive(7) == b"request"
    await server.send(b"reply")
    server.writer.close()
    assert await client.hears_nothing()
    proxy.heal()
    fresh = await connect()
    await (await recorder.peers.get()).send(b"reply")
    assert await fresh.receive(5) == b"reply"


async def test_refusal_leaves_open_connections_alone(
    proxy: FaultProxy, pair: tuple[Peer, Peer], connect: Connect
) -> None:
    client, server = pair
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await connect()
    await client.send(b"request")
    assert await server.receive(7) == b"request"
    proxy.heal()
    await connect()


async def test_proxy_works_while_the_loop_of_the_test_is_blocked(proxy: FaultProxy, pair: tuple[Peer, Peer]) -> None:
    client, server = pair
    with server.writer.get_extra_info("socket").dup() as sock:
        sock.setblocking(True)
        sock.settimeout(5)
        client.writer.write(b"request")  # goes to the kernel at once
        assert sock.recv(7) == b"request"
