"""What follows when a connection has left: its close frame, its socket, its lease, and the calls of hooks."""

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
    """Ends a connection when the ASGI call of its endpoint ends. It is on the exit stack of that call.

    Args:
        end: Ends the connection. It gets the error of the endpoint, if there is one.
        connection: The connection.
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
        """End the connection. An error of the endpoint passes through."""
        await self._end(self._connection, error)


def code_of(error: BaseException) -> int:
    """Return the close code for a connection whose endpoint has failed with this error."""
    if isinstance(error, Exception):
        error = ungrouped(error, WebSocketException, WebSocketDisconnect)
    code = error.code if isinstance(error, WebSocketException) else CloseCode.INTERNAL_ERROR
    return code if is_sendable(code) else CloseCode.INTERNAL_ERROR


class Departures:
    """Closes connections and waits for their sockets. It does so in tasks, so that nobody else waits."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        # The connections that are being or were closed here, until their sockets are freed. The future is done when the
        # close frame is out, or the peer was given up.
        self._closing: dict[Connection, asyncio.Future[None]] = {}
        # The places of connections until their sockets are freed, if places are counted.
        self._leases: dict[Connection, Lease] = {}
        # Set while somebody waits until no connection is being closed. It is done then.
        self._emptied: asyncio.Future[None] | None = None

    def hold(self, connection: Connection, lease: Lease) -> None:
        """Keep a connection's place until its socket is freed."""
        if lease.needs_release:
            self._leases[connection] = lease

    def release(self, connection: Connection) -> None:
        """Give a connection's place back. It may be called twice."""
        if (lease := self._leases.pop(connection, None)) is not None:
            lease.release()

    def oldest_of(self, user_key: str) -> Connection | None:
        """Return the user's oldest connection that has a place. It may be open, or being closed."""
        return next((connection for connection in self._leases if connection._user_key == user_key), None)

    def close(self, connection: Connection, code: int, reason: str) -> None:
        """Send what waits, then a close frame. `closing` tells when that is out, or the peer was given up."""
        # Both are set now, before the task begins, so that another close finds the connection closed.
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
        """Return the future that is done when a connection's close is; `None` if it isn't closed here, or freed."""
        return self._closing.get(connection)

    def release_when_freed(self, connection: Connection) -> None:
        """Forget a connection as soon as the server has freed its socket. Nothing is sent on it any more."""

        async def wait() -> None:
            try:
                await connection._sink.see_off()
            finally:
                self._let_go(connection)

        if connection._sink.is_freed:
            self._let_go(connection)
        else:  # `aclose` waits for the task, the caller of `close` doesn't
            self._tasks.spawn(wait(), "see-off", connection._transport.context)

    def _let_go(self, connection: Connection) -> None:
        self.release(connection)
        closing = self._closing.get(connection)
        if closing is not None and closing.done():  # else callers that wait for the close still have to find it
            del self._closing[connection]
            if self._emptied is not None and not self._closing and not self._emptied.done():
                self._emptied.set_result(None)
        connection._transport.let_go()

    async def seen_off(self, seconds: float) -> int:
        """Wait at most so many seconds until the sockets of closing connections are freed.

        Returns:
            int: How many connections were cut off then.
        """
        if self._closing:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._emptied}, timeout=seconds)
            self._emptied = None
        late = list(self._closing)
        for connection in late:
            connection._sink.abort()
        if closings := [closing for closing in self._closing.values() if not closing.done()]:
            await asyncio.wait(closings)  # their writers were cancelled, so this is quick
        return len(late)


class Announcements:
    """Calls the hooks for connections that come and go: for each `on_connect` first, then once `on_disconnect`.

    Args:
        hooks: The hooks.
        tasks: Runs calls that nobody waits for.
        leave_channel: Takes a connection out of a channel; returns whether it was in the channel.
    """

    def __init__(self, hooks: HookChain, tasks: Tasks, leave_channel: Callable[[Connection, str], bool]) -> None:
        self._hooks = hooks
        self._tasks = tasks
        self._leave_channel = leave_channel
        # How many calls of hooks run for each connection, if any do.
        self._running: dict[Connection, int] = {}

    async def connected(self, connection: Connection, channels: tuple[str, ...]) -> None:
        """Call `on_connect` for a connection, and `on_subscribe` for each of its channels.

        If this fails, the connection leaves all channels whose `on_subscribe` hasn't begun. For the others
        `on_unsubscribe` is called at its end.

        Raises:
            PermissionDenied: If a hook refuses. The hooks after it aren't called.
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
        """Call `on_subscribe` for a connection and a channel. If this fails, the connection leaves the channel.

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
        """Call `on_unsubscribe` for a connection that has left a channel, and stays."""
        if self._hooks.has("on_unsubscribe"):
            with self._holding(connection):
                await self._hooks.observe("on_unsubscribe", connection, channel)

    def unsubscribed_soon(self, connection: Connection, channels: list[str]) -> None:
        """Call `on_unsubscribe` in a task for channels that a connection has left. Hooks of its end wait for that."""
        if not (channels and self._hooks.has("on_unsubscribe")):
            return
        self._hold(connection)  # now, because the connection may end before the task begins
        told = self._tell_unsubscribed(connection, channels)
        task = self._tasks.spawn(told, "on_unsubscribe hooks", connection._transport.context)
        task.add_done_callback(lambda _: self._release(connection))

    async def _tell_unsubscribed(self, connection: Connection, channels: list[str]) -> None:
        await self._tasks.begun()
        for channel in channels:
            await self._hooks.observe("on_unsubscribe", connection, channel)

    def disconnected(self, connection: Connection) -> None:
        """Call `on_disconnect` in a task, after all other hooks that still run for the connection."""
        is_heard = self._hooks.has("on_disconnect") or self._hooks.has("on_unsubscribe")
        if is_heard and connection not in self._running:
            self._tasks.spawn(self._tell_end(connection), "on_disconnect hooks", connection._transport.context)

    @contextmanager
    def _holding(self, connection: Connection) -> Generator[None]:
        # The hooks of the connection's end wait for the end of this block.
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
        await self._tasks.begun()  # a delivery that found it gone goes on to others before a hook may broadcast
        if self._hooks.has("on_unsubscribe"):
            # All channels have one deadline, so that a hook that hangs delays `on_disconnect` once, not once for each.
            deadline = asyncio.get_running_loop().time() + self._hooks.timeout
            for channel in sorted(connection.channels):
                await self._hooks.observe("on_unsubscribe", connection, channel, deadline=deadline)
        await self._hooks.observe("on_disconnect", connection)
