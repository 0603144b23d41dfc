"""All that we use of asyncpg, which is installed only with the extra `postgres`, and what its errors mean."""

from __future__ import annotations

import inspect
import ssl
from typing import Any, TypeAlias

from wsbroadcast.engines.sockets import reset
from wsbroadcast.exceptions import ConfigurationError, EngineError, EngineUnavailable, MissingDependency

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
        """Tell the server nothing.

        asyncpg would open another connection to do so, in a task that outlives this one and complains about its end.
        """


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
