"""A site for the browser's client: a router, its HTTP side as a stand-in, a page, and a proxy that misbehaves."""

# No postponed annotations: FastAPI reads them.

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from tests.support.brokers import Endpoint, free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import serve_here
from wsbroadcast import ClientTiming, ConnectionManager, History, Identity, TokenFrom, create_router
from wsbroadcast.web.client_script import DIRECTORY

CHANNEL = "room:1"

PAGE = """<!doctype html><title>page</title><link rel="icon" href="data:,">
<script type="module" src="/page.js"></script>"""

# What each test drives: it keeps what the page was told.
SCRIPT = """
import { connect } from "%s"
window.connect = connect
const get = async (path) => (await fetch(path)).json()
window.told = { log: [], states: 0, tokens: 0, status: [], closed: null, errors: [], events: [] }
window.start = ({ state, token, ...options } = {}) => {
  const told = window.told
  const ws = window.ws = connect("/ws/room:1", {
    ...options,
    ...(state && { state() { told.states++; told.log.push("state"); return get("/position") } }),
    ...(token && { token() { told.tokens++; return get("/token") } }),
  })
  ws.on("message", ({ data }) => told.log.push(data))
  ws.on("status", (status, closed) => { told.status.push(status); told.closed = closed ?? null })
  for (const type of ["subscribed", "gap", "expiring"]) ws.on(type, (event) => told.events.push(event))
  ws.on("error", (error) => told.errors.push(String(error)))
}
window.isReady = true
"""

# The client's times, a part of what they are: the tests that everybody runs take seconds and not minutes.
QUICK = {
    "STEADY": 1000,
    "GRACE": 700,
    "OPEN_TIMEOUT": 2000,
    "PROBE_TIMEOUT": 500,
    "FIRST_BYTE_TIMEOUT": 800,
    "SLACK": 1000,
    "WAIT": 1,
}

TIMING = ClientTiming(ping_interval=1.0, reconnect_min=0.2, reconnect_max=2.0)

HEADERS = {"Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:"}


def quick_client() -> str:
    """The client with shorter times."""
    source = (DIRECTORY / "wsbroadcast.js").read_text(encoding="utf-8")
    for name, value in QUICK.items():
        source, count = re.subn(rf"\b{name} = [\d_]+", f"{name} = {value}", source)
        assert count == 1, name
    return source


async def current_user(request: Any, token: str) -> Identity | None:
    """Tokens are `good` or not."""
    return Identity("ada") if token == "good" else None


