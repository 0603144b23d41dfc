"""Crossing the borders of an event loop: from plain calls, and from threads."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from wsbroadcast.exceptions import LifecycleError

T = TypeVar("T")


def without_waiting(coroutine: Coroutine[Any, Any, T], why: str) -> T:
    """Run a coroutine that is expected to finish without waiting for anything.

    Raises:
        LifecycleError: If it has to wait after all; `why` says what for.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise LifecycleError(f"{why}, and broadcast_nowait can't: await `broadcast`")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if there is one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def wait_in_thread(future: Future[T], loop: asyncio.AbstractEventLoop) -> T:
    """Block until a future of another thread's loop is done.

    Raises:
        LifecycleError: If that loop ends first.
    """
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():
                raise  # the call's own
            if not loop.is_running():
                future.cancel()
                raise LifecycleError("the manager's event loop ended before the call was done") from None
