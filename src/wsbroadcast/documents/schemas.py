"""Makes JSON Schemas of Python types, by pydantic, with one name for each type of a document."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import PydanticUserError, TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaWarningKind

from wsbroadcast.exceptions import ConfigurationError

Schema: TypeAlias = dict[str, Any]
"""A JSON Schema of draft 2020-12."""

Definitions: TypeAlias = dict[str, Schema]
"""Schemas by the names by which other schemas refer to them."""


class Wanted(NamedTuple):
    """A type whose schema is wanted."""

    type: Any
    """An annotation, or a `TypeAdapter`."""
    mode: Literal["validation", "serialization"]
    """Whether it is received or sent: defaults, aliases and validators make a difference."""
    where: str
    """What the type belongs to, for errors."""


def schemas_of(wanted: Sequence[Wanted], ref_template: str = "#/$defs/{model}") -> tuple[list[Schema], Definitions]:
    """Return a schema for each type, in the same order, and the definitions that they refer to.

    If a model is received and sent in different forms, it has two definitions with pydantic's names: `Post-Input` and
    `Post-Output`. Models with the same name in two modules get longer names. The same types give the same schemas.

    Raises:
        ConfigurationError: If a type has no JSON Schema.
    """
    adapters = [_adapter(each) for each in wanted]
    try:
        return _schemas([*zip(wanted, adapters, strict=True)], ref_template)
    except Exception:
        for each in zip(wanted, adapters, strict=True):
            try:
                _schemas([each], ref_template)
            except Exception as error:
                raise _without_schema(each[0], error) from error
        raise


def _schemas(wanted: list[tuple[Wanted, TypeAdapter[Any]]], ref_template: str) -> tuple[list[Schema], Definitions]:
    inputs: list[tuple[Hashable, JsonSchemaMode, TypeAdapter[Any]]] = [
        (number, each.mode, adapter) for number, (each, adapter) in enumerate(wanted)
    ]
    found, document = TypeAdapter.json_schemas(inputs, ref_template=ref_template, schema_generator=_Generator)
    definitions = document.get("$defs", {})
    schemas = [found[key, mode] for key, mode, _ in inputs]
    for schema in (*schemas, *definitions.values()):
        _require_tags(schema, definitions)
    return schemas, {name: definitions[name] for name in sorted(definitions)}


def _require_tags(schema: Any, definitions: Definitions) -> None:
    # The tag of a union with a discriminator is required, even if the field of a member has a default.
    if isinstance(schema, list):
        for each in schema:
            _require_tags(each, definitions)
    elif isinstance(schema, dict):
        match schema:
            case {"discriminator": {"propertyName": str() as tag, "mapping": dict() as mapping}}:
                for ref in mapping.values():
                    member = definitions.get(ref.rpartition("/")[2], {})
                    if tag in member.get("properties", ()) and tag not in member.get("required", ()):
                        member["required"] = [*member.get("required", ()), tag]
        for each in schema.values():
            _require_tags(each, definitions)


def _adapter(wanted: Wanted) -> TypeAdapter[Any]:
    if isinstance(wanted.type, TypeAdapter):
        return wanted.type
    try:
        return TypeAdapter(wanted.type)
    except (PydanticUserError, TypeError, NameError) as error:
        raise _without_schema(wanted, error) from error


def _without_schema(wanted: Wanted, error: Exception) -> ConfigurationError:
    reason = error.message if isinstance(error, (PydanticUserError, PydanticInvalidForJsonSchema)) else str(error)
    return ConfigurationError(f"{wanted.where} can't be documented, because it has no JSON Schema: {reason}")


def one_of(schemas: Sequence[Schema]) -> Schema:
    """Return the schema of a union of schemas. Unions among them are flattened."""
    if len(schemas) == 1:
        return schemas[0]
    members = [each for schema in schemas for each in (schema.get("oneOf") or schema.get("anyOf") or [schema])]
    return {"anyOf": [each for number, each in enumerate(members) if each not in members[:number]]}


class _Generator(GenerateJsonSchema):
    ignored_warning_kinds = {"non-serializable-default"}  # noqa: RUF012  # such a default is left out

    def field_is_required(self, field: Any, total: bool) -> bool:
        # A sent model has all of its fields, also those with a default.
        if self.mode == "serialization" and field["type"] != "typed-dict-field":
            return field.get("serialization_exclude_if") is None
        return super().field_is_required(field, total)

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        # A member of a union has no schema. Without it the document would be wrong.
        if kind == "skipped-choice":
            raise PydanticInvalidForJsonSchema(detail)
        super().emit_warning(kind, detail)

    def encode_default(self, dft: Any) -> Any:
        # A set of texts has another order in each process, but a document must always be the same.
        return super().encode_default(_in_order(dft))


def _in_order(value: Any) -> Any:
    if type(value) in (set, frozenset):
        return sorted(value, key=repr)
    if type(value) in (list, tuple):
        return [_in_order(each) for each in value]
    return {key: _in_order(each) for key, each in value.items()} if type(value) is dict else value
