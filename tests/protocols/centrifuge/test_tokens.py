"""Tokens with Centrifugo's claims: what they say, which are refused, and which keys are."""

from __future__ import annotations

import base64
import builtins
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import get_default_algorithms

from wsbroadcast import ConfigurationError, MissingDependency
from wsbroadcast.protocols.centrifuge.keys import InvalidToken
from wsbroadcast.protocols.centrifuge.tokens import (
    CentrifugeTokens,
    ConnectionToken,
    ExpiredToken,
    ForeignToken,
    ServerSubscription,
    SubscriptionToken,
    ttl_of,
)

SECRET = "a secret of thirty-two bytes or more"
OTHER = "another secret, which is as long as it"

RSA = rsa.generate_private_key(65537, 2048)
CURVES: dict[str, Any] = {
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "ES384": ec.generate_private_key(ec.SECP384R1()),
    "ES512": ec.generate_private_key(ec.SECP521R1()),
    "ES256K": ec.generate_private_key(ec.SECP256K1()),
}
PRIVATE: dict[str, Any] = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), RSA),
    **CURVES,
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def pem(key: Any) -> str:
    """The public key of a private one, or a public key itself, as PEM."""
    public = key.public_key() if hasattr(key, "public_key") else key
    return str(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def jwk(key: Any, algorithm: str, **more: str) -> dict[str, Any]:
    """The public key of a private one as a JWK."""
    found: dict[str, Any] = json.loads(get_default_algorithms()[algorithm].to_jwk(key.public_key()))
    return {name: value for name, value in found.items() if name != "key_ops"} | more


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(claims: Any, key: Any = SECRET, algorithm: str = "HS256", **header: Any) -> str:
    """Sign claims, whatever they are, as no issuer would check them."""
    signed = f"{segment({'alg': algorithm, **header})}.{segment(claims)}"
    implementation = get_default_algorithms()[algorithm]
    return f"{signed}.{segment(implementation.sign(signed.encode(), implementation.prepare_key(key)))}"


def check(claims: dict[str, Any], **options: Any) -> ConnectionToken:
    return CentrifugeTokens(SECRET, **options).connection(token(claims))


def check_subscription(claims: dict[str, Any], *, user: str | None = "42", **options: Any) -> SubscriptionToken:
    tokens = CentrifugeTokens(SECRET, **options)
    return tokens.subscription(token(claims), channel="room:1", user=user, client="c1")


# What they say.


def test_connection_token_says_all_that_it_has_claims_for() -> None:
    exp = int(time.time()) + 60
    claims: dict[str, Any] = {
        "sub": "42",
        "exp": exp,
        "iat": exp + 1000,  # of no meaning to whoever checks
        "nbf": exp - 120,
        "jti": "once",
        "info": {"name": "Ada"},
        "channels": ["news", "rooms"],
        "subs": {
            "room:1": {"info": {"is_admin": True}, "data": {"welcome": 1}, "override": {"presence": {"value": True}}},
            "news": {"b64info": base64.b64encode(b'{"in": "news"}').decode(), "b64data": "bnVsbA=="},
        },
        "meta": {"plan": "paid"},
    }
    assert check(claims) == ConnectionToken(
        "42",
        exp,
        {"name": "Ada"},
        {
            "news": ServerSubscription({"in": "news"}, None),
            "rooms": ServerSubscription(),
            "room:1": ServerSubscription({"is_admin": True}, {"welcome": 1}),
        },
        {"plan": "paid"},
    )


@pytest.mark.parametrize("claims", [{}, {"sub": ""}, {"sub": None}])
def test_token_without_a_user_is_of_an_anonymous_one(claims: dict[str, Any]) -> None:
    assert check(claims) == ConnectionToken(None)


@pytest.mark.parametrize(
    ("claims", "expires_in"),
    [
        ({}, None),
        ({"exp": 60}, 60),
        ({"exp": 60, "expire_at": 0}, None),
        ({"exp": 60, "expire_at": 3600}, 3600),
        ({"expire_at": 30}, 30),
    ],
)
def test_connection_lives_as_long_as_it_says(claims: dict[str, int], expires_in: int | None) -> None:
    now = int(time.time())
    made = {name: value and now + value for name, value in claims.items()}
    assert check({"sub": "42", **made}).expires_at == (expires_in and now + expires_in)
    found = check_subscription({"sub": "42", "channel": "room:1", **made})
    assert found.expires_at == (expires_in and now + expires_in)


def test_subscription_token_says_all_that_it_has_claims_for() -> None:
    claims = {"sub": "42", "channel": "room:1", "client": "c1", "b64info": base64.b64encode(b"[1]").decode(), "data": 5}
    assert check_subscription(claims) == SubscriptionToken(None, [1], 5)


def test_anonymous_user_has_subscription_tokens_too() -> None:
    assert check_subscription({"channel": "room:1"}, user=None) == SubscriptionToken()
    with pytest.raises(ForeignToken):
        check_subscription({"channel": "room:1", "sub": "42"}, user=None)


@pytest.mark.parametrize(("left", "ttl"), [(60.0, 60), (59.9, 59), (1.2, 1), (0.4, 1), (-5.0, 1)])
def test_seconds_are_whole_and_one_at_least(left: float, ttl: int) -> None:
    assert ttl_of(1000.0 + left, 1000.0) == ttl


# Which are refused.


@pytest.mark.parametrize("claims", [{"exp": -1}, {"exp": 0}, {"nbf": 60}, {"exp": 60, "expire_at": -1}])
def test_token_out_of_its_time_is_expired(claims: dict[str, int]) -> None:
    now = int(time.time())
    made = {name: now + value for name, value in claims.items()}
    with pytest.raises(ExpiredToken):
        check({"sub": "42", **made})
    with pytest.raises(ExpiredToken):
        check_subscription({"sub": "42", "channel": "room:1", **made})


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": 42},
        {"sub": ["42"]},
        {"exp": "soon"},
        {"exp": True},
        {"exp": 1e300},
        {"nbf": [1]},
        {"expire_at": {}},
        {"channels": "news"},
        {"channels": [1]},
        {"channels": {"news": {}}},
        {"subs": ["news"]},
        {"subs": {"news": []}},
        {"subs": {"news": {"b64info": 1}}},
        {"meta": [1]},
        {"b64info": "%%%"},
        {"b64info": base64.b64encode(b"\xff").decode()},
        {"b64info": base64.b64encode(b"NaN").decode()},
        {"channel": "room:1"},
    ],
)
def test_claims_of_the_wrong_type_are_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(InvalidToken) as caught:
        check({"sub": "42", **claims})
    assert type(caught.value) is InvalidToken


