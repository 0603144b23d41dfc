"""Spans of broadcasts: one where it is made, one linked on each node, hooks below them, never one for a recipient."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, StaticSampler
from opentelemetry.trace import SpanKind

from tests.support.asgi import Peer, connected, eventually, turns
from tests.support.brokers.base import Endpoint
from wsbroadcast import (
    EVERYONE,
    HOLD_BACK,
    Audience,
    ConnectionManager,
    Delivery,
    EngineUnavailable,
    History,
    Message,
    PermissionDenied,
    Publication,
    Publisher,
)
from wsbroadcast.engines.broker.envelope import Origin, decode, encode
from wsbroadcast.telemetry.otel import trace
from wsbroadcast.testing import Cluster
from wsbroadcast.tracing import is_traceparent

NEWS = Audience.channel("news")
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Recorder:
    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def spans(self, kind: SpanKind | None = None) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if kind is None or span.kind is kind]

    def within(self, name: str) -> AbstractContextManager[object]:
        return self.provider.get_tracer("app").start_as_current_span(name)

    def one(self, kind: SpanKind) -> ReadableSpan:
        [span] = self.spans(kind)
        return span


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.provider.shutdown()


def is_linked(span: ReadableSpan, to: ReadableSpan) -> bool:
    [link] = span.links
    there, here = to.get_span_context(), link.context
    assert there is not None
    return (here.trace_id, here.span_id) == (there.trace_id, there.span_id)


def is_child(span: ReadableSpan, of: ReadableSpan) -> bool:
    context = of.get_span_context()
    return span.parent is not None and context is not None and span.parent.span_id == context.span_id


async def test_broadcast_is_one_span_and_one_on_each_node(recorder: Recorder) -> None:
    async with Cluster(2) as cluster:
        peers: list[Peer] = []
        for manager in cluster:
            trace(manager, recorder.provider)
            peers += [peer for peer, _ in await connected(manager, 50, channels=["news"])]
        with recorder.within("request"):
            await cluster[0].broadcast("x", channel="news")
        for peer in peers:
            await peer.wait_messages(1)
    published, [request] = recorder.one(SpanKind.PRODUCER), recorder.spans(SpanKind.INTERNAL)
    assert is_child(published, request)
    delivered = recorder.spans(SpanKind.CONSUMER)
    assert len(delivered) == 2  # 100 connections got it
    for span in delivered:
        assert is_linked(span, published)
        assert span.parent is None
    assert (published.name, delivered[0].name) == ("publish channel", "deliver channel")
    assert published.attributes is not None
    assert published.attributes["messaging.operation.type"] == "send"
    for span in recorder.spans():
        assert "news" not in repr(span.to_json())


async def test_hooks_are_children(recorder: Recorder) -> None:
    async with ConnectionManager() as manager:
        trace(manager, recorder.provider)
        await connected(manager, 3)

        @manager.on_broadcast
        def shout(message: Message, audience: Audience) -> str:
            return str(message.data).upper()

        @manager.on_deliver
        async def look(delivery: Delivery) -> None:
            with recorder.within("query"):
                await asyncio.sleep(0)

        await manager.broadcast("x")
    published, delivered = recorder.one(SpanKind.PRODUCER), recorder.one(SpanKind.CONSUMER)
    named = {span.name: span for span in recorder.spans(SpanKind.INTERNAL)}
    assert set(named) == {"on_broadcast", "on_deliver", "query"}
    assert is_child(named["on_broadcast"], published)
    assert is_child(named["on_deliver"], delivered)
    assert is_child(named["query"], named["on_deliver"])
    assert is_linked(delivered, published)
    assert named["on_broadcast"].attributes is not None
    assert "shout" in str(named["on_broadcast"].attributes["code.function.name"])


async def test_broadcast_to_several_audiences_is_one_span_on_each_node(recorder: Recorder) -> None:
    async with Cluster(2) as cluster:
        hooked = 0

        def count(delivery: Delivery) -> None:
            nonlocal hooked
            hooked += 1

        for manager in cluster:
            trace(manager, recorder.provider)
            manager.on_deliver(count)
            await connected(manager, 2, channels=["a", "b"], user="ann")
        await cluster[0].broadcast("x", to=[Audience.channel("a"), Audience.channel("b"), EVERYONE])
        await eventually(lambda: hooked == 6)
        await turns()
    recorder.one(SpanKind.PRODUCER)
    delivered = recorder.spans(SpanKind.CONSUMER)
    assert len(delivered) == 2
    hooks = recorder.spans(SpanKind.INTERNAL)
    assert len(hooks) == 6
    assert all(any(is_child(hook, span) for span in delivered) for hook in hooks)


async def test_each_verb_makes_one_span(recorder: Recorder) -> None:
    async with ConnectionManager() as manager:
        trace(manager, recorder.provider)
        [(peer, _)] = await connected(manager, 1)

        def from_thread() -> None:
            with recorder.within("thread"):
                manager.broadcast_threadsafe("3")
                manager.broadcast_soon("4")

        await manager.broadcast("1")
        manager.broadcast_nowait("2")
        await asyncio.to_thread(from_thread)
        await peer.wait_messages(4)
        await manager.broadcast_local("5")
        await peer.wait_messages(5)
    published, delivered = recorder.spans(SpanKind.PRODUCER), recorder.spans(SpanKind.CONSUMER)
    assert len(published) == len(delivered) == 5
    [thread] = recorder.spans(SpanKind.INTERNAL)
    assert sum(is_child(span, thread) for span in published) == 2
    assert all(any(is_linked(there, here) for there in delivered) for here in published)


async def test_what_fails_is_in_the_span(recorder: Recorder) -> None:
    async with Cluster(1) as cluster:
        trace(cluster[0], recorder.provider)
        cluster.partition(0)
        with pytest.raises(EngineUnavailable):
            await cluster[0].broadcast("x")
    assert not recorder.one(SpanKind.PRODUCER).status.is_ok


def breaks(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("broken", "name"), [(StaticSampler, "should_sample"), (SpanProcessor, "on_start"), (SpanProcessor, "on_end")]
)
async def test_tracer_that_raises_costs_no_message_and_hides_no_error(
    broken: type, name: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Cluster(2) as cluster:
        found = [(await connected(manager, 1, channels="news"))[0][0] for manager in cluster]
        trace(cluster[0], recorder.provider)
        await cluster[0].broadcast("0", channel="news")  # one that the other node is told to find
        monkeypatch.setattr(broken, name, breaks)
        recorder.provider.add_span_processor(SpanProcessor())
        trace(cluster[1], recorder.provider)

        @cluster[0].on_broadcast
        def refuse(message: Message, audience: Audience) -> None:
            if message.data == "2":
                raise PermissionDenied("no")

        for manager in cluster:
            manager.on_deliver(lambda delivery: None)
        await cluster[0].broadcast("1", channel="news")
        with pytest.raises(PermissionDenied):
            await cluster[0].broadcast("2", channel="news")
        await cluster[0].broadcast("3", channel="news")
        for peer in found:
            assert await peer.wait_messages(3) == ["0", "1", "3"]
    events = [getattr(record, "event", "") for record in caplog.records if record.levelno >= logging.ERROR]
    assert set(events) == {"tracing.failed"}
    assert len(events) <= 2  # one for each manager


async def test_what_is_held_back_reaches_no_node(recorder: Recorder) -> None:
    async with ConnectionManager() as manager:
        trace(manager, recorder.provider)
        manager.on_broadcast(lambda message, audience: HOLD_BACK)
        await manager.broadcast("x")
    recorder.one(SpanKind.PRODUCER)
    assert recorder.spans(SpanKind.CONSUMER) == []


# What it costs, and what isn't written.


def written(manager: ConnectionManager, monkeypatch: pytest.MonkeyPatch) -> list[Publication]:
    found: list[Publication] = []
    deliver = manager._core.life.node.deliver

    async def keep(publication: Any) -> None:
        found.append(publication)
        await deliver(publication)

    monkeypatch.setattr(manager._core.life.node, "deliver", keep)
    return found


async def test_nothing_is_written_while_nobody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ConnectionManager() as manager:
        found = written(manager, monkeypatch)
        with Recorder().within("request"):
            await manager.broadcast("x")
        assert [publication.traceparent for publication in found] == [None]
        assert b"traceparent" not in encode(found[0], Origin("n", 1))


async def test_nothing_is_written_of_a_span_that_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(sampler=ALWAYS_OFF)
    async with ConnectionManager() as manager:
        trace(manager, recorder.provider)
        found = written(manager, monkeypatch)
        await manager.broadcast("x")
        assert b"traceparent" not in encode(found[0], Origin("n", 1))
    assert recorder.spans() == []


async def test_without_a_provider_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ConnectionManager() as manager:
        trace(manager)  # of the API alone
        found = written(manager, monkeypatch)
        [(peer, _)] = await connected(manager, 1)
        await manager.broadcast("x")
        assert await peer.wait_messages(1) == ["x"]
        assert b"traceparent" not in encode(found[0], Origin("n", 1))
    assert not otel.get_current_span().is_recording()


# The envelope.


def test_envelope_carries_it() -> None:
    publication = Publication(Message.of("x"), NEWS)
    publication.traceparent = PARENT
    envelope = encode(publication, Origin("n", 1))
    header = json.loads(envelope.partition(b"\n")[0])
    assert header == {"v": 1, "node": "n", "seq": 1, "traceparent": PARENT}
    again, _ = decode(envelope, NEWS, 100)
    assert isinstance(again, Publication)
    assert again.traceparent == PARENT
    assert again == publication


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        "",
        1,
        ["x"],
        {"a": 1},
        True,
        PARENT.upper(),
        PARENT + "-00",
        PARENT + "\n",
        " " + PARENT,
        "01" + PARENT[2:],
        "ff" + PARENT[2:],
        PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT.replace("4b", "٤b"),
        PARENT[:-1],
        "x" * 10_000,
    ],
    ids=repr,
)
def test_what_is_no_traceparent_is_ignored(wrong: object) -> None:
    assert not is_traceparent(wrong)
    header = json.dumps({"v": 1, "node": "n", "seq": 1, "traceparent": wrong}).encode()
    publication, _ = decode(header + b"\nhello", NEWS, 100)
    assert isinstance(publication, Publication)
    assert (publication.traceparent, publication.data) == (None, "hello")


# What is kept.


async def test_replay_makes_no_span(recorder: Recorder) -> None:
    async with Cluster(1, history=History()) as cluster:
        manager = cluster[0]
        trace(manager, recorder.provider)
        [(peer, _)] = await connected(manager, 1, channels=["news"])
        first = await manager.broadcast("1", channel="news")
        await manager.broadcast("2", channel="news")
        await peer.wait_messages(2)
        [(late, _)] = await connected(manager, 1, channels=["news"], since={"news": first.position})
        assert await late.wait_messages(1) == ["2"]
    assert len(recorder.spans(SpanKind.CONSUMER)) == len(recorder.spans(SpanKind.PRODUCER)) == 2


async def test_hooks_of_a_replay_make_no_span(recorder: Recorder) -> None:
    async with Cluster(1, history=History()) as cluster:
        manager = cluster[0]
        trace(manager, recorder.provider)
        seen: list[bool] = []
        manager.on_deliver(lambda delivery: seen.append(delivery.is_replay))
        first = await manager.broadcast("1", channel="news")
        await manager.broadcast("2", channel="news")
        with recorder.within("socket"):
            [(late, _)] = await connected(manager, 1, channels=["news"], since={"news": first.position})
            assert await late.wait_messages(1) == ["2"]
    assert True in seen
    assert [span.name for span in recorder.spans(SpanKind.INTERNAL)] == ["on_deliver"] * seen.count(False) + ["socket"]


async def test_hooks_of_what_nobody_traced_make_no_span(recorder: Recorder) -> None:
    async with Cluster(2) as cluster:
        trace(cluster[1], recorder.provider)  # the other one isn't
        seen: list[str] = []
        cluster[1].on_deliver(lambda delivery: seen.append(delivery.message.data))
        [(peer, _)] = await connected(cluster[1], 1)
        await cluster[0].broadcast("x")
        assert await peer.wait_messages(1) == ["x"]
    assert seen == ["x"]
    assert recorder.spans() == []


# A real broker.


async def test_traces_cross_a_broker(recorder: Recorder, redis_server: Endpoint, prefix: str) -> None:
    url = f"{redis_server.url}?prefix={prefix}"
    managers = [ConnectionManager(url, history=History()) for _ in range(2)]
    publisher = Publisher(url)
    trace(publisher, recorder.provider)
    for manager in managers:
        trace(manager, recorder.provider)
    async with managers[0], managers[1], publisher:
        pairs = [pair for manager in managers for pair in await connected(manager, 2, channels=["news"])]
        with recorder.within("job"):
            await publisher.broadcast("1", channel="news")
        publisher.broadcast_nowait("2", channel="news")
        managers[0].broadcast_soon("3", channel="news")
        for peer, _ in pairs:
            await peer.wait_messages(3)
        await asyncio.to_thread(publisher.broadcast_threadsafe, "4", channel="news")
        for peer, _ in pairs:
            await peer.wait_messages(4)
    published, delivered = recorder.spans(SpanKind.PRODUCER), recorder.spans(SpanKind.CONSUMER)
    assert len(published) == 4
    assert len(delivered) == 8
    for span in published:
        assert sum(is_linked(there, span) for there in delivered) == 2
