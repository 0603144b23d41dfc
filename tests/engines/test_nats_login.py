from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from tests.engines.links import failure, used
from tests.engines.nats_links import INFO, let_in, serving
from tests.support.brokers import Endpoint, NATSServer, free_port
from tests.support.loops import TASK_FACTORIES
from wsbroadcast import ConfigurationError, EngineUnavailable
from wsbroadcast.concurrency import Patience
from wsbroadcast.engines.broker.link import Host
from wsbroadcast.engines.nats import NATSEngine
from wsbroadcast.options import Timing
from wsbroadcast.testing.nodes import Recorder

OwnNATS = Callable[..., NATSServer]

PASSWORD = "s@cr,t/%"


# Who we are.


@pytest.mark.parametrize(
    ("config", "right", "wrong", "who"),
    [
        ("user: alice, password: secret", "alice:secret@", "alice:guess@", "the user 'alice'"),
        ("user: alice, password: secret", "alice:secret@", "", "a connection without user and password"),
        ("token: secret", "secret@", "guess@", "the token"),
    ],
)
async def test_wrong_credentials_are_refused(own_nats: OwnNATS, config: str, right: str, wrong: str, who: str) -> None:
    server = own_nats(config=f"authorization {{ {config} }}")
    where = f"{server.host}:{server.port}"
    async with used(f"nats://{right}{where}", "app.a") as link:
        await link.publish("app.a", b"1")
    error = await failure(f"nats://{wrong}{where}")
    assert isinstance(error, ConfigurationError)
    assert str(error) == f"nats at {where} refuses {who}"
    assert "guess" not in "".join(traceback.format_exception(error))


async def test_password_of_any_characters_gets_in(own_nats: OwnNATS) -> None:
    server = own_nats(user="al:ice", password=PASSWORD)
    async with used(server.url), used(NATSEngine(server.url.partition("@")[2], user="al:ice", password=PASSWORD)):
        pass


