"""Clients of the Centrifuge protocol that say anything in any order, while the app does anything: nothing breaks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import AsyncExitStack
from random import Random
from typing import Any

import pytest

from tests.support.asgi import turns
from tests.support.centrifuge_client import BOTH, SECRET, Client, Form, client, served, token
from wsbroadcast import CentrifugeTokens, ConnectionManager, History, Limits, Presence

CHANNELS = ["a", "b", "c", "#42", "#43", "#", "all", "no", "", "x" * 300, "quiet:1", "é"]
SOON = int(time.time()) + 1000

TERMINAL = {3500, 3501, 3503, 3504, 3507}
COMING_BACK = {3000, 3001, 3004, 3005, 3006, 3008, 3010, 3012}


class Chatter:
    """Says things by chance."""

    def __init__(self, random: Random) -> None:
        self.random = random

    def token(self) -> str:
        channel = self.random.choice(CHANNELS)
        return self.random.choice(
            [
                "x",
                "",
                token(exp=SOON),
                token(exp=1),
                token(sub="43"),
                token(channel=channel, exp=SOON),
                token(channel=channel),
                token(channel=channel, exp=1),
            ]
        )

    def since(self) -> dict[str, Any]:
        found: dict[str, Any] = {"offset": self.random.choice([0, 1, 2, 5, 2**63, 2**64 - 1])}
        return found | {"epoch": self.random.choice(["", "x", "é" * 1000])}

    def data(self) -> Any:
        return self.random.choice([None, 1, "", "x\ny", {"a": [1, {"b": "\u2028"}]}, [], "x" * 5000])

    def channel(self) -> dict[str, Any]:
        return {} if self.random.random() < 0.05 else {"channel": self.random.choice(CHANNELS)}

    def some(self, **fields: Any) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if self.random.random() < 0.25}

    def command(self, id_: int) -> dict[str, Any]:
        choice = self.random.choice
        method, request = choice(
            [
                (
                    "subscribe",
                    self.channel()
                    | self.some(
                        token=self.token(),
                        recover=True,
                        flag=choice([0, 1, 2, 3, -1]),
                        join_leave=True,
                        positioned=True,
                        recoverable=True,
                        delta="fossil",
                        data=self.data(),
                        **self.since(),
                    )
                    | (self.some(type=1, tf={}, phase=2, limit=-5) if self.random.random() < 0.1 else {}),
                ),
                ("subscribe", self.channel() | {"recover": True, **self.since()}),
                ("unsubscribe", self.channel()),
                ("publish", self.channel() | {"data": self.data()}),
                ("publish", self.channel() | self.some(data=1, type=1, key="k", removed=True)),
                ("presence", self.channel()),
                ("presence_stats", self.channel()),
                (
                    "history",
                    self.channel()
                    | self.some(limit=choice([-1, 1, 2, -7, 2**31 - 1]), since=self.since(), reverse=True),
                ),
                (
                    "rpc",
                    {"method": choice(["add", "break", "", "none"]), "data": choice([{"a": 1}, {}, [], None, "x"])},
                ),
                ("send", self.some(data=self.data())),
                ("sub_refresh", self.channel() | {"token": token(channel="a", exp=SOON)}),
            ]
        )
        if self.random.random() < 0.01:  # mostly the end of it
            method, request = choice(
                [("refresh", {"token": self.token()}), ("sub_refresh", {"token": self.token()}), ("connect", {})]
            )
        return {"id": id_, method: request}


def check(one: Client, asked: Counter[int]) -> None:
    """What any client may rely on."""
    answers = Counter(each["id"] for each in one.told if each.get("id"))
    assert answers.keys() <= asked.keys()
    assert all(answers[id_] <= asked[id_] for id_ in answers)
    subscribed: set[str] = set()
    for each in one.told:
        assert len(each.keys() - {"id"}) == 1, each
        if "connect" in each:
            subscribed |= each["connect"].get("subs", {}).keys()
        if "error" in each:
            assert each["error"]["code"] >= 100
            assert each["error"]["message"]
            assert bool(each["error"].get("temporary")) is (each["error"]["code"] in (100, 111))
        if "push" in each:
            kinds = each["push"].keys() - {"channel"}
            assert len(kinds) == 1
    end = one.peer.end
    if end is not None:
        assert end[0] in TERMINAL | COMING_BACK, end


@pytest.mark.parametrize("seed", range(15))
@BOTH
async def test_anything_in_any_order(form: Form, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    random = Random(seed)
    manager = ConnectionManager(
        history={"a": History(messages=3), "b": History()},
        presence={"a": Presence(by="connection", grace=0), "c": Presence(by="connection", grace=0)},
        limits=Limits(max_channels_per_connection=4, inbound_burst=10_000),
    )

    @manager.method("add")
    async def add(a: int, b: int = 1) -> int:
        await asyncio.sleep(0)
        return a + b

    @manager.method("break")
    async def break_() -> None:
        raise RuntimeError("expected")

    async def authorize(_connection: object, _action: str, channel: str | None) -> bool:
        for _ in range(random.randrange(3)):
            await asyncio.sleep(0)
        return channel != "no"

    options = {"tokens": CentrifugeTokens(SECRET), "authorize": authorize, "everyone_channel": "all"}
    async with served(manager, **options) as app, AsyncExitStack() as stack:
        chatter = Chatter(random)
        clients = []
        for _ in range(3):
            one = await stack.enter_async_context(client(app, form, connects={"token": token(exp=SOON)}))
            clients.append((one, Counter({1: 1})))
        id_ = 1
        for _ in range(80):
            one, asked = random.choice(clients)
            commands = []
            for _ in range(random.choice([1, 1, 1, 2, 5])):
                id_ += 1
                asked[id_] += 1
                commands.append(chatter.command(id_))
            one.say(*commands)
            await act(manager, random)
            await turns(random.choice([0, 0, 1, 3, 10]))
        for one, asked in clients:
            if one.peer.close is None:
                one.say({"id": 2**32 - 1, "unsubscribe": {"channel": "a"}})
                asked[2**32 - 1] += 1
        for one, asked in clients:
            await one.peer.wait_for(
                lambda one=one: one.peer.close is not None or any(each.get("id") == 2**32 - 1 for each in one.told)  # type: ignore[misc]
            )
            check(one, asked)
            if one.peer.close is None:
                unanswered = asked.keys() - {each.get("id") for each in one.told} - one.sends
                await one.peer.wait_for(
                    lambda one=one, unanswered=unanswered: unanswered <= {each.get("id") for each in one.told}  # type: ignore[misc]
                )
    unexpected = [
        record
        for record in caplog.records
        if record.levelno >= logging.ERROR
        and "expected" not in str(record.exc_info)
        and "expected" not in record.message
    ]
    assert unexpected == []


async def act(manager: ConnectionManager, random: Random) -> None:
    """Let the app do something, or nothing."""
    what = random.random()
    if what < 0.3:
        await manager.broadcast({"n": random.randrange(100)}, channel=random.choice(["a", "b", "c"]))
    elif what < 0.35:
        await manager.broadcast("to all")
    elif what < 0.4:
        await manager.broadcast(b"\xff", channel="a")
    elif what < 0.45 and manager.connections:
        connection = random.choice(manager.connections)
        await connection.unsubscribe(random.choice(["a", "b", "c"]))
    elif what < 0.5:
        await manager.broadcast({"n": 1}, user="42")
