"""Which metrics there are: their names, what they mean, and where they stand in `Stats`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from wsbroadcast.stats import CONNECTION_BOUNDS, WAIT_BOUNDS, Histogram, Stats

PREFIX = "wsbroadcast"
"""What all names begin with."""

OTHER = "other"
"""What stands for a value of a label that isn't known here, such as one of a newer node."""

Kind = Literal["gauge", "counter", "histogram"]

Value = int | Mapping[str, int] | Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One metric.

    A label has the values that are known here, each with a number from the beginning, so that the first event of a kind
    is an increase. What else is found is counted as `other`. So neither a client nor a forged message of another node
    can make series.
    """

    name: str
    """Its name in OpenTelemetry, without the prefix."""
    kind: Kind
    """Whether it goes up and down, is counted, or is a duration."""
    unit: str
    """Its unit, as UCUM writes it."""
    help: str
    """What it means, in one line."""
    read: Callable[[Stats], Value]
    """Finds it: a number, or numbers by the value of the label."""
    label: str = ""
    """The name of the label; empty for none."""
    values: tuple[str, ...] = ()
    """The values that the label has."""
    bounds: tuple[float, ...] = ()
    """The bounds of a histogram, in seconds."""
    prometheus_name: str
    """The name of its family in Prometheus, without `_total`."""

    def histogram(self, stats: Stats) -> Histogram:
        """Return what is known of a duration; nothing if it has other bounds, as of a node of another version."""
        found = self.read(stats)
        if isinstance(found, Histogram) and found.bounds == self.bounds and len(found.counts) == len(self.bounds) + 1:
            return found
        return Histogram(bounds=self.bounds, counts=(0,) * (len(self.bounds) + 1))

    def points(self, stats: Stats) -> Iterator[tuple[tuple[str, str] | None, int]]:
        """Return the numbers of what is no histogram, each with its label."""
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
        # "server protocol WSProtocol" and "unknown uvicorn: transport" say what it was
        return next((known for known in self.values if value.startswith((f"{known} ", f"{known}:"))), OTHER)


# How Prometheus writes units; the others only say what is counted.
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
_DROPPED = ("disconnect", "drop_newest", "drop_oldest", "conflate", "closed")
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


# In OpenTelemetry the names are nested with dots, as those of SignalR are, which are the only stable ones for sockets.
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
    _gauge("slow_consumers", "{connection}", "Connections past their high-water mark.", lambda s: s.behind),
    _gauge("backlog.size", "By", "Bytes that wait for slow consumers.", lambda s: s.backlog_bytes),
    _gauge("backlog.messages", "{message}", "Messages that wait for slow consumers.", lambda s: s.backlog_messages),
    _counter("connects", "{connection}", "Connections that came.", lambda s: s.connects),
    _counter("disconnects", "{connection}", "Connections that went.", lambda s: s.disconnects),
    _counter("broadcasts", "{message}", "Broadcasts handed to the recipients of this node.", lambda s: s.broadcasts),
    _counter("sends", "{message}", "Messages to single connections.", lambda s: s.sends),
    _counter("deliveries", "{message}", "Messages handed to connections.", lambda s: s.deliveries),
    _counter(
        "dropped",
        "{message}",
        "Messages that were handed to connections and do not arrive.",
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
    _counter("limited", "{refusal}", "What went past a limit and was refused.", lambda s: s.limited, limit=_LIMITS),
    _counter("held_back", "{message}", "Broadcasts that an on_broadcast hook held back.", lambda s: s.vetoed),
    _counter(
        "unpublished",
        "{message}",
        "Messages of clients of a router that the broker did not take.",
        lambda s: s.unpublished,
    ),
    _counter("hook_errors", "{error}", "Hooks that raised or were cut off.", lambda s: s.hook_errors),
    _counter("heals", "{heal}", "Times that missing messages were read from a history.", lambda s: s.heals),
    _counter(
        "recoveries",
        "{recovery}",
        "Connections that asked for what they had missed, by what became of it.",
        lambda s: {"recovered": s.recoveries, **s.refused_recoveries},
        result=_RECOVERIES,
    ),
    _counter("unkept", "{message}", "Messages that were published past a history.", lambda s: s.unkept),
    _gauge(
        "engine.connected",
        "1",
        "Whether there is a connection to the broker, or none is needed.",
        lambda s: int(s.engine.is_connected),
    ),
    _counter(
        "engine.reconnects", "{reconnect}", "Lost connections to the broker, replaced.", lambda s: s.engine.reconnects
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
        "What came from the broker and was dropped.",
        lambda s: s.engine.bad_envelopes,
        reason=_BAD_ENVELOPES,
    ),
    _duration(
        "connection", "How long connections lasted that have ended.", CONNECTION_BOUNDS, lambda s: s.connection_seconds
    ),
    _duration(
        "delivery",
        "From when the node had a message until it was written; the first of each turn of the event loop.",
        WAIT_BOUNDS,
        lambda s: s.delivery_seconds,
    ),
    _duration(
        "recovery",
        "From when a connection said where it was until it had what it had missed.",
        WAIT_BOUNDS,
        lambda s: s.recovery_seconds,
    ),
    _duration(
        "engine.publish", "How long the broker took to take messages.", WAIT_BOUNDS, lambda s: s.engine.publish_seconds
    ),
    _duration(
        "engine.round_trip",
        "How long a message of the engine to itself took.",
        WAIT_BOUNDS,
        lambda s: s.engine.round_trip_seconds,
    ),
)
"""All metrics."""
