"""What a package index is told: the README as people read it there, without a repository around it."""

from __future__ import annotations

import email
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)]*)\)|\bsrc=|\bhref=|^\[[^\]]+\]:", re.MULTILINE)


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The long description, from the metadata as a build makes it (PEP 517)."""
    directory = tmp_path_factory.mktemp("metadata")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.delenv("PIP_BUILD_TRACKER", raising=False)
        backend = importlib.import_module("hatchling.build")
        name = backend.prepare_metadata_for_build_wheel(str(directory))
    metadata = email.message_from_bytes((directory / name / "METADATA").read_bytes())
    assert metadata["Description-Content-Type"] == "text/markdown"
    text: str = metadata.get_payload(decode=True).decode("utf-8")  # type: ignore[union-attr]
    return text


def blocks_of(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_has_what_an_index_can_not_show() -> None:
    assert "](docs/assets/demo.png)" in README
    assert "](docs/tutorial.md)" in README


def test_description_has_no_link_or_picture_that_would_break(description: str) -> None:
    assert [link for link in LINK.findall(description) if not link.startswith("https://")] == []
    assert "![" not in description


def test_description_is_the_readme_but_for_that(description: str) -> None:
    assert description.startswith(README.partition("![")[0])
    code = blocks_of(README.partition("## Try it\n")[0])
    assert blocks_of(description) == code
    assert len(code) == 3

    def headings_of(text: str) -> list[str]:
        return re.findall(r"^## (.+)$", text, re.MULTILINE)

    assert headings_of(description) == [heading for heading in headings_of(README) if heading != "Try it"]
    for name in re.findall(r"\[([^\]]+)\]\(docs/", README.partition("## Documentation")[2]):
        assert name in description
