"""The other end of an ASGI WebSocket, in the same event loop. One object is both the client and its server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Generator, Iterable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

from starlette.websockets import WebSocket

from wsbroadcast import Connection, ConnectionManager

TIMEOUT = 5.0
"""Seconds after which something that should have happened is missing."""

Event = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]


class HasLifespan(Protocol):
    """Starlette or FastAPI."""

    router: Any


class Refused(Exception):
    """Raised when the app refuses the handshake. It has the close code, if there was one."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class Peer:
    """A client together with its server. It keeps what the app sends, and gives the app what it receives.

    Args:
        suspends: Whether every `receive` and `send` lets other tasks run first, as real servers may do.
        refuses: Close codes that `send` raises on, as daphne does.
        is_silent: Whether a send after the end succeeds without effect, as on hypercorn, granian and daphne. Otherwise
            it raises `OSError` after the peer's end and `RuntimeError` after a close, as on uvicorn.
        has_both_keys: Whether a received event has both `text` and `bytes`, as on hypercorn.
        can_deny: Whether the server lets the app refuse the handshake with an HTTP response.
    """

    def __init__(
        self,
        path: str = "/ws",
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        subprotocols: Collection[str] = (),
        suspends: bool = False,
        refuses: Collection[int] = (),
        is_silent: bool = False,
        has_both_keys: bool = False,
        can_deny: bool = False,
    ) -> None:
        self.scope: dict[str, Any] = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"testserver"), *headers],
            "client": ("testclient", 50000),
            "server": ("testserver", 80),
            "subprotocols": list(subprotocols),
            "extensions": {"websocket.http.response": {}} if can_deny else {},
            "state": {},
        }
        self.websocket = WebSocket(self.scope, self.receive, self.send)
        """What an endpoint is given, for tests that need no app."""
        self.sent: list[Event] = []
        """Every event that the app sent and the peer took."""
        self.error: BaseException | None = None
        """What the next sends raise."""
        self.error_on_receive: BaseException | None = None
        """What the next receives raise."""
        self.overlaps = 0
        """Sends that began while another one was going on."""
        self.is_gone = False
        """Whether the peer has left."""
        self._suspends = suspends
        self._refuses = refuses
        self._is_silent = is_silent
        self._has_both_keys = has_both_keys
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._takes = asyncio.Event()
        self._takes.set()
        self._sending = 0
        self._news = asyncio.Event()
        # What `sent` has of messages and of a close, so that nobody goes through it for each of a thousand events.
        self._messages: list[str | bytes] = []
        self._close: Event | None = None
        self._read = 0

    # What the server calls.

    async def receive(self) -> Event:
        """Give the app the next event, as a server does."""
        if self.error_on_receive is not None:
            raise self.error_on_receive
        if self._suspends:
            await asyncio.sleep(0)
        return await self._inbox.get()

    async def send(self, event: Event) -> None:
        """Take an event from the app, as a server does."""
        self.overlaps += self._sending > 0
        self._sending += 1
        try:
            await self._take(event)
        finally:
            self._sending -= 1

    async def _take(self, event: Event) -> None:
        if self._suspends:
            await asyncio.sleep(0)
        await self._takes.wait()
        if self.error is not None:
            raise self.error
        if self.is_gone or self.close is not None:
            if self._is_silent:
                return
            if self.is_gone:
                raise OSError("the client disconnected")
            raise RuntimeError(f"unexpected {event['type']} after websocket.close")
        if event["type"] == "websocket.close" and event["code"] in self._refuses:
            raise ValueError("invalid close code")
        self.sent.append(dict(event))
        if event["type"] == "websocket.send":
            self._messages.append(event["text"] if event.get("text") is not None else event["bytes"])
        elif event["type"] == "websocket.close":
            self._close = self.sent[-1]
        self._news.set()

    # What the peer does.

    def say(self, data: str | bytes) -> None:
        """Send the app a message."""
        event: Event = {"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data}
        if self._has_both_keys:
            event = {"text": None, "bytes": None, **event}
        self._inbox.put_nowait(event)

    def leave(self, code: int = 1005, reason: str = "") -> None:
        """Close from the peer's side."""
        self.is_gone = True
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})

    def vanish(self) -> None:
        """Disappear without a close. Only a send notices it."""
        self.is_gone = True

    def stall(self) -> None:
        """Take no more messages."""
        self._takes.clear()

    def resume(self) -> None:
        """Take messages again."""
        self._takes.set()

    # What the peer has seen.

    @property
    def is_stalled(self) -> bool:
        """Whether a send waits for the peer to take it."""
        return self._sending > 0 and not self._takes.is_set()

    @property
    def accepted(self) -> Event | None:
        """The accept event, if there was one."""
        return next((event for event in self.sent if event["type"] == "websocket.accept"), None)

    @property
    def messages(self) -> list[str | bytes]:
        """The messages so far."""
        return self._messages.copy()

    @property
    def close(self) -> Event | None:
        """The close event, if there was one."""
        return self._close

    @property
    def close_code(self) -> int | None:
        """The code of the close event, if there was one."""
        return None if self.close is None else int(self.close["code"])

    @property
    def end(self) -> tuple[int, str] | None:
        """Code and reason of the close event, if there was one."""
        return None if self.close is None else (int(self.close["code"]), self.close.get("reason", ""))

    @property
    def subprotocol(self) -> str | None:
        """The subprotocol that the app has accepted with."""
        assert self.accepted is not None
        return self.accepted["subprotocol"]  # type: ignore[no-any-return]

    @property
    def denial(self) -> tuple[int, str]:
        """Status and text of the HTTP response that has refused the handshake."""
        start, body = self.sent
        return start["status"], body["body"].decode()

    async def next(self) -> str | bytes:
        """Wait for the next message that `next` hasn't returned yet."""
        await self.wait_for(lambda: len(self._messages) > self._read)
        self._read += 1
        return self._messages[self._read - 1]

    async def wait_messages(self, count: int) -> list[str | bytes]:
        """Wait until `count` messages have come; return all."""
        await self.wait_for(lambda: len(self._messages) >= count)
        return self.messages

    async def wait_close(self) -> int:
        """Wait for the close event; return its code."""
        await self.wait_for(lambda: self.close is not None)
        assert self.close_code is not None
        return self.close_code

    async def wait_for(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        """Wait until a condition holds. It is checked after each event of the app."""
        async with asyncio.timeout(timeout):
            while not condition():
                self._news.clear()
                await self._news.wait()


# Helpers.


async def connected(manager: ConnectionManager, count: int, **options: Any) -> list[tuple[Peer, Connection]]:
    """Connect `count` new peers."""
    pairs = []
    for _ in range(count):
        peer = Peer()
        pairs.append((peer, await manager.connect(peer.websocket, **options)))
    return pairs


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110  # whatever changes it sets no event
            await asyncio.sleep(0.001)


async def turns(count: int = 5) -> None:
    """Let all ready tasks run. It is for checks that something does NOT happen."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def lifespan(app: HasLifespan) -> AsyncIterator[None]:
    """Run an app's start and end around a block."""
    async with app.router.lifespan_context(app):
        yield


@asynccontextmanager
async def visit(app: App, path: str, peer: Peer | None = None, **options: Any) -> AsyncIterator[Peer]:
    """Open a WebSocket to an app. After the block the peer has left and the app's call has ended.

    Raises:
        Refused: If the app refuses the handshake.
        Exception: If the app raises it.
    """
    peer = peer or Peer(path, **options)
    call = asyncio.ensure_future(app(peer.scope, peer.receive, peer.send))
    call.add_done_callback(lambda _: peer._news.set())
    try:
        await peer.wait_for(lambda: bool(peer.sent) or call.done())
        if peer.accepted is None:
            async with asyncio.timeout(TIMEOUT):
                await call
            raise Refused(peer.close_code)
        yield peer
    finally:
        if not peer.is_gone:
            peer.leave()
        peer.resume()
        async with asyncio.timeout(TIMEOUT):
            await call


async def refusal(app: App, path: str = "/ws", peer: Peer | None = None, **options: Any) -> int | None:
    """Return the close code with which an app refuses a handshake before it accepts, if it gives one."""
    try:
        async with visit(app, path, peer, **options):
            raise AssertionError("it was accepted")
    except Refused as refused:
        return refused.code


class _Steps:
    """An awaitable that runs another one, and cancels its task when that waits for the n-th time."""

    def __init__(self, awaitable: Awaitable[Any], step: int) -> None:
        self._awaitable = awaitable
        self._step = step
        self.count = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        steps = self._awaitable.__await__()
        try:
            wanted = next(steps)
            while True:
                self.count += 1
                if self.count == self._step:
                    # Scheduled before the task's own next step, so it hits exactly this await.
                    asyncio.get_running_loop().call_soon(task.cancel)
                try:
                    sent = yield wanted
                except GeneratorExit:
                    raise
                except BaseException as error:
                    wanted = steps.throw(error)
                else:
                    wanted = steps.send(sent)
        except StopIteration as end:
            return end.value


async def cancel_at(step: int, awaitable: Awaitable[Any]) -> bool:
    """Run something in a task and cancel it when it waits for the n-th time; return whether it waited that often."""
    steps = _Steps(awaitable, step)

    async def run() -> None:
        await steps

    task = asyncio.ensure_future(run())
    async with asyncio.timeout(TIMEOUT):
        await asyncio.wait({task})
    if not task.cancelled():
        task.result()
    return steps.count >= step
