"""Nodes that ask each other: who there is, who answers in time, and what becomes of what nobody should have sent."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import process_time
from typing import Any

import pytest

from tests.support.asgi import Peer, eventually
from wsbroadcast import Audience, ConnectionManager, LimitExceeded, NodeMessage, Presence
from wsbroadcast.audience import NODES
from wsbroadcast.manager import core_of
from wsbroadcast.node.siblings import (
    ANSWER_SECONDS,
    MAX_QUESTIONS,
    MAX_SIBLINGS,
    Answers,
    Reply,
    Siblings,
    this_process,
)
from wsbroadcast.publication import MAX_NODE_MESSAGE_BYTES
from wsbroadcast.testing import Cluster
from wsbroadcast.web.reports import ConnectionReport, Head, reader

NAMES = {"limit": 500, "after": "", "prefix": "", "largest": False}


def siblings(manager: ConnectionManager) -> Siblings:
    return core_of(manager).life.node.know_siblings()


async def ask(manager: ConnectionManager, topic: str = "node", arguments: Any = None) -> Answers[Any]:
    return await core_of(manager).ask_nodes(topic, arguments or {}, json.loads)


@asynccontextmanager
async def acquainted(count: int, **options: Any) -> AsyncIterator[Cluster]:
    """Nodes that know each other."""
    cluster = Cluster(count, **options)
    for manager in cluster:
        core_of(manager).know_siblings()
    async with cluster:
        await eventually(lambda: all(len(siblings(manager).others()) == count - 1 for manager in cluster))
        yield cluster


def seconds() -> float:
    return asyncio.get_running_loop().time()


async def test_newcomer_knows_all_at_once() -> None:
    async with acquainted(4):
        pass  # within the patience of `eventually`, which is shorter than the time between two greetings


async def test_every_node_answers_and_the_asker_is_first() -> None:
    async with acquainted(3) as cluster:
        began = seconds()
        answers = await ask(cluster[1])
        assert seconds() - began < ANSWER_SECONDS / 2  # nobody waits for more than those that are known
        assert [answers.known, len(answers.given), answers.silent, answers.is_linked] == [3, 3, [], True]
        assert answers.given[0].node == siblings(cluster[1]).me
        assert {each.node.id for each in answers.given} == {siblings(each).me.id for each in cluster}


async def test_node_that_is_stuck_counts_as_silent() -> None:
    async with acquainted(3) as cluster:
        stuck = siblings(cluster[2])
        stuck._respond = lambda topic, arguments: asyncio.sleep(60)  # type: ignore[assignment,return-value]
        began = seconds()
        answers = await ask(cluster[0])
        assert ANSWER_SECONDS * 0.9 < seconds() - began < ANSWER_SECONDS * 2
        assert (len(answers.given), answers.known, answers.silent) == (2, 3, [stuck.me])


async def test_node_that_was_killed_is_forgotten_after_15_seconds() -> None:
    async with acquainted(3) as cluster:
        dead = siblings(cluster[2]).me
        await cluster.kill(2)
        assert dead in siblings(cluster[0]).others()
        await cluster.advance(14)
        assert set(siblings(cluster[0]).others()) == {siblings(cluster[1]).me, dead}
        await cluster.advance(2)
        assert siblings(cluster[0]).others() == [siblings(cluster[1]).me]
        assert (await ask(cluster[0])).known == 2


async def test_nodes_that_keep_a_lease_are_known_as_long_as_it_holds() -> None:
    async with acquainted(3, presence=Presence()) as cluster:
        await cluster.advance(0.1)  # in which each gets its lease, and says so
        await eventually(lambda: all(siblings(each)._timer is None for each in cluster))
        await cluster.advance(60)
        assert (await ask(cluster[0])).known == 3
        await cluster.kill(2)
        await cluster.advance(5)
        assert (await ask(cluster[0])).known == 3
        await cluster.advance(6)
        assert (await ask(cluster[0])).known == 2


async def test_nodes_that_got_another_lease_are_known_by_that() -> None:
    async with acquainted(2, presence=Presence()) as cluster:
        await cluster.advance(0.1)
        cluster.hub.leases.clear()
        await cluster.advance(5)
        assert (await ask(cluster[0])).known == 2
        cluster.partition()
        await cluster.advance(20)
        cluster.heal()
        await cluster.advance(1)
        assert (await ask(cluster[0])).known == (await ask(cluster[1])).known == 2


async def test_node_that_ends_takes_leave() -> None:
    async with acquainted(2) as cluster:
        await cluster[1].aclose()
        await eventually(lambda: siblings(cluster[0]).others() == [])


async def test_outage_leaves_a_node_its_own_answer_at_once() -> None:
    async with acquainted(3) as cluster:
        cluster.partition(0)
        began = seconds()
        answers = await ask(cluster[0])
        assert seconds() - began < ANSWER_SECONDS / 2
        assert (len(answers.given), answers.known) == (1, 3)
        rest = await ask(cluster[1])  # which the others learn when the time is over
        assert (len(rest.given), rest.known) == (2, 3)


async def test_nodes_that_come_back_after_a_long_outage_know_each_other_at_once() -> None:
    async with acquainted(3) as cluster:
        cluster.partition()
        await cluster.advance(20)
        assert siblings(cluster[0]).others() == []
        cluster.heal()
        await eventually(lambda: all(len(siblings(each).others()) == 2 for each in cluster))


async def test_outage_counts_no_failed_publications(tmp_path: Any) -> None:
    async with ConnectionManager("redis://127.0.0.1:1/") as manager:
        answers = await ask(manager)
        assert (answers.known, len(answers.given)) == (1, 1)
        assert manager.stats().engine.publish_failures == 0


async def test_process_without_a_broker_answers_alone_and_says_so(manager: ConnectionManager) -> None:
    answers = await ask(manager)
    assert (len(answers.given), answers.known, answers.is_linked) == (1, 1, False)
    assert siblings(manager)._timer is None


async def test_nothing_is_kept_for_who_asks_nothing() -> None:
    async with Cluster(2) as cluster:
        assert all(core_of(each).life.node.siblings is None for each in cluster)
        assert all(NODES not in engine.wanted for engine in cluster.hub.engines)


async def test_who_takes_part_is_not_disturbed_by_who_does_not() -> None:
    cluster = Cluster(2)
    core_of(cluster[0]).know_siblings()
    async with cluster:
        assert (await ask(cluster[0])).known == 1


async def test_channels_of_all_nodes_are_cut_where_an_answer_is_full() -> None:
    async with acquainted(2) as cluster:
        for number in range(100):
            channels = {f"{'ü' * 90}{number:02}{each:03}" for each in range(100)}
            await cluster[1].connect(Peer().websocket, channels=channels)
        answers = await ask(cluster[0], "channels", {**NAMES, "largest": True})
        theirs = answers.given[1].content
        assert theirs["is_cut"]
        assert theirs["head"]["total"] == 10_000
        assert 100 < len(theirs["items"]) < 5000


async def test_storm_of_the_same_question_is_one_question() -> None:
    async with acquainted(3) as cluster:
        sent: list[str] = []
        send = cluster.hub.send

        def count(publication: Any) -> None:
            sent.append(getattr(publication, "kind", ""))
            send(publication)

        cluster.hub.send = count  # type: ignore[method-assign]
        all_answers = await asyncio.gather(*(ask(cluster[0]) for _ in range(500)))
        assert {len(each.given) for each in all_answers} == {3}
        assert sent.count("question") == 1
        assert sent.count("answer") == 2


async def test_storm_of_different_questions_is_bounded() -> None:
    async with acquainted(2) as cluster:
        some = [ask(cluster[0], "channels", {**NAMES, "prefix": str(number)}) for number in range(500)]
        found = await asyncio.gather(*some, return_exceptions=True)
        refused = [each for each in found if isinstance(each, LimitExceeded)]
        assert len(refused) == 500 - MAX_QUESTIONS
        assert {len(each.given) for each in found if isinstance(each, Answers)} == {2}
        assert (await ask(cluster[0])).known == 2


async def test_question_of_one_who_gives_up_is_answered_to_the_others() -> None:
    async with acquainted(2) as cluster:
        first = asyncio.ensure_future(ask(cluster[0]))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(ask(cluster[0]))
        await asyncio.sleep(0)
        first.cancel()
        assert len((await second).given) == 2


async def test_question_that_nobody_understands_is_an_error_for_the_asker(caplog: pytest.LogCaptureFixture) -> None:
    async with acquainted(2) as cluster:
        with pytest.raises(ValueError, match="no topic"):
            await ask(cluster[0], "weather")
        await eventually(lambda: "not understood" in caplog.text)


# What is forged.


def message(kind: Any, sender: str = "forger", id_: str = "", body: Any = b"", to: Audience = NODES) -> NodeMessage:
    return NodeMessage(to, kind, sender, id_, body if isinstance(body, bytes) else json.dumps(body).encode())


GARBAGE = [
    b"",
    b"\xff",
    b"[" * 100_000,
    b"{}",
    b"[]",
    b"null",
    {"host": 1, "pid": "x", "family": None},
    {"host": "h" * 1000, "pid": 1, "family": ""},
    {"topic": "node"},
    {"topic": 7, "arguments": {}},
    {"topic": "node", "arguments": []},
    {"topic": "connections", "arguments": {"limit": 10**9}},
    {"topic": "connections", "arguments": {"limit": -1, "after": "", "channel": None, "user": None, "slow": False}},
    {"topic": "channels", "arguments": {"limit": 1, "after": 5, "prefix": "", "largest": False}},
    {"topic": "drain", "arguments": {"family": "x", "over": -1}},
    {"topic": "drain", "arguments": {"family": ["x"], "over": 1}},
]


@pytest.mark.parametrize("kind", ["hello", "bye", "question", "answer"])
async def test_garbage_of_nodes_harms_nobody(kind: str) -> None:
    async with acquainted(2) as cluster:
        for body in GARBAGE:
            node = core_of(cluster[0]).life.node
            node.take(message(kind, id_="q", body=body))
            node.take(message(kind, sender=siblings(cluster[1]).me.id + "x", id_="q", body=body))
        answers = await ask(cluster[0])
        assert (len(answers.given), answers.known) == (2, 2)
        assert not cluster[0].is_draining


async def test_answer_that_cannot_be_read_shows_nobody_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with acquainted(2) as cluster:

        async def respond(topic: str, arguments: Any) -> Reply:  # of a release with other fields
            return Reply({"total": 1, "has_more": False}, [{"id": "x", "user": "alice", "channels": ["secret\nline"]}])

        siblings(cluster[1])._respond = respond
        arguments = {"limit": 1, "after": "", "channel": None, "user": None, "slow": False}
        answers = await core_of(cluster[0]).ask_nodes("connections", arguments, reader(Head, ConnectionReport))
        assert answers.silent == [siblings(cluster[1]).me]
    [record] = [record for record in caplog.records if getattr(record, "event", "") == "nodes.bad_message"]
    text = record.getMessage()
    assert "missing at ('items', 0, 'channel_count'), and 5 more" in text
    assert not any(word in text for word in ("alice", "secret", "\n"))


async def test_answers_of_strangers_and_second_answers_are_dropped() -> None:
    async with acquainted(2) as cluster:
        node, mine, theirs = core_of(cluster[0]).life.node, siblings(cluster[0]), siblings(cluster[1])
        may_answer, respond = asyncio.Event(), theirs._respond

        async def respond_later(topic: str, arguments: Any) -> Any:
            await may_answer.wait()
            return await respond(topic, arguments)

        theirs._respond = respond_later
        asking = asyncio.ensure_future(ask(cluster[0]))
        await eventually(lambda: mine._asking)
        (id_,) = mine._asking
        node.take(message("answer", "stranger", id_, {"head": "forged"}))
        node.take(message("answer", mine.me.id, id_, {"head": "forged"}))
        node.take(message("answer", theirs.me.id, "another", {"head": "forged"}))
        may_answer.set()
        answers = await asking
        assert len(answers.given) == 2
        assert "forged" not in str(answers)


async def test_forged_nodes_are_bounded() -> None:
    async with acquainted(2) as cluster:
        node = core_of(cluster[0]).life.node
        for number in range(3 * MAX_SIBLINGS):
            node.take(
                message("hello", f"n{number}", body={"host": "h", "pid": 1, "family": ""}, to=Audience("nodes", "x"))
            )
        assert len(siblings(cluster[0]).others()) == MAX_SIBLINGS
        await cluster.advance(4)  # the true ones say hello before the forged ones are forgotten
        await cluster.advance(13)
        assert siblings(cluster[0]).others() == [siblings(cluster[1]).me]


async def test_flood_of_forged_nodes_costs_little_for_each() -> None:
    async with acquainted(2) as cluster:
        node, many = core_of(cluster[0]).life.node, 30 * MAX_SIBLINGS
        hellos = [message("hello", f"n{number}", body={"host": "h", "pid": 1, "family": ""}) for number in range(many)]
        began = process_time()
        for hello in hellos:
            node.take(hello)
        assert process_time() - began < 1.5  # a look at all that are known would take three times as long
        assert len(siblings(cluster[0]).others()) == MAX_SIBLINGS


async def test_flood_of_questions_runs_few_at_a_time() -> None:
    async with acquainted(2) as cluster:
        mine = siblings(cluster[0])
        body = {"topic": "node", "arguments": {}}
        for number in range(5000):
            mine.take(message("question", siblings(cluster[1]).me.id, f"q{number}", body))
        assert mine._answering == MAX_QUESTIONS
        await eventually(lambda: mine._answering == 0)


@pytest.mark.parametrize("links_nodes", [True, False])
async def test_process_that_was_forked_off_is_another_node(links_nodes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    managers = [Cluster(1)[0]] if links_nodes else [ConnectionManager()]
    before = siblings(managers[0]).me
    monkeypatch.setattr(os, "getpid", lambda: before.pid + 1)  # as in a worker of `gunicorn --preload`
    async with managers[0]:
        own = (await ask(managers[0])).given[0].node
    assert own.pid == before.pid + 1
    assert own.id != before.id


async def test_node_of_a_process_of_its_own_has_no_family() -> None:
    one, other = this_process(), this_process()
    assert one.id != other.id
    assert one.family != other.family or one.family != one.id


def test_largest_answer_fits_into_an_envelope() -> None:
    assert MAX_NODE_MESSAGE_BYTES == 256 * 1024
