"""Which parts of a type JSON can carry, by pydantic's core schema of the type."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from math import isfinite
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, core_schema, to_json


@dataclass(frozen=True, slots=True)
class Shape:
    """What becomes of a type in JSON."""

    unreadable: str
    """Why it can't be read from JSON, with the name of the field; empty if it can."""
    unwritable: str
    """Why what is written can't be read again; empty if it can."""
    may_be_infinite: bool
    """Whether a number in it may be infinite or NaN. JSON can't carry these back."""


_UNREADABLE = {
    "callable": "a function is not JSON",
    "is-instance": "pydantic takes any object of this class, and none is JSON: give it a schema, or use a model",
    "is-subclass": "a class is not JSON",
    "generator": "an iterable is read only while it is used: write list[…]",
}

_NO_KEYS = ("list", "tuple", "set", "frozenset", "dict", "model", "dataclass", "typed-dict")

# Schemas that may give an infinite float: pydantic reads 1e999 as one, and the text "inf".
_INFINITE = ("float", "any", "decimal", "function-plain")


def shape_of(schema: Any) -> Shape:
    """Examine the core schema of a type."""
    unreadable = unwritable = ""
    may_be_infinite = False
    for place, each, is_written in _parts(schema):
        kind = each["type"]
        if not unreadable and (reason := _UNREADABLE.get(kind) or _hindrance(each)):
            unreadable = _said(place, each, reason)
        if is_written and not unwritable and (reason := _loss(each)):
            unwritable = _said(place, each, reason)
        if kind in _INFINITE and each.get("allow_inf_nan", kind != "decimal"):
            may_be_infinite = True
        if _allows_more(each):
            may_be_infinite = True
    return Shape(unreadable, unwritable, may_be_infinite)


def _allows_more(schema: dict[str, Any]) -> bool:
    # Whether a record may have fields that its type doesn't name.
    return "allow" in (schema.get("extra_behavior"), schema.get("config", {}).get("extra_fields_behavior"))


def _hindrance(schema: dict[str, Any]) -> str:
    if schema["type"] == "dict" and schema.get("keys_schema", {}).get("type") in _NO_KEYS:
        return "a key of an object is a text"
    if schema["type"] == "literal":
        return next(filter(None, map(_unreachable, schema["expected"])), "")
    if schema["type"] == "function-plain":
        function = schema["function"].get("function")
        if getattr(function, "__name__", "") == "import_string":
            return "a client would say what is imported here"
    return ""


def _unreachable(value: Any) -> str:
    # Only some versions of pydantic can read the literal of an enum's member that is neither a text nor a number.
    if isinstance(value, Enum) and not isinstance(value, (str, int)):
        try:
            SchemaValidator(core_schema.literal_schema([value])).validate_json(to_json(value))
        except ValidationError:
            return f"JSON can't be the literal {type(value).__name__}.{value.name}: make it a StrEnum"
    return ""


def _loss(schema: dict[str, Any]) -> str:
    if schema["type"] == "json" and "serialization" not in schema:
        return "a Json is read from a text, and is not written as one"
    inside = schema.get("python_schema", {}).get("function", {})
    ways = (schema.get("serialization", {}).get("function"), inside.get("function"))
    if any(getattr(each, "__module__", "") == "pydantic.types" and _is_secretive(each) for each in ways):
        return "a secret is written as asterisks"
    return ""


def _is_secretive(function: Any) -> bool:
    # The names differ between versions of pydantic.
    return "secret" in getattr(function, "__qualname__", "").lower()


def _said(place: tuple[str, ...], schema: dict[str, Any], reason: str) -> str:
    where = ".".join((*place, *filter(None, (_named(schema),))))
    return f"{where}: {reason}" if where else reason


def _named(schema: dict[str, Any]) -> str:
    name: str = getattr(schema.get("cls"), "__name__", "")
    return name


# In these schemas only one side is about JSON. The keys below aren't about the values that come.
_SIDES = {"json-or-python": "json_schema", "lax-or-strict": "lax_schema"}
_NOT_ABOUT_VALUES = ("metadata", "serialization", "default", "config", "computed_fields")


