"""Limits, expiry and disconnected users on every server, as a client sees them; and that no log tells a secret."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.integration.conftest import ConnectRaw
from tests.support.rawclient import TEXT, RawClient, handshake, masked_frame
from tests.support.servers import (
    DAPHNE,
    GRANIAN,
    HYPERCORN,
    UVICORN,
    UVICORN_UVLOOP,
    UVICORN_WSPROTO,
    Flavour,
    Server,
)

TIMEOUT = 10.0


def quiet(flavour: Flavour) -> Flavour:
    """The same without uvicorn's access lines, which repeat the query string: what is left must hold no secret."""
    if flavour.package != "uvicorn":
        return flavour
    return dataclasses.replace(flavour, arguments=("--log-level", "warning", *flavour.arguments))


FLAVOURS = [quiet(flavour) for flavour in (UVICORN, UVICORN_UVLOOP, UVICORN_WSPROTO, HYPERCORN, GRANIAN, DAPHNE)]

# What uvicorn says of every denial on its default protocol, although it has sent it.
NO_COMPLAINT = "ASGI callable returned without completing handshake"


@pytest.fixture(scope="module", params=FLAVOURS, ids=str)
def limited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flavour: Flavour = request.param
    if flavour.missing:
        pytest.skip(flavour.missing)
    with Server(flavour, tmp_path_factory.mktemp(flavour.name) / "log", "tests.support.limited:app") as server:
        yield server


@pytest.fixture
def server(limited: Server) -> Iterator[Server]:
    limited.mark()
    yield limited
    assert [line for line in limited.complaints() if NO_COMPLAINT not in line] == [], limited.log()


@pytest.fixture
def room() -> str:
    return uuid4().hex


def expected(server: Server, code: int, reason: str) -> tuple[int, str]:
    """What a client sees of a close: daphne takes no registered codes and forgets reasons."""
    if server.flavour is not DAPHNE:
        return code, reason
    return (code if code >= 3000 else code + 3000), ""


async def end_of(client: ClientConnection) -> tuple[int | None, str | None]:
    try:
        async with asyncio.timeout(TIMEOUT):
            while True:
                await client.recv()
    except ConnectionClosed:
        return client.close_code, client.close_reason


async def status_of(server: Server, path: str) -> tuple[int, bytes]:
    """Connect and return the status and the body of the refusal."""
    with pytest.raises(InvalidStatus) as caught:
        await connect(server.url(path), open_timeout=TIMEOUT)
    return caught.value.response.status_code, bytes(caught.value.response.body or b"")


@pytest.mark.parametrize(
    ("kind", "limit", "status", "text"),
    [
        ("in_all", "max_connections", 503, b"too many connections here"),
        ("per_user", "max_connections_per_user", 429, b"too many connections of this user"),
        ("per_address", "max_connections_per_address", 429, b"too many connections from this address"),
        ("pace", "max_handshake_rate", 429, b"too many handshakes from this address"),
    ],
)
async def test_client_sees_why_it_is_refused(
    server: Server, room: str, kind: str, limit: str, status: int, text: bytes
) -> None:
    path = f"/{kind}/{room}"
    async with connect(server.url(f"{path}/ws?user=ann")), connect(server.url(f"{path}/ws?user=ann")):
        refused = await status_of(server, f"{path}/ws?user=ann")
        if server.flavour is DAPHNE:
            assert refused[0] == 403
        else:
            assert refused == (status, text)
        await server.stats(path, connections=2, limited={limit: 1})
    await server.stats(path, connections=0, places={}, tasks=0)


async def test_hundred_handshakes_at_once_get_two_in(server: Server, room: str) -> None:
    path = f"/per_user/{room}"

    async def attempt() -> ClientConnection | int:
        try:
            return await connect(server.url(f"{path}/ws?user=ann"), open_timeout=TIMEOUT)
        except InvalidStatus as refused:
            return refused.response.status_code

    results = await asyncio.gather(*(attempt() for _ in range(100)))
    inside = [result for result in results if isinstance(result, ClientConnection)]
    assert len(inside) == 2
    assert results.count(403 if server.flavour is DAPHNE else 429) == 98
    await server.stats(path, connections=2, limited={"max_connections_per_user": 98})
    for client in inside:
        await client.close()
    await server.stats(path, connections=0, places={}, tasks=0)


