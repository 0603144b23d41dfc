"""Publisher: broadcasts from a program that holds no connections, whether it is async or not."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from typing import Any, Self, TypeVar
from weakref import finalize

from wsbroadcast.audience import UNSET, Unset, UserId
from wsbroadcast.concurrency import LoopEnded, LoopThread, Patience, running_loop
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.contract import Engine, Health, transactional
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, LifecycleError
from wsbroadcast.options import Limits, check_positive
from wsbroadcast.publication import Dismissal, Gap, Publication
from wsbroadcast.signatures import no_dependency

T = TypeVar("T")

_LIMITS = Limits()
_CLOSED = "the publisher is closed"

# Seconds between two looks whether the engine has been stopped in the event loop where it ran before.
_LOOK_SECONDS = 0.01


class NullReceiver:
    """What an engine hands its publications to where no connections are; it is subscribed to nothing."""

    def take(self, publication: Publication | Dismissal) -> None:
        """Do nothing."""

    async def deliver(self, publication: Publication | Dismissal) -> None:
        """Do nothing."""

    def gap(self, gap: Gap) -> None:
        """Do nothing."""


class _HasEnded(LifecycleError):
    """Raised by a host that has ended. Nothing was sent; the call may be made at another host."""


class _Host:
    """The engine in one event loop, from its first use there until it is stopped or the loop ends.

    It is made in its event loop. `submit`, `stop`, `join` and the properties are for all threads, the rest is for that
    loop.

    Args:
        engine: An engine that is not started, or that runs at the host before.
        before: The host before. The engine is started here as soon as it no longer runs there.
        start_timeout: Seconds that a call waits for the engine to start. It goes on starting after that.
    """

    def __init__(self, engine: Engine, before: _Host | None, start_timeout: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread: LoopThread[_Host] | None = None
        """The thread that the event loop has to itself; `None` if the loop belongs to the app."""
        self._engine = engine
        self._before = before
        self._start_timeout = start_timeout
        # Whether the engine was started here and not yet stopped, nor started at a later host.
        self._has_engine = False
        self._has_started = False
        self._is_stopped = False
        self._stopping = asyncio.Event()
        # Owned and awaited by `_life`, because the call that began it may be cancelled.
        self._start: asyncio.Task[None] | None = None
        # Awaited by who stops the host; cancelled, with everything else in the loop, when `asyncio.run` ends.
        self._life = self.loop.create_task(self._live(), name="wsbroadcast publisher", context=Context())

    @property
    def has_ended(self) -> bool:
        """Whether it was stopped, or its event loop ends; the loop still runs then, to cancel what is left in it."""
        return self._is_stopped or self._life.done() or self._life.cancelling() > 0 or not self.loop.is_running()

    @property
    def is_over(self) -> bool:
        """Whether the engine no longer runs here, so that it may be started elsewhere."""
        return (self._life.done() or not self.loop.is_running()) and (self._before is None or self._before.is_over)

    @property
    def is_started(self) -> bool:
        """Whether the engine has started, perhaps without its broker, and was not stopped."""
        return self._has_started and not self.has_ended

    async def start(self) -> bool:
        """Start the engine, unless that was done; return whether it has started, or False if it takes longer.

        Raises:
            _HasEnded: If the host has.
            ConfigurationError: If the broker refuses us.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
        """
        if self.has_ended:
            raise _HasEnded(_CLOSED)
        if self._start is None or (self._start.done() and not self._has_started):
            start = self._start_engine()
            self._start = self.loop.create_task(start, name="wsbroadcast publisher start", context=Context())
            # The callers that waited for it may be gone. The next call begins again and sees the error itself.
            self._start.add_done_callback(lambda start: start.cancelled() or start.exception())
        begun = self._start
        if not begun.done():
            with suppress(TimeoutError):
                async with Patience(self._start_timeout):
                    await asyncio.wait([begun])
        if self.has_ended or begun.cancelled():
            raise _HasEnded(_CLOSED)
        if begun.done():
            begun.result()
        return begun.done()

    async def _start_engine(self) -> None:
        if self._before is not None:
            while not self._before.is_over:  # noqa: ASYNC110  # its event loop may end without telling anyone
                await asyncio.sleep(_LOOK_SECONDS)
            self._before._has_engine = False  # in case its event loop runs once more
            self._before = None
        self._has_engine = True
        await self._engine.start(NullReceiver())
        self._has_started = True

    async def publish(self, publication: Publication) -> None:
        """Start if necessary, and return once the engine has taken the publication.

        Raises:
            _HasEnded: If the host has; nothing was sent.
            EngineError: If the broker doesn't take it; `EngineUnavailable` if to try again may help.
        """
        if not (self.is_started or await self.start()):
            raise EngineUnavailable(f"the {self._engine.name} engine finds no broker so quickly; nothing was sent")
        await self._engine.publish(publication)

    async def health(self) -> Health:
        """Tell whether an echo comes back through the broker."""
        if not (self.is_started or await self.start()):
            return Health(self._engine.name, False, "not connected yet")
        return await self._engine.health()

    def submit(self, call: Callable[[_Host], Coroutine[Any, Any, T]]) -> Future[T]:
        """Make a call from another thread; only where the host has a thread of its own.

        Raises:
            _HasEnded: If the host has; the call was not made.
        """
        assert self.thread is not None
        try:
            return self.thread.submit(partial(call, self))
        except LoopEnded:
            raise _HasEnded(_CLOSED) from None

    def stop(self) -> None:
        """Begin to end: what was published goes out, if that is possible quickly, and the engine is stopped."""
        self._is_stopped = True
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._stopping.set)
        if self.thread is not None:
            self.thread.stop(self.wait_ended)

    async def wait_ended(self) -> None:
        """Return when a host that was stopped has ended."""
        await asyncio.shield(self._life)

    def join(self) -> None:
        """Block until a host that was stopped has ended, or its event loop."""
        if self.thread is not None:
            self.thread.join()
        while not self._life.done() and self.loop.is_running():
            time.sleep(_LOOK_SECONDS)

    async def _live(self) -> None:
        await self._stopping.wait()
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        if self._has_engine:
            self._has_engine = False
            await self._engine.aclose()


class _State:
    """What a publisher is in one process. `lock` guards the rest; it is held only briefly.

    Args:
        parent: The same in the process that this one was forked off.
    """

    def __init__(self, parent: _State | None = None) -> None:
        self.lock = threading.Lock()
        # How many `start` are without an `aclose` yet, by the event loop in which they were called, if any.
        self.starts: Counter[asyncio.AbstractEventLoop | None] = Counter(parent.starts if parent else ())
        # Whether it refuses to work until the next start.
        self.is_closed: bool = parent is not None and parent.is_closed
        self.host: _Host | None = None
        # The host before, which may be about to end.
        self.left: _Host | None = None
        # Whether it is used outside of one event loop. Then it runs in a thread of its own until it is closed.
        self.is_shared = False

    def leave(self) -> None:
        """Stop the host, if there is one; the next call gets another."""
        if self.host is not None:
            self.left, self.host = self.host, None
            self.left.stop()

    def leave_ended(self) -> None:
        """Leave the host if it has ended."""
        host = self.host
        if host is not None and host.has_ended:
            # A call that comes while its event loop ends can't begin anew in there.
            self.is_shared = self.is_shared or host.loop is running_loop()
            self.leave()

    def count(self, change: int) -> int:
        """Count a start more or less; return how many are left. Those of event loops that are closed don't count."""
        self.starts = Counter({loop: n for loop, n in self.starts.items() if n and not (loop and loop.is_closed())})
        here = running_loop()
        if change < 0 and not self.starts[here]:
            here = next(iter(+self.starts), None)
        self.starts[here] = max(0, self.starts[here] + change)
        return self.starts.total()


