from __future__ import annotations

from typing import Any

import pytest

from wsbroadcast import (
    Audience,
    ConfigurationError,
    Engine,
    EngineUnavailable,
    Health,
    MemoryEngine,
    Message,
    Publication,
)
from wsbroadcast.engines import create_engine
from wsbroadcast.testing import Recorder

PUBLICATION = Publication(Message.of("text"), Audience("channel", "news"), frozenset({"1"}))


async def test_publication_is_received_as_it_is_when_publish_returns() -> None:
    engine, recorder = MemoryEngine(), Recorder()
    await engine.start(recorder)
    await engine.publish(PUBLICATION)
    engine.publish_nowait(PUBLICATION)
    assert recorder.publications == [PUBLICATION, PUBLICATION]


async def test_errors_of_the_receiver_reach_whoever_awaits() -> None:
    engine, recorder = MemoryEngine(), Recorder()
    recorder.failing.add(PUBLICATION.audience)
    await engine.start(recorder)
    with pytest.raises(RuntimeError, match="told to fail"):
        await engine.publish(PUBLICATION)
    engine.publish_nowait(PUBLICATION)
    assert recorder.failures == 2


async def test_publish_before_the_start_and_after_the_end_is_refused() -> None:
    engine, node = MemoryEngine(), Recorder()
    for _ in range(2):
        with pytest.raises(EngineUnavailable, match="not started"):
            await engine.publish(PUBLICATION)
        with pytest.raises(EngineUnavailable, match="not started"):
            engine.publish_nowait(PUBLICATION)
        await engine.start(node)
        await engine.aclose()
        await engine.aclose()
    assert node.publications == []


async def test_engine_can_be_started_again() -> None:
    engine, first, second = MemoryEngine(), Recorder(), Recorder()
    await engine.start(first)
    await engine.aclose()
    await engine.start(second)
    await engine.publish(PUBLICATION)
    assert (len(first.publications), len(second.publications)) == (0, 1)


async def test_health_tells_whether_it_runs() -> None:
    engine = MemoryEngine()
    assert await engine.health() == Health("memory", False, "not started")
    await engine.start(Recorder())
    assert await engine.health() == Health("memory", True)


@pytest.mark.parametrize("url", ["memory://", "memory:", "memory:///"])
def test_url_makes_a_memory_engine(url: str) -> None:
    assert isinstance(create_engine(url), MemoryEngine)


@pytest.mark.parametrize("url", ["memory://host", "memory:///path", "memory://?a=b"])
def test_url_with_anything_to_configure_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="no host, no path and no options: write memory://"):
        create_engine(url)


@pytest.mark.parametrize(
    "url", ["", "memory", "nope://ann:secret@host", "x://ann:secret@[::1", "x://ann:secre\u2100t@host"]
)
def test_url_that_names_no_engine_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        create_engine(url)
    assert "secre" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("engine", [None, 7, MemoryEngine])
def test_what_is_no_engine_is_refused(engine: Any) -> None:
    with pytest.raises(ConfigurationError, match="a URL or an Engine"):
        create_engine(engine)


def test_engine_object_is_taken_as_it_is() -> None:
    engine: Engine = MemoryEngine()
    assert create_engine(engine) is engine
