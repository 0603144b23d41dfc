"""The example of a model's answers, with a route for its health: `uvicorn tests.support.answered:app`."""

from __future__ import annotations

import os

from fastapi import FastAPI

from tests.support.examples import EXAMPLES, load

app: FastAPI = load(EXAMPLES / "20_answers.py").app


@app.get("/health")
async def health() -> dict[str, str]:
    """Say which server answers."""
    return {"server": os.environ.get("WSBROADCAST_TEST_SERVER", "")}
