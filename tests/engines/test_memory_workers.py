"""The warning that the memory engine is one of several: what tells, and that real servers are seen through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.servers import GRANIAN, HYPERCORN, UVICORN, Flavour, Server, eventually
from wsbroadcast import ConnectionManager
from wsbroadcast.engines.memory import sign_of_several_workers

CHILD = ["app.py"]
SERVERS = ["/usr/bin/uvicorn", "/lib/gunicorn/__main__.py", "C:\\Scripts\\granian.exe"]


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
def test_command_line_of_a_server_or_of_the_parent_tells(options: list[str], number: int) -> None:
    sign = f"the command line asks for {number} workers" if number else ""
    assert sign_of_several_workers({}, [*CHILD, *options], is_child=True) == sign
    for server in SERVERS:
        assert sign_of_several_workers({}, [server, "app:app", *options], is_child=False) == sign
    for program in ([], ["app.py"], ["/home/uvicorn/app.py"]):  # whose option may mean anything
        assert sign_of_several_workers({}, [*program, *options], is_child=False) == ""


def test_server_that_reloads_has_one_worker() -> None:
    argv = ["uvicorn", "app:app", "--workers", "4", "--reload"]
    assert sign_of_several_workers({"WEB_CONCURRENCY": "4"}, argv, is_child=True) == ""
    assert sign_of_several_workers({"WEB_CONCURRENCY": "4"}, argv, is_child=False) == ""


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
    assert sign_of_several_workers(environ, ["app.py"], is_child=False) == sign


def test_environment_of_granian_tells_in_its_children() -> None:
    environ = {"GRANIAN_WORKERS": "2"}
    assert sign_of_several_workers(environ, ["app.py"], is_child=True) == "GRANIAN_WORKERS asks for 2 workers"
    assert sign_of_several_workers(environ, ["app.py"], is_child=False) == ""


@pytest.mark.parametrize("variable", ["GRANIAN_WORKERS", "WEB_CONCURRENCY"])
def test_command_line_overrules_the_environment(variable: str) -> None:
    assert sign_of_several_workers({variable: "4"}, [*CHILD, "--workers", "1"], is_child=True) == ""


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


# A worker of granian's may miss that it is told to end right after its start; then granian kills it.
GRANIAN_ALONE = (
    *("--workers-kill-timeout", "2"),
    *(part for part in GRANIAN.arguments if part not in ("--workers", "1")),
)

OPTION, VARIABLE = "the command line", "WEB_CONCURRENCY"

# How two workers are asked for, and how that is known.
TWO = [
    (with_options(UVICORN, "--workers", "2"), OPTION),
    (with_options(UVICORN, WEB_CONCURRENCY="2"), VARIABLE),
    (with_options(GUNICORN, "--workers", "2"), OPTION),
    (with_options(GUNICORN, WEB_CONCURRENCY="2"), VARIABLE),
    (with_options(HYPERCORN, "--workers", "2"), OPTION),
    (replace(GRANIAN, arguments=(*GRANIAN_ALONE, "--workers", "2")), OPTION),
    (replace(GRANIAN, arguments=GRANIAN_ALONE, environment={"GRANIAN_WORKERS": "2"}), "GRANIAN_WORKERS"),
]

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


@pytest.mark.parametrize(("flavour", "sign"), TWO, ids=str)
async def test_each_of_two_workers_warns(flavour: Flavour, sign: str, tmp_path: Path) -> None:
    with serve(flavour, tmp_path) as server:

        async def have_both_warned() -> bool:
            log = server.log()
            # granian never ends if it is told to while it starts a worker.
            is_up = flavour.package != "granian" or log.count("Started worker-") == 2
            return is_up and log.count(f"{sign} asks for 2 workers, and memory:// doesn't link them") == 2

        await eventually(have_both_warned, timeout=60)


@pytest.mark.parametrize("flavour", ONE, ids=str)
def test_one_worker_says_nothing(flavour: Flavour, tmp_path: Path) -> None:
    with serve(flavour, tmp_path) as server:
        assert "memory://" not in server.log()
