"""The engine for a single process. What is published is received at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import sys
from collections import OrderedDict, deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from itertools import islice
from secrets import token_urlsafe
from typing import Any, Self

from wsbroadcast.audience import Audience
from wsbroadcast.engines.contract import Engine, Health, Receiver
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, LifecycleError
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.logs import about, logger
from wsbroadcast.presence import Members, Roll
from wsbroadcast.publication import Control, Position, PresenceChange, Publication

# Servers that can run an app in several processes, and the option that they all have for it.
_SERVER = re.compile(r"(uvicorn|gunicorn|hypercorn|granian|fastapi)(\.exe|[/\\]__main__\.py)?$")
_OPTION = re.compile(r"(?<!\S)(?:--workers|-w)[ =]?(\d+)(?!\S)")


# How many keys are remembered in each audience, whether their publications are still kept or not.
_KEYS = 1000

# After so many new audiences, histories are removed to which nothing was published for long.
_SWEEP = 4096


class Log:
    """The history of one audience in this process."""

    __slots__ = ("_kept", "_keys", "_touched", "epoch", "offset")

    def __init__(self, now: float) -> None:
        self.epoch = token_urlsafe(9)
        """The epoch, which ends with this object."""
        self.offset = 0
        """The offset of the newest publication."""
        self._kept: deque[Publication] = deque()
        # The offsets of publications that had a key, by that key.
        self._keys: OrderedDict[str, int] | None = None
        self._touched = now

    def append(self, publication: Publication, history: History, now: float) -> Position:
        """Keep a publication, and give it its position."""
        previous = self.offset
        self.offset = previous + 1
        position = Position(self.epoch, self.offset)
        publication.place(position, previous, now)
        self._touched = now
        if publication.message.size <= history.max_kept_bytes:
            kept = self._kept
            kept.append(publication)
            if len(kept) > history.messages or now - kept[0].kept_at > history.seconds:
                kept.popleft()
        return position

    def repeat(self, key: str) -> Position | None:
        """Return the position of the publication that had this key; `None` if the key is new."""
        offset = None if self._keys is None else self._keys.get(key)
        return None if offset is None else Position(self.epoch, offset)

    def remember(self, key: str) -> None:
        """Remember the key of the newest publication."""
        if self._keys is None:
            self._keys = OrderedDict()
        self._keys[key] = self.offset
        if len(self._keys) > _KEYS:
            self._keys.popitem(last=False)

    def is_forgotten(self, now: float, history: History) -> bool:
        """Tell whether nothing was published for longer than `history.remember`."""
        return now - self._touched > history.remember

    def read(self, since: int | None, history: History, now: float) -> Replay:
        """Return what was kept after an offset, or all of it."""
        while self._kept and now - self._kept[0].kept_at > history.seconds:
            self._kept.popleft()
        publications = list(islice(self._kept, max(0, len(self._kept) - history.messages), None))
        base = self.offset
        for publication in reversed(publications):
            if publication.offset != base:
                break  # the publication after this one was too large to be kept
            base = publication.previous
        if since is not None:
            publications = [each for each in publications if each.offset > since]
            base = max(base, since)
        return Replay(Position(self.epoch, self.offset), publications, base)


class MemoryEngine(Engine):
    """Reaches only the connections of this process. It does no I/O, and has no options.

    What it keeps is gone when the manager is closed or the process ends.
    """

    name = "memory"
    links_nodes = False
    rules: HistoryRules | None = None

    def __init__(self) -> None:
        self._receiver: Receiver | None = None
        self._logs: dict[Audience, Log] = {}
        self._made = 0
        self._roll = Roll()
        self._incarnation = ""
        # The event loop and the process in which it was started. A forked process has another number.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make an engine from `memory://`.

        Raises:
            ConfigurationError: If the URL has a host or a path.
        """
        if url.removeprefix("memory:").strip("/"):
            raise ConfigurationError("the memory engine takes no host, no path and no options: write memory://")
        return cls()

    async def start(self, receiver: Receiver) -> None:
        """Begin to hand publications to the receiver. Log a warning if several processes serve the app.

        Raises:
            LifecycleError: If the engine runs already.
        """
        loop = self._loop
        if self._receiver is not None and loop is not None and loop.is_running() and self._process == os.getpid():
            raise LifecycleError("the memory engine is started already: each manager needs one of its own")
        _warn_of_several_workers()
        self._receiver, self._loop, self._process = receiver, asyncio.get_running_loop(), os.getpid()

    async def aclose(self) -> None:
        """Stop, and forget what was kept."""
        self._receiver = self._loop = None
        self._logs.clear()
        self._roll, self._incarnation = Roll(), ""

    def publish(self, publication: Publication | Control) -> Coroutine[Any, Any, None]:
        """Deliver to this node's connections; return when they have it."""
        return self._started().deliver(publication)  # the receiver's coroutine itself, which saves one

    def publish_nowait(self, publication: Publication | Control) -> None:
        """Deliver to this node's connections, after what waits for `on_deliver` hooks."""
        self._started().take(publication)

    # Histories.

    def keep(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        """Say what is kept. There is no broker at which the rules are written down."""
        self.rules = rules

    async def append(self, publication: Publication, history: History, key: str | None = None) -> Appended:
        """Keep a publication and deliver it to this node's connections; return when they have it."""
        receiver, log = self._started(), self._log(publication.audience, history)
        if key is not None and (position := log.repeat(key)) is not None:
            return Appended(position, is_repeat=True)
        position = log.append(publication, history, self._now())
        if key is not None:
            log.remember(key)
        await receiver.deliver(publication)
        return Appended(position)

    def append_nowait(self, publication: Publication, history: History) -> None:
        """Keep a publication and deliver it to this node's connections, after what waits for `on_deliver` hooks."""
        receiver = self._started()
        self._log(publication.audience, history).append(publication, history, self._now())
        receiver.take(publication)

    async def read(self, audience: Audience, since: Position | None, history: History) -> Replay:
        """Return what was kept after a position, or all of it."""
        self._started()
        log = self._log(audience, history)
        is_its_own = since is not None and since.epoch == log.epoch and 0 <= since.offset <= log.offset
        return log.read(since.offset if is_its_own and since is not None else None, history, self._now())

    async def positions(self, audiences: Sequence[Audience], histories: Sequence[History]) -> Sequence[Position]:
        """Return the newest position of each audience."""
        self._started()
        logs = [self._log(audience, history) for audience, history in zip(audiences, histories, strict=True)]
        return [Position(log.epoch, log.offset) for log in logs]

    async def forget(self, audience: Audience) -> None:
        """Remove the history of an audience."""
        self._started()
        self._logs.pop(audience, None)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def _log(self, audience: Audience, history: History) -> Log:
        log = self._logs.get(audience)
        if log is None:
            self._sweep()
            log = self._logs[audience] = Log(self._now())
        return log

    def _sweep(self) -> None:
        # Histories are removed while new ones are made, so no task is needed for it.
        self._made += 1
        if self._made % _SWEEP == 0 and self.rules is not None:
            now = self._now()
            forgotten = [
                audience
                for audience, log in self._logs.items()
                if (history := self.rules.of(audience)) is None or log.is_forgotten(now, history)
            ]
            for audience in forgotten:
                del self._logs[audience]

    # Presence. The lease is seen by nobody else, and ends with the process.

    @property
    def incarnation(self) -> str:
        """The name of this node's lease; empty before the first `renew`."""
        return self._incarnation

    async def renew(self, seconds: float) -> bool:
        """Take the lease once; it never runs out."""
        self._started()
        is_same = bool(self._incarnation)
        self._incarnation = self._incarnation or token_urlsafe(9)
        return is_same

    async def alive(self) -> frozenset[str]:
        """Return this node's incarnation."""
        self._started()
        return frozenset({self._incarnation} if self._incarnation else ())

    async def enter(self, channel: str, members: Mapping[str, bytes]) -> PresenceChange | None:
        """Say that members are in a channel."""
        return self._tell(self._roll.enter(channel, self._incarnation, members))

    async def leave(self, channel: str, members: Iterable[str]) -> PresenceChange | None:
        """Say that members are no longer in a channel."""
        return self._tell(self._roll.leave(channel, self._incarnation, members))

    async def members(self, channel: str) -> Members:
        """Return who is in a channel."""
        self._started()
        return self._roll.members(channel)

    async def count(self, channel: str) -> int:
        """Return how many are in a channel."""
        self._started()
        return self._roll.count(channel)

    async def channels_of(self, member: str) -> frozenset[str]:
        """Return the channels that a member is in."""
        self._started()
        return self._roll.channels_of(member)

    async def sweep(self) -> Sequence[PresenceChange]:
        """Return no changes: there is no other node whose lease could run out."""
        self._started()
        return ()

    def _tell(self, change: PresenceChange | None) -> PresenceChange | None:
        receiver = self._started()
        if change is not None:
            receiver.take(change)
        return change

    async def health(self) -> Health:
        """Tell whether the engine was started."""
        return Health(self.name, self._receiver is not None, "" if self._receiver else "not started")

    def _started(self) -> Receiver:
        if self._receiver is None:
            raise EngineUnavailable("the memory engine is not started")
        return self._receiver


def _warn_of_several_workers() -> None:
    sign = sign_of_several_workers(os.environ, sys.argv, is_child=multiprocessing.parent_process() is not None)
    if sign:
        logger.warning(
            "%s, and memory:// doesn't link them: a broadcast reaches only the connections of the process it is made "
            "in. Give the ConnectionManager sqlite:///messages.db, which links the processes of one machine, or the "
            "URL of a broker, such as redis://localhost; or run one worker",
            sign,
            extra=about("engine.several_workers"),
        )


def sign_of_several_workers(environ: Mapping[str, str], argv: Sequence[str], *, is_child: bool) -> str:
    """Return the sign that several processes serve the app, such as an option; empty if there is none.

    The command line counts if a server has it, or the process is a `multiprocessing` child, which has its parent's
    command line. A number of processes that a program or a file gives to its server isn't known here.
    """
    options = argv[1:] if is_child or _SERVER.search(" ".join(argv[:1])) else []
    if "--reload" in options:  # then there is one worker, whatever number is given
        return ""
    numbers = [(int(number), "the command line") for number in _OPTION.findall(" ".join(options))]
    if not numbers:
        variables = ("GRANIAN_WORKERS", "WEB_CONCURRENCY") if is_child else ("WEB_CONCURRENCY",)
        numbers = [(int(environ[each]), each) for each in variables if environ.get(each, "").isdecimal()]
    number, where = max(numbers[-1:], default=(1, ""))
    return f"{where} asks for {number} workers" if number > 1 else ""
