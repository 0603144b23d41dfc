"""The link to one Redis server, which sentinels may have to name first."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.link import Inlet, Link, Parcel
from wsbroadcast.engines.redis.connection import Asker, Listener, Wire
from wsbroadcast.engines.redis.protocol import ErrorReply, Reply, pack
from wsbroadcast.engines.redis.target import Access, Host, Target
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable
from wsbroadcast.options import Timing

# A sentinel or a node of a cluster that hasn't answered after this part of the time to connect is left out: there are
# others.
_ASK_PART = 1 / 3


class Answer(NamedTuple):
    """What one of several servers has answered."""

    host: Host
    replies: list[Reply]


class RedisLink(Link):
    """What the links of Redis have in common: some connections, all of them lost when one is.

    Args:
        target: Where to connect, and how.
        prefix: What the names begin with.
        timing: How long to wait for Redis.
        max_envelope_bytes: The largest envelope that we will publish. Redis takes 512 MiB, but by default it cuts off
            every subscriber for whom more than 32 MiB wait, so a single envelope of 31 MiB would cost all nodes a gap.
    """

    def __init__(
        self, target: Target, prefix: str, timing: Timing, max_envelope_bytes: int = Link.max_envelope_bytes
    ) -> None:
        self.max_envelope_bytes = min(max_envelope_bytes, Link.max_envelope_bytes)
        self.timing = timing
        """How long to wait for Redis."""
        self.target = target
        """Where we connect."""
        self.probe = f"{prefix}:probe"
        """The name by which is tried whether we may publish and subscribe; no audience has it."""
        self._needs = target.permissions(prefix)
        self._wires: list[Wire] = []
        self._loss: Exception | None = None
        self._lost = asyncio.Event()

    def new_pair(self, host: Host | None, *, is_sharded: bool = False) -> Pair:
        """Make a pair of connections that isn't open yet; the link is lost when one of them is."""
        pair = Pair(self.target.access, host, self._needs, self._lose, is_sharded=is_sharded)
        self._wires += pair.wires
        return pair

    async def ask_all(self, access: Access, needs: str, *commands: bytes) -> list[Answer]:
        """Ask every host of the target at the same time; return the answers of those that know the first command.

        Raises:
            ConfigurationError: If one refuses us or doesn't know it, and none answers.
            Exception: If none answers, why one doesn't.
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
            Exception: Why it was.
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

    def __init__(
        self, target: Target, prefix: str, timing: Timing, max_envelope_bytes: int = Link.max_envelope_bytes
    ) -> None:
        super().__init__(target, prefix, timing, max_envelope_bytes)
        self._pair: Pair | None = None

    async def open(self) -> None:
        """Find the server, connect, and see whether we may do everything that we will do."""
        if self.target.kind == "sentinel":
            pair = self.new_pair(await self._find_master())
            await pair.open(self.probe)
            await _check_master(pair.asker)
        else:
            pair = self.new_pair(next(iter(self.target.hosts), None))
            await pair.open(self.probe)
        self._pair = pair

    async def read(self, inlet: Inlet) -> None:
        """Hand over what arrives until one of the two connections is lost."""
        self._opened.listener.inlet = inlet
        await self.wait_lost()

    async def subscribe(self, names: Sequence[str]) -> None:
        """Subscribe with one command, and wait for each confirmation."""
        await self._opened.listener.subscribe([names])

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Unsubscribe with one command, and wait for each confirmation."""
        await self._opened.listener.unsubscribe([names])

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | None]:
        """Publish in one write, and wait for the answers."""
        return await self._opened.publish(parcels)

    @property
    def _opened(self) -> Pair:
        if self._pair is None:
            raise ConnectionError(f"the link to Redis at {self.target.address} isn't open")
        return self._pair

    async def _find_master(self) -> Host:
        # The majority's word: one sentinel alone, cut off from the others, may still name a master of yesterday.
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
    # What is published at a replica reaches nobody at the master; sentinels may not know yet.
    (role,) = await asker.ask(pack("ROLE"))
    if isinstance(role, ErrorReply):
        raise asker.explain(role)
    if not isinstance(role, list) or role[:1] != [b"master"]:
        raise ConnectionError(f"Redis at {asker.where} is not the master")


def _ignore(error: Exception) -> None:
    """A connection opened only for a question may end silently."""


# Two connections to one Redis server, one to publish and one to receive.


T = TypeVar("T")


class Pair:
    """Both connections, and the commands that go over them.

    Args:
        access: How to get in.
        host: Where; `None` for a unix socket.
        needs: The permissions that we need, as in `ACL SETUSER`.
        lost: Called with the reason when one of them has ended.
        is_sharded: Use the commands of sharded pub/sub.
    """

    def __init__(
        self,
        access: Access,
        host: Host | None,
        needs: str,
        lost: Callable[[Exception], None],
        *,
        is_sharded: bool = False,
    ) -> None:
        self.asker = Asker(access, host, needs, lost)
        self.listener = Listener(access, host, needs, lost, is_sharded=is_sharded)
        verb = b"SPUBLISH" if is_sharded else b"PUBLISH"
        self._head = b"*3\r\n$%d\r\n%b\r\n" % (len(verb), verb)

    @property
    def wires(self) -> tuple[Wire, Wire]:
        """Both connections."""
        return self.asker, self.listener

    async def open(self, probe: str | None) -> None:
        """Connect, and see whether we may do everything that we will do.

        Args:
            probe: A name like those that will be used, of no audience; `None` to take it on trust.

        Raises:
            ConfigurationError: If the server refuses us.
        """
        await together(self.asker.open(), self.listener.open())
        if probe is None:
            return
        (answer,) = await self.asker.ask(self._packed(Parcel(probe, b"")))
        if isinstance(answer, ErrorReply):
            raise self.asker.explain(answer)
        await self.listener.subscribe([[probe]])
        await self.listener.unsubscribe([[probe]])

    async def publish(self, parcels: Iterable[Parcel]) -> list[Exception | None]:
        """Publish in one write; return for each parcel what it was refused with.

        Raises:
            Exception: If the connection is lost, or this is the wrong server by now.
        """
        answers = await self.asker.ask(*map(self._packed, parcels))
        return [None if type(answer) is int else self._refusal(answer) for answer in answers]

    def _packed(self, parcel: Parcel) -> bytes:
        name, envelope = parcel.name.encode(), parcel.envelope
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._head, len(name), name, len(envelope), envelope)

    def _refusal(self, answer: Reply) -> Exception:
        if not isinstance(answer, ErrorReply):
            raise ValueError(f"Redis at {self.asker.where} answers a publish with {type(answer).__name__}")
        error = self.asker.explain(answer)
        if isinstance(error, ConnectionError):
            raise error
        return error


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Run coroutines at the same time; if one fails, end the others and raise its error.

    No `TaskGroup`, which before Python 3.13 forgets that it is being cancelled when one of its tasks fails (gh-116720).

    Raises:
        Exception: The first error, or a `ConfigurationError` among several.
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
