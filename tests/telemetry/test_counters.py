"""The counters say what happened: a long run with everything that is counted, held against what the clients saw."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from functools import partial
from random import Random

import pytest

from tests.support.asgi import Peer, eventually, turns
from wsbroadcast import (
    HOLD_BACK,
    Audience,
    CloseCode,
    Connection,
    ConnectionManager,
    EngineUnavailable,
    Gap,
    History,
    HoldBack,
    LimitExceeded,
    Limits,
    Message,
    SlowConsumer,
)
from wsbroadcast.delivery import pace
from wsbroadcast.manager import core_of
from wsbroadcast.telemetry.prometheus import exposition
from wsbroadcast.testing import Cluster

MESSAGES = 100_000 if os.environ.get("WSBROADCAST_TEST_FULL") else 4_000
KEPT = ["kept:a", "kept:b"]
PLAIN = ["newest", "oldest", "strict"]
CHANNELS = [*KEPT, *PLAIN]


class Tally:
    """What one node did, as it was seen from outside."""

    def __init__(self, manager: ConnectionManager) -> None:
        self.manager = manager
        self.witness = Peer()
        self.peers: list[tuple[Peer, Connection]] = []
        self.ended: list[tuple[Peer, Connection]] = []
        self.counts: Counter[str] = Counter()
        self.recovered: Counter[str] = Counter()
        self.missed: set[str] = set()

        @manager.on_broadcast
        def hold_back(message: Message, audience: Audience) -> HoldBack | None:
            if message.data == "hold back":
                self.counts["vetoed"] += 1
                return HOLD_BACK
            if message.data == "fail":
                self.counts["hook_errors"] += 1
                raise ValueError("as it should")
            return None

        @manager.on_gap
        def gap(gap: Gap) -> None:
            self.counts["gaps"] += 1

    async def begin(self) -> None:
        await self.connect(self.witness, CHANNELS, "witness")

    async def connect(self, peer: Peer, channels: list[str], user: str, **options: object) -> Connection:
        connection = await self.manager.connect(peer.websocket, channels=channels, user=user, **options)  # type: ignore[arg-type]
        self.counts["connects"] += 1
        for recovery in connection.recovered.values():
            self.recovered["recovered" if recovery.recovered else recovery.reason] += 1
        self.peers.append((peer, connection))
        return connection

    def forget_ended(self) -> None:
        gone = [pair for pair in self.peers if not pair[1].is_open]
        self.peers = [pair for pair in self.peers if pair[1].is_open]
        self.ended += gone
        self.counts["disconnects"] += len(gone)

    @property
    def everybody(self) -> list[tuple[Peer, Connection]]:
        return self.peers + self.ended


class Run:
    """A seeded run over two nodes."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.random = Random(seed)
        self.nodes = [Tally(manager) for manager in cluster]
        self.is_cut = False
        self.published = 0
        self.positions: list[tuple[str, object]] = []

    async def go(self) -> None:
        for node in self.nodes:
            await node.begin()
        while self.published < MESSAGES:
            for _ in range(self.random.randrange(1, 40)):
                await self.publish()
            await self.something()
            for node in self.nodes:
                node.forget_ended()
        await self.mend()
        for node in self.nodes:
            for peer, _ in node.everybody:
                peer.resume()
        for node in self.nodes:
            await eventually(partial(has_nothing_waiting, node.manager))
        await turns(20)
        for node in self.nodes:
            await eventually(partial(has_been_seen, node))
            node.forget_ended()

    async def publish(self) -> None:
        node = self.nodes[0]
        channel = self.random.choice(CHANNELS)
        self.published += 1
        kind = self.random.random()
        text = "hold back" if kind < 0.01 else "fail" if kind < 0.02 else f"{self.published}" + "x" * 50
        try:
            if self.random.random() < 0.9:  # it waits for nobody, so that backlogs are filled
                receipt = node.manager.broadcast_nowait(text, channel=channel)
                await turns(3)
            else:
                receipt = await node.manager.broadcast(text, channel=channel)
        except ValueError:
            return
        if not receipt.is_held_back and self.is_cut and channel in KEPT:
            self.nodes[1].missed.add(channel)
        if receipt.position is not None:
            self.positions = [*self.positions[-20:], (channel, receipt.position)]

    async def something(self) -> None:
        node = self.random.choice(self.nodes)
        await self.random.choice(
            [self.come, self.come, self.refuse, self.stall, self.leave, self.cut, self.mend, self.send]
        )(node)

    async def come(self, node: Tally) -> None:
        if len(node.peers) > 12:
            return
        channel, since = self.random.choice(self.positions or [("kept:a", None)])
        if self.random.random() < 0.5 and since is not None and not self.is_cut:
            if self.random.random() < 0.2:
                since = "nowhere:17"
            await node.connect(Peer(), [channel], f"u{node.counts['connects']}", since={channel: since})
        else:
            channels = self.random.choice([["newest", "oldest"], self.random.sample(CHANNELS, 2)])
            await node.connect(Peer(), channels, f"u{node.counts['connects']}")

    async def refuse(self, node: Tally) -> None:
        for _ in range(3):
            with pytest.raises(LimitExceeded):
                await node.manager.connect(Peer().websocket, user="witness")
            node.counts["limited"] += 1

    async def stall(self, node: Tally) -> None:
        if len(node.peers) > 2:
            peer, _ = self.random.choice(node.peers[1:])
            peer.resume() if peer.is_stalled else peer.stall()

    async def leave(self, node: Tally) -> None:
        if len(node.peers) > 2:
            peer, connection = self.random.choice(node.peers[1:])
            peer.resume()
            await turns()
            if connection.is_open:
                peer.leave()
                node.manager.disconnect(peer.websocket)

    async def send(self, node: Tally) -> None:
        await node.manager.send(node.peers[0][1], "for the witness alone")
        node.counts["sends"] += 1

    async def cut(self, node: Tally) -> None:
        if not self.is_cut:
            await turns(10)  # what is on its way would be missed
            self.cluster.partition(1)
            self.is_cut = True
        with pytest.raises(EngineUnavailable):
            await self.nodes[1].manager.broadcast("never", channel="strict")
        self.nodes[1].counts["publish_failures"] += 1

    async def mend(self, node: Tally | None = None) -> None:
        if self.is_cut:
            there = self.nodes[1]
            self.cluster.heal(1)
            self.is_cut = False
            there.counts["reconnects"] += 1
            there.counts["heals"] += len(there.missed)
            there.missed.clear()
            try:
                await eventually(lambda: there.manager.stats().heals == there.counts["heals"])
            except TimeoutError:
                raise AssertionError((there.manager.stats().heals, there.counts, self.published)) from None


