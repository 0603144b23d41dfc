"""The streams that are produced on one node, or by a publisher: how they begin, are stopped, and end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from contextvars import copy_context
from heapq import heappop, heappush
from typing import Protocol

from pydantic_core import from_json

from wsbroadcast.audience import Audience, UserId, check_stream_id, user_key
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import Engine
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.exceptions import ConfigurationError, EngineError, StreamExists
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.message import JSONDefault, to_json_bytes
from wsbroadcast.options import check_positive
from wsbroadcast.publication import Publication
from wsbroadcast.streams.ledger import MAX_SECONDS, Known, Ledger, Start, can_stream, ledger_of, log_of, requests_of
from wsbroadcast.streams.run import Run, StreamLimits, check_most, insist

DEFAULT_TTL = 3600.0
"""For how many seconds a stream is kept after its end."""

END_SECONDS = 5.0
"""How long the code that ends a run waits until the end is written, in seconds. Writing goes on after that."""

# Between two attempts to listen for requests.
_HEAR_AGAIN_SECONDS = 1.0

# Between two checks whether a lease that can't be renewed is lost.
_LOOK_SECONDS = 0.5

# How long the end of a node waits until the ends of its runs are written, in seconds.
_CLOSE_SECONDS = 2.0


Producer = Callable[[Run], Awaitable[object]]
"""An async function that produces a run: `async def answer(run)`."""


class Requests(Protocol):
    """Brings a node the requests to it."""

    def listen(self, audience: Audience) -> AbstractAsyncContextManager[AsyncIterator[Publication]]:
        """Yield what is in the log of an audience, and what comes next. Some of it may come more than once."""


class StreamOptions:
    """The options of a stream, checked.

    Args:
        id_: Its name.
        user: The user whose stream it is.
        ttl: For how many seconds it is kept after its end.
        limits: How much one run may produce.

    Raises:
        ConfigurationError: If an option makes no sense.
        ValueError: If the id breaks a rule for names, or `user` is not an id.
    """

    def __init__(self, id_: object, user: UserId | None, ttl: float, limits: StreamLimits) -> None:
        self.id = check_stream_id(id_)
        """Its name."""
        self.user = None if user is None else user_key(user)
        """The user whose stream it is, as text."""
        check_positive("ttl", ttl)
        check_most("ttl", ttl, MAX_SECONDS)
        if not isinstance(limits, StreamLimits):
            raise ConfigurationError("limits must be a StreamLimits(…)")
        self.ttl = float(ttl)
        """For how many seconds it is kept after its end."""
        self.limits = limits
        """How much one run may produce."""


class Producers:
    """The runs that are produced on this node.

    While there are any, the node holds its lease and listens for requests to stop them. Otherwise it does nothing.

    Args:
        engine: An engine that can carry streams.
        lease: The lease of this node.
        requests: Bring the requests of other nodes.
        json_default: Writes what JSON doesn't know.

    Raises:
        ConfigurationError: If the engine can't carry streams.
    """

    def __init__(
        self, engine: Engine, lease: LeaseKeeper, requests: Requests, json_default: JSONDefault | None = None
    ) -> None:
        self._keeper, lessor = can_stream(engine)
        self.ledger = Ledger(self._keeper, lessor)
        """The logs that say which streams there are, and their states."""
        self._tasks = Tasks()
        self._lease = lease
        self._requests = requests
        self._json_default = json_default
        self._runs: dict[str, Run] = {}
        # The newest runs to be stopped that aren't known here. Others may know of a run before its start returns.
        self._asked: deque[str] = deque(maxlen=1000)
        # How many runs are about to begin.
        self._starting = 0
        # The task that receives requests and watches the lease.
        self._attending: asyncio.Task[None] | None = None
        # Some engines never remove logs by themselves. For them: which log to remove, and when.
        self._removes = not engine.links_nodes
        self._removals: list[tuple[float, str, str | None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._throttle = Throttle()
        self._is_closed = False

    # Runs.

    async def start(self, options: StreamOptions) -> Run:
        """Begin a run.

        Args:
            options: The options of the stream.

        Raises:
            StreamExists: If the stream has a run that goes on.
            EngineUnavailable: If the broker can't be reached.
        """
        self._starting += 1
        try:
            self._lease.hold(self)
            await self._lease.ensure()
            node = self._lease.incarnation
            start = Start.new(options.id, node, options.user, options.ttl)
            await self._begin(start)
            run = Run(self, self._keeper, self.ledger, start, options.limits, self._encode)
            self._runs[start.run] = run
            if start.run in self._asked:
                run.stop()
        finally:
            self._starting -= 1
            self._release()
        self._tasks.spawn(run.write(), "stream")
        if self._is_closed or self.is_lost(node):
            run.lose()
        else:
            self._begin_attending()
        return run

    def _begin_attending(self) -> None:
        if self._attending is None and self._runs and not self._is_closed:
            self._attending = self._tasks.spawn(self._attend(self._lease.incarnation), "stream requests")

    async def _begin(self, start: Start) -> None:
        try:
            await self.ledger.start(start)
        except StreamExists:
            raise
        except BaseException:  # the run may have begun, and nobody would produce it
            self._tasks.spawn(self._take_back(start), "stream end")
            raise

    async def _take_back(self, start: Start) -> None:
        await self._tasks.begun()
        await insist(lambda: self.ledger.bury(start))

    def _release(self) -> None:
        if self._runs or self._starting:
            return
        self._lease.release(self)
        if self._attending is not None:
            self._attending.cancel()
            self._attending = None

    @asynccontextmanager
    async def stream(self, options: StreamOptions) -> AsyncIterator[Run]:
        """Produce a run in a block. The run ends with the block."""
        run = await self.start(options)
        with suppress_own(run):
            try:
                yield run
            except BaseException as error:
                end_by(run, error)
                raise
            else:
                run.end("done")
            finally:
                await run.wait_written(END_SECONDS)

    async def produce(self, options: StreamOptions, producer: Producer) -> Run:
        """Begin a run that is produced in a task of its own."""
        run = await self.start(options)
        run.task = self._tasks.spawn(self._produce(run, producer), "stream producer", copy_context())
        if run.state != "running":
            run.task.cancel()
        return run

    async def _produce(self, run: Run, producer: Producer) -> None:
        await self._tasks.begun()
        with suppress_own(run):
            try:
                await producer(run)
            except BaseException as error:
                end_by(run, error)
                raise
            else:
                run.end("done")

    def _encode(self, value: object) -> bytes:
        return to_json_bytes(value, self._json_default)

    # What runs need.

    def is_lost(self, incarnation: str) -> bool:
        """Return whether the lease of a run's incarnation has run out."""
        return self._lease.incarnation != incarnation

    def is_alive(self, incarnation: str) -> bool:
        """Return whether the lease of a run's incarnation is valid now."""
        return self._lease.seconds_left > 0 and self._lease.incarnation == incarnation

    async def wait_alive(self, incarnation: str) -> bool:
        """Renew the lease; return whether it is still that of a run's incarnation.

        Without a valid lease nothing may be written: it could come after an end that others have written.

        Raises:
            EngineUnavailable: If the broker can't be reached.
        """
        await self._lease.ensure()
        return not self.is_lost(incarnation)

    def ended(self, run: Run) -> None:
        """Called when a run has written its end, or can't."""
        if self._runs.pop(run.run_id, None) is None:
            return
        self._release()
        if self._removes and not self._is_closed:
            self._remove_later(run)

    # Requests.

    async def find(self, id_: str) -> Known | None:
        """Return the newest run of a stream. If its node is dead, end it first.

        Raises:
            EngineUnavailable: If the broker can't be asked.
        """
        known = await self.ledger.find(id_)
        if known is not None and known.end is None:
            # This node knows more about its own run than what is written so far.
            run = self._runs.get(known.start.run)
            if run is not None and run.how_it_ended is not None:
                await run.wait_written(END_SECONDS)
                known = await self.ledger.find(id_)
        return known

    async def stop(self, id_: str) -> bool:
        """Stop a run, on any node; return whether there was one to stop.

        Raises:
            EngineUnavailable: If the broker can't be asked.
        """
        known = await self.find(id_)
        if known is None or known.end is not None:
            return False
        run = self._runs.get(known.start.run)
        if run is None:
            await self.ledger.ask_to_stop(known.start)
            return True
        was_running = run.how_it_ended is None
        run.stop()
        await run.wait_written(END_SECONDS)
        return was_running

    async def _attend(self, incarnation: str) -> None:
        await self._tasks.begun()
        try:
            async with asyncio.TaskGroup() as tasks:
                hearing = tasks.create_task(self._hear(requests_of(incarnation)), name="wsbroadcast stream requests")
                while not self.is_lost(incarnation):
                    await self._lease.lost(self._lease.generation)
                    if not self.is_lost(incarnation):
                        await asyncio.sleep(_LOOK_SECONDS)  # until the broker says whether the lease has run out
                hearing.cancel()
        finally:
            if self._attending is asyncio.current_task():  # else there is a newer one
                self._attending = None
        for run in list(self._runs.values()):
            run.lose_if(incarnation)
        if any(run.state == "running" for run in self._runs.values()):  # they began under the next lease
            self._begin_attending()

    async def _hear(self, audience: Audience) -> None:
        while True:
            try:
                async with self._requests.listen(audience) as publications:
                    async for publication in publications:
                        self._obey(publication.message.payload)
                return
            except EngineError as error:
                if self._throttle.is_due("requests"):
                    text = "requests to stop streams can't be received now (%s); trying again"
                    logger.warning(text, error, extra=about("stream.unheard"))
                await asyncio.sleep(_HEAR_AGAIN_SECONDS)

    def _obey(self, payload: bytes) -> None:
        try:
            found = from_json(payload)
        except ValueError:
            return
        match found:
            case {"stop": str() as name}:
                if (run := self._runs.get(name)) is not None:
                    run.stop()
                elif name not in self._asked:
                    self._asked.append(name)

    # Removing logs.

    def _remove_later(self, run: Run) -> None:
        # The owner stays known for another `ttl`.
        now = asyncio.get_running_loop().time()
        heappush(self._removals, (now + run.ttl, run.run_id, None))
        heappush(self._removals, (now + 2 * run.ttl, run.run_id, run.id))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._removals:
            self._timer = asyncio.get_running_loop().call_at(self._removals[0][0], self._remove)

    def _remove(self) -> None:
        self._timer = None
        now = max(asyncio.get_running_loop().time(), self._removals[0][0])
        while self._removals and self._removals[0][0] <= now:
            _, run, id_ = heappop(self._removals)
            self._tasks.spawn(self._forget(run, id_), "stream removal")
        self._set_timer()

    async def _forget(self, run: str, id_: str | None) -> None:
        await self._tasks.begun()
        with suppress(EngineError):
            if id_ is None:
                await self._keeper.forget(log_of(run))
            elif (known := await self.ledger.find(id_)) is not None and known.start.run == run:
                await self._keeper.forget(ledger_of(id_))

    # The end.

    async def aclose(self) -> None:
        """End. What is still being produced here becomes `lost`, and that is written."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        runs = list(self._runs.values())
        for run in runs:
            run.lose()
        if runs:
            await asyncio.wait([run.written for run in runs], timeout=_CLOSE_SECONDS)
        producers = {run.task: run.id for run in runs if run.task is not None}
        others = producers.keys() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=_CLOSE_SECONDS)
        await self._tasks.end(_CLOSE_SECONDS)
        for task in others:
            if not task.done():
                text = "the producer of the stream %r doesn't end though it was cancelled: it is left behind"
                logger.error(text, producers[task], extra=about("stream.stuck"))


class suppress_own:  # noqa: N801  # like `contextlib.suppress`
    """Suppress errors that only say that a run was stopped or lost.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Suppress the error, if it is such an error."""
        return error is not None and self._run.was_ended_elsewhere(error)


def end_by(run: Run, error: BaseException) -> None:
    """End a run whose producer has raised an error. Viewers are told its type. Its text is only for the log."""
    if isinstance(error, Exception):
        run.end("error", f"the producer failed ({type(error).__name__})")
    else:
        run.end("lost")
