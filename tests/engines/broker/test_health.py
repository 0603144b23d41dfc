from __future__ import annotations

import pytest

from tests.support.asgi import turns
from tests.support.fake_broker import QUICK
from wsbroadcast.engines.broker.health import Echoes, LinkHealth
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.stats import EngineCounters
from wsbroadcast.testing import Recorder


@pytest.mark.parametrize("is_ended", [False, True])
async def test_what_is_missed_is_reported_once_and_not_after_the_end(is_ended: bool) -> None:
    counters, recorder = EngineCounters(), Recorder()
    outgoing = Outgoing("fake at nowhere:1", AudienceNames(), QUICK, 1000, counters)
    echoes = Echoes("echo", outgoing, 1.0)
    health = LinkHealth("fake", "fake at nowhere:1", echoes, outgoing, recorder, counters, missed_seconds=0.0)
    health.missed("a buffer was full")
    if is_ended:
        health.end()
    health.missed("a buffer was full")
    await turns()
    assert [gap.engine for gap in recorder.gaps] == ([] if is_ended else ["fake"])
    assert counters.gaps == len(recorder.gaps)
