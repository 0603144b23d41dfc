"""Clients that are told who is in a channel: a whole list once, then the changes, once a second."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from typing import Any, Protocol

from wsbroadcast.concurrency import Tasks
from wsbroadcast.exceptions import EngineError
from wsbroadcast.message import Message
from wsbroadcast.presence import Members, Presence, seen_of
from wsbroadcast.protocols import events
from wsbroadcast.protocols.commands import ErrorCode, Refused
from wsbroadcast.publication import PresenceChange

# Seconds between two times at which clients are told. A member that joins and leaves within that time isn't told.
_TELL_SECONDS = 1.0

# Seconds until the broker is asked again if it couldn't be reached.
_AGAIN_SECONDS = 1.0

# How many channels are read at the same time after changes may have been missed.
_READ_AT_ONCE = 32

# How often within `_TELL_SECONDS` a client may be sent a whole list, such as when it goes from room to room and back.
_LISTS_AT_ONCE = 5

# How many connections are told in one turn of the event loop, so that nothing else waits for all. A channel counts too.
_AT_ONCE = 1000
_CHANNEL_COUNTS = 20

Read = Callable[[str], Coroutine[Any, Any, Members]]
"""Asks the broker who is in a channel."""


class Present(Protocol):
    """The part of a connection that is needed here."""

    id: str
    _user_key: str | None
    _shown: bytes

    @property
    def channels(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def is_open(self) -> bool: ...  # noqa: D102


Say = Callable[[Sequence[Any], Message], None]
"""Sends connections a message of their protocol."""

Infos = Mapping[str, bytes]
"""Members of a channel, and the info of each."""

Tell = Callable[[str, Sequence[Any], Infos, Infos], None]
"""Tells connections who has joined a channel, and who has left it."""


class Watch:
    """One channel that clients of this node watch.

    Args:
        channel: The name of the channel.
        presence: The options of the channel.
    """

    def __init__(self, channel: str, presence: Presence) -> None:
        self.channel = channel
        self.by = presence.by
        self.up_to = presence.members_up_to
        """If there are more members than this, clients are told only how many there are, not who."""
        self.reading = asyncio.Lock()
        """Held while the broker is asked."""
        self.asking: asyncio.Task[None] | None = None
        """The task that asks the broker for the first time."""
        self.watchers: dict[Present, None] = {}
        """The connections that are told once a second, in the order in which they asked."""
        self.followers: dict[Tell, dict[Present, None]] = {}
        """The connections that are told at once of each change, by the function that tells them."""
        self.untold: list[Present] = []
        """The connections that have yet to be sent the last message."""
        self.message: Message | None = None
        """The last message."""
        self.expected = 0
        """How many connections will watch once the broker has answered."""
        self.version: int | None = None
        """The known version; `None` until the broker has been asked."""
        self.members: dict[str, bytes] = {}
        """The known members."""
        self.count = 0
        """How many members there are, including connections without a user."""
        # The changes that came while the broker was asked.
        self._waiting: list[PresenceChange] | None = []
        # What the watchers know: the version, the number of members, and who they are.
        self._told_version = 0
        self._told_count = 0
        self._told: dict[str, bytes] = {}
        self._knows_list = False
        # The same as one message, made when it is first needed.
        self._snapshot: Message | None = None
        self._is_due = False

    # From the broker.

    def take(self, change: PresenceChange) -> bool:
        """Take a change; return whether the broker has to be asked."""
        if self._waiting is not None:
            self._waiting.append(change)
            return False
        assert self.version is not None
        if change.version <= self.version:
            return False
        if change.version > self.version + 1:
            self._waiting = [change]
            return True
        self._apply(change)
        return False

    def suspect(self) -> None:
        """Take note that changes may be missing. New changes wait until the broker has answered."""
        if self._waiting is None:
            self._waiting = []

    @property
    def is_suspect(self) -> bool:
        """Whether the broker has to be asked."""
        return self._waiting is not None

    def read(self, members: Members) -> None:
        """Take the broker's answer. If `is_suspect` is true afterwards, a change came that doesn't fit it."""
        waiting, self._waiting = self._waiting or [], None
        before, is_first = self.members, self.version is None
        self.version = members.version
        self.members = dict(members.members)
        self.count = len(self.members)
        self._is_due = True
        if self.followers:
            # After the first answer, only members of changes that came meanwhile count as joined.
            came = {key for change in waiting for key in change.joined}
            news = {key: info for key, info in self.members.items() if (key in came if is_first else key not in before)}
            self._tell_followers(news, {key: info for key, info in before.items() if key not in self.members})
        for change in waiting:
            self.take(change)

    def _tell_followers(self, joined: Infos, left: Infos) -> None:
        if joined or left:
            for tell, followers in self.followers.items():
                tell(self.channel, list(followers), joined, left)

    def _apply(self, change: PresenceChange) -> None:
        self.version = change.version
        if self.followers:
            known = self.members
            left = {key: known[key] for key in change.left if key in known}
            self._tell_followers({key: info for key, info in change.joined.items() if key not in known}, left)
        for key in change.left:
            self.members.pop(key, None)
        self.members.update(change.joined)
        self.count = len(self.members)
        self._is_due = True

    # Messages for clients.

    @property
    def is_due(self) -> bool:
        """Whether there is something to tell."""
        return self._is_due and self.version is not None

    def snapshot(self) -> Message:
        """Return the first message for a client: what the other watchers know, so that later changes fit it.

        It is made once for all clients.
        """
        if self._snapshot is None:
            known = self.channel, self._told_version, self._told_count
            self._snapshot = (
                events.presence_list(*known, self._told, self.by) if self._knows_list else events.presence_count(*known)
            )
        return self._snapshot

    def difference(self) -> Message | None:
        """Return the message with all changes since the last one; `None` if nothing has changed."""
        assert self.version is not None
        self._is_due = False
        if self.count == self._told_count and (not self._knows_list or self._seen() == self._told):
            return None
        changes = self._changes() if self._knows_list and self.count <= self.up_to else None
        self.told()
        return changes or self.snapshot()

    def told(self) -> None:
        """Take note that all watchers know the present state."""
        assert self.version is not None
        self._snapshot = None
        self._told_version = self.version
        self._told_count = self.count
        self._knows_list = self.count <= self.up_to
        self._told = self._seen() if self._knows_list else {}

    def _changes(self) -> Message:
        assert self.version is not None
        seen = self._seen()
        joined = {key: info for key, info in seen.items() if self._told.get(key) != info}
        left = [key for key in self._told if key not in seen]
        return events.presence_changes(
            self.channel, self._told_version, self.version, self.count, joined, left, self.by
        )

    def _seen(self) -> dict[str, bytes]:
        return seen_of(self.members, self.by)


class Watches:
    """The channels that clients of this node watch. Nothing runs while there are none.

    Args:
        read: Asks the broker.
        say: Tells clients.
        tasks: Run the questions.
    """

    def __init__(self, read: Read, say: Say, tasks: Tasks) -> None:
        self._read = read
        self._say = say
        self._tasks = tasks
        self._watches: dict[str, Watch] = {}
        self._reading_anew = asyncio.Semaphore(_READ_AT_ONCE)
        # The channels whose watchers are being told of changes.
        self._telling: deque[Watch] = deque()
        # How often each connection was sent the whole list of a channel since changes were last told.
        self._lately: Counter[tuple[str, str]] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._is_ended = False

    def __len__(self) -> int:
        return len(self._watches)

    async def begin(self, connection: Present, channel: str, presence: Presence, id_: object = None) -> bool:
        """Tell a connection who is in a channel, now and at each change, as long as it is in the channel.

        Args:
            connection: The connection.
            channel: The channel.
            presence: The channel's options.
            id_: The `id` of the command that asked for it.

        Returns:
            Whether it is told. It isn't if it has left the channel meanwhile.

        Raises:
            EngineError: If the broker can't be asked.
            Refused: If it was sent the whole list too often in the last second. A list may be long, a command is short.
        """
        if self._lately[connection.id, channel] >= _LISTS_AT_ONCE:
            raise Refused(ErrorCode.LIMIT_EXCEEDED, "the list was sent just now; changes are sent automatically")
        watch = self._watches.get(channel)
        if watch is None:
            watch = self._watches[channel] = Watch(channel, presence)
        watch.expected += 1
        try:
            if watch.version is None:
                await self._first_answer(watch)
            if not connection.is_open or channel not in connection.channels or self._is_ended:
                return False
            if not watch.watchers:
                watch.told()
            watch.watchers[connection] = None
        finally:
            watch.expected -= 1
            self._forget_unwatched(watch)
        self._lately[connection.id, channel] += 1
        self._tell_later()
        message = watch.snapshot()
        self._say((connection,), message if id_ is None else events.answering(message, id_))
        return True

    def follow(self, connection: Present, channel: str, presence: Presence, tell: Tell) -> None:
        """Tell a connection at once of each join and leave in a channel, as long as it is in the channel."""
        if self._is_ended:
            return
        watch = self._watches.get(channel)
        if watch is None:
            watch = self._watches[channel] = Watch(channel, presence)
            self._tasks.spawn(self._ask_until_answered(watch), "presence")
        watch.followers.setdefault(tell, {})[connection] = None

    async def _first_answer(self, watch: Watch) -> None:
        # All callers share one question, which goes on if the first caller is cancelled.
        if watch.asking is None or watch.asking.done():
            watch.asking = self._tasks.begin(self._ask(watch), "presence", Context())
        await asyncio.shield(watch.asking)

    def end(self, connection: Present, channel: str) -> None:
        """Tell a connection no more about a channel."""
        watch = self._watches.get(channel)
        if watch is None:
            return
        watch.watchers.pop(connection, None)
        for tell, followers in list(watch.followers.items()):
            followers.pop(connection, None)
            if not followers:
                del watch.followers[tell]
        self._forget_unwatched(watch)

    def _forget_unwatched(self, watch: Watch) -> None:
        is_wanted = watch.watchers or watch.followers or watch.expected
        if not is_wanted and self._watches.get(watch.channel) is watch:
            del self._watches[watch.channel]

    def take(self, change: PresenceChange) -> None:
        """Take a change that came from the broker."""
        watch = self._watches.get(change.audience.name)
        if watch is None:
            return
        if watch.take(change):
            self._tasks.spawn(self._ask_until_answered(watch), "presence")
        if watch.is_due and watch.watchers:
            self._tell_later()

    def read_anew(self) -> None:
        """Ask again who is in the channels, because changes may have been missed."""
        for watch in self._watches.values():
            if watch.version is not None:
                watch.suspect()
                self._tasks.spawn(self._ask_until_answered(watch), "presence")

    async def _ask(self, watch: Watch) -> None:
        async with watch.reading:
            while watch.is_suspect:
                watch.read(await self._read(watch.channel))
        if watch.is_due and watch.watchers:
            self._tell_later()

    async def _ask_until_answered(self, watch: Watch) -> None:
        await self._tasks.begun()
        while self._watches.get(watch.channel) is watch and not self._is_ended:
            try:
                async with self._reading_anew:
                    return await self._ask(watch)
            except EngineError:
                await asyncio.sleep(_AGAIN_SECONDS)

    # Telling.

    def _tell_later(self) -> None:
        if self._timer is None and not self._is_ended:
            self._timer = asyncio.get_running_loop().call_later(_TELL_SECONDS, self._tell_all, context=Context())

    def _tell_all(self) -> None:
        self._timer = None
        self._lately.clear()
        is_idle = not self._telling
        self._telling.extend(watch for watch in self._watches.values() if watch.is_due and not watch.untold)
        if is_idle:
            self._tell_some()

    def _tell_some(self) -> None:
        room = _AT_ONCE
        while self._telling and room > 0:
            room -= self._tell(self._telling[0], room)
            if not self._telling[0].untold:
                self._telling.popleft()
        if self._telling:
            asyncio.get_running_loop().call_soon(self._tell_some, context=Context())

    def _tell(self, watch: Watch, most: int) -> int:
        # Tells some of the watchers of a channel; returns for how many connections that counts.
        if not watch.untold:
            watch.message = watch.difference()
            watch.untold = [] if watch.message is None else list(watch.watchers)
        some = [each for each in watch.untold[:most] if each in watch.watchers]
        del watch.untold[:most]
        if some and watch.message is not None:
            self._say(some, watch.message)
        return _CHANNEL_COUNTS + len(some)

    def aclose(self) -> None:
        """Tell no connection any more."""
        self._is_ended = True
        self._watches.clear()
        self._telling.clear()
        self._lately.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
