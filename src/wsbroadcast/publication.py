"""What nodes send each other, and what of it they hand to connections. No I/O."""

from __future__ import annotations

import re
from abc import abstractmethod
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from secrets import token_urlsafe
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

from pydantic_core import SchemaSerializer, from_json

from wsbroadcast.audience import Audience, UserId, as_channels
from wsbroadcast.close_codes import check_sendable, cut_reason
from wsbroadcast.message import Message

EPOCH = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""The form of an epoch."""

MAX_OFFSET = 2**63 - 1
"""The largest offset that every broker can count to."""

_POSITION = re.compile(rf"({EPOCH.pattern}):(0|[1-9][0-9]{{0,18}})")

# The schema by which pydantic writes a `Described`. It is a dict, because pydantic itself isn't imported here.
_AS_DICT: Any = {"type": "function-plain", "function": dict, "return_schema": {"type": "dict"}}

NOBODY: frozenset[str] = frozenset()
"""Excludes no connection."""


class Position(str):
    """A place in the history of an audience. It is a text too, so an app may put it anywhere, such as into JSON.

    As the type of a route's parameter, or of a model's field, it is read from its text. `<` compares two positions of
    the same history; for others it is a `TypeError`.
    """

    __slots__ = ("epoch", "offset")
    __match_args__ = ("epoch", "offset")

    epoch: str
    """The name of the history. Positions of different epochs can't be compared."""
    offset: int
    """Grows with each publication that is kept. It is 0 before the first one."""

    def __new__(cls, epoch: str, offset: int) -> Self:  # noqa: D102
        self = str.__new__(cls, f"{epoch}:{offset}")  # not by super(), for speed: one is made for each kept message
        self.epoch = epoch
        self.offset = offset
        return self

    @classmethod
    def of(cls, text: str) -> Self:
        """Read a position from its text.

        Raises:
            ValueError: If the text is something else.
        """
        found = _POSITION.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"a position is {POSITION_TEXT}, not {text!r:.80}")
        return cls(found[1], int(found[2]))

    # Compared by offset: as texts they would be compared letter by letter, and offset 10 would come before offset 9.

    def __lt__(self, other: object) -> bool:
        return self.offset < self._comparable(other)

    def __le__(self, other: object) -> bool:
        return self.offset <= self._comparable(other)

    def __gt__(self, other: object) -> bool:
        return self.offset > self._comparable(other)

    def __ge__(self, other: object) -> bool:
        return self.offset >= self._comparable(other)

    def _comparable(self, other: object) -> int:
        if not isinstance(other, Position) or other.epoch != self.epoch:
            raise TypeError(f"a position can be compared with one of the same history, not with {other!r:.80}")
        return other.offset

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]  # a copy is made from these
        return self.epoch, self.offset

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> dict[str, Any]:
        """Let routes and pydantic's models take a position by its text."""
        reads = {"type": "no-info", "function": cls.of}
        return {"type": "function-after", "function": reads, "schema": {"type": "str"}}

    def __repr__(self) -> str:
        return f"Position({self.epoch!r}, {self.offset!r})"


POSITION_TEXT = 'an epoch, a colon and an offset, such as "kX2dh0Qb7a_Z:17"'
"""What the text of a position looks like, for error messages."""


class Described:
    """Something that is written as JSON as `dict` makes it, in a route's answer and in a broadcast."""

    __slots__ = ()

    # Pydantic looks for this attribute in a value that it has to write.
    __pydantic_serializer__ = SchemaSerializer({"type": "any", "serialization": _AS_DICT})

    @abstractmethod
    def keys(self) -> Iterable[str]:
        """Return the names of what is written."""

    @abstractmethod
    def __getitem__(self, key: str) -> Any:
        """Return what is written under a name."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: object) -> dict[str, Any]:
        """Let a route declare that it returns this. Its documentation shows an object; a route can't receive one."""
        one = {"type": "is-instance", "cls": cls}
        sent = {"type": "chain", "steps": [{"type": "dict"}, one]}
        return {"type": "json-or-python", "json_schema": sent, "python_schema": one, "serialization": _AS_DICT}


