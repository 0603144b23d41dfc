"""No endpoint to write: `create_router`."""

from _serve import serve
from fastapi import FastAPI

from wsbroadcast import ConnectionManager, create_router

app = FastAPI()
manager = ConnectionManager()
app.include_router(create_router(manager, "/ws"))
app.include_router(create_router(manager, "/ws/{channel}"))

if __name__ == "__main__":
    serve(app)
