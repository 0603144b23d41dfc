"""What happens to clients of the Centrifuge protocol that they have not asked for: in order, and never twice."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually, refusal, turns, visit
from tests.support.centrifuge_client import BOTH, PATH, SECRET, Client, Form, client, served, token
from wsbroadcast import (
    USERS,
    CallError,
    CentrifugeTokens,
    ClientTiming,
    Connection,
    ConnectionManager,
    Delivery,
    History,
    Identity,
    Limits,
    Message,
    Presence,
    SlowConsumer,
)
from wsbroadcast.testing import Cluster
from wsbroadcast.web.centrifuge import client as clients
from wsbroadcast.web.centrifuge import commands, router

HERE = Presence(by="connection", grace=0)


def order(one: Client, channel: str) -> list[str]:
    """What a client was told of a channel, in order."""
    found = []
    for each in one.told:
        push = each.get("push", {})
        if push.get("channel") == channel:
            (kind,) = push.keys() - {"channel"}
            found.append(kind)
        elif "subscribe" in each or "unsubscribe" in each:
            found.append("answer")
    return found


# Joins.


@BOTH
async def test_who_joins_is_told_so_after_its_answer_and_who_leaves_is_not(form: Form) -> None:
    manager = ConnectionManager(presence=HERE)
    async with served(manager) as app, client(app, form) as one, client(app, form) as other:
        await one.result("subscribe", channel="a", join_leave=True)
        (own,) = await one.wait_pushes(1, "a", "join")
        await other.result("subscribe", channel="a", join_leave=True)
        (theirs,) = await other.wait_pushes(1, "a", "join")
        await one.wait_pushes(2, "a", "join")
        assert one.pushes("a", "join")[1]["info"]["client"] == theirs["info"]["client"]
        assert own["info"]["client"] != theirs["info"]["client"]
        presence = await one.result("presence", channel="a")
        assert presence["presence"].keys() == {own["info"]["client"], theirs["info"]["client"]}
        assert await one.result("presence_stats", channel="a") == {"num_clients": 2, "num_users": 1}
        await other.result("unsubscribe", channel="a")
        (leave,) = await one.wait_pushes(1, "a", "leave")
        assert leave["info"]["client"] == theirs["info"]["client"]
        await other.ask("unsubscribe", channel="a")
        assert order(other, "a")[:2] == ["answer", "join"]
        assert other.pushes("a", "leave") == []
        assert order(one, "a") == ["answer", "join", "join", "leave"]


@BOTH
async def test_joins_are_told_to_those_who_ask(form: Form) -> None:
    manager = ConnectionManager(presence=HERE)
    async with served(manager) as app, client(app, form) as one, client(app, form) as other:
        await one.result("subscribe", channel="a")
        await other.result("subscribe", channel="a", join_leave=True)
        await other.wait_pushes(1, "a", "join")
        await one.ask("unsubscribe", channel="b")
        assert one.pushes("a", "join") == []


@BOTH
async def test_who_is_lost_leaves_once(form: Form) -> None:
    manager = ConnectionManager(presence=HERE)
    async with served(manager) as app, client(app, form) as one:
        await one.result("subscribe", channel="a", join_leave=True)
        for count in range(1, 4):
            async with client(app, form) as other:
                await other.result("subscribe", channel="a")
                await one.wait_pushes(count + 1, "a", "join")
            await one.wait_pushes(count, "a", "leave")
        await one.ask("presence", channel="a")
        assert order(one, "a") == ["answer", "join"] + ["join", "leave"] * 3
        await one.ask("unsubscribe", channel="b")


# What the server does with subscriptions.


@BOTH
async def test_a_subscription_by_the_app_is_a_push_before_its_messages(form: Form) -> None:
    manager = ConnectionManager(history=History())
    async with served(manager) as app, client(app, form) as one:
        (connection,) = manager.connections
        await manager.broadcast({"n": 0}, channel="a")
        await connection.subscribe("a")
        await manager.broadcast({"n": 1}, channel="a")
        (pub,) = await one.wait_pushes(1, "a")
        assert pub == {"data": {"n": 1}, "offset": 2}
        (push,) = one.pushes("a", "subscribe")
        assert push["recoverable"] is True
        assert push["offset"] == 1
        assert order(one, "a") == ["subscribe", "pub"]
        await connection.unsubscribe("a")
        await manager.broadcast({"n": 2}, channel="a")
        (end,) = await one.wait_pushes(1, "a", "unsubscribe")
        assert end["code"] < 2500
        await one.ask("unsubscribe", channel="b")
        assert len(one.pushes("a")) == 1


@BOTH
async def test_channels_of_connect_are_in_its_answer(form: Form) -> None:
    manager = ConnectionManager(history=History())
    async with served(manager, channels={"news": {"hello": 1}}) as app:
        async with client(app, form, connects=False) as one:
            first = await one.result("connect")
            assert first["subs"]["news"]["data"] == {"hello": 1}
            assert first["subs"]["news"]["recoverable"] is True
            await manager.broadcast({"n": 1}, channel="news")
            assert (await one.wait_pushes(1, "news"))[0]["offset"] == 1
        await manager.broadcast({"n": 2}, channel="news")
        known = {"recover": True, "epoch": first["subs"]["news"]["epoch"], "offset": 1}
        async with client(app, form, connects=False) as one:
            again = await one.result("connect", subs={"news": known, "other": known})
            assert again["subs"].keys() & {"news", "other"} == {"news"}
            assert again["subs"]["news"]["recovered"] is True
            assert [each["data"] for each in again["subs"]["news"]["publications"]] == [{"n": 2}]
        async with client(app, form, connects=False) as one:
            lost = await one.result("connect", subs={"news": {**known, "epoch": "other"}})
            assert not lost["subs"]["news"].get("recovered")
            assert lost["subs"]["news"]["was_recovering"] is True
            assert lost["subs"]["news"]["offset"] == 2


@BOTH
async def test_a_server_side_subscription_that_is_insufficient_closes_with_3010(form: Form) -> None:
    async with (
        Cluster(1, history=History(messages=2)) as cluster,
        served(cluster[0], channels=["news"]) as app,
        client(app, form) as one,
    ):
        for n in range(5):
            cluster.hub.lost = float(n < 4)
            await cluster[0].broadcast({"n": n}, channel="news")
        await turns()
        await cluster.advance(5)
        assert await one.closed() == 3010


# What the client isn't given.


@BOTH
async def test_a_channel_with_the_name_of_a_user_changes_nothing_for_the_user(form: Form) -> None:
    manager = ConnectionManager(history={USERS: History()})
    async with served(manager) as app, client(app, form) as one:
        await manager.broadcast(1, user="7")
        await one.wait_pushes(1, "#7")
        await manager.forget(user="7")
        await turns(20)
        one.begin("subscribe", channel="7")
        one.begin("unsubscribe", channel="7")
        assert await one.closed() == 3010


@BOTH
async def test_an_excluded_connection_goes_on(form: Form) -> None:
    manager = ConnectionManager(history=History())
    async with served(manager) as app, client(app, form) as one:
        await one.result("subscribe", channel="a")
        (connection,) = manager.connections
        await manager.broadcast({"n": 1}, channel="a", exclude=[connection])
        await manager.broadcast({"n": 2}, channel="a")
        assert [each["offset"] for each in await one.wait_pushes(1, "a")] == [2]
        await one.ask("unsubscribe", channel="b")
        assert one.pushes("a", "unsubscribe") == []


@BOTH
async def test_what_a_hook_holds_back_is_no_hole(form: Form) -> None:
    manager = ConnectionManager(history=History())

    @manager.on_deliver
    def odd(delivery: Delivery) -> None:
        if json.loads(delivery.message.payload)["n"] % 2 == 0:
            delivery.recipients.clear()

    async with served(manager) as app, client(app, form) as one:
        await one.result("subscribe", channel="a")
        for n in range(1, 6):
            await manager.broadcast({"n": n}, channel="a")
        assert [each["offset"] for each in await one.wait_pushes(3, "a")] == [1, 3, 5]


async def test_what_is_no_json_is_only_for_protobuf() -> None:
    manager = ConnectionManager(history=History())
    async with served(manager) as app, client(app) as one, client(app, "protobuf") as other:
        first = await one.result("subscribe", channel="a")
        await other.result("subscribe", channel="a")
        other.peer.say(b"\x0b\x08\x09\x3a\x07\x0a\x01a\x12\x02\xff\x00")
        await eventually(lambda: any(b"\xff\x00" in frame for frame in other.peer.messages if isinstance(frame, bytes)))
        await manager.broadcast({"n": 1}, channel="a")
        await manager.broadcast(b"", channel="a")
        await manager.broadcast({"n": 2}, channel="a")
        assert [each["data"] for each in await one.wait_pushes(2, "a")] == [{"n": 1}, {"n": 2}]
        history = await one.result("history", channel="a", limit=-1)
        assert [each["offset"] for each in history["publications"]] == [2, 4]
        async with client(app) as back:
            again = await back.result("subscribe", channel="a", recover=True, offset=0, epoch=first["epoch"])
            assert again["recovered"] is True
            assert [each["offset"] for each in again["publications"]] == [2, 4]
        assert manager.stats().dropped.get("not_json", 0) >= 1


# Slow clients.


@BOTH
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "conflate", "disconnect"])
async def test_a_slow_client_misses_nothing_without_a_word(form: Form, policy: Any) -> None:
    manager = ConnectionManager(
        history=History(), slow_consumer=SlowConsumer(policy=policy, max_backlog_messages=5, send_timeout=2.0)
    )
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(served(manager))
        one, *others = [await stack.enter_async_context(client(app, form)) for _ in range(4)]
        for each in one, *others:
            await each.result("subscribe", channel="a")
        one.peer.stall()
        for n in range(1, 40):
            await manager.broadcast(Message.of({"n": n}, key="k"), channel="a")
        for each in others:  # who keep up set the pace
            assert [pub["offset"] for pub in await each.wait_pushes(39, "a")] == list(range(1, 40))
        one.peer.resume()

        def is_over() -> bool:
            pubs = one.pushes("a")
            return one.peer.close is not None or bool(one.pushes("a", "unsubscribe")) or pubs[-1:] == [newest]

        newest = others[0].pushes("a")[-1]
        await eventually(is_over)
        offsets = [each["offset"] for each in one.pushes("a")]
        if policy == "conflate":  # of what waits, the newest of a key is all that the app wants to be sent
            assert offsets == sorted(set(offsets))
        else:
            assert offsets == list(range(1, len(offsets) + 1))
        if one.peer.close is not None:
            assert await one.closed() in (3008, 3010)
        elif one.pushes("a", "unsubscribe"):
            assert one.pushes("a", "unsubscribe")[0]["code"] == 2500
        else:
            assert offsets[-1] == 39


@BOTH
@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
async def test_a_slow_client_that_loses_messages_is_answered(form: Form, policy: Any) -> None:
    manager = ConnectionManager(slow_consumer=SlowConsumer(policy=policy, max_backlog_messages=5))
    async with AsyncExitStack() as stack:
        app = await stack.enter_async_context(served(manager))
        one, *others = [await stack.enter_async_context(client(app, form)) for _ in range(4)]
        for each in one, *others:
            await each.result("subscribe", channel="a")
        one.peer.stall()
        for n in range(10):
            await manager.broadcast({"n": n}, channel="a")
        asked = one.begin("subscribe", channel="b")
        await eventually(lambda: any("b" in each.channels for each in manager.connections))
        for n in range(10, 20):
            await manager.broadcast({"n": n}, channel="a")
        assert manager.stats().dropped[policy] > 0
        one.peer.resume()
        assert "subscribe" in await one.answer(asked)


@BOTH
async def test_what_comes_while_it_is_subscribed_is_not_too_much_for_it(form: Form) -> None:
    asked, may = asyncio.Event(), asyncio.Event()

    async def authorize(connection: Connection, action: str, channel: str | None) -> bool:
        if channel in connection.channels:  # again, now that it is a member
            asked.set()
            await may.wait()
        return True

    manager = ConnectionManager(slow_consumer=SlowConsumer(max_backlog_messages=10))
    async with served(manager, authorize=authorize) as app, client(app, form) as one:
        begun = one.begin("subscribe", channel="a")
        await asked.wait()
        for n in range(50):
            await manager.broadcast(n, channel="a")
        may.set()
        await one.answer(begun)
        await manager.broadcast(50, channel="a")
        await eventually(lambda: [each["data"] for each in one.pushes("a")][-1:] == [50])
        numbers = [each["data"] for each in one.pushes("a")]
        assert numbers == list(range(51 - len(numbers), 51)), "the newest, and no hole"
        assert manager.stats().evicted == {}


# Ends.


@BOTH
async def test_nobody_is_let_go_for_a_stall_of_the_server(form: Form) -> None:
    manager = ConnectionManager(client_timing=ClientTiming(ping_interval=1.0))
    async with served(manager, pong_timeout=0.5) as app, client(app, form) as one:
        ping = b"\x00" if form == "protobuf" else "{}"
        await one.peer.wait_for(lambda: ping in one.peer.messages)
        time.sleep(1.0)  # noqa: ASYNC251  # the stall
        await turns(2)  # what it has answered meanwhile is read a little later
        one.say({})
        await one.result("unsubscribe", channel="a")
        assert one.peer.close is None
        assert await one.closed() == 3012, "it answers no other"


@BOTH
async def test_a_drain_closes_with_3001(form: Form) -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app, form) as one:
        await manager.drain(0.01)
        assert await one.closed() == 3001


@BOTH
async def test_a_connection_whose_token_has_expired_closes_with_3005(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in clients, commands, router:
        monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    async with (
        served(tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects={"token": token(exp=int(time.time()) + 2)}) as one,
    ):
        assert await one.closed() == 3005


@BOTH
async def test_a_subscription_whose_token_has_expired_ends_with_2501(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "GRACE_SECONDS", 0.1)
    manager = ConnectionManager()
    async with (
        served(manager, tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects={"token": token()}) as one,
    ):
        await one.result("subscribe", channel="a", token=token(channel="a", exp=int(time.time()) + 2))
        (push,) = await one.wait_pushes(1, "a", "unsubscribe")
        assert push["code"] == 2501
        await manager.broadcast({"n": 1}, channel="a")
        await one.ask("unsubscribe", channel="b")
        assert one.pushes("a") == []


@BOTH
async def test_a_page_of_somebody_else_is_closed_and_not_refused_by_http(form: Form) -> None:
    async with served(allowed_origins=["https://app.example"]) as app:
        peer = Peer(
            PATH,
            headers=[(b"origin", b"https://evil.example")],
            subprotocols=["centrifuge-protobuf"] if form == "protobuf" else [],
        )
        async with visit(app, PATH, peer):
            one = Client(peer, form)
            one.begin("connect")
            assert await one.closed() in (3500, 3507)
            assert one.told == []


@BOTH
async def test_a_full_server_refuses_the_handshake_after_which_clients_come_back(form: Form) -> None:
    manager = ConnectionManager(limits=Limits(max_connections=1))
    async with served(manager) as app, client(app, form):
        await refusal(app, PATH)


@BOTH
async def test_a_first_frame_that_is_too_large_closes_with_1009(form: Form) -> None:
    async with served() as app, client(app, form, connects=False) as one:
        one.begin("connect", token="x" * 70_000)
        assert await one.closed() == 1009


@BOTH
async def test_an_app_that_fails_to_say_who_it_is_is_no_end(form: Form) -> None:
    async def broken() -> Identity:
        raise RuntimeError("the database is down, its password is secret")

    async with served(authenticate=broken) as app:
        peer = Peer(PATH, subprotocols=["centrifuge-protobuf"] if form == "protobuf" else [])
        async with visit(app, PATH, peer):
            one = Client(peer, form)
            one.begin("connect")
            answer = await one.answer(1)
            assert answer["error"]["code"] == 100
            assert answer["error"]["temporary"] is True
            assert "secret" not in json.dumps(answer)


# Calls.


@BOTH
async def test_calls_run_side_by_side_and_so_many(form: Form) -> None:
    manager = ConnectionManager()
    may = asyncio.Event()

    @manager.method("wait")
    async def wait() -> str:
        await may.wait()
        return "done"

    @manager.method("fail")
    async def fail() -> None:
        raise CallError("sold_out", "nothing is left")

    @manager.method("break")
    async def break_() -> None:
        raise RuntimeError("a secret")

    async with served(manager) as app, client(app, form) as one:
        ids = [one.begin("rpc", method="wait") for _ in range(20)]
        assert await one.result("unsubscribe", channel="a") == {}
        errors = [each for each in one.told if "error" in each]
        assert len(errors) == 4
        assert {each["error"]["code"] for each in errors} == {111}
        assert all(each["error"]["temporary"] for each in errors)
        may.set()
        for id_ in ids[:16]:
            assert (await one.answer(id_))["rpc"] == {"data": "done"}
        assert await one.error("rpc", method="fail") >= 400
        answer = await one.ask("rpc", method="break")
        assert answer["error"]["code"] == 100
        assert "secret" not in json.dumps(answer)


@BOTH
async def test_on_send_takes_what_is_sent(form: Form) -> None:
    taken: list[Any] = []

    async def on_send(connection: Connection, data: Any) -> None:
        taken.append((connection.user, data))
        if data == "bad":
            raise RuntimeError("a mistake of the app")

    async with served(on_send=on_send) as app, client(app, form) as one:
        one.say({"send": {"data": {"a": [1]}}}, {"send": {"data": "bad"}}, {"send": {}}, {"id": 5, "send": {"data": 2}})
        await one.ask("unsubscribe", channel="a")
        assert taken[:2] == [("7", {"a": [1]}), ("7", "bad")]
        assert one.peer.close is None
