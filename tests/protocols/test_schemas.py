"""The schemas of frames: what the page about the protocol shows, which a server has really sent, fits them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.npm import installed, needs_npm, run_script
from wsbroadcast.protocols import schemas
from wsbroadcast.protocols.commands import _READERS, ErrorCode

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")

SENT = {
    **schemas.events({}),
    **schemas.answers(),
    **{each["title"]: each for each in [*schemas.published(is_typed=True), schemas.result({}), schemas.error()]},
}
SAID = {
    **schemas.commands(),
    "publish": schemas.publish({}),
    "call": schemas.call({"type": "string"}, {"type": "object"}, needs_any=False),
}


def frames() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in re.findall(r"^```(?:events[^\n]*|frames)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            direction, text = (line[0], line[1:]) if line[0] in "<>" else ("<", line)
            found.append((direction, json.loads(text)))
    return found


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory, "ajv@8")


def wrong(packages: Path, known: dict[str, Any], values: list[dict[str, Any]]) -> list[Any]:
    closed = [{**each, "additionalProperties": False} for each in known.values()]
    return [
        (values[number], errors)
        for number, errors in run_script(packages, "ajv.mjs", {"schema": {"anyOf": closed}, "values": values})
    ]


@needs_npm
def test_frames_of_the_page_fit(packages: Path) -> None:
    sent = [each for direction, each in frames() if direction == "<"]
    said = [each for direction, each in frames() if direction == ">" and each["type"] != "dance"]
    assert len(sent) > 30
    assert len(said) > 10
    assert wrong(packages, SENT, sent) == []
    assert wrong(packages, SAID, said) == []


@needs_npm
def test_what_no_server_sends_does_not_fit(packages: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"type": "hello"},
        {"type": "message", "channel": "a"},
        {"type": "ping", "more": 1},
        {"type": "gap", "to": "nobody", "reason": "epoch"},
        {"type": "error", "code": 1, "text": ""},
        {"type": "dance"},
    ]
    assert [value for value, _ in wrong(packages, SENT, odd)] == odd


def test_every_command_and_every_event_of_the_page_has_a_schema() -> None:
    assert set(SAID) == set(_READERS)
    shown = {each["type"] for direction, each in frames() if direction == "<"}
    assert shown <= set(SENT)
    assert SENT["error"]["properties"]["code"]["examples"] == [str(code) for code in ErrorCode]


def test_schema_is_written_anew_for_each_caller() -> None:
    one, other = schemas.events({}), schemas.events({})
    one["message"]["properties"]["channel"]["changed"] = True
    assert other == schemas.events({})
