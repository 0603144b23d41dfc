"""Converts JSON Schemas of draft 2020-12, which pydantic makes, to draft-07, which AsyncAPI 3.0 uses. No I/O."""

from __future__ import annotations

from typing import Any

from wsbroadcast.documents.schemas import Schema

# The keys under which a schema has other schemas: by name, in a list, alone.
_BY_NAME = ("properties", "patternProperties")
_LISTS = ("anyOf", "oneOf", "allOf")
_ALONE = ("items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")


def draft7(schema: Schema) -> Schema:
    """Return the same schema in draft-07.

    There the items of a tuple are a list, and a reference can't have other keys beside it. A discriminator is left out:
    the constants of the members say the same, and AsyncAPI means something else by it.
    """
    found = {key: _value(key, value) for key, value in schema.items() if key not in ("prefixItems", "discriminator")}
    if schema.get("prefixItems"):
        if "items" in found:
            found["additionalItems"] = found["items"]
        found["items"] = [_any(each) for each in schema["prefixItems"]]
    if "$ref" in found and len(found) > 1:
        found["allOf"] = [{"$ref": found.pop("$ref")}, *found.get("allOf", ())]
    return found


def _value(key: str, value: Any) -> Any:
    if key in _BY_NAME and isinstance(value, dict):
        return {name: _any(each) for name, each in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_any(each) for each in value]
    return _any(value) if key in _ALONE else value


def _any(schema: Any) -> Any:
    return draft7(schema) if isinstance(schema, dict) else schema
