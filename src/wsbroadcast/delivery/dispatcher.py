"""Collects the messages of one turn of the event loop and hands them to the connections in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.delivery.batch import Batch
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.watch import Watch
from wsbroadcast.message import Message
from wsbroadcast.registry import Member, Registry

# A turn holds no more than this before it is delivered and the loop gets its chance: enough to join what belongs
# together, and little enough that other tasks of the app run in between.
_TURN_BYTES = 16 * 1024
_TURN_MESSAGES = 128


class Recipient(Member, Protocol):
    """A member of the registry that can be delivered to."""

    @property
    def sink(self) -> Sink: ...  # noqa: D102


R = TypeVar("R", bound=Recipient)
_NOBODY: frozenset[str] = frozenset()


class Dispatcher(Generic[R]):
    """From a message and its audience to the sinks of one node, in order.

    Nothing is awaited between the registry and a sink: whoever is a member when a message is handed over gets it.
    Whoever changes the registry calls `flush` first.
    """

    def __init__(self, registry: Registry[R], watch: Watch) -> None:
        self._registry = registry
        self._watch = watch
        self._batches: list[Batch[R]] = []
        self._bytes = 0
        self._messages = 0
        self._is_scheduled = False
        # Set when a turn was full, until the loop has run the writers it woke.
        self._is_turn_full = False

    def dispatch(self, message: Message, target: Audience | Sequence[R], exclude: frozenset[str] = _NOBODY) -> None:
        """Hand over a message for an audience, or for given recipients. Synchronous; written within this turn."""
        batches = self._batches
        if batches and (last := batches[-1]).target == target and last.exclude == exclude:
            last.messages.append(message)
        else:
            batches.append(Batch(target, exclude, message))
        self._bytes += message.size
        self._messages += 1
        if self._bytes >= _TURN_BYTES or self._messages >= _TURN_MESSAGES:
            self.flush()
            if not self._is_turn_full:
                self._is_turn_full = True
                asyncio.get_running_loop().call_soon(self._begin_turn)
        elif not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._end_turn)

    def flush(self) -> None:
        """Deliver what was collected, now."""
        if not self._batches:
            return
        batches, self._batches = self._batches, []
        self._bytes = self._messages = 0
        for batch in batches:
            target = batch.target
            if isinstance(target, Audience):
                recipients: Sequence[R] = self._registry.recipients(target, batch.exclude)
            else:
                recipients = target
            for recipient in recipients:
                recipient.sink.deliver(batch)
            self._watch.counters.deliveries += len(recipients) * len(batch.messages)

    @property
    def is_clear(self) -> bool:
        """Whether a broadcaster may go on without looking further: the turn isn't full and nobody is behind."""
        return not self._is_turn_full and not self._watch.behind

    async def ease(self, audience: Audience, exclude: frozenset[str] = _NOBODY) -> None:
        """Wait until the turn isn't full and no more than half of an audience is behind, at most `send_timeout`.

        The crowd sets the pace, a laggard never does.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._watch.options.send_timeout
        while self._is_turn_full:
            await self._watch.wait_for_change(deadline)
        while self._is_crowd_behind(audience, exclude) and loop.time() < deadline:
            await self._watch.wait_for_change(deadline)

    def _is_crowd_behind(self, audience: Audience, exclude: frozenset[str]) -> bool:
        behind = self._watch.behind
        members = self._registry.members(audience)
        if 2 * len(behind) <= len(members) - len(exclude):
            return False  # nearly always, and without looking at each member
        recipients = [member for member in members if member.id not in exclude]
        return 2 * sum(member.sink in behind for member in recipients) > len(recipients)

    def _end_turn(self) -> None:
        self._is_scheduled = False
        self.flush()

    def _begin_turn(self) -> None:
        self._is_turn_full = False
        self._watch.wake()
