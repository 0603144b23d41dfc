"""TypeScript of every field type that pydantic documents, checked by `tsc --strict`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, create_model

from tests.support.field_types import CASES, REFUSED
from tests.support.npm import check_types, needs_npm
from wsbroadcast import ConfigurationError
from wsbroadcast.documents.emitter import Emitter, comment, identifier
from wsbroadcast.documents.names import Names
from wsbroadcast.documents.schemas import Wanted, schemas_of


def emitted(schema: Any, **definitions: Any) -> str:
    return Emitter(definitions, Names()).expression(schema)


def model_of(name: str, type_: Any) -> type[BaseModel]:
    return create_model(f"Case_{name}", value=(type_, ...))


@needs_npm
def test_every_field_type_has_the_type_of_its_values(tmp_path: Path) -> None:
    # What a page is sent fits its type, a function doesn't, unless nothing is known of the type.
    models = {name: model_of(name, case.type) for name, case in CASES.items()}
    wanted = [Wanted(model, "serialization", name) for name, model in models.items()]
    schemas, definitions = schemas_of(wanted)
    emitter = Emitter(definitions, Names())
    lines = [*emitter.declarations()]
    for (name, model), schema in zip(models.items(), schemas, strict=True):
        adapter = TypeAdapter(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            instance = adapter.validate_python({"value": CASES[name].value})
            sent = adapter.dump_json(instance, by_alias=True).decode()
        type_ = emitter.expression(schema)
        lines.append(f"export const case_{name}: {type_} = {sent}")
        if not CASES[name].is_unknown:
            lines.append(
                f"// @ts-expect-error a function is no JSON\nexport const not_{name}: {type_} = {{ value: f }}"
            )
    (tmp_path / "types.ts").write_text("declare const f: () => 0\n" + "\n".join(lines), encoding="utf-8")
    check_types(tmp_path, "types.ts")


@needs_npm
def test_every_field_type_has_the_type_of_what_is_read(tmp_path: Path) -> None:
    # What a page sends may be what was sent to it, where one goes with the other.
    models = {name: model_of(name, case.type) for name, case in CASES.items() if name not in NOT_READ}
    schemas, definitions = schemas_of([Wanted(model, "validation", name) for name, model in models.items()])
    emitter = Emitter(definitions, Names())
    lines = [*emitter.declarations()]
    for (name, model), schema in zip(models.items(), schemas, strict=True):
        adapter = TypeAdapter(model)
        sent = adapter.dump_json(adapter.validate_python({"value": CASES[name].value}), by_alias=True)
        assert adapter.validate_json(sent)
        lines.append(f"export const case_{name}: {emitter.expression(schema)} = {sent.decode()}")
    (tmp_path / "types.ts").write_text("\n".join(lines), encoding="utf-8")
    check_types(tmp_path, "types.ts")


# Whose text isn't what is read: it is written otherwise, or in a shape of its own.
NOT_READ = {"aliases", "computed", "enum_member", "model_serializer", "serializer"}


@pytest.mark.parametrize("name", REFUSED)
def test_type_without_schema_is_refused_by_name(name: str) -> None:
    fine = Wanted(model_of("fine", int), "validation", "receives of /fine")
    with pytest.raises(ConfigurationError, match=r"^sends of /ws can't be documented"):
        schemas_of([fine, Wanted(model_of(name, REFUSED[name]), "serialization", "sends of /ws")])


def test_default_that_is_a_set_has_an_order() -> None:
    names = [f"name {number}" for number in range(10)]
    model = create_model(
        "Sets", flat=(set[str], set(names)), deep=(dict[str, list[frozenset[str]]], {"a": [frozenset(names)]})
    )
    _, definitions = schemas_of([Wanted(model, "validation", "receives of /ws")])
    assert definitions["Sets"]["properties"]["flat"]["default"] == names
    assert definitions["Sets"]["properties"]["deep"]["default"] == {"a": [names]}


def test_member_of_a_union_without_schema_is_no_gap_in_the_document() -> None:
    with pytest.raises(ConfigurationError, match="receives of /ws can't be documented"):
        schemas_of([Wanted(model_of("union", int | REFUSED["callable"]), "validation", "receives of /ws")])


@pytest.mark.parametrize(
    ("schema", "type_"),
    [
        (True, "unknown"),
        (False, "never"),
        ({}, "unknown"),
        ({"type": "array"}, "unknown[]"),
        ({"type": "array", "maxItems": 0}, "[]"),
        ({"type": "array", "prefixItems": [{"type": "string"}], "minItems": 1}, "[string, ...unknown[]]"),
        ({"type": "array", "prefixItems": [{"type": "string"}], "items": False}, "[string?]"),
        (
            {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
            "(number | null)[]",
        ),
        ({"type": ["string", "null"]}, "string | null"),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, "number"),
        ({"anyOf": [{"type": "integer"}, {}]}, "unknown"),
        ({"allOf": [{"type": "string"}, {"enum": ["a", "b"]}]}, 'string & ("a" | "b")'),
        ({"const": {"a": [1, None]}}, "{ a: [1, null] }"),
        ({"type": "object"}, "{ [key: string]: unknown }"),
        ({"type": "object", "additionalProperties": False}, "{ [key: string]: never }"),
        ({"type": "object", "patternProperties": {"^a": {"type": "string"}}}, "{ [key: string]: string }"),
        (
            {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "string"}},
            '{ [key in "a" | "b"]?: string }',
        ),
        (
            {"type": "object", "oneOf": [{"type": "object", "properties": {}}, {"type": "null"}]},
            "{\n  [key: string]: unknown\n} | null",
        ),
    ],
)
def test_schema_is_written_as_a_type(schema: Any, type_: str) -> None:
    assert emitted(schema) == type_


def test_reference_is_the_name_of_its_definition() -> None:
    assert emitted({"$ref": "#/$defs/a.b-c"}, **{"a.b-c": {"type": "string"}}) == "aBC"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Post", "Post"),
        ("Post-Input", "PostInput"),
        ("Page_int_", "Page_int_"),
        ("a.b c", "aBC"),
        ("string", "_string"),
        ("class", "_class"),
        ("1st", "_1st"),
        ("-", "_"),
    ],
)
def test_name_is_an_identifier(name: str, found: str) -> None:
    assert identifier(name) == found


def test_names_that_become_the_same_have_numbers() -> None:
    texts = [*Emitter({"a-b": {}, "aB": {}, "a.b": {}}, Names()).declarations()]
    assert [text.split()[2] for text in texts] == ["aB", "aB_2", "aB_3"]


def test_comment_can_not_be_ended_by_what_is_in_it() -> None:
    assert comment("a */ b") == "/** a *\\/ b */\n"
    assert comment("a\n\nb\u2028c", "  ") == "  /**\n   * a\n   *\n   * b\n   * c\n   */\n"
    assert comment(" ") == ""
