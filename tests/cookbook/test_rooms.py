"""The recipes of one process, on a real server, in a real browser."""

from __future__ import annotations

import asyncio
import json

import httpx2
from playwright.async_api import Page, expect
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from tests.cookbook.conftest import PATIENCE_MS, RECIPES, Studio
from tests.support.examples import load
from tests.support.programs import needs_browser
from tests.support.rawclient import RawClient
from tests.support.servers import eventually, serve_here

pytestmark = needs_browser

expect.set_options(timeout=PATIENCE_MS)


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")


async def test_chat_keeps_what_was_said_and_shows_who_is_there(studio: Studio) -> None:
    example = load(RECIPES / "chat.py")
    gone = []

    @example.manager.on_left  # type: ignore[untyped-decorator]
    async def left(channel: str, user: str) -> None:
        gone.append((channel, user))

    async with serve_here(example.app) as port:
        url = f"http://127.0.0.1:{port}/"
        ada, bob = await studio.open(f"{url}?user=ada"), await studio.open(f"{url}?user=bob")
        await expect(ada.locator("#members li")).to_have_text(["ada", "bob"])
        lines = ["ada: Is there any tea left?", "bob: A whole pot. It is on the third floor."]
        await say(ada, lines[0].partition(": ")[2])
        await expect(bob.locator("#messages li")).to_have_text(lines[:1])
        await say(bob, lines[1].partition(": ")[2])
        for page in (ada, bob):
            await expect(page.locator("#messages li")).to_have_text(lines)

        await studio.take("chat", {"Ada": ada, "Bob": bob})

        # Another tab of the same user is no other member, and has what was said before.
        tab = await studio.open(f"{url}?user=ada", beside=ada)
        await expect(tab.locator("#messages li")).to_have_text(lines)
        await expect(tab.locator("#members li")).to_have_text(["ada", "bob"])
        await expect(tab.locator("#count")).to_have_text("2")

        # Who is cut off, and who reloads, has missed nothing.
        for connection in list(example.manager.connections):
            if connection.user == "ada":
                await example.manager.close(connection, 1012)
        lines.append("bob: <b>Hurry!</b>")
        await say(bob, lines[-1].partition(": ")[2])
        await bob.reload()
        for page in (ada, bob, tab):
            await expect(page.locator("#messages li")).to_have_text(lines)
        await tab.close()

        assert ("room:tea", "bob") not in gone
        await example.manager.close_user("bob")
        await expect(ada.locator("#members li")).to_have_text(["ada"])
        assert gone.count(("room:tea", "bob")) == 1


async def test_chat_lets_nobody_speak_in_a_room_that_they_are_not_in() -> None:
    async with (
        serve_here(load(RECIPES / "chat.py").app) as port,
        connect(f"ws://127.0.0.1:{port}/ws/tea?user=grace", subprotocols=[Subprotocol("wsbroadcast.v1")]) as grace,
    ):
        for args, code in (
            ({"room": "coffee", "text": "hi"}, "forbidden"),
            ({"room": "tea", "text": ""}, "invalid_arguments"),
        ):
            await grace.send(json.dumps({"type": "call", "id": code, "name": "say", "args": args}))
            while (event := json.loads(await grace.recv())).get("id") != code:
                pass
            assert event["code"] == code


