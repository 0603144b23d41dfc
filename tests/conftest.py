"""The rules for every test: the event loop it runs in, and that it leaves none of the library's tasks behind."""

from __future__ import annotations

import asyncio
import faulthandler
import io
import os
import sys
from collections.abc import AsyncIterator, Callable, Generator, Mapping

import pytest
from hypothesis import settings

from tests.support.fixtures import *  # noqa: F403
from wsbroadcast import ConnectionManager

# A busy machine is no failure.
settings.register_profile("wsbroadcast", deadline=None)
settings.load_profile("wsbroadcast")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

_loop = pytest.StashKey[asyncio.AbstractEventLoop]()
_has_hung = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    # pytest-asyncio sets a loop's debug mode itself and would overrule the environment.
    if os.environ.get("PYTHONASYNCIODEBUG"):
        config.option.asyncio_debug = True
    if os.environ.get("WSBROADCAST_TEST_FULL") and config.option.timeout is None:
        config.option.timeout = 7200


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run in one process more than there are cores, because tests mostly wait: for brokers, browsers and timeouts."""
    return (os.cpu_count() or 1) + 1


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    """Run the suite in asyncio's own loop, in uvloop's, or with tasks that start at once; see CONTRIBUTING.md."""
    name = os.environ.get("WSBROADCAST_TEST_LOOP", "asyncio")
    if name == "uvloop":
        import uvloop

        return {name: uvloop.new_event_loop}
    if name == "eager":
        return {name: _eager_loop}
    if name != "asyncio":
        raise pytest.UsageError(f"WSBROADCAST_TEST_LOOP must be asyncio, uvloop or eager, not {name!r}")
    return {name: asyncio.new_event_loop}


def _eager_loop() -> asyncio.AbstractEventLoop:
    if sys.version_info < (3, 12):
        raise pytest.UsageError("tasks start eagerly from Python 3.12 on")
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what each task waits for in a test that has hung."""
    report = yield
    if call.when == "call" and call.excinfo is not None and call.excinfo.errisinstance(pytest.fail.Exception):
        item.stash[_has_hung] = True
        if _loop in item.stash:
            stacks = io.StringIO()
            for task in asyncio.all_tasks(item.stash[_loop]):
                task.print_stack(file=stacks)
            report.sections.append(("Tasks that still ran", stacks.getvalue()))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """End the process if a test that has hung can't be ended, because a thread of it still waits."""
    if item.stash.get(_has_hung, False):
        faulthandler.dump_traceback_later(60, exit=True, file=2)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
async def no_task_is_left(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fail a test if one of the library's tasks still runs after it. Tasks that are ending get a second for it."""
    request.node.stash[_loop] = asyncio.get_running_loop()
    yield
    tasks = {task for task in asyncio.all_tasks() if task.get_name().startswith("wsbroadcast ")}
    if tasks:
        _, left = await asyncio.wait(tasks, timeout=1)
        assert not left, f"left behind: {sorted(task.get_name() for task in left)}"


@pytest.fixture
async def manager() -> AsyncIterator[ConnectionManager]:
    async with ConnectionManager() as manager:
        yield manager
