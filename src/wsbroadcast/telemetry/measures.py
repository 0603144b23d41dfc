"""The metrics: their names, what they mean, and where `Stats` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from wsbroadcast.protocols.centrifuge.codes import Disconnect, ErrorCode
from wsbroadcast.stats import CONNECTION_BOUNDS, WAIT_BOUNDS, Histogram, Stats

PREFIX = "wsbroadcast"
"""The beginning of all names."""

OTHER = "other"
"""The value of a label under which unknown values are counted, such as those of a newer node."""

Kind = Literal["gauge", "counter", "histogram"]

Value = int | Mapping[str, int] | Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One metric.

    A label has the values in `values`. Each of them has a number from the beginning, so the first event of a kind shows
    as an increase. Any other value is counted as `other`, so neither a client nor a forged message of another node can
    add series.
    """

    name: str
    """The name in OpenTelemetry, without the prefix."""
    kind: Kind
    """A gauge goes up and down, a counter only up. A histogram is of durations."""
    unit: str
    """The unit, as UCUM writes it."""
    help: str
    """What the metric means, in one line."""
    read: Callable[[Stats], Value]
    """Reads the value: a number, or numbers by the value of the label."""
    label: str = ""
    """The name of the label; empty for none."""
    values: tuple[str, ...] = ()
    """The known values of the label."""
    bounds: tuple[float, ...] = ()
    """The bounds of a histogram, in seconds."""
    prometheus_name: str
    """The name of the metric's family in Prometheus, without `_total`."""

    def histogram(self, stats: Stats) -> Histogram:
        """Return the histogram of a duration; an empty one if its bounds differ, as at a node of another version."""
        found = self.read(stats)
        if isinstance(found, Histogram) and found.bounds == self.bounds and len(found.counts) == len(self.bounds) + 1:
            return found
        return Histogram(bounds=self.bounds, counts=(0,) * (len(self.bounds) + 1))

    def points(self, stats: Stats) -> Iterator[tuple[tuple[str, str] | None, int]]:
        """Return the numbers of a gauge or a counter, each with its label."""
        found = self.read(stats)
        assert not isinstance(found, Histogram)
        if not isinstance(found, Mapping):
            yield None, found
            return
        known = dict.fromkeys(self.values, 0)
        for value, number in found.items():
            value = self._known(value)
            known[value] = known.get(value, 0) + number
        for value, number in known.items():
            yield (self.label, value), number

    def _known(self, value: str) -> str:
        if value in self.values:
            return value
        # Some values have details behind them: "server protocol WSProtocol", "unknown uvicorn: transport".
        return next((known for known in self.values if value.startswith((f"{known} ", f"{known}:"))), OTHER)


# How Prometheus writes units. A unit in braces only says what is counted, and isn't written.
_SUFFIXES = {"By": "_bytes", "s": "_seconds"}

_REFUSED = (
    "send is taken over",
    "receive is wrapped",
    "send is wrapped",
    "server protocol",
    "unknown uvicorn",
    "the handshake is not complete",
    "compressed",
    "not in chunks",
    "long poll",
)
_SINKS = ("uvicorn", "asgi", "uvicorn_sse", "asgi_sse", "long_poll")
_DROPPED = ("disconnect", "drop_newest", "drop_oldest", "conflate", "closed", "not_json", "opening")
_CLIENT_ERRORS = tuple(str(int(code)) for code in (*ErrorCode, *Disconnect))
_LIMITS = (
    "max_connections",
    "max_connections_per_user",
    "max_connections_per_address",
    "draining",
    "max_handshake_rate",
    "max_channels_per_connection",
    "max_inbound_bytes",
    "max_inbound_rate",
    "max_router_inbound_rate",
)
_RECOVERIES = ("recovered", "epoch", "expired", "too_many", "unavailable", "not_kept")
_BAD_ENVELOPES = ("echo", "forged", "header", "must", "schema", "stale", "text", "too_large", "unknown_name", "version")


def _gauge(name: str, unit: str, help: str, read: Callable[[Stats], Value], **label: tuple[str, ...]) -> Measure:  # noqa: A002
    return _measure("gauge", name, unit, help, read, label)


def _counter(name: str, unit: str, help: str, read: Callable[[Stats], Value], **label: tuple[str, ...]) -> Measure:  # noqa: A002
    return _measure("counter", name, unit, help, read, label)


def _measure(
    kind: Kind,
    name: str,
    unit: str,
    help: str,  # noqa: A002
    read: Callable[[Stats], Value],
    label: Mapping[str, tuple[str, ...]],
) -> Measure:
    [(key, values)] = label.items() or [("", ())]
    return Measure(
        name=name,
        kind=kind,
        unit=unit,
        help=help,
        read=read,
        label=key,
        values=values,
        prometheus_name=_prometheus_name(name, unit),
    )


def _duration(name: str, help: str, bounds: tuple[float, ...], read: Callable[[Stats], Value]) -> Measure:  # noqa: A002
    name = f"{name}.duration"
    return Measure(
        name=name,
        kind="histogram",
        unit="s",
        help=help,
        read=read,
        bounds=bounds,
        prometheus_name=_prometheus_name(name, "s"),
    )


