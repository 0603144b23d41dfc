"""Finds the code that blocks the event loop, by its name."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from typing import Any

from wsbroadcast.logs import logger

# A step of a hook that keeps the event loop this many seconds is reported by name.
_BLOCKED_SECONDS = 1.0


class BlockingWatch:
    """Times each step of a hook between two awaits and names the hook that keeps the event loop."""

    def __init__(self, name: str) -> None:
        self._name = name

    @contextmanager
    def step(self) -> Generator[None]:
        """Time what runs inside, which is everything up to the next await."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            if seconds >= _BLOCKED_SECONDS:
                logger.warning(
                    "%s blocked the event loop for %.1f s; run blocking code with asyncio.to_thread",
                    self._name,
                    seconds,
                )


class Stepped:
    """An awaitable that runs another one step by step under a watch (the expansion of `yield from`, PEP 380)."""

    def __init__(self, awaitable: Awaitable[Any], watch: BlockingWatch) -> None:
        self._awaitable = awaitable
        self._watch = watch

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._awaitable.__await__()
        try:
            with self._watch.step():
                wanted = next(steps)
            while True:
                try:
                    sent = yield wanted
                except GeneratorExit:
                    raise
                except BaseException as error:
                    with self._watch.step():
                        wanted = steps.throw(error)
                else:
                    with self._watch.step():
                        wanted = steps.send(sent)
        except StopIteration as end:
            return end.value
