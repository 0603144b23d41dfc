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
    [({}, None), ({"room": "a"}, "a"), ({"channel": "a"}, "a"), ({"number": 7}, "7")],
)
def test_without_a_pattern_it_is_the_only_parameter(parameters: dict[str, object], channel: str | None) -> None:
    assert PathChannel("/ws", None).of(parameters) == channel


@pytest.mark.parametrize("names", [("tenant", "room"), ("tenant", "channel"), ("channel", "room", "tenant")])
def test_of_several_parameters_none_is_left_out_in_silence(names: tuple[str, ...]) -> None:
    text = "say which make the channel, channel='" + ":".join(rf"\{{{name}\}}" for name in names) + "'"
    with pytest.raises(ConfigurationError, match=text):
        PathChannel("/ws", None).of(dict.fromkeys(names, "x"))
    with pytest.raises(ConfigurationError, match=text):
        PathChannel("".join(f"/{{{name}}}" for name in names), None)


def test_pattern_that_leaves_out_a_parameter_from_elsewhere_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    pattern = PathChannel("/ws/{room}/{client}", "room:{room}")
    own = {"room": "a", "client": "b"}
    assert pattern.of(own) == "room:a"
    assert caplog.records == []
    for tenant in ("acme", "other"):
        assert pattern.of({"tenant": tenant, **own}) == "room:a"
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith("/ws/{room}/{client}: the channel 'room:{room}' is the same for every tenant, which is a")
    assert "put {tenant} into the pattern" in warning


def test_pattern_that_names_a_parameter_from_elsewhere_is_fine(caplog: pytest.LogCaptureFixture) -> None:
    pattern = PathChannel("/ws/{room}", "{tenant}:{room}")
    assert pattern.of({"tenant": "acme", "room": "a"}) == "acme:a"
    assert caplog.records == []


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
