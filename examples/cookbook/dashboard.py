# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A live dashboard with hundreds of readings a second. A page that can't keep up gets the newest of each machine.

Run it with `uvicorn dashboard:app` in this directory, open http://localhost:8000 in two tabs, and freeze one of them.
"""

import asyncio
import random
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

from wsbroadcast import ConnectionManager, SlowConsumer, create_router

MACHINES = [f"web-{number}" for number in range(1, 9)]

# At most one reading of each machine waits for a slow page. A page that takes nothing for a minute is closed.
manager = ConnectionManager(slow_consumer=SlowConsumer(policy="conflate", send_timeout=60))
app = FastAPI()
app.include_router(create_router(manager, "/ws/{channel}", inbound="ignore"))
readings: dict[str, float] = {}


async def measured(machine: str, load: float) -> None:
    readings[machine] = load
    # A newer reading with the same key replaces one that still waits.
    await manager.broadcast({machine: load}, channel="load", key=machine)


@manager.background
async def simulate() -> None:  # stands for your machines
    loads = dict.fromkeys(MACHINES, 50.0)
    while True:
        for machine in MACHINES:
            loads[machine] = min(100.0, max(0.0, loads[machine] + random.uniform(-3, 3)))
            await measured(machine, round(loads[machine], 1))
        await asyncio.sleep(0.02)


@app.get("/readings")
async def load() -> dict[str, float]:
    return readings


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
