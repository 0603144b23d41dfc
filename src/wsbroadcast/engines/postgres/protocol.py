r"""What a notification of Postgres carries: a name, and an envelope as text or the row where it is. No I/O.

    wsbroadcast:channel:news text:1f {"v":1,"node":"kX2…","seq":42}\nhello
    wsbroadcast:channel:news base64:20 eyJ2IjoxLCJ0eXBlIjoiYmluYXJ5In0K…
    wsbroadcast:channel:news table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55

The number after the colon keeps two equal envelopes apart, because Postgres merges equal notifications of one
transaction; a program that sends a single one may leave it out. Of what is kept its epoch and its offset stand there:

    wsbroadcast:channel:news text:kX2dh0Qb7a_Z:42 {"v":1,"node":"kX2…","seq":43}\nhello
    wsbroadcast:channel:news row:kX2dh0Qb7a_Z:43
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from base64 import b64decode, b64encode
from itertools import count
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID
from zlib import crc32

from wsbroadcast.engines.broker.link import NOWHERE, Parcel, Place, reset
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, MissingDependency
from wsbroadcast.publication import EPOCH, MAX_OFFSET, Position

MAX_NOTE_BYTES = 7_500
"""The longest notification that is sent. Postgres takes 7,999 bytes, a build of it with smaller pages takes less."""

# Channels of Postgres that share the audiences. A server hands a notification to every session that listens to its
# channel: more of them spare a node what it doesn't want, fewer are sooner listened to after an outage.
_CHANNELS = 8

# What a form, an epoch of the server's and an offset take, with what is between them.
_PLACE_BYTES = 8 + 12 + 19 + 3

_numbers = count()


class Note(NamedTuple):
    """A notification that was understood."""

    name: str
    envelope: bytes | None = b""
    """`None` if it was too large for a notification: then it is in a table."""
    row: UUID | None = None
    """Where in the table for large envelopes; `None` if it is kept."""
    place: Place = NOWHERE
    """Where it is kept, if it is."""


def channel_of(name: str, prefix: str) -> str:
    """Return the channel of Postgres on which a name is published.

    Every node listens to the channel `prefix` too, so that no other program has to know this rule. There it also hears
    of rows, which somebody has to remove even if nobody reads them.
    """
    return f"{prefix}:{crc32(name.encode()) % _CHANNELS}"


def pack(parcel: Parcel, *, takes_unicode: bool) -> str | None:
    """Return the notification of a parcel, or `None` if it doesn't fit in one.

    Args:
        parcel: The name and the envelope.
        takes_unicode: Whether the database is in UTF-8; another one refuses characters that it doesn't have.
    """
    name, envelope = parcel
    if len(envelope) > MAX_NOTE_BYTES:
        return None
    text = _as_text(envelope, takes_unicode)
    if text is not None:
        start, size = f"{name} text:{next(_numbers):x} ", len(envelope)
    else:
        text = b64encode(envelope).decode()
        start, size = f"{name} base64:{next(_numbers):x} ", len(text)
    return start + text if len(start) + size <= MAX_NOTE_BYTES else None


def pack_kept(parcel: Parcel, *, takes_unicode: bool) -> tuple[str | None, str | None]:
    """Return the form and the body of the notification of a parcel that the server gives a place, or two `None`s.

    The arguments are those of `pack`.
    """
    name, envelope = parcel
    if len(envelope) > MAX_NOTE_BYTES:
        return None, None
    form, size = "text", len(envelope)
    body = _as_text(envelope, takes_unicode)
    if body is None:
        form, body = "base64", b64encode(envelope).decode()
        size = len(body)
    return (form, body) if len(name) + size + _PLACE_BYTES <= MAX_NOTE_BYTES else (None, None)


def pack_row(name: str, row: UUID) -> str:
    """Return the notification that says in which row the envelope is."""
    return f"{name} table {row.hex}"


def is_row(note: str) -> bool:
    """Tell whether a notification says in which row an envelope is."""
    return note.startswith("table ", note.find(" ") + 1)


def unpack(payload: str) -> Note:
    """Read a notification, which anybody may have sent.

    Raises:
        ValueError: If it has none of the forms above.
    """
    name, _, rest = payload.partition(" ")
    form, _, body = rest.partition(" ")
    kind, _, number = form.partition(":")
    place = _place(number) if ":" in number else NOWHERE
    match kind:
        case "text":
            return Note(name, body.encode(), None, place)
        case "base64":
            return Note(name, b64decode(body, validate=True), None, place)
        case "table":
            return Note(name, None, UUID(hex=body))
        case "row" if place is not NOWHERE:
            return Note(name, None, None, place)
    raise ValueError("neither text nor base64 nor in a table")


def _place(text: str) -> Place:
    epoch, _, number = text.partition(":")
    offset = int(number) if number.isdecimal() and len(number) < 20 else 0
    if not EPOCH.fullmatch(epoch) or not 0 < offset <= MAX_OFFSET:
        raise ValueError("no epoch and offset")
    return Place(Position(epoch, offset), offset - 1)  # no number is left out here


def _as_text(envelope: bytes, takes_unicode: bool) -> str | None:
    if b"\0" in envelope:  # no text of Postgres may have it
        return None
    try:
        return envelope.decode("utf-8" if takes_unicode else "ascii")
    except UnicodeDecodeError:
        return None


# All that we use of asyncpg, which is installed only with the extra `postgres`, and what its errors mean.


try:
    import asyncpg
except ImportError as error:
    raise MissingDependency('the Postgres engine needs asyncpg: pip install "wsbroadcast[postgres]"') from error

Connection: TypeAlias = Any
"""An `asyncpg.Connection`; the package has no types."""

_OURS = {"connection_class", "dsn", "host", "loop", "port", "record_class", "timeout"}

ARGUMENTS = frozenset(inspect.signature(asyncpg.connect).parameters) - _OURS
"""What `asyncpg.connect` takes and isn't ours to give."""

