"""The Centrifuge SDKs against this server: the suite that one of them brings, and what both do in JSON and Protobuf."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.brokers import Endpoint
from tests.support.centrifuge_sdks import (
    JS,
    Clients,
    also_in_a_browser,
    everywhere,
    in_javascript,
    in_json,
    python_sdk,
    run_suite,
    suite_port,
)
from tests.support.centrifuge_site import site, token
from tests.support.npm import installed, needs_npm
from tests.support.servers import ROOT, UVICORN, Server, eventually, serve_here
from tests.test_docs import BLOCKS, blocks_of
from wsbroadcast import Connection, ConnectionManager, History

# The suite.


@pytest.fixture(params=["memory", "redis"])
def broker_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    server: Endpoint = request.getfixturevalue("redis_server")
    return f"{server.url}?prefix={request.getfixturevalue('prefix')}"


@pytest.mark.timeout(500)  # another run of it may come first
async def test_suite_of_the_python_sdk_passes(
    broker_url: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    sdk = await asyncio.to_thread(python_sdk, tmp_path_factory)
    flavour = replace(
        UVICORN,
        arguments=("--app-dir", str(ROOT / "examples"), *UVICORN.arguments),
        environment={"BROKER_URL": broker_url, "TOKEN_SECRET": "secret"},
    )
    server = Server(flavour, tmp_path / "log", "23_centrifuge:app", identifies_itself=False, probe="/openapi.json")
    with server:
        async with suite_port(server.port):
            output = await run_suite(sdk)
        assert re.search(r"^Ran 185 tests ", output, re.MULTILINE), output[-5000:]
        assert output.rstrip().endswith("\nOK"), output[-5000:]
        assert not server.complaints(), server.log()


# What both SDKs do.


@in_json
async def test_first_frame_connects_and_subscribes(sdk: Clients) -> None:
    async with site() as here:
        tab = await sdk.open(here.url, connect=False, token=token(), tokens=None)
        for number in range(3):
            await tab("subscribe", channel=f"room:{number}")
        await tab("connect")
        seen = await tab.until(lambda seen: list(seen["subscriptions"].values()) == ["subscribed"] * 3)
        [first, *_] = seen["frames"]
        assert first[1] == ">"
        assert [("connect" in line, "subscribe" in line) for line in first[2].split("\n")] == [
            (True, False),
            *[(False, True)] * 3,
        ]
        assert [frame[1] for frame in seen["frames"]].count(">") == 1


@also_in_a_browser
async def test_everything_that_can_be_asked_is_answered(sdk: Clients) -> None:
    async with site() as here:
        ada = await sdk.open(here.url, "ada", tokens=[token("ada", info={"name": "Ada"})])
        bob = await sdk.open(here.url, "bob", tokens=[token("bob")])
        for tab in (ada, bob):
            await tab("subscribe", channel="room:1", tokens=None)
            await tab.hears("subscribed", channel="room:1")
        assert await ada("publish", channel="room:1", data={"text": "gr\u00fc\u00df\u2028\n"}) == {}
        for tab in (ada, bob):
            heard = await tab.hears("publication", channel="room:1")
            assert heard["data"] == {"text": "gr\u00fc\u00df\u2028\n"}
            assert (heard["offset"], heard["info"]["user"]) == (1, "ada")
            assert heard["info"]["conn_info"] == {"name": "Ada"}
        await here.manager.broadcast([1, 2], channel="room:1")
        await here.manager.broadcast("plain text", channel="room:1")
        await bob.hears("publication", 3)
        assert await bob.data("room:1") == [{"text": "gr\u00fc\u00df\u2028\n"}, [1, 2], "plain text"]
        page = await ada("history", channel="room:1", limit=-1)
        assert [each["offset"] for each in page["publications"]] == [1, 2, 3]
        assert page["offset"] == 3
        since = {"offset": 1, "epoch": page["epoch"]}
        page = await ada("history", channel="room:1", limit=1, since=since)
        assert [each["data"] for each in page["publications"]] == [[1, 2]]
        assert (await ada("history", channel="room:1"))["publications"] == []
        page = await ada("history", channel="room:1", limit=2, reverse=True)
        assert [each["offset"] for each in page["publications"]] == [3, 2]
        assert await ada("presence_stats", channel="room:1") == {"num_clients": 2, "num_users": 2}
        members = (await ada("presence", channel="room:1"))["clients"]
        assert sorted(each["user"] for each in members.values()) == ["ada", "bob"]
        assert {key == each["client"] for key, each in members.items()} == {True}
        assert await ada("rpc", method="add", data={"a": 1, "b": 2}) == {"data": 3}
        await ada("rpc", method="note", data={"text": "x"})
        assert here.heard == [("ada", "x")]
        await ada("unsubscribe", channel="room:1")
        await bob.hears("leave")
        assert (await bob("presence_stats", channel="room:1")) == {"num_clients": 1, "num_users": 1}


@everywhere
async def test_what_is_refused_says_why_and_nothing_ends(sdk: Clients) -> None:
    def authorize(connection: Connection, action: str, channel: str | None) -> bool:
        return channel not in ("secret", "read-only") or (channel == "read-only" and action == "subscribe")

    async with site(authorize=authorize, history={"room:*": History()}) as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="secret")
        await tab("subscribe", channel="x" * 300)
        await tab("subscribe", channel="#43")
        await tab("subscribe", channel="read-only")
        await tab.hears("unsubscribed", channel="secret", code=103)
        await tab.hears("unsubscribed", channel="x" * 300, code=107)
        await tab.hears("unsubscribed", channel="#43", code=103)
        await tab.hears("subscribed", channel="read-only")
        codes = [
            (await tab(do, **options)).get("error", {}).get("code")
            for do, options in (
                ("publish", {"channel": "read-only", "data": 1}),
                ("publish", {"channel": "secret", "data": 1}),
                ("history", {"channel": "read-only", "limit": -1}),
                ("presence", {"channel": "secret"}),
                ("rpc", {"method": "nothing", "data": {}}),
                ("rpc", {"method": "add", "data": {"a": "x"}}),
                ("rpc", {"method": "add", "data": {"a": -1, "b": 0}}),
            )
        ]
        assert codes == [103, 103, 108, 103, 104, 107, 400]
        assert len(await tab.log("connected")) == 1


# Tokens.


@also_in_a_browser
async def test_expired_token_is_replaced(sdk: Clients) -> None:
    async with site() as here:
        tab = await sdk.open(here.url, tokens=[token(expires_in=-5), token()])
        await tab.hears("connected")
        assert [each["on"] for each in await tab.log("get_token", "disconnected")] == ["get_token", "get_token"]


@everywhere
@pytest.mark.parametrize(
    ("tokens", "code"),
    [
        ([token(key="another secret, which is as long as it")], 3500),
        ([token(channel="room:1")], 3500),
        ([token(nbf=9_999_999_999), None], 1),
    ],
    ids=["forged", "of a channel", "before its time"],
)
async def test_token_that_is_refused_ends_it(sdk: Clients, tokens: list[str | None], code: int) -> None:
    async with site() as here:
        tab = await sdk.open(here.url, tokens=tokens)
        await tab.hears("disconnected", code=code)
        assert here.manager.connections == []


@everywhere
async def test_subscription_tokens_are_looked_at(sdk: Clients) -> None:
    async with site() as here:
        tab = await sdk.open(here.url)
        for channel, tokens in {
            "good": [token(channel="good", info={"is": "in"})],
            "expired": [token(channel="expired", expires_in=-5), token(channel="expired")],
            "forged": [token(channel="forged", key="another secret, which is as long as it")],
            "none": [None],
        }.items():
            await tab("subscribe", channel=channel, tokens=tokens)
        await tab.hears("subscribed", channel="good")
        await tab.hears("subscribed", channel="expired")
        await tab.hears("unsubscribed", channel="forged", code=103)
        await tab.hears("unsubscribed", channel="none", code=1)
        assert len(await tab.log("connected")) == 1
        await tab("publish", channel="good", data=1)
        assert (await tab.hears("publication"))["info"]["chan_info"] == {"is": "in"}
        await tab("subscribe", channel="foreign", tokens=[token("43", channel="foreign")])
        await tab.hears("disconnected", code=3500)


@also_in_a_browser
async def test_tokens_are_refreshed_while_it_is_connected(sdk: Clients) -> None:
    async with site() as here:
        await sdk.open(here.url, "before it", connect=False)  # so that the SDK is there before a token is made
        tab = await sdk.open(here.url, tokens=[token(expires_in=4), token(expires_in=3600)])
        of_channel = [token(channel="room:1", expires_in=4), token(channel="room:1", expires_in=3600)]
        await tab("subscribe", channel="room:1", tokens=of_channel)
        await tab.hears("subscribed", channel="room:1")

        async def are_refreshed() -> bool:
            log = [each["on"] for each in await tab.log("get_token", "get_subscription_token")]
            return log.count("get_token") == log.count("get_subscription_token") == 2

        await eventually(are_refreshed, 60)
        [connection] = here.manager.connections

        async def is_renewed() -> bool:
            return (connection.expires_at or 0) > asyncio.get_running_loop().time() and await _is_long(connection)

        await eventually(is_renewed, 60)
        await here.manager.broadcast(1, channel="room:1")
        await tab.hears("publication")
        assert await tab.log("unsubscribed", "disconnected", "error") == []
        assert len(await tab.log("connected")) == 1


async def _is_long(connection: Connection) -> bool:
    import time

    return connection.expires_at is None or connection.expires_at - time.time() > 600


# Subscriptions of the server's.


@everywhere
async def test_server_puts_clients_into_channels(sdk: Clients) -> None:
    async with site(everyone_channel="all") as here:
        tab = await sdk.open(here.url, tokens=[token("ada", channels=["news"])])
        for channel in ("#ada", "all", "news"):
            await tab.hears("subscribed", channel=channel)
        await here.manager.broadcast(1, user="ada")
        await here.manager.broadcast(2)
        await here.manager.broadcast(3, channel="news")
        for number, channel in ((1, "#ada"), (2, "all"), (3, "news")):
            assert (await tab.hears("publication", channel=channel))["data"] == number
        [connection] = here.manager.connections
        await here.manager.subscribe(connection, "later")
        await tab.hears("subscribed", channel="later")
        await here.manager.broadcast(4, channel="later")
        assert (await tab.hears("publication", channel="later"))["data"] == 4
        await here.manager.unsubscribe(connection, "later")
        await tab.hears("unsubscribed", channel="later")
        await tab("cut")
        await tab.hears("connected", 2)
        await here.manager.broadcast(5, user="ada")
        await tab.hears("publication", 2, channel="#ada")
        assert await tab.data("#ada") == [1, 5]


@everywhere
async def test_server_takes_a_client_out_of_a_channel_for_good(sdk: Clients) -> None:
    async with site() as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="room:1")
        await tab.hears("subscribed", channel="room:1")
        await here.manager.unsubscribe_user("42", "room:1")
        await tab.hears("unsubscribed", channel="room:1", code=2000)


@in_javascript
async def test_message_to_one_connection_is_a_message(sdk: Clients) -> None:
    async with site() as here:
        tab = await sdk.open(here.url)
        await tab.hears("connected")
        [connection] = here.manager.connections
        await connection.send({"for": "you"})
        assert (await tab.hears("message"))["data"] == {"for": "you"}


# The docs.


@asynccontextmanager
async def app_of_the_docs() -> AsyncIterator[tuple[ConnectionManager, str]]:
    """Serve the page's app; yields its manager, and its host and port."""
    [app] = [block for block in BLOCKS if block.name == "docs/centrifuge.md#the-app"]
    names = app.run()
    async with serve_here(names["app"]) as port:
        yield names["manager"], f"127.0.0.1:{port}"


