# /// script
# requires-python = ">=3.11"
# dependencies = ["wsbroadcast[demo]"]
# ///
"""Clients choose their channels. A message to a user reaches all connections of that user.

Run it with `uvicorn 03_channels_and_users:app` in this directory, and connect with
`python -m websockets ws://127.0.0.1:8000/ws/eva`. Type `{"do": "join", "channel": "news"}`: the answer is
`{"channels":["lobby","news"]}`. Type `{"do": "tell", "user": "eva", "text": "psst"}`: eva gets
`{"from":"eva","text":"psst"}`. Type `{"do": "say", "channel": "news", "text": "hello"}`: everybody in `news` gets it.
"""

from typing import Annotated, Literal

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from wsbroadcast import Connection, ConnectionManager, InvalidChannel

manager = ConnectionManager()
app = FastAPI(lifespan=manager.lifespan)


class Join(BaseModel):
    do: Literal["join", "leave"]
    channel: str


class Say(BaseModel):
    do: Literal["say"]
    channel: str
    text: str


class Tell(BaseModel):
    do: Literal["tell"]
    user: str
    text: str


Command = TypeAdapter[Join | Say | Tell](Annotated[Join | Say | Tell, Field(discriminator="do")])


async def obey(connection: Connection, command: Join | Say | Tell) -> None:
    match command:
        case Join(do="join"):
            await connection.subscribe(command.channel)
            await connection.send({"channels": sorted(connection.channels)})
        case Join():
            await connection.unsubscribe(command.channel)
            await connection.send({"channels": sorted(connection.channels)})
        case Say():
            said = {"from": connection.user, "channel": command.channel, "text": command.text}
            await manager.broadcast(said, channel=command.channel)
        case Tell():
            await manager.broadcast({"from": connection.user, "text": command.text}, user=command.user)


@app.websocket("/ws/{user}")
async def endpoint(websocket: WebSocket, user: str) -> None:
    # Here the path says who the user is. In your app, a session or a token says it.
    connection = await manager.connect(websocket, user=user, channels=["lobby"])
    try:
        while True:
            text = await connection.receive_text()  # closes the connection of a client that sends bytes
            try:
                await obey(connection, Command.validate_json(text))
            except (ValidationError, InvalidChannel) as error:
                await connection.send({"error": str(error)})
    except WebSocketDisconnect:
        manager.disconnect(connection)


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
