"""Which run a stream has now, its state, and who may begin the next one. Each stream has a small log for this.

    {"type":"start","run":"kX2…","node":"mH3…","user":"7","at":1767225600.0,"ttl":3600}
    {"type":"end","run":"kX2…","state":"done","at":1767225642.5}

The order of this log decides. A start counts if the run before it has ended. If several come at the same time, the
first one counts. A run whose node has lost its lease is over: the first to notice writes that it is lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from secrets import token_urlsafe
from time import time
from typing import Any

from pydantic_core import from_json, to_json

from wsbroadcast.audience import Audience
from wsbroadcast.engines.contract import Engine, KeepsHistory, KeepsLease, keeps_history
from wsbroadcast.exceptions import ConfigurationError, EngineUnavailable, StreamExists
from wsbroadcast.history import Appended, History, Replay
from wsbroadcast.message import Message
from wsbroadcast.publication import Described, Position, Publication
from wsbroadcast.streams.entries import End, State, read_part, write_part

MAX_SECONDS = 86_400.0
"""The longest that a run lasts, and that it is kept after its end, in seconds."""

MAX_PARTS = 32_768
"""The most publications in the log of a run."""

STREAMS = History(messages=MAX_PARTS + 2, seconds=2 * MAX_SECONDS, remember=2 * MAX_SECONDS)
"""How much is kept of a run. It may last a day, and be read for a day after its end."""

END_KEY = "end"
"""The idempotency key of the end of a run's log: the first end counts."""

REQUESTS = History(messages=1024, seconds=STREAMS.seconds, remember=STREAMS.remember)
"""How much is kept of the requests to a node."""

# For the stream's own log: what came before the last run isn't needed.
_LEDGER = History(messages=64, seconds=STREAMS.seconds, remember=STREAMS.remember)

# How often a start is tried when others start at the same time.
_TRIES = 5


def ledger_of(id_: str) -> Audience:
    """Return the audience of the log that says which run a stream has."""
    return Audience("stream", id_)


def log_of(run: str) -> Audience:
    """Return the audience of the log of a run."""
    return Audience("run", run)


def requests_of(incarnation: str) -> Audience:
    """Return the audience of the log of requests to a node to stop runs."""
    return Audience("run", f"node:{incarnation}")  # no run's id has a colon


def can_stream(engine: Engine) -> tuple[KeepsHistory, KeepsLease]:
    """Return the engine, twice, if it can carry streams.

    Raises:
        ConfigurationError: If it can't.
    """
    try:
        keeper = keeps_history(engine)
    except ConfigurationError:
        keeper = None
    if keeper is None or not isinstance(engine, KeepsLease):
        raise ConfigurationError(
            f"the {engine.name} engine can't carry streams, which need a history and a lease: use memory://, "
            "sqlite:///, redis://, nats:// or postgresql://"
        )
    return keeper, engine


@dataclass(frozen=True, slots=True)
class Start:
    """The beginning of a run."""

    id: str
    """The id of the stream."""
    run: str
    """The run's id."""
    node: str
    """The incarnation of the node that produces it."""
    user: str | None
    """The user whose stream it is."""
    at: float
    """When it began, in seconds since 1970."""
    ttl: float
    """For how many seconds it is kept after its end."""

    @classmethod
    def new(cls, id_: str, node: str, user: str | None, ttl: float) -> Start:
        """Begin another run now."""
        return cls(id_, token_urlsafe(12), node, user, time(), ttl)

    def to_json(self) -> bytes:
        """Return the start as it is written."""
        written: dict[str, Any] = {"type": "start", "run": self.run, "node": self.node, "at": self.at, "ttl": self.ttl}
        if self.user is not None:
            written["user"] = self.user
        return to_json(written)

    @classmethod
    def of(cls, id_: str, found: Mapping[str, Any]) -> Start | None:
        """Read a start that was written; `None` if it is something else."""
        match found:
            case {
                "run": str() as run,
                "node": str() as node,
                "at": int() | float() as at,
                "ttl": int() | float() as ttl,
            }:
                user = found.get("user")
                return cls(id_, run, node, user if isinstance(user, str) else None, at, ttl)
        return None

    def history(self, seconds: float) -> History:
        """Return how much is kept of a run that ended this many seconds after its start."""
        kept = min(max(seconds, 0.0) + self.ttl + 60.0, STREAMS.seconds)
        return History(messages=STREAMS.messages, seconds=kept, remember=STREAMS.remember)


