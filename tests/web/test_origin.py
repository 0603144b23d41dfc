"""Which pages may connect: the reading of origins, and the refusal at the router and at ConnectionDep."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.testclient import TestClient

from tests.support.asgi import Peer, lifespan, refusal
from tests.support.web import EVERY_APP, MakeApp, admitted, denied, router_app
from wsbroadcast import (
    ConfigurationError,
    ConnectionManager,
    connection_dependency,
    create_router,
    create_routes,
)
from wsbroadcast.logs import Throttle
from wsbroadcast.web.origin import AllowedOrigins, Origin, parse_origin

# Reading an origin.


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://app.example", Origin("https", "app.example", 443)),
        ("https://app.example:443", Origin("https", "app.example", 443)),
        ("http://app.example", Origin("http", "app.example", 80)),
        ("http://app.example:443", Origin("http", "app.example", 443)),
        ("HTTPS://App.EXAMPLE", Origin("https", "app.example", 443)),
        ("http://localhost:5173", Origin("http", "localhost", 5173)),
        ("http://127.0.0.1:8000", Origin("http", "127.0.0.1", 8000)),
        ("http://[::1]:8000", Origin("http", "[::1]", 8000)),
        ("http://[0:0:0:0:0:0:0:1]", Origin("http", "[::1]", 80)),
        ("https://xn--bcher-kva.example", Origin("https", "xn--bcher-kva.example", 443)),
        ("http://my_host", Origin("http", "my_host", 80)),
        ("app.example://localhost", Origin("app.example", "localhost", None)),
        ("chrome-extension://abcdefgh", Origin("chrome-extension", "abcdefgh", None)),
        ("https://app.example:0", Origin("https", "app.example", 0)),
        ("https://app.example:65535", Origin("https", "app.example", 65535)),
    ],
)
def test_an_origin_is_scheme_host_and_port(text: str, origin: Origin) -> None:
    assert parse_origin(text) == origin
    assert parse_origin(str(origin)) == origin


NO_ORIGINS = [
    "",
    "null",
    "NULL",
    "app.example",
    "//app.example",
    "https://",
    "https:app.example",
    "https:/app.example",
    "https://app.example/",
    "https://app.example/path",
    "https://app.example?query",
    "https://app.example#fragment",
    "https://user@app.example",
    "https://user:password@app.example",
    "https://app.example:",
    "https://app.example:port",
    "https://app.example:-1",
    "https://app.example:0443",
    "https://app.example:65536",
    "https://app.example:99999999999999999999",
    "https://*.example",
    "https://bücher.example",
    "https://\uff41pp.example",
    "\u212aelvin://app.example",
    "https://app.example\n",
    "https://app.example\x00",
    " https://app.example",
    "https://app.example ",
    "https://app .example",
    "https://app.example, https://evil.example",
    "https://app.example https://evil.example",
    "https://app.example\\@evil.example",
    "https://[::1",
    "https://::1",
    "https://[::1]evil",
    "https://[fe80::1%25eth0]",
    "https://[:::]",
    "https://[12345::]",
    "1http://app.example",
]


@pytest.mark.parametrize("text", NO_ORIGINS)
def test_anything_else_is_no_origin(text: str) -> None:
    assert parse_origin(text) is None


@given(st.text())
def test_reading_an_origin_never_fails_and_what_it_reads_is_stable(text: str) -> None:
    origin = parse_origin(text)
    if origin is not None:
        assert parse_origin(str(origin)) == origin
        assert parse_origin(text.upper()) == origin


@given(st.lists(st.tuples(st.sampled_from([b"origin", b"host"]), st.binary(max_size=300)), max_size=4))
def test_a_handshake_is_judged_whatever_its_headers_hold(headers: list[tuple[bytes, bytes]]) -> None:
    for allowed in (AllowedOrigins(), AllowedOrigins(["https://app.example"]), AllowedOrigins("*")):
        refusal = allowed.refusal("ws", headers)
        assert refusal is None or (refusal.isprintable() and len(refusal) < 2000)


# Who is allowed.

OWN = [(b"host", b"app.example")]


def _refusal(origin: str | None, scheme: str = "wss", host: str = "app.example", **options: Any) -> str | None:
    headers = [(b"host", host.encode("latin-1"))]
    if origin is not None:
        headers.append((b"origin", origin.encode("latin-1")))
    allowed = AllowedOrigins(options.pop("origins", None), **options)
    return allowed.refusal(scheme, headers)


@pytest.mark.parametrize(
    ("origin", "scheme", "host"),
    [
        ("https://app.example", "wss", "app.example"),
        ("https://app.example", "wss", "app.example:443"),
        ("https://app.example:443", "wss", "APP.example"),
        ("HTTPS://APP.example", "wss", "app.example"),
        ("http://app.example", "ws", "app.example"),
        ("http://app.example:8000", "ws", "app.example:8000"),
        ("http://[::1]:8000", "ws", "[0::1]:8000"),
        (None, "ws", "app.example"),
        (None, "ws", "garbage, garbage"),
    ],
)
def test_by_default_the_servers_own_pages_and_programs_are_allowed(origin: str | None, scheme: str, host: str) -> None:
    assert _refusal(origin, scheme, host) is None


EVIL = [
    "https://evil.example",
    "https://app.example.evil.com",
    "https://evil.com/https://app.example",
    "https://app.example@evil.com",
    "https://evilapp.example",
    "https://sub.app.example",
    "https://www.app.example",
    "http://app.example",
    "wss://app.example",
    "https://app.example:8443",
    "https://app.example.",
    "https://app.example/",
    "null",
    "",
    "https://\xe4pp.example",
]


@pytest.mark.parametrize("origins", [None, ["https://app.example"], ["https://other.example", "https://app.example"]])
@pytest.mark.parametrize("origin", EVIL)
def test_any_other_page_is_refused(origin: str, origins: list[str] | None) -> None:
    refusal = _refusal(origin, origins=origins)
    assert refusal is not None
    assert repr(origin) in refusal
    assert _refusal("https://app.example", origins=origins) is None


@pytest.mark.parametrize("host", ["", "app.example/x", "app.example@evil", "a b", "app.example:x"])
def test_a_host_header_that_is_none_makes_no_page_the_servers_own(host: str) -> None:
    refusal = _refusal("https://app.example", host=host)
    assert refusal is not None
    assert "Host header" in refusal


@pytest.mark.parametrize("hosts", [0, 2])
def test_without_one_host_header_no_page_is_the_servers_own(hosts: int) -> None:
    headers = [(b"origin", b"https://app.example"), *OWN * hosts]
    assert AllowedOrigins().refusal("wss", headers) is not None
    assert AllowedOrigins(["https://app.example"]).refusal("wss", headers) is None


@pytest.mark.parametrize("origins", [None, ["https://app.example"], "*"])
def test_two_origin_headers_are_refused(origins: Any) -> None:
    headers = [*OWN, (b"origin", b"https://app.example"), (b"origin", b"https://app.example")]
    assert "2 Origin headers" in (AllowedOrigins(origins).refusal("wss", headers) or "")


def test_a_list_is_the_whole_list() -> None:
    """Else a name that an attacker points at this server would be its own (DNS rebinding)."""
    origins = ["http://localhost:5173", "https://App.example:443"]
    assert _refusal("http://localhost:5173", origins=origins) is None
    assert _refusal("https://app.example", origins=origins) is None
    assert _refusal("https://rebound.example", "wss", "rebound.example", origins=origins) is not None
    assert _refusal("https://app.example", origins=[]) is not None


@pytest.mark.parametrize("origins", ["*", ["*"], ["https://app.example", "*"]])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "garbage"])
def test_the_star_allows_every_page(origins: Any, origin: str) -> None:
    assert _refusal(origin, origins=origins) is None


@pytest.mark.parametrize("origins", [None, ["https://app.example"], "*"])
def test_programs_without_an_origin_are_allowed_unless_told_otherwise(origins: Any) -> None:
    assert _refusal(None, origins=origins) is None
    assert "Origin" in (_refusal(None, origins=origins, allow_missing=False) or "")
    assert _refusal("https://app.example", origins=origins, allow_missing=False) is None


@pytest.mark.parametrize("entry", [*NO_ORIGINS, "ws://app.example", "wss://app.example", None, 1, b"https://a.example"])
def test_an_entry_that_is_no_origin_is_an_error_at_once(entry: Any) -> None:
    for factory in (create_router, create_routes):
        with pytest.raises(ConfigurationError, match="is not an origin"):
            factory(ConnectionManager(), allowed_origins=["https://app.example", entry])
    with pytest.raises(ConfigurationError, match="is not an origin"):
        connection_dependency(allowed_origins=[entry])


# What a developer is told.


def test_the_refusal_says_what_to_set() -> None:
    refusal = _refusal("http://localhost:5173", "ws", "localhost:8000")
    assert refusal == (
        "origin 'http://localhost:5173' is not allowed: this server is 'http://localhost:8000'. "
        "If that page is yours, pass allowed_origins=['http://localhost:5173']"
    )
    assert _refusal("null") == ("origin 'null' is not allowed: this server is 'https://app.example'. It names no page.")


def test_the_refusal_says_so_if_only_the_scheme_differs() -> None:
    assert "X-Forwarded-Proto" in (_refusal("https://app.example", "ws") or "")
    assert "X-Forwarded-Proto" not in (_refusal("https://other.example", "ws") or "")


# At the door.


@EVERY_APP
def test_a_page_of_another_site_gets_403_and_the_reason(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(make_app(ConnectionManager())) as client:
        for _ in range(3):
            response = denied(client, "/ws?token=secret", origin="http://localhost:5173")
            assert response.status_code == 403
            assert response.headers["content-type"] == "text/plain; charset=utf-8"
            assert "allowed_origins=['http://localhost:5173']" in response.text
        with client.websocket_connect("/ws", headers={"origin": "http://testserver"}) as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "hello"
    records = [record for record in caplog.records if record.name == "wsbroadcast"]
    assert [record.levelno for record in records] == [logging.WARNING]
    assert "http://localhost:5173" in records[0].getMessage()
    assert "secret" not in caplog.text


@EVERY_APP
async def test_a_server_that_can_not_answer_closes_before_it_accepts(make_app: MakeApp) -> None:
    app = make_app(ConnectionManager())
    async with lifespan(app):
        assert await refusal(app, headers=[(b"origin", b"https://evil.example")]) == 1008


async def test_what_a_client_chose_is_logged_escaped_and_cut(
    manager: ConnectionManager, caplog: pytest.LogCaptureFixture
) -> None:
    for origin in ("evil\x1b[2J\u0085\x9b\n" + "x" * 10_000, "https://evil.example\xff"):
        peer = Peer("/ws", headers=[(b"origin", origin.encode("latin-1"))], can_deny=True)
        await refusal(router_app(manager), peer=peer)
        status, text = peer.denial
        assert (status, text.isprintable()) == (403, True)
        assert len(text) < 1000
    assert len(caplog.records) == 2
    assert all(record.getMessage().isprintable() and len(record.getMessage()) < 1000 for record in caplog.records)


def test_many_origins_do_not_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with TestClient(router_app(ConnectionManager())) as client:
        for number in range(150):
            denied(client, origin=f"https://evil{number}.example")
        assert len(caplog.records) == 101
        later = monotonic() + 61
        monkeypatch.setattr(Throttle, "is_due", Throttle(lambda: later).is_due)
        for origin in ("https://evil1.example", "https://late.example", "https://later.example"):
            denied(client, origin=origin)
    assert len(caplog.records) == 102
    assert "https://late.example" in caplog.messages[-1]


def test_dns_rebinding_is_refused_where_the_names_of_the_server_are_known() -> None:
    manager, rebound = ConnectionManager(), {"origin": "http://evil.example", "host": "evil.example"}
    with TestClient(router_app(manager)) as client:
        admitted(client, **rebound)  # which the threat model says
    trusting = router_app(manager)
    trusting.add_middleware(TrustedHostMiddleware, allowed_hosts=["testserver"])
    for app, status in ((router_app(manager, allowed_origins=["http://testserver"]), 403), (trusting, 400)):
        with TestClient(app) as client:
            assert denied(client, **rebound).status_code == status
            admitted(client, origin="http://testserver")


def test_the_routers_options_are_the_doors() -> None:
    options: dict[str, Any] = {"allowed_origins": ["http://localhost:5173"], "allow_missing_origin": False}
    with TestClient(router_app(ConnectionManager(), **options)) as client:
        admitted(client, origin="http://localhost:5173")
        for headers in ({}, {"origin": "http://testserver"}):
            denied(client, **headers)
    with TestClient(router_app(ConnectionManager(), allowed_origins="*")) as client:
        admitted(client, origin="https://evil.example")


@pytest.mark.parametrize("root_path", ["", "/api", "/api/v1/"])
def test_a_root_path_changes_nothing(root_path: str) -> None:
    with TestClient(router_app(ConnectionManager()), root_path=root_path) as client:
        admitted(client, origin="http://testserver")
        denied(client, origin="http://evil.example")


@EVERY_APP
def test_over_tls_the_scheme_counts(make_app: MakeApp) -> None:
    with TestClient(make_app(ConnectionManager()), base_url="https://testserver") as client:
        admitted(client, "wss://testserver/ws", origin="https://testserver")
        denied(client, "wss://testserver/ws", origin="http://testserver")
