from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast import Message
from wsbroadcast.audience import EVERYONE
from wsbroadcast.delivery.batch import Batch
from wsbroadcast.delivery.frames import PLAIN


def batch_of(messages: list[Message]) -> Batch[object]:
    batch = Batch[object](EVERYONE, frozenset(), messages[0])
    batch.messages.extend(messages[1:])
    return batch


@given(st.lists(st.text() | st.binary(), min_size=1))
def test_wire_is_every_frame_in_order(values: list[str | bytes]) -> None:
    messages = [Message.of(value) for value in values]
    assert batch_of(messages).wire(PLAIN) == b"".join(PLAIN.frame(message) for message in messages)


def test_wire_is_the_same_object_for_every_connection() -> None:
    batch = batch_of([Message.of("one"), Message.of("two")])
    assert batch.wire(PLAIN) is batch.wire(PLAIN)


def test_single_message_is_not_copied() -> None:
    message = Message.of("one")
    assert batch_of([message]).wire(PLAIN) is PLAIN.frame(message)


def test_message_in_two_batches_is_framed_once() -> None:
    message = Message.of("one")
    assert batch_of([message]).wire(PLAIN) is batch_of([message]).wire(PLAIN)