@pytest.mark.parametrize(
    "claims", [{}, {"channel": ""}, {"channel": None}, {"channel": 1}, {"channel": "room:1", "client": 1}]
)
def test_subscription_token_without_a_channel_is_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(InvalidToken) as caught:
        check_subscription({"sub": "42", **claims})
    assert type(caught.value) is InvalidToken


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "42", "channel": "room:2"},
        {"sub": "43", "channel": "room:1"},
        {"channel": "room:1"},
        {"sub": "42", "channel": "room:1", "client": "c2"},
    ],
)
def test_subscription_token_of_somebody_else_is_foreign(claims: dict[str, Any]) -> None:
    with pytest.raises(ForeignToken):
        check_subscription(claims)


@pytest.mark.parametrize(
    ("claims", "is_good"),
    [
        ({"aud": "chat", "iss": "us"}, True),
        ({"aud": ["other", "chat"], "iss": "us"}, True),
        ({"aud": "cha", "iss": "us"}, False),
        ({"aud": ["other"], "iss": "us"}, False),
        ({"aud": {"chat": 1}, "iss": "us"}, False),
        ({"iss": "us"}, False),
        ({"aud": "chat"}, False),
        ({"aud": "chat", "iss": "them"}, False),
        ({"aud": "chat", "iss": ["us"]}, False),
        ({"aud": "other", "iss": "us", "exp": 1}, False),  # a new one would be no better
    ],
)
def test_audience_and_issuer_are_looked_at_where_they_are_named(claims: dict[str, Any], is_good: bool) -> None:
    assert check({key: value for key, value in claims.items() if key != "exp"}).user is None
    if is_good:
        check(claims, audience="chat", issuer="us")
        return
    with pytest.raises(InvalidToken) as caught:
        check(claims, audience="chat", issuer="us")
    assert type(caught.value) is InvalidToken


