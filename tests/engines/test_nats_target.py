from __future__ import annotations

import importlib.util
import ssl
from typing import Any

import pytest
from nats.aio.client import Client

from wsbroadcast import ConfigurationError, MissingDependency
from wsbroadcast.engines import create_engine
from wsbroadcast.engines.broker.link import Host
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.engines.nats.target import Target

A, B = Host("a", 4222), Host("b", 4222)


def target(url: str, **options: Any) -> Target:
    return Target.parse(url, options)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("nats://a", (A,)),
        ("nats://a:4222/", (A,)),
        ("a", (A,)),
        ("nats://a,b", (A, B)),
        ("nats://a, nats://b", (A, B)),
        ("nats://a,nats://a:4222", (A,)),
        ("nats://u:p@a:1,b:2", (Host("a", 1), Host("b", 2))),
        ("nats://[::1]:5,127.0.0.1", (Host("::1", 5), Host("127.0.0.1", 4222))),
    ],
)
def test_url_names_servers(url: str, hosts: tuple[Host, ...]) -> None:
    assert target(url).hosts == hosts
    assert Target.parse(url.split(","), {}).hosts == hosts


def test_address_leaves_out_who_we_are() -> None:
    engine = NATSEngine("nats://alice:secret@a:1,[::1]:2")
    assert engine.address == "a:1,[::1]:2"
    assert "secret" not in repr(engine) + repr(engine.__dict__["_target"])


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("nats://a", {}),
        ("nats://alice:s%40cr%2Ct@a", {"user": "alice", "password": "s@cr,t"}),
        ("nats://alice:a:b@a,b", {"user": "alice", "password": "a:b"}),
        ("nats://alice:x@a,nats://alice:x@b", {"user": "alice", "password": "x"}),
        ("nats://:x@a", {"user": "", "password": "x"}),
        ("nats://t%6Fken@a", {"token": "token"}),
    ],
)
def test_url_says_who_we_are(url: str, options: dict[str, str]) -> None:
    assert target(url).options == options


@pytest.mark.parametrize(
    ("url", "options", "must_encrypt"),
    [
        ("nats://a", {}, False),
        ("tls://a", {}, True),
        ("nats://a,tls://b", {}, True),
        ("nats://a", {"tls": ssl.create_default_context()}, True),
        ("nats://a", {"tls_handshake_first": True}, True),
    ],
)
def test_tls_is_a_must_where_it_is_asked_for(url: str, options: dict[str, Any], must_encrypt: bool) -> None:
    assert target(url, **options).must_encrypt is must_encrypt


def test_query_holds_options() -> None:
    engine = NATSEngine.from_url("nats://a?prefix=app&name=n%20n&tls_hostname=t&tls_handshake_first=true&fail_fast=1")
    assert engine.__dict__["_target"].options == {"name": "n n", "tls_hostname": "t", "tls_handshake_first": True}
    assert engine.__dict__["_fail_fast"] is True
    assert engine.names.of_node("n") == "app.node.n"


@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_url_makes_the_engine(scheme: str) -> None:
    engine = create_engine(f"{scheme}://a:1,b:2?fail_fast=False")
    assert isinstance(engine, NATSEngine)
    assert engine.address == "a:1,b:2"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("nats://", "nats://host:4222"),
        ("nats://alice:secret@", "nats://host:4222"),
        ("nats://a,", "nats://host:4222"),
        ("nats://a/secret", "nats://host:4222"),
        ("nats://a:secret", "nats://host:4222"),
        ("nats://alice:secret", "nats://host:4222"),
        ("nats://alice:se/secret", "nats://host:4222"),
        ("nats://[secret", "nats://host:4222"),
        ("ws://alice:secret@a", "begins with"),
        ("nats://alice:secret://x@a", "begins with"),
        ("nats://a,alice:secret@b", "before the first server"),
        ("nats://alice:x@a,alice:secret@b", "before the first server"),
        ("nats://alice:1?secret@a", "written %23"),
        ("nats://alice:1#secret@a", "written %23"),
        ("nats://a?prefix=x&prefix=secret", "'prefix' twice"),
        ("nats://a?passwort=secret", "'passwort'; it takes fail_fast, history_replicas, history_storage, name"),
        ("nats://a?history_storage=disk", "memory or file, not 'disk'"),
        ("nats://a?history_replicas=0", "1 to 5, not 0"),
        ("nats://a?history_replicas=6", "1 to 5, not 6"),
        ("nats://a?history_replicas=many", "1 to 5, not 'many'"),
        ("nats://a?history_replicas=-1", "1 to 5, not '-1'"),
        ("nats://a?presence_replicas=0", "presence_replicas of NATS is 1 to 5, not 0"),
        ("nats://a?presence_replicas=many", "1 to 5, not 'many'"),
        ("nats://a?fail_fast=perhaps", "true or false, not 'perhaps'"),
        ("nats://a?prefix=a.b", "prefix must be"),
    ],
)
def test_url_that_makes_no_sense_is_refused_without_repeating_secrets(url: str, what: str) -> None:
    with pytest.raises(ConfigurationError, match=what) as caught:
        NATSEngine.from_url(url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"user": "alice"}, "user and password together"),
        ({"password": "secret"}, "user and password together"),
        ({"allow_reconnect": True}, "no option 'allow_reconnect'"),
        ({"tls": True}, "an ssl.SSLContext, not bool"),
        ({"user": 5, "password": "secret"}, "user is a str, or a function that returns one, not int"),
        ({"user": "alice", "password": 5}, "password is a str, or a function that returns one, not int"),
        ({"token": 5}, "token is a str, or a function"),
        ({"name": 5}, "name is a str, not int"),
        ({"tls_hostname": b"a"}, "tls_hostname is a str, not bytes"),
        ({"tls_handshake_first": "no"}, "tls_handshake_first is True or False, not str"),
        ({"signature_cb": "x"}, "signature_cb is a function, not str"),
    ],
)
def test_option_that_makes_no_sense_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError, match=what):
        NATSEngine(**options)


