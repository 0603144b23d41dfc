"""The channel of a path's parameters: which one is meant, and that no two rooms are one."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast import ConfigurationError, InvalidChannel
from wsbroadcast.web.path_channel import PathChannel


@pytest.mark.parametrize(
    ("parameters", "channel"),
    [({}, None), ({"room": "a"}, "a"), ({"channel": "a", "tenant": "t"}, "a"), ({"number": 7}, "7")],
)
def test_without_a_pattern_it_is_the_parameter_of_that_name_or_the_only_one(
    parameters: dict[str, object], channel: str | None
) -> None:
    assert PathChannel("/ws", None).of(parameters) == channel


def test_of_several_parameters_one_has_to_be_meant() -> None:
    with pytest.raises(ConfigurationError, match=r"say which make the channel, channel='\{tenant\}'"):
        PathChannel("/ws", None).of({"tenant": "t", "room": "r"})


def test_what_is_no_channel_is_refused() -> None:
    for parameters in ({"room": ""}, {"room": "x" * 201}, {"room": "\n"}):
        with pytest.raises(InvalidChannel):
            PathChannel("/ws/{room}", None).of(parameters)


# Few letters, so that separators turn up inside values, and at their ends.
values = st.text("a:", min_size=1, max_size=6)
separators = st.text("a:", min_size=1, max_size=3)


@given(separators, separators, st.lists(st.tuples(values, values, values), min_size=2, max_size=30, unique=True))
def test_different_parameters_never_make_the_same_channel(
    first: str, second: str, tuples: list[tuple[str, str, str]]
) -> None:
    pattern = PathChannel("/ws", f"<{{a}}{first}{{b}}{second}{{c}}>")
    made: dict[str | None, tuple[str, str, str]] = {}
    for each in tuples:
        with suppress(InvalidChannel):
            channel = pattern.of(dict(zip("abc", each, strict=True)))
            assert channel not in made
            made[channel] = each
