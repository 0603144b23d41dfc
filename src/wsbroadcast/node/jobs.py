"""Background functions of the app, which run as long as the manager: on each node, or on only one of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from inspect import iscoroutine, iscoroutinefunction
from typing import Any

from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import KeepsPresence
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.exceptions import EngineError, kind_of
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.presence import once_of

# How often, in seconds, a node checks whether the node that runs a job has ended.
_LOOK_SECONDS = 2.0

# Seconds until a failed job runs again: at first, and at most.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0

# For how many seconds the end of a node waits for the broker.
_GIVE_UP_SECONDS = 2.0

# The member that nodes enter into the channel of a job. The node that enters it first runs the job.
_RUNNER = "\x01runner"


@dataclass(frozen=True, slots=True)
class Job:
    """A background function of the app."""

    function: Callable[[], Awaitable[object]]
    """The function."""
    once: bool
    """Whether it runs on only one of the nodes. If not, it runs on each."""
    name: str
    """Its name, which is the same on all nodes."""

    @classmethod
    def of(cls, function: object, once: bool, name: str | None) -> Job:
        """Make a job of an app's function.

        Raises:
            TypeError: If it is not an async function without arguments.
        """
        if iscoroutine(function):
            function.close()
            raise TypeError(
                "background takes the async function itself, not the result of calling it: write background(function)"
            )
        if not callable(function):
            raise TypeError(f"background takes an async function, not {kind_of(function)}")
        is_async = iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
        if not is_async and hasattr(function, "__name__"):
            raise TypeError(f"background takes an async function: write async def {function.__name__}()")
        found = name if name is not None else _name_of(function)
        if not isinstance(found, str) or not found:
            raise TypeError(f"the name of a background function is a text, not {found!r:.80}")
        return cls(function, once, found)


def _name_of(function: Any) -> str:
    named = getattr(function, "func", function)  # of a functools.partial
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__qualname__)}"


class Election:
    """Decides which of the nodes runs a job: the first one in the job's hidden channel, while it has its lease.

    Args:
        engine: Knows who has entered the channel.
        lease: The lease of this node.
        sweep: Removes what dead nodes have left behind.
    """

    def __init__(self, engine: KeepsPresence, lease: LeaseKeeper, sweep: Callable[[], Awaitable[None]]) -> None:
        self._engine = engine
        self.lease = lease
        """The lease of this node."""
        self._sweep = sweep

    async def wins(self, name: str) -> int | None:
        """Return the generation of the lease under which this node runs a job; `None` if another one does.

        Raises:
            EngineError: If it isn't known which node does.
        """
        self.lease.hold(name)
        await self._sweep()
        generation = await self.lease.ensure()
        try:
            if await self._engine.enter(once_of(name), {_RUNNER: b""}) is not None:
                return generation
        except EngineError:
            # This node may have entered already. It leaves, so that the next try shows whether it enters.
            await self._engine.leave(once_of(name), (_RUNNER,))
            raise
        await self._engine.leave(once_of(name), (_RUNNER,))
        return None

    async def give_up(self, name: str) -> None:
        """Let another node run a job.

        Raises:
            EngineError: If the broker can't be told. Another node then runs the job once this node's lease has run out.
        """
        self.lease.release(name)
        await self._engine.leave(once_of(name), (_RUNNER,))


class Jobs:
    """Runs the jobs of a manager on one node, from its start to its end.

    Args:
        elect: Returns the election for jobs that run on only one node.
        seconds: For how many seconds `aclose` waits for the jobs.
    """

    def __init__(self, elect: Callable[[], Election], seconds: float) -> None:
        self._elect = elect
        self._seconds = seconds
        self._tasks = Tasks()
        # The tasks by the name of the job. An elected job has a task also while another node runs it.
        self._running: dict[str, asyncio.Task[None]] = {}
        self._throttle = Throttle()
        self._is_ended = False

    def begin(self, jobs: Iterable[Job]) -> None:
        """Run these jobs from now on, except those that run already."""
        for job in jobs:
            if job.name not in self._running and not self._is_ended:
                run = self._run_elected(job, self._elect()) if job.once else self._run(job)
                self._running[job.name] = self._tasks.spawn(run, f"background {job.name}")

    async def _run(self, job: Job) -> None:
        # The function runs until it returns. After an error it runs again.
        await self._tasks.begun()
        pause = _FIRST_PAUSE
        while True:
            began = _now()
            try:
                await job.function()
            except Exception as error:
                if _now() - began > _LONGEST_PAUSE:
                    pause = _FIRST_PAUSE
                text = "the background function %s failed, and runs again in %.0f s"
                name = job.name
                logger.error(text, name, pause, exc_info=error, extra=about("background.failed", task=name))
            else:
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _run_elected(self, job: Job, election: Election) -> None:
        await self._tasks.begun()
        while True:
            generation = None
            try:
                generation = await election.wins(job.name)
            except EngineError as error:
                if self._throttle.is_due(job.name):
                    text = "it can't be decided now which node runs the background function %s: %s"
                    logger.warning(text, job.name, error, extra=about("background.undecided", task=job.name))
            if generation is None:
                await asyncio.sleep(_LOOK_SECONDS * random.uniform(0.75, 1.25))  # noqa: S311  # no secret
            else:
                await self._run_while(job, election, generation)

    async def _run_while(self, job: Job, election: Election, generation: int) -> None:
        running = self._tasks.spawn(self._run(job), f"background {job.name}", Context())
        try:
            await election.lease.lost(generation)
            text = "the background function %s ends here: the lease of this node is lost, and another one may run it"
            logger.warning(text, job.name, extra=about("background.lost", task=job.name))
        finally:
            running.cancel()
            await asyncio.wait([running])
            if self._is_ended:
                with suppress(EngineError, TimeoutError):
                    async with asyncio.timeout(_GIVE_UP_SECONDS):
                        await election.give_up(job.name)

    def includes_current(self) -> bool:
        """Tell whether the caller runs in one of the jobs."""
        return self._tasks.includes_current()

    async def aclose(self) -> None:
        """Cancel the jobs, and wait for a bounded time until they have ended. Then other nodes may run them."""
        self._is_ended = True
        if not self._running or self.includes_current():
            return
        ending = asyncio.ensure_future(self._tasks.cancel())
        await asyncio.wait([ending], timeout=self._seconds)
        stuck = [name for name, task in self._running.items() if not task.done()]
        for name in stuck:
            text = "the background function %s doesn't end though it was cancelled: it is left behind"
            logger.error(text, name, extra=about("background.stuck", task=name))


def _now() -> float:
    return asyncio.get_running_loop().time()
