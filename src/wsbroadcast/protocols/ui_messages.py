"""The UI message stream of the Vercel AI SDK, version 1: what `useChat` reads of a run. No I/O.

```
data: {"type":"start","messageId":"Vq8…"}                       the run's id, for all viewers
data: {"type":"text-start","id":"1"}
data: {"type":"text-delta","id":"1","delta":"some text"}
data: {"type":"text-end","id":"1"}                              data follows, or the end
data: {"type":"tool-input-available","toolCallId":"a","toolName":"search","input":{"q":"tea"},"dynamic":true}
data: {"type":"tool-output-available","toolCallId":"a","output":["…"],"dynamic":true}
data: {"type":"data-weather","data":{"type":"weather","city":"Oslo"}}
data: {"type":"finish"}                                         or "abort", or "error" with an errorText
data: [DONE]
```

Its parts are numbered by the entries before them, not by how text was joined on its way, so every viewer sees the same
ids. Some versions of the SDK treat a field that they don't know as an error. So no field is added, and no position.
The chunks are described in https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic_core import to_json

from wsbroadcast.protocols import sse
from wsbroadcast.streams.entries import StreamEntry

Chunk = Mapping[str, Any]
"""One chunk of the protocol."""

Parts = Callable[[dict[str, Any]], Iterable[Chunk] | None]
"""Makes chunks from data that a producer has appended. `None` stands for the default chunks."""

HEADERS = {"x-vercel-ai-ui-message-stream": "v1"}
"""The headers by which a client recognizes the protocol."""

_LOST = "the server that produced this answer is gone"
_FAILED = "the producer failed"
_SENT_AWAY = "the connection has ended before the answer; resume it"

_NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)


_DONE = b"data: [DONE]\n\n"


class UIMessages:
    """Writes the entries of one run, from its beginning, for one viewer.

    Args:
        message_id: The id of the message. It is the same for all viewers of the run.
        parts: Makes chunks from data.
    """

    def __init__(self, message_id: str, parts: Parts | None = None) -> None:
        self._begin = _event({"type": "start", "messageId": message_id})
        self._parts = parts
        # The kind of the part that is open, and how many parts there were.
        self._open = ""
        self._part = 0
        # The ids of the tool calls so far: a client breaks off at a result without a call.
        self._calls: set[str] = set()

    def events(self, entries: Sequence[StreamEntry]) -> bytes:
        """Return entries as events. The first time, the start comes before them."""
        begin, self._begin = self._begin, b""
        done = _DONE if entries and entries[-1].type == "end" else b""
        return begin + b"".join(_event(chunk) for each in entries for chunk in self._chunks(each)) + done

    def last(self, code: int, reason: str) -> bytes:
        """Return the last event for a viewer that is sent away. Without it, clients take the end for the answer's."""
        return _event({"type": "error", "errorText": _SENT_AWAY})

    def _chunks(self, entry: StreamEntry) -> Iterable[Chunk]:
        match entry.type:
            case "text":
                yield from self._text("text", entry.text)
            case "data":
                yield from self._data(entry.data)
            case "end":
                yield from self._close()
                yield _end(entry)

    def _data(self, data: dict[str, Any]) -> Iterable[Chunk]:
        chunks = None if self._parts is None else self._parts(data)
        match data:
            case {"type": "reasoning", "text": str() as text} if chunks is None:
                yield from self._text("reasoning", text)
                return
        yield from self._close()
        for chunk in [_default(data)] if chunks is None else chunks:
            match chunk:
                case {"type": "tool-input-start" | "tool-input-available", "toolCallId": str() as call}:
                    self._calls.add(call)
                case {"type": "tool-output-available" | "tool-output-error", "toolCallId": str() as call}:
                    if call not in self._calls:
                        chunk = _part(data)
            yield chunk

    def _text(self, kind: str, text: str) -> Iterable[Chunk]:
        if self._open != kind:
            yield from self._close()
            self._open = kind
            self._part += 1
            yield {"type": f"{kind}-start", "id": str(self._part)}
        if text:
            yield {"type": f"{kind}-delta", "id": str(self._part), "delta": text}

    def _close(self) -> Iterable[Chunk]:
        if self._open:
            yield {"type": f"{self._open}-end", "id": str(self._part)}
            self._open = ""


def _event(chunk: Chunk) -> bytes:
    return sse.event(to_json(chunk))


def _end(entry: StreamEntry) -> Chunk:
    match entry.state:
        case "done":
            return {"type": "finish"}
        case "cancelled":
            return {"type": "abort"}
        case "lost":
            return {"type": "error", "errorText": entry.error or _LOST}
    return {"type": "error", "errorText": entry.error or _FAILED}


def _default(data: dict[str, Any]) -> Chunk:
    # Return the chunk for a tool call, for its result, or for any other data.
    match data:
        case {"type": "tool_call", "id": str() as call, "name": str() as name}:
            named = {"type": "tool-input-available", "toolCallId": call, "toolName": name}
            return {**named, "input": data.get("input"), "dynamic": True}
        case {"type": "tool_result", "id": str() as call, "error": str() as error}:
            return {"type": "tool-output-error", "toolCallId": call, "errorText": error, "dynamic": True}
        case {"type": "tool_result", "id": str() as call, "output": output}:
            return {"type": "tool-output-available", "toolCallId": call, "output": output, "dynamic": True}
    return _part(data)


def _part(data: dict[str, Any]) -> Chunk:
    # A part named by its type. If it has an id, a later part with the same id replaces it.
    kind, id_ = data.get("type"), data.get("id")
    name = kind if isinstance(kind, str) and _NAME.fullmatch(kind) else "entry"
    part: dict[str, Any] = {"type": f"data-{name}", "data": data}
    return {**part, "id": id_} if isinstance(id_, str) else part
