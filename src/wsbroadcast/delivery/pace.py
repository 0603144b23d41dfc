"""Decides for which peers a broadcaster waits: for a crowd that keeps pace, not for a few or for peers that stall."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Generic, Protocol, TypeVar

from wsbroadcast.audience import Audience
from wsbroadcast.delivery.registry import Member, Registry
from wsbroadcast.delivery.sink import Sink
from wsbroadcast.delivery.slow_consumers import PACE_PART, SlowConsumers

# The longest wait, in seconds, whatever `send_timeout` is. While an endpoint waits, servers don't read for it, and
# don't see the pongs of its peer. uvicorn closes the connection after 20 s.
_LONGEST_SECONDS = 10.0

# The wait for peers that take nothing, as a part of `send_timeout`, for a broadcaster that isn't in a tight loop. It is
# also how long all tight loops together may delay a crowd that has taken everything.
_MOMENT_PART = 20

# How many seconds of patience come back in a second.
_PATIENCE_SHARE = 0.05

# How many peers that keep up are checked for unsent bytes.
_SAMPLE = 64


class Recipient(Member, Protocol):
    """A member of the registry that can be delivered to."""

    @property
    def _sink(self) -> Sink: ...


R = TypeVar("R", bound=Recipient)


class Patience:
    """Seconds that all broadcasters of a node may spend together. They come back slowly."""

    def __init__(self, most: float) -> None:
        self._most = self._left = most
        self._refilled_at = self._spent_until = -inf

    def is_left(self, now: float) -> bool:
        """Tell whether any patience is left."""
        self._left = min(self._most, self._left + (now - self._refilled_at) * _PATIENCE_SHARE)
        self._refilled_at = now
        return self._left > 0

    def spend(self, began: float, now: float) -> None:
        """Spend the time between two moments. Time in which several broadcasters wait is spent only once."""
        self._left -= max(0.0, now - max(began, self._spent_until))
        self._spent_until = now


class Wait:
    """The wait of one broadcaster, from one check to the next."""

    __slots__ = ("fills_turns", "patience", "seen")

    def __init__(self) -> None:
        self.fills_turns = False
        """Whether it hands over more than the event loop can write in between, as a tight loop does."""
        self.patience: Patience | None = None
        """The patience that it spends by waiting, because peers wait that have taken everything; `None` for none."""
        self.seen: dict[Sink, int] = {}
        """How much peers that keep up still had to take at the last check."""


class Pace(Generic[R]):
    """Decides for which peers a broadcaster waits.

    A peer that is behind belongs to the crowd while it keeps pace. That means it takes, on average, an eighth of a
    backlog in a quarter of `send_timeout` (see `Progress`). If these peers are more than those that aren't behind, all
    broadcasters wait for them.

    Peers that don't keep pace only delay broadcasters in a tight loop, which would fill a backlog at once. A tight loop
    waits for a majority of such peers, and for peers that are slower than the crowd. It waits as long as that costs the
    others nothing, because they still have something to take. After that it waits as long as there is patience, which
    all tight loops share.
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
        # If it isn't known what peers have taken, those that keep up seem to have taken everything.
        self._patience_in_the_dark = Patience(self._while)

    def must_wait(self, audience: Audience, exclude: frozenset[str], wait: Wait, now: float) -> bool:
        """Tell whether a message for an audience should wait; `now` is of the event loop's clock."""
        wait.patience = None
        behind = self._slow_consumers.behind
        members = self._registry.members(audience)
        may_be_most = 2 * len(behind) > len(members) - len(exclude)
        if not behind or not (may_be_most or wait.fills_turns):
            return False  # nearly always, and without checking each connection
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
        if not others and not moving:  # if no peer takes anything, the network may be the reason
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
