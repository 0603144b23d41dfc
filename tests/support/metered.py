"""An app of several workers with `memory://`, each of which serves its metrics at a port of its own."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, start_http_server

from wsbroadcast import ConnectionManager, create_router
from wsbroadcast.telemetry.prometheus import StatsCollector

manager = ConnectionManager()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    registry = CollectorRegistry()
    registry.register(StatsCollector(manager))
    first = int(os.environ["METRICS_PORT"])
    for port in range(first, first + 16):
        try:
            server, _ = start_http_server(port, "127.0.0.1", registry)
            break
        except OSError:
            continue
    yield
    server.shutdown()


app = FastAPI(lifespan=lifespan)
app.include_router(create_router(manager, "/ws/{channel}"))


@app.get("/health")
async def health() -> dict[str, str]:
    """Say that it is up."""
    return {}