def has_been_seen(node: Tally) -> bool:
    """Whether the witness has got what was counted: it is written in a later turn of the event loop."""
    return node.manager.stats().broadcasts <= len(node.witness.messages) - node.counts["sends"]


def has_nothing_waiting(manager: ConnectionManager) -> bool:
    """Whether everything is handed over: what comes from the engine waits for a crowd that doesn't keep up, too."""
    return not (manager.stats().backlog_messages or core_of(manager).life.node._lanes.waiting)


async def test_counters_say_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    # Most of those that are in a channel may be stalled: a broadcast that is awaited would wait for them.
    monkeypatch.setattr(pace, "_LONGEST_SECONDS", 0.1)
    slow = SlowConsumer(
        max_backlog_messages=40, send_timeout=60, by_channel={"newest": "drop_newest", "oldest": "drop_oldest"}
    )
    limits = Limits(max_connections_per_user=1)
    async with Cluster(
        2, history={"kept:*": History(messages=100_000, seconds=3600)}, slow_consumer=slow, limits=limits
    ) as cluster:
        run = Run(cluster, seed=13)
        async with asyncio.timeout(MESSAGES / 100):
            await run.go()
        for node in run.nodes:
            check(node)
        everything = {name for name, number in Counter(run.nodes[0].counts + run.nodes[1].counts).items() if number}
        assert everything >= {
            "vetoed",
            "hook_errors",
            "gaps",
            "limited",
            "sends",
            "heals",
            "publish_failures",
            "reconnects",
        }
        dropped = {reason for manager in cluster for reason in manager.stats().dropped}
        assert dropped == {"drop_newest", "drop_oldest", "closed"}
        assert (run.nodes[0].recovered + run.nodes[1].recovered).keys() == {"recovered", "epoch"}
        assert exposition({str(number): manager.stats() for number, manager in enumerate(cluster)})


def check(node: Tally) -> None:
    stats, counts = node.manager.stats(), node.counts
    assert stats.connects == counts["connects"]
    assert stats.disconnects == counts["disconnects"] == stats.connection_seconds.count
    assert stats.connections == len(node.peers) == stats.connects - stats.disconnects
    assert stats.limited == {"max_connections_per_user": counts["limited"]}
    assert (stats.vetoed, stats.hook_errors) == (counts["vetoed"], counts["hook_errors"])
    assert (stats.sends, stats.heals) == (counts["sends"], counts["heals"])
    evicted = [peer for peer, connection in node.ended if connection.close_code == CloseCode.TRY_AGAIN_LATER]
    assert sum(stats.evicted.values()) == len(evicted) > 0
    # The witness is in every channel, reads everything, and is never away.
    seen = node.witness.messages
    assert stats.broadcasts == len(seen) - counts["sends"]
    # What was handed over has arrived, was dropped, or was being written when its connection ended.
    arrived = sum(len(peer.messages) for peer, _ in node.everybody)
    assert 0 <= stats.deliveries - arrived - sum(stats.dropped.values()) <= len(node.ended)
    # One that ended before it had everything wasn't recovered.
    stayed = sum(recovery.recovered for _, connection in node.peers for recovery in connection.recovered.values())
    assert stayed <= stats.recoveries == stats.recovery_seconds.count <= node.recovered["recovered"]
    assert stats.refused_recoveries == {
        reason: number for reason, number in node.recovered.items() if reason != "recovered"
    }
    engine = stats.engine
    assert (engine.gaps, engine.reconnects) == (counts["reconnects"], counts["reconnects"])
    assert engine.publish_failures == counts["publish_failures"]
