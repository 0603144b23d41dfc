"""Metrics for Prometheus: a collector for prometheus_client, and the text itself, which needs no other package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.stats import Stats
from wsbroadcast.telemetry.measures import MEASURES, Measure

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of what `exposition` returns."""


def exposition(stats: Mapping[str, Stats]) -> bytes:
    """Return the metrics of some nodes as a page that Prometheus reads, with the label `node`.

    It needs no other package, so that a route of metrics works without an extra.

    Args:
        stats: By the name of the node.
    """
    lines: list[str] = []
    for measure in MEASURES:
        name = _sample_name(measure)
        lines += (f"# HELP {name} {measure.help}", f"# TYPE {name} {measure.kind}")
        for node, of_node in stats.items():
            for labels, value in measure.points(of_node):
                lines.append(f"{name}{_labels({'node': node, **labels})} {value}")
    return "".join(f"{line}\n" for line in lines).encode()


def _sample_name(measure: Measure) -> str:
    name = measure.prometheus_name
    return f"{name}_total" if measure.kind == "counter" else name


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class StatsCollector:
    """Collects the metrics of managers when Prometheus asks, from any thread.

    ```
    REGISTRY.register(StatsCollector(manager))
    ```

    Args:
        managers: Whose. Several are told apart by the label `manager`, so give them by keyword.
        named: More of them, by what the label says.

    Raises:
        ConfigurationError: If none is given, or several without names.
    """

    def __init__(self, *managers: ConnectionManager, **named: ConnectionManager) -> None:
        if len(managers) + len(named) == 0 or (managers and len(managers) + len(named) > 1):
            raise ConfigurationError("write StatsCollector(manager), or with names StatsCollector(chat=…, prices=…)")
        self._managers: list[tuple[dict[str, str], ConnectionManager]] = [
            *(({}, manager) for manager in managers),
            *(({"manager": name}, manager) for name, manager in named.items()),
        ]

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without samples, so that a registry refuses a second collector of the same names."""
        return (self._family(measure) for measure in MEASURES)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        found = [(labels, manager.stats()) for labels, manager in self._managers]
        for measure in MEASURES:
            family = self._family(measure)
            for labels, stats in found:
                for own, value in measure.points(stats):
                    family.add_sample(_sample_name(measure), {**labels, **own}, value)
            yield family

    def _family(self, measure: Measure) -> Metric:
        from prometheus_client.metrics_core import Metric

        return Metric(measure.prometheus_name, measure.help, measure.kind)