class Site:
    """The server and the proxy in front of it. Inside `async with` it runs; the page reaches it at `url`."""

    def __init__(self, directory: Path, *, is_full: bool = False, authenticates: bool = False, **options: Any) -> None:
        self._directory = directory
        self._is_full = is_full
        self._options = options
        self._authenticates = authenticates
        self.blocks_upgrades = False
        """Whether a proxy answers WebSocket handshakes with 400."""
        self.holds_back = ""
        """What it holds back of server-sent events: `all`, the `body`, or nothing."""
        self.closes_streams: int | None = None
        """The code that server-sent events end with at once."""
        self.has_http = True
        """Whether the server has another way in than a WebSocket."""
        self.tokens = ["good"]
        """What `/token` gives, the last for ever."""
        self.asked: list[str] = []
        """How the page has come: `ws`, `sse`, `poll`, `post`."""
        self.streams: set[asyncio.Task[Any]] = set()
        """The server-sent events that are open."""
        self.sent = 0
        """How many ticks there were."""
        self.log = 0
        self.manager: ConnectionManager
        self._server = AsyncExitStack()
        self._running = asyncio.Lock()
        self.endpoint = Endpoint(f"http://127.0.0.1:{free_port()}")
        self.proxy = FaultProxy(self.endpoint)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    async def __aenter__(self) -> Self:
        await self.proxy.start()
        await self.begin()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticking.cancel()
        await self.proxy.stop()
        await self.end()

    async def begin(self) -> None:
        """Start the server, with the log that there is."""
        self.manager = ConnectionManager(
            f"sqlite:///{self._directory}/log{self.log}.db", history=History(messages=1000), client_timing=TIMING
        )
        self._server = AsyncExitStack()
        self.endpoint.port = await self._server.enter_async_context(
            serve_here(self._app(), timeout_graceful_shutdown=1)
        )

    async def end(self) -> None:
        """Stop it: uvicorn closes with 1012."""
        for stream in self.streams:
            stream.cancel()
        await self._server.aclose()

    async def restart(self, *, loses_log: bool = False) -> None:
        """Stop and start it; nothing ticks meanwhile."""
        async with self._running:
            await self.end()
            self.log += loses_log
            await self.begin()

    async def _tick(self) -> None:
        while True:
            async with self._running:
                await self.manager.broadcast(self.sent, channel=CHANNEL)
                self.sent += 1
            await asyncio.sleep(0.05)

    def _app(self) -> Any:
        app = FastAPI(openapi_url=None)
        manager = self.manager
        if self._authenticates:

            async def user(token: Annotated[str, Depends(TokenFrom(subprotocol="bearer", header=True))]) -> Any:
                return Identity("ada") if token == "good" else None

            self._options["authenticate"] = user
        app.include_router(create_router(manager, "/ws/{channel}", **self._options))

        @manager.method("double")
        async def double(number: int) -> int:
            return 2 * number

        @app.get("/")
        async def page() -> HTMLResponse:
            return HTMLResponse(PAGE, headers=HEADERS)

        @app.get("/page.js")
        async def script() -> Response:
            client = "/ws/wsbroadcast.js" if self._is_full else "/quick.js"
            return Response(SCRIPT % client, media_type="text/javascript")

        @app.get("/quick.js")
        async def quick() -> Response:
            return Response(quick_client(), media_type="text/javascript")

        @app.get("/position")
        async def position() -> str:
            return str(await manager.position(CHANNEL))

        @app.get("/token")
        async def token() -> str:
            return self.tokens.pop(0) if len(self.tokens) > 1 else self.tokens[0]

        app.get("/ws/{channel}")(self._get)
        app.post("/ws/{channel}")(self._post)
        return self._proxied(app)

    def _proxied(self, app: Any) -> Any:
        async def run(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan" or not scope["path"].endswith(CHANNEL):
                await app(scope, receive, send)
                return
            headers = {name: value for name, value in scope["headers"] if name == b"accept"}
            is_stream = headers.get(b"accept") == b"text/event-stream"
            kind = "ws" if scope["type"] == "websocket" else "post" if scope["method"] == "POST" else "poll"
            self.asked.append("sse" if is_stream else kind)
            if kind == "ws" and self.blocks_upgrades:
                await send({"type": "websocket.http.response.start", "status": 400, "headers": []})
                await send({"type": "websocket.http.response.body", "body": b""})
            elif kind != "ws" and not self.has_http:
                await send({"type": "http.response.start", "status": 404, "headers": []})
                await send({"type": "http.response.body", "body": b""})
            else:
                await app(scope, receive, self._held_back(send) if is_stream and self.holds_back else send)

        return run

    def _held_back(self, send: Any) -> Any:
        async def hold(event: Any) -> None:
            if self.holds_back == "body" and event["type"] == "http.response.start":
                await send(event)

        return hold

    # The HTTP side.

    async def _get(self, request: Request, channel: str, since: str | None = None, wait: float = 0) -> Response:
        if self._authenticates and request.headers.get("authorization") != "Bearer good":
            raise HTTPException(401)
        if "text/event-stream" in request.headers["accept"]:
            more = [name.rpartition("@")[0] or name for name in request.query_params.getlist("channel")]
            return StreamingResponse(self._events(channel, since, more), media_type="text/event-stream")
        messages: list[Any] = []
        begins = await self.manager.position(channel)
        async with self.manager.listen(channel, since=since or str(begins)) as listener:
            recovered = listener.recovered[channel].recovered
            if wait and recovered:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        messages.append({"type": "message", **await anext(listener)})
        position = messages[-1]["position"] if messages else since if recovered and since else str(begins)
        answer = {"position": position, "recovered": recovered, "messages": messages}
        return Response(json.dumps(answer), media_type="application/json")

    async def _events(self, channel: str, since: str | None, more: list[str]) -> AsyncIterator[str]:
        task = asyncio.current_task()
        assert task is not None
        self.streams.add(task)
        try:
            yield _event({"type": "hello", "id": "x", "version": 1, "ping": 1.0, "reconnect": {"min": 0.2, "max": 2}})
            begins = since or str(await self.manager.position(channel))
            async with self.manager.listen(channel, since=begins) as listener:
                recovered = listener.recovered[channel]
                answer: dict[str, Any] = {"type": "subscribed", "channel": channel, "position": recovered.position}
                yield _event(answer | ({"recovered": recovered.recovered} if since else {}))
                for name in more:
                    kind = (
                        {"type": "error", "code": "forbidden", "text": "no"}
                        if name == "secret"
                        else {"type": "subscribed"}
                    )
                    yield _event({**kind, "channel": name, "id": name})
                if self.closes_streams is not None:
                    yield _event({"type": "close", "code": self.closes_streams, "reason": "because"})
                    return
                async for publication in listener:
                    yield f"id: {publication.position}\n" + _event({"type": "message", **publication})
        finally:
            self.streams.discard(task)

    async def _post(self, request: Request, channel: str) -> Response:
        command = await request.json()
        if command["type"] == "publish":
            await self.manager.broadcast(command["data"], channel=channel)
            return JSONResponse({"type": "published", "channel": channel})
        return JSONResponse({"type": "error", "code": "not_supported", "text": "no"})


def _event(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
