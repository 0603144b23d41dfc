"""How connections of the Centrifuge SDKs end, and whether the SDKs come back; and those that are silent."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from tests.support.centrifuge_sdks import Clients, also_in_a_browser, in_javascript, in_json
from tests.support.centrifuge_site import site
from tests.support.servers import eventually

ENDS = {
    # What an app closes with: what the client is told, and whether it comes back.
    1000: (3503, False),
    1001: (3001, True),
    1008: (3503, False),
    1011: (3004, True),
    1012: (3001, True),
    1013: (3008, True),
    4401: (3500, False),
    4403: (3507, False),
    4200: (4200, True),
    4700: (4700, False),
}


@also_in_a_browser
async def test_clients_come_back_or_not_as_the_code_says(sdk: Clients) -> None:
    async with site() as here:
        for number, (code, (told, comes_back)) in enumerate(ENDS.items()):
            tab = await sdk.open(here.url, f"tab {number}")
            await tab.hears("connected")
            for connection in here.manager.connections:
                await connection.close(code, "")
            if comes_back:
                await tab.hears("connecting", code=told)
                await tab.hears("connected", 2)
                await tab("disconnect")
            else:
                await tab.hears("disconnected", code=told)

            async def is_empty() -> bool:
                return not here.manager.connections

            await eventually(is_empty)


@in_javascript
async def test_reason_that_is_json_misleads_nobody(sdk: Clients) -> None:
    async with site() as here:
        for number, reason in enumerate(["true", "1013", '{"reconnect": false}', '"x"', " ", "\n"]):
            tab = await sdk.open(here.url, f"tab {number}")
            await tab.hears("connected")
            await here.manager.close_user("42", code=4200, reason=reason)
            await tab.hears("connected", 2)
            await tab("disconnect")


# What is silent.


@in_javascript
async def test_client_that_answers_no_ping_is_let_go(sdk: Clients) -> None:
    async with site(ping_interval=1.0, pong_timeout=0.5) as here:
        tab = await sdk.open(here.url)
        await tab.hears("connected")
        await tab("mute", muted=True)
        await tab.hears("connecting", code=3012)
        await tab("mute", muted=False)
        await tab.hears("connected", 2)


@also_in_a_browser
async def test_client_notices_a_dead_network_by_its_pings(sdk: Clients) -> None:
    async with site(ping_interval=1.0) as here:
        tab = await sdk.open(here.url, maxServerPingDelay=500)
        await tab("subscribe", channel="room:1")
        await tab.hears("subscribed", channel="room:1")
        here.proxy.black_hole()
        await here.manager.broadcast(1, channel="room:1")
        await tab.hears("connecting", code=2)
        here.proxy.reset()
        here.proxy.heal()
        assert (await tab.hears("subscribed", 2, channel="room:1"))["recovered"]
        await tab.hears("publication")
        assert await tab.data("room:1") == [1]


@in_json
async def test_pings_come_while_it_is_busy(sdk: Clients) -> None:
    async with site(ping_interval=1.0) as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="room:1")
        await tab.hears("subscribed", channel="room:1")

        async def flood() -> None:
            while True:
                await here.manager.broadcast("x" * 100, channel="room:1")
                await asyncio.sleep(0.002)

        flooding = asyncio.create_task(flood())
        try:
            seen = await tab.until(
                lambda seen: sum("\n{}" in f"\n{data}" for _, kind, data in seen["frames"] if kind == "<") > 2
            )
        finally:
            flooding.cancel()
        lines = [line for _, kind, data in seen["frames"] if kind == "<" for line in data.split("\n")]
        between = "".join("p" if line == "{}" else "." for line in lines)
        assert re.search(r"\.p.*\.p.*\.p", between)
        assert len(await tab.log("connecting")) == 1


@in_json
async def test_subscription_that_is_asked_for_again_takes_the_place_of_the_first(sdk: Clients) -> None:
    """An error 105 would make an SDK leave the channel for good."""
    async with site() as here:
        tab = await sdk.open(here.url)
        await tab("subscribe", channel="room:1")
        await tab.hears("subscribed", channel="room:1")
        await tab("say", frame='{"id":99,"subscribe":{"channel":"room:1"}}')

        def answers(seen: dict[str, Any]) -> list[str]:
            lines = [line for _, kind, data in seen["frames"] if kind == "<" for line in data.split("\n")]
            return [line for line in lines if '"id":99' in line]

        [answer] = answers(await tab.until(answers))
        assert '"error"' not in answer
        await here.manager.broadcast(1, channel="room:1")
        await tab.hears("publication", channel="room:1")
        assert await tab.data("room:1") == [1]
