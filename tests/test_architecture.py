"""Which module may import which: the page on architecture lists the modules, this file enforces their order."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import wsbroadcast

ROOT = Path(wsbroadcast.__file__).parent

# From the outermost to the innermost. A room is a module or a whole package. It imports from the layers below its own;
# rooms of one layer don't know each other.
LAYERS = [
    {"__main__"},
    {"command"},
    {"demo", "testing"},
    {"__init__"},
    {"web"},
    {"telemetry"},
    {"manager"},
    {"documents"},
    {"node"},
    {"handlers", "hooks", "methods"},
    {"connection"},
    {"transports"},
    {"delivery", "publishing"},
    {"protocols"},
    {"asking", "types"},
    {"streams"},
    {"engines"},
    {"typed"},
    {"history", "presence", "tracing"},
    {"publication"},
    {"message"},
    {"audience", "concurrency", "options", "signatures"},
    {"close_codes", "exceptions", "logs", "stats"},
    {"text"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

# Somebody else's packages, and the rooms that may know them; `None` for all.
OUTSIDE: dict[str, set[str] | None] = {
    "starlette": None,
    "typing_extensions": {"connection", "typed", "testing"},  # for type checkers only
    "pydantic_core": None,
    "fastapi": {"web", "demo", "command"},
    "pydantic": {"web", "methods", "typed", "demo", "documents"},
    "uvicorn": {"demo", "command"},
    "pytest": {"testing"},
    "websockets": {"demo"},
    "asyncpg": {"engines"},
    "cryptography": {"protocols"},
    "jwt": {"protocols"},
    "nats": {"engines"},
    "redis": {"engines"},
    "opentelemetry": {"telemetry"},
    "prometheus_client": {"telemetry"},
}


class Import(NamedTuple):
    """One import statement's target, seen from the module that has it."""

    importer: str
    module: str


def modules() -> dict[str, Path]:
    """The dotted names of all modules, without `wsbroadcast.`; a package goes by its `__init__`."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imports_of(name: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write it out"
            assert node.module is not None
            # `from wsbroadcast.engines import memory` names a module, `… import create_engine` a thing inside one.
            targets = [
                f"{node.module}.{alias.name}"
                if f"{node.module}.{alias.name}".removeprefix("wsbroadcast.") in MODULES
                else node.module
                for alias in node.names
            ]
        else:
            continue
        for target in targets:
            yield Import(name, target)


IMPORTS = [each for name in MODULES for each in imports_of(name)]


def inside(target: str) -> str | None:
    """The name of one of our own modules, or `None` for somebody else's."""
    if target == "wsbroadcast":
        return "__init__"
    return target.removeprefix("wsbroadcast.") if target.startswith("wsbroadcast.") else None


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_module_has_a_room() -> None:
    assert {room_of(name) for name in MODULES} <= set(LEVEL), "give the new room a layer"


def test_rooms_of_the_page_are_these() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| module or package | what is in it |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    named = [room for row in rows for room in row]
    assert sorted(named) == sorted(LEVEL)
    assert [LEVEL[room] for room in named] == sorted(LEVEL.values())


def test_imports_go_down_only() -> None:
    wrong = []
    for each in IMPORTS:
        target = inside(each.module)
        if target is None or room_of(target) == room_of(each.importer):
            continue
        goes_down = LEVEL[room_of(each.importer)] < LEVEL[room_of(target)]
        if not goes_down:
            wrong.append(f"{each.importer} imports {target}")
    assert wrong == []


def test_no_module_is_imported_in_a_circle() -> None:
    # Not for types either.
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for each in IMPORTS:
        target = inside(each.module)
        if target is not None:
            graph[each.importer].add(target)
    TopologicalSorter(graph).prepare()  # names the circle if there is one


def test_only_some_rooms_know_the_outside() -> None:
    for each in IMPORTS:
        package = each.module.partition(".")[0]
        if inside(each.module) is None and package not in sys.stdlib_module_names:
            assert package in OUTSIDE, f"{each.importer} imports {package}: say which rooms may"
            rooms = OUTSIDE[package]
            assert rooms is None or room_of(each.importer) in rooms, f"{each.importer} imports {package}"


def test_public_names_are_sorted_and_complete() -> None:
    tree = ast.parse(MODULES["__init__"].read_text())
    imported = {
        alias.name: node.module.removeprefix("wsbroadcast.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wsbroadcast.") and node.module
        for alias in node.names
    }
    assert wsbroadcast.__all__ == sorted(wsbroadcast.__all__, key=lambda name: (not name.isupper(), name))
    assert set(wsbroadcast.__all__) == imported.keys() | {"__version__"}
    assert wsbroadcast._MODULES.items() <= imported.items()  # what is lazy is what type checkers import
    assert all(hasattr(wsbroadcast, name) for name in wsbroadcast.__all__)


def test_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()


def test_import_brings_no_driver_and_no_server() -> None:
    code = "import json, sys, wsbroadcast; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(output.stdout)}
    assert not loaded & {"redis", "nats", "asyncpg", "psycopg", "uvicorn", "uvloop", "websockets", "httpx"}


def test_who_only_publishes_imports_no_fastapi() -> None:
    code = "import json, sys; from wsbroadcast import Message, Publisher; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(output.stdout)
    assert not {"fastapi", "pydantic", "starlette.applications", "starlette.routing"} & set(loaded)
    assert not [
        name for name in loaded if name.startswith(("wsbroadcast.web", "wsbroadcast.node", "wsbroadcast.deliv"))
    ]
