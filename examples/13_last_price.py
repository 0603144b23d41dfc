# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""A client gets the last price of each thing when it connects, and then every change.

Run it with `uvicorn 13_last_price:app` in this directory. Set a price with
`curl -X PUT "http://127.0.0.1:8000/prices/oil?price=70"`. Later, connect with
`python -m websockets "ws://127.0.0.1:8000/prices?name=oil&name=gold"`: the price of oil comes at once.
"""

from typing import Annotated, Literal

from fastapi import FastAPI, Query, WebSocket

from wsbroadcast import LAST, ConnectionManager, History, SlowConsumer

Name = Literal["oil", "gold", "tea"]

manager = ConnectionManager(
    history={"price:*": History(messages=1, seconds=86_400)},  # keeps the newest price of each thing
    slow_consumer=SlowConsumer(policy="conflate"),
)
app = FastAPI(lifespan=manager.lifespan)


@app.put("/prices/{name}", status_code=204)
async def quote(name: Name, price: float) -> None:
    await manager.broadcast({name: price}, channel=f"price:{name}", key=name)


@app.websocket("/prices")
async def follow(websocket: WebSocket, name: Annotated[list[Name], Query()]) -> None:
    channels = [f"price:{each}" for each in name]
    async with manager.connect(websocket, channels=channels, since=dict.fromkeys(channels, LAST)) as connection:
        await connection.wait_closed()


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
