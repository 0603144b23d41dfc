"""A drain before the server ends: the first SIGTERM or SIGINT goes to the managers, and then to the server."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

from wsbroadcast.logs import about, logger

Handler = Callable[[int, FrameType | None], Any]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# What the server is given beyond the time of a drain, whatever happens.
_GRACE_SECONDS = 1.0


class Drainable(Protocol):
    """What is drained at a signal: the life of a manager."""

    loop: asyncio.AbstractEventLoop | None

    @property
    def needs_drain(self) -> bool:
        """Whether it runs and has not been drained yet."""

    def begin_drain(self) -> tuple[asyncio.Task[None], float]:
        """Begin in its event loop; return the task, and the seconds for which somebody may wait for it."""


class SignalHandler:
    """Stands before the signal handler of a server: there is one in a process, for all of its managers.

    uvicorn closes all sockets right after the signal, and runs the lifespan after that: too late for a drain. So its
    handler is called when the drain is over. What follows is as if the signal had come then.
    """

    def __init__(self) -> None:
        self._managers: WeakSet[Drainable] = WeakSet()
        # What was there before, by the signal.
        self._before: dict[int, Handler] = {}
        # The first signal, until it is passed on: the call, and who is drained before.
        self._held: list[Callable[[], Any]] = []
        self._draining: set[Drainable] = set()
        self._is_passing = False

    @property
    def should_exit(self) -> bool:
        """Whether the server has begun to end. sse-starlette finds the server by this name, to end its streams then."""
        return any(getattr(_server_of(handler), "should_exit", False) for handler in self._before.values())

    def attach(self, manager: Drainable) -> None:
        """Drain a manager at a signal, if the handler is a known server's; called in its event loop, in any thread.

        One that begins when the signal has come is drained at once: else it lets people in whom nobody closes.
        Nothing is done in a thread other than the main one, where Python sets no handlers, or where somebody else's
        handler is: pytest's, a notebook's, the app's own.
        """
        self._managers.add(manager)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler != self.handle and _server_of(handler) is not None:
                    self._before[number] = handler
                    self._is_passing = False
                    self._held.clear()
                    with suppress(ValueError):  # a subinterpreter
                        signal.signal(number, self.handle)
        if (self._held or self.should_exit) and signal.getsignal(signal.SIGTERM) == self.handle:
            manager.begin_drain()

    def detach(self, manager: Drainable) -> None:
        """Drain a manager no more; the last one puts back what was there, unless somebody has replaced our handler."""
        self._managers.discard(manager)
        # One whose event loop has ended, without a word, needs no handler either.
        others = any(each.loop is not None and each.loop.is_running() for each in list(self._managers))
        if others or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; pass on each one after that at once.

        A signal handler waits for no lock: its thread may be the one that holds it.
        """
        before = self._before[number]
        managers = [] if self._is_passing else [each for each in list(self._managers) if each.needs_drain]
        self._is_passing = True
        self._held.clear()
        if not managers:
            before(number, frame)
            return
        self._held.append(lambda: before(number, None))
        self._draining = set(managers)
        for manager in managers:
            try:
                assert manager.loop is not None
                manager.loop.call_soon_threadsafe(self._begin, manager)
            except RuntimeError:  # that loop has just been closed
                self._ended(manager)

    def _begin(self, manager: Drainable) -> None:
        try:
            task, seconds = manager.begin_drain()
        except Exception:
            logger.exception("a drain at a signal failed", extra=about("drain.failed"))
            self._ended(manager)
            return
        # However long somebody else's drain takes, which may have begun before, or the event loop of another thread.
        limit = asyncio.get_running_loop().call_later(seconds + _GRACE_SECONDS, self._pass_on)

        def ended(_: asyncio.Task[None]) -> None:
            self._ended(manager)
            if not self._held:
                limit.cancel()

        task.add_done_callback(ended)

    def _ended(self, manager: Drainable) -> None:
        self._draining.discard(manager)
        if not self._draining:
            self._pass_on()

    def _pass_on(self) -> None:
        with suppress(IndexError):  # two threads come to this, or a second signal has been here
            self._held.pop()()


def _server_of(handler: object) -> object | None:
    """Return the server whose handler it is, if its kind is known: uvicorn's, also under gunicorn, or a subclass."""
    server = getattr(handler, "__self__", None)
    uvicorn = sys.modules.get("uvicorn.server")
    is_known = uvicorn is not None and isinstance(server, uvicorn.Server)
    return server if is_known and getattr(handler, "__name__", "") == "handle_exit" else None


SIGNALS = SignalHandler()
"""That of this process."""
