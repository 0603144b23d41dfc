"""What type checkers say of apps: nothing of one that is right, and each mistake of one that isn't."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import wsbroadcast

TESTS = Path(__file__).parent
RIGHT, WRONG = TESTS / "typed" / "app.py", TESTS / "typed" / "wrong.py"
MARKED = {number for number, line in enumerate(WRONG.read_text().splitlines(), 1) if line.endswith("# wrong")}


def mypy(path: Path) -> dict[int, str]:
    """Errors by line."""
    command = [sys.executable, "-m", "mypy", "--strict", "--output=json", "--config-file=", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {each["line"]: each["message"] for each in found if each["severity"] == "error"}


def pyright(path: Path, tmp_path: Path) -> dict[int, str]:
    """Errors by line, with everything switched on that pyright calls strict."""
    config = tmp_path / "pyrightconfig.json"
    options = {"typeCheckingMode": "strict", "include": [str(path)]}
    config.write_text(json.dumps(options | {"extraPaths": [str(Path(wsbroadcast.__file__).parents[1])]}))
    command = [sys.executable, "-m", "basedpyright", "-p", str(config), "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1, done.stdout
    return {each["range"]["start"]["line"] + 1: each["message"] for each in found["generalDiagnostics"]}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_app_that_is_right_has_no_errors(checker: str, tmp_path: Path) -> None:
    assert (mypy(RIGHT) if checker == "mypy" else pyright(RIGHT, tmp_path)) == {}


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_every_mistake_is_reported(checker: str, tmp_path: Path) -> None:
    found = mypy(WRONG) if checker == "mypy" else pyright(WRONG, tmp_path)
    assert found.keys() == MARKED, {line: found.get(line) for line in found.keys() ^ MARKED}
