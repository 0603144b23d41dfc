"""No endpoint to write: `create_router`."""

from _serve import serve
from fastapi import FastAPI

from wsbroadcast import ConnectionManager, Limits, create_router

app = FastAPI()
# The load client pipelines thousands of messages a second, which the defaults take for an attack.
manager = ConnectionManager(limits=Limits(max_router_inbound_rate=None, max_inbound_bytes=None))
app.include_router(create_router(manager, "/ws"))
app.include_router(create_router(manager, "/ws/{channel}"))

if __name__ == "__main__":
    serve(app)
