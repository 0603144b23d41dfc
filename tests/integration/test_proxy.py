"""Behind a real nginx, with the configuration that the documentation shows."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from tests.support.brokers import free_port
from tests.support.guarded import LISTED
from tests.support.programs import NGINX, needs_nginx
from tests.support.servers import ROOT, UVICORN, Server

pytestmark = needs_nginx

TIMEOUT = 10.0

_MAIN = """
daemon off;
master_process off;
pid {directory}/pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {documented}
}}
"""


def configuration(directory: Path, port: int, upstream: int) -> str:
    """Return what the documentation shows, with ports and files of this test."""
    page = (ROOT / "docs" / "behind-a-proxy.md").read_text(encoding="utf-8")
    (documented,) = re.findall(r"^```nginx\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for shown, here in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("server 127.0.0.1:8000", f"server 127.0.0.1:{upstream}"),
        ("/etc/ssl/app.example.pem", f"{directory}/certificate.pem"),
        ("/etc/ssl/app.example.key", f"{directory}/key.pem"),
    ):
        assert documented.count(shown) == 1, shown
        documented = documented.replace(shown, here)
    return _MAIN.format(directory=directory, documented=documented)


class Nginx:
    """One nginx in front of a server. Use it with `with`."""

    def __init__(self, directory: Path, server: Server) -> None:
        self._directory = directory
        self.server = server
        self.port = free_port()
        (directory / "nginx.conf").write_text(configuration(directory, self.port, server.port))
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_pem.write_to_path(directory / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(directory / "certificate.pem")
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)

    def __enter__(self) -> Nginx:
        assert NGINX is not None
        command = [NGINX, "-p", str(self._directory), "-c", str(self._directory / "nginx.conf")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + TIMEOUT
        while not (self._directory / "pid").exists() or not (self._directory / "pid").read_text():
            log = self._directory / "error.log"
            assert self.process.poll() is None, log.read_text() if log.exists() else "no log"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT)

    @property
    def own(self) -> str:
        """The origin of a page behind it."""
        return f"https://127.0.0.1:{self.port}"

    def connect(self, path: str, **options: Any) -> connect:
        return connect(f"wss://127.0.0.1:{self.port}/api{path}", ssl=self.trust, open_timeout=TIMEOUT, **options)


@pytest.fixture(scope="module", params=["trusting", "trusting with a root path", "not trusting"])
def nginx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """An nginx before a uvicorn that trusts it, or doesn't."""
    more = {
        "trusting": (),
        "trusting with a root path": ("--root-path", "/api"),
        "not trusting": ("--no-proxy-headers",),
    }[request.param]
    flavour = replace(UVICORN, name=f"uvicorn {request.param}", arguments=(*UVICORN.arguments, *more))
    if flavour.missing:
        pytest.skip(flavour.missing)
    directory = tmp_path_factory.mktemp("nginx")
    with ExitStack() as stack:
        server = stack.enter_context(Server(flavour, directory / "uvicorn.log", "tests.support.guarded:app"))
        yield stack.enter_context(Nginx(directory, server))


def trusts(nginx: Nginx) -> bool:
    return "not trusting" not in nginx.server.flavour.name


async def refusal(nginx: Nginx, path: str, **options: Any) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with nginx.connect(path, **options):
            pass
    return caught.value.response.status_code, (caught.value.response.body or b"").decode()


async def echoes(nginx: Nginx, path: str, **options: Any) -> None:
    async with asyncio.timeout(TIMEOUT), nginx.connect(path, **options) as client:
        await client.send("hello")
        assert await client.recv() == "hello"


async def test_its_own_page_gets_in_if_the_server_trusts_the_proxy(nginx: Nginx) -> None:
    if trusts(nginx):
        await echoes(nginx, "/ws", origin=nginx.own)
        await echoes(nginx, "/dependency", origin=nginx.own)
    else:
        status, body = await refusal(nginx, "/ws", origin=nginx.own)
        assert status == 403
        assert f"this server is 'http://127.0.0.1:{nginx.port}'" in body
        assert "X-Forwarded-Proto" in body


async def test_any_other_page_is_refused(nginx: Nginx) -> None:
    for origin in (
        "https://evil.example",
        "https://127.0.0.1",
        f"https://127.0.0.1:{nginx.server.port}",
        f"http://127.0.0.1:{nginx.server.port}",
        f"https://localhost:{nginx.port}",
        "null",
    ):
        status, body = await refusal(nginx, "/ws", origin=origin)
        assert status == 403
        assert repr(origin) in body
    if trusts(nginx):
        assert (await refusal(nginx, "/ws", origin=nginx.own.replace("https", "http")))[0] == 403


async def test_a_list_of_origins_needs_no_trust(nginx: Nginx) -> None:
    await echoes(nginx, "/listed", origin=LISTED)
    assert (await refusal(nginx, "/listed", origin=nginx.own))[0] == 403


async def test_programs_get_in(nginx: Nginx) -> None:
    await echoes(nginx, "/ws")


async def test_401_comes_through(nginx: Nginx) -> None:
    headers = {"Authorization": "Bearer nobody"}
    assert await refusal(nginx, "/member", additional_headers=headers) == (401, "not authenticated")


async def test_a_channel_in_the_path_is_the_apps(nginx: Nginx) -> None:
    async with nginx.connect("/channel/news", additional_headers={"Authorization": "Bearer ada"}) as client:
        await client.send('{"type": "subscribe", "channel": "news"}')
        assert json.loads(await client.recv()) == {"type": "subscribed", "channel": "news"}


async def test_the_address_and_the_scheme_are_nginxs_word_not_the_clients(nginx: Nginx) -> None:
    lies = {
        "X-Forwarded-For": "1.2.3.4",
        "X-Forwarded-Proto": "http",
        "X-Real-IP": "1.2.3.4",
        "Forwarded": "for=1.2.3.4",
    }
    async with nginx.connect("/client", additional_headers=lies) as client:
        told = json.loads(await client.recv())
    assert told["client"][0] == "127.0.0.1"
    assert told["url"].startswith(f"{'wss' if trusts(nginx) else 'ws'}://127.0.0.1:{nginx.port}/")
    assert told["root_path"] == ("/api" if "root path" in nginx.server.flavour.name else "")


async def test_nothing_is_wrong_in_the_servers_log(nginx: Nginx) -> None:
    assert nginx.server.complaints() == []
