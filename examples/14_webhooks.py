# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A forwarder: what is broadcast to a channel is posted to another service, which misses nothing over a restart.

Run it with `WEBHOOK_URL=http://127.0.0.1:9000 uvicorn 14_webhooks:app` in this directory, and something that takes a
POST at that address. Then `curl -X POST "http://127.0.0.1:8000/orders?item=tea"`. Stop either of the two, and start it
again. Where it is stands in the file `webhooks.position`; what is to be posted is in `webhooks.db`, or at the broker
that `BROKER_URL` names. Each order is posted at least once; its `Idempotency-Key` tells the other side when it is the
second time. Of several workers one has to forward.
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
    new.replace(POSITION)  # a crash leaves the old one or the new one, nothing in between


async def forward() -> None:
    page = await manager.history("orders", since=saved())  # all that is kept, the first time
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
            save(order.position)  # after the post: at least once


async def post(order: Publication) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(order.position)}
    request = Request(WEBHOOK_URL, json.dumps(order.data).encode(), headers)
    wait = 0.1
    while True:
        try:
            await asyncio.to_thread(lambda: urlopen(request, timeout=10).close())
            return
        except OSError as error:  # out of reach, or a status that is an error
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
