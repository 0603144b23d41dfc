"""The mistakes in a message, as clients are told: where, and a code, but nothing of what they sent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, TypedDict, get_args, get_type_hints

from pydantic import ValidationError
from pydantic_core import SchemaValidator, core_schema

from wsbroadcast.typed.discriminators import is_typed_dict

MAX_MISTAKES = 16
"""The most mistakes that are named."""

_MAX_COUNTED = 1000
_MAX_LOCATION = 64
_MAX_STEPS = 32
_MAX_TEXT = 256


class Mistake(TypedDict):
    """One mistake, as pydantic describes it."""

    loc: list[str | int]
    """The place, from the outside in: at most 32 steps, each of at most 64 characters."""
    type: str
    """The code of the mistake, such as `missing`."""
    msg: str
    """What was expected, in English."""


class Invalid(Exception):
    """Raised for a message that isn't of its types."""

    def __init__(self, mistakes: Sequence[Mistake], count: int | None = None) -> None:
        self.mistakes = list(mistakes)
        """The first mistakes, at most 16."""
        self.count = len(self.mistakes) if count is None else count
        """The number of all mistakes."""
        super().__init__("the message isn't of its type")

    @property
    def text(self) -> str:
        """The mistakes in one line, for the person who made the message."""
        named = "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}" if each["loc"] else each["msg"]
            for each in self.mistakes[:5]
        )
        return named if self.count <= len(self.mistakes[:5]) else f"{named}; and more"


# Mistakes whose text contains parts of the type, but nothing of what came. All other texts with contents lose them: for
# example, the text of a validator of the app may contain anything.
_ABOUT_TYPES = frozenset(
    {
        "bytes_too_long",
        "bytes_too_short",
        "dataclass_exact_type",
        "dataclass_type",
        "decimal_max_digits",
        "decimal_max_places",
        "decimal_whole_digits",
        "enum",
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "literal_error",
        "model_attributes_type",
        "model_type",
        "multiple_of",
        "string_pattern_mismatch",
        "string_too_long",
        "string_too_short",
        "too_long",
        "too_short",
        "union_tag_not_found",
        "url_scheme",
        "url_too_long",
        "uuid_version",
    }
)

_TEXTS = {
    "assertion_error": "Assertion failed",
    "bytes_invalid_encoding": "Data should be valid in its encoding",
    "date_from_datetime_parsing": "Input should be a valid date or datetime",
    "date_parsing": "Input should be a valid date in the format YYYY-MM-DD",
    "datetime_from_date_parsing": "Input should be a valid datetime or date",
    "datetime_parsing": "Input should be a valid datetime",
    "json_invalid": "Invalid JSON",
    "time_delta_parsing": "Input should be a valid timedelta",
    "time_parsing": "Input should be in a valid time format",
    "union_tag_invalid": "Input tag is none of those expected",
    "url_parsing": "Input should be a valid URL",
    "url_syntax_violation": "Input violated strict URL syntax rules",
    "uuid_parsing": "Input should be a valid UUID",
    "value_error": "Value error",
}


def mistakes_of(error: ValidationError) -> list[Mistake]:
    """Return the first mistakes that pydantic has found. If there are more than 1,000, only that is returned.

    The text of an app's own `ValueError` is left out, because it may repeat what came. A `PydanticCustomError` without
    a context keeps its text: type checkers require a literal there.
    """
    if error.error_count() > _MAX_COUNTED:  # reading them would take longer than finding them
        return [Mistake(loc=[], type="too_many_errors", msg=f"More than {_MAX_COUNTED:,} mistakes")]
    found = error.errors(include_url=False, include_input=False)[:MAX_MISTAKES]
    return [
        Mistake(
            loc=_cut(mistake["loc"]),
            type=mistake["type"],
            msg=(
                mistake["msg"][:_MAX_TEXT]
                if "ctx" not in mistake or mistake["type"] in _ABOUT_TYPES
                else _TEXTS.get(mistake["type"], "Input is not valid")
            ),
        )
        for mistake in found
    ]


def not_finite(loc: Iterable[str | int]) -> Mistake:
    """Return the mistake of a number that JSON can't carry back, as pydantic describes it."""
    return Mistake(loc=_cut(tuple(loc)), type="finite_number", msg="Input should be a finite number")


def _cut(loc: tuple[str | int, ...]) -> list[str | int]:
    return [each[:_MAX_LOCATION] if isinstance(each, str) else each for each in loc[:_MAX_STEPS]]


def cause_of(error: ValidationError) -> BaseException | None:
    """Return the error that the app's own code has raised, in a validator or a property; `None` if there is none.

    Pydantic's own error repeats the message, and would bring it into a log.
    """
    if error.error_count() <= _MAX_COUNTED:
        for each in error.errors(include_url=False, include_input=False):
            raised = each.get("ctx", {}).get("error")
            if isinstance(raised, BaseException):
                return raised
            if each["type"] == "get_attribute_error":
                return AttributeError(raised)
    return None


# The number of mistakes.


@cache
def _containers() -> frozenset[str]:
    # The kinds of schemas that can stop at their first mistake. They differ between versions of pydantic.
    schemas = [each for each in vars(core_schema).values() if is_typed_dict(each)]
    return frozenset(
        get_args(get_type_hints(each)["type"])[0] for each in schemas if "fail_fast" in each.__annotations__
    )


def bounded(schema: Any) -> SchemaValidator:
    """Return a validator of a type that stops at the first mistake in a list or another container.

    Otherwise 64 KiB of JSON could have a million mistakes, which take seconds and hundreds of megabytes.

    Args:
        schema: The core schema of the type.
    """
    stopping = _stopping(schema)
    try:
        # Models have a validator of their own, which would be used in place of this schema.
        return SchemaValidator(stopping, _use_prebuilt=False)
    except TypeError:  # before pydantic 2.13 it can't be prevented that those of models are used
        return SchemaValidator(stopping)


def _stopping(schema: Any) -> Any:
    if isinstance(schema, (list, tuple)):
        return type(schema)(map(_stopping, schema))
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if not isinstance(kind, str):  # a dict of schemas, by the names of fields or by tags
        return {name: _stopping(each) for name, each in schema.items()}
    found = {key: each if key in _KEPT else _stopping(each) for key, each in schema.items()}
    return found | {"fail_fast": True} if kind in _containers() else found


# Parts of a schema that are not schemas, and may be anything.
_KEPT = ("metadata", "serialization", "default", "config", "expected", "members")
