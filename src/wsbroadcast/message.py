"""A message: what was broadcast, checked and encoded once."""

from __future__ import annotations

import json
import marshal
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from inspect import iscoroutinefunction
from math import isfinite
from types import GeneratorType
from typing import Any, Literal, NamedTuple, Protocol
from uuid import UUID

from pydantic_core import PydanticSerializationError, SchemaSerializer, from_json, to_json

from wsbroadcast.exceptions import ConfigurationError, EncodeError, MessageTooLarge, shorten
from wsbroadcast.signatures import check_callable
from wsbroadcast.text import plain

Form = Literal["text", "json", "binary"]
"""What the bytes of a message are. JSON goes out as a text frame."""


JSONDefault = Callable[[Any], Any]
"""Turns an object that JSON doesn't know into something that JSON knows."""


class Encoding(Protocol):
    """Makes the bytes that are written to connections from a message."""

    def encode(self, message: Message) -> bytes:
        """Return the bytes."""


class Message:
    """One message, encoded once. Treat it as immutable.

    A `str` is a text frame, `bytes` a binary one, anything else JSON in a text frame.
    """

    __slots__ = ("_encoded", "form", "key", "payload", "size")

    def __init__(self, payload: bytes, form: Form = "text", *, key: str | None = None) -> None:
        self.payload = payload
        """The bytes of the message, UTF-8 for text and JSON."""
        self.size = len(payload)
        """The payload's size in bytes."""
        self.form = form
        """What the bytes are: `text`, `json` or `binary`."""
        self.key = key
        """Under the policy `conflate`, a newer message to the same audience with the same key replaces this one."""
        # What was made of it for the wire. It is there already when a message is broadcast for the second time.
        self._encoded: dict[Encoding, bytes] = {}

    @classmethod
    def of(cls, value: object, key: str | None = None, *, json_default: JSONDefault | None = None) -> Message:
        """Encode a value. A `Message` is returned as it is, unless it gets another key.

        Args:
            value: `str` is text, `bytes` binary, anything else JSON.
            key: Under the policy `conflate`, a newer message with the same key replaces this one in a backlog.
            json_default: Called with an object that JSON doesn't know; returns what is written instead.

        Raises:
            EncodeError: If the value holds a lone surrogate, NaN or an infinity, if it can't be written as JSON, or if
                the key is not a str.
        """
        if key is not None:
            if not isinstance(key, str):
                raise EncodeError(f"a key is a str, not {type(key).__name__}")
            key = plain(key)
        if isinstance(value, str):
            text = value if type(value) is str else plain(value)
            try:
                return cls(text.encode(), key=key)
            except UnicodeEncodeError as error:
                raise EncodeError(f"text holds a lone surrogate at position {error.start}: not UTF-8") from error
        if isinstance(value, (bytes, bytearray, memoryview)):
            return cls(bytes(value), "binary", key=key)
        if isinstance(value, Message):
            if key is None or key == value.key:
                return value
            return cls(value.payload, value.form, key=key)
        return cls.json(value, key, json_default=json_default)

    @classmethod
    def json(cls, value: object, key: str | None = None, *, json_default: JSONDefault | None = None) -> Message:
        """Encode a value as JSON; a `str` becomes a JSON string.

        Raises:
            EncodeError: If the value holds a lone surrogate, NaN or an infinity, or can't be written as JSON.
        """
        return cls(to_json_bytes(value, json_default), "json", key=key)

    @property
    def is_text(self) -> bool:
        """Whether it goes out as a text frame. Otherwise it is a binary one."""
        return self.form != "binary"

    def _wire(self, encoding: Encoding) -> bytes:
        """Return the message as bytes in an encoding, made once for all connections that share it."""
        encoded = self._encoded.get(encoding)
        if encoded is None:
            encoded = self._encoded[encoding] = encoding.encode(self)
        return encoded

    def _within(self, limit: int) -> Message:
        """Return the message itself, if it isn't larger than a limit in bytes.

        Raises:
            MessageTooLarge: If it is larger.
        """
        if self.size > limit:
            raise MessageTooLarge(self.size, limit)
        return self

    @property
    def data(self) -> str | bytes:
        """The message as a client receives it: `str` for a text frame, `bytes` for a binary one."""
        return self.payload.decode() if self.is_text else self.payload  # not kept: a str may take four times the bytes

    def __repr__(self) -> str:
        return f"<Message {self.form} {self.size} bytes>"  # never the payload: a repr ends up in logs


class Enveloped(Message):
    """A message that a protocol has put into an object of its own, around what was published."""

    __slots__ = ()


# From a value to JSON, or to an error that says what would be lost.


