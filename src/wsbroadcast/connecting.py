"""What `ConnectionManager.connect` returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any

from wsbroadcast.connection import Connection


class Connecting(Coroutine[Any, Any, Connection]):
    """What `ConnectionManager.connect` returns: a coroutine, and an async context manager."""

    __slots__ = ("_connect", "_connection", "_part")

    def __init__(self, connect: Coroutine[Any, Any, Connection], part: Callable[[Connection], Awaitable[None]]) -> None:
        self._connect = connect
        self._part = part

    def __await__(self) -> Generator[Any, None, Connection]:
        return self._connect.__await__()

    # The rest of a coroutine, for `asyncio.create_task`.

    def send(self, value: Any) -> Any:
        """Resume it."""
        return self._connect.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error where it waits."""
        return self._connect.throw(*error)

    def close(self) -> None:
        """Give it up."""
        self._connect.close()

    async def __aenter__(self) -> Connection:
        self._connection = await self._connect
        return self._connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._part(self._connection)  # a server may close as soon as the endpoint returns
