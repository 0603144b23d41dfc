"""One connection to a broker: it is opened, used, lost and thrown away. A new broker engine has to write one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final, NamedTuple, Protocol, Self

from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.publication import Position


class Host(NamedTuple):
    """The address of a server."""

    name: str
    port: int
    tls_hostname: str | None = None
    """The name that its certificate must have, if `host` is only an address."""

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


class Parcel(NamedTuple):
    """An envelope on its way to the broker, and the name that it is published under."""

    name: str
    """The name of an audience at the broker, as `AudienceNames` makes it."""
    envelope: bytes
    """The envelope. It may hold any bytes."""


class Keep(NamedTuple):
    """How a broker keeps an envelope."""

    history: History
    """How much is kept under this name."""
    key: str | None = None
    """Of several parcels with the same key under this name, only the first is kept and sent."""


class KeptParcel(Parcel):
    """A parcel that the broker keeps, numbers and sends in one step. Its header is as `envelope.encode` writes it."""

    keep: Keep
    """How it is kept."""

    def __new__(cls, name: str, envelope: bytes, keep: Keep) -> Self:  # noqa: D102
        parcel = super().__new__(cls, name, envelope)
        parcel.keep = keep
        return parcel


class Place(NamedTuple):
    """The place of an envelope among those that are kept under its name."""

    position: Position
    """Its epoch and offset."""
    previous: int
    """The offset of the envelope before it; 0 if there was none."""


NOWHERE: Final = Place(Position("", 0), 0)
"""The place of an envelope that isn't kept. It is for brokers that give the place beside each envelope: what the header
says of a place isn't believed then."""


class Entry(NamedTuple):
    """An envelope as a broker has kept it."""

    envelope: bytes
    """The envelope as it was published."""
    offset: int
    """Its offset."""
    age: float
    """How many seconds ago it was kept, by the broker's clock."""
    previous: int | None = None
    """The offset of the envelope before it. `None` if that is the offset of the entry before, or `Stretch.base` for the
    first entry."""


class Stretch(NamedTuple):
    """What a broker has kept under a name, or a part of it."""

    top: Position
    """The newest position, also if nothing is kept any more; offset 0 if nothing ever was."""
    entries: Sequence[Entry]
    """The entries in order. Some may be too old."""
    base: int
    """The entries have everything that was kept after this offset, up to `top`."""


class Inlet(Protocol):
    """Takes what comes from the broker. Its methods don't wait, so a link never waits for a slow node."""

    def take(self, name: str, envelope: bytes, place: Place | None = None) -> None:
        """Take one envelope. Call it in the order in which the broker sent them.

        Args:
            name: The name that it came under.
            envelope: The envelope.
            place: Its place, or `NOWHERE`, if the broker gives that beside the envelope. `None` if the header may have
                it.
        """

    def missed(self, why: str, since: float | None = None) -> None:
        """Take note that messages are missing: a full buffer dropped them, or a lost link had not read them yet.

        Args:
            why: What happened to them, for the log.
            since: When something last came before the first of them, in seconds of the event loop's clock; by default
                the time of the last `take`.
        """


