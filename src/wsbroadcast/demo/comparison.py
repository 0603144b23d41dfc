"""The same messages through FastAPI's tutorial class and through ours, while a client of each reads nothing."""

import asyncio
import logging
import os
import secrets
import socket
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Self
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, WebSocket, WebSocketException

from wsbroadcast import CloseCode, Connection, ConnectionManager, Hook, Limits, SlowConsumer, connection_dependency
from wsbroadcast.demo import handwritten
from wsbroadcast.demo.messages import Clock, ClockAnswer, StallClient, StallState, Tick, WakeClient

# A client that stops reading. It uses a real socket, so that the server behaves as with any such client.


_RECEIVE_BUFFER_BYTES = 4096
_HANDSHAKE_TIMEOUT = 5.0
_MAX_ANSWER_BYTES = 16 * 1024

# A masked close frame without a code (RFC 6455, 5.5.1); a key of zeros leaves the empty payload as it is.
_CLOSE_FRAME = b"\x88\x80\x00\x00\x00\x00"


class StalledClient:
    """A WebSocket client that reads the answer to its handshake, and then nothing until it is told to read on.

    Args:
        address: Where the server listens, as an IP address and a port, or what ASGI has instead.
        path: The endpoint's, with its query.

    Raises:
        OSError: If that is not an address.
    """

    def __init__(self, address: tuple[str, int | None] | None, path: str) -> None:
        if address is None or address[1] is None:
            raise OSError("the server has no address to connect to")
        self._address = address
        self._path = path
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        # Set before it connects, because it determines the first window. So the kernel buffers little for this client,
        # and the server soon notices that it reads nothing.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)

    async def connect(self) -> None:
        """Open the connection.

        Raises:
            OSError: If the server can't be reached, doesn't answer, or refuses.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT):
            await loop.sock_connect(self._socket, self._address)
            await loop.sock_sendall(self._socket, self._handshake())
            answer = b""
            while b"\r\n\r\n" not in answer and len(answer) < _MAX_ANSWER_BYTES:
                data = await loop.sock_recv(self._socket, 1024)
                if not data:
                    break
                answer += data
        status = answer.partition(b"\r\n")[0]
        if b" 101 " not in status + b" ":
            raise ConnectionRefusedError(f"the server answered {status.decode('latin-1')!r}")

    def _handshake(self) -> bytes:
        host, port = self._address
        host = f"[{host}]" if ":" in host else host
        key = b64encode(os.urandom(16)).decode()
        return (
            f"GET {self._path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode("latin-1")

    async def read_on(self) -> None:
        """Read, and throw away, whatever comes; returns when the server has closed the connection."""
        loop = asyncio.get_running_loop()
        # With the first window, reading what waits would take many seconds more.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024 * 1024)
        try:
            while await loop.sock_recv(self._socket, 64 * 1024):
                pass
        except ConnectionError:
            pass

    async def leave(self) -> None:
        """Send a close frame, if the server still listens."""
        try:
            await asyncio.get_running_loop().sock_sendall(self._socket, _CLOSE_FRAME)
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _stalled(address: tuple[str, int | None] | None, path: str) -> StalledClient:
    """Connect a client that stalls. It tries again when it reaches a worker that doesn't compare."""
    for attempt in range(_MAX_ATTEMPTS):
        client = StalledClient(address, path)
        try:
            await client.connect()
        except BaseException as error:
            client.close()
            if not isinstance(error, ConnectionRefusedError) or attempt == _MAX_ATTEMPTS - 1:
                raise
        else:
            break
    return client


# The comparison.


logger = logging.getLogger("wsbroadcast.demo")

TICK_SECONDS = 0.1
STALL_SECONDS = 15.0

MAX_CLIENTS = 60
"""Clients in each column. A tab of the page has three."""

_FULL = "enough tabs compare already"

# The close code of a worker that doesn't compare. The page then tries again, and may reach another one. A refused
# handshake would be an error in the browser's console.
OTHER_WORKER = 4421

# How often a client tries again that reaches the wrong worker.
_MAX_ATTEMPTS = 50

# Added to the ticks while a client stalls, so that the buffers between it and the server are full within two seconds.
_PADDING = "." * 16 * 1024

# How many ticks may wait for a broadcast to return: those of a minute. When there are more, the oldest is dropped.
_MAX_WAITING = round(60 / TICK_SECONDS)

# A stalled client that reads again leaves when its column has caught up, and at the latest after this time.
_CATCH_UP_SECONDS = 5.0

_REPORT_SECONDS = 0.5


