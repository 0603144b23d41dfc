from __future__ import annotations

import asyncio
import gc

import pytest

from tests.support.fake_broker import FakeBroker, FakeEngine, FakeNode


@pytest.mark.parametrize("turns", range(8))
async def test_end_ends_in_every_turn_of_the_loop_in_which_a_link_is_being_lost(
    turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    broker = FakeBroker()
    engine = FakeEngine(broker)
    await engine.start(FakeNode())
    broker.is_down = True
    broker.drop_links()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(2):
        await engine.aclose()
    del engine, broker
    gc.collect()
    assert "never retrieved" not in caplog.text
