# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A forwarder posts each message of a channel to another service, and misses none over a restart.

Run it with `WEBHOOK_URL=http://127.0.0.1:9000 uvicorn 14_webhooks:app` in this directory, and a service that takes a
POST at that address. `curl -X POST "http://127.0.0.1:8000/orders?item=tea"` makes an order, which arrives there. Stop
the service, order again, restart the app, and start the service again: that order arrives, too.

The file `webhooks.position` says how far the forwarder is. The orders are in `webhooks.db`, or at the broker that
`BROKER_URL` names. Each order is posted at least once. If it is posted twice, it has the same `Idempotency-Key`. With
several workers, only one may forward.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, History, Lagged, Position, Publication

DAY = 86_400
POSITION = Path("webhooks.position")
WEBHOOK_URL = os.environ.get("WEBHOOK_URL", "http://127.0.0.1:9000")

logger = logging.getLogger("webhooks")
manager = ConnectionManager(
    os.environ.get("BROKER_URL", "sqlite:///webhooks.db"),
    history={"orders": History(messages=10_000, seconds=7 * DAY, remember=30 * DAY)},
)


def saved() -> str | None:
    return POSITION.read_text() if POSITION.exists() else None


def save(position: Position | None) -> None:
    new = POSITION.with_suffix(".new")
    new.write_text(str(position))
    new.replace(POSITION)  # after a crash, the old file or the new one is there


async def forward() -> None:
    page = await manager.history("orders", since=saved())  # at the first start, everything that is kept
    if not page.is_complete:
        logger.error("some orders are no longer kept, and were perhaps not posted")
    for order in page.messages:
        await post(order)
        save(order.position)
    async with manager.listen("orders", since=page.position) as orders:
        if not orders.recovered["orders"].recovered:
            logger.error("some orders were not posted: %s", orders.recovered["orders"].reason)
        while True:
            try:
                order = await anext(orders)
            except StopAsyncIteration:
                return
            except Lagged as lagged:
                logger.error("some orders were not posted: %s", lagged)
                continue
            await post(order)
            save(order.position)  # after the post, so that each order is posted at least once


async def post(order: Publication) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(order.position)}
    request = Request(WEBHOOK_URL, json.dumps(order.data).encode(), headers)
    wait = 0.1
    while True:
        try:
            await asyncio.to_thread(lambda: urlopen(request, timeout=10).close())
            return
        except OSError as error:  # the service can't be reached, or its answer is an error
            logger.warning("try again in %s s: %s", wait, error)
        await asyncio.sleep(wait)
        wait = min(2 * wait, 60.0)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with manager:
        forwarding = asyncio.create_task(forward())
        yield
        forwarding.cancel()
        await asyncio.wait([forwarding])


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=204)
async def order(item: str) -> None:
    await manager.broadcast({"item": item}, channel="orders")


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
