"""What follows when a connection has left: its close frame, its socket, its lease; and what hooks are told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from types import TracebackType

from starlette.exceptions import WebSocketException
from starlette.websockets import WebSocketDisconnect

from wsbroadcast.close_codes import CloseCode, is_sendable
from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, ConnectionState
from wsbroadcast.exceptions import ungrouped
from wsbroadcast.hooks import HookChain
from wsbroadcast.node.admission import Lease


class EndpointGuard:
    """Ends a connection with the ASGI call of its endpoint, on that call's exit stack.

    Args:
        end: Ends it, with an error of the endpoint's if there is one.
        connection: Which.
    """

    __slots__ = ("_connection", "_end")

    def __init__(
        self, end: Callable[[Connection, BaseException | None], Awaitable[None]], connection: Connection
    ) -> None:
        self._end = end
        self._connection = connection

    async def __call__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it; an error of the endpoint's goes on."""
        await self._end(self._connection, error)


def code_of(error: BaseException) -> int:
    """Return the code with which a connection is closed whose endpoint has failed."""
    if isinstance(error, Exception):
        error = ungrouped(error, WebSocketException, WebSocketDisconnect)
    code = error.code if isinstance(error, WebSocketException) else CloseCode.INTERNAL_ERROR
    return code if is_sendable(code) else CloseCode.INTERNAL_ERROR


class Departures:
    """Closes connections and waits for their sockets, in tasks of its own: who takes one out doesn't wait."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        # Those that we close or have closed, until their sockets are freed. Done when the close frame is out, or the
        # peer was given up.
        self._closing: dict[Connection, asyncio.Future[None]] = {}
        # The places of connections, where places are counted, until their sockets are freed.
        self._leases: dict[Connection, Lease] = {}
        # Done when nobody is being closed, while somebody waits for that.
        self._emptied: asyncio.Future[None] | None = None

    def hold(self, connection: Connection, lease: Lease) -> None:
        """Keep a connection's place until its socket is freed."""
        if lease.needs_release:
            self._leases[connection] = lease

    def release(self, connection: Connection) -> None:
        """Give a connection's place back. Idempotent."""
        if (lease := self._leases.pop(connection, None)) is not None:
            lease.release()

    def oldest_of(self, user_key: str) -> Connection | None:
        """Return the user's oldest connection that has a place, be it open or being closed."""
        return next((connection for connection in self._leases if connection._user_key == user_key), None)

    def close(self, connection: Connection, code: int, reason: str) -> None:
        """Send what waits, then a close frame. `closing` tells when it is out or the peer was given up."""
        # Both now, not when the task begins: another close that comes before that finds the connection closed.
        connection._sink.is_ended = True
        closing = self._closing[connection] = asyncio.get_running_loop().create_future()

        async def close() -> None:
            try:
                await connection._sink.close(code, reason)
            finally:
                if connection.state is ConnectionState.CLOSING:
                    connection._enter(ConnectionState.CLOSED, code, reason)
                closing.set_result(None)
                self.release_when_freed(connection)

        self._tasks.spawn(close(), "close", connection._transport.context)

    def closing(self, connection: Connection) -> asyncio.Future[None] | None:
        """Return what ends with our close of a connection; `None` if we don't close it, or its socket is freed."""
        return self._closing.get(connection)

    def release_when_freed(self, connection: Connection) -> None:
        """Let a connection go as soon as the server has let go of its socket. Nothing is sent on it any more."""

        async def wait() -> None:
            try:
                await connection._sink.see_off()
            finally:
                self._let_go(connection)

        if connection._sink.is_freed:
            self._let_go(connection)
        else:  # the caller of `close` doesn't wait for it, `aclose` does
            self._tasks.spawn(wait(), "see-off", connection._transport.context)

    def _let_go(self, connection: Connection) -> None:
        self.release(connection)
        closing = self._closing.get(connection)
        if closing is not None and closing.done():  # else those who wait for the close still have to find it
            del self._closing[connection]
            if self._emptied is not None and not self._closing and not self._emptied.done():
                self._emptied.set_result(None)
        connection._transport.let_go()

    async def seen_off(self, seconds: float) -> int:
        """Wait until the sockets of all that are being closed are freed; then cut off the others, and count them."""
        if self._closing:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._emptied}, timeout=seconds)
            self._emptied = None
        late = list(self._closing)
        for connection in late:
            connection._sink.abort()
        if closings := [closing for closing in self._closing.values() if not closing.done()]:
            await asyncio.wait(closings)  # whose writers were cancelled
        return len(late)