class Link(ABC):
    """One connection to a broker, or two: one to publish and one to receive.

    The supervisor opens it and runs `read`. When anything fails, it calls `abort` and makes a new link. So a link never
    reconnects, never subscribes again, and never sends again what it could not send. The supervisor puts a timeout
    around every call. A call may be cancelled at any point, and `abort` must then end all that it has left behind.
    """

    max_envelope_bytes: int = 512 * 1024 * 1024
    """The largest envelope that the broker takes, in bytes. It is right once the link is open."""

    @abstractmethod
    async def open(self) -> None:
        """Connect and authenticate.

        Raises:
            ConfigurationError: If the broker refuses the node, and trying again doesn't help: password, permission.
            Exception: Any other error means that the broker can't be reached now. An error that no broker causes, such
                as `AttributeError` or `TypeError`, counts as a bug: `start` raises an `EngineError` for it.
        """

    @abstractmethod
    async def read(self, inlet: Inlet) -> None:
        """Hand what arrives to the inlet until the connection is lost. It runs as a task while the link is used.

        Raises:
            Exception: Why the connection was lost. It never returns.
        """

    @abstractmethod
    async def subscribe(self, names: Sequence[str]) -> None:
        """Receive what is published to these names. It returns once the broker has confirmed each of them.

        `subscribe` and `unsubscribe` never run at the same time. Both run while `read` and `publish` run.

        Raises:
            ConfigurationError: If the broker forbids one of the names.
        """

    @abstractmethod
    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Receive no more of what is published to these names.

        It returns once the broker has confirmed, so that its answer can't be taken for that to a later `subscribe`.
        """

    @abstractmethod
    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish in this order, in one go; return once the broker has taken the parcels. Never called twice at once.

        Returns:
            For each parcel `None`, or where it is kept if it was to be kept, or an error if the broker refused it. The
            error is a `ConfigurationError` if the broker forbids to publish it, an `OSError` such as
            `EngineUnavailable` if the broker takes nothing now, `MessageTooLarge`, or any other error if trying again
            with this very parcel doesn't help. A caller of `broadcast` gets the first two as an `EngineUnavailable`,
            `MessageTooLarge` as it is, and any other error as an `EngineError`.

        Raises:
            Exception: If the connection was lost. Whether the broker took the parcels isn't known then.
        """

    async def read_limits(self) -> None:  # noqa: B027  # most brokers announce changes, or never change
        """Ask the broker for `max_envelope_bytes` again. It is called when somebody publishes more than that.

        Raises:
            Exception: If the broker doesn't answer now. The link isn't lost by it.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Drop the connection now, without waiting for the broker. It may be called twice.

        Nothing that is still in a buffer may reach the broker later. So close the socket with a reset (`reset`). After
        a normal close the kernel goes on sending what it has, even when a network partition ends much later.
        """


class KeepingLink(Link):
    """A link to a broker that keeps envelopes. A `KeptParcel` is kept, numbered and sent in one step.

    A kept envelope arrives with its place, in the header or beside the envelope. If rules were given and the broker
    can't keep anything, `open` raises `ConfigurationError`, and the error says what to do.

    Args:
        rules: What is kept; `None` if that isn't known, or if nothing is.
        only_publishes: Whether this program receives nothing.
    """

    keeps_without_rules: ClassVar[bool] = False
    """Whether it can keep envelopes although it had no rules when it was opened."""

    def __init__(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        self.rules = rules
        """What is kept. If `learns` is true, `open` fills it in."""
        self.writes = rules is not None and not only_publishes
        """Whether `open` writes the rules down at the broker."""
        self.learns = rules is None and only_publishes
        """Whether `open` reads the rules that others have written."""

    @abstractmethod
    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what was kept under a name. It may be called at any time, also several times at once.

        If there is no epoch, it makes one, as the first append would. It sees every append that was confirmed before
        the call.

        Args:
            name: The name of an audience.
            since: Read at least everything after this offset. If some of that is no longer kept, read all that is kept.
            history: How much is kept. The newest `history.messages` are enough.
        """

    @abstractmethod
    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest position under each name in one round trip; missing epochs are made."""

    @abstractmethod
    async def forget(self, name: str) -> None:
        """Remove what is kept under a name. The epoch changes."""


# Closing sockets with a reset, which the drivers don't do.


# The value of SO_LINGER: linger, but for 0 s. It is two shorts on Windows, two ints elsewhere.
_NO_LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


def no_linger(transport: asyncio.BaseTransport) -> None:
    """Make every later close of the connection a reset (RFC 9293, 3.10.5), no matter what closes it.

    The kernel then drops what it could not send yet. It has no effect on a unix socket, whose peer has at once what was
    written, nor on a transport without a socket.
    """
    # If the connection is closed already, the socket is None, or closed: uvloop raises ValueError for that, others
    # OSError. Over TLS, asyncio's `get_extra_info` itself raises AttributeError after a second close.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


def reset(transport: asyncio.BaseTransport) -> None:
    """Close the connection with a reset. Nothing that is still in a buffer, ours or the kernel's, is sent any more.

    It takes every transport, also over TLS, and also a closed one. The socket is closed one turn of the event loop
    later.
    """
    no_linger(transport)
    # Found by name, because uvloop's transports are not of asyncio's classes.
    getattr(transport, "abort", transport.close)()
