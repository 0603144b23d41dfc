"""What clients of the Centrifuge protocol must not do: each gets a close or an error that SDKs understand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from tests.support.asgi import Peer, eventually, turns, visit
from tests.support.centrifuge import replies_of
from tests.support.centrifuge_client import BOTH, PATH, SECRET, Form, client, served, token
from wsbroadcast import (
    CentrifugeTokens,
    ConnectionManager,
    History,
    Identity,
    Limits,
)

# Each with the fields that it needs, so that only what a test changes is wrong.
COMMANDS: dict[str, dict[str, Any]] = {
    "subscribe": {"channel": "a"},
    "unsubscribe": {"channel": "a"},
    "publish": {"channel": "a", "data": 1},
    "presence": {"channel": "a"},
    "presence_stats": {"channel": "a"},
    "history": {"channel": "a"},
    "rpc": {"method": "add", "data": {"a": 1, "b": 2}},
    "send": {"data": 1},
    "refresh": {"token": "x"},
    "sub_refresh": {"channel": "a", "token": "x"},
}


# Frames.


BAD_FRAMES: dict[str, tuple[Form, str | bytes]] = {
    "empty text": ("json", ""),
    "line end": ("json", "\n"),
    "empty line": ("json", '{"id":2,"rpc":{"method":"add"}}\n\n{"id":3,"rpc":{"method":"add"}}'),
    "no JSON": ("json", "hello"),
    "list": ("json", "[]"),
    "binary": ("json", b'{"id":2,"subscribe":{"channel":"a"}}'),
    "no UTF-8": ("json", b"\xff"),
    "id 0": ("json", '{"id":0,"subscribe":{"channel":"a"}}'),
    "no id": ("json", '{"subscribe":{"channel":"a"}}'),
    "id 2^32": ("json", '{"id":4294967296,"subscribe":{"channel":"a"}}'),
    "id -1": ("json", '{"id":-1,"subscribe":{"channel":"a"}}'),
    "id 1.5": ("json", '{"id":1.5,"subscribe":{"channel":"a"}}'),
    "id as text": ("json", '{"id":"2","subscribe":{"channel":"a"}}'),
    "no method": ("json", '{"id":2}'),
    "unknown method": ("json", '{"id":2,"fly":{"channel":"a"}}'),
    "ping": ("json", '{"id":2,"ping":{}}'),
    "method without its object": ("json", '{"id":2,"subscribe":"a"}'),
    "channel as a number": ("json", '{"id":2,"subscribe":{"channel":1}}'),
    "deep": ("json", '{"id":2,"publish":{"channel":"a","data":' + "[" * 9000 + "]" * 9000 + "}}"),
    "5,000 commands": ("json", "\n".join(["{}"] * 5000)),
    "empty binary": ("protobuf", b""),
    "text": ("protobuf", '{"id":2,"subscribe":{"channel":"a"}}'),
    "cut off": ("protobuf", b"\x05\x08"),
    "length of 11 bytes": ("protobuf", b"\xff" * 11),
    "group": ("protobuf", b"\x01\x73"),
    "id 0 in Protobuf": ("protobuf", b"\x05\x2a\x03\x0a\x01a"),
    "id 2^32 in Protobuf": ("protobuf", b"\x0b\x08\x80\x80\x80\x80\x10\x2a\x03\x0a\x01a"),
    "ping in Protobuf": ("protobuf", b"\x04\x08\x02\x5a\x00"),
    "no method in Protobuf": ("protobuf", b"\x02\x08\x02"),
    "channel that isn't UTF-8": ("protobuf", b"\x07\x08\x02\x2a\x03\x0a\x01\xff"),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_bad_frame_closes_with_3501(name: str) -> None:
    form, frame = BAD_FRAMES[name]
    async with served() as app, client(app, form) as one:
        one.peer.say(frame)
        assert await one.closed() == 3501


@pytest.mark.parametrize("name", BAD_FRAMES)
async def test_a_bad_frame_at_first_closes_with_3501(name: str) -> None:
    form, frame = BAD_FRAMES[name]
    async with served() as app, client(app, form, connects=False) as one:
        one.peer.say(frame)
        assert await one.closed() == 3501


@BOTH
@pytest.mark.parametrize("method", COMMANDS)
async def test_the_first_command_is_connect(form: Form, method: str) -> None:
    async with served() as app, client(app, form, connects=False) as one:
        one.begin(method, **COMMANDS[method])
        assert await one.closed() == 3501
        assert one.told == []


@BOTH
async def test_a_second_connect_closes_with_3501(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        one.begin("connect")
        assert await one.closed() == 3501


@BOTH
async def test_two_connects_in_one_frame_close_with_3501(form: Form) -> None:
    async with served() as app, client(app, form, connects=False) as one:
        one.say({"id": 1, "connect": {}}, {"id": 2, "connect": {}})
        assert await one.closed() == 3501


@BOTH
@pytest.mark.parametrize("method", [method for method in COMMANDS if method != "send"])
@pytest.mark.parametrize("id_", [0, None])
async def test_a_command_without_an_id_closes_with_3501(form: Form, method: str, id_: int | None) -> None:
    async with served() as app, client(app, form) as one:
        one.say({method: COMMANDS[method]} | ({} if id_ is None else {"id": id_}))
        assert await one.closed() == 3501


async def test_what_came_before_a_bad_line_may_be_done_and_what_came_after_is_not() -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app) as one:
        one.peer.say('{"id":2,"subscribe":{"channel":"a"}}\n{"id":3,"subscribe":{"channel":1}}\n{"id":4,"rpc":{}}')
        assert await one.closed() == 3501
        assert not any(each.get("id") in (3, 4) for each in one.told)


@BOTH
async def test_the_largest_frame_has_64_kib(form: Form) -> None:
    async with served() as app, client(app, form) as one, client(app, form) as other:
        for each, more in (one, 0), (other, 1):
            empty = each.frame({"id": 2, "publish": {"channel": "a", "data": ""}})
            size = 65_536 + more - len(empty) - (0 if form == "json" else 6)
            frame = each.frame({"id": 2, "publish": {"channel": "a", "data": "x" * size}})
            assert abs(len(frame) - 65_536 - more) <= 1
            if len(frame) != 65_536 + more:
                frame = each.frame(
                    {"id": 2, "publish": {"channel": "a", "data": "x" * (size + 65_536 + more - len(frame))}}
                )
            assert len(frame) == 65_536 + more
            each.peer.say(frame)
        assert "publish" in await one.answer(2)
        assert await other.closed() == 1009
        assert other.peer.end is not None
        assert other.peer.end[1] != ""


@BOTH
async def test_ids_may_be_anything_that_fits_and_come_again(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        for id_ in (2**32 - 1, 5, 1, 5):
            one.say({"id": id_, "unsubscribe": {"channel": "a"}})
        await eventually(lambda: len(one.told) == 5 or one.peer.close)
        assert [each.get("id") for each in one.told[1:]] == [2**32 - 1, 5, 1, 5]


@BOTH
async def test_a_line_with_several_methods_has_one_answer(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        one.say({"id": 7, "subscribe": {"channel": "a"}, "rpc": {"method": "x"}, "unsubscribe": {"channel": "a"}})
        await one.answer(7)
        await one.ask("unsubscribe", channel="b")
        assert len([each for each in one.told if each.get("id") == 7]) == 1


@BOTH
async def test_a_pong_that_nobody_asked_for_is_let_through(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        one.say({})
        assert await one.result("unsubscribe", channel="a") == {}


async def test_a_frame_of_pongs_and_commands_is_read() -> None:
    async with served() as app, client(app) as one:
        one.peer.say('{}\n{"id":5,"unsubscribe":{"channel":"a"}}\n{}\n')
        assert await one.answer(5) == {"id": 5, "unsubscribe": {}}


@BOTH
async def test_a_thousand_subscribes_in_one_frame(form: Form) -> None:
    manager = ConnectionManager(limits=Limits(max_channels_per_connection=100))
    async with served(manager) as app, client(app, form, connects=False) as one:
        subscribes = [{"id": each + 2, "subscribe": {"channel": f"c{each}"}} for each in range(1000)]
        one.say({"id": 1, "connect": {}}, *subscribes)
        await eventually(lambda: len(one.told) >= 1001 or one.peer.close)
        answers = {each["id"]: each for each in one.told}
        assert sorted(answers) == list(range(1, 1002))
        assert [each["id"] for each in one.told if "subscribe" in each] == list(range(2, 102))
        assert {answers[id_]["error"]["code"] for id_ in range(102, 1002)} == {106}
        assert one.peer.close is None


@BOTH
async def test_commands_in_one_frame_count_each_for_itself(form: Form) -> None:
    manager = ConnectionManager(limits=Limits(max_router_inbound_rate=1.0, inbound_burst=50))
    async with served(manager) as app, client(app, form) as one:
        one.say(*({"id": each, "publish": {"channel": "a", "data": each}} for each in range(10, 210)))
        assert await one.closed() == 3013
        assert len([each for each in one.told if "publish" in each]) <= 60


# Before connect, and how it ends.


@BOTH
async def test_no_token_closes_with_3507(form: Form) -> None:
    async with served(tokens=CentrifugeTokens(SECRET)) as app, client(app, form, connects=False) as one:
        one.say({"id": 1, "connect": {}}, {"id": 2, "subscribe": {"channel": "a"}})
        assert await one.closed() == 3507
        assert one.told == []


BAD_TOKENS: dict[str, Callable[[], str]] = {
    "garbage": lambda: "x",
    "other key": lambda: token("another secret of thirty-two bytes!!"),
    "no signature": lambda: jwt.encode({"sub": "42"}, "", "none"),
    "subscription token": lambda: token(channel="a"),
    "long": lambda: "x" * 60_000,
    "user with a line end": lambda: token(sub="a\nb"),
    "user of 10,000 bytes": lambda: token(sub="x" * 10_000),
    "user that is a number": lambda: token(sub=42),
    "expired with another key": lambda: token("another secret of thirty-two bytes!!", exp=1),
}


@BOTH
@pytest.mark.parametrize("bad", BAD_TOKENS)
async def test_a_bad_token_closes_with_3500(form: Form, bad: str) -> None:
    async with served(tokens=CentrifugeTokens(SECRET)) as app, client(app, form, connects=False) as one:
        one.begin("connect", token=BAD_TOKENS[bad]())
        assert await one.closed() == 3500
        assert one.told == []


@BOTH
@pytest.mark.parametrize("claims", [{"exp": 1}, {"nbf": 4_000_000_000}])
async def test_an_expired_token_is_error_109_and_the_rest_of_the_frame_is_nothing(
    form: Form, claims: dict[str, int]
) -> None:
    async with served(tokens=CentrifugeTokens(SECRET)) as app, client(app, form, connects=False) as one:
        one.say(
            {"id": 1, "connect": {"token": token(**claims)}},
            {"id": 2, "subscribe": {"channel": "a"}},
            {"id": 3, "publish": {"channel": "a", "data": 1}},
        )
        answer = await one.answer(1)
        assert answer["error"]["code"] == 109
        await turns(50)
        assert len(one.told) == 1


@BOTH
async def test_a_good_token_says_who_it_is(form: Form) -> None:
    async with served(tokens=CentrifugeTokens(SECRET)) as app, client(app, form, connects=False) as one:
        result = await one.result("connect", token=token(exp=int(time.time()) + 100))
        assert result["expires"] is True
        assert 90 <= result["ttl"] <= 100
        assert result["client"]
        assert result["version"]
        assert result["pong"] is True
        assert result["ping"] >= 1
        assert not {"flag", "dict", "session"} & result.keys()


@BOTH
async def test_too_many_connections_of_a_user_close_with_3504(form: Form) -> None:
    manager = ConnectionManager(limits=Limits(max_connections_per_user=1))
    async with (
        served(manager, tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects={"token": token()}),
        client(app, form, connects=False) as other,
    ):
        other.begin("connect", token=token())
        assert await other.closed() == 3504


@BOTH
async def test_a_token_with_too_many_channels_closes_with_3505(form: Form) -> None:
    manager = ConnectionManager(limits=Limits(max_channels_per_connection=10))
    async with (
        served(manager, tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects=False) as one,
    ):
        one.begin("connect", token=token(channels=[f"c{n}" for n in range(11)]))
        assert await one.closed() == 3505


@BOTH
async def test_who_may_not_in_is_closed_with_3507_and_not_by_http(form: Form) -> None:
    async def nobody() -> Identity | None:
        return None

    async with served(authenticate=nobody) as app, client(app, form, connects=False) as one:
        one.begin("connect")
        assert await one.closed() in (3500, 3507)


# The handshake.


@pytest.mark.parametrize(
    ("offered", "query", "chosen", "is_binary"),
    [
        ([], "", None, False),
        (["centrifuge-json"], "", "centrifuge-json", False),
        (["centrifuge-protobuf"], "", "centrifuge-protobuf", True),
        (["other"], "", None, False),
        (["other", "centrifuge-protobuf"], "", "centrifuge-protobuf", True),
        ([], "format=protobuf", None, True),
        ([], "cf_protocol=protobuf", None, True),
        ([], "cf_protocol=json&cf_protocol_version=v2", None, False),
        ([], "format=xml", None, False),
    ],
)
async def test_a_subprotocol_is_chosen_only_if_it_was_offered(
    offered: list[str], query: str, chosen: str | None, is_binary: bool
) -> None:
    peer = Peer(PATH, subprotocols=offered)
    peer.scope["query_string"] = query.encode()
    async with served() as app, visit(app, PATH, peer):
        assert peer.subprotocol == chosen
        peer.say(b"\x04\x08\x01\x22\x00" if is_binary else '{"id":1,"connect":{}}')
        answer = await peer.next()
        assert isinstance(answer, bytes) is is_binary
        (told,) = replies_of(answer) if isinstance(answer, bytes) else [json.loads(answer)]
        assert told["id"] == 1
        assert told["connect"]["client"]


# Subscribe.


@BOTH
@pytest.mark.parametrize("channel", ["", "x" * 256, "é" * 128, "a\nb", "\x00"])
async def test_a_bad_name_is_error_107(form: Form, channel: str) -> None:
    async with served() as app, client(app, form) as one:
        code = await one.error("subscribe", channel=channel)
        assert code == 107
        assert await one.result("unsubscribe", channel="a") == {}


@BOTH
async def test_a_forbidden_channel_is_error_103(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        assert await one.error("subscribe", channel="no") == 103
        assert await one.error("publish", channel="no", data=1) == 103
        assert await one.error("history", channel="no") == 103
        assert await one.error("presence", channel="no") == 103
        assert await one.error("presence_stats", channel="no") == 103


@BOTH
@pytest.mark.parametrize(
    ("request_", "codes"),
    [
        ({"type": 1}, {108}),
        ({"type": -1}, {107, 108}),
        ({"tf": {"op": "", "key": "a", "cmp": "eq", "val": "b"}}, {107, 108}),
    ],
)
async def test_what_is_not_supported_is_declined(form: Form, request_: dict[str, Any], codes: set[int]) -> None:
    async with served() as app, client(app, form) as one:
        assert await one.error("subscribe", channel="a", **request_) in codes


@BOTH
@pytest.mark.parametrize("wish", [{"delta": "fossil"}, {"delta": "x"}, {"flag": 1}, {"flag": 3}, {"join_leave": True}])
async def test_wishes_that_are_not_granted_are_ignored(form: Form, wish: dict[str, Any]) -> None:
    async with served() as app, client(app, form) as one:
        result = await one.result("subscribe", channel="a", **wish)
        assert not {"delta", "id"} & result.keys()
        await one.result("publish", channel="a", data={"a": 1})
        (pub,) = await one.wait_pushes(1, "a")
        assert pub["data"] == {"a": 1}
        assert "delta" not in pub


@BOTH
async def test_a_repeated_subscribe_replaces_the_old_one(form: Form) -> None:
    manager = ConnectionManager(history=History())
    async with served(manager) as app, client(app, form) as one:
        for _ in range(3):
            assert "epoch" in await one.result("subscribe", channel="a")
        one.say(*({"id": id_, "subscribe": {"channel": "a"}} for id_ in (50, 51, 52)))
        for id_ in (50, 51, 52):
            assert "subscribe" in await one.answer(id_)
        await manager.broadcast({"n": 1}, channel="a")
        await manager.broadcast({"n": 2}, channel="a")
        pubs = await one.wait_pushes(2, "a")
        await one.result("unsubscribe", channel="a")
        assert [each["data"]["n"] for each in pubs] == [1, 2]
        await manager.broadcast({"n": 3}, channel="a")
        await one.ask("history", channel="b")
        assert len(one.pushes("a")) == 2


@BOTH
@pytest.mark.parametrize(
    ("made", "code"),
    [
        (lambda: "x", 103),
        (lambda: token("another secret of thirty-two bytes!!", channel="a"), 103),
        (lambda: token(), 103),
        (lambda: token(channel="a", exp=1), 109),
    ],
)
async def test_a_bad_subscription_token_is_an_error(form: Form, made: Callable[[], str], code: int) -> None:
    async with (
        served(tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects={"token": token()}) as one,
    ):
        assert await one.error("subscribe", channel="a", token=made()) == code
        assert await one.result("unsubscribe", channel="a") == {}


@BOTH
@pytest.mark.parametrize("claims", [{"channel": "b"}, {"channel": "a", "sub": "43"}, {"channel": "a", "client": "x"}])
async def test_a_subscription_token_of_something_else_closes_with_3500(form: Form, claims: dict[str, str]) -> None:
    async with (
        served(tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects={"token": token()}) as one,
    ):
        one.begin("subscribe", channel="a", token=token(**claims))
        assert await one.closed() == 3500


@BOTH
async def test_a_channel_of_another_user_is_error_103(form: Form) -> None:
    async with (
        served(tokens=CentrifugeTokens(SECRET), user_channel="#{user}") as app,
        client(app, form, connects=False) as one,
    ):
        result = await one.result("connect", token=token())
        assert list(result["subs"]) == ["#42"]
        for method in "subscribe", "publish", "history", "presence", "presence_stats":
            code = await one.error(method, **{"channel": "#43"} | ({"data": 1} if method == "publish" else {}))
            assert code == 103, method


@BOTH
async def test_the_users_own_channel_can_be_subscribed_and_not_be_left(form: Form) -> None:
    async with (
        served(tokens=CentrifugeTokens(SECRET), user_channel="#{user}") as app,
        client(app, form, connects={"token": token()}) as one,
    ):
        await one.result("subscribe", channel="#42")
        await one.result("unsubscribe", channel="#42")
        await one.result("publish", channel="#42", data=1)
        (pub,) = await one.wait_pushes(1, "#42")
        assert pub["data"] == 1


# The others.


@BOTH
async def test_a_result_is_always_there(form: Form) -> None:
    soon = int(time.time()) + 100
    async with (
        served(tokens=CentrifugeTokens(SECRET)) as app,
        client(app, form, connects={"token": token(exp=soon)}) as one,
    ):
        assert await one.result("unsubscribe", channel="never") == {}
        assert await one.result("publish", channel="quiet", data=1) == {}
        stats = await one.result("presence_stats", channel="deserted")
        presence = await one.result("presence", channel="deserted")
        history = await one.result("history", channel="empty")
        assert history["epoch"]
        if form == "json":
            assert stats == {"num_clients": 0, "num_users": 0}
            assert presence == {"presence": {}}
            assert history.keys() == {"epoch", "offset", "publications"}
        subscribed = await one.ask("subscribe", channel="quiet")
        assert "subscribe" in subscribed
        refreshed = await one.result("refresh", token=token(exp=soon + 100))
        assert refreshed["client"]
        assert refreshed["ttl"] >= 1


@BOTH
async def test_what_is_off_is_error_108(form: Form) -> None:
    async with served(ConnectionManager()) as app, client(app, form) as one:
        assert await one.error("history", channel="a") == 108
        assert await one.error("presence", channel="a") == 108
        assert await one.error("presence_stats", channel="a") == 108


@BOTH
async def test_names_without_a_channel_are_error_107(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        for method in "publish", "presence", "presence_stats", "history", "sub_refresh":
            request = {name: value for name, value in COMMANDS[method].items() if name != "channel"}
            assert await one.error(method, **request) == 107, method


@BOTH
async def test_a_publication_needs_data(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        assert await one.error("publish", channel="a") == 107


@BOTH
async def test_a_map_publication_is_error_108(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        assert await one.error("publish", channel="a", data=1, type=1, key="k") == 108


@BOTH
async def test_an_unknown_method_is_error_104(form: Form) -> None:
    manager = ConnectionManager()

    @manager.method("add")
    async def add(a: int, b: int) -> int:
        return a + b

    async with served(manager) as app, client(app, form) as one:
        assert await one.error("rpc", method="subtract", data={}) == 104
        assert await one.result("rpc", method="add", data={"a": 1, "b": 2}) == {"data": 3}
        assert await one.error("rpc", method="add", data={"a": "x"}) >= 107
        assert await one.error("rpc", method="add", data=[]) >= 107
        assert await one.error("rpc", method="add") >= 107


@BOTH
async def test_history_errors(form: Form) -> None:
    manager = ConnectionManager(history=History())
    async with served(manager) as app, client(app, form) as one:
        for n in range(3):
            await manager.broadcast({"n": n}, channel="a")
        top = await one.result("history", channel="a")
        assert top["offset"] == 3
        assert not top.get("publications")
        assert await one.error("history", channel="a", limit=1, since={"offset": 1, "epoch": "other"}) == 112
        assert await one.error("history", channel="a", limit=1, reverse=True, since={"epoch": top["epoch"]}) == 107
        for limit, since, reverse, expected in [
            (-1, None, False, [1, 2, 3]),
            (2, None, False, [1, 2]),
            (2, None, True, [3, 2]),
            (-1, 1, False, [2, 3]),
            (-1, 3, True, [2, 1]),
            (1, 3, True, [2]),
            (-1, 3, False, []),
            (-1, 2**64 - 1, False, []),
            (2**31 - 1, None, False, [1, 2, 3]),
        ]:
            request: dict[str, Any] = {"channel": "a", "limit": limit, "reverse": reverse}
            if since is not None:
                request["since"] = {"offset": since, "epoch": top["epoch"]}
            answer = await one.ask("history", **request)
            if since == 2**64 - 1 and "error" in answer:
                assert answer["error"]["code"] == 112
                continue
            found = answer["history"]
            assert [each["offset"] for each in found.get("publications", [])] == expected, request
            assert (found["offset"], found["epoch"]) == (3, top["epoch"])


@BOTH
async def test_refresh_errors(form: Form) -> None:
    async with served(tokens=CentrifugeTokens(SECRET)) as app:
        made: Callable[[], str]
        for made, code in [
            (lambda: "x", 3500),
            (lambda: token(sub="43"), 3500),
            (lambda: token(exp=1), 3005),
        ]:
            async with client(app, form, connects={"token": token(exp=int(time.time()) + 100)}) as one:
                one.begin("refresh", token=made())
                assert await one.closed() == code


@BOTH
async def test_sub_refresh_errors(form: Form) -> None:
    async with served(tokens=CentrifugeTokens(SECRET)) as app:
        soon = int(time.time()) + 100
        made: Callable[[], str]
        for made, code in [
            (lambda: "x", 3500),
            (lambda: token(channel="b", exp=soon), 3500),
            (lambda: token(channel="a", exp=1), 3006),
        ]:
            async with client(app, form, connects={"token": token()}) as one:
                assert await one.error("sub_refresh", channel="a", token=token(channel="a", exp=soon)) == 103
                result = await one.result("subscribe", channel="a", token=token(channel="a", exp=soon))
                assert result["expires"] is True
                assert 1 <= result["ttl"] <= 100
                assert await one.error("sub_refresh", channel="a") == 107
                one.begin("sub_refresh", channel="a", token=made())
                assert await one.closed() == code


@BOTH
async def test_send_has_no_answer_and_needs_no_id(form: Form) -> None:
    async with served() as app, client(app, form) as one:
        one.say({"send": {"data": {"a": 1}}})
        assert await one.result("unsubscribe", channel="a") == {}
        assert len(one.told) == 2


# Order.


@BOTH
async def test_no_push_comes_before_its_subscription_and_none_after_its_end(form: Form) -> None:
    manager = ConnectionManager(history=History())
    async with served(manager) as app, client(app, form) as one:
        stops = asyncio.Event()

        async def publish() -> None:
            n = 0
            while not stops.is_set():
                await manager.broadcast({"n": n}, channel="a")
                n += 1
                await asyncio.sleep(0)

        publishing = asyncio.create_task(publish())
        ids = []
        for _ in range(30):
            ids.append(one.begin("subscribe", channel="a"))
            await one.answer(ids[-1])
            await turns(3)
            ids.append(one.begin("unsubscribe", channel="a"))
            await one.answer(ids[-1])
        stops.set()
        await publishing
        await one.ask("unsubscribe", channel="a")
        is_in, offset = False, 0
        for each in one.told:
            if "subscribe" in each:
                is_in, offset = True, each["subscribe"].get("offset", 0)
            elif "unsubscribe" in each:
                is_in = False
            elif "push" in each:
                assert is_in, each
                assert each["push"]["pub"]["offset"] == offset + 1
                offset += 1
        assert one.pushes("a")


@BOTH
async def test_a_payload_of_several_lines_is_one_line(form: Form) -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app, form) as one:
        await one.result("subscribe", channel="a")
        await manager.broadcast({"text": "one\ntwo\u2028three"}, channel="a")
        await manager.broadcast("a text\nof two lines", channel="a")
        pubs = await one.wait_pushes(2, "a")
        assert [each["data"] for each in pubs] == [{"text": "one\ntwo\u2028three"}, "a text\nof two lines"]


async def test_a_json_client_is_not_given_what_is_no_json() -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app) as one:
        await one.result("subscribe", channel="a")
        await manager.broadcast(b"\xff\x00", channel="a")
        await manager.broadcast({"n": 1}, channel="a")
        pubs = await one.wait_pushes(1, "a")
        assert pubs[0]["data"] == {"n": 1}
        assert one.peer.close is None


# Closes by the server.


@BOTH
@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (1008, "", {3503, 3501}),
        (4401, "", {3500}),
        (4403, "", {3507}),
        (1013, "", {3008}),
        (1012, "", {3001}),
        (1001, "", {3001}),
        (1011, "", {3004}),
        (1000, "", {3503}),
        (4999, "true", {4999}),
        (4500, "", {4500}),
        (4001, "1013", {4001}),
        (4600, "{}", {4600}),
    ],
)
async def test_a_close_by_the_app_says_what_it_means(form: Form, code: int, reason: str, expected: set[int]) -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app, form) as one:
        (connection,) = manager.connections
        await connection.close(code, reason)
        assert await one.closed() in expected


@BOTH
async def test_who_is_unsubscribed_by_the_app_is_told(form: Form) -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app, form) as one:
        await one.result("subscribe", channel="a")
        (connection,) = manager.connections
        await connection.unsubscribe("a")
        (push,) = await one.wait_pushes(1, "a", "unsubscribe")
        assert push["code"] == 2000
        assert push["reason"]


@BOTH
async def test_a_user_who_is_closed_is_told_so(form: Form) -> None:
    manager = ConnectionManager()
    async with served(manager) as app, client(app, form) as one:
        await manager.close_user("7")
        assert await one.closed() >= 3000


@BOTH
async def test_authorize_that_raises_is_error_100_and_temporary(form: Form, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(_connection: object, _action: str, _channel: str | None) -> bool:
        raise RuntimeError("a mistake of the app with a secret")

    async with served(authorize=broken) as app, client(app, form) as one:
        answer = await one.ask("subscribe", channel="a")
        assert answer["error"]["code"] == 100
        assert answer["error"]["temporary"] is True
        assert "secret" not in json.dumps(answer)
