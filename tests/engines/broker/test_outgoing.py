from __future__ import annotations

import asyncio

import pytest

from tests.support.fake_broker import QUICK, FakeBroker, FakeLink
from wsbroadcast import Audience, EngineUnavailable, Message, Publication
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.stats import EngineCounters

NEWS = Publication(Message.of("text"), Audience("channel", "news"))


async def test_what_nobody_awaits_is_refused_at_once_when_too_much_waits() -> None:
    broker, counters = FakeBroker(), EngineCounters()
    outgoing = Outgoing("fake at nowhere:1", AudienceNames(), QUICK, 1000, counters, max_waiting_bytes=100)
    link = FakeLink(broker)
    outgoing.use(link)
    for _ in range(3):
        outgoing.publish_nowait(NEWS)
    with pytest.raises(EngineUnavailable, match=r"the broker doesn't keep up: .* bytes wait for it"):
        outgoing.publish_nowait(NEWS)
    awaited = asyncio.ensure_future(outgoing.publish(NEWS))  # whoever awaits holds the message anyway
    sending = asyncio.create_task(outgoing.send(link))
    await awaited
    assert len(broker.batches[0]) == 4
    outgoing.publish_nowait(NEWS)
    await outgoing.wait_empty()
    assert len(broker.batches[1]) == 1
    sending.cancel()
    await outgoing.aclose("stopped")
    assert counters.publish_failures == 1
