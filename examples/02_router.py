# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Channels without an endpoint to write: rooms in which clients talk, and news to which they only listen.

Run it with `uvicorn 02_router:app` in this directory. Then, in two terminals,
`python -m websockets ws://127.0.0.1:8000/ws/rooms/tea`, and type something; or
`python -m websockets ws://127.0.0.1:8000/ws/news`, and in a third one
`curl -X POST "http://127.0.0.1:8000/announce?text=hello"`.
"""

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, ManagerDep, Stats, create_router

manager = ConnectionManager()
app = FastAPI()
# The pattern keeps clients to channels that begin with `room:`; what else the app calls its channels is safe from them.
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
