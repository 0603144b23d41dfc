"""Tokens in the form that Centrifugo's issuers make: a JWT (RFC 7519) for a connection or for a subscription."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wsbroadcast.audience import user_key
from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.protocols.centrifuge.keys import InvalidToken, Key, TokenKey, json_of, keys_of, verified
from wsbroadcast.signatures import no_dependency

# The year 9999: a later time is no valid datetime.
_MAX_TIME = 253_402_300_800


class ExpiredToken(InvalidToken):
    """Raised for a well-signed token whose time has passed or hasn't come yet. The client should get a new one."""


class ForeignToken(InvalidToken):
    """Raised for a well-signed subscription token for another channel, user or client."""


@dataclass(frozen=True, slots=True)
class ServerSubscription:
    """A channel that a connection token puts its connection into."""

    info: Any = field(default=None, repr=False)
    """What others see of the connection in this channel: `chan_info`."""
    data: Any = field(default=None, repr=False)
    """What the client is told with the subscription."""


@dataclass(frozen=True, slots=True)
class ConnectionToken:
    """The contents of a connection token."""

    user: str | None
    """The claim `sub`; `None` for an anonymous user, if it is missing or empty."""
    expires_at: float | None = None
    """When the connection must show a new token, in seconds since 1970; `None` for never."""
    info: Any = field(default=None, repr=False)
    """What others see of the connection: `conn_info`."""
    channels: Mapping[str, ServerSubscription] = field(default_factory=dict)
    """The channels that the connection is put into."""
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the issuer tells the server. Clients never see it."""


@dataclass(frozen=True, slots=True)
class SubscriptionToken:
    """The contents of a subscription token."""

    expires_at: float | None = None
    """When the subscription must show a new token, in seconds since 1970; `None` for never."""
    info: Any = field(default=None, repr=False)
    """What others see of the connection in this channel: `chan_info`."""
    data: Any = field(default=None, repr=False)
    """What the client is told with the subscription."""


def ttl_of(expires_at: float, now: float) -> int:
    """Return the whole seconds until then, at least 1: to a client, 0 means that it never expires."""
    return max(1, int(expires_at - now))


@no_dependency("pass it to create_centrifuge_router")
class CentrifugeTokens:
    """Checks tokens with the claims of Centrifugo's issuers. Needs `pip install "wsbroadcast[centrifuge]"`.

    Each key works only with the algorithms of its kind: a secret with HS256, HS384 and HS512; an RSA key with RS… and
    PS…; a key of an elliptic curve with the ES… of its curve; an Ed25519 or Ed448 key with EdDSA. In a JWKS, the keys
    with the token's `kid` are tried, or, if it has no `kid`, all keys that fit. A token needs no `exp`.

    Nothing is fetched. Fetch a JWKS when the app starts, and pass later ones to `replace_keys`.

    Args:
        keys: The key that tokens are signed with, or a list of several.
        subscription_keys: The keys that subscription tokens are signed with. The default is `keys`.
        audience: What `aud` must be or contain. By default it isn't checked.
        issuer: What `iss` must be. By default it isn't checked.
        allow_weak_secret: Whether a secret may be shorter than 32 bytes (RFC 7518, 3.2). Anybody with a token can find
            out a short secret.

    Raises:
        ConfigurationError: If a key is not a key, is weak, is private, or fits no algorithm.
        MissingDependency: If PyJWT isn't installed, or, for a public key, the package cryptography.
    """

    def __init__(
        self,
        keys: TokenKey | Iterable[TokenKey],
        *,
        subscription_keys: TokenKey | Iterable[TokenKey] | None = None,
        audience: str | None = None,
        issuer: str | None = None,
        allow_weak_secret: bool = False,
    ) -> None:
        for name, value in (("audience", audience), ("issuer", issuer)):
            if value is not None and not isinstance(value, str):
                raise ConfigurationError(f"{name} is text, not {kind_of(value)}")
        self._audience, self._issuer = audience, issuer
        self._allow_weak_secret = allow_weak_secret
        self._subscription_keys: list[Key] | None = None  # `None`: the same as for connections
        self.replace_keys(keys, subscription_keys=subscription_keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._keys)} keys)"

    def replace_keys(
        self,
        keys: TokenKey | Iterable[TokenKey],
        *,
        subscription_keys: TokenKey | Iterable[TokenKey] | None = None,
    ) -> None:
        """Check tokens with other keys from now on. If one of the keys is refused, nothing changes.

        Args:
            keys: As for the class.
            subscription_keys: As for the class. By default they stay as they are.

        Raises:
            ConfigurationError: As for the class.
        """
        found = keys_of(keys, allow_weak_secret=self._allow_weak_secret)
        if subscription_keys is not None:
            self._subscription_keys = keys_of(subscription_keys, allow_weak_secret=self._allow_weak_secret)
        self._keys = found

    def connection(self, token: str) -> ConnectionToken:
        """Check a connection token; return its contents.

        Raises:
            ExpiredToken: If its time has passed or hasn't come yet.
            InvalidToken: If it isn't valid for any other reason.
        """
        claims = self._claims(token, self._keys)
        if claims.get("channel"):
            raise InvalidToken("a subscription token was shown for a connection")
        channels = {channel: ServerSubscription() for channel in _strings(claims, "channels")}
        for channel, options in _object(claims, "subs").items():
            if not isinstance(options, dict):
                raise InvalidToken("the claim subs isn't an object of objects")
            channels[channel] = ServerSubscription(_json_in(options, "info"), _json_in(options, "data"))
        return ConnectionToken(
            _user(claims),
            _expires_at(claims),
            _json_in(claims, "info"),
            channels,
            _object(claims, "meta"),
        )

    def subscription(self, token: str, *, channel: str, user: str | None, client: str) -> SubscriptionToken:
        """Check a subscription token; return its contents.

        Args:
            token: The token that the client has sent.
            channel: The channel that the client subscribes to.
            user: The user of the connection; `None` for an anonymous user.
            client: The id of the connection. A token may be bound to it.

        Raises:
            ForeignToken: If it is for another channel, user or client.
            ExpiredToken: If its time has passed or hasn't come yet.
            InvalidToken: If it isn't valid for any other reason.
        """
        claims = self._claims(token, self._subscription_keys or self._keys)
        if not _text(claims, "channel"):
            raise InvalidToken("it has no channel: a connection token was shown for a subscription")
        if claims["channel"] != channel or _text(claims, "sub") != (user or ""):
            raise ForeignToken("it is for another channel or another user")
        if _text(claims, "client") not in ("", client):
            raise ForeignToken("it is for another connection")
        return SubscriptionToken(_expires_at(claims), _json_in(claims, "info"), _json_in(claims, "data"))

    def _claims(self, token: str, keys: list[Key]) -> dict[str, Any]:
        claims = verified(token, keys)
        now = time.time()
        # First check whose token it is: for a token of another issuer, getting a new one wouldn't help.
        audience = claims.get("aud")
        if self._audience is not None and self._audience not in (
            audience if isinstance(audience, list) else [audience]
        ):
            raise InvalidToken("its aud isn't ours")
        if self._issuer is not None and claims.get("iss") != self._issuer:
            raise InvalidToken("its iss isn't ours")
        expires_at, begins_at = _number(claims, "exp"), _number(claims, "nbf")
        if expires_at is not None and expires_at <= now:
            raise ExpiredToken("its exp has passed")
        if begins_at is not None and begins_at > now:
            raise ExpiredToken("its nbf is in the future")
        if (_expires_at(claims) or math.inf) <= now:
            raise ExpiredToken("its expire_at has passed")
        return claims


# Claims. A claim of the wrong type can't be relied on, so the token is refused.


def _user(claims: Mapping[str, Any]) -> str | None:
    user = _text(claims, "sub")
    try:
        return user_key(user) if user else None
    except ValueError as error:
        raise InvalidToken("the claim sub can't be the name of a user") from error


def _text(claims: Mapping[str, Any], name: str) -> str:
    value = claims.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidToken(f"the claim {name} isn't text")
    return value or ""


def _number(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _MAX_TIME:
        raise InvalidToken(f"the claim {name} isn't a time in seconds")
    return float(value)


def _expires_at(claims: Mapping[str, Any]) -> float | None:
    # `expire_at` is for what the token is shown for. If it is missing, the token's own expiry counts. 0 means never.
    apart = _number(claims, "expire_at")
    return _number(claims, "exp") if apart is None else apart or None


def _strings(claims: Mapping[str, Any], name: str) -> list[str]:
    value = claims.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidToken(f"the claim {name} isn't a list of text")
    return value


def _object(claims: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = claims.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidToken(f"the claim {name} isn't an object")
    return value


def _json_in(claims: Mapping[str, Any], name: str) -> Any:
    # Return the claim as JSON, or else as base64 of JSON.
    encoded = _text(claims, f"b64{name}")
    if not encoded:
        return claims.get(name)
    try:
        return json_of(base64.b64decode(encoded, validate=True))
    except ValueError:
        raise InvalidToken(f"the claim b64{name} isn't base64 of JSON") from None
