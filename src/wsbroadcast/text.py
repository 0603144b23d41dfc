"""Text and ids of any class as a plain `str`: what `str()` and f-strings make of a subclass, its author decides.

`class Role(str, Enum)` is the usual case: `Role.ADMIN == "admin"`, and `str(Role.ADMIN)` is `"Role.ADMIN"`.
"""

from __future__ import annotations

from enum import Enum
from uuid import UUID


def plain(text: str) -> str:
    """Return the characters that a text holds, whatever its class says of itself."""
    return text if type(text) is str else str.__str__(text)


def text_of(value: object) -> str:
    """Return the text of an id: of an enum's member that of its value, of a number its digits."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int.__repr__(value)
    if isinstance(value, UUID):
        return UUID.__str__(value)
    return text_of(value.value) if isinstance(value, Enum) else str(value)
