"""Listeners: async iterators, in this process, over what is broadcast to channels."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from secrets import token_urlsafe
from typing import Literal, Self

from wsbroadcast.audience import Audience
from wsbroadcast.exceptions import ConfigurationError, Lagged
from wsbroadcast.history import Recovery
from wsbroadcast.node.tail import Tail
from wsbroadcast.node.tails import Tails
from wsbroadcast.options import check_count
from wsbroadcast.publication import Position, Publication

ListenPolicy = Literal["raise", "drop_oldest"]
"""What a listener does when it has missed something: it raises `Lagged`, or goes on without a word."""

# How many broadcasts to several audiences are remembered, so that a listener to two of the audiences gets each once.
_REMEMBERED = 1024


class _Remembered:
    """The ids of the newest broadcasts to several audiences."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, id_: str) -> bool:
        """Remember an id; tell whether it is new."""
        if id_ in self._ids:
            return False
        self._ids[id_] = None
        if len(self._ids) > _REMEMBERED:
            self._ids.popitem(last=False)
        return True


class Listener:
    """Gets what is broadcast to channels, and to a user, in this process: `async for publication in listener`.

    From a channel with a history it gets everything that the history still has, however late it reads. Of channels
    without a history at most `size` messages wait for it. Nobody ever waits for a listener. `on_deliver` hooks don't
    apply: a listener gets each message as it was broadcast.

    Args:
        channels: The names of the channels.
        user_key: A user, as text, whose own messages it gets too; `None` for none.
        size: How many messages of channels without a history may wait.
        policy: What happens when messages were missed: `raise` raises `Lagged`, `drop_oldest` goes on.

    Raises:
        ConfigurationError: If an option makes no sense.
    """

    _listens = True

    def __init__(self, channels: tuple[str, ...], user_key: str | None, size: int, policy: ListenPolicy) -> None:
        check_count("size", size)
        if policy not in ("raise", "drop_oldest"):
            raise ConfigurationError(f"policy must be raise or drop_oldest, not {policy!r:.80}")
        self._id = token_urlsafe(12)
        self.channels = channels
        """The channels that it listens to."""
        self.user_key = user_key
        """The user whose messages it gets too, as text; `None` for none."""
        self.recovered: dict[str | Audience, Recovery] = {}
        """Whether it gets everything after the positions given in `since=`, by channel."""
        self.audiences = [Audience("channel", channel) for channel in channels]
        """The audiences that it listens to."""
        if user_key is not None:
            self.audiences.append(Audience("user", user_key))
        self._size = size
        self._policy = policy
        self._tails: Tails | None = None
        # Its position in each audience with a history.
        self._places: dict[Audience, Position] = {}
        self._waiting: deque[Publication] = deque()
        self._missed = 0
        self._has_broken = False
        # The broadcasts that it has got; and those that came without a history, also if they were dropped.
        self._got = _Remembered()
        self._offered = _Remembered()
        self._wake: asyncio.Future[None] | None = None
        self._is_ended = False

    @property
    def id(self) -> str:
        """An id that is unique among all nodes. `exclude=` takes the listener itself."""
        return self._id

    # For the node.

    def begin(self, tails: Tails | None, places: Mapping[Audience, Position]) -> None:
        """Begin to listen, at these positions of the audiences with a history."""
        self._tails = tails
        self._has_broken = False
        for audience in self.audiences:
            tail, place = None if tails is None else tails.of(audience), places.get(audience)
            if tail is None or not tail.epoch:
                continue  # it has no history, or its position isn't known yet
            if place is not None and place.epoch == tail.epoch:
                self._places[audience] = place
            else:
                self.broken(audience, tail.position)  # the tail has begun anew since the position was looked up
        self.wake()

    def offer(self, publication: Publication) -> None:
        """Take a publication to an audience without a history."""
        if self._is_withheld(publication) or (publication.id is not None and not self._offered.add(publication.id)):
            return
        if len(self._waiting) >= self._size:
            self._missed += 1
            if self._policy == "raise":
                return  # it is dropped, and the waiting ones come first
            self._waiting.popleft()
        self._waiting.append(publication)
        self.wake()

    def arrived(self, audience: Audience, tail: Tail) -> None:
        """Take note that a tail has more. A listener without a position there begins before the newest."""
        if audience not in self._places and self._tails is not None:
            self._places[audience] = Position(tail.epoch, tail.delivered)
        self.wake()

    def wake(self) -> None:
        """Check whether something has come."""
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def broken(self, audience: Audience, position: Position | None) -> None:
        """Take note that publications are missing and can't be read any more. The listener goes on at this position."""
        self._has_broken = True
        if position is not None:
            self._places[audience] = position
        self.wake()

    def end(self) -> None:
        """Take note that the node ends."""
        self._is_ended = True
        self.wake()

    # For the app.

    def __aiter__(self) -> Self:
        """Iterate until the block or the manager ends."""
        return self

    async def __anext__(self) -> Publication:
        """Wait for the next publication. If the call is cancelled, nothing is lost.

        Raises:
            Lagged: If messages were missed, under the policy `raise`. It is raised once; the next call goes on after
                them.
            RuntimeError: If another task waits already.
        """
        if self._wake is not None:
            raise RuntimeError("another task reads from this listener already: open a listener for each task")
        while True:
            publication = self._next()
            if publication is not None:
                return publication
            if self._is_ended:
                raise StopAsyncIteration
            self._wake = asyncio.get_running_loop().create_future()
            try:
                await self._wake
            finally:
                self._wake = None

    def _next(self) -> Publication | None:
        if self._has_broken:
            self._has_broken = False
            self._tell(None)
        for candidate in self._candidates():
            if not self._is_withheld(candidate) and (candidate.id is None or self._got.add(candidate.id)):
                return candidate
        return None

    def _is_withheld(self, publication: Publication) -> bool:
        return self.id in publication.exclude or self.user_key in publication.exclude_users

    def _candidates(self) -> Iterable[Publication]:
        while self._waiting:
            yield self._waiting.popleft()
        if self._missed:
            missed, self._missed = self._missed, 0
            self._tell(missed)
        if self._tails is None:
            return
        for audience in self._places:
            while (publication := self._read_on(self._tails, audience)) is not None:
                yield publication

    def _read_on(self, tails: Tails, audience: Audience) -> Publication | None:
        tail, place = tails.of(audience), self._places[audience]
        if tail is None or tail.epoch != place.epoch:
            return None
        if place.offset < tail.base:
            missed = tail.base - place.offset
            self._places[audience] = Position(place.epoch, tail.base)
            self._tell(missed)
        publication = tail.first_after(self._places[audience].offset)
        if publication is not None and publication.position is not None:  # each publication in a tail has one
            self._places[audience] = publication.position
        return publication

    def _tell(self, missed: int | None) -> None:
        if self._policy == "raise":
            raise Lagged(missed)
