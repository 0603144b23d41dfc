"""Metrics for Prometheus: a collector for prometheus_client, and the text format, which needs no other package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from wsbroadcast.exceptions import ConfigurationError, MissingDependency
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.stats import Stats
from wsbroadcast.telemetry.measures import MEASURES, Measure

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of what `exposition` returns."""


def exposition(stats: Mapping[str, Stats]) -> bytes:
    """Return the metrics of some nodes as a page that Prometheus reads, in UTF-8. The label `node` has the node's name.

    It needs no other package, so that a route of metrics works without an extra.

    Args:
        stats: What `stats()` returned, by the name of the node.
    """
    names = {node: f'{{node="{_escaped(node)}"' for node in stats}
    lines: list[str] = []
    for measure, head in _HEADS:
        lines.append(head)
        for node, of_node in stats.items():
            label = names[node]
            for sample, own, value in _samples(measure, of_node):
                lines.append(f'{sample}{label},{own[0]}="{own[1]}"}} {value}' if own else f"{sample}{label}}} {value}")
    lines.append("")
    return "\n".join(lines).encode()


_TOTAL = {"counter": "_total", "gauge": "", "histogram": ""}

_HEADS = [
    (
        measure,
        "# HELP {0} {1}\n# TYPE {0} {2}".format(
            measure.prometheus_name + _TOTAL[measure.kind], measure.help, measure.kind
        ),
    )
    for measure in MEASURES
]


def _samples(measure: Measure, stats: Stats) -> Iterator[tuple[str, tuple[str, str] | None, float]]:
    # Each sample with its label. The values of labels are our own, so they need no escaping.
    name = measure.prometheus_name
    if measure.kind != "histogram":
        name += _TOTAL[measure.kind]
        for label, value in measure.points(stats):
            yield name, label, value
        return
    histogram = measure.histogram(stats)
    bucket, so_far = f"{name}_bucket", 0
    for bound, number in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        so_far += number
        yield bucket, ("le", str(bound)), so_far
    yield f"{name}_count", None, so_far
    yield f"{name}_sum", None, histogram.sum


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class StatsCollector:
    """Collects the metrics of managers when Prometheus asks, from any thread.

    ```
    REGISTRY.register(StatsCollector(manager))
    ```

    Args:
        managers: One manager. Give several by keyword, so that the label `manager` tells them apart.
        named: Managers by name. The name is the value of the label.

    Raises:
        ConfigurationError: If none is given, or several without names.
    """

    def __init__(self, *managers: ConnectionManager, **named: ConnectionManager) -> None:
        if len(managers) + len(named) == 0 or (managers and len(managers) + len(named) > 1):
            raise ConfigurationError("write StatsCollector(manager), or with names StatsCollector(chat=…, prices=…)")
        self._managers: list[tuple[list[tuple[str, str]], ConnectionManager]] = [
            *(([], manager) for manager in managers),
            *(([("manager", name)], manager) for name, manager in named.items()),
        ]

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples. By these a registry refuses a second collector with the same names."""
        return (self._family(measure) for measure in MEASURES)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        found = [(labels, manager.stats()) for labels, manager in self._managers]
        for measure in MEASURES:
            family = self._family(measure)
            for labels, stats in found:
                for sample, own, value in _samples(measure, stats):
                    family.add_sample(sample, dict([*labels, own] if own else labels), value)
            yield family

    def _family(self, measure: Measure) -> Metric:
        try:
            from prometheus_client.metrics_core import Metric
        except ImportError as error:
            raise MissingDependency(
                'a StatsCollector needs prometheus_client: pip install "wsbroadcast[prometheus]"'
            ) from error
        return Metric(measure.prometheus_name, measure.help, measure.kind)
