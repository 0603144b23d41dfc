"""Clients of the Centrifuge protocol on real sockets: what they must not send, and how they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.support.centrifuge import as_runtime, behind_lengths, replies_of
from tests.support.centrifuge_client import BOTH, PATH, Form, is_understood, served
from tests.support.servers import serve_here
from wsbroadcast import ConnectionManager, History, Limits

TIMEOUT = 30.0

# On the fast path, and through ASGI alone.
SERVERS = pytest.mark.parametrize("ws", ["auto", "wsproto"])


class Socket:
    """A client's socket, in either form."""

    def __init__(self, socket: ClientConnection, form: Form) -> None:
        self.socket = socket
        self.form = form
        self.told: list[dict[str, Any]] = []

    async def say(self, *commands: dict[str, Any]) -> None:
        if self.form == "json":
            await self.socket.send("\n".join(map(json.dumps, commands)))
        else:
            await self.socket.send(behind_lengths(*(as_runtime("Command", each) for each in commands)))

    async def until(self, count: int) -> list[dict[str, Any]]:
        """Read until it was told so much, without pings; return all."""
        async with asyncio.timeout(TIMEOUT):
            while len(self.told) < count:
                await self._read()
        return self.told

    async def _read_all(self) -> None:
        while True:
            await self._read()

    async def _read(self) -> None:
        frame = await self.socket.recv()
        assert isinstance(frame, str) is (self.form == "json")
        lines = replies_of(frame) if isinstance(frame, bytes) else map(json.loads, frame.split("\n"))
        self.told += [each for each in lines if each]

    async def end(self) -> int:
        """Read until it is closed; return the code, which every SDK must understand."""
        async with asyncio.timeout(TIMEOUT):
            with pytest.raises(ConnectionClosed) as caught:
                await self._read_all()
        end = caught.value.rcvd
        assert end is not None
        assert end.code < 3000 or is_understood(end.reason)
        return end.code


@asynccontextmanager
async def opened(port: int, form: Form) -> AsyncIterator[Socket]:
    offered = [Subprotocol("centrifuge-protobuf")] if form == "protobuf" else None
    async with connect(f"ws://127.0.0.1:{port}{PATH}", subprotocols=offered, max_size=1_000_000) as socket:
        assert socket.subprotocol == (offered[0] if offered else None)
        yield Socket(socket, form)


@asynccontextmanager
async def serving(ws: str, **options: Any) -> AsyncIterator[tuple[int, ConnectionManager]]:
    manager = ConnectionManager(history=History(), **options)
    async with served(manager) as app, serve_here(app, ws=ws, lifespan="off") as port:
        yield port, manager


@SERVERS
@BOTH
async def test_a_client_subscribes_and_gets_what_is_published(ws: str, form: Form) -> None:
    async with serving(ws) as (port, manager), opened(port, form) as one:
        await one.say({"id": 1, "connect": {}}, {"id": 2, "subscribe": {"channel": "a"}})
        connected, subscribed = await one.until(2)
        assert connected["id"] == 1
        assert connected["connect"]["client"]
        assert subscribed["subscribe"]["recoverable"] is True
        data = b'{"a" :  [1.0]}'
        if form == "json":
            await one.socket.send('{"id":3,"publish":{"channel":"a","data":' + data.decode() + "}}")
        else:
            await one.say({"id": 3, "publish": {"channel": "a", "data": data}})
        await one.until(4)
        (push,) = (each["push"] for each in one.told if "push" in each)
        assert push["channel"] == "a"
        assert push["pub"]["offset"] == 1
        assert push["pub"]["info"]["client"] == connected["connect"]["client"]
        assert push["pub"]["data"] == (json.loads(data) if form == "json" else data)
        assert len(manager.connections) == 1


BAD: dict[str, tuple[Form, str | bytes, int]] = {
    "no JSON": ("json", "hello", 3501),
    "empty": ("json", "", 3501),
    "binary": ("json", b"\x00", 3501),
    "empty line": ("json", '{"id":2,"unsubscribe":{"channel":"a"}}\n\n', 3501),
    "second connect": ("json", '{"id":2,"connect":{}}', 3501),
    "ping": ("json", '{"id":2,"ping":{}}', 3501),
    "id 2^32": ("json", '{"id":4294967296,"unsubscribe":{"channel":"a"}}', 3501),
    "64 KiB + 1": ("json", '{"id":2,"rpc":{"data":"' + "x" * (65_537 - 26) + '"}}', 1009),
    "text": ("protobuf", "hello", 3501),
    "empty binary": ("protobuf", b"", 3501),
    "garbage": ("protobuf", bytes(range(256)), 3501),
    "64 KiB + 1 in Protobuf": ("protobuf", b"\x00" * 65_537, 1009),
}


@SERVERS
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_frame_ends_its_client_and_no_other(ws: str, name: str) -> None:
    form, frame, code = BAD[name]
    async with serving(ws) as (port, manager), opened(port, form) as one, opened(port, form) as other:
        for each in one, other:
            await each.say({"id": 1, "connect": {}}, {"id": 2, "subscribe": {"channel": "a"}})
            await each.until(2)
        await one.socket.send(frame)
        assert await one.end() == code
        await manager.broadcast({"n": 1}, channel="a")
        assert (await other.until(3))[2]["push"]["pub"]["offset"] == 1
        assert len(manager.connections) == 1


@SERVERS
@BOTH
async def test_a_bad_first_frame_is_no_handshake_refused(ws: str, form: Form) -> None:
    async with serving(ws) as (port, _), opened(port, form) as one:
        await one.say({"id": 1, "subscribe": {"channel": "a"}})
        assert await one.end() == 3501


@SERVERS
@BOTH
async def test_the_largest_frame_has_64_kib(ws: str, form: Form) -> None:
    async with serving(ws) as (port, _), opened(port, form) as one:
        await one.say({"id": 1, "connect": {}})
        if form == "json":
            head, tail = '{"id":2,"publish":{"channel":"a","data":"', '"}}'
            await one.socket.send(head + "x" * (65_536 - len(head) - len(tail)) + tail)
        else:
            size = 65_536 - len(behind_lengths(as_runtime("Command", _published(60_000)))) + 60_000
            frame = behind_lengths(as_runtime("Command", _published(size)))
            assert len(frame) == 65_536
            await one.socket.send(frame)
        assert (await one.until(2))[1] == {"id": 2, "publish": {}}


def _published(size: int) -> dict[str, Any]:
    return {"id": 2, "publish": {"channel": "a", "data": b'"' + b"x" * (size - 2) + b'"'}}


@SERVERS
@BOTH
async def test_a_thousand_subscribes_in_the_first_frame(ws: str, form: Form) -> None:
    async with (
        serving(ws, limits=Limits(max_channels_per_connection=None, inbound_burst=2000)) as (port, manager),
        opened(port, form) as one,
    ):
        subscribes = [{"id": each + 2, "subscribe": {"channel": f"c{each}"}} for each in range(1000)]
        await one.say({"id": 1, "connect": {}}, *subscribes)
        await one.until(1001)
        assert [each["id"] for each in one.told] == list(range(1, 1002))
        assert all("subscribe" in each for each in one.told[1:])
        await manager.broadcast({"n": 1}, channel="c999")
        assert (await one.until(1002))[-1]["push"]["channel"] == "c999"


async def test_a_page_of_the_path_is_answered() -> None:
    async with serving("auto") as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status = await reader.readline()
        writer.close()
        await writer.wait_closed()
        assert status.split()[1] in (b"404", b"405", b"426")
