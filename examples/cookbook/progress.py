# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]", "celery"]
# ///
"""A progress bar for a job that a Celery worker does in another process.

Run it with `uvicorn progress:app` and, in a second terminal, `celery -A progress:tasks worker`, both in this directory.
Open http://localhost:8000, start a job, and reload the page in the middle.
"""

import os
import time
from pathlib import Path
from secrets import token_urlsafe

from celery import Celery
from fastapi import FastAPI
from fastapi.responses import FileResponse

from wsbroadcast import ConnectionManager, History, Page, Publisher, create_router

STEPS = 40
ENGINE = os.environ.get("BROKER_URL", "sqlite:///progress.db")  # links the app and the worker

# Celery's queue. Here it is a directory, so that no broker has to be installed. Yours is redis://… or amqp://….
QUEUE = os.environ.get("CELERY_BROKER_URL", "filesystem://localhost")
tasks = Celery("progress", broker=QUEUE)
if QUEUE == "filesystem://localhost":
    Path("queue").mkdir(exist_ok=True)
    tasks.conf.broker_transport_options = {
        "data_folder_in": "queue",
        "data_folder_out": "queue",
        "control_folder": "queue",
        "polling_interval": 0.2,
    }

# The worker uses this. It connects at its first message.
publisher = Publisher(ENGINE)


@tasks.task(name="build_report", ignore_result=True)
def build_report(job: str) -> None:
    channel = f"job:{job}"
    try:
        for done in range(1, STEPS + 1):
            time.sleep(0.1)  # stands for the work
            publisher.broadcast_threadsafe({"done": done, "of": STEPS}, channel=channel)
    except Exception:
        publisher.broadcast_threadsafe({"error": "it failed"}, channel=channel)
        raise  # so that Celery knows it, too


# The app uses this. The newest message of a job is kept for an hour, for pages that are opened later.
manager = ConnectionManager(ENGINE, history={"job:*": History(messages=1, seconds=3600)})
app = FastAPI()
app.include_router(create_router(manager, "/ws/{job}", channel="job:{job}", inbound="ignore"))


@app.post("/jobs")
async def begin() -> str:
    job = token_urlsafe(12)  # nobody can guess it
    await manager.broadcast({"done": 0, "of": STEPS}, channel=f"job:{job}")
    build_report.delay(job)
    return job


@app.get("/jobs/{job}")
async def newest(job: str) -> Page:
    return await manager.history(f"job:{job}")


@app.get("/")
async def page() -> FileResponse:
    return FileResponse(Path(__file__).with_suffix(".html"))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
