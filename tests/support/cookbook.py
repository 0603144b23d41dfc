"""The cookbook's pages show files of the repository. `python -m tests.support.cookbook` writes them there anew."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.servers import ROOT

PAGES = sorted((ROOT / "docs" / "cookbook").glob("*.md"))

# A paragraph that begins with a link to a file, and then a block, which is that file.
_SHOWN = re.compile(
    r"(?P<before>^\[`[^`\n]+`\]\((?P<path>[^)\n]+)\)[^\n]*\n\n```\w+\n)(?P<code>.*?)(?P<after>^```$)",
    re.DOTALL | re.MULTILINE,
)


def shown_in(page: Path) -> list[Path]:
    """Return the files that a page shows."""
    text = page.read_text(encoding="utf-8")
    return [(page.parent / found["path"]).resolve() for found in _SHOWN.finditer(text)]


def renewed(page: Path) -> str:
    """Return a page with its files as they are now."""

    def renew(found: re.Match[str]) -> str:
        return found["before"] + (page.parent / found["path"]).read_text(encoding="utf-8") + found["after"]

    return _SHOWN.sub(renew, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for each in PAGES:
        each.write_text(renewed(each), encoding="utf-8")
