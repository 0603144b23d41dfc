"""The browser's client in Chromium, through a proxy that misbehaves: nothing is lost or comes twice, or it is told.

The page gets twenty ticks a second. With `WSBROADCAST_TEST_FULL` it is the client that is served, with its real times.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.integration.test_browser import BROWSER_ARGUMENTS
from tests.support.asgi import Peer
from tests.support.browser_site import QUICK, Site
from tests.support.programs import BROWSER, needs_browser
from tests.support.servers import eventually
from wsbroadcast import Message, Presence
from wsbroadcast.manager import core_of
from wsbroadcast.node import watching

pytestmark = needs_browser

FULL = bool(os.environ.get("WSBROADCAST_TEST_FULL"))

REAL = {
    "STEADY": 5000,
    "GRACE": 3000,
    "PROBE_TIMEOUT": 3000,
    "FIRST_BYTE_TIMEOUT": 5000,
    "SLACK": 10_000,
}

# What a busy machine adds (s).
SPARE = 6.0


def after(name: str) -> float:
    """One of the client's times, in seconds."""
    return (REAL if FULL else QUICK)[name] / 1000


class Tab:
    """A page with the client, and what it was told."""

    def __init__(self, page: Page, site: Site) -> None:
        self.page = page
        self.site = site

    async def start(self, **options: Any) -> None:
        await self.page.goto(self.site.url)
        await self.page.wait_for_function("window.isReady")
        await self.page.evaluate("(options) => start(options)", options)

    async def run(self, script: str) -> Any:
        return await self.page.evaluate(script)

    async def told(self) -> dict[str, Any]:
        found: dict[str, Any] = await self.page.evaluate("window.told")
        return found

    async def gets_ticks(self, more: int = 5, within: float = SPARE) -> None:
        """Wait until so many more come than there are now; the proxy may have to be healed before."""
        target = self.site.sent + more

        async def came() -> bool:
            ticks = [each for each in (await self.told())["log"] if isinstance(each, int)]
            return bool(ticks) and ticks[-1] >= target

        await eventually(came, within)

    async def status(self) -> str:
        found: str = await self.page.evaluate("ws.status")
        return found

    async def becomes(self, status: str, within: float = SPARE) -> None:
        async def is_so() -> bool:
            return await self.status() == status

        await eventually(is_so, within)

    async def lost_nothing(self, states: int = 0) -> None:
        """Assert that what the page got has no gap and nothing twice, but where it was told to load its state."""
        log = (await self.told())["log"]
        assert log.count("state") == states
        runs: list[list[int]] = [[]]
        for each in log:
            if each == "state":
                runs.append([])
            elif isinstance(each, int):
                runs[-1].append(each)
        for run in runs:
            assert run == list(range(run[0], run[0] + len(run))) if run else True
        ticks = [each for each in log if isinstance(each, int)]
        assert len(ticks) == len(set(ticks))


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        yield browser
        await browser.close()


@asynccontextmanager
async def a_tab(directory: Path, *, starts: bool = True, **options: Any) -> AsyncIterator[Tab]:
    """Run a site and open its page."""
    names = ("authenticates", "inbound", "authorize", "presence")
    site_options = {name: options.pop(name) for name in names if name in options}
    async with Site(directory, is_full=FULL, **site_options) as site, browsing() as browser:
        page = await (await browser.new_context()).new_page()
        tab = Tab(page, site)
        if starts:
            await tab.start(**options)
            await tab.gets_ticks()
        yield tab


# What breaks.


