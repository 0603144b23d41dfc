"""Clients of `chaos` that speak the Centrifuge client protocol, and keep their place as its SDKs do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import FastAPI

from tests.support.asgi import Peer, visit
from tests.support.chaos import Client, Story
from wsbroadcast import ConnectionManager, Position, create_centrifuge_router

_apps: WeakKeyDictionary[ConnectionManager, FastAPI] = WeakKeyDictionary()


def app_of(manager: ConnectionManager) -> FastAPI:
    """Return the app of a node, whose manager runs already."""
    if manager not in _apps:
        app = _apps[manager] = FastAPI()
        app.include_router(create_centrifuge_router(manager, "/ws", authorize=lambda *_: True))
    return _apps[manager]


class CentrifugeClient(Client):
    """One client, over all its connections.

    An SDK stores the epoch of a subscribe reply, and the offset of that and of each publication. It never looks for
    holes: so a hole in what it is told is one that nobody will ever notice.
    """

    def __init__(self, story: Story, managers: Sequence[ConnectionManager], channels: Sequence[str], seed: int) -> None:
        super().__init__(story, managers, channels, seed)
        self._stack = AsyncExitStack()
        self._ids = count(1)
        self._asked: dict[int, str] = {}
        # By channel: its epoch, while it is subscribed.
        self._epochs: dict[str, str] = {}
        self._again: set[str] = set()

    async def come(self, manager: ConnectionManager) -> None:
        """Connect, and subscribe in the same frame since where it is, unless it is connected."""
        self.read()
        if self.peer is not None and self.peer.close is None:
            if self._again:
                self._say(self._subscribe(channel) for channel in sorted(self._again))
            return
        await self.leave()
        self.peer = Peer("/ws", suspends=self.random.random() < 0.5)
        self._read = 0
        await self._stack.enter_async_context(visit(app_of(manager), "/ws", self.peer))
        self.story.seen["came back" if self.at else "came"] += 1
        self._say([{"id": next(self._ids), "connect": {}}, *map(self._subscribe, self.channels)])

    async def leave(self) -> None:
        """Lose the connection, and remember what came."""
        self.read()
        peer, self.peer = self.peer, None
        if peer is not None and not peer.is_gone:
            peer.leave(1006)
        await self._stack.aclose()
        self._asked.clear()
        self._epochs.clear()
        self._again.clear()

    async def end(self) -> None:
        """Leave."""
        await self.leave()

    def tell(self) -> str:
        """Return where it stands, for somebody who has to find out why."""
        last = {channel: log[-3:] for channel, log in self.log.items()}
        return f"closed {self.peer and self.peer.end}, is at {self.at}, in {self._epochs}, was told {last}"

    def _subscribe(self, channel: str) -> dict[str, Any]:
        self._again.discard(channel)
        self._epochs.pop(channel, None)
        since = self.at.get(channel)
        self.log[channel].append(("came", since))
        number = next(self._ids)
        self._asked[number] = channel
        recover = {} if since is None else {"recover": True, "epoch": since.epoch, "offset": since.offset}
        return {"id": number, "subscribe": {"channel": channel, "flag": 1, **recover}}

    def _say(self, commands: Any) -> None:
        assert self.peer is not None
        self.peer.say("\n".join(map(json.dumps, commands)))

    def read(self) -> None:
        """Look at what came, and move on."""
        if self.peer is None:
            return
        frames = self.peer.messages
        read, self._read = self._read, len(frames)
        for frame in frames[read:]:
            for line in str(frame).split("\n"):
                self.take(json.loads(line))

    def take(self, event: dict[str, Any]) -> None:
        """Note one reply, push or ping."""
        if not event:
            self._say([{}])
        elif "push" in event:
            push = event["push"]
            self._pushed(push.get("channel"), push)
        elif event["id"] in self._asked:
            self._answered(self._asked.pop(event["id"]), event)

    def _pushed(self, channel: str, push: dict[str, Any]) -> None:
        if "pub" in push:
            if channel not in self._epochs:
                self.story.wrong["a publication before its reply, or after the end"] += 1
            else:
                self._published(channel, push["pub"])
        elif "unsubscribe" in push:
            self._epochs.pop(channel, None)
            self.story.seen[f"unsubscribed: {push['unsubscribe']['code']}"] += 1
            if push["unsubscribe"]["code"] >= 2500:
                self._say([self._subscribe(channel)])
            else:
                self.story.wrong[f"unsubscribed: {push['unsubscribe']['code']}"] += 1

    def _answered(self, channel: str, reply: dict[str, Any]) -> None:
        if "error" in reply:
            self.story.seen[f"error: {reply['error']['code']}"] += 1
            if not reply["error"].get("temporary"):
                self.story.wrong[f"error: {reply['error']}"] += 1
            self._again.add(channel)
            return
        result = reply["subscribe"]
        position = Position(result["epoch"], result.get("offset", 0))
        recovered = result.get("recovered", False) if result.get("was_recovering") else None
        self._epochs[channel] = position.epoch
        self.log[channel].append(("subscribed", (position, recovered)))
        self.at[channel] = position
        self.story.seen["recovered" if recovered else "not recovered" if recovered is False else "subscribed"] += 1
        if not recovered and result.get("publications"):
            self.story.wrong["a part was replayed"] += 1
        for publication in result.get("publications", ()):
            self._published(channel, publication)

    def _published(self, channel: str, publication: dict[str, Any]) -> None:
        position = Position(self._epochs[channel], publication["offset"])
        self.story.note(channel, position, publication["data"])
        self.log[channel].append(("message", (position, None)))
        self.at[channel] = position
