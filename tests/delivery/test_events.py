from __future__ import annotations

from wsbroadcast.delivery.backlog import Entry
from wsbroadcast.delivery.frames import Events


def entry(data: bytes, *, is_text: bool = True) -> Entry:
    return Entry(data, len(data), is_text=is_text)


def test_event_holds_the_text_or_the_bytes() -> None:
    events = Events()
    assert events.of(entry("é😀".encode())) == {"type": "websocket.send", "text": "é😀"}
    assert events.of(entry(b"\xff", is_text=False)) == {"type": "websocket.send", "bytes": b"\xff"}


def test_event_is_made_once_for_all_who_write_it_soon() -> None:
    events = Events()
    one, two = entry(b"one"), entry(b"two")
    first = events.of(one)
    events.of(two)
    assert events.of(one) is first
    events.clear()
    assert events.of(one) is not first
    assert events.of(one) == first


def test_newest_is_kept_whatever_its_size_and_the_others_to_a_bound() -> None:
    events = Events()
    large = entry(b"x" * 1_000_000)
    assert events.of(large) is events.of(large)
    small = [entry(b"") for _ in range(1000)]
    first = events.of(small[0])
    made = [events.of(one) for one in small]
    assert made[0] is first
    assert events.of(small[-1]) is made[-1]
    assert events.of(small[0]) is not first
    assert len(events._kept) <= 600