async def test_credentials_that_cannot_be_read_are_no_outage(
    own_nats: OwnNATS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", _FakeNkeys())
    missing, broken = tmp_path / "missing", tmp_path / "broken"
    broken.write_text("secret")
    server = own_nats(config="authorization { token: secret }")
    engine = NATSEngine(server.url, token="x")
    for path, what in (
        (missing, "which can't be read: No such file"),
        (broken, "nats-py can't use the nkey"),
    ):
        engine.__dict__["_target"].options = {"nkeys_seed": str(path)}
        error = await failure(engine)
        assert isinstance(error, ConfigurationError)
        assert what in str(error)
        assert "secret" not in "".join(traceback.format_exception(error))


class _FakeNkeys:
    @staticmethod
    def from_seed(seed: bytes) -> object:
        raise ValueError(f"no seed: {seed!r}")


async def test_start_says_that_credentials_are_wrong(own_nats: OwnNATS) -> None:
    server = own_nats(user="alice", password="secret")
    engine = NATSEngine(f"nats://alice:guess@{server.host}:{server.port}")
    with pytest.raises(ConfigurationError, match="refuses the user 'alice'"):
        await engine.start(Recorder())


async def test_start_says_that_permissions_are_missing(own_nats: OwnNATS) -> None:
    permissions = 'permissions: { publish: ["app.>"], subscribe: ["other.>"] }'
    server = own_nats(config=f"authorization {{ users: [ {{ user: alice, password: secret, {permissions} }} ] }}")
    engine = NATSEngine(f"nats://alice:secret@{server.host}:{server.port}", prefix="app")
    with pytest.raises(ConfigurationError, match=r"grant subscribe on 'app\.>'"):
        await engine.start(Recorder())


# Where it is.


async def test_unreachable_server_is_an_outage_at_once(caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    error = await failure(f"nats://alice:secret@127.0.0.1:{free_port()}")
    assert isinstance(error, ConnectionRefusedError)
    assert time.monotonic() - began < Timing().connect_timeout
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert "secret" not in "".join(traceback.format_exception(error))


async def test_name_that_does_not_resolve_is_an_outage() -> None:
    assert isinstance(await failure("nats://nowhere.invalid"), OSError)


async def test_fail_fast_names_the_address_only() -> None:
    port = free_port()
    engine = NATSEngine.from_url(f"nats://alice:secret@127.0.0.1:{port}?fail_fast=true")
    with pytest.raises(EngineUnavailable, match=f"nats at 127.0.0.1:{port}") as caught:
        await engine.start(Recorder())
    assert "secret" not in "".join(traceback.format_exception(caught.value))


async def test_servers_are_tried_until_one_lets_us_in(own_nats: OwnNATS) -> None:
    server = own_nats()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(hang_up) as first, serving(hang) as second:
        urls = [f"nats://127.0.0.1:{free_port()}", first, second, server.url]
        for _ in range(3):
            async with used(NATSEngine(urls)) as link:
                await link.publish("a", b"1")


async def test_given_servers_that_hang_hide_neither_one_that_was_discovered_nor_the_last(own_nats: OwnNATS) -> None:
    server = own_nats()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(hang) as first, serving(hang) as second, serving(hang) as third:
        engine = NATSEngine([first, second, third])
        engine._target.discover([f"127.0.0.1:{server.port}"])  # as a server's greeting does
        for _ in range(2):
            link = engine.new_link()
            try:
                async with Patience(Timing().connect_timeout):
                    await link.open()
            finally:
                await link.abort()
            assert engine._target.last == Host("127.0.0.1", server.port)
            engine._target.discover([])


async def test_refusal_is_final_whichever_server_says_it(own_nats: OwnNATS) -> None:
    server = own_nats(user="alice", password="secret")
    for _ in range(5):
        error = await failure(f"nats://alice:guess@127.0.0.1:{server.port},127.0.0.1:{free_port()}")
        assert isinstance(error, ConfigurationError)


async def test_server_tells_of_others_when_it_greets_and_later() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO.replace(b'"headers"', b'"connect_urls":["10.0.0.1:1"],"headers"'))
        for _ in range(2):
            await reader.readuntil(b"PING\r\n")
            writer.write(b"PONG\r\n")
        await reader.readuntil(b"PING\r\n")
        writer.write(b'INFO {"connect_urls":["10.0.0.2:2"]}\r\nPONG\r\n')
        await reader.read()

    async with serving(serve) as url:
        engine = NATSEngine(url)
        target = engine.__dict__["_target"]
        async with used(engine) as link:
            assert {str(host) for host in target.route()} == {engine.address, "10.0.0.1:1"}
            await link.publish("a", b"1")
            assert {str(host) for host in target.route()} == {engine.address, "10.0.0.2:2"}


@pytest.mark.parametrize("factory", TASK_FACTORIES)
async def test_what_comes_behind_the_greeting_is_read(factory: Any) -> None:
    asyncio.get_running_loop().set_task_factory(factory)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\nPI")
        await reader.readuntil(b"PING\r\n")
        writer.write(b"NG\r\nPONG\r\n")
        await reader.readuntil(b"PONG\r\n")

    async with serving(serve) as url, used(url) as link:
        assert isinstance(await link.lost(), ConnectionError)


async def test_other_servers_of_a_cluster_are_found(own_nats: OwnNATS) -> None:
    ports = [free_port(), free_port()]
    routes = ", ".join(f'"nats-route://127.0.0.1:{port}"' for port in ports)
    servers = [
        own_nats(config=f'server_name: s{port}\ncluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{routes}] }}')
        for port in ports
    ]
    engine = NATSEngine(servers[0].url)
    target = engine.__dict__["_target"]
    async with used(engine, "app.a") as link:
        async with asyncio.timeout(10):
            while len(target.route()) < 2:
                await link.publish("app.b", b"")
                await asyncio.sleep(0.01)
        servers[0].kill()
        await link.lost()
    async with used(engine, "app.a") as link:
        await link.publish("app.a", b"1")
        assert await link.letters.until(b"1") == [("app.a", b"1")]


# TLS.


class Certificates(NamedTuple):
    config: str
    trusting: ssl.SSLContext


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(file)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return Certificates(f'tls {{ cert_file: "{file}", key_file: "{file}" }}', trusting)


@pytest.mark.parametrize("scheme", ["nats", "tls"])
@pytest.mark.parametrize("more", ["", "allow_non_tls: true", "first"])
async def test_connection_is_encrypted(own_nats: OwnNATS, certificates: Certificates, scheme: str, more: str) -> None:
    first = more == "first"
    config = certificates.config.replace("tls {", 'tls { handshake_first: "50ms",') if first else certificates.config
    server = own_nats(config=f"{config}\n{more if not first else ''}")
    url = f"{scheme}://localhost:{server.port}"
    options: dict[str, Any] = {"tls_handshake_first": True} if first else {}
    async with used(NATSEngine(url, tls=certificates.trusting, **options), "app.a") as link:
        assert link.link.__dict__["_login"].writer.get_extra_info("ssl_object") is not None
        await link.publish("app.a", b"x" * 1_000_000, b"last")
        assert len(await link.letters.until(b"last")) == 2
        await server.killed()
        assert isinstance(await link.lost(), OSError)


async def test_certificate_that_is_not_trusted_is_refused(own_nats: OwnNATS, certificates: Certificates) -> None:
    server = own_nats(config=certificates.config)
    error = await failure(f"tls://localhost:{server.port}")
    assert isinstance(error, ConfigurationError)
    assert "can't be trusted: unable to get local issuer certificate" in str(error)


async def test_server_without_tls_gets_nothing_secret() -> None:
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        while data := await reader.read(65536):
            received.extend(data)

    async with serving(serve) as url:
        error = await failure(url.replace("nats://", "tls://alice:secret@"))
        assert isinstance(error, ConfigurationError)
        assert "offers no TLS" in str(error)
    assert not received


# On the way.


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def says_who_it_is(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(INFO)
    while await reader.read(65536):
        pass


async def wants_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(INFO.replace(b'"headers"', b'"tls_required":true,"headers"'))
    while await reader.read(65536):
        pass


async def lets_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await let_in(reader, writer)
    while await reader.read(65536):
        pass


@pytest.mark.parametrize("serve", [silent, says_who_it_is, wants_tls, lets_in])
async def test_open_can_be_cut_off_at_every_stage(serve: Any) -> None:
    async with serving(serve) as url:
        before = asyncio.all_tasks()
        link = NATSEngine(url).new_link()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await link.open()
        async with asyncio.timeout(5):
            await link.abort()
        assert len(asyncio.all_tasks() - before) <= 1  # what serves us


async def test_cancelled_open_leaves_nothing_behind(nats_server: Endpoint) -> None:
    before = asyncio.all_tasks()
    outcomes = set()
    for steps in range(0, 300, 5):
        link = NATSEngine(nats_server.url).new_link()
        task = asyncio.create_task(link.open())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        outcomes.add(task.cancelled())
        await link.abort()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
    assert outcomes == {True, False}


async def test_server_that_hangs_up_after_the_greeting_is_an_outage() -> None:
    async with serving(let_in) as url:
        assert isinstance(await failure(url), ConnectionError)


async def test_server_of_another_kind_is_an_outage() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read()

    async with serving(serve) as url:
        assert "INFO" in str(await failure(url))


# Without the driver.


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        ('sys.modules["nats"] = None', "needs nats-py:"),
        ("from nats.aio.client import Client; del Client._process_info", "needs another nats-py"),
        ("from nats.aio.client import Client; del Client._read_loop", "needs another nats-py"),
    ],
    ids=["missing", "changed", "reads otherwise"],
)
def test_missing_driver_is_named_with_the_command_that_installs_it(spoil: str, what: str) -> None:
    script = f"""
import sys
{spoil}
import wsbroadcast
try:
    wsbroadcast.ConnectionManager("nats://localhost")
except wsbroadcast.MissingDependency as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert what in done.stdout
    assert 'pip install "wsbroadcast[nats]"' in done.stdout