def script_of_the_docs(language: str, host: str) -> str:
    """Return the page's script in a language, with the page's app in the place of its own."""
    [script] = blocks_of("docs/centrifuge.md", language)
    return script.source.replace("wss://app.example", f"ws://{host}").replace("https://app.example", f"http://{host}")


async def hears(manager: ConnectionManager, user: str, line: bytes, *command: str, **options: Any) -> None:
    """Run a script, and check what it prints first, and as whom it is connected then."""
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, **options)
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == line
        assert [each.user for each in manager.connections] == [user]
    finally:
        process.kill()
        await process.wait()


@needs_npm
async def test_script_of_the_docs_hears_what_it_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = await asyncio.to_thread(installed, tmp_path_factory, *JS)
    async with app_of_the_docs() as (manager, host):
        source = script_of_the_docs("js", host)
        # A page knows its server, and a browser has a WebSocket; not every Node has.
        source = source.replace('fetch("/', f'fetch("http://{host}/').replace(
            "getToken:", "websocket: WebSocket, getToken:"
        )
        (directory / "docs.mjs").write_text(f'import {{ WebSocket }} from "ws"\n{source}')
        await hears(manager, "ada", b"{ text: 'hello' }\n", "node", "docs.mjs", cwd=directory)


async def test_program_of_the_docs_hears_what_it_says(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    sdk = await asyncio.to_thread(python_sdk, tmp_path_factory)
    async with app_of_the_docs() as (manager, host):
        (tmp_path / "docs.py").write_text(script_of_the_docs("py", host))
        environment = os.environ | {"PYTHONPATH": str(sdk / "site"), "NO_PROXY": "127.0.0.1"}
        command = (sys.executable, "-u", str(tmp_path / "docs.py"))
        await hears(manager, "bob", b"{'text': 'hello'}\n", *command, env=environment)
