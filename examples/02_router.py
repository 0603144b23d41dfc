# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Channels without an endpoint to write: the router subscribes each connection to the channel in its URL.

Run it with `uvicorn 02_router:app` in this directory. Then, in two terminals,
`python -m websockets ws://127.0.0.1:8000/realtime/ws/news`; in a third one
`curl -X POST "http://127.0.0.1:8000/announce/news?text=hello"`.
"""

from fastapi import FastAPI

from wsbroadcast import ConnectionManager, ManagerDep, Stats, create_router

app = FastAPI()
app.include_router(create_router(ConnectionManager(), "/ws/{channel}"), prefix="/realtime")


@app.post("/announce/{channel}", status_code=204)
async def announce(channel: str, text: str, manager: ManagerDep) -> None:
    await manager.broadcast(text, channel=channel)


@app.get("/stats")
async def stats(manager: ManagerDep) -> Stats:
    return manager.stats()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
