"""Clients with random lives at several nodes, and what each of them must be able to say of what it got."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from tests.support.asgi import Peer
from wsbroadcast import Connection, ConnectionManager, EngineError, Position
from wsbroadcast.node.membership import SPEAKS
from wsbroadcast.protocols.events import events

# How many messages fewer than a history has may have come since, for a refusal to count as needless: a node may be
# behind the publisher that the test counts by.
_SLACK = 8


class Story:
    """What is known of all publications, and what was found wrong."""

    def __init__(self, messages: int) -> None:
        self.messages = messages
        """How many a history keeps."""
        self.offsets: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
        """What was published under each offset, by channel and epoch, as anybody has seen it."""
        self.published: list[tuple[str, Position]] = []
        self.wrong: Counter[str] = Counter()
        """What must not be."""
        self.seen: Counter[str] = Counter()
        """What happened, so that a test knows that something did."""

    def note(self, channel: str, position: Position, text: str) -> None:
        """Remember a publication; whoever sees another under its position is wrong."""
        known = self.offsets[channel, position.epoch].setdefault(position.offset, text)
        if known != text:
            self.wrong["two under one position"] += 1

    def between(self, channel: str, after: Position, before: int) -> int:
        """Return how many publications are known between two places."""
        return sum(after.offset < offset < before for offset in self.offsets[channel, after.epoch])

    def since(self, channel: str, position: Position) -> int:
        """Return how many publications are known after a position."""
        return sum(offset > position.offset for offset in self.offsets[channel, position.epoch])


class Client:
    """One client, over all its connections; it speaks events, and says since when it wants what it missed."""

    def __init__(self, story: Story, managers: Sequence[ConnectionManager], channels: Sequence[str], seed: int) -> None:
        self.story = story
        self.managers = managers
        self.channels = channels
        self.random = random.Random(seed)
        self.log: dict[str, list[tuple[str, Any]]] = {channel: [] for channel in channels}
        """What it was told, by channel, in order."""
        self.at: dict[str, Position] = {}
        """Where it is, as it tells when it comes back."""
        self.peer: Peer | None = None
        self._read = 0

    async def live(self, is_over: Callable[[], bool]) -> None:
        """Come, stay, stall, leave, come back at another node."""
        while not is_over():
            try:
                await self.come(self.random.choice(self.managers))
            except EngineError:
                self.story.seen["not let in"] += 1
                await asyncio.sleep(0.01)
                continue
            await asyncio.sleep(self.random.uniform(0.01, 0.4))
            if self.random.random() < 0.2 and self.peer is not None:
                self.peer.stall()
                await asyncio.sleep(self.random.uniform(0.01, 0.3))
                self.peer.resume()
            if self.random.random() < 0.7:
                await self.leave()
                await asyncio.sleep(self.random.choice((0, 0, 0.001, self.random.uniform(0, 0.3))))
        await self.come(self.random.choice(self.managers))

    async def come(self, manager: ConnectionManager) -> None:
        """Connect since where it is, unless it is connected."""
        self.read()
        if self.peer is not None and self.peer.close is None:
            return
        peer = Peer(suspends=self.random.random() < 0.5)
        peer.websocket.scope[SPEAKS] = events
        since = {channel: self.at[channel] for channel in self.channels if channel in self.at}
        for channel in self.channels:
            self.log[channel].append(("came", since.get(channel)))
        self._read, self.peer = 0, peer
        self.connection: Connection = await manager.connect(peer.websocket, channels=self.channels, since=since)
        self.story.seen["came back" if since else "came"] += 1

    async def leave(self) -> None:
        """Go without a word, and remember what came."""
        peer = self.peer
        if peer is not None:
            manager = self.connection.manager
            self.read()
            self.peer = None
            peer.vanish()
            manager.disconnect(self.connection)

    def read(self) -> None:
        """Look at what came, and move on."""
        if self.peer is None:
            return
        messages = self.peer.messages
        for message in messages[self._read :]:
            self.take(json.loads(message))
        self._read = len(messages)

    def take(self, event: dict[str, Any]) -> None:
        """Note one event."""
        kind, channel = event["type"], event.get("channel")
        if channel not in self.log or kind not in ("message", "position", "subscribed", "gap"):
            return
        position = None if "position" not in event else Position.of(event["position"])
        if kind == "message":
            if position is None:
                self.story.wrong["without a position"] += 1
                return
            self.story.note(channel, position, event["data"])
        if kind == "subscribed" and event.get("recovered") is False:
            self.refused(channel, event["reason"], position)
        if kind == "subscribed" and event.get("recovered"):
            self.story.seen["recovered"] += 1
        if kind == "gap":
            self.story.seen[f"gap: {event['reason']}"] += 1
        self.log[channel].append((kind, (position, event.get("recovered"))))
        if position is not None:
            self.at[channel] = position
        elif kind in ("subscribed", "gap"):
            self.at.pop(channel, None)

    def refused(self, channel: str, reason: str, position: Position | None) -> None:
        """Note a refusal, and whether there was a reason for it."""
        self.story.seen[f"refused: {reason}"] += 1
        since: Position | None = next(value for kind, value in reversed(self.log[channel]) if kind == "came")
        if since is None or position is None or position.epoch != since.epoch:
            return
        if reason == "epoch":
            self.story.wrong["needless refusal: epoch"] += 1
        elif reason != "unavailable" and self.story.since(channel, since) < self.story.messages - _SLACK:
            self.story.wrong[f"needless refusal: {reason}"] += 1

    def check(self) -> None:
        """Go through what it was told, and find holes, doubles and what is out of order."""
        self.read()
        for channel, log in self.log.items():
            at: Position | None = None
            asked: Position | None = None
            for kind, value in log:
                if kind == "came":
                    asked = value
                    continue
                position, recovered = value
                if kind == "subscribed":
                    if recovered and position != asked:
                        self.story.wrong["recovered from elsewhere"] += 1
                    at = position
                elif kind == "gap":
                    at = position
                elif at is None or position.epoch != at.epoch:
                    self.story.wrong["another epoch in silence" if at is not None else "before it was subscribed"] += 1
                    at = position
                else:
                    if position.offset <= at.offset:
                        self.story.wrong["doubled or out of order"] += 1
                    elif self.story.between(channel, at, position.offset):
                        self.story.wrong["lost in silence"] += 1
                    at = position


async def publish(
    story: Story, managers: Sequence[ConnectionManager], channels: Sequence[str], seed: int, is_over: Callable[[], bool]
) -> None:
    """Publish at random nodes until it is over."""
    choose = random.Random(seed)
    number = 0
    while not is_over():
        number += 1
        channel, text = choose.choice(channels), f"{seed}.{number}"
        manager = choose.choice(managers)
        try:
            if choose.random() < 0.2:
                manager.broadcast_nowait(text, channel=channel)
            else:
                receipt = await manager.broadcast(text, channel=channel)
                assert receipt.position is not None
                story.note(channel, receipt.position, text)
            story.seen["published"] += 1
        except EngineError:
            story.seen["not published"] += 1
        await asyncio.sleep(choose.uniform(0, 0.004))
