"""The links to Redis: the base of all, and the link to one server, which sentinels may have to name first."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.history import new_epoch
from wsbroadcast.engines.broker.link import Host, Inlet, KeptParcel, Link, Parcel, Stretch
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.presence import PresentLink
from wsbroadcast.engines.redis.connection import Asker, Subscriber, Wire
from wsbroadcast.engines.redis.history import Keeper, Written
from wsbroadcast.engines.redis.presence import Held, RedisPresence, Servers
from wsbroadcast.engines.redis.protocol import ErrorReply, Reply, pack
from wsbroadcast.engines.redis.target import TO_BE_PRESENT, Access, Target
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.options import Timing
from wsbroadcast.publication import Position

T = TypeVar("T")

# A sentinel, or a node of a cluster, that hasn't answered after this part of the time to connect is left out, because
# others may.
_ASK_PART = 1 / 3


class Answer(NamedTuple):
    """The answer of one of several servers."""

    host: Host
    replies: list[Reply]


class RedisLink(PresentLink):
    """The base of the links to Redis. A link has several connections, and is lost when one of them is.

    Args:
        target: Where to connect, and how.
        prefix: The beginning of all names.
        names: The names of audiences.
        timing: How long to wait for Redis.
        max_envelope_bytes: The largest envelope that is published, in bytes. Redis takes 512 MiB. But by default it
            disconnects each subscriber for which more than 32 MiB wait, so one envelope of 31 MiB would cost all nodes
            a gap.
        rules: What is kept; `None` if that isn't known, or if nothing is.
        written: What is known of the rules that are written at the broker.
        held: The lease that this node holds.
        only_publishes: Whether this program receives nothing.
    """

    keeps_without_rules = True

    def __init__(
        self,
        target: Target,
        prefix: str,
        names: AudienceNames,
        timing: Timing,
        max_envelope_bytes: int,
        rules: HistoryRules | None,
        written: Written,
        held: Held,
        *,
        only_publishes: bool = False,
    ) -> None:
        super().__init__(rules, only_publishes=only_publishes)
        self.max_envelope_bytes = min(max_envelope_bytes, Link.max_envelope_bytes)
        self.timing = timing
        """How long to wait for Redis."""
        self.target = target
        """Where to connect, and how."""
        self.probe = f"{prefix}:probe"
        """A name of no audience, with which the permissions to publish and subscribe are tested."""
        self._prefix = prefix
        # The rules that this node writes down.
        self._ours = rules if self.writes else None
        self._written = written
        self._needs = target.permissions(prefix, keeps=rules is not None)
        self._wires: list[Wire] = []
        self._keeps_presence = False
        self._loss: Exception | None = None
        self._lost = asyncio.Event()
        servers = Servers(self._keeper_of, self._keepers, self._lose, is_cluster=target.kind == "cluster")
        self.presence = RedisPresence(prefix, names, servers, held)

    def _keeper_of(self, name: str) -> Keeper:
        self._announce_needs()
        return self.pair_of(name).keeper

    def _keepers(self) -> Sequence[Keeper]:
        self._announce_needs()
        return [pair.keeper for pair in self.pairs]

    def _announce_needs(self) -> None:
        # Errors name the permissions of presence only if presence is used.
        if not self._keeps_presence:
            self._keeps_presence = True
            for wire in self._wires:
                wire.needs = f"{wire.needs} {TO_BE_PRESENT.format(prefix=self._prefix)}"

    @property
    @abstractmethod
    def pairs(self) -> Collection[Pair]:
        """The connections to each server, once the link is open."""

    def new_pair(self, host: Host | None, *, is_sharded: bool = False) -> Pair:
        """Make a pair of connections that isn't open yet. The link is lost when one of them is."""
        asker = Asker(self.target.access, host, self._needs, self._lose)
        listener = Subscriber(self.target.access, host, self._needs, self._lose, is_sharded=is_sharded)
        self._wires += asker, listener
        return Pair(asker, listener, self._prefix, "SPUBLISH" if is_sharded else "PUBLISH")

    @abstractmethod
    def pair_of(self, name: str) -> Pair:
        """Return the connections to the server that has this name.

        Raises:
            ConnectionError: If no server has it.
        """

    async def open_pairs(self, probes: Mapping[Pair, str | None]) -> None:
        """Connect, check all permissions that are needed, and read or write the rules.

        Args:
            probes: For each pair a name of no audience, with which permissions are tested; `None` to test none.

        Raises:
            ConfigurationError: If a server refuses the user.
        """
        await together(*(self._open(pair, probe) for pair, probe in probes.items()))
        if self._ours is None and self.rules is not None:
            for wire in self._wires:
                wire.needs = self.target.permissions(self._prefix, keeps=True)
            await together(*(pair.keeper.learn() for pair in probes))

    async def _open(self, pair: Pair, probe: str | None) -> None:
        is_holder = pair is self.pair_of(self._written.key)
        questions = self._written.questions(self._ours) if is_holder and (self.writes or self.learns) else []
        answers = await pair.open(probe, questions, keeps=self._ours is not None)
        if questions:
            self.rules = self._written.take(answers, self._ours, pair.keeper)

    # Histories.

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what was kept under a name, from the server that has the name."""
        return await self._asked(self.pair_of(name).keeper.read(name, since, history))

    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest positions from all servers at the same time, each with one write."""
        asked: dict[Pair, list[int]] = defaultdict(list)
        for at, name in enumerate(names):
            asked[self.pair_of(name)].append(at)
        answers = await self._asked(
            together(
                *(
                    pair.keeper.positions([names[at] for at in mine], [histories[at] for at in mine])
                    for pair, mine in asked.items()
                )
            )
        )
        found = dict(zip(chain.from_iterable(asked.values()), chain.from_iterable(answers), strict=True))
        return [found[at] for at in range(len(names))]

    async def forget(self, name: str) -> None:
        """Remove what is kept under a name, at the server that has the name."""
        await self._asked(self.pair_of(name).keeper.forget(name))

    async def _asked(self, question: Awaitable[T]) -> T:
        try:
            return await question
        except ConnectionError as error:
            self._lose(error)  # this is no longer the right server: the next link finds the right one
            raise

    # Being lost.

    async def watch(self, pair: Pair) -> None:
        """Check a server again and again.

        Raises:
            Exception: If it is no longer the right server, or doesn't answer.
        """
        seconds = self.timing.request_timeout
        while True:
            await asyncio.sleep(self.timing.probe_interval)
            try:
                async with Patience(seconds):
                    await self.look_at(pair)
            except TimeoutError:
                raise TimeoutError(f"Redis at {pair.asker.where} doesn't answer within {seconds:g} s") from None

    async def look_at(self, pair: Pair) -> None:
        """Check a server once."""
        if self.rules is None:
            return
        with suppress(EngineUnavailable):  # it answers, so it is alive, although it can't do everything now
            await pair.keeper.learn()
        if self._ours is not None and pair is self.pair_of(self._written.key):
            await pair.asker.ask(self._written.again(self._ours))

    async def ask_all(self, access: Access, needs: str, *commands: bytes) -> list[Answer]:
        """Ask every host of the target at the same time; return the answers of those that know the first command.

        Raises:
            ConfigurationError: If no host answers, and one refuses the user or doesn't know the command.
            Exception: If no host answers for another reason; it is the reason of one of them.
        """
        askers = [Asker(access, host, needs, _ignore) for host in self.target.hosts]
        self._wires += askers
        outcomes = await together(*(self._ask(asker, commands) for asker in askers))
        answers = [
            Answer(host, outcome)
            for host, outcome in zip(self.target.hosts, outcomes, strict=True)
            if isinstance(outcome, list)
        ]
        if not answers:
            errors = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            raise next((error for error in errors if isinstance(error, ConfigurationError)), errors[0])
        return answers

    async def wait_lost(self) -> None:
        """Wait until a connection is lost.

        Raises:
            Exception: Why it was lost.
        """
        await self._lost.wait()
        assert self._loss is not None
        raise self._loss

    async def abort(self) -> None:
        """Drop every connection, whether it is open or not."""
        for wire in self._wires:
            await wire.drop()
        await asyncio.sleep(0)  # a transport closes its socket in the next turn of the loop

    async def _ask(self, asker: Asker, commands: Sequence[bytes]) -> list[Reply] | Exception:
        seconds = self.timing.connect_timeout * _ASK_PART
        try:
            async with Patience(seconds):
                await asker.open()
                replies = await asker.ask(*commands)
        except TimeoutError:
            return TimeoutError(f"Redis at {asker.where} doesn't answer within {seconds:g} s")
        except Exception as error:
            return error
        finally:
            await asker.drop()
        refusals = [asker.explain(reply) for reply in replies if isinstance(reply, ErrorReply)]
        for refusal in refusals:
            if not isinstance(refusal, EngineError):
                return refusal
        if isinstance(replies[0], ErrorReply):
            if isinstance(refusals[0], EngineUnavailable):
                return refusals[0]
            return ConfigurationError(f"{refusals[0]}: is it a {self.target.kind}?")
        return replies

    def _lose(self, error: Exception) -> None:
        if self._loss is None:
            self._loss = error
            self._lost.set()


