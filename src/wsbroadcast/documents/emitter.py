"""Makes TypeScript of JSON Schemas: a type for each definition, and expressions that refer to these. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from wsbroadcast.documents.names import Names
from wsbroadcast.documents.schemas import Definitions, Schema

_IDENTIFIER = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")

# Names that no type may have: reserved words, and types of the language.
_RESERVED = frozenset(
    re.findall(
        r"\w+",
        """any as async await bigint boolean break case catch class const continue debugger default delete do else enum
    export extends false finally for function if implements import in instanceof interface let never new null number
    object package private protected public return static string super switch symbol this throw true try type typeof
    undefined unknown var void while with yield""",
    )
)

_SIMPLE = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}


def identifier(name: str) -> str:
    """Make a valid name for a type. Characters that it can't have are removed, and the next letter is a capital."""
    found = re.sub(r"[^A-Za-z0-9_$]+(.?)", lambda match: match[1].upper(), name)
    return f"_{found}" if not _IDENTIFIER.fullmatch(found) or found in _RESERVED else found


def comment(text: str, indent: str = "") -> str:
    """Write a comment for the next line; nothing if the text is empty."""
    lines = [line.rstrip() for line in text.replace("*/", "*\\/").strip().splitlines()]
    if not lines:
        return ""
    if len(lines) == 1:
        return f"{indent}/** {lines[0]} */\n"
    inner = "".join(f"{indent} *{' ' if line else ''}{line}\n" for line in lines)
    return f"{indent}/**\n{inner}{indent} */\n"


class Emitter:
    """Writes types.

    The types are those of JSON: a date is a string, a set is an array, an object has the fields that its schema names.
    Rules that a type can't have are left out: the length of a text, a pattern, the smallest number.

    Args:
        definitions: The schemas to which other schemas refer.
        names: Names that are taken already. Those of the definitions are added.
    """

    def __init__(self, definitions: Definitions, names: Names) -> None:
        self._definitions = definitions
        self._names = {name: names.new(identifier(name)) for name in definitions}

    def declarations(self) -> Iterator[str]:
        """Write the definitions, ordered by name."""
        for name, schema in self._definitions.items():
            yield self.declaration(self._names[name], schema)

    def declaration(self, name: str, schema: Schema | bool, about: str = "") -> str:
        """Write one type with its comment."""
        said = comment(about or _about(schema))
        if isinstance(schema, dict) and _is_plain_object(schema):
            return f"{said}export interface {name} {self._fields(schema, '')}\n"
        return f"{said}export type {name} = {self.expression(schema)}\n"

    def expression(self, schema: Schema | bool, indent: str = "") -> str:
        """Write the type of a schema, for use after a colon or an equals sign."""
        if isinstance(schema, bool):
            return "unknown" if schema else "never"
        parts = [*dict.fromkeys(self._parts(schema, indent))]
        if len(parts) == 1:
            return parts[0]
        return " & ".join(_grouped(part) for part in parts) or "unknown"

    def _parts(self, schema: Schema, indent: str) -> Iterator[str]:
        # Each part says something about the same value.
        if "$ref" in schema:
            yield self._names[schema["$ref"].rpartition("/")[2].replace("~1", "/").replace("~0", "~")]
        if "const" in schema:
            yield _literal(schema["const"])
        elif "enum" in schema:
            yield _union(_literal(value) for value in schema["enum"])
        elif (kind := schema.get("type")) is not None and not (kind == "object" and _says_more(schema)):
            yield _union(self._of_kind(each, schema, indent) for each in ([kind] if isinstance(kind, str) else kind))
        elif "properties" in schema:
            yield self._object(schema, indent)
        for alternatives in ("anyOf", "oneOf"):
            if alternatives in schema:
                yield _union(self.expression(each, indent) for each in schema[alternatives])
        for each in schema.get("allOf", ()):
            yield self.expression(each, indent)

    def _of_kind(self, kind: str, schema: Schema, indent: str) -> str:
        match kind:
            case "array":
                return self._array(schema, indent)
            case "object":
                return self._object(schema, indent)
        return _SIMPLE[kind]

    def _array(self, schema: Schema, indent: str) -> str:
        items: Schema | bool = schema.get("items", True)
        first = schema.get("prefixItems", [])
        most = schema.get("maxItems")
        if not first and most != 0:
            return f"{_grouped(self.expression(items, indent))}[]"
        least = schema.get("minItems", 0)
        parts = [
            f"{_grouped(self.expression(each, indent))}{'' if number < least else '?'}"
            for number, each in enumerate(first)
        ]
        if items is not False and (most is None or most > len(first)):
            parts.append(f"...{_grouped(self.expression(items, indent))}[]")
        return f"[{', '.join(parts)}]"

    def _object(self, schema: Schema, indent: str) -> str:
        if "properties" in schema:
            return self._fields(schema, indent)
        values = self._values(schema, indent)
        keys = self._keys(schema.get("propertyNames", True))
        return f"{{ [key in {keys}]?: {values} }}" if keys else f"{{ [key: string]: {values} }}"

    def _values(self, schema: Schema, indent: str) -> str:
        patterns = schema.get("patternProperties", {})
        others: Schema | bool = schema.get("additionalProperties", not patterns)
        every = [*patterns.values(), *([] if patterns and others is False else [others])]
        return _union(self.expression(each, indent) for each in every)

    def _keys(self, schema: Schema | bool) -> str | None:
        # Returns the names that keys may have, if they are known.
        if isinstance(schema, bool):
            return None
        if "$ref" in schema:
            return self._keys(self._definitions[schema["$ref"].rpartition("/")[2]])
        names = [schema["const"]] if "const" in schema else schema.get("enum", ())
        return _union(_literal(str(name)) for name in names) if names else None

    def _fields(self, schema: Schema, indent: str) -> str:
        inner = f"{indent}  "
        required = schema.get("required", ())
        lines = [
            f"{comment(_about(each), inner)}{inner}{_key(name)}{'' if name in required else '?'}: "
            f"{self.expression(each, inner)}\n"
            for name, each in schema["properties"].items()
        ]
        others = schema.get("additionalProperties", not lines)  # in TypeScript `{}` alone means anything but null
        if others is not False or "patternProperties" in schema:
            lines.append(f"{inner}[key: string]: unknown\n")
        elif not lines:
            lines.append(f"{inner}[key: string]: never\n")
        return f"{{\n{''.join(lines)}{indent}}}"


def _is_plain_object(schema: Schema) -> bool:
    return schema.get("type") == "object" and "properties" in schema and not _says_more(schema)


def _says_more(schema: Schema) -> bool:
    # Returns whether `type: object` has another key beside it that names the fields.
    return "properties" not in schema and any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf"))


def _about(schema: Schema | bool) -> str:
    if isinstance(schema, bool):
        return ""
    said = [schema.get("description", ""), schema.get("format", ""), "@deprecated" if schema.get("deprecated") else ""]
    return "\n".join(line for line in said if line)


def _key(name: str) -> str:
    return name if _IDENTIFIER.fullmatch(name) else json.dumps(name)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_literal(each) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{ {'; '.join(f'{_key(name)}: {_literal(each)}' for name, each in value.items())} }}"
    return json.dumps(value)


def _union(parts: Iterable[str]) -> str:
    every = [*dict.fromkeys(parts)]
    if "unknown" in every:
        return "unknown"
    return " | ".join(part for part in every if part != "never") or "never"


def _grouped(expression: str) -> str:
    # Puts a union or an intersection into parentheses, for use before `[]`, `&` or `?`.
    return f"({expression})" if re.search(r" [|&] ", expression) else expression
