"""When rows of the table for large envelopes are removed; how, is tested with the link."""

from __future__ import annotations

import pytest

from wsbroadcast.engines.postgres.notifier import KEPT_IN_TRANSACTION_SECONDS, KEPT_SECONDS, SpillTable


class Clock:
    """What the table takes for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("wsbroadcast.engines.postgres.notifier.time", clock)
    return clock


@pytest.fixture
def table(clock: Clock) -> SpillTable:
    """A table whose first clean-up is over; there was nothing to do."""
    table = SpillTable("app", "public")
    assert table.begin_clean_up()
    table.end_clean_up(is_behind=False, has_more=False)
    clock.now += 10 * KEPT_SECONDS
    return table


def test_nothing_is_removed_where_no_rows_are(table: SpillTable) -> None:
    assert not table.begin_clean_up()


def test_clean_up_is_due_when_the_first_row_has_had_its_time(table: SpillTable, clock: Clock) -> None:
    table.expect_clean_up()
    clock.now += KEPT_SECONDS
    table.expect_clean_up()
    assert not table.begin_clean_up()
    clock.now += 1
    assert table.begin_clean_up()
    table.end_clean_up(is_behind=False, has_more=True)
    assert not table.begin_clean_up()
    clock.now += KEPT_SECONDS + 1
    assert table.begin_clean_up()
    table.end_clean_up(is_behind=False, has_more=False)
    clock.now += 10 * KEPT_SECONDS
    assert not table.begin_clean_up()


def test_clean_up_that_is_behind_goes_on_at_once(table: SpillTable, clock: Clock) -> None:
    table.expect_clean_up()
    clock.now += KEPT_SECONDS + 1
    assert table.begin_clean_up()
    assert not table.begin_clean_up()
    table.end_clean_up(is_behind=True, has_more=True)
    assert table.begin_clean_up()


def test_clean_up_that_was_cut_off_comes_again(table: SpillTable, clock: Clock) -> None:
    table.expect_clean_up()
    clock.now += KEPT_SECONDS + 1
    assert table.begin_clean_up()
    clock.now += KEPT_SECONDS + 1
    assert table.begin_clean_up()


def test_row_of_an_open_transaction_is_not_forgotten(table: SpillTable, clock: Clock) -> None:
    table.expect_commit()
    removed = clock.now + KEPT_IN_TRANSACTION_SECONDS
    while clock.now <= removed:
        clock.now += KEPT_SECONDS + 1
        assert table.begin_clean_up()
        table.end_clean_up(is_behind=False, has_more=False)
    clock.now += KEPT_SECONDS + 1
    assert not table.begin_clean_up()