GOOD = token({"sub": "42"})
HEAD, BODY, SIGNATURE = GOOD.split(".")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "invalid",
        f"{HEAD}.{BODY}",
        f"{HEAD}.{BODY}.",
        f"{HEAD}.{BODY}.{SIGNATURE}.{SIGNATURE}",
        f"{HEAD}.{BODY}.{SIGNATURE}=",
        f"{HEAD}.{BODY}.{SIGNATURE[:-2]}",
        f"{HEAD}.{BODY}. {SIGNATURE}",
        f"{HEAD}.{segment({'sub': '43'})}.{SIGNATURE}",
        f"{HEAD}.é.{SIGNATURE}",
        f"{HEAD}.+/==.{SIGNATURE}",
        token([1]),
        token("42"),
        token(b"{not json"),
        token(b"\xff"),
        token(b'{"sub": NaN}'),
        token(b"[" * 100_000),
        token({"sub": "42"}, OTHER),
        token({"sub": "42"}, crit=["exp"]),
        token({"sub": "42"}, alg=None),
        token({"sub": "42"}, alg="none"),
        token({"sub": "42"}, alg=["HS256"]),
        f"{segment({'alg': 'none'})}.{BODY}.",
        f"{segment(['alg'])}.{BODY}.{SIGNATURE}",
    ],
    ids=lambda text: text[:9].encode().hex(),
)
def test_what_is_no_token_of_ours_is_refused(text: str) -> None:
    with pytest.raises(InvalidToken) as caught:
        CentrifugeTokens(SECRET).connection(text)
    assert type(caught.value) is InvalidToken
    assert "42" not in str(caught.value)


@given(st.text() | st.binary().map(lambda data: f"{segment(data[:9])}.{segment(data)}.{SIGNATURE}"))
def test_no_text_makes_anything_else_of_it(text: str) -> None:
    with pytest.raises(InvalidToken):
        CentrifugeTokens(SECRET).connection(text)


# Keys, each for the algorithms of its kind.


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_public_keys_check_what_their_private_ones_have_signed(algorithm: str) -> None:
    key = PRIVATE[algorithm]
    made = jwt.encode({"sub": "42"}, key, algorithm)
    for keys in (pem(key), pem(key).encode(), jwk(key, algorithm), {"keys": [jwk(key, algorithm, alg=algorithm)]}):
        assert CentrifugeTokens(keys).connection(made).user == "42"
        with pytest.raises(InvalidToken):
            CentrifugeTokens(keys).connection(made[:-8] + "AAAAAAAA")


def test_key_of_ed448_is_one_of_eddsa() -> None:
    key = ed448.Ed448PrivateKey.generate()
    assert CentrifugeTokens(pem(key)).connection(jwt.encode({"sub": "42"}, key, "EdDSA")).user == "42"
    assert CentrifugeTokens(jwk(key, "EdDSA")).connection(jwt.encode({"sub": "42"}, key, "EdDSA")).user == "42"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_secrets_check_what_was_signed_with_them(algorithm: str) -> None:
    secret = SECRET * 2
    made = jwt.encode({"sub": "42"}, secret, algorithm)
    for keys in (secret, secret.encode(), {"kty": "oct", "k": segment(secret.encode())}):
        assert CentrifugeTokens(keys).connection(made).user == "42"