# Values with nothing inside that could be lost, except that a float may be NaN.
_SCALARS: frozenset[type] = frozenset(
    {str, int, float, bool, type(None), bytes, Decimal, UUID, date, datetime, time, timedelta}
)
_LISTS = (list, tuple, deque)
_SETS = (set, frozenset)
_SEQUENCES = (*_LISTS, *_SETS)
_CONTAINERS = (dict, *_SEQUENCES)

# From this many bytes of JSON on, it pays to look at a value in C first.
_LARGE = 2048

# Shows whether SQLModel is in use. Without it rows are hardly ever models, and lists and dicts aren't searched for any.
_MODULES = sys.modules

# Writes any type, for values that stay in Python.
_FOR_PYTHON = SchemaSerializer({"type": "any"})

# The way from a value to something inside it: the steps as they are in the JSON.
Path = tuple["str | int", ...]


def to_json_bytes(value: object, json_default: JSONDefault | None = None) -> bytes:
    """Write a value as JSON in UTF-8.

    Raises:
        EncodeError: If the value holds a lone surrogate, NaN, an infinity, or a row of a database that has expired; or
            if it can't be written as JSON.
    """
    try:
        if type(value) is GeneratorType:
            value = _drained(value)
        # "constants" writes NaN literally. The default would silently turn a NaN into null.
        payload = to_json(value, inf_nan_mode="constants", fallback=json_default)
        # First look for one byte, an N or an I: `in` finds a number ten times as fast as a word.
        if (78 in payload and payload.find(b"NaN") >= 0) or (73 in payload and payload.find(b"Infinity") >= 0):
            _refuse_constants(payload)
        # What a model has lost is null or empty now. Of what a row has lost, a part may still be there.
        has_null = payload.find(b"null") >= 0
        if has_null or payload.find(b"{}") >= 0 or "sqlmodel" in _MODULES or _is_row(type(value)):
            _refuse_losses(value, payload, has_null=has_null)
    except EncodeError:
        raise
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        raise EncodeError(_explanation(value, error, json_default)) from error
    return payload


def write_json(serializer: SchemaSerializer, value: object) -> bytes:
    """Write a value as JSON in UTF-8, in the way that a serializer of pydantic writes its type.

    Raises:
        EncodeError: As for `to_json_bytes`; or if the value is not of that type.
    """
    try:
        payload = serializer.to_json(value, by_alias=True, warnings="error")
        if (78 in payload and payload.find(b"NaN") >= 0) or (73 in payload and payload.find(b"Infinity") >= 0):
            _refuse_constants(payload)
        if payload.find(b"null") >= 0:
            _refuse_hidden_constants(value, payload, partial(serializer.to_json, by_alias=True), serializer)
        if "sqlmodel" in _MODULES or _is_row(type(value)):
            _refuse_expired_rows(value, within_models=payload.find(b"{}") >= 0)
    except EncodeError:
        raise
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split())[:300]
        raise EncodeError(f"{type(value).__name__} can't be written as its type says: {said}") from error
    return payload


def check_json_default(function: object) -> None:
    """Check that a value can be a `json_default`.

    Raises:
        ConfigurationError: If it is not a plain function of one argument.
    """
    if function is None:
        return
    if iscoroutinefunction(function):
        raise ConfigurationError("json_default must be a plain function: nothing is awaited while a message is written")
    check_callable(function, ("value",), "json_default")


def _drained(generator: GeneratorType[Any, Any, Any]) -> list[object]:
    # A generator can be read only once.
    try:
        return list(generator)
    except Exception as error:
        raise EncodeError(f"generator can't be written as JSON, it raises {type(error).__name__}: {error}") from error


def _refuse_losses(value: object, payload: bytes, *, has_null: bool) -> None:
    if _is_plain(value) if len(payload) < _LARGE else _is_plain_and_large(value):
        return
    is_empty = payload.find(b"{}") >= 0
    if is_empty or any(map(_is_row, _kinds(value))):
        _refuse_expired_rows(value, within_models=is_empty)
    if has_null:
        _refuse_hidden_constants(value, payload, partial(to_json, inf_nan_mode="constants"), _FOR_PYTHON)


# What JSON can't carry.


class _Constant(str):
    """NaN or an infinity in a parsed message."""

    __slots__ = ()


def _refuse_constants(payload: bytes) -> None:
    # It may only be text inside a string: a parser tells. The parser must not convert long integers.
    parsed = json.loads(payload, parse_constant=_Constant, parse_int=str)
    for path, constant in _objects(parsed):
        raise EncodeError(f"the message holds {constant}{_at(path)}, which JSON can't carry; send None instead")