class StreamStatus(Described):
    """The state of a stream. A route may return it as it is."""

    __slots__ = ("ended_at", "error", "id", "run", "started_at", "state", "user")

    def __init__(self, start: Start, state: State, ended_at: float | None, error: str) -> None:
        self.id = start.id
        """Its name."""
        self.run = start.run
        """The id of its run. No other run has it. It is the epoch in the positions of its entries."""
        self.user = start.user
        """The user whose stream it is, as text."""
        self.state: State = state
        """`running`, or how it has ended: `done`, `error`, `cancelled`, or `lost` with its node."""
        self.started_at = start.at
        """When it began, in seconds since 1970."""
        self.ended_at = ended_at
        """When it ended, in seconds since 1970; `None` while it runs."""
        self.error = error
        """What went wrong."""

    @property
    def is_running(self) -> bool:
        """Whether it is still being produced."""
        return self.state == "running"

    def keys(self) -> Iterable[str]:
        """Return the names of what is written as JSON."""
        return "id", "run", "user", "state", "started_at", "ended_at", "error"

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __repr__(self) -> str:
        return f"<StreamStatus {self.id!r} {self.state}>"


@dataclass(frozen=True, slots=True)
class Known:
    """What the log of a stream says about its newest run."""

    start: Start
    """How it began."""
    end: End | None
    """How it has ended; `None` if it hasn't."""
    ended_at: float | None
    """When it ended, in seconds since 1970."""
    is_over: bool
    """Whether it ended so long ago that it isn't shown any more."""

    @property
    def status(self) -> StreamStatus:
        """The state of the stream."""
        if self.end is None:
            return StreamStatus(self.start, "running", None, "")
        return StreamStatus(self.start, self.end.state, self.ended_at, self.end.error)


class _Found:
    """A stream's log, read from its beginning."""

    def __init__(self, id_: str, replay: Replay) -> None:
        self._id = id_
        self.top = replay.top
        """The newest position of the log."""
        self.offset: int | None = None
        """The offset of the run's start."""
        self.start: Start | None = None
        """The start of the newest run."""
        self.end: End | None = None
        """How it has ended; `None` if it hasn't."""
        self._ended_at: float | None = None
        self._ended = 0.0
        for publication in replay.publications:
            self._read(publication)

    def _read(self, publication: Publication) -> None:
        try:
            found = from_json(publication.message.payload)
        except ValueError:
            return
        match found:
            case {"type": "start"} if self.start is None or self.end is not None:
                if (start := Start.of(self._id, found)) is not None:
                    self.start, self.end, self.offset = start, None, publication.offset
            case {"type": "end", "run": run} if self.start is not None and run == self.start.run and self.end is None:
                self.end, self._ended = End.of(found), publication.kept_at
                at = found.get("at")
                self._ended_at = at if isinstance(at, (int, float)) else None

    def known(self) -> Known | None:
        """Return what is known of the run; `None` if there is none."""
        if self.start is None:
            return None
        age = asyncio.get_running_loop().time() - self._ended
        return Known(self.start, self.end, self._ended_at, self.end is not None and age > self.start.ttl)

    @property
    def key(self) -> str:
        """The idempotency key of the next start. If several read the same log, only the first of them begins a run."""
        return f"run:{self.top.epoch}:{self.top.offset if self.offset is None else self.offset}"


