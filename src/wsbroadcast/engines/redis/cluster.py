"""The link to a Redis cluster: two connections to each shard."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from wsbroadcast.engines.broker.link import Host, Inlet, Parcel
from wsbroadcast.engines.redis.link import Answer, Pair, RedisLink, together
from wsbroadcast.engines.redis.protocol import ErrorReply, pack
from wsbroadcast.engines.redis.target import key_slot
from wsbroadcast.exceptions import ConfigurationError
from wsbroadcast.history import Appended

# A node of the cluster that hasn't answered after this part of the time to connect is left out, because others may.
_ASK_PART = 1 / 3


class Slots(NamedTuple):
    """A range of the cluster's hash slots, and the node that serves it."""

    first: int
    last: int
    host: Host


class ClusterLink(RedisLink):
    """Publishes and receives each name at the node that serves its hash slot, so the order is the same for all.

    When one connection is lost, or a slot moves, the whole link is lost. The next link asks the cluster again. The
    supervisor's echo passes only one node, so each receiving connection is pinged too.
    """

    # Set once the link is open: the ranges of slots in order, their first slots, and the connections to their nodes.
    _slots: Sequence[Slots] = ()
    _firsts: Sequence[int] = ()
    _pairs: Mapping[Host, Pair] = MappingProxyType({})

    async def open(self) -> None:
        """Ask which node serves which slots, connect to each, and check all permissions that are needed."""
        # SUNSUBSCRIBE without a name does nothing. It is unknown to servers without sharded pub/sub.
        answers = await self.ask_all(self.target.access, self._needs, pack("CLUSTER", "SLOTS"), pack("SUNSUBSCRIBE"))
        is_sharded = not any(isinstance(answer.replies[1], ErrorReply) for answer in answers)
        answer = random.choice(answers)  # noqa: S311  # each time another: one may be behind the others
        self._slots = sorted(_slots(answer))
        self._firsts = [each.first for each in self._slots]
        pairs = {each.host: self.new_pair(each.host, is_sharded=is_sharded) for each in self._slots}
        self._pairs = pairs
        # So many names that nearly every node serves one.
        names = [f"{self.probe}:{number}" for number in range(8 * len(pairs))]
        probes = {self.pair_of(name): name for name in names}
        await self.open_pairs({pair: probes.get(pair) for pair in pairs.values()})

    async def read(self, inlet: Inlet) -> None:
        """Hand over what arrives until one of the connections is lost."""
        for pair in self._pairs.values():
            pair.listener.inlet = inlet
        await together(self.wait_lost(), *map(self.watch, self._pairs.values()))

    async def look_at(self, pair: Pair) -> None:
        """Check that the receiving connection is alive, too."""
        await pair.listener.ping()
        await super().look_at(pair)

    async def subscribe(self, names: Sequence[str]) -> None:
        """Subscribe with one command for each slot, and wait for each confirmation."""
        grouped = self._grouped(names)
        refusals = await together(*(_refusal(pair, groups) for pair, groups in grouped))
        for refusal in filter(None, refusals):
            raise refusal

    async def unsubscribe(self, names: Sequence[str]) -> None:
        """Unsubscribe with one command for each slot, and wait for each confirmation."""
        await together(*(pair.listener.unsubscribe(groups) for pair, groups in self._grouped(names)))

    async def publish(self, parcels: Sequence[Parcel]) -> Sequence[Exception | Appended | None]:
        """Publish in one write for each node, and wait for the answers."""
        positions: dict[Pair, list[int]] = defaultdict(list)
        for position, parcel in enumerate(parcels):
            positions[self.pair_of(parcel.name)].append(position)
        outcomes: list[Exception | Appended | None] = [None] * len(parcels)

        async def publish(pair: Pair, mine: list[int]) -> None:
            for position, outcome in zip(mine, await pair.publish([parcels[at] for at in mine]), strict=True):
                outcomes[position] = outcome

        await together(*(publish(pair, mine) for pair, mine in positions.items()))
        return outcomes

    def pair_of(self, name: str) -> Pair:
        """Return the connections to the node that serves the name's slot."""
        slot = key_slot(name.encode())
        at = bisect_right(self._firsts, slot) - 1
        if at < 0 or slot > self._slots[at].last:
            raise ConnectionError(f"no node of the cluster {self.target.address} serves the slot {slot}")
        return self._pairs[self._slots[at].host]

    @property
    def pairs(self) -> Collection[Pair]:
        """The connections to each node that serves slots."""
        return self._pairs.values()

    def _grouped(self, names: Sequence[str]) -> list[tuple[Pair, list[list[str]]]]:
        # A command takes only names of one slot.
        by_slot: dict[int, list[str]] = defaultdict(list)
        for name in names:
            by_slot[key_slot(name.encode())].append(name)
        by_pair: dict[Pair, list[list[str]]] = defaultdict(list)
        for group in by_slot.values():
            by_pair[self.pair_of(group[0])].append(group)
        return list(by_pair.items())


async def _refusal(pair: Pair, groups: list[list[str]]) -> ConfigurationError | None:
    # The error is returned. If it was raised, the questions to the other nodes would end, but their answers would still
    # come.
    try:
        await pair.listener.subscribe(groups)
    except ConfigurationError as refusal:
        return refusal
    return None


def _slots(answer: Answer) -> list[Slots]:
    # https://redis.io/docs/latest/commands/cluster-slots/: first and last slot, the master, its replicas.
    found = []
    for each in answer.replies[0] if isinstance(answer.replies[0], list) else ():
        match each:
            case [int(first), int(last), [name, int(port), *_], *_]:
                # A node without a name is the one that was asked.
                known = name.decode() if isinstance(name, bytes) else ""
                found.append(Slots(first, last, Host(known if known not in ("", "?") else answer.host.name, port)))
    if not found:
        raise ConnectionError(f"the cluster at {answer.host} serves no slots yet")
    return found
