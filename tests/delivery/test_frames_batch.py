from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast import Message
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.frames import FRAGMENT_BYTES, FRAMED, Batch, unframed, wire_form
from wsbroadcast.publication import Publication

PLAIN = wire_form()


def batch_of(messages: list[Message]) -> Batch[object]:
    publications = [Publication(message, EVERYONE) for message in messages]
    batch = Batch[object](publications[0])
    batch.publications.extend(publications[1:])
    return batch


@given(st.lists(st.text() | st.binary(), min_size=1))
def test_wire_is_every_frame_in_order(values: list[str | bytes]) -> None:
    messages = [Message.of(value) for value in values]
    assert batch_of(messages).wire(PLAIN) == b"".join(message._wire(FRAMED) for message in messages)


def test_wire_is_the_same_object_for_every_connection() -> None:
    batch = batch_of([Message.of("one"), Message.of("two")])
    assert batch.wire(PLAIN) is batch.wire(PLAIN)


def test_single_message_is_not_copied() -> None:
    message = Message.of("one")
    assert batch_of([message]).wire(PLAIN) is message._wire(FRAMED)


def test_message_in_two_batches_is_framed_once() -> None:
    message = Message.of("one")
    assert batch_of([message]).wire(PLAIN) is batch_of([message]).wire(PLAIN)


def test_what_waits_is_its_wire_form_and_shared() -> None:
    batch = batch_of([Message.of("one"), Message.of(b"two!", "key")])
    one, two = batch.entries(PLAIN)
    assert batch.entries(PLAIN)[0] is one
    assert (one.data, one.size, one.is_text, one.key) == (b"\x81\x03one", 3, True, None)
    assert (two.data, two.size, two.is_text, two.key) == (b"\x82\x04two!", 4, False, (EVERYONE, "key"))
    assert [entry.data for entry in batch.entries(unframed())] == [b"one", b"two!"]


def test_batch_is_large_if_a_message_needs_more_than_one_frame() -> None:
    small = Message.of(b"x" * FRAGMENT_BYTES)
    assert not batch_of([small, small]).is_large
    assert batch_of([small, Message.of(b"x" * (FRAGMENT_BYTES + 1))]).is_large
