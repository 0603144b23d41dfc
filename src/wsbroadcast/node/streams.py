"""The streams of one node: the runs that are produced here, and the viewers here of runs on any node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Self

from wsbroadcast.audience import Audience
from wsbroadcast.close_codes import CloseCode
from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.contract import Engine
from wsbroadcast.engines.lease import LeaseKeeper
from wsbroadcast.exceptions import EngineError, Lagged, StreamNotFound
from wsbroadcast.history import FIRST
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.message import JSONDefault
from wsbroadcast.node.continuity import Continuity
from wsbroadcast.node.demand import Demand
from wsbroadcast.node.drain import DRAIN
from wsbroadcast.node.listening import Listener
from wsbroadcast.publication import Position, Publication
from wsbroadcast.streams.entries import End, Reader, StreamEntry, Taken, read_part
from wsbroadcast.streams.ledger import Ledger, Start, log_of
from wsbroadcast.streams.producers import Producers

# If nothing has come from a run for so many seconds, its producer may be gone.
_QUIET_SECONDS = 3.0

# How often a log is read again if entries are missing.
_READS = 3


class LogListener(Listener):
    """Brings the entries of a log, and those that come later.

    Args:
        audience: The audience of the log.
        changed: Called when there may be more entries.
    """

    def __init__(self, audience: Audience, changed: Callable[[], None] | None = None) -> None:
        super().__init__((), None, 1, "raise")
        self.audiences = [audience]
        self._changed = changed

    @property
    def has_place(self) -> bool:
        """Whether it begins at the beginning of the log. If not, the log couldn't be read."""
        return bool(self._places)

    def wake(self) -> None:
        """Check whether something has come."""
        super().wake()
        if self._changed is not None:
            self._changed()

    def take(self) -> Publication | None:
        """Return the next entry that has come; `None` if there is none.

        Raises:
            Lagged: If entries are missing. It is raised once for them.
        """
        return self._next()


