"""How an endpoint reads what it expects: text, bytes, JSON, or message by message."""

from __future__ import annotations

from typing import Any, Protocol, Self

from pydantic_core import from_json

from wsbroadcast.close_codes import CloseCode
from wsbroadcast.exceptions import ConnectionClosed
from wsbroadcast.message import Message


class Receiver(Protocol):
    """What the readers are made of."""

    async def receive(self) -> str | bytes: ...  # noqa: D102
    async def close(self, code: int, reason: str) -> None: ...  # noqa: D102
    async def refuse(self, code: int, reason: str) -> ConnectionClosed: ...  # noqa: D102


class Receiving:
    """The readers of a connection. A peer that sends something else is closed, with a code that says why."""

    __slots__ = ()

    async def receive_text(self: Receiver) -> str:
        """Wait for a text message; a binary one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        if isinstance(message, str):
            return message
        raise await self.refuse(CloseCode.UNSUPPORTED_DATA, "expected a text message")

    async def receive_bytes(self: Receiver) -> bytes:
        """Wait for a binary message; a text one closes this connection with 1003.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        if isinstance(message, bytes):
            return message
        raise await self.refuse(CloseCode.UNSUPPORTED_DATA, "expected a binary message")

    async def receive_json(self: Receiver) -> Any:
        """Wait for a message that holds JSON, text or binary; anything else closes this connection with 1007.

        Raises:
            ConnectionClosed: If the connection has ended, that way or another.
        """
        message = await self.receive()
        try:
            value = from_json(message, allow_inf_nan=False)
            Message.json(value)  # which 1e999 can't: it is read as infinity
            return value
        except ValueError:  # broken, too deep, or too large a number
            raise await self.refuse(CloseCode.INVALID_DATA, "expected JSON") from None

    async def refuse(self: Receiver, code: int, reason: str) -> ConnectionClosed:
        """Close because of what the peer sent; return the error for whoever wanted to read it."""
        await self.close(code, reason)
        return ConnectionClosed(code, reason)

    def __aiter__(self) -> Self:
        """Iterate over the peer's messages until the connection ends; there is no exception to catch."""
        return self

    async def __anext__(self: Receiver) -> str | bytes:
        try:
            return await self.receive()
        except ConnectionClosed:
            raise StopAsyncIteration from None
