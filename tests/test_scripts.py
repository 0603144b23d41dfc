"""The scripts that do their own set-up: which Python they take, what they install and when, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.servers import ROOT

# Takes the place of Python and of pip: it says which version it is, and writes down what it is asked to do.
PYTHON = """#!{interpreter} -IS
import os, shutil, sys
arguments = sys.argv[1:]
if arguments[0] == "-c":
    sys.version_info = ({version}, 0, "final", 0)
    sys.version = "{build}"
    sys.modules |= dict.fromkeys({lacks}) | ({{}} if "pip" in {lacks} else {{"pip": sys}})
    exec(arguments[1])
elif arguments[0] == "--version":
    print("Python {build}")
else:
    with open("log", "a") as log:
        print(*arguments[1:], file=log)
    if arguments[1] == "venv":
        shutil.rmtree(".venv", ignore_errors=True)
        os.makedirs(".venv/bin")
        shutil.copy(__file__, ".venv/bin/python")
    sys.exit(arguments[1] == "pip" and os.path.exists("pip-fails"))
"""

MAKE = "venv --clear .venv"
DEMO = "pip install --quiet --disable-pip-version-check --no-user -e .[demo]"
TEST = "pip install --quiet --disable-pip-version-check --no-user -e .[demo,test]"


class Clone:
    """A clone of the repository on a machine that has what you give it, bash, and what stands behind it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "clone"
        self.path = directory / "path"
        self.path.mkdir()
        for program in ("bash", "env", "dirname", "cat"):
            (self.path / program).symlink_to(str(shutil.which(program)))
        shutil.copytree(ROOT / "scripts", self.directory / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.directory)

    def has(self, name: str, version: str, build: str = "", lacks: tuple[str, ...] = ()) -> Path:
        """Put a Python of a version such as `3, 11` there."""
        python = self.path / name
        build = build or version.replace(", ", ".")
        python.write_text(PYTHON.format(interpreter=sys.executable, version=version, build=build, lacks=lacks))
        python.chmod(0o755)
        return python

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (self.directory / "scripts" / script, *arguments),
            env={"PATH": str(self.path), **environment},
            cwd="/",
            capture_output=True,
            text=True,
        )

    def does(self, script: str, *arguments: str, **environment: str) -> list[str]:
        """Run a script, which must end well, and return what Python was asked to do."""
        log = self.directory / "log"
        log.unlink(missing_ok=True)
        done = self.run(script, *arguments, **environment)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    def refuses(self, script: str, **environment: str) -> str:
        """Run a script, which must do nothing, and return what it says."""
        done = self.run(script, **environment)
        assert done.returncode == 1
        assert not (self.directory / ".venv").exists()
        assert not (self.directory / "log").exists()
        assert done.stdout == ""
        return done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A clone on a machine that has Python 3.11, unless another one takes its place."""
    clone = Clone(tmp_path)
    clone.has("python3", "3, 11")
    return clone


def test_demo_installs_its_extra_alone_and_only_once(clone: Clone) -> None:
    demo = "wsbroadcast demo --port 0"
    assert clone.does("demo", "--port", "0") == [MAKE, DEMO, demo]
    assert clone.does("demo", "--port", "0") == [demo]


def test_tests_install_what_every_script_needs(clone: Clone) -> None:
    assert clone.does("demo") == [MAKE, DEMO, "wsbroadcast demo"]
    assert clone.does("test", "-k", "a b") == [TEST, "pytest -k a b"]
    assert clone.does("test") == ["pytest"]
    assert clone.does("demo") == ["wsbroadcast demo"]
    assert clone.does("check") == ["ruff check", "ruff format --check", "mypy"]
    assert clone.does("brokers", "redis") == ["tests.support.brokers redis"]


def test_docs_install_their_extra_alone(clone: Clone) -> None:
    assert clone.does("docs", "serve") == [MAKE, TEST.replace("demo,test", "docs"), "tests.support.site serve"]
    assert clone.does("docs") == ["tests.support.site"]


def test_coverage_is_an_option(clone: Clone) -> None:
    measured = ["coverage run -m pytest -n 0 -x tests/node/test_node.py", "coverage report"]
    assert clone.does("test", "-x", "--coverage", "tests/node/test_node.py") == [MAKE, TEST, *measured]


def test_changed_project_is_installed_again(clone: Clone) -> None:
    clone.does("demo")
    with (clone.directory / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert clone.does("demo") == [DEMO, "wsbroadcast demo"]
    assert clone.does("demo") == ["wsbroadcast demo"]


def test_moved_clone_is_installed_again(clone: Clone) -> None:
    clone.does("demo")
    clone.directory = clone.directory.rename(clone.directory.with_name("a clone elsewhere"))
    assert clone.does("demo") == [DEMO, "wsbroadcast demo"]


def test_installation_that_failed_is_tried_again(clone: Clone) -> None:
    (clone.directory / "pip-fails").touch()
    assert clone.run("demo").returncode == 1
    assert (clone.directory / "log").read_text().splitlines() == [MAKE, DEMO]
    (clone.directory / "pip-fails").unlink()
    assert clone.does("demo") == [DEMO, "wsbroadcast demo"]


def test_scripts_that_are_started_together_install_once(clone: Clone) -> None:
    with ThreadPoolExecutor() as pool:
        scripts = [pool.submit(clone.run, "demo") for _ in range(4)]
        assert [script.result().returncode for script in scripts] == [0] * 4
    assert (clone.directory / "log").read_text().splitlines() == [MAKE, DEMO, *["wsbroadcast demo"] * 4]


def test_environment_whose_python_was_updated_is_made_anew(clone: Clone) -> None:
    clone.does("demo")
    shutil.copy(clone.has("updated", "3, 12", lacks=("pip",)), clone.directory / ".venv" / "bin" / "python")
    assert clone.does("demo") == [MAKE, DEMO, "wsbroadcast demo"]
    (clone.directory / ".venv" / "bin" / "python").unlink()
    assert clone.does("demo") == [MAKE, DEMO, "wsbroadcast demo"]


def test_newest_python_that_can_is_taken(clone: Clone) -> None:
    clone.has("python3.14", "3, 14", lacks=("ensurepip",))
    clone.has("python3.12", "3, 12")
    clone.has("python3.11", "3, 11")
    clone.has("python3", "3, 9")
    assert "Making .venv with Python 3.12\n" in clone.run("demo").stderr


def test_named_python_is_taken(clone: Clone) -> None:
    clone.has("python3.13", "3, 13")
    clone.has("python3.11", "3, 11")
    assert "Making .venv with Python 3.13\n" in clone.run("demo").stderr
    assert clone.does("demo", PYTHON="python3.13") == ["wsbroadcast demo"]
    named = (clone.path / "python3.11").rename(clone.path / "my python")
    assert "Making .venv with Python 3.11\n" in clone.run("demo", PYTHON=str(named)).stderr


def test_other_python_makes_the_environment_anew(clone: Clone) -> None:
    clone.has("python3", "3, 13")
    clone.has("own", "3, 13", build="3.13.1 (built here)")
    clone.does("demo")
    clone.has("python3", "3, 14")
    assert clone.does("demo") == ["wsbroadcast demo"]  # it works, and nobody asked for another
    assert clone.does("demo", PYTHON="own") == [MAKE, DEMO, "wsbroadcast demo"]
    assert clone.does("demo", PYTHON="own") == ["wsbroadcast demo"]
    assert clone.does("demo") == ["wsbroadcast demo"]


def test_python_that_is_too_old_is_refused(clone: Clone) -> None:
    clone.has("python3", "3, 9")
    assert clone.refuses("demo") == (
        "wsbroadcast needs Python 3.11 or later, with venv:\n"
        "  python3 is Python 3.9\n"
        "PYTHON=/path/to/python names another.\n"
    )


def test_python_without_venv_is_refused_with_what_brings_it(clone: Clone) -> None:
    clone.has("python3.13", "3, 13", lacks=("ensurepip",))
    clone.has("python3", "3, 13", lacks=("ensurepip", "venv"))
    assert clone.refuses("test") == (
        "wsbroadcast needs Python 3.11 or later, with venv:\n"
        "  python3.13 lacks venv; Debian and Ubuntu: apt-get install python3.13-venv\n"
        "  python3 lacks venv; Debian and Ubuntu: apt-get install python3.13-venv\n"
        "PYTHON=/path/to/python names another.\n"
    )


def test_machine_without_python_is_told_what_brings_it(clone: Clone) -> None:
    (clone.path / "python3").unlink()
    assert "there is no python3; Debian and Ubuntu: apt-get install python3-venv\n" in clone.refuses("demo")


def test_named_python_that_is_not_there_is_refused(clone: Clone) -> None:
    clone.has("python3", "3, 13")
    assert "  python9 isn't there\n" in clone.refuses("demo", PYTHON="python9")


def test_scripts_can_be_started() -> None:
    for script in (ROOT / "scripts").iterdir():
        assert script.suffix or os.access(script, os.X_OK), script
