r"""The content of a notification of Postgres: a name, and an envelope as text or the row that has it. No I/O.

    wsbroadcast:channel:news text:1f {"v":1,"node":"kX2…","seq":42}\nhello
    wsbroadcast:channel:news base64:20 eyJ2IjoxLCJ0eXBlIjoiYmluYXJ5In0K…
    wsbroadcast:channel:news table 6f1d0c9aa1b04d0f8c6e5d1f6f0a7c55

The number after the colon keeps two equal envelopes apart, because Postgres merges equal notifications of one
transaction. A program that sends a single one may leave it out. A kept envelope has its epoch and offset there:

    wsbroadcast:channel:news text:kX2dh0Qb7a_Z:42 {"v":1,"node":"kX2…","seq":43}\nhello
    wsbroadcast:channel:news row:kX2dh0Qb7a_Z:43
"""

from __future__ import annotations

import asyncio
import inspect
import ssl
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from contextvars import Context
from itertools import count
from typing import Any, NamedTuple, TypeAlias, TypeVar
from uuid import UUID
from zlib import crc32

from wsbroadcast.concurrency import Tasks
from wsbroadcast.engines.broker.link import NOWHERE, Parcel, Place, reset
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, MissingDependency
from wsbroadcast.publication import EPOCH, MAX_OFFSET, Position

MAX_NOTE_BYTES = 7_500
"""The longest notification that is sent, in bytes. Postgres takes 7,999; a build with smaller pages takes less."""

# How many channels of Postgres the audiences share. A server sends a notification to every session that listens to its
# channel. With more channels a node gets less that it doesn't want. With fewer it listens to all sooner after an
# outage.
_CHANNELS = 8

# How many bytes a form, an epoch of the server and an offset take, with the characters between them.
_PLACE_BYTES = 8 + 12 + 19 + 3

_numbers = count()

T = TypeVar("T")


class Note(NamedTuple):
    """A notification that was read."""

    name: str
    envelope: bytes | None = b""
    """The envelope; `None` if it was too large for a notification, and is in a table."""
    row: UUID | None = None
    """Its row in the table for large envelopes; `None` if it is kept."""
    place: Place = NOWHERE
    """Its place, if it is kept."""


def channel_of(name: str, prefix: str) -> str:
    """Return the channel of Postgres on which a name is published.

    Every node also listens to the channel `prefix`, so other programs needn't know this rule. Notifications of rows
    come there too, because some node has to remove the rows even if nobody reads them.
    """
    return f"{prefix}:{crc32(name.encode()) % _CHANNELS}"


def pack(parcel: Parcel, *, takes_unicode: bool) -> str | None:
    """Return the notification of a parcel, or `None` if it doesn't fit in one.

    Args:
        parcel: The name and the envelope.
        takes_unicode: Whether the database is in UTF-8. With another encoding it refuses characters that it lacks.
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
    """Return the form and the body of the notification of a kept parcel, or two `None`s if it doesn't fit in one.

    The server adds the place. The arguments are those of `pack`.
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
    """Return the notification for an envelope that is in a row."""
    return f"{name} table {row.hex}"


def is_row(note: str) -> bool:
    """Tell whether a notification is for an envelope in a row."""
    return note.startswith("table ", note.find(" ") + 1)