class Feed:
    """A loop as apps have it: it broadcasts a tick when the broadcast of the previous one has returned."""

    def __init__(self, broadcast: Callable[[Tick], Awaitable[object]]) -> None:
        self._broadcast = broadcast
        self._ticks: asyncio.Queue[Tick] = asyncio.Queue(_MAX_WAITING)

    def put(self, tick: Tick) -> None:
        """Add a tick. The loop broadcasts it in its turn."""
        if self._ticks.full():
            self._ticks.get_nowait()
            self._ticks.task_done()
        self._ticks.put_nowait(tick)

    async def run(self) -> None:
        """Broadcast what is put in, until cancelled."""
        while True:
            tick = await self._ticks.get()
            try:
                await self._broadcast(tick)
            except Exception:
                # The tutorial's class raises when a client has just left. Those after it on the list miss the message.
                logger.debug("a broadcast failed", exc_info=True)
            finally:
                self._ticks.task_done()

    async def caught_up(self) -> None:
        """Return when no tick waits any more."""
        await self._ticks.join()


@dataclass
class Stall:
    """A client of each manager that reads nothing for a while."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    """The endpoints know its two connections by this."""
    started_at: float | None = None
    """When both were connected."""
    is_over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when they are to read on."""
    over_at: float | None = None
    """When they began to read again."""
    ended_at: float | None = None
    """When our manager ended its connection."""
    code: int | None = None
    reason: str = ""
    problem: str = ""
    """Why nobody could be stalled."""
    is_done: bool = False
    """Whether they have left."""

    @property
    def is_on(self) -> bool:
        """Whether nothing is read now."""
        return self.started_at is not None and not self.is_over.is_set()


