"""The demo's app: a small chat on the library's public API, meant to be read as an example."""

import asyncio
import time
from base64 import urlsafe_b64decode
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import PurePath
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wsbroadcast import (
    EVERYONE,
    Access,
    CloseCode,
    Connection,
    ConnectionManager,
    Hook,
    InvalidChannel,
    Limits,
    ManagerDep,
    Presence,
    SlowConsumer,
    connection_dependency,
    create_script_router,
)
from wsbroadcast.demo.comparison import Comparison
from wsbroadcast.demo.messages import (
    Chat,
    ChatLine,
    Counted,
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
    total,
)

# A shorter `send_timeout` than the default of 10 s, so that nobody has to wait for the eviction, and four times the
# default backlog, so that there is time to see it grow.
SLOW_CONSUMER = SlowConsumer(max_backlog_bytes=4 * 1024 * 1024, send_timeout=3.0)

# A tab that floods everyone sends 3,000 messages at once, which the default takes for an attack.
LIMITS = Limits(max_inbound_rate=1_000, inbound_burst=10_000)

# How many visitors are shown by name.
_MAX_ROSTER = 50

# The channel of everybody who has said hello. Its presence says who is here, on all workers. In the other one, workers
# tell each other their counters. A visitor can't name a channel with a space at its beginning.
PEOPLE = " people"
WORKERS = " workers"

# Seconds between two reports of a worker, between two when nothing changes, and until a report is too old.
_TELL_SECONDS = 0.25
_TELL_AGAIN_SECONDS = 2.0
_HOLDS_SECONDS = 5.0

# By this subprotocol, a tab says in its handshake who it is. So it has the same name after a reconnect.
PROFILE = "profile"

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
    """Tells a channel who comes and goes, and the workers how connections ended."""

    async def on_subscribe(self, connection: Connection, channel: str) -> None:
        """Tell the others in the channel."""
        if channel != PEOPLE:
            notice = Notice(event="joined", name=connection.info.name, channel=channel)
            await connection.manager.broadcast(notice, channel=channel, exclude=connection)

    async def on_unsubscribe(self, connection: Connection, channel: str) -> None:
        """Tell the channel. At the end of a connection, the close code says how it ended."""
        if channel != PEOPLE:
            notice = Notice(
                event="left",
                name=connection.info.name,
                channel=channel,
                code=connection.close_code,
                reason=connection.close_reason,
            )
            await connection.manager.broadcast(notice, channel=channel, exclude=connection)

    async def on_disconnect(self, connection: Connection) -> None:
        """Tell the workers of the end."""
        if connection.info is not None:
            ended = Ended(
                id=connection.id,
                name=connection.info.name,
                code=connection.close_code,
                reason=connection.close_reason,
                at=time.time(),
            )
            await connection.manager.broadcast(ended, channel=WORKERS)


class Workers:
    """What the workers know of each other: their counters, and how connections ended.

    Args:
        manager: That of the chat.
    """

    def __init__(self, manager: ConnectionManager) -> None:
        self._manager = manager
        self._name = f"{time.time_ns():x}"
        self._others: dict[str, tuple[float, Counted]] = {}
        self.ended: deque[Ended] = deque(maxlen=6)
        """How the last connections ended, the latest first."""
        manager.background(self.tell)
        manager.background(self.hear)

    async def tell(self) -> None:
        """Send the counters of this worker when they have changed, and otherwise now and then."""
        was_told, told_at = None, 0.0
        while True:
            counted, now = self._counted(), time.monotonic()
            if counted != was_told or now - told_at >= _TELL_AGAIN_SECONDS:
                await self._manager.broadcast(counted, channel=WORKERS)
                was_told, told_at = counted, now
            await asyncio.sleep(_TELL_SECONDS)

    async def hear(self) -> None:
        """Receive what all workers send, this one included."""
        async with self._manager.listen(WORKERS, policy="drop_oldest") as messages:
            async for message in messages:
                if message.data["type"] == "ended":
                    self.ended.appendleft(Ended.model_validate(message.data))
                else:
                    counted = Counted.model_validate(message.data)
                    self._others[counted.worker] = time.monotonic(), counted

    def _counted(self) -> Counted:
        return Counted.of(self._name, self._manager.stats())

    def counted(self) -> list[Counted]:
        """Return the counters of each worker that is alive."""
        since = time.monotonic() - _HOLDS_SECONDS
        others = [counted for name, (at, counted) in self._others.items() if name != self._name and at > since]
        return [self._counted(), *others]


# Who is here.


def shown(connection: Connection[Visitor]) -> dict[str, object]:
    """Return what others see of a visitor."""
    visitor = connection.info
    return {**vars(visitor), "channel": ", ".join(sorted(connection.channels - {PEOPLE}))}


async def people(manager: ConnectionManager) -> list[Guest]:
    """Return who is here, on all workers, in the order in which they came."""
    guests = [Guest(id=member.id, **member.info) for member in await manager.presence(PEOPLE) if member.info]
    return sorted(guests, key=lambda guest: (guest.since, guest.id))