def _abandon(states: dict[int, _State]) -> None:
    if (state := states.get(os.getpid())) is not None:
        state.leave()


@no_dependency("make one at the top of a module, and return it from a function of yours")
class Publisher:
    """Broadcasts to the connections of other processes: from a Celery task, a cron job, a management command, a script.

    It is made without any I/O, at import time if you like, and connects when it is used first. An async program uses it
    in its event loop; event loops may use it one after another, also if one ends without closing it.
    `broadcast_threadsafe` and `with` run it in a thread of its own, which has one event loop. So does a second event
    loop that comes while the first one runs. Any number of threads and event loops may use it there, until it is
    closed. A forked process connects for itself.

    Args:
        engine: The URL of a broker, the same one that the app's ConnectionManager has; or an engine of its own.
        limits: How much is too much.
        start_timeout: Seconds that a call waits for the first connection. It is an error of that call if none is there
            by then; the publisher goes on connecting.

    Raises:
        ConfigurationError: If an option or the URL makes no sense, or the URL is `memory://`, which reaches only this
            process.
    """

    def __init__(self, engine: str | Engine, *, limits: Limits = _LIMITS, start_timeout: float = 2.25) -> None:
        if not isinstance(limits, Limits):
            raise ConfigurationError("limits is a Limits(…)")
        check_positive("start_timeout", start_timeout)
        self._engine = create_engine(engine)
        if isinstance(self._engine, MemoryEngine):
            raise ConfigurationError(
                "memory:// reaches this process only, where a Publisher has no connections: give it, and the "
                "ConnectionManager, the URL of a broker, such as redis://localhost"
            )
        self._limits = limits
        self._start_timeout = start_timeout
        # By process id. A forked process neither uses what it inherits nor lets it be collected: a transport that is
        # closed leaves the selector, which is the parent's as well (epoll(7): the interest list is shared).
        self._states = {os.getpid(): _State()}
        finalize(self, _abandon, self._states).atexit = False

    # Messages.

    async def broadcast(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        key: str | None = None,
        transaction: object = None,
    ) -> None:
        """Send a message to every connection of an audience, on all nodes; to everyone if none is named.

        Returns once the broker has taken it. Connections receive it at most once, in the order in which the broker
        took the messages of the audience.

        Args:
            message: `str` for a text frame, `bytes` for a binary one, anything else is sent as JSON.
            channel: The channel whose subscribers get it.
            user: The user whose connections get it.
            key: What the message is the newest of, for slow consumers under the policy `conflate`.
            transaction: On Postgres, a database connection or session of yours: the message is sent when its
                transaction commits, and never if it is rolled back.

        Raises:
            EncodeError: If the message can't be sent as text, bytes or JSON; nobody gets it.
            ValueError: If `channel` (`InvalidChannel`) or `user` is not valid. `None` is an error, never "everyone".
            EngineUnavailable: If the broker can't be reached, takes no messages now, or no longer lets us publish; or
                if it doesn't answer within 2 s: its text says whether anything may have been sent.
            EngineError: If the broker refuses this very message: to try again doesn't help.
            ConfigurationError: If the broker refuses us when we connect: a wrong password, a missing permission; or if
                the engine can't publish inside a transaction, or in this one.
            LifecycleError: If the publisher is closed.
            Exception: What the driver of the transaction raises.
        """
        publication = Publication.of(message, channel, user, key, self._limits)
        if transaction is not None:  # it belongs to this event loop, wherever our own connection is
            if self._state().is_closed:
                raise LifecycleError(_CLOSED)
            await transactional(self._engine).publish_in(transaction, publication)
            return
        await self._run(lambda host: host.publish(publication))

    def broadcast_nowait(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        key: str | None = None,
    ) -> None:
        """Send a message like `broadcast`, without awaiting anything: for hot loops and plain callbacks.

        If the broker doesn't take it, that is logged.

        Raises:
            EngineUnavailable: If the broker is known to be out of reach, or too much waits for it.
            EncodeError: As for `broadcast`.
            LifecycleError: If the publisher doesn't run in this event loop, because it isn't started, or because
                threads or other event loops use it too.
        """
        publication = Publication.of(message, channel, user, key, self._limits)
        loop, host = running_loop(), self._state().host
        if loop is None:
            raise LifecycleError("no event loop runs here: use `broadcast_threadsafe`")
        if host is not None and host.loop is not loop and not host.has_ended:
            raise LifecycleError("the publisher runs in another event loop, or a thread of its own: await `broadcast`")
        if host is None or not host.is_started:
            raise LifecycleError("the publisher isn't started in this event loop: await `start` or `broadcast` first")
        self._engine.publish_nowait(publication)

    def broadcast_threadsafe(
        self,
        message: object,
        *,
        channel: str | Unset = UNSET,
        user: UserId | Unset = UNSET,
        key: str | None = None,
    ) -> None:
        """Send a message like `broadcast`, from a program or a thread without an event loop.

        Blocks until the broker has taken it. Raises what `broadcast` raises.

        Raises:
            LifecycleError: If the publisher is closed, or the call comes from the event loop that it runs in.
        """
        publication = Publication.of(message, channel, user, key, self._limits)
        self._run_threadsafe(lambda host: host.publish(publication), "broadcast_threadsafe", "broadcast")

    async def health(self) -> Health:
        """Tell whether messages reach the broker and come back."""
        return await self._run(lambda host: host.health())

    # Life.

    async def start(self) -> None:
        """Connect, unless that has been done. Every `start` needs an `aclose`; only the last one ends it.

        A broker that can't be reached is not an error yet, unless the engine was told to fail fast.

        Raises:
            ConfigurationError: If the broker refuses us.
            EngineError: If the engine fails in a way that no broker causes; `EngineUnavailable` if it fails fast.
        """
        with self._counted_start():
            await self._run(lambda host: host.start())

    async def aclose(self) -> None:
        """Disconnect. It is closed until the next `start`, even if that start fails.

        Idempotent; does nothing if `start` was called more often.
        """
        host = self._close()
        if host is not None and host.loop is asyncio.get_running_loop():
            await host.wait_ended()
        elif host is not None:
            await asyncio.to_thread(host.join)

    def close(self) -> None:
        """Disconnect like `aclose`, from a program or a thread without an event loop; blocks until it is done.

        Raises:
            LifecycleError: If the call comes from the event loop that the publisher runs in.
        """
        self._check_not_here("close", "aclose")
        host = self._close()
        if host is not None:
            host.join()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._check_not_here("with", "async with")
        with self._counted_start():
            self._run_threadsafe(lambda host: host.start(), "with", "async with")
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Publisher {self._engine.name}>"

    # Inside.

    def _state(self) -> _State:
        process = os.getpid()
        if process not in self._states:
            parent = list(self._states.values())[-1]
            self._states.setdefault(process, _State(parent))  # atomic: another thread may be here, too
        return self._states[process]

    async def _run(self, call: Callable[[_Host], Coroutine[Any, Any, T]]) -> T:
        here = asyncio.get_running_loop()
        while True:
            host = self._find_host(here)
            with suppress(_HasEnded):  # the call was not made
                if host.loop is here:
                    return await call(host)
                return await asyncio.wrap_future(host.submit(call))

    def _run_threadsafe(self, call: Callable[[_Host], Coroutine[Any, Any, T]], name: str, instead: str) -> T:
        while True:
            self._check_not_here(name, instead)
            host = self._find_host(None)
            with suppress(_HasEnded):  # the call was not made
                future = host.submit(call)
                try:
                    return future.result()
                finally:
                    del future  # an error would hold this frame, which holds the future, which holds the error

    def _find_host(self, here: asyncio.AbstractEventLoop | None) -> _Host:
        # The host for calls from an event loop, or from none. Only a host with a thread of its own serves others than
        # its own event loop, because no other one tells anybody before it ends.
        state = self._state()
        with state.lock:
            if state.is_closed:
                raise LifecycleError(_CLOSED)
            state.leave_ended()
            if state.host is not None and state.host.thread is None and state.host.loop is not here:
                state.is_shared = True
                state.leave()
            new_host = partial(_Host, self._engine, state.left, self._start_timeout)
            if state.host is None and (here is None or state.is_shared):
                thread = LoopThread("wsbroadcast publisher", new_host)
                state.host = thread.made
                state.host.thread = thread
            elif state.host is None:
                state.host = new_host()
            return state.host

    def _check_not_here(self, name: str, instead: str) -> None:
        host = self._state().host
        if host is not None and host.loop is running_loop():
            raise LifecycleError(f"{name} would block the event loop that the publisher runs in: use `{instead}`")

    @contextmanager
    def _counted_start(self) -> Generator[None]:
        # Counted before it is done, so that a concurrent `aclose` does not see itself as the last one.
        state = self._state()
        with state.lock:
            state.is_closed = False
            state.count(+1)
        try:
            yield
        except BaseException:
            with state.lock:
                state.count(-1)
            raise

    def _close(self) -> _Host | None:
        # Count one start less. After the last one, return the host that ends now.
        state = self._state()
        with state.lock:
            if state.count(-1) or state.is_closed:
                return None
            state.is_closed, state.is_shared = True, False
            host = None if state.host is None or state.host.has_ended else state.host
            state.leave()
            return host