def _parts(
    schema: Any, place: tuple[str, ...] = (), *, is_written: bool = True
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], bool]]:
    # Yield each schema inside a schema, with the names of its model and its field, and whether it decides how its value
    # is written.
    if isinstance(schema, (list, tuple)):
        for each in schema:
            yield from _parts(each, place, is_written=is_written)
    if not isinstance(schema, dict):
        return
    inner = dict.items(schema)
    kind = schema.get("type")
    if isinstance(kind, str):
        yield place, schema, is_written
        is_written = is_written and "serialization" not in schema
        if kind in ("model", "dataclass", "typed-dict"):
            place = (_named(schema),)
        if kind in _SIDES:
            inner = {"": schema[_SIDES[kind]]}.items()
        elif kind == "chain":  # the first step reads what comes
            inner = {"": schema["steps"][0]}.items()
    for key, each in inner:
        if key == "fields" and isinstance(each, dict):
            for name, field in each.items():
                yield from _parts(field, (*place[:1], name), is_written=is_written)
        elif key == "fields":  # those of a dataclass are in a list, and have their names inside
            for field in filter(lambda found: isinstance(found, dict), each):
                yield from _parts(field, (*place[:1], field["name"]), is_written=is_written)
        elif key not in _NOT_ABOUT_VALUES and isinstance(each, (dict, list, tuple)):
            yield from _parts(each, place, is_written=is_written)


# Infinities in messages that were read.


_HARMLESS = frozenset({str, int, bool, type(None), bytes})

Path = tuple["str | int", ...]


class Finite:
    """Looks for infinities and NaN in the messages of a type, only in the fields where there may be any.

    Args:
        schema: The core schema of a model, a dataclass or a `TypedDict`, or of anything else.
    """

    __slots__ = ("_aliases", "_fields", "is_needed")

    def __init__(self, schema: Any) -> None:
        self.is_needed = shape_of(schema).may_be_infinite
        """Whether there may be any at all."""
        fields = _fields_of(schema) if self.is_needed else {}
        # The names of the fields where there may be any; `None` if everything has to be searched.
        self._fields = None if fields is None else tuple(filter(lambda name: _may_be_infinite(fields[name]), fields))
        aliases = {name: each.get("validation_alias") for name, each in (fields or {}).items()}
        self._aliases = {name: alias for name, alias in aliases.items() if isinstance(alias, str)}

    def find(self, value: Any) -> Path | None:
        """Return the place of the first one, in the names that clients know; `None` if there is none."""
        if self._fields is None:
            return infinity_in(value)
        held = value if type(value) is dict else getattr(value, "__dict__", None)
        for name in self._fields:
            inner = getattr(value, name, None) if held is None else held.get(name)
            if type(inner) is float:
                if isfinite(inner):
                    continue
                path: Path | None = ()
            else:
                path = None if inner is None else infinity_in(inner)
            if path is not None:
                return (self._aliases.get(name, name), *path)
        return None


def _may_be_infinite(schema: Any) -> bool:
    # References to definitions aren't followed, so behind them there may be any.
    return any(each["type"] == "definition-ref" for _, each, _ in _parts(schema)) or shape_of(schema).may_be_infinite


def _fields_of(schema: Any) -> dict[str, Any] | None:
    # The fields of a record; `None` if it is not a record, or may have other fields.
    while not _allows_more(schema):
        match schema["type"]:
            case "model-fields" | "typed-dict":
                return dict(schema["fields"])
            case "dataclass-args":
                return {each["name"]: each for each in schema["fields"]}
            case "model" | "dataclass" | "definitions" | "function-before" | "function-after" | "function-wrap":
                if schema.get("root_model"):
                    return None
                schema = schema["schema"]
            case _:
                return None
    return None


def infinity_in(value: Any) -> Path | None:
    """Return the place of an infinity or NaN in a value; `None` if there is none."""
    kind = type(value)
    if kind in _HARMLESS:
        return None
    if kind is float:
        return None if isfinite(value) else ()
    if isinstance(value, dict):
        return _first(value.items())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return _first(enumerate(value))
    if kind is Decimal:
        return None if value.is_finite() else ()
    if hasattr(kind, "__pydantic_validator__") or hasattr(kind, "__dataclass_fields__"):
        held = getattr(value, "__dict__", None)
        if held is None:  # a dataclass with slots
            held = {name: getattr(value, name) for name in kind.__dataclass_fields__}
        more = getattr(value, "__pydantic_extra__", None)
        return _first((held | more).items() if more else held.items())
    return None


def _first(inside: Any) -> Path | None:
    for step, inner in inside:
        if type(inner) not in _HARMLESS and (path := infinity_in(inner)) is not None:
            return (step if isinstance(step, (str, int)) else "", *path)
    return None
