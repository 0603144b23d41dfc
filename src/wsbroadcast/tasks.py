"""The background tasks of a manager: each has a name, an owner, and somebody who awaits its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger("wsbroadcast")


class Tasks:
    """Tasks that end by themselves, each within a timeout of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a coroutine in the background; an error that escapes it is logged."""
        task = asyncio.get_running_loop().create_task(coroutine, name=f"wsbroadcast {name}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
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

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)
