"""Clients of the Centrifuge SDKs in programs of their own, from npm and PyPI, and the suite that one of them brings."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.async_api import Page, async_playwright

from tests.support.centrifuge_site import check_frames, token
from tests.support.npm import SCRIPTS, installed, needs_npm, once, program, run, started
from tests.support.programs import BROWSER, needs_browser
from tests.support.servers import eventually

JS = ("centrifuge@5.8.0", "ws@8")
PYTHON = "centrifuge-python==0.7.0"

SUITE_PORT = 8000
"""Where the suite of the Python SDK looks for its server."""

BROWSER_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]

# What a busy machine may need.
PATIENCE = 60.0

# What a connection of the suite takes at least, and for how long it waits for others that have asked something.
_HANDSHAKE_SECONDS = 0.15
_OTHERS_SECONDS = 3.0
_SUITE_SECONDS = 200.0


def python_sdk(factory: pytest.TempPathFactory) -> Path:
    """Install the SDK for Python with what it needs, and unpack its source beside it, which has its suite."""

    def install(directory: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        run([*pip, "install", "--target", "site", PYTHON], directory)
        # To build nothing is needed but hatchling, which is there.
        run(
            [*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", ".", PYTHON],
            directory,
        )
        [source] = directory.glob("*.tar.gz")
        with tarfile.open(source) as archive:
            archive.extractall(directory, filter="data")

    return once(factory, "pip-" + PYTHON, install)


def suite_of(sdk: Path) -> Path:
    """Return where the suite of the Python SDK is run."""
    [source] = [each for each in sdk.glob("centrifuge_python-*") if each.is_dir()]
    return source


class Asks(Protocol):
    """A program or a page with clients."""

    async def ask(self, do: str, tab: str = "", **options: Any) -> Any:
        """Tell it what to do; return what it answers."""
        ...


class BrowserPage:
    """A page with clients."""

    def __init__(self, page: Page) -> None:
        self._page = page

    async def ask(self, do: str, tab: str = "", **options: Any) -> Any:
        """Tell it what to do; return what it answers."""
        return await self._page.evaluate("([what, tab, options]) => all[what](tab, options)", [do, tab, options])


@asynccontextmanager
async def browser_page(factory: pytest.TempPathFactory, url: str) -> AsyncIterator[BrowserPage]:
    """Open a page of a server's own origin, and give it the SDK as it is for browsers, and what tests tell it to do."""
    packages = installed(factory, *JS) / "node_modules" / "centrifuge" / "dist"
    script = (SCRIPTS / "centrifuge.mjs").read_text(encoding="utf-8").replace("export const", "const")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BROWSER, args=BROWSER_ARGUMENTS)
        page = await browser.new_page()
        await page.goto(url)
        await page.add_script_tag(path=packages / "centrifuge.js")
        await page.add_script_tag(content="window.Json = Centrifuge")
        await page.add_script_tag(path=packages / "centrifuge.protobuf.js")
        await page.add_script_tag(
            content=f"{script}\nwindow.all = actions({{ Json, Protobuf: Centrifuge, WebSocket }})"
        )
        yield BrowserPage(page)
        await browser.close()


@asynccontextmanager
async def clients(kind: str, factory: pytest.TempPathFactory, url: str) -> AsyncIterator[Asks]:
    """Run a program or a page with clients, of `js`, `python` or `chromium`; the page has the origin of the URL."""
    if kind == "chromium":
        async with browser_page(factory, url) as page:
            yield page
        return
    if kind == "js":
        async with program(installed(factory, *JS), "centrifuge_node.mjs", "centrifuge.mjs") as node:
            yield node
        return
    directory = python_sdk(factory)
    environment = {"PYTHONPATH": str(directory / "site")}
    script = str(SCRIPTS / "centrifuge_sdk.py")
    async with started(sys.executable, script, directory=directory, environment=environment) as python:
        yield python


