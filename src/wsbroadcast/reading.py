"""A task that waits inside `receive`, and how to get it out of there."""

from __future__ import annotations

import asyncio


class Reading:
    """A task inside `receive` that may have to be interrupted.

    As `asyncio.timeout` does it: our own cancellation is taken back, anybody else's passes through.
    """

    __slots__ = ("_cancelling", "_is_interrupted", "_is_taken_back", "_task", "before", "throws_away")

    def __init__(self, throws_away: bool, before: Reading | None) -> None:
        self.throws_away = throws_away
        """Whether it only waits for the end, and steps aside for whoever wants the messages."""
        self.before = before
        """The one that began before it and still waits, if another task reads as well."""
        self._task = asyncio.current_task()
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._is_interrupted = False
        self._is_taken_back = False

    def interrupt(self) -> None:
        """Make the task come out of `receive`."""
        if self._task is not None and self._task is not asyncio.current_task() and not self._is_interrupted:
            self._is_interrupted = True
            self._task.cancel()

    def without(self, ended: Reading) -> Reading | None:
        """Return the readings from this one on, without one that has ended."""
        if self is ended:
            return self.before
        if self.before is not None:
            self.before = self.before.without(ended)
        return self

    def take_back(self) -> bool:
        """Undo our own cancellation; return whether it was the only one."""
        if not self._is_interrupted or self._is_taken_back or self._task is None:
            return False
        self._is_taken_back = True
        return self._task.uncancel() <= self._cancelling

    def finish(self) -> None:
        """Undo our own cancellation if `receive` has swallowed it."""
        self.take_back()