def _prometheus_name(name: str, unit: str) -> str:
    return f"{PREFIX}.{name}".replace(".", "_") + _SUFFIXES.get(unit, "")


# In OpenTelemetry names are nested with dots. SignalR's names are the model: no others for sockets are stable yet.
MEASURES = (
    _gauge("connections", "{connection}", "Open connections.", lambda s: s.sinks, sink=_SINKS),
    _gauge("users", "{user}", "Users with at least one connection.", lambda s: s.users),
    _gauge("channels", "{channel}", "Channels with at least one connection.", lambda s: s.channels),
    _gauge(
        "fast_path.refused",
        "{connection}",
        "Open connections that are not on the fast path.",
        lambda s: s.fast_path_refused,
        reason=_REFUSED,
    ),
    _gauge("slow_consumers", "{connection}", "Open connections past their high-water mark.", lambda s: s.behind),
    _gauge("backlog.size", "By", "Unsent bytes in the backlogs of connections.", lambda s: s.backlog_bytes),
    _gauge(
        "backlog.messages", "{message}", "Unsent messages in the backlogs of connections.", lambda s: s.backlog_messages
    ),
    _counter("connects", "{connection}", "Connections that were opened.", lambda s: s.connects),
    _counter("disconnects", "{connection}", "Connections that have ended.", lambda s: s.disconnects),
    _counter("broadcasts", "{message}", "Broadcasts handed to the recipients of this node.", lambda s: s.broadcasts),
    _counter("sends", "{message}", "Messages to single connections.", lambda s: s.sends),
    _counter("deliveries", "{message}", "Messages handed to connections.", lambda s: s.deliveries),
    _counter(
        "dropped",
        "{message}",
        "Messages that were meant for connections and were dropped.",
        lambda s: s.dropped,
        reason=_DROPPED,
    ),
    _counter(
        "evicted",
        "{connection}",
        "Slow consumers that were thrown out.",
        lambda s: s.evicted,
        reason=("backlog_full", "send_timeout"),
    ),
    _counter("limited", "{refusal}", "Refusals because a limit was passed.", lambda s: s.limited, limit=_LIMITS),
    _counter(
        "client_errors",
        "{error}",
        "Errors and closes that clients of the Centrifuge protocol have caused.",
        lambda s: s.client_errors,
        error=_CLIENT_ERRORS,
    ),
    _counter("held_back", "{message}", "Broadcasts that an on_broadcast hook held back.", lambda s: s.vetoed),
    _counter(
        "unpublished",
        "{message}",
        "Messages of a router's clients that the broker did not take.",
        lambda s: s.unpublished,
    ),
    _counter("hook_errors", "{error}", "Hooks that raised or were cut off.", lambda s: s.hook_errors),
    _counter(
        "invalid",
        "{message}",
        "Messages of clients that were not of a type in receives=.",
        lambda s: s.invalid,
    ),
    _counter("heals", "{heal}", "How often a history had everything that was missing.", lambda s: s.heals),
    _counter(
        "recoveries",
        "{recovery}",
        "Connections that asked for what they had missed, by the result.",
        lambda s: {"recovered": s.recoveries, **s.refused_recoveries},
        result=_RECOVERIES,
    ),
    _counter("unkept", "{message}", "Messages that a history did not keep.", lambda s: s.unkept),
    _gauge(
        "engine.connected",
        "1",
        "Whether there is a connection to the broker, or none is needed.",
        lambda s: int(s.engine.is_connected),
    ),
    _counter(
        "engine.reconnects",
        "{reconnect}",
        "Connections to the broker that were lost and replaced.",
        lambda s: s.engine.reconnects,
    ),
    _counter("engine.gaps", "{gap}", "Outages of the broker in which messages were lost.", lambda s: s.engine.gaps),
    _counter(
        "engine.publish_failures",
        "{message}",
        "Publications that the broker did not take.",
        lambda s: s.engine.publish_failures,
    ),
    _counter(
        "engine.bad_envelopes",
        "{message}",
        "Messages from the broker that were refused and dropped.",
        lambda s: s.engine.bad_envelopes,
        reason=_BAD_ENVELOPES,
    ),
    _duration(
        "connection", "How long ended connections had lasted.", CONNECTION_BOUNDS, lambda s: s.connection_seconds
    ),
    _duration(
        "delivery",
        "Time from a message's arrival at the node until it was written; measured for the first of each loop turn.",
        WAIT_BOUNDS,
        lambda s: s.delivery_seconds,
    ),
    _duration(
        "recovery",
        "Time from a connection's request for what it missed until it had all of it.",
        WAIT_BOUNDS,
        lambda s: s.recovery_seconds,
    ),
    _duration(
        "engine.publish", "How long the broker took to take messages.", WAIT_BOUNDS, lambda s: s.engine.publish_seconds
    ),
    _duration(
        "engine.round_trip",
        "How long a message took that the engine sent to itself through the broker.",
        WAIT_BOUNDS,
        lambda s: s.engine.round_trip_seconds,
    ),
)
"""All metrics."""