class Ledger:
    """Reads and writes the logs of streams.

    Args:
        keeper: The engine, which keeps logs.
        lessor: The same engine, which knows the nodes that are alive.
    """

    def __init__(self, keeper: KeepsHistory, lessor: KeepsLease) -> None:
        self._keeper = keeper
        self._lessor = lessor

    async def start(self, mine: Start) -> None:
        """Begin a run.

        Raises:
            StreamExists: If the stream has a run that goes on.
            EngineUnavailable: If the broker can't be reached. The run may have begun.
        """
        id_ = mine.id
        for attempt in range(_TRIES):
            found = await self._read(id_)
            if found.start is not None and found.start.run == mine.run:
                return
            if found.start is not None and found.end is None and await self._goes_on(found.start):
                break
            try:
                appended = await self._write(id_, mine.to_json(), _LEDGER, found.key)
            except EngineUnavailable as error:
                if not error.may_have_been_sent or attempt == _TRIES - 1:
                    raise
                continue
            if not appended.is_repeat and appended.position == Position(found.top.epoch, found.top.offset + 1):
                return
            # Else another start came in between, or this engine leaves gaps in its offsets: the next attempt shows.
        raise StreamExists(id_)

    async def find(self, id_: str) -> Known | None:
        """Return the newest run of a stream. If its node is dead, end it first.

        Raises:
            EngineUnavailable: If the broker can't be asked.
        """
        found = await self._read(id_)
        if found.start is not None and found.end is None and not await self._goes_on(found.start):
            found = await self._read(id_)
        return found.known()

    async def _goes_on(self, start: Start) -> bool:
        # A dead node writes nothing any more. The first to notice ends the run: first in its log, for the viewers.
        if start.node in await self._lessor.alive():
            return True
        await self.bury(start)
        return False

    async def bury(self, start: Start) -> None:
        """End a run as `lost`, because its node is dead."""
        await self.end_log(start, End("lost"))
        await self.end(start, End("lost"))

    async def end_log(self, start: Start, end: End) -> None:
        """End the log of a run, unless it has an end."""
        publication = Publication(Message(write_part(0, (), end), "json"), log_of(start.run))
        await self._keeper.append(publication, start.history(time() - start.at), END_KEY)

    async def end(self, start: Start, end: End) -> None:
        """Write into the stream's log how a run has ended."""
        written = {"type": "end", "run": start.run, "at": time(), **end.to_json()}
        # It is kept twice as long as the run can be read, so the owner is still known if a viewer comes a little later.
        seconds = start.history(time() - start.at + start.ttl).seconds
        history = History(messages=_LEDGER.messages, seconds=seconds, remember=_LEDGER.remember)
        await self._write(start.id, to_json(written), history, f"end:{start.run}")

    async def end_of(self, start: Start) -> End | None:
        """Return how the log of a run has ended; `None` if it hasn't."""
        for publication in await self.read_log(start):
            part = read_part(publication.message.payload)
            if part is not None and part.end is not None:
                return part.end
        return None

    async def read_log(self, start: Start) -> Sequence[Publication]:
        """Read the log of a run from its beginning."""
        return (await self._keeper.read(log_of(start.run), None, STREAMS)).publications

    async def read_requests(self, audience: Audience) -> Sequence[Publication]:
        """Read the requests to a node."""
        return (await self._keeper.read(audience, None, REQUESTS)).publications

    async def alive(self) -> frozenset[str]:
        """Return the incarnations that are alive."""
        return await self._lessor.alive()

    async def ask_to_stop(self, start: Start) -> None:
        """Ask the node of a run to stop it."""
        publication = Publication(Message(to_json({"stop": start.run}), "json"), requests_of(start.node))
        await self._keeper.append(publication, REQUESTS, f"stop:{start.run}")

    async def _read(self, id_: str) -> _Found:
        return _Found(id_, await self._keeper.read(ledger_of(id_), None, _LEDGER))

    async def _write(self, id_: str, payload: bytes, history: History, key: str) -> Appended:
        return await self._keeper.append(Publication(Message(payload, "json"), ledger_of(id_)), history, key)
