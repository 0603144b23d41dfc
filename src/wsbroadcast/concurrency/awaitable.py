"""A coroutine that is an async context manager, too."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class AwaitableContext(Coroutine[Any, Any, T], Generic[T]):
    """Await it for its result; or use it with `async with`, which gives the result and does something at the end.

    Args:
        coroutine: Gives the result.
        leave: Awaited with the result at the end of the block.
    """

    __slots__ = ("_coroutine", "_leave", "_result")

    def __init__(self, coroutine: Coroutine[Any, Any, T], leave: Callable[[T], Awaitable[None]]) -> None:
        self._coroutine = coroutine
        self._leave = leave

    def __await__(self) -> Generator[Any, None, T]:
        return self._coroutine.__await__()

    # The rest of a coroutine, for `asyncio.create_task`.

    def send(self, value: Any) -> Any:
        """Resume it."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an error where it waits."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """Give it up."""
        self._coroutine.close()

    async def __aenter__(self) -> T:
        self._result = await self._coroutine
        return self._result

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave(self._result)
