from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wsbroadcast import Audience, InvalidChannel
from wsbroadcast.audience import EVERYONE, MAX_NAME_BYTES, UNSET, as_channels, check_channel, user_key


class Unspeakable:
    """An object that can't even be shown."""

    def __repr__(self) -> str:
        raise KeyError("no repr")


def name_of_type(value: object) -> str:
    return type(value).__name__


def is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) <= 159 or ord(character) in (0x2028, 0x2029)


def is_name(text: str) -> bool:
    """The rule once more, as it is written in the documentation."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return False
    return 1 <= size <= 200 and not any(is_control(character) for character in text)


any_text = st.text(st.characters(exclude_categories=[]))  # lone surrogates too


@given(any_text)
@example("")
@example("a" * 200)
@example("a" * 201)
@example("é" * 100)
@example("é" * 101)
@example("\x00")
@example("\x7f")
@example("\x9f")
@example("\u2028")
@example("\ud800")
@example("a b/c*>.~")
def test_channel_is_a_name_or_refused(text: str) -> None:
    if is_name(text):
        assert check_channel(text) == text
    else:
        with pytest.raises(InvalidChannel) as caught:
            check_channel(text)
        assert caught.value.channel == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.uuids() | any_text,
        lambda inner: st.lists(inner) | st.dictionaries(st.integers(), inner),
    )
)
def test_channel_check_answers_for_any_value(value: object) -> None:
    try:
        assert check_channel(value) is value
    except InvalidChannel as error:
        str(error).encode()


@pytest.mark.parametrize("value", [None, Unspeakable(), 10**5000, object, lambda: None, 1.5], ids=name_of_type)
def test_channel_check_answers_for_odd_objects(value: object) -> None:
    with pytest.raises(InvalidChannel, match="a channel is a str, not ") as caught:
        check_channel(value)
    assert caught.value.channel is value


def test_channel_check_answers_for_endless_nesting() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidChannel, match="not list"):
        check_channel(nested)


@pytest.mark.parametrize(
    ("channel", "rule"),
    [
        ("", "it is empty"),
        ("a\nb", "it has control characters"),
        ("\udfff", "it has a lone surrogate, which UTF-8 can't carry"),
        ("a" * 5000, f"it has 5000 bytes, the limit is {MAX_NAME_BYTES}"),
    ],
)
def test_channel_error_names_the_rule(channel: str, rule: str) -> None:
    with pytest.raises(InvalidChannel) as caught:
        check_channel(channel)
    assert caught.value.rule == rule
    assert len(str(caught.value)) < 200  # whatever a client sends, the log line stays short
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("user", ["7", 7])
def test_user_is_the_same_as_text_and_as_number(user: object) -> None:
    assert user_key(user) == "7"


def test_user_may_be_a_uuid() -> None:
    user = UUID(int=7)
    assert user_key(user) == str(user)


@pytest.mark.parametrize(
    "user", [None, True, 1.0, b"ann", ("ann",), Unspeakable(), "", "a\x00", "a" * 201, "\ud800"], ids=name_of_type
)
def test_user_that_is_no_id_is_refused(user: object) -> None:
    with pytest.raises(ValueError, match="user"):
        user_key(user)


def test_audience_without_arguments_is_everyone() -> None:
    assert Audience.of() is EVERYONE


@pytest.mark.parametrize("user", ["\udca1" * 300, "a\nb\x1b[2J" + "x" * 1000, "😀" * 100, "\x00" * 300])
def test_user_that_a_client_chose_is_escaped_and_cut_in_the_error(user: str) -> None:
    with pytest.raises(ValueError, match="invalid user") as caught:
        user_key(user)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_audience_of_a_channel_and_of_a_user_differ() -> None:
    assert Audience.of(channel="7") == Audience("channel", "7")
    assert Audience.of(user=7) == Audience("user", "7")


@pytest.mark.parametrize("arguments", [{"channel": None}, {"user": None}, {"channel": "a", "user": "b"}])
def test_audience_refuses_none_and_both(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"channel|user"):
        Audience.of(**arguments)


def test_unset_shows_as_dots_in_signatures() -> None:
    assert repr(UNSET) == "..."


def test_channels_may_be_one_str() -> None:
    assert as_channels("news") == ("news",)


def test_channels_lose_doubles_and_keep_their_order() -> None:
    assert as_channels(name for name in ("b", "a", "b")) == ("b", "a")


@pytest.mark.parametrize("channels", ["", ["fine", ""], ["fine", None], b"news"])
def test_channels_are_all_checked(channels: object) -> None:
    with pytest.raises(InvalidChannel):
        as_channels(channels)
