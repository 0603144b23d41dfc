"""Who the visitors are to each other: no two with the same name, and nobody's words move those of others."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

MAX_NAME_LENGTH = 24

HUES = 8
"""As many colours as the page has for names; each visitor gets the one that the fewest have."""

# Emoji and several scripts need these two of the invisible characters: the zero width non-joiner and joiner.
_JOINERS = "\u200c\u200d"

# Letters and symbols that are drawn as nothing.
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"


@dataclass
class Visitor:
    """What the demo remembers about a connection, as its `info`."""

    name: str
    hue: int
    is_stalled: bool = False


def clean_text(text: str) -> str:
    """Return a text without what would reorder or break the lines around it; empty if it shows nothing.

    Line breaks and other control characters become spaces. Invisible characters go; those that override the direction
    of text (Unicode Standard Annex 9, 2) are among them.
    """
    cleaned = "".join(_cleaned(character) for character in text)
    return cleaned if _looks(cleaned) else ""


def _cleaned(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Zl", "Zp"):
        return " "
    if category in ("Cf", "Co", "Cs") and character not in _JOINERS:
        return ""
    return character


def clean_channel(text: str) -> str:
    """Return a channel's name, cleaned in the same way and without spaces that nobody sees."""
    return " ".join(clean_text(text).split())


def clean_name(text: str) -> str:
    """Return a visitor's name, cleaned in the same way; a text that shows nothing gives "Guest"."""
    return clean_channel(text) or "Guest"


def next_visitor(wanted: str, hue: int | None, others: Iterable[Visitor]) -> Visitor:
    """Return a visitor with a name that none of the others has, a number behind it if need be, and with a colour.

    Args:
        wanted: The name, cleaned.
        hue: The colour it has already.
        others: Those who are there.
    """
    others = list(others)
    taken = {_looks(other.name) for other in others}
    name, number = wanted, 1
    while _looks(name) in taken:
        number += 1
        name = f"{wanted[: MAX_NAME_LENGTH - len(str(number)) - 1].rstrip()} {number}"
    if hue is None:
        used = Counter(other.hue for other in others)
        hue = min(range(HUES), key=lambda one: used[one])
    return Visitor(name, hue)


def _looks(name: str) -> str:
    """Return what a name looks like at a glance: names for which it is the same are taken for one."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(
        character
        for character in folded
        if unicodedata.category(character) not in ("Cf", "Mn", "Me", "Zs") and character not in _BLANKS
    )
