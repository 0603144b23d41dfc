"""Who gets in, on every server: what a real client sees of a refusal, and what the server's log says of it."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests.support.guarded import LISTED
from tests.support.servers import (
    DAPHNE,
    GRANIAN,
    HYPERCORN,
    ROOT,
    UVICORN,
    UVICORN_UVLOOP,
    UVICORN_WSPROTO,
    Flavour,
    Server,
    eventually,
    serve_here,
)
from wsbroadcast import ConnectionManager, create_router

# What uvicorn's wsproto does with a subprotocol outside ASCII is a traceback, and it never ends after that.
NO_WSPROTO = (UVICORN, HYPERCORN, GRANIAN, DAPHNE)
FLAVOURS = (UVICORN_UVLOOP, UVICORN_WSPROTO, *NO_WSPROTO)

TIMEOUT = 10.0


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    yield servers
    with ExitStack() as stack:
        for server in servers.values():
            stack.push(server)


@pytest.fixture(params=FLAVOURS, ids=str)
def server(
    request: pytest.FixtureRequest, started: dict[str, Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    flavour: Flavour = request.param
    if flavour.missing:
        pytest.skip(flavour.missing)
    if flavour.name not in started:
        log = tmp_path_factory.mktemp(flavour.name) / "log"
        started[flavour.name] = Server(flavour, log, "tests.support.guarded:app").__enter__()
    started[flavour.name].mark()
    return started[flavour.name]


def answers(server: Server) -> bool:
    """Whether the server can answer a handshake with more than 403."""
    return server.flavour is not DAPHNE


async def refusal(server: Server, path: str, **options: Any) -> tuple[int, str, dict[str, str]]:
    """Return status, body and headers of a refused handshake."""
    with pytest.raises(InvalidStatus) as caught:
        async with asyncio.timeout(TIMEOUT), connect(server.url(path), **options):
            pass
    response = caught.value.response
    return response.status_code, (response.body or b"").decode(), {k.lower(): v for k, v in response.headers.items()}


@asynccontextmanager
async def connected(server: Server, path: str, **options: Any) -> AsyncIterator[ClientConnection]:
    async with asyncio.timeout(TIMEOUT), connect(server.url(path), **options) as client:
        yield client


async def echoes(client: ClientConnection) -> bool:
    await client.send("hello")
    return await client.recv() == "hello"


async def close_of(client: ClientConnection) -> tuple[int, str]:
    await client.wait_closed()
    assert client.close_code is not None
    return client.close_code, client.close_reason or ""


# Origin.


@pytest.mark.parametrize("path", ["/ws", "/dependency"])
@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1:1", "https://evil.example", "null", "http://127.0.0.1.evil.example"]
)
async def test_a_page_from_elsewhere_is_refused_with_403(server: Server, path: str, origin: str) -> None:
    before = await server.get("/state")
    status, body, headers = await refusal(server, path, origin=origin)
    assert status == 403
    if answers(server):
        assert f"origin {origin!r} is not allowed" in body
        assert headers["content-type"] == "text/plain; charset=utf-8"
    after = await server.get("/state")  # a client of the test before may have been leaving still
    counts = [(one["connects"], one["endpoints"], one["sessions"]["opened"]) for one in (before, after)]
    assert counts[0] == counts[1]
    assert not server.complaints(), server.log()


@pytest.mark.parametrize("path", ["/ws", "/dependency"])
async def test_the_servers_own_page_and_programs_get_in(server: Server, path: str) -> None:
    for origin in (f"http://127.0.0.1:{server.port}", f"HTTP://127.0.0.1:{server.port}", None):
        async with connected(server, path, origin=origin) as client:
            assert await echoes(client)
    assert not server.complaints(), server.log()


async def test_a_list_of_origins_is_exact(server: Server) -> None:
    async with connected(server, "/listed", origin=LISTED) as client:
        assert await echoes(client)
    for origin in (f"http://127.0.0.1:{server.port}", LISTED.replace("https", "http"), LISTED + ":8443"):
        assert (await refusal(server, "/listed", origin=origin))[0] == 403


async def test_the_reason_is_logged_once(server: Server) -> None:
    for _ in range(3):
        await refusal(server, "/ws", origin="http://localhost:5173")
    lines = [line for line in server.log().splitlines() if "allowed_origins=['http://localhost:5173']" in line]
    assert len(lines) == 1


# Authentication.


@pytest.mark.parametrize(
    ("token", "status", "text"),
    [
        ("nobody", 401, "not authenticated"),
        ("expired", 401, "that token has expired"),
        ("banned", 403, "not you"),
    ],
)
async def test_who_is_nobody_is_refused_before_accept(server: Server, token: str, status: int, text: str) -> None:
    before = (await server.get("/state"))["connects"]
    seen, body, headers = await refusal(server, "/member", additional_headers={"Authorization": f"Bearer {token}"})
    if answers(server):
        assert (seen, body) == (status, text)
        assert headers.get("www-authenticate", "").startswith("Bearer" if status == 401 else "")
    else:
        assert seen == 403
    assert (await server.get("/state"))["connects"] == before
    assert not server.complaints(), server.log()


async def test_an_error_of_the_app_lets_nobody_in_and_says_nothing(server: Server) -> None:
    status, body, _ = await refusal(server, "/member", additional_headers={"Authorization": "Bearer broken"})
    assert status in (403, 500)
    assert "hunter2" not in body
    assert "ValueError" not in body

    async def is_logged() -> bool:
        return "ValueError: the password is hunter2" in server.log()  # where it belongs

    await eventually(is_logged)


async def test_the_session_of_authentication_is_closed_while_the_connection_lives(server: Server) -> None:
    before = (await server.get("/state"))["sessions"]["opened"]
    async with connected(server, "/member", additional_headers={"Authorization": "Bearer ada"}) as client:
        assert await echoes(client)
        state = await server.get("/state")
        assert "ada" in state["users"]
        assert state["sessions"] == {"open": 0, "opened": before + 1}


async def test_a_token_may_come_in_the_subprotocol_and_is_not_sent_back(server: Server) -> None:
    async with connected(server, "/member", subprotocols=["bearer", "SECRET"]) as client:
        assert client.subprotocol == "bearer"
        assert await echoes(client)
        assert "SECRET" in (await server.get("/state"))["users"]
        assert "SECRET" not in str(client.response)
    assert "SECRET" not in server.log()


async def test_a_token_may_come_as_the_first_message(server: Server) -> None:
    async with connected(server, "/member") as client:
        await client.send("SECRET")
        assert await echoes(client)
        state = await server.get("/state")
        assert "SECRET" in state["users"]
        assert set(state["sinks"]) == {"uvicorn" if server.flavour.fast_path else "asgi"}
    assert "SECRET" not in server.log()
    assert not server.complaints(), server.log()


@pytest.mark.parametrize(
    ("token", "code", "reason"),
    [
        (None, 4401, "no token came in time"),
        ("two words", 4401, "the first message has to be the token"),
        ("expired", 4401, "that token has expired"),
        ("banned", 4403, "not you"),
    ],
)
async def test_a_first_message_that_proves_nothing_closes(
    server: Server, token: str | None, code: int, reason: str
) -> None:
    async with connected(server, "/member") as client:
        if token is not None:
            await client.send(token)
        assert await close_of(client) == (code, "" if server.flavour is DAPHNE else reason)
    assert not server.complaints(), server.log()


async def test_who_leaves_without_a_word_is_forgotten(server: Server) -> None:
    before = (await server.get("/state"))["connects"]
    async with connected(server, "/member"):
        pass

    async def forgotten() -> bool:
        state = await server.get("/state")
        return bool(state["users"] == [] and state["sessions"]["open"] == 0)

    await eventually(forgotten)
    assert (await server.get("/state"))["connects"] == before
    assert not server.complaints(), server.log()


async def test_a_channel_that_is_not_allowed_is_refused(server: Server) -> None:
    headers = {"Authorization": "Bearer ada"}
    status, body, _ = await refusal(server, "/channel/private", additional_headers=headers)
    assert (status, body) == (403, "not allowed") if answers(server) else status == 403
    async with connected(server, "/channel/news", additional_headers=headers) as client:
        await client.send('{"type": "subscribe", "channel": "private"}')
        assert "forbidden" in str(await client.recv())
        await client.send('{"type": "publish", "channel": "news", "data": 1}')
        assert await client.recv() == '{"type":"message","channel":"news","data":1}'


# Headers that have brought others down.


@pytest.mark.parametrize(
    "lines",
    [
        b"Sec-WebSocket-Protocol: \x80\xff\r\n",
        b"Sec-WebSocket-Protocol: bearer, \x80\xff\r\n",
        b"Sec-WebSocket-Protocol: " + b", ".join(b"p%d" % number for number in range(1_000)) + b"\r\n",
        b"Cookie: session=\xe9\xff; a=\x80\r\n",
        b"Authorization: Bearer \x80\xff\r\n",
        b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n",
        b"Origin: \x80\xff\r\n",
        b"Origin: https://evil.example\r\nOrigin: http://{host}\r\n",
    ],
    ids=lambda lines: repr(lines[:40]),
)
@pytest.mark.parametrize("server", NO_WSPROTO, ids=str, indirect=True)
async def test_a_strange_header_hurts_nobody_else(server: Server, lines: bytes) -> None:
    async with connected(server, "/ws") as healthy:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        host = f"127.0.0.1:{server.port}".encode()
        writer.write(
            b"GET /member HTTP/1.1\r\nHost: " + host + b"\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
            + lines.replace(b"{host}", host)
            + b"\r\n"
        )
        try:
            async with asyncio.timeout(TIMEOUT):
                answer = await reader.read(4096)  # an answer, or an end
        except ConnectionResetError:
            answer = b""
        finally:
            writer.transport.abort()
        assert not answer.startswith(b"HTTP/1.1 101") or b"Origin" not in lines
        assert await echoes(healthy)


# What the documentation says about the server's log.


async def test_the_documented_filter_keeps_queries_out_of_uvicorns_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "how-to-authenticate.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(import logging\n.*?)^```", page, re.DOTALL | re.MULTILINE)
    # Without the filter of whatever test ran the page before.
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])
    app = FastAPI()
    app.include_router(create_router(ConnectionManager()))
    async with serve_here(app, log_config=None) as port:
        caplog.set_level(logging.INFO, "uvicorn.error")
        for is_filtered in (False, True):
            caplog.clear()
            async with connect(f"ws://127.0.0.1:{port}/ws?token=SECRET") as client:
                assert await echoes(client)
            assert '"WebSocket /ws' in caplog.text
            assert ("SECRET" in caplog.text) is not is_filtered
            exec(block, {})