@pytest.mark.parametrize("signed", [*PRIVATE, "HS256"])
@pytest.mark.parametrize("of", [*PRIVATE, "HS256"])
def test_key_is_good_for_no_algorithm_of_another_kind(signed: str, of: str) -> None:
    key = PRIVATE.get(of, SECRET)
    if PRIVATE.get(signed, SECRET) is key:
        return
    tokens = CentrifugeTokens(key if isinstance(key, str) else pem(key))
    made = jwt.encode({"sub": "42"}, PRIVATE.get(signed, SECRET), signed)
    with pytest.raises(InvalidToken):
        tokens.connection(made)
    # And with the header of the other: the algorithm of the token isn't trusted.
    _, body, signature = made.split(".")
    with pytest.raises(InvalidToken):
        tokens.connection(f"{segment({'alg': of})}.{body}.{signature}")


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_public_key_is_no_secret(algorithm: str) -> None:
    import hashlib
    import hmac

    public = pem(PRIVATE[algorithm])
    signed = f"{segment({'alg': 'HS256'})}.{segment({'sub': 'admin'})}"
    forged = f"{signed}.{segment(hmac.digest(public.encode(), signed.encode(), hashlib.sha256))}"
    with pytest.raises(InvalidToken):
        CentrifugeTokens(public).connection(forged)


def test_tokens_name_their_key() -> None:
    old, new = CURVES["ES256"], ec.generate_private_key(ec.SECP256R1())
    tokens = CentrifugeTokens({"keys": [jwk(old, "ES256", kid="old"), jwk(new, "ES256", kid="new")]})
    for key, kid, is_good in ((old, "old", True), (new, "new", True), (new, "old", False), (new, "other", False)):
        made = jwt.encode({"sub": "42"}, key, "ES256", headers={"kid": kid})
        if is_good:
            assert tokens.connection(made).user == "42"
        else:
            with pytest.raises(InvalidToken):
                tokens.connection(made)
    assert tokens.connection(jwt.encode({"sub": "42"}, new, "ES256")).user == "42"
    # A secret has no id, so it may be meant by any.
    assert CentrifugeTokens([OTHER, SECRET]).connection(token({"sub": "42"}, kid="x")).user == "42"


def test_key_of_a_jwk_is_good_for_the_algorithm_that_it_names() -> None:
    tokens = CentrifugeTokens(jwk(RSA, "RS256", alg="RS512"))
    assert tokens.connection(jwt.encode({"sub": "42"}, RSA, "RS512")).user == "42"
    with pytest.raises(InvalidToken):
        tokens.connection(jwt.encode({"sub": "42"}, RSA, "RS256"))


def test_keys_that_are_not_understood_are_passed_over_in_a_set() -> None:
    others = [jwk(RSA, "RS256", use="enc"), {"kty": "AKP", "pub": "x"}, jwk(RSA, "RS256", alg="RSA-OAEP")]
    tokens = CentrifugeTokens({"keys": [*others, jwk(RSA, "RS256", use="sig")]})
    assert repr(tokens) == "CentrifugeTokens(1 keys)"
    with pytest.raises(ConfigurationError, match="there is no key"):
        CentrifugeTokens({"keys": others})
    for each in others:
        with pytest.raises(ConfigurationError):
            CentrifugeTokens(each)


