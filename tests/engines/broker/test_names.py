from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast import Audience, ConfigurationError
from wsbroadcast.audience import EVERYONE
from wsbroadcast.engines.broker import names
from wsbroadcast.engines.broker.names import AudienceNames

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
AUDIENCES = st.one_of(
    st.just(EVERYONE),
    st.builds(Audience, st.sampled_from(["channel", "user"]), TEXT),
)


def test_plain_names_stay_readable() -> None:
    redis, nats = AudienceNames("app"), AudienceNames("app", ".")
    assert redis.of(EVERYONE) == "app:everyone"
    assert redis.of(Audience("channel", "room:42/a")) == "app:channel:room:42/a"
    assert nats.of(Audience("user", "ann@example")) == "app.user.ann@example"
    assert nats.of_node("id") == "app.node.id"


@pytest.mark.parametrize("channel", ["*", ">", "a.>", "a b", "news[a-z]", '"; DROP', "é", "e\u0301", "😀" * 50, "%2E"])
def test_name_has_nothing_in_it_that_a_broker_minds(channel: str) -> None:
    name = AudienceNames("app", ".").of(Audience("channel", channel))
    assert name.isascii()
    assert name.count(".") == 2
    assert not set(name) & set('*> "[]?\\')
    assert unquote(name.removeprefix("app.channel.")) == channel


@given(st.lists(st.tuples(st.sampled_from(["a", "a-b", "A"]), AUDIENCES), min_size=2, max_size=8, unique=True))
def test_no_two_audiences_share_a_name(some: list[tuple[str, Audience]]) -> None:
    for separator in (":", "."):
        assert len({AudienceNames(prefix, separator).of(audience) for prefix, audience in some}) == len(some)


def test_memory_of_names_is_bounded() -> None:
    some = AudienceNames()
    for number in range(names._REMEMBERED + 10):
        some.of(Audience("channel", str(number)))
    assert len(some._names) <= names._REMEMBERED
    assert some.of(Audience("channel", "1")) == "wsbroadcast:channel:1"


@pytest.mark.parametrize("prefix", ["", "a:b", "a.b", "a b", "é", "x" * 33, None, 7, "a\n"])
def test_prefix_that_breaks_the_rule_is_refused(prefix: Any) -> None:
    with pytest.raises(ConfigurationError, match="prefix must be"):
        AudienceNames(prefix)
