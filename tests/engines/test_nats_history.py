"""What is JetStream's own about the histories that it keeps; the contract has what all engines do."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import nats
import pytest
from nats.aio.client import Client

from tests.engines.links import failure, used
from tests.engines.nats_links import serving
from tests.support.brokers import JetStreamServer, NATSServer, jetstream_cluster
from wsbroadcast import ConfigurationError, EngineError, EngineUnavailable, Message, MessageTooLarge
from wsbroadcast.audience import Audience
from wsbroadcast.engines.broker.link import Keep, KeptParcel, Parcel
from wsbroadcast.engines.nats import NATSEngine, upkeep
from wsbroadcast.engines.nats.jetstream import Refused
from wsbroadcast.history import Appended, History, HistoryRules, Replay
from wsbroadcast.options import Timing
from wsbroadcast.publication import Position, Publication
from wsbroadcast.testing.nodes import NEWS, SPORT, Node, Recorder

OwnNATS = Callable[..., NATSServer]

KEPT = History(messages=20, seconds=60, remember=3600)
RULES = HistoryRules(KEPT)
TIMING = Timing(connect_timeout=5.0)


@pytest.fixture(scope="module")
def jetstream() -> Iterator[JetStreamServer]:
    """One that all tests share that change nothing but their own stream."""
    with JetStreamServer() as server:
        yield server


@pytest.fixture
def own_jetstream() -> Iterator[Callable[..., JetStreamServer]]:
    servers: list[JetStreamServer] = []

    def own(**options: Any) -> JetStreamServer:
        servers.append(JetStreamServer(**options))
        servers[-1].start()
        return servers[-1]

    yield own
    for server in servers:
        server.close()


@asynccontextmanager
async def running(
    url: str,
    prefix: str,
    *audiences: Audience,
    rules: HistoryRules | None = RULES,
    **options: Any,
) -> AsyncIterator[Node]:
    """Run a node that keeps something, or learns what others keep."""
    node = Node(NATSEngine(url, prefix=prefix, timing=TIMING, **options), Recorder(), 10.0)
    engine_of(node).keep(rules)
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        await node.engine.start(node.recorder)
        stack.push_async_callback(node.engine.aclose)
        await node.join(*audiences)
        yield node


def engine_of(node: Node) -> NATSEngine:
    assert isinstance(node.engine, NATSEngine)
    return node.engine


async def append(
    node: Node, data: object, audience: Audience = NEWS, key: str | None = None, history: History = KEPT
) -> Appended:
    return await engine_of(node).append(Publication(Message.of(data), audience), history, key)


async def read(node: Node, since: Position | None = None, audience: Audience = NEWS, history: History = KEPT) -> Replay:
    return await engine_of(node).read(audience, since, history)


async def position(node: Node, audience: Audience = NEWS) -> Position:
    return (await engine_of(node).positions([audience], [KEPT]))[0]


def texts(replay: Replay) -> list[object]:
    return [each.message.data for each in replay.publications]


async def received(node: Node, count: int, audience: Audience = NEWS) -> list[Publication]:
    """Wait for so many publications, and return them."""

    def all_of_them() -> list[Publication]:
        return [each for each in node.recorder.publications if each.audience == audience]

    assert await node.recorder.wait_until(lambda: len(all_of_them()) >= count, node.seconds), all_of_them()
    return all_of_them()


async def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until something holds that an outage has to pass for, and return it."""
    async with asyncio.timeout(10):
        while True:
            try:
                if result := await condition():
                    return result
            except EngineUnavailable:
                pass
            await asyncio.sleep(0.01)


