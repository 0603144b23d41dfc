"""The app of a deploy whose clients speak the Centrifuge client protocol; see `deployed`."""

from __future__ import annotations

import json
import os

from fastapi import FastAPI

from tests.support.scaled import router
from wsbroadcast import ConnectionManager, History, create_centrifuge_router

manager = ConnectionManager(
    os.environ["WSBROADCAST_TEST_ENGINE"],
    history=History(messages=10_000, seconds=300),
    drain=json.loads(os.environ.get("WSBROADCAST_TEST_DRAIN", "5.0")),
)

app = FastAPI()
app.include_router(create_centrifuge_router(manager, "/ws/centrifuge", authorize=lambda *_: True))
app.include_router(router)
