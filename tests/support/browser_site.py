"""A site for the browser's client: a router, a page, and a proxy that misbehaves."""

# No postponed annotations: FastAPI reads them.

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from fastapi import Depends, FastAPI, Response
from fastapi.responses import HTMLResponse

from tests.support.brokers import Endpoint, free_port
from tests.support.proxy import FaultProxy
from tests.support.servers import serve_here
from wsbroadcast import ClientTiming, ConnectionManager, History, Identity, Presences, TokenFrom, create_router
from wsbroadcast.web.client_script import DIRECTORY

CHANNEL = "room:1"

PAGE = """<!doctype html><title>page</title><link rel="icon" href="data:,">
<script type="module" src="/page.js"></script>"""

# What each test drives: it keeps what the page was told.
SCRIPT = """
import { connect } from "%s"
window.connect = connect
const get = async (path) => (await fetch(path)).json()
window.told = { log: [], states: 0, tokens: 0, status: [], closed: null, errors: [], events: [], presence: [] }
window.start = ({ state, token, ...options } = {}) => {
  const told = window.told
  const ws = window.ws = connect("/ws/room:1", {
    ...options,
    ...(state && { state() { told.states++; told.log.push("state"); return get("/position") } }),
    ...(token && { token() { told.tokens++; return get("/token") } }),
  })
  ws.on("message", ({ data }) => told.log.push(data))
  ws.on("status", (status, closed) => { told.status.push(status); told.closed = closed ?? null })
  ws.on("presence", (event) => told.presence.push(event))
  for (const type of ["subscribed", "gap", "expiring"]) ws.on(type, (event) => told.events.push(event))
  ws.on("error", (error) => told.errors.push(error.code ?? String(error)))
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

    def __init__(
        self,
        directory: Path,
        *,
        is_full: bool = False,
        authenticates: bool = False,
        presence: Presences | None = None,
        **options: Any,
    ) -> None:
        self._directory = directory
        self._is_full = is_full
        self._options = options
        self._authenticates = authenticates
        self._presence = presence
        self.blocks_upgrades = False
        """Whether a proxy answers WebSocket handshakes with 400."""
        self.holds_back = ""
        """What it holds back of server-sent events: `all`, the `body`, or nothing."""
        self.has_http = True
        """Whether the server has another way in than a WebSocket."""
        self.tokens = ["good"]
        """What `/token` gives, the last for ever."""
        self.asked: list[str] = []
        """How the page has come: `ws`, `sse`, `poll`, `post`."""
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
            f"sqlite:///{self._directory}/log{self.log}.db",
            history=History(messages=1000),
            client_timing=TIMING,
            presence=self._presence,
        )
        self._server = AsyncExitStack()
        self.endpoint.port = await self._server.enter_async_context(
            serve_here(self._app(), timeout_graceful_shutdown=1)
        )

    async def end(self) -> None:
        """Stop it: uvicorn closes with 1012."""
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
        app.include_router(create_router(manager, "/ws/{channel}", http=True, **self._options))

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

        return self._proxied(app)

    def _proxied(self, app: Any) -> Any:
        async def run(scope: Any, receive: Any, send: Any) -> None:
            if (way := _way_of(scope)) is None:
                await app(scope, receive, send)
                return
            self.asked.append(way)
            if way == "ws" and self.blocks_upgrades:
                await send({"type": "websocket.http.response.start", "status": 400, "headers": []})
                await send({"type": "websocket.http.response.body", "body": b""})
            elif way != "ws" and not self.has_http:
                await Response(status_code=404)(scope, receive, send)
            elif way == "sse" and self.holds_back:
                await app(scope, receive, self._held_back(send))
            else:
                await app(scope, receive, send)

        return run

    def _held_back(self, send: Any) -> Any:
        async def hold(event: Any) -> None:
            # What a proxy has collected is gone with it.
            if event["type"] == "http.response.start" and self.holds_back == "body":
                await send(event)

        return hold


def _way_of(scope: Any) -> str | None:
    """How a page comes in: `ws`, `sse`, `poll`, `post`; `None` if it asks for something else."""
    if scope["type"] == "websocket":
        return "ws"
    if scope["type"] != "http" or not scope["path"].startswith("/ws/") or scope["path"].endswith(".js"):
        return None
    if scope["method"] == "POST":
        return "post"
    return "sse" if b"text/event-stream" in dict(scope["headers"]).get(b"accept", b"") else "poll"