async def test_accepted_socket_is_closed_with_the_reason(server: Server, room: str) -> None:
    path = f"/in_all/{room}"
    ws = server.url(f"{path}/ws")
    async with connect(ws), connect(ws), connect(server.url(f"{path}/accepted")) as client:
        assert await end_of(client) == expected(server, 1013, "too many connections here")


@pytest.mark.parametrize("limited", FLAVOURS[:3], ids=str, indirect=True)
async def test_who_does_not_answer_the_close_holds_its_place_as_long_as_its_socket(server: Server, room: str) -> None:
    """Sockets are counted, not places: each client provokes a close, and then leaves it unanswered."""
    path = f"/per_address/{room}"
    accepted: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        async with asyncio.timeout(TIMEOUT):  # by itself uvicorn lets go of them after 10 s
            while len(accepted) < 6:
                sock = await asyncio.to_thread(knock, server, f"{path}/json")
                if sock is None:
                    continue
                accepted.append(stack.enter_context(sock))
                sock.sendall(masked_frame(TEXT, b"{"))
                assert sum(map(is_open, accepted)) <= 2
        await server.stats(path, connections=0, places={}, tasks=0)
        assert not any(map(is_open, accepted))


@pytest.mark.parametrize("limited", FLAVOURS[:3], ids=str, indirect=True)
async def test_who_answers_the_close_may_come_again_at_once(server: Server, room: str) -> None:
    for _ in range(20):
        async with connect(server.url(f"/per_address/{room}/json")) as client:
            await client.send("{")
            assert await end_of(client) == (1007, "expected JSON")


def knock(server: Server, path: str) -> socket.socket | None:
    """Connect and return the socket; `None` if the handshake is refused."""
    sock = socket.create_connection(("127.0.0.1", server.port), TIMEOUT)
    sock.sendall(handshake(server.port, path))
    if sock.recv(4096).startswith(b"HTTP/1.1 101 "):
        return sock
    sock.close()
    return None


def is_open(sock: socket.socket) -> bool:
    """Whether the server still has its end."""
    sock.setblocking(False)
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


