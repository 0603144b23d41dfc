"""The cookbook's pages: they show the files that the tests run, each has a picture, and every link leads somewhere."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

from tests.cookbook.conftest import RECIPES
from tests.support.cookbook import PAGES, renewed, shown_in
from tests.support.servers import ROOT
from tests.test_docs import slug

INDEX = ROOT / "docs" / "cookbook" / "README.md"
PICTURES = ROOT / "docs" / "assets" / "cookbook"
APPS = sorted(RECIPES.glob("*.py"))

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@by_name
def test_page_shows_its_files_as_they_are(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == renewed(page), "run: python -m tests.support.cookbook"


def test_every_recipe_has_a_page_with_a_picture_and_every_file_is_shown() -> None:
    recipes = [page for page in PAGES if page != INDEX]
    assert all(shown_in(page) for page in recipes)
    shown = {path for page in recipes for path in shown_in(page)}
    kinds = ("*.py", "*.html", "*.yaml", "Dockerfile")  # beside them lies what apps write
    assert {path for kind in kinds for path in RECIPES.rglob(kind)} <= shown
    pictures = [re.findall(r"^!\[.{20,}\]\(\.\./assets/cookbook/(.+)\)$", page.read_text(), re.M) for page in recipes]
    assert [len(found) for found in pictures] == [1] * len(recipes)
    assert {name for found in pictures for name in found} == {path.name for path in PICTURES.iterdir()}


def test_pictures_are_small() -> None:
    assert {path.name: path.stat().st_size for path in PICTURES.iterdir() if path.stat().st_size > 100_000} == {}


def test_index_has_every_page_once() -> None:
    linked = re.findall(r"^\| \[[^\]]+\]\(([\w-]+\.md)\)", INDEX.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(linked) == [page.name for page in PAGES if page != INDEX]


@by_name
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)), link


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.stem)
def test_app_has_a_script_header_and_says_how_to_run_it(app: Path) -> None:
    source = app.read_text(encoding="utf-8")
    lines = source.splitlines()
    start, end = lines.index("# /// script"), lines.index("# ///")
    header = tomllib.loads("\n".join(line.removeprefix("#").strip() for line in lines[start + 1 : end]))
    assert header["requires-python"] == importlib.metadata.metadata("wsbroadcast")["Requires-Python"]
    assert header["dependencies"][0].startswith("wsbroadcast[demo")
    assert re.search(rf"`(\w+=\S+ )?uvicorn {app.stem}:app", ast.get_docstring(ast.parse(source)) or "")
    (page,) = (page for page in PAGES if app in shown_in(page))
    text = page.read_text(encoding="utf-8")
    assert f"uvicorn {app.stem}:app" in text
    wanted = [f'"{each}"' if re.search(r"\W", each) else each for each in header["dependencies"]]
    assert f"pip install {' '.join(wanted)}\n" in text