def unpack(payload: str) -> Note:
    """Read a notification. It is untrusted.

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
    return Place(Position(epoch, offset), offset - 1)  # Postgres leaves no number out


def _as_text(envelope: bytes, takes_unicode: bool) -> str | None:
    if b"\0" in envelope:  # a text of Postgres can't have it
        return None
    try:
        return envelope.decode("utf-8" if takes_unicode else "ascii")
    except UnicodeDecodeError:
        return None


# All that is used of asyncpg, which is installed only with the extra `postgres`, and what its errors mean.


try:
    import asyncpg
except ImportError as error:
    raise MissingDependency('the Postgres engine needs asyncpg: pip install "wsbroadcast[postgres]"') from error

Connection: TypeAlias = Any
"""An `asyncpg.Connection`; the package has no types."""

_OURS = {"connection_class", "dsn", "host", "loop", "port", "record_class", "timeout"}

ARGUMENTS = frozenset(inspect.signature(asyncpg.connect).parameters) - _OURS
"""The arguments of `asyncpg.connect` that the app may give."""

PostgresError = asyncpg.PostgresError
UndefinedTable = asyncpg.UndefinedTableError
UndefinedFunction = asyncpg.UndefinedFunctionError

# The errors with which a server refuses the login or the options. Trying again doesn't help.
_REFUSALS = (
    asyncpg.InvalidAuthorizationSpecificationError,  # a wrong password, too
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.UndefinedObjectError,  # an option that the server doesn't have
    asyncpg.InvalidParameterValueError,
    asyncpg.ClientConfigurationError,
    ssl.SSLCertVerificationError,
    ValueError,
)

_FORBIDDEN = (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidSchemaNameError)

# The errors with which a server refuses values.
_OF_THE_MESSAGE = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)

# After these errors the connection can't be used any more, although it may still be open.
_LOSSES = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InternalServerError,
)


class _Connection(asyncpg.Connection):  # type: ignore[misc]  # it is Any
    """A connection that is given up when a command on it is cancelled."""

    __slots__ = ()

    def _cancel_current_command(self, *_waiters: object) -> None:
        """Give the connection up, before the next waiting call gets it, and don't tell the server.

        asyncpg would open another connection to tell the server, in a task that outlives this one and logs its end. The
        next call on this connection would wait for that.
        """
        asyncio.get_running_loop().call_soon(drop, self)  # later, because asyncpg still writes to it in this turn


async def connect(**options: Any) -> Connection:
    """Open a connection. It is given up when a call on it is cancelled.

    Args:
        **options: The arguments of `asyncpg.connect`.
    """
    return await asyncpg.connect(connection_class=_Connection, **options)


def is_refusal(error: BaseException) -> bool:
    """Tell whether the server refuses the login, or asyncpg the options, so that trying again doesn't help."""
    return isinstance(error, _REFUSALS) or _is_without_tls(error)


def _is_without_tls(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) and "rejected SSL upgrade" in str(error)  # asyncpg has no class for it


def is_loss(error: BaseException, connection: Connection) -> bool:
    """Tell whether the connection is lost, and not only one statement refused."""
    if connection.is_closed() or not isinstance(error, PostgresError):
        return True
    return isinstance(error, _LOSSES) and not isinstance(error, asyncpg.QueryCanceledError)


def is_forbidden(error: BaseException) -> bool:
    """Tell whether the role lacks a permission."""
    return isinstance(error, _FORBIDDEN)


def is_full(error: BaseException) -> bool:
    """Tell whether the server's queue of notifications is full, because a listening session doesn't read."""
    return isinstance(error, asyncpg.ProgramLimitExceededError)


def refusal(error: Exception, where: str) -> ConfigurationError:
    """Return the error for a server that refuses the login. Neither its texts nor asyncpg's have the password."""
    if _is_without_tls(error):
        return ConfigurationError(f"{where} offers no TLS: write sslmode=prefer to do without")
    return ConfigurationError(f"{where} can't be used: {said(error)}")


def publish_error(error: Exception, where: str) -> EngineError:
    """Return the error for a refused statement. Its transaction is rolled back, so nothing was sent."""
    if is_full(error):
        told: EngineError = EngineUnavailable(
            f"{where} took nothing, because its queue of notifications is full: a session that listens doesn't read"
        )
    elif isinstance(error, _OF_THE_MESSAGE):
        told = EngineError(f"{where} refuses the message: {said(error)}")
    else:  # the database is read-only, the disk full, a timeout over, a permission revoked
        told = EngineUnavailable(f"{where} takes no message now: {said(error)}; nothing was sent")
    told.__cause__ = error
    return told


def said(error: BaseException) -> str:
    """Return the first line of an error. The details after it may repeat values."""
    return (str(error) or type(error).__name__).partition("\n")[0][:200]


def drop(connection: Connection) -> None:
    """Close a connection with a reset."""
    transport = getattr(connection, "_transport", None)  # asyncpg has no public name for it
    if transport is not None:
        reset(transport)
    connection.terminate()


class Turns:
    """Asks a connection one thing at a time.

    Each question goes on to its end, because a cancelled call would cost the connection.

    Args:
        lock: The lock of the connection, because asyncpg allows one operation at a time.
    """

    def __init__(self, lock: asyncio.Lock) -> None:
        self.connection: Connection = None
        """The connection that is asked."""
        self._lock = lock
        self._tasks = Tasks()

    async def run(self, ask: Callable[[Connection], Awaitable[T]]) -> T:
        """Ask, and return the answer. If the caller is cancelled, the question still goes on.

        Raises:
            Exception: If `ask` raises it.
        """
        found: list[T] = []

        async def take_turn() -> None:
            async with self._lock:
                found.append(await ask(self.connection))

        await asyncio.shield(self._tasks.begin(take_turn(), "engine question", Context()))
        return found[0]

    async def join(self) -> None:
        """Wait until all that was asked has ended. The connection is gone."""
        await self._tasks.join()
