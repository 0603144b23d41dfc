"""A client of an app for tests, without a server and a network. Everything that it waits for has a timeout."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload
from urllib.parse import unquote

from pydantic_core import PydanticSerializationError, to_jsonable_python

from wsbroadcast.close_codes import ABNORMAL, CloseCode
from wsbroadcast.exceptions import LifecycleError
from wsbroadcast.protocols.events import SUBPROTOCOL
from wsbroadcast.typed.message_types import MessageTypes, shown
from wsbroadcast.typed.mistakes import Invalid

if TYPE_CHECKING:  # older versions of typing_extensions don't have it
    from typing_extensions import TypeForm

T = TypeVar("T")

App = Callable[[Any, Any, Any], Awaitable[None]]

Event = MutableMapping[str, Any]

# How many of the last messages an error shows, and how many characters of each.
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
        """The HTTP status; 403 if the app closed the WebSocket before accepting it, as with a real server."""
        self.text = text
        """The text of the HTTP response."""
        self.code = code
        """The code that the app closed the WebSocket with; `None` if it sent an HTTP response."""
        self.reason = reason
        """The reason that came with the code."""


class Peer:
    """A WebSocket client of an app: `async with Peer(app, "/ws/room:1") as peer`.

    It runs in the event loop of the test, and calls the app like a server. It doesn't run the lifespan of the app, so
    that several clients can share one: put `async with app.router.lifespan_context(app):` around them.

    The block begins when the app has accepted. At its end the client leaves, and the app's call has ended. If the app
    has raised an error, it is raised there.

    A wait that is in vain raises `TimeoutError`, or `AssertionError` if something else came.

    Args:
        app: FastAPI, Starlette, or any ASGI app.
        path: The path, with a query if you like.
        headers: Headers that the client sends, such as `{"cookie": "session=…"}`.
        subprotocols: Subprotocols that the client offers, such as `["wsbroadcast.v1"]`.
        state: The state that the lifespan of the app has yielded.
        timeout: Seconds that each step may take, if it has no timeout of its own.

    Raises:
        Refused: If the app refuses the handshake. `async with` raises it.
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
            raise ValueError(f"subprotocols must be a list: write subprotocols=[{subprotocols!r:.80}]")
        self.path = path
        """The path that it connects to."""
        self.messages: list[str | bytes] = []
        """All messages that came, read or not."""
        self.subprotocol: str | None = None
        """The subprotocol that the app accepted."""
        self.close_code: int | None = None
        """The code that the server closed with; 1006 if it ended without a close frame, `None` while it is open."""
        self.close_reason = ""
        """The reason that came with the code."""
        self._app = app
        self._timeout = timeout
        self._scope = _scope(path, headers, list(subprotocols), dict(state or {}))
        self._call: asyncio.Task[None] | None = None
        # The events for the app, in order.
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._changed = asyncio.Event()
        self._takes = asyncio.Event()
        self._takes.set()
        self._read = 0
        self._is_accepted = self._has_left = False
        # The status and body of an HTTP response to the handshake, and whether it is complete.
        self._denial: tuple[int, bytearray] | None = None
        self._is_denied = False

    # From the handshake to the end.

    async def __aenter__(self) -> Self:
        __tracebackhide__ = True
        if self._call is not None:
            raise LifecycleError("this Peer has been connected: make another one")
        # A coroutine of our own, because an app may return any awaitable.
        self._call = asyncio.create_task(self._run(), name=f"wsbroadcast peer {self.path}")
        self._call.add_done_callback(lambda _: self._changed.set())
        try:
            await self._wait(lambda: self._is_accepted or self._is_over, "an answer to the handshake", self._timeout)
            if not self._is_accepted:
                raise await self._refusal()
        except BaseException:
            self._call.cancel()
            await asyncio.wait({self._call}, timeout=self._timeout)
            self._raised()  # so that asyncio doesn't log the error
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
            TimeoutError: If the app's call goes on.
        """
        __tracebackhide__ = True
        self._check_connected()
        self._leave(code, reason)
        await self._until_call_ends()

    def vanish(self) -> None:
        """Leave without a close frame, like a phone that loses the network. The app notices when it sends something.

        At the end of the block, the app notices too, as if the server's ping had not been answered.
        """
        self._check_connected()
        self._has_left = True
        self._takes.set()
        self._changed.set()

    def stall(self) -> None:
        """Stop reading. What the app sends waits in the app."""
        self._takes.clear()

    def resume(self) -> None:
        """Read again after `stall`."""
        self._takes.set()

    # Sending and receiving.

    async def send(self, message: object) -> None:
        """Send text, bytes, or anything else as JSON: `await peer.send(Say(text="hi"))`.

        What JSON doesn't know, such as a model or a date, is written as pydantic writes it, with the aliases of its
        fields. A peer that speaks `wsbroadcast.v1` sends a model or a dataclass as a command to `publish` it.

        Raises:
            AssertionError: If the connection has ended.
            TypeError: If it can't be written as JSON.
        """
        __tracebackhide__ = True
        self._check_connected()
        if self._is_over or self._has_left:
            raise AssertionError(f"{_shown(message)} can't be sent to {self.path}: {self._state()}")
        if self.subprotocol == SUBPROTOCOL and (is_dataclass(message) or hasattr(message, "__pydantic_serializer__")):
            message = {"type": "publish", "data": message}
        data = message if isinstance(message, (str, bytes)) else _json(message)
        self._inbox.put_nowait({"type": "websocket.receive", "text" if isinstance(data, str) else "bytes": data})

    @overload
    async def receive(self, *, timeout: float | None = None) -> str | bytes: ...
    @overload
    async def receive(self, timeout: float | None, /) -> str | bytes: ...
    @overload
    async def receive(self, expected: TypeForm[T], timeout: float | None = None) -> T: ...
    async def receive(self, expected: Any = None, timeout: float | None = None) -> Any:
        """Return the next message. If a type is given, return it as that type: `await peer.receive(Said)`.

        With a type, a peer that speaks `wsbroadcast.v1` returns the `data` of the next `message`. It ignores other
        events, but not an `error`.

        Args:
            expected: A type that pydantic reads from JSON, such as a model or a union of models.
            timeout: Seconds to wait for it.

        Raises:
            AssertionError: If the connection ends first, or the message is not of the type.
            TimeoutError: If no message comes.
        """
        __tracebackhide__ = True
        if isinstance(expected, (int, float)):
            expected, timeout = None, expected
        if expected is None:
            return await self._next(timeout)
        types: MessageTypes[Any] = MessageTypes.of(expected, "what a peer receives")
        while True:
            message = await self._next(timeout)
            data = message
            if self.subprotocol == SUBPROTOCOL:
                event = json.loads(message)
                if event["type"] not in ("message", "error"):
                    continue
                data = json.dumps(event.get("data"))
            try:
                return types.read(data)
            except Invalid as invalid:
                raise AssertionError(
                    f"waited for {shown(expected)} of {self.path}, but {_shown(message)} came: {invalid.text}"
                ) from None

    async def _next(self, timeout: float | None) -> str | bytes:
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
        """Return the value of the JSON in the next message, such as an event of `wsbroadcast.v1`.

        Args:
            timeout: Seconds to wait for it.

        Raises:
            AssertionError: If the message is not JSON, or the connection ends first.
            TimeoutError: If no message comes.
        """
        __tracebackhide__ = True
        message = await self._next(timeout)
        try:
            return json.loads(message)
        except ValueError:
            raise AssertionError(f"waited for JSON of {self.path}, but {_shown(message)} came") from None

    async def expect_nothing(self, timeout: float = 0.1) -> None:
        """Check that no message comes, and the connection doesn't end, for so many seconds.

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
        """Wait until the server has closed, whatever messages come first; return the close code.

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

    # Called by the app.

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._give, self._take)
        finally:
            if self._is_accepted and self.close_code is None and not self._has_left:
                self.close_code = ABNORMAL

    async def _give(self) -> Event:
        event = await self._inbox.get()
        if event["type"] == "websocket.disconnect":
            self._inbox.put_nowait(event)  # so that the app gets it again if it asks again, and doesn't wait for ever
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

    # The state, for errors.

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
            self._call.cancel()  # does nothing if it has ended
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


def _json(message: object) -> str:
    try:
        return json.dumps(message, separators=(",", ":"), default=partial(to_jsonable_python, by_alias=True))
    except PydanticSerializationError as error:
        raise TypeError(str(error)) from None


def _shown(message: object) -> str:
    text = repr(message)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
