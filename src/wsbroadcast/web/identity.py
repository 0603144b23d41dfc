"""Who is behind a connection, as the app's own dependency says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from starlette.websockets import WebSocket

from wsbroadcast.audience import UserId
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.expiry import ExpiresAt
from wsbroadcast.loops import finished
from wsbroadcast.signatures import no_dependency

UserKey = Callable[[Any], UserId]
"""Makes the id of a user from what `authenticate` returned."""


@no_dependency("whoever connects would say in the query who it is; return one from a function that finds it out")
@dataclass(frozen=True, slots=True)
class Identity:
    """Who is behind a connection, and until when; what `authenticate` may return."""

    user: UserId | None
    """The user's id; becomes `connection.user`."""
    info: Any = field(default=None, repr=False)
    """Whatever the app wants to find again; becomes `connection.info`."""
    expires_at: ExpiresAt = None
    """When the connection is closed with 4401: seconds since 1970, or a datetime with a timezone. `None` is never."""


@no_dependency("whoever connects would say in the query who it is; authorize gets one")
@dataclass(frozen=True, slots=True)
class Handshake:
    """A connection that isn't accepted yet, as `authorize` sees it: what of a `Connection` is known by then."""

    websocket: WebSocket
    """The Starlette WebSocket."""
    user: UserId | None
    """Who asks to come in, `None` if there is no `authenticate`."""
    info: Any = field(default=None, repr=False)
    """What `authenticate` returned, unless that was an id."""
    channels: frozenset[str] = frozenset()
    """It is in none yet."""


def identity_of(found: Any, user_key: UserKey | None) -> Identity:
    """Make an identity of what `authenticate` returned: an id, the claims of a token, or an object that has an id.

    Args:
        found: Not `None`. An id is the user itself; of claims, `sub` is the user and `exp` the expiry (RFC 7519, 4.1);
            of anything else, `id` is the user. Claims and objects are kept as `info`.
        user_key: Makes the id instead.

    Raises:
        ConfigurationError: If there is no id in it, or something in it has yet to run.
    """
    identity = found if isinstance(found, Identity) else _identity(found, user_key)
    finished(identity.user, "the user that authenticate found")
    finished(identity.expires_at, "the expires_at that authenticate found")
    return identity


def _identity(found: Any, user_key: UserKey | None) -> Identity:
    finished(found, "what authenticate returned")
    if isinstance(found, bool) or found == "":
        raise ConfigurationError(
            f"authenticate returned {found!r}, which doesn't say who it is: return the user's id, or None to refuse"
        )
    is_id = isinstance(found, (str, int, UUID))
    expires_at = found.get("exp") if isinstance(found, Mapping) else None
    if user_key is not None:
        return Identity(_user_by(user_key, found), None if is_id else found, expires_at)
    return Identity(found, None) if is_id else Identity(_user_in(found), found, expires_at)


def _user_in(found: Any) -> UserId:
    is_claims = isinstance(found, Mapping)
    user: UserId | None = found.get("sub") if is_claims else getattr(found, "id", None)
    if user is None:
        raise ConfigurationError(
            f"authenticate returned a {type(found).__name__} with no {'sub' if is_claims else 'id'}: pass "
            "user_key=…, which makes the user's id of it, or return the id or an Identity"
        )
    return user


def _user_by(user_key: UserKey, found: Any) -> UserId:
    user: UserId | None = user_key(found)
    if user is None:
        raise ConfigurationError(f"user_key returned None for a {type(found).__name__}: it has to return the user's id")
    return user
