"""One connection to a broker: opened, used, lost, thrown away. What a new broker engine has to write."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol, Self

from wsbroadcast.history import Appended, History, HistoryRules
from wsbroadcast.publication import Position


class Host(NamedTuple):
    """Where a server listens."""

    name: str
    port: int
    tls_hostname: str | None = None
    """What its certificate has to name instead, for one we know by its address only."""

    def __str__(self) -> str:
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


class Parcel(NamedTuple):
    """What travels through a broker."""

    name: str
    """The name of an audience at the broker, as `AudienceNames` makes it."""
    envelope: bytes
    """The envelope, any bytes."""


class Keep(NamedTuple):
    """How a broker keeps an envelope."""

    history: History
    """How much is kept of what comes under this name."""
    key: str | None = None
    """Of several with the same key under this name the first alone is kept and sent."""


class KeptParcel(Parcel):
    """What a broker keeps, numbers and sends in one step. Its header is as `envelope.encode` writes it.

    Args:
        name: The name of an audience at the broker.
        envelope: The envelope.
        keep: How it is kept.
    """

    keep: Keep

    def __new__(cls, name: str, envelope: bytes, keep: Keep) -> Self:  # noqa: D102
        parcel = super().__new__(cls, name, envelope)
        parcel.keep = keep
        return parcel


class Place(NamedTuple):
    """Where an envelope stands among those that are kept under its name."""

    position: Position
    """Its epoch and offset."""
    previous: int
    """The offset of the one before it; 0 if there was none."""


NOWHERE: Final = Place(Position("", 0), 0)
"""The place of what isn't kept, where a broker says beside each envelope what is: its header isn't believed then."""


class Entry(NamedTuple):
    """An envelope as a broker has kept it."""

    envelope: bytes
    """As it was published."""
    offset: int
    """Its place; that of the envelope before it is the offset of the entry before, or known by `Stretch.base`."""
    age: float
    """How many seconds ago it was kept, by the broker's clock."""
    previous: int | None = None
    """The offset of the envelope before it, if that may be missing among the entries."""


class Stretch(NamedTuple):
    """What a broker has kept under a name."""

    top: Position
    """The newest position, also where nothing is kept any more; offset 0 if nothing ever was."""
    entries: Sequence[Entry]
    """In order. Entries that are too old may be among them."""
    base: int
    """Whatever was kept after this offset, up to `top`, is among the entries."""


class Inlet(Protocol):
    """Where a link hands over what comes from the broker. Synchronous: a link never waits for a slow node."""

    def take(self, name: str, envelope: bytes, place: Place | None = None) -> None:
        """Take one envelope, in the order in which the broker sent them.

        Args:
            name: Under which it came.
            envelope: The envelope.
            place: Where it was kept, if the broker says that beside it, or `NOWHERE`; else it may stand in the
                envelope.
        """

    def missed(self, why: str, since: float | None = None) -> None:
        """Take note that messages are missing: those that a full buffer dropped, or that a lost link had yet to read.

        Args:
            why: What happened to them, for the log.
            since: When, by the event loop's clock, something last came before the first of them; the last `take`
                unless it is given.
        """


