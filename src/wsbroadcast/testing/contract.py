"""The contract of engines, as tests. The docstrings of the tests together define what an engine must do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import pytest

from wsbroadcast.audience import EVERYONE, NODES, Audience
from wsbroadcast.exceptions import EngineUnavailable, LifecycleError, MessageTooLarge, WSBroadcastError
from wsbroadcast.message import Message
from wsbroadcast.publication import Control, Dismissal, Forgetting, NodeMessage, Publication, Sender, Unsubscription
from wsbroadcast.stats import EngineStats
from wsbroadcast.testing.nodes import MESSAGES, NAMES, NEWS, SPORT, Nodes, Recorder, use


@pytest.mark.asyncio
class EngineContract(Nodes):
    """What every engine must do, with one node or with many.

    Subclass it, override `make_engine`, and give the subclass a name that begins with `Test`.
    """

    # Content.

    async def test_publication_arrives_as_it_was(self) -> None:
        """Text, bytes and JSON arrive with the same payload, kind and key, with any characters and bytes in them."""
        published = [Publication(message, NEWS) for message in MESSAGES]
        await self._check_same(published)

    async def test_publication_keeps_audience_and_exclusions(self) -> None:
        """Audiences, exclusions arrive unchanged; for a broadcast to several audiences, all of these and its id."""
        message = Message.of("hello")
        some, many = frozenset({"a", "b\n"}), frozenset(f"connection {number}" for number in range(1000))
        kinds = [EVERYONE, NEWS, Audience("user", "news")]
        published = [Publication(message, kind, exclude) for kind in kinds for exclude in (frozenset(), some, many)]
        both = Publication(message, NEWS, some, exclude_users=some, id="xyz", audiences=(EVERYONE, NEWS))
        both.sender = Sender("kX2", "5", b'{"name":"\xc3\xa4"}', b"1")
        await self._check_same([*published, Publication(message, NEWS, exclude_users=many), both])

    async def test_dismissal_arrives_as_it_was(self) -> None:
        """A dismissal keeps its code, its reason and who stays; an unsubscription keeps its channels."""
        kinds = [EVERYONE, NEWS, Audience("user", "news")]
        published = [Dismissal(kind, 1008, "reäson", frozenset({"a", "b\n"})) for kind in kinds]
        left = [Unsubscription(kind, ("news", "späße")) for kind in kinds]
        forgotten = [Forgetting(kind) for kind in kinds]
        await self._check_same([*published, Dismissal(NEWS, 4999), *left, *forgotten])

    async def test_nodes_hear_each_other(self) -> None:
        """Messages between nodes arrive unchanged: at all nodes that want them, or at the one node they are for."""
        one = Audience("nodes", "kX2-_")
        hello, bye = NodeMessage(NODES, "hello", "a", body=b'{"host":"h\xc3\xb6st"}'), NodeMessage(NODES, "bye", "a")
        question = NodeMessage(NODES, "question", "a", "q1", b'{"topic":"node"}')
        answers = [NodeMessage(one, "answer", "b", "q1", b"[" + b"1," * size + b"1]") for size in (1, 100_000)]
        await self._check_same([hello, question, *answers, NodeMessage(one, "hello", "b"), bye])

    async def _check_same(self, published: Sequence[Publication | Control]) -> None:
        audiences = list(dict.fromkeys(each.audience for each in published))
        async with self.nodes(*audiences) as nodes:
            for publication in published:
                await nodes[0].engine.publish(publication)
            for _, recorder, seconds in nodes:
                await recorder.wait_until(lambda: len(recorder.received) >= len(published), seconds)  # noqa: B023
                for audience in audiences:
                    came = [each for each in recorder.received if each.audience == audience]
                    assert came == [each for each in published if each.audience == audience]

    async def test_large_message_arrives_or_is_refused(self) -> None:
        """A message of 1 MiB arrives, or `MessageTooLarge` names a limit, and a message of that size arrives."""
        data = bytes(range(256)) * 4096
        async with self.nodes(NEWS) as nodes:
            try:
                await nodes[0].publish(data)
            except MessageTooLarge as error:
                data = data[: error.limit]
                await nodes[0].publish(data)
            await nodes[0].publish("after")
            for node in nodes:
                await node.receives([data, "after"])

    async def test_message_reaches_its_audience_and_no_other(self) -> None:
        """Names mean nothing to a broker: a message to one of many odd names reaches exactly that audience."""
        audiences = [EVERYONE, *(Audience(kind, name) for name in NAMES for kind in ("channel", "user"))]
        async with self.nodes(*audiences) as nodes:
            for word in ("first", "last"):
                for audience in audiences:
                    await nodes[0].publish(f"{word} {audience}", audience)
            for node in nodes:
                for audience in audiences:
                    await node.receives([f"first {audience}", f"last {audience}"], audience)

    async def test_every_message_arrives_once(self) -> None:
        """What a node publishes arrives once at every node, itself included. At the end every counter is zero."""
        async with self.nodes(NEWS) as nodes:
            sent = [f"{number} of {index}" for index in range(len(nodes)) for number in range(20)]
            for index, text in enumerate(sent):
                await nodes[index // 20].publish(text)
                await nodes[index // 20].publish(text, SPORT)  # nobody has joined this one
            for node in nodes:
                node.publish_nowait("last")
            for node in nodes:
                await node.receives(sent + ["last"] * len(nodes))
                assert node.engine.stats() == EngineStats()

    # Order.

    async def test_messages_arrive_in_the_order_of_publish(self) -> None:
        """Messages of one publisher arrive in the order in which it published them."""
        sent = [str(number) for number in range(200)]
        async with self.nodes(NEWS) as nodes:
            for text in sent:
                await nodes[0].publish(text)
            for node in nodes:
                await node.receives(sent)

    async def test_publish_and_publish_nowait_keep_their_order(self) -> None:
        """`publish_nowait` and `publish` share one order."""
        sent = [str(number) for number in range(200)]
        async with self.nodes(NEWS) as nodes:
            for number, text in enumerate(sent):
                if number % 5:
                    nodes[0].publish_nowait(text)
                else:
                    await nodes[0].publish(text)
            for node in nodes:
                await node.receives(sent)

    async def test_publishers_at_the_same_time_have_one_order(self) -> None:
        """Everything that is published at the same time, on any node, arrives, in the same order on all nodes."""
        async with self.nodes(NEWS) as nodes:
            sent = [[f"{number} of {task}" for number in range(40)] for task in range(4 * len(nodes))]

            async def publish(task: int) -> None:
                for text in sent[task]:
                    await nodes[task % len(nodes)].publish(text)

            await asyncio.gather(*(publish(task) for task in range(len(sent))))
            count = sum(map(len, sent))
            for _, recorder, seconds in nodes:
                await recorder.wait_until(lambda: len(recorder.data(NEWS)) >= count, seconds)  # noqa: B023
                order = [str(text) for text in recorder.data(NEWS)]
                assert [[text for text in order if text.endswith(f" of {task}")] for task in range(len(sent))] == sent
            self.check_one_order(nodes)

    async def test_cancelled_publish_disturbs_nobody(self) -> None:
        """If a `publish` is cancelled, its message arrives once or not at all, and later messages arrive."""
        async with self.nodes(NEWS) as nodes:
            for number in range(40):
                task = asyncio.create_task(nodes[0].publish(f"cancelled {number}"))
                for _ in range(number % 4):
                    await asyncio.sleep(0)
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await nodes[0].publish("last")
            for _, recorder, seconds in nodes:
                assert await recorder.wait_until(lambda: "last" in recorder.data(NEWS), seconds)  # noqa: B023
                came = [int(str(text).split()[1]) for text in recorder.data(NEWS)[:-1]]
                assert came == sorted(set(came))

    # Subscriptions.

    async def test_confirmed_subscription_misses_nothing(self) -> None:
        """What any node publishes after `confirmed` has returned arrives: 300 times, each time with a new name."""
        async with self.nodes() as nodes:
            audiences = [Audience("channel", f"news {number}") for number in range(300)]
            for number, audience in enumerate(audiences):
                await nodes[number % len(nodes)].join(audience)
                await nodes[(number + 1) % len(nodes)].publish("hello", audience)
            for number, audience in enumerate(audiences):
                await nodes[number % len(nodes)].receives(["hello"], audience)

    async def test_thousands_of_audiences_are_confirmed_at_once(self) -> None:
        """Any number of audiences can be wanted in one call, and confirmed in one call."""
        async with self.nodes() as nodes:
            audiences = [Audience("user", str(number)) for number in range(2500)]
            await nodes[-1].join(*audiences)
            for audience in audiences[::250]:
                await nodes[0].publish("hello", audience)
            for audience in audiences[::250]:
                await nodes[-1].receives(["hello"], audience)

    async def test_last_word_counts_where_subscriptions_flap(self) -> None:
        """An audience may be wanted and unwanted many times: if it is wanted last, each message arrives once."""
        async with self.nodes(SPORT) as nodes:
            first, last = nodes[0], nodes[-1]
            for number in range(200):
                last.engine.subscribe([NEWS])
                if number % 10 == 0:
                    await last.engine.confirmed([NEWS])
                    await first.publish(f"{number}")
                    await last.receives([f"{n}" for n in range(0, number + 1, 10)])
                elif number % 3 == 0:
                    await asyncio.sleep(0)
                last.engine.unsubscribe(audience for audience in [NEWS])
            last.engine.unsubscribe([NEWS, Audience("user", "never seen")])
            await last.join(NEWS)
            sent = [f"{n}" for n in range(0, 200, 10)]
            end = asyncio.get_running_loop().time() + self.flapping_seconds
            is_over = False
            while not is_over:
                is_over = asyncio.get_running_loop().time() >= end
                for _ in range(2):  # lets everything run that is due by now, even if this process was blocked
                    await asyncio.sleep(0)
                sent.append(f"{len(sent)} in the end")
                await first.publish(sent[-1])
                await last.receives(sent)
            await first.publish("sport", SPORT)
            await last.receives(["sport"], SPORT)

    async def test_confirmed_ends_when_the_audience_is_no_longer_wanted(self) -> None:
        """`confirmed` doesn't wait for an audience that is no longer wanted, and returns at once without audiences."""
        async with self.nodes() as nodes:
            engine = nodes[-1].engine
            engine.subscribe([NEWS])
            confirmed = asyncio.ensure_future(engine.confirmed([NEWS]))
            await asyncio.sleep(0)
            engine.unsubscribe([NEWS])
            async with asyncio.timeout(self.seconds):
                await confirmed
                await engine.confirmed([])
                await engine.confirmed([SPORT])

    # Receivers.

    async def test_receiver_that_fails_holds_up_nobody(self) -> None:
        """If the receiver fails for a message, only that one is lost: later ones and other audiences are delivered."""
        async with self.nodes(NEWS, SPORT) as nodes:
            recorder = nodes[-1].recorder
            recorder.failing.add(NEWS)
            with suppress(RuntimeError):  # an engine without a broker may hand it to the publisher
                await nodes[0].publish("lost")
            await nodes[0].publish("sport", SPORT)
            await nodes[-1].receives(["sport"], SPORT)
            assert await recorder.wait_until(lambda: recorder.failures == 1, self.seconds)
            recorder.failing.clear()
            await nodes[0].publish("news")
            await nodes[-1].receives(["news"])

    async def test_receiver_that_waits_holds_up_its_own_audience_only(self) -> None:
        """While the receiver takes for ever for one audience, others go on, health is good, and `aclose` ends."""
        async with self.nodes(NEWS, SPORT) as nodes:
            recorder = nodes[-1].recorder
            recorder.stalled.add(NEWS)
            # Without a broker in between, the publisher waits as well.
            stalled = [asyncio.create_task(nodes[0].publish(f"{number}")) for number in range(100)]
            assert await recorder.wait_until(lambda: recorder.waiting, self.seconds)
            for number in range(100):
                await nodes[0].publish(f"{number}", SPORT)
            for node in nodes:
                await node.receives([f"{number}" for number in range(100)], SPORT)
                assert (await node.engine.health()).is_ok
            assert recorder.data(NEWS) == []
            for task in stalled:
                task.cancel()
            await asyncio.wait(stalled)

    # Start and end.

    async def test_engine_is_made_where_no_event_loop_runs(self) -> None:
        """Making an engine does no I/O and needs no event loop. It may be made in any thread."""
        engine = await asyncio.to_thread(self.make_engine)
        await use(engine, Recorder(), self.seconds)

    async def test_publishing_needs_a_running_engine(self) -> None:
        """Before `start` and after `aclose`, publishing raises `EngineUnavailable`, and health is not good."""
        engine = self.make_engine()
        for _ in range(2):
            with pytest.raises(EngineUnavailable):
                await engine.publish(Publication(Message.of("nobody hears"), NEWS))
            with pytest.raises(EngineUnavailable):
                engine.publish_nowait(Publication(Message.of("nobody hears"), NEWS))
            health = await engine.health()
            assert (health.engine, health.is_ok) == (engine.name, False)
            assert health.detail
            await engine.aclose()
            await use(engine, Recorder(), self.seconds)

    async def test_health_is_good_while_it_runs(self) -> None:
        """Health is good, has the engine's name, on every node, each time it is asked."""
        async with self.nodes() as nodes:
            for node in nodes * 2:
                health = await node.engine.health()
                assert (health.engine, health.is_ok, health.detail) == (node.engine.name, True, "")
                assert node.recorder.publications == []

    async def test_cancelled_health_leaves_no_trace(self) -> None:
        """A cancelled `health` changes nothing: its answer may come when nobody waits for it any more."""
        async with self.nodes() as nodes:
            for number in range(40):
                asking = asyncio.ensure_future(nodes[0].engine.health())
                for _ in range(number % 20):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking])
            for node in nodes:
                assert (await node.engine.health()).is_ok
                assert node.engine.stats() == EngineStats()

    async def test_nothing_arrives_after_aclose(self) -> None:
        """After `aclose` has returned, nothing is received. What was published before still reaches other nodes."""
        async with self.nodes(NEWS) as nodes:
            last, others = nodes[-1], nodes[:-1]
            for number in range(100):
                last.publish_nowait(f"{number}")
            await last.engine.aclose()
            received = list(last.recorder.publications)
            for node in others:
                await node.receives([f"{number}" for number in range(100)])
            for node in others:
                await node.publish("later")
            await use(last.engine, Recorder(), self.seconds)
            assert last.recorder.publications == received
            for node in others:
                await node.receives([*(f"{n}" for n in range(100)), *["later"] * len(others), "hello"])

    async def test_aclose_can_be_called_again_and_again(self) -> None:
        """`aclose` is idempotent: before `start`, when called twice, and when called twice at the same time."""
        engine = self.make_engine()
        await engine.aclose()
        await engine.start(Recorder())
        await asyncio.gather(engine.aclose(), engine.aclose())
        await engine.aclose()

    async def test_aclose_ends_a_start_that_runs(self) -> None:
        """If an engine is stopped while it starts, both calls end, and it can be started again."""
        engine = self.make_engine()
        for turns in range(20):
            starting = asyncio.ensure_future(engine.start(Recorder()))
            for _ in range(turns):
                await asyncio.sleep(0)
            async with asyncio.timeout(self.seconds):
                await engine.aclose()
                with suppress(WSBroadcastError):
                    await starting
                await engine.aclose()
        await use(engine, Recorder(), self.seconds)

    async def test_engine_serves_one_node_at_a_time(self) -> None:
        """While an engine runs, another `start` is a `LifecycleError`, and the first receiver still gets everything."""
        async with self.nodes(NEWS) as nodes:
            for node in nodes:
                with pytest.raises(LifecycleError):
                    await node.engine.start(Recorder())
            await nodes[0].publish("hello")
            for node in nodes:
                await node.receives(["hello"])

    async def test_engine_can_be_started_again_when_its_event_loop_has_ended(self) -> None:
        """If an event loop ends without `aclose`, the engine can be started in another one."""
        engine, last = self.make_engine(), Recorder()
        await asyncio.to_thread(asyncio.run, engine.start(Recorder()))
        await use(engine, last, self.seconds)
        assert last.data(NEWS) == ["hello"]

    async def test_engine_can_be_started_again(self) -> None:
        """After `aclose` it can be started with a new receiver, in another event loop too. The old one gets nothing."""
        engine = self.make_engine()
        recorders = [Recorder() for _ in range(4)]
        for index, recorder in enumerate(recorders):
            if index % 2:
                await asyncio.to_thread(asyncio.run, use(engine, recorder, self.seconds))
            else:
                await use(engine, recorder, self.seconds)
        assert [recorder.data(NEWS) for recorder in recorders] == [["hello"]] * len(recorders)
