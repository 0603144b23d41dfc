"""What comes from the broker: checked, fresh, and handed on to the node."""

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

# Origins and names that are remembered, twice: a node that broadcasts to more audiences than that between two
# envelopes for the same one is no longer checked for that one.
_GENERATION = 16384

# What is older by more than this is not an old envelope: the newest was forged, and must not silence its node for ever.
_BELIEVABLE = 2**20


class Freshness:
    """The newest place in the order that was seen, by node and name.

    An envelope that a broker, a proxy or an eavesdropper brings a second time is not fresh; neither is one that was
    held up while newer ones overtook it.
    """

    def __init__(self) -> None:
        self._young: dict[tuple[str, str], int] = {}
        self._old: dict[tuple[str, str], int] = {}

    def is_fresh(self, origin: Origin, name: str) -> bool:
        """Tell whether it is newer than all before it, and remember it."""
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
            young[key] = newest  # it may have been the old generation's, which is gone now
            return False
        young[key] = seq
        return True


class Incoming:
    """The inlet of one session's links.

    Args:
        where: The engine and its broker's address, for logs.
        names: How audiences are called at the broker.
        max_message_bytes: The largest payload that is taken.
        interest: Knows the names that the broker holds for us.
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
        """The wanted audiences by their names at the broker."""
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
        """Hand an envelope on, if it is a good one."""
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
                # What is kept has its place instead: one that was missed and read later is older than what came before.
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
        """Read a stretch of what a broker has kept; what is no good envelope is left out, as it was when it came."""
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
        """Report messages that are missing although the link lives on; many such reports are one gap."""
        self._health.missed(why, since)

    def _take_other(self, name: str, envelope: bytes) -> None:
        if name == self._health.echoes.name:
            if not self._health.echoes.take(envelope):
                self._drop("echo", name, len(envelope))
        elif name not in self._interest:  # else it is on its way out: nobody is there any more
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