class Tab:
    """One client of a program."""

    def __init__(self, node: Asks, name: str, **options: Any) -> None:
        self._node = node
        self._name = name
        self._options = options

    async def __call__(self, do: str, **options: Any) -> Any:
        if do == "open":
            options = self._options | options
        return await self._node.ask(do, self._name, **options)

    async def log(self, *events: str) -> list[dict[str, Any]]:
        """Return what it was told, all of it or some events."""
        told: list[dict[str, Any]] = (await self("look"))["log"]
        return [each for each in told if not events or each["on"] in events]

    async def until(self, is_so: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Wait until a look at it is as a test wants it, and return that."""
        seen: dict[str, Any] = {}

        async def looked() -> bool:
            seen.update(await self("look"))
            return bool(is_so(seen))

        try:
            await eventually(looked, PATIENCE)
        except AssertionError:
            pytest.fail(f"it never came: {json.dumps(seen, indent=1)}")
        return seen

    async def hears(self, event: str, times: int = 1, **fields: Any) -> dict[str, Any]:
        """Wait until it was told something so many times; return the last of them."""

        def found(seen: dict[str, Any]) -> list[dict[str, Any]]:
            return [
                each
                for each in seen["log"]
                if each["on"] == event and all(each.get(name) == value for name, value in fields.items())
            ]

        return found(await self.until(lambda seen: len(found(seen)) >= times))[-1]

    async def data(self, channel: str) -> list[Any]:
        """Return what was published in a channel, as far as it was told of."""
        return [each["data"] for each in await self.log("publication") if each["channel"] == channel]


class Clients:
    """Clients of one SDK, each in a tab."""

    def __init__(self, kind: str, factory: pytest.TempPathFactory) -> None:
        self.sdk, _, self.form = kind.partition("-")
        self._factory = factory
        self._stack = AsyncExitStack()
        self._tabs: list[Tab] = []

    async def open(self, url: str, name: str = "a", **options: Any) -> Tab:
        """Open a client; it connects unless it is told not to."""
        if not self._tabs:
            origin = url.replace("ws://", "http://").partition("/connection")[0]
            self._program = await self._stack.enter_async_context(clients(self.sdk, self._factory, origin))
        options.setdefault("tokens", [token()])
        tab = Tab(self._program, name, url=url, protobuf=bool(self.form), **options)
        self._tabs.append(tab)
        await tab("open")
        return tab

    async def aclose(self) -> None:
        """Check what they were sent, and end them."""
        if self.sdk != "python" and not self.form:
            for tab in self._tabs:
                check_frames((await tab("look"))["frames"])
        await self._stack.aclose()


@asynccontextmanager
async def some(kind: str, factory: pytest.TempPathFactory) -> AsyncIterator[Clients]:
    """Have clients of one SDK in one form."""
    found = Clients(kind, factory)
    try:
        yield found
    finally:
        await found.aclose()


KINDS = [
    pytest.param("js", marks=needs_npm),
    pytest.param("js-protobuf", marks=needs_npm),
    "python",
    "python-protobuf",
]

IN_A_BROWSER = [
    pytest.param("chromium", marks=[needs_npm, needs_browser]),
    pytest.param("chromium-protobuf", marks=[needs_npm, needs_browser]),
]

everywhere = pytest.mark.parametrize("sdk", KINDS, indirect=True)
also_in_a_browser = pytest.mark.parametrize("sdk", [*KINDS, *IN_A_BROWSER], indirect=True)
in_javascript = pytest.mark.parametrize("sdk", KINDS[:2], indirect=True)
in_json = pytest.mark.parametrize("sdk", KINDS[:1], indirect=True)


# The suite.


@asynccontextmanager
async def suite_port(server: int) -> AsyncIterator[None]:
    """Lead from the port that the suite wants to that of a server; one at a time among all runs on this machine.

    A connection is led through after a moment, as over a network, and when the other ones have been answered;
    everything else at once. Some tests of the suite subscribe with one client, connect another, and take it that the
    first has its answer by then.
    """
    pipes: set[asyncio.Task[None]] = set()
    asking: set[asyncio.StreamReader] = set()

    async def others_are_answered() -> bool:
        return not asking

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        with suppress(AssertionError):
            await eventually(others_are_answered, _OTHERS_SECONDS)
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", server)

        async def ask() -> None:
            await _pipe(reader, to_writer, lambda: asking.add(reader))
            asking.discard(reader)

        for each in (ask(), _pipe(to_reader, writer, lambda: asking.discard(reader))):
            pipes.add(asyncio.create_task(each))

    async def listens() -> asyncio.Server | None:
        try:
            return await asyncio.start_server(lead, "127.0.0.1", SUITE_PORT)
        except OSError:  # another run is there, or something else
            return None

    door: asyncio.Server = await eventually(listens, _SUITE_SECONDS)
    try:
        async with door:
            yield
    finally:
        for pipe in pipes:
            pipe.cancel()
        await asyncio.gather(*pipes, return_exceptions=True)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: Callable[[], None]) -> None:
    try:
        while data := await reader.read(1 << 16):
            passes()
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def run_suite(sdk: Path, *arguments: str, seconds: float = 240.0) -> str:
    """Run the suite of the Python SDK as it is; return what unittest has written."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unittest", *(arguments or ("discover", "-s", "tests"))),
        cwd=suite_of(sdk),
        env=os.environ | {"PYTHONPATH": str(sdk / "site")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, output = await asyncio.wait_for(process.communicate(), seconds)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output.decode(errors="replace")
