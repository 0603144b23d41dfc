"""Keeps one link to a broker alive: opens it, subscribes, probes it, and when it is lost begins again, for ever."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.health import LinkHealth
from wsbroadcast.engines.broker.incoming import Incoming
from wsbroadcast.engines.broker.interest import Interest
from wsbroadcast.engines.broker.link import Inlet, Link
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.options import Timing

# Names in one call of `Link.subscribe` or `Link.unsubscribe`, so that its timeout is for something that can be done in
# time.
_ASK_NAMES = 1000

_FIRST_BACKOFF = 0.05

_CANCEL_AGAIN_SECONDS = 0.1


class Supervisor:
    """One link after the other, each used by four tasks: read, publish, reconcile subscriptions, probe."""

    def __init__(
        self,
        new_link: Callable[[], Link],
        timing: Timing,
        interest: Interest,
        outgoing: Outgoing,
        health: LinkHealth,
        incoming: Incoming,
    ) -> None:
        self._new_link = new_link
        self._timing = timing
        self._interest = interest
        self._outgoing = outgoing
        self._health = health
        self._incoming = incoming
        self._changed = asyncio.Event()
        # Whether who joins waits for a confirmation: while a link is in use, and while it takes the last step there.
        self._joins_wait = False
        # Names that somebody waits for; done when the name is confirmed, refused or wanted no longer, or all are lost.
        # One for each, because in a crowd that joins everybody would wake for everybody else's.
        self._awaited: dict[str, asyncio.Future[None]] = {}
        self._throttle = Throttle()

    async def run(self, tried: Callable[[Exception | None], None]) -> None:
        """Keep a link alive until cancelled.

        Args:
            tried: Told how the first attempt went: `None` when the link is in use.
        """
        first = backoff = min(_FIRST_BACKOFF, self._timing.max_backoff)
        while True:
            link: Link | None = None
            try:
                try:
                    link = self._new_link()
                except Exception as unmade:
                    error = unmade
                else:
                    error = await _end_of(self._use(link, tried))
                was_used = self._outgoing.link is not None
                tried(error)
                self._lose(error)
                if was_used:
                    backoff = first
            finally:
                self._outgoing.link = None
                self._joins_wait = False
                self._wake(list(self._awaited))
                if link is not None:
                    await self._abort(link)
            await asyncio.sleep(random.uniform(0, backoff))  # noqa: S311  # full jitter: nodes don't come back as one
            backoff = min(2 * backoff, self._timing.max_backoff)

    async def _use(self, link: Link, tried: Callable[[Exception | None], None]) -> None:
        async with Patience(self._timing.connect_timeout):
            await link.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_read(link, self._incoming), name="wsbroadcast engine read")
            await self._subscribe(link)  # among them our own name, for the echo
            tasks.create_task(self._outgoing.send(link), name="wsbroadcast engine publish")
            await self._health.echoes.send()  # a broker that lets us in and carries nothing is not back
            # Who joins waits from here on, so this pass has all who didn't. One pass and no more, here as everywhere:
            # names may come faster than confirmations, and what comes during a pass is for the next.
            self._joins_wait = True
            await self._subscribe(link)
            self._outgoing.use(link)
            tasks.create_task(self._reconcile(link), name="wsbroadcast engine subscriptions")
            self._health.up()
            tried(None)
            tasks.create_task(self._probe(), name="wsbroadcast engine probe")

    async def _abort(self, link: Link) -> None:
        try:
            async with asyncio.timeout(self._timing.request_timeout):
                await link.abort()
        except Exception:  # a driver's, on a connection that is given up anyway
            if self._throttle.is_due("abort"):
                logger.exception(
                    "a connection to the broker could not be dropped cleanly", extra=about("engine.abort_failed")
                )

    def _lose(self, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}"[:200] if str(error) else type(error).__name__
        self._interest.lost()
        self._health.down(why, error)

    # Subscriptions.

    def wanted(self) -> None:
        """More names are wanted: make the broker hold them."""
        self._changed.set()

    def unwanted(self, names: Sequence[str]) -> None:
        """These names are wanted no longer: make the broker end them after a while, and let nobody wait for them."""
        self._changed.set()
        self._wake(names)

    async def wait_settled(self, names: Sequence[str]) -> None:
        """Wait until the broker has confirmed those of these names that are wanted, or the link is lost."""
        loop = asyncio.get_running_loop()
        while self._joins_wait and (unsettled := self._interest.first_unsettled(names)) is not None:
            await asyncio.shield(self._awaited.setdefault(unsettled, loop.create_future()))

    def _wake(self, names: Iterable[str]) -> None:
        for name in names:
            awaited = self._awaited.pop(name, None)
            if awaited is not None:
                awaited.set_result(None)

    async def _reconcile(self, link: Link) -> None:
        while True:
            await self._wait_for_change()
            await self._subscribe(link)
            # A part of them in each turn: a join doesn't wait until all names of a crowd that has left are released.
            names = self._interest.release(asyncio.get_running_loop().time(), _ASK_NAMES)
            if names:
                async with Patience(self._timing.request_timeout):
                    await link.unsubscribe(names)
                self._interest.released(names)

    async def _wait_for_change(self) -> None:
        # Woken by a change, or when the next name has lingered long enough.
        try:
            async with asyncio.timeout_at(self._interest.next_release):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _subscribe(self, link: Link) -> None:
        for names in _chunks(self._interest.ask()):
            await self._ask(link, names)

    async def _ask(self, link: Link, names: list[str]) -> None:
        try:
            async with Patience(self._timing.request_timeout):
                await link.subscribe(names)
        except ConfigurationError as error:
            if len(names) == 1:
                self._health.refused(names[0], error)
                self._interest.refuse(names[0], error)
                self._wake(names)
                return
            middle = len(names) // 2  # one that is forbidden must not cost the others
            await self._ask(link, names[:middle])
            await self._ask(link, names[middle:])
        else:
            self._interest.confirm(names, asyncio.get_running_loop().time())
            self._wake(names)

    # Probing.

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(self._timing.probe_interval)
            await self._health.probe()


async def _end_of(using: Coroutine[Any, Any, None]) -> Exception:
    # In a task of its own: a group of tasks that fails in the turn of the loop in which it is cancelled forgets that it
    # was, before Python 3.13 (gh-116720), and we would go on for ever.
    task = asyncio.get_running_loop().create_task(using, name="wsbroadcast engine link")
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        # Again and again, because a driver may lose it: before Python 3.12 `wait_for` does, if what it waits for comes
        # at the same moment.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_CANCEL_AGAIN_SECONDS)
        if not task.cancelled():
            task.exception()  # looked at: it came too late to matter
        raise
    if task.cancelled():
        return EngineUnavailable("the driver gave the connection up")
    error = task.exception()
    assert error is not None, "a link is used until it fails"
    return _first(error)


async def _read(link: Link, inlet: Inlet) -> None:
    await link.read(inlet)
    raise EngineUnavailable("the broker ended the connection")


def _chunks(names: list[str]) -> list[list[str]]:
    return [names[start : start + _ASK_NAMES] for start in range(0, len(names), _ASK_NAMES)]


def _first(error: BaseException) -> Exception:
    # Who failed first tells why; of several, a refusal tells more.
    errors = [leaf for leaf in _leaves(error) if isinstance(leaf, Exception)]
    if not errors:
        raise error
    return next((error for error in errors if isinstance(error, ConfigurationError)), errors[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
