"""Hosts: where a publisher runs, in an event loop of the app or in a thread of its own, one after another."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from functools import partial
from typing import Any, TypeVar

from wsbroadcast.asking import Question
from wsbroadcast.audience import Audience
from wsbroadcast.concurrency import LoopEnded, LoopThread, Patience, Tasks, running_loop
from wsbroadcast.engines.contract import Engine, Health, KeepsHistory, keeps_history, publish_all
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError
from wsbroadcast.history import Appended, HistoryRules, check_key
from wsbroadcast.message import JSONDefault
from wsbroadcast.publication import Control, Gap, Publication
from wsbroadcast.streams.ledger import REQUESTS, can_stream
from wsbroadcast.streams.producers import Producers

T = TypeVar("T")

CLOSED = "the publisher is closed"
"""The text of the error after the end."""

# Between two attempts to read the requests to streams.
_READ_AGAIN_SECONDS = 0.5

# Seconds between two checks whether the engine has stopped in the event loop where it ran before.
_LOOK_SECONDS = 0.01


class Inbox:
    """Receives publications from an engine in a process without connections. It only passes on requests to streams.

    Args:
        engine: The engine that brings them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # By audience: where its publications go. `None` in a queue means that something may have been missed.
        self._queues: dict[Audience, asyncio.Queue[Publication | None]] = {}

    @asynccontextmanager
    async def listen(self, audience: Audience) -> AsyncIterator[AsyncIterator[Publication]]:
        """Yield what is in the log of an audience, and what comes next. Some of it may come more than once."""
        queue = self._queues[audience] = asyncio.Queue()
        queue.put_nowait(None)
        try:
            self._engine.subscribe((audience,))
            await self._engine.confirmed((audience,))
            yield self._publications(audience, queue)
        finally:
            del self._queues[audience]
            self._engine.unsubscribe((audience,))

    async def _publications(
        self, audience: Audience, queue: asyncio.Queue[Publication | None]
    ) -> AsyncIterator[Publication]:
        while True:
            publication = await queue.get()
            if publication is not None:
                yield publication
                continue
            try:
                replay = await keeps_history(self._engine).read(audience, None, REQUESTS)
            except EngineUnavailable:
                await asyncio.sleep(_READ_AGAIN_SECONDS)
                queue.put_nowait(None)
                continue
            for each in replay.publications:
                yield each

    def _look(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(None)

    def take(self, publication: Publication | Control) -> None:
        """Pass on a publication that somebody listens to."""
        if self._queues and isinstance(publication, Publication):
            queue = self._queues.get(publication.audience)
            if queue is not None:
                queue.put_nowait(publication)

    async def deliver(self, publication: Publication | Control) -> None:
        """Do nothing: there are no connections."""

    def gap(self, gap: Gap) -> None:
        """Read the logs again, because something may have been missed."""
        self._look()

    def suspect(self) -> None:
        """Read the logs again, because something may have been missed."""
        self._look()


class HasEnded(LifecycleError):
    """Raised by a host that has ended. Nothing was sent, and the call may be made at another host."""


class Host:
    """The engine in one event loop, from its first use there until it is stopped or the loop ends.

    It must be made in its event loop. `submit`, `stop`, `join` and the properties may be used in all threads, the rest
    only in that loop.

    Args:
        engine: An engine that is not started, or that still runs at the previous host.
        before: The previous host. The engine is started here as soon as it no longer runs there.
        start_timeout: Seconds that a call waits for the engine to start. After that it goes on starting.
        json_default: Writes what JSON doesn't know, in streams.
    """

    def __init__(
        self, engine: Engine, before: Host | None, start_timeout: float, json_default: JSONDefault | None = None
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread: LoopThread[Host] | None = None
        """The thread that runs the event loop; `None` if the loop belongs to the app."""
        self._engine = engine
        self._inbox = Inbox(engine)
        self._json_default = json_default
        # The streams that are produced here; `None` before the first one.
        self._producers: Producers | None = None
        self._lease: LeaseKeeper | None = None
        self._tasks = Tasks()
        self._before = before
        self._start_timeout = start_timeout
        # Whether the engine was started here, and neither stopped since nor started at a later host.
        self._has_engine = False
        self._has_started = False
        self._is_stopped = False
        self._stopping = asyncio.Event()
        # `_life` owns and awaits it, because the call that began it may be cancelled.
        self._start: asyncio.Task[None] | None = None
        # Awaited by the code that stops the host. `asyncio.run` cancels it at its end, like all tasks of the loop.
        self._life = self.loop.create_task(self._live(), name="wsbroadcast publisher", context=Context())

    @property
    def has_ended(self) -> bool:
        """Whether it was stopped, or its event loop is ending and only runs to cancel what is left in it."""
        return self._is_stopped or self._life.done() or self._life.cancelling() > 0 or not self.loop.is_running()

    @property
    def is_over(self) -> bool:
        """Whether the engine no longer runs here. Then it may be started elsewhere."""
        return (self._life.done() or not self.loop.is_running()) and (self._before is None or self._before.is_over)

    @property
    def is_started(self) -> bool:
        """Whether the engine has started, perhaps without its broker, and was not stopped."""
        return self._has_started and not self.has_ended

    async def start(self) -> bool:
        """Start the engine, unless that was done. Return whether it has started: False if that takes longer.

        Raises:
            HasEnded: If the host has.
            ConfigurationError: If the broker refuses us.
            EngineUnavailable: If the broker can't be reached and the engine fails fast.
        """
        if self.has_ended:
            raise HasEnded(CLOSED)
        if self._start is None or (self._start.done() and not self._has_started):
            start = self._start_engine()
            self._start = self.loop.create_task(start, name="wsbroadcast publisher start", context=Context())
            # The callers that waited for it may be gone. The next call begins anew and sees its own error.
            self._start.add_done_callback(lambda start: start.cancelled() or start.exception())
        begun = self._start
        if not begun.done():
            with suppress(TimeoutError):
                async with Patience(self._start_timeout):
                    await asyncio.wait([begun])
        if self.has_ended or begun.cancelled():
            raise HasEnded(CLOSED)
        if begun.done():
            begun.result()
        return begun.done()

    async def _start_engine(self) -> None:
        if self._before is not None:
            while not self._before.is_over:  # noqa: ASYNC110  # its event loop may end without telling anybody
                await asyncio.sleep(_LOOK_SECONDS)
            self._before._has_engine = False  # in case its event loop runs once more
            self._before = None
        self._has_engine = True
        await self._engine.start(self._inbox)
        self._has_started = True

    async def publish(
        self, publications: Sequence[Publication | Control], key: str | None = None
    ) -> dict[Audience, Appended]:
        """Start if necessary; return once the engine has taken the publications, with what it has kept by audience.

        Raises:
            HasEnded: If the host has ended. Then nothing was sent.
            EngineError: If the broker doesn't take it; `EngineUnavailable` if a retry may help.
            ConfigurationError: If there is a key for an audience without a history.
        """
        rules = await self.rules()
        if key is not None:
            if rules is None and not (health := await self._engine.health()).is_ok:
                raise EngineUnavailable(f"it isn't known what is kept: {health.detail}; nothing was sent")
            check_key(key, rules, [each.audience for each in publications])
        return await publish_all(self._engine, publications, rules, key)

    async def rules(self) -> HistoryRules | None:
        """Start if necessary, and return what is kept, as far as it is known.

        Raises:
            HasEnded: If the host has ended.
            EngineUnavailable: If the engine doesn't start within the timeout.
        """
        if not (self.is_started or await self.start()):
            raise EngineUnavailable(f"the {self._engine.name} engine finds no broker so quickly; nothing was sent")
        return self._engine.rules if isinstance(self._engine, KeepsHistory) else None

    async def ask(self, question: Question[T]) -> T:
        """Start if necessary; ask the engine something about what is kept.

        Raises:
            HasEnded: If the host has ended.
            EngineUnavailable: If the broker can't be asked.
        """
        return await question(self._engine, await self.rules())

    async def producers(self) -> Producers:
        """Start if necessary; return the object that produces streams here.

        Raises:
            HasEnded: If the host has ended.
            ConfigurationError: If the engine can't carry streams.
            EngineUnavailable: If the engine doesn't start within the timeout.
        """
        await self.rules()
        await self._engine.ready_to_keep()
        if self._producers is None:
            _, lessor = can_stream(self._engine)
            self._lease = LeaseKeeper(lessor, self._tasks)
            self._producers = Producers(self._engine, self._lease, self._inbox, self._json_default)
        return self._producers

    async def health(self) -> Health:
        """Return whether an echo comes back through the broker."""
        if not (self.is_started or await self.start()):
            return Health(self._engine.name, False, "not connected yet")
        return await self._engine.health()

    def submit(self, call: Callable[[Host], Coroutine[Any, Any, T]]) -> Future[T]:
        """Make a call from another thread. Only for a host with a thread of its own.

        Raises:
            HasEnded: If the host has ended. Then the call was not made.
        """
        assert self.thread is not None
        try:
            return self.thread.submit(partial(call, self))
        except LoopEnded:
            raise HasEnded(CLOSED) from None

    def stop(self) -> None:
        """Begin to end: send what was published, if that is possible quickly, and stop the engine. Returns at once."""
        self._is_stopped = True
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._stopping.set)
        if self.thread is not None:
            self.thread.stop(self.wait_ended)

    async def wait_ended(self) -> None:
        """Return when the host, which was stopped, has ended."""
        await asyncio.shield(self._life)

    def join(self) -> None:
        """Block until the host, which was stopped, or its event loop has ended."""
        if self.thread is not None:
            self.thread.join()
        while not self._life.done() and self.loop.is_running():
            time.sleep(_LOOK_SECONDS)

    async def _live(self) -> None:
        await self._stopping.wait()
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        if self._producers is not None:
            await self._producers.aclose()
        if self._lease is not None:
            self._lease.end()
        await self._tasks.join()
        if self._has_engine:
            self._has_engine = False
            await self._engine.aclose()


class State:
    """The state of a publisher in one process. `lock` guards everything else, and is held only briefly.

    Args:
        parent: The state in the process that this one was forked from.
    """

    def __init__(self, parent: State | None = None) -> None:
        self.lock = threading.Lock()
        # How many `start` have no `aclose` yet, by the event loop in which they were called; `None` for no loop.
        self.starts: Counter[asyncio.AbstractEventLoop | None] = Counter(parent.starts if parent else ())
        # Whether it refuses to work until the next start.
        self.is_closed: bool = parent is not None and parent.is_closed
        self.host: Host | None = None
        # The previous host, which may still be ending.
        self.left: Host | None = None
        # Whether it is used outside of one event loop. Then it runs in a thread of its own until it is closed.
        self.is_shared = False

    def leave(self) -> None:
        """Stop the host, if there is one. The next call makes another one."""
        if self.host is not None:
            self.left, self.host = self.host, None
            self.left.stop()

    def leave_ended(self) -> None:
        """Leave the host if it has ended."""
        host = self.host
        if host is not None and host.has_ended:
            # A call that comes while its event loop ends can't start anew in that loop.
            self.is_shared = self.is_shared or host.loop is running_loop()
            self.leave()

    def count(self, change: int) -> int:
        """Count a start more or less; return how many are left, without those of event loops that are closed."""
        self.starts = Counter({loop: n for loop, n in self.starts.items() if n and not (loop and loop.is_closed())})
        here = running_loop()
        if change < 0 and not self.starts[here]:
            here = next(iter(+self.starts), None)
        self.starts[here] = max(0, self.starts[here] + change)
        return self.starts.total()
