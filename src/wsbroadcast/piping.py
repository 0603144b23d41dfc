"""From standard input to a publisher: each line is one message, published as it comes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future

from pydantic_core import from_json

from wsbroadcast.exceptions import EncodeError, MessageTooLarge

# What may be on its way to the broker at the same time.
_MAX_MESSAGES = 512
_MAX_BYTES = 4 * 1024 * 1024

_READ_BYTES = 64 * 1024


async def lines(file: int, limit: int) -> AsyncIterator[bytes]:
    """Read the lines of a file descriptor as they come, without their ends.

    Raises:
        MessageTooLarge: If a line is longer than the limit, in bytes; the rest isn't read.
        OSError: If it can't be read.
    """
    rest = b""
    while chunk := await _read(file):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r")
        if len(rest) > limit:
            raise MessageTooLarge(len(rest), limit)
    if rest:
        yield rest


async def everything(file: int, limit: int) -> bytes:
    """Read a file descriptor to its end.

    Raises:
        MessageTooLarge: If that is more than the limit, in bytes.
        OSError: If it can't be read.
    """
    whole = bytearray()
    while chunk := await _read(file):
        whole += chunk
        if len(whole) > limit:
            raise MessageTooLarge(len(whole), limit)
    return bytes(whole)


async def _read(file: int) -> bytes:
    # A thread for each read: no event loop can wait for a terminal, a pipe and a file alike, and a thread that is still
    # reading when the program ends must not be waited for.
    future: Future[bytes] = Future()
    future.set_running_or_notify_cancel()

    def read() -> None:
        try:
            future.set_result(os.read(file, _READ_BYTES))
        except OSError as error:
            future.set_exception(error)

    threading.Thread(target=read, name="wsbroadcast stdin", daemon=True).start()
    return await asyncio.wrap_future(future)


def as_text(line: bytes) -> str:
    """Return a line as a text message.

    Raises:
        EncodeError: If it isn't UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise EncodeError(f"byte {error.start + 1} is not UTF-8") from None


def as_json(line: bytes) -> str:
    """Return a line as a text message, if it is JSON.

    Raises:
        EncodeError: If it isn't.
    """
    try:
        from_json(line, allow_inf_nan=False)
    except ValueError as error:
        raise EncodeError(f"not JSON: {error}") from None
    return line.decode()


def as_json_line(line: bytes) -> str | None:
    """Return a line as `as_json` does, or `None` if it is blank."""
    return as_json(line) if line.strip() else None


class Piping:
    """Publishes lines in their order, many at a time, until one fails.

    Args:
        broadcast: Publishes one message.
        convert: Makes a message of a line; `None` if it is to be passed over.
    """

    def __init__(self, broadcast: Callable[[str], Awaitable[None]], convert: Callable[[bytes], str | None]) -> None:
        self.published = 0
        """Messages that the broker has taken."""
        self.failures: list[tuple[int, Exception]] = []
        """The number of each line that could not be published, from 1 on, and why; the first line first."""
        self._broadcast = broadcast
        self._convert = convert
        self._on_their_way: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._eased = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def run(self, lines: AsyncIterator[bytes]) -> None:
        """Publish until the lines end, one fails, or this is cancelled; it ends when nothing is on its way any more.

        Raises:
            OSError: If the lines can't be read.
        """
        reading = self._reading = asyncio.create_task(self._read(lines), name="wsbroadcast stdin")
        try:
            await asyncio.wait([reading])
        finally:
            reading.cancel()
            await asyncio.wait([reading, *self._on_their_way])
        self.failures.sort(key=lambda failure: failure[0])
        if not reading.cancelled():
            reading.result()

    async def _read(self, lines: AsyncIterator[bytes]) -> None:
        number = 1
        try:
            async for line in lines:
                message = self._convert(line)
                if message is not None:
                    await self._wait_for_room()
                    self._send(number, message, len(line))
                number += 1
        except EncodeError as error:
            self.failures.append((number, error))

    async def _wait_for_room(self) -> None:
        while len(self._on_their_way) >= _MAX_MESSAGES or self._bytes >= _MAX_BYTES:
            self._eased.clear()
            await self._eased.wait()

    def _send(self, number: int, message: str, size: int) -> None:
        def sent(task: asyncio.Task[None]) -> None:
            self._on_their_way.discard(task)
            self._bytes -= size
            self._eased.set()

        task = asyncio.create_task(self._publish(number, message), name="wsbroadcast stdin message")
        self._on_their_way.add(task)
        self._bytes += size
        task.add_done_callback(sent)

    async def _publish(self, number: int, message: str) -> None:
        try:
            await self._broadcast(message)
            self.published += 1
        except Exception as error:
            self.failures.append((number, error))
            if self._reading is not None:
                self._reading.cancel()
