"""Stand-ins for packages that only one example needs: the used parts of Strawberry and pycrdt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType
from typing import Any, Self

from fastapi import APIRouter

# Strawberry: types and fields are what they decorate, and nobody asks in GraphQL.


def _itself(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _strawberry() -> dict[str, ModuleType]:
    names = {"type": dataclass, "field": _itself, "mutation": _itself, "subscription": _itself, "Schema": dict}
    return {
        "strawberry": _module("strawberry", names),
        "strawberry.fastapi": _module("strawberry.fastapi", {"GraphQLRouter": lambda schema: APIRouter()}),
    }


# pycrdt: a document is a set of lines that only grows. It speaks as Yjs does: what one has, what another one lacks of
# that, and what is new. No update is empty: one with nothing in it is two zeros, which say so.

_NO_UPDATE = b"\0\0"


class _Kind(IntEnum):
    SYNC = 0
    AWARENESS = 1


class Document:
    """Stands for `pycrdt.Doc`."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.news: asyncio.Queue[bytes] = asyncio.Queue()

    def apply_update(self, update: bytes) -> None:
        """Take what is new, and tell of it."""
        new = [line for line in update.split(b"\n") if line and line not in self.lines]
        self.lines += new
        if new:
            self.news.put_nowait(b"\n".join(new))


def _create_sync_message(document: Document) -> bytes:
    return b"\0\0" + b"\n".join(document.lines)


def _handle_sync_message(message: bytes, document: Document) -> bytes | None:
    kind, rest = message[0], message[1:]
    if kind == 0:
        lacks = b"\n".join(line for line in document.lines if line not in rest.split(b"\n"))
        return b"\0\1" + (lacks or _NO_UPDATE)
    if kind > 2:
        raise ValueError("no message of Yjs")
    assert rest
    if rest != _NO_UPDATE:
        document.apply_update(rest)
    return None


class Provider:
    """Stands for `pycrdt.Provider`: keeps a document in step through a channel; if it can't, the block ends."""

    def __init__(self, document: Document, channel: Any) -> None:
        self._document = document
        self._channel = channel
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        self._tasks = [self._group.create_task(self._receive()), self._group.create_task(self._send())]
        return self

    async def __aexit__(self, *exc: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(*exc)

    async def _receive(self) -> None:
        async for message in self._channel:
            if message[0] == _Kind.SYNC:
                reply = _handle_sync_message(message[1:], self._document)
                if reply is not None:
                    await self._channel.send(reply)

    async def _send(self) -> None:
        await self._channel.send(_create_sync_message(self._document))
        while True:
            await self._channel.send(b"\0\2" + await self._document.news.get())


def _pycrdt() -> dict[str, ModuleType]:
    names = {
        "Doc": Document,
        "Provider": Provider,
        "YMessageType": _Kind,
        "create_sync_message": _create_sync_message,
        "handle_sync_message": _handle_sync_message,
    }
    return {"pycrdt": _module("pycrdt", names)}


def _module(name: str, names: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


def standins() -> dict[str, ModuleType]:
    """Make the modules, to put into `sys.modules`."""
    return _strawberry() | _pycrdt()
