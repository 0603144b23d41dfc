# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo,nats,postgres,redis]"]
# ///
"""Several workers, several machines: a broker's URL links them, and nothing else changes.

Run it with `BROKER_URL=redis://localhost uvicorn 09_scale_out:app --workers 4` in this directory, with the extra
`redis`; `nats://localhost` and `postgres://postgres@localhost` with theirs do as well. Then, in as many terminals as
you like, `python -m websockets ws://127.0.0.1:8000/ws/news`; and
`curl -X POST "http://127.0.0.1:8000/announce/news?text=hello"` reaches them all, whichever workers they are on. Stop
the broker, and see what `/health` says; start it again.
"""

import os

from fastapi import FastAPI, HTTPException, Response

from wsbroadcast import ConnectionManager, EngineUnavailable, Gap, Health, ManagerDep, create_router

manager = ConnectionManager(os.environ.get("BROKER_URL", "memory://"))
app = FastAPI()
app.include_router(create_router(manager, "/ws/{channel}", inbound="ignore"))  # clients listen, the server speaks


@manager.on_gap
async def tell_everybody_here(gap: Gap) -> None:
    """What was published meanwhile is lost, because nothing is kept here: pages had better load the present state."""
    await manager.broadcast_local({"missed_seconds": round(gap.seconds, 1)})


@app.post("/announce/{channel}", status_code=204)
async def announce(channel: str, text: str, manager: ManagerDep) -> None:
    try:
        await manager.broadcast(text, channel=channel)
    except EngineUnavailable as error:
        raise HTTPException(503, "the message was not sent, try again") from error


@app.get("/health")
async def health(manager: ManagerDep, response: Response) -> Health:
    """For a load balancer: 503 while messages don't travel between the workers."""
    health = await manager.health()
    if not health.is_ok:
        response.status_code = 503
    return health


if __name__ == "__main__":
    import uvicorn

    uvicorn.run("09_scale_out:app", workers=4)