class Sender(NamedTuple):
    """The client that has published something, as other clients may see it."""

    client: str
    """The id of the client's connection."""
    user: str
    """Its user; empty if it has none."""
    info: bytes = b""
    """What others see of the client, as JSON; empty for nothing."""
    channel_info: bytes = b""
    """What others see of the client in this channel, as JSON; empty for nothing."""


class Publication(Described):
    """A message on its way to an audience.

    As JSON, and by `dict`, it is what a client of the subprotocol `wsbroadcast.v1` gets, without the `type`.
    """

    __slots__ = (
        "_seen",
        "audience",
        "audiences",
        "exclude",
        "exclude_users",
        "id",
        "kept_at",
        "message",
        "position",
        "previous",
        "sender",
        "taken_at",
        "traceparent",
    )

    def __init__(
        self,
        message: Message,
        audience: Audience,
        exclude: frozenset[str] = NOBODY,
        *,
        exclude_users: frozenset[str] = NOBODY,
        id: str | None = None,  # noqa: A002  # its name in the envelope
        audiences: tuple[Audience, ...] = (),
        position: Position | None = None,
        previous: int = 0,
        kept_at: float = 0.0,
    ) -> None:
        self.message = message
        """What was broadcast."""
        self.audience = audience
        """Who it is for."""
        self.exclude = exclude
        """Ids of connections that don't get it, on any node."""
        self.exclude_users = exclude_users
        """Users whose connections don't get it, on any node; as text."""
        self.id = id
        """The common id of the publications of one broadcast to several audiences; `None` for one audience."""
        self.audiences = audiences
        """All audiences of a broadcast to several audiences; empty for one audience."""
        self.position = position
        """Its place in the history of its audience; `None` if it isn't kept."""
        self.previous = previous
        """The offset before it in its audience, if it has a position. A jump shows that a publication is missing."""
        self.kept_at = kept_at
        """When it was kept, in seconds by the clock of the event loop, if it has a position."""
        self.taken_at = 0.0
        """When the node got it, in seconds by the monotonic clock; 0 if its delivery isn't measured."""
        self.sender: Sender | None = None
        """The client that has published it; `None` if others aren't told."""
        self.traceparent: str | None = None
        """Where a trace has its broadcast (W3C Trace Context); empty if it isn't recorded, `None` if nobody traces."""
        # Its messages for clients of other protocols than the plain one, made when one is first needed.
        self._seen: dict[Protocol, Message] | None = None

    @property
    def size(self) -> int:
        """The payload's size in bytes."""
        return self.message.size

    @property
    def channel(self) -> str | None:
        """The channel that it was broadcast to; `None` for a user or everyone."""
        return self.audience.name if self.audience.kind == "channel" else None

    @property
    def data(self) -> Any:
        """What was broadcast: the text, the bytes, or the value of the JSON."""
        message = self.message
        return from_json(message.payload) if message.form == "json" else message.data

    @property
    def offset(self) -> int:
        """The offset of its position; 0 if it has none."""
        return 0 if self.position is None else self.position.offset

    def keys(self) -> Iterable[str]:
        """Return the names of what is written as JSON."""
        yield "channel" if self.audience.kind == "channel" else "to"
        yield "data"
        if not self.message.is_text:
            yield "encoding"
        if self.id is not None:
            yield "id"
        if self.position is not None:
            yield "position"

    def __getitem__(self, key: str) -> Any:
        match key:
            case "to":
                return self.audience.kind
            case "data" if not self.message.is_text:
                return b64encode(self.message.payload).decode()
            case "encoding":
                return "base64"
            case "channel" | "data" | "id" | "position":
                return getattr(self, key)
        raise KeyError(key)

    def withheld(self) -> Withheld:
        """Return what an excluded client that knows positions gets instead, so that it knows the new position."""
        return Withheld(self.message, self.audience, position=self.position, previous=self.previous)

    def with_message(self, message: Message) -> Publication:
        """Return a copy with another message."""
        other = Publication(
            message,
            self.audience,
            self.exclude,
            exclude_users=self.exclude_users,
            id=self.id,
            audiences=self.audiences,
            position=self.position,
            previous=self.previous,
            kept_at=self.kept_at,
        )
        other.taken_at, other.traceparent, other.sender = self.taken_at, self.traceparent, self.sender
        return other

    def place(self, position: Position, previous: int, kept_at: float = 0.0) -> None:
        """Give it its place in the history of its audience."""
        self.position, self.previous, self.kept_at = position, previous, kept_at

    def seen_by(self, protocol: Protocol) -> Message:
        """Return the message for clients of a protocol. It is made once for all of them."""
        if protocol is plain:
            return self.message
        if self._seen is None:
            self._seen = {}
        seen = self._seen.get(protocol)
        if seen is None:
            seen = self._seen[protocol] = protocol(self)
        return seen

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Publication):
            return NotImplemented
        return self._content == other._content

    __hash__ = None  # type: ignore[assignment]  # as for a list: two equal ones are still two publications

    @property
    def _content(self) -> tuple[object, ...]:
        message = self.message
        place = self.audience, self.audiences, self.id, self.position
        return message.payload, message.form, message.key, self.exclude, self.exclude_users, place, self.sender

    def __repr__(self) -> str:
        return f"<Publication {self.message!r} to {self.audience!r}>"