class Administrator:
    """Asks a NATS server without any of our code."""

    def __init__(self, client: Client, prefix: str) -> None:
        self.client = client
        self.prefix = prefix
        self.stream = f"{prefix}-history"

    async def call(self, verb: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        text = b"" if content is None else json.dumps(content).encode()
        answer: dict[str, Any] = json.loads((await self.client.request(f"$JS.API.{verb}", text, timeout=5)).data)
        assert "error" not in answer, answer
        return answer

    async def config(self) -> dict[str, Any]:
        config: dict[str, Any] = (await self.call(f"STREAM.INFO.{self.stream}"))["config"]
        return config

    async def change(self, **changes: Any) -> None:
        await self.call(f"STREAM.UPDATE.{self.stream}", await self.config() | changes)

    async def keep(self, what: str, payload: bytes, **headers: str) -> dict[str, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()} or None
        answer = await self.client.request(f"{self.prefix}:keep.{what}", payload, timeout=5, headers=named)
        ack: dict[str, Any] = json.loads(answer.data)
        return ack


@asynccontextmanager
async def administering(server: NATSServer, prefix: str) -> AsyncIterator[Administrator]:
    client = await nats.connect(server.url, allow_reconnect=False)
    try:
        yield Administrator(client, prefix)
    finally:
        await client.close()


# One order.


async def test_publishers_at_the_same_time_make_one_chain(jetstream: JetStreamServer, prefix: str) -> None:
    async with AsyncExitStack() as stack:
        publishers = [await stack.enter_async_context(running(jetstream.url, prefix)) for _ in range(4)]
        readers = [await stack.enter_async_context(running(jetstream.url, prefix, NEWS)) for _ in range(2)]

        async def publish(node: Node, name: str) -> list[Position]:
            return [(await append(node, f"{name} {number}")).position for number in range(250)]

        names = "abcd"
        places = await asyncio.gather(*(publish(node, name) for node, name in zip(publishers, names, strict=True)))
        orders = [await received(node, 1000) for node in readers]
        assert [each.message.data for each in orders[0]] == [each.message.data for each in orders[1]]
        for came in orders:
            assert came[0].previous == 0
            assert all(first.offset == second.previous for first, second in pairwise(came))
            for name, positions in zip(names, places, strict=True):
                of_one = [each for each in came if str(each.message.data).startswith(name)]
                assert [each.position for each in of_one] == positions


# Where the data ends, the epoch ends.


async def test_memory_of_a_server_that_was_restarted_is_another_epoch(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    async with running(server.url, prefix, NEWS) as node, running(server.url, prefix) as quiet:
        empty = await position(quiet, SPORT)
        at = [(await append(node, str(number))).position for number in range(10)][-1]
        await server.restarted()

        async def appended() -> Appended:
            return await append(node, "after")

        after: Appended = await eventually(appended)
        assert after.position.epoch not in ("", at.epoch)
        for each in (node, quiet):
            replay = await eventually(partial(read, each, at))
            assert (replay.top, texts(replay)) == (after.position, ["after"])
            assert not replay.is_complete(at)
            assert not (await read(each, empty, SPORT)).is_complete(empty)


async def test_files_of_a_server_that_was_restarted_go_on(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    async with running(server.url, prefix, NEWS, history_storage="file") as node:
        at = [(await append(node, str(number))).position for number in range(10)]
        await server.restarted()
        replay: Replay = await eventually(lambda: read(node, at[4]))
        assert replay.is_complete(at[4])
        assert replay.top == at[-1]
        after = await append(node, "after")
        assert after.position.epoch == at[-1].epoch
        came = await received(node, 11)
        assert came[-1].previous == at[-1].offset


@pytest.mark.parametrize("subscribed", [True, False])
async def test_stream_that_was_set_back_is_found_out(
    own_jetstream: Callable[..., JetStreamServer], prefix: str, subscribed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who isn't subscribed knows by its own clock when something was taken. Servers don't usually come back that fast.
    monkeypatch.setattr(upkeep, "_SKEW", 2 * 10**7)
    # What says `created`, the epoch's record and an offset that is there again, was shown to be fooled.
    server = own_jetstream()
    store = server.directory / "jetstream"
    copy = server.directory / "copy"
    joined = [NEWS] if subscribed else []
    async with running(server.url, prefix, *joined, history_storage="file") as node:
        old = [(await append(node, f"old {number}")).position for number in range(5)]
        await server.stopped()
        await asyncio.to_thread(shutil.copytree, store, copy)
        await server.started()
        lost = [(await eventually(partial(append, node, f"lost {n}"))).position for n in range(5)]
        assert lost[-1].epoch == old[-1].epoch
        await node.engine.aclose()
        await server.stopped()
        await asyncio.to_thread(shutil.rmtree, store)
        await asyncio.to_thread(shutil.move, copy, store)
        await server.started()
        async with running(server.url, prefix) as other:  # it knows nothing of what was lost
            new = [(await append(other, f"new {number}")).position for number in range(8)]
        assert set(lost) < set(new)  # all of it is there again, and is something else
        await node.engine.start(node.recorder)
        assert (await position(node)).epoch != old[-1].epoch
        for since in (*old, *lost):
            assert not (await read(node, since)).is_complete(since)


async def test_server_that_comes_back_behind_is_found_out_at_once(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    store, copy = server.directory / "jetstream", server.directory / "copy"
    async with running(server.url, prefix, history_storage="file") as node:
        await append(node, "old")
        await server.stopped()
        await asyncio.to_thread(shutil.copytree, store, copy)
        await server.started()
        lost = (await eventually(lambda: append(node, "lost"))).position  # known by the confirmation alone
        await server.stopped()
        await asyncio.to_thread(shutil.rmtree, store)
        await asyncio.to_thread(shutil.move, copy, store)
        await server.started()
        after = (await eventually(lambda: append(node, "new"))).position
        assert after.epoch != lost.epoch


async def test_stream_that_is_replaced_while_we_are_connected_is_found_out(
    jetstream: JetStreamServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_SKEW", 0)
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        at = [(await append(node, str(number))).position for number in range(10)][-1]
        config = await admin.config()
        await admin.call(f"STREAM.DELETE.{admin.stream}")
        await admin.call(f"STREAM.CREATE.{admin.stream}", config)
        await admin.keep("epoch", at.epoch.encode(), Nats_TTL="never")
        await admin.keep("channel.news", b'{"v":1}\nnew')
        assert (await received(node, 11))[-1].offset < at.offset

        async def is_found_out() -> bool:
            return (await position(node)).epoch != at.epoch

        await eventually(is_found_out)


async def test_stream_that_is_deleted_comes_back(
    jetstream: JetStreamServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        at = (await append(node, "old")).position
        await admin.call(f"STREAM.DELETE.{admin.stream}")
        with pytest.raises(EngineUnavailable, match="nothing was sent") as caught:
            await append(node, "nobody takes it")
        assert not caught.value.may_have_been_sent
        after: Appended = await eventually(lambda: append(node, "new"))
        assert after.position.epoch != at.epoch
        assert [each.message.data for each in await received(node, 2)] == ["old", "new"]
        assert engine_of(node).stats().reconnects == 0


async def test_append_to_a_new_stream_gets_no_position_of_the_old_one(jetstream: JetStreamServer, prefix: str) -> None:
    # Between the making of the stream and its epoch, as another node may leave it.
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        at = (await append(node, "old")).position
        config = await admin.config()
        await admin.call(f"STREAM.DELETE.{admin.stream}")
        await admin.call(f"STREAM.CREATE.{admin.stream}", config)
        after = (await append(node, "new")).position
        assert (after.epoch != at.epoch, after.offset) == (True, 1)
        assert await position(node) == after


# What goes by itself.


async def test_audience_whose_messages_have_expired_begins_anew(jetstream: JetStreamServer, prefix: str) -> None:
    short = History(messages=20, seconds=0.2, remember=0.4)
    rules = HistoryRules(short)
    async with running(jetstream.url, prefix, NEWS, rules=rules) as node:
        at = [(await append(node, str(number))).position for number in range(3)]

        async def is_gone() -> bool:
            return (await position(node)).offset == 0

        await eventually(is_gone)
        replay = await read(node, at[-1])
        assert (replay.top.epoch, list(replay.publications)) == (at[-1].epoch, [])
        assert not replay.is_complete(at[-1])
        after = (await append(node, "after")).position
        came = await received(node, 4)
        assert (came[-1].position, came[-1].previous) == (after, 0)
        assert not (await read(node, at[-1])).is_complete(at[-1])


async def test_records_outlive_everything_else(jetstream: JetStreamServer, prefix: str) -> None:
    short = History(messages=20, seconds=0.1, remember=0.2)
    async with running(jetstream.url, prefix, NEWS, rules=HistoryRules(short)) as node:
        at = await position(node)
        async with administering(jetstream, prefix) as admin:
            name = f"STREAM.MSG.GET.{admin.stream}"

            async def sequence(what: str) -> int:
                found = await admin.call(name, {"last_by_subj": f"{prefix}:keep.{what}"})
                return int(found["message"]["seq"])

            first = {what: await sequence(what) for what in ("epoch", "rules")}
            for what in first:

                async def is_written_again(what: str = what) -> bool:
                    return await sequence(what) > first[what]

                await eventually(is_written_again)
        assert await position(node) == at
        async with running(jetstream.url, prefix, rules=None) as other:
            assert engine_of(other).rules == HistoryRules(short)
            assert await position(other) == at


async def test_full_stream_drops_what_is_oldest_and_goes_on(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix) as node, administering(jetstream, prefix) as admin:
        sport = [(await append(node, "x" * 1000, SPORT)).position for _ in range(5)]
        await admin.change(max_bytes=20_000)
        news = [(await append(node, "x" * 1000)).position for _ in range(30)]
        assert {each.epoch for each in news} == {sport[0].epoch}
        assert not (await read(node, sport[0], SPORT)).is_complete(sport[0])
        replay = await read(node, news[-6])
        assert replay.is_complete(news[-6])
        assert replay.top == news[-1]
        assert not (await read(node, news[0])).is_complete(news[0])
        # The epoch's own record went first, and it is the same epoch all the same. But what it proved it doesn't now.
        start = Position(sport[0].epoch, 0)
        assert not (await read(node, start)).is_complete(start)
        async with running(jetstream.url, prefix) as other:
            assert (await position(other)) == news[-1]


async def test_stream_that_takes_no_more_is_told_of(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        await append(node, "first")
        await admin.change(max_bytes=5000, discard="new")
        results = [(await asyncio.gather(append(node, "x" * 1000), return_exceptions=True))[0] for _ in range(30)]
        assert isinstance(results[-1], EngineUnavailable)
        assert "maximum bytes exceeded" in str(results[-1])
        count = len(texts(await read(node)))
        assert len(await received(node, count)) == count
        await node.publish("not kept")
        assert (await received(node, count + 1))[-1].message.data == "not kept"


async def test_history_that_was_purged_from_outside_is_not_complete(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        at = [(await append(node, str(number))).position for number in range(3)]
        await admin.call(f"STREAM.PURGE.{admin.stream}")
        for since in (*at, Position(at[0].epoch, 0)):
            replay = await read(node, since)
            assert not replay.is_complete(since)
            assert replay.top.epoch not in ("", at[0].epoch)
        await admin.call(f"STREAM.PURGE.{admin.stream}", {"filter": f"{prefix}:keep.channel.news"})
        after = (await append(node, "after")).position
        came = await received(node, 4)
        assert (came[-1].position, came[-1].previous) == (after, 0)
        for since in at:
            assert not (await read(node, since)).is_complete(since)


# Who keeps what.


async def test_limits_of_the_stream_only_grow(jetstream: JetStreamServer, prefix: str) -> None:
    async with administering(jetstream, prefix) as admin:
        for history, messages, seconds in (
            (History(messages=10, remember=1000), 11, 1250),
            (History(messages=5, remember=2000), 11, 2500),
            (History(messages=20, remember=500), 21, 2500),
        ):
            async with running(jetstream.url, prefix, rules=HistoryRules({"a": history, "b*": History(messages=2)})):
                config = await admin.config()
                assert (config["max_msgs_per_subject"], config["max_age"]) == (messages, max(seconds, 108_000) * 10**9)
                assert (config["storage"], config["num_replicas"], config["discard"]) == ("memory", 1, "old")


async def test_stream_of_an_administrator_is_used_as_it_is(jetstream: JetStreamServer, prefix: str) -> None:
    async with administering(jetstream, prefix) as admin:
        config = {
            "name": admin.stream,
            "subjects": [f"{prefix}:keep.>"],
            "storage": "file",
            "max_bytes": 10**6,
            "republish": {"src": f"{prefix}:keep.>", "dest": f"{prefix}.>"},
            "allow_direct": True,
            "allow_msg_ttl": True,
        }
        made = (await admin.call(f"STREAM.CREATE.{admin.stream}", config))["config"]
        async with running(jetstream.url, prefix) as node:
            assert (await read(node)).top == await position(node)
            assert await admin.config() == made


async def test_stream_that_is_kept_less_safely_than_asked_for_is_told_of(
    jetstream: JetStreamServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(jetstream.url, prefix):
        async with running(jetstream.url, prefix, history_storage="file"):
            pass
        assert caplog.text.count("exists already, and it is kept in memory, not in files") == 1
        async with running(jetstream.url, prefix, history_replicas=3):
            pass
        assert "exists already, and it is kept on 1 servers, not on 3" in caplog.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subjects": ["{prefix}:keep.channel.>"]}, "doesn't take"),
        ({"retention": "interest"}, "retention"),
        ({"deny_purge": True}, "forgotten"),
    ],
)
async def test_stream_that_does_not_fit_is_refused(
    jetstream: JetStreamServer, prefix: str, changes: dict[str, Any], why: str
) -> None:
    async with administering(jetstream, prefix) as admin:
        config = {"name": admin.stream, "subjects": [f"{prefix}:keep.>"]} | changes
        config["subjects"] = [each.replace("{prefix}", prefix) for each in config["subjects"]]
        await admin.call(f"STREAM.CREATE.{admin.stream}", config)
        with pytest.raises(ConfigurationError, match=why) as caught:
            async with running(jetstream.url, prefix):
                pass
        assert "remove it" in str(caught.value)


async def test_other_rules_are_told_of_once(
    own_jetstream: Callable[..., JetStreamServer], prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = own_jetstream()
    others = HistoryRules(History(messages=7))

    def warnings() -> list[str]:
        return [each.getMessage() for each in caplog.records if "another node keeps other histories" in each.message]

    async with running(server.url, prefix, history_storage="file") as node:
        async with running(server.url, prefix, rules=RULES):
            assert warnings() == []
        async with running(server.url, prefix, rules=others, history_storage="file"):
            (warning,) = warnings()
            assert '"messages":7' in warning
            assert '"messages":20' in warning
        for _ in range(2):  # ours are written again, and the log was told of the others' once
            await server.restarted()
            await eventually(lambda: append(node, "back"))
        assert len(warnings()) == 2
        async with running(server.url, prefix, rules=None) as learner:
            assert engine_of(learner).rules == RULES


async def test_who_only_publishes_goes_on_with_what_it_learned(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    async with running(server.url, prefix, rules=None) as early:
        assert engine_of(early).rules is None
        async with running(server.url, prefix, NEWS) as node, running(server.url, prefix, rules=None) as learner:
            assert engine_of(learner).rules == RULES
            await append(learner, "kept")
            await received(node, 1)
            await node.engine.aclose()
            await server.restarted()  # and its memory is empty

            async def is_back() -> bool:
                return engine_of(learner).link is not None

            await eventually(is_back)
            assert engine_of(learner).rules == RULES
            with pytest.raises(EngineUnavailable, match="nothing was sent"):
                await append(learner, "too early")
            async with running(server.url, prefix, NEWS) as again:
                appended: Appended = await eventually(lambda: append(learner, "kept again"))
                assert [each.position for each in await received(again, 1)] == [appended.position]


async def test_who_only_publishes_learns_when_somebody_begins_to_keep(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    async with running(server.url, prefix, rules=None) as early:
        assert engine_of(early).rules is None
        async with running(server.url, prefix, NEWS) as node:

            async def has_learned() -> bool:
                return engine_of(early).rules == RULES

            await eventually(has_learned)
            appended: Appended = await eventually(partial(append, early, "kept"))
            assert [each.position for each in await received(node, 1)] == [appended.position]
            assert (await read(early, appended.position)).is_complete(appended.position)
        await server.stopped()
        assert engine_of(early).rules == RULES


async def test_rules_of_a_stranger_are_not_believed(
    jetstream: JetStreamServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(jetstream.url, prefix), administering(jetstream, prefix) as admin:
        await admin.keep("rules", b"[]")
        async with running(jetstream.url, prefix, rules=None) as learner:
            assert engine_of(learner).rules is None
        assert "was not written by this library" in caplog.text


# What makes a history impossible.


async def test_server_without_jetstream_is_refused(own_nats: OwnNATS, prefix: str) -> None:
    server = own_nats()
    with pytest.raises(ConfigurationError, match=r"JetStream is off: write jetstream \{\}"):
        async with running(server.url, prefix):
            pass
    async with running(server.url, prefix, NEWS, rules=None) as learner:
        assert engine_of(learner).rules is None
        await learner.publish("hello")
        await learner.receives(["hello"])


async def test_account_without_jetstream_is_refused(prefix: str) -> None:
    server = JetStreamServer(config="accounts { A: { users: [ { user: a, password: a } ] } }")
    with server, pytest.raises(ConfigurationError, match="JetStream is off"):
        async with running(f"nats://a:a@{server.host}:{server.port}", prefix):
            pass


async def test_old_server_is_refused(prefix: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.10.29","max_payload":1048576,"headers":true}\r\n')
        while await reader.readuntil(b"PING\r\n"):
            writer.write(b"PONG\r\n")

    async with serving(serve) as url:
        engine = NATSEngine(url, prefix=prefix)
        engine.keep(RULES)
        error = await failure(engine)
        assert isinstance(error, ConfigurationError)
        assert "nats-server 2.10.29, and a history needs 2.11" in str(error)


PERMITTED = """
authorization {{ users: [
    {{ user: admin, password: admin }},
    {{ user: node, password: node, permissions: {{ subscribe: ["{prefix}.>"], publish: [{publish}] }} }},
] }}
"""
NEEDED = (
    "{prefix}.>",
    "{prefix}:keep.>",
    "$JS.API.STREAM.*.{prefix}-history",
    "$JS.API.STREAM.MSG.GET.{prefix}-history",
    "$JS.API.DIRECT.GET.{prefix}-history",
)


def permitted(prefix: str, names: tuple[str, ...]) -> str:
    return PERMITTED.format(prefix=prefix, publish=", ".join(json.dumps(name.format(prefix=prefix)) for name in names))


async def test_permissions_that_are_named_are_enough(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream(config=permitted(prefix, NEEDED))
    async with running(f"nats://node:node@{server.host}:{server.port}", prefix, NEWS) as node:
        at = (await append(node, "hello")).position
        assert (await received(node, 1))[0].position == at
        assert texts(await read(node)) == ["hello"]
        await engine_of(node).forget(NEWS)
        assert texts(await read(node)) == []


@pytest.mark.parametrize("missing", NEEDED[1:])
async def test_permission_that_is_missing_is_named(
    own_jetstream: Callable[..., JetStreamServer], prefix: str, missing: str
) -> None:
    server = own_jetstream(config=permitted(prefix, tuple(name for name in NEEDED if name != missing)))
    with pytest.raises(ConfigurationError, match="doesn't let the user 'node' publish") as caught:
        async with running(f"nats://node:node@{server.host}:{server.port}", prefix):
            pass
    assert missing.format(prefix=prefix) in str(caught.value)


async def test_permission_to_append_that_is_missing_refuses_the_append_alone(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    names = tuple(f"{{prefix}}:keep.{what}" for what in ("epoch", "rules", "channel.news"))
    server = own_jetstream(config=permitted(prefix, (NEEDED[0], *names, *NEEDED[2:])))
    async with running(f"nats://node:node@{server.host}:{server.port}", prefix, NEWS) as node:
        results = await asyncio.gather(
            *(append(node, str(number), (NEWS, SPORT)[number % 2]) for number in range(4)), return_exceptions=True
        )
        assert [isinstance(each, Appended) for each in results] == [True, False, True, False]
        assert all(isinstance(each, EngineUnavailable) for each in results[1::2])
        assert f"grant publish on '{prefix}:keep.>'" in str(results[1])
        with pytest.raises(EngineUnavailable, match="grant publish"):
            await engine_of(node).forget(NEWS)
        assert engine_of(node).stats().reconnects == 0


async def test_stream_larger_than_the_server_is_refused(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    with pytest.raises(ConfigurationError, match=r"refuses the stream .* on 3 of its servers"):
        async with running(server.url, prefix, history_replicas=3):
            pass


# What is said from outside.


async def test_place_in_an_envelope_is_not_believed(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        at = (await append(node, "first")).position
        forged = b'{"v":1,"node":"x","seq":1,"epoch":"%s","offset":900,"previous":%d}\nforged'
        envelope = forged % (at.epoch.encode(), at.offset)
        await admin.client.publish(f"{prefix}.channel.news", envelope)
        other = b'{"v":1,"epoch":"e","offset":7,"previous":6}\nforged'
        await admin.client.publish(f"{prefix}.channel.news", other, headers={"Nats-Sequence": "9"})
        sequence = (await admin.keep("channel.news", envelope, Nats_Sequence="77", Nats_Last_Sequence="76"))["seq"]
        came = await received(node, 4)
        assert [each.position for each in came] == [at, None, None, Position(at.epoch, sequence)]
        assert came[-1].previous == at.offset
        replay = await read(node)
        assert [(each.offset, each.message.data) for each in replay.publications] == [
            (at.offset, "first"),
            (sequence, "forged"),
        ]


async def test_records_of_strangers_disturb_nobody(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix, NEWS) as node, administering(jetstream, prefix) as admin:
        at = (await append(node, "first")).position
        for name in ("epoch", "forgotten.channel.news", "forgotten", "rules"):
            await admin.client.publish(f"{prefix}.{name}", b"other")  # not where the stream takes it
            await admin.client.publish(f"{prefix}:keep.{name}", b"\xff no epoch")
        inbox = next(iter(engine_of(node).link.__dict__["_log"].__dict__["_answers"].__dict__["_inbox"].split(b" ")))
        await admin.client.publish(f"{inbox.decode()}1", b"nobody asked")
        await admin.client.flush()
        after = (await append(node, "after")).position
        assert [each.position for each in await received(node, 2)] == [at, after]
        async with running(jetstream.url, prefix) as other:  # what is no epoch is replaced
            found = await position(other)
            assert found.offset == after.offset
            assert found.epoch != at.epoch

            async def agrees() -> bool:
                return await position(node) == found

            await eventually(agrees)


# Several servers.


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[JetStreamServer]]:
    """Three servers, which take some seconds to agree on a leader."""
    with jetstream_cluster() as servers:
        yield servers


@asynccontextmanager
async def running_on_each(
    servers: list[JetStreamServer], prefix: str, *audiences: Audience, **options: Any
) -> AsyncIterator[list[Node]]:
    """Run a node at each server, when they agree."""
    async with AsyncExitStack() as stack:
        nodes: list[Node] = []
        for server in servers:

            async def enter(server: JetStreamServer = server) -> Node | None:
                node = await stack.enter_async_context(running(server.url, prefix, *audiences, **options))
                return node if engine_of(node).link is not None else None

            async with asyncio.timeout(30):
                while len(nodes) < 3:
                    try:
                        if node := await enter():
                            nodes.append(node)
                            break
                    except ConfigurationError:  # they don't know yet that they are three
                        await asyncio.sleep(0.1)
        yield nodes


async def test_replicas_that_are_behind_are_not_believed(cluster: list[JetStreamServer], prefix: str) -> None:
    async with running_on_each(cluster, prefix, history_replicas=3) as nodes:
        for number in range(100):
            at = (await append(nodes[0], str(number))).position
            for node in nodes:
                assert await position(node) == at
                replay = await read(node, at)
                assert (replay.top, replay.is_complete(at)) == (at, True)
        for node in nodes:
            replay = await read(node)
            assert texts(replay) == [str(number) for number in range(80, 100)]
        appended = await asyncio.gather(*(append(nodes[n % 3], str(n), key="k") for n in range(64)))
        assert len({each.position for each in appended}) == 1
        assert sorted(each.is_repeat for each in appended) == [False, *[True] * 63]


async def test_chain_is_unbroken_when_the_leader_changes(cluster: list[JetStreamServer], prefix: str) -> None:
    async with (
        running_on_each(cluster, prefix, NEWS, history_replicas=3) as nodes,
        administering(cluster[0], prefix) as admin,
    ):
        results: list[Appended | BaseException] = []
        taken: list[Appended] = []
        for number in range(200):
            if number >= 20 and len(taken) > 100:
                break  # the new leader takes them; how soon there is one is up to the machine
            if number == 10:
                await admin.call(f"STREAM.LEADER.STEPDOWN.{admin.stream}")
            some = (append(nodes[n % 3], f"{number} {n}") for n in range(10))
            results += await asyncio.gather(*some, return_exceptions=True)
            taken = [each for each in results if isinstance(each, Appended)]
        assert all(isinstance(each, (Appended, EngineUnavailable)) for each in results)
        assert len(taken) > 100
        top = max(each.position for each in taken)
        for node in nodes:
            came = await received(node, len(taken))
            assert all(first.offset == second.previous for first, second in pairwise(came))
            assert {each.position for each in taken} <= {each.position for each in came}
            assert (await position(node)) >= top
            assert engine_of(node).stats().reconnects == 0


async def test_memory_of_one_server_of_several_is_another_epoch_when_it_is_back(
    cluster: list[JetStreamServer], prefix: str
) -> None:
    # The stream says that it was created when it was, and has lost everything.
    async with running_on_each(cluster, prefix, NEWS) as nodes, administering(cluster[0], prefix) as admin:
        at = [(await append(nodes[0], str(number))).position for number in range(10)][-1]
        leader = (await admin.call(f"STREAM.INFO.{admin.stream}"))["cluster"]["leader"]
        server = next(
            each for each in cluster if f"server_name: {leader}" in (each.directory / "nats.conf").read_text()
        )
        await server.restarted()

        async def is_another() -> bool:
            return (await position(nodes[0])).epoch != at.epoch

        await eventually(is_another)
        after: Appended = await eventually(partial(append, nodes[0], "after"))
        for node in nodes:
            assert (await eventually(partial(position, node))).epoch == after.position.epoch
            assert not (await read(node, at)).is_complete(at)


# What is forgotten.


async def test_others_keep_their_epoch_when_one_audience_is_forgotten(jetstream: JetStreamServer, prefix: str) -> None:
    async with (
        running(jetstream.url, prefix, NEWS, SPORT) as node,
        running(jetstream.url, prefix, NEWS, SPORT) as other,
    ):
        news = (await append(node, "news")).position
        sport = (await append(node, "sport", SPORT)).position
        epochs = {news.epoch}
        for _ in range(3):
            await engine_of(other).forget(NEWS)
            after = (await append(other, "after")).position
            epochs.add(after.epoch)
            assert await position(node) == await position(other) == after
            assert (await append(node, "again")).position.epoch == after.epoch
        assert len(epochs) == 4
        assert (await read(node, sport, SPORT)).is_complete(sport)
        for each in (node, other):
            came = await received(each, 7)
            assert len({kept.position.epoch for kept in came if kept.position}) == 4
        async with running(jetstream.url, prefix) as late:
            assert await position(late) == await position(node)
            assert (await append(late, "late")).position.epoch == after.epoch


async def test_what_is_about_to_be_removed_is_no_part_of_the_new_history(
    jetstream: JetStreamServer, prefix: str
) -> None:
    async with (
        running(jetstream.url, prefix, NEWS) as node,
        running(jetstream.url, prefix) as late,
        administering(jetstream, prefix) as admin,
    ):
        secret = (await append(node, "secret")).position
        # As `forget` begins; whoever reads now finds what it removes next.
        record = (await admin.keep("forgotten.channel.news", b"another"))["seq"]
        empty = Position(f"{secret.epoch}-another", 0)
        for each in (node, late):
            assert await position(each) == empty
            for since in (None, secret, empty):
                replay = await read(each, since)
                assert (replay.top, texts(replay), replay.base) == (empty, [], 0)
        after = (await append(node, "after")).position
        assert after.epoch == empty.epoch
        assert after.offset > record
        kept = (await received(node, 2))[-1]
        assert (kept.position, kept.previous) == (after, 0)
        for each in (node, late):
            replay = await read(each, empty)
            assert (replay.top, texts(replay), replay.is_complete(empty)) == (after, ["after"], True)


async def test_append_that_is_confirmed_after_its_history_was_forgotten_is_in_none(
    jetstream: JetStreamServer, prefix: str
) -> None:
    async with running(jetstream.url, prefix, NEWS) as node, running(jetstream.url, prefix) as other:
        for _ in range(20):
            appended, _ = await asyncio.gather(append(node, "before or after"), engine_of(other).forget(NEWS))
            top = await position(node)
            assert (appended.position == top) == (texts(await read(node)) == ["before or after"])
            assert appended.position == top or appended.position.epoch != top.epoch


async def test_key_of_a_forgotten_audience_is_forgotten(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix) as node:
        first = await append(node, "first", key="k")
        assert await append(node, "first", key="k") == (first.position, True)
        await engine_of(node).forget(NEWS)
        again = await append(node, "again", key="k")
        assert not again.is_repeat
        assert texts(await read(node)) == ["again"]


async def test_forgotten_audience_keeps_its_epoch_as_long_as_it_is_used(
    jetstream: JetStreamServer, prefix: str
) -> None:
    short = History(messages=20, seconds=0.4, remember=0.4)
    async with running(jetstream.url, prefix, rules=HistoryRules(short)) as node:
        plain = (await append(node, "secret")).position
        await engine_of(node).forget(NEWS)
        epoch = (await position(node)).epoch
        loop = asyncio.get_running_loop()
        until = loop.time() + 1.2  # three times as long as its record lives
        while loop.time() < until:
            at = (await append(node, "used")).position
            assert at.epoch == epoch
            await asyncio.sleep(0.05)
        async with running(jetstream.url, prefix, rules=None) as other:
            assert (await position(other)).epoch == epoch

            async def is_as_others() -> bool:
                found = [await position(each) for each in (node, other)]
                return found == [Position(plain.epoch, 0)] * 2

            await eventually(is_as_others)  # nobody has a position of it any more


# What is large, or slow.


async def test_large_history_is_read_in_pages(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix) as node:
        positions = [(await append(node, f"{number:02}" + "x" * 900_000)).position for number in range(12)]
        replay = await read(node, positions[0])
        assert replay.is_complete(positions[0])
        assert [str(each.message.data)[:2] for each in replay.publications] == [f"{number:02}" for number in range(12)]
        audiences = [Audience("channel", f"{number}") for number in range(12)]
        tops = [(await append(node, "x" * 900_000, audience)).position for audience in audiences]
        assert await engine_of(node).positions(audiences, [KEPT] * 12) == tops


async def test_many_forgotten_audiences_are_known(jetstream: JetStreamServer, prefix: str) -> None:
    async with running(jetstream.url, prefix) as node, administering(jetstream, prefix) as admin:
        for number in range(2100):
            await admin.client.publish(f"{prefix}:keep.forgotten.channel.{number}", b"v%d" % number)
        await admin.keep("forgotten.channel.2100", b"v2100")
        audiences = [Audience("channel", f"{number}") for number in (0, 1050, 2099)]
        epochs = [each.epoch for each in await engine_of(node).positions(audiences, [KEPT] * 3)]
        assert [each.rpartition("-")[2] for each in epochs] == ["v0", "v1050", "v2099"]
        async with running(jetstream.url, prefix) as other:
            appended = [await append(other, "x", audience) for audience in audiences]
            assert [each.position.epoch for each in appended] == epochs


async def test_key_that_makes_a_message_too_large_loses_nothing(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream(config="max_payload: 4096")
    async with running(server.url, prefix, NEWS) as node:
        size = 4096 - 60
        await append(node, "x" * size)
        with pytest.raises(MessageTooLarge):
            await append(node, "x" * size, key="k")
        await append(node, "x", key="k")
        assert len(await received(node, 2)) == 2
        assert engine_of(node).stats().reconnects == 0


async def test_large_message_beside_one_that_is_kept_is_refused_alone(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream(config="max_payload: 4096")
    engine = NATSEngine(server.url, prefix=prefix)
    engine.keep(RULES)
    name = f"{prefix}.channel.news"
    async with used(engine, name) as link:
        kept = KeptParcel(name, b"2", Keep(KEPT))
        large = (Parcel(name, b"x" * 4097), KeptParcel(name, b"x" * 4097, Keep(KEPT)))
        results = await link.link.publish([Parcel(name, b"1"), *large, kept, Parcel(name, b"3")])
        assert [type(each) for each in results] == [type(None), MessageTooLarge, MessageTooLarge, Appended, type(None)]
        await link.publish(name, b"4")
        assert sorted(envelope for _, envelope in await link.letters.until(b"4")) == [b"1", b"2", b"3", b"4"]


async def test_stream_that_says_nothing_costs_only_what_is_kept(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    engine = NATSEngine(server.url, prefix=prefix, timing=Timing(connect_timeout=5.0, request_timeout=2.0))
    engine.keep(RULES)
    name = f"{prefix}.channel.news"
    async with used(engine, name) as link, administering(server, prefix) as admin:
        await admin.call(f"STREAM.DELETE.{admin.stream}")
        await admin.client.subscribe(f"{prefix}:keep.>")  # somebody is there, and doesn't answer
        await admin.client.flush()
        parcels = [Parcel(name, b"1"), KeptParcel(name, b"2", Keep(KEPT)), Parcel(name, b"3")]
        first, second, third = await link.link.publish(parcels)
        assert (first, third) == (None, None)
        assert isinstance(second, EngineUnavailable)
        assert second.may_have_been_sent
        assert [envelope for _, envelope in await link.letters.until(b"3")] == [b"1", b"3"]
        await link.publish(name, b"4")
        assert not link.reading.done()


async def test_read_that_waits_ends_with_the_connection(
    own_jetstream: Callable[..., JetStreamServer], prefix: str
) -> None:
    server = own_jetstream()
    async with running(server.url, prefix, NEWS) as node:
        await append(node, "hello")
        server.pause()
        calls = [asyncio.create_task(call) for call in (read(node), position(node), append(node, "lost"))]
        await asyncio.sleep(0)
        server.kill()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in results] == [EngineUnavailable] * 3
        assert ["is lost" in str(each) for each in results] == [True] * 3


# A server that answers what none does.

OK = b'{"stream":"s","seq":1}'
FITS = {
    "subjects": ["app:keep.>"],
    "retention": "limits",
    "max_msgs_per_subject": -1,
    "max_age": 0,
    "republish": {"src": "app:keep.>", "dest": "app.>"},
    "allow_direct": True,
    "allow_msg_ttl": True,
}
INFO = json.dumps({"config": FITS, "state": {"last_seq": 1}, "ts": "2026-01-01T00:00:00Z"}).encode()
MESSAGE = b'{"message":{"seq":1,"time":"2026-01-01T00:00:00Z","data":"RQ=="}}'
NO_MESSAGE = b'{"error":{"code":404,"err_code":10037,"description":"no message found"}}'
NOT_NOW = b'{"error":{"code":503,"err_code":10008,"description":"temporarily unavailable"}}'
NO_STREAM = b'{"error":{"code":404,"err_code":10059,"description":"stream not found"}}'
TAKEN = b'{"error":{"code":400,"err_code":10058,"description":"name already in use"}}'
SECOND = b'{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 3"}}'
FAILS = b'{"error":{"code":500,"err_code":10000,"description":"no"}}'
ANSWERS: Mapping[str, bytes] = {
    "STREAM.INFO": INFO,
    "STREAM.CREATE": INFO,
    "STREAM.UPDATE": INFO,
    "STREAM.MSG.GET": MESSAGE,
    "keep.": OK,
}


@asynccontextmanager
async def answering(answers: Mapping[str, bytes | list[bytes]]) -> AsyncIterator[str]:
    """Run a server that answers by what the names of questions hold; of several answers the last for ever."""
    found = {**answers, **ANSWERS, **answers}  # what is asked for comes first
    left = {name: [each] if isinstance(each, bytes) else list(each) for name, each in found.items()}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"version":"2.15.1","max_payload":1048576,"headers":true}\r\n')
        while line := await reader.readline():
            words = line.decode().split()
            if words[0] == "PING":
                writer.write(b"PONG\r\n")
            elif words[0] in ("PUB", "HPUB"):
                await reader.readexactly(int(words[-1]) + 2)
                name = next((each for each in left if each in words[1]), "")
                if name:
                    answer = left[name].pop(0) if len(left[name]) > 1 else left[name][0]
                    writer.write(b"MSG %b inbox %d\r\n%b\r\n" % (words[2].encode(), len(answer), answer))
                elif words[1].startswith("$JS.API.DIRECT"):
                    writer.write(b"HMSG %b inbox 21 21\r\nNATS/1.0 404 none\r\n\r\n\r\n" % words[2].encode())

    async with serving(serve) as url:
        yield url


@pytest.mark.parametrize(
    ("answers", "kind", "what"),
    [
        ({"STREAM.INFO": NOT_NOW}, EngineUnavailable, "temporarily unavailable"),
        ({"STREAM.INFO": [NO_STREAM, FAILS], "STREAM.CREATE": TAKEN}, ConfigurationError, "error 10000"),
        ({"STREAM.INFO": NO_STREAM, "STREAM.CREATE": FAILS}, ConfigurationError, "in memory on 1 of its servers"),
        ({"STREAM.INFO": NO_STREAM}, EngineUnavailable, "can't be configured now"),
        ({"STREAM.MSG.GET": NO_MESSAGE, "keep.": SECOND}, EngineUnavailable, "don't agree on an epoch"),
        ({"STREAM.MSG.GET": NO_MESSAGE, "keep.": FAILS}, ConfigurationError, "error 10000"),
        ({"STREAM.MSG.GET": b"{}"}, ConfigurationError, "no message"),
        ({"STREAM.MSG.GET": b'{"message":{"seq":"x","time":""}}'}, ConfigurationError, "no message"),
        ({"STREAM.MSG.GET": b"<html>"}, ConfigurationError, "no message"),
        ({"STREAM.MSG.GET": b'{"error":{"code":"x","err_code":null}}'}, ConfigurationError, "JetStream says None"),
    ],
)
async def test_what_a_server_says_against_a_history_is_told(
    answers: dict[str, bytes | list[bytes]], kind: type[Exception], what: str
) -> None:
    async with answering(answers) as url:
        engine = NATSEngine(url, prefix="app")
        engine.keep(RULES)
        error = await failure(engine)
        assert type(error) in (kind, Refused)
        assert isinstance(error, kind)
        assert what in str(error)


@pytest.mark.parametrize(
    ("ack", "kind"),
    [
        (b"+OK", EngineError),
        (b'{"stream":"s","seq":0}', EngineError),
        (b'{"stream":"s","seq":"1"}', EngineError),
        (b'{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"}}', EngineError),
        (FAILS, Refused),
        (NOT_NOW, Refused),
    ],
)
async def test_what_a_server_says_against_a_message_is_told(ack: bytes, kind: type[Exception]) -> None:
    async with answering({"keep.channel": ack}) as url:
        engine = NATSEngine(url, prefix="app")
        engine.keep(RULES)
        async with used(engine) as link:
            (error,) = await link.link.publish([KeptParcel("app.channel.a", b"x", Keep(KEPT))])
            assert type(error) is kind
            assert not link.reading.done()


async def test_key_that_another_node_appends_just_now_is_tried_again() -> None:
    busy = b'{"error":{"code":409,"err_code":10158,"description":"duplicate message id is in process"}}'
    taken = b'{"stream":"s","seq":5,"duplicate":true}'
    async with answering({"keep.channel": [busy, busy, taken]}) as url:
        engine = NATSEngine(url, prefix="app")
        engine.keep(RULES)
        async with used(engine) as link:
            results = await link.link.publish([KeptParcel("app.channel.a", b"x", Keep(KEPT, "k"))])
            assert results == [Appended(Position("E", 5), is_repeat=True)]


# What it costs where nothing is kept.


async def test_without_histories_not_one_byte_is_sent_for_them() -> None:
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","max_payload":1048576,"headers":true}\r\n')
        while part := await reader.readuntil(b"PING\r\n"):
            received.extend(part)
            writer.write(b"PONG\r\n")

    async with serving(serve) as url, used(url, "app.channel.a", "app.node.x") as link:
        await link.link.publish([Parcel("app.channel.a", b"1"), Parcel("app.channel.b", b"22")])
        await link.link.unsubscribe(["app.channel.a"])
        sent = bytes(received)
        assert sent.startswith(b"CONNECT {")
        assert sent[sent.index(b"\r\n") + 2 :] == (
            b"PING\r\nPING\r\n"
            b"SUB app.channel.a 1\r\nSUB app.node.x 2\r\nPING\r\n"
            b"PUB app.channel.a 1\r\n1\r\nPUB app.channel.b 2\r\n22\r\nPING\r\n"
            b"UNSUB 1\r\nPING\r\n"
        )


async def test_engine_that_was_told_of_no_history_says_so(jetstream: JetStreamServer, prefix: str) -> None:
    engine = NATSEngine(jetstream.url, prefix=prefix)
    await engine.start(Recorder())
    try:
        with pytest.raises(EngineError, match="keep"):
            await engine.read(NEWS, None, KEPT)
        async with administering(jetstream, prefix) as admin:
            names = await admin.call("STREAM.NAMES")
            assert admin.stream not in (names["streams"] or [])
    finally:
        await engine.aclose()


logging.getLogger("nats").setLevel(logging.CRITICAL)
