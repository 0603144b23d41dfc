"""What the log of a run holds, and what a viewer gets. No I/O.

Each publication in a run's log holds the entries that came within a moment, as JSON:

    {"at":12,"entries":["some text",{"tool":"search"}],"end":{"state":"done"}}

`at` is how many entries come before these. Text is a string, data an object. A place in a run is the number of entries
before it. So a publication that comes twice adds nothing, and a missing one is noticed. The first `end` counts. What
comes after it was written by a producer that others had given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json, to_json

from wsbroadcast.exceptions import EncodeError
from wsbroadcast.publication import Described, Position

MAX_CHARACTERS = 256 * 1024
"""The most characters that are joined into one text: many clients refuse a message of more than a mebibyte."""

# Shorter data can't be nested so deeply, and can't have so long a number, that a reader refuses it.
_READABLE_BYTES = 300

State = Literal["running", "done", "error", "cancelled", "lost"]
"""The state of a stream. Its producer is running, has ended, raised an error, was told to stop, or is gone."""

EndState = Literal["done", "error", "cancelled", "lost"]
"""How a stream has ended."""

_ENDS: dict[object, EndState] = {"done": "done", "error": "error", "cancelled": "cancelled", "lost": "lost"}


class End(NamedTuple):
    """How a run has ended."""

    state: EndState
    """The state that it ended in."""
    error: str = ""
    """What went wrong, for viewers."""

    def to_json(self) -> dict[str, str]:
        """Return the end as it is written."""
        return {"state": self.state, "error": self.error} if self.error else {"state": self.state}

    @classmethod
    def of(cls, found: object) -> End | None:
        """Read an end that was written; `None` if it is something else."""
        match found:
            case {"state": state, **rest} if (known := _ENDS.get(state)) is not None:
                error = rest.get("error", "")
                return cls(known, error if isinstance(error, str) else "")
        return None


class StreamEntry(Described):
    """What a viewer of a stream gets: text, data, or the end. A route may return it as it is."""

    __slots__ = ("data", "error", "position", "state", "text", "type")

    def __init__(
        self,
        type_: Literal["text", "data", "end", "reset"],
        position: Position,
        text: str = "",
        data: Any = None,
        state: EndState | None = None,
        error: str = "",
    ) -> None:
        self.type = type_
        """`text`, `data` or `end`; or `reset`, if what was seen before is of another run, and the whole run follows."""
        self.position = position
        """Where the viewer is after this entry. Pass it as `since` to go on."""
        self.text = text
        """For `text`: what the producer wrote. Texts that follow one another are joined."""
        self.data = data
        """For `data`: what the producer wrote, as it is in JSON."""
        self.state = state
        """For `end`: how the stream has ended."""
        self.error = error
        """For `end`: what went wrong."""

    def to_json(self) -> bytes:
        """Return the entry as JSON."""
        if self.type == "text":  # nearly always
            return b'{"type":"text","text":%b,"position":"%b"}' % (to_json(self.text), self.position.encode())
        return to_json(self)

    def keys(self) -> Iterable[str]:
        """Return the names of what is written as JSON."""
        yield "type"
        if self.type in ("text", "data"):
            yield self.type
        elif self.type == "end":
            yield "state"
            if self.error:
                yield "error"
        yield "position"

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StreamEntry) and dict(self) == dict(other)

    __hash__ = None  # type: ignore[assignment]  # it holds any data that the producer wrote

    def __repr__(self) -> str:
        return f"<StreamEntry {dict(self)!r:.200}>"


class Part(NamedTuple):
    """What one publication of a log holds."""

    at: int
    """How many entries come before these."""
    entries: Sequence[str | dict[str, Any]]
    """Text and data, in order."""
    end: End | None
    """How the run has ended after them; `None` if it hasn't."""


