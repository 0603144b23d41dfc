"""An event loop beside that of the test, and the ways in which a loop begins tasks."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

TASK_FACTORIES: list[Any] = [pytest.param(None, id="usual")]
"""Begin a task in the next turn of the event loop, or at once, which came with Python 3.12."""
if sys.version_info >= (3, 12):
    TASK_FACTORIES.append(pytest.param(asyncio.eager_task_factory, id="eager"))


@contextmanager
def loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