def _refuse_hidden_constants(
    value: object, payload: bytes, write: Callable[..., bytes], serializer: SchemaSerializer
) -> None:
    # A pydantic model always writes NaN as null in JSON, but not in what it makes for Python.
    try:
        # Usually a null is just a field that is None.
        if write(value, exclude_none=True).find(b"null") < 0:
            return
        tree = serializer.to_python(value, by_alias=True, warnings=False)
        sent = from_json(payload)
    except Exception:  # a serializer of the app that works only once, or only for JSON: then nobody can tell
        return
    for path, number in _lost(tree, sent):
        if not _is_wished(value, path):
            raise EncodeError(
                f"the message holds {json.dumps(number)}{_at(path)}, which JSON can't carry and the model would write"
                " as null; send None instead, or set ser_json_inf_nan='null' in the config of the model"
            )


def _lost(tree: object, sent: object, path: Path = ()) -> Iterator[tuple[Path, float]]:
    # Yield the numbers of the tree that were sent as null.
    if isinstance(tree, float):
        if sent is None and not isfinite(tree):
            yield path, tree
    elif isinstance(tree, dict) and isinstance(sent, dict):
        if len(tree) == len(sent):  # else two keys have the same text, and nothing can be compared
            for one, (key, other) in zip(tree.values(), sent.items(), strict=True):
                yield from _lost(one, other, (*path, key))
    elif isinstance(tree, _SETS) and isinstance(sent, list):
        for inner in tree if None in sent else ():  # a set has no order
            yield from _lost(inner, None, path)
    elif isinstance(tree, _LISTS) and isinstance(sent, list):
        for number, (one, other) in enumerate(zip(tree, sent, strict=False)):
            yield from _lost(one, other, (*path, number))


def _is_wished(value: Any, path: Path) -> bool:
    # Whether the innermost model around a place wants NaN to be null, or writes JSON by functions of its own.
    is_wished = False
    for step in (*path, None):
        if _is_model(kind := type(value)):
            config = getattr(kind, "model_config", None) or getattr(kind, "__pydantic_config__", None) or {}
            is_wished = config.get("ser_json_inf_nan") == "null" or _writes_json(kind.__pydantic_core_schema__)
            if getattr(kind, "__pydantic_root_model__", False):
                value = value.root
        value = next((inner for key, inner in _inside(value) if key == step), None)
    return is_wished


def _writes_json(schema: object) -> bool:
    if isinstance(schema, (list, tuple)):
        return any(map(_writes_json, schema))
    if not isinstance(schema, dict):
        return False
    way = schema.get("serialization") or {}
    if str(way.get("type")).startswith("function") and str(way.get("when_used")).startswith("json"):
        return True
    return any(_writes_json(inner) for key, inner in schema.items() if key not in ("metadata", "default"))


# Rows of a database. They are known by what SQLAlchemy adds to them.


def _refuse_expired_rows(value: object, *, within_models: bool) -> None:
    # A model writes what it has, and doesn't know what a row would have to load. A row inside another model need not be
    # written by it, so there it counts only if something came out empty.
    for path, row in _objects(value, within_models=within_models):
        if _is_model(type(row)) and (names := _expired(row)):
            raise EncodeError(
                f"{type(row).__name__}{_at(path)} is a row that has expired, as rows do at a commit: it has no"
                f" {', '.join(names[:5])}; refresh it before, or make the session with expire_on_commit=False"
            )


def _expired(row: object) -> list[str]:
    # Not what a query left out on purpose, and not what a row lacks that was never in the database.
    state = _state_of(row)
    if getattr(state, "key", None) is None:
        return []
    fields: dict[str, Any] = getattr(type(row), "model_fields", {})
    expired = getattr(state, "expired_attributes", ())
    return [name for name, field in fields.items() if name in expired and not field.exclude]


def _explanation(value: object, error: Exception, json_default: JSONDefault | None) -> str:
    for path, row in _objects(value, within_models=True):
        if advice := _advice(row):
            return f"{type(row).__name__}{_at(path)} {advice}"
    path, strange = _strange(value, json_default)
    if isinstance(strange, Coroutine):
        strange.close()  # else Python warns later, in another place
        return f"a coroutine{_at(path)} can't be written as JSON: an `await` is missing"
    # One line: errors of a database go on with a statement and its values.
    text = f"{type(strange).__name__}{_at(path)[:200]} can't be written as JSON: {str(error).partition(chr(10))[0]}"
    is_unknown = isinstance(error, PydanticSerializationError) and json_default is None
    return f"{text}; pass json_default= to say how" if is_unknown else text


def _strange(value: object, json_default: JSONDefault | None) -> tuple[Path, object]:
    # Find what inside a value can't be written; return the value itself if that isn't found.
    found: list[object] = []

    def remember(strange: Any) -> Any:
        found.append(strange)
        return strange if json_default is None else json_default(strange)

    with suppress(Exception):
        to_json(value, inf_nan_mode="constants", fallback=remember)
    places = {id(each): path for path, each in _objects(value, within_models=True)}
    return next(((places[id(each)], each) for each in found[-1:] if id(each) in places), ((), value))


