# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Starlette without FastAPI: the endpoint of a router as routes, and the manager's lifespan.

Run it with `uvicorn 06_starlette:app` in this directory. Connect two clients with
`python -m websockets ws://127.0.0.1:8000/ws/tea`: what one types appears only at the other.
`curl -X POST "http://127.0.0.1:8000/announce/tea?text=hello"` reaches both.
"""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from wsbroadcast import ConnectionManager, create_routes

manager = ConnectionManager()


async def announce(request: Request) -> Response:
    await manager.broadcast(request.query_params["text"], channel=f"room:{request.path_params['room']}")
    return Response(status_code=204)


app = Starlette(
    routes=[
        *create_routes(manager, "/ws/{room}", channel="room:{room}", include_sender=False),
        Route("/announce/{room}", announce, methods=["POST"]),
    ],
    lifespan=manager.lifespan,
)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