class Announcements:
    """Tells hooks who comes and goes: of each connection its coming first, and its going once, after that.

    Args:
        hooks: Who is told.
        tasks: Runs what nobody waits for.
        leave_channel: Takes a connection out of a channel; returns whether it was in there.
    """

    def __init__(self, hooks: HookChain, tasks: Tasks, leave_channel: Callable[[Connection, str], bool]) -> None:
        self._hooks = hooks
        self._tasks = tasks
        self._leave_channel = leave_channel
        # How many calls of hooks about a connection that was here run, where there are any.
        self._running: dict[Connection, int] = {}

    async def connected(self, connection: Connection, channels: tuple[str, ...]) -> None:
        """Tell that a connection has come, and of each of its channels.

        `on_unsubscribe` is for channels whose `on_subscribe` began. The connection leaves the others if this fails.

        Raises:
            PermissionDenied: If a hook refuses; those after it aren't told.
        """
        if not (self._hooks.has("on_connect") or self._hooks.has("on_subscribe")):
            return
        rest = iter(channels)
        with self._holding(connection):
            try:
                await self._hooks.observe("on_connect", connection)
                if self._hooks.has("on_subscribe"):
                    for channel in rest:
                        await self._hooks.observe("on_subscribe", connection, channel)
            except BaseException:
                for channel in rest:
                    if not self._leave_channel(connection, channel):
                        connection.channels -= {channel}
                raise

    async def subscribed(self, connection: Connection, channel: str) -> None:
        """Tell that a connection was subscribed to a channel; it leaves the channel if this fails.

        Raises:
            PermissionDenied: If a hook refuses.
        """
        if not self._hooks.has("on_subscribe"):
            return
        with self._holding(connection):
            try:
                await self._hooks.observe("on_subscribe", connection, channel)
            except BaseException:
                if self._leave_channel(connection, channel):
                    self.unsubscribed_soon(connection, [channel])
                raise

    async def unsubscribed(self, connection: Connection, channel: str) -> None:
        """Tell that a connection has left a channel, and stays."""
        if self._hooks.has("on_unsubscribe"):
            with self._holding(connection):
                await self._hooks.observe("on_unsubscribe", connection, channel)

    def unsubscribed_soon(self, connection: Connection, channels: list[str]) -> None:
        """Tell in a task that a connection has left channels, and stays; what is told of its end waits for that."""
        if not (channels and self._hooks.has("on_unsubscribe")):
            return
        self._hold(connection)  # now, because it may end before the task begins
        told = self._tell_unsubscribed(connection, channels)
        task = self._tasks.spawn(told, "on_unsubscribe hooks", connection._transport.context)
        task.add_done_callback(lambda _: self._release(connection))

    async def _tell_unsubscribed(self, connection: Connection, channels: list[str]) -> None:
        await self._tasks.begun()
        for channel in channels:
            await self._hooks.observe("on_unsubscribe", connection, channel)

    def disconnected(self, connection: Connection) -> None:
        """Tell that a connection has gone, in a task; after the hooks that are still told of its channels or coming."""
        is_heard = self._hooks.has("on_disconnect") or self._hooks.has("on_unsubscribe")
        if is_heard and connection not in self._running:
            self._tasks.spawn(self._tell_end(connection), "on_disconnect hooks", connection._transport.context)

    @contextmanager
    def _holding(self, connection: Connection) -> Generator[None]:
        # What is told of the connection's end waits for the end of this block.
        self._hold(connection)
        try:
            yield
        finally:
            self._release(connection)

    def _hold(self, connection: Connection) -> None:
        self._running[connection] = self._running.get(connection, 0) + 1

    def _release(self, connection: Connection) -> None:
        self._running[connection] -= 1
        if not self._running[connection]:
            del self._running[connection]
            if not connection.is_open:
                self.disconnected(connection)

    async def _tell_end(self, connection: Connection) -> None:
        await self._tasks.begun()  # a delivery may have found it gone, and goes on to others before a hook broadcasts
        if self._hooks.has("on_unsubscribe"):
            # One budget for all channels: a hook that hangs holds up `on_disconnect` once, not once for each.
            deadline = asyncio.get_running_loop().time() + self._hooks.timeout
            for channel in sorted(connection.channels):
                await self._hooks.observe("on_unsubscribe", connection, channel, deadline=deadline)
        await self._hooks.observe("on_disconnect", connection)
