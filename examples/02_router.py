# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Channels without an endpoint to write: the router subscribes each connection to the channel that its URL makes.

Whoever connects writes that URL. So the pattern makes `room:lobby` of `/ws/lobby`: clients talk in rooms, and no URL of
theirs leads to a channel of the app's own, such as `admins`.

Run it with `uvicorn 02_router:app` in this directory. Then, in two terminals,
`python -m websockets ws://127.0.0.1:8000/realtime/ws/lobby`; in a third one
`curl -X POST "http://127.0.0.1:8000/announce/lobby?text=hello"`.
"""

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, ManagerDep, Stats, create_router

app = FastAPI()
app.include_router(create_router(ConnectionManager(), "/ws/{room}", channel="room:{room}"), prefix="/realtime")


@app.post("/announce/{room}", status_code=204)
async def announce(room: str, text: str, manager: ManagerDep) -> None:
    await manager.broadcast(text, channel=f"room:{room}")


@app.get("/stats")
async def stats(manager: ManagerDep) -> Stats:
    return manager.stats()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
