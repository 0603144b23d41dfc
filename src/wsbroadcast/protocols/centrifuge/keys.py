"""The keys that tokens are checked with, each for the algorithms of its kind, and the check of signatures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from wsbroadcast.exceptions import ConfigurationError, MissingDependency, WSBroadcastError, kind_of

TokenKey = str | bytes | Mapping[str, Any]
"""A secret for HMAC, a public key as PEM, or a JWK or a JWKS (RFC 7517) as a dict."""

# RFC 7518, 3.2: a secret is at least as long as the hash. And 3.3, in bits, for RSA.
_MIN_SECRET_BYTES = 32
_MIN_RSA_BITS = 2048

_HMAC = ("HS256", "HS384", "HS512")
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_CURVES = {"secp256r1": "ES256", "secp256k1": "ES256K", "secp384r1": "ES384", "secp521r1": "ES512"}


class InvalidToken(WSBroadcastError):
    """Raised for a token that is malformed, forged or meant for something else. The text says why, for logs.

    An `authenticate` of the app may raise it, too.
    """


@dataclass(frozen=True, slots=True)
class Key:
    """One key, and the algorithms it is for."""

    algorithms: frozenset[str]
    """The names of the algorithms (RFC 7518, 3.1)."""
    verifies: Callable[[str, bytes, bytes], bool]
    """Called with an algorithm, a text and a signature; returns whether this key has signed the text."""
    kid: str | None = None
    """The id of the key, if it has one."""


def verified(token: str, keys: Iterable[Key]) -> dict[str, Any]:
    """Return the claims of a JWT (RFC 7519, 7.2) that one of these keys has signed.

    Raises:
        InvalidToken: If no key has signed it, or it isn't a JWT.
    """
    text, _, signature = token.rpartition(".")
    head, _, body = text.partition(".")
    header = _object(head)
    if "crit" in header:  # RFC 7515, 4.1.11: an unknown extension must be refused
        raise InvalidToken("it has a critical extension")
    algorithm, kid = header.get("alg"), header.get("kid")
    if not isinstance(algorithm, str):
        raise InvalidToken("its header has no alg")
    # A key without an id, such as a secret or a PEM key, may belong to any token.
    fitting = [key for key in keys if algorithm in key.algorithms and (kid is None or key.kid in (None, kid))]
    if not fitting:
        raise InvalidToken("no key fits its alg and its kid")
    try:
        signed = text.encode("ascii"), _base64url(signature)
    except ValueError:
        raise InvalidToken("it isn't a JWT") from None
    if not any(key.verifies(algorithm, *signed) for key in fitting):
        raise InvalidToken("its signature is wrong")
    return _object(body)  # only now: before the check, anybody could have written it


def _object(segment: str) -> dict[str, Any]:
    try:
        found = json_of(_base64url(segment))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidToken("it isn't a JWT")
    return found


def json_of(data: bytes) -> Any:
    """Decode JSON, strictly.

    Raises:
        ValueError: If it is something else. NaN and infinity are not JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    return json.loads(data.decode(), parse_constant=refuse)


def _base64url(text: str) -> bytes:
    if "+" in text or "/" in text or "=" in text:
        raise ValueError("not base64url without padding (RFC 7515, 2)")
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def keys_of(keys: TokenKey | Iterable[TokenKey], *, allow_weak_secret: bool) -> list[Key]:
    """Return the keys in what an app gives as keys.

    Raises:
        ConfigurationError: If one isn't a key, is weak, is private, or fits no algorithm.
        MissingDependency: If a package that they need isn't installed.
    """
    several = [keys] if isinstance(keys, (str, bytes, Mapping)) or not isinstance(keys, Iterable) else list(keys)
    found = [key for each in several for key in _expanded(each, allow_weak_secret)]
    if not found:
        raise ConfigurationError("there is no key that tokens can be checked with")
    return found


class _NotUnderstood(ConfigurationError):
    pass


def _expanded(key: TokenKey, allow_weak_secret: bool) -> list[Key]:
    if isinstance(key, Mapping):
        return _of_jwks(key["keys"], allow_weak_secret) if "keys" in key else [_of_jwk(key, allow_weak_secret)]
    if not isinstance(key, (str, bytes)):
        raise ConfigurationError(f"a key is text, bytes or a dict, not {kind_of(key)}")
    data = key.encode() if isinstance(key, str) else key
    return [_of_pem(data) if b"-----BEGIN" in data else _of_secret(data, allow_weak_secret)]


def _of_jwks(jwks: object, allow_weak_secret: bool) -> list[Key]:
    if not isinstance(jwks, list) or not all(isinstance(jwk, Mapping) for jwk in jwks):
        raise ConfigurationError('a JWKS is a dict with a list of keys: {"keys": [{"kty": …}, …]}')
    found = []
    for jwk in jwks:
        try:
            found.append(_of_jwk(jwk, allow_weak_secret))
        except _NotUnderstood:  # RFC 7517, 5: such a key is ignored
            pass
    return found