def test_user_stands_in_the_url_or_in_options() -> None:
    with pytest.raises(ConfigurationError, match="give them only once"):
        NATSEngine("nats://alice:secret@a", user="alice", password="secret")


@pytest.mark.parametrize(
    ("servers", "what"),
    [([4222], "list"), (4222, "int"), (Client(), r"nats\.aio\.client\.Client")],
    ids=["list", "number", "client"],
)
def test_servers_are_text(servers: Any, what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"servers are URLs, not {what}"):
        NATSEngine(servers)


@pytest.mark.skipif(importlib.util.find_spec("nkeys") is not None, reason="nkeys is installed")
@pytest.mark.parametrize("option", ["user_credentials", "nkeys_seed", "nkeys_seed_str"])
def test_missing_nkeys_are_named_with_the_command_that_installs_them(option: str) -> None:
    with pytest.raises(MissingDependency, match=r'pip install "nats-py\[nkeys\]"'):
        NATSEngine("nats://a", **{option: "secret"})  # type: ignore[arg-type]


def test_servers_that_a_server_tells_of_are_tried_too() -> None:
    nats = target("nats://a,b")
    nats.discover(["10.0.0.1:4222", "a:4222", "10.0.0.1:4222", "c:1"])
    assert sorted(nats.route()) == [Host("10.0.0.1", 4222, tls_hostname="a"), A, B, Host("c", 1)]
    nats.discover([])
    assert sorted(nats.route()) == [A, B]


def test_given_and_discovered_servers_and_the_last_are_among_the_first_tries() -> None:
    given, found = [f"g{number}" for number in range(9)], [f"f{number}" for number in range(9)]
    nats = target(f"nats://{','.join(given)}")
    nats.discover(found)
    for last in (None, Host("g3", 4222), Host("f3", 4222), Host("gone", 4222)):
        nats.last = last
        firsts = set()
        for _ in range(200):
            route = nats.route()
            names = [host.name for host in route]
            assert {*names} == {*given, *found, *([last.name] if last else [])}
            assert len(names) == len({*names})
            assert {*names[:3]} & {*given}
            assert {*names[:3]} & {*found}
            assert last is None or last in route[:3]
            firsts.add(names[0])
        assert len(firsts) > 2  # one that lets us in and carries nothing is not the first each time


def test_server_known_by_address_is_asked_for_no_other_name() -> None:
    nats = target("nats://127.0.0.1")
    nats.discover(["10.0.0.1:4222"])
    assert Host("10.0.0.1", 4222) in nats.route()


@pytest.mark.parametrize(
    ("options", "who"),
    [
        ({}, "a connection without user and password"),
        ({"user": "alice", "password": "secret"}, "the user 'alice'"),
        ({"user": str, "password": str}, "the user"),
        ({"token": "secret"}, "the token"),
        ({"signature_cb": str}, "the signature"),
    ],
)
def test_target_says_who_we_are(options: dict[str, Any], who: str) -> None:
    assert target("nats://a", **options).who == who