def test_keys_of_subscriptions_may_be_others_and_all_can_be_replaced() -> None:
    tokens = CentrifugeTokens(SECRET, subscription_keys=OTHER)
    claims = {"sub": "42", "channel": "room:1"}
    of = {"channel": "room:1", "user": "42", "client": "c1"}

    def is_good(key: str) -> tuple[bool, bool]:
        results = []
        for checked in (
            lambda: tokens.connection(token({"sub": "42"}, key)),
            lambda: tokens.subscription(token(claims, key), **of),
        ):
            try:
                checked()
                results.append(True)
            except InvalidToken:
                results.append(False)
        return results[0], results[1]

    third = "a third secret, of thirty-two bytes too"
    assert [is_good(key) for key in (SECRET, OTHER, third)] == [(True, False), (False, True), (False, False)]
    tokens.replace_keys(third)
    assert [is_good(key) for key in (SECRET, OTHER, third)] == [(False, False), (False, True), (True, False)]
    tokens.replace_keys(SECRET, subscription_keys=[SECRET, third])
    assert [is_good(key) for key in (SECRET, OTHER, third)] == [(True, True), (False, False), (False, True)]
    with pytest.raises(ConfigurationError):
        tokens.replace_keys(OTHER, subscription_keys="short")
    assert [is_good(key) for key in (SECRET, OTHER, third)] == [(True, True), (False, False), (False, True)]


def test_short_secret_is_refused_unless_it_is_allowed() -> None:
    with pytest.raises(ConfigurationError, match="allow_weak_secret"):
        CentrifugeTokens("secret")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = jwt.encode({"sub": "42"}, "secret", "HS256")
    assert CentrifugeTokens("secret", allow_weak_secret=True).connection(made).user == "42"


def test_secret_that_looks_a_little_like_a_key_is_one() -> None:
    for secret in (b"\x30" + bytes(40), b"{" + b"x" * 40):
        CentrifugeTokens(secret)


DER = RSA.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SHORT_DER = PRIVATE["EdDSA"].public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
SSH = RSA.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
SECRET_PEM = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PRIVATE_JWK = json.loads(get_default_algorithms()["RS256"].to_jwk(RSA))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (lambda: "", "empty secret"),
        (list, "there is no key"),
        (lambda: {"keys": []}, "there is no key"),
        (lambda: {"keys": {"kty": "oct"}}, "list of keys"),
        (lambda: {"keys": ["x"]}, "list of keys"),
        (dict, "the kty of a JWK"),
        (lambda: {"kty": "oct"}, "the k of a JWK"),
        (lambda: {"kty": "oct", "k": "a+/="}, "the k of a JWK"),
        (lambda: {"kty": "oct", "k": segment(b"short")}, "5 bytes"),
        (lambda: {"kty": "oct", "k": segment(b"x" * 32), "kid": 1}, "kid and the alg"),
        (lambda: {"kty": "oct", "k": segment(b"x" * 32), "alg": "RS256"}, "HS256"),
        (lambda: {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}, "can't be read"),
        (lambda: {"kty": "OKP", "crv": "X25519", "x": "AA"}, "the kty of a JWK"),
        (lambda: PRIVATE_JWK, "private key"),
        (lambda: SECRET_PEM, "private key"),
        (lambda: DER, "in a form that isn't read"),
        (lambda: SHORT_DER, "in a form that isn't read"),
        (lambda: SSH, "in a form that isn't read"),
        (lambda: json.dumps(jwk(RSA, "RS256")), "in a form that isn't read"),
        (lambda: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", "for a certificate"),
        (lambda: pem(rsa.generate_private_key(65537, 1024)), "1024 bits"),
        (lambda: pem(dsa.generate_private_key(2048)), "neither RSA"),
        (lambda: pem(ec.generate_private_key(ec.BrainpoolP256R1())), "neither RSA"),
        (lambda: 5, "not int"),
        (lambda: [None], "not NoneType"),
    ],
)
def test_what_is_no_key_is_refused(keys: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        CentrifugeTokens(keys())


@pytest.mark.parametrize("option", ["audience", "issuer"])
def test_options_are_text(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option} is text, not list"):
        CentrifugeTokens(SECRET, **{option: ["chat"]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("package", "keys"), [("jwt", SECRET), ("cryptography", pem(RSA))], ids=["jwt", "cryptography"]
)
def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, package: str, keys: str) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match=r"wsbroadcast\[centrifuge\]"):
        CentrifugeTokens(keys)
