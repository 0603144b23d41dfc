"""Whom a broadcaster waits for: the crowd sets the pace; neither a laggard does nor a majority that takes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Generic, Protocol, TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.delivery.registry import Member, Registry
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import PACE_PART, SlowConsumers

# The longest wait, whatever `send_timeout` is: while an endpoint waits, servers don't read for it, and don't see the
# pongs of its peer. uvicorn cuts it off after 20 s.
_LONGEST_SECONDS = 10.0

# The part of `send_timeout` that a broadcaster which isn't in a tight loop waits for somebody who takes nothing; and of
# which tight loops together may make a crowd wait that has taken everything.
_MOMENT_PART = 20

# How much patience comes back in a second.
_PATIENCE_SHARE = 0.05

# How many of those who keep up are asked whether they have anything left to take.
_SAMPLE = 64


class Recipient(Member, Protocol):
    """A member of the registry that can be delivered to."""

    @property
    def _sink(self) -> Sink: ...


R = TypeVar("R", bound=Recipient)


class Patience:
    """Seconds that may be spent, by all broadcasters of a node together; they come back slowly."""

    def __init__(self, most: float) -> None:
        self._most = self._left = most
        self._refilled_at = self._spent_until = -inf

    def is_left(self, now: float) -> bool:
        """Tell whether any is left."""
        self._left = min(self._most, self._left + (now - self._refilled_at) * _PATIENCE_SHARE)
        self._refilled_at = now
        return self._left > 0

    def spend(self, began: float, now: float) -> None:
        """Spend a stretch of time; what several broadcasters wait for at once is spent once."""
        self._left -= max(0.0, now - max(began, self._spent_until))
        self._spent_until = now


class Wait:
    """One broadcaster's wait, from look to look."""

    __slots__ = ("fills_turns", "patience", "seen")

    def __init__(self) -> None:
        self.fills_turns = False
        """Whether it hands over more than the event loop gets a chance to write, as a tight loop does."""
        self.patience: Patience | None = None
        """What it spends by waiting, because it makes others wait who have taken everything."""
        self.seen: dict[Sink, int] = {}
        """What those who keep up still had to take at the last look."""


class Pace(Generic[R]):
    """Decides who is waited for.

    A peer that is behind belongs to the crowd while it keeps pace: it takes, on average, an eighth of a backlog in a
    quarter of `send_timeout` (see `Progress`). If they are more than those who aren't behind, everybody waits for them.

    Who doesn't keep pace holds up nobody but a tight loop: that would fill a backlog before anybody can turn round. It
    waits for such a majority, and for the tail of the crowd, as long as that costs the others nothing, because they
    still have something to take themselves; and after that from a small patience, which all of them share.
    """

    def __init__(self, registry: Registry[R], slow_consumers: SlowConsumers) -> None:
        self._registry = registry
        self._slow_consumers = slow_consumers
        timeout = slow_consumers.options.send_timeout
        self.longest = min(timeout, _LONGEST_SECONDS)
        """How many seconds a broadcaster waits at most."""
        self._moment = timeout / _MOMENT_PART
        self._while = timeout / PACE_PART
        self._patience = Patience(self._moment)
        # Where it isn't known what a peer has taken, those who keep up seem to have taken everything.
        self._patience_in_the_dark = Patience(self._while)

    def must_wait(self, audience: Audience, exclude: frozenset[str], wait: Wait, now: float) -> bool:
        """Tell whether a message for an audience should wait, as of a time of the event loop."""
        wait.patience = None
        behind = self._slow_consumers.behind
        members = self._registry.members(audience)
        may_be_most = 2 * len(behind) > len(members) - len(exclude)
        if not behind or not (may_be_most or wait.fills_turns):
            return False  # nearly always, and without looking at each member
        sinks = [member._sink for member in members if member.id not in exclude]
        late = [sink for sink in sinks if sink in behind]
        others = [sink for sink in sinks if sink not in behind]
        if len(late) > len(others) and self._is_most_waited_for(late, others, wait, now):
            return True
        if not wait.fills_turns:
            return False
        about_to_lose = set(self._slow_consumers.tail())
        tail = [sink for sink in late if sink in about_to_lose and self._stood(sink, now) < self._while]
        return bool(tail) and self._costs_little(others, wait, now)

    def _is_most_waited_for(self, late: Sequence[Sink], others: Sequence[Sink], wait: Wait, now: float) -> bool:
        moving = sum(self._moves(sink, wait, now) for sink in late)
        if moving > len(others):
            return True
        if not others and not moving:  # where nobody moves, it may be the network's fault
            limit = self.longest if wait.fills_turns else self._while
            return any(self._stood(sink, now) < limit for sink in late)
        if not wait.fills_turns:
            return False
        still = sum(self._stood(sink, now) < self._while for sink in late)
        return still > len(others) and self._costs_little(others, wait, now)

    def _moves(self, sink: Sink, wait: Wait, now: float) -> bool:
        progress = self._slow_consumers.progress(sink, now)
        if progress is None:
            return True
        is_recent = wait.fills_turns or not sink.is_observable or now - progress.took_at <= self._moment
        return is_recent and progress.paid_until > now

    def _stood(self, sink: Sink, now: float) -> float:
        progress = self._slow_consumers.progress(sink, now)
        return 0.0 if progress is None else now - progress.paid_until

    def _costs_little(self, others: Sequence[Sink], wait: Wait, now: float) -> bool:
        dry = moving = 0
        sample = others[:: len(others) // _SAMPLE + 1]
        for sink in sample:
            left = sink.held_bytes + sink.outstanding
            if not left:
                dry += 1
            elif left < wait.seen.get(sink, 0):
                moving += 1
            wait.seen[sink] = left
        if dry <= moving:
            return True
        is_known = all(sink.is_observable for sink in sample)
        wait.patience = self._patience if is_known else self._patience_in_the_dark
        return wait.patience.is_left(now)
