from __future__ import annotations

import asyncio

import pytest

from wsbroadcast.concurrency.tasks import Tasks


async def test_task_has_a_name_and_is_counted_until_it_ends() -> None:
    tasks = Tasks()
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    task = tasks.spawn(work(), "work")
    assert task.get_name() == "wsbroadcast work"
    assert len(tasks) == 1
    may_end.set()
    await tasks.join()
    assert task.done()
    assert len(tasks) == 0


async def test_join_without_tasks_returns() -> None:
    await Tasks().join()


async def test_join_waits_for_what_tasks_start_themselves() -> None:
    tasks = Tasks()
    finished: list[int] = []

    async def work(left: int) -> None:
        await asyncio.sleep(0)
        if left:
            tasks.spawn(work(left - 1), "more work")
        finished.append(left)

    tasks.spawn(work(5), "work")
    await tasks.join()
    assert finished == [5, 4, 3, 2, 1, 0]


async def test_join_from_within_a_task_does_not_wait_for_itself() -> None:
    tasks = Tasks()
    may_end = asyncio.Event()
    order: list[str] = []

    async def work() -> None:
        await may_end.wait()
        order.append("work")

    async def end() -> None:
        may_end.set()
        await tasks.join()
        order.append("end")

    tasks.spawn(work(), "work")
    async with asyncio.timeout(5):
        await tasks.spawn(end(), "end")
    assert order == ["work", "end"]


async def test_error_of_a_task_is_logged_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()

    async def work() -> None:
        raise KeyError("lost")

    tasks.spawn(work(), "work")
    await tasks.join()
    assert "wsbroadcast work failed" in caplog.text
    assert "KeyError: 'lost'" in caplog.text
    assert len(tasks) == 0


async def test_cancelled_task_is_forgotten_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    task = tasks.spawn(_forever(), "work")
    task.cancel()
    await tasks.join()
    assert len(tasks) == 0
    assert not [record for record in caplog.records if record.name == "wsbroadcast"]


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()