def _advice(row: object) -> str:
    kind, state = type(row), _state_of(row)
    fields = getattr(kind, "__dataclass_fields__", None)
    if hasattr(kind, "_mapping") and kind.__module__.startswith("sqlalchemy."):
        return "is a row of a result, which can't be written as JSON: send dict(row._mapping)"
    if state is None or _is_model(kind):
        return ""
    if fields is None:
        return (
            "is a row of SQLAlchemy, which can't be written as JSON: send a dict, or a pydantic model made of it with"
            " from_attributes; if it has expired, as rows do at a commit, refresh it before, or make the session with"
            " expire_on_commit=False"
        )
    missing = ", ".join(sorted(getattr(state, "unloaded", set()) & fields.keys())[:5])
    return missing and (
        f"is a row without its {missing}, which can't be loaded while it is sent: load or refresh it before, or make"
        " the session with expire_on_commit=False"
    )


def _is_row(kind: type) -> bool:
    return "_sa_class_manager" in kind.__dict__


def _state_of(row: object) -> object:
    return getattr(row, "__dict__", {}).get("_sa_instance_state")


# What is inside a value.


def _is_model(kind: type) -> bool:
    return hasattr(kind, "__pydantic_serializer__")


def _is_plain(value: Any) -> bool:
    # Whether it holds only scalars, lists and dicts. This is asked for every message that holds null.
    kind = type(value)
    if kind is dict:
        value = value.values()
    elif kind is not list and kind is not tuple:
        return kind in _SCALARS
    for inner in value:
        kind = type(inner)
        if kind not in _SCALARS:
            if kind is not dict and kind is not list and kind is not tuple:
                return False
            if not _is_plain(inner):
                return False
    return True


def _is_plain_and_large(value: Any) -> bool:
    try:
        marshal.dumps(value)  # in C; it refuses everything else, and dates too
    except ValueError:
        return _is_plain(value)
    return True


def _kinds(value: Any) -> set[type]:
    # The types of everything inside that is neither a scalar nor a container.
    if isinstance(value, _CONTAINERS):
        inside = value.values() if isinstance(value, dict) else value
        kinds = set(map(type, inside)) - _SCALARS
        if not any(issubclass(kind, _CONTAINERS) for kind in kinds):
            return kinds
        return set().union(*map(_kinds, inside))
    return {type(value)}


class _Place(NamedTuple):
    """A step on the way to something inside a value. Steps are shared, because a nesting may be very deep."""

    before: _Place | None
    step: str | int

    @property
    def path(self) -> Path:
        """All steps, from the outside to the inside."""
        steps, place = [self.step], self.before
        while place is not None:
            steps.append(place.step)
            place = place.before
        return tuple(reversed(steps))


def _objects(value: object, *, within_models: bool = False) -> Iterator[tuple[Path, object]]:
    # Everything inside that is neither a scalar nor a container, each once.
    waiting: deque[tuple[_Place | None, object]] = deque([(None, value)])
    seen = set()
    while waiting:
        place, each = waiting.popleft()
        if type(each) in _SCALARS or id(each) in seen:
            continue
        seen.add(id(each))
        if not isinstance(each, _CONTAINERS):
            yield place.path if place else (), each
            if not within_models:
                continue
        waiting.extend((_Place(place, step), inner) for step, inner in _inside(each))


def _inside(value: Any) -> Iterable[tuple[str | int, object]]:
    if isinstance(value, dict):
        return [(_name(key), inner) for key, inner in value.items()]
    if isinstance(value, _SEQUENCES):
        return enumerate(value)
    slots = getattr(type(value), "__dataclass_fields__", None)
    if slots is None and not _is_model(type(value)):
        return ()
    fields = getattr(type(value), "model_fields", {})
    held = getattr(value, "__dict__", None) or {name: getattr(value, name) for name in slots or ()}
    more = getattr(value, "__pydantic_extra__", None) or {}
    return [
        (getattr(fields.get(name), "serialization_alias", None) or name, inner)
        for name, inner in (held | more).items()
        if name != "_sa_instance_state"
    ]


def _name(key: object) -> str:
    try:
        return str(key)
    except ValueError:  # an int with more digits than Python writes
        return f"<{type(key).__name__}>"


def _at(path: Path) -> str:
    # Written as in JavaScript.
    steps = (f".{step}" if isinstance(step, str) and step.isidentifier() else f"[{shorten(step)}]" for step in path)
    return f" at {''.join(steps).removeprefix('.')}" if path else ""
