"""Metrics and traces for OpenTelemetry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

from wsbroadcast.exceptions import ConfigurationError, MissingDependency
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.manager import ConnectionManager
from wsbroadcast.publication import Publication, Publications
from wsbroadcast.publishing import Publisher
from wsbroadcast.stats import Stats
from wsbroadcast.telemetry.measures import MEASURES, PREFIX, Measure

try:
    from opentelemetry.context import Context, attach, detach
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter
    from opentelemetry.metrics import Histogram as Instrument
    from opentelemetry.trace import (
        INVALID_SPAN,
        Link,
        NonRecordingSpan,
        Span,
        SpanContext,
        SpanKind,
        TraceFlags,
        Tracer,
        TracerProvider,
        get_current_span,
        get_tracer,
        set_span_in_context,
    )
except ImportError as error:
    raise MissingDependency('traces and metrics need OpenTelemetry: pip install "wsbroadcast[otel]"') from error

# At most so many durations are recorded in a histogram when it is collected. They take about 18 ms.
_MOST_RECORDED = 1000

# How many broadcasts are remembered. A node makes one span for a broadcast that comes to several audiences.
_REMEMBERED = 1024

_Labels = dict[str, str]


def _version() -> str | None:
    try:
        return version(PREFIX)
    except PackageNotFoundError:
        return None


# Metrics.


def instrument(
    *managers: ConnectionManager, meter_provider: MeterProvider | None = None, **named: ConnectionManager
) -> None:
    """Let OpenTelemetry read the metrics of managers whenever it collects. Nothing is recorded in between.

    Call it once. Histograms are filled when they are collected, from the counts of the buckets. So the counts are
    exact, and each duration is taken as the middle of its bucket in the sum. If there were more than 1,000 durations
    since the last collection, about 1,000 are recorded, in the same proportions.

    Args:
        managers: One manager. Give several by keyword, so that the attribute `wsbroadcast.manager` tells them apart.
        meter_provider: Where the instruments are made; the global one by default.
        named: Managers by name. The name is the value of the attribute.

    Raises:
        ConfigurationError: If no manager is given, or several without names.
    """
    if len(managers) + len(named) == 0 or (managers and len(managers) + len(named) > 1):
        raise ConfigurationError("write instrument(manager), or with names instrument(chat=…, prices=…)")
    meter = get_meter(PREFIX, _version() or "", meter_provider)
    sources: list[tuple[_Labels, ConnectionManager]] = [({}, manager) for manager in managers]
    sources += [({f"{PREFIX}.manager": name}, manager) for name, manager in named.items()]
    recorders: list[Callable[[list[tuple[_Labels, Stats]]], None]] = []
    for measure in MEASURES:
        if measure.kind == "histogram":
            recorders.append(_Recorder(measure, meter).record)
        else:
            _observe(measure, meter, sources)
    _observe_first(meter, sources, recorders)


def _observe(measure: Measure, meter: Meter, sources: list[tuple[_Labels, ConnectionManager]]) -> None:
    def callback(options: CallbackOptions) -> Iterable[Observation]:
        for labels, manager in sources:
            for own, value in measure.points(manager.stats()):
                attributes = labels if own is None else {**labels, f"{PREFIX}.{own[0]}": own[1]}
                yield Observation(value, attributes)

    if measure.kind == "counter":
        make: Callable[..., object] = meter.create_observable_counter
    elif measure.unit == "1":
        make = meter.create_observable_gauge
    else:  # a number that can be added up over nodes
        make = meter.create_observable_up_down_counter
    make(f"{PREFIX}.{measure.name}", [callback], measure.unit, measure.help)


def _observe_first(
    meter: Meter,
    sources: list[tuple[_Labels, ConnectionManager]],
    recorders: list[Callable[[list[tuple[_Labels, Stats]]], None]],
) -> None:
    # OpenTelemetry has no observable histogram. When it asks this instrument, the histograms are filled.
    def callback(options: CallbackOptions) -> Iterable[Observation]:
        found = [(labels, manager.stats()) for labels, manager in sources]
        for record in recorders:
            record(found)
        return [Observation(len(sources))]

    meter.create_observable_up_down_counter(
        f"{PREFIX}.managers", [callback], "{manager}", "Managers that are observed."
    )


class _Recorder:
    """Records the durations that have come since the last collection."""

    def __init__(self, measure: Measure, meter: Meter) -> None:
        self._measure = measure
        self._instrument: Instrument = meter.create_histogram(
            f"{PREFIX}.{measure.name}",
            measure.unit,
            measure.help,
            explicit_bucket_boundaries_advisory=measure.bounds,
        )
        bounds = measure.bounds
        self._middles = [*map(_middle, (0.0, *bounds), bounds), 2 * bounds[-1]]
        self._before: dict[str, tuple[int, ...]] = {}

    def record(self, found: list[tuple[_Labels, Stats]]) -> None:
        for labels, stats in found:
            name = "".join(labels.values())
            counts = self._measure.histogram(stats).counts
            before = self._before.get(name, (0,) * len(counts))
            self._before[name] = counts
            new = [now - then for now, then in zip(counts, before, strict=True)]
            total = sum(new)
            for number, middle in zip(new, self._middles, strict=True):
                if total > _MOST_RECORDED:
                    number = -(-number * _MOST_RECORDED // total)  # rounded up, so that rare durations are seen
                for _ in range(number):
                    self._instrument.record(middle, labels)


def _middle(low: float, high: float) -> float:
    return (low + high) / 2


# Traces.


def trace(source: ConnectionManager | Publisher, tracer_provider: TracerProvider | None = None) -> None:
    """Trace the broadcasts of a manager or a publisher from now on.

    Each broadcast is a span of the kind `PRODUCER`. Each node that traces makes one more span, of the kind `CONSUMER`,
    for its delivery to all connections of the node. That span has a trace of its own, with a link to the broadcast. The
    hooks `on_broadcast` and `on_deliver` are child spans. No channel, user or message is written into a span.

    Args:
        source: Whose broadcasts are traced.
        tracer_provider: Makes the spans; the global one by default.
    """
    spans = Spans(get_tracer(PREFIX, _version(), tracer_provider))
    if isinstance(source, Publisher):
        source.tracing = spans
    else:
        source.hooks.tracing = spans


class Spans:
    """Makes the spans of broadcasts. If a span can't be made or ended, the message is sent all the same.

    Args:
        tracer: Makes the spans.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._throttle = Throttle()
        # The delivery spans of the newest broadcasts that came here, by the `traceparent` of the broadcast.
        self._delivered: dict[str, SpanContext] = {}

    @contextmanager
    def publishing(self, publications: Publications) -> Iterator[None]:
        """Make the span of one broadcast; if it is recorded, write its `traceparent` into the publications."""
        kind = _kind(publications)
        attributes = _attributes("publish", "send", kind)
        attributes["messaging.message.body.size"] = publications[0].size if publications else 0
        name = f"publish {kind}"
        with self._span(name, kind=SpanKind.PRODUCER, attributes=attributes) as span:
            context = span.get_span_context()
            where = _traceparent(context) if span.is_recording() and context.is_valid else ""
            for publication in publications:
                publication.traceparent = where
            yield

    @contextmanager
    def delivering(self, publication: Publication) -> Iterator[None]:
        """Make the span of a delivery on this node; the other audiences of the same broadcast use that span too."""
        where = publication.traceparent or ""
        if (before := self._delivered.get(where)) is not None:
            with _within(before):
                yield
            return
        kind = publication.audience.kind
        with self._span(
            f"deliver {kind}",
            context=Context(),
            kind=SpanKind.CONSUMER,
            attributes=_attributes("deliver", "process", kind),
            links=[Link(_remote(where))],
        ) as span:
            self._remember(where, span.get_span_context())
            yield

    def hook(self, event: str, name: str) -> AbstractContextManager[object]:
        """Make the span of a hook, if the span around it is recorded."""
        if not get_current_span().is_recording() and not get_current_span().get_span_context().trace_flags.sampled:
            return nullcontext()
        return self._span(event, attributes={"code.function.name": name})

    @contextmanager
    def _span(self, name: str, **options: Any) -> Iterator[Span]:
        # A sampler or a span processor may raise.
        making = self._tracer.start_as_current_span(name, **options)
        try:
            span = making.__enter__()
        except Exception as error:
            self._report(error)
            yield INVALID_SPAN
            return
        raised: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
        raised = None, None, None
        try:
            yield span
        except BaseException as error:
            raised = type(error), error, error.__traceback__
            raise
        finally:
            try:
                making.__exit__(*raised)
            except Exception as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        if self._throttle.is_due("span"):
            logger.error("a span was not made", exc_info=error, extra=about("tracing.failed"))

    def _remember(self, where: str, context: SpanContext) -> None:
        self._delivered[where] = context
        if len(self._delivered) > _REMEMBERED:
            del self._delivered[next(iter(self._delivered))]


@contextmanager
def _within(context: SpanContext) -> Iterator[None]:
    token = attach(set_span_in_context(NonRecordingSpan(context), Context()))
    try:
        yield
    finally:
        detach(token)


def _kind(publications: Publications) -> str:
    return publications[0].audience.kind if len(publications) == 1 else "several"


def _attributes(name: str, type_: str, kind: str) -> dict[str, str | int]:
    # The names are those of OpenTelemetry's conventions for messaging.
    return {
        "messaging.system": PREFIX,
        "messaging.operation.name": name,
        "messaging.operation.type": type_,
        f"{PREFIX}.audience": kind,
    }


def _traceparent(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _remote(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
