# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo,nats,postgres,redis]"]
# ///
"""Several workers on several machines. The URL of a broker links them, and nothing else changes.

Run it with `BROKER_URL=redis://localhost uvicorn 09_scale_out:app --workers 4` in this directory, after
`pip install "wsbroadcast[redis]"`. `nats://localhost` and `postgres://postgres@localhost` work as well, with their
extras. Connect several clients with `python -m websockets ws://127.0.0.1:8000/ws/news`.
`curl -X POST "http://127.0.0.1:8000/announce/news?text=hello"` reaches all of them, on all workers. Stop the broker:
http://127.0.0.1:8000/health says so. Start it again: the workers reconnect.
"""

import os

from fastapi import FastAPI, HTTPException, Response

from wsbroadcast import ConnectionManager, EngineUnavailable, Gap, Health, ManagerDep, create_router

manager = ConnectionManager(os.environ.get("BROKER_URL", "memory://"))
app = FastAPI()
app.include_router(create_router(manager, "/ws/{channel}", inbound="ignore"))  # clients only listen


@manager.on_gap
async def tell_everybody_here(gap: Gap) -> None:
    """Messages of the outage are lost, because there is no history here. Pages should load the current state."""
    await manager.broadcast_local({"missed_seconds": round(gap.seconds, 1)})


@app.post("/announce/{channel}", status_code=204)
async def announce(channel: str, text: str, manager: ManagerDep) -> None:
    try:
        await manager.broadcast(text, channel=channel)
    except EngineUnavailable as error:
        raise HTTPException(503, "the message was not sent, try again") from error


@app.get("/health")
async def health(manager: ManagerDep, response: Response) -> Health:
    """Tells a load balancer by 503 that messages don't reach the other workers now."""
    health = await manager.health()
    if not health.is_ok:
        response.status_code = 503
    return health


if __name__ == "__main__":
    import uvicorn

    uvicorn.run("09_scale_out:app", workers=4)
