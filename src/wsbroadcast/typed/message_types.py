"""The types of messages in one direction: one model, or several that a field tells apart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache, partial
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic_core import SchemaError

from wsbroadcast.exceptions import ConfigurationError, kind_of
from wsbroadcast.message import Message, write_json
from wsbroadcast.typed.discriminators import Discriminated, discriminated, is_typed_dict
from wsbroadcast.typed.json_only import Finite, Shape, shape_of
from wsbroadcast.typed.mistakes import Invalid, bounded, cause_of, mistakes_of, not_finite

if TYPE_CHECKING:  # older versions of typing_extensions don't have it
    from typing_extensions import TypeForm

T = TypeVar("T")

SCHEMA_REFERENCE = "#/components/schemas/{model}"
"""Where the schemas of models are in OpenAPI and AsyncAPI."""


class MessageTypes(Generic[T]):
    """The types that messages may have. It is made once from an annotation. Then pydantic reads and writes by it.

    One field tells the members of a union apart: each member has a literal there. If the annotation has a discriminator
    of pydantic's, that is used. Otherwise it is a field that all members have, preferably `type`.

    Args:
        annotation: A model, a dataclass, a `TypedDict`, a union of these, or anything else that pydantic reads from
            JSON.
        name: What an error calls it, such as `receives`.

    Raises:
        ConfigurationError: If pydantic can't read the annotation, if nothing tells its members apart, or if one of its
            fields can't come as JSON.
    """

    def __init__(self, annotation: TypeForm[T], name: str = "the type of messages") -> None:
        self.annotation: Any = annotation
        """The annotation that it was made from."""
        self.name = name
        """What an error calls it."""
        if isinstance(annotation, (str, list, tuple, set, dict, BaseModel)):
            raise ConfigurationError(f"{name} is a type, such as Say, or Say | Typing, not {kind_of(annotation)}")
        found: Discriminated = discriminated(annotation, name)
        self.members: tuple[Any, ...] = found.members
        """The members of the union; for anything else, that alone."""
        self._classes = frozenset(self.members)
        self.discriminator: str | None = found.field
        """The field that tells the members apart, by its name in Python. `None` if there is only one member, or if
        pydantic has a function for it."""
        self.tags: Mapping[Any, Any] = MappingProxyType(found.tags)
        """The member for each value of that field, or for each result of that function."""
        self._tag_of = found.function or partial(_field_of, found.field)
        try:
            self.adapter: TypeAdapter[T] = TypeAdapter(found.annotation)
            """The adapter that pydantic makes of the annotation, with the discriminator."""
            schema: dict[str, Any] = {**self.adapter.core_schema}  # fails here if it contains an unknown name
        except (PydanticUserError, PydanticUndefinedAnnotation, SchemaError, NameError, TypeError) as error:
            raise ConfigurationError(f"pydantic can't read {name}: {_first_line(error)}") from error
        self._shape: Shape = shape_of(schema)
        if self._shape.unreadable:
            raise ConfigurationError(f"{name} can't come as JSON: {self._shape.unreadable}")
        self._check_documented()
        # By class of the message: what looks for infinities in it.
        self._finite = self._finite_by_class(schema)
        # Faster than the adapter's own method, which is written in Python.
        self._validate_json = bounded(schema).validate_json
        self._validate_python = self.adapter.validator.validate_python

    @classmethod
    def of(cls, annotation: TypeForm[T], name: str = "the type of messages") -> MessageTypes[T]:
        """Return the types of an annotation. They are made only once, if the annotation can be remembered.

        Raises:
            ConfigurationError: As for the class.
        """
        found: Any = annotation
        try:
            hash(found)
        except TypeError:  # an `Annotated` may have any metadata, so it may not be hashable
            return cls(found, name)
        return _remembered(found, name)

    def check_sendable(self) -> None:
        """Check that what is written can be read again.

        Raises:
            ConfigurationError: If a field is written as something else, like a `SecretStr`.
        """
        if self._shape.unwritable:
            raise ConfigurationError(f"{self.name} can't be sent as JSON: {self._shape.unwritable}")

    # Reading and writing.

    def read(self, raw: str | bytes) -> T:
        """Return the message in a text of JSON.

        Raises:
            Invalid: If it is of none of these types. The error holds nothing of it.
            Exception: What a validator raises that pydantic doesn't turn into a mistake.
        """
        try:
            value = self._validate_json(raw)
        except ValidationError as error:
            raise Invalid(mistakes_of(error), error.error_count()) from None
        finite = self._finite.get(type(value), self._all_finite)
        if finite is not None and (path := finite.find(value)) is not None:
            tag = self._tag_of(value)  # because pydantic's locations begin with it
            raise Invalid([not_finite(path if tag is None else (tag, *path))])
        return value  # type: ignore[no-any-return]

    def check(self, value: object) -> T:
        """Return the message in an object: one of these types, a dict, or any object with their attributes.

        Raises:
            Invalid: If it is of none of these types.
            Exception: What a validator raises that pydantic doesn't turn into a mistake.
        """
        try:
            return self._validate_python(value, from_attributes=True)  # type: ignore[no-any-return]
        except ValidationError as error:
            raise Invalid(mistakes_of(error), error.error_count()) from cause_of(error)

    def write(self, value: T, key: str | None = None) -> Message:
        """Return a message as it is sent, with the aliases of its fields, and only the fields of its type.

        Raises:
            EncodeError: If it holds NaN or an infinity, or can't be written.
        """
        return Message(write_json(self.adapter.serializer, value), "json", key=key)

    def member_of(self, value: object) -> Any:
        """Return the member of the union that a message is of."""
        if len(self.members) == 1:
            return self.members[0]
        kind = type(value)
        return kind if kind in self._classes else self.tags.get(self._tag_of(value), kind)

    # For documents.

    def json_schema(
        self, mode: Literal["validation", "serialization"] = "validation", ref_template: str = SCHEMA_REFERENCE
    ) -> dict[str, Any]:
        """Return the JSON schema of these messages. Those of their models are under `$defs`.

        Args:
            mode: `validation` for what is read, `serialization` for what is written.
            ref_template: The form of references to models.
        """
        with warnings.catch_warnings():  # a default value that JSON doesn't know is left out
            warnings.simplefilter("ignore")
            return self.adapter.json_schema(mode=mode, ref_template=ref_template)

    def _finite_by_class(self, schema: dict[str, Any]) -> dict[type, Finite]:
        self._all_finite: Finite | None = None
        if not self._shape.may_be_infinite:
            return {}
        found = {}
        for member in self.members:
            kind = dict if is_typed_dict(get_origin(member) or member) else get_origin(member) or member
            finite = Finite(TypeAdapter(member).core_schema)
            if len(self.members) == 1 or kind is dict or not isinstance(kind, type):
                self._all_finite = Finite(schema)
            elif finite.is_needed:
                found[kind] = finite
        return found

    def _check_documented(self) -> None:
        # A type without a schema can't be described to anybody. Often it can't be read either.
        try:
            self.json_schema("validation")
            self.json_schema("serialization")
        except PydanticUserError as error:
            raise ConfigurationError(
                f"{self.name} has no JSON schema: {_first_line(error)}; pydantic's WithJsonSchema can give it one"
            ) from error

    def __repr__(self) -> str:
        return f"<MessageTypes {shown(self.annotation)}>"


def _field_of(name: str | None, value: object) -> Any:
    return None if name is None else value.get(name) if isinstance(value, dict) else getattr(value, name, None)


@lru_cache(maxsize=256)
def _remembered(annotation: Any, name: str) -> MessageTypes[Any]:
    return MessageTypes(annotation, name)


def shown(annotation: Any) -> str:
    """Return an annotation as it is written in code, for errors."""
    if get_origin(annotation) is Annotated:
        return shown(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        names = list(map(shown, get_args(annotation)))
        return " | ".join(names if len(names) <= 5 else [*names[:4], f"{len(names) - 4} others"])
    name = getattr(annotation, "__name__", None)
    return str(name) if name and not get_args(annotation) else str(annotation)[:80]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