class Comparison(Hook):
    """Two managers that broadcast the same ticks, and the endpoints for their clients.

    It does nothing while nobody is connected. What waits in it is bounded, and what it starts ends with the app.

    Args:
        slow_consumer: The policy of our manager.
        is_here: Whether this is the worker that compares: the tutorial's class knows no other.
    """

    def __init__(self, slow_consumer: SlowConsumer, *, is_here: bool = True) -> None:
        self._is_here = is_here
        limits = Limits(max_inbound_rate=20.0, inbound_burst=50)
        self.ours = ConnectionManager(hooks=[self], limits=limits, slow_consumer=slow_consumer)
        self.theirs = handwritten.ConnectionManager()
        self._our_feed = Feed(lambda tick: self.ours.broadcast(self._text_of(tick)))
        self._their_feed = Feed(lambda tick: self.theirs.broadcast(self._text_of(tick)))
        self._somebody_came = asyncio.Event()
        self._stall = Stall(is_done=True)
        # Runs the stall.
        self._stalling: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run as long as the app."""
        async with self.ours:
            loops = {"ticks": self._tick(), "our feed": self._our_feed.run(), "their feed": self._their_feed.run()}
            tasks = [asyncio.create_task(loop, name=f"wsbroadcast demo: {name}") for name, loop in loops.items()]
            try:
                yield
            finally:
                tasks += [] if self._stalling is None else [self._stalling]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _tick(self) -> None:
        number = 0
        while True:
            if not self.ours.connections and not self.theirs.active_connections:
                self._somebody_came.clear()
                await self._somebody_came.wait()
            number += 1
            tick = Tick(number=number, at=time.monotonic())
            self._our_feed.put(tick)
            self._their_feed.put(tick)
            await asyncio.sleep(TICK_SECONDS)

    def _text_of(self, tick: Tick) -> str:
        return tick.model_copy(update={"padding": _PADDING} if self._stall.is_on else {}).model_dump_json()

    # The stalled client.

    def stall(self, websocket: WebSocket) -> None:
        """Connect a client to each manager that reads nothing; unless there is one already.

        Args:
            websocket: Somebody's who has found the server.
        """
        if self._stall.is_done:
            self._stall = stall = Stall()
            name = "wsbroadcast demo: stalled client"
            self._stalling = asyncio.create_task(self._run(stall, websocket.scope.get("server")), name=name)

    def wake(self) -> None:
        """Let the stalled client read on."""
        self._stall.is_over.set()

    async def _run(self, stall: Stall, address: tuple[str, int | None] | None) -> None:
        try:
            with (
                await _stalled(address, f"/feed/wsbroadcast?stall={stall.token}") as ours,
                await _stalled(address, f"/feed/handwritten?stall={stall.token}") as theirs,
            ):
                stall.started_at = time.monotonic()
                await self._report_until_over(stall)
                await self._read_on(ours, theirs)
        except OSError as error:
            stall.problem = f"no client could be stalled: {error or type(error).__name__}"
        finally:
            stall.is_over.set()
            stall.is_done = True
        await self._report()

    async def _report_until_over(self, stall: Stall) -> None:
        ends_at = time.monotonic() + STALL_SECONDS
        while stall.is_on and (left := ends_at - time.monotonic()) > 0:
            await self._report()
            with suppress(TimeoutError):
                await asyncio.wait_for(stall.is_over.wait(), min(left, _REPORT_SECONDS))
        stall.is_over.set()
        stall.over_at = time.monotonic()
        await self._report()

    async def _read_on(self, *clients: StalledClient) -> None:
        reading = [asyncio.create_task(client.read_on()) for client in clients]
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._their_feed.caught_up(), _CATCH_UP_SECONDS)
            for client in clients:
                await client.leave()
            await asyncio.wait(reading, timeout=1)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    async def on_disconnect(self, connection: Connection) -> None:
        """Remember how our manager ended the stalled connection, and tell the others."""
        if connection.info is not None and connection.info.is_on:
            stall: Stall = connection.info
            stall.ended_at, stall.code, stall.reason = time.monotonic(), connection.close_code, connection.close_reason
            await self._report()

    async def _report(self) -> None:
        await self.ours.broadcast(self._state())

    def _state(self) -> StallState:
        stall = self._stall
        return StallState(
            phase="idle" if stall.is_done else "stalled" if stall.is_on else "busy",
            started_at=stall.started_at,
            over_at=stall.over_at,
            seconds=STALL_SECONDS,
            ended_at=stall.ended_at,
            code=stall.code,
            reason=stall.reason,
            waiting_bytes=self.ours.stats().backlog_bytes,
            problem=stall.problem,
        )

    # The endpoints.

    def router(self) -> APIRouter:
        """Return an endpoint for the clients of each manager."""
        router = APIRouter()
        OurConnection = Annotated[Connection, Depends(connection_dependency(self.ours))]  # noqa: N806  # a type

        @router.websocket("/feed/wsbroadcast", dependencies=[Depends(self._check_worker)])
        async def of_ours(connection: OurConnection) -> None:
            connection.info = self._stall_of(connection.websocket)
            if not self._is_here:
                await connection.close(OTHER_WORKER)
                return
            if len(self.ours.connections) > MAX_CLIENTS and connection.info is None:
                await connection.close(CloseCode.TRY_AGAIN_LATER, _FULL)
                return
            self._somebody_came.set()
            await connection.send(self._state())
            async for command in connection.typed(Clock | StallClient | WakeClient):
                await self._obey(connection, command)

        @router.websocket("/feed/handwritten", dependencies=[Depends(_check_origin), Depends(self._check_worker)])
        async def of_theirs(websocket: WebSocket) -> None:
            stall = self._stall_of(websocket)
            if not self._is_here:
                await websocket.accept()
                await websocket.close(OTHER_WORKER)
                return
            if len(self.theirs.active_connections) >= MAX_CLIENTS and stall is None:
                await websocket.accept()
                await websocket.close(CloseCode.TRY_AGAIN_LATER, _FULL)
                return
            await self.theirs.connect(websocket)
            try:
                self._somebody_came.set()
                while (await websocket.receive())["type"] != "websocket.disconnect":
                    pass
            finally:
                self.theirs.disconnect(websocket)
                if stall is not None:
                    stall.is_over.set()  # it has left, or the server ends, and must not wait for it

        return router

    async def _check_worker(self, websocket: WebSocket) -> None:
        if not self._is_here and "stall" in websocket.query_params:
            raise WebSocketException(CloseCode.POLICY_VIOLATION)

    def _stall_of(self, websocket: WebSocket) -> Stall | None:
        token = websocket.query_params.get("stall", "")
        return self._stall if secrets.compare_digest(token.encode(), self._stall.token.encode()) else None

    async def _obey(self, connection: Connection, command: Clock | StallClient | WakeClient) -> None:
        if isinstance(command, Clock):
            await connection.send(ClockAnswer(sent=command.sent, at=time.monotonic()))
        elif isinstance(command, StallClient):
            self.stall(connection.websocket)
        else:
            self.wake()


async def _check_origin(websocket: WebSocket) -> None:
    # As our own endpoint does it: a page of another site may not connect.
    origin = websocket.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != websocket.headers.get("host", "").lower():
        raise WebSocketException(CloseCode.POLICY_VIOLATION)
