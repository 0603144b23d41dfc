"""What a client of the Centrifuge protocol sends: JSON and Protobuf that is wrong, cut off, too deep, too much."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fuzz.harness import fuzz, watched

with watched():
    from wsbroadcast.protocols.centrifuge.codec import JSON, MAX_COMMANDS, PROTOBUF, Malformed


def check(data: bytes) -> None:
    """A frame is read or refused; its payloads can be sent on."""
    frames: list[str | bytes] = [data, data.decode("utf-8", "surrogateescape"), data.decode("utf-8", "replace")]
    for frame in frames:
        for codec in (JSON, PROTOBUF):
            try:
                commands = codec.decode(frame)
            except Malformed:
                continue
            assert 0 < len(commands) <= MAX_COMMANDS
            for command in commands:
                payload = command.get("publish", {}).get("data", b"")
                line = codec.encode({"push": {"channel": "a", "pub": {"data": payload}}})
                assert payload in line or b"\n" in payload


if __name__ == "__main__":
    fuzz(check)
