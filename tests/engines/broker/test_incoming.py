from __future__ import annotations

from wsbroadcast.engines.broker import incoming
from wsbroadcast.engines.broker.envelope import Origin
from wsbroadcast.engines.broker.incoming import Freshness


def test_newer_is_fresh_and_the_same_or_older_is_not() -> None:
    seen = Freshness()
    assert seen.is_fresh(Origin("a", 1), "news")
    assert seen.is_fresh(Origin("a", 5), "news")
    assert not seen.is_fresh(Origin("a", 5), "news")
    assert not seen.is_fresh(Origin("a", 4), "news")
    assert seen.is_fresh(Origin("a", 6), "news")


def test_order_is_each_node_s_and_each_name_s_own() -> None:
    seen = Freshness()
    assert seen.is_fresh(Origin("a", 5), "news")
    assert seen.is_fresh(Origin("b", 1), "news")
    assert seen.is_fresh(Origin("a", 1), "sport")


def test_memory_is_bounded_and_keeps_the_latest() -> None:
    seen = Freshness()
    for number in range(5 * incoming._GENERATION):
        assert seen.is_fresh(Origin("a", 1), f"name{number}")
        assert seen.is_fresh(Origin("busy", number + 1), "news")
    assert len(seen._young) + len(seen._old) <= 2 * incoming._GENERATION + 2
    assert not seen.is_fresh(Origin("busy", 5), "news")


def test_stale_envelope_is_stale_again_after_the_older_half_was_forgotten() -> None:
    seen = Freshness()
    assert seen.is_fresh(Origin("node", 5), "first")
    for number in range(2 * incoming._GENERATION - 1):
        assert seen.is_fresh(Origin("node", 5), f"name {number}")
    assert [seen.is_fresh(Origin("node", 5), "first") for _ in range(3)] == [False] * 3
