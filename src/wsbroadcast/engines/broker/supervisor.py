"""The supervisor keeps a link to the broker: it opens one, subscribes, probes it, and replaces it when it is lost."""

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

# How many names one call of `Link.subscribe` or `Link.unsubscribe` gets at most, so that it can be done within its
# timeout.
_ASK_NAMES = 1000

_FIRST_BACKOFF = 0.05

_CANCEL_AGAIN_SECONDS = 0.1


class Supervisor:
    """Uses one link after the other. Each is used by four tasks: read, publish, reconcile subscriptions, probe."""

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
        # Whether joining connections wait for the broker's confirmation. They do while a link is in use, and during the
        # last step before that.
        self._joins_wait = False
        # A future for each name that somebody waits for. It is done when the name is confirmed, refused or no longer
        # wanted, or when the link is lost. If there was one for all, each join of a crowd would wake everybody.
        self._awaited: dict[str, asyncio.Future[None]] = {}
        self._throttle = Throttle()

    async def run(self, tried: Callable[[Exception | None], None]) -> None:
        """Keep a link alive until cancelled.

        Args:
            tried: Called once, after the first attempt: with its error, or with `None` when the link is in use.
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
            await self._subscribe(link)  # one of the names is the node's own, for the echo
            tasks.create_task(self._outgoing.send(link), name="wsbroadcast engine publish")
            await self._health.echoes.send()  # a broker that accepts the connection may still carry no messages
            # From here on, joins wait. The pass below subscribes to all names of joins that didn't. There is only one
            # pass, here and elsewhere: names may come faster than confirmations, and the next pass has the new ones.
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
        except Exception:  # the driver raised it, on a connection that is dropped anyway
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
        """Take note that more names are wanted, and subscribe to them."""
        self._changed.set()

    def unwanted(self, names: Sequence[str]) -> None:
        """Take note that names are no longer wanted. They are released after a while, and nobody waits for them."""
        self._changed.set()
        self._wake(names)

    async def wait_settled(self, names: Sequence[str]) -> None:
        """Wait until the broker has confirmed all of these names that are still wanted, or the link is lost."""
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
            # Only some are released in each turn, so that a join doesn't wait for all names of a crowd that has left.
            names = self._interest.release(asyncio.get_running_loop().time(), _ASK_NAMES)
            if names:
                async with Patience(self._timing.request_timeout):
                    await link.unsubscribe(names)
                self._interest.released(names)

    async def _wait_for_change(self) -> None:
        # Returns after a change, or when the next name has lingered long enough.
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
            middle = len(names) // 2  # one forbidden name must not keep the others from being subscribed
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
    # It runs in a task of its own. Before Python 3.13, a TaskGroup that fails in the turn of the loop in which it is
    # cancelled loses the cancellation (gh-116720), and this would go on for ever.
    task = asyncio.get_running_loop().create_task(using, name="wsbroadcast engine link")
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        # It is cancelled again and again, because a driver may lose a cancellation. Before Python 3.12 `wait_for` does,
        # if what it waits for comes at the same moment.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_CANCEL_AGAIN_SECONDS)
        if not task.cancelled():
            task.exception()  # marked as retrieved: it came too late to matter
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
    # The first error says why. If there are several, a refusal says more.
    errors = [leaf for leaf in _leaves(error) if isinstance(leaf, Exception)]
    if not errors:
        raise error
    return next((error for error in errors if isinstance(error, ConfigurationError)), errors[0])


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
