# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""All nodes of an app on one page, in JSON and for Prometheus. Operators can close users and drain servers there.

Run it with `uvicorn 18_operations:app --workers 4` in this directory, connect some clients to `/ws/tea`, and log in at
http://localhost:8000/operations/ with any name and the password `sesame`. Any worker answers for all of them.
"""

import os
from secrets import compare_digest
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from wsbroadcast import ConnectionManager, create_operations_router, create_router

PASSWORD = os.environ.get("OPERATIONS_PASSWORD", "sesame")

manager = ConnectionManager(os.environ.get("BROKER_URL", "sqlite:///operations.db"))


async def only_operators(login: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> None:
    if not compare_digest(login.password.encode(), PASSWORD.encode()):
        raise HTTPException(401, "not an operator", {"WWW-Authenticate": "Basic"})


app = FastAPI()
app.include_router(create_router(manager, "/ws/{channel}"))
app.include_router(create_operations_router(manager, dependencies=[Depends(only_operators)]))


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