PostgresError = asyncpg.PostgresError
UndefinedTable = asyncpg.UndefinedTableError

# What a server says to somebody it doesn't want, now or ever.
_REFUSALS = (
    asyncpg.InvalidAuthorizationSpecificationError,  # a wrong password, too
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedObjectError,  # an option that it doesn't have
    asyncpg.InvalidParameterValueError,
    asyncpg.ClientConfigurationError,
    ssl.SSLCertVerificationError,
    ValueError,
)

_FORBIDDEN = (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidSchemaNameError)

# What a server says of values that it doesn't take.
_OF_THE_MESSAGE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)

# With these the connection is of no use any more, although it may still be open.
_LOSSES = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InternalServerError,
)


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # it is Any
    """A connection that is given up when a command on it is cancelled."""

    __slots__ = ()

    def _cancel_current_command(self, *_waiters: object) -> None:
        """Tell the server nothing, and give the connection up, before anybody else who waits for a turn on it gets one.

        asyncpg would open another connection to do so, in a task that outlives this one and complains about its end.
        Who comes next on this one would wait for that.
        """
        asyncio.get_running_loop().call_soon(drop, self)  # later, because asyncpg still writes to it in this turn


async def connect(**options: Any) -> Connection:
    """Open a connection; it is used up when a call on it is cancelled.

    Args:
        **options: The arguments of `asyncpg.connect`.
    """
    return await asyncpg.connect(connection_class=_Connection, **options)


def is_refusal(error: BaseException) -> bool:
    """Say whether the server turned us away, or asyncpg our options, which trying again doesn't mend."""
    return isinstance(error, _REFUSALS) or _is_without_tls(error)


def _is_without_tls(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error)  # asyncpg has no class for it


def is_loss(error: BaseException, connection: Connection) -> bool:
    """Say whether the connection is lost, rather than one statement refused."""
    if connection.is_closed() or not isinstance(error, PostgresError):
        return True
    return isinstance(error, _LOSSES) and not isinstance(error, asyncpg.QueryCanceledError)


def is_forbidden(error: BaseException) -> bool:
    """Say whether our role lacks a permission."""
    return isinstance(error, _FORBIDDEN)


def is_full(error: BaseException) -> bool:
    """Say whether the server's queue of notifications is full: some session that listens doesn't read."""
    return isinstance(error, asyncpg.ProgramLimitExceededError)


def refusal(error: Exception, where: str) -> ConfigurationError:
    """Return what to tell about a server that turned us away; neither its texts nor asyncpg's have the password."""
    if _is_without_tls(error):
        return ConfigurationError(f"{where} offers no TLS: write sslmode=prefer if it may be without")
    return ConfigurationError(f"{where} can't be used: {said(error)}")


def publish_error(error: Exception, where: str) -> EngineError:
    """Return what to tell about a statement that was refused; its transaction is rolled back, so nothing was sent."""
    if is_full(error):
        told: EngineError = EngineUnavailable(
            f"{where} took nothing, because its queue of notifications is full: a session that listens doesn't read"
        )
    elif isinstance(error, _OF_THE_MESSAGE):
        told = EngineError(f"{where} refuses the message: {said(error)}")
    else:  # a database that is read-only, a disk that is full, a timeout, a permission that was taken back
        told = EngineUnavailable(f"{where} takes no message now: {said(error)}; nothing was sent")
    told.__cause__ = error
    return told


def said(error: BaseException) -> str:
    """Return the first line of an error, without the details that repeat values."""
    return (str(error) or type(error).__name__).partition("\n")[0][:200]


def drop(connection: Connection) -> None:
    """Close a connection with a reset."""
    transport = getattr(connection, "_transport", None)  # asyncpg has no public name for it
    if transport is not None:
        reset(transport)
    connection.terminate()
