"""The metrics of OpenTelemetry, read by its own in-memory reader; and what to do about the spans of its middleware."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, Metric, Sum
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.support.asgi import connected, turns
from wsbroadcast import ConfigurationError, ConnectionManager
from wsbroadcast.telemetry.measures import MEASURES
from wsbroadcast.telemetry.otel import instrument


class Reading:
    """What a reader collects, whenever it is asked."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])

    def metrics(self) -> dict[str, Metric]:
        data = self.reader.get_metrics_data()
        assert data is not None
        [resource] = data.resource_metrics
        [scope] = resource.scope_metrics
        assert scope.scope.name == "wsbroadcast"
        return {metric.name: metric for metric in scope.metrics}

    def points(self, name: str) -> list[Any]:
        return list(self.metrics()[name].data.data_points)


def number(points: Iterable[Any], **attributes: str) -> float:
    wanted = {f"wsbroadcast.{key}": value for key, value in attributes.items()}
    [value] = [point.value for point in points if point.attributes == wanted]
    return float(value)


async def test_instruments_say_what_stats_say() -> None:
    reading = Reading()
    async with ConnectionManager() as manager:
        instrument(manager, meter_provider=reading.provider)
        await connected(manager, 3, channels=["a"])
        for _ in range(4):
            await manager.broadcast("x", channel="a")
            await turns()
        metrics = reading.metrics()
        assert {f"wsbroadcast.{measure.name}" for measure in MEASURES} - set(metrics) == {
            # of which there was nothing to record
            "wsbroadcast.connection.duration",
            "wsbroadcast.recovery.duration",
            "wsbroadcast.engine.publish.duration",
            "wsbroadcast.engine.round_trip.duration",
        }
        assert number(metrics["wsbroadcast.connections"].data.data_points, sink="asgi") == 3
        assert number(metrics["wsbroadcast.deliveries"].data.data_points) == 12
        deliveries = metrics["wsbroadcast.deliveries"].data
        assert isinstance(deliveries, Sum)
        assert deliveries.is_monotonic
        assert (metrics["wsbroadcast.backlog.size"].unit, metrics["wsbroadcast.users"].unit) == ("By", "{user}")
        [duration] = metrics["wsbroadcast.delivery.duration"].data.data_points
        assert isinstance(duration, HistogramDataPoint)
        seen = manager.stats().delivery_seconds
        assert (duration.count, tuple(duration.bucket_counts), tuple(duration.explicit_bounds)) == (
            4,
            seen.counts,
            seen.bounds,
        )
    reading.provider.shutdown()


async def test_histogram_is_told_of_each_duration_once() -> None:
    reading, other = Reading(), InMemoryMetricReader()
    reading.provider.add_metric_reader(other)
    async with ConnectionManager() as manager:
        instrument(manager, meter_provider=reading.provider)
        durations = manager._core.counters.connection_seconds
        for expected in (1, 2, 3):
            durations.observe(3.0)
            durations.observe(1e6)
            other.get_metrics_data()
            [point] = reading.points("wsbroadcast.connection.duration")
            assert (point.count, tuple(point.bucket_counts)) == (
                2 * expected,
                manager.stats().connection_seconds.counts,
            )
    reading.provider.shutdown()


async def test_many_durations_are_thinned_out_in_the_same_proportions() -> None:
    reading = Reading()
    async with ConnectionManager() as manager:
        instrument(manager, meter_provider=reading.provider)
        durations = manager._core.counters.delivery_seconds
        for seconds, times in ((0.0002, 90_000), (0.002, 9_999), (5.0, 1)):
            for _ in range(times):
                durations.observe(seconds)
        before = time.process_time()
        [point] = reading.points("wsbroadcast.delivery.duration")
        assert time.process_time() - before < 1.0
        assert [each for each in point.bucket_counts if each] == [900, 100, 1]
    reading.provider.shutdown()


async def test_several_managers_need_names() -> None:
    reading = Reading()
    async with ConnectionManager() as chat, ConnectionManager() as prices:
        for wrong in ((), (chat, prices)):
            with pytest.raises(ConfigurationError, match="write instrument"):
                instrument(*wrong, meter_provider=reading.provider)
        instrument(chat=chat, prices=prices, meter_provider=reading.provider)
        await connected(prices, 2)
        points = reading.points("wsbroadcast.connects")
        assert number(points, manager="chat") == 0
        assert number(points, manager="prices") == 2
    reading.provider.shutdown()


@pytest.mark.parametrize("module", ["wsbroadcast", "wsbroadcast.telemetry", "wsbroadcast.telemetry.prometheus"])
def test_nothing_imports_what_an_extra_brings(module: str) -> None:
    code = f"""
import sys
import {module}
found = [name for name in sys.modules if name.startswith(("prometheus_client", "opentelemetry.sdk"))]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_missing_is_named() -> None:
    code = """
import sys
sys.modules["opentelemetry.trace"] = None
sys.modules["prometheus_client"] = None
from wsbroadcast import ConnectionManager, Stats
from wsbroadcast.telemetry.prometheus import StatsCollector, exposition
assert exposition({"n": Stats()})
for wrong in ("import wsbroadcast.telemetry.otel", "list(StatsCollector(ConnectionManager()).collect())"):
    try:
        exec(wrong)
    except ImportError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert 'pip install "wsbroadcast[otel]"' in found
    assert 'pip install "wsbroadcast[prometheus]"' in found


# The middleware of OpenTelemetry.


def spans_of_a_socket(options: Mapping[str, Any]) -> list[str]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    manager = ConnectionManager()
    app = FastAPI(lifespan=manager.lifespan)

    @app.websocket("/ws")
    async def chat(websocket: WebSocket) -> None:
        await manager.connect(websocket)
        async for text in websocket.iter_text():
            await manager.broadcast(text)

    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, **options)
    with TestClient(app) as client, client.websocket_connect("/ws") as socket:
        for _ in range(10):
            socket.send_text("x")
            socket.receive_text()
    FastAPIInstrumentor.uninstrument_app(app)
    return [span.name for span in exporter.get_finished_spans()]


def test_spans_of_the_middleware_for_each_frame_can_be_silenced() -> None:
    loud = spans_of_a_socket({})
    assert sum("receive" in name or "send" in name for name in loud) >= 20
    [span] = spans_of_a_socket({"exclude_spans": ["send", "receive"]})
    assert span.endswith("/ws")
