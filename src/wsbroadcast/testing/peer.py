"""A client of an app for tests, without a server and without a network; whatever it waits for has a timeout."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote

from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.exceptions import LifecycleError

App = Callable[[Any, Any, Any], Awaitable[None]]

Event = MutableMapping[str, Any]

# How many of the last messages an error shows, and how much of each.
_SHOWN = 5
_SHOWN_CHARACTERS = 100


class Refused(AssertionError):
    """Raised when the app refuses the handshake: `with pytest.raises(Refused) as refused:`."""

    def __init__(self, path: str, status: int, text: str, code: int | None, reason: str) -> None:
        why = repr(text) if code is None else f"close code {code}, {reason!r}"
        if code == CloseCode.NORMAL and not reason:
            why = f"close code {code}, as of a path that Starlette doesn't know"
        super().__init__(f"the app refused {path} with HTTP status {status}: {why}")
        self.status = status
        """The HTTP status; 403 if the app has closed the WebSocket before it accepted it, as servers make of that."""
        self.text = text
        """The text of the HTTP response."""
        self.code = code
        """The code that the app has closed the WebSocket with; `None` if it has sent an HTTP response."""
        self.reason = reason
        """The reason that came with the code."""


class Peer:
    """A WebSocket client of an app: `async with Peer(app, "/ws/room:1") as peer`.

    It runs in the event loop of the test, and calls the app as a server does. It doesn't run the lifespan of the app,
    so that several clients can share one: `async with app.router.lifespan_context(app):` around them runs it. The block
    begins when the app has accepted. At its end the client leaves, and the app's call has ended; what the app has
    raised is raised there.

    A wait that ends without what it was for raises `TimeoutError`, or `AssertionError` if something else came.

    Args:
        app: FastAPI, Starlette, or any ASGI app.
        path: The path, and perhaps a query.
        headers: What the client sends, such as `{"cookie": "session=…"}`.
        subprotocols: What the client offers, such as `["wsbroadcast.v1"]`.
        state: What the lifespan of the app has yielded.
        timeout: Seconds that everything may take that says nothing else.

    Raises:
        Refused: If the app refuses the handshake; by `async with`.
    """

    def __init__(
        self,
        app: App,
        path: str = "/ws",
        *,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        subprotocols: Sequence[str] = (),
        state: Mapping[str, Any] | None = None,
        timeout: float = 5.0,
    ) -> None:
        if not isinstance(path, str) or not path.startswith("/"):
            raise ValueError(f'a path begins with a slash, such as "/ws", not {path!r:.80}')
        if isinstance(subprotocols, str):
            raise ValueError(f"subprotocols is a list: write subprotocols=[{subprotocols!r:.80}]")
        self.path = path
        """Where it connects to."""
        self.messages: list[str | bytes] = []
        """All messages that came, read or not."""
        self.subprotocol: str | None = None
        """The subprotocol that the app has accepted with."""
        self.close_code: int | None = None
        """The code that the server has closed with; 1006 if it has gone without a word, `None` while it is there."""
        self.close_reason = ""
        """The reason that came with the code."""
        self._app = app
        self._timeout = timeout
        self._scope = _scope(path, headers, list(subprotocols), dict(state or {}))
        self._call: asyncio.Task[None] | None = None
        # What the app is given next.
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._changed = asyncio.Event()
        self._takes = asyncio.Event()
        self._takes.set()
        self._read = 0
        self._is_accepted = self._has_left = False
        # Status and body of an HTTP response to the handshake, and whether that is all of it.
        self._denial: tuple[int, bytearray] | None = None
        self._is_denied = False

    # From the handshake to the end.

    async def __aenter__(self) -> Self:
        __tracebackhide__ = True
        if self._call is not None:
            raise LifecycleError("this Peer has been connected: make another one")
        # A coroutine of our own: apps may return any awaitable.
        self._call = asyncio.create_task(self._run(), name=f"wsbroadcast peer {self.path}")
        self._call.add_done_callback(lambda _: self._changed.set())
        try:
            await self._wait(lambda: self._is_accepted or self._is_over, "an answer to the handshake", self._timeout)
            if not self._is_accepted:
                raise await self._refusal()
        except BaseException:
            self._call.cancel()
            await asyncio.wait({self._call}, timeout=self._timeout)
            self._raised()  # so that asyncio doesn't log it
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        self._leave(CloseCode.NORMAL, "")
        try:
            await self._until_call_ends()
        except TimeoutError as late:
            if error is None:
                raise
            error.add_note(str(late))
        if (raised := self._raised()) is not None:
            if error is None:
                raise raised
            if raised is not error.__cause__:
                error.add_note(f"the app raised {raised!r}")

    async def close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """Leave with a close frame; return when the app's call has ended.

        Raises:
            TimeoutError: If it goes on.
        """
        __tracebackhide__ = True
        self._check_connected()
        self._leave(code, reason)
        await self._until_call_ends()

    def vanish(self) -> None:
        """Go without a word, as when a phone loses the network: the app finds out when it sends something.

        The end of the block stands for the server's ping that isn't answered.
        """
        self._check_connected()
        self._has_left = True
        self._takes.set()
        self._changed.set()

    def stall(self) -> None:
        """Take nothing from the app any more: what it sends waits in the app."""
        self._takes.clear()

    def resume(self) -> None:
        """Take what comes again."""
        self._takes.set()

    # What is said and heard.

    async def send(self, message: object) -> None:
        """Send text, bytes, or anything else as JSON.

        Raises:
            AssertionError: If the connection has ended.
            TypeError: If it can't be written as JSON.
        """
        __tracebackhide__ = True
        self._check_connected()
        if self._is_over or self._has_left:
            raise AssertionError(f"{_shown(message)} can't be sent to {self.path}: {self._state()}")
        data = message if isinstance(message, (str, bytes)) else json.dumps(message, separators=(",", ":"))
        self._inbox.put_nowait({"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data})

    async def receive(self, timeout: float | None = None) -> str | bytes:
        """Return the next message.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            AssertionError: If the connection ends before.
            TimeoutError: If none comes.
        """
        __tracebackhide__ = True
        self._check_connected()
        await self._wait(
            lambda: len(self.messages) > self._read or self._is_over or self._has_left, "a message", timeout
        )
        if len(self.messages) == self._read:
            raise AssertionError(f"waited for a message of {self.path}, but {self._state()}") from self._raised()
        self._read += 1
        return self.messages[self._read - 1]

    async def receive_json(self, timeout: float | None = None) -> Any:
        """Return what the JSON of the next message stands for, such as an event of `wsbroadcast.v1`.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            AssertionError: If the message is not JSON, or the connection ends before.
            TimeoutError: If none comes.
        """
        __tracebackhide__ = True
        message = await self.receive(timeout)
        try:
            return json.loads(message)
        except ValueError:
            raise AssertionError(f"waited for JSON of {self.path}, but {_shown(message)} came") from None

    async def expect_nothing(self, timeout: float = 0.1) -> None:
        """Check that neither a message comes nor the end, for so many seconds.

        Raises:
            AssertionError: If something came.
        """
        __tracebackhide__ = True
        self._check_connected()
        try:
            await self._wait(lambda: len(self.messages) > self._read or self._is_over, "", timeout)
        except TimeoutError:
            return
        came = self.messages[self._read :]
        what = f"{', '.join(map(_shown, came[:_SHOWN]))} came" if came else self._state()
        raise AssertionError(f"expected nothing of {self.path} for {timeout:g} s, but {what}") from self._raised()

    async def wait_closed(self, timeout: float | None = None) -> int:
        """Wait until the server has closed, whatever comes before; return the close code.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            AssertionError: If the app has failed.
            TimeoutError: If it doesn't close.
        """
        __tracebackhide__ = True
        self._check_connected()
        await self._wait(lambda: self._is_over or self._has_left, "a close", timeout)
        if self.close_code is None or self._raised() is not None:
            raise AssertionError(f"waited for a close of {self.path}, but {self._state()}") from self._raised()
        return self.close_code

    # What the app calls.

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._give, self._take)
        finally:
            if self._is_accepted and self.close_code is None and not self._has_left:
                self.close_code = ABNORMAL

    async def _give(self) -> Event:
        event = await self._inbox.get()
        if event["type"] == "websocket.disconnect":
            self._inbox.put_nowait(event)  # for who asks again, so that nobody waits for ever
        return event

    async def _take(self, event: Event) -> None:
        if event["type"] != "websocket.accept":
            await self._takes.wait()
        if self._has_left:
            raise OSError("the client has left")
        if self._is_over:
            raise RuntimeError(f"the app sends {event['type']} after the end")
        match event["type"]:
            case "websocket.accept":
                self._is_accepted, self.subprotocol = True, event.get("subprotocol")
            case "websocket.send":
                self.messages.append(event["text"] if event.get("text") is not None else event["bytes"])
            case "websocket.close":
                self.close_code, self.close_reason = event.get("code", CloseCode.NORMAL), event.get("reason") or ""
                self._inbox.put_nowait({"type": "websocket.disconnect", "code": self.close_code})
            case "websocket.http.response.start":
                self._denial = event["status"], bytearray()
            case "websocket.http.response.body" if self._denial is not None:
                self._denial[1].extend(event.get("body", b""))
                self._is_denied = not event.get("more_body", False)
            case kind:
                raise RuntimeError(f"the app sends {kind}, which no WebSocket server takes")
        self._changed.set()

    # What has happened.

    @property
    def _is_over(self) -> bool:
        is_ended = self._call is not None and self._call.done()
        return self.close_code is not None or self._is_denied or is_ended

    def _raised(self) -> BaseException | None:
        call = self._call
        return call.exception() if call is not None and call.done() and not call.cancelled() else None

    def _state(self) -> str:
        if (raised := self._raised()) is not None:
            return f"the app raised {raised!r}"
        if self._has_left:
            return "the client has left"
        if self.close_code == ABNORMAL:
            return "the server went without a close frame: the app's call has ended"
        if self.close_code is not None:
            return f"the server closed with {int(self.close_code)}, {self.close_reason!r}"
        if not self._is_accepted:
            return "the app has neither accepted nor refused the client"
        came = ", ".join(map(_shown, self.messages[-_SHOWN:]))
        return f"the connection is open; {f'the last that came: {came}' if came else 'nothing has come so far'}"

    async def _refusal(self) -> BaseException:
        if self._denial is not None and self._is_denied:
            status, body = self._denial
            refusal = Refused(self.path, status, body.decode(errors="replace"), None, "")
        elif self.close_code is not None:
            refusal = Refused(self.path, 403, "", int(self.close_code), self.close_reason)
        else:
            return self._raised() or AssertionError(f"the app's call ended, and {self._state()}")
        self._leave(ABNORMAL, "")
        await self._until_call_ends()
        return refusal

    def _check_connected(self) -> None:
        if self._call is None:
            raise LifecycleError(f'this Peer isn\'t connected: async with Peer(app, "{self.path}") as peer')

    def _leave(self, code: int, reason: str) -> None:
        if self.close_code is None:
            code = ABNORMAL if self._has_left else code
            self._inbox.put_nowait({"type": "websocket.disconnect", "code": int(code), "reason": reason})
            self._has_left = True
        self._takes.set()
        self._changed.set()

    async def _wait(self, condition: Callable[[], bool], what: str, seconds: float | None) -> None:
        __tracebackhide__ = True
        seconds = self._timeout if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"waited {seconds:g} s for {what} of {self.path}: {self._state()}") from None

    async def _until_call_ends(self) -> None:
        __tracebackhide__ = True
        assert self._call is not None
        try:
            done, _ = await asyncio.wait({self._call}, timeout=self._timeout)
        finally:
            self._call.cancel()  # which does nothing to one that has ended
        if not done:
            await asyncio.wait({self._call}, timeout=self._timeout)
            raise TimeoutError(
                f"the app's call for {self.path} went on {self._timeout:g} s after the client had left, and was "
                "cancelled: does the endpoint wait for something else?"
            )


def _scope(
    path: str, headers: Mapping[str, str] | Iterable[tuple[str, str]], subprotocols: list[str], state: dict[str, Any]
) -> dict[str, Any]:
    raw_path, _, query = path.partition("?")
    sent = {"host": "testserver", "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    if subprotocols:
        sent["sec-websocket-protocol"] = ", ".join(subprotocols)
    given = list(headers.items() if isinstance(headers, Mapping) else headers)
    names = {name.lower() for name, _ in given}
    all_headers = [*((name, value) for name, value in sent.items() if name not in names), *given]
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in all_headers],
        "client": ("testclient", 50000),
        "server": ("testserver", 80),
        "subprotocols": subprotocols,
        "extensions": {"websocket.http.response": {}},
        "state": state,
    }


def _shown(message: object) -> str:
    text = repr(message)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
