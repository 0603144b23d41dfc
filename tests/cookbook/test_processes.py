"""The recipes of several processes: a worker of Celery, a database, four workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from playwright.async_api import Page, expect

from tests.cookbook.conftest import PATIENCE_MS, RECIPES, Studio
from tests.support.brokers import Endpoint
from tests.support.examples import EXAMPLES, load
from tests.support.programs import needs_browser
from tests.support.servers import UVICORN, Server, eventually, serve_here

pytestmark = needs_browser

expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def celery_worker(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the worker as the page of the recipe says, in the directory that the app runs in."""
    command = [sys.executable, "-m", "celery", "-A", "progress:tasks", "worker", "--concurrency", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(RECIPES), *filter(None, sys.path)))}
    with (directory / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield worker
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


async def test_progress_of_a_worker_survives_a_reload_and_comes_to_its_end(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("celery")
    example = load(RECIPES / "progress.py")
    async with serve_here(example.app) as port:
        with celery_worker(tmp_path):
            page = await studio.open(f"http://127.0.0.1:{port}/", size=(420, 260))
            await page.get_by_role("button").click()
            await page.wait_for_function("document.querySelector('progress').position >= 0.25")
            other = await studio.open(page.url, size=(420, 260))
            await other.wait_for_function("document.querySelector('progress').position >= 0.3")
            await studio.take("progress", {"Who started it": page, "Who has the link": other})
            await page.reload()
            # It is where it was, without a message from the worker.
            await page.wait_for_function("document.querySelector('progress').position >= 0.25")
            for each in (page, other):
                await expect(each.get_by_role("status")).to_have_text("Your report is ready.")
            late = await studio.open(page.url)
            await expect(late.get_by_role("status")).to_have_text("Your report is ready.")
            stranger = await studio.open(f"http://127.0.0.1:{port}/#guessed")
            await expect(stranger.get_by_role("status")).to_have_text("There is no such report.")


async def test_progress_of_a_job_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("celery")
    example: Any = load(RECIPES / "progress.py")

    def fail(seconds: float) -> None:
        raise RuntimeError("no paper")

    async with serve_here(example.app), example.manager.listen("job:1") as told:
        with monkeypatch.context() as patched, example.publisher:
            patched.setattr(example.time, "sleep", fail)
            with pytest.raises(RuntimeError, match="no paper"):
                await asyncio.to_thread(example.build_report, "1")
        assert (await anext(told)).data == {"error": "it failed"}  # and not why


@pytest.fixture
async def database(postgres_server: Endpoint) -> str:
    """The URL of a database that only this test uses."""
    name = f"cookbook_{uuid4().hex[:12]}"
    connection = await asyncpg.connect(postgres_server.url)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return f"{postgres_server.url.rpartition('/')[0]}/{name}"


async def test_trigger_tells_pages_what_any_program_has_committed(
    studio: Studio, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database)
    example = load(RECIPES / "postgres_trigger.py")

    async def shows(page: Page, *rows: str) -> None:
        await expect(page.locator("tr")).to_have_text(rows)

    async with serve_here(example.app) as port:
        program: Any = await asyncpg.connect(database)  # another one, that knows nothing of the app
        try:
            await program.execute("INSERT INTO orders (item) VALUES ('teapot')")
            first = await studio.open(f"http://127.0.0.1:{port}/", size=(420, 260))
            second = await studio.open(f"http://127.0.0.1:{port}/", size=(420, 260))
            for page in (first, second):
                await shows(page, "1teapotnew")
            rolled_back = program.transaction()
            await rolled_back.start()
            await program.execute("INSERT INTO orders (item) VALUES ('never')")
            await rolled_back.rollback()
            await program.execute("INSERT INTO orders (item) VALUES ('cup'), ('<b>spoon</b>')")
            await program.execute("UPDATE orders SET state = 'sent' WHERE item = 'teapot'")
            for page in (first, second):
                await shows(page, "1teapotsent", "3cupnew", "4<b>spoon</b>new")

            # A page that was cut off gets what was written meanwhile.
            for connection in list(example.manager.connections):
                await example.manager.close(connection, 1012)
            await program.execute("UPDATE orders SET item = 'spoon' WHERE id = 4")
            await program.execute("UPDATE orders SET state = 'packed' WHERE id = 3")
            for page in (first, second):
                await shows(page, "1teapotsent", "3cuppacked", "4spoonnew")
            await studio.take("postgres-trigger", {"A tab": first, "Another one": second})
            await program.execute("DELETE FROM orders WHERE id = 1")
            for page in (first, second):
                await shows(page, "3cuppacked", "4spoonnew")
        finally:
            await program.close()


async def test_four_workers_tell_each_others_pages_and_survive_one_of_them(studio: Studio, tmp_path: Path) -> None:
    flavour = replace(
        UVICORN,
        name="uvicorn --workers 4",
        arguments=("--workers", "4", "--timeout-worker-healthcheck", "60", *UVICORN.arguments),
        environment={"BROKER_URL": f"sqlite:///{tmp_path}/workers.db"},
    )
    server = Server(flavour, tmp_path / "server.log", "examples.cookbook.four_workers:app", identifies_itself=False)
    await asyncio.to_thread(server.__enter__)
    try:
        await _talk_on(server, studio)
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def _talk_on(server: Server, studio: Studio) -> None:
    size = (460, 300)
    pages = [await studio.open(f"http://127.0.0.1:{server.port}/", size=size)]

    async def workers() -> Counter[str]:
        """How many pages each worker has, as soon as all of them are counted."""
        await pages[0].wait_for_function(
            "(count) => [...document.querySelector('#tabs').textContent.matchAll(/(\\d+) on/g)]"
            ".reduce((sum, [, each]) => sum + Number(each), 0) === count",
            arg=len(pages),
        )
        text = await pages[0].locator("#tabs").inner_text()
        return Counter({worker: int(count) for count, worker in (part.split(" on ") for part in text.split(", "))})

    while len(pages) < 4 or len(await workers()) < 2:  # the system gives a connection to whichever worker is first
        assert len(pages) < 30
        pages.append(await studio.open(f"http://127.0.0.1:{server.port}/", size=size))
    for page, text in zip(pages, ("Who is on which worker?", "It makes no difference.", "Right."), strict=False):
        await page.get_by_label("Message").fill(text)
        await page.get_by_label("Message").press("Enter")
        await expect(pages[0].locator("li", has_text=text)).to_have_count(1)
    said = await pages[0].locator("li").all_inner_texts()
    assert len(said) == 3
    for page in pages:
        await expect(page.locator("li")).to_have_text(said)
    await studio.take("four-workers", {"A tab": pages[0], "Another one": pages[1]})

    found = await workers()
    os.kill(int(min(found, key=lambda worker: found[worker])), signal.SIGKILL)
    for number in range(5):
        await eventually(lambda number=number: _said(server, f"after {number}"), timeout=30)  # type: ignore[misc]
    for page in pages:  # those of the one that was killed have gone to another, and have missed nothing
        await expect(page.locator("li", has_text="after")).to_contain_text([f"after {number} (" for number in range(5)])


async def _said(server: Server, text: str) -> bool:
    try:
        await server.post(f"/say?text={text.replace(' ', '%20')}")
    except (OSError, ValueError):  # it was the worker that is gone
        return False
    return True


async def test_answer_is_the_same_in_two_tabs_over_a_reload_and_a_stop(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # the app says the question back
    example: Any = load(EXAMPLES / "20_answers.py")
    example.LONG *= 10  # so that it isn't over before somebody stops it
    async with serve_here(example.app) as port:
        first = await studio.open(f"http://127.0.0.1:{port}/")
        await first.get_by_label("Question").fill("Is there any tea left?")
        await first.get_by_label("Question").press("Enter")
        await expect(first.locator("#answer")).to_contain_text("Reload this page now")
        second = await studio.open(first.url, beside=first)
        await expect(second.locator("#answer")).to_contain_text("nothing is lost. That is")
        await studio.take("answers", {"A tab": first, "Another one": second})
        await first.reload()
        await second.get_by_role("button", name="Stop").click()
        for page in (first, second):
            await expect(page.get_by_role("status")).to_have_text("cancelled")
        text = await first.locator("#answer").inner_text()
        assert text.startswith("You have asked: Is there any tea left? That is a good question")
        assert await second.locator("#answer").inner_text() == text
