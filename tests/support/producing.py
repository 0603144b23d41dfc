"""A program that produces a stream until it is killed: `python -m tests.support.producing URL ID`."""

from __future__ import annotations

import asyncio
import sys

from wsbroadcast import ConnectionManager
from wsbroadcast.manager import core_of


async def main(url: str, id_: str) -> None:
    """Append a number every 10 ms."""
    manager = ConnectionManager(url)
    core_of(manager).use_streams()
    async with manager, manager.stream(id_, user="ann") as run:
        for number in range(1_000_000):
            run.append(f"{number} ")
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
