"""From a file descriptor to messages; `tests/test_command.py` has the rest, with a broker."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from wsbroadcast import EncodeError, MessageTooLarge
from wsbroadcast.command import LinePublisher, as_json, as_json_line, as_text, everything, lines
from wsbroadcast.message import Message


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)


async def given(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_line_is_there_before_the_next_one_is_written() -> None:
    with pipe() as (reader, writer):
        several = lines(reader, 100)
        for line in (b"one", b"", b"two"):
            os.write(writer, line + b"\n")
            assert await anext(several) == line
        os.write(writer, b"three, ")
        os.write(writer, b"unfinished")
        os.close(writer)
        assert await anext(several) == b"three, unfinished"
        with pytest.raises(StopAsyncIteration):
            await anext(several)


async def test_line_that_grows_past_the_limit_is_not_read_to_its_end() -> None:
    with pipe() as (reader, writer):
        os.write(writer, b"x" * 101)  # and no end in sight
        with pytest.raises(MessageTooLarge):
            await anext(lines(reader, 100))
        os.write(writer, b"x" * 101)
        with pytest.raises(MessageTooLarge):
            await everything(reader, 100)
        os.close(writer)


async def test_reading_can_be_cancelled() -> None:
    with pipe() as (reader, writer):
        reading = asyncio.create_task(everything(reader, 100))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        os.close(writer)  # ends the thread


async def test_what_can_not_be_read_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        await anext(lines(987654, 100))


def test_line_is_text_or_json() -> None:
    assert as_text("\N{EM DASH}".encode()) == "\N{EM DASH}"
    message = as_json(b' {"a": [1e5]}')
    assert (message.payload, message.form) == (b' {"a": [1e5]}', "json")
    assert as_json_line(b" \t") is None
    with pytest.raises(EncodeError, match="byte 2 is not UTF-8"):
        as_text(b"a\xff")
    for wrong in (b"", b"secret", b"Infinity", b'"\xff"', b"[1] [2]"):
        with pytest.raises(EncodeError, match="not JSON") as caught:
            as_json(wrong)
        assert "secret" not in str(caught.value)


class Broadcasts:
    """Calls of `broadcast` that end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[str | bytes] = []
        self.may_end = asyncio.Event()
        self.broken: set[str | bytes] = set()
        self.most = 0
        self._running = 0

    async def __call__(self, message: str | bytes | Message) -> None:
        message = message.data if isinstance(message, Message) else message
        self.begun.append(message)
        self._running += 1
        self.most = max(self.most, self._running)
        await self.may_end.wait()
        self._running -= 1
        if message in self.broken:
            raise ConnectionResetError(message)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("limit", [{"max_messages": 3}, {"max_bytes": 5}])
async def test_so_many_are_on_their_way_and_no_more(limit: dict[str, int]) -> None:
    broadcasts = Broadcasts()
    messages = [b"%02d" % number for number in range(10)]
    flow = LinePublisher(broadcasts, as_text, **limit)
    running = asyncio.create_task(flow.run(given(*messages)))
    await settled()
    assert broadcasts.begun == ["00", "01", "02"]
    broadcasts.may_end.set()
    await running
    assert broadcasts.begun == [message.decode() for message in messages]
    assert (flow.published, flow.failures, broadcasts.most) == (10, [], 3)


async def test_failure_ends_the_reading_and_the_first_line_comes_first() -> None:
    broadcasts = Broadcasts()
    broadcasts.broken = {"2", "3"}
    more = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        for number in range(1, 5):
            yield b"%d" % number
        await more.wait()

    flow = LinePublisher(broadcasts, as_text)
    running = asyncio.create_task(flow.run(endless()))
    await settled()
    broadcasts.may_end.set()
    await running
    assert flow.published == 2
    assert [(number, str(error)) for number, error in flow.failures] == [(2, "2"), (3, "3")]


async def test_line_that_is_refused_ends_the_reading_before_those_after_it() -> None:
    broadcasts = Broadcasts()
    broadcasts.may_end.set()
    flow = LinePublisher(broadcasts, as_json_line)
    await flow.run(given(b"1", b"", b"nonsense", b"4"))
    assert broadcasts.begun == ["1"]
    assert [number for number, _ in flow.failures] == [3]


async def test_interruption_waits_for_what_is_on_its_way() -> None:
    broadcasts = Broadcasts()

    async def endless() -> AsyncIterator[bytes]:
        yield b"one"
        await asyncio.Event().wait()

    flow = LinePublisher(broadcasts, as_text)
    running = asyncio.create_task(flow.run(endless()))
    await settled()
    running.cancel()
    await settled()
    assert not running.done()
    broadcasts.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert flow.published == 1
