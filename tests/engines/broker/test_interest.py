from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast.engines.broker.interest import _TRANSITIONS, Holding, Interest

LINGER = 1.0


def test_wanted_name_is_asked_for_once_and_held_when_confirmed() -> None:
    interest = Interest(LINGER)
    interest.want("a")
    interest.want("a")
    assert (interest.ask(), interest.ask()) == (["a"], [])
    assert interest.first_unsettled(["b", "a"]) == "a"
    interest.confirm(["a"], 0.0)
    assert interest.first_unsettled(["a"]) is None


def test_name_that_nobody_wants_lingers_and_is_released() -> None:
    interest = Interest(LINGER)
    interest.want("a")
    interest.confirm(interest.ask(), 0.0)
    interest.unwant("a", 10.0)
    assert interest.next_release == 11.0
    assert interest.release(10.9, 9) == []
    assert interest.release(11.0, 9) == ["a"]
    interest.released(["a"])
    assert "a" not in interest
    assert interest.next_release is None


def test_names_are_released_a_few_at_a_time() -> None:
    interest = Interest(LINGER)
    for name in "abc":
        interest.want(name)
    interest.confirm(interest.ask(), 0.0)
    for name in "abc":
        interest.unwant(name, 10.0)
    assert interest.release(11.0, 2) == ["a", "b"]
    assert interest.next_release == 11.0
    assert interest.release(11.0, 2) == ["c"]


def test_name_that_is_wanted_while_it_lingers_costs_the_broker_nothing() -> None:
    interest = Interest(LINGER)
    interest.want("a")
    interest.confirm(interest.ask(), 0.0)
    interest.unwant("a", 0.0)
    interest.want("a")
    assert interest.ask() == []
    assert interest.release(5.0, 9) == []
    assert interest.first_unsettled(["a"]) is None


def test_name_that_comes_and_goes_lingers_from_its_last_going() -> None:
    interest = Interest(LINGER)
    interest.want("a")
    interest.confirm(interest.ask(), 0.0)
    for now in (0.0, 0.5):
        interest.unwant("a", now)
        interest.want("a")
    interest.unwant("a", 0.9)
    assert interest.release(1.8, 9) == []
    assert interest.release(1.9, 9) == ["a"]


def test_name_that_is_wanted_again_while_it_is_released_is_asked_for_again() -> None:
    interest = Interest(LINGER)
    interest.want("a")
    interest.confirm(interest.ask(), 0.0)
    interest.unwant("a", 0.0)
    assert interest.release(1.0, 9) == ["a"]
    interest.want("a")
    assert interest.ask() == []
    assert interest.first_unsettled(["b", "a"]) == "a"
    interest.released(["a"])
    assert interest.ask() == ["a"]


def test_name_that_nobody_waits_for_any_more_is_settled_and_released_after_its_confirmation() -> None:
    interest = Interest(LINGER)
    interest.want("a")
    asked = interest.ask()
    interest.unwant("a", 0.0)
    assert interest.first_unsettled(["a"]) is None
    interest.confirm(asked, 1.0)
    assert interest.release(2.0, 9) == ["a"]


def test_lost_connection_leaves_only_what_is_wanted_to_ask_for() -> None:
    interest = Interest(LINGER)
    names = ("asked", "held", "lingering", "releasing", "regretted", "doubted")
    for name in names:
        interest.want(name)
    interest.ask()
    interest.confirm(["held", "lingering", "releasing", "regretted"], 0.0)
    interest.unwant("doubted", 0.0)
    for name in ("releasing", "regretted"):
        interest.unwant(name, 0.0)
    interest.release(1.0, 9)
    interest.want("regretted")
    interest.unwant("lingering", 2.0)
    interest.want("new")
    interest.lost()
    assert sorted(interest.ask()) == ["asked", "held", "new", "regretted"]
    assert interest.next_release is None
    assert [name for name in names if name in interest] == ["asked", "held", "regretted"]


def test_refusal_is_known_until_the_connection_is_lost_or_nobody_wants_the_name() -> None:
    interest = Interest(LINGER)
    refusals = {name: PermissionError(name) for name in "abc"}
    for name in refusals:
        interest.want(name)
    interest.ask()
    interest.unwant("c", 0.0)
    for name, refusal in refusals.items():
        interest.refuse(name, refusal)
    assert interest.first_unsettled("abc") is None
    assert interest.refusal(["d", "b", "a"]) is refusals["b"]
    assert interest.refusal(["c"]) is None
    interest.unwant("b", 0.0)
    assert interest.refusal(["b"]) is None
    interest.lost()
    assert interest.refusal(["a"]) is None
    assert interest.ask() == ["a"]


def test_step_that_can_not_be_is_an_error_that_names_it() -> None:
    interest = Interest(LINGER)
    with pytest.raises(RuntimeError, match="None can't confirm"):
        interest.confirm(["a"], 0.0)
    interest.want("a")
    with pytest.raises(RuntimeError, match="wanted can't released"):
        interest.released(["a"])


def test_every_state_knows_wanting_losing_and_no_longer_wanting() -> None:
    for state, step in product(Holding, ("want", "unwant", "lose")):
        assert any(before is state and each.value == step for before, each in _TRANSITIONS), (state, step)


NAMES = st.sampled_from("abc")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["want", "unwant"]), NAMES),
        st.tuples(st.sampled_from(["subscribe", "answer", "release", "wait", "lose"]), st.none()),
    ),
    max_size=60,
)


@given(STEPS)
def test_broker_holds_what_is_wanted_once_all_is_done(steps: list[tuple[str, str | None]]) -> None:
    """A naive model: sets of what is wanted and held, and one request on its way, as the supervisor has."""
    interest = Interest(LINGER)
    wanted: set[str] = set()
    held: set[str] = set()
    request: tuple[str, list[str]] | None = None
    now = 0.0

    def answer() -> None:
        nonlocal request
        if request is None:
            return
        kind, names = request
        request = None
        if kind == "subscribe":
            assert not held & set(names), "asked for what it has"
            held.update(names)
            interest.confirm(names, now)
        else:
            assert set(names) <= held, "released what it hasn't"
            held.difference_update(names)
            interest.released(names)

    def do(step: str, name: str | None) -> None:
        nonlocal request, now
        if step == "want":
            assert name is not None
            wanted.add(name)
            interest.want(name)
        elif step == "unwant":
            assert name is not None
            wanted.discard(name)
            interest.unwant(name, now)
        elif step == "subscribe" and request is None and (names := interest.ask()):
            request = ("subscribe", names)
        elif step == "release" and request is None and (names := interest.release(now, 9)):
            request = ("release", names)
        elif step == "answer":
            answer()
        elif step == "wait":
            now += LINGER / 2
        elif step == "lose":
            request = None
            held.clear()
            interest.lost()

    for step, name in steps:
        do(step, name)
        assert wanted <= set(filter(interest.__contains__, "abc"))
        if interest.first_unsettled(wanted) is None:
            assert wanted <= held
    for step in ("answer", "subscribe", "answer", "wait", "wait", "release", "answer", "subscribe", "answer"):
        do(step, None)
    assert held == wanted
    assert {name for name in "abc" if name in interest} == wanted