async def test_notifications_are_counted_alike_in_all_tabs_and_after_a_reload(studio: Studio) -> None:
    example = load(RECIPES / "notifications.py")

    async def shows(page: Page, unread: int, *texts: str) -> None:
        await expect(page.locator("#unread")).to_have_text(str(unread))
        await expect(page).to_have_title(f"({unread}) Notifications" if unread else "Notifications")
        await expect(page.locator("li")).to_have_text(texts)

    async with serve_here(example.app) as port:
        url = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(example.notify, "ada", "Your parcel is on its way.")  # nobody is there
        ada = await studio.open(f"{url}/login/ada", size=(420, 330))
        tab = await studio.open(f"{url}/", beside=ada, size=(420, 330))
        bob = await studio.open(f"{url}/login/bob")
        for page in (ada, tab):
            await shows(page, 1, "Your parcel is on its way.")
        await ada.get_by_role("button").click()
        for page in (ada, tab):
            await shows(page, 0, "Your parcel is on its way.")
        texts = ["Your parcel has arrived.", "Bob wrote to you.", "Your parcel is on its way."]
        for text in reversed(texts[:2]):
            await asyncio.to_thread(example.notify, "ada", text)
        for page in (ada, tab):
            await shows(page, 2, *texts)
        await studio.take("notifications", {"A tab of Ada's": ada, "Another one": tab})
        await tab.reload()
        for connection in list(example.manager.connections):
            await example.manager.close(connection, 1012)
        texts.insert(0, "Tea is ready.")
        await asyncio.to_thread(example.notify, "ada", texts[0])  # they are away
        for page in (ada, tab):
            await shows(page, 3, *texts)
        await asyncio.to_thread(example.notify, "bob", "Ada is away.")
        await shows(bob, 1, "Ada is away.")
        await tab.get_by_role("button").click()
        await tab.reload()
        for page in (ada, tab):
            await shows(page, 0, *texts)
        await shows(bob, 1, "Ada is away.")
        stranger = await studio.open(f"{url}/")
        assert await stranger.evaluate("fetch('notifications').then(({ status }) => status)") == 401


async def test_dashboard_shows_the_newest_reading_of_each_machine(studio: Studio) -> None:
    example = load(RECIPES / "dashboard.py")
    async with serve_here(example.app) as port:
        await example.measured("spare", 1.5)
        first = await studio.open(f"http://127.0.0.1:{port}/")
        await expect(first.locator("tr", has_text="spare")).to_contain_text("1.5 %")
        second = await studio.open(f"http://127.0.0.1:{port}/")
        await expect(second.locator("tr", has_text="web-8")).to_contain_text("%")
        await example.measured("spare", 88.5)
        for page in (first, second):
            await expect(page.locator("tr", has_text="spare")).to_contain_text("88.5 %")
            await page.wait_for_function("Number(document.querySelector('#count').textContent) > 400")
        await studio.take("dashboard", {"A tab": first, "Another one": second})


async def test_dashboard_sends_a_slow_client_the_newest_of_each_and_not_the_rest() -> None:
    example = load(RECIPES / "dashboard.py")
    async with serve_here(example.app) as port:
        slow = await RawClient.connect(port, "/ws/load", receive_buffer=4096)
        try:
            machine, sent = "x" * 20_000, 0  # its readings fill what the system holds for a connection

            async def some_were_replaced() -> bool:
                nonlocal sent
                sent += 1
                await example.measured(machine, float(sent))
                return bool(example.manager.stats().dropped.get("conflate", 0) > 100)

            await eventually(some_were_replaced, timeout=60)
            got: list[float] = []
            while not got or got[-1] < sent:
                got += [load for name, load in json.loads(await slow.receive_text()).items() if name == machine]
            assert got == sorted(set(got))
            assert len(got) < sent
            assert example.manager.stats().evicted == {}
        finally:
            slow.close()


