"""The page about the protocol: every frame that it shows is sent and answered as it says."""

# No postponed annotations: FastAPI reads them.

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI

from tests.support.asgi import eventually
from tests.web.test_events import EventPeer
from wsbroadcast import (
    Access,
    Audience,
    CallError,
    ConnectionManager,
    ErrorCode,
    History,
    Identity,
    Message,
    Position,
    Presence,
    Publication,
    TokenFrom,
    create_router,
    should_reconnect,
)
from wsbroadcast.connection import _NOTICE_SECONDS
from wsbroadcast.options import ClientTiming
from wsbroadcast.protocols import events
from wsbroadcast.protocols.commands import _READERS, MAX_CALLS

PAGE = (Path(__file__).parents[1] / "docs/protocol.md").read_text(encoding="utf-8")
CONVERSATIONS = re.findall(r"```events (\S+)\n(.*?)```", PAGE, re.DOTALL)


async def current_user(token: Annotated[str, Depends(TokenFrom(subprotocol="bearer"))]) -> Identity:
    user, _, seconds = token.partition(".")
    return Identity(user, expires_at=time.time() + float(seconds))


def may(connection: object, action: str, channel: str | None) -> bool:
    return action == "call" or str(channel).startswith("room:")


def make_app(manager: ConnectionManager) -> FastAPI:
    @manager.method("add")
    async def add(a: int, b: int) -> int:
        return a + b

    @manager.method("book")
    async def book() -> None:
        raise CallError("sold_out", "no seats")

    app = FastAPI()
    access = Access(authenticate=current_user, authorize=may)
    app.include_router(create_router(manager, "/ws/{channel}", inbound="commands", access=access))
    return app


def fits(shown: Any, found: Any) -> bool:
    """Tell whether something is as the page shows it, where `…` is any text and a moment any number."""
    if isinstance(shown, dict) and isinstance(found, dict):
        return shown.keys() == found.keys() and all(fits(shown[name], found[name]) for name in shown)
    if isinstance(shown, list) and isinstance(found, list):
        return len(shown) == len(found) and all(map(fits, shown, found))
    if isinstance(shown, str) and "…" in shown:
        return isinstance(found, str) and re.fullmatch(".+".join(map(re.escape, shown.split("…"))), found) is not None
    if isinstance(shown, float) and shown > 10**9:
        return isinstance(found, float) and found > time.time()
    return bool(shown == found)


async def test_every_frame_is_as_the_page_says() -> None:
    assert len(CONVERSATIONS) == 6
    manager = ConnectionManager(history=History(), presence=Presence())
    app = make_app(manager)
    async with manager:
        first = str(await manager.position("room:1"))
        for url, lines in CONVERSATIONS:
            path, _, query = url.partition("?")
            peer = EventPeer(path=path, subprotocols=("wsbroadcast.v1", "bearer", "ada.3600"))
            peer.scope["query_string"] = query.replace("{first}", first).encode()
            task = asyncio.create_task(app(peer.scope, peer.receive, peer.send))
            count = 0
            for line in lines.splitlines():
                direction, _, frame = line.partition(" ")
                if direction == ">":
                    peer.say(frame)
                    continue
                assert direction == "<"
                count += 1
                await eventually(lambda count=count, peer=peer: len(peer.messages) >= count)  # type: ignore[misc]
                assert fits(json.loads(frame), peer.events[count - 1]), (frame, peer.events[count - 1])
            peer.leave()
            await task


def table(heading: str) -> set[str]:
    """The first names of a table's rows under a heading."""
    part = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE))


def test_tables_are_complete() -> None:
    assert table("Errors") - {"code"} == set(ErrorCode)
    assert table("What a client asks for") == _READERS.keys()
    shown = {json.loads(line[2:])["type"] for _, lines in CONVERSATIONS for line in lines.splitlines()}
    assert table("What a client asks for") - {"pong"} <= shown
    told = {"hello", "subscribed", "message", "position", "gap", "presence", "ping", "expiring"}
    assert table("What is sent to a client") == told


def test_numbers_are_those_of_the_code() -> None:
    assert f"At most {MAX_CALLS} at once, for {ClientTiming().call_timeout:g} s each" in PAGE
    assert f"It comes {_NOTICE_SECONDS:g} s before" in PAGE
    codes = [code for code in range(1000, 5000) if should_reconnect(code)]
    assert codes == [1001, 1006, 1011, 1012, 1013, 4001, 4006, 4011, 4012, 4013]
    assert "After the close codes 1001, 1006, 1011, 1012 and 1013" in PAGE


def test_other_frames_are_as_the_page_says() -> None:
    (block,) = re.findall(r"```frames\n(.*?)```", PAGE, re.DOTALL)
    audience, position = Audience.channel("room:1"), Position("kX2dh0Qb7a_Z", 18)
    made = [
        events.events(Publication(Message.of("x"), audience, position=position).withheld()),
        events.gap(audience, "epoch", position),
        events.PING,
        events.expiring(time.time() + 30, 30),
        events.presence_changes("room:1", 7, 9, 2, {"bob": b'{"name":"Bob"}'}, ["eve"], "user"),
        events.presence_count("room:1", 900, 512),
    ]
    for line, message in zip(block.splitlines(), made, strict=True):
        assert fits(json.loads(line), json.loads(message.payload))


@pytest.mark.parametrize(
    ("shown", "found", "is_so"), [("a…", "ab", True), ("a…", "a", False), ([1], [1, 2], False), (1, 2, False)]
)
def test_comparison_can_fail(shown: Any, found: Any, is_so: bool) -> None:
    assert fits(shown, found) is is_so
