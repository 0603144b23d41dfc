"""Which names are wanted, and which the broker holds for this node: a transition table. No I/O, no clock.

    want ──> WANTED ──ask──> ASKED ──confirm──> HELD ──unwant──> LINGERING ──release──> RELEASING ──released──> gone
               ^               │ ^                ^                  │                     │ ^
               │          unwant want             └──────want────────┘                  want unwant
               │               v │                                                         v │
               │             DOUBTED ──confirm──> LINGERING                             REGRETTED
               └──────────────────────────────────released─────────────────────────────────┘

ASKED becomes REFUSED if the broker forbids the name. When the connection is lost, names that are still wanted become
WANTED again, and all others are gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from enum import Enum


class Holding(Enum):
    """The state of a name between this node and the broker. A name without a state is neither wanted nor held."""

    WANTED = "wanted"
    """A connection here wants it. The broker was not asked yet."""
    ASKED = "asked"
    """The broker was asked and has not confirmed."""
    DOUBTED = "doubted"
    """The broker was asked, and the name is no longer wanted."""
    HELD = "held"
    """Confirmed: everything published to it arrives."""
    LINGERING = "lingering"
    """Held, but no longer wanted. It is kept for a while, in case somebody comes back."""
    RELEASING = "releasing"
    """The broker was asked to end it."""
    REFUSED = "refused"
    """Wanted, but the broker forbids it. The next link to the broker will ask again."""
    REGRETTED = "regretted"
    """The broker was asked to end it, and it is wanted again."""


class _Step(Enum):
    WANT = "want"
    UNWANT = "unwant"
    ASK = "ask"
    CONFIRM = "confirm"
    REFUSE = "refuse"
    RELEASE = "release"
    RELEASED = "released"
    LOSE = "lose"


_H, _S = Holding, _Step
_TRANSITIONS: dict[tuple[Holding | None, _Step], Holding | None] = {
    (None, _S.WANT): _H.WANTED,
    (None, _S.UNWANT): None,
    (_H.WANTED, _S.WANT): _H.WANTED,
    (_H.WANTED, _S.UNWANT): None,
    (_H.WANTED, _S.ASK): _H.ASKED,
    (_H.WANTED, _S.LOSE): _H.WANTED,
    (_H.ASKED, _S.WANT): _H.ASKED,
    (_H.ASKED, _S.UNWANT): _H.DOUBTED,
    (_H.ASKED, _S.CONFIRM): _H.HELD,
    (_H.ASKED, _S.REFUSE): _H.REFUSED,
    (_H.ASKED, _S.LOSE): _H.WANTED,
    (_H.DOUBTED, _S.WANT): _H.ASKED,
    (_H.DOUBTED, _S.UNWANT): _H.DOUBTED,
    (_H.DOUBTED, _S.CONFIRM): _H.LINGERING,
    (_H.DOUBTED, _S.REFUSE): None,
    (_H.DOUBTED, _S.LOSE): None,
    (_H.REFUSED, _S.WANT): _H.REFUSED,
    (_H.REFUSED, _S.UNWANT): None,
    (_H.REFUSED, _S.LOSE): _H.WANTED,
    (_H.HELD, _S.WANT): _H.HELD,
    (_H.HELD, _S.UNWANT): _H.LINGERING,
    (_H.HELD, _S.LOSE): _H.WANTED,
    (_H.LINGERING, _S.WANT): _H.HELD,
    (_H.LINGERING, _S.UNWANT): _H.LINGERING,
    (_H.LINGERING, _S.RELEASE): _H.RELEASING,
    (_H.LINGERING, _S.LOSE): None,
    (_H.RELEASING, _S.WANT): _H.REGRETTED,
    (_H.RELEASING, _S.UNWANT): _H.RELEASING,
    (_H.RELEASING, _S.RELEASED): None,
    (_H.RELEASING, _S.LOSE): None,
    (_H.REGRETTED, _S.WANT): _H.REGRETTED,
    (_H.REGRETTED, _S.UNWANT): _H.RELEASING,
    (_H.REGRETTED, _S.RELEASED): _H.WANTED,
    (_H.REGRETTED, _S.LOSE): _H.WANTED,
}


_UNSETTLED = {Holding.WANTED, Holding.ASKED, Holding.REGRETTED}


class Interest:
    """The names that a node wants from the broker, and the names that it has.

    The supervisor asks the broker for the names that `ask` returns, and then calls `confirm` or `refuse`. It lets the
    broker end those that `release` returns, and then calls `released`. When the connection is gone, it calls `lost`.
    `want` and `unwant` may come at any moment.

    Args:
        linger: Seconds for which a name is held after nobody wants it any more.
    """

    def __init__(self, linger: float) -> None:
        self._linger = linger
        self._states: dict[str, Holding] = {}
        # The names in WANTED, in the order in which they came. The broker will be asked for them.
        self._wanted: dict[str, None] = {}
        # Why the broker refuses the names in REFUSED.
        self._refusals: dict[str, Exception] = {}
        # When lingering ends, by name, and in the order of the ends. An end that is out of date is skipped.
        self._ends: dict[str, float] = {}
        self._queue: deque[tuple[float, str]] = deque()

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def first_unsettled(self, names: Iterable[str]) -> str | None:
        """Return the first of these names that is wanted but not yet confirmed by the broker."""
        return next((name for name in names if self._states.get(name) in _UNSETTLED), None)

    def want(self, name: str) -> None:
        """Take note that a connection here wants the name."""
        self._step(name, _Step.WANT)

    def unwant(self, name: str, now: float) -> None:
        """Take note that nobody here wants the name any more."""
        self._step(name, _Step.UNWANT, now)

    def ask(self) -> list[str]:
        """Return the names to ask the broker for, each once."""
        names = list(self._wanted)
        for name in names:
            self._step(name, _Step.ASK)
        return names

    def confirm(self, names: Iterable[str], now: float) -> None:
        """Take note that the broker has confirmed names that it was asked for."""
        for name in names:
            self._step(name, _Step.CONFIRM, now)

    def refuse(self, name: str, error: Exception) -> None:
        """Take note that the broker has refused a name that it was asked for."""
        self._step(name, _Step.REFUSE)
        if self._states.get(name) is Holding.REFUSED:  # else nobody wants the name any more
            self._refusals[name] = error

    def refusal(self, names: Iterable[str]) -> Exception | None:
        """Return why the broker refuses the first of these names that it refuses; `None` if it refuses none."""
        return next((self._refusals[name] for name in names if name in self._refusals), None)

    @property
    def next_release(self) -> float | None:
        """Return when `release` may next have names to return; `None` if none linger."""
        return self._queue[0][0] if self._queue else None

    def release(self, now: float, at_most: int) -> list[str]:
        """Return names that have lingered long enough, each once. The broker is to end them."""
        names: list[str] = []
        while self._queue and self._queue[0][0] <= now and len(names) < at_most:
            end, name = self._queue.popleft()
            if self._ends.get(name) == end:
                self._step(name, _Step.RELEASE)
                names.append(name)
        return names

    def released(self, names: Iterable[str]) -> None:
        """Take note that the broker has ended names."""
        for name in names:
            self._step(name, _Step.RELEASED)

    def lost(self) -> None:
        """Take note that the connection is gone. All wanted names are to be asked for again."""
        for name in list(self._states):
            self._step(name, _Step.LOSE)
        self._queue.clear()

    def _step(self, name: str, step: _Step, now: float = 0.0) -> None:
        state = self._states.get(name)
        try:
            after = _TRANSITIONS[state, step]
        except KeyError:
            raise RuntimeError(f"a name that is {state and state.value} can't {step.value}") from None
        if after is state:
            return
        if after is None:
            del self._states[name]
        else:
            self._states[name] = after
        if after is Holding.WANTED:
            self._wanted[name] = None
        elif state is Holding.WANTED:
            del self._wanted[name]
        if state is Holding.REFUSED:
            del self._refusals[name]
        if after is Holding.LINGERING:
            self._ends[name] = now + self._linger
            self._queue.append((self._ends[name], name))
        elif state is Holding.LINGERING:
            del self._ends[name]
