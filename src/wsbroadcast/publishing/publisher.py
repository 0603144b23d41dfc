"""Publisher: broadcasts from a program that holds no connections, be it async or not."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar
from weakref import WeakSet, finalize

from wsbroadcast.audience import UNSET, Unset, UserId
from wsbroadcast.concurrency.loops import running_loop
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.contract import Engine, Health, transactional
from wsbroadcast.engines.memory import MemoryEngine
from wsbroadcast.exceptions import ConfigurationError, LifecycleError
from wsbroadcast.options import Limits
from wsbroadcast.publication import Publication
from wsbroadcast.publishing.calls import CLOSED, HasEnded, Ticket
from wsbroadcast.publishing.host import Call, Home, OwnHome
from wsbroadcast.signatures import no_dependency

T = TypeVar("T")


@no_dependency("make one at the top of a module, and return it from a function of yours")
class Publisher:
    """Broadcasts to the connections of other processes: from a Celery task, a cron job, a management command, a script.

    Made without any I/O, at import time if you like, and safe to use from several threads and event loops. It connects
    when it is used first, in the event loop where that is; `broadcast_threadsafe`, where none runs, gives it one in a
    thread of its own. Others use the event loop in which it was started, until that closes it. An event loop in which
    it was not is left for a thread of its own as soon as somebody else comes, because it may end without a word. A
    process that was forked off connects for itself.

    Args:
        engine: The URL of a broker, the one that the ConnectionManager of the app has; or an engine of its own.
        limits: How much is too much.

    Raises:
        ConfigurationError: If an option or the URL makes no sense, or names `memory://`, which reaches nobody else.
    """

    def __init__(self, engine: str | Engine, *, limits: Limits = Limits()) -> None:  # noqa: B008  # frozen
        if not isinstance(limits, Limits):
            raise ConfigurationError("limits is a Limits(…)")
        self._engine = create_engine(engine)
        if isinstance(self._engine, MemoryEngine):
            raise ConfigurationError(
                "memory:// reaches this process only, where a Publisher has no connections: give it, and the "
                "ConnectionManager, the URL of a broker, such as redis://localhost"
            )
        self._limits = limits
        # Guards what follows; held for moments only, except while a thread begins.
        self._lock = threading.Lock()
        self._home: Home | None = None
        # The last one that was left; it may be about to end.
        self._left: Home | None = None
        # Whether several use it, of which one has gone or may go at any time: then it lives in a thread of its own.
        self._is_shared = False
        self._abandoning: finalize[[], Publisher] | None = None
        self._starts = 0
        self._is_closed = False
        _publishers.add(self)

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
            ValueError: If the channel (`InvalidChannel`) or user is none; `None` is never "everybody".
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
            await transactional(self._engine).publish_in(transaction, publication)
            return
        await self._run(lambda home, ticket: home.publish(publication, ticket))

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
            LifecycleError: If called outside the event loop that the publisher runs in, which may be one of its own.
        """
        publication = Publication.of(message, channel, user, key, self._limits)
        loop, home = running_loop(), self._home
        if loop is None:
            raise LifecycleError("no event loop runs here: use `broadcast_threadsafe`")
        if home is not None and home.loop is not loop and not home.has_ended:
            raise LifecycleError("the publisher runs in another event loop, or a thread of its own: await `broadcast`")
        if home is None or not home.is_started:
            raise LifecycleError("the publisher isn't started in this event loop: await `start` or `broadcast` first")
        home.publish_nowait(publication)

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
        self._run_threadsafe(
            lambda home, ticket: home.publish(publication, ticket), "broadcast_threadsafe", "broadcast"
        )

    async def health(self) -> Health:
        """Tell whether messages reach the broker and come back."""
        return await self._run(lambda home, ticket: home.health())

    # Life.

    async def start(self) -> None:
        """Connect, unless that has been done. Every `start` wants an `aclose`; only the last one ends it.

        A broker that can't be reached is no error yet, unless the engine was told to fail fast.

        Raises:
            ConfigurationError: If the broker refuses us.
            EngineError: If the engine fails in a way that no broker causes; `EngineUnavailable` if it fails fast.
        """
        with self._counted_start():
            await self._run(lambda home, ticket: home.start(), is_start=True)

    async def aclose(self) -> None:
        """Disconnect; it is closed until the next `start`, be it one that fails.

        Idempotent; does nothing if `start` was called more often.
        """
        home = self._leave()
        if home is None:
            return
        if home.loop is asyncio.get_running_loop():
            await home.end()
        else:
            home.stop()  # now: who is cancelled while all threads are busy never gets to the next line
            await asyncio.to_thread(home.end_threadsafe)

    def close(self) -> None:
        """Disconnect like `aclose`, from a program or a thread without an event loop; blocks until it is done.

        Raises:
            LifecycleError: If the call comes from the event loop that the publisher runs in.
        """
        self._check_not_here("close", "aclose")
        home = self._leave()
        if home is not None:
            home.end_threadsafe()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._check_not_here("with", "async with")
        with self._counted_start():
            self._run_threadsafe(lambda home, ticket: home.start(), "with", "async with")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Publisher {self._engine.name}>"

    # Inside.

    async def _run(self, call: Call[T], *, is_start: bool = False) -> T:
        here = asyncio.get_running_loop()
        while True:
            home = self._find_home(here, is_start=is_start)
            try:
                return await (call(home, Ticket()) if home.loop is here else home.do_elsewhere(call))
            except HasEnded:  # and the call was not made
                self._is_shared = True

    def _run_threadsafe(self, call: Call[T], name: str, instead: str) -> T:
        here = running_loop()
        while True:
            home = self._find_home(here, blocks=True)
            if home.loop is here:
                raise LifecycleError(_blocking(name, instead))
            try:
                return home.do_threadsafe(call)
            except HasEnded:  # as above
                self._is_shared = True

    def _find_home(
        self, here: asyncio.AbstractEventLoop | None, *, is_start: bool = False, blocks: bool = False
    ) -> Home:
        # Where it runs already, if that is safe; else in this event loop, if there is one and it isn't to be blocked;
        # else in one of its own.
        with self._lock:
            if self._is_closed:
                raise LifecycleError(CLOSED)
            home = self._home
            if home is not None and (home.has_ended or not home.serves(here)):
                left = self._leave_home()
                if left is not None:
                    self._is_shared = True
                    left.stop()
            if self._home is None:
                self._home = self._new_home(None if blocks or self._is_shared else here)
            if is_start and self._home.loop is here:
                self._home.starts += 1
            return self._home

    def _new_home(self, loop: asyncio.AbstractEventLoop | None) -> Home:
        if loop is not None:
            return Home(self._engine, loop, self._left)
        home = OwnHome(self._engine, self._left)
        self._abandoning = finalize(self, home.stop)
        self._abandoning.atexit = False
        return home

    def _check_not_here(self, name: str, instead: str) -> None:
        if self._home is not None and self._home.loop is running_loop():
            raise LifecycleError(_blocking(name, instead))

    @contextmanager
    def _counted_start(self) -> Generator[None]:
        # Counted before it is done, so that nobody who leaves meanwhile takes himself for the last.
        with self._lock:
            self._is_closed = False
            self._starts += 1
        try:
            yield
        except BaseException:
            with self._lock:
                self._count_down()
            raise

    def _count_down(self) -> None:
        self._starts = max(0, self._starts - 1)
        if self._home is not None and self._home.loop is running_loop():
            self._home.starts = max(0, self._home.starts - 1)

    def _leave(self) -> Home | None:
        # Returns what has to be ended: by the last one, and by an event loop that leaves while it runs there.
        with self._lock:
            self._count_down()
            if not self._starts and not self._is_closed:
                self._is_closed, self._is_shared = True, False
                return self._leave_home()
            if self._home is not None and self._home.loop is running_loop() and not self._home.starts:
                self._is_shared = True
                return self._leave_home()
            return None

    def _leave_home(self) -> Home | None:
        home, self._home = self._home, None
        self._abandon_nothing()
        if home is None:
            return None
        self._left = home
        if not home.has_ended:
            return home
        home.stop()  # should its event loop run once more
        return None

    def _abandon_nothing(self) -> None:
        if self._abandoning is not None:
            self._abandoning.detach()
            self._abandoning = None

    def _begin_after_fork(self) -> None:
        self._lock = threading.Lock()  # the other may be held for ever, by a thread that exists in the parent only
        _of_parents.extend(home for home in (self._home, self._left) if home is not None)
        self._home = self._left = None
        self._abandon_nothing()


def _blocking(name: str, instead: str) -> str:
    return f"{name} would block the event loop that the publisher runs in: use `{instead}`"


_publishers: WeakSet[Publisher] = WeakSet()

# What a forked process has inherited. It must neither use it nor let it be collected: to close a transport takes its
# socket out of the selector, which is the parent's too (epoll(7): the interest list is shared after a fork).
_of_parents: list[Home] = []


def _begin_all_after_fork() -> None:
    for publisher in _publishers:
        publisher._begin_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_begin_all_after_fork)
