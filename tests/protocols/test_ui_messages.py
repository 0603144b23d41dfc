"""The UI message stream: the same parts for every viewer, and nothing that a strict client doesn't know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsbroadcast import StreamEntry
from wsbroadcast.protocols.ui_messages import UIMessages
from wsbroadcast.publication import Position
from wsbroadcast.streams.entries import End, EndState, Part, Reader

CALL = {"type": "tool_call", "id": "t", "name": "search", "input": {"q": 1}}
RESULT = {"type": "tool_result", "id": "t", "output": None}


def entry(what: str | dict[str, Any] | End) -> StreamEntry:
    at = Position("run", 1)
    if isinstance(what, str):
        return StreamEntry("text", at, text=what)
    if isinstance(what, End):
        return StreamEntry("end", at, state=what.state, error=what.error)
    return StreamEntry("data", at, data=what)


def chunks(written: bytes) -> list[Any]:
    events = [event.removeprefix("data: ") for event in written.decode().split("\n\n")[:-1]]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def told(*what: str | dict[str, Any] | End, **options: Any) -> list[Any]:
    return chunks(UIMessages("m", **options).events([entry(each) for each in what]))


def test_text_is_a_part_between_data() -> None:
    assert told("a", "b", CALL, RESULT, "c", End("done")) == [
        {"type": "start", "messageId": "m"},
        {"type": "text-start", "id": "1"},
        {"type": "text-delta", "id": "1", "delta": "a"},
        {"type": "text-delta", "id": "1", "delta": "b"},
        {"type": "text-end", "id": "1"},
        {"type": "tool-input-available", "toolCallId": "t", "toolName": "search", "input": {"q": 1}, "dynamic": True},
        {"type": "tool-output-available", "toolCallId": "t", "output": None, "dynamic": True},
        {"type": "text-start", "id": "2"},
        {"type": "text-delta", "id": "2", "delta": "c"},
        {"type": "text-end", "id": "2"},
        {"type": "finish"},
        "[DONE]",
    ]


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (End("done"), {"type": "finish"}),
        (End("cancelled"), {"type": "abort"}),
        (End("error", "no credit"), {"type": "error", "errorText": "no credit"}),
        (End("error"), {"type": "error", "errorText": "the producer failed"}),
        (End("lost"), {"type": "error", "errorText": "the server that produced this answer is gone"}),
    ],
)
def test_every_end_has_its_chunk(end: End, last: dict[str, Any]) -> None:
    assert told({"type": "reasoning", "text": "x"}, end)[-3:] == [{"type": "reasoning-end", "id": "1"}, last, "[DONE]"]


def test_viewer_that_is_sent_away_is_not_told_that_it_is_done() -> None:
    messages = UIMessages("m")
    assert chunks(messages.events([])) == [{"type": "start", "messageId": "m"}]
    assert messages.events([]) == b""
    (last,) = chunks(messages.last(1012, "drain"))
    assert last["type"] == "error"


@pytest.mark.parametrize(
    ("data", "type_"),
    [
        ({}, "data-entry"),
        ({"type": 7}, "data-entry"),
        ({"type": "two words"}, "data-entry"),
        ({"type": "x\ny"}, "data-entry"),
        ({"type": ""}, "data-entry"),
        ({"type": "weather"}, "data-weather"),
        ({"type": "reasoning"}, "data-reasoning"),
        ({"type": "tool_call", "name": "without an id"}, "data-tool_call"),
        ({"type": "tool_call", "id": 7, "name": "x"}, "data-tool_call"),
        ({"type": "tool_result", "id": "t"}, "data-tool_result"),
        (RESULT, "data-tool_result"),  # of a call that nobody has made: a client would break off
        ({"type": "tool_result", "id": ["t"], "output": 1}, "data-tool_result"),
    ],
)
def test_data_that_is_nothing_else_is_a_part_of_its_own(data: dict[str, Any], type_: str) -> None:
    _, part = told(data)
    id_ = {"id": data["id"]} if isinstance(data.get("id"), str) else {}
    assert part == {"type": type_, "data": data, **id_}


def test_app_may_make_the_chunks() -> None:
    def parts(data: dict[str, Any]) -> Iterable[dict[str, Any]] | None:
        return [data["chunk"]] if "chunk" in data else None

    source = {"type": "source-url", "sourceId": "1", "url": "https://example.org"}
    reasoning = {"type": "reasoning", "text": "hm"}
    found = told({"chunk": source}, {"x": 1}, reasoning, parts=parts)
    assert found[1:3] == [source, {"type": "data-entry", "data": {"x": 1}}]
    assert [chunk["type"] for chunk in found[3:]] == ["reasoning-start", "reasoning-delta"]
    assert told("a", CALL, parts=lambda data: [])[-1] == {"type": "text-end", "id": "1"}


WHAT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.sampled_from([CALL, RESULT, {"type": "reasoning", "text": "r"}, {"x": 1}]),
)


def joined(written: list[Any]) -> list[Any]:
    """Put together what was written of one part."""
    found: list[Any] = []
    for chunk in written:
        if "delta" in chunk and "delta" in found[-1]:  # its start, or its end, comes between two parts
            found[-1]["delta"] += chunk["delta"]
        else:
            found.append(chunk)
    return found


@given(st.lists(st.lists(WHAT)), st.sampled_from(["done", "error", "cancelled", "lost"]))
def test_every_viewer_sees_the_same_parts(parts: list[list[str | dict[str, Any]]], state: EndState) -> None:
    # One that was there from the beginning, and one that reads all of it at the end.
    live, late = (Reader("run"), UIMessages("m")), (Reader("run"), UIMessages("m"))
    at, written = 0, b""
    for entries in parts:
        part = Part(at, entries, None)
        at += len(entries)
        for reader, _ in (live, late):
            reader.take(part)
        written += live[1].events(live[0].pop())
    for reader, _ in (live, late):
        reader.take(Part(at, [], End(state)))
    written += live[1].events(live[0].pop())
    assert joined(chunks(written)) == joined(chunks(late[1].events(late[0].pop())))
