# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "pycrdt"]
# ///
"""Documents that several people edit at once, with Yjs in the browser and pycrdt in every worker.

Run it with `pip install pycrdt` and `uvicorn 16_documents:app` in this directory. With
`BROKER_URL=sqlite:///documents.db` it runs with `--workers 4`, too. Pages connect with
`new WebsocketProvider("ws://127.0.0.1:8000/documents", "notes", ydoc)` of y-websocket. What one person types appears in
all pages, on all workers.

Each worker has a copy of every document that is open there. A channel keeps the copies and all pages in step. Documents
that have to outlive the workers must be stored: see `Document.run`.
"""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from fastapi import FastAPI, WebSocket
from pycrdt import Doc, Provider, YMessageType, create_sync_message, handle_sync_message

from wsbroadcast import CloseCode, ConnectionManager, EngineUnavailable, History, Lagged, Listener

manager = ConnectionManager(
    os.environ.get("BROKER_URL", "memory://"),
    history={"document:*": History(seconds=60)},  # brings back the messages of a short outage of the broker
)


class Others:
    """A channel in the sense of pycrdt: to the copies of a document in other workers, and to all pages."""

    def __init__(self, path: str, document: Doc, listener: Listener) -> None:
        self.path = path
        self._document = document
        self._listener = listener
        self._received = deque[bytes](maxlen=64)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while True:
            try:
                message = (await anext(self._listener)).data
            except Lagged:
                await self.send(create_sync_message(self._document))  # the others answer with what is missing
                continue
            if isinstance(message, bytes) and message:
                self._received.append(message)
                return message

    async def recv(self) -> bytes:
        return await anext(self)

    async def send(self, message: bytes) -> None:
        if message in self._received:
            return  # another worker sent it to everybody
        while True:
            try:
                await manager.broadcast(message, channel=self.path, exclude=self._listener)
                return
            except EngineUnavailable:  # an outage; for Yjs, a message may come late, and twice
                await asyncio.sleep(0.5)


class Document:
    """This worker's copy of a document, in step with the others from `opened` on."""

    def __init__(self, name: str) -> None:
        self.channel = f"document:{name}"
        self.copy = Doc()
        self.opened = asyncio.Event()
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        # In your app, load it from your database here, and store it at the end.
        async with (
            manager.listen(self.channel) as listener,
            Provider(self.copy, Others(self.channel, self.copy, listener)),
        ):
            self.opened.set()
            await asyncio.Event().wait()  # until the app ends

    async def open(self) -> None:
        opening = asyncio.create_task(self.opened.wait())
        await asyncio.wait([opening, self.task], return_when=asyncio.FIRST_COMPLETED)
        opening.cancel()
        if self.task.done():
            self.task.result()  # raises the error that stopped it


documents: dict[str, Document] = {}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with manager:
        yield
        tasks = [document.task for document in documents.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


app = FastAPI(lifespan=lifespan)


@app.websocket("/documents/{name}")
async def edit(websocket: WebSocket, name: str) -> None:
    document = documents.get(name)
    if document is None or document.task.done():
        document = documents[name] = Document(name)
    await document.open()
    async with manager.connect(websocket, channels=[document.channel]) as connection:
        await connection.send(create_sync_message(document.copy))  # the page answers with what this copy lacks
        async for message in connection:
            if not isinstance(message, bytes) or not message:
                continue
            if message[0] != YMessageType.SYNC:  # the place of somebody's cursor
                await manager.broadcast(message, channel=document.channel, exclude=connection)
                continue
            try:
                reply = handle_sync_message(message[1:], document.copy)
            except (AssertionError, IndexError, ValueError):  # what pycrdt raises
                await connection.close(CloseCode.INVALID_DATA, "that is not what Yjs says")
                return
            if reply is not None:
                await connection.send(reply)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