@pytest.mark.parametrize("size", [1000, 1001])
async def test_message_beyond_the_limit_closes_with_1009(server: Server, room: str, size: int) -> None:
    async with connect(server.url(f"/inbound/{room}/ws")) as client:
        await client.send("é" * (size // 2) + "x" * (size % 2))
        if size <= 1000:
            assert len(await client.recv()) == 500
        else:
            assert await end_of(client) == expected(server, 1009, "message too big")
            await server.stats(f"/inbound/{room}", connections=0, limited={"max_inbound_bytes": 1})


async def test_flood_of_frames_ends_that_connection_alone(server: Server, room: str, connect_raw: ConnectRaw) -> None:
    path = f"/inbound/{room}"
    async with connect(server.url(f"{path}/ws")) as healthy:
        flooding = await connect_raw(server, f"{path}/ws")
        sending = asyncio.create_task(flood(flooding, 10_000))
        received = [await healthy.recv() for _ in range(10)]
        assert received == [f"{number}" for number in range(10)]  # and not one more
        async with asyncio.timeout(TIMEOUT):
            while (end := await flooding.receive()) is not None and end.opcode == TEXT:
                pass
        if end is not None:  # else what it still sent was answered by a reset
            assert (end.close_code, end.payload[2:].decode()) == expected(
                server, 1008, "too many messages (max_inbound_rate)"
            )
        flooding.close()
        await sending
        stats = await server.stats(path, connections=1, limited={"max_inbound_rate": 1})
        assert stats["broadcasts"] == 10
        await healthy.send("still here")
        assert await healthy.recv() == "still here"


async def flood(client: RawClient, frames: int) -> None:
    data = b"".join(masked_frame(TEXT, str(number).encode()) for number in range(frames))
    try:
        await asyncio.get_running_loop().sock_sendall(client.socket, data)
    except OSError:
        pass  # closed meanwhile


def attacker(server: Server, path: str, address: str) -> socket.socket:
    """Connect from an address, send a handshake and read nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects, or it has no effect
    sock.bind((address, 0))
    sock.connect(("127.0.0.1", server.port))
    sock.sendall(handshake(server.port, path))
    return sock


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="127.0.0.2 is an address of every Linux")
@pytest.mark.parametrize("limited", FLAVOURS[:3], ids=str, indirect=True)
async def test_flood_of_everything_costs_the_healthy_no_message_and_leaves_nothing(server: Server, room: str) -> None:
    """10,000 frames, 1,000 handshakes from one address, a list of channel names without end, 100 that never read."""
    path = f"/flood/{room}"
    async with contextlib.AsyncExitStack() as stack:
        healthy = [await stack.enter_async_context(connect(server.url(f"{path}/ws"))) for _ in range(50)]
        deaf = [attacker(server, f"{path}/ws", f"127.0.1.{number}") for number in range(1, 101)]
        await server.stats(path, connections=150)
        knocking = []
        for _ in range(1000):  # 60 find a place, 40 more the pace lets come, and the rest it doesn't
            knocking.append(attacker(server, f"{path}/ws", "127.0.0.3"))
            await asyncio.sleep(0)
        limited = {"max_connections_per_address": 40, "max_handshake_rate": 900}
        await server.stats(path, connections=210, limited=limited)
        for sock in knocking:
            sock.close()
        await server.stats(path, connections=150)

        naming = attacker(server, f"{path}/names", "127.0.0.4")
        flooding = attacker(server, f"{path}/ws", "127.0.0.5")
        await server.stats(path, connections=152)
        names = b"".join(masked_frame(TEXT, f"name {number}".encode()) for number in range(10_000))
        frames = b"".join(masked_frame(TEXT, f"{number}".encode()) for number in range(10_000))
        await asyncio.gather(*(send_what_goes(sock, data) for sock, data in ((naming, names), (flooding, frames))))
        limited |= {"max_channels_per_connection": 10, "max_inbound_rate": 2}
        stats = await server.stats(path, connections=150, limited=limited, channels=0)
        assert stats["broadcasts"] == 60  # as many of the flood as its burst allows

        await healthy[0].send("still here")
        for client in healthy:
            async with asyncio.timeout(TIMEOUT):
                received = [await client.recv() for _ in range(61)]
            assert received == [*map(str, range(60)), "still here"]
        for sock in (*deaf, naming, flooding):
            sock.close()
        await server.stats(path, connections=50)
    await server.stats(path, connections=0, channels=0, backlog_messages=0, places={}, tasks=0)


async def send_what_goes(sock: socket.socket, data: bytes) -> None:
    sock.setblocking(False)
    try:
        async with asyncio.timeout(2):  # whoever is closed takes no more
            await asyncio.get_running_loop().sock_sendall(sock, data)
    except (OSError, TimeoutError):
        pass


async def test_too_many_channels_end_nothing_unless_nobody_catches_it(server: Server, room: str) -> None:
    async with connect(server.url(f"/channels/{room}/json")) as client:
        await client.send('["a", "b"]')
        assert json.loads(await client.recv()) == ["a", "b"]
        await client.send('["c"]')
        assert await end_of(client) == expected(server, 1008, "too many channels")


async def test_connection_is_closed_at_the_moment_it_expires(server: Server, room: str) -> None:
    started = time.monotonic()
    async with connect(server.url(f"/default/{room}/ws?expires_in=0.5")) as client:
        assert await end_of(client) == expected(server, 4401, "it has expired")
    assert 0.4 < time.monotonic() - started < 2.5
    await server.stats(f"/default/{room}", connections=0, tasks=0)


async def test_expired_handshake_is_refused(server: Server, room: str) -> None:
    status, body = await status_of(server, f"/default/{room}/ws?expires_in=-1")
    assert (status, body) == (403, b"") if server.flavour is DAPHNE else (401, b"it has expired")


async def test_disconnected_user_is_out_within_two_seconds(server: Server, room: str) -> None:
    path = f"/default/{room}"
    async with (
        connect(server.url(f"{path}/ws?user=ann")) as one,
        connect(server.url(f"{path}/ws?user=ann")) as two,
        connect(server.url(f"{path}/ws?user=bob")) as staying,
    ):
        started = time.monotonic()
        await server.post(f"{path}/disconnect/ann")
        ends = [await end_of(one), await end_of(two)]
        assert ends == [expected(server, 4401, "signed out")] * 2
        assert time.monotonic() - started < 2
        await staying.send("still here")
        assert await staying.recv() == "still here"


@pytest.mark.parametrize("limited", FLAVOURS[:3], ids=str, indirect=True)
async def test_disconnected_user_does_not_get_what_waits(server: Server, room: str, connect_raw: ConnectRaw) -> None:
    path = f"/default/{room}"
    client = await connect_raw(server, f"{path}/ws?user=ann", stalls=True)
    await server.stats(path, connections=1)
    sent = waiting = 0
    while waiting == 0:  # until the kernel holds what it can
        sent += 5
        await server.post(f"{path}/broadcast?times=5&size=65536")
        waiting = (await server.stats(path, connections=1))["backlog_messages"]
    await server.post(f"{path}/disconnect/ann")
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * 1024 * 1024)
    received = 0
    async with asyncio.timeout(TIMEOUT):
        while (frame := await client.receive()) is not None and frame.opcode == TEXT:
            received += 1
    assert received <= sent - waiting
    stats = await server.stats(path, connections=0, tasks=0)
    assert stats["dropped"]["closed"] >= waiting


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("flavour", [quiet(UVICORN), quiet(UVICORN_UVLOOP)], ids=str)
async def test_compression_bomb_stays_small_on_uvicorn(flavour: Flavour, tmp_path: Path) -> None:
    """250 MiB of zeros in 255 kB: uvicorn's default protocol stops inflating at its limit for a message."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = b"".join(deflate.compress(bytes(2**20)) for _ in range(250)) + deflate.flush(zlib.Z_SYNC_FLUSH)[:-4]
    frame = b"\xc1\xff" + len(zeros).to_bytes(8) + b"\0\0\0\0" + zeros  # FIN, RSV1, text; a mask of zeros
    hello = handshake(0, "/default/a/ws").replace(
        b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
    )
    with Server(flavour, tmp_path / "log", "tests.support.limited:app") as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(hello)
        assert b"permessage-deflate" in await reader.readuntil(b"\r\n\r\n")
        before = server.peak_resident_bytes()
        writer.write(frame)
        async with asyncio.timeout(TIMEOUT):
            header = await reader.readexactly(4)
        writer.close()
        assert (header[0], int.from_bytes(header[2:])) == (0x88, 1009)
        assert server.peak_resident_bytes() - before < 64 * 2**20


SECRETS = ("sEcReT-query", "sEcReT-header", "sEcReT-payload", "sEcReT-cookie")


async def test_no_log_and_no_close_tells_a_secret(server: Server, room: str, connect_raw: ConnectRaw) -> None:
    """Every way to fail, each with secrets in the query, the headers and the payload."""
    query, header, payload, cookie = SECRETS
    headers = {"Authorization": f"Bearer {header}", "Cookie": f"session={cookie}"}
    ends: list[tuple[object, object]] = []
    clients = []

    async def fail(path: str, message: str | bytes) -> None:
        async with connect(server.url(f"{path}?token={query}"), additional_headers=headers) as client:
            await client.send(message)
            ends.append(await end_of(client))

    await fail(f"/inbound/{room}/ws", payload * 1000)  # too big
    await fail(f"/inbound/{room}/ws", f"forbidden {payload}")  # refused by a hook
    await fail(f"/inbound/{room}/json", f'{{"{payload}": ')  # broken JSON
    await fail(f"/inbound/{room}/json", f'["{payload}\\u0001"]')  # no channel
    await fail(f"/router/{room}", f"{{{payload}")
    await fail(f"/router/{room}", payload * 1000)
    for path in ("/router/a%0aFORGED%1b[2J", f"/in_all/{room}/ws", f"/in_all/{room}/ws", f"/in_all/{room}/ws"):
        try:
            client = await connect(server.url(f"{path}?token={query}"), additional_headers=headers)
        except InvalidStatus as refused:
            ends.append((refused.response.status_code, (refused.response.body or b"").decode()))
            ends.append((0, str(refused.response.headers)))
        else:
            clients.append(client)
    for client in clients:
        await client.close()
    stalled = await connect_raw(server, f"/default/{room}/ws?token={query}", stalls=True)
    await server.stats(f"/default/{room}", connections=1)
    await server.post(f"/default/{room}/broadcast?times=200&size=65536")  # evicted, where the server lets us know
    stalled.close()
    await server.stats(f"/default/{room}", connections=0)
    log = server.log()
    for secret in SECRETS:
        assert secret not in log, log
        assert not any(secret in str(end) for end in ends), ends
    assert "\nFORGED" not in log
    assert "\x1b[2J" not in log
