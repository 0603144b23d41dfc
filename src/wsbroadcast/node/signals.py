"""A drain before the server ends: the first SIGTERM or SIGINT goes to the managers first, and then to the server."""

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

# After so many seconds beyond the time of a drain, the signal is passed on to the server, whatever happens.
_GRACE_SECONDS = 1.0


class Drainable(Protocol):
    """What is drained at a signal: the lifecycle of a manager."""

    loop: asyncio.AbstractEventLoop | None

    @property
    def needs_drain(self) -> bool:
        """Whether it runs, and isn't drained yet."""

    def begin_drain(self) -> tuple[asyncio.Task[None], float]:
        """Begin the drain in its event loop; return the task, and how many seconds to wait for it."""


class SignalHandler:
    """Gets signals before the handler of a server does. A process has one, for all of its managers.

    uvicorn closes all sockets right after the signal, and runs the end of the lifespan after that, which is too late
    for a drain. So uvicorn's handler is called when the drain is over, as if the signal had come then.
    """

    def __init__(self) -> None:
        self._managers: WeakSet[Drainable] = WeakSet()
        # The handlers that were there before, by signal.
        self._before: dict[int, Handler] = {}
        # The first signal, until it is passed on: the call of the server's handler, and the managers to drain first.
        self._held: list[Callable[[], Any]] = []
        self._draining: set[Drainable] = set()
        self._is_passing = False

    @property
    def should_exit(self) -> bool:
        """Whether the server has begun to end. sse-starlette looks for an object with this name, to end its streams."""
        return any(getattr(_server_of(handler), "should_exit", False) for handler in self._before.values())

    def attach(self, manager: Drainable) -> None:
        """Drain a manager at a signal, if a known server handles signals. Call it in the manager's event loop.

        A manager that begins after the signal is drained at once. Otherwise it would take connections that nobody
        closes. Nothing is done outside of the main thread, where Python sets no handlers, nor if the handler is of
        something else: of pytest, a notebook, the app itself.
        """
        self._managers.add(manager)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler) and handler != self.handle and _server_of(handler) is not None:
                    self._before[number] = handler
                    self._is_passing = False
                    self._held.clear()
                    with suppress(ValueError):  # in a subinterpreter no handlers can be set
                        signal.signal(number, self.handle)
        if (self._held or self.should_exit) and signal.getsignal(signal.SIGTERM) == self.handle:
            manager.begin_drain()

    def detach(self, manager: Drainable) -> None:
        """Drain a manager no more. The last one puts the old handlers back, unless somebody has replaced ours."""
        self._managers.discard(manager)
        # A manager whose event loop has ended without `aclose` needs no handler either.
        others = any(each.loop is not None and each.loop.is_running() for each in list(self._managers))
        if others or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in self._before.items():
            if signal.getsignal(number) == self.handle:
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal. Pass each later signal on at once.

        A signal handler must not wait for a lock, because its own thread may hold the lock.
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
            except RuntimeError:  # the event loop has just been closed
                self._ended(manager)

    def _begin(self, manager: Drainable) -> None:
        try:
            task, seconds = manager.begin_drain()
        except Exception:
            logger.exception("a drain at a signal failed", extra=about("drain.failed"))
            self._ended(manager)
            return
        # A limit, because the drain may be one that has begun before, and an event loop of another thread may be slow.
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
        with suppress(IndexError):  # another thread or a second signal has passed it on already
            self._held.pop()()


def _server_of(handler: object) -> object | None:
    """Return the server of a handler, if it is a known one: uvicorn's, also under gunicorn, or a subclass."""
    server = getattr(handler, "__self__", None)
    uvicorn = sys.modules.get("uvicorn.server")
    is_known = uvicorn is not None and isinstance(server, uvicorn.Server)
    return server if is_known and getattr(handler, "__name__", "") == "handle_exit" else None


SIGNALS = SignalHandler()
"""The signal handler of this process."""
