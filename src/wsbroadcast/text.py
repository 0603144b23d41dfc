"""Texts and ids of any class as a plain `str`.

`str()` and f-strings don't do: a subclass of `str` decides what they return. `class Role(str, Enum)` is the usual case:
`Role.ADMIN == "admin"`, but `str(Role.ADMIN)` is `"Role.ADMIN"`.
"""

from __future__ import annotations

from enum import Enum
from uuid import UUID


def plain(text: str) -> str:
    """Return the characters of a text, whatever its class returns for `str()`."""
    return text if type(text) is str else str.__str__(text)


def text_of(value: object) -> str:
    """Return the text of an id: a text itself, the digits of a number, the text of an enum member's value."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    if isinstance(value, UUID):
        return UUID.__str__(value)
    return text_of(value.value) if isinstance(value, Enum) else str(value)
