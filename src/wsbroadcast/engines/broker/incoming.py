"""What comes from the broker. It is checked, and handed to the node unless it is old."""

from __future__ import annotations

import asyncio

from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.envelope import BadEnvelope, Origin, decode
from wsbroadcast.engines.broker.health import LinkHealth
from wsbroadcast.engines.broker.interest import Interest
from wsbroadcast.engines.broker.link import NOWHERE, Place, Stretch
from wsbroadcast.engines.broker.names import AudienceNames
from wsbroadcast.engines.broker.outgoing import Outgoing
from wsbroadcast.engines.contract import Receiver
from wsbroadcast.history import History, Replay
from wsbroadcast.logs import Throttle, about, logger
from wsbroadcast.publication import Position, Publication
from wsbroadcast.stats import EngineCounters

# How many pairs of node and name are remembered in each of two generations. If a node broadcasts to more audiences than
# that between two envelopes for the same audience, the second of these isn't checked.
_GENERATION = 16384

# If an envelope seems older by more than this, the newest one was forged. That must not silence the node for ever.
_BELIEVABLE = 2**20


class Freshness:
    """The newest number that was seen, by node and name.

    An envelope isn't fresh if a broker, a proxy or an eavesdropper brings it a second time, or if newer ones have
    overtaken it.
    """

    def __init__(self) -> None:
        self._young: dict[tuple[str, str], int] = {}
        self._old: dict[tuple[str, str], int] = {}

    def is_fresh(self, origin: Origin, name: str) -> bool:
        """Tell whether an envelope is newer than all before it, and remember it."""
        node, seq = origin
        key = (node, name)
        young = self._young
        newest = young.get(key)
        if newest is None:
            newest = self._old.get(key, 0)
            if len(young) >= _GENERATION:
                self._old, self._young = young, {}
                young = self._young
        if 0 <= newest - seq < _BELIEVABLE:
            young[key] = newest  # the old generation, which may have had it, is gone now
            return False
        young[key] = seq
        return True


class Incoming:
    """The inlet of one session's links.

    Args:
        where: The engine and its broker's address, for logs.
        names: The names of audiences at the broker.
        max_message_bytes: The largest payload that is taken, in bytes.
        interest: Knows the names that are subscribed to.
        outgoing: Knows what this node has published.
        health: Is told when something comes, and when something is missing.
        receiver: The node.
        counters: Where bad envelopes are counted.
    """

    def __init__(
        self,
        where: str,
        names: AudienceNames,
        max_message_bytes: int,
        interest: Interest,
        outgoing: Outgoing,
        health: LinkHealth,
        receiver: Receiver,
        counters: EngineCounters,
    ) -> None:
        self.audiences: dict[str, Audience] = {}
        """The wanted audiences, by their names at the broker."""
        self._where = where
        self._names = names
        self._max_message_bytes = max_message_bytes
        self._interest = interest
        self._outgoing = outgoing
        self._health = health
        self._receiver = receiver
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._freshness = Freshness()
        self._throttle = Throttle()

    def take(self, name: str, envelope: bytes, place: Place | None = None) -> None:
        """Hand an envelope to the node, if it is valid and fresh."""
        self._health.last_sign = self._loop.time()
        audience = self.audiences.get(name)
        if audience is None:
            self._take_other(name, envelope)
            return
        try:
            publication, origin = decode(envelope, audience, self._max_message_bytes)
            is_kept = isinstance(publication, Publication) and self._is_placed(publication, place)
            if origin is not None:
                if self._outgoing.is_forged(origin):
                    raise BadEnvelope("forged")
                # A kept one is checked by its position instead. It may come late, because it was missed and read later.
                if not is_kept and not self._freshness.is_fresh(origin, name):
                    raise BadEnvelope("stale")
        except BadEnvelope as bad:
            self._drop(str(bad), name, len(envelope))
        else:
            self._receiver.take(publication)

    def _is_placed(self, publication: Publication, place: Place | None) -> bool:
        if place is NOWHERE:
            publication.position = None
        elif place is not None:
            publication.place(place.position, place.previous)
        publication.kept_at = self._loop.time()
        return publication.position is not None

    def replay(self, audience: Audience, stretch: Stretch, history: History) -> Replay:
        """Make publications of what a broker has kept. Bad envelopes are left out, as they were when they came."""
        name, now, epoch = self._names.of(audience), self._loop.time(), stretch.top.epoch
        publications: list[Publication] = []
        base = previous = stretch.base
        for entry in stretch.entries:
            if entry.age > history.seconds:
                base = max(base, entry.offset)
                publications.clear()
            else:
                try:
                    publication, _ = decode(entry.envelope, audience, self._max_message_bytes)
                    if not isinstance(publication, Publication):
                        raise BadEnvelope("schema")
                    before = previous if entry.previous is None else entry.previous
                    publication.place(Position(epoch, entry.offset), before, now - entry.age)
                    publications.append(publication)
                except BadEnvelope as bad:
                    self._drop(str(bad), name, len(entry.envelope))
            previous = entry.offset
        if len(publications) > history.messages:
            base = max(base, publications[-history.messages - 1].offset)
            publications = publications[-history.messages :]
        return Replay(stretch.top, publications, base)

    def missed(self, why: str, since: float | None = None) -> None:
        """Report messages that are missing although the link stays. Many such reports become one gap."""
        self._health.missed(why, since)

    def _take_other(self, name: str, envelope: bytes) -> None:
        if name == self._health.echoes.name:
            if not self._health.echoes.take(envelope):
                self._drop("echo", name, len(envelope))
        elif name not in self._interest:  # else the name is being released: it has no connections here any more
            self._drop("unknown_name", name, len(envelope))

    def _drop(self, reason: str, name: str, size: int) -> None:
        self._counters.bad_envelopes[reason] += 1
        if self._throttle.is_due("bad envelope"):  # a broken publisher usually sends many
            logger.warning(
                "%s: dropped a bad envelope (%s), %d bytes under %.200r",
                self._where,
                reason,
                size,
                self._names.for_logs(name),
                extra=about("envelope.bad", reason=reason, bytes=size),
            )