class ServerLink(RedisLink):
    """Publishes and receives at one server."""

    _pair: Pair | None = None

    async def open(self) -> None:
        """Find the server, connect, and check all permissions that are needed."""
        is_sentinel = self.target.kind == "sentinel"
        pair = self._pair = self.new_pair(
            await self._find_master() if is_sentinel else next(iter(self.target.hosts), None)
        )
        await self.open_pairs({pair: self.probe})
        if is_sentinel:
            await _check_master(pair.asker)

    def pair_of(self, name: str) -> Pair:
        """Return the connections to the server."""
        return self._opened

    @property
    def pairs(self) -> Collection[Pair]:
        """The connections to the server."""
        return (self._opened,)

    async def read(self, inlet: Inlet) -> None:
        """Hand over what arrives until one of the two connections is lost."""
        pair = self._opened
        pair.listener.inlet = inlet
        if self.rules is None:
            await self.wait_lost()
        else:
            await together(self.wait_lost(), self.watch(pair))

    async def subscribe(self, names: Sequence[str]) -> None:
        """Subscribe with one command, and wait for each confirmation."""
        await self._opened.listener.subscribe([names])

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Unsubscribe with one command, and wait for each confirmation."""
        await self._opened.listener.unsubscribe([names])

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish in one write, and wait for the answers."""
        return await self._opened.publish(parcels)

    @property
    def _opened(self) -> Pair:
        if self._pair is None:
            raise ConnectionError(f"the link to Redis at {self.target.address} isn't open")
        return self._pair

    async def _find_master(self) -> Host:
        # Most sentinels must agree. A single one, cut off from the others, may still name a former master.
        assert self.target.sentinel_access is not None
        question = pack("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.target.service)
        answers = await self.ask_all(self.target.sentinel_access, "+sentinel|get-master-addr-by-name", question)
        named: Counter[Host] = Counter()
        for answer in answers:
            match answer.replies:
                case [[bytes(name), bytes(port)]]:
                    named[Host(name.decode(), int(port))] += 1
        if not named:
            raise ConfigurationError(f"the sentinels know no service of this name: {self.target.address}")
        return named.most_common(1)[0][0]


async def _check_master(asker: Asker) -> None:
    # A message that is published at a replica doesn't reach the master's subscribers. Sentinels may not know of a
    # failover yet.
    (role,) = await asker.ask(pack("ROLE"))
    if isinstance(role, ErrorReply):
        raise asker.explain(role)
    if not isinstance(role, list) or role[:1] != [b"master"]:
        raise ConnectionError(f"Redis at {asker.where} is not the master")


def _ignore(error: Exception) -> None:
    """Do nothing: a connection that was opened only for a question may end silently."""


# Two connections to one Redis server: one to publish and one to receive.


class Pair:
    """Two connections to one server, and the commands that go over them.

    Args:
        asker: Publishes.
        listener: Receives.
        prefix: The beginning of all names.
        verb: The command that publishes: PUBLISH or SPUBLISH.
    """

    def __init__(self, asker: Asker, listener: Subscriber, prefix: str, verb: str) -> None:
        self.asker = asker
        self.listener = listener
        self.keeper = Keeper(asker, prefix, verb)
        """Reads and writes what the server keeps."""
        self._head = b"*3\r\n$%d\r\n%b\r\n" % (len(verb), verb.encode())

    async def open(self, probe: str | None, questions: Sequence[bytes], *, keeps: bool) -> Sequence[Reply]:
        """Connect, and check all permissions that are needed.

        Args:
            probe: A name of no audience, with which permissions are tested; `None` to test none.
            questions: Other commands for the server. Their answers are returned.
            keeps: Whether something is kept.

        Raises:
            ConfigurationError: If the server refuses the user.
        """
        await together(self.asker.open(), self.listener.open())
        trial = [] if probe is None else [self._packed(Parcel(probe, b""))]
        kept = self.keeper.trial(probe) if keeps else []
        commands = [*trial, *kept, *questions]
        answers = deque(await self.asker.ask(*commands) if commands else [])
        for answer in [answers.popleft() for _ in trial]:
            if isinstance(answer, ErrorReply):
                raise self.asker.explain(answer)
        self.keeper.take_trial([answers.popleft() for _ in kept])
        if probe is not None:
            await self.listener.subscribe([[probe]])
            await self.listener.unsubscribe([[probe]])
        return list(answers)

    async def publish(self, parcels: Sequence[Parcel]) -> list[Exception | Appended | None]:
        """Publish in one write; return for each parcel where it is kept, or the error with which it was refused.

        Raises:
            Exception: If the connection is lost, or this is no longer the right server.
        """
        explain: Callable[[ErrorReply], Exception] = self.asker.explain
        if KeptParcel in map(type, parcels):
            await self.keeper.ready()
            answers, explain = await self.asker.ask(*self._mixed(parcels)), self.keeper.explain
        else:
            answers = await self.asker.ask(*map(self._packed, parcels))
        return [None if type(answer) is int else self._outcome(answer, explain) for answer in answers]

    def _packed(self, parcel: Parcel) -> bytes:
        name, envelope = parcel.name.encode(), parcel.envelope
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._head, len(name), name, len(envelope), envelope)

    def _mixed(self, parcels: Sequence[Parcel]) -> Iterator[bytes]:
        fresh, is_first = new_epoch().encode(), True
        for number, parcel in enumerate(parcels):
            if isinstance(parcel, KeptParcel):
                yield self.keeper.append(parcel, b"%b%d" % (fresh, number), is_first=is_first)
                is_first = False
            else:
                yield self._packed(parcel)

    def _outcome(self, answer: Reply, explain: Callable[[ErrorReply], Exception]) -> Exception | Appended:
        if not isinstance(answer, ErrorReply):
            return self.keeper.appended(answer)
        error = explain(answer)
        if isinstance(error, ConnectionError):
            raise error
        return error


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Run coroutines at the same time. If one fails, end the others and raise its error.

    It uses no `TaskGroup`: before Python 3.13 that loses a cancellation if one of its tasks fails (gh-116720).

    Raises:
        Exception: The first error; of several, a `ConfigurationError` if one is among them.
    """
    tasks = [asyncio.create_task(each, name="wsbroadcast engine redis") for each in work]
    if not tasks:
        return []
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    failures = sorted(filter(None, errors), key=lambda error: not isinstance(error, ConfigurationError))
    if failures:
        raise failures[0]
    return [task.result() for task in tasks]