class Follower:
    """The entries of a stream for one viewer: `async for entry in entries`.

    It is only a position in the log, so no producer ever waits for it. A viewer that reads late gets the text that came
    meanwhile as one entry. It ends after the entry `end`.

    Args:
        start: The run.
        ledger: Reads the log again, if entries are missing.
        since: The viewer's position; `None` if it has seen nothing.
    """

    def __init__(self, start: Start, ledger: Ledger, since: Position | None) -> None:
        self.start = start
        """The run."""
        self._ledger = ledger
        self._changed = asyncio.Event()
        self.listener = LogListener(log_of(start.run), self._changed.set)
        """Brings the entries of the log."""
        is_ours = since is not None and since.epoch == start.run
        self._since = since.offset if since is not None and is_ours else 0
        self._reader = Reader(start.run, self._since)
        self._must_reset = since is not None and not is_ours
        self._has_hole = False
        self._is_nudged = False
        self._waiting: list[StreamEntry] = []
        self.heard_at = asyncio.get_running_loop().time()
        """When something came last, in seconds of the event loop's clock."""
        self.closing: tuple[int, str] | None = None
        """The close code and reason, if the viewer was sent away; else `None`."""

    @property
    def run(self) -> str:
        """The id of the run."""
        return self.start.run

    @property
    def user(self) -> str | None:
        """The user of the stream, as text; `None` for none."""
        return self.start.user

    @property
    def position(self) -> Position:
        """The viewer's position once it has got everything that has come. Give it to `since` to go on from there."""
        return self._reader.position

    @property
    def end(self) -> End | None:
        """How the run has ended; `None` if its end hasn't come yet."""
        return self._reader.end

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come, because the run has ended or the manager ends. Entries may still be there."""
        return self.closing is not None or self._reader.end is not None

    def __aiter__(self) -> Self:
        """Iterate up to the end of the run, or of the manager."""
        return self

    async def __anext__(self) -> StreamEntry:
        """Wait for the next entry. If the call is cancelled, nothing is lost."""
        while not self._waiting and not self.is_over:
            self._is_nudged = False
            await self._wait()
        if not self._waiting:
            raise StopAsyncIteration
        return self._waiting.pop(0)

    def take_nowait(self) -> list[StreamEntry]:
        """Return all entries that have come."""
        waiting, self._waiting = self._waiting, []
        return waiting

    async def take(self, seconds: float | None = None) -> list[StreamEntry]:
        """Wait for entries, for at most so many seconds or until `nudge`; return all that have come."""
        if not self._waiting:
            self._is_nudged = False
            if seconds is None:
                await self._wait()
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._wait()
        return self.take_nowait()

    def nudge(self) -> None:
        """Let `take` return, although nothing has come."""
        self._is_nudged = True
        self._changed.set()

    def close(self, code: int = CloseCode.GOING_AWAY, reason: str = "") -> None:
        """Send the viewer away. The run goes on."""
        if self.closing is None:
            self.closing = code, reason
        self._changed.set()

    # For the node.

    async def begin(self, end: End | None) -> None:
        """Read what is in the log.

        Args:
            end: How the run has ended; `None` if it hasn't.

        Raises:
            EngineUnavailable: If the broker can't be asked.
        """
        self._drain()
        is_behind = self._reader.at < self._since or (end is not None and self._reader.end is None)
        if is_behind or self._has_hole or not self.listener.has_place:
            self.feed(await self._ledger.read_log(self.start))
        if self._reader.at < self._since:  # the run doesn't have so much, so the position is wrong
            self._must_reset, self._reader = True, Reader(self.run)
            self.feed(await self._ledger.read_log(self.start))
        if self._has_hole or (end is not None and self._reader.end is None):
            self._give_up()
        self._deliver()

    def feed(self, publications: Iterable[Publication]) -> None:
        """Take the whole log that was read."""
        self._has_hole = False
        for publication in publications:
            self._take(publication)
        self._deliver()
        self._changed.set()

    # Inside.

    async def _wait(self) -> None:
        while not self._waiting and not self.is_over and not self._is_nudged:
            await self._changed.wait()
            self._changed.clear()
            self._drain()
            if self._has_hole:
                await self._heal()
            self._deliver()

    def _drain(self) -> None:
        while True:
            try:
                publication = self.listener.take()
            except Lagged:
                self._has_hole = True
                continue
            if publication is None:
                return
            self._take(publication)

    def _take(self, publication: Publication) -> None:
        part = read_part(publication.message.payload)
        if part is not None:
            self.heard_at = asyncio.get_running_loop().time()
            if self._reader.take(part) is Taken.HOLE:
                self._has_hole = True

    async def _heal(self) -> None:
        for attempt in range(_READS):
            try:
                self.feed(await self._ledger.read_log(self.start))
            except EngineError:
                await asyncio.sleep(attempt)
                continue
            if not self._has_hole:
                return
        self._give_up()

    def _give_up(self) -> None:
        self._has_hole = False
        self._reader.finish(End("error", "a part of it is lost"))

    def _deliver(self) -> None:
        if self._must_reset:
            self._must_reset = False
            self._waiting.append(StreamEntry("reset", Position(self.run, 0)))
        self._waiting += self._reader.pop()


class NodeStreams:
    """The streams of this node.

    Args:
        engine: Carries the streams.
        lease: The lease of this node.
        continuity: Brings logs to this node.
        demand: Asks the engine for their audiences.
        json_default: Writes values that JSON doesn't know.

    Raises:
        ConfigurationError: If the engine can't carry streams.
    """

    def __init__(
        self,
        engine: Engine,
        lease: LeaseKeeper,
        continuity: Continuity,
        demand: Demand,
        json_default: JSONDefault | None,
    ) -> None:
        self._continuity = continuity
        self._demand = demand
        self.producers = Producers(engine, lease, self, json_default)
        """The runs that are produced here."""
        self._ledger = self.producers.ledger
        self._followers: dict[Follower, str | None] = {}
        self._tasks = Tasks()
        self._watching: asyncio.Task[None] | None = None
        self._throttle = Throttle()

    # Viewers.

    @asynccontextmanager
    async def follow(self, id_: str, since: Position | None, viewer: str | None = None) -> AsyncGenerator[Follower]:
        """Watch a stream, for the length of a block.

        Args:
            id_: The id of the stream.
            since: The viewer's position; `None` if it has seen nothing.
            viewer: The user who watches, as text; `None` for none.

        Raises:
            StreamNotFound: If there is no such stream.
            EngineUnavailable: If the broker can't be asked.
        """
        known = await self.producers.find(id_)
        if known is None or known.is_over:
            raise StreamNotFound(id_)
        follower = Follower(known.start, self._ledger, since)
        self._followers[follower] = viewer
        try:
            # Any node may close the user's viewers. So its audience is held, even if it has no connection here.
            users = () if viewer is None else (Audience("user", viewer),)
            async with self._demand.holding(users), self._listening(follower.listener):
                await follower.begin(known.end)
                if not follower.is_over:
                    self._watch()
                yield follower
        finally:
            del self._followers[follower]
            follower.close()

    @asynccontextmanager
    async def _listening(self, listener: LogListener) -> AsyncGenerator[None]:
        since = dict.fromkeys(listener.audiences, FIRST)
        async with self._demand.holding(listener.audiences), self._continuity.listen(listener, since):
            yield

    @asynccontextmanager
    async def listen(self, audience: Audience) -> AsyncGenerator[AsyncIterator[Publication]]:
        """Get what is in the log of an audience, and what comes later."""
        listener = LogListener(audience)
        async with self._listening(listener):
            yield self._whole(listener, audience)

    async def _whole(self, listener: LogListener, audience: Audience) -> AsyncGenerator[Publication]:
        # Yields what comes. If something may be missing, it yields all that is kept.
        while True:
            try:
                yield await anext(listener)
            except Lagged:
                for publication in await self._ledger.read_requests(audience):
                    yield publication
            except StopAsyncIteration:
                return

    def dismiss(self, user: str, code: int, reason: str) -> None:
        """Send the viewers of a user away."""
        for follower, viewer in list(self._followers.items()):
            if viewer == user:
                follower.close(code, reason)

    def send_away(self) -> None:
        """Send all viewers away. They come back to another node, and go on where they were."""
        for follower in list(self._followers):
            follower.close(CloseCode.SERVICE_RESTART, DRAIN)

    # Checking that producers are alive.

    def _watch(self) -> None:
        if self._watching is None or self._watching.done():
            self._watching = self._tasks.spawn(self._look(), "stream watch")

    async def _look(self) -> None:
        await self._tasks.begun()
        while any(not each.is_over for each in self._followers):
            await asyncio.sleep(_QUIET_SECONDS)
            since = asyncio.get_running_loop().time() - _QUIET_SECONDS
            quiet = [each for each in self._followers if not each.is_over and each.heard_at <= since]
            if not quiet:
                continue
            try:
                await self._look_at(quiet)
            except EngineError as error:
                if self._throttle.is_due("look"):
                    logger.warning(
                        "it can't be checked now whether the producers of streams are alive (%s); trying again",
                        error,
                        extra=about("stream.unwatched"),
                    )

    async def _look_at(self, quiet: list[Follower]) -> None:
        alive = await self._ledger.alive()
        dead = {each.run: each.start for each in quiet if each.start.node not in alive}
        for start in dead.values():
            await self._ledger.bury(start)
            publications = await self._ledger.read_log(start)
            for follower in list(self._followers):
                if follower.run == start.run:
                    follower.feed(publications)

    async def aclose(self) -> None:
        """End. Viewers are sent away, and runs that are produced here are lost."""
        await self.producers.aclose()
        for follower in list(self._followers):
            follower.close(CloseCode.GOING_AWAY, "the server is going away")
        await self._tasks.cancel()