async def show(connection: Connection) -> None:
    """Let others see the new name: what they see of a member is made when it comes, so it comes again."""
    await connection.unsubscribe(PEOPLE)
    await connection.subscribe(PEOPLE)


# The chat.


async def get_naming(request: WebSocket) -> asyncio.Lock:
    """Return the app's lock: visitors get their names one after the other."""
    naming: asyncio.Lock = request.app.state.naming
    return naming


Tab = Annotated[Connection, Depends(connection_dependency(access=Access(subprotocols=(PROFILE,))))]
Naming = Annotated[asyncio.Lock, Depends(get_naming)]


@router.websocket("/ws")
async def chat(connection: Tab, manager: ManagerDep, naming: Naming) -> None:
    """Serve one tab, from its handshake to its end. Pages of other sites are refused."""
    if profile := connection.websocket.scope["subprotocols"][1:]:
        try:
            hello = Hello.model_validate_json(urlsafe_b64decode(profile[0] + "=="))
        except ValueError:  # not base64, or not a profile
            await connection.close(CloseCode.INVALID_DATA, "not a profile of this demo")
            return
        await enter(connection, hello, manager, naming)
    async for message in connection.typed(Hello | Chat | Stall | Flood):
        if isinstance(message, Hello):
            await enter(connection, message, manager, naming)
        elif connection.info is None:
            await connection.close(CloseCode.POLICY_VIOLATION, "say hello first")
        else:
            await pass_on(connection, connection.info, message)


async def enter(connection: Connection, hello: Hello, manager: ConnectionManager, naming: asyncio.Lock) -> None:
    """Give a connection its name and its channel, the only one it stays in."""
    async with naming:
        others = [Visitor(guest.name, guest.hue) for guest in await people(manager) if guest.id != connection.id]
        before: Visitor | None = connection.info
        connection.info = next_visitor(hello.name, before.hue if before else None, others)
        connection.info.since = before.since if before else time.time()
        try:
            await connection.subscribe(hello.channel)
        except InvalidChannel as error:
            await connection.send(Refused(text=str(error)))
        else:
            await connection.unsubscribe(*(connection.channels - {hello.channel, PEOPLE}))
            visitor = connection.info
            await connection.send(Welcome(id=connection.id, name=visitor.name, hue=visitor.hue, channel=hello.channel))
        await show(connection)


async def pass_on(connection: Connection, visitor: Visitor, message: Chat | Stall | Flood) -> None:
    """Broadcast what a tab says: a line to its channel, a flood to everyone."""
    if isinstance(message, Stall):
        visitor.is_stalled = True
        await show(connection)
    elif isinstance(message, Flood):
        # A tab that floods waits for its own messages to come back. This sets the pace, so nothing is awaited here.
        connection.manager.broadcast_nowait(FloodLine(**message.model_dump(), name=visitor.name))
    elif not message.text:
        await connection.send(Refused(text="This message has nothing that can be shown."))
    else:
        for channel in connection.channels - {PEOPLE}:
            line = ChatLine(
                sender=connection.id, name=visitor.name, hue=visitor.hue, channel=channel, text=message.text
            )
            await connection.manager.broadcast(line, channel=channel)


async def get_workers(request: Request) -> Workers:
    """Return what the workers of the app know of each other."""
    workers: Workers = request.app.state.workers
    return workers


@router.api_route("/state", methods=["GET", "HEAD"])
async def state(manager: ManagerDep, workers: Annotated[Workers, Depends(get_workers)]) -> State:
    """Return the counters, who is here, and how the last connections ended, on all workers."""
    roster, counted = await people(manager), workers.counted()
    return State(
        stats=total(counted),
        workers=len(counted),
        roster=roster[:_MAX_ROSTER],
        visitors=len(roster),
        ended=list(workers.ended),
        max_backlog_bytes=SLOW_CONSUMER.max_backlog_bytes,
        send_timeout=SLOW_CONSUMER.send_timeout,
    )


# HEAD as well: programs use it to check that a page is there, and FastAPI doesn't add it by itself.
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
    # These three make the page "cross-origin isolated". Only then it may use shared memory, through which it wakes a
    # stalled worker.
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


def create_app(engine: str = "memory://", *, compares: bool = True) -> FastAPI:
    """Make the demo's app, with a manager of its own.

    Args:
        engine: What links its workers.
        compares: Whether this is the worker that compares. Only one does.
    """
    manager = ConnectionManager(
        engine,
        hooks=[ComingsAndGoings()],
        limits=LIMITS,
        slow_consumer=SLOW_CONSUMER,
        presence={PEOPLE: Presence(by="connection", grace=0, info=shown)},
        sends={"*": ChatLine | Notice, WORKERS: Counted | Ended, EVERYONE: FloodLine},
    )
    comparison = Comparison(SLOW_CONSUMER, is_here=compares)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with manager.lifespan(app), comparison.running():
            yield

    # No pages for the API: they load scripts from elsewhere, which the Content-Security-Policy forbids.
    app = FastAPI(title="wsbroadcast demo", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.workers = Workers(manager)
    app.state.naming = asyncio.Lock()
    app.include_router(comparison.router())
    app.include_router(create_script_router())
    app.include_router(router)
    app.add_middleware(SecurityHeaders)
    return app
