"""One connection to NATS, once the server has accepted the login."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from wsbroadcast.engines.broker.link import (
    NOWHERE,
    Host,
    Inlet,
    KeptParcel,
    Parcel,
    Place,
    Stretch,
    reset,
)
from wsbroadcast.engines.broker.presence import PresentLink
from wsbroadcast.engines.nats.history import Log
from wsbroadcast.engines.nats.login import Login
from wsbroadcast.engines.nats.presence import Attending, NATSPresence
from wsbroadcast.engines.nats.protocol import PING, PONG, REFUSAL, Answer, OnMessage, Reader, pub, sub, unsub
from wsbroadcast.engines.nats.records import INBOX
from wsbroadcast.engines.nats.rooms import is_quiet
from wsbroadcast.engines.nats.target import Target
from wsbroadcast.engines.nats.upkeep import Keeping
from wsbroadcast.exceptions import ConfigurationError, MessageTooLarge
from wsbroadcast.history import Appended, History
from wsbroadcast.publication import Position

# What a server refuses without closing the connection.
_DENIED = re.compile(r"-ERR 'Permissions Violation for (Publish|Subscription) to \"([^\"]+)\"")

# Shares of the time that one server may take, where there are others to try.
_TRIES = 3


class Conversation(asyncio.Protocol):
    """Commands to a server and its answers.

    Args:
        transport: The transport, after the login.
        on_message: Called with each message, as `Reader` does.
        on_line: Called with each other line that is no answer to a PING.
    """

    def __init__(
        self,
        transport: asyncio.WriteTransport,
        on_message: OnMessage,
        on_line: Callable[[str], None],
    ) -> None:
        self._transport = transport
        self._reader = Reader(on_message, self._read_line)
        self._on_line = on_line
        # A future for each PING. They are answered in order. The caller may be gone by then.
        self._pongs: deque[asyncio.Future[None]] = deque()
        self.lost: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        """Done when the connection is lost. Its result is the reason."""
        transport.set_protocol(self)

    def send(self, commands: Iterable[bytes]) -> None:
        """Send commands without waiting for an answer.

        Raises:
            Exception: If the connection is lost. It is the reason.
        """
        if self.lost.done():
            raise self.lost.result()
        self._transport.write(b"".join(commands))

    async def confirmed(self, commands: Iterable[bytes]) -> None:
        """Send commands, and return when the server has processed all of them.

        A PING is sent after them, in the same write. A server processes commands one after the other.

        Raises:
            Exception: If the connection is lost. It is the reason.
        """
        if self.lost.done():
            raise self.lost.result()
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pongs.append(pong)
        self._transport.write(b"".join((*commands, PING)))
        await pong

    def lose(self, why: Exception) -> None:
        """Tell all waiting callers that the connection is lost. The first reason counts."""
        if self.lost.done():
            return
        self.lost.set_result(why)
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(why)
                pong.exception()  # marked as retrieved: the caller may be cancelled in this turn of the loop
        self._pongs.clear()

    def data_received(self, data: bytes) -> None:
        """Read on. After an error the connection is lost: nobody knows where the next message begins."""
        try:
            self._reader.feed(data)
        except Exception as error:
            self.lose(error)
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the connection is closed."""
        self.lose(exc or ConnectionError("the server closed the connection"))

    def _read_line(self, line: bytes) -> None:
        if line == b"PONG":
            if self._pongs and not (pong := self._pongs.popleft()).done():
                pong.set_result(None)
        elif line == b"PING":
            self._transport.write(PONG)
        else:
            self._on_line(line.decode(errors="replace"))


