from __future__ import annotations

import dataclasses
import math
import re
from enum import IntEnum
from typing import Any

import pytest

from tests.support.fake_broker import FakeBroker, FakeEngine
from wsbroadcast import ConfigurationError, Limits, Policy, SlowConsumer, Timing


def broker_engine(**options: Any) -> FakeEngine:
    return FakeEngine(FakeBroker(), **options)


def test_defaults_are_what_the_documentation_says() -> None:
    options = SlowConsumer()
    assert options.policy == "disconnect"
    assert (options.max_backlog_bytes, options.max_backlog_messages) == (2**20, 1024)
    assert (options.send_timeout, options.close_timeout) == (10.0, 1.0)
    assert Limits().max_outbound_bytes == 16 * 2**20


@pytest.mark.parametrize("policy", ["disconnect", "drop_newest", "drop_oldest", "conflate"])
def test_every_policy_is_taken(policy: Any) -> None:
    assert SlowConsumer(policy=policy).policy == policy


@pytest.mark.parametrize(
    ("channel", "policy"),
    [
        (None, "disconnect"),
        ("news", "disconnect"),
        ("ticker:oil", "conflate"),
        ("ticker:", "conflate"),
        ("ticker:oil\n", "conflate"),
        ("TICKER:oil", "disconnect"),
        ("ticker:gold", "drop_oldest"),
        ("my ticker:oil", "disconnect"),
        ("a.b", "drop_newest"),
        ("axb", "disconnect"),
    ],
)
def test_longest_pattern_names_the_policy_of_a_channel(channel: str | None, policy: str) -> None:
    by_channel: dict[str, Policy] = {"ticker:*": "conflate", "ticker:gold": "drop_oldest", "a.b": "drop_newest"}
    assert SlowConsumer(by_channel=by_channel).policy_of(channel) == policy


@pytest.mark.parametrize("by_channel", [["a"], {"a": "drop"}, {"a": None}, "a"])
def test_policies_of_channels_are_a_dict_of_known_ones(by_channel: Any) -> None:
    with pytest.raises(ConfigurationError):
        SlowConsumer(by_channel=by_channel)


@pytest.mark.parametrize("when_full", ["newest", None, True])
def test_when_full_is_refuse_or_oldest(when_full: Any) -> None:
    with pytest.raises(ConfigurationError, match="refuse or oldest"):
        Limits(when_full=when_full)


@pytest.mark.parametrize("policy", ["", "drop", None, ["disconnect"]])
def test_unknown_policy_is_refused_with_the_known_ones(policy: Any) -> None:
    with pytest.raises(ConfigurationError, match="disconnect, drop_newest, drop_oldest, conflate"):
        SlowConsumer(policy=policy)


NUMBERS = [
    *((kind, field.name) for kind in (SlowConsumer, Limits, Timing) for field in dataclasses.fields(kind)),
    (broker_engine, "max_message_bytes"),
]
for no_number in ((SlowConsumer, "policy"), (SlowConsumer, "by_channel"), (Limits, "when_full")):
    NUMBERS.remove(no_number)


def is_measured(name: str) -> bool:
    """Whether an option is seconds or a rate, not a count."""
    return name.endswith(("_timeout", "_rate", "_age", "_interval", "_backoff")) or name == "linger"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in NUMBERS if is_measured(name)])
def test_number_that_is_larger_than_any_float_is_refused(kind: Any, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be a positive number"):
        kind(**{name: 10**400})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, True, "1", b"1", [1]])
def test_numbers_must_be_positive(kind: Any, name: str, value: Any) -> None:
    what = "a positive number" if is_measured(name) else "a whole number greater than 0"
    with pytest.raises(ConfigurationError, match=rf"{name} must be {what}, not"):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
@pytest.mark.parametrize("value", [0.5, 2.5, 2.0, 1e300])
def test_only_what_is_no_count_may_have_a_fraction(kind: Any, name: str, value: float) -> None:
    if is_measured(name):
        assert getattr(kind(**{name: value}), name) == value
    else:
        with pytest.raises(
            ConfigurationError, match=rf"{name} must be a whole number greater than 0, not {re.escape(str(value))}"
        ):
            kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_whole_numbers_are_taken_everywhere(kind: Any, name: str) -> None:
    class Size(IntEnum):
        SMALL = 1

    for value in (1, 2**40, Size.SMALL):
        kind(**{name: value})


@pytest.mark.parametrize("field", dataclasses.fields(Limits), ids=lambda field: field.name)
def test_only_what_may_be_without_a_limit_takes_none(field: dataclasses.Field[Any]) -> None:
    options: dict[str, Any] = {field.name: None}
    if "None" in str(field.type):
        assert getattr(Limits(**options), field.name) is None
    else:
        with pytest.raises(ConfigurationError, match=field.name):
            Limits(**options)


@pytest.mark.parametrize("options", [SlowConsumer(), Limits()])
def test_options_are_frozen(options: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, dataclasses.fields(options)[0].name, 1)
