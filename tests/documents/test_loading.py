"""Apps by name on the command line: what is found, and what is said if it isn't."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wsbroadcast.command import main

APP = """
print("noise")
from fastapi import FastAPI
from pydantic import BaseModel
from wsbroadcast import ConnectionManager, create_router

class Say(BaseModel):
    text: str

class Site:
    def __init__(self):
        self.app = FastAPI(title="Grüße \\U0001f375")
        self.app.include_router(create_router(ConnectionManager(), "/ws", receives=Say))

def make_app():
    return site.app

site = Site()
app = site.app
empty = FastAPI()
number = 42
"""

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module into a directory of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()

    def write(name: str, text: str) -> str:
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    yield write
    sys.modules.pop("shop", None)


@pytest.mark.parametrize("name", ["shop:app", "shop", "shop:", "shop:site.app", "shop:make_app()"])
def test_app_is_found_by_its_name(name: str, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("shop", APP)
    before = [*sys.path]
    assert main(["types", name]) == 0
    captured = capsys.readouterr()
    assert "export type WsSends = Say" in captured.out
    assert "noise" not in captured.out  # which would be in the file
    assert captured.err == "noise\n"
    assert sys.path == before


def test_app_is_found_in_another_directory(write: Write, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    write("inner/shop", APP)
    assert main(["asyncapi", "--app-dir", "inner", "shop:app"]) == 0
    document = json.loads(capsysbinary.readouterr().out.decode("utf-8"))  # whatever the terminal's encoding
    assert document["info"]["title"] == "Grüße \U0001f375"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing:app", "there is no module 'nothing' in '.', nor installed"),
        ("shop.inner:app", "there is no module 'shop.inner' in '.', nor installed"),
        ("shop:nothing", "shop has no 'nothing'"),
        ("shop:site.nothing", "shop has no 'site.nothing'"),
        ("shop:empty", "the app has no socket of a router: write app.include_router(create_router(manager, …))"),
        ("shop:number", "expected a FastAPI or Starlette app, not int"),
        ("shop:site", "expected a FastAPI or Starlette app, not shop.Site"),
        ("shop:number()", "shop can't be imported: TypeError: 'int' object is not callable"),
        ("shop.py:app", "there is no module 'shop.py' in '.', nor installed"),
        ("./shop:app", "an app is a module and a name in it, such as main:app, not './shop:app'"),
        (":app", "an app is a module and a name in it, such as main:app, not ':app'"),
        ("", "an app is a module and a name in it, such as main:app, not ''"),
        ("shop:a b", "an app is a module and a name in it, such as main:app, not 'shop:a b'"),
    ],
)
@pytest.mark.parametrize("command", ["types", "asyncapi"])
def test_what_is_no_app_is_said_in_one_line(
    command: str, name: str, said: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("shop", APP.replace('print("noise")', ""))
    assert main([command, name]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"wsbroadcast: {said}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package", "shop can't be imported: No module named 'no_such_package'"),
        ("1 / 0", "shop can't be imported: ZeroDivisionError: division by zero"),
        ("raise SystemExit('no settings')", "shop can't be imported: SystemExit: no settings"),
        ("def", "shop can't be imported: SyntaxError: invalid syntax (shop.py, line 1)"),
        ("(1).missing", "shop can't be imported: AttributeError: 'int' object has no attribute 'missing'"),
    ],
)
def test_module_that_fails_is_said_in_one_line(
    text: str, said: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("shop", text)
    assert main(["types", "shop:app"]) == 1
    assert capsys.readouterr().err == f"wsbroadcast: {said}\n"


def test_method_without_schema_is_said_in_one_line(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    more = """
from collections.abc import Callable
manager = ConnectionManager()
@manager.method("odd")
def odd(way: Callable[[], int]): ...
app.include_router(create_router(manager, "/odd"))
"""
    write("shop", APP.replace('print("noise")', "") + more)
    for command in ("types", "asyncapi"):
        assert main([command, "shop:app"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            "wsbroadcast: the arguments of method 'odd' can't be documented, because it has no JSON Schema: "
            "Cannot generate a JsonSchema for core_schema.CallableSchema\n"
        )


@pytest.mark.parametrize("arguments", [["types"], ["asyncapi"], ["types", "a:b", "c:d"], ["asyncapi", "--yaml", "a:b"]])
def test_command_line_that_makes_no_sense_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err
