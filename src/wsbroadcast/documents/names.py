"""Names in documents. They are made of paths and models, and each is used once."""

from __future__ import annotations

import re


def words_of(path: str) -> list[str]:
    """Return the words of a path: `/ws/{channel}` has `ws` and `channel`."""
    return re.findall("[A-Za-z0-9]+", path) or ["root"]


class Names:
    """The names of a document. If a name is taken, the next one gets a number."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, wanted: str, *endings: str) -> str:
        """Take the wanted name if it is free, else the name with a number.

        Args:
            wanted: The name.
            endings: Endings of the name; by default none. The name must be free with each of them.
        """
        ends = endings or ("",)
        name, number = wanted, 1
        while any(f"{name}{end}" in self._taken for end in ends):
            number += 1
            name = f"{wanted}_{number}"
        self._taken.update(f"{name}{end}" for end in ends)
        return name
