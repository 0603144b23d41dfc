from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from wsbroadcast import ConfigurationError, Limits, SlowConsumer


def test_defaults_are_what_the_documentation_says() -> None:
    options = SlowConsumer()
    assert options.policy == "disconnect"
    assert (options.max_backlog_bytes, options.max_backlog_messages) == (2**20, 1024)
    assert (options.send_timeout, options.close_timeout) == (10.0, 1.0)
    assert Limits().max_message_bytes == 16 * 2**20


@pytest.mark.parametrize("policy", ["disconnect", "drop_newest", "drop_oldest", "conflate"])
def test_every_policy_is_taken(policy: Any) -> None:
    assert SlowConsumer(policy=policy).policy == policy


@pytest.mark.parametrize("policy", ["", "drop", None, ["disconnect"]])
def test_unknown_policy_is_refused_with_the_known_ones(policy: Any) -> None:
    with pytest.raises(ConfigurationError, match="disconnect, drop_newest, drop_oldest, conflate"):
        SlowConsumer(policy=policy)


@pytest.mark.parametrize("name", ["max_backlog_bytes", "max_backlog_messages", "send_timeout", "close_timeout"])
@pytest.mark.parametrize("value", [0, -1, math.nan, "1", None])
def test_slow_consumer_numbers_must_be_positive(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"SlowConsumer\.{name} must be a positive number"):
        SlowConsumer(**{name: value})


@pytest.mark.parametrize("value", [0, -1, math.nan, "1", None])
def test_limits_must_be_positive(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Limits\.max_message_bytes"):
        Limits(max_message_bytes=value)


@pytest.mark.parametrize("options", [SlowConsumer(), Limits()])
def test_options_are_frozen(options: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, dataclasses.fields(options)[0].name, 1)
