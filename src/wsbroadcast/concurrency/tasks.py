"""The background tasks of a manager: each has a name, an owner, and somebody who awaits its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any

from wsbroadcast.logs import logger


class Tasks:
    """Tasks that end by themselves, each within a timeout of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        # How many are running their first step inside `create_task`, as an eager task factory lets them.
        self._starting = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def includes_current(self) -> bool:
        """Tell whether the caller runs in one of these tasks."""
        return self._starting > 0 or asyncio.current_task() in self._tasks

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], name: str, context: Context | None = None
    ) -> asyncio.Task[None]:
        """Run a coroutine in the background; an error that escapes it is logged.

        Args:
            coroutine: What is to be done.
            name: Of the task, for who looks at the tasks of a process.
            context: The context variables that it sees, such as those of the connection that it is about. By default
                none: nothing of whoever happened to cause it.
        """
        task = self._start(coroutine, name, context)
        task.add_done_callback(_log_error)
        return task

    def begin(self, coroutine: Coroutine[Any, Any, None], name: str, context: Context) -> asyncio.Task[None]:
        """Run a coroutine whose outcome the caller looks at, unless the caller is cancelled."""
        task = self._start(coroutine, name, context)
        task.add_done_callback(_look_at)
        return task

    def _start(self, coroutine: Coroutine[Any, Any, None], name: str, context: Context | None) -> asyncio.Task[None]:
        # A copy, because an eager task factory enters it at once, and it may be the one that is entered now.
        context = Context() if context is None else context.copy()
        self._starting += 1
        try:
            task = asyncio.get_running_loop().create_task(coroutine, name=f"wsbroadcast {name}", context=context)
        finally:
            self._starting -= 1
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def join(self) -> None:
        """Wait until all have ended, those included that they start; except the one that is asking."""
        while pending := self._tasks - {asyncio.current_task()}:
            await asyncio.wait(pending)

    async def cancel(self) -> None:
        """Cut off all that run, and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await self.join()


def _log_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


def _look_at(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # else asyncio complains where the caller was cancelled
