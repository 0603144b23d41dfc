"""The tail of one audience: what comes with holes, twice, late or from another history, goes out in order or breaks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from wsbroadcast import Audience, History, Message, Position, Publication
from wsbroadcast.history import Replay
from wsbroadcast.node.tail import Tail, Taken

NEWS = Audience("channel", "news")
KEPT = History(messages=5, seconds=100)


def entry(offset: int, epoch: str = "e", previous: int | None = None, kept_at: float = 0.0) -> Publication:
    publication = Publication(Message.of(f"{epoch}{offset}"), NEWS)
    publication.place(Position(epoch, offset), offset - 1 if previous is None else previous, kept_at)
    return publication


def replay(first: int, last: int, epoch: str = "e", base: int | None = None) -> Replay:
    publications = [entry(offset, epoch) for offset in range(first, last + 1)]
    return Replay(Position(epoch, last), publications, first - 1 if base is None else base)


def fill(tail: Tail, found: Replay) -> str | None:
    tail.reads += 1
    return tail.filled(found, tail.reads)


def delivered(tail: Tail) -> list[int]:
    found = []
    while (publication := tail.next()) is not None:
        found.append(publication.offset)
        tail.delivered = publication.offset
    return found


@pytest.fixture
def tail() -> Tail:
    tail = Tail(KEPT)
    tail.is_reading = True
    assert fill(tail, replay(3, 4)) is None
    return tail


def test_what_follows_is_next(tail: Tail) -> None:
    assert tail.position == Position("e", 4)
    assert tail.next() is None
    assert tail.take(entry(5)) is Taken.NEXT
    assert tail.take(entry(9, previous=5)) is Taken.NEXT
    assert delivered(tail) == [5, 9]


def test_what_came_before_is_known(tail: Tail) -> None:
    tail.take(entry(5))
    for offset in (5, 4, 3, 1):
        assert tail.take(entry(offset)) is Taken.KNOWN
    assert delivered(tail) == [5]


def test_hole_is_filled_in_order(tail: Tail) -> None:
    assert tail.take(entry(7)) is Taken.SUSPECT
    assert tail.take(entry(8)) is Taken.HELD
    assert tail.next() is None
    assert fill(tail, replay(5, 7)) is None
    assert not tail.is_reading
    assert delivered(tail) == [5, 6, 7, 8]


def test_chain_that_begins_again_is_looked_into(tail: Tail) -> None:
    # A stream whose messages have expired doesn't know the one before any more.
    assert tail.take(entry(9, previous=0)) is Taken.SUSPECT
    assert fill(tail, replay(5, 9)) is None
    assert delivered(tail) == [5, 6, 7, 8, 9]
    assert tail.take(entry(12, previous=0)) is Taken.SUSPECT
    assert fill(tail, replay(12, 12)) == "expired"
    assert delivered(tail) == [12]


def test_hole_behind_what_was_read_is_read_again(tail: Tail) -> None:
    tail.take(entry(7))
    tail.take(entry(9))
    assert fill(tail, replay(5, 7)) is None
    assert tail.is_reading
    assert fill(tail, replay(8, 9)) is None
    assert delivered(tail) == [5, 6, 7, 8, 9]


def test_more_than_is_kept_is_a_break(tail: Tail) -> None:
    tail.take(entry(30))
    assert fill(tail, replay(26, 30)) == "too_many"
    assert (tail.position, tail.base) == (Position("e", 30), 25)
    assert delivered(tail) == [30]  # which has come


def test_what_was_not_kept_is_a_break(tail: Tail) -> None:
    tail.take(entry(8))
    assert fill(tail, Replay(Position("e", 8), [entry(8)], 7)) == "expired"
    assert tail.take(entry(9)) is Taken.NEXT


def test_what_came_behind_a_break_is_delivered_though_it_was_read(tail: Tail) -> None:
    tail.take(entry(12))
    tail.take(entry(13))
    assert fill(tail, replay(9, 13)) == "too_many"
    assert (tail.delivered, delivered(tail)) == (11, [12, 13])


def test_other_epoch_is_a_break(tail: Tail) -> None:
    assert tail.take(entry(1, "f")) is Taken.SUSPECT
    assert fill(tail, replay(1, 1, "f")) == "epoch"
    assert tail.position == Position("f", 1)
    assert tail.take(entry(2, "f")) is Taken.NEXT


def test_publication_of_an_ended_history_is_dropped(tail: Tail) -> None:
    """However often it comes, it is not read for again and again."""
    for _ in range(3):
        assert tail.take(entry(17, "old")) is Taken.SUSPECT
        assert fill(tail, Replay(Position("e", 4), [], 4)) is None
        assert not tail.is_reading
    assert tail.take(entry(5)) is Taken.NEXT


def test_forged_offset_is_given_up(tail: Tail) -> None:
    tail.take(entry(10**12))
    reads = 0
    while tail.is_reading:
        reads += 1
        assert fill(tail, Replay(Position("e", 4), [], 4)) is None
        assert reads < 10
    assert tail.take(entry(5)) is Taken.NEXT


def test_read_that_began_too_early_is_not_enough(tail: Tail) -> None:
    tail.reads += 1
    wanted = tail.want_read()
    assert tail.filled(Replay(Position("e", 4), [], 4), tail.reads) is None
    assert tail.is_reading
    assert fill(tail, replay(5, 5)) is None
    assert (tail.reads, tail.is_reading) == (wanted, False)


def test_what_joins_the_rest_waits_for_no_read(tail: Tail) -> None:
    tail.want_read()
    top = tail.top
    assert tail.take(entry(top + 1)) is Taken.NEXT
    assert tail.take(entry(top + 3)) is Taken.HELD
    assert tail.take(entry(top + 2)) is Taken.NEXT
    assert fill(tail, replay(top, top + 1)) is None  # of before both
    assert delivered(tail)[-3:] == [top + 1, top + 2, top + 3]


def test_nothing_of_a_history_that_was_removed_goes_out(tail: Tail) -> None:
    tail.want_read()
    tail.is_void = True
    top = tail.top
    assert tail.take(entry(top + 1)) is Taken.HELD
    assert fill(tail, Replay(Position("f", 0), [], 0)) == "epoch"
    assert (tail.is_void, tail.top) == (False, 0)


def test_history_that_can_t_be_read_is_gone_on_with(tail: Tail) -> None:
    tail.is_reading = True
    assert tail.given_up() is None
    tail.take(entry(7))
    tail.take(entry(8))
    assert tail.given_up() == "unavailable"
    assert delivered(tail) == [7, 8]
    assert not tail.has(5, 0.0)


def test_what_follows_is_no_break_although_the_history_can_t_be_read(tail: Tail) -> None:
    tail.is_reading = True
    for publication in (entry(4), entry(5), entry(6), entry(9)):
        tail.take(publication)
    assert tail.given_up() is None
    assert delivered(tail) == [5, 6]
    assert tail.is_reading
    assert tail.given_up() == "unavailable"
    assert delivered(tail) == [9]


@pytest.mark.parametrize("has_failed", [False, True])
def test_first_read_is_a_break_for_who_came_before_it(has_failed: bool) -> None:
    tail = Tail(KEPT)
    tail.is_reading, tail.has_failed = True, has_failed
    tail.take(entry(4))
    assert fill(tail, replay(3, 4)) == ("unavailable" if has_failed else None)
    assert (tail.delivered, tail.next()) == (4, None)


def test_far_too_much_is_held_is_read_later(tail: Tail) -> None:
    tail.take(entry(6))
    for offset in range(7, 6000):
        tail.take(entry(offset))
    assert fill(tail, replay(5, 5)) is None
    assert tail.is_reading
    assert fill(tail, replay(tail.top + 1, 6001)) is None
    assert delivered(tail) == list(range(5, 6002))


def test_what_was_not_delivered_stays(tail: Tail) -> None:
    for offset in range(5, 205):
        tail.take(entry(offset))
    assert tail.waiting == 200
    assert delivered(tail) == list(range(5, 205))
    tail.take(entry(205))
    assert tail.base == 200
    tail.skip()
    assert tail.waiting == 0


def test_positions_that_can_be_gone_on_from(tail: Tail) -> None:
    for offset in range(5, 13):
        tail.take(entry(offset))
        tail.delivered = offset
    assert [offset for offset in range(-2, 20) if tail.has(offset, 0.0)] == [7, 8, 9, 10, 11, 12]
    assert tail.why_not(3) == "too_many"
    assert tail.why_not(13) == "epoch"


def test_offset_between_two_never_was(tail: Tail) -> None:
    tail.take(entry(9, previous=4))
    tail.take(entry(15, previous=9))
    tail.delivered = 15
    assert [offset for offset in range(20) if tail.has(offset, 0.0)] == [2, 3, 4, 9, 15]


def test_old_publications_are_not_gone_on_from(tail: Tail) -> None:
    for offset in range(5, 8):
        tail.take(entry(offset, kept_at=50.0))
    tail.delivered = 7
    assert [offset for offset in (2, 3, 4, 6, 7) if tail.has(offset, 120.0)] == [4, 6, 7]
    assert [offset for offset in (4, 6, 7) if tail.has(offset, 151.0)] == [7]
    assert [tail.why_not(offset) for offset in (2, 4, 6, 8)] == ["expired", "expired", "expired", "epoch"]


def test_too_old_is_not_too_many(tail: Tail) -> None:
    for offset in range(5, 13):
        tail.take(entry(offset, kept_at=50.0))
        tail.delivered = offset
    assert not tail.has(7, 151.0)
    assert [tail.why_not(offset) for offset in (6, 7, 9)] == ["too_many", "expired", "expired"]


def test_stretches_are_shared_and_end_at_a_turn(tail: Tail) -> None:
    for offset in range(5, 8):
        tail.take(entry(offset))
        tail.delivered = offset
    stretch = tail.after(4)
    assert stretch is tail.after(4)
    assert stretch.batch is not None
    assert [each.offset for each in stretch.batch.publications] == [5, 6, 7]
    assert stretch.end == 7
    small = Tail(KEPT, turn_messages=2, turn_bytes=3)
    small.is_reading = True
    fill(small, replay(1, 5))
    assert [small.after(offset).end for offset in (0, 1, 4)] == [1, 2, 5]


def test_shrunk_tail_is_filled_again(tail: Tail) -> None:
    tail.take(entry(5))
    tail.shrink()
    assert (tail.base, tail.bytes, tail.is_shrunk) == (4, 2, True)
    assert delivered(tail) == [5]
    assert not tail.has(3, 0.0)
    tail.refilled(replay(1, 5))
    assert (tail.base, tail.is_shrunk) == (0, False)
    assert all(tail.has(offset, 0.0) for offset in range(6))
    assert [each.offset for each in tail.after(0).batch.publications] == [1, 2, 3, 4, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize("ahead", [0, 1, 3, 5, 9])
def test_shrunk_tail_is_filled_from_a_log_that_is_ahead(tail: Tail, ahead: int) -> None:
    for offset in range(5, 11):
        tail.take(entry(offset))
        tail.delivered = offset
    tail.shrink()
    tail.refilled(replay(6 + ahead, 10 + ahead))
    assert tail.base == min(5 + ahead, 10)
    assert tail.why_not(4) == "too_many"


def test_shrunk_tail_whose_log_is_old_has_nothing_more(tail: Tail) -> None:
    tail.shrink()
    tail.refilled(Replay(Position("e", 5), [entry(5)], 4))
    assert (tail.base, tail.why_not(3)) == (4, "expired")


def test_shrunk_tail_is_not_filled_from_another_history(tail: Tail) -> None:
    tail.shrink()
    before = tail.base
    tail.refilled(Replay(Position("other", 9), (), 0))
    assert (tail.base, tail.is_shrunk) == (before, True)
    assert tail.why_not(1) == "unavailable"


@pytest.mark.parametrize("seed", range(50))
def test_any_order_of_faults(seed: int) -> None:
    """Whatever is lost, doubled and read late: what is delivered is a chain, but for the breaks that were told."""
    choose = random.Random(seed)
    tail = Tail(KEPT)
    tail.is_reading = True
    epochs = ["e0"]
    log: list[list[Publication]] = [[]]
    out: list[Publication | None] = []
    breaks = 0
    for _ in range(400):
        action = choose.random()
        if action < 0.6:
            log[-1].append(entry(len(log[-1]) + 1, epochs[-1]))
            for _ in range(choose.choice((0, 1, 1, 1, 1, 2))):
                tail.take(log[-1][-1])
        elif action < 0.7 and log[-1]:
            tail.take(choose.choice(log[choose.randrange(len(log))] or log[-1]))
        elif action < 0.72:
            epochs.append(f"e{len(epochs)}")
            log.append([])
        if tail.is_reading and choose.random() < 0.5:
            kept = log[-1][-5:]
            top = len(log[-1])
            was_known = bool(tail.epoch)
            found = fill(tail, Replay(Position(epochs[-1], top), list(kept), top - len(kept)))
            if found is not None:
                assert was_known
                breaks += 1
                out.append(None)
        while (publication := tail.next()) is not None:
            tail.delivered = publication.offset
            out.append(publication)
    for one, other in pairwise(out):
        if one is not None and other is not None:
            assert one.position is not None
            assert other.position is not None
            assert (one.position.epoch, other.previous) == (other.position.epoch, one.offset)
    assert len(out) > 50