def write_part(at: int, entries: Sequence[bytes], end: End | None) -> bytes:
    """Return the payload of a publication.

    Args:
        at: How many entries come before these.
        entries: The entries, each as JSON.
        end: How the run has ended; `None` if it hasn't.
    """
    ended = b"" if end is None else b',"end":' + to_json(end.to_json())
    return b'{"at":%d,"entries":[%b]%b}' % (at, b",".join(entries), ended)


def read_part(payload: bytes) -> Part | None:
    """Read the payload of a publication; `None` if it is something else. The bytes are untrusted."""
    try:
        found = from_json(payload)
    except ValueError:
        return None
    match found:
        case {"at": int() as at, "entries": list() as entries, **rest} if at >= 0:
            if all(type(each) in (str, dict) for each in entries):
                return Part(at, entries, End.of(rest.get("end")))
    return None


def text_json(text: str) -> bytes:
    """Return text as JSON. Half of a surrogate pair, which UTF-8 can't carry, becomes a question mark."""
    try:
        return to_json(text)
    except ValueError:
        return to_json(text.encode("utf-8", "replace").decode())


def check_readable(data: bytes) -> None:
    """Check that data that was written as JSON can be read: readers refuse some of what the writer takes.

    Raises:
        EncodeError: If it is nested too deeply, or has a number with too many digits.
    """
    if len(data) < _READABLE_BYTES:
        return
    try:
        from_json(write_part(0, [data], None))
    except ValueError as error:
        raise EncodeError(f"the data can't be read again by viewers: {error}") from error


class Taken(Enum):
    """What a reader did with a part of a log."""

    READ = "read"
    """It was read, now or before."""
    HOLE = "hole"
    """It was not read, because something before it is missing."""


class Reader:
    """Reads the log of one run from its beginning, and returns what a viewer doesn't have yet.

    Args:
        run: The run's id.
        since: How many entries the viewer has seen. The end counts as one.
    """

    def __init__(self, run: str, since: int = 0) -> None:
        self._run = run
        self._since = since
        self.at = 0
        """How many entries were read. The end counts as one."""
        self.end: End | None = None
        """How the run has ended; `None` if that wasn't read yet."""
        # What the viewer doesn't have yet: for text the pieces, in order, and how many characters they have together.
        self._waiting: list[tuple[int, list[str] | dict[str, Any] | End]] = []
        self._characters = 0

    @property
    def position(self) -> Position:
        """The position of a viewer that has everything that was read."""
        return Position(self._run, self.at)

    def take(self, part: Part) -> Taken:
        """Read a part of the log."""
        if self.end is not None:
            return Taken.READ
        if part.entries and part.at > self.at:
            return Taken.HOLE
        for entry in part.entries[self.at - part.at :] if part.entries else ():
            self.at += 1
            if self.at > self._since:
                self._add(entry)
        if part.end is not None:
            self.finish(part.end)
        return Taken.READ

    def finish(self, end: End) -> None:
        """Take note of how the run has ended. Nothing comes after that."""
        if self.end is None:
            self.end = end
            self.at += 1
            if self.at > self._since:
                self._waiting.append((self.at, end))

    def _add(self, entry: str | dict[str, Any]) -> None:
        if isinstance(entry, dict):
            self._waiting.append((self.at, entry))
            return
        self._characters += len(entry)
        pieces = self._waiting[-1][1] if self._waiting else None
        if isinstance(pieces, list) and self._characters <= MAX_CHARACTERS:
            pieces.append(entry)
            self._waiting[-1] = (self.at, pieces)
        else:
            self._waiting.append((self.at, [entry]))
            self._characters = len(entry)

    def pop(self) -> list[StreamEntry]:
        """Return what the viewer doesn't have yet."""
        waiting, self._waiting = self._waiting, []
        return [self._entry(Position(self._run, at), found) for at, found in waiting]

    def _entry(self, position: Position, found: list[str] | dict[str, Any] | End) -> StreamEntry:
        if isinstance(found, End):
            return StreamEntry("end", position, state=found.state, error=found.error)
        if isinstance(found, dict):
            return StreamEntry("data", position, data=found)
        return StreamEntry("text", position, text="".join(found))
