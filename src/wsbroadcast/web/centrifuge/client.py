"""One client of the Centrifuge protocol: what it is sent, and when it is given up."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wsbroadcast.audience import Audience
from wsbroadcast.connection import Connection
from wsbroadcast.delivery.slow_consumers import NOBODYS
from wsbroadcast.message import Message
from wsbroadcast.node.core import Core
from wsbroadcast.node.event_clients import Beginning, Beginnings
from wsbroadcast.node.membership import Membership
from wsbroadcast.node.watching import Infos
from wsbroadcast.protocols.centrifuge.codec import JSON, PROTOBUF, Codec
from wsbroadcast.protocols.centrifuge.codes import (
    INSUFFICIENT_STATE,
    SUBSCRIPTION_EXPIRED,
    UNSUBSCRIBED_BY_SERVER,
    Disconnect,
    ErrorCode,
    Failed,
    text_of,
)
from wsbroadcast.protocols.centrifuge.session import Command, Session, Subscription
from wsbroadcast.protocols.centrifuge.speech import Fields, Names, Speech, member_info
from wsbroadcast.publication import Frame, Position, Sender

# An answer holds at most so much of what was missed. Clients take messages of at least 1 MiB.
_CARRIES = 256 * 1024

# How long a client may stay after its token, or that of a subscription, has expired.
GRACE_SECONDS = 25.0

# When members of a channel must subscribe again, they are told over this time, for each thousand of them.
_SPREAD_SECONDS = 1.0

# A connection that is to come back is not closed before it is this old: a client starts with its shortest pause.
_SETTLED_SECONDS = 1.0

# If a timer runs this late, the server is slow, not its clients.
_LATE_SECONDS = 1.0

VERSION = "wsbroadcast"
"""The version of the server that clients are told."""

# The flag of a client that wants an error in place of `recovered: false`.
_REJECT_UNRECOVERED = 2


@dataclass(slots=True)
class Asked:
    """A subscription that a client asks for."""

    command: Command
    audience: Audience
    subscription: Subscription
    is_granted: bool = False
    """Whether a token grants it."""
    failure: Failed | None = None
    """The reason why it is not done."""

    @property
    def rejects_unrecovered(self) -> bool:
        """Whether it wants an error if what it missed can't be had."""
        return bool(self.command.request.get("flag", 0) & _REJECT_UNRECOVERED)


class Clients:
    """What all clients of a router share.

    Args:
        core: The core of the manager.
        names: The channels that stand for users and everyone.
        pong_timeout: Seconds within which a client must answer a ping.
    """

    def __init__(self, core: Core, names: Names, pong_timeout: float) -> None:
        self.core = core
        """The core of the manager."""
        self.names = names
        """The channels that stand for users and everyone."""
        self._pong_timeout = pong_timeout
        counters = core.counters  # not the core: a speech is remembered as long as the process runs
        self._speeches = {codec.name: Speech(codec, names, counters) for codec in (JSON, PROTOBUF)}
        # The clients that are pinged in this turn of the event loop.
        self._pinged: list[tuple[Connection, Client, int]] | None = None
        self._tells: dict[str, Callable[[str, Sequence[Any], Infos, Infos], None]] = {
            name: self._teller(speech) for name, speech in self._speeches.items()
        }

    @property
    def membership(self) -> Membership:
        """The membership of the node."""
        return self.core.life.node.membership

    def speech(self, codec: Codec) -> Speech:
        """Return the object that makes messages for clients of a codec."""
        return self._speeches[codec.name]

    def teller(self, codec: Codec) -> Callable[[str, Sequence[Any], Infos, Infos], None]:
        """Return the function that tells clients of a codec who joins and leaves a channel."""
        return self._tells[codec.name]

    def count(self, code: int) -> None:
        """Count an error or a close that a client has caused."""
        self.core.counters.client_errors[str(int(code))] += 1

    def _teller(self, speech: Speech) -> Callable[[str, Sequence[Any], Infos, Infos], None]:
        def tell(channel: str, connections: Sequence[Connection], joined: Infos, left: Infos) -> None:
            dispatch = self.core.life.node.dispatcher.dispatch
            audience = Audience("channel", channel)
            for kind, members in (("join", joined), ("leave", left)):
                for key, seen in members.items():
                    info = member_info(key, seen)
                    message = speech.say({"push": {"channel": channel, kind: {"info": info}}})
                    # A client that has joined learns that from its own answer.
                    some = [each for each in connections if each.id != key]
                    if some:
                        dispatch(Frame(message, audience), some)

        return tell

    # Pings.

    def pinged(self, connection: Connection, client: Client) -> None:
        """Take note of a ping that a client is sent now. If it doesn't answer in time, it is given up."""
        if self._pinged is None:
            self._pinged = []
            self._check_later(self._pinged)
            asyncio.get_running_loop().call_soon(self._end_round, context=NOBODYS.copy())
        self._pinged.append((connection, client, client.session.pings))

    def _end_round(self) -> None:
        self._pinged = None

    def _check_later(self, pinged: list[tuple[Connection, Client, int]]) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self._pong_timeout
        loop.call_at(due, self._check_pongs, pinged, due, context=NOBODYS.copy())

    def _check_pongs(self, pinged: list[tuple[Connection, Client, int]], due: float) -> None:
        late = asyncio.get_running_loop().time() - due
        if late > min(_LATE_SECONDS, self._pong_timeout / 2):
            self._check_later(pinged)  # the event loop was blocked: answers may not be read yet
            return
        for connection, client, number in pinged:
            # An answer may wait behind a command that takes long.
            if client.session.answered_pings < number and connection.is_open and not client.is_busy:
                self.membership.dismiss(connection, Disconnect.NO_PONG, text_of(Disconnect.NO_PONG))