async def test_reset(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        tab.site.proxy.reset()
        await tab.gets_ticks()
        assert (await tab.told())["status"] == ["open"]  # it was back within the grace
        for _ in range(3):
            tab.site.proxy.reset()
            await tab.gets_ticks()
        await tab.lost_nothing()
        assert set(tab.site.asked) == {"ws"}


async def test_restart_of_a_server_that_keeps_its_log(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        await tab.site.restart()
        await tab.gets_ticks()
        await tab.lost_nothing()
        assert (await tab.told())["events"][-1]["recovered"] is True


async def test_server_that_is_away_for_long_is_found_again_by_websocket(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        tab.site.proxy.refuse()
        tab.site.proxy.reset()
        await tab.becomes("lost", after("GRACE") + SPARE)
        tries = tab.site.proxy.accepted

        async def tried() -> bool:
            return not tab.site.proxy.accepted > tries

        await eventually(tried)
        await asyncio.sleep(2)  # several attempts, over WebSocket and HTTP, find nobody
        tab.site.asked.clear()
        tab.site.proxy.heal()
        await tab.gets_ticks()
        await tab.becomes("open")
        if tab.site.asked[-1] == "sse":  # HTTP asked first; in a while it is a WebSocket again

            async def is_back() -> bool:
                return tab.site.asked[-1] == "ws"

            await eventually(is_back, 2 * after("STEADY") + SPARE)
        await tab.gets_ticks()
        await tab.lost_nothing()


async def test_restart_of_a_server_that_loses_its_log(tmp_path: Path) -> None:
    async with a_tab(tmp_path, state=True) as tab:
        await tab.site.restart(loses_log=True)
        await tab.gets_ticks()
        told = await tab.told()
        assert [event.get("recovered") for event in told["events"]] == [True, False]
        await tab.lost_nothing(states=2)  # the first was the beginning


async def test_state_that_can_not_be_loaded_is_loaded_later(tmp_path: Path) -> None:
    async with a_tab(tmp_path, state=True) as tab:
        await tab.run(
            "(() => { let failures = 2; const { fetch } = window; window.fetch = (...what) => "
            "(what[0] === '/position' && failures-- > 0"
            " ? Promise.reject(new TypeError('no network')) : fetch(...what)) })()"
        )
        await tab.site.restart(loses_log=True)
        await tab.gets_ticks(within=2 * SPARE)
        told = await tab.told()
        assert told["states"] == 4
        assert "TypeError: no network" in told["errors"]
        await tab.lost_nothing(states=4)


async def test_packets_that_are_swallowed_are_noticed_by_the_missing_pings(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        tab.site.proxy.black_hole()
        began = time.monotonic()
        await tab.becomes("lost", 1 + after("SLACK") + after("GRACE") + SPARE)
        assert time.monotonic() - began >= after("SLACK")
        tab.site.proxy.heal()
        await tab.gets_ticks(within=2 * after("STEADY") + SPARE)
        await tab.lost_nothing()


async def test_dead_socket_is_noticed_when_the_network_comes_back(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        tab.site.proxy.black_hole()
        tab.site.proxy.heal()  # what was open hears nothing any more
        await tab.run("dispatchEvent(new Event('online'))")
        await tab.gets_ticks(within=after("PROBE_TIMEOUT") + SPARE)
        await tab.lost_nothing()


async def test_browser_that_is_offline_for_a_while(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        await tab.page.context.set_offline(True)
        assert await tab.run("navigator.onLine") is False
        await asyncio.sleep(3 if FULL else 1)
        await tab.page.context.set_offline(False)
        await tab.gets_ticks()
        await tab.lost_nothing()


async def test_page_that_is_frozen_and_wakes(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        devtools = await tab.page.context.new_cdp_session(tab.page)
        await devtools.send("Page.setWebLifecycleState", {"state": "frozen"})
        tab.site.proxy.reset()
        await asyncio.sleep(4 if FULL else 1)
        await devtools.send("Page.setWebLifecycleState", {"state": "active"})
        await tab.gets_ticks()
        await tab.lost_nothing()


@pytest.mark.parametrize("is_silent", [False, True])
async def test_browser_that_is_stopped_as_in_a_laptop_s_sleep(tmp_path: Path, is_silent: bool) -> None:
    async with a_tab(tmp_path) as tab:
        assert tab.page.context.browser is not None
        devtools = await tab.page.context.browser.new_browser_cdp_session()
        found = await devtools.send("SystemInfo.getProcessInfo")
        processes = [process["id"] for process in found["processInfo"]]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            if is_silent:
                tab.site.proxy.black_hole()
                tab.site.proxy.heal()
            else:
                tab.site.proxy.reset()
            await asyncio.sleep(14 if FULL else 2)
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)
        await tab.gets_ticks(within=after("SLACK") + 1 + SPARE)
        await tab.lost_nothing()


async def test_proxy_that_cuts_what_is_idle_never_cuts(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        tab.site._ticking.cancel()
        accepted = tab.site.proxy.accepted
        await tab.run(
            "new Promise((done) => { const began = Date.now(); const stop = ws.on('ping', () => { "
            "if (Date.now() - began > 3000) done(stop()) }) })"
        )
        assert tab.site.proxy.accepted == accepted
        assert await tab.status() == "open"


# What the server says.


async def close_all(site: Site, code: int) -> None:
    for connection in site.manager.connections:
        await connection.close(code, "because")


@pytest.mark.parametrize("code", [1001, 1011, 1012, 1013])
async def test_codes_after_which_it_comes_back(tmp_path: Path, code: int) -> None:
    async with a_tab(tmp_path) as tab:
        began = time.monotonic()
        await close_all(tab.site, code)
        await tab.gets_ticks(within=(after("STEADY") if code == 1013 else 0) + SPARE)
        if code == 1013:
            assert time.monotonic() - began >= after("STEADY")
        await tab.lost_nothing()
        assert ("lost" in (await tab.told())["status"]) == (code == 1013)


@pytest.mark.parametrize("code", [1000, 1008, 4403, 4409, 4000])
async def test_codes_that_end_it(tmp_path: Path, code: int) -> None:
    async with a_tab(tmp_path) as tab:
        await close_all(tab.site, code)
        await tab.becomes("closed")
        assert (await tab.told())["closed"] == {"code": code, "reason": "because"}
        asked = len(tab.site.asked)
        await tab.run("dispatchEvent(new Event('online'))")
        failed = await tab.run("ws.publish(1).catch((error) => error.code)")
        assert failed == "lost"
        assert len(tab.site.asked) == asked


async def test_token_that_has_expired_is_asked_for_again(tmp_path: Path) -> None:
    async with a_tab(tmp_path, authenticates=True, token=True) as tab:
        assert (await tab.told())["tokens"] == 1
        await close_all(tab.site, 4401)
        await tab.gets_ticks()
        assert (await tab.told())["tokens"] == 2
        await tab.lost_nothing()


async def test_token_that_expires_is_refreshed_in_time(tmp_path: Path) -> None:
    async with a_tab(tmp_path, authenticates=True, token=True) as tab:
        (connection,) = tab.site.manager.connections
        connection.renew(time.time() + 1)

        async def is_refreshed() -> bool:
            return connection.expires_at is None  # as the new token says

        await eventually(is_refreshed)
        told = await tab.told()
        assert told["tokens"] == 2
        assert [event["type"] for event in told["events"]] == ["subscribed", "expiring"]
        assert tab.site.asked == ["ws"]


async def test_token_that_is_refused_for_ever_ends_it(tmp_path: Path) -> None:
    async with a_tab(tmp_path, authenticates=True, token=True) as tab:
        while await tab.status() != "closed":
            await close_all(tab.site, 4401)
            await asyncio.sleep(0.05)
        told = await tab.told()
        assert told["tokens"] == 4
        assert told["closed"]["code"] == 4401


async def test_handshake_that_is_refused_for_its_token_ends_it_by_http(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False, authenticates=True) as tab:
        tab.site.tokens = ["bad"]
        await tab.start(token=True)
        await tab.becomes("closed", 3 * SPARE)
        assert (await tab.told())["closed"]["code"] == 4401
        assert set(tab.site.asked) == {"ws", "sse"}


async def test_no_token_means_nobody_is_logged_in(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False) as tab:
        await tab.start()
        await tab.becomes("open")
        closed = await tab.run(
            "(async () => {"
            " const ws = connect('/ws/room:1', { token: () => null });"
            " return await new Promise((done) => ws.on('status', (status, why) => why && done(why))) })()"
        )
        assert closed == {"code": 4401, "reason": "no token"}


async def test_server_that_accepts_and_closes_is_not_hammered(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        tab.site.asked.clear()
        began = time.monotonic()
        while time.monotonic() - began < 4:
            await close_all(tab.site, 1011)
            await asyncio.sleep(0.02)
        # Waits of up to 0.2, 0.4, 0.8, 1.6, 2, 2 … seconds: more than a handful in four seconds is no backoff.
        assert 2 <= len(tab.site.asked) <= 14


# What the page does.


async def test_commands_are_promises(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        assert await tab.run("ws.call('double', { number: 4 })") == 8
        error = await tab.run("ws.call('double', { number: 'x' }).catch((e) => [e.code, e.errors[0].loc])")
        assert error == ["invalid_arguments", ["number"]]
        published = await tab.run("ws.publish('hello', { key: 'once' })")
        assert published["type"] == "published"
        assert (await tab.run("ws.publish('hello', { key: 'once' })"))["is_repeat"]
        assert (await tab.told())["log"].count("hello") == 1
        assert await tab.run("ws.subscribe('room:2').catch((error) => error.code)") == "forbidden"
        tab.site.proxy.black_hole()
        waiting = tab.run("ws.call('double', { number: 4 }).catch((error) => error.code)")
        assert await waiting == "lost"  # when the connection is given up
        assert await tab.run("ws.publish(1).catch((error) => error.code)") == "lost"


async def test_close_while_a_token_is_fetched_opens_nothing(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False) as tab:
        await tab.start()
        await tab.becomes("open")
        await tab.run("ws.close()")
        tab.site.asked.clear()
        await tab.run("ws = null")
        status = await tab.run(
            "(async () => {"
            " let give; const ws = connect('/ws/room:1', { token: () => new Promise((done) => { give = done }) });"
            " await 0; ws.close(); give('good');"
            " await new Promise((done) => setTimeout(done, 300)); return ws.status })()"
        )
        assert status == "closed"
        assert tab.site.asked == []


async def test_page_that_is_left_and_shown_again(tmp_path: Path) -> None:
    async with a_tab(tmp_path) as tab:
        await tab.run("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")

        async def is_gone() -> bool:
            return not tab.site.manager.connections

        await eventually(is_gone)
        asked = len(tab.site.asked)
        await asyncio.sleep(1)
        assert len(tab.site.asked) == asked  # it stays away while nobody sees it
        await tab.run("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
        await tab.gets_ticks()
        await tab.lost_nothing()


# Where a proxy lets no WebSocket through.


async def test_blocked_upgrades_are_gone_around_by_server_sent_events(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False) as tab:
        tab.site.blocks_upgrades = True
        await tab.start()
        await tab.gets_ticks()
        assert tab.site.asked[:3] == ["ws", "ws", "sse"]
        assert (await tab.run("ws.publish('hello')"))["type"] == "published"
        assert "post" in tab.site.asked
        code = await tab.run("ws.call('double').catch((error) => error.code)")
        assert code in ("not_supported", "invalid_arguments")  # as the other side knows methods
        for _ in range(2):
            tab.site.proxy.reset()
            await tab.gets_ticks()
        await tab.lost_nothing()
        tab.site.blocks_upgrades = False

        async def is_back() -> bool:
            return bool(tab.site.manager.connections)

        await eventually(is_back, 8 * after("STEADY") + SPARE)
        await tab.gets_ticks()
        await tab.lost_nothing()


@pytest.mark.parametrize("held_back", ["all", "body"])
async def test_events_that_are_held_back_are_gone_around_by_polls(tmp_path: Path, held_back: str) -> None:
    async with a_tab(tmp_path, starts=False) as tab:
        tab.site.blocks_upgrades = True
        tab.site.holds_back = held_back
        await tab.start()
        await tab.gets_ticks(within=after("FIRST_BYTE_TIMEOUT") + SPARE)
        assert tab.site.asked.count("poll") > 1
        await tab.lost_nothing()
        assert (await tab.run("ws.publish('hello')"))["type"] == "published"
        tab.site.blocks_upgrades = False
        tab.site.holds_back = ""

        async def is_back() -> bool:
            return bool(tab.site.manager.connections)

        await eventually(is_back, 8 * after("STEADY") + SPARE)
        await tab.gets_ticks()


def all_but_secret(connection: object, action: str, channel: str | None) -> bool:
    return channel != "secret"


async def test_stream_has_further_channels_and_ends_with_a_code(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False, inbound="commands", authorize=all_but_secret) as tab:
        tab.site.blocks_upgrades = True
        await tab.start()
        await tab.gets_ticks()
        assert (await tab.run("ws.subscribe('room:2')"))["channel"] == "room:2"
        assert await tab.run("ws.subscribe('secret').catch((error) => error.code)") == "forbidden"
        await tab.gets_ticks()
        await tab.lost_nothing()
        await close_all(tab.site, 4403)
        await tab.becomes("closed", 2 * SPARE)
        assert (await tab.told())["closed"] == {"code": 4403, "reason": "because"}


async def test_token_goes_along_over_http(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False, authenticates=True) as tab:
        tab.site.blocks_upgrades = True
        await tab.start(token=True)
        await tab.gets_ticks()
        assert "sse" in tab.site.asked
        await tab.lost_nothing()


async def test_server_without_http_is_asked_by_websocket_again(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False) as tab:
        tab.site.has_http = False
        tab.site.blocks_upgrades = True
        await tab.start()

        async def tried() -> bool:
            return tab.site.asked.count("ws") >= 4

        await eventually(tried, 2 * SPARE)
        tab.site.blocks_upgrades = False
        await tab.gets_ticks()


# Who is there.

HERE = Presence(grace=0.2, members_up_to=3, info=lambda connection: {"name": str(connection.user)})


@pytest.fixture
def tells_often(monkeypatch: pytest.MonkeyPatch) -> None:
    if not FULL:
        monkeypatch.setattr(watching, "_TELL_SECONDS", 0.1)


class Others:
    """Other users, who come and go on the server."""

    def __init__(self, tab: Tab) -> None:
        self._tab = tab
        self._peers: dict[str, Peer] = {}

    async def come(self, *names: str, channel: str = "room:1") -> None:
        for name in names:
            self._peers[name] = Peer()
            await self._tab.site.manager.connect(self._peers[name].websocket, user=name, channels=[channel])

    def go(self, *names: str) -> None:
        for name in names:
            self._tab.site.manager.disconnect(self._peers.pop(name).websocket)

    async def are_seen(self, count: int, *names: str, of: str = "") -> None:
        """Wait until the page sees so many, and these of them."""

        async def is_so() -> bool:
            script = f"(() => {{ const all = ws.members({of}); return [all.count, [...all.keys()].sort()] }})()"
            return bool(await self._tab.run(script) == [count, sorted(names)])

        await eventually(is_so, 3 * SPARE)


watches = pytest.mark.usefixtures("tells_often")


@watches
async def test_list_of_members_is_kept_right(tmp_path: Path) -> None:
    async with a_tab(tmp_path, presence=HERE, authenticates=True, token=True) as tab:
        others = Others(tab)
        await others.come("bob")
        await others.are_seen(2, "ada", "bob")
        assert await tab.run("ws.members().get('bob').info") == {"name": "bob"}
        assert await tab.run("ws.members() === ws.members('room:1')") is True
        await others.come("eve")
        await others.are_seen(3, "ada", "bob", "eve")
        await others.come("dan")
        await others.are_seen(4)  # more than are named
        others.go("bob", "eve")
        await others.are_seen(2, "ada", "dan")
        kinds = {frozenset(event) for event in (await tab.told())["presence"]}
        assert len(kinds) == 3  # lists, changes and numbers
        await tab.lost_nothing()
        assert (await tab.told())["errors"] == []


@watches
async def test_list_is_right_after_what_was_cut_off(tmp_path: Path) -> None:
    async with a_tab(tmp_path, presence=HERE, authenticates=True, token=True) as tab:
        others = Others(tab)
        await others.come("bob")
        await others.are_seen(2, "ada", "bob")
        for name in ("eve", "dan"):
            tab.site.proxy.black_hole()
            await others.come(name)
            tab.site.proxy.reset()
            tab.site.proxy.heal()
            await others.are_seen(3, "ada", "bob", name)
            others.go(name)
        await others.are_seen(2, "ada", "bob")
        await tab.site.restart()
        await others.come("joe")
        await others.are_seen(2, "ada", "joe")
        await tab.lost_nothing()


@watches
async def test_list_of_a_client_that_was_sent_too_much_is_asked_for_again(tmp_path: Path) -> None:
    async with a_tab(tmp_path, presence=HERE, authenticates=True, token=True) as tab:
        others = Others(tab)
        await others.are_seen(1, "ada")
        (connection,) = tab.site.manager.connections
        change = {"version": 1000, "previous": 999, "count": 2, "joined": [{"user": "x"}], "left": []}
        core_of(tab.site.manager).say(connection, Message.json({"type": "presence", "channel": "room:1", **change}))
        await others.come("bob")
        await others.are_seen(2, "ada", "bob")
        lists = [event for event in (await tab.told())["presence"] if "members" in event]
        assert len(lists) == 2


@watches
async def test_list_is_asked_for_again_when_the_broker_was_away(tmp_path: Path) -> None:
    async with a_tab(tmp_path, presence=HERE, authenticates=True, token=True) as tab:
        await Others(tab).are_seen(1, "ada")
        (connection,) = tab.site.manager.connections
        unavailable = {"type": "error", "code": "unavailable", "text": "try again later"}
        core_of(tab.site.manager).say(connection, Message.json(unavailable))

        async def is_told_again() -> bool:
            return sum("members" in event for event in (await tab.told())["presence"]) == 2

        await eventually(is_told_again, after("STEADY") + SPARE)
        assert (await tab.told())["errors"] == ["unavailable"]


@watches
async def test_members_of_a_further_channel(tmp_path: Path) -> None:
    options: dict[str, Any] = {"inbound": "commands", "authorize": all_but_secret}
    async with a_tab(tmp_path, presence=HERE, authenticates=True, token=True, **options) as tab:
        others = Others(tab)
        await tab.run("ws.subscribe('room:2').then(() => {})")
        await others.are_seen(1, "ada", of="'room:2'")
        await others.come("bob", channel="room:2")
        await others.are_seen(2, "ada", "bob", of="'room:2'")
        await others.are_seen(1, "ada")
        tab.site.proxy.reset()
        await others.come("eve", channel="room:2")
        await others.are_seen(3, "ada", "bob", "eve", of="'room:2'")
        await tab.run("ws.unsubscribe('room:2')")
        await tab.run("ws.members('secret')")

        async def is_told() -> bool:
            return bool((await tab.told())["errors"] == ["forbidden"])

        await eventually(is_told)


@watches
@pytest.mark.parametrize("held_back", ["", "all"])
async def test_list_over_http(tmp_path: Path, held_back: str) -> None:
    async with a_tab(tmp_path, starts=False, presence=HERE, authenticates=True) as tab:
        tab.site.blocks_upgrades = True
        tab.site.holds_back = held_back
        await tab.start(token=True)
        others = Others(tab)
        await others.are_seen(1, "ada")
        await others.come("bob")
        await others.are_seen(2, "ada", "bob")
        others.go("bob")
        await others.are_seen(1, "ada")
        assert tab.site.asked[-1] == ("poll" if held_back else "sse")
        tab.site.holds_back, tab.site.blocks_upgrades = "", False

        async def is_back() -> bool:
            return tab.site.asked[-1] == "ws"

        await eventually(is_back, 16 * after("STEADY") + SPARE)
        await others.come("eve")
        await others.are_seen(2, "ada", "eve")


async def test_plain_connection_has_no_list(tmp_path: Path) -> None:
    async with a_tab(tmp_path, starts=False) as tab:
        await tab.start(plain=True)
        await tab.becomes("open")
        assert await tab.run("[ws.members().size, ws.members().count]") == [0, None]
