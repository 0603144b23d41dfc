"""The warning that the memory engine is one of several: what tells, and that real servers are seen through."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.servers import GRANIAN, HYPERCORN, UVICORN, Flavour, Server, eventually
from wsbroadcast import ConnectionManager
from wsbroadcast.engines import worker_count
from wsbroadcast.engines.worker_count import Frame, sign_of_several_workers, warn_of_several_workers


def frame(module: str, **variables: Any) -> Frame:
    return module, variables


def uvicorn(number: int, reload: bool = False) -> Frame:
    config = SimpleNamespace(workers=number, reload=reload)
    return frame("uvicorn.server", self=SimpleNamespace(config=config))


GUNICORN_4 = frame("gunicorn.arbiter", self=SimpleNamespace(num_workers=4))
CHILD = ["uvicorn", "app:app"]


@pytest.mark.parametrize(
    ("frames", "sign"),
    [
        ([], ""),
        ([uvicorn(1)], ""),
        ([uvicorn(2)], "uvicorn runs 2 workers"),
        ([uvicorn(4, reload=True)], ""),  # reloading makes one of any number
        ([GUNICORN_4], "gunicorn runs 4 workers"),
        ([uvicorn(1), frame("gunicorn.arbiter", pid=1), GUNICORN_4], "gunicorn runs 4 workers"),
        ([frame("hypercorn.asyncio.run", config=SimpleNamespace(workers=3))], "hypercorn runs 3 workers"),
        ([frame("granian.server.common", self=SimpleNamespace(workers=2))], "granian runs 2 workers"),
        ([frame("uvicorn.server", self=SimpleNamespace(config=None))], ""),
        ([frame("gunicorn.arbiter", self=SimpleNamespace(num_workers="4"))], ""),
        ([frame("app", config=SimpleNamespace(workers=3))], ""),
    ],
)
def test_server_that_called_us_tells(frames: list[Frame], sign: str) -> None:
    assert sign_of_several_workers({}, ["app.py"], False, frames) == sign


@pytest.mark.parametrize("frames", [[uvicorn(1)], [uvicorn(4, reload=True)]])
def test_server_that_called_us_knows_best(frames: list[Frame]) -> None:
    assert sign_of_several_workers({"WEB_CONCURRENCY": "4"}, [*CHILD, "--workers", "4"], True, frames) == ""


@pytest.mark.parametrize(
    ("options", "number"),
    [
        (["--workers", "2"], 2),
        (["--workers=3"], 3),
        (["-w", "4"], 4),
        (["-w5"], 5),
        (["--workers", "4", "--workers", "6"], 6),
        (["--workers", "4", "--workers", "1"], 0),
        (["--workers", "many"], 0),
        (["--workers-lifetime", "60"], 0),
        (["--no-w", "4"], 0),
        ([], 0),
    ],
)
def test_command_line_of_the_parent_tells_in_a_child(options: list[str], number: int) -> None:
    sign = f"the command line asks for {number} workers" if number else ""
    assert sign_of_several_workers({}, [*CHILD, *options], True, []) == sign
    assert sign_of_several_workers({}, [*CHILD, *options], False, []) == ""


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 0),
        ({"WEB_CONCURRENCY": ""}, 0),
        ({"WEB_CONCURRENCY": "1"}, 0),
        ({"WEB_CONCURRENCY": "2"}, 2),
        ({"WEB_CONCURRENCY": "-2"}, 0),
        ({"WEB_CONCURRENCY": "all"}, 0),
    ],
)
def test_environment_tells(environ: Mapping[str, str], number: int) -> None:
    sign = f"WEB_CONCURRENCY asks for {number} workers" if number else ""
    assert sign_of_several_workers(environ, ["app.py"], False, []) == sign


def test_environment_of_granian_tells_in_its_children() -> None:
    environ = {"GRANIAN_WORKERS": "2"}
    assert sign_of_several_workers(environ, ["app.py"], True, []) == "GRANIAN_WORKERS asks for 2 workers"
    assert sign_of_several_workers(environ, ["app.py"], False, []) == ""


@pytest.mark.parametrize("variable", ["GRANIAN_WORKERS", "WEB_CONCURRENCY"])
def test_command_line_overrules_the_environment(variable: str) -> None:
    assert sign_of_several_workers({variable: "4"}, [*CHILD, "--workers", "1"], True, []) == ""


async def test_memory_engine_warns_once_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    async with ConnectionManager() as manager:
        await manager.broadcast("text")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("WEB_CONCURRENCY asks for 4 workers, and memory:// doesn't link them")
    assert "the URL of a broker, such as redis://localhost" in record.getMessage()


async def test_memory_engine_alone_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WEB_CONCURRENCY", raising=False)
    async with ConnectionManager():
        pass
    assert caplog.records == []


def test_own_stack_is_looked_at(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(worker_count._SERVERS, __name__, ("config", "workers", None))

    def run(config: SimpleNamespace) -> None:
        warn_of_several_workers()

    run(SimpleNamespace(workers=3))
    assert caplog.records[0].getMessage().startswith("tests runs 3 workers")


# Real servers.

APP = "tests.support.apps:lived"

GUNICORN = Flavour(
    "gunicorn",
    "gunicorn",
    ("--bind", "127.0.0.1:{port}", "--worker-class", "uvicorn_worker.UvicornWorker", "{app}"),
    requires=("uvicorn_worker",),
)


def with_options(flavour: Flavour, *options: str, **environment: str) -> Flavour:
    return replace(flavour, arguments=(*options, *flavour.arguments), environment=environment)


GRANIAN_ALONE = tuple(part for part in GRANIAN.arguments if part not in ("--workers", "1"))

TWO = [
    with_options(UVICORN, "--workers", "2"),
    replace(with_options(UVICORN, WEB_CONCURRENCY="2"), name="uvicorn, environment"),
    with_options(GUNICORN, "--workers", "2"),
    with_options(HYPERCORN, "--workers", "2"),
    replace(GRANIAN, arguments=(*GRANIAN_ALONE, "--workers", "2")),
    replace(GRANIAN, name="granian, environment", arguments=GRANIAN_ALONE, environment={"GRANIAN_WORKERS": "2"}),
]

# What the children of granian know it by from Python 3.14 on, where they are no forks.
SIGNS = {"granian": "the command line asks for", "granian, environment": "GRANIAN_WORKERS asks for"}

ONE = [
    replace(with_options(UVICORN, "--reload", WEB_CONCURRENCY="2"), name="uvicorn, reload"),
    replace(with_options(UVICORN, "--workers", "1", WEB_CONCURRENCY="2"), name="uvicorn, 1 worker"),
    with_options(GUNICORN, "--workers", "1", WEB_CONCURRENCY="2"),
]


def serve(flavour: Flavour, directory: Path) -> Server:
    if flavour.missing:
        pytest.skip(flavour.missing)
    home = {"HOME": str(directory)}  # where gunicorn leaves a socket
    return Server(replace(flavour, environment=flavour.environment | home), directory / "log", APP)


@pytest.mark.parametrize("flavour", TWO, ids=str)
async def test_each_of_two_workers_warns(flavour: Flavour, tmp_path: Path) -> None:
    sign = f"{flavour.package} runs"
    if sys.version_info >= (3, 14):
        sign = SIGNS.get(flavour.name, sign)
    with serve(flavour, tmp_path) as server:

        async def have_both_warned() -> bool:
            log = server.log()
            # granian never ends if it is told to while it starts a worker.
            is_up = flavour.package != "granian" or log.count("Started worker-") == 2
            return is_up and log.count(f"{sign} 2 workers, and memory:// doesn't link them") == 2

        await eventually(have_both_warned, timeout=15)


@pytest.mark.parametrize("flavour", ONE, ids=str)
def test_one_worker_says_nothing(flavour: Flavour, tmp_path: Path) -> None:
    with serve(flavour, tmp_path) as server:
        assert "memory://" not in server.log()