@dataclass(slots=True, eq=False)
class Client:
    """One client, and what it is sent; see `Speaker`."""

    clients: Clients
    session: Session
    speech: Speech
    connect: Command | None = None
    """Its command to connect; `None` once that is answered."""
    given: dict[str, Subscription] = field(default_factory=dict)
    """The subscriptions that the server gives it when it connects."""
    shown: bytes = b""
    """What others see of it, as JSON."""
    expires_at: float | None = None
    """When it must show another token; `None` if it needs none."""
    calls: set[asyncio.Task[None]] = field(default_factory=set)
    """Its running calls."""
    is_busy: bool = False
    """Whether a command of it is being carried out."""
    carries: int = _CARRIES
    is_told_of_subscriptions: bool = True
    begins_at_once: bool = True
    # Timers of its subscriptions, by channel, or by audience for users and everyone. A timer is for an expiry, or for
    # telling it to subscribe again.
    _timers: dict[str | Audience, asyncio.TimerHandle] = field(default_factory=dict)

    # What it is sent, as a `Speaker`.

    def hello(self, connection: Connection, interval: float, beginnings: Beginnings) -> Message:
        """Return the answer to its command to connect."""
        assert self.connect is not None
        connection._shown = self.shown
        self.session.is_connected = True
        subs = {}
        for channel, subscription in self.given.items():
            self.session.subscriptions[channel] = subscription
            beginning = beginnings.get(self.clients.names.audience(channel, connection._user_key))
            subs[channel] = self.result(subscription, beginning)
        result: Fields = {
            "client": connection.id,
            "version": VERSION,
            "ping": math.ceil(interval),
            "pong": True,
            "subs": subs,
            **ttl_of(self.expires_at),
        }
        return self.speech.say({"id": self.connect.id, "connect": result})

    def subscribed(
        self, connection: Connection, audience: Audience, beginning: Beginning, id_: object
    ) -> Message | None:
        """Return where a channel begins for it: as the answer to its command, or as a push if it hasn't asked."""
        channel = self.clients.names.of(audience)
        if channel is None:
            return None
        if isinstance(id_, Asked):
            recovery = beginning.recovery
            if recovery.reason == "unavailable":
                id_.failure = Failed(ErrorCode.INTERNAL, "try again later")
            elif id_.rejects_unrecovered and beginning.is_asked and not recovery.recovered:
                id_.failure = Failed(ErrorCode.UNRECOVERABLE_POSITION)
            if id_.failure is not None:
                return None
            self.session.subscriptions[channel] = id_.subscription
            return self.answer(id_.command, self.result(id_.subscription, beginning))
        self.session.subscriptions[channel] = Subscription(is_server_side=True)
        return self.push(channel, "subscribe", self._position(beginning))

    def lost(
        self, connection: Connection, audience: Audience, reason: str, position: Position | None
    ) -> Message | None:
        """Return nothing: soon it is told to come back, to the channel or with a new connection."""
        asyncio.get_running_loop().call_soon(self._lose, connection, audience, context=NOBODYS.copy())
        return None

    def left(self, connection: Connection, channel: str) -> Message | None:
        """Return that the server has unsubscribed it; nothing if it has asked for that or knows it."""
        if self.session.subscriptions.pop(channel, None) is None:
            return None
        self.forget(channel)
        return self.push(channel, "unsubscribe", _unsubscribe(UNSUBSCRIBED_BY_SERVER, "unsubscribed by the server"))

    def expiring(self, connection: Connection, expires_at: float, seconds: float) -> Message | None:
        """Return nothing: it was told in the answer to its command to connect."""
        return None

    def ping(self, connection: Connection) -> Message | None:
        """Return a ping. The client must answer it."""
        self.session.pings += 1
        self.clients.pinged(connection, self)
        return self.speech.ping

    # Other messages to it.

    def answer(self, command: Command, result: Fields) -> Message:
        """Return the answer to a command."""
        return self.speech.say({"id": command.id, command.method: result})

    def seen(self, connection: Connection, channel_info: bytes = b"") -> Sender:
        """Return what others see of the client."""
        return Sender(connection.id, connection._user_key or "", self.shown, channel_info)

    def push(self, channel: str, kind: str, fields: Fields) -> Message:
        """Return a message that it hasn't asked for."""
        return self.speech.say({"push": {"channel": channel, kind: fields}})

    def result(self, subscription: Subscription, beginning: Beginning | None) -> Fields:
        """Return the fields that describe a subscription to the client."""
        fields: Fields = {**ttl_of(subscription.expires_at), "data": subscription.data}
        if beginning is not None:
            fields |= self._position(beginning)
            if beginning.is_asked:
                fields["was_recovering"] = True
                fields["recovered"] = beginning.recovery.recovered
                fields["publications"] = self.speech.publications(beginning.missed)
        return fields

    @staticmethod
    def _position(beginning: Beginning) -> Fields:
        since = beginning.since
        if since is None:
            return {}
        return {"recoverable": True, "positioned": True, "epoch": since.epoch, "offset": since.offset}

    # Timers.

    def forget(self, place: str | Audience) -> None:
        """Cancel what would happen later to a subscription."""
        if (timer := self._timers.pop(place, None)) is not None:
            timer.cancel()

    def end(self) -> None:
        """Cancel everything that would happen later: the client is gone."""
        for place in list(self._timers):
            self.forget(place)
        for call in self.calls:
            call.cancel()

    def _later(self, place: str | Audience, seconds: float, call: Callable[[], None]) -> None:
        self.forget(place)
        self._timers[place] = asyncio.get_running_loop().call_later(seconds, call, context=NOBODYS.copy())

    def expire_later(self, connection: Connection, channel: str, expires_at: float | None) -> None:
        """Unsubscribe it from a channel some time after its token for the channel has expired."""
        self.forget(channel)
        if expires_at is not None:
            seconds = max(0.0, expires_at - time.time()) + GRACE_SECONDS
            self._later(channel, seconds, lambda: self._expire(connection, channel))

    def _expire(self, connection: Connection, channel: str) -> None:
        self._timers.pop(channel, None)
        self._leave(connection, channel)
        self._say(connection, self.push(channel, "unsubscribe", _unsubscribe(SUBSCRIPTION_EXPIRED, "token expired")))

    def _lose(self, connection: Connection, audience: Audience) -> None:
        if not connection.is_open:
            return
        membership, channel = self.clients.membership, audience.name
        subscription = self.session.subscriptions.get(channel)
        if audience.kind == "channel" and subscription is None:
            return  # it has left in the meantime
        if subscription is None or subscription.is_server_side or audience.kind != "channel":
            code = Disconnect.INSUFFICIENT_STATE
            age = time.monotonic() - connection._opened_at
            place = channel if audience.kind == "channel" else audience  # a channel and a user may have the same name
            self._later(place, _SETTLED_SECONDS - age, lambda: membership.send_away(connection, code, text_of(code)))
            return
        members = len(self.clients.core.life.node.registry.members(audience))
        pause = self.session.brake.pause(channel, asyncio.get_running_loop().time())
        pause += random.uniform(0, _SPREAD_SECONDS * (members - 1) / 1000)  # noqa: S311  # jitter

        def tell() -> None:  # until then it is still subscribed, and may publish
            self._timers.pop(channel, None)
            self._leave(connection, channel)
            fields = _unsubscribe(INSUFFICIENT_STATE, "insufficient state")
            self._say(connection, self.push(channel, "unsubscribe", fields))

        self._later(channel, pause, tell)

    def _leave(self, connection: Connection, channel: str) -> None:
        self.session.subscriptions.pop(channel, None)
        self.clients.membership.unsubscribe_all(Audience("connection", connection.id), (channel,))

    def _say(self, connection: Connection, message: Message) -> None:
        if connection.is_open:
            self.clients.core.say(connection, message)


def ttl_of(expires_at: float | None) -> Fields:
    """Return the fields that say for how many seconds a token is valid: at least one, because 0 means for ever."""
    return {} if expires_at is None else {"expires": True, "ttl": max(1, int(expires_at - time.time()))}


def _unsubscribe(code: int, reason: str) -> Fields:
    return {"code": code, "reason": reason}
