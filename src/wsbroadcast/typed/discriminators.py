"""Finds out how the members of a union are told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from itertools import combinations
from types import MappingProxyType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, Discriminator, Field, Tag

from wsbroadcast.exceptions import ConfigurationError


class Discriminated(NamedTuple):
    """A union with what tells its members apart; or something that isn't a union."""

    annotation: Any
    """The annotation for pydantic."""
    members: tuple[Any, ...]
    """The members of the union; for anything else, that alone."""
    field: str | None = None
    """The field that tells the members apart, by its name in Python; `None` for no field."""
    tags: Mapping[Any, Any] = MappingProxyType({})
    """The member for each value of the field, or for each result of the function."""
    function: Callable[[Any], Any] | None = None
    """The app's function that tells the members apart, if there is one."""


class _Member(NamedTuple):
    """A member of a union, and the possible values of its fields that are literals."""

    type: Any
    literals: Mapping[str, tuple[Any, ...]]


def discriminated(annotation: Any, name: str) -> Discriminated:
    """Find out how the members of a union are told apart.

    Args:
        annotation: Any annotation.
        name: What an error calls it.

    Raises:
        ConfigurationError: If nothing tells them apart.
    """
    inner, given = _without_metadata(annotation)
    if get_origin(inner) not in (Union, UnionType):
        return Discriminated(annotation, (inner,))
    members = tuple(dict.fromkeys(_flat(inner)))
    if given is not None and not isinstance(given, str):
        return Discriminated(annotation, members, tags=dict(_tagged(inner)), function=given)
    for each in members:
        if not _is_record(each):
            raise ConfigurationError(
                f"the members of {name} must be models, dataclasses or TypedDicts, so that a field tells them apart; "
                f"{_name(each)} is none of these: wrap it in a model"
            )
    known = [_Member(each, _literals_of(each)) for each in members]
    chosen = given or _common(known, name)
    tags = {value: each.type for each in known for value in each.literals.get(chosen, ())}
    if given is None:
        annotation = Annotated[inner, Field(discriminator=chosen)]
    return Discriminated(annotation, members, chosen, tags)


def _without_metadata(annotation: Any) -> tuple[Any, Any]:
    # Return the annotation without an alias and without metadata, and the discriminator that was in the metadata.
    given = None
    while True:
        if hasattr(annotation, "__value__"):  # made by a `type` statement
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            for each in metadata:
                found = each.discriminator if isinstance(each, Discriminator) else getattr(each, "discriminator", None)
                given = given or (found.discriminator if isinstance(found, Discriminator) else found)
        else:
            return annotation, given


def _tagged(union: Any) -> Iterator[tuple[Any, Any]]:
    for member in get_args(union):
        inner, _ = _without_metadata(member)
        for each in get_args(member)[1:] if get_origin(member) is Annotated else ():
            if isinstance(each, Tag):
                yield each.tag, inner


def _flat(union: Any) -> Iterator[Any]:
    for member in get_args(union):
        inner, _ = _without_metadata(member)
        if get_origin(inner) in (Union, UnionType):
            yield from _flat(inner)
        else:
            yield inner


def _is_record(member: Any) -> bool:
    kind = get_origin(member) or member
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind) or is_typed_dict(kind))


def is_typed_dict(kind: Any) -> bool:
    """Return whether something is a `TypedDict`, of `typing` or of `typing_extensions`."""
    return isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__total__")


def _literals_of(member: Any) -> dict[str, tuple[Any, ...]]:
    kind = get_origin(member) or member
    hints: Mapping[str, Any]
    if issubclass(kind, BaseModel):
        hints = {name: each.annotation for name, each in kind.model_fields.items()}
    else:
        try:
            hints = get_type_hints(kind, include_extras=True)
        except NameError as error:
            raise ConfigurationError(f"the annotations of {_name(member)} can't be read: {error}") from error
    found = {}
    for name, hint in hints.items():
        values = tuple(_literal_values(hint))
        if values:
            found[name] = values
    return found


def _literal_values(hint: Any) -> Iterator[Any]:
    hint, _ = _without_metadata(hint)
    while getattr(get_origin(hint), "_name", "") in ("Required", "NotRequired", "ReadOnly"):
        hint, _ = _without_metadata(get_args(hint)[0])
    if get_origin(hint) is Literal:
        for value in get_args(hint):
            yield value.value if isinstance(value, Enum) else value


def _common(members: list[_Member], name: str) -> str:
    names = [each for each in members[0].literals if all(each in member.literals for member in members)]
    apart = [each for each in names if _is_apart([member.literals[each] for member in members])]
    if apart:
        return "type" if "type" in apart else apart[0]
    if names:
        one, other, value = _alike(members, names[0])
        raise ConfigurationError(
            f"the members of {name} aren't told apart: {names[0]} is {value!r} in {_name(one)} and in {_name(other)}"
        )
    missing = next((each for each in members if not each.literals), members[-1])
    raise ConfigurationError(
        f"nothing tells the members of {name} apart: give each of them the same field with a literal of its own, as in "
        f'{_name(missing.type)}: type: Literal["{_name(missing.type).lower()}"]'
    )


def _is_apart(values: list[tuple[Any, ...]]) -> bool:
    return len({each for some in values for each in some}) == sum(map(len, values))


def _alike(members: list[_Member], name: str) -> tuple[Any, Any, Any]:
    values = [(value, member.type) for member in members for value in member.literals[name]]
    return next((one, other, value) for (value, one), (same, other) in combinations(values, 2) if value == same)


def _name(member: Any) -> str:
    return getattr(member, "__name__", None) or str(member)[:80]
