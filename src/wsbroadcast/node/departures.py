"""What follows when a connection has left: its close frame, its socket, and the hooks that are told."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from wsbroadcast.concurrency import Tasks
from wsbroadcast.connection import Connection, ConnectionState
from wsbroadcast.hooks import HookChain


class Farewells:
    """Says goodbye in tasks of its own: whoever takes a connection out of the registry doesn't wait."""

    def __init__(self, hooks: HookChain, tasks: Tasks) -> None:
        self._hooks = hooks
        self._tasks = tasks

    def close(self, connection: Connection, code: int, reason: str) -> None:
        """Send what waits, then a close frame; `connection.closing` ends when it is out or the peer was given up."""
        # Both now, not when the task begins: whoever closes next finds it closed.
        connection.sink.is_ended = True
        closing = connection.closing = asyncio.get_running_loop().create_future()

        async def close() -> None:
            try:
                await connection.sink.close(code, reason)
            finally:
                if connection.state is ConnectionState.CLOSING:
                    connection.enter(ConnectionState.CLOSED, code, reason)
                closing.set_result(None)
                self.see_off(connection)

        self._tasks.spawn(close(), "close", connection.context)

    def see_off(self, connection: Connection) -> None:
        """Its last word is said: let it go as soon as the server has let go of its socket."""

        async def wait() -> None:
            try:
                await connection.sink.see_off()
            finally:
                connection.let_go()

        if connection.sink.is_freed:
            connection.let_go()
        else:  # whoever called `close` doesn't wait for it, `aclose` does
            self._tasks.spawn(wait(), "see-off", connection.context)

    @contextmanager
    def after(self, connection: Connection) -> Generator[None]:
        """Let the hooks that are told of its coming, in this block, end before they are told of its going."""
        connection.hooks_running += 1
        try:
            yield
        finally:
            connection.hooks_running -= 1
            if not connection.is_open:
                self.tell(connection)

    def tell(self, connection: Connection) -> None:
        """Tell the hooks that it has gone; while one is still told of its coming, the end of that block does."""
        if not connection.hooks_running and (self._hooks.has("on_disconnect") or self._hooks.has("on_unsubscribe")):
            self._tasks.spawn(self._run_hooks(connection), "on_disconnect hooks", connection.context)

    async def _run_hooks(self, connection: Connection) -> None:
        if self._hooks.has("on_unsubscribe"):
            # One budget for all channels: a hook that hangs holds up `on_disconnect` once, not once for each.
            deadline = asyncio.get_running_loop().time() + self._hooks.timeout
            for channel in sorted(connection.channels):
                await self._hooks.observe("on_unsubscribe", connection, channel, deadline=deadline)
        await self._hooks.observe("on_disconnect", connection)
