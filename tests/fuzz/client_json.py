"""What a client sends: JSON that is none, commands that are wrong, frames of the other kind, too large, too many."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.harness import fuzz, watched

with watched():
    from fastapi import FastAPI

    from tests.support.asgi import visit
    from wsbroadcast import ConnectionManager, Limits, create_router

# What a router may close a client with for what it sent; 1000 is for none, because the client leaves then.
CODES = {1003, 1007, 1008, 1009}

# A frame is the bytes themselves, or they stand in one of these, so that not only broken JSON is tried.
TEMPLATES = (
    "?",
    '{"type":"subscribe","channel":"?"}',
    '{"type":"subscribe","channel":?,"id":?}',
    '{"type":"unsubscribe","channel":"?","id":"?"}',
    '{"type":"publish","channel":"a","data":?}',
    '{"type":"publish","channel":"?","data":"?"}',
    '{"type":?}',
    '{"?":"subscribe","channel":"a"}',
)

app = FastAPI()
manager = ConnectionManager(limits=Limits(max_inbound_bytes=1000, inbound_burst=20, max_channels_per_connection=3))
app.include_router(
    create_router(
        manager, "/commands", inbound="commands", authorize=lambda _connection, _action, channel: channel != "no"
    )
)
app.include_router(create_router(manager, "/json", accepts="json"))
app.include_router(create_router(manager, "/text/{channel}", accepts="text"))

_loop = asyncio.new_event_loop()


def check(data: bytes) -> None:
    """Whatever a client sends gets an answer, or ends its connection with a code for it; nothing escapes the app."""
    logging.disable()
    try:
        _loop.run_until_complete(_talk(data))
    finally:
        logging.disable(logging.NOTSET)


async def _talk(data: bytes) -> None:
    path = ("/commands", "/commands", "/json", "/text/a")[data[0] % 4] if data else "/commands"
    async with visit(app, path) as peer:
        for frame in data[1:].split(b"\x00"):
            peer.say(_message(frame))
    assert peer.close_code is None or peer.close_code in CODES, peer.close
    assert manager.connections == []
    assert manager.stats().channels == 0
    for _ in range(3):
        await asyncio.sleep(0)


def _message(frame: bytes) -> str | bytes:
    # The first byte says what it is; a text frame's bytes are UTF-8, which the server has seen to.
    if not frame or frame[0] >= 0x80:
        return frame
    return TEMPLATES[frame[0] % len(TEMPLATES)].replace("?", frame[1:].decode("utf-8", "replace"))


if __name__ == "__main__":
    fuzz(check)
