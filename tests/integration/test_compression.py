"""Shared compression against real inflaters, mixed with what the app sends through the server's own compressor."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import textwrap
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI, WebSocket
from playwright.async_api import async_playwright
from websockets.asyncio.client import ClientConnection, connect
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate

from tests.support.programs import BROWSER, NODE, needs_browser, needs_node
from tests.support.servers import eventually, serve_here
from wsbroadcast import ConnectionManager

MESSAGES = 10_000


def make_app(manager: ConnectionManager) -> FastAPI:
    app = FastAPI()

    @app.websocket("/ws")
    async def endpoint(websocket: WebSocket) -> None:
        async with manager.connect(websocket) as connection:
            await connection.wait_closed()

    return app


def compressible(number: int) -> str:
    return json.dumps({"n": number, "user": "ann", "text": "hello again and again and again " * 6})


def make_message(number: int, chance: random.Random) -> str | bytes:
    kind = chance.randrange(4)
    if kind == 0:
        return f"{number}"  # too small to compress
    if kind == 1:
        return number.to_bytes(4) + chance.randbytes(200)  # doesn't shrink
    if kind == 2:
        return number.to_bytes(4) + b"binary " * 50
    return compressible(number)


async def send_all(manager: ConnectionManager, seed: int, messages: int = MESSAGES) -> list[str | bytes]:
    """Send in three ways: shared, to one connection, and by the app itself; everybody gets everything."""
    chance = random.Random(seed)
    sent = []
    for number in range(messages):
        message = make_message(number, chance)
        sent.append(message)
        way = chance.randrange(10)
        if way == 0:
            for websocket in manager.active_connections:
                if isinstance(message, str):
                    await websocket.send_text(message)
                else:
                    await websocket.send_bytes(message)
        elif way == 1:
            for connection in manager.connections:
                await connection.send(message)
        else:
            await manager.broadcast(message)
    return sent


@asynccontextmanager
async def windows(port: int, *sizes: int | None) -> AsyncIterator[list[ClientConnection]]:
    async with AsyncExitStack() as stack:
        clients = []
        for size in sizes:
            factory = ClientPerMessageDeflateFactory(server_max_window_bits=size, client_max_window_bits=True)
            clients.append(
                await stack.enter_async_context(
                    connect(
                        f"ws://127.0.0.1:{port}/ws",
                        compression=None,
                        extensions=[factory],
                        max_queue=None,
                        ping_interval=None,
                    )
                )
            )
        yield clients


async def receive_all(client: ClientConnection, messages: int = MESSAGES) -> list[str | bytes]:
    return [await client.recv() for _ in range(messages)]


async def test_compressed_messages_are_right_for_every_window_size() -> None:
    manager = ConnectionManager()
    async with (
        serve_here(make_app(manager), ws_ping_interval=None) as port,
        windows(port, 9, 10, 11, 12, None) as clients,
        connect(f"ws://127.0.0.1:{port}/ws", compression=None, max_queue=None, ping_interval=None) as plain,
    ):
        negotiated = [extension for client in clients for extension in client.protocol.extensions]
        assert [isinstance(e, PerMessageDeflate) and e.remote_max_window_bits for e in negotiated] == [
            9,
            10,
            11,
            12,
            12,
        ]
        assert manager.stats().sinks == {"uvicorn": 6}
        receiving = [asyncio.create_task(receive_all(client)) for client in (*clients, plain)]
        sent = await send_all(manager, seed=1)
        for received in receiving:
            assert await asyncio.wait_for(received, 60) == sent


async def test_compression_saves_bytes_on_the_wire() -> None:
    manager = ConnectionManager()
    async with serve_here(make_app(manager)) as port, windows(port, None) as [client]:
        raw = bytearray()
        protocol = client.protocol
        receive_data = protocol.receive_data

        def record(data: bytes) -> None:
            raw.extend(data)
            receive_data(data)

        protocol.receive_data = record  # type: ignore[method-assign,assignment]  # count what arrives
        for number in range(20):
            await manager.broadcast(compressible(number))
        size = sum(len(compressible(number)) for number in range(20))
        assert [await client.recv() for _ in range(20)] == [compressible(number) for number in range(20)]
        assert len(raw) < size / 2


NODE_CLIENT = """
const [url, count] = [process.argv[1], Number(process.argv[2])];
const { createHash } = require('node:crypto');
const hash = createHash('sha256');
const socket = new WebSocket(url);
socket.binaryType = 'arraybuffer';
let received = 0;
socket.onmessage = ({ data }) => {
  hash.update(typeof data === 'string' ? 't' + data : Buffer.concat([Buffer.from('b'), Buffer.from(data)]));
  if (++received === count) { console.log(hash.digest('hex')); process.exit(0); }
};
socket.onerror = (event) => { console.log('error', event.message); process.exit(1); };
"""


def digest(messages: list[str | bytes]) -> str:
    total = hashlib.sha256()
    for message in messages:
        total.update(b"t" + message.encode() if isinstance(message, str) else b"b" + message)
    return total.hexdigest()


@needs_node
async def test_compressed_messages_are_right_in_node() -> None:
    manager = ConnectionManager()
    async with serve_here(make_app(manager)) as port:
        client = await asyncio.create_subprocess_exec(
            NODE,
            "-e",
            textwrap.dedent(NODE_CLIENT),
            f"ws://127.0.0.1:{port}/ws",
            str(MESSAGES),
            stdout=subprocess.PIPE,
        )
        try:
            await eventually(lambda: asyncio.sleep(0, manager.connections))
            sent = await send_all(manager, seed=2)
            output, _ = await asyncio.wait_for(client.communicate(), 60)
            assert output.decode().strip() == digest(sent)
        finally:
            if client.returncode is None:
                client.kill()
                await client.wait()


BROWSER_CLIENT = """
([url, count]) => new Promise((resolve, reject) => {
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  const encoder = new TextEncoder();
  let received = 0, hash = 0;
  socket.onerror = () => reject(new Error("the connection failed"));
  socket.onmessage = ({ data }) => {
    const isText = typeof data === "string";
    hash = (Math.imul(hash, 31) + (isText ? 1 : 2)) | 0;
    for (const byte of isText ? encoder.encode(data) : new Uint8Array(data)) hash = (Math.imul(hash, 31) + byte) | 0;
    if (++received === count) resolve(hash >>> 0);
  };
})
"""


def rolling_hash(messages: list[str | bytes]) -> int:
    value = 0
    for message in messages:
        data = b"\x01" + message.encode() if isinstance(message, str) else b"\x02" + message
        for byte in data:
            value = (value * 31 + byte) & 0xFFFFFFFF
    return value


@needs_browser
async def test_compressed_messages_are_right_in_chromium() -> None:
    manager = ConnectionManager()
    async with serve_here(make_app(manager)) as port, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        try:
            page = await browser.new_page()
            url = f"ws://127.0.0.1:{port}/ws"
            hashing = asyncio.ensure_future(page.evaluate(BROWSER_CLIENT, [url, MESSAGES]))
            await eventually(lambda: asyncio.sleep(0, manager.connections))
            sent = await send_all(manager, seed=3)
            assert await asyncio.wait_for(hashing, 60) == rolling_hash(sent)
        finally:
            await browser.close()


async def test_server_compressor_is_given_up_at_registration() -> None:
    manager = ConnectionManager()
    async with serve_here(make_app(manager)) as port, windows(port, None):
        [connection] = manager.connections
        receive: Any = connection.websocket._receive
        [extension] = receive.__self__.conn.extensions
        assert extension.local_no_context_takeover
        assert not hasattr(extension, "encoder")