class NATSLink(PresentLink):
    """One connection for both directions, to one of the servers.

    Nothing waits in it. What is published is written at once. What arrives is handed over at once, in the server's
    order over all names. So no message is missed while the connection lasts. The server disconnects a node that doesn't
    keep up.

    Only this server confirms. The other servers of a cluster learn of a subscription a moment later.

    Args:
        target: The servers, and how to log in.
        connect_timeout: The seconds that `open` may take.
        keeping: How the engine keeps histories; `None` if it keeps none.
        attending: How the engine knows who is in a channel; `None` if it doesn't.
    """

    def __init__(
        self,
        target: Target,
        connect_timeout: float,
        keeping: Keeping | None = None,
        attending: Attending | None = None,
    ) -> None:
        super().__init__(None if keeping is None else keeping.rules)
        self._keeping = keeping
        self._attending = attending
        if attending is not None:
            self.presence: NATSPresence = NATSPresence(
                attending, lambda: self.max_envelope_bytes, lambda name: self._denial("publish", name)
            )
        self._log: Log | None = None
        self._target = target
        self._connect_timeout = connect_timeout
        self._login: Login | None = None
        # The server that accepted the login: its address in the target, and the id by which it calls itself.
        self._host: Host | None = None
        self._server_id = ""
        self._talk: Conversation | None = None
        self._inlet: Inlet | None = None
        # Messages that arrived before there was an inlet.
        self._early: list[tuple[str, bytes, Place]] = []
        # The id of a subscription is a number on the wire, which is never used twice. So a message that is still on its
        # way when the subscription ends has no name.
        self._sids: dict[str, bytes] = {}
        self._names: dict[bytes, str] = {}
        self._numbers = itertools.count(1)
        # Names that the server refuses, by the kind of command that is being confirmed now.
        self._denied: dict[str, set[str]] = {}

    async def open(self) -> None:
        """Connect to the first server that can be reached.

        Raises:
            ConfigurationError: If the server refuses the login.
            Exception: If no server can be reached. It is the reason of the last one.
        """
        route = self._target.route()
        timeout = self._connect_timeout / min(len(route), _TRIES)
        for tries, host in enumerate(route, 1):
            try:
                await self._begin(host, timeout)
                self._target.last = host
                return
            except ConfigurationError:
                raise
            except Exception:
                if tries == len(route):
                    raise
                await self.abort()

    async def _begin(self, host: Host, timeout: float) -> None:
        self._host = host
        login = self._login = Login(self._target, host, timeout)
        read = await login.run()
        assert login.writer is not None
        self._talk = Conversation(login.writer.transport, self._take, self._hear)
        self.max_envelope_bytes = login.max_payload
        self._note(login.info)
        self._talk.data_received(read)
        await self._talk.confirmed(())  # checks that reading and writing really go through here now
        if self._attending is not None:
            await self.presence.open(self._talk, login.info.get("version"))
        if self._keeping is not None:
            self._log = Log(self._keeping, self._talk, lambda name: self._denial("publish", name))
            await self._log.open(login.info.get("version"))
            self.rules = self.rules or self._keeping.learned

    async def read(self, inlet: Inlet) -> None:
        """Hand what arrives to the inlet until the connection is lost."""
        talk = self._opened()
        self._inlet = inlet
        early, self._early = self._early, []
        for each in early:
            inlet.take(*each)
        if self._log is None:
            await asyncio.wait([talk.lost])
        else:
            await self._log.watch(inlet)
        raise talk.lost.result()

    async def subscribe(self, names: Sequence[str]) -> None:
        """Receive what is published to these names. It returns once the server has confirmed each of them.

        Raises:
            ConfigurationError: If the server forbids one of the names.
        """
        fresh = {name: b"%d" % next(self._numbers) for name in names if name not in self._sids}
        self._sids |= fresh
        self._names |= {sid: name for name, sid in fresh.items()}
        denied = await self._ask("Subscription", [sub(name, sid) for name, sid in fresh.items()])
        for name in denied & fresh.keys():
            del self._names[self._sids.pop(name)]
        if denied:
            raise self._denial("subscribe", min(denied))

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Receive no more of what is published to these names. It returns once the server has confirmed."""
        sids = [self._sids.pop(name) for name in names if name in self._sids]
        for sid in sids:
            del self._names[sid]
        await self._opened().confirmed(map(unsub, sids))

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish in this order, in one write; return once the server has taken the parcels.

        Returns:
            For each parcel the error with which the server refused it, where it is kept, or `None`.
        """
        limit = self.max_envelope_bytes
        if self._log is not None and any(isinstance(parcel, KeptParcel) for parcel in parcels):
            return await self._publish_kept(self._log, parcels)
        denied = await self._ask("Publish", [pub(*parcel) for parcel in parcels if len(parcel.envelope) <= limit])
        return [
            MessageTooLarge(len(envelope), limit)
            if len(envelope) > limit
            else (self._denial("publish", name) if name in denied else None)
            for name, envelope in parcels
        ]

    async def _publish_kept(self, log: Log, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        denied: set[str] = set()

        async def ask(commands: Iterable[bytes]) -> None:
            denied.update(await self._ask("Publish", commands))

        results = await log.publish(parcels, self.max_envelope_bytes, ask)
        return [
            self._denial("publish", name) if result is None and name in denied else result
            for (name, _), result in zip(parcels, results, strict=True)
        ]

    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what JetStream has kept under a name."""
        return await self._kept().read_kept(name, since, history)

    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest position under each name. One question asks for 500 names; they are asked one by one."""
        return await self._kept().read_positions(names, self.max_envelope_bytes)

    async def forget(self, name: str) -> None:
        """Remove what JetStream has kept under a name. The epoch of this name changes."""
        await self._kept().forget(name)

    async def read_limits(self) -> None:
        """Ask the server for its limits, over another connection. It doesn't announce a change of `max_payload`."""
        if self._host is None or self._login is None:
            return
        other = NATSLink(self._target, self._connect_timeout)
        try:
            await other._begin(self._host, self._connect_timeout)
            # Several servers may have the same name or address.
            if other._server_id == self._server_id:
                self.max_envelope_bytes = other.max_envelope_bytes
        finally:
            await other.abort()

    async def abort(self) -> None:
        """Drop the connection now. What is still in a buffer never reaches the server. It may be called twice."""
        login, self._login = self._login, None
        self._names.clear()
        if self._talk is not None:
            self._talk.lose(ConnectionError("the connection was dropped"))
        if login is not None and login.writer is not None:
            reset(login.writer.transport)
            await asyncio.sleep(0)  # the socket is closed in the next turn of the loop

    def _opened(self) -> Conversation:
        if self._talk is None:
            raise ConnectionError("the connection isn't open")
        return self._talk

    def _kept(self) -> Log:
        if self._log is None:
            raise ConfigurationError("the NATS engine wasn't told that there are histories: call keep() before start()")
        return self._log

    async def _ask(self, what: str, commands: Iterable[bytes]) -> set[str]:
        # A server refuses a command before it answers the PING.
        denied = self._denied[what] = set[str]()
        try:
            await self._opened().confirmed(commands)
        finally:
            del self._denied[what]
        return denied

    def _take(self, words: list[bytes], envelope: bytes, headers: bytes) -> None:
        name = self._names.get(words[2])
        if name is None:
            if words[2] == INBOX:
                self.presence.hear(words[1], Answer(envelope, headers))
            elif self._log is not None:
                self._log.hear(words[1], words[2], Answer(envelope, headers))
            return
        if headers and is_quiet(headers):
            return
        place = self._log.place(name, headers) if headers and self._log is not None else NOWHERE
        if self._inlet is None:
            self._early.append((name, envelope, place))
        else:
            self._inlet.take(name, envelope, place)

    def _hear(self, line: str) -> None:
        if line.startswith("INFO "):
            self._note(json.loads(line.removeprefix("INFO ")))
        elif (match := _DENIED.match(line)) and self._is_answered(match[2]):
            pass
        elif match and match[1] in self._denied:
            self._denied[match[1]].add(match[2])
        elif line.startswith("-ERR"):
            kind = ConfigurationError if match or REFUSAL.search(line) else ConnectionError
            self._opened().lose(kind(f"the server says {line.removeprefix('-ERR').strip():.200}"))

    def _is_answered(self, denied: str) -> bool:
        # Whether the name is of no audience. The waiting caller has been told then.
        if self._attending is not None and self.presence.deny(denied):
            return True
        return self._log is not None and self._log.deny(denied)

    def _note(self, info: Mapping[str, Any]) -> None:
        # What the server says of itself, at the login and later.
        if not isinstance(info, dict):
            raise ValueError(f"expected an INFO object of NATS from the server, not {type(info).__name__}")
        self._target.discover(info.get("connect_urls") or ())
        self._server_id = str(info.get("server_id", self._server_id))
        if type(limit := info.get("max_payload")) is int and limit > 0:
            self.max_envelope_bytes = limit

    def _denial(self, verb: str, name: str) -> ConfigurationError:
        where, pattern = self._target.address, f"{name.partition('.')[0]}.>"
        if self._attending is not None and self._attending.stream.owns(name):
            return self._attending.stream.denial(f"nats at {where}", self._target.who, name)
        if self._keeping is not None and name.startswith("$JS."):
            return self._keeping.stream.denial(f"nats at {where}", self._target.who, name)
        return ConfigurationError(
            f"nats at {where} doesn't let {self._target.who} {verb} to {name!r:.120}: grant {verb} on {pattern!r}"
        )


# How to be let in by a NATS server: nats-py connects, encrypts and signs in, then the connection is ours.
