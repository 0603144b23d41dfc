"""The text that Prometheus reads, checked by Prometheus' own parsers and by what promtool checks."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from pydantic import TypeAdapter

from tests.support.asgi import Peer, connected, eventually, turns
from wsbroadcast import ConfigurationError, ConnectionManager, Stats
from wsbroadcast.stats import WAIT_BOUNDS, Durations, EngineStats, Histogram
from wsbroadcast.telemetry.measures import MEASURES
from wsbroadcast.telemetry.prometheus import StatsCollector, exposition

# What no label may be called: a client or an app makes these up, and each would be a series of its own.
_MADE_UP = {"channel", "user", "origin", "path", "code", "address", "connection"}


def of(families: Iterable[Metric]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(page: bytes, name: str, **labels: str) -> float:
    return of(parse(page.decode()))[name, tuple(sorted(labels.items()))]


async def busy_stats() -> Stats:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 3, channels=["a"], user="ann")
        for _ in range(5):
            await manager.broadcast("x", channel="a")
            await turns()
        manager.disconnect(pairs[0][0].websocket)
        manager._core.counters.dropped["drop_oldest"] += 7
        manager._core.counters.refused_recoveries["epoch"] += 2
        return manager.stats()


async def test_page_says_what_stats_say() -> None:
    stats = await busy_stats()
    page = exposition({"n1": stats, "n2": Stats()})
    assert value(page, "wsbroadcast_connections", node="n1", sink="asgi") == 2
    assert value(page, "wsbroadcast_connections", node="n2", sink="asgi") == 0
    assert value(page, "wsbroadcast_broadcasts_total", node="n1") == 5
    assert value(page, "wsbroadcast_deliveries_total", node="n1") == 15
    assert value(page, "wsbroadcast_dropped_total", node="n1", reason="drop_oldest") == 7
    assert value(page, "wsbroadcast_recoveries_total", node="n1", result="epoch") == 2
    assert value(page, "wsbroadcast_delivery_duration_seconds_count", node="n1") == 5
    assert value(page, "wsbroadcast_connection_duration_seconds_count", node="n1") == 1
    assert value(page, "wsbroadcast_engine_connected", node="n1") == 1


async def test_collector_and_page_say_the_same() -> None:
    async with ConnectionManager() as manager:
        await connected(manager, 2, channels=["a"])
        await manager.broadcast("x", channel="a")
        await turns()
        registry = CollectorRegistry()
        registry.register(StatsCollector(manager))
        collected = of(parse(generate_latest(registry).decode()))
        page = of(parse(exposition({"n": manager.stats()}).decode()))
        assert {
            (name, tuple(label for label in labels if label[0] != "node")): n for (name, labels), n in page.items()
        } == (collected)
        assert of(parse_openmetrics(generate_openmetrics(registry).decode())) == collected


async def test_page_keeps_to_the_rules_of_promtool() -> None:
    page = exposition({"a": await busy_stats(), "b": Stats()}).decode()
    assert page.endswith("\n")
    assert "\n\n" not in page
    lines = page.splitlines()
    families = list(parse(page))
    assert len(families) == len(MEASURES)
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        assert family.documentation.endswith(".")
        assert lines.count(f"# HELP {name} {family.documentation}") == 1
        assert lines.count(f"# TYPE {name} {family.type}") == 1
        assert re.fullmatch(r"wsbroadcast_[a-z]+(_[a-z]+)*", family.name)
        assert not re.search(r"_(total|count|sum|bucket|info|gauge|counter|histogram)$", family.name)
        assert not re.search(r"milli|micro|minutes|hours|kilo|mega", family.name), "base units only"
        for sample in family.samples:
            assert family.type != "counter" or sample.name.endswith("_total")
            assert family.type != "gauge" or sample.name == family.name
            assert not _MADE_UP & set(sample.labels)
            assert math.isfinite(sample.value)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
            check_histogram(family)
    series = Counter(line.rpartition(" ")[0] for line in lines if not line.startswith("#"))
    assert [name for name, number in series.items() if number > 1] == []


def check_histogram(family: Metric) -> None:
    for node in ("a", "b"):
        some = [sample for sample in family.samples if sample.labels["node"] == node]
        buckets = [sample for sample in some if sample.name.endswith("_bucket")]
        [count] = [sample.value for sample in some if sample.name.endswith("_count")]
        [total] = [sample.value for sample in some if sample.name.endswith("_sum")]
        bounds = [float(bucket.labels["le"]) for bucket in buckets]
        assert bounds == sorted(set(bounds))
        assert bounds[-1] == math.inf
        values = [bucket.value for bucket in buckets]
        assert values == sorted(values)
        assert values[-1] == count
        assert total >= 0


def test_observation_is_counted_at_its_bound() -> None:
    durations = Durations((1.0, 2.0))
    for seconds in (0.0, 1.0, 1.5, 2.0, 2.5):
        durations.observe(seconds)
    assert durations.snapshot() == Histogram(bounds=(1.0, 2.0), counts=(2, 2, 1), sum=7.0)
    assert durations.snapshot().count == 5


def test_page_of_the_docs_has_every_metric() -> None:
    docs = Path(__file__).parents[2] / "docs" / "observe.md"
    text = docs.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(wsbroadcast_\w+)` \| (\w+) \| (?:`(\w+)`)? ?\| ", text, re.MULTILINE)
    total = {"counter": "_total"}
    assert rows == [(each.prometheus_name + total.get(each.kind, ""), each.kind, each.label) for each in MEASURES]
    # What alerts and the list of what to watch name is there.
    exposed = {name for name, _ in of(parse(exposition({"n": Stats()}).decode()))}
    for name in re.findall(r"wsbroadcast_\w+", text.partition("## All metrics")[0]):
        assert name in exposed or f"{name}_bucket" in exposed, name


# Labels.


def test_labels_are_escaped() -> None:
    node = 'a"b\\c\nd'
    page = exposition({node: Stats(users=3)})
    assert value(page, "wsbroadcast_users", node=node) == 3
    assert page.count(b"\n# TYPE wsbroadcast_users gauge\n") == 1


def test_values_that_are_not_known_make_no_series() -> None:
    many = {f"made up {number}": 1 for number in range(1000)}
    stats = Stats(
        sinks=many,
        fast_path_refused={
            "server protocol WSProtocol": 2,
            "server protocol Other": 3,
            "unknown uvicorn: transport": 1,
        },
        dropped=many,
        evicted=many,
        limited={"max_connections": 1, "max_connections_of_the_future": 5},
        refused_recoveries=many,
        delivery_seconds=Histogram(bounds=(0.3, 0.7), counts=(1, 2, 3), sum=9.0),
        engine=EngineStats(bad_envelopes=many),
    )
    page = exposition({"n": stats})
    assert value(page, "wsbroadcast_dropped_total", node="n", reason="other") == 1000
    assert value(page, "wsbroadcast_fast_path_refused", node="n", reason="server protocol") == 5
    assert value(page, "wsbroadcast_limited_total", node="n", limit="max_connections") == 1
    assert value(page, "wsbroadcast_limited_total", node="n", limit="other") == 5
    assert value(page, "wsbroadcast_delivery_duration_seconds_count", node="n") == 0
    assert b"made up" not in page
    assert len(page.splitlines()) < len(exposition({"n": Stats()}).splitlines()) + 10


def test_every_reason_of_the_library_is_a_known_value() -> None:
    # What the code counts under, found in the source: a new one belongs into the table.
    import wsbroadcast
    from wsbroadcast.history import Reason
    from wsbroadcast.node.admission import REFUSALS
    from wsbroadcast.options import Policy
    from wsbroadcast.protocols.centrifuge.codes import Disconnect, ErrorCode

    values = {measure.name: set(measure.values) for measure in MEASURES}
    root = Path(wsbroadcast.__file__).parent
    source = "\n".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    envelopes = set(re.findall(r'BadEnvelope\("(\w+)"\)', source)) | set(re.findall(r'_drop\("(\w+)"', source))
    assert values["engine.bad_envelopes"] == envelopes
    assert values["limited"] == set(REFUSALS)
    dropped = set(re.findall(r'dropped\["(\w+)"\]', source))
    assert values["dropped"] == {*Policy.__args__, "closed", *dropped}  # type: ignore[attr-defined]
    assert {str(int(code)) for code in (*ErrorCode, *Disconnect)} == values["client_errors"]
    assert values["recoveries"] == {"recovered", *Reason.__args__} - {""}  # type: ignore[attr-defined]
    assert values["connections"] == set(re.findall(r'^    kind = "(\w+)"', source, re.MULTILINE))
    evicted = set(re.findall(r'evict\(\w*,? ?"(\w+)"', source))
    assert values["evicted"] == evicted
    refused = re.search(
        r"def find_protocol.*?^def ", (root / "delivery" / "uvicorn.py").read_text("utf-8"), re.S | re.M
    )
    assert refused is not None
    for reason in re.findall(r'return None, f?"([^"{:]+)', refused[0]):
        assert reason.strip() in values["fast_path.refused"]
    assert {"compressed", "not in chunks", "long poll"} <= values["fast_path.refused"]


# Collectors.


async def test_several_managers_need_names() -> None:
    chat, prices = ConnectionManager(), ConnectionManager()
    with pytest.raises(ConfigurationError, match="chat="):
        StatsCollector(chat, prices)
    with pytest.raises(ConfigurationError, match="write StatsCollector"):
        StatsCollector()
    await connected(chat, 2)
    registry = CollectorRegistry()
    registry.register(StatsCollector(chat=chat, prices=prices))
    page = generate_latest(registry)
    assert value(page, "wsbroadcast_connections", manager="chat", sink="asgi") == 2
    assert value(page, "wsbroadcast_connections", manager="prices", sink="asgi") == 0
    await chat.aclose()


def test_second_collector_of_the_same_names_is_refused() -> None:
    registry = CollectorRegistry()
    registry.register(StatsCollector(ConnectionManager()))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(StatsCollector(ConnectionManager()))


async def test_metrics_may_be_read_in_another_thread() -> None:
    failures: list[BaseException] = []
    is_over = threading.Event()
    async with ConnectionManager() as manager:
        collector = StatsCollector(manager)

        def scrape() -> None:
            try:
                while not is_over.is_set():
                    list(collector.collect())
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=scrape)
        thread.start()
        try:
            for number in range(30):
                pairs = await connected(manager, 5, user=f"u{number}", channels=[f"c{number}"])
                for peer, _ in pairs:
                    peer.stall()
                manager.broadcast_nowait("x" * 100)
                await turns()
                for peer, connection in pairs:
                    peer.resume()
                    manager.disconnect(connection)
        finally:
            is_over.set()
            await asyncio.to_thread(thread.join)
    assert failures == []


# Nodes of several versions.


async def test_stats_travel_as_json_between_versions() -> None:
    adapter = TypeAdapter(Stats)
    stats = await busy_stats()
    again = adapter.validate_json(adapter.dump_json(stats))
    assert again == stats
    assert (again.delivery_seconds, again.connection_seconds) == (stats.delivery_seconds, stats.connection_seconds)
    older = adapter.validate_json(b'{"connections": 3, "engine": {"gaps": 1}}')
    assert (older.connections, older.engine.gaps, older.deliveries) == (3, 1, 0)
    newer = adapter.validate_json(b'{"connections": 3, "something": {"new": [1]}, "engine": {"something": 1}}')
    assert newer == Stats(connections=3)
    assert value(exposition({"n": older}), "wsbroadcast_engine_gaps_total", node="n") == 1


async def test_gauges_come_back_to_zero() -> None:
    async with ConnectionManager() as manager:
        pairs = await connected(manager, 4)
        assert manager.stats().sinks == {"asgi": 4}
        for peer, _ in pairs[:2]:
            manager.disconnect(peer.websocket)
        await pairs[2][1].close()
        assert manager.stats().sinks == {"asgi": 1}
        pairs[3][0].vanish()
        await manager.broadcast("x")
        await eventually(lambda: not manager.connections)
        assert (manager.stats().sinks, manager.stats().fast_path_refused) == ({}, {})
        assert manager.stats().connection_seconds.count == 4


async def test_scrape_takes_less_than_a_millisecond_however_many_are_connected() -> None:
    # So that ten in a second take less than a hundredth of a core.
    async with ConnectionManager() as manager:
        for number in range(2000):
            await manager.connect(Peer().websocket, user=number, channels=[f"c{number}"])
        took = []
        for _ in range(50):
            before = time.process_time()
            exposition({"n": manager.stats()})
            took.append(time.process_time() - before)
    assert min(took) < 0.001


def test_bounds_are_in_order() -> None:
    for measure in MEASURES:
        assert list(measure.bounds) == sorted(set(measure.bounds))
    assert WAIT_BOUNDS[0] == 0.0001


# Several processes.

_WORKER = """
import sys
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from wsbroadcast import ConnectionManager
from wsbroadcast.telemetry.prometheus import StatsCollector

Counter("own", "Of the app.", registry=None).inc()
manager = ConnectionManager()
manager._core.counters.sends += int(sys.argv[1])
registry = CollectorRegistry()
MultiProcessCollector(registry)
registry.register(StatsCollector(manager))
print(generate_latest(registry).decode())
"""


def test_multiprocess_mode_runs_no_collector_of_another_process(tmp_path: Path) -> None:
    pages = [
        subprocess.run(
            [sys.executable, "-c", _WORKER, str(number)],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            check=True,
            capture_output=True,
        ).stdout
        for number in (3, 4)
    ]
    assert [value(page, "own_total") for page in pages] == [1, 2]  # its own counters are added up
    assert [value(page, "wsbroadcast_sends_total") for page in pages] == [3, 4]  # ours are those of who answers
