"""Whether an envelope is newer than those that came before it from the same node."""

from __future__ import annotations

from wsbroadcast.engines.broker.envelope import Origin

# Origins and names that are remembered, twice: a node that broadcasts to more audiences than that between two
# envelopes for the same one is no longer checked for that one.
_GENERATION = 16384

# What is older by more than this is no old envelope: the newest was forged, and must not silence its node for ever.
_BELIEVABLE = 2**20


class Freshness:
    """The newest place in the order that was seen, by node and name.

    An envelope that a broker, a proxy or somebody who listens brings a second time is not fresh; neither is one that
    was held up while newer ones overtook it.
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
            return False
        young[key] = seq
        return True
