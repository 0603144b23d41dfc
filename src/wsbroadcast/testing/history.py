"""The contract of engines that keep what is published, as tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import ClassVar

import pytest

from wsbroadcast.audience import EVERYONE, Audience
from wsbroadcast.engines.contract import keeps_history
from wsbroadcast.exceptions import EngineUnavailable
from wsbroadcast.history import USERS, Appended, History, HistoryRules, Replay
from wsbroadcast.message import Message
from wsbroadcast.publication import Position, Publication, Sender
from wsbroadcast.testing.nodes import MESSAGES, NAMES, NEWS, SPORT, Node, Nodes

KEPT = History(messages=20, seconds=60)
"""How much the tests keep, if they don't say otherwise."""

RULES = HistoryRules({"*": KEPT, USERS: KEPT, EVERYONE: KEPT})
"""The rules of the nodes in the tests."""


@pytest.mark.asyncio
class HistoryContract(Nodes):
    """What an engine with the ability `KeepsHistory` must do, with one node or with many.

    Subclass it beside `EngineContract`, override `make_engine`, and give the subclass a name that begins with `Test`.
    """

    is_dense: ClassVar[bool] = True
    """Whether offsets count the publications of one audience: 1, 2, 3. Those of JetStream have jumps."""
    keeps_large: ClassVar[bool] = False
    """Whether `max_kept_bytes` has no effect, because the broker can't number a message without keeping it."""

    @asynccontextmanager
    async def keeping(self, *audiences: Audience) -> AsyncIterator[list[Node]]:
        """Run nodes that keep everything and have joined these audiences."""
        async with self.nodes(*audiences, rules=RULES) as nodes:
            yield nodes

    # Positions.

    async def test_positions_are_an_unbroken_chain(self) -> None:
        """Each publication arrives at every node with its position and the offset before it. No offset comes twice."""
        async with self.keeping(NEWS) as nodes:
            before = await position(nodes[0], NEWS)
            appended = [await append(nodes[n % len(nodes)], str(n)) for n in range(50)]
            positions = [each.position for each in appended]
            assert not any(each.is_repeat for each in appended)
            for node in nodes:
                came = await self._kept(node, NEWS, 50)
                assert [each.position for each in came] == positions
                assert [each.previous for each in came] == [before.offset, *(each.offset for each in positions[:-1])]
                assert await position(node, NEWS) == positions[-1]
            if self.is_dense:
                assert [each.offset for each in positions] == list(range(1, 51))

    async def test_who_joins_late_sees_what_is_before_the_first_message(self) -> None:
        """The offset before a publication is that of its audience, even if a node hasn't got what came before."""
        async with self.keeping() as nodes:
            unseen = [(await append(node, "unseen")).position for node in nodes * 2]
            for node in nodes:
                await node.join(NEWS)
            seen = (await append(nodes[0], "seen")).position
            for node in nodes:
                recorder = node.recorder
                assert await recorder.wait_until(lambda: "seen" in recorder.data(NEWS), self.seconds)  # noqa: B023
                came = recorder.publications[-1]
                assert (came.position, came.previous) == (seen, unseen[-1].offset)

    async def test_appends_at_the_same_time_are_an_unbroken_chain(self) -> None:
        """If all nodes append to two audiences at the same time, each node gets everything, in one order."""
        async with self.keeping(NEWS, SPORT) as nodes:
            tasks = [
                append(nodes[n % len(nodes)], f"{n} {audience.name}", audience)
                for n in range(64)
                for audience in (NEWS, SPORT)
            ]
            appended = await asyncio.gather(*tasks)
            for number, audience in enumerate((NEWS, SPORT)):
                offsets = sorted(each.position.offset for each in appended[number::2])
                assert len(set(offsets)) == 64
                texts = {each.position.offset: f"{n} {audience.name}" for n, each in enumerate(appended[number::2])}
                for node in nodes:
                    came = await self._kept(node, audience, 64)
                    assert [each.offset for each in came] == offsets
                    assert [each.previous for each in came[1:]] == offsets[:-1]
                    assert [each.message.data for each in came] == [texts[offset] for offset in offsets]

    async def test_appends_of_one_turn_keep_their_order(self) -> None:
        """Appends of one publisher, awaited or not, are kept and sent in the order of the calls."""
        async with self.keeping(NEWS) as nodes:
            tasks = []
            for number in range(60):
                if number % 3:
                    tasks.append(asyncio.ensure_future(append(nodes[0], str(number))))
                else:
                    await asyncio.sleep(0)  # so that the earlier calls have begun
                    keeps_history(nodes[0].engine).append_nowait(_publication(str(number)), KEPT)
            await asyncio.gather(*tasks)
            for node in nodes:
                came = await self._kept(node, NEWS, 60)
                assert [each.message.data for each in came] == [str(number) for number in range(60)]

    async def test_what_arrives_is_kept(self) -> None:
        """What arrives can be read at once. A cancelled `append` is both kept and sent, or neither."""
        async with self.keeping(NEWS) as nodes:
            at = await position(nodes[0], NEWS)
            for number in range(18):
                task = asyncio.create_task(append(nodes[0], f"cancelled {number}"))
                for _ in range(number % 6):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            last = (await append(nodes[0], "last")).position
            for node in nodes:
                replay = await read(node, at)
                assert replay.is_complete(at)
                assert replay.top == last
                assert await self._kept(node, NEWS, len(replay.publications)) == list(replay.publications)
            for number in range(20):
                recorder = nodes[number % len(nodes)].recorder
                count = len(recorder.publications)
                appending = asyncio.create_task(append(nodes[0], f"{number}"))
                assert await recorder.wait_until(lambda: len(recorder.publications) > count, self.seconds)  # noqa: B023
                came = recorder.publications[-1]
                assert came in (await read(nodes[number % len(nodes)], None)).publications
                await appending

    async def test_audience_without_publications_has_a_position(self) -> None:
        """It is the same on all nodes, has an epoch and the offset 0, and a reader from there has missed nothing."""
        async with self.keeping() as nodes:
            audiences = [EVERYONE, NEWS, Audience("user", "news")]
            found = [
                await keeps_history(node.engine).positions(audiences, [KEPT] * 3) for node in nodes for _ in range(2)
            ]
            assert all(each == found[0] for each in found)
            assert all(each.epoch and each.offset == 0 for each in found[0])
            for audience, at in zip(audiences, found[0], strict=True):
                replay = await read(nodes[-1], at, audience)
                assert (replay.top, list(replay.publications), replay.is_complete(at)) == (at, [], True)

    async def test_many_positions_are_read_at_once(self) -> None:
        """Positions of any number of audiences can be read at once, and come in their order."""
        async with self.keeping() as nodes:
            audiences = [Audience("channel", f"news {number}") for number in range(1500)]
            for audience in audiences[::500]:
                await append(nodes[0], "hello", audience)
            found = await keeps_history(nodes[-1].engine).positions(audiences, [KEPT] * len(audiences))
            assert [number for number, each in enumerate(found) if each.offset] == [0, 500, 1000]
            assert await keeps_history(nodes[0].engine).positions([], []) == []

    # Keeping.

    async def test_publication_is_kept_as_it_was(self) -> None:
        """Text, bytes and JSON are replayed unchanged, with key, id, audiences, excluded users and sender."""
        some = frozenset({"5", "ä\n"})
        published = [Publication(message, NEWS) for message in MESSAGES]
        published += [Publication(MESSAGES[0], NEWS, exclude_users=some, id="xyz", audiences=(EVERYONE, NEWS))]
        published[-1].sender = Sender("kX2", "5", b'{"name":"\xc3\xa4"}')
        async with self.keeping(NEWS) as nodes:
            at = await position(nodes[0], NEWS)
            for publication in published:
                await keeps_history(nodes[0].engine).append(publication, KEPT)
            for node in nodes:
                came = await self._kept(node, NEWS, len(published))
                replay = await read(node, at)
                assert [_content(each) for each in replay.publications] == [_content(each) for each in published]
                assert list(replay.publications) == came

    async def test_names_are_kept_apart(self) -> None:
        """Names mean nothing to a broker: each odd name has a history of its own, as a channel and as a user."""
        audiences = [EVERYONE, *(Audience(kind, name) for name in NAMES for kind in ("channel", "user"))]
        async with self.keeping() as nodes:
            for audience in audiences:
                await append(nodes[0], f"to {audience}", audience)
            for audience in audiences:
                replay = await read(nodes[-1], None, audience)
                assert [each.message.data for each in replay.publications] == [f"to {audience}"]

    async def test_replay_is_complete_where_it_can_be(self) -> None:
        """With 20 kept: from the top there is nothing, from 20 back all 20 in order, from 21 back it isn't complete."""
        async with self.keeping() as nodes:
            positions = [(await append(nodes[0], str(number))).position for number in range(50)]
            for back in (0, 1, 7, 19, 20):
                since = positions[49 - back]
                for node in nodes:
                    replay = await read(node, since)
                    assert replay.is_complete(since)
                    assert replay.top == positions[-1]
                    after = [each for each in replay.publications if each.offset > since.offset]
                    assert [each.message.data for each in after] == [str(number) for number in range(50 - back, 50)]
                    assert [each.position for each in after] == positions[50 - back :]
            for since in (positions[28], positions[0]):
                replay = await read(nodes[-1], since)
                assert not replay.is_complete(since)
            newest = await read(nodes[-1], None)
            assert [each.message.data for each in newest.publications] == [str(number) for number in range(30, 50)]
            assert newest.is_complete(positions[29])
            assert not newest.is_complete(positions[28])

    async def test_newest_few_are_read(self) -> None:
        """A read for a smaller history returns its newest messages, and from where on they are complete."""
        async with self.keeping() as nodes:
            positions = [(await append(nodes[0], str(number))).position for number in range(10)]
            few = History(messages=3)
            replay = await keeps_history(nodes[-1].engine).read(NEWS, None, few)
            assert [each.message.data for each in replay.publications] == ["7", "8", "9"]
            assert replay.is_complete(positions[6])
            assert not replay.is_complete(positions[5])

    async def test_position_that_is_none_is_not_complete(self) -> None:
        """A wrong epoch, an offset that never was, or a position of another audience isn't complete, and no error."""
        async with self.keeping() as nodes:
            for number in range(10):
                at = (await append(nodes[0], str(number))).position
                other = (await append(nodes[0], str(number), SPORT)).position
            offsets = (0, 1, -1, at.offset, at.offset + 1, 10**9, 2**63 - 1, 2**63, 2**64, 10**30)
            nonsense = [Position(epoch, offset) for epoch in ("", "other", "x" * 1_000_000) for offset in offsets]
            nonsense += [Position(at.epoch, offset) for offset in offsets if not 0 <= offset <= at.offset]
            if other.epoch == at.epoch:
                nonsense.append(other)
            else:
                nonsense.append(Position(other.epoch, at.offset))
            for since in nonsense:
                replay = await read(nodes[-1], since)
                assert replay.top == at
                assert not replay.is_complete(since), since
                if since.epoch != at.epoch:
                    assert [each.message.data for each in replay.publications] == [str(number) for number in range(10)]

    async def test_old_publications_are_not_replayed(self) -> None:
        """Nothing older than `seconds` is replayed. Only a reader that has missed such a message is told so."""
        async with self.keeping() as nodes:
            old = [(await append(nodes[0], str(number))).position for number in range(3)]
            await asyncio.sleep(0.1)
            between = monotonic()
            await asyncio.sleep(0.1)
            young = (await append(nodes[0], "young")).position
            for node in nodes:
                replay = await self._read_younger(node, old[2], between)
                assert replay.is_complete(old[2])
                assert [each.message.data for each in replay.publications if each.offset > old[2].offset] == ["young"]
                replay = await self._read_younger(node, old[1], between)
                assert not replay.is_complete(old[1])
                assert [each.message.data for each in replay.publications] == ["young"]
            await asyncio.sleep(0.1)
            for node in nodes:
                replay = await self._read_younger(node, young, monotonic() - 0.01)
                assert (replay.top, list(replay.publications)) == (young, [])
                assert replay.is_complete(young)
                assert not replay.is_complete(old[2])

    async def _read_younger(self, node: Node, since: Position, moment: float) -> Replay:
        while True:  # until a read was quick enough to be surely on one side of the moment
            asked = monotonic()
            history = History(messages=20, seconds=asked - moment)
            replay = await keeps_history(node.engine).read(NEWS, since, history)
            if monotonic() - asked < 0.05:
                return replay

    async def test_large_publication_is_delivered_and_not_kept(self) -> None:
        """A message beyond `max_kept_bytes` arrives, with a position. Readers later are told of the hole."""
        small = History(messages=20, max_kept_bytes=1000)
        async with self.keeping(NEWS) as nodes:
            history = keeps_history(nodes[0].engine)
            sizes = (10, 1001, 1000, 10)
            positions = [(await history.append(_publication("x" * size), small)).position for size in sizes]
            for node in nodes:
                came = await self._kept(node, NEWS, 4)
                assert [len(each.message.data) for each in came] == list(sizes)
                assert [each.position for each in came] == positions
            replay = await keeps_history(nodes[-1].engine).read(NEWS, positions[1], small)
            assert replay.is_complete(positions[1])
            assert [len(each.message.data) for each in replay.publications if each.offset > positions[1].offset] == [
                1000,
                10,
            ]
            replay = await keeps_history(nodes[-1].engine).read(NEWS, positions[0], small)
            assert replay.is_complete(positions[0]) == self.keeps_large

    async def test_forgotten_history_is_gone(self) -> None:
        """After `forget` there is another epoch, nothing is read, and later appends begin a new history."""
        async with self.keeping(NEWS) as nodes:
            at = (await append(nodes[0], "secret")).position
            await append(nodes[0], "sport", SPORT)
            await keeps_history(nodes[-1].engine).forget(NEWS)
            for node in nodes:
                replay = await read(node, at)
                assert list(replay.publications) == []
                assert not replay.is_complete(at)
                assert replay.top.epoch not in ("", at.epoch)
                assert await position(node, NEWS) == replay.top
            after = (await append(nodes[0], "after")).position
            assert after.epoch == replay.top.epoch
            for node in nodes:
                assert (await self._kept(node, NEWS, 2))[-1].position == after
                assert [each.message.data for each in (await read(node, None)).publications] == ["after"]
                assert (await read(node, replay.top)).is_complete(replay.top)
                assert len((await read(node, None, SPORT)).publications) == 1

    # Keys.

    async def test_one_key_is_kept_once(self) -> None:
        """Of 64 appends with one key, one is kept and sent. All return its position, and the others say `is_repeat`."""
        async with self.keeping(NEWS) as nodes:
            appended = await asyncio.gather(
                *(append(nodes[n % len(nodes)], f"{n}", key="k") for n in range(64)), return_exceptions=False
            )
            assert len({each.position for each in appended}) == 1
            assert sorted(each.is_repeat for each in appended) == [False, *[True] * 63]
            other = await append(nodes[0], "other", key="other")
            again = await append(nodes[-1], "again", key="k")
            assert again == Appended(appended[0].position, is_repeat=True)
            assert other.position.offset > again.position.offset
            await append(nodes[0], "last")
            for node in nodes:
                came = await self._kept(node, NEWS, 3)
                assert [each.message.data for each in came][1:] == ["other", "last"]

    async def test_key_counts_in_its_audience(self) -> None:
        """The same key in two audiences, even with similar names, means different things."""
        async with self.keeping() as nodes:
            audiences = [EVERYONE, NEWS, SPORT, Audience("user", "news"), Audience("channel", "news:k")]
            for audience in audiences:
                for key in ("k", "k:k", " \N{GRINNING FACE}\n", "\0", "a\r\nb: c", "x" * 200):
                    appended = await append(nodes[0], "hello", audience, key=key)
                    assert not appended.is_repeat
                    assert await append(nodes[-1], "again", audience, key=key) == appended._replace(is_repeat=True)

    # Engines that only publish.

    async def test_publisher_learns_what_is_kept(self) -> None:
        """An engine without rules of its own knows the rules that others have stored, as soon as it is started."""
        async with self.keeping(NEWS) as nodes:
            assert all(keeps_history(node.engine).rules == RULES for node in nodes)
            if not nodes[0].engine.links_nodes:
                return
            async with self.nodes(only_publish=True) as others:
                assert keeps_history(others[0].engine).rules == RULES
                appended = await append(others[0], "hello")
            for node in nodes:
                assert [each.position for each in await self._kept(node, NEWS, 1)] == [appended.position]

    async def test_history_needs_a_running_engine(self) -> None:
        """Before `start` and after `aclose`, every call raises `EngineUnavailable`."""
        engine = self.make_engine()
        history = keeps_history(engine)
        history.keep(RULES)
        for _ in range(2):
            with pytest.raises(EngineUnavailable):
                await history.append(_publication("nobody hears"), KEPT)
            with pytest.raises(EngineUnavailable):
                history.append_nowait(_publication("nobody hears"), KEPT)
            with pytest.raises(EngineUnavailable):
                await history.read(NEWS, None, KEPT)
            with pytest.raises(EngineUnavailable):
                await history.positions([NEWS], [KEPT])
            with pytest.raises(EngineUnavailable):
                await history.forget(NEWS)
            await engine.aclose()

    async def test_unkept_publication_has_no_position(self) -> None:
        """What is published past the history arrives without a position, and doesn't change the history."""
        async with self.keeping(NEWS) as nodes:
            at = (await append(nodes[0], "kept")).position
            await nodes[0].publish("unkept")
            after = (await append(nodes[0], "kept too")).position
            for node in nodes:
                assert await node.recorder.wait_until(lambda: len(node.recorder.publications) >= 3, self.seconds)  # noqa: B023
                places = [each.position for each in node.recorder.publications]
                assert sorted(each for each in places if each is not None) == [at, after]
                assert [each.message.data for each in node.recorder.publications if each.position is None] == ["unkept"]
                assert [each.previous for each in await self._kept(node, NEWS, 2)][-1] == at.offset

    async def _kept(self, node: Node, audience: Audience, count: int) -> list[Publication]:
        recorder = node.recorder

        def kept() -> list[Publication]:
            return [each for each in recorder.publications if each.audience == audience and each.position is not None]

        await recorder.wait_until(lambda: len(kept()) >= count, self.seconds)
        assert len(kept()) == count, f"of what was appended to {audience}"
        return kept()


def _publication(data: object, audience: Audience = NEWS) -> Publication:
    return Publication(Message.of(data), audience)


def _content(publication: Publication) -> Sequence[object]:
    message = publication.message
    return (
        *(message.payload, message.form, message.key, publication.exclude_users, publication.id),
        *(publication.audiences, publication.audience, publication.sender),
    )


async def append(node: Node, data: object, audience: Audience = NEWS, *, key: str | None = None) -> Appended:
    """Append a message to what a node keeps."""
    return await keeps_history(node.engine).append(_publication(data, audience), KEPT, key)


async def read(node: Node, since: Position | None, audience: Audience = NEWS) -> Replay:
    """Read what a node keeps."""
    return await keeps_history(node.engine).read(audience, since, KEPT)


async def position(node: Node, audience: Audience) -> Position:
    """Return the newest position of an audience, as a node knows it."""
    (found,) = await keeps_history(node.engine).positions([audience], [KEPT])
    return found
