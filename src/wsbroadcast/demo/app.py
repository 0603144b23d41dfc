"""The demo's app: a small chat on the library's public API, meant to be read as an example."""

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from pydantic import ValidationError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wsbroadcast import (
    CloseCode,
    Connection,
    ConnectionDep,
    ConnectionManager,
    Hook,
    InvalidChannel,
    Limits,
    ManagerDep,
    SlowConsumer,
)
from wsbroadcast.demo.comparison import Comparison
from wsbroadcast.demo.messages import (
    INBOUND,
    Chat,
    ChatLine,
    Ended,
    Flood,
    FloodLine,
    Guest,
    Hello,
    Notice,
    Refused,
    Stall,
    State,
    Visitor,
    Welcome,
    next_visitor,
)

# A shorter `send_timeout` than the default of 10 s, so that nobody has to wait for the eviction, and four times the
# default backlog, so that there is time to see it grow.
SLOW_CONSUMER = SlowConsumer(max_backlog_bytes=4 * 1024 * 1024, send_timeout=3.0)

# A tab that floods everyone sends 3,000 messages at once, which the default takes for an attack.
LIMITS = Limits(max_inbound_rate=1_000, inbound_burst=10_000)

# As many visitors are shown by name.
_MAX_ROSTER = 50

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_ASSETS = {
    file.name: file
    for file in (files("wsbroadcast.demo") / "static").iterdir()
    if PurePath(file.name).suffix in _MEDIA_TYPES
}

router = APIRouter()


class ComingsAndGoings(Hook):
    """Tells a channel who comes and goes, and remembers how connections ended."""

    def __init__(self) -> None:
        self.ended: deque[Ended] = deque(maxlen=6)
        """The latest first."""

    async def on_subscribe(self, connection: Connection, channel: str) -> None:
        """Tell the others in the channel."""
        notice = Notice(event="joined", name=connection.info.name, channel=channel)
        await connection.manager.broadcast(notice, channel=channel, exclude=connection)

    async def on_unsubscribe(self, connection: Connection, channel: str) -> None:
        """Tell the channel; runs at the end of a connection too, and then the code says how it ended."""
        notice = Notice(
            event="left",
            name=connection.info.name,
            channel=channel,
            code=connection.close_code,
            reason=connection.close_reason,
        )
        await connection.manager.broadcast(notice, channel=channel, exclude=connection)

    async def on_disconnect(self, connection: Connection) -> None:
        """Remember the end."""
        if connection.info is not None:
            self.ended.appendleft(
                Ended(
                    id=connection.id,
                    name=connection.info.name,
                    code=connection.close_code,
                    reason=connection.close_reason,
                    at=time.time(),
                )
            )


@router.websocket("/ws")
async def chat(connection: ConnectionDep) -> None:
    """One tab, from its first message to its end; `ConnectionDep` refuses pages of other sites."""
    async for frame in connection:
        try:
            message = INBOUND.validate_json(frame)
        except ValidationError:
            await connection.close(CloseCode.INVALID_DATA, "not a message of this demo")
            return
        if isinstance(message, Hello):
            await enter(connection, message)
        elif connection.info is None:
            await connection.close(CloseCode.POLICY_VIOLATION, "say hello first")
        else:
            await pass_on(connection, connection.info, message)


async def enter(connection: Connection, hello: Hello) -> None:
    """Give a connection its name and its channel, the only one it stays in."""
    others = [other.info for other in connection.manager.connections if other is not connection and other.info]
    connection.info = next_visitor(hello.name, connection.info and connection.info.hue, others)
    try:
        await connection.subscribe(hello.channel)
    except InvalidChannel as error:
        await connection.send(Refused(text=str(error)))
        return
    await connection.unsubscribe(*(connection.channels - {hello.channel}))
    visitor = connection.info
    await connection.send(Welcome(id=connection.id, name=visitor.name, hue=visitor.hue, channel=hello.channel))


async def pass_on(connection: Connection, visitor: Visitor, message: Chat | Stall | Flood) -> None:
    """Broadcast what a tab says: a line to its channel, a flood to everyone."""
    if isinstance(message, Stall):
        visitor.is_stalled = True
    elif isinstance(message, Flood):
        await connection.manager.broadcast(FloodLine(**message.model_dump(), name=visitor.name))
    elif not message.text:
        await connection.send(Refused(text="There is nothing in it that could be shown."))
    else:
        for channel in connection.channels:
            line = ChatLine(
                sender=connection.id, name=visitor.name, hue=visitor.hue, channel=channel, text=message.text
            )
            await connection.manager.broadcast(line, channel=channel)


async def get_comings_and_goings(request: Request) -> ComingsAndGoings:
    """Return the app's hook; it knows how connections ended."""
    hook: ComingsAndGoings = request.app.state.comings_and_goings
    return hook


@router.api_route("/state", methods=["GET", "HEAD"])
async def state(
    manager: ManagerDep, comings_and_goings: Annotated[ComingsAndGoings, Depends(get_comings_and_goings)]
) -> State:
    """Return the counters, who is connected, and how the last ones ended."""
    visitors = [connection for connection in manager.connections if connection.info is not None]
    return State(
        stats=manager.stats(),
        roster=[
            Guest(
                id=connection.id,
                name=connection.info.name,
                hue=connection.info.hue,
                channel=", ".join(sorted(connection.channels)),
                is_stalled=connection.info.is_stalled,
            )
            for connection in visitors[:_MAX_ROSTER]
        ],
        visitors=len(visitors),
        ended=list(comings_and_goings.ended),
        max_backlog_bytes=SLOW_CONSUMER.max_backlog_bytes,
        send_timeout=SLOW_CONSUMER.send_timeout,
    )


# HEAD as well: FastAPI adds it to no route by itself, and programs that look whether a page is there use it.
@router.api_route("/", methods=["GET", "HEAD"])
@router.api_route("/{name}", methods=["GET", "HEAD"])
async def asset(name: str = "index.html") -> Response:
    """Serve the page and what belongs to it."""
    file = _ASSETS.get(name)
    if file is None:
        raise HTTPException(404)
    return Response(file.read_bytes(), headers={"content-type": _MEDIA_TYPES[PurePath(name).suffix]})


_CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",  # the icon
        "connect-src 'self'",
        "worker-src 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
)

_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    # These three make the page "cross-origin isolated". Only then a browser lends it the shared memory through which
    # the page wakes a stalled worker.
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}


class SecurityHeaders:
    """Adds the headers to every HTTP response; WebSockets pass untouched, so that they stay on the fast path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def create_app() -> FastAPI:
    """Make the demo's app, with a manager of its own."""
    hook = ComingsAndGoings()
    manager = ConnectionManager(hooks=[hook], limits=LIMITS, slow_consumer=SLOW_CONSUMER)
    comparison = Comparison(SLOW_CONSUMER)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with manager.lifespan(app), comparison.running():
            yield

    # No pages for the API: they load scripts from elsewhere, which the Content-Security-Policy forbids.
    app = FastAPI(title="wsbroadcast demo", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.comings_and_goings = hook
    app.include_router(comparison.router())
    app.include_router(router)
    app.add_middleware(SecurityHeaders)
    return app
