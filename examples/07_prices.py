# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Prices: a connection that can't keep up gets only the newest price of each thing, and isn't closed.

Run it with `uvicorn 07_prices:app` in this directory, and connect with
`python -m websockets ws://127.0.0.1:8000/prices/oil`. You get ten prices a second. The counters are at
http://127.0.0.1:8000/stats.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, ManagerDep, SlowConsumer, Stats, create_router

manager = ConnectionManager(slow_consumer=SlowConsumer(policy="conflate", max_backlog_messages=64, send_timeout=5.0))


async def quote() -> None:
    prices = {"oil": 70.0, "gold": 4000.0}
    while True:
        await asyncio.sleep(0.1)
        for name in prices:
            prices[name] *= random.uniform(0.999, 1.001)
            await manager.broadcast({name: round(prices[name], 2)}, channel=name, key=name)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with manager:  # the router would also start it, but stop it while `quote` still runs
        quoting = asyncio.create_task(quote())
        yield
        quoting.cancel()
        await asyncio.wait([quoting])


app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/prices/{channel}", inbound="ignore"))


@app.get("/stats")
async def stats(manager: ManagerDep) -> Stats:
    return manager.stats()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