class Link(ABC):
    """One connection to a broker, or one to publish and one to receive.

    The supervisor opens it, runs `read`, and when anything fails, calls `abort` and makes a new one: a link neither
    reconnects nor resubscribes, and never sends again what it could not send. Every call has a timeout outside; being
    cancelled anywhere must leave nothing behind that `abort` doesn't end.
    """

    max_envelope_bytes: int = 512 * 1024 * 1024
    """The largest envelope the broker takes, once the link is open."""

    @abstractmethod
    async def open(self) -> None:
        """Connect and authenticate.

        Raises:
            ConfigurationError: If the broker refuses us, which trying again doesn't mend: password, permission.
            Exception: Any other means that the broker can't be reached now.
        """

    @abstractmethod
    async def read(self, inlet: Inlet) -> None:
        """Hand what arrives to the inlet until the connection is lost; runs as a task while the link is used.

        Raises:
            Exception: Why it was lost. It never returns otherwise.
        """

    @abstractmethod
    async def subscribe(self, names: Sequence[str]) -> None:
        """Receive what is published to these names; returns once the broker has confirmed each.

        `subscribe` and `unsubscribe` are never called at the same time as each other, but while `read` and `publish`
        run.

        Raises:
            ConfigurationError: If the broker forbids a name to us.
        """

    @abstractmethod
    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Receive it no more; returns once the broker has confirmed, so that a later `subscribe` can't be confused."""

    @abstractmethod
    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish in this order, in one go; returns once the broker has taken them. Never called concurrently.

        Returns:
            For each parcel `None`, of one that was to be kept where it is, or what the broker refused it with: a
            `ConfigurationError` if it forbids us to publish it, an `OSError` such as `EngineUnavailable` if it takes
            nothing now, `MessageTooLarge`, or any other error if trying again with this very parcel doesn't help.

        Raises:
            Exception: If the connection was lost; whether the broker took them isn't known.
        """

    async def read_limits(self) -> None:  # noqa: B027  # most brokers say what has changed, or change nothing
        """Find out whether `max_envelope_bytes` is still right; called when somebody publishes more than that.

        Raises:
            Exception: If the broker doesn't say it now; that is not a loss of the link.
        """

    @abstractmethod
    async def abort(self) -> None:
        """Drop the connection now, without waiting for the broker; idempotent.

        Nothing that is still in a buffer may reach the broker later: the socket is closed with a reset
        (`reset_on_close`), because a kernel goes on sending after a partition what a closed socket had left.
        """


class KeepingLink(Link):
    """A link to a broker that keeps envelopes: a `KeptParcel` is kept, numbered and sent in one step.

    What comes of them carries its place, in the header or beside the envelope. Opening it raises `ConfigurationError`,
    with what to do, if rules were given and the broker can't keep anything.

    Args:
        rules: What is kept; `None` if that isn't known, or nothing is.
        only_publishes: Whether nobody receives anything here.
    """

    def __init__(self, rules: HistoryRules | None, *, only_publishes: bool = False) -> None:
        self.rules = rules
        """What is kept. `open` fills it in if it `learns`."""
        self.writes = rules is not None and not only_publishes
        """Whether `open` writes the rules down at the broker."""
        self.learns = rules is None and only_publishes
        """Whether `open` reads the rules that others have written."""

    @abstractmethod
    async def read_kept(self, name: str, since: int | None, history: History) -> Stretch:
        """Read what was kept under a name; may be called at any time, also while it runs already.

        It makes the epoch if there is none, as the first append would. It answers from what has every append that was
        confirmed before the call.

        Args:
            name: The name of an audience.
            since: Everything after this offset, if it is kept; at least all that is kept if that is less.
            history: How much is kept; the newest `history.messages` are enough.
        """

    @abstractmethod
    async def read_positions(self, names: Sequence[str], histories: Sequence[History]) -> Sequence[Position]:
        """Read the newest position under each name, in one round trip; it makes the epochs that are missing."""

    @abstractmethod
    async def forget(self, name: str) -> None:
        """Remove what is kept under a name; the epoch changes."""


# What the drivers don't do with their sockets.


# Two shorts on Windows, two ints elsewhere: do linger, for no time at all.
_NO_LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


def no_linger(transport: asyncio.BaseTransport) -> None:
    """Make every later close of the connection a reset (RFC 9293, 3.10.5), no matter which side or library closes it.

    The kernel then drops what it could not send yet. It doesn't help a unix socket, whose peer has at once what was
    written, and not there on transports without a socket.
    """
    # Closed already: None or a closed socket, of which uvloop says ValueError and everybody else OSError. Over
    # TLS, once somebody has closed it twice, asyncio's `get_extra_info` itself says AttributeError.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


def reset(transport: asyncio.BaseTransport) -> None:
    """Close the connection with a reset: nothing that is still in a buffer, ours or the kernel's, is sent any more.

    Takes every transport, one over TLS too, and one that is closed. The socket is gone a turn of the event loop later.
    """
    no_linger(transport)
    # By name: uvloop's transports are not asyncio's classes.
    getattr(transport, "abort", transport.close)()
