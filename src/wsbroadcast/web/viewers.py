"""Viewers: they watch a stream by a request. They hold a place, are written to as they read, and may be sent away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from time import time
from types import TracebackType
from typing import Protocol, Self
from weakref import WeakKeyDictionary

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.delivery.sse import last_event
from wsbroadcast.delivery.uvicorn import find_transport
from wsbroadcast.exceptions import EngineError, StreamNotFound
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.node.admission import Admission
from wsbroadcast.node.core import Core
from wsbroadcast.node.drain import DRAIN
from wsbroadcast.node.streams import Follower
from wsbroadcast.protocols import sse
from wsbroadcast.publication import Position
from wsbroadcast.streams.entries import StreamEntry
from wsbroadcast.transports.http import WrittenStream
from wsbroadcast.transports.refusal import refuse

# How many bytes are written to an event stream at once.
_AT_ONCE = 64 * 1024

_NOT_FOUND = "there is no such stream"


class Dialect(Protocol):
    """The form in which a stream is written as events."""

    def events(self, entries: Sequence[StreamEntry]) -> bytes:
        """Return entries as events."""

    def last(self, code: int, reason: str) -> bytes:
        """Return the last event for a viewer that is sent away before the stream's end."""


class EntriesAsEvents:
    """Writes each entry as JSON, in an event whose id is its position."""

    def events(self, entries: Sequence[StreamEntry]) -> bytes:
        """Return entries as events."""
        return b"".join([sse.event(each.to_json(), b"", each.position) for each in entries])

    def last(self, code: int, reason: str) -> bytes:
        """Return the last event for a viewer that is sent away before the stream's end."""
        return last_event(code, reason)


# An outage is logged once for all routes of a manager.
_THROTTLES: WeakKeyDictionary[Core, Throttle] = WeakKeyDictionary()


class Viewers:
    """The viewers of one router, or of one response.

    Args:
        core: The core of the manager that carries the streams.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._throttle = _THROTTLES.setdefault(core, Throttle())

    @asynccontextmanager
    async def answering(self, websocket: WebSocket) -> AsyncGenerator[None]:
        """Hold a place for a request. If something fails before the response has begun, answer it."""
        try:
            async with self._core.handshake(websocket):
                yield
        except (WebSocketException, WebSocketDisconnect):
            return  # it was answered, or is gone
        except StreamNotFound:
            await refuse(websocket, 404, CloseCode.FORBIDDEN, _NOT_FOUND)
        except EngineError as error:
            if self._throttle.is_due("engine"):
                logger.warning("a stream can't be read now: %s", error, extra=about("stream.unavailable"))
            await refuse(websocket, 503, CloseCode.TRY_AGAIN_LATER, "try again later")

    async def let_in(self, websocket: WebSocket) -> None:
        """Let a viewer in, whom only a drain could keep out.

        Raises:
            LimitExceeded: If the node drains. The viewer was answered.
        """
        if self._admission.drains_until is not None:
            await self._admission.refuse_draining(websocket)
        self._admission.arrived(websocket)  # if a drain begins after this, it leaves the answer to us

    @property
    def _admission(self) -> Admission:
        return self._core.life.node.membership.admission

    @asynccontextmanager
    async def following(
        self,
        websocket: WebSocket,
        id_: str,
        viewer: str | None,
        left: Callable[[], Awaitable[None]],
        *,
        since: Position | None = None,
        expires_at: float | None = None,
    ) -> AsyncGenerator[Follower]:
        """Watch a stream for as long as the peer is there and may watch.

        Args:
            websocket: Stands for the peer.
            id_: The stream's id.
            viewer: The user who watches, as text.
            left: Returns when the peer has left.
            since: The position of the viewer; `None` if it has seen nothing.
            expires_at: Until when it may watch, in seconds since 1970; `None` for no limit.
        """
        loop = asyncio.get_running_loop()
        async with self._core.follow(id_, since, viewer) as follower:
            if self._admission.drains_until is not None:  # a drain has begun since `let_in`
                follower.close(CloseCode.SERVICE_RESTART, DRAIN)
            watch = loop.create_task(_close_when(left, follower), name="wsbroadcast stream viewer")
            timer = None
            if expires_at is not None:
                seconds = max(0.0, expires_at - time())
                timer = loop.call_later(seconds, follower.close, CloseCode.UNAUTHENTICATED, "the token has expired")
            try:
                yield follower
            finally:
                if timer is not None:
                    timer.cancel()
                watch.cancel()
                await asyncio.wait([watch])

    async def write(
        self, stream: WrittenStream, follower: Follower, entries: list[StreamEntry], dialect: Dialect
    ) -> None:
        """Write the entries that have come, and those that come next, until the end.

        Args:
            stream: The response. Its head was sent.
            follower: Watches the stream.
            entries: The entries that have come.
            dialect: The form in which they are written.
        """
        try:
            async with self.watchdog() as dog, self._pinging(follower):
                while entries or not follower.is_over:
                    events = dialect.events(entries) or sse.PING
                    for start in range(0, len(events), _AT_ONCE):  # a server checks before each write if there is room
                        await dog.watch(stream.write(events[start : start + _AT_ONCE]))
                    entries = await follower.take()
                await dog.watch(stream.end(b"" if follower.closing is None else dialect.last(*follower.closing)))
        except OSError:  # also a timeout
            stream.abort()
        finally:
            await stream.wind_up()

    async def send(self, websocket: WebSocket, follower: Follower) -> None:
        """Send the entries that have come, and those that come next, until the end, over an accepted WebSocket."""
        try:
            async with self.watchdog() as dog:
                entries = follower.take_nowait()
                while entries or not follower.is_over:
                    for each in entries:
                        await dog.watch(websocket.send_text(each.to_json().decode()))
                    entries = await follower.take()
                code, reason = follower.closing or (CloseCode.NORMAL, "")
                if websocket.client_state is not WebSocketState.DISCONNECTED:
                    await dog.watch(websocket.close(int(code), reason))
        except OSError:  # also a timeout
            transport = find_transport(websocket._receive)
            if transport is not None:
                transport.abort()

    def watchdog(self) -> Watchdog:
        """Return a watchdog that gives up a peer that reads nothing for too long."""
        return Watchdog(self._core.send_timeout)

    @asynccontextmanager
    async def _pinging(self, follower: Follower) -> AsyncGenerator[None]:
        # One timer for each viewer, however much is written.
        loop, seconds = asyncio.get_running_loop(), self._core.client_timing.stream_ping_interval
        timer: asyncio.TimerHandle

        def ping() -> None:
            nonlocal timer
            quiet = loop.time() - follower.heard_at
            if quiet >= seconds:
                follower.nudge()
                quiet = 0.0
            timer = loop.call_later(seconds - quiet, ping)

        timer = loop.call_later(seconds, ping)
        try:
            yield
        finally:
            timer.cancel()


class Watchdog:
    """Gives up a peer that reads nothing for too long: the block then raises `TimeoutError`.

    There is one timer for the block, however much is written in it.

    Args:
        seconds: How long one write may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._since: float | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._seconds, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    async def watch(self, writing: Awaitable[None]) -> None:
        """Wait for a write to end."""
        self._since = self._loop.time()
        await writing
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        due = now + self._seconds if self._since is None else self._since + self._seconds
        if due <= now:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)


async def _close_when(left: Callable[[], Awaitable[None]], follower: Follower) -> None:
    await left()
    follower.close()