class Frame(Publication):
    """Something that the protocol itself tells one connection, such as an answer."""

    __slots__ = ()


class Withheld(Publication):
    """Stands for a publication that a connection doesn't get, so that the connection knows the new position."""

    __slots__ = ()


Publications = tuple[Publication, ...]
"""The publications of one broadcast, one for each audience."""


def publications_of(
    message: Message,
    audiences: tuple[Audience, ...],
    exclude: frozenset[str] = NOBODY,
    exclude_users: frozenset[str] = NOBODY,
) -> Publications:
    """Build the publications of a broadcast. If there are several, they have a common id."""
    if len(audiences) == 1:
        return (Publication(message, audiences[0], exclude, exclude_users=exclude_users),)
    id_ = token_urlsafe(12)
    return tuple(
        Publication(message, audience, exclude, exclude_users=exclude_users, id=id_, audiences=audiences)
        for audience in audiences
    )


class Receipt(NamedTuple):
    """What is known about a broadcast when the engine has taken it."""

    members_here: int
    """How many connections of this node were to get it at the time of the call: those in its audiences without the
    excluded ones. Connections of other nodes aren't counted."""
    positions: Mapping[Audience, Position] = MappingProxyType({})
    """Its positions in the histories of its audiences; empty if it isn't kept."""
    is_held_back: bool = False
    """Whether a hook held it back. Nobody gets it then."""
    is_repeat: bool = False
    """Whether it was published before, under the same idempotency key. Nobody gets it again then."""
    members: int | None = None
    """With presence: how many members the audience has over all nodes. Each user counts once, and so do members in
    their grace and excluded ones. `None` without presence, for several audiences, if the broker can't be asked, and if
    the broadcast wasn't awaited."""

    @property
    def position(self) -> Position | None:
        """Its position in the history of its audience; `None` for several audiences, or if it isn't kept."""
        return next(iter(self.positions.values())) if len(self.positions) == 1 else None


Protocol = Callable[[Publication], Message]
"""Makes of a publication the message for a client. It is a pure function: it is called once for all its clients."""


NOTHING = Message(b"")
"""What a protocol returns if its clients aren't sent the publication."""


def plain(publication: Publication) -> Message:
    """Return the message itself: the protocol of FastAPI's tutorial."""
    return publication.message


