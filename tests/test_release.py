"""What a release is made of: the sections of the changelog, the wheel, the source distribution."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tarfile
import zipfile
from datetime import date, timedelta
from pathlib import Path

import pytest

import wsbroadcast
from tests.support.release import ReleaseError, check_changelog, check_sdist, check_wheel
from tests.support.servers import ROOT

TODAY = date.today()
GOOD = (
    f"# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - {TODAY}\n\n### Added\n\n- Something.\n\n## [1.1.0] - 2026-01-01\n"
)


def test_changelog_of_a_release_passes() -> None:
    check_changelog(GOOD, "1.2.0")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# Changelog\n", "has to begin with the section"),
        (GOOD.replace("## [Unreleased]\n", ""), "has to begin with the section"),
        (GOOD.replace("## [Unreleased]\n", "## [Unreleased]\n\n- More.\n"), "has entries under"),
        ("# Changelog\n\n## [Unreleased]\n", "the newest section of CHANGELOG.md is none"),
        (GOOD.replace("1.2.0", "1.3.0"), "the newest section of CHANGELOG.md is 1.3.0"),
        (GOOD.replace(f" - {TODAY}", ""), "needs its day"),
        (GOOD.replace(str(TODAY), "soon"), "needs its day"),
        (GOOD.replace(str(TODAY), str(TODAY + timedelta(days=2))), "needs its day"),
        (GOOD.replace("### Added\n\n- Something.\n", ""), "is empty"),
    ],
)
def test_changelog_of_no_release_says_what_to_do(text: str, problem: str) -> None:
    with pytest.raises(ReleaseError, match=problem):
        check_changelog(text, "1.2.0")


def test_version_has_a_section_in_the_changelog() -> None:
    assert f"\n## [{wsbroadcast.__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("dist")
    backend = importlib.import_module("hatchling.build")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.delenv("PIP_BUILD_TRACKER", raising=False)
        wheel = directory / backend.build_wheel(str(directory))
        sdist = directory / backend.build_sdist(str(directory))
    return sdist, wheel


def test_wheel_and_source_distribution_have_what_they_are_to_have(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    check_sdist(sdist)
    check_wheel(wheel)
    twine = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert twine.returncode == 0, twine.stdout + twine.stderr


def test_wheel_without_a_module_or_with_something_else_is_refused(built: tuple[Path, Path], tmp_path: Path) -> None:
    good = built[1]
    lacking, strange = tmp_path / "lacking" / good.name, tmp_path / "strange" / good.name
    for copy in (lacking, strange):
        copy.parent.mkdir()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(lacking, "w") as less, zipfile.ZipFile(strange, "w") as more:
        for name in source.namelist():
            if not name.endswith("/manager.py"):
                less.writestr(name, source.read(name))
            more.writestr(name, source.read(name))
        more.writestr("tests/test_manager.py", "")
    with pytest.raises(ReleaseError, match=r"lacks wsbroadcast/manager\.py"):
        check_wheel(lacking)
    with pytest.raises(ReleaseError, match=r"what doesn't belong there: tests/test_manager\.py"):
        check_wheel(strange)


def test_source_distribution_without_a_file_is_refused(built: tuple[Path, Path], tmp_path: Path) -> None:
    lacking = tmp_path / built[0].name
    with tarfile.open(built[0]) as source, tarfile.open(lacking, "w:gz") as less:
        for member in source.getmembers():
            if member.isfile() and not member.name.endswith("/docs/tutorial.md"):
                less.addfile(member, source.extractfile(member))
    with pytest.raises(ReleaseError, match=r"lacks docs/tutorial\.md"):
        check_sdist(lacking)
