# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Two routers and no endpoint of your own: rooms in which clients talk, and news that they only read.

Run it with `uvicorn 02_router:app` in this directory. Connect two clients to a room with
`python -m websockets ws://127.0.0.1:8000/ws/rooms/tea`: what you type in one appears in both. Connect another one with
`python -m websockets ws://127.0.0.1:8000/ws/news`: it gets what
`curl -X POST "http://127.0.0.1:8000/announce?text=hello"` sends, and nobody can type there.
"""

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, ManagerDep, Stats, create_router

manager = ConnectionManager()
app = FastAPI()
# Clients of this router can only reach channels that begin with `room:`. Other channels of the app are safe.
app.include_router(create_router(manager, "/rooms/{room}", channel="room:{room}"), prefix="/ws")
app.include_router(create_router(manager, "/news", channel="news", inbound="ignore"), prefix="/ws")


@app.post("/announce", status_code=204)
async def announce(text: str, manager: ManagerDep) -> None:
    await manager.broadcast(text, channel="news")


@app.get("/stats")
async def stats(manager: ManagerDep) -> Stats:
    return manager.stats()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