@dataclass(frozen=True, slots=True)
class Dismissal:
    """Closes the connections of an audience on all nodes."""

    audience: Audience
    """The audience."""
    code: int
    """The close code."""
    reason: str = ""
    """The close reason; at most 123 bytes of UTF-8."""
    exclude: frozenset[str] = NOBODY
    """Ids of connections that stay open."""

    @classmethod
    def of_user(cls, user: UserId, code: int, reason: str, exclude: frozenset[str] = NOBODY) -> Self:
        """Build the dismissal of a user's connections.

        Raises:
            ValueError: If the user is not an id, or the code can't be sent.
        """
        check_sendable(code)
        return cls(Audience.user(user), int(code), cut_reason(reason), exclude)

    @property
    def size(self) -> int:
        """The size of the reason in bytes."""
        return len(self.reason.encode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Unsubscription:
    """Takes the connections of an audience out of channels, on all nodes."""

    audience: Audience
    """The audience."""
    channels: tuple[str, ...]
    """The channels that the connections leave."""

    @classmethod
    def of_user(cls, user: UserId, channels: tuple[str, ...]) -> Self:
        """Build the unsubscription of a user's connections.

        Raises:
            InvalidChannel: If a name breaks a rule.
            ValueError: If the user is not an id, or no channel is named.
        """
        names = as_channels(channels)
        if not names:
            raise ValueError("name the channels: unsubscribe_user(user, channel)")
        return cls(Audience.user(user), names)

    @property
    def size(self) -> int:
        """Always 0: it has no payload."""
        return 0


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Tells nodes that the history of an audience was removed, so that they replay nothing that they still hold."""

    audience: Audience
    """The audience."""

    @property
    def size(self) -> int:
        """Always 0: it has no payload."""
        return 0


@dataclass(frozen=True, slots=True)
class PresenceChange:
    """Who has joined a channel, or left it, over all nodes. Every node with connections in the channel is sent it."""

    audience: Audience
    """The channel."""
    version: int
    """One more than the version of the change before. A jump shows that a change is missing: read `members` then."""
    joined: Mapping[str, bytes]
    """The members that have joined, with their info as JSON; empty bytes for none."""
    left: frozenset[str] = frozenset()
    """The members that have left."""
    by: str = ""
    """The incarnation of the node where they joined or left."""

    @property
    def size(self) -> int:
        """The size of names and infos in bytes."""
        return sum(len(name.encode()) + len(info) for name, info in self.joined.items()) + sum(map(len, self.left))


MAX_NODE_MESSAGE_BYTES = 256 * 1024
"""The largest body of a `NodeMessage`, in bytes."""

NodeMessageKind = Literal["hello", "bye", "question", "answer"]
"""`hello`: the node is there. `bye`: it ends. `question`: it asks the other nodes. `answer`: it answers a question."""


@dataclass(frozen=True, slots=True)
class NodeMessage:
    """What a node tells other nodes about itself. It changes no connection, and no connection is sent it."""

    audience: Audience
    """All nodes that answer such questions, or one of them."""
    kind: NodeMessageKind
    """What the message is."""
    sender: str
    """The id of the node that sends it."""
    id: str = ""
    """The id of a question, in the question and its answers."""
    body: bytes = b""
    """The content, as JSON."""

    @property
    def size(self) -> int:
        """The size of the body in bytes."""
        return len(self.body)


Control = Dismissal | Unsubscription | Forgetting | NodeMessage | PresenceChange
"""What nodes tell each other, beside messages. No connection is sent it."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An outage of the broker. What other nodes published in that time has not arrived here."""

    engine: str
    """The engine's name."""
    seconds: float
    """How long it lasted, in seconds."""
    audiences: frozenset[Audience] = frozenset()
    """The audiences with connections here that may have missed messages. An audience with a history isn't among them
    if all missed messages could be read."""