async def test_cursors_follow_the_mouse_and_go_with_their_tab(studio: Studio) -> None:
    example = load(RECIPES / "cursors.py")
    async with serve_here(example.app) as port:
        url = f"http://127.0.0.1:{port}/?user="
        ada, bob, grace = [await studio.open(url + user, size=(420, 300)) for user in ("ada", "bob", "grace")]
        for page in (ada, bob, grace):
            await expect(page.locator("#count")).to_have_text("3")
        for page, x, y in ((ada, 105, 110), (bob, 210, 220), (grace, 315, 150)):
            await page.mouse.move(x, y)
        await expect(ada.locator(".cursor")).to_have_text(["bob", "grace"])
        await expect(bob.locator(".cursor")).to_have_text(["ada", "grace"])
        seen = bob.locator(".cursor", has_text="ada")
        assert await seen.evaluate("(cursor) => cursor.style.left") == "25%"
        colours = "() => [...document.querySelectorAll('.cursor')].map((each) => each.style.background)"
        assert len(set(await bob.evaluate(colours))) == 2
        await studio.take("cursors", {"Ada": ada, "Bob": bob})

        # A user's second tab has a cursor of its own, in the same colour.
        tab = await studio.open(f"{url}ada", size=(420, 300))
        await expect(bob.locator("#count")).to_have_text("4")
        await tab.mouse.move(42, 200)
        await expect(bob.locator(".cursor", has_text="ada")).to_have_count(2)
        backgrounds = await bob.locator(".cursor", has_text="ada").evaluate_all(
            "(all) => all.map((c) => c.style.background)"
        )
        assert len(set(backgrounds)) == 1

        # However often the mouse moves, little is sent, and the last place is among it.
        before = example.manager.stats().broadcasts
        await tab.evaluate(
            """() => {
              const board = document.querySelector("main"), { left, top, width, height } = board.getBoundingClientRect()
              for (let step = 0; step <= 1000; step++) {
                const where = { clientX: left + (width * step) / 1000, clientY: top + height / 2 }
                board.dispatchEvent(new PointerEvent("pointermove", where))
              }
            }"""
        )
        await expect(bob.locator('.cursor[style*="left: 100%"]')).to_have_text("ada")
        assert 1 <= example.manager.stats().broadcasts - before <= 2

        await tab.close()
        await grace.close()
        await expect(bob.locator(".cursor")).to_have_text(["ada"])
        await expect(ada.locator(".cursor")).to_have_text(["bob"])


async def test_stock_tells_what_was_committed_and_nothing_else(studio: Studio) -> None:
    example = load(RECIPES / "stock.py")
    async with serve_here(example.app) as port:
        url = f"http://127.0.0.1:{port}/"
        first, second = [await studio.open(url, size=(420, 260)) for _ in range(2)]

        async def shows(teapots: int) -> None:
            for page in (first, second):
                await expect(page.locator("tr", has_text="Teapot")).to_contain_text(f"{teapots} left")

        buy = first.locator("tr", has_text="Teapot").get_by_role("button")
        for left in (2, 1, 0):
            await buy.click()
            await shows(left)
        told = example.manager.stats().broadcasts
        await buy.click()
        await expect(first.get_by_role("status")).to_have_text("sold out")
        await studio.take("stock", {"Who buys": first, "Who looks on": second})
        await shows(0)
        assert example.manager.stats().broadcasts == told == 3
        with example.Session(example.engine) as session:
            assert len(session.exec(example.select(example.Order)).all()) == 3


async def test_stock_is_not_sold_twice_by_orders_at_the_same_time() -> None:
    example = load(RECIPES / "stock.py")
    async with serve_here(example.app) as port, example.manager.listen("products") as told:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            answers = await asyncio.gather(*(client.post("/orders?product=1") for _ in range(8)))
            assert sorted(answer.status_code for answer in answers) == [204] * 3 + [409] * 5
            assert (await client.post("/orders?product=77")).status_code == 404
        assert sorted([(await anext(told)).data["stock"] for _ in range(3)]) == [0, 1, 2]
        assert example.manager.stats().broadcasts == 3


async def test_stock_waits_for_the_commit_and_forgets_what_a_savepoint_takes_back() -> None:
    example = load(RECIPES / "stock.py")
    async with serve_here(example.app), example.manager.listen("products") as told:
        with example.Shop(example.engine) as session:
            pot, cup = session.get(example.Product, 1), session.get(example.Product, 2)
            pot.stock = 7
            session.flush()
            with session.begin_nested():  # a savepoint that stays
                cup.stock = 70
            taken_back = session.begin_nested()
            pot.stock = 99
            with session.begin_nested():  # stays in one that doesn't
                cup.stock = 99
            taken_back.rollback()
            assert example.manager.stats().broadcasts == 0
            session.commit()
            pot.stock = 1
            session.flush()
            session.rollback()
            cup.stock = 71
            session.commit()
        got = [(await anext(told)).data for _ in range(3)]
        assert [(each["name"], each["stock"]) for each in got] == [("Teapot", 7), ("Cup", 70), ("Cup", 71)]
        assert example.manager.stats().broadcasts == 3
