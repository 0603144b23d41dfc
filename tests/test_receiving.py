"""The readers of a connection, over a receiver that says what the test wants."""

from __future__ import annotations

from typing import Any

import pytest

from wsbroadcast import Connection, ConnectionClosed


class Reader(Connection):
    def __init__(self, *messages: str | bytes) -> None:
        self.messages = list(messages)
        self.closed: list[tuple[int, str]] = []

    async def receive(self) -> str | bytes:
        if not self.messages:
            raise ConnectionClosed(1001)
        return self.messages.pop(0)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self.closed.append((code, reason))


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        ("receive_text", "text", "text"),
        ("receive_bytes", b"\xff", b"\xff"),
        ("receive_json", '{"a": [1]}', {"a": [1]}),
        ("receive_json", b"2", 2),
    ],
)
async def test_reader_returns_what_it_expects(name: str, message: str | bytes, expected: Any) -> None:
    reader = Reader(message)
    assert await getattr(reader, name)() == expected
    assert reader.closed == []


@pytest.mark.parametrize(
    ("name", "message", "code"),
    [
        ("receive_text", b"bytes", 1003),
        ("receive_bytes", "text", 1003),
        ("receive_json", "{", 1007),
        ("receive_json", "NaN", 1007),
        ("receive_json", "1e999", 1007),
        ("receive_json", "[" * 100_000, 1007),
        ("receive_json", b"\xff", 1007),
    ],
)
async def test_anything_else_closes_with_a_code_that_says_why(name: str, message: str | bytes, code: int) -> None:
    reader = Reader(message, "never read")
    with pytest.raises(ConnectionClosed) as caught:
        await getattr(reader, name)()
    assert caught.value.code == code
    assert [closed for closed, _ in reader.closed] == [code]


async def test_iteration_ends_with_the_connection() -> None:
    assert [message async for message in Reader("a", b"b")] == ["a", b"b"]