def _of_secret(secret: bytes, allow_weak_secret: bool, kid: str | None = None) -> Key:
    # Everybody knows a public key. Used as the secret of an HMAC, it would let everybody sign tokens.
    if secret.lstrip().startswith((b"ssh-", b"ecdsa-sha2-")) or _is_der(secret) or _is_jwk(secret):
        raise ConfigurationError("keys is a public key in a form that isn't read: pass it as PEM, or a JWK as a dict")
    if not secret:
        raise ConfigurationError("keys is an empty secret: anybody could sign tokens")
    if len(secret) < _MIN_SECRET_BYTES and not allow_weak_secret:
        raise ConfigurationError(
            f"the secret has {len(secret)} bytes, and {_MIN_SECRET_BYTES} are needed so that nobody can find it out "
            "from a token (RFC 7518, 3.2): use a longer one, or pass allow_weak_secret=True"
        )
    return _of_algorithms(_HMAC, secret, kid)


def _is_jwk(data: bytes) -> bool:
    try:
        return isinstance(json_of(data), dict)
    except (ValueError, RecursionError):
        return False


def _is_der(data: bytes) -> bool:
    # Every key in DER begins with a SEQUENCE that is as long as the data.
    return data[:1] == b"\x30" and len(data) > 32 and _der_length(data) == len(data)


def _der_length(data: bytes) -> int:
    if data[1] < 0x80:
        return data[1] + 2
    size = data[1] & 0x7F
    return int.from_bytes(data[2 : 2 + size]) + 2 + size


def _of_pem(data: bytes) -> Key:
    if b"PRIVATE KEY-----" in data:
        raise ConfigurationError("keys is a private key, which only the issuer of tokens needs: pass the public key")
    _needs_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(
            "keys isn't a public key as PEM, which begins with -----BEGIN PUBLIC KEY-----; for a certificate, "
            "pass its public key"
        ) from error
    return _of_public(key)


def _of_jwk(jwk: Mapping[str, Any], allow_weak_secret: bool) -> Key:
    kid, named = jwk.get("kid"), jwk.get("alg")
    if not isinstance(kid, str | None) or not isinstance(named, str | None):
        raise ConfigurationError("the kid and the alg of a JWK are text")
    if jwk.get("use", "sig") != "sig":
        raise _NotUnderstood("the use of a JWK is sig, for signatures")
    if "d" in jwk:
        raise ConfigurationError("a JWK is a private key, which only the issuer of tokens needs: pass the public key")
    if jwk.get("kty") == "oct":
        key = _of_secret(_secret_of(jwk), allow_weak_secret, kid)
    else:
        key = _of_public(_public_of(jwk), kid)
    if named is None:
        return key
    if named not in key.algorithms:
        raise _NotUnderstood(f"the alg of a JWK is one of {sorted(key.algorithms)}, which its key fits")
    return Key(frozenset({named}), key.verifies, kid)


def _secret_of(jwk: Mapping[str, Any]) -> bytes:
    try:
        return _base64url(jwk["k"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError("the k of a JWK is base64url without padding") from error


# The readers of keys, by kty and crv. Each reader of PyJWT reads only keys of the curve of its own algorithm.
_READERS = {
    ("RSA", None): "RS256",
    ("EC", "P-256"): "ES256",
    ("EC", "P-384"): "ES384",
    ("EC", "P-521"): "ES512",
    ("EC", "secp256k1"): "ES256K",
    ("OKP", "Ed25519"): "EdDSA",
    ("OKP", "Ed448"): "EdDSA",
}


def _public_of(jwk: Mapping[str, Any]) -> Any:
    kind = str(jwk.get("kty"))
    reader = _READERS.get((kind, None if kind == "RSA" else str(jwk.get("crv"))))
    if reader is None:
        raise _NotUnderstood("the kty of a JWK is RSA, EC, OKP or oct, with a crv that tokens are signed with")
    _needs_cryptography()
    try:
        return _algorithms()[reader].from_jwk(dict(jwk))
    except Exception as error:  # PyJWT and cryptography raise many kinds
        raise ConfigurationError("a JWK can't be read") from error


def _of_public(key: Any, kid: str | None = None) -> Key:
    from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            raise ConfigurationError(f"the RSA key has {key.key_size} bits, and {_MIN_RSA_BITS} are needed")
        return _of_algorithms(_RSA, key, kid)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return _of_algorithms((_CURVES[key.curve.name],), key, kid)
    if isinstance(key, (ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)):
        return _of_algorithms(("EdDSA",), key, kid)
    raise ConfigurationError("the public key is neither RSA nor of a curve that tokens are signed with")


def _of_algorithms(names: tuple[str, ...], key: Any, kid: str | None) -> Key:
    algorithms = {name: _algorithms()[name] for name in names}
    prepared = {name: algorithm.prepare_key(key) for name, algorithm in algorithms.items()}

    def verifies(name: str, text: bytes, signature: bytes) -> bool:
        return bool(algorithms[name].verify(text, prepared[name], signature))

    return Key(frozenset(names), verifies, kid)


def _algorithms() -> Any:
    try:
        from jwt.algorithms import get_default_algorithms
    except ImportError as error:
        raise MissingDependency('CentrifugeTokens needs PyJWT: pip install "wsbroadcast[centrifuge]"') from error
    return get_default_algorithms()


def _needs_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            'a public key needs the package cryptography: pip install "wsbroadcast[centrifuge]"'
        ) from error
